//! Turns fetched records into batches: decides when a batch is closed, and parses its records.
//!
//! In a backlog the next batch is built while the one before it is being written, so that the database never
//! waits.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::LaneSettings;
use crate::domain::batch::{Batch, Memory, Progress};
use crate::domain::record::{NextOffset, Partition, SourceBatch, TimestampMs};
use crate::domain::wire::Rules;
use crate::ports::KafkaPort;
use crate::ports::fetch_buffer::FetchBuffer;
use crate::telemetry::metrics;
use crate::telemetry::status::StatusRegistry;

/// A batch smaller than this share of the largest keeps growing until the one before it is published.
const OVERLAP_DIVISOR: usize = 8;
/// By how much batches shrink when one could not be published in time.
const SHRINK: usize = 4;
/// Batches shrink no further than this.
const RECORDS_LEAST: usize = 10;
/// Batches from this size on are built on another thread, because parsing them here would delay the
/// transactions.
const ASIDE_MIN: usize = 1_000;

/// A batch, and how long it took to build.
pub(super) struct Built {
    pub batch: Batch,
    pub took: Duration,
    pub ended: SystemTime,
}

/// The input of a closed batch, not parsed yet.
struct Closed {
    memory: Memory,
    source: SourceBatch,
    progress: Vec<Progress>,
    rules: Arc<Rules>,
}

impl Closed {
    fn assemble(self) -> Built {
        let began = Instant::now();
        let batch = Batch::assemble_in(self.memory, self.source, self.progress, &self.rules);
        Built { batch, took: began.elapsed(), ended: SystemTime::now() }
    }
}

/// The batch after the one that is being written.
enum Next {
    Made(Box<Built>),
    /// Being built on another thread, with records of these partitions.
    Making(JoinHandle<Built>, Vec<Partition>),
}

/// Collects fetched records and builds batches of them.
pub(super) struct BatchBuilder {
    pub buffer: FetchBuffer,
    /// When the first record of the buffer was fetched.
    since: Option<Instant>,
    next: Option<Next>,
    /// Memory of the last completed batch, for reuse.
    spare: Option<Memory>,
    rules: Arc<Rules>,
    records_max: usize,
    linger: Duration,
}

impl BatchBuilder {
    pub fn new(settings: &LaneSettings) -> Self {
        Self {
            buffer: FetchBuffer::new(settings.batch_payments_max, settings.batch_bytes_max),
            since: None,
            next: None,
            spare: None,
            rules: Arc::clone(&settings.rules),
            records_max: settings.batch_payments_max,
            linger: settings.linger,
        }
    }

    /// Limits batches to a quarter of `records`, until they [`grow`](Self::grow) again. Returns the new
    /// limit; `None` if it would not be lower.
    pub fn shrink(&mut self, records: usize) -> Option<usize> {
        let limit = (records / SHRINK).max(RECORDS_LEAST);
        (limit < self.buffer.records_max()).then(|| {
            self.buffer.limit(limit);
            limit
        })
    }

    /// Doubles the limit, up to that of the settings.
    pub fn grow(&mut self) {
        let limit = self.buffer.records_max();
        if limit < self.records_max {
            self.buffer.limit(limit.saturating_mul(2).min(self.records_max));
        }
    }

    /// Whether there is neither a batch nor anything to build one from.
    pub fn is_empty(&self) -> bool {
        self.next.is_none() && self.buffer.is_empty()
    }

    /// Whether a batch is closed, built or still being built.
    pub fn has_next(&self) -> bool {
        self.next.is_some()
    }

    /// When `linger` ends for the records in the buffer.
    pub fn due_at(&self) -> Option<Instant> {
        self.since.map(|since| since + self.linger)
    }

    /// Whether `linger` is over, or the buffer is empty.
    pub fn is_over(&self) -> bool {
        self.due_at().is_none_or(|due_at| due_at <= Instant::now())
    }

    /// Whether the buffer is full.
    pub fn is_full(&self) -> bool {
        self.buffer.room() == 0
    }

    /// Whether a batch of this size is worth writing while another one is being published.
    pub fn is_large(&self, records: usize) -> bool {
        records >= self.records_max / OVERLAP_DIVISOR
    }

    /// Fetches what is available into the buffer, waiting at most `wait` for the first item. Cancel-safe.
    pub async fn fetch<K: KafkaPort>(&mut self, kafka: &mut K, wait: Duration) {
        kafka.fetch(&mut self.buffer, wait).await;
        if self.since.is_none() && !self.buffer.is_empty() {
            self.since = Some(Instant::now());
        }
    }

    /// Whether to close a batch now. `is_alone`: no earlier batch waits for its publication.
    fn is_wanted(&self, is_alone: bool) -> bool {
        let is_due = if is_alone { self.is_over() } else { self.is_large(self.buffer.len()) };
        !self.buffer.is_empty() && (self.is_full() || is_due)
    }

    /// Returns the next batch if it is due, and waits for it if another thread is still building it.
    pub async fn take(
        &mut self,
        is_alone: bool,
        status: &StatusRegistry,
        seen: impl Fn(Partition) -> Option<NextOffset>,
    ) -> Option<Built> {
        match self.next.take() {
            Some(Next::Made(made)) => Some(*made),
            Some(Next::Making(making, _)) => match making.await {
                Ok(made) => Some(made),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            None if self.is_wanted(is_alone) => self.close(status, seen).map(Closed::assemble),
            None => None,
        }
    }

    /// Fetches until the buffer is full, and builds the next batch. `seen` returns `applied` as it will be
    /// once the batch before is written. Cancel-safe.
    pub async fn prepare<K: KafkaPort>(
        &mut self,
        kafka: &mut K,
        tick: Duration,
        status: &StatusRegistry,
        seen: impl Fn(Partition) -> Option<NextOffset>,
    ) {
        while !self.is_full() && !self.buffer.is_interrupted() {
            self.fetch(kafka, tick).await;
        }
        if self.buffer.is_interrupted() {
            return;
        }
        self.next = self.close(status, seen).map(|closed| {
            if closed.source.len() < ASIDE_MIN {
                Next::Made(Box::new(closed.assemble()))
            } else {
                let partitions = closed.progress.iter().map(|p| p.partition).collect();
                Next::Making(tokio::task::spawn_blocking(|| closed.assemble()), partitions)
            }
        });
    }

    /// Closes the buffer as a batch whose partitions start at `seen`. Partitions without a `seen` are not
    /// live: their records are dropped.
    fn close(
        &mut self,
        status: &StatusRegistry,
        seen: impl Fn(Partition) -> Option<NextOffset>,
    ) -> Option<Closed> {
        self.since = None;
        let mut memory = self.spare.take().unwrap_or_default();
        let (source, ends) = self.buffer.take(memory.take_source());
        let mut progress: BTreeMap<Partition, Progress> = BTreeMap::new();
        let mut oldest: Vec<(Partition, TimestampMs)> = Vec::new();
        for record in source.iter() {
            let next = record.offset.next();
            let stamp = Some(record.timestamp);
            let partition = record.partition;
            if let Some(known) = progress.get_mut(&partition) {
                known.reached = next;
                known.timestamp = stamp;
            } else if let Some(seen) = seen(partition) {
                oldest.extend(record.timestamp.map(|at| (partition, at)));
                progress.insert(partition, Progress { partition, seen, reached: next, timestamp: stamp });
            }
        }
        for (partition, end) in ends {
            if let Some(seen) = seen(partition) {
                let entry = progress.entry(partition).or_insert(Progress {
                    partition,
                    seen,
                    reached: end,
                    timestamp: None,
                });
                entry.reached = entry.reached.max(end);
            }
        }
        if progress.is_empty() {
            return None;
        }
        let oldest = oldest.into_iter().filter_map(|(p, at)| Some((p, progress.get(&p)?.reached, at)));
        status.taken(metrics::now(), oldest);
        let progress = progress.into_values().collect();
        Some(Closed { memory, source, progress, rules: Arc::clone(&self.rules) })
    }

    /// Whether the buffer or the next batch has records of `partition`.
    pub fn holds(&self, partition: Partition) -> bool {
        let is_next = match &self.next {
            Some(Next::Made(made)) => made.batch.progress().iter().any(|p| p.partition == partition),
            Some(Next::Making(_, partitions)) => partitions.contains(&partition),
            None => false,
        };
        is_next || self.buffer.holds(partition)
    }

    /// Keeps the memory of a completed batch for reuse.
    pub fn keep(&mut self, memory: Memory) {
        self.spare = Some(memory);
    }

    /// Drops buffered records of these partitions. Must not be called while a batch is closed: it spans other
    /// partitions, too.
    pub fn forget(&mut self, partitions: &[Partition]) {
        self.buffer.forget(partitions);
        if self.buffer.is_empty() {
            // Otherwise `linger` would be over for an empty buffer, and the lane would loop without a pause.
            self.since = None;
        }
    }

    /// Drops everything; records are ignored until partitions are begun again.
    pub fn clear(&mut self) {
        self.next = None;
        self.buffer.clear();
        self.since = None;
    }
}
