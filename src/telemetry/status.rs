//! State of the daemon, for `/status`, `/readyz` and the metrics.

pub mod fetch_starts;
mod partition;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::fetch_starts::{FetchStart, FetchStarts};
use self::partition::IN_HAND_MAX;
pub use self::partition::{OpenTransaction, PartitionStatus, Phase};
use super::work::Work;
use crate::domain::batch::OutcomeCounts;
use crate::domain::cursor::{HaltReason, Known};
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::domain::wire::Reason;

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

/// Maximum number of dead letters that are kept for the console.
pub const DEAD_LETTERS_MAX: usize = 50;
/// Dead letters of a reason after so much time without one are news.
const NEWS_AFTER_MS: i64 = 60 * 60_000;

/// Dead letters of one reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeadLetterTimes {
    /// Their number since the start.
    pub count: u64,
    /// The first one after an hour without any.
    pub since: TimestampMs,
    /// The last one.
    pub last: TimestampMs,
}

/// A record that was dead-lettered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeadLettered {
    /// When its dead letter was committed.
    pub at: TimestampMs,
    /// Its partition.
    pub partition: Partition,
    /// Its offset.
    pub offset: Offset,
    /// Why.
    pub reason: Reason,
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
    /// The last dead letters, the oldest first.
    dead_letters: VecDeque<DeadLettered>,
    dead_lettered: BTreeMap<&'static str, DeadLetterTimes>,
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
pub struct StatusRegistry {
    state: Mutex<State>,
    work: Arc<Work>,
}

impl StatusRegistry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the lanes did.
    pub fn work(&self) -> &Arc<Work> {
        &self.work
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

    /// The lag of each assigned partition; `None` where it is not known yet.
    pub fn partition_lags(&self) -> BTreeMap<Partition, Option<i64>> {
        self.state().partitions.iter().map(|(partition, status)| (*partition, status.lag())).collect()
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
            dead_letters: std::mem::take(&mut state.dead_letters),
            dead_lettered: std::mem::take(&mut state.dead_lettered),
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

    /// Notes dead letters: their numbers by reason, and the last ones, the oldest first.
    pub fn dead_lettered(
        &self,
        now: TimestampMs,
        counts: impl Iterator<Item = (Reason, u64)>,
        letters: impl Iterator<Item = DeadLettered>,
    ) {
        let mut state = self.state();
        for (reason, more) in counts.filter(|(_, count)| *count > 0) {
            let first = DeadLetterTimes { count: 0, since: now, last: now };
            let times = state.dead_lettered.entry(reason.as_str()).or_insert(first);
            if now.0 - times.last.0 > NEWS_AFTER_MS {
                times.since = now;
            }
            (times.count, times.last) = (times.count + more, now);
        }
        for letter in letters {
            if state.dead_letters.len() >= DEAD_LETTERS_MAX {
                state.dead_letters.pop_front();
            }
            state.dead_letters.push_back(letter);
        }
    }

    /// Dead letters since the start, by reason.
    pub fn dead_letter_times(&self) -> BTreeMap<&'static str, DeadLetterTimes> {
        self.state().dead_lettered.clone()
    }

    /// The last dead letters, the newest first.
    pub fn dead_letters(&self) -> Vec<DeadLettered> {
        self.state().dead_letters.iter().rev().copied().collect()
    }

    /// Recovery of a partition starts or restarts.
    pub fn opening(&self, now: TimestampMs, partition: Partition) {
        let mut state = self.state();
        let status = state.partitions.entry(partition).or_insert_with(|| PartitionStatus::opening(now));
        if !matches!(&status.phase, Phase::Halted(reason) if reason.is_about_reading()) {
            status.enter(now, Phase::Opening);
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
    pub fn halted(&self, now: TimestampMs, partition: Partition, reason: HaltReason) {
        if let Some(status) = self.state().partitions.get_mut(&partition) {
            status.enter(now, Phase::Halted(reason));
        }
    }

    /// A partition that could not be read is read again.
    pub fn flows(&self, now: TimestampMs, partition: Partition) {
        if let Some(status) = self.state().partitions.get_mut(&partition) {
            status.enter(now, Phase::Live);
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
                status.enter(now, Phase::Live);
            }
            // Also if an operator stated that events that were published must be sent again.
            if Some(applied.min(published)) < status.applied.min(status.published) {
                status.note_went_back();
            }
            let before = status.done_to();
            status.applied = Some(applied);
            status.published = Some(published);
            status.unpublished_from = None;
            if status.done_to() > before {
                status.moved_at = Some(now);
            }
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

    /// What each lane says of the database and of the broker.
    pub fn lanes(&self) -> BTreeMap<usize, (Dependency, Dependency)> {
        self.state().lanes.clone()
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
