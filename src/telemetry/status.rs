//! State of the daemon, for `/status`, `/readyz` and the metrics.

pub mod begins;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::begins::{Begin, Begins};
use crate::domain::batch::OutcomeCounts;
use crate::domain::cursor::{HaltReason, Known};
use crate::domain::record::{NextOffset, Partition, TimestampMs};

/// Phase of a partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Assigned; recovery determines where to continue.
    Opening,
    /// Being written and published.
    Live,
    /// Halted until an operator resolves it.
    Halted(HaltReason),
}

/// State of an assigned partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartitionStatus {
    /// Current phase.
    pub phase: Phase,
    /// Next offset to write.
    pub applied: Option<NextOffset>,
    /// Next offset to publish.
    pub published: Option<NextOffset>,
    /// The lowest of the cursors, during recovery or while halted.
    pub unpublished_from: Option<NextOffset>,
    /// Timestamp of the last written record, but at most the time at which this was recorded: a producer
    /// clock that is ahead must not hide lag.
    pub applied_timestamp: Option<TimestampMs>,
    /// That timestamp as it is in the record.
    stamped: Option<TimestampMs>,
    /// Last stable offset, when last read.
    pub end: Option<NextOffset>,
    /// When the partition was last caught up to the end, by the wall clock.
    pub caught_up_at: Option<TimestampMs>,
    /// When the partition was assigned, by the wall clock.
    pub assigned_at: TimestampMs,
    /// `applied` in the database at the last recovery.
    found_applied: Option<NextOffset>,
    /// End offset and first timestamp of each batch in flight.
    in_hand: VecDeque<(NextOffset, TimestampMs)>,
}

/// Maximum number of batches of a partition in flight: one being written and those that wait for their Kafka
/// transaction.
const IN_HAND_MAX: usize = 4;

impl PartitionStatus {
    fn opening(now: TimestampMs) -> Self {
        Self {
            phase: Phase::Opening,
            applied: None,
            published: None,
            unpublished_from: None,
            applied_timestamp: None,
            stamped: None,
            end: None,
            caught_up_at: None,
            assigned_at: now,
            found_applied: None,
            in_hand: VecDeque::new(),
        }
    }

    /// Position of the lane at a rebalance that may have interrupted fetching; for the audit.
    fn disturbed(&self, partition: Partition) -> Option<Begin> {
        let applied = self.applied?;
        let position = self.in_hand.back().map_or(applied, |(reached, _)| applied.max(*reached));
        Some(Begin { partition, position, applied })
    }

    /// Everything before this offset is written and published.
    fn done_to(&self) -> Option<NextOffset> {
        // In a restored database, the rows may be behind what was published.
        self.unpublished_from.or_else(|| Some(self.applied?.min(self.published?)))
    }

    /// Number of records between what is written and published and the end.
    pub fn lag(&self) -> Option<i64> {
        Some((self.end?.0 - self.done_to()?.0).max(0))
    }

    /// Age in milliseconds of the oldest record that is not yet written and published; 0 when caught up.
    /// While that record is in flight, its timestamp is used. Otherwise the record arrived after the last
    /// written record and after the partition was last caught up; the later of these times is used. If
    /// neither is known, the time of the assignment is used.
    pub fn lag_ms(&self, now: TimestampMs) -> i64 {
        if self.is_caught_up() {
            return 0;
        }
        let oldest = match self.in_hand.front() {
            Some((_, at)) => *at,
            None => self.applied_timestamp.max(self.caught_up_at).unwrap_or(self.assigned_at),
        };
        (now.0 - oldest.0).max(0)
    }

    /// A cursor beyond the end has a lag of 0, but new records will not be written either.
    fn is_caught_up(&self) -> bool {
        let is_beyond_end = matches!(self.phase, Phase::Halted(HaltReason::BeyondEnd { .. }));
        self.lag() == Some(0) && !is_beyond_end
    }

    fn note_written(&mut self, now: TimestampMs, timestamp: Option<TimestampMs>) {
        // Keep the first value: `now` only grows.
        if timestamp.is_some() && timestamp != self.stamped {
            self.stamped = timestamp;
            self.applied_timestamp = timestamp.map(|at| at.min(now));
        }
    }

    /// Positions went back, as in a restored database: earlier observations do not apply to the records that
    /// are read again.
    fn note_went_back(&mut self) {
        self.caught_up_at = None;
        self.applied_timestamp = None;
        self.stamped = None;
    }

    fn note_caught_up(&mut self, now: TimestampMs) {
        if self.is_caught_up() {
            self.caught_up_at = Some(now);
        }
    }
}

/// State of a dependency.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Dependency {
    /// Not known yet.
    #[default]
    Unknown,
    /// Requests succeed.
    Up,
    /// Requests fail; the reason contains no payload.
    Down(String),
}

#[derive(Default)]
struct State {
    partitions: BTreeMap<Partition, PartitionStatus>,
    lanes: BTreeMap<usize, (Dependency, Dependency)>,
    start: (Dependency, Dependency),
    /// When the log ends were last read successfully.
    ends_at: Option<TimestampMs>,
    is_member: bool,
    /// While the process is not a member or does not know its partitions' positions yet: since when, or the
    /// age of the oldest record that was pending before.
    waiting_since: Option<TimestampMs>,
    /// Time of the last rebalance.
    disturbed_at: Option<Instant>,
    broker_lost_at: Option<Instant>,
    broker_refusal: Option<(Instant, String)>,
    was_fenced_after_loss: bool,
}

impl State {
    fn oldest_pending_ms(&self, now: TimestampMs) -> i64 {
        let waited = self.waiting_since.map(|since| now.0 - since.0);
        let lags = self.partitions.values().map(|status| status.lag_ms(now));
        lags.chain(waited).max().unwrap_or(0).max(0)
    }

    /// Positions of the partitions at a rebalance. Only the first of the callbacks of one rebalance returns
    /// them.
    fn disturbed(&mut self) -> Vec<Begin> {
        if self.disturbed_at.is_some_and(|at| at.elapsed() < SAME_EVENT) {
            return Vec::new();
        }
        self.disturbed_at = Some(Instant::now());
        self.partitions.iter().filter_map(|(partition, status)| status.disturbed(*partition)).collect()
    }

    fn waits(&mut self, now: TimestampMs) {
        self.waiting_since = Some(TimestampMs(now.0 - self.oldest_pending_ms(now)));
    }

    /// A member stops waiting once the position of each of its partitions is known.
    fn note_known(&mut self) {
        if self.is_member && self.partitions.values().all(|status| status.lag().is_some()) {
            self.waiting_since = None;
        }
    }
}

/// Partitions are revoked one by one, all within this time.
const SAME_EVENT: Duration = Duration::from_millis(100);
/// librdkafka retries a refused connection continually, but reports an identical error of a broker only every
/// 30 s.
const REFUSAL_LASTS: Duration = Duration::from_secs(35);

/// Completed records since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Records written.
    pub written: u64,
    /// Records that were written before and redelivered for their events.
    pub redelivered: u64,
    /// Duplicates.
    pub duplicates: u64,
    /// Dead letters.
    pub dead_letters: u64,
}

/// State shared by the lanes, which update it once per batch, and the admin server, which reads it.
#[derive(Default)]
pub struct StatusRegistry {
    state: Mutex<State>,
    begins: Mutex<Begins>,
    written: AtomicU64,
    redelivered: AtomicU64,
    duplicates: AtomicU64,
    dead_letters: AtomicU64,
}

impl StatusRegistry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begins(&self) -> MutexGuard<'_, Begins> {
        self.begins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enables recording of fetch starts; the caller must take them regularly.
    pub fn want_begins(&self) {
        self.begins().want();
    }

    /// Fetching of a partition starts or restarts at `position`.
    pub fn began(&self, partition: Partition, position: NextOffset) {
        let found = self.state().partitions.get(&partition).and_then(|status| status.found_applied);
        self.begins().push(Begin { partition, position, applied: found.unwrap_or(position) });
    }

    /// Takes the fetch starts since the last call, and the number of dropped ones.
    pub fn take_begins(&self) -> (VecDeque<Begin>, u64) {
        self.begins().take()
    }

    /// Records a rebalance, which may have interrupted fetching of every partition.
    fn rebalanced(&self, disturbed: Vec<Begin>) {
        let mut begins = self.begins();
        disturbed.into_iter().for_each(|begin| begins.push(begin));
    }

    /// Next offset to write of each partition, where known.
    pub fn applied(&self) -> Vec<(Partition, NextOffset)> {
        let state = self.state();
        state.partitions.iter().filter_map(|(p, status)| Some((*p, status.applied?))).collect()
    }

    /// Total lag in records of all partitions whose lag is known.
    pub fn lag(&self) -> i64 {
        self.state().partitions.values().filter_map(PartitionStatus::lag).sum()
    }

    /// The connection to the broker was lost, or the broker was silent for the session timeout.
    pub fn broker_lost(&self) {
        self.state().broker_lost_at = Some(Instant::now());
    }

    /// A broker refused the connection: credentials, certificates or permissions.
    pub fn broker_refused(&self, reason: &str) {
        self.state().broker_refusal = Some((Instant::now(), reason.to_owned()));
    }

    /// Why brokers refused connections recently; requests then only time out.
    pub fn broker_refusal(&self) -> Option<String> {
        let state = self.state();
        state
            .broker_refusal
            .as_ref()
            .filter(|(at, _)| at.elapsed() <= REFUSAL_LASTS)
            .map(|(_, reason)| reason.clone())
    }

    /// The member was fenced. `suspicion` is the time after a loss of the broker within which a fencing may
    /// be self-inflicted.
    pub fn fenced(&self, suspicion: Duration) {
        let mut state = self.state();
        state.was_fenced_after_loss = state.broker_lost_at.is_some_and(|at| at.elapsed() <= suspicion);
    }

    /// Whether the member was fenced soon after the broker was lost.
    pub fn was_fenced_after_loss(&self) -> bool {
        self.state().was_fenced_after_loss
    }

    /// The process is not a member yet or starts again: it knows of no records, and may be the only process.
    pub fn waits(&self, now: TimestampMs) {
        self.state().waits(now);
    }

    /// The process is no longer a member and joins again. A loss of the broker excuses only one fencing.
    pub fn left(&self, now: TimestampMs) {
        let mut state = self.state();
        state.waits(now);
        *state = State { waiting_since: state.waiting_since, ..State::default() };
    }

    /// Age in milliseconds of this process's oldest record that is not yet written and published, where
    /// known. For a process that is not a member, the time without membership is added to the last known age.
    pub fn oldest_pending_ms(&self, now: TimestampMs) -> i64 {
        self.state().oldest_pending_ms(now)
    }

    /// Counts completed records.
    pub fn settled(&self, outcomes: &OutcomeCounts) {
        self.written.fetch_add(outcomes.written, Ordering::Relaxed);
        self.redelivered.fetch_add(outcomes.redelivered, Ordering::Relaxed);
        self.duplicates.fetch_add(outcomes.duplicate, Ordering::Relaxed);
        self.dead_letters.fetch_add(outcomes.dead_lettered, Ordering::Relaxed);
    }

    /// Completed records since the start.
    pub fn totals(&self) -> Totals {
        Totals {
            written: self.written.load(Ordering::Relaxed),
            redelivered: self.redelivered.load(Ordering::Relaxed),
            duplicates: self.duplicates.load(Ordering::Relaxed),
            dead_letters: self.dead_letters.load(Ordering::Relaxed),
        }
    }

    /// Recovery of a partition starts or restarts.
    pub fn opening(&self, now: TimestampMs, partition: Partition) {
        let mut state = self.state();
        let status = state.partitions.entry(partition).or_insert_with(|| PartitionStatus::opening(now));
        if !matches!(&status.phase, Phase::Halted(reason) if reason.is_about_reading()) {
            status.phase = Phase::Opening;
        }
        status.in_hand.clear();
    }

    /// Positions found by recovery. `now` is from before the end was read.
    pub fn found(&self, now: TimestampMs, known: &Known) {
        let mut state = self.state();
        if let Some(status) = state.partitions.get_mut(&known.partition) {
            let row = known.row.as_ref();
            if row.map(|row| row.applied) < status.applied {
                status.note_went_back();
            }
            status.unpublished_from = Some(known.unpublished_from());
            status.found_applied = row.map(|row| row.applied);
            status.end = Some(known.bounds.end);
            status.note_written(now, row.and_then(|row| row.applied_timestamp));
            status.note_caught_up(now);
        }
        state.note_known();
    }

    /// A batch was closed: the end offset and first timestamp of each of its partitions.
    pub fn taken(&self, now: TimestampMs, parts: impl Iterator<Item = (Partition, NextOffset, TimestampMs)>) {
        let mut state = self.state();
        for (partition, reached, at) in parts {
            if let Some(status) = state.partitions.get_mut(&partition)
                && status.in_hand.len() < IN_HAND_MAX
            {
                status.in_hand.push_back((reached, at.min(now)));
            }
        }
    }

    /// A partition was revoked.
    pub fn revoked(&self, partition: Partition) {
        let mut state = self.state();
        let disturbed = state.disturbed();
        state.partitions.remove(&partition);
        state.note_known();
        drop(state);
        self.rebalanced(disturbed);
    }

    /// A partition is halted.
    pub fn halted(&self, partition: Partition, reason: HaltReason) {
        if let Some(status) = self.state().partitions.get_mut(&partition) {
            status.phase = Phase::Halted(reason);
        }
    }

    /// A partition that could not be read is read again.
    pub fn flows(&self, partition: Partition) {
        if let Some(status) = self.state().partitions.get_mut(&partition) {
            status.phase = Phase::Live;
        }
    }

    /// Updates positions of running partitions. A partition that cannot be read stays halted until
    /// [`flows`](Self::flows).
    pub fn positions(
        &self,
        now: TimestampMs,
        positions: impl Iterator<Item = (Partition, NextOffset, NextOffset, Option<TimestampMs>)>,
    ) {
        let mut state = self.state();
        for (partition, applied, published, timestamp) in positions {
            let Some(status) = state.partitions.get_mut(&partition) else { continue };
            if !matches!(&status.phase, Phase::Halted(reason) if reason.is_about_reading()) {
                status.phase = Phase::Live;
            }
            // Also if an operator stated that events that were published must be sent again.
            if Some(applied.min(published)) < status.applied.min(status.published) {
                status.note_went_back();
            }
            status.applied = Some(applied);
            status.published = Some(published);
            status.unpublished_from = None;
            status.note_written(now, timestamp);
            let done_to = applied.min(published);
            while status.in_hand.front().is_some_and(|(reached, _)| *reached <= done_to) {
                status.in_hand.pop_front();
            }
        }
    }

    /// The last stable offset of `partition`, if it was read at or after `since`.
    pub fn end_since(&self, partition: Partition, since: TimestampMs) -> Option<NextOffset> {
        let state = self.state();
        state.ends_at.filter(|at| *at >= since)?;
        state.partitions.get(&partition)?.end
    }

    /// Updates the log ends; `now` is from before they were read.
    pub fn ends(&self, now: TimestampMs, ends: impl Iterator<Item = (Partition, NextOffset)>) {
        let mut state = self.state();
        state.ends_at = Some(now);
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

    /// State of the database as seen by `lane`.
    pub fn database(&self, lane: usize, dependency: Dependency) {
        self.state().lanes.entry(lane).or_default().0 = dependency;
    }

    /// State of the broker as seen by `lane`.
    pub fn broker(&self, lane: usize, dependency: Dependency) {
        self.state().lanes.entry(lane).or_default().1 = dependency;
    }

    /// State of the database and the broker before there are lanes, and between batches.
    pub fn probed(&self, database: Option<Dependency>, broker: Option<Dependency>) {
        let mut state = self.state();
        if let Some(database) = database {
            state.start.0 = database;
        }
        if let Some(broker) = broker {
            state.start.1 = broker;
        }
    }

    /// The process is a member and was assigned these partitions; lanes start recovery later.
    pub fn assigned(&self, now: TimestampMs, partitions: &[Partition]) {
        let mut state = self.state();
        let disturbed = state.disturbed();
        state.is_member = true;
        for partition in partitions {
            state.partitions.entry(*partition).or_insert_with(|| PartitionStatus::opening(now));
        }
        state.note_known();
        drop(state);
        self.rebalanced(disturbed);
    }

    /// Whether the process is a member; its assignment may be empty.
    pub fn is_member(&self) -> bool {
        self.state().is_member
    }

    /// The group membership was lost.
    pub fn lost(&self, now: TimestampMs) {
        let mut state = self.state();
        let disturbed = state.disturbed();
        state.is_member = false;
        state.waits(now);
        drop(state);
        self.rebalanced(disturbed);
    }

    /// What keeps the daemon from being ready; empty when it is ready.
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
    use crate::domain::cursor::{CursorRow, LogBounds, Proof};

    const SUSPICION: Duration = Duration::from_secs(60);

    fn lag_ms(status: &StatusRegistry, now: i64) -> i64 {
        status.partitions().get(&Partition(0)).unwrap().lag_ms(TimestampMs(now))
    }

    fn at(offset: i64) -> NextOffset {
        NextOffset(offset)
    }

    const P: Partition = Partition(0);

    /// Positions of a partition with a cursor row.
    fn known(applied: i64, end: i64, last: Option<i64>) -> Known {
        Known {
            partition: P,
            group: None,
            row: Some(CursorRow {
                applied: at(applied),
                published: None,
                applied_timestamp: last.map(TimestampMs),
                settled: None,
            }),
            bounds: LogBounds { start: at(0), end: at(end) },
            proof: Proof::NotAsked,
        }
    }

    #[test]
    fn lag_in_time_is_that_of_the_oldest_record_as_far_as_it_is_known() {
        let status = StatusRegistry::default();
        let ends = |now, end| status.ends(TimestampMs(now), [(P, at(end))].into_iter());
        let positions = |published, last: Option<i64>| {
            let last = last.map(TimestampMs);
            status.positions(TimestampMs(1_000), [(P, at(published), at(published), last)].into_iter());
        };
        let taken =
            |end, stamp| status.taken(TimestampMs(1_000), [(P, at(end), TimestampMs(stamp))].into_iter());

        // Before the cursors are read, the age of the lag is not known.
        status.opening(TimestampMs(100), P);
        assert_eq!(lag_ms(&status, 1_000), 900);
        status.found(TimestampMs(150), &known(0, 10, None));
        let found = status.partitions()[&P].clone();
        assert_eq!((found.lag(), found.published), (Some(10), None), "a lowest cursor is no position");
        assert_eq!(lag_ms(&status, 1_000), 900);

        // Nothing was ever written, and the first records are in flight.
        positions(0, None);
        taken(4, 200);
        taken(8, 300);
        assert_eq!(lag_ms(&status, 1_000), 800);
        positions(4, Some(290));
        assert_eq!(lag_ms(&status, 1_000), 700);

        // The remaining records are not fetched yet; they are not older than the last written one.
        positions(8, Some(350));
        assert_eq!(lag_ms(&status, 1_000), 650);

        // Caught up and idle for long: a new record is not as old as the last one.
        positions(10, Some(400));
        assert_eq!(lag_ms(&status, 1_000), 0);
        ends(90_000, 10);
        ends(92_000, 11);
        assert_eq!(lag_ms(&status, 92_500), 2_500);

        // Batches that a lane drops are no longer in flight.
        taken(11, 500);
        assert_eq!(lag_ms(&status, 92_500), 92_000);
        status.opening(TimestampMs(92_400), P);
        assert_eq!(lag_ms(&status, 92_500), 2_500);
    }

    #[test]
    fn a_partition_that_does_not_go_on_grows_older_from_the_start() {
        // Its cursors cannot be read, or it is halted by recovery.
        let status = StatusRegistry::default();
        status.opening(TimestampMs(1_000), P);
        assert_eq!((lag_ms(&status, 1_000), lag_ms(&status, 61_000)), (0, 60_000));
        status.found(TimestampMs(62_000), &known(3, 8, Some(500)));
        status.halted(P, HaltReason::LogGap { needed: at(3), log_start: at(5) });
        assert_eq!(status.partitions()[&P].lag(), Some(5));
        assert_eq!(lag_ms(&status, 62_500), 62_000);

        // A partition that was revoked and assigned again starts afresh.
        status.revoked(P);
        status.opening(TimestampMs(70_000), P);
        assert_eq!(lag_ms(&status, 70_500), 500);
    }

    #[test]
    fn what_is_written_again_in_a_restored_database_is_lag() {
        let status = StatusRegistry::default();
        let positions = |applied| {
            let last = Some(TimestampMs(700));
            status.positions(TimestampMs(1_000), [(P, at(applied), at(10), last)].into_iter());
        };
        status.opening(TimestampMs(100), P);
        status.found(TimestampMs(100), &known(2, 10, None));
        positions(2);
        status.taken(TimestampMs(1_000), [(P, at(6), TimestampMs(300))].into_iter());
        positions(2);
        assert_eq!((status.partitions()[&P].lag(), lag_ms(&status, 1_000)), (Some(8), 700));
        positions(6);
        assert_eq!((status.partitions()[&P].lag(), lag_ms(&status, 1_000)), (Some(4), 300));
        positions(10);
        assert_eq!(lag_ms(&status, 1_000), 0);
    }

    #[test]
    fn a_clock_that_is_ahead_hides_no_lag() {
        let status = StatusRegistry::default();
        let ahead = Some(TimestampMs(3_600_000));
        status.opening(TimestampMs(0), P);
        status.found(TimestampMs(1_000), &known(0, 9, Some(3_600_000)));
        assert_eq!(lag_ms(&status, 5_000), 4_000);
        let positions = |now, last| status.positions(TimestampMs(now), [(P, at(4), at(4), last)].into_iter());
        positions(6_000, ahead);
        assert_eq!(lag_ms(&status, 7_000), 6_000, "the same record is noted once");
        positions(8_000, Some(TimestampMs(3_600_001)));
        assert_eq!(lag_ms(&status, 9_000), 1_000);
        status.taken(TimestampMs(10_000), [(P, at(9), TimestampMs(3_600_002))].into_iter());
        assert_eq!(lag_ms(&status, 12_000), 2_000);
    }

    #[test]
    fn a_process_that_is_no_member_counts_for_how_long() {
        let status = StatusRegistry::default();
        let oldest = |now| status.oldest_pending_ms(TimestampMs(now));
        status.waits(TimestampMs(1_000));
        assert_eq!(oldest(31_000), 30_000);
        status.assigned(TimestampMs(40_000), &[]);
        assert_eq!(oldest(50_000), 0, "a member without partitions");

        // Pending records age, also when the membership is lost.
        status.opening(TimestampMs(60_000), P);
        assert_eq!(oldest(61_000), 1_000);
        status.lost(TimestampMs(65_000));
        status.revoked(P);
        assert_eq!(oldest(70_000), 10_000);
        status.left(TimestampMs(70_000));
        status.waits(TimestampMs(71_000));
        assert_eq!(oldest(72_000), 12_000);
        status.assigned(TimestampMs(73_000), &[P]);
        assert_eq!(oldest(74_000), 14_000, "positions are not known yet");
        status.opening(TimestampMs(74_000), P);
        status.ends(TimestampMs(74_000), [(P, at(9))].into_iter());
        assert_eq!(oldest(75_000), 15_000);
        status.found(TimestampMs(75_000), &known(8, 9, Some(74_500)));
        assert_eq!(oldest(76_000), 1_500);
    }

    #[test]
    fn a_cursor_beyond_the_end_is_not_caught_up_once_it_is_halted() {
        let status = StatusRegistry::default();
        status.opening(TimestampMs(0), P);
        status.found(TimestampMs(1_000), &known(20, 15, Some(500)));
        assert_eq!(lag_ms(&status, 9_000), 0, "a leader may lag");
        status.halted(P, HaltReason::BeyondEnd { position: at(20), end: at(15) });
        assert_eq!(lag_ms(&status, 9_000), 8_000);
        status.found(TimestampMs(10_000), &known(20, 15, Some(500)));
        status.ends(TimestampMs(11_000), [(P, at(16))].into_iter());
        assert_eq!(
            (lag_ms(&status, 12_000), status.oldest_pending_ms(TimestampMs(12_000))),
            (11_000, 11_000)
        );
    }

    #[test]
    fn what_was_caught_up_before_a_restore_is_no_news_of_what_comes_again() {
        let status = StatusRegistry::default();
        let positions = |applied, last| {
            let last = Some(TimestampMs(last));
            status.positions(TimestampMs(60_000), [(P, at(applied), at(10), last)].into_iter());
        };
        status.opening(TimestampMs(100), P);
        status.found(TimestampMs(100), &known(10, 10, Some(50)));
        positions(10, 50);
        status.ends(TimestampMs(60_000), [(P, at(10))].into_iter());
        assert_eq!(lag_ms(&status, 61_000), 0);

        // An older database, and an empty one.
        status.opening(TimestampMs(61_000), P);
        status.found(TimestampMs(61_000), &known(4, 10, Some(20)));
        assert_eq!(lag_ms(&status, 61_000), 60_980);
        positions(4, 20);
        assert_eq!(lag_ms(&status, 61_000), 60_980);
        status.found(TimestampMs(61_000), &Known { row: None, ..known(0, 10, None) });
        assert_eq!(lag_ms(&status, 61_000), 60_900, "since it was assigned");
    }

    #[test]
    fn each_loss_of_the_broker_explains_one_fencing() {
        let status = StatusRegistry::default();
        status.fenced(SUSPICION);
        assert!(!status.was_fenced_after_loss(), "nothing was lost");

        // However close together, as when a broker dies twice within minutes.
        for _ in 0..3 {
            status.broker_lost();
            status.fenced(SUSPICION);
            assert!(status.was_fenced_after_loss());
            status.left(TimestampMs(1));
        }

        status.fenced(SUSPICION);
        assert!(!status.was_fenced_after_loss(), "no new loss: another process uses the instance id");
    }
}
