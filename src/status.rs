//! What the daemon knows of itself, for `/status`, `/readyz` and the metrics.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::batch::Outcomes;
use crate::cursor::Doubt;
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
    /// When the published position was last seen at the end, by the wall clock.
    pub caught_up_at: Option<TimestampMs>,
    /// Of each batch in hand, where it ends and the timestamp of its first record.
    in_hand: VecDeque<(NextOffset, TimestampMs)>,
}

/// Batches of one partition in hand: one that is written and those that wait for their Kafka transaction.
const IN_HAND_MAX: usize = 4;

impl PartitionStatus {
    fn opening() -> Self {
        Self {
            phase: Phase::Opening,
            applied: None,
            published: None,
            applied_timestamp: None,
            end: None,
            caught_up_at: None,
            in_hand: VecDeque::new(),
        }
    }

    /// Records between the published position and the end.
    pub fn lag(&self) -> Option<i64> {
        Some((self.end?.0 - self.published?.0).max(0))
    }

    /// Age of the oldest record that is not published yet, in milliseconds; 0 when caught up. By that record's
    /// timestamp while it is in hand. Else it came after the last written record, and after the moment at which
    /// the partition was last seen caught up: the shorter of the two. `None`: neither is known.
    pub fn lag_ms(&self, now: TimestampMs) -> Option<i64> {
        if self.lag()? == 0 {
            return Some(0);
        }
        let oldest = match self.in_hand.front() {
            Some((_, at)) => Some(*at),
            None => self.applied_timestamp.max(self.caught_up_at),
        };
        oldest.map(|at| (now.0 - at.0).max(0))
    }

    fn note_caught_up(&mut self, now: TimestampMs) {
        if self.lag() == Some(0) {
            self.caught_up_at = Some(now);
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
    pub fn settled(&self, outcomes: &Outcomes) {
        self.written.fetch_add(outcomes.written, Ordering::Relaxed);
        self.redelivered.fetch_add(outcomes.redelivered, Ordering::Relaxed);
        self.duplicates.fetch_add(outcomes.duplicate, Ordering::Relaxed);
        self.dead_letters.fetch_add(outcomes.dead_lettered, Ordering::Relaxed);
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
        let mut state = self.state();
        let status = state.partitions.entry(partition).or_insert_with(PartitionStatus::opening);
        status.phase = Phase::Opening;
        status.in_hand.clear();
    }

    /// What was found of a partition that is being opened: where what may be unpublished begins, and the end.
    pub fn found(&self, partition: Partition, unpublished_from: NextOffset, end: NextOffset) {
        if let Some(status) = self.state().partitions.get_mut(&partition) {
            status.published = Some(unpublished_from);
            status.end = Some(end);
        }
    }

    /// A batch was cut: of its partitions where it ends, and the timestamp of the first record.
    pub fn taken(&self, parts: impl Iterator<Item = (Partition, NextOffset, TimestampMs)>) {
        let mut state = self.state();
        for (partition, reached, at) in parts {
            if let Some(status) = state.partitions.get_mut(&partition)
                && status.in_hand.len() < IN_HAND_MAX
            {
                status.in_hand.push_back((reached, at));
            }
        }
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
            while status.in_hand.front().is_some_and(|(reached, _)| *reached <= published) {
                status.in_hand.pop_front();
            }
        }
    }

    /// Ends of the log as just asked.
    pub fn ends(&self, now: TimestampMs, ends: impl Iterator<Item = (Partition, NextOffset)>) {
        let mut state = self.state();
        for (partition, end) in ends {
            if let Some(status) = state.partitions.get_mut(&partition) {
                status.end = Some(end);
                status.note_caught_up(now);
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

    fn lag_ms(board: &Board, now: i64) -> Option<i64> {
        board.partitions().get(&Partition(0)).unwrap().lag_ms(TimestampMs(now))
    }

    #[test]
    fn lag_in_time_is_that_of_the_oldest_record_as_far_as_it_is_known() {
        let board = Board::default();
        let at = |offset| NextOffset(offset);
        let p = Partition(0);
        let ends = |now, end| board.ends(TimestampMs(now), [(p, at(end))].into_iter());
        let positions = |published, last: Option<i64>| {
            let last = last.map(TimestampMs);
            board.positions([(p, at(published), at(published), last)].into_iter());
        };

        // Nothing is known before the cursors were read; then there is lag, but of what age is not known.
        board.opening(p);
        assert_eq!(lag_ms(&board, 1_000), None);
        board.found(p, at(0), at(10));
        assert_eq!(board.partitions()[&p].lag(), Some(10));
        assert_eq!(lag_ms(&board, 1_000), None);

        // Nothing was written ever, and the first records are in hand.
        positions(0, None);
        board.taken([(p, at(4), TimestampMs(200))].into_iter());
        board.taken([(p, at(8), TimestampMs(300))].into_iter());
        assert_eq!(lag_ms(&board, 1_000), Some(800));
        positions(4, Some(290));
        assert_eq!(lag_ms(&board, 1_000), Some(700));

        // What remains is not fetched yet: it is no older than the last written.
        positions(8, Some(350));
        assert_eq!(lag_ms(&board, 1_000), Some(650));

        // Caught up, and at rest for long: a new record is not as old as the last one.
        positions(10, Some(400));
        assert_eq!(lag_ms(&board, 1_000), Some(0));
        ends(90_000, 10);
        ends(92_000, 11);
        assert_eq!(lag_ms(&board, 92_500), Some(2_500));

        // What a lane forgets is no longer in hand.
        board.taken([(p, at(11), TimestampMs(500))].into_iter());
        assert_eq!(lag_ms(&board, 92_500), Some(92_000));
        board.opening(p);
        assert_eq!(lag_ms(&board, 92_500), Some(2_500));
    }

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
