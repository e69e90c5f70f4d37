//! What a lane has fetched and not yet made into a batch.

use std::collections::BTreeMap;

use rdkafka::types::RDKafkaErrorCode;

use crate::cursor::Doubt;
use crate::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};

/// What ended the fetching of a partition: nothing more of it is taken until it is begun again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interruption {
    /// The first thing that came after a begin was not at the position asked for.
    Gap {
        /// The position asked for.
        from: NextOffset,
        /// Where the first record or the end was.
        to: NextOffset,
    },
    /// The client reported an error. What it delivers behind one may be at a wrong position.
    Failed {
        /// After the last record or end that came before the error.
        position: NextOffset,
        /// What failed.
        fault: FetchFault,
    },
}

/// Why a partition cannot be fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchFault {
    /// librdkafka's error code.
    pub code: RDKafkaErrorCode,
    /// The first offset of the batch that cannot be read, if it is a batch.
    pub batch: Option<NextOffset>,
}

impl FetchFault {
    /// From what the client reported: where a batch cannot be read, `offset` is that of its first record.
    pub fn new(code: RDKafkaErrorCode, offset: i64) -> Self {
        use RDKafkaErrorCode as Code;
        let is_of_a_batch = matches!(code, Code::BadMessage | Code::BadCompression | Code::NotImplemented);
        Self { code, batch: (is_of_a_batch && offset >= 0).then_some(NextOffset(offset)) }
    }

    /// The doubt about a partition that fails so at `position`; `after` is the offset after the batch, if it is known.
    pub fn doubt(&self, position: NextOffset, after: Option<NextOffset>) -> Doubt {
        let (code, remedy) = (format!("{:?}", self.code), remedy(self.code));
        Doubt::Unreadable { position, batch: self.batch, after, code, remedy }
    }
}

/// What is known to help.
fn remedy(code: RDKafkaErrorCode) -> &'static str {
    use RDKafkaErrorCode as Code;
    match code {
        Code::BadMessage => {
            "Its checksum or its form is wrong, as after damage to a replica's disk: make another replica the leader, or \
             restore this one"
        }
        Code::BadCompression => {
            "It cannot be decompressed, or needs more than receive.message.max.bytes then: raise that in kafka.properties, \
             to three times what the batch holds"
        }
        Code::NotImplemented => "Its format or codec is unknown to this program",
        Code::MessageSizeTooLarge => {
            "Raise fetch.message.max.bytes and receive.message.max.bytes in kafka.properties"
        }
        Code::TopicAuthorizationFailed => "Grant this principal the right to read the topic",
        _ => "See the log of the partition's leader",
    }
}

/// How far the delivery of one partition is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Delivery {
    /// Nothing of it is wanted.
    #[default]
    Unwanted,
    /// Fetching was begun here, and nothing has come yet.
    Begun(NextOffset),
    /// This is expected next.
    Running(NextOffset),
    /// Interrupted here.
    Interrupted(NextOffset),
}

/// Records on their way into the next batch; keeps for each partition where its delivery is.
#[derive(Debug, Default)]
pub struct Intake {
    source: SourceBatch,
    /// By partition number.
    deliveries: Vec<Delivery>,
    /// Positions without a record before them: an end that was met, control records included, or what is proved.
    ends: BTreeMap<Partition, NextOffset>,
    interruptions: Vec<(Partition, Interruption)>,
    records_max: usize,
    bytes_max: usize,
}

impl Intake {
    /// An intake that is full at either limit.
    pub fn new(records_max: usize, bytes_max: usize) -> Self {
        Self { records_max, bytes_max, ..Self::default() }
    }

    /// Records at which this is full.
    pub fn records_max(&self) -> usize {
        self.records_max
    }

    /// Makes this full at so many records.
    pub fn limit(&mut self, records_max: usize) {
        self.records_max = records_max;
    }

    fn delivery(&mut self, partition: Partition) -> Option<&mut Delivery> {
        let index = usize::try_from(partition.0).ok()?;
        if index >= self.deliveries.len() {
            self.deliveries.resize(index.checked_add(1)?, Delivery::Unwanted);
        }
        self.deliveries.get_mut(index)
    }

    /// Wants records of `partition` from `position` on, where fetching is begun.
    pub fn begin(&mut self, partition: Partition, position: NextOffset) {
        if let Some(delivery) = self.delivery(partition) {
            *delivery = Delivery::Begun(position);
        }
    }

    /// As [`begin`](Self::begin), where it is proved that no record lies between the former position and this one.
    pub fn begin_proved(&mut self, partition: Partition, position: NextOffset) {
        self.begin(partition, position);
        let end = self.ends.entry(partition).or_insert(position);
        *end = position.max(*end);
    }

    /// Where the delivery of `partition` is; `None`: nothing of it is wanted.
    pub fn position(&self, partition: Partition) -> Option<NextOffset> {
        match self.deliveries.get(usize::try_from(partition.0).ok()?)? {
            Delivery::Unwanted => None,
            Delivery::Begun(position) | Delivery::Running(position) | Delivery::Interrupted(position) => {
                Some(*position)
            }
        }
    }

    /// Whether something of `partition` came since it was begun, and nothing interrupted it.
    pub fn is_running(&self, partition: Partition) -> bool {
        let index = usize::try_from(partition.0).ok();
        matches!(index.and_then(|index| self.deliveries.get(index)), Some(Delivery::Running(_)))
    }

    /// Takes one record in, unless it is not wanted: what was fetched for a former owner is nobody's.
    pub fn record<'h>(
        &mut self,
        partition: Partition,
        offset: Offset,
        timestamp: Option<TimestampMs>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h [u8], Option<&'h [u8]>)>,
    ) {
        let Some(delivery) = self.delivery(partition) else { return };
        match *delivery {
            Delivery::Begun(asked) if NextOffset(offset.0) == asked => {}
            Delivery::Begun(asked) if !asked.is_past(offset) => {
                *delivery = Delivery::Interrupted(asked);
                let gap = Interruption::Gap { from: asked, to: NextOffset(offset.0) };
                self.interruptions.push((partition, gap));
                return;
            }
            Delivery::Running(expected) if !expected.is_past(offset) => {}
            _ => return,
        }
        *delivery = Delivery::Running(offset.next());
        self.source.push(partition, offset, timestamp, key, value, headers);
    }

    /// Everything readable of `partition` before `position` was delivered.
    pub fn end(&mut self, partition: Partition, position: NextOffset) {
        let Some(delivery) = self.delivery(partition) else { return };
        match *delivery {
            Delivery::Begun(asked) if position == asked => *delivery = Delivery::Running(asked),
            Delivery::Begun(asked) if position > asked => {
                *delivery = Delivery::Interrupted(asked);
                self.interruptions.push((partition, Interruption::Gap { from: asked, to: position }));
            }
            Delivery::Running(expected) if position > expected => {
                *delivery = Delivery::Running(position);
                self.ends.insert(partition, position);
            }
            _ => {}
        }
    }

    /// Fetching `partition` failed: what comes of it behind the error is not taken.
    pub fn fail(&mut self, partition: Partition, fault: FetchFault) {
        let Some(delivery) = self.delivery(partition) else { return };
        if let Delivery::Begun(position) | Delivery::Running(position) = *delivery {
            *delivery = Delivery::Interrupted(position);
            self.interruptions.push((partition, Interruption::Failed { position, fault }));
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

    /// Whether a partition was interrupted.
    pub fn is_interrupted(&self) -> bool {
        !self.interruptions.is_empty()
    }

    /// Takes what was interrupted, at most once a partition since it was begun.
    pub fn take_interruptions(&mut self) -> Vec<(Partition, Interruption)> {
        std::mem::take(&mut self.interruptions)
    }

    /// Whether a record or a position of `partition` waits for the next batch.
    pub fn holds(&self, partition: Partition) -> bool {
        self.ends.contains_key(&partition) || self.source.iter().any(|record| record.partition == partition)
    }

    /// Takes everything: the records, and the ends met after them. Goes on with `empty`.
    pub fn take(&mut self, empty: SourceBatch) -> (SourceBatch, BTreeMap<Partition, NextOffset>) {
        (std::mem::replace(&mut self.source, empty), std::mem::take(&mut self.ends))
    }

    /// Forgets everything, and wants nothing more.
    pub fn clear(&mut self) {
        self.source.clear();
        self.ends.clear();
        self.interruptions.clear();
        self.deliveries.clear();
    }

    /// Forgets these partitions, keeps the others' records.
    pub fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            if let Some(delivery) = self.delivery(*partition) {
                *delivery = Delivery::Unwanted;
            }
            self.ends.remove(partition);
        }
        self.interruptions.retain(|(p, _)| !partitions.contains(p));
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
        intake.begin(Partition(1), NextOffset(5));
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
            intake.begin(Partition(partition), NextOffset(0));
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
        intake.begin(Partition(1), NextOffset(0));
        push(&mut intake, 1, 0);
        assert!(intake.is_running(Partition(1)));
        intake.end(Partition(1), NextOffset(1));
        assert!(intake.ends.is_empty(), "nothing beyond the record itself");
        intake.end(Partition(1), NextOffset(2));
        assert_eq!(intake.ends.get(&Partition(1)), Some(&NextOffset(2)));
    }

    #[test]
    fn what_comes_first_after_a_begin_must_be_at_the_position_asked_for() {
        let gap = |from, to| Interruption::Gap { from: NextOffset(from), to: NextOffset(to) };
        let mut intake = Intake::new(10, 1_000);
        for partition in 1..=4 {
            intake.begin(Partition(partition), NextOffset(5));
        }
        // A record, or the end, beyond it: nothing of the partition is taken any more.
        push(&mut intake, 1, 7);
        push(&mut intake, 1, 8);
        intake.end(Partition(2), NextOffset(6));
        push(&mut intake, 2, 6);
        // At it: what comes later may jump, as over a transaction's marker.
        push(&mut intake, 3, 5);
        push(&mut intake, 3, 9);
        intake.end(Partition(4), NextOffset(5));
        push(&mut intake, 4, 7);
        assert_eq!(offsets(&intake), [(3, 5), (3, 9), (4, 7)]);
        assert_eq!(intake.take_interruptions(), [(Partition(1), gap(5, 7)), (Partition(2), gap(5, 6))]);
        assert_eq!(intake.position(Partition(1)), Some(NextOffset(5)), "it did not move");
        // Proved empty: the position moves, and is delivered as such.
        intake.begin_proved(Partition(2), NextOffset(6));
        assert_eq!(intake.ends.get(&Partition(2)), Some(&NextOffset(6)));
        push(&mut intake, 2, 6);
        assert_eq!(offsets(&intake).last(), Some(&(2, 6)));
    }

    #[test]
    fn nothing_behind_an_error_is_taken() {
        let fault = FetchFault { code: RDKafkaErrorCode::BadMessage, batch: Some(NextOffset(2)) };
        let mut intake = Intake::new(10, 1_000);
        intake.begin(Partition(1), NextOffset(0));
        push(&mut intake, 1, 0);
        push(&mut intake, 1, 1);
        intake.fail(Partition(1), fault);
        push(&mut intake, 1, 4);
        intake.end(Partition(1), NextOffset(9));
        intake.fail(Partition(1), fault);
        assert_eq!(offsets(&intake), [(1, 0), (1, 1)]);
        let position = NextOffset(2);
        assert_eq!(
            intake.take_interruptions(),
            [(Partition(1), Interruption::Failed { position, fault })],
            "told once"
        );
        assert!(intake.ends.is_empty());
        // It goes on where it was, once it is begun again.
        intake.begin(Partition(1), position);
        push(&mut intake, 1, 2);
        assert_eq!(offsets(&intake), [(1, 0), (1, 1), (1, 2)]);
    }
}
