//! Batches as a lane builds them, of payments as `payment-writer produce` sends them.
#![allow(dead_code)]

use payment_writer::domain::batch::{Answer, Batch, Owner, Progress, Refused};
use payment_writer::domain::partitioner::java_partition_hash;
use payment_writer::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use payment_writer::domain::wire::Rules;
use payment_writer::generator::{Generator, GeneratorConfig, IdKind};
use payment_writer::kafka::group::lane_of;

/// Partitions of the input.
pub const PARTITIONS: usize = 100;
/// Time for records that need no real one.
pub const AT: TimestampMs = TimestampMs(1_767_225_600_000);

/// One lane's share of the payments: an endless supply of valid ones with distinct message ids.
pub struct Share {
    generator: Generator,
    lane: usize,
    lanes: usize,
    /// By partition.
    next: Vec<NextOffset>,
}

impl Share {
    /// The payments of all partitions of the lane with this index. The same seed gives the same payments.
    pub fn new(seed: u64, lane: usize, lanes: usize) -> Self {
        let rules = Rules::default();
        let generator = Generator::new(GeneratorConfig {
            seed,
            accounts: 10_000,
            duplicates: 0.0,
            conflicts: 0.0,
            bad: 0.0,
            bad_reasons: Vec::new(),
            ids: IdKind::V4,
            value_bytes: None,
            value_bytes_max: rules.payment_bytes_max,
            types: rules.payment_types,
            window: rules.idempotency_window,
        });
        Self { generator, lane, lanes, next: vec![NextOffset(0); PARTITIONS] }
    }

    /// The next `count` payments of this lane, and the new end of each partition. Keys choose the partition,
    /// as in the topic, and the records of a partition are contiguous, as in fetches.
    pub fn take(&mut self, count: usize, at: TimestampMs) -> (SourceBatch, Vec<Progress>) {
        let mut arrived = SourceBatch::new();
        while arrived.len() < count {
            let record = self.generator.next(at.0);
            let hash = record.key.as_deref().map_or(0, java_partition_hash);
            let partition = Partition((hash % PARTITIONS as u32) as i32);
            if lane_of(partition, self.lanes) == self.lane {
                let headers = record.headers.iter().map(|(n, value)| (n.as_bytes(), Some(value.as_slice())));
                let (key, value) = (record.key.as_deref(), record.value.as_deref());
                arrived.push(partition, Offset(0), Some(at), key, value, headers);
            }
        }
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by_key(|index| arrived.get(*index).map(|r| r.partition));
        let mut batch = SourceBatch::new();
        let mut progress: Vec<Progress> = Vec::new();
        for record in order.into_iter().filter_map(|index| arrived.get(index)) {
            let partition = record.partition;
            let Some(next) = self.next.get_mut(partition.0 as usize) else { continue };
            let (seen, offset) = (*next, Offset(next.0));
            *next = offset.next();
            match progress.last_mut().filter(|p| p.partition == partition) {
                Some(known) => known.reached = *next,
                None => {
                    progress.push(Progress { partition, seen, reached: *next, timestamp: Some(Some(at)) })
                }
            }
            batch.push(partition, offset, record.timestamp, record.key, record.value, record.headers.iter());
        }
        (batch, progress)
    }
}

/// `count` payments of one of two lanes; always the same.
pub fn batch_of(count: usize) -> (SourceBatch, Vec<Progress>) {
    Share::new(1, 0, 2).take(count, AT)
}

/// The partitions of one of two lanes.
pub fn lanes_partitions() -> impl Iterator<Item = Partition> {
    (0..PARTITIONS as i32).map(Partition).filter(|partition| lane_of(*partition, 2) == 0)
}

/// Every hundredth id belongs to another record with the same payload.
pub fn duplicates(batch: &Batch) -> Answer {
    let none = Refused::default();
    let owner = |payload_hash| Owner { partition: Partition(-1), offset: Offset(0), payload_hash };
    let taken = batch.claims(&none).step_by(100);
    Answer { owners: taken.map(|claim| (claim.message_id, owner(claim.payload_hash))).collect() }
}
