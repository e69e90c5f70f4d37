//! How each partition is read, apart from where its cursors are: where it is begun, what is proved of a gap behind a
//! begin, what is done about one that cannot be read.
//!
//! A partition is only ever begun at a position of this lane's own: after the last record or end that was taken, or
//! after what is proved to hold no record.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode as Code;
use tokio::time::Instant;

use super::ports::{Gap, GapAnswer, Ledger, Log, LogFailure};
use super::{Lane, LaneSettings, Slot, told};
use crate::cursor::{Doubt, IdentityDoubt};
use crate::intake::{FetchFault, Interruption};
use crate::logging::RateLimited;
use crate::metrics;
use crate::record::{NextOffset, Partition, TimestampMs};

/// A partition that failed, or whose gaps hold records, so often in a row is held back.
const TRIES_MAX: u32 = 3;
const RETRY_MIN: Duration = Duration::from_millis(100);
/// One that is held back is tried again after this time at first, then after twice as long, and so on.
const HELD_RETRY_MIN: Duration = Duration::from_secs(5);
const HELD_RETRY_MAX: Duration = Duration::from_secs(60);
/// A gap that could not be looked into is looked into again after this time.
const GAP_RETRY: Duration = Duration::from_secs(1);
/// A partition with records to read, of which a lane with room hears nothing for so long, needs another client.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// In a backlog a lane has room only now and then, and other partitions have their turn.
const SILENCE_BUSY_MAX: Duration = Duration::from_secs(300);
const SILENCE_TICK: Duration = Duration::from_secs(5);
/// Ends of the log that were asked for longer ago say nothing of a broker that may be away since.
const ENDS_FRESH: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reading {
    /// Begun.
    Begun,
    /// Not begun: whether a gap holds records is to be found out.
    Gap { gap: Gap, again_at: Instant },
    /// Not begun: it failed.
    Failed { again_at: Instant },
}

/// How one partition is read.
#[derive(Clone, Debug)]
pub(super) struct Fetch {
    reading: Reading,
    /// Failures since something of it was last taken.
    failures: u32,
    /// Gaps with records in them since something of it was last taken.
    gaps: u32,
    /// Why it is held back.
    held: Option<Doubt>,
    /// Where it was when it was last seen to have moved on, and when.
    heard: (NextOffset, Instant),
}

impl Fetch {
    fn begun(position: NextOffset, now: Instant) -> Self {
        Self { reading: Reading::Begun, failures: 0, gaps: 0, held: None, heard: (position, now) }
    }

    fn is_in_trouble(&self) -> bool {
        self.failures > 0 || self.gaps > 0 || self.held.is_some()
    }

    /// How long to wait before the next try.
    fn pause(&self) -> Duration {
        match self.failures.checked_sub(TRIES_MAX) {
            None => RETRY_MIN.saturating_mul(1 << self.failures.min(TRIES_MAX)),
            Some(more) => HELD_RETRY_MIN.saturating_mul(1 << more.min(10)).min(HELD_RETRY_MAX),
        }
    }
}

/// The partitions of a lane, as they are read.
pub(super) struct Fetches {
    of: BTreeMap<Partition, Fetch>,
    /// The number of the proof that is under way. One at a time: what comes meanwhile goes into the next.
    proof: Option<u64>,
    last_proof: u64,
    /// When the lane last had no room.
    full_at: Instant,
    looked_at: Instant,
}

impl Fetches {
    pub fn new() -> Self {
        let now = Instant::now();
        Self { of: BTreeMap::new(), proof: None, last_proof: 0, full_at: now, looked_at: now }
    }

    /// Forgets what is under way; what is known to be in trouble stays so until it is read.
    pub fn reset(&mut self) {
        self.of.retain(|_, fetch| fetch.is_in_trouble());
        for fetch in self.of.values_mut() {
            if matches!(fetch.reading, Reading::Gap { .. }) {
                fetch.reading = Reading::Begun;
            }
        }
    }

    /// Forgets these partitions.
    pub fn forget(&mut self, partitions: &[Partition]) {
        for partition in partitions {
            self.of.remove(partition);
        }
    }

    /// The lane has no room for what comes.
    pub fn note_full(&mut self) {
        self.full_at = Instant::now();
    }

    /// Partitions that are held back.
    pub fn held(&self) -> impl Iterator<Item = (Partition, &Doubt)> {
        self.of.iter().filter_map(|(partition, fetch)| Some((*partition, fetch.held.as_ref()?)))
    }

    /// Why `partition` is held back, and when it is tried again.
    pub fn held_until(&self, partition: Partition) -> Option<Instant> {
        let fetch = self.of.get(&partition).filter(|fetch| fetch.held.is_some())?;
        match fetch.reading {
            Reading::Failed { again_at } => Some(again_at),
            _ => None,
        }
    }
}

/// Errors after which the position itself is in question.
fn is_out_of_range(fault: &FetchFault) -> bool {
    matches!(fault.code, Code::OffsetOutOfRange | Code::AutoOffsetReset)
}

impl<L: Log, D: Ledger> Lane<L, D> {
    /// Begins to read these partitions at these positions. False: the client failed, and everything is begun anew.
    pub(super) async fn begin(
        &mut self,
        positions: &[(Partition, NextOffset)],
    ) -> Result<bool, IdentityDoubt> {
        if positions.is_empty() {
            return Ok(true);
        }
        if let Err(failure) = self.log.start(positions).await {
            self.fetching_failed("starting to fetch", failure)?;
            return Ok(false);
        }
        let now = Instant::now();
        for (partition, position) in positions {
            self.board.began(*partition, *position);
            match self.fetches.of.get_mut(partition) {
                Some(fetch) => {
                    fetch.reading = Reading::Begun;
                    fetch.heard = (*position, now);
                }
                None => {
                    self.fetches.of.insert(*partition, Fetch::begun(*position, now));
                }
            }
        }
        Ok(true)
    }

    /// Reads these partitions no more. False: the client failed, and everything is begun anew.
    pub(super) async fn end(&mut self, partitions: &[Partition]) -> Result<bool, IdentityDoubt> {
        match self.log.stop(partitions).await {
            Ok(()) => Ok(true),
            Err(failure) => self.fetching_failed("stopping to fetch", failure).map(|()| false),
        }
    }

    fn fetching_failed(&mut self, doing: &str, failure: LogFailure) -> Result<(), IdentityDoubt> {
        self.log_failed(doing, failure)?;
        self.reset("all partitions have to be begun again");
        Ok(())
    }

    /// Takes note of what interrupted the delivery of partitions, and of those that are read again.
    pub(super) async fn follow_fetching(&mut self) -> Result<(), IdentityDoubt> {
        self.note_read_again();
        let interruptions = self.assembly.intake.take_interruptions();
        if !interruptions.is_empty() {
            let partitions: Vec<Partition> = interruptions.iter().map(|(partition, _)| *partition).collect();
            if !self.end(&partitions).await? {
                return Ok(());
            }
            for (partition, interruption) in interruptions {
                match interruption {
                    Interruption::Gap { from, to } => {
                        let gap = Gap { partition, from, to };
                        self.note_reading(partition, |now| Reading::Gap { gap, again_at: now });
                    }
                    Interruption::Failed { fault, .. } if is_out_of_range(&fault) => {
                        self.reset("an offset is out of range, the positions have to be found out again");
                        self.broker.delay();
                        return Ok(());
                    }
                    Interruption::Failed { position, fault } => self.failed(partition, position, &fault),
                }
            }
            self.note_assigned();
        }
        self.prove_gaps();
        self.begin_again().await?;
        self.look_for_silence()
    }

    fn note_reading(&mut self, partition: Partition, reading: impl Fn(Instant) -> Reading) {
        if let Some(fetch) = self.fetches.of.get_mut(&partition) {
            fetch.reading = reading(Instant::now());
        }
    }

    /// Whatever comes of a partition at the position asked for ends its trouble.
    fn note_read_again(&mut self) {
        let Self { fetches, assembly, board, settings, .. } = self;
        let mut is_changed = false;
        for (partition, fetch) in &mut fetches.of {
            if fetch.is_in_trouble()
                && fetch.reading == Reading::Begun
                && assembly.intake.is_running(*partition)
            {
                fetch.failures = 0;
                fetch.gaps = 0;
                if let Some(doubt) = fetch.held.take() {
                    board.flows(*partition);
                    is_changed = true;
                    told::read_again(settings.index, &settings.input_topic, *partition, &doubt);
                }
            }
        }
        if is_changed {
            self.note_assigned();
        }
    }

    fn failed(&mut self, partition: Partition, position: NextOffset, fault: &FetchFault) {
        let Some(fetch) = self.fetches.of.get_mut(&partition) else { return };
        fetch.failures = fetch.failures.saturating_add(1);
        fetch.reading = Reading::Failed { again_at: Instant::now() + fetch.pause() };
        self.metrics.fetch_failed();
        if fetch.failures >= TRIES_MAX {
            self.hold(partition, fault.doubt(position, None));
        }
    }

    /// Holds a partition back, loudly the first time.
    fn hold(&mut self, partition: Partition, doubt: Doubt) {
        let Some(fetch) = self.fetches.of.get_mut(&partition) else { return };
        if fetch.held.as_ref() != Some(&doubt) {
            let LaneSettings { index, input_topic, identity, .. } = &self.settings;
            told::halted(*index, input_topic, identity.topic_id, partition, &doubt);
            fetch.held = Some(doubt.clone());
        }
        self.board.halted(partition, doubt);
    }

    // ---- gaps --------------------------------------------------------------------------------

    /// Has the gaps that wait for it looked into, all at once.
    fn prove_gaps(&mut self) {
        if self.fetches.proof.is_some() {
            return;
        }
        let now = Instant::now();
        let gaps: Vec<Gap> = self
            .fetches
            .of
            .values()
            .filter_map(|fetch| match fetch.reading {
                Reading::Gap { gap, again_at } if again_at <= now => Some(gap),
                _ => None,
            })
            .collect();
        if gaps.is_empty() {
            return;
        }
        self.fetches.last_proof += 1;
        self.fetches.proof = Some(self.fetches.last_proof);
        self.log.prove_gaps(self.fetches.last_proof, gaps);
    }

    /// An answer about gaps came. Those of partitions that were begun elsewhere since, or taken away, do not count.
    pub(super) async fn gaps_proved(
        &mut self,
        id: u64,
        answers: Vec<(Gap, GapAnswer)>,
    ) -> Result<(), IdentityDoubt> {
        if self.fetches.proof == Some(id) {
            self.fetches.proof = None;
        }
        let mut positions = Vec::new();
        for (gap, answer) in answers {
            let partition = gap.partition;
            let Some(fetch) = self.fetches.of.get_mut(&partition) else { continue };
            let is_waiting = matches!(fetch.reading, Reading::Gap { gap: waiting, .. } if waiting == gap);
            if !is_waiting || !matches!(self.slots.get(&partition), Some(Slot::Live(_))) {
                continue;
            }
            match answer {
                GapAnswer::Empty => positions.push((partition, gap.to)),
                GapAnswer::Record(at) => {
                    fetch.gaps = fetch.gaps.saturating_add(1);
                    let is_stubborn = fetch.gaps >= TRIES_MAX;
                    self.metrics.fetch_gap();
                    told::gap(self.settings.index, &self.settings.input_topic, &gap, at);
                    if is_stubborn {
                        fetch.failures = fetch.failures.saturating_add(1).max(TRIES_MAX);
                        fetch.reading = Reading::Failed { again_at: Instant::now() + fetch.pause() };
                        self.hold(partition, Doubt::FetchGap { from: at, to: gap.to });
                        self.note_assigned();
                    } else {
                        positions.push((partition, at));
                    }
                }
                GapAnswer::Removed => {
                    self.reset("the log's start was moved over what was to be read");
                    return Ok(());
                }
                GapAnswer::Failed(error) => {
                    fetch.reading = Reading::Gap { gap, again_at: Instant::now() + GAP_RETRY };
                    told::gap_unknown(self.settings.index, &self.settings.input_topic, &gap, &error);
                }
            }
        }
        if self.begin(&positions).await? {
            for (partition, position) in positions {
                self.assembly.intake.begin_proved(partition, position);
            }
        }
        Ok(())
    }

    // ---- tries -------------------------------------------------------------------------------

    /// Begins partitions again that failed, at the lane's own positions.
    async fn begin_again(&mut self) -> Result<(), IdentityDoubt> {
        let now = Instant::now();
        let mut positions = Vec::new();
        let mut held = Vec::new();
        for (partition, fetch) in &self.fetches.of {
            let Reading::Failed { again_at } = fetch.reading else { continue };
            match (&fetch.held, self.slots.get(partition)) {
                // A person may decide to skip what cannot be read: that is found by taking it up anew.
                (Some(doubt), Some(Slot::Live(_))) => held.push((*partition, doubt.clone())),
                (None, Some(Slot::Live(_))) if again_at <= now => {
                    if let Some(position) = self.assembly.intake.position(*partition) {
                        positions.push((*partition, position));
                    }
                }
                _ => {}
            }
        }
        for (partition, doubt) in held {
            // A batch must not lose its partition on its way.
            if !self.is_in_flight(partition) {
                self.slots.insert(partition, Slot::Halted { doubt, known: None, again_at: now });
            }
        }
        if self.begin(&positions).await? {
            for (partition, position) in positions {
                self.assembly.intake.begin(partition, position);
            }
        }
        Ok(())
    }

    /// Whether something of `partition` is on its way through this lane.
    fn is_in_flight(&self, partition: Partition) -> bool {
        self.assembly.holds(partition)
            || self.writing.iter().any(|batch| batch.progress().iter().any(|p| p.partition == partition))
            || self
                .pending
                .iter()
                .any(|pending| pending.publication.spans().iter().any(|span| span.partition == partition))
    }

    // ---- silence -----------------------------------------------------------------------------

    /// Fetches by a new client where a partition has records and nothing is heard of it: the library keeps some errors
    /// to itself, and may forget its brokers (librdkafka #5301).
    fn look_for_silence(&mut self) -> Result<(), IdentityDoubt> {
        let now = Instant::now();
        if now.saturating_duration_since(self.fetches.looked_at) < SILENCE_TICK {
            return Ok(());
        }
        self.fetches.looked_at = now;
        let Self { fetches, slots, assembly, board, .. } = self;
        let has_room = now.saturating_duration_since(fetches.full_at) >= SILENCE_MAX;
        let limit = if has_room { SILENCE_MAX } else { SILENCE_BUSY_MAX };
        let fresh = i64::try_from(ENDS_FRESH.as_millis()).unwrap_or(i64::MAX);
        let since = TimestampMs(metrics::now().0.saturating_sub(fresh));
        let mut silent = None;
        for (partition, fetch) in &mut fetches.of {
            let Some(position) = assembly.intake.position(*partition) else { continue };
            let end = board.end_since(*partition, since);
            let is_waiting = fetch.reading == Reading::Begun
                && matches!(slots.get(partition), Some(Slot::Live(_)))
                && end.is_some_and(|end| end > position);
            if !is_waiting || fetch.heard.0 != position {
                fetch.heard = (position, now);
            } else if now.saturating_duration_since(fetch.heard.1) >= limit {
                silent = Some((*partition, position, end.unwrap_or(position)));
            }
        }
        if let Some((partition, position, end)) = silent {
            self.metrics.fetch_silent();
            static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(
                    lane = self.settings.index,
                    topic = self.settings.input_topic,
                    partition = partition.0,
                    offset = position.0,
                    end = end.0,
                    suppressed,
                    "nothing was fetched of this partition for a while though it has records: fetching by a new client"
                );
            }
            self.log.renew_fetching();
            self.reset("the client that fetches was made anew");
        }
        Ok(())
    }
}
