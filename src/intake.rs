//! What a lane has fetched and not yet made into a batch.

use std::collections::BTreeMap;

use crate::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};

/// Records on their way into the next batch; keeps each partition's next expected offset.
#[derive(Debug, Default)]
pub struct Intake {
    source: SourceBatch,
    /// Next expected offset by partition number; none: nothing of it is wanted.
    expected: Vec<Option<NextOffset>>,
    /// Positions at which a partition's end was met, control records included.
    ends: BTreeMap<Partition, NextOffset>,
    disturbed: Vec<Partition>,
    records_max: usize,
    bytes_max: usize,
}

impl Intake {
    /// An intake that is full at either limit.
    pub fn new(records_max: usize, bytes_max: usize) -> Self {
        Self { records_max, bytes_max, ..Self::default() }
    }

    fn slot(&mut self, partition: Partition) -> Option<&mut Option<NextOffset>> {
        let index = usize::try_from(partition.0).ok()?;
        if index >= self.expected.len() {
            self.expected.resize(index.checked_add(1)?, None);
        }
        self.expected.get_mut(index)
    }

    /// Wants records of `partition` from `position` on.
    pub fn expect(&mut self, partition: Partition, position: NextOffset) {
        if let Some(slot) = self.slot(partition) {
            *slot = Some(position);
        }
    }

    /// Takes one record in, unless it is not wanted: a pause inside the client may deliver again what
    /// was delivered, and what was fetched for a former owner is nobody's.
    pub fn record<'h>(
        &mut self,
        partition: Partition,
        offset: Offset,
        timestamp: Option<TimestampMs>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h [u8], Option<&'h [u8]>)>,
    ) {
        let Some(slot) = self.slot(partition) else { return };
        match slot {
            Some(position) if !position.is_past(offset) => *slot = Some(offset.next()),
            _ => return,
        }
        self.source.push(partition, offset, timestamp, key, value, headers);
    }

    /// Everything readable of `partition` before `position` was delivered.
    pub fn end(&mut self, partition: Partition, position: NextOffset) {
        if let Some(slot) = self.slot(partition)
            && let Some(expected) = slot
            && position > *expected
        {
            *slot = Some(position);
            self.ends.insert(partition, position);
        }
    }

    /// Fetching `partition` failed in a way that only a new start mends.
    pub fn disturb(&mut self, partition: Partition) {
        if !self.disturbed.contains(&partition) {
            self.disturbed.push(partition);
        }
    }

    /// How many more records fit.
    pub fn room(&self) -> usize {
        if self.source.bytes() >= self.bytes_max {
            0
        } else {
            self.records_max.saturating_sub(self.source.len())
        }
    }

    /// Records held.
    pub fn len(&self) -> usize {
        self.source.len()
    }

    /// Whether there is neither a record nor a position to note.
    pub fn is_empty(&self) -> bool {
        self.source.is_empty() && self.ends.is_empty()
    }

    /// The records held.
    pub fn source(&self) -> &SourceBatch {
        &self.source
    }

    /// Whether a new start is needed.
    pub fn is_disturbed(&self) -> bool {
        !self.disturbed.is_empty()
    }

    /// Takes the disturbed partitions.
    pub fn take_disturbed(&mut self) -> Vec<Partition> {
        std::mem::take(&mut self.disturbed)
    }

    /// Takes everything: the records, and the ends met after them. Goes on with `empty`.
    pub fn take(&mut self, empty: SourceBatch) -> (SourceBatch, BTreeMap<Partition, NextOffset>) {
        (std::mem::replace(&mut self.source, empty), std::mem::take(&mut self.ends))
    }

    /// Forgets everything, and wants nothing more.
    pub fn clear(&mut self) {
        self.source.clear();
        self.ends.clear();
        self.disturbed.clear();
        self.expected.clear();
    }

    /// Forgets these partitions, keeps the others' records.
    pub fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            if let Some(slot) = self.slot(*partition) {
                *slot = None;
            }
            self.ends.remove(partition);
        }
        self.disturbed.retain(|p| !partitions.contains(p));
        if self.source.iter().any(|r| partitions.contains(&r.partition)) {
            let mut kept = SourceBatch::new();
            for r in self.source.iter().filter(|r| !partitions.contains(&r.partition)) {
                kept.push(r.partition, r.offset, r.timestamp, r.key, r.value, r.headers.iter());
            }
            self.source = kept;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(intake: &mut Intake, partition: i32, offset: i64) {
        intake.record(Partition(partition), Offset(offset), None, None, Some(b"v"), []);
    }

    fn offsets(intake: &Intake) -> Vec<(i32, i64)> {
        intake.source().iter().map(|r| (r.partition.0, r.offset.0)).collect()
    }

    #[test]
    fn a_record_delivered_twice_is_taken_once() {
        let mut intake = Intake::new(10, 1_000);
        intake.expect(Partition(1), NextOffset(5));
        for offset in [4, 5, 6, 5, 6, 9] {
            push(&mut intake, 1, offset);
        }
        push(&mut intake, 2, 0);
        assert_eq!(offsets(&intake), [(1, 5), (1, 6), (1, 9)]);
    }

    #[test]
    fn what_is_forgotten_leaves_the_others_in_order() {
        let mut intake = Intake::new(10, 1_000);
        for partition in [1, 2] {
            intake.expect(Partition(partition), NextOffset(0));
        }
        for (partition, offset) in [(1, 0), (2, 0), (1, 1), (2, 1)] {
            push(&mut intake, partition, offset);
        }
        intake.end(Partition(1), NextOffset(3));
        intake.forget(&[Partition(1)]);
        push(&mut intake, 1, 2);
        push(&mut intake, 2, 2);
        assert_eq!(offsets(&intake), [(2, 0), (2, 1), (2, 2)]);
        assert!(intake.take(SourceBatch::new()).1.is_empty());
    }

    #[test]
    fn an_end_moves_the_position_over_control_records() {
        let mut intake = Intake::new(10, 1_000);
        intake.expect(Partition(1), NextOffset(0));
        push(&mut intake, 1, 0);
        intake.end(Partition(1), NextOffset(1));
        assert!(intake.ends.is_empty(), "nothing beyond the record itself");
        intake.end(Partition(1), NextOffset(2));
        assert_eq!(intake.ends.get(&Partition(1)), Some(&NextOffset(2)));
    }
}
