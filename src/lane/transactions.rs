//! The two transactions of a batch: Postgres first (cursors, claims, rows), then Kafka (events, dead letters,
//! group offsets). The Kafka transaction of one batch runs beside the Postgres transaction of the next.
//!
//! If the Postgres transaction fails, the cursors are compared in a new session (`cursors`), and the batch is
//! written unless it was committed after all. If the Kafka transaction is aborted, the same publication is
//! retried; if its outcome is unknown, the lane is reset and recovers from both cursors.
//!
//! Rows appear once, because a record that is written again finds its message id claimed by itself in
//! `idempotency`. Events appear once, because the group's offset is committed in the same transaction.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::maybe_done;
use tokio::time::Instant;

use super::batch_builder::Built;
use super::failures::AfterFailure;
use super::partitions::PartitionState;
use super::revocation::receive_until_grace_ends;
use super::{IDLE_TICK, Lane, LaneSettings, PENDING_MAX, Pending, Session, log_lines};
use crate::domain::batch::{Answer, Batch, OutcomeCounts, Outcomes, Progress};
use crate::domain::cursor::IdentityMismatch;
use crate::domain::outcome::FailureClass;
use crate::domain::publication::{Committed, OffsetCommit, OutputCounts, Publication, REPLAYS_HEADER};
use crate::domain::record::{NextOffset, Partition};
use crate::domain::wire::Reason;
use crate::ports::{CursorMove, KafkaPort, PublishError, PublishTimes, Store, StoreError, WriteStats};
use crate::telemetry::activity::LaneStep;
use crate::telemetry::metrics::{self, LaneMetrics};
use crate::telemetry::status::{DEAD_LETTERS_MAX, DeadLettered};
use crate::telemetry::trace::BatchTrace;
use crate::telemetry::work::LanePhase;

/// After a publication no longer than this, batches that were made smaller may grow again.
const SHORT_PUBLICATION: Duration = Duration::from_secs(3);
/// After a failed publication that took at least this long, or its time limit if that is shorter, batches are made
/// smaller.
const LONG_PUBLICATION: Duration = Duration::from_secs(8);

type Written = Result<(Outcomes, Answer, WriteStats), StoreError>;
type Sent = Result<(Committed, OutputCounts, PublishTimes), PublishError>;

/// The end of the transactions that ran side by side.
enum InFlight {
    Finished {
        written: Option<Written>,
        /// The result and its duration.
        sent: Option<(Sent, Duration)>,
    },
    /// Partitions are being revoked, and not both finished within the grace; perhaps the Kafka transaction did.
    GivenUp { sent: Option<(Sent, Duration)> },
}

/// Runs the Postgres transaction of `batch`, if there is one.
async fn write<S: Store>(
    store: &mut S,
    batch: Option<&Batch>,
    moves: &[CursorMove],
    metrics: &LaneMetrics,
    trace: Option<&mut BatchTrace>,
) -> Option<Written> {
    let (batch, began) = (batch?, Instant::now());
    let _in_step = metrics.begin(LaneStep::Database);
    let written = store.write(batch, moves).await;
    metrics.phase(LanePhase::Database, began.elapsed());
    if let Some(trace) = trace {
        trace.database_ended();
    }
    Some(written)
}

/// Runs the Kafka transaction of `publication`, if there is one. Returns its result and duration.
async fn publish<K: KafkaPort>(
    kafka: &mut K,
    publication: Option<&Arc<Publication>>,
    metrics: &LaneMetrics,
    trace: Option<&mut BatchTrace>,
) -> Option<(Sent, Duration)> {
    let (publication, began) = (publication?, Instant::now());
    let _in_step = metrics.begin(LaneStep::Kafka);
    let sent = kafka.publish(publication).await;
    let took = began.elapsed();
    metrics.phase(LanePhase::Kafka, took);
    if let Some(trace) = trace {
        trace.kafka_ended();
    }
    Some((sent, took))
}

/// `applied` of a live partition once `moves` are committed.
fn applied_after(
    partitions: &BTreeMap<Partition, PartitionState>,
    moves: &[CursorMove],
    partition: Partition,
) -> Option<NextOffset> {
    let live = partitions.get(&partition)?.live()?;
    let moved = moves.iter().find(|moved| moved.partition == partition);
    Some(moved.map_or(live.applied, |moved| live.applied.max(moved.applied)))
}

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Closes the buffer as a batch, if it is large or old enough; the next step writes it.
    pub(super) async fn close_batch(&mut self) {
        if self.writing.is_some() {
            return;
        }
        let _in_step = self.metrics.begin(LaneStep::Assembling);
        let Self { builder, partitions, pending, status, .. } = self;
        let applied = |partition| partitions.get(&partition)?.live().map(|live| live.applied);
        let Some(built) = builder.take(pending.is_empty(), status, applied).await else { return };
        self.metrics.phase(LanePhase::Assembling, built.took);
        let tracer = self.settings.tracer.as_ref().filter(|tracer| tracer.samples());
        let Built { batch, took, ended } = built;
        self.trace = tracer.map(|tracer| tracer.begin(self.settings.index, &batch, took, ended));
        self.metrics.batch(batch.len(), batch.source_bytes());
        self.writing = Some(batch);
    }

    /// Writes the closed batch and publishes the one before it, side by side. An idle lane copies committed
    /// offsets into the database instead.
    pub(super) async fn write_and_publish(&mut self) -> Result<(), IdentityMismatch> {
        let writes = self.writing.is_some() && self.can_write();
        let publishes = self.can_publish();
        if writes && self.session == Session::Unchecked && !self.compare_cursors().await? {
            return Ok(());
        }
        if !writes && !publishes {
            self.copy_when_idle().await?;
            if self.writing.is_some() || !self.pending.is_empty() || !self.builder.is_empty() {
                self.wait_for_event(self.next_due()).await;
            }
            return Ok(());
        }
        let moves = match &self.writing {
            Some(batch) if writes => self.moves(batch.progress()),
            _ => Vec::new(),
        };
        let publication = self.first_pending().filter(|_| publishes);
        let is_publishing = publication.is_some();
        let in_flight = self.run_transactions(writes, &moves, publication.as_ref()).await;
        drop(publication);
        let (written, sent, is_given_up) = match in_flight {
            InFlight::Finished { written, sent } => (written, sent, false),
            InFlight::GivenUp { sent } => (None, sent, true),
        };
        match sent {
            Some((sent, took)) => self.after_publish(sent, took)?,
            None if is_publishing => self.producer_lost(),
            None => {}
        }
        if let Some(written) = written {
            self.after_write(written, &moves)?;
        }
        if is_given_up {
            if writes {
                self.session = Session::Unchecked;
            }
            self.reset("transactions did not finish before partitions were revoked");
        }
        Ok(())
    }

    /// Whether to build the next batch during the write. At most three batches are held: two that are being
    /// written or wait for publication, and the next. Where batches are small, the next one rather waits and
    /// grows.
    fn is_next_wanted(&self) -> bool {
        !self.builder.has_next()
            && self.pending.len() < PENDING_MAX
            && self.writing.as_ref().is_some_and(|batch| self.builder.is_large(batch.len()))
    }

    /// Runs the Postgres transaction of one batch beside the Kafka transaction of the one before. When the
    /// latter is finished, the next batch is fetched and built.
    async fn run_transactions(
        &mut self,
        writes: bool,
        moves: &[CursorMove],
        publication: Option<&Arc<Publication>>,
    ) -> InFlight {
        let is_next_wanted = writes && self.is_next_wanted();
        let Self { store, kafka, writing, trace, pending, events, inbox, metrics, builder, .. } = self;
        let (partitions, status) = (&self.partitions, &self.status);
        let pending_trace = pending.front_mut().and_then(|pending| pending.trace.as_deref_mut());
        let write = write(store, writing.as_ref().filter(|_| writes), moves, metrics, trace.as_deref_mut());
        let mut write = pin!(maybe_done(write));
        let mut grace_ended = pin!(receive_until_grace_ends(events, inbox));
        let sent = {
            let mut publish = pin!(publish(kafka, publication, metrics, pending_trace));
            let mut is_written = false;
            loop {
                tokio::select! {
                    biased;
                    sent = &mut publish => break sent,
                    () = &mut write, if !is_written => is_written = true,
                    () = &mut grace_ended => return InFlight::GivenUp { sent: None },
                }
            }
        };
        let prepare = async {
            if is_next_wanted {
                let applied = |partition| applied_after(partitions, moves, partition);
                builder.prepare(kafka, IDLE_TICK, status, applied).await;
            }
            // Never completes: the write decides when the lane goes on.
            future::pending::<Infallible>().await
        };
        tokio::select! {
            biased;
            () = &mut write => InFlight::Finished { written: write.take_output().flatten(), sent },
            never = prepare => match never {},
            () = grace_ended => InFlight::GivenUp { sent },
        }
    }

    fn after_write(&mut self, written: Written, moves: &[CursorMove]) -> Result<(), IdentityMismatch> {
        let (outcomes, _, times) = match written {
            Ok(written) => written,
            Err(failure) => {
                if let Some(trace) = &self.trace {
                    trace.failed("database", failure.class.as_str());
                }
                let is_undecided = failure.class == FailureClass::Undecided;
                self.write_failed("writing a batch", failure)?;
                if is_undecided {
                    self.take_again_with_others();
                }
                return Ok(());
            }
        };
        self.database_up();
        self.copied_at = Instant::now();
        self.compared_at = self.copied_at;
        self.metrics.write_stats(&times);
        // None after a reset by the publication beside it: recovery reads from the cursors what was written.
        let Some(batch) = self.writing.take() else { return Ok(()) };
        let mut trace = self.trace.take();
        if let Some(trace) = &mut trace {
            trace.written(&times);
        }
        self.note_moves(moves);
        let commits = self.commits_of(&batch);
        self.report_positions();
        if commits.is_empty() {
            self.count_outcomes(&batch, &outcomes, trace);
            self.builder.keep(batch.into_memory());
        } else {
            let emits = self.settings.mode.publishes;
            let publication = Arc::new(Publication::of_batch(batch, outcomes, commits, emits));
            self.pending.push_back(Pending { publication, trace });
        }
        Ok(())
    }

    /// Notes that the database has these cursors.
    fn note_moves(&mut self, moves: &[CursorMove]) {
        for moved in moves {
            let state = self.partitions.get_mut(&moved.partition);
            let Some(live) = state.and_then(PartitionState::live_mut) else { continue };
            live.applied = live.applied.max(moved.applied);
            if let Some(Some(timestamp)) = moved.timestamp {
                live.timestamp = Some(timestamp);
            }
            live.copied = moved.published.or(live.copied);
        }
    }

    /// The offsets to commit with a batch: its end in each live partition, but never a lower one than before.
    fn commits_of(&self, batch: &Batch) -> Vec<OffsetCommit> {
        let commit_of = |progress: &Progress| {
            let live = self.partitions.get(&progress.partition)?.live()?;
            (progress.reached > live.committed).then_some(OffsetCommit {
                partition: progress.partition,
                publish_from: live.publish_from,
                commit: progress.reached,
            })
        };
        batch.progress().iter().filter_map(commit_of).collect()
    }

    /// Rows of the batch are refused, and it is unknown whether the rows are at fault: fetches the batch
    /// again together with records that arrived since. If some of those can be written, the refused rows are
    /// at fault.
    fn take_again_with_others(&mut self) {
        let LaneSettings { batch_payments_max, batch_bytes_max, .. } = &self.settings;
        let has_room = self.writing.as_ref().is_some_and(|batch| {
            batch.len() < *batch_payments_max && batch.source_bytes() < *batch_bytes_max
        });
        // A reset would drop batches that wait for their publication, too: they are published first.
        if has_room && self.pending.is_empty() {
            self.reset("the database refuses rows; others are needed to tell whether the rows are at fault");
        }
    }

    fn after_publish(&mut self, sent: Sent, took: Duration) -> Result<(), IdentityMismatch> {
        let error = match sent {
            Ok(sent) => {
                if took < SHORT_PUBLICATION {
                    self.builder.grow();
                }
                self.publication_committed(sent);
                return Ok(());
            }
            Err(error) => error,
        };
        let pending = self.pending.front();
        if let PublishError::Aborted { class, .. } = &error
            && let Some(trace) = pending.and_then(|pending| pending.trace.as_ref())
        {
            trace.failed("kafka", class.as_str());
        }
        match self.publish_failed("publishing a batch", error)? {
            AfterFailure::Retry => {
                if self.made_batches_smaller(took) {
                    // The written records are fetched again and published in smaller transactions.
                    self.reset("a batch could not be published in time");
                }
            }
            AfterFailure::AwaitGeneration => {}
            AfterFailure::Recover => {
                self.made_batches_smaller(took);
                self.reset("whether a transaction was committed is not known");
            }
        }
        Ok(())
    }

    /// Makes batches smaller if this one used up a transaction's time limit, as when a quota slows the
    /// producer down. True: the limit was lowered.
    fn made_batches_smaller(&mut self, took: Duration) -> bool {
        let records = self.first_pending().and_then(|publication| publication.batch().map(Batch::len));
        let limit = records
            .filter(|_| took >= LONG_PUBLICATION.min(self.settings.publication_max))
            .and_then(|records| self.builder.shrink(records));
        if let Some(limit) = limit {
            tracing::warn!(
                lane = self.settings.index,
                records = limit,
                "a batch could not be published in time; batches are limited to this many records for now"
            );
        }
        limit.is_some()
    }

    /// Notes that the first pending publication is committed.
    pub(super) fn publication_committed(
        &mut self,
        (committed, counts, times): (Committed, OutputCounts, PublishTimes),
    ) {
        self.broker_up();
        for (partition, position) in committed.positions() {
            if let Some(live) = self.partitions.get_mut(partition).and_then(PartitionState::live_mut) {
                live.committed = live.committed.max(*position);
            }
        }
        self.metrics.outputs(&counts);
        if let Some(Pending { publication, mut trace }) = self.pending.pop_front() {
            if let Some(trace) = &mut trace {
                trace.published(&times);
            }
            let trace_id = trace.as_ref().map(|trace| trace.id());
            log_lines::dead_letters(&self.settings, &publication, &counts, trace_id.as_deref());
            if counts.by_reason.iter().any(|count| *count > 0) {
                self.note_dead_letters(&publication, &counts);
            }
            if let Some(batch) = publication.batch() {
                self.count_outcomes(batch, publication.outcomes(), trace);
            }
            self.metrics.latency(publication.batch());
            let batch = Arc::into_inner(publication).and_then(Publication::into_batch);
            if let Some(batch) = batch {
                self.builder.keep(batch.into_memory());
            }
        }
        self.report_positions();
    }

    fn note_dead_letters(&self, publication: &Publication, counts: &OutputCounts) {
        let at = metrics::now();
        let last = publication.dead_letters().rev().take(DEAD_LETTERS_MAX);
        let mut last: Vec<DeadLettered> = last
            .map(|letter| DeadLettered {
                at,
                partition: letter.record.partition,
                offset: letter.record.offset,
                reason: letter.reason,
            })
            .collect();
        last.reverse();
        let counts = Reason::ALL.iter().copied().zip(counts.by_reason);
        self.status.dead_lettered(at, counts, last.into_iter());
    }

    /// Counts the outcomes of a completed batch.
    fn count_outcomes(&self, batch: &Batch, outcomes: &Outcomes, trace: Option<Box<BatchTrace>>) {
        let outcomes = OutcomeCounts::of(outcomes);
        self.metrics.outcomes(&outcomes);
        self.metrics.replayed.increment(batch.source().count_with_header(REPLAYS_HEADER) as u64);
        self.status.settled(&outcomes);
        if let Some(trace) = trace {
            trace.settled(&outcomes);
        }
    }
}
