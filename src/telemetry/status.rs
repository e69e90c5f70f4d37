//! State of the daemon, for `/status`, `/readyz` and the metrics.

pub mod fetch_starts;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::fetch_starts::{FetchStart, FetchStarts};
use crate::domain::batch::OutcomeCounts;
use crate::domain::cursor::{HaltReason, Known};
use crate::domain::record::{NextOffset, Partition, TimestampMs};

/// Phase of a partition.
#[derive(Clone, PartialEq, Eq, Debug, Default, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Phase {
    /// Assigned; recovery determines where to continue.
    #[default]
    Opening,
    /// Being written and published.
    Live,
    /// Halted until an operator resolves it.
    Halted(HaltReason),
}

/// State of an assigned partition.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
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
    applied_timestamp: Option<TimestampMs>,
    /// That timestamp as it is in the record.
    stamped: Option<TimestampMs>,
    /// Last stable offset, when last read.
    pub end: Option<NextOffset>,
    open: Option<OpenTransaction>,
    /// When the partition was last caught up to the end, by the wall clock.
    caught_up_at: Option<TimestampMs>,
    /// When the partition was assigned, by the wall clock.
    assigned_at: TimestampMs,
    /// `applied` in the database at the last recovery.
    found_applied: Option<NextOffset>,
    /// End offset and first timestamp of each batch in flight.
    in_hand: VecDeque<(NextOffset, TimestampMs)>,
}

/// The first open transaction of a partition, at its last stable offset. Records from there on are not read
/// until it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenTransaction {
    /// The last stable offset.
    pub at: NextOffset,
    /// Number of records between the last stable offset and the high watermark.
    pub records: i64,
    since: TimestampMs,
}

impl OpenTransaction {
    /// How long the last stable offset has been there, in milliseconds, as far as this process knows.
    pub fn age_ms(&self, now: TimestampMs) -> i64 {
        (now.0 - self.since.0).max(0)
    }
}

/// Maximum number of batches of a partition in flight: one being written and those that wait for their Kafka
/// transaction.
const IN_HAND_MAX: usize = 4;

impl PartitionStatus {
    fn opening(now: TimestampMs) -> Self {
        Self { assigned_at: now, ..Self::default() }
    }

    /// Position of the lane at a rebalance that may have interrupted fetching; for the audit.
    fn interrupted(&self, partition: Partition) -> Option<FetchStart> {
        let applied = self.applied?;
        let position = self.in_hand.back().map_or(applied, |(reached, _)| applied.max(*reached));
        Some(FetchStart { partition, position, applied })
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

    /// The first open transaction, when the high watermark was last read.
    pub fn open_transaction(&self) -> Option<OpenTransaction> {
        self.open
    }

    /// `high` was read before the end.
    fn note_high_watermark(&mut self, now: TimestampMs, high: NextOffset) {
        let open = self.end.filter(|end| *end < high).map(|at| {
            let since = self.open.filter(|open| open.at == at).map_or(now, |open| open.since);
            OpenTransaction { at, records: high.0 - at.0, since }
        });
        self.open = open;
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
    rebalanced_at: Option<Instant>,
    broker_lost_at: Option<Instant>,
    broker_refusal: Option<(Instant, String)>,
    /// Why the group could not be joined, since the last time that the process was a member.
    join_failure: Option<String>,
    /// What the join waits for, if the brokers do not refuse it.
    join_wait: Option<String>,
    was_fenced_after_loss: bool,
    fetch_starts: FetchStarts,
    totals: OutcomeCounts,
}

impl State {
    fn oldest_pending_ms(&self, now: TimestampMs) -> i64 {
        let waited = self.waiting_since.map(|since| now.0 - since.0);
        let lags = self.partitions.values().map(|status| status.lag_ms(now));
        lags.chain(waited).max().unwrap_or(0).max(0)
    }

    /// Records a rebalance, which may have interrupted fetching of every partition. Only the first of the
    /// callbacks of one rebalance counts.
    fn note_rebalance(&mut self) {
        if self.rebalanced_at.is_some_and(|at| at.elapsed() < SAME_REBALANCE) {
            return;
        }
        self.rebalanced_at = Some(Instant::now());
        for (partition, status) in &self.partitions {
            if let Some(start) = status.interrupted(*partition) {
                self.fetch_starts.push(start);
            }
        }
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
const SAME_REBALANCE: Duration = Duration::from_millis(100);
/// librdkafka retries a refused connection continually, but reports an identical error of a broker only every
/// 30 s.
const REFUSAL_LASTS: Duration = Duration::from_secs(35);

/// State shared by the lanes, which update it once per batch, and the admin server, which reads it.
#[derive(Default)]
pub struct StatusRegistry(Mutex<State>);

impl StatusRegistry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enables recording of fetch starts; the caller must take them regularly.
    pub fn record_fetch_starts(&self) {
        self.state().fetch_starts.enable();
    }

    /// Fetching of a partition starts or restarts at `position`.
    pub fn fetch_started(&self, partition: Partition, position: NextOffset) {
        let mut state = self.state();
        let found = state.partitions.get(&partition).and_then(|status| status.found_applied);
        state.fetch_starts.push(FetchStart { partition, position, applied: found.unwrap_or(position) });
    }

    /// Takes the fetch starts since the last call, and the number of dropped ones.
    pub fn take_fetch_starts(&self) -> (VecDeque<FetchStart>, u64) {
        self.state().fetch_starts.take()
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
        *state = State {
            waiting_since: state.waiting_since,
            fetch_starts: std::mem::take(&mut state.fetch_starts),
            totals: state.totals,
            ..State::default()
        };
    }

    /// Age in milliseconds of this process's oldest record that is not yet written and published, where
    /// known. For a process that is not a member, the time without membership is added to the last known age.
    pub fn oldest_pending_ms(&self, now: TimestampMs) -> i64 {
        self.state().oldest_pending_ms(now)
    }

    /// Counts completed records.
    pub fn settled(&self, outcomes: &OutcomeCounts) {
        self.state().totals += *outcomes;
    }

    /// Completed records since the start.
    pub fn totals(&self) -> OutcomeCounts {
        self.state().totals
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
        state.note_rebalance();
        state.partitions.remove(&partition);
        state.note_known();
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

    /// Updates the high watermarks, which were read before the ends.
    pub fn high_watermarks(&self, now: TimestampMs, highs: BTreeMap<Partition, NextOffset>) {
        let mut state = self.state();
        for (partition, high) in highs {
            if let Some(status) = state.partitions.get_mut(&partition) {
                status.note_high_watermark(now, high);
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

    /// The group could not be joined.
    pub fn join_failed(&self, reason: String) {
        self.state().join_failure = Some(reason);
    }

    /// The brokers do not refuse to let this process join the group, but it waits for `reason`.
    pub fn join_waits(&self, reason: String) {
        self.state().join_wait = Some(reason);
    }

    /// The process is a member and was assigned these partitions; lanes start recovery later.
    pub fn assigned(&self, now: TimestampMs, partitions: &[Partition]) {
        let mut state = self.state();
        state.note_rebalance();
        state.is_member = true;
        state.join_failure = None;
        state.join_wait = None;
        for partition in partitions {
            state.partitions.entry(*partition).or_insert_with(|| PartitionStatus::opening(now));
        }
        state.note_known();
    }

    /// Whether the process is a member; its assignment may be empty.
    pub fn is_member(&self) -> bool {
        self.state().is_member
    }

    /// The group membership was lost.
    pub fn lost(&self, now: TimestampMs) {
        let mut state = self.state();
        state.note_rebalance();
        state.is_member = false;
        state.join_failure = None;
        state.waits(now);
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
            let reason = state.join_failure.clone().or_else(|| state.join_wait.clone());
            missing.insert("group", reason.unwrap_or_else(|| "not joined yet".to_owned()));
        }
        missing
    }
}

#[cfg(test)]
mod tests;
