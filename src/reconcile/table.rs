//! Expected and actual results of each record of a slice, as hashes. Pure.

use crate::domain::publication::OutputTopic;
use crate::domain::record::{Offset, Partition};
use crate::domain::wire::Reason;
use crate::kafka::scan::ScanRange;

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

/// Hashes of the expected rows and outputs, for both outcomes: written and dead-lettered. 0 means none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hashes {
    /// Row of `payment_metadata`.
    pub metadata: u32,
    /// Row of `payment_core`.
    pub core: u32,
    /// Row of `payment_notes`.
    pub notes: u32,
    /// Key and value of the read event.
    pub read: u32,
    /// Key and value of the e-mail event.
    pub email: u32,
    /// Key and value of the dead letter.
    pub letter: u32,
}

impl Hashes {
    fn of_output(&self, topic: OutputTopic) -> u32 {
        match topic {
            OutputTopic::Read => self.read,
            OutputTopic::Email => self.email,
            OutputTopic::DeadLetter => self.letter,
        }
    }
}

/// Number of occurrences, and whether any of them differs from the expected one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Number of occurrences; saturates.
    pub count: u8,
    /// Whether at least one differs.
    pub differs: bool,
}

impl Seen {
    fn note(&mut self, is_same: bool) {
        self.count = self.count.saturating_add(1);
        self.differs |= !is_same;
    }
}

/// Rows and outputs found for a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Found {
    /// Joined rows, counted by `payment_metadata`.
    pub metadata: Seen,
    /// Joined rows with a row of `payment_core`.
    pub core: Seen,
    /// Joined rows with a row of `payment_notes`.
    pub notes: Seen,
    /// Outputs by [`OutputTopic::index`].
    pub outputs: [Seen; 3],
    /// Reason of the last dead letter.
    pub reason: Option<Reason>,
}

impl Found {
    /// Outputs found in this topic.
    pub fn output(&self, topic: OutputTopic) -> Seen {
        self.outputs.get(topic.index()).copied().unwrap_or_default()
    }

    /// Whether nothing was found.
    pub fn is_nothing(&self) -> bool {
        self.metadata.count == 0 && self.outputs.iter().all(|seen| seen.count == 0)
    }
}

/// A record of the slice.
#[derive(Clone, Debug)]
pub struct Entry {
    delta: u32,
    /// Hash of the key by Java's partitioner; `None` without a key, which can be in any output partition.
    pub key: Option<u32>,
    /// Status by log and claims.
    pub claim: Claim,
    /// Special circumstances.
    pub circumstances: Notes,
    /// Expected rows and outputs.
    pub expected: Hashes,
    /// Actual rows and outputs.
    pub found: Found,
    /// Amount in ten-thousandths; 0 if the record is not a payment.
    pub amount: u64,
    /// ISO 4217 code.
    pub currency: [u8; 3],
}

/// Memory per record, in bytes.
pub const ENTRY_BYTES: usize = size_of::<Entry>();

impl Entry {
    /// Creates a record without any findings.
    pub fn new(claim: Claim, circumstances: Notes, expected: Hashes) -> Self {
        let found = Found::default();
        Self { delta: 0, key: None, claim, circumstances, expected, found, amount: 0, currency: [0; 3] }
    }
}

/// Hashes of a row of `payment_metadata` and the rows joined to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowSeen {
    /// Hash of the row of `payment_metadata`.
    pub metadata: u32,
    /// Hash of the row of `payment_core`.
    pub core: Option<u32>,
    /// Hash of the row of `payment_notes`.
    pub notes: Option<u32>,
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

struct Share {
    range: ScanRange,
    entries: Vec<Entry>,
}

/// Records of a slice.
pub struct Table {
    shares: Vec<Share>,
}

enum Place<'t> {
    Outside,
    Nowhere,
    Here(&'t mut Entry),
}

impl Table {
    /// Creates a table for ranges sorted by partition, one range per partition.
    pub fn new(ranges: &[ScanRange]) -> Self {
        Self { shares: ranges.iter().map(|range| Share { range: *range, entries: Vec::new() }).collect() }
    }

    fn share(&mut self, partition: Partition) -> Option<&mut Share> {
        let at = self.shares.binary_search_by_key(&partition, |share| share.range.partition).ok()?;
        self.shares.get_mut(at)
    }

    /// Adds a record; within a partition, records must be added in offset order.
    pub fn push(&mut self, partition: Partition, offset: Offset, mut entry: Entry) {
        let Some(share) = self.share(partition) else { return };
        let Ok(delta) = u32::try_from(offset.0.saturating_sub(share.range.from.0)) else { return };
        if share.entries.is_empty() {
            let room = share.range.to.0.saturating_sub(share.range.from.0);
            // Reserve exactly: the memory limit is computed from offsets, and a doubling vector would exceed
            // it.
            share.entries.reserve_exact(usize::try_from(room).unwrap_or_default());
        }
        entry.delta = delta;
        share.entries.push(entry);
    }

    fn place(&mut self, partition: Partition, offset: Offset) -> Place<'_> {
        let Some(share) = self.share(partition) else { return Place::Outside };
        if share.range.from.is_past(offset) || !share.range.to.is_past(offset) {
            return Place::Outside;
        }
        let delta = offset.0.saturating_sub(share.range.from.0);
        let at = share.entries.binary_search_by_key(&delta, |entry| i64::from(entry.delta));
        match at.ok().and_then(|at| share.entries.get_mut(at)) {
            Some(entry) => Place::Here(entry),
            None => Place::Nowhere,
        }
    }

    /// The record at this position.
    pub fn entry(&mut self, partition: Partition, offset: Offset) -> Option<&mut Entry> {
        match self.place(partition, offset) {
            Place::Here(entry) => Some(entry),
            Place::Outside | Place::Nowhere => None,
        }
    }

    /// Counts a row of `payment_metadata` with the rows joined to it.
    pub fn note_row(&mut self, partition: Partition, offset: Offset, row: RowSeen) -> Placed {
        let entry = match self.place(partition, offset) {
            Place::Outside => return Placed::Outside,
            Place::Nowhere => return Placed::Nowhere,
            Place::Here(entry) => entry,
        };
        let expected = &entry.expected;
        if entry.circumstances.is_rewound && row.metadata != expected.metadata {
            return Placed::Former;
        }
        let found = &mut entry.found;
        found.metadata.note(row.metadata == expected.metadata);
        if let Some(core) = row.core {
            found.core.note(core == expected.core);
        }
        if let Some(notes) = row.notes {
            found.notes.note(notes == expected.notes);
        }
        Placed::Here
    }

    /// Counts an output.
    pub fn note_output(
        &mut self,
        partition: Partition,
        offset: Offset,
        topic: OutputTopic,
        hash: u32,
        reason: Option<Reason>,
    ) -> Placed {
        let entry = match self.place(partition, offset) {
            Place::Outside => return Placed::Outside,
            Place::Nowhere => return Placed::Nowhere,
            Place::Here(entry) => entry,
        };
        let is_same = hash == entry.expected.of_output(topic);
        if entry.circumstances.is_rewound && !is_same {
            return Placed::Former;
        }
        if let Some(seen) = entry.found.outputs.get_mut(topic.index()) {
            seen.note(is_same);
        }
        entry.found.reason = reason.or(entry.found.reason);
        Placed::Here
    }

    /// All records, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Partition, Offset, &Entry)> {
        self.shares.iter().flat_map(|share| {
            let from = share.range.from.0;
            let at = move |e: &Entry| Offset(from.saturating_add(i64::from(e.delta)));
            share.entries.iter().map(move |entry| (share.range.partition, at(entry), entry))
        })
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
        for offset in [101, 105] {
            let entry = Entry::new(Claim::Own, Notes::default(), Hashes { read: 7, ..Hashes::default() });
            table.push(Partition(1), Offset(offset), entry);
        }
        let mut note = |partition, offset, hash| {
            table.note_output(Partition(partition), Offset(offset), OutputTopic::Read, hash, None)
        };
        assert_eq!(note(1, 99, 7), Placed::Outside);
        assert_eq!(note(1, 110, 7), Placed::Outside);
        assert_eq!(note(2, 101, 7), Placed::Outside);
        assert_eq!(note(1, 100, 7), Placed::Nowhere);
        assert_eq!(note(4, 0, 7), Placed::Nowhere);
        assert_eq!(note(1, 105, 7), Placed::Here);
        assert_eq!(note(1, 105, 8), Placed::Here);
        let found: Vec<_> = table.iter().map(|(p, o, e)| (p.0, o.0, e.found.outputs[0])).collect();
        let twice = Seen { count: 2, differs: true };
        assert_eq!(found, [(1, 101, Seen::default()), (1, 105, twice)]);
    }
}
