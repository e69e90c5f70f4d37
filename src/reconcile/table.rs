//! What is kept of each record of a slice: what should have come of it, as hashes, and what was found. Pure.

use crate::kafka::scan::ScanRange;
use crate::publication::OutputTopic;
use crate::record::{Offset, Partition};
use crate::wire::Reason;

/// What the log and the claims say about a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// It breaks a rule.
    Refused(Reason),
    /// It claimed its message id itself.
    Own,
    /// Another record has the id, with the same payload.
    Same,
    /// Another record has the id, with another payload.
    Other,
    /// Nobody has the id.
    Nobody,
}

/// Special circumstances of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Notes {
    /// A person gave it up.
    pub is_given_up: bool,
    /// Its offset was used before, by a record that the log lost.
    pub is_rewound: bool,
    /// It is so old that its claim may have been pruned.
    pub is_prunable: bool,
    /// Its month may have been taken out of the payment tables.
    pub is_archived: bool,
    /// Its own claim does not say what the record does.
    pub is_claim_wrong: bool,
    /// A later record of its own partition has its id.
    pub is_owned_later: bool,
    /// A row of another record has its id, though nobody has claimed it.
    pub is_elsewhere: bool,
}

/// Hashes of what a record should have become, were it written or dead-lettered. 0 is "none".
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
    /// Of the e-mail event.
    pub email: u32,
    /// Of the dead letter.
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

/// How often something was found, and whether it was ever not what it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Saturates.
    pub count: u8,
    /// One of them differs from what the record says.
    pub differs: bool,
}

impl Seen {
    fn note(&mut self, is_same: bool) {
        self.count = self.count.saturating_add(1);
        self.differs |= !is_same;
    }
}

/// What was found of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Found {
    /// Rows of `payment_metadata`, each counted as often as there are rows of the other two for it.
    pub metadata: Seen,
    /// Of these, with a row of `payment_core`.
    pub core: Seen,
    /// Of these, with a row of `payment_notes`.
    pub notes: Seen,
    /// Outputs by [`OutputTopic::index`].
    pub outputs: [Seen; 3],
    /// The reason in the last dead letter.
    pub reason: Option<Reason>,
}

impl Found {
    /// What was found in this topic.
    pub fn output(&self, topic: OutputTopic) -> Seen {
        self.outputs.get(topic.index()).copied().unwrap_or_default()
    }

    /// Whether there is any trace at all.
    pub fn is_nothing(&self) -> bool {
        self.metadata.count == 0 && self.outputs.iter().all(|seen| seen.count == 0)
    }
}

/// One record.
#[derive(Clone, Debug)]
pub struct Entry {
    delta: u32,
    /// Hash of its key as Java's partitioner computes it; `None` without a key, which is put anywhere.
    pub key: Option<u32>,
    /// What log and claims say.
    pub claim: Claim,
    /// Circumstances.
    pub circumstances: Notes,
    /// What should be there.
    pub expected: Hashes,
    /// What is there.
    pub found: Found,
    /// Ten-thousandths; 0 if it is no payment.
    pub amount: u64,
    /// Three letters.
    pub currency: [u8; 3],
}

/// Bytes of memory that a record takes.
pub const ENTRY_BYTES: usize = size_of::<Entry>();

impl Entry {
    /// A record of which nothing was found yet.
    pub fn new(claim: Claim, circumstances: Notes, expected: Hashes) -> Self {
        let found = Found::default();
        Self { delta: 0, key: None, claim, circumstances, expected, found, amount: 0, currency: [0; 3] }
    }
}

/// One row of `payment_metadata` with one row each of the other tables, as hashes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowSeen {
    /// Of `payment_metadata`.
    pub metadata: u32,
    /// Of `payment_core`.
    pub core: Option<u32>,
    /// Of `payment_notes`.
    pub notes: Option<u32>,
}

/// Where a row or an output belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placed {
    /// To no offset of this slice.
    Outside,
    /// To an offset of this slice at which the log has no record.
    Nowhere,
    /// To a record that the log lost, whose offset was used again.
    Former,
    /// To a record.
    Here,
}

struct Share {
    range: ScanRange,
    entries: Vec<Entry>,
}

/// The records of one slice.
pub struct Table {
    shares: Vec<Share>,
}

enum Place<'t> {
    Outside,
    Nowhere,
    Here(&'t mut Entry),
}

impl Table {
    /// A table for these ranges: by partition, each partition once.
    pub fn new(ranges: &[ScanRange]) -> Self {
        Self { shares: ranges.iter().map(|range| Share { range: *range, entries: Vec::new() }).collect() }
    }

    fn share(&mut self, partition: Partition) -> Option<&mut Share> {
        let at = self.shares.binary_search_by_key(&partition, |share| share.range.partition).ok()?;
        self.shares.get_mut(at)
    }

    /// Adds a record; they come in the order of offsets within a partition.
    pub fn push(&mut self, partition: Partition, offset: Offset, mut entry: Entry) {
        let Some(share) = self.share(partition) else { return };
        let Ok(delta) = u32::try_from(offset.0.saturating_sub(share.range.from.0)) else { return };
        if share.entries.is_empty() {
            let room = share.range.to.0.saturating_sub(share.range.from.0);
            // The bound of memory is kept in offsets: a vector that doubles would pass it.
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

    /// The record at this place.
    pub fn entry(&mut self, partition: Partition, offset: Offset) -> Option<&mut Entry> {
        match self.place(partition, offset) {
            Place::Here(entry) => Some(entry),
            Place::Outside | Place::Nowhere => None,
        }
    }

    /// Notes a row of `payment_metadata` with what is joined to it.
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

    /// Notes an output.
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
    use crate::record::NextOffset;

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
