//! What a lane has fetched, on its way to the next batch, and that batch, as soon as there is one.
//!
//! In a backlog the next batch is made while the one before is being written: the database would wait for it
//! otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::LaneSettings;
use super::ports::Log;
use crate::batch::{Batch, Memory, Progress};
use crate::intake::Intake;
use crate::metrics;
use crate::record::{NextOffset, Partition, SourceBatch, TimestampMs};
use crate::status::Board;
use crate::wire::Rules;

/// A batch smaller than this part of the largest waits until the one before it is published, and grows.
const OVERLAP_DIVISOR: usize = 8;
/// A batch that could not be published in time is cut into so many.
const SHRINK: usize = 4;
/// No batch is limited to fewer records.
const RECORDS_LEAST: usize = 10;
/// From so many records on, making the next batch would keep the one that is written waiting.
const ASIDE_MIN: usize = 1_000;

/// A batch, and what making it took.
pub(super) struct Assembled {
    pub batch: Batch,
    pub took: Duration,
    pub ended: SystemTime,
}

/// What a batch is made of.
struct Cut {
    memory: Memory,
    source: SourceBatch,
    progress: Vec<Progress>,
    rules: Arc<Rules>,
}

impl Cut {
    fn assemble(self) -> Assembled {
        let began = Instant::now();
        let batch = Batch::assemble_in(self.memory, self.source, self.progress, &self.rules);
        Assembled { batch, took: began.elapsed(), ended: SystemTime::now() }
    }
}

/// The batch after the one that is being written.
enum Next {
    Made(Box<Assembled>),
    /// On another thread; of these partitions.
    Making(JoinHandle<Assembled>, Vec<Partition>),
}

/// Where records become batches.
pub(super) struct Assembly {
    pub intake: Intake,
    /// When the first record came in.
    since: Option<Instant>,
    next: Option<Next>,
    /// Of the batch that was settled last.
    spare: Option<Memory>,
    rules: Arc<Rules>,
    records_max: usize,
    linger: Duration,
}

impl Assembly {
    pub fn new(settings: &LaneSettings) -> Self {
        Self {
            intake: Intake::new(settings.batch_payments_max, settings.batch_bytes_max),
            since: None,
            next: None,
            spare: None,
            rules: Arc::clone(&settings.rules),
            records_max: settings.batch_payments_max,
            linger: settings.linger,
        }
    }

    /// Batches get a quarter of `records` at most, until they [`grow`](Self::grow) again; the limit, or `None` if it is at
    /// its least already.
    pub fn shrink(&mut self, records: usize) -> Option<usize> {
        let limit = (records / SHRINK).max(RECORDS_LEAST);
        (limit < self.intake.records_max()).then(|| {
            self.intake.limit(limit);
            limit
        })
    }

    /// Batches may be twice as large as before, up to the settings' limit.
    pub fn grow(&mut self) {
        let limit = self.intake.records_max();
        if limit < self.records_max {
            self.intake.limit(limit.saturating_mul(2).min(self.records_max));
        }
    }

    /// Whether there is nothing that a batch could come of.
    pub fn is_empty(&self) -> bool {
        self.next.is_none() && self.intake.is_empty()
    }

    /// Whether there is a batch, or soon.
    pub fn has_next(&self) -> bool {
        self.next.is_some()
    }

    /// When the records that are there have waited long enough for others.
    pub fn due_at(&self) -> Option<Instant> {
        self.since.map(|since| since + self.linger)
    }

    /// Whether there is no record, or the first has waited long enough for others.
    pub fn is_over(&self) -> bool {
        self.due_at().is_none_or(|due_at| due_at <= Instant::now())
    }

    /// Whether nothing more fits into a batch.
    pub fn is_full(&self) -> bool {
        self.intake.room() == 0
    }

    /// Whether a batch of so many records is large enough to be written beside another one's Kafka transaction.
    pub fn is_large(&self, records: usize) -> bool {
        records >= self.records_max / OVERLAP_DIVISOR
    }

    /// Takes in what is there, waiting at most `wait` for the first item. May be dropped while it waits.
    pub async fn fetch<L: Log>(&mut self, log: &mut L, wait: Duration) {
        log.fetch(&mut self.intake, wait).await;
        if self.since.is_none() && !self.intake.is_empty() {
            self.since = Some(Instant::now());
        }
    }

    /// Whether a batch is to be made of what is there, with none before it, or one that is being published.
    fn is_wanted(&self, is_alone: bool) -> bool {
        let is_due = if is_alone { self.is_over() } else { self.is_large(self.intake.len()) };
        !self.intake.is_empty() && (self.is_full() || is_due)
    }

    /// The batch whose turn it is, if there is one.
    pub async fn take(
        &mut self,
        is_alone: bool,
        board: &Board,
        seen: impl Fn(Partition) -> Option<NextOffset>,
    ) -> Option<Assembled> {
        match self.next.take() {
            Some(Next::Made(made)) => Some(*made),
            Some(Next::Making(making, _)) => match making.await {
                Ok(made) => Some(made),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            None if self.is_wanted(is_alone) => self.cut(board, seen).map(Cut::assemble),
            None => None,
        }
    }

    /// Fetches until the next batch is full, and makes it. `seen` is `applied` once the batch before it is written.
    /// May be dropped while it waits.
    pub async fn prepare<L: Log>(
        &mut self,
        log: &mut L,
        tick: Duration,
        board: &Board,
        seen: impl Fn(Partition) -> Option<NextOffset>,
    ) {
        while !self.is_full() && !self.intake.is_interrupted() {
            self.fetch(log, tick).await;
        }
        if self.intake.is_interrupted() {
            return;
        }
        self.next = self.cut(board, seen).map(|cut| {
            if cut.source.len() < ASIDE_MIN {
                Next::Made(Box::new(cut.assemble()))
            } else {
                let partitions = cut.progress.iter().map(|p| p.partition).collect();
                Next::Making(tokio::task::spawn_blocking(|| cut.assemble()), partitions)
            }
        });
    }

    /// Everything that was taken in, for a batch that begins at `seen`; records of other partitions are nobody's.
    fn cut(&mut self, board: &Board, seen: impl Fn(Partition) -> Option<NextOffset>) -> Option<Cut> {
        self.since = None;
        let mut memory = self.spare.take().unwrap_or_default();
        let (source, ends) = self.intake.take(memory.take_source());
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
        board.taken(metrics::now(), oldest);
        let progress = progress.into_values().collect();
        Some(Cut { memory, source, progress, rules: Arc::clone(&self.rules) })
    }

    /// Whether something of `partition` is here.
    pub fn holds(&self, partition: Partition) -> bool {
        let is_next = match &self.next {
            Some(Next::Made(made)) => made.batch.progress().iter().any(|p| p.partition == partition),
            Some(Next::Making(_, partitions)) => partitions.contains(&partition),
            None => false,
        };
        is_next || self.intake.holds(partition)
    }

    /// The memory of a settled batch.
    pub fn keep(&mut self, memory: Memory) {
        self.spare = Some(memory);
    }

    /// Drops what was taken in of these partitions. Not while there is a batch, which spans others, too.
    pub fn forget(&mut self, partitions: &[Partition]) {
        self.intake.forget(partitions);
        if self.intake.is_empty() {
            // Or the lane would go on to wait, in vain and without a pause, for what is overdue.
            self.since = None;
        }
    }

    /// Drops everything, and wants nothing more.
    pub fn clear(&mut self) {
        self.next = None;
        self.intake.clear();
        self.since = None;
    }
}
