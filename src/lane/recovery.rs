//! Recovery starts a partition from its two cursors. After an assignment, a halt or a reset there is no other
//! way to start one.
//!
//! 1. [`Lane::renew_producer`] runs `init_transactions`, which ends transactions that an earlier producer
//!    left open.
//! 2. [`Lane::recover_partitions`] reads the cursors from Postgres, then asks Kafka in the background for the
//!    group's committed offsets and the log's bounds.
//! 3. [`Lane::answered`] has [`decide`] determine where to start, or the halt reason. If the committed offset
//!    is missing, not this program's, or unknown to the database, the output topics are scanned first for the
//!    events that were sent.
//! 4. The committed offset and the cursor row are written where they differ, and fetching begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::failures::AfterFailure;
use super::partitions::{LivePositions, PartitionState};
use super::questions::Asked;
use super::{Lane, Producer, log_lines};
use crate::domain::cursor::{
    CursorRow, Decision, HaltReason, IdentityMismatch, Known, OutputScan, Start, decide,
};
use crate::domain::outcome::FailureClass;
use crate::domain::publication::{OffsetCommit, Publication};
use crate::domain::record::{NextOffset, Partition};
use crate::failpoint;
use crate::ports::{KafkaPort, KafkaPortError, Positions, Store};
use crate::telemetry::activity::LaneStep;
use crate::telemetry::logging::RateLimited;
use crate::telemetry::metrics;

/// For this long a cursor beyond the log's end is taken for a leader that lags.
const BEYOND_END_PATIENCE: Duration = Duration::from_secs(30);
const BEYOND_END_TICK: Duration = Duration::from_secs(1);
/// How often a running output scan is polled.
const OUTPUT_SCAN_TICK: Duration = Duration::from_millis(50);
/// A failed output scan is started again after this time.
const OUTPUT_SCAN_RETRY: Duration = Duration::from_secs(5);
/// How often a halted partition is examined again: an operator may have resolved it.
const HALTED_TICK: Duration = Duration::from_secs(5);

const ASKING: &str = "reading the group's offsets and the log's bounds";

/// Rate limit of the reset message; resets can repeat quickly.
static RESETS: RateLimited = RateLimited::new(10, Duration::from_secs(60));

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Drops everything that the lane holds; every live partition is recovered from its cursors.
    pub(super) fn reset(&mut self, reason: &str) {
        if let Some(suppressed) = RESETS.pass() {
            let lane = self.settings.index;
            tracing::info!(lane, reason, suppressed, "reading the cursors of all partitions again");
        }
        self.metrics.resets.increment(1);
        self.writing = None;
        let traces = self.trace.take().into_iter().chain(self.pending.drain(..).filter_map(|p| p.trace));
        traces.for_each(|trace| trace.dropped(reason));
        self.builder.clear();
        self.questions.forget_all();
        self.fetch_states.reset();
        for (partition, state) in &mut self.partitions {
            if state.live().is_some() {
                *state = PartitionState::Opening;
                self.status.opening(metrics::now(), *partition);
            }
        }
    }

    /// Starts the transactional producer, which ends transactions that an earlier one left open.
    pub(super) async fn renew_producer(&mut self) -> Result<(), IdentityMismatch> {
        if self.producer == Producer::Ready || !self.broker.is_due() {
            return Ok(());
        }
        let _in_step = self.metrics.begin(LaneStep::StartingProducer);
        match self.kafka.renew().await {
            Ok(()) => {
                self.producer = Producer::Ready;
                self.questions.forget_all();
                self.broker_up();
                Ok(())
            }
            Err(failure) => self.kafka_failed("starting the transactional producer", failure),
        }
    }

    /// Asks about partitions that wait for recovery, if neither side is in a backoff. The answer arrives as
    /// an event; live partitions go on meanwhile. The committed offset is read only after
    /// `init_transactions`, because an open transaction of an earlier producer could still change it.
    pub(super) async fn recover_partitions(&mut self) -> Result<(), IdentityMismatch> {
        let now = Instant::now();
        let waiting: Vec<Partition> = self
            .partitions
            .iter()
            .filter(|(partition, state)| match state {
                PartitionState::Opening => !self.questions.is_asked(**partition),
                PartitionState::BeyondEnd { again_at, .. }
                | PartitionState::Halted { again_at, .. }
                | PartitionState::ScanningOutputs { again_at, .. } => {
                    *again_at <= now && !self.questions.is_asked(**partition)
                }
                PartitionState::Live(_) => false,
            })
            .map(|(partition, _)| *partition)
            .collect();
        let is_due = self.producer == Producer::Ready
            && self.database.is_due()
            && self.broker.is_due()
            && self.asking.is_due();
        if waiting.is_empty() || !is_due || !self.questions.has_room() {
            return Ok(());
        }
        let _in_step = self.metrics.begin(LaneStep::Recovering);
        let parts = self.questions.divided(waiting);
        let rows = match self.store.cursors(&parts.concat()).await {
            Ok(rows) => rows,
            Err(failure) => return self.store_failed("reading the cursors", failure),
        };
        let mut rows: BTreeMap<_, _> = rows.into_iter().collect();
        for partitions in parts {
            let rows = partitions.into_iter().map(|p| (p, rows.remove(&p).flatten())).collect();
            let question = self.questions.ask(Asked { rows, at: metrics::now() });
            self.kafka.ask(question);
        }
        Ok(())
    }

    /// Handles an answer of the cluster; outdated parts are dropped.
    pub(super) async fn answered(
        &mut self,
        id: u64,
        found: Result<Vec<Positions>, KafkaPortError>,
    ) -> Result<(), IdentityMismatch> {
        let Some((mut asked, partitions)) = self.questions.take(id) else { return Ok(()) };
        let found = match found {
            Ok(found) => found,
            Err(KafkaPortError::Identity(mismatch)) => return Err(mismatch),
            // Outdated as a whole.
            _ if partitions.is_empty() => return Ok(()),
            Err(KafkaPortError::Failed { class, message }) => {
                self.questions.failed(&partitions);
                self.asking_failed(class, &message);
                return Ok(());
            }
        };
        self.asking.succeeded();
        self.questions.succeeded(&partitions);
        let mut starts: Vec<(Known, Start)> = Vec::new();
        let mut to_scan: Vec<(Known, NextOffset)> = Vec::new();
        for positions in found {
            let Positions { partition, group, bounds } = positions;
            if !partitions.contains(&partition) {
                continue;
            }
            let row = asked.rows.remove(&partition).flatten();
            let mut known = Known { partition, group, row, bounds, scan: OutputScan::NotScanned };
            // While the cursors are the same, another output scan would find the same.
            if let Some(
                PartitionState::Halted { known: Some(last), .. }
                | PartitionState::BeyondEnd { known: last, .. },
            ) = self.partitions.get(&partition)
                && last.group == known.group
                && last.row == known.row
            {
                known.scan = last.scan;
            }
            self.status.found(asked.at, &known);
            match self.decide(&known) {
                Decision::Go(start) => match self.halted_until(&known, &start) {
                    Some(until) => self.examine_halted_at(partition, until),
                    None => starts.push((known, start)),
                },
                Decision::ScanOutputs { from } => to_scan.push((known, from)),
                Decision::Halt(reason) => self.halt(known, reason).await?,
                Decision::Stop(mismatch) => return Err(mismatch),
            }
        }
        self.scan_outputs(to_scan, &mut starts).await?;
        self.note_assigned();
        if starts.is_empty() {
            // Where nothing can start, nothing else would tell.
            self.database_answered();
            self.broker_answered();
            return Ok(());
        }
        self.start_partitions(starts).await
    }

    /// Notes a failed question. The broker counts as down only if no partition of this lane is live.
    fn asking_failed(&mut self, class: FailureClass, message: &str) {
        let is_idle = !self.partitions.values().any(|state| state.live().is_some());
        let (class, message) = self.refused_or(class, message);
        self.asking.failed(class, ASKING, &message);
        self.metrics.kafka_error(class);
        if is_idle {
            self.broker_down(class, ASKING, &message);
        }
    }

    /// Until when a partition that could start stays halted, because it cannot be read and its next try is
    /// not due. `None` if an operator skipped the unreadable batch.
    fn halted_until(&self, known: &Known, start: &Start) -> Option<Instant> {
        let Some(PartitionState::Halted { reason, .. }) = self.partitions.get(&known.partition) else {
            return None;
        };
        let stays =
            reason.is_about_reading() && known.settlement().is_none() && start.from <= reason.first_offset();
        self.fetch_states.halted_until(known.partition).filter(|until| stays && *until > Instant::now())
    }

    fn examine_halted_at(&mut self, partition: Partition, until: Instant) {
        if let Some(PartitionState::Halted { again_at, .. }) = self.partitions.get_mut(&partition) {
            *again_at = until.min(Instant::now() + HALTED_TICK);
        }
    }

    fn decide(&self, known: &Known) -> Decision {
        static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(600));
        let settled = known.row.as_ref().and_then(|row| row.settled.as_ref());
        if let Some(settled) = settled.filter(|_| known.settlement().is_none())
            && let Some(suppressed) = LIMIT.pass()
        {
            tracing::warn!(
                partition = known.partition.0,
                decided_on = settled.committed.0,
                suppressed,
                "an operator's decision is dropped: the group's offset has been changed since; if the partition is \
                 halted, decide again"
            );
        }
        decide(known, &self.settings.identity, &self.settings.mode)
    }

    /// Scans the outputs for partitions whose committed offset is missing, not ours, or unknown to the database,
    /// and decides those with a result.
    async fn scan_outputs(
        &mut self,
        wanted: Vec<(Known, NextOffset)>,
        starts: &mut Vec<(Known, Start)>,
    ) -> Result<(), IdentityMismatch> {
        if wanted.is_empty() {
            return Ok(());
        }
        let positions: Vec<_> = wanted.iter().map(|(known, from)| (known.partition, *from)).collect();
        let answers = match self.kafka.scan_outputs(&positions).await {
            Ok(answers) => answers.unwrap_or_default(),
            Err(KafkaPortError::Identity(mismatch)) => return Err(mismatch),
            Err(KafkaPortError::Failed { message, .. }) => {
                static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    let lane = self.settings.index;
                    tracing::warn!(
                        lane,
                        error = message,
                        suppressed,
                        "the outputs could not be searched, trying again"
                    );
                }
                let again_at = Instant::now() + OUTPUT_SCAN_RETRY;
                for (known, _) in wanted {
                    self.wait_for_outputs(known.partition, again_at);
                }
                return Ok(());
            }
        };
        let again_at = Instant::now() + OUTPUT_SCAN_TICK;
        for (mut known, from) in wanted {
            let partition = known.partition;
            let Some(scanned) = answers.iter().find(|p| p.partition == partition && p.from == from) else {
                self.wait_for_outputs(partition, again_at);
                continue;
            };
            known.scan = scanned.scan;
            static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
            if let Some(suppressed) = (!scanned.is_refused).then(|| LIMIT.pass()).flatten() {
                tracing::info!(
                    lane = self.settings.index,
                    topic = self.settings.input_topic,
                    partition = partition.0,
                    from = from.0,
                    proof = ?scanned.scan,
                    suppressed,
                    "the group's offset is missing, not this daemon's, or unknown to the database: the outputs show what was sent"
                );
            }
            match self.decide(&known) {
                Decision::Go(start) => starts.push((known, start)),
                Decision::Halt(reason) => {
                    if scanned.is_refused {
                        known.scan = OutputScan::NotScanned;
                    }
                    self.halt(known, reason).await?;
                }
                Decision::Stop(mismatch) => return Err(mismatch),
                // `decide` asks for no second scan.
                Decision::ScanOutputs { .. } => {}
            }
        }
        Ok(())
    }

    /// Waits for the output scan. A halted partition stays halted meanwhile.
    fn wait_for_outputs(&mut self, partition: Partition, again_at: Instant) {
        let halted = match self.partitions.remove(&partition) {
            Some(PartitionState::Halted { reason, .. }) => Some(reason),
            Some(PartitionState::ScanningOutputs { halted, .. }) => halted,
            _ => None,
        };
        self.partitions.insert(partition, PartitionState::ScanningOutputs { again_at, halted });
    }

    /// Halts a partition. A cursor beyond the log's end is given some time first.
    async fn halt(&mut self, known: Known, reason: HaltReason) -> Result<(), IdentityMismatch> {
        let now = Instant::now();
        let partition = known.partition;
        let state = self.partitions.get(&partition);
        let halted = state.and_then(PartitionState::halted);
        if let HaltReason::BeyondEnd { .. } = reason
            && halted.is_none()
        {
            let since = match state {
                Some(PartitionState::BeyondEnd { since, .. }) => *since,
                _ => now,
            };
            if now - since < BEYOND_END_PATIENCE {
                let again_at = now + BEYOND_END_TICK;
                self.partitions.insert(partition, PartitionState::BeyondEnd { since, known, again_at });
                return Ok(());
            }
        }
        // The end of the affected range moves with the log; only another label or start is a new reason.
        let is_same = |last: &HaltReason| {
            last.label() == reason.label() && last.first_offset() == reason.first_offset()
        };
        if !halted.is_some_and(is_same) {
            log_lines::halted(&self.settings, partition, &reason);
        }
        self.status.halted(metrics::now(), partition, reason.clone());
        let state = PartitionState::Halted { reason, known: Some(known), again_at: now + HALTED_TICK };
        self.partitions.insert(partition, state);
        self.fetch_states.forget(&[partition]);
        self.stop_fetching(&[partition]).await?;
        Ok(())
    }

    /// Starts partitions whose positions are decided. The group's offset is committed before the row is
    /// written. After a crash in between, recovery finds an offset of ours without a row and starts at the same
    /// place. In the other order it would find written records without knowing whether their events were
    /// published.
    async fn start_partitions(&mut self, starts: Vec<(Known, Start)>) -> Result<(), IdentityMismatch> {
        if !self.commit_first_offsets(&starts).await? || !self.store_first_cursors(&starts).await? {
            return Ok(());
        }
        let positions: Vec<_> = starts.iter().map(|(known, start)| (known.partition, start.from)).collect();
        if !self.start_fetching(&positions).await? {
            return Ok(());
        }
        self.broker_answered();
        for (known, start) in starts {
            self.builder.buffer.begin(known.partition, start.from);
            let live = LivePositions {
                applied: start.applied,
                publish_from: start.publish_from,
                committed: start.committed,
                copied: self.settings.mode.publishes.then_some(start.publish_from),
                timestamp: known.row.as_ref().and_then(|r| r.applied_timestamp),
            };
            self.partitions.insert(known.partition, PartitionState::Live(live));
        }
        self.note_assigned();
        self.report_positions();
        Ok(())
    }

    /// Commits the group's offsets that differ from where partitions start. False: it failed.
    async fn commit_first_offsets(&mut self, starts: &[(Known, Start)]) -> Result<bool, IdentityMismatch> {
        let commits: Vec<OffsetCommit> = starts
            .iter()
            .filter(|(_, start)| start.must_commit)
            .map(|(known, start)| OffsetCommit {
                partition: known.partition,
                publish_from: start.publish_from,
                commit: start.committed,
            })
            .collect();
        if commits.is_empty() {
            return Ok(true);
        }
        match self.kafka.publish(&Arc::new(Publication::of_offsets(commits))).await {
            Ok(_) => {
                failpoint::hit("after_first_offsets");
                self.broker_up();
                Ok(true)
            }
            Err(error) => {
                let next = self.publish_failed("committing the first offsets", error)?;
                if next == AfterFailure::Recover {
                    self.reset("whether a transaction was committed is not known");
                }
                Ok(false)
            }
        }
    }

    /// Writes the cursor rows that differ from where partitions start. False: it failed.
    async fn store_first_cursors(&mut self, starts: &[(Known, Start)]) -> Result<bool, IdentityMismatch> {
        let publishes = self.settings.mode.publishes;
        let rows: Vec<_> = starts
            .iter()
            .filter(|(_, start)| start.must_store)
            .map(|(known, start)| {
                let found = known.row.as_ref();
                let row = CursorRow {
                    applied: start.applied,
                    published: publishes.then_some(start.publish_from),
                    applied_timestamp: found.and_then(|r| r.applied_timestamp),
                    settled: found.and_then(|r| r.settled.clone()),
                };
                (known.partition, found.map(|r| r.applied), row)
            })
            .collect();
        failpoint::hit("before_store_cursors");
        if rows.is_empty() {
            self.database_answered();
        } else if let Err(failure) = self.store.store_cursors(&rows).await {
            return self.write_failed("storing the first cursors", failure).map(|()| false);
        } else {
            self.database_up();
        }
        failpoint::hit("after_store_cursors");
        Ok(true)
    }
}
