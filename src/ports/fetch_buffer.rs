//! The records that a lane has fetched for its next batch, and how far each partition was delivered.
//!
//! The buffer does not trust the client's positions: the first record or end after a begin must be at the
//! position asked for, and nothing behind an error is taken. Either interrupts the partition until it is
//! begun again.

use std::collections::BTreeMap;

use rdkafka::types::RDKafkaErrorCode;

use crate::domain::cursor::HaltReason;
use crate::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};

/// Why the delivery of a partition was interrupted; nothing more of it is taken until it is begun again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interruption {
    /// The first record or end after a begin was not at the position asked for.
    Gap {
        /// The position asked for.
        from: NextOffset,
        /// The position of the first record or end.
        to: NextOffset,
    },
    /// The client reported an error. What it delivers after one may be at a wrong position.
    Failed {
        /// The position after the last record or end before the error.
        position: NextOffset,
        /// The error.
        fault: FetchFault,
    },
}

/// Why a partition cannot be fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchFault {
    /// librdkafka's error code.
    pub code: RDKafkaErrorCode,
    /// The first offset of the record batch that cannot be read, if the error is about one.
    pub batch: Option<NextOffset>,
}

impl FetchFault {
    /// Converts an error of the client; for an unreadable record batch, `offset` is that of its first record.
    pub fn new(code: RDKafkaErrorCode, offset: i64) -> Self {
        use RDKafkaErrorCode as Code;
        let is_of_a_batch = matches!(code, Code::BadMessage | Code::BadCompression | Code::NotImplemented);
        Self { code, batch: (is_of_a_batch && offset >= 0).then_some(NextOffset(offset)) }
    }

    /// The halt reason of a partition with this fault at `position`; `after` is the offset after the batch,
    /// if known.
    pub fn reason(&self, position: NextOffset, after: Option<NextOffset>) -> HaltReason {
        let (code, remedy) = (format!("{:?}", self.code), remedy(self.code));
        HaltReason::Unreadable { position, batch: self.batch, after, code, remedy }
    }
}

/// The advice for an operator.
fn remedy(code: RDKafkaErrorCode) -> &'static str {
    use RDKafkaErrorCode as Code;
    match code {
        Code::BadMessage => {
            "Its checksum or format is wrong, as after damage to a replica's disk: make another replica the \
             leader, or restore this one"
        }
        Code::BadCompression => {
            "It cannot be decompressed, or is larger than receive.message.max.bytes after that: raise this \
             setting in kafka.properties to three times the uncompressed size of the batch"
        }
        Code::NotImplemented => "Its format or codec is unknown to this program",
        Code::MessageSizeTooLarge => {
            "Raise fetch.message.max.bytes and receive.message.max.bytes in kafka.properties"
        }
        Code::TopicAuthorizationFailed => "Grant this principal the right to read the topic",
        _ => "See the log of the partition's leader",
    }
}

/// State of the delivery of one partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Delivery {
    /// Not begun: its records are ignored.
    #[default]
    Unwanted,
    /// Begun at this position; nothing was delivered yet.
    Begun(NextOffset),
    /// The next record is expected at or after this position.
    Delivering(NextOffset),
    /// Interrupted at this position.
    Interrupted(NextOffset),
}

/// The records of the next batch, with the delivery position of each partition.
#[derive(Debug, Default)]
pub struct FetchBuffer {
    source: SourceBatch,
    /// By partition number.
    deliveries: Vec<Delivery>,
    /// Positions that advanced without a record: ends of partition (after control records), and     /// gaps that were checked to be empty.
    ends: BTreeMap<Partition, NextOffset>,
    interruptions: Vec<(Partition, Interruption)>,
    records_max: usize,
    bytes_max: usize,
}

impl FetchBuffer {
    /// A buffer that is full at either limit.
    pub fn new(records_max: usize, bytes_max: usize) -> Self {
        Self { records_max, bytes_max, ..Self::default() }
    }

    /// The present limit of records.
    pub fn records_max(&self) -> usize {
        self.records_max
    }

    /// Sets the limit of records.
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

    /// Expects records of `partition` from `position` on, where fetching begins.
    pub fn begin(&mut self, partition: Partition, position: NextOffset) {
        if let Some(delivery) = self.delivery(partition) {
            *delivery = Delivery::Begun(position);
        }
    }

    /// As [`begin`](Self::begin), after a check that no record lies between the former position and this one.
    pub fn begin_after_gap(&mut self, partition: Partition, position: NextOffset) {
        self.begin(partition, position);
        let end = self.ends.entry(partition).or_insert(position);
        *end = position.max(*end);
    }

    /// The delivery position of `partition`; `None`: it is not begun.
    pub fn position(&self, partition: Partition) -> Option<NextOffset> {
        match self.deliveries.get(usize::try_from(partition.0).ok()?)? {
            Delivery::Unwanted => None,
            Delivery::Begun(position) | Delivery::Delivering(position) | Delivery::Interrupted(position) => {
                Some(*position)
            }
        }
    }

    /// Whether a record or end of `partition` was taken since its begin, and nothing interrupted it.
    pub fn is_delivering(&self, partition: Partition) -> bool {
        let index = usize::try_from(partition.0).ok();
        matches!(index.and_then(|index| self.deliveries.get(index)), Some(Delivery::Delivering(_)))
    }

    /// Takes one record, unless its partition is not begun or the record is before the expected position.
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
            Delivery::Delivering(expected) if !expected.is_past(offset) => {}
            _ => return,
        }
        *delivery = Delivery::Delivering(offset.next());
        self.source.push(partition, offset, timestamp, key, value, headers);
    }

    /// Notes an end of partition: every readable record of `partition` before `position` was delivered.
    pub fn end(&mut self, partition: Partition, position: NextOffset) {
        let Some(delivery) = self.delivery(partition) else { return };
        match *delivery {
            Delivery::Begun(asked) if position == asked => *delivery = Delivery::Delivering(asked),
            Delivery::Begun(asked) if position > asked => {
                *delivery = Delivery::Interrupted(asked);
                self.interruptions.push((partition, Interruption::Gap { from: asked, to: position }));
            }
            Delivery::Delivering(expected) if position > expected => {
                *delivery = Delivery::Delivering(position);
                self.ends.insert(partition, position);
            }
            _ => {}
        }
    }

    /// Interrupts `partition` after an error of the client.
    pub fn fail(&mut self, partition: Partition, fault: FetchFault) {
        let Some(delivery) = self.delivery(partition) else { return };
        if let Delivery::Begun(position) | Delivery::Delivering(position) = *delivery {
            *delivery = Delivery::Interrupted(position);
            self.interruptions.push((partition, Interruption::Failed { position, fault }));
        }
    }

    /// How many more records fit; 0 if the limit of bytes is reached.
    pub fn room(&self) -> usize {
        if self.source.bytes() >= self.bytes_max {
            0
        } else {
            self.records_max.saturating_sub(self.source.len())
        }
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.source.len()
    }

    /// Whether there is neither a record nor an advanced position.
    pub fn is_empty(&self) -> bool {
        self.source.is_empty() && self.ends.is_empty()
    }

    /// Whether interruptions wait to be taken.
    pub fn is_interrupted(&self) -> bool {
        !self.interruptions.is_empty()
    }

    /// Takes the interruptions; each begin of a partition causes at most one.
    pub fn take_interruptions(&mut self) -> Vec<(Partition, Interruption)> {
        std::mem::take(&mut self.interruptions)
    }

    /// Whether the buffer has a record or an advanced position of `partition`.
    pub fn holds(&self, partition: Partition) -> bool {
        self.ends.contains_key(&partition) || self.source.iter().any(|record| record.partition == partition)
    }

    /// Takes the records and the advanced positions; `empty` becomes the new storage.
    pub fn take(&mut self, empty: SourceBatch) -> (SourceBatch, BTreeMap<Partition, NextOffset>) {
        (std::mem::replace(&mut self.source, empty), std::mem::take(&mut self.ends))
    }

    /// Drops everything; no partition is begun afterwards.
    pub fn clear(&mut self) {
        self.source.clear();
        self.ends.clear();
        self.interruptions.clear();
        self.deliveries.clear();
    }

    /// Drops these partitions and their records.
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
mod tests;
