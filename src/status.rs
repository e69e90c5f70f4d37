//! What the daemon knows of itself, for `/status`, `/readyz` and the metrics.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::audit::begins::{Begin, Begins};
use crate::batch::Outcomes;
use crate::cursor::{Doubt, Known};
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
    /// The lowest of the cursors, while the partition is being opened or is halted.
    pub unpublished_from: Option<NextOffset>,
    /// Timestamp of the last record written, no later than the moment at which this was noted: a clock that is
    /// ahead must not hide how long records wait.
    pub applied_timestamp: Option<TimestampMs>,
    /// That timestamp as the record bears it.
    stamped: Option<TimestampMs>,
    /// The last stable offset, as last asked.
    pub end: Option<NextOffset>,
    /// When everything up to the end was last seen written and published, by the wall clock.
    pub caught_up_at: Option<TimestampMs>,
    /// When it was assigned, by the wall clock.
    pub assigned_at: TimestampMs,
    /// `applied` as the database had it when the partition was last opened.
    found_applied: Option<NextOffset>,
    /// Of each batch in hand, where it ends and the timestamp of its first record.
    in_hand: VecDeque<(NextOffset, TimestampMs)>,
}

/// Batches of one partition in hand: one that is written and those that wait for their Kafka transaction.
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

    /// What the audit has to know of a partition whose fetching a rebalance may have disturbed: how far its lane had come.
    fn disturbed(&self, partition: Partition) -> Option<Begin> {
        let applied = self.applied?;
        let position = self.in_hand.back().map_or(applied, |(reached, _)| applied.max(*reached));
        Some(Begin { partition, position, applied })
    }

    /// What lies before it is written and published.
    fn done_to(&self) -> Option<NextOffset> {
        // In a database that was restored, rows have yet to reach what was published.
        self.unpublished_from.or_else(|| Some(self.applied?.min(self.published?)))
    }

    /// Records between what is written and published, and the end.
    pub fn lag(&self) -> Option<i64> {
        Some((self.end?.0 - self.done_to()?.0).max(0))
    }

    /// Age of the oldest record that is not yet written and published, in milliseconds; 0 when caught up. By that
    /// record's timestamp while it is in hand. Else it came after the last written record, and after the moment at
    /// which the partition was last seen caught up: the shorter of the two. If neither is known, not even whether
    /// there is such a record, it is the time since the partition was assigned.
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

    /// Of a cursor beyond the end nothing is left to do, and nothing that comes will be done.
    fn is_caught_up(&self) -> bool {
        let is_beyond_end = matches!(self.phase, Phase::Halted(Doubt::BeyondEnd { .. }));
        self.lag() == Some(0) && !is_beyond_end
    }

    fn note_written(&mut self, now: TimestampMs, timestamp: Option<TimestampMs>) {
        // What was noted before stays: `now` is later each time.
        if timestamp.is_some() && timestamp != self.stamped {
            self.stamped = timestamp;
            self.applied_timestamp = timestamp.map(|at| at.min(now));
        }
    }

    /// Positions went back, as in a database that was restored: what was seen before them says nothing of how old
    /// the records are that come again.
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
    /// When the ends of the log were last asked for, with an answer.
    ends_at: Option<TimestampMs>,
    is_member: bool,
    /// While the process is no member, or knows nothing of its partitions yet: since when, or since when the oldest
    /// record waits that it had before.
    waiting_since: Option<TimestampMs>,
    /// When a rebalance was last noted.
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

    /// Where the partitions are, at a rebalance. Of the calls that are one event, the first tells.
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

    /// A member's wait is over once it knows how far each of its partitions is.
    fn note_known(&mut self) {
        if self.is_member && self.partitions.values().all(|status| status.lag().is_some()) {
            self.waiting_since = None;
        }
    }
}

/// Partitions are revoked one by one, and all of them within this time.
const SAME_EVENT: Duration = Duration::from_millis(100);
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
    begins: Mutex<Begins>,
    written: AtomicU64,
    redelivered: AtomicU64,
    duplicates: AtomicU64,
    dead_letters: AtomicU64,
}

impl Board {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begins(&self) -> MutexGuard<'_, Begins> {
        self.begins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody takes the begins of partitions from now on.
    pub fn want_begins(&self) {
        self.begins().want();
    }

    /// Fetching of a partition begins, or begins again, at `position`.
    pub fn began(&self, partition: Partition, position: NextOffset) {
        let found = self.state().partitions.get(&partition).and_then(|status| status.found_applied);
        self.begins().push(Begin { partition, position, applied: found.unwrap_or(position) });
    }

    /// Takes the begins since the last time, and the number of those that there was no room for.
    pub fn take_begins(&self) -> (VecDeque<Begin>, u64) {
        self.begins().take()
    }

    /// A rebalance: it may have disturbed the fetching of every partition.
    fn rebalanced(&self, disturbed: Vec<Begin>) {
        let mut begins = self.begins();
        disturbed.into_iter().for_each(|begin| begins.push(begin));
    }

    /// Next offset to write of each partition of which it is known.
    pub fn applied(&self) -> Vec<(Partition, NextOffset)> {
        let state = self.state();
        state.partitions.iter().filter_map(|(p, status)| Some((*p, status.applied?))).collect()
    }

    /// Records between what is written and published and the ends, of all partitions of which that is known.
    pub fn lag(&self) -> i64 {
        self.state().partitions.values().filter_map(PartitionStatus::lag).sum()
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

    /// The process is no member yet, or begins anew: it knows of no record, and may be the only one there is.
    pub fn waits(&self, now: TimestampMs) {
        self.state().waits(now);
    }

    /// The process is no member any more, and joins again. A loss of the broker explains one fencing.
    pub fn left(&self, now: TimestampMs) {
        let mut state = self.state();
        state.waits(now);
        *state = State { waiting_since: state.waiting_since, ..State::default() };
    }

    /// Age of this process's oldest record that is not yet written and published, as far as known, in milliseconds.
    /// A process that is no member counts for how long, or how old the oldest was that it had.
    pub fn oldest_pending_ms(&self, now: TimestampMs) -> i64 {
        self.state().oldest_pending_ms(now)
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

    /// A partition is being opened, or opened again.
    pub fn opening(&self, now: TimestampMs, partition: Partition) {
        let mut state = self.state();
        let status = state.partitions.entry(partition).or_insert_with(|| PartitionStatus::opening(now));
        if !matches!(&status.phase, Phase::Halted(doubt) if doubt.is_about_reading()) {
            status.phase = Phase::Opening;
        }
        status.in_hand.clear();
    }

    /// What was found of a partition that is being opened. `now` is from before the end was asked for.
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

    /// A batch was cut: of its partitions where it ends, and the timestamp of the first record.
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

    /// A partition is no longer ours.
    pub fn revoked(&self, partition: Partition) {
        let mut state = self.state();
        let disturbed = state.disturbed();
        state.partitions.remove(&partition);
        state.note_known();
        drop(state);
        self.rebalanced(disturbed);
    }

    /// A partition is halted.
    pub fn halted(&self, partition: Partition, doubt: Doubt) {
        if let Some(status) = self.state().partitions.get_mut(&partition) {
            status.phase = Phase::Halted(doubt);
        }
    }

    /// A partition that could not be read is read again.
    pub fn flows(&self, partition: Partition) {
        if let Some(status) = self.state().partitions.get_mut(&partition) {
            status.phase = Phase::Live;
        }
    }

    /// Positions of live partitions. One that cannot be read stays halted until it [flows](Self::flows) again.
    pub fn positions(
        &self,
        now: TimestampMs,
        positions: impl Iterator<Item = (Partition, NextOffset, NextOffset, Option<TimestampMs>)>,
    ) {
        let mut state = self.state();
        for (partition, applied, published, timestamp) in positions {
            let Some(status) = state.partitions.get_mut(&partition) else { continue };
            if !matches!(&status.phase, Phase::Halted(doubt) if doubt.is_about_reading()) {
                status.phase = Phase::Live;
            }
            // Also where events are to be sent again that a person said were not.
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

    /// The last stable offset of `partition`, if it was asked for at or after `since`.
    pub fn end_since(&self, partition: Partition, since: TimestampMs) -> Option<NextOffset> {
        let state = self.state();
        state.ends_at.filter(|at| *at >= since)?;
        state.partitions.get(&partition)?.end
    }

    /// Ends of the log; `now` is from before they were asked for.
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

    /// The process is a member and was given these partitions. Their lanes take them up later.
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

    /// Whether something was assigned, if only nothing, and not lost since.
    pub fn is_member(&self) -> bool {
        self.state().is_member
    }

    /// The place in the group was lost.
    pub fn lost(&self, now: TimestampMs) {
        let mut state = self.state();
        let disturbed = state.disturbed();
        state.is_member = false;
        state.waits(now);
        drop(state);
        self.rebalanced(disturbed);
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
    use crate::cursor::{CursorRow, LogBounds, Proof};

    const SUSPICION: Duration = Duration::from_secs(60);

    fn lag_ms(board: &Board, now: i64) -> i64 {
        board.partitions().get(&Partition(0)).unwrap().lag_ms(TimestampMs(now))
    }

    fn at(offset: i64) -> NextOffset {
        NextOffset(offset)
    }

    const P: Partition = Partition(0);

    /// As found of a partition with a row.
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
        let board = Board::default();
        let ends = |now, end| board.ends(TimestampMs(now), [(P, at(end))].into_iter());
        let positions = |published, last: Option<i64>| {
            let last = last.map(TimestampMs);
            board.positions(TimestampMs(1_000), [(P, at(published), at(published), last)].into_iter());
        };
        let taken =
            |end, stamp| board.taken(TimestampMs(1_000), [(P, at(end), TimestampMs(stamp))].into_iter());

        // Nothing is known before the cursors were read; then there is lag, but of what age is not known.
        board.opening(TimestampMs(100), P);
        assert_eq!(lag_ms(&board, 1_000), 900);
        board.found(TimestampMs(150), &known(0, 10, None));
        let status = board.partitions()[&P].clone();
        assert_eq!((status.lag(), status.published), (Some(10), None), "a lowest cursor is no position");
        assert_eq!(lag_ms(&board, 1_000), 900);

        // Nothing was written ever, and the first records are in hand.
        positions(0, None);
        taken(4, 200);
        taken(8, 300);
        assert_eq!(lag_ms(&board, 1_000), 800);
        positions(4, Some(290));
        assert_eq!(lag_ms(&board, 1_000), 700);

        // What remains is not fetched yet: it is no older than the last written.
        positions(8, Some(350));
        assert_eq!(lag_ms(&board, 1_000), 650);

        // Caught up, and at rest for long: a new record is not as old as the last one.
        positions(10, Some(400));
        assert_eq!(lag_ms(&board, 1_000), 0);
        ends(90_000, 10);
        ends(92_000, 11);
        assert_eq!(lag_ms(&board, 92_500), 2_500);

        // What a lane forgets is no longer in hand.
        taken(11, 500);
        assert_eq!(lag_ms(&board, 92_500), 92_000);
        board.opening(TimestampMs(92_400), P);
        assert_eq!(lag_ms(&board, 92_500), 2_500);
    }

    #[test]
    fn a_partition_that_does_not_go_on_grows_older_from_the_start() {
        // Its cursors cannot be read, or it is halted where it was taken up.
        let board = Board::default();
        board.opening(TimestampMs(1_000), P);
        assert_eq!((lag_ms(&board, 1_000), lag_ms(&board, 61_000)), (0, 60_000));
        board.found(TimestampMs(62_000), &known(3, 8, Some(500)));
        board.halted(P, Doubt::LogGap { needed: at(3), log_start: at(5) });
        assert_eq!(board.partitions()[&P].lag(), Some(5));
        assert_eq!(lag_ms(&board, 62_500), 62_000);

        // A partition that went away is a new one when it comes back.
        board.revoked(P);
        board.opening(TimestampMs(70_000), P);
        assert_eq!(lag_ms(&board, 70_500), 500);
    }

    #[test]
    fn what_is_written_again_in_a_restored_database_is_lag() {
        let board = Board::default();
        let positions = |applied| {
            let last = Some(TimestampMs(700));
            board.positions(TimestampMs(1_000), [(P, at(applied), at(10), last)].into_iter());
        };
        board.opening(TimestampMs(100), P);
        board.found(TimestampMs(100), &known(2, 10, None));
        positions(2);
        board.taken(TimestampMs(1_000), [(P, at(6), TimestampMs(300))].into_iter());
        positions(2);
        assert_eq!((board.partitions()[&P].lag(), lag_ms(&board, 1_000)), (Some(8), 700));
        positions(6);
        assert_eq!((board.partitions()[&P].lag(), lag_ms(&board, 1_000)), (Some(4), 300));
        positions(10);
        assert_eq!(lag_ms(&board, 1_000), 0);
    }

    #[test]
    fn a_clock_that_is_ahead_hides_no_lag() {
        let board = Board::default();
        let ahead = Some(TimestampMs(3_600_000));
        board.opening(TimestampMs(0), P);
        board.found(TimestampMs(1_000), &known(0, 9, Some(3_600_000)));
        assert_eq!(lag_ms(&board, 5_000), 4_000);
        let positions = |now, last| board.positions(TimestampMs(now), [(P, at(4), at(4), last)].into_iter());
        positions(6_000, ahead);
        assert_eq!(lag_ms(&board, 7_000), 6_000, "the same record is noted once");
        positions(8_000, Some(TimestampMs(3_600_001)));
        assert_eq!(lag_ms(&board, 9_000), 1_000);
        board.taken(TimestampMs(10_000), [(P, at(9), TimestampMs(3_600_002))].into_iter());
        assert_eq!(lag_ms(&board, 12_000), 2_000);
    }

    #[test]
    fn a_process_that_is_no_member_counts_for_how_long() {
        let board = Board::default();
        let oldest = |now| board.oldest_pending_ms(TimestampMs(now));
        board.waits(TimestampMs(1_000));
        assert_eq!(oldest(31_000), 30_000);
        board.assigned(TimestampMs(40_000), &[]);
        assert_eq!(oldest(50_000), 0, "one of many, and without a partition");

        // What it has grows old, also when its place is lost with it.
        board.opening(TimestampMs(60_000), P);
        assert_eq!(oldest(61_000), 1_000);
        board.lost(TimestampMs(65_000));
        board.revoked(P);
        assert_eq!(oldest(70_000), 10_000);
        board.left(TimestampMs(70_000));
        board.waits(TimestampMs(71_000));
        assert_eq!(oldest(72_000), 12_000);
        board.assigned(TimestampMs(73_000), &[P]);
        assert_eq!(oldest(74_000), 14_000, "what it was given is not known yet");
        board.opening(TimestampMs(74_000), P);
        board.ends(TimestampMs(74_000), [(P, at(9))].into_iter());
        assert_eq!(oldest(75_000), 15_000);
        board.found(TimestampMs(75_000), &known(8, 9, Some(74_500)));
        assert_eq!(oldest(76_000), 1_500);
    }

    #[test]
    fn a_cursor_beyond_the_end_is_not_caught_up_once_it_is_halted() {
        let board = Board::default();
        board.opening(TimestampMs(0), P);
        board.found(TimestampMs(1_000), &known(20, 15, Some(500)));
        assert_eq!(lag_ms(&board, 9_000), 0, "a leader may lag");
        board.halted(P, Doubt::BeyondEnd { position: at(20), end: at(15) });
        assert_eq!(lag_ms(&board, 9_000), 8_000);
        board.found(TimestampMs(10_000), &known(20, 15, Some(500)));
        board.ends(TimestampMs(11_000), [(P, at(16))].into_iter());
        assert_eq!((lag_ms(&board, 12_000), board.oldest_pending_ms(TimestampMs(12_000))), (11_000, 11_000));
    }

    #[test]
    fn what_was_caught_up_before_a_restore_is_no_news_of_what_comes_again() {
        let board = Board::default();
        let positions = |applied, last| {
            let last = Some(TimestampMs(last));
            board.positions(TimestampMs(60_000), [(P, at(applied), at(10), last)].into_iter());
        };
        board.opening(TimestampMs(100), P);
        board.found(TimestampMs(100), &known(10, 10, Some(50)));
        positions(10, 50);
        board.ends(TimestampMs(60_000), [(P, at(10))].into_iter());
        assert_eq!(lag_ms(&board, 61_000), 0);

        // An older database, and an empty one.
        board.opening(TimestampMs(61_000), P);
        board.found(TimestampMs(61_000), &known(4, 10, Some(20)));
        assert_eq!(lag_ms(&board, 61_000), 60_980);
        positions(4, 20);
        assert_eq!(lag_ms(&board, 61_000), 60_980);
        board.found(TimestampMs(61_000), &Known { row: None, ..known(0, 10, None) });
        assert_eq!(lag_ms(&board, 61_000), 60_900, "since it was assigned");
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
            board.left(TimestampMs(1));
        }

        board.fenced(SUSPICION);
        assert!(!board.was_fenced_after_loss(), "nothing was lost since: there is a namesake");
    }
}
