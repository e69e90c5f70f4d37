//! Expected and actual results of each record of a slice, as hashes. Pure.

use std::fmt;

use crate::domain::record::{Offset, Partition};
use crate::domain::wire::Reason;
use crate::kafka::scan::ScanRange;

/// Position of a record.
pub type Place = (Partition, Offset);

/// Status of a record by the log and the claims.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// It violates a rule.
    Refused(Reason),
    /// It claimed its message id itself.
    Own,
    /// Another record with the same payload has claimed the id.
    Same,
    /// Another record with another payload has claimed the id.
    Other,
    /// The id is not claimed.
    Nobody,
}

/// Special circumstances of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Notes {
    /// An operator skipped it.
    pub is_given_up: bool,
    /// Its offset was used before by a record that the log has lost.
    pub is_rewound: bool,
    /// It is so old that its claim may have been pruned.
    pub is_prunable: bool,
    /// Its month may have been detached from the payment tables.
    pub is_archived: bool,
    /// Its own claim does not match the record.
    pub is_claim_wrong: bool,
    /// A later record of its own partition has claimed its id.
    pub is_owned_later: bool,
    /// A row of another record has its id, though the id is not claimed.
    pub is_elsewhere: bool,
}

/// A row or an output of a record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Part {
    /// Row of `payment_metadata`.
    Metadata,
    /// Row of `payment_core`.
    Core,
    /// Row of `payment_notes`.
    Notes,
    /// Read event.
    Read,
    /// E-mail event.
    Email,
    /// Dead letter.
    DeadLetter,
}

impl Part {
    /// The rows.
    pub const ROWS: [Self; 3] = [Self::Metadata, Self::Core, Self::Notes];
    /// The outputs.
    pub const OUTPUTS: [Self; 3] = [Self::Read, Self::Email, Self::DeadLetter];

    /// The indefinite article of its name.
    pub fn article(self) -> &'static str {
        if self == Self::Email { "an" } else { "a" }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Metadata => "row in payment_metadata",
            Self::Core => "row in payment_core",
            Self::Notes => "row in payment_notes",
            Self::Read => "read event",
            Self::Email => "e-mail event",
            Self::DeadLetter => "dead letter",
        })
    }
}

/// A value for each part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Each<T> {
    /// Of the row of `payment_metadata`.
    pub metadata: T,
    /// Of the row of `payment_core`.
    pub core: T,
    /// Of the row of `payment_notes`.
    pub notes: T,
    /// Of the read event.
    pub read: T,
    /// Of the e-mail event.
    pub email: T,
    /// Of the dead letter.
    pub letter: T,
}

impl<T: Copy> Each<T> {
    /// The value of this part.
    pub fn of(mut self, part: Part) -> T {
        *self.of_mut(part)
    }

    fn of_mut(&mut self, part: Part) -> &mut T {
        match part {
            Part::Metadata => &mut self.metadata,
            Part::Core => &mut self.core,
            Part::Notes => &mut self.notes,
            Part::Read => &mut self.read,
            Part::Email => &mut self.email,
            Part::DeadLetter => &mut self.letter,
        }
    }
}

/// Hashes by [`hash`](super::hash); 0 means none. Of outputs, they cover key and value.
pub type Hashes = Each<u32>;

/// Number of occurrences, and whether any of them differs from the expected one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Number of occurrences; saturates.
    pub count: u8,
    /// Whether at least one differs.
    pub differs: bool,
}

/// A record of the slice.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Position of the record.
    pub place: Place,
    /// Hash of the key by Java's partitioner; `None` without a key, which can be in any output partition.
    pub key: Option<u32>,
    /// Timestamp, in seconds; 0 if it has none, or one that seconds of 32 bits cannot tell.
    pub second: u32,
    /// Status by log and claims.
    pub claim: Claim,
    /// Special circumstances.
    pub circumstances: Notes,
    /// Expected rows and outputs, for both outcomes: written and dead-lettered.
    pub expected: Hashes,
    /// Actual rows and outputs; rows are counted in the join with `payment_metadata`.
    pub found: Each<Seen>,
    /// Reason of the last dead letter.
    pub reason: Option<Reason>,
    /// Amount in millionths; 0 if the record is not a payment.
    pub amount: i128,
    /// ISO 4217 code.
    pub currency: [u8; 3],
}

/// Memory per record, in bytes.
pub const ENTRY_BYTES: usize = size_of::<Entry>();

impl Entry {
    /// Creates a record without any findings.
    pub fn new(place: Place, claim: Claim, circumstances: Notes, expected: Hashes) -> Self {
        let found = Each::default();
        Self {
            place,
            key: None,
            second: 0,
            claim,
            circumstances,
            expected,
            found,
            reason: None,
            amount: 0,
            currency: [0; 3],
        }
    }

    /// Whether it has a row.
    pub fn has_row(&self) -> bool {
        self.found.metadata.count > 0
    }
}

/// Where the source of a row or an output is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placed {
    /// Not in this slice.
    Outside,
    /// In this slice, but the log has no record at that offset.
    Nowhere,
    /// A record that the log has lost and whose offset was used again.
    Former,
    /// A record of this slice.
    Here,
}

/// Records of a slice.
pub struct Table {
    ranges: Vec<ScanRange>,
    entries: Vec<Entry>,
}

impl Table {
    /// Creates a table for these ranges.
    pub fn new(ranges: &[ScanRange]) -> Self {
        let offsets: i64 = ranges.iter().map(|range| range.to.0.saturating_sub(range.from.0)).sum();
        // Reserve exactly: the memory limit is computed from offsets, and a doubling vector would exceed it.
        let entries = Vec::with_capacity(usize::try_from(offsets).unwrap_or_default());
        Self { ranges: ranges.to_vec(), entries }
    }

    /// The ranges of the slice.
    pub fn ranges(&self) -> &[ScanRange] {
        &self.ranges
    }

    /// Adds a record; call [`sort`](Self::sort) after the last one.
    pub fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Sorts the records, so that they can be found.
    pub fn sort(&mut self) {
        self.entries.sort_unstable_by_key(|entry| entry.place);
    }

    /// All records, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The record at this position.
    pub fn entry(&mut self, place: Place) -> Option<&mut Entry> {
        let at = self.entries.binary_search_by_key(&place, |entry| entry.place).ok()?;
        self.entries.get_mut(at)
    }

    /// Counts a row of `payment_metadata` and the rows joined to it, or an output and the reason of a dead
    /// letter. Hashes of 0 are not counted; the first one tells whether it belongs to a lost record.
    pub fn note(&mut self, place: Place, hashes: &[(Part, u32)], reason: Option<Reason>) -> Placed {
        let Some(entry) = self.entry(place) else {
            let is_inside = self.ranges.iter().any(|range| range.contains(place.0, place.1));
            return if is_inside { Placed::Nowhere } else { Placed::Outside };
        };
        let expected = entry.expected;
        if entry.circumstances.is_rewound
            && hashes.first().is_some_and(|(part, hash)| *hash != expected.of(*part))
        {
            return Placed::Former;
        }
        for (part, hash) in hashes.iter().filter(|(_, hash)| *hash != 0) {
            let seen = entry.found.of_mut(*part);
            seen.count = seen.count.saturating_add(1);
            seen.differs |= *hash != expected.of(*part);
        }
        entry.reason = reason.or(entry.reason);
        Placed::Here
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::NextOffset;

    #[test]
    fn a_record_is_found_again_whatever_gaps_the_log_has() {
        let range = |partition, from, to| ScanRange {
            partition: Partition(partition),
            from: NextOffset(from),
            to: NextOffset(to),
        };
        let mut table = Table::new(&[range(1, 100, 110), range(4, 0, 3)]);
        for offset in [105, 101] {
            let place = (Partition(1), Offset(offset));
            let expected = Hashes { read: 7, ..Hashes::default() };
            table.push(Entry::new(place, Claim::Own, Notes::default(), expected));
        }
        table.sort();
        let mut note = |partition, offset, hash| {
            table.note((Partition(partition), Offset(offset)), &[(Part::Read, hash)], None)
        };
        assert_eq!(note(1, 99, 7), Placed::Outside);
        assert_eq!(note(1, 110, 7), Placed::Outside);
        assert_eq!(note(2, 101, 7), Placed::Outside);
        assert_eq!(note(1, 100, 7), Placed::Nowhere);
        assert_eq!(note(4, 0, 7), Placed::Nowhere);
        assert_eq!(note(1, 105, 7), Placed::Here);
        assert_eq!(note(1, 105, 8), Placed::Here);
        let found: Vec<_> =
            table.entries().iter().map(|e| (e.place.0.0, e.place.1.0, e.found.read)).collect();
        let twice = Seen { count: 2, differs: true };
        assert_eq!(found, [(1, 101, Seen::default()), (1, 105, twice)]);
    }
}
