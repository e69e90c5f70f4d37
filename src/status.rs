//! What the daemon knows of itself, for `/status`, `/readyz` and the metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cursor::Doubt;
use crate::disposition::Fate;
use crate::record::{NextOffset, Partition, TimestampMs};

/// What a partition is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Assigned; where to go on is being found out.
    Opening,
    /// Being written and published.
    Live,
    /// Halted until a person settles it.
    Halted(Doubt),
}

/// One assigned partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartitionStatus {
    /// What it is doing.
    pub phase: Phase,
    /// Next offset to write.
    pub applied: Option<NextOffset>,
    /// Next offset to publish.
    pub published: Option<NextOffset>,
    /// Timestamp of the last record written.
    pub applied_timestamp: Option<TimestampMs>,
    /// The last stable offset, as last asked.
    pub end: Option<NextOffset>,
}

impl PartitionStatus {
    fn opening() -> Self {
        Self { phase: Phase::Opening, applied: None, published: None, applied_timestamp: None, end: None }
    }

    /// Records between the published position and the end.
    pub fn lag(&self) -> Option<i64> {
        Some((self.end?.0 - self.published?.0).max(0))
    }

    /// Age of the last written record while there is lag; 0 when caught up. Milliseconds.
    pub fn lag_ms(&self, now: TimestampMs) -> Option<i64> {
        match self.lag()? {
            0 => Some(0),
            _ => self.applied_timestamp.map(|at| (now.0 - at.0).max(0)),
        }
    }
}

/// A dependency's state: up, or why not.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Dependency {
    /// Nothing was heard of it yet.
    #[default]
    Unknown,
    /// It answers.
    Up,
    /// It does not; the reason names no payload.
    Down(String),
}

#[derive(Default)]
struct State {
    partitions: BTreeMap<Partition, PartitionStatus>,
    lanes: BTreeMap<usize, (Dependency, Dependency)>,
    start: (Dependency, Dependency),
    is_member: bool,
    broker_lost_at: Option<Instant>,
    broker_refusal: Option<(Instant, String)>,
    was_fenced_after_loss: bool,
}

/// A refused connection is tried again all the time, after pauses of up to ten seconds.
const REFUSAL_LASTS: Duration = Duration::from_secs(15);

/// Records settled since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Written now.
    pub written: u64,
    /// Written in an earlier try, delivered again for their events.
    pub redelivered: u64,
    /// Duplicates.
    pub duplicates: u64,
    /// Dead letters.
    pub dead_letters: u64,
}

/// Shared by lanes (which write it once a batch) and the admin server (which reads it).
#[derive(Default)]
pub struct Board {
    state: Mutex<State>,
    written: AtomicU64,
    redelivered: AtomicU64,
    duplicates: AtomicU64,
    dead_letters: AtomicU64,
}

impl Board {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection to the broker broke, or the broker was not heard of for a session's time.
    pub fn broker_lost(&self) {
        self.state().broker_lost_at = Some(Instant::now());
    }

    /// A broker refused the connection: credentials, certificates, rights.
    pub fn broker_refused(&self, reason: &str) {
        self.state().broker_refusal = Some((Instant::now(), reason.to_owned()));
    }

    /// Why brokers refused the connection lately; requests only time out then.
    pub fn broker_refusal(&self) -> Option<String> {
        let state = self.state();
        state
            .broker_refusal
            .as_ref()
            .filter(|(at, _)| at.elapsed() <= REFUSAL_LASTS)
            .map(|(_, reason)| reason.clone())
    }

    /// The member was fenced; `suspicion` is how soon after the loss of the broker that may be by itself.
    pub fn fenced(&self, suspicion: Duration) {
        let mut state = self.state();
        state.was_fenced_after_loss = state.broker_lost_at.is_some_and(|at| at.elapsed() <= suspicion);
    }

    /// Whether the member was fenced soon after the broker was lost.
    pub fn was_fenced_after_loss(&self) -> bool {
        self.state().was_fenced_after_loss
    }

    /// The process is no member any more, and joins again. A loss of the broker explains one fencing.
    pub fn left(&self) {
        *self.state() = State::default();
    }

    /// Counts records that were settled.
    pub fn settled(&self, fates: &[Fate]) {
        let (mut written, mut redelivered, mut duplicates, mut dead_letters) = (0, 0, 0, 0);
        for fate in fates {
            match fate {
                Fate::Written => written += 1,
                Fate::WrittenBefore => redelivered += 1,
                Fate::Duplicate => duplicates += 1,
                Fate::DeadLetter(_) | Fate::Rejected(_) => dead_letters += 1,
            }
        }
        self.written.fetch_add(written, Ordering::Relaxed);
        self.redelivered.fetch_add(redelivered, Ordering::Relaxed);
        self.duplicates.fetch_add(duplicates, Ordering::Relaxed);
        self.dead_letters.fetch_add(dead_letters, Ordering::Relaxed);
    }

    /// Records settled since the start.
    pub fn totals(&self) -> Totals {
        Totals {
            written: self.written.load(Ordering::Relaxed),
            redelivered: self.redelivered.load(Ordering::Relaxed),
            duplicates: self.duplicates.load(Ordering::Relaxed),
            dead_letters: self.dead_letters.load(Ordering::Relaxed),
        }
    }

    /// A partition was assigned or is being opened again.
    pub fn opening(&self, partition: Partition) {
        self.state().partitions.entry(partition).or_insert_with(PartitionStatus::opening).phase =
            Phase::Opening;
    }

    /// A partition is no longer ours.
    pub fn revoked(&self, partition: Partition) {
        self.state().partitions.remove(&partition);
    }

    /// A partition is halted.
    pub fn halted(&self, partition: Partition, doubt: Doubt) {
        self.state().partitions.entry(partition).or_insert_with(PartitionStatus::opening).phase =
            Phase::Halted(doubt);
    }

    /// Positions of live partitions.
    pub fn positions(
        &self,
        positions: impl Iterator<Item = (Partition, NextOffset, NextOffset, Option<TimestampMs>)>,
    ) {
        let mut state = self.state();
        for (partition, applied, published, timestamp) in positions {
            let status = state.partitions.entry(partition).or_insert_with(PartitionStatus::opening);
            status.phase = Phase::Live;
            status.applied = Some(applied);
            status.published = Some(published);
            status.applied_timestamp = timestamp.or(status.applied_timestamp);
        }
    }

    /// Ends of the log as just asked.
    pub fn ends(&self, ends: impl Iterator<Item = (Partition, NextOffset)>) {
        let mut state = self.state();
        for (partition, end) in ends {
            if let Some(status) = state.partitions.get_mut(&partition) {
                status.end = Some(end);
            }
        }
    }

    /// All assigned partitions.
    pub fn partitions(&self) -> BTreeMap<Partition, PartitionStatus> {
        self.state().partitions.clone()
    }

    /// The database, as `lane` sees it.
    pub fn database(&self, lane: usize, dependency: Dependency) {
        self.state().lanes.entry(lane).or_default().0 = dependency;
    }

    /// The broker, as `lane` sees it.
    pub fn broker(&self, lane: usize, dependency: Dependency) {
        self.state().lanes.entry(lane).or_default().1 = dependency;
    }

    /// The database and the broker before there are lanes, and between batches.
    pub fn probed(&self, database: Option<Dependency>, broker: Option<Dependency>) {
        let mut state = self.state();
        if let Some(database) = database {
            state.start.0 = database;
        }
        if let Some(broker) = broker {
            state.start.1 = broker;
        }
    }

    /// The group was joined.
    pub fn member(&self, is_member: bool) {
        self.state().is_member = is_member;
    }

    /// What keeps the daemon from being ready; empty when it is.
    pub fn missing(&self) -> BTreeMap<&'static str, String> {
        let state = self.state();
        let mut missing = BTreeMap::new();
        let mut note = |name, dependency: &Dependency, required: bool| match dependency {
            Dependency::Down(reason) => {
                missing.insert(name, reason.clone());
            }
            Dependency::Unknown if required => {
                missing.insert(name, "not asked yet".to_owned());
            }
            _ => {}
        };
        note("database", &state.start.0, true);
        note("broker", &state.start.1, true);
        for (database, broker) in state.lanes.values() {
            note("database", database, false);
            note("broker", broker, false);
        }
        if !state.is_member && state.partitions.is_empty() {
            missing.insert("group", "not joined yet".to_owned());
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUSPICION: Duration = Duration::from_secs(60);

    #[test]
    fn each_loss_of_the_broker_explains_one_fencing() {
        let board = Board::default();
        board.fenced(SUSPICION);
        assert!(!board.was_fenced_after_loss(), "nothing was lost");

        // However soon after each other, as with a broker that dies twice within minutes.
        for _ in 0..3 {
            board.broker_lost();
            board.fenced(SUSPICION);
            assert!(board.was_fenced_after_loss());
            board.left();
        }

        board.fenced(SUSPICION);
        assert!(!board.was_fenced_after_loss(), "nothing was lost since: there is a namesake");
    }
}
