//! Supervises fetching: starts and stops partitions, checks gaps, and retries partitions that cannot be read.
//!
//! The lane starts to fetch a partition at a position that it determined itself: after the last record or end
//! of partition that it took, or after a range that was checked to hold no record. Positions that librdkafka
//! keeps are never used. A *gap* lies between such a start and the first record or end that the client
//! delivers after it: usually transaction markers or aborted records, which the lane verifies with another
//! client ([`Lane::check_gaps`]).
//!
//! A partition that cannot be read halts after [`TRIES_MAX`] failures, and the lane retries it with a backoff.
//! The other partitions go on.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode as Code;
use tokio::time::Instant;

use super::partitions::PartitionState;
use super::{Lane, log_lines};
use crate::domain::cursor::{HaltReason, IdentityMismatch};
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::ports::fetch_buffer::{FetchFault, Interruption};
use crate::ports::{Gap, GapAnswer, KafkaPort, KafkaPortError, Store};
use crate::telemetry::activity::LaneStep;
use crate::telemetry::logging::RateLimited;
use crate::telemetry::metrics;

/// A partition halts when it failed this often in a row, or when so many of its gaps had records.
const TRIES_MAX: u32 = 3;
const RETRY_MIN: Duration = Duration::from_millis(100);
/// First pause of a halted partition; it doubles with each failure.
const HALTED_RETRY_MIN: Duration = Duration::from_secs(5);
const HALTED_RETRY_MAX: Duration = Duration::from_secs(60);
/// A gap that could not be checked is checked again after this time.
const GAP_RETRY: Duration = Duration::from_secs(1);
/// A gap check without an answer for this long is made again: the client of the check hangs.
const HUNG_AFTER: Duration = Duration::from_secs(60);
/// Most checks that are given up, since each hanging client keeps a thread.
const CHECKS_HUNG_MAX: u32 = 20;
/// If a partition has records to read and a lane with room receives nothing of it for this long, the client
/// is replaced.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The same in a backlog, where the lane has room only now and then and other partitions come first, and while brokers
/// throttle the client.
const SILENCE_BUSY_MAX: Duration = Duration::from_secs(300);
const SILENCE_TICK: Duration = Duration::from_secs(5);
/// Log ends that were read longer ago are ignored: the broker may be down since, which is no silence of the
/// client.
const ENDS_FRESH: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reading {
    /// The client fetches it.
    Fetching,
    /// Stopped until it is known whether a gap has records.
    Gap { gap: Gap, again_at: Instant },
    /// Stopped after a failure.
    Failed { again_at: Instant },
}

/// Fetch state of one partition.
#[derive(Clone, Debug)]
pub(super) struct Fetch {
    reading: Reading,
    /// Failures since a record or end of it was last taken.
    failures: u32,
    /// Gaps that had records since a record or end of it was last taken.
    gaps: u32,
    /// Why it halted.
    halted: Option<HaltReason>,
    /// Position and time of the last progress.
    last_progress: (NextOffset, Instant),
}

impl Fetch {
    fn started(position: NextOffset, now: Instant) -> Self {
        Self {
            reading: Reading::Fetching,
            failures: 0,
            gaps: 0,
            halted: None,
            last_progress: (position, now),
        }
    }

    fn has_failures(&self) -> bool {
        self.failures > 0 || self.gaps > 0 || self.halted.is_some()
    }

    /// Pause before the next try.
    fn pause(&self) -> Duration {
        match self.failures.checked_sub(TRIES_MAX) {
            None => RETRY_MIN.saturating_mul(1 << self.failures.min(TRIES_MAX)),
            Some(more) => HALTED_RETRY_MIN.saturating_mul(1 << more.min(10)).min(HALTED_RETRY_MAX),
        }
    }
}

/// Fetch states of a lane's partitions.
pub(super) struct FetchStates {
    by_partition: BTreeMap<Partition, Fetch>,
    /// Id and begin of the pending gap check. One runs at a time; gaps found meanwhile go into the next.
    gap_check: Option<(u64, Instant)>,
    /// Gap checks that were given up and have not answered since.
    checks_hung: u32,
    /// Id of the last gap check, pending or not.
    last_gap_check: u64,
    /// When the lane last had no room for a record: its buffer was full, or a batch waited.
    no_room_at: Instant,
    /// When the lane last looked for partitions of which nothing arrives.
    silence_checked_at: Instant,
}

impl FetchStates {
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            by_partition: BTreeMap::new(),
            gap_check: None,
            checks_hung: 0,
            last_gap_check: 0,
            no_room_at: now,
            silence_checked_at: now,
        }
    }

    /// Whether a gap check may begin now, and if so, whether the pending one hangs.
    fn may_check(&self, now: Instant) -> Option<bool> {
        match self.gap_check {
            Some((_, began)) if now.saturating_duration_since(began) < HUNG_AFTER => None,
            Some(_) if self.checks_hung >= CHECKS_HUNG_MAX => None,
            pending => Some(pending.is_some()),
        }
    }

    /// Begins a gap check, gives up the pending one, and returns the new one's id.
    fn check_begins(&mut self, now: Instant) -> u64 {
        self.checks_hung += u32::from(self.gap_check.is_some());
        self.last_gap_check += 1;
        self.gap_check = Some((self.last_gap_check, now));
        self.last_gap_check
    }

    /// Each check ends once, also one that was given up.
    fn check_ended(&mut self, id: u64) {
        if self.gap_check.is_some_and(|(pending, _)| pending == id) {
            self.gap_check = None;
        } else {
            self.checks_hung = self.checks_hung.saturating_sub(1);
        }
    }

    /// Forgets all fetch states except those of partitions with failures, which keep their counts until they
    /// are read.
    pub fn reset(&mut self) {
        self.by_partition.retain(|_, fetch| fetch.has_failures());
        for fetch in self.by_partition.values_mut() {
            if matches!(fetch.reading, Reading::Gap { .. }) {
                fetch.reading = Reading::Fetching;
            }
        }
    }

    /// Removes these partitions.
    pub fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.by_partition.remove(partition);
        }
    }

    /// Notes that the lane does not fetch now: its buffer is full, or a batch waits.
    pub fn pause_silence_check(&mut self) {
        self.no_room_at = Instant::now();
    }

    /// A partition of which nothing arrived for too long, with its position. `position` returns where a partition
    /// is, and whether records wait there. Called after each round of the lane.
    fn silent(
        &mut self,
        now: Instant,
        is_throttled: bool,
        position: impl Fn(Partition) -> Option<(NextOffset, bool)>,
    ) -> Option<(Partition, NextOffset)> {
        let since_check = now.saturating_duration_since(self.silence_checked_at);
        if since_check < SILENCE_TICK {
            return None;
        }
        // Nothing could arrive while the lane was elsewhere, as in a transaction that waited for a lock.
        let elsewhere = since_check.saturating_sub(SILENCE_TICK);
        self.silence_checked_at = now;
        let has_room = now.saturating_duration_since(self.no_room_at) >= SILENCE_MAX;
        let limit = if has_room && !is_throttled { SILENCE_MAX } else { SILENCE_BUSY_MAX };
        let mut silent = None;
        for (partition, fetch) in &mut self.by_partition {
            let Some((position, has_records)) = position(*partition) else { continue };
            fetch.last_progress.1 = now.min(fetch.last_progress.1 + elsewhere);
            let is_waiting = has_records && fetch.reading == Reading::Fetching;
            if !is_waiting || fetch.last_progress.0 != position {
                fetch.last_progress = (position, now);
            } else if now.saturating_duration_since(fetch.last_progress.1) >= limit {
                silent = Some((*partition, position));
            }
        }
        silent
    }

    /// Partitions that halted because they cannot be read.
    pub fn halted(&self) -> impl Iterator<Item = (Partition, &HaltReason)> {
        self.by_partition.iter().filter_map(|(partition, fetch)| Some((*partition, fetch.halted.as_ref()?)))
    }

    /// When a partition that halted after a failure is tried again.
    pub fn halted_until(&self, partition: Partition) -> Option<Instant> {
        let fetch = self.by_partition.get(&partition).filter(|fetch| fetch.halted.is_some())?;
        match fetch.reading {
            Reading::Failed { again_at } => Some(again_at),
            _ => None,
        }
    }
}

/// Whether the fault makes the position itself invalid.
fn is_out_of_range(fault: &FetchFault) -> bool {
    matches!(fault.code, Code::OffsetOutOfRange | Code::AutoOffsetReset)
}

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Starts to fetch these partitions at these positions. False: the client failed, and the lane was reset.
    pub(super) async fn start_fetching(
        &mut self,
        positions: &[(Partition, NextOffset)],
    ) -> Result<bool, IdentityMismatch> {
        if positions.is_empty() {
            return Ok(true);
        }
        if let Err(failure) = self.kafka.start(positions).await {
            self.fetching_failed("starting to fetch", failure)?;
            return Ok(false);
        }
        let now = Instant::now();
        for (partition, position) in positions {
            self.status.fetch_started(*partition, *position);
            match self.fetch_states.by_partition.get_mut(partition) {
                Some(fetch) => {
                    fetch.reading = Reading::Fetching;
                    fetch.last_progress = (*position, now);
                }
                None => {
                    self.fetch_states.by_partition.insert(*partition, Fetch::started(*position, now));
                }
            }
        }
        Ok(true)
    }

    /// Stops fetching these partitions. False: the client failed, and the lane was reset.
    pub(super) async fn stop_fetching(&mut self, partitions: &[Partition]) -> Result<bool, IdentityMismatch> {
        let _in_step = self.metrics.begin(LaneStep::Recovering);
        match self.kafka.stop(partitions).await {
            Ok(()) => Ok(true),
            Err(failure) => self.fetching_failed("stopping to fetch", failure).map(|()| false),
        }
    }

    fn fetching_failed(&mut self, doing: &str, failure: KafkaPortError) -> Result<(), IdentityMismatch> {
        self.kafka_failed(doing, failure)?;
        self.reset("the fetching client failed");
        Ok(())
    }

    /// Handles gaps and errors that interrupted partitions, retries failed partitions, and looks for silent
    /// ones.
    pub(super) async fn supervise_fetching(&mut self) -> Result<(), IdentityMismatch> {
        self.note_read_again();
        let interruptions = self.builder.buffer.take_interruptions();
        if !interruptions.is_empty() {
            let partitions: Vec<Partition> = interruptions.iter().map(|(partition, _)| *partition).collect();
            if !self.stop_fetching(&partitions).await? {
                return Ok(());
            }
            for (partition, interruption) in interruptions {
                match interruption {
                    Interruption::Gap { from, to } => {
                        let gap = Gap { partition, from, to };
                        self.set_reading(partition, |now| Reading::Gap { gap, again_at: now });
                    }
                    Interruption::Failed { fault, .. } if is_out_of_range(&fault) => {
                        self.reset("an offset is out of range");
                        self.broker.delay();
                        return Ok(());
                    }
                    Interruption::Failed { position, fault } => {
                        self.fetch_failed(partition, position, &fault)
                    }
                }
            }
            self.note_assigned();
        }
        self.check_gaps();
        self.retry_failed().await?;
        self.check_silence()
    }

    fn set_reading(&mut self, partition: Partition, reading: impl Fn(Instant) -> Reading) {
        if let Some(fetch) = self.fetch_states.by_partition.get_mut(&partition) {
            fetch.reading = reading(Instant::now());
        }
    }

    /// A record or end at the position asked for shows that a partition can be read again: its counts are
    /// cleared.
    fn note_read_again(&mut self) {
        let Self { fetch_states, builder, status, settings, .. } = self;
        let mut is_changed = false;
        for (partition, fetch) in &mut fetch_states.by_partition {
            if fetch.has_failures()
                && fetch.reading == Reading::Fetching
                && builder.buffer.is_delivering(*partition)
            {
                fetch.failures = 0;
                fetch.gaps = 0;
                if let Some(reason) = fetch.halted.take() {
                    status.flows(metrics::now(), *partition);
                    is_changed = true;
                    log_lines::read_again(settings, *partition, &reason);
                }
            }
        }
        if is_changed {
            self.note_assigned();
        }
    }

    fn fetch_failed(&mut self, partition: Partition, position: NextOffset, fault: &FetchFault) {
        let Some(fetch) = self.fetch_states.by_partition.get_mut(&partition) else { return };
        fetch.failures = fetch.failures.saturating_add(1);
        fetch.reading = Reading::Failed { again_at: Instant::now() + fetch.pause() };
        self.metrics.fetch_failures.increment(1);
        if fetch.failures >= TRIES_MAX {
            self.halt_fetching(partition, fault.reason(position, None));
        }
    }

    /// Holds a partition back; logs it unless the reason is the same as before.
    fn halt_fetching(&mut self, partition: Partition, reason: HaltReason) {
        let Some(fetch) = self.fetch_states.by_partition.get_mut(&partition) else { return };
        if fetch.halted.as_ref() != Some(&reason) {
            log_lines::halted(&self.settings, partition, &reason);
            fetch.halted = Some(reason.clone());
        }
        self.status.halted(metrics::now(), partition, reason);
    }

    // ---- gaps --------------------------------------------------------------------------------

    /// Starts a check of all gaps that are due. The answer arrives as an event.
    fn check_gaps(&mut self) {
        let now = Instant::now();
        let Some(has_hung) = self.fetch_states.may_check(now) else { return };
        let gaps: Vec<Gap> = self
            .fetch_states
            .by_partition
            .values()
            .filter_map(|fetch| match fetch.reading {
                Reading::Gap { gap, again_at } if again_at <= now => Some(gap),
                _ => None,
            })
            .collect();
        if gaps.is_empty() {
            return;
        }
        if has_hung && let Some(gap) = gaps.first() {
            log_lines::gap_unknown(&self.settings, gap, "the check has not ended; its client hangs");
        }
        self.kafka.check_gaps(self.fetch_states.check_begins(now), gaps);
    }

    /// Handles the answer of a gap check. Answers about partitions that were started again or revoked since are
    /// dropped.
    pub(super) async fn gaps_checked(
        &mut self,
        id: u64,
        answers: Vec<(Gap, GapAnswer)>,
    ) -> Result<(), IdentityMismatch> {
        self.fetch_states.check_ended(id);
        let mut positions = Vec::new();
        for (gap, answer) in answers {
            let partition = gap.partition;
            let is_live = self.is_live(partition);
            let Some(fetch) = self.fetch_states.by_partition.get_mut(&partition) else { continue };
            let is_waiting = matches!(fetch.reading, Reading::Gap { gap: waiting, .. } if waiting == gap);
            if !is_waiting || !is_live {
                continue;
            }
            match answer {
                GapAnswer::Empty => positions.push((partition, gap.to)),
                GapAnswer::Record(at) => {
                    fetch.gaps = fetch.gaps.saturating_add(1);
                    let is_stubborn = fetch.gaps >= TRIES_MAX;
                    self.metrics.fetch_gaps.increment(1);
                    log_lines::gap(&self.settings, &gap, at);
                    if is_stubborn {
                        fetch.failures = fetch.failures.saturating_add(1).max(TRIES_MAX);
                        fetch.reading = Reading::Failed { again_at: Instant::now() + fetch.pause() };
                        self.halt_fetching(partition, HaltReason::FetchGap { from: at, to: gap.to });
                        self.note_assigned();
                    } else {
                        positions.push((partition, at));
                    }
                }
                GapAnswer::Removed => {
                    self.reset("records to be read were removed from the log");
                    return Ok(());
                }
                GapAnswer::Failed(error) => {
                    fetch.reading = Reading::Gap { gap, again_at: Instant::now() + GAP_RETRY };
                    log_lines::gap_unknown(&self.settings, &gap, &error);
                }
            }
        }
        if self.start_fetching(&positions).await? {
            for (partition, position) in positions {
                self.builder.buffer.begin_after_gap(partition, position);
            }
        }
        Ok(())
    }

    // ---- tries -------------------------------------------------------------------------------

    /// Starts failed partitions again when their pause is over, and halts those that failed too often.
    async fn retry_failed(&mut self) -> Result<(), IdentityMismatch> {
        let now = Instant::now();
        let mut positions = Vec::new();
        let mut halted = Vec::new();
        for (partition, fetch) in &self.fetch_states.by_partition {
            let Reading::Failed { again_at } = fetch.reading else { continue };
            match (&fetch.halted, self.partitions.get(partition)) {
                // As a halted partition it goes through recovery again, which notices if an operator skipped
                // the batch.
                (Some(reason), Some(PartitionState::Live(_))) => halted.push((*partition, reason.clone())),
                (None, Some(PartitionState::Live(_))) if again_at <= now => {
                    if let Some(position) = self.builder.buffer.position(*partition) {
                        positions.push((*partition, position));
                    }
                }
                _ => {}
            }
        }
        for (partition, reason) in halted {
            // A batch in flight needs its partition in state `Live` until it is published.
            if !self.is_in_flight(partition) {
                self.partitions
                    .insert(partition, PartitionState::Halted { reason, known: None, again_at: now });
            }
        }
        if self.start_fetching(&positions).await? {
            for (partition, position) in positions {
                self.builder.buffer.begin(partition, position);
            }
        }
        Ok(())
    }

    /// Whether records of `partition` are in the buffer or in a batch that is not published yet.
    fn is_in_flight(&self, partition: Partition) -> bool {
        self.builder.holds(partition)
            || self.writing.iter().any(|batch| batch.progress().iter().any(|p| p.partition == partition))
            || self.pending.iter().any(|pending| {
                pending.publication.commits().iter().any(|commit| commit.partition == partition)
            })
    }

    // ---- silence -----------------------------------------------------------------------------

    /// Replaces the client if a partition has records and none arrive: librdkafka does not report every
    /// error, and may lose all its brokers (librdkafka #5301).
    fn check_silence(&mut self) -> Result<(), IdentityMismatch> {
        let Self { fetch_states, partitions, builder, status, kafka, .. } = self;
        let fresh = i64::try_from(ENDS_FRESH.as_millis()).unwrap_or(i64::MAX);
        let end =
            |partition| status.end_since(partition, TimestampMs(metrics::now().0.saturating_sub(fresh)));
        let silent = fetch_states.silent(Instant::now(), kafka.is_throttled(), |partition| {
            let position = builder.buffer.position(partition)?;
            let is_live = partitions.get(&partition).is_some_and(|state| state.live().is_some());
            Some((position, is_live && end(partition).is_some_and(|end| end > position)))
        });
        if let Some((partition, position)) = silent {
            self.metrics.fetch_clients_renewed.increment(1);
            static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(
                    lane = self.settings.index,
                    topic = self.settings.input_topic,
                    partition = partition.0,
                    offset = position.0,
                    end = end(partition).map(|end| end.0),
                    suppressed,
                    "nothing was fetched of this partition although it has records: replacing the client"
                );
            }
            self.kafka.abandon_fetcher();
            self.reset("the fetching client was replaced");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
