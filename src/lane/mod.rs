//! A lane: the sole owner of retry, halt and gate.
//!
//! It drives one share of the partitions through fetch, one Postgres transaction and one Kafka
//! transaction a batch. The Kafka transaction of a batch runs beside the Postgres transaction of the
//! next one. Whenever it is in doubt about where things stand, it forgets everything it holds and
//! reads both cursors again ([`Lane::reset`]): there is one way to recover, and it is used often.

mod assembly;
pub mod breaker;
mod fetching;
mod opening;
pub mod ports;
mod questions;
mod told;

use std::collections::{BTreeMap, VecDeque};
use std::future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::maybe_done;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use self::assembly::{Assembled, Assembly};
use self::breaker::Breaker;
use self::fetching::Fetches;
use self::ports::{
    CursorMove, LaneEvent, Ledger, LedgerFailure, Log, PublishFailure, PublishTimes, RevokeDone, WriteStats,
};
use self::questions::Questions;
use crate::batch::{Answer, Batch, Fates, Outcomes, Progress};
use crate::cursor::{Doubt, Identity, IdentityDoubt, Known, Mode};
use crate::disposition::FailureClass;
use crate::dlq::letter::REPLAYS_HEADER;
use crate::logging::RateLimited;
use crate::metrics::{self, LaneMetrics, LanePhase};
use crate::publication::{OutputCounts, Publication, Published, Span};
use crate::record::{NextOffset, Partition, TimestampMs};
use crate::status::{Board, Dependency};
use crate::trace::{BatchTrace, BatchTracer};
use crate::wire::Rules;

/// Without records, the lane looks around this often.
const IDLE_TICK: Duration = Duration::from_millis(200);
/// A quiet lane copies the group's offsets into the database after this time.
const IDLE_COPY_AFTER: Duration = Duration::from_secs(1);
/// A lane that had nothing to ask the database for compares the cursors after this time.
const IDLE_COMPARE_AFTER: Duration = Duration::from_secs(5);
/// What is in flight when partitions are revoked may take this long to finish.
const REVOKE_GRACE: Duration = Duration::from_secs(8);
/// Of partitions that are lost already hardly anything can be finished; the group waits for nothing.
const LOST_GRACE: Duration = Duration::from_secs(1);
/// After a publication that took no longer, batches that were made smaller may grow again.
const SHORT_PUBLICATION: Duration = Duration::from_secs(3);
/// After one that failed so late, smaller ones are tried.
const LONG_PUBLICATION: Duration = Duration::from_secs(8);
/// Written batches that wait for their Kafka transaction.
const PENDING_MAX: usize = 2;

/// What a lane is told once.
#[derive(Clone)]
pub struct LaneSettings {
    /// Number of the lane within the process, from 0.
    pub index: usize,
    /// Rules of valid messages.
    pub rules: Arc<Rules>,
    /// The input topic's name, for the log.
    pub input_topic: String,
    /// Topic and database.
    pub identity: Identity,
    /// How the daemon runs.
    pub mode: Mode,
    /// Records in a batch, at most.
    pub batch_payments_max: usize,
    /// Bytes in a batch, about at most.
    pub batch_bytes_max: usize,
    /// How long the first record of a batch waits for others.
    pub linger: Duration,
    /// Traces some batches; `None`: none.
    pub tracer: Option<Arc<BatchTracer>>,
}

/// Positions of a partition that is being written and published.
#[derive(Clone, Debug)]
struct Live {
    /// `applied` as last read or written.
    applied: NextOffset,
    /// G.
    gate: NextOffset,
    /// K.
    committed: NextOffset,
    /// `published` as last written to the database.
    stored: Option<NextOffset>,
    /// Timestamp of the last record before `applied`.
    timestamp: Option<TimestampMs>,
}

#[derive(Clone, Debug)]
enum Slot {
    /// Where to go on has to be found out.
    Opening,
    /// The cursor lies beyond the log's end; it may be a leader that lags.
    BeyondEnd { since: Instant, known: Known, again_at: Instant },
    /// The outputs are asked which events were sent; the doubt is that of a partition that was halted before.
    Proving { again_at: Instant, halted: Option<Doubt> },
    /// Being written and published.
    Live(Live),
    /// Halted until a person settles it, or until it can be read again.
    Halted { doubt: Doubt, known: Option<Known>, again_at: Instant },
}

impl Slot {
    /// What it waits for a person with.
    fn halted(&self) -> Option<&Doubt> {
        match self {
            Self::Halted { doubt, .. } => Some(doubt),
            Self::Proving { halted, .. } => halted.as_ref(),
            Self::Opening | Self::BeyondEnd { .. } | Self::Live(_) => None,
        }
    }
}

type Written = Result<(Fates, Answer, WriteStats), LedgerFailure>;
type Sent = Result<(Published, OutputCounts, PublishTimes), PublishFailure>;

/// The same, and after how long.
type Timed<T> = (T, Duration);

/// A written batch that waits for its Kafka transaction.
struct Pending {
    publication: Arc<Publication>,
    trace: Option<Box<BatchTrace>>,
}

/// Of what a lane says when it begins anew: it can be told to again and again.
static RESETS: RateLimited = RateLimited::new(10, Duration::from_secs(60));

/// One lane over a log and a ledger.
pub struct Lane<L: Log, D: Ledger> {
    settings: LaneSettings,
    log: L,
    ledger: D,
    events: mpsc::Receiver<LaneEvent>,
    /// Events taken from the channel and not yet handled.
    inbox: VecDeque<LaneEvent>,
    slots: BTreeMap<Partition, Slot>,
    questions: Questions,
    fetches: Fetches,
    assembly: Assembly,
    writing: Option<Batch>,
    /// Of the batch that is being written, if it is traced.
    trace: Option<Box<BatchTrace>>,
    pending: VecDeque<Pending>,
    /// False after a session broke: the cursors are compared before the next write.
    is_session_checked: bool,
    /// False until transactions of a former producer are settled.
    is_producer_ready: bool,
    database: Breaker,
    broker: Breaker,
    /// Of questions about partitions that are not live yet.
    asking: Breaker,
    wrote_at: Instant,
    /// When the cursors were last known to be where this lane left them.
    compared_at: Instant,
    is_draining: bool,
    board: Arc<Board>,
    metrics: LaneMetrics,
}

impl<L: Log, D: Ledger> Lane<L, D> {
    /// A lane without partitions.
    pub fn new(
        settings: LaneSettings,
        log: L,
        ledger: D,
        events: mpsc::Receiver<LaneEvent>,
        board: Arc<Board>,
    ) -> Self {
        let assembly = Assembly::new(&settings);
        let index = settings.index;
        Self {
            settings,
            log,
            ledger,
            events,
            inbox: VecDeque::new(),
            slots: BTreeMap::new(),
            questions: Questions::default(),
            fetches: Fetches::new(),
            assembly,
            writing: None,
            trace: None,
            pending: VecDeque::new(),
            is_session_checked: false,
            is_producer_ready: false,
            database: Breaker::new("database", index),
            broker: Breaker::new("broker", index),
            asking: Breaker::new("broker", index),
            wrote_at: Instant::now(),
            compared_at: Instant::now(),
            is_draining: false,
            board,
            metrics: LaneMetrics::new(index),
        }
    }

    /// The same lane with a jitter that a test can repeat.
    pub fn with_jitter(mut self, seed: u64) -> Self {
        self.database.seed(seed);
        self.broker.seed(seed ^ u64::MAX);
        self.asking.seed(seed.rotate_left(32));
        self
    }

    /// Runs until it is drained, or a doubt about identity stops it.
    pub async fn run(mut self) -> Result<(), IdentityDoubt> {
        loop {
            self.handle_events().await?;
            if self.is_draining {
                return self.drain().await;
            }
            self.renew_if_due().await?;
            self.ask_if_due().await?;
            self.follow_fetching().await?;
            self.collect().await;
            self.advance().await?;
        }
    }

    // ---- events ------------------------------------------------------------------------------

    async fn handle_events(&mut self) -> Result<(), IdentityDoubt> {
        loop {
            let event = match self.inbox.pop_front() {
                Some(event) => event,
                None => match self.events.try_recv() {
                    Ok(event) => event,
                    Err(mpsc::error::TryRecvError::Empty) => return Ok(()),
                    Err(mpsc::error::TryRecvError::Disconnected) => LaneEvent::Drain,
                },
            };
            match event {
                LaneEvent::Assigned(partitions) => {
                    self.questions.forget(&partitions);
                    self.fetches.forget(&partitions);
                    for partition in partitions {
                        self.board.opening(metrics::now(), partition);
                        self.slots.insert(partition, Slot::Opening);
                    }
                    // Also while nothing can be asked of them.
                    self.note_assigned();
                }
                LaneEvent::Revoked { partitions, is_lost, done } => {
                    self.revoke(&partitions, is_lost, done).await?;
                }
                LaneEvent::Answered { id, found } => self.answered(id, found).await?,
                LaneEvent::GapsProved { id, answers } => self.gaps_proved(id, answers).await?,
                LaneEvent::Drain => {
                    self.is_draining = true;
                    return Ok(());
                }
            }
        }
    }

    /// Finishes or drops what is in flight of these partitions, then lets them go.
    async fn revoke(
        &mut self,
        partitions: &[Partition],
        is_lost: bool,
        done: RevokeDone,
    ) -> Result<(), IdentityDoubt> {
        if !is_lost && self.is_producer_ready {
            let deadline = Instant::now() + REVOKE_GRACE;
            while let Some(publication) = self.first_pending() {
                match tokio::time::timeout_at(deadline, self.log.publish(&publication)).await {
                    Ok(Ok(sent)) => {
                        drop(publication);
                        self.published(sent);
                    }
                    Ok(Err(PublishFailure::Identity(doubt))) => return Err(doubt),
                    Ok(Err(PublishFailure::Aborted { class, .. })) => {
                        self.metrics.kafka_error(class);
                        break;
                    }
                    Ok(Err(PublishFailure::Fenced(_))) => {
                        self.metrics.kafka_error(FailureClass::Fenced);
                        break;
                    }
                    Ok(Err(PublishFailure::Unknown(_))) => {
                        self.metrics.kafka_error(FailureClass::Passing);
                        self.producer_lost();
                        break;
                    }
                    // The grace is over: it may still be committed.
                    Err(_) => {
                        self.producer_lost();
                        break;
                    }
                }
            }
        }
        if self.pending.is_empty() && !self.has_batch() {
            self.assembly.forget(partitions);
        } else {
            // A batch spans partitions: dropping it for one must not let the next commit past it for
            // another.
            self.reset("a batch in flight was dropped when partitions were revoked");
        }
        self.questions.forget(partitions);
        self.fetches.forget(partitions);
        for partition in partitions {
            self.slots.remove(partition);
            self.board.revoked(*partition);
        }
        self.end(partitions).await?;
        if self.slots.is_empty() {
            // Nothing to ask for any more: what this lane last heard is no news of either.
            self.board.database(self.settings.index, Dependency::Unknown);
            self.board.broker(self.settings.index, Dependency::Unknown);
            self.metrics.at_rest();
        }
        self.note_assigned();
        done.finish();
        Ok(())
    }

    fn note_assigned(&self) {
        let is_live = |partition: &Partition| matches!(self.slots.get(partition), Some(Slot::Live(_)));
        // Of those that cannot be read some are still live: something of them is on its way.
        let held = self.fetches.held().filter(|(partition, _)| is_live(partition)).count();
        let halted = self.slots.values().filter(|slot| slot.halted().is_some()).count();
        self.metrics.assigned(self.slots.len(), halted + held);
    }

    /// Forgets all that is held; every partition is taken up anew from its cursors.
    fn reset(&mut self, reason: &str) {
        if let Some(suppressed) = RESETS.pass() {
            let lane = self.settings.index;
            tracing::info!(lane, reason, suppressed, "reading the cursors of all partitions again");
        }
        self.metrics.reset();
        self.writing = None;
        let traces = self.trace.take().into_iter().chain(self.pending.drain(..).filter_map(|p| p.trace));
        traces.for_each(|trace| trace.dropped(reason));
        self.assembly.clear();
        self.questions.forget_all();
        self.fetches.reset();
        for (partition, slot) in &mut self.slots {
            if matches!(slot, Slot::Live(_)) {
                *slot = Slot::Opening;
                self.board.opening(metrics::now(), *partition);
            }
        }
    }

    // ---- producer ----------------------------------------------------------------------------

    /// A transaction of the present producer may be open still: what the group's offset was says nothing any more.
    fn producer_lost(&mut self) {
        self.is_producer_ready = false;
        self.questions.forget_all();
    }

    async fn renew_if_due(&mut self) -> Result<(), IdentityDoubt> {
        if self.is_producer_ready || !self.broker.is_due() {
            return Ok(());
        }
        match self.log.renew().await {
            Ok(()) => {
                self.is_producer_ready = true;
                self.questions.forget_all();
                self.broker_up();
                Ok(())
            }
            Err(failure) => self.log_failed("starting the transactional producer", failure),
        }
    }

    /// The group is between two generations, as in every rebalance: no fault of the broker's.
    fn fenced(&mut self, message: &str) {
        tracing::debug!(
            lane = self.settings.index,
            reason = message,
            "waiting for the group's next generation"
        );
        self.metrics.kafka_error(FailureClass::Fenced);
        self.broker.delay();
    }

    fn broker_up(&mut self) {
        self.broker.succeeded();
        self.metrics.broker_up(true);
        self.board.broker(self.settings.index, Dependency::Up);
    }

    fn broker_failed(&mut self, class: FailureClass, doing: &str, message: &str) {
        let (class, message) = self.refused_or(class, message);
        self.broker.failed(class, doing, &message);
        self.metrics.kafka_error(class);
        self.broker_down(class, doing, &message);
    }

    /// Requests of a client that is refused its connections only time out; why is told elsewhere.
    fn refused_or(&self, class: FailureClass, message: &str) -> (FailureClass, String) {
        match self.board.broker_refusal() {
            Some(refusal) => (FailureClass::Systemic, refusal),
            None => (class, message.to_owned()),
        }
    }

    fn broker_down(&self, class: FailureClass, doing: &str, message: &str) {
        self.metrics.broker_up(false);
        let down = Dependency::Down(format!("{doing}: {message} ({})", class.as_str()));
        self.board.broker(self.settings.index, down);
    }

    fn database_up(&mut self) {
        self.database.succeeded();
        self.metrics.database_up(true);
        self.board.database(self.settings.index, Dependency::Up);
    }

    fn log_failed(&mut self, doing: &str, failure: ports::LogFailure) -> Result<(), IdentityDoubt> {
        match failure {
            ports::LogFailure::Failed { class, message } => {
                self.broker_failed(class, doing, &message);
                Ok(())
            }
            ports::LogFailure::Identity(doubt) => Err(doubt),
        }
    }

    fn ledger_failed(&mut self, doing: &str, failure: LedgerFailure) -> Result<(), IdentityDoubt> {
        self.is_session_checked = false;
        self.metrics.database_error(failure.sqlstate.as_deref());
        if let Some(doubt) = failure.identity {
            return Err(doubt);
        }
        match failure.class {
            FailureClass::Fenced => {
                static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    tracing::warn!(
                        lane = self.settings.index,
                        detail = %failure.message,
                        suppressed,
                        "a cursor is not where this lane left it: another writer was there"
                    );
                }
                self.reset("a cursor was moved by another writer");
                self.database.delay();
            }
            class => {
                self.database.failed(class, doing, &failure.message);
                self.metrics.database_up(false);
                self.board.database(
                    self.settings.index,
                    Dependency::Down(format!("{doing}: {} ({})", failure.message, class.as_str())),
                );
            }
        }
        Ok(())
    }

    // ---- collecting --------------------------------------------------------------------------

    fn first_pending(&self) -> Option<Arc<Publication>> {
        self.pending.front().map(|pending| Arc::clone(&pending.publication))
    }

    fn can_publish(&self) -> bool {
        !self.pending.is_empty() && self.is_producer_ready && self.broker.is_due()
    }

    fn can_write(&self) -> bool {
        self.pending.len() < PENDING_MAX && self.database.is_due()
    }

    /// Whether a batch waits for the database, or will soon.
    fn has_batch(&self) -> bool {
        self.writing.is_some() || self.assembly.has_next()
    }

    /// Fills the intake until there is a batch, something else to do, or nothing for a while.
    async fn collect(&mut self) {
        if self.has_batch() || self.pending.len() >= PENDING_MAX {
            self.fetches.note_full();
            self.log.listen();
            if !(self.has_batch() && self.can_write() || self.can_publish()) {
                self.wait_for_event(self.next_due()).await;
            }
        } else {
            self.fill().await;
        }
        if self.assembly.is_full() {
            self.fetches.note_full();
        }
    }

    async fn fill(&mut self) {
        let began = Instant::now();
        loop {
            let now = Instant::now();
            let wait = if self.can_publish() {
                Duration::ZERO
            } else {
                let until = self.assembly.due_at().unwrap_or_else(|| self.next_due());
                until.saturating_duration_since(now)
            };
            let interrupted = {
                let Self { log, assembly, events, inbox, .. } = self;
                tokio::select! {
                    biased;
                    event = events.recv() => {
                        inbox.push_back(event.unwrap_or(LaneEvent::Drain));
                        true
                    }
                    () = assembly.fetch(log, wait) => false,
                }
            };
            let is_done =
                self.assembly.is_full() || self.assembly.is_over() || self.assembly.intake.is_interrupted();
            if interrupted || is_done || self.can_publish() {
                break;
            }
        }
        self.metrics.phase(LanePhase::Waiting, began.elapsed());
    }

    /// The moment at which something may have to be done without an event or a record.
    fn next_due(&self) -> Instant {
        let now = Instant::now();
        let mut due = now + IDLE_TICK;
        let has_batch = self.has_batch();
        if has_batch && self.pending.len() < PENDING_MAX {
            due = due.min(self.database.due_at());
        }
        if !self.pending.is_empty() || !self.is_producer_ready {
            due = due.min(self.broker.due_at());
        } else if let Some(due_at) = self.assembly.due_at()
            && !has_batch
        {
            due = due.min(due_at);
        }
        due.max(now)
    }

    async fn wait_for_event(&mut self, until: Instant) {
        let Self { events, inbox, .. } = self;
        tokio::select! {
            biased;
            event = events.recv() => inbox.push_back(event.unwrap_or(LaneEvent::Drain)),
            () = sleep_until(until) => {}
        }
    }

    // ---- writing and publishing --------------------------------------------------------------

    async fn cut_batch(&mut self) {
        if self.writing.is_some() {
            return;
        }
        let Self { assembly, slots, pending, board, .. } = self;
        let seen = |partition| match slots.get(&partition) {
            Some(Slot::Live(live)) => Some(live.applied),
            _ => None,
        };
        let Some(assembled) = assembly.take(pending.is_empty(), board, seen).await else { return };
        self.metrics.phase(LanePhase::Assembling, assembled.took);
        let tracer = self.settings.tracer.as_ref().filter(|tracer| tracer.samples());
        let Assembled { batch, took, ended } = assembled;
        self.trace = tracer.map(|tracer| tracer.begin(self.settings.index, &batch, took, ended));
        self.metrics.batch(batch.len(), batch.source_bytes());
        self.writing = Some(batch);
    }

    /// Cursor moves that go with `progress`: its own, and copies of K that the database lacks.
    fn moves(&self, progress: &[Progress]) -> Vec<CursorMove> {
        let mut moves: BTreeMap<Partition, CursorMove> = BTreeMap::new();
        for (partition, slot) in &self.slots {
            let Slot::Live(live) = slot else { continue };
            let published =
                Some(live.committed).filter(|k| self.settings.mode.publishes && live.stored != Some(*k));
            if published.is_some() {
                moves.insert(
                    *partition,
                    CursorMove {
                        partition: *partition,
                        seen: live.applied,
                        applied: live.applied,
                        published,
                        timestamp: None,
                    },
                );
            }
        }
        for p in progress {
            let published = moves.get(&p.partition).and_then(|m| m.published);
            moves.insert(
                p.partition,
                CursorMove {
                    partition: p.partition,
                    seen: p.seen,
                    applied: p.applied(),
                    published,
                    timestamp: p.timestamp,
                },
            );
        }
        moves.into_values().collect()
    }

    async fn advance(&mut self) -> Result<(), IdentityDoubt> {
        self.cut_batch().await;
        let writes = self.writing.is_some() && self.can_write();
        let publishes = self.can_publish();
        if writes && !self.is_session_checked && !self.check_session().await? {
            return Ok(());
        }
        if !writes && !publishes {
            self.copy_when_idle().await?;
            if self.writing.is_some() || !self.pending.is_empty() || !self.assembly.is_empty() {
                self.wait_for_event(self.next_due()).await;
            }
            return Ok(());
        }
        let moves = match &self.writing {
            Some(batch) if writes => self.moves(batch.progress()),
            _ => Vec::new(),
        };
        let publication = self.first_pending().filter(|_| publishes);
        let Some((written, sent)) = self.write_and_publish(writes, &moves, publication.as_ref()).await else {
            // Partitions are being taken away, and what is in flight does not finish.
            if publication.is_some() {
                self.producer_lost();
            }
            self.is_session_checked &= !writes;
            self.reset("what was in flight did not finish before partitions had to go");
            return Ok(());
        };
        drop(publication);
        if let Some((sent, took)) = sent {
            self.after_publish(sent, took)?;
        }
        if let Some(written) = written {
            self.after_write(written, &moves)?;
        }
        Ok(())
    }

    /// Runs the Postgres transaction of one batch beside the Kafka transaction of the one before, and then makes the
    /// next one. `None`: partitions are to be revoked and neither finished within the grace.
    async fn write_and_publish(
        &mut self,
        writes: bool,
        moves: &[CursorMove],
        publication: Option<&Arc<Publication>>,
    ) -> Option<(Option<Written>, Option<Timed<Sent>>)> {
        let Self {
            ledger, log, writing, trace, pending, events, inbox, metrics, assembly, slots, board, ..
        } = self;
        // No more than three batches at any time.
        let is_next_wanted = writes
            && !assembly.has_next()
            && pending.len() < PENDING_MAX
            && writing.as_ref().is_some_and(|batch| assembly.is_large(batch.len()));
        let pending_trace = pending.front_mut().and_then(|pending| pending.trace.as_mut());
        let write = async {
            match writing {
                Some(batch) if writes => {
                    let began = Instant::now();
                    let written = ledger.write(batch, moves).await;
                    metrics.phase(LanePhase::Database, began.elapsed());
                    if let Some(trace) = trace {
                        trace.database_ended();
                    }
                    Some(written)
                }
                _ => None,
            }
        };
        let publish = async {
            match publication {
                Some(publication) => {
                    let began = Instant::now();
                    let sent = log.publish(publication).await;
                    let took = began.elapsed();
                    metrics.phase(LanePhase::Kafka, took);
                    if let Some(trace) = pending_trace {
                        trace.kafka_ended();
                    }
                    Some((sent, took))
                }
                None => None,
            }
        };
        // `applied` once what is being written is committed.
        let seen = |partition| {
            let Some(Slot::Live(live)) = slots.get(&partition) else { return None };
            let moved = moves.iter().find(|moved| moved.partition == partition);
            Some(moved.map_or(live.applied, |moved| live.applied.max(moved.applied)))
        };
        let mut given_up = pin!(given_up(events, inbox));
        let mut write = pin!(maybe_done(write));
        let sent = {
            let mut publish = pin!(publish);
            let mut is_written = false;
            loop {
                tokio::select! {
                    biased;
                    sent = &mut publish => break sent,
                    () = &mut write, if !is_written => is_written = true,
                    () = &mut given_up => return None,
                }
            }
        };
        let prepare = async {
            if is_next_wanted {
                assembly.prepare(log, IDLE_TICK, board, seen).await;
            }
            // What is being written tells when it is enough.
            future::pending().await
        };
        tokio::select! {
            biased;
            () = &mut write => Some((write.take_output().flatten(), sent)),
            () = prepare => None,
            () = given_up => None,
        }
    }

    fn after_write(&mut self, written: Written, moves: &[CursorMove]) -> Result<(), IdentityDoubt> {
        let (fates, _, times) = match written {
            Ok(written) => written,
            Err(failure) => {
                if let Some(trace) = &self.trace {
                    trace.failed("database", failure.class.as_str());
                }
                let is_undecided = failure.class == FailureClass::Record;
                self.ledger_failed("writing a batch", failure)?;
                if is_undecided {
                    self.take_again_with_others();
                }
                return Ok(());
            }
        };
        self.database_up();
        self.wrote_at = Instant::now();
        self.compared_at = self.wrote_at;
        self.metrics.write_stats(&times);
        let Some(batch) = self.writing.take() else { return Ok(()) };
        let mut trace = self.trace.take();
        if let Some(trace) = &mut trace {
            trace.written(&times);
        }
        for moved in moves {
            if let Some(Slot::Live(live)) = self.slots.get_mut(&moved.partition) {
                live.applied = live.applied.max(moved.applied);
                if let Some(Some(timestamp)) = moved.timestamp {
                    live.timestamp = Some(timestamp);
                }
                live.stored = moved.published.or(live.stored);
            }
        }
        let mut spans = Vec::with_capacity(batch.progress().len());
        for progress in batch.progress() {
            if let Some(Slot::Live(live)) = self.slots.get(&progress.partition) {
                // The group's offset goes as far as this batch reaches, and never back.
                if progress.reached > live.committed {
                    let commit = progress.reached;
                    spans.push(Span { partition: progress.partition, gate: live.gate, commit });
                }
            }
        }
        self.report_positions();
        if spans.is_empty() {
            self.settled(&batch, &fates, trace);
            self.assembly.keep(batch.into_memory());
        } else {
            let emits = self.settings.mode.publishes;
            let publication = Arc::new(Publication::of_batch(batch, fates, spans, emits));
            self.pending.push_back(Pending { publication, trace });
        }
        Ok(())
    }

    /// Rows of the batch are refused, and nothing tells whether that is their fault: records that have come since may
    /// tell, and are not to wait for it either.
    fn take_again_with_others(&mut self) {
        let LaneSettings { batch_payments_max, batch_bytes_max, .. } = &self.settings;
        let has_room = self.writing.as_ref().is_some_and(|batch| {
            batch.len() < *batch_payments_max && batch.source_bytes() < *batch_bytes_max
        });
        // What is written and not published yet would have to be read again, too; the batch is tried again after it.
        if has_room && self.pending.is_empty() {
            self.reset("the database refuses rows, and others are needed to tell whose fault that is");
        }
    }

    fn after_publish(&mut self, sent: Sent, took: Duration) -> Result<(), IdentityDoubt> {
        match sent {
            Ok(sent) => {
                if took < SHORT_PUBLICATION {
                    self.assembly.grow();
                }
                self.published(sent);
            }
            Err(PublishFailure::Aborted { class, message }) => {
                if let Some(trace) = self.pending.front().and_then(|pending| pending.trace.as_ref()) {
                    trace.failed("kafka", class.as_str());
                }
                self.broker_failed(class, "publishing a batch", &message);
                if self.made_batches_smaller(took) {
                    // What is written is read again, and published in smaller transactions.
                    self.reset("a batch could not be published in time");
                }
            }
            Err(PublishFailure::Fenced(message)) => self.fenced(&message),
            Err(PublishFailure::Unknown(message)) => {
                self.broker_failed(FailureClass::Passing, "publishing a batch", &message);
                self.made_batches_smaller(took);
                self.producer_lost();
                self.reset("whether a transaction was committed is not known");
            }
            Err(PublishFailure::Identity(doubt)) => return Err(doubt),
        }
        Ok(())
    }

    /// Makes batches smaller if this one was not published in all the time that a transaction has, as where a quota slows
    /// the producer down. True: they are smaller from now on.
    fn made_batches_smaller(&mut self, took: Duration) -> bool {
        let records = self.first_pending().and_then(|publication| publication.batch().map(Batch::len));
        let limit =
            records.filter(|_| took >= LONG_PUBLICATION).and_then(|records| self.assembly.shrink(records));
        if let Some(limit) = limit {
            tracing::warn!(
                lane = self.settings.index,
                records = limit,
                "a batch could not be published in time; until it is quick again batches have no more records than this"
            );
        }
        limit.is_some()
    }

    /// The first of the pending publications is committed.
    fn published(&mut self, (proof, counts, times): (Published, OutputCounts, PublishTimes)) {
        self.broker_up();
        for (partition, position) in proof.positions() {
            if let Some(Slot::Live(live)) = self.slots.get_mut(partition) {
                live.committed = live.committed.max(*position);
            }
        }
        self.metrics.outputs(&counts);
        if let Some(Pending { publication, mut trace }) = self.pending.pop_front() {
            if let Some(trace) = &mut trace {
                trace.published(&times);
            }
            let trace_id = trace.as_ref().map(|trace| trace.id());
            let LaneSettings { input_topic, identity, .. } = &self.settings;
            told::dead_letters(input_topic, identity.topic_id, &publication, &counts, trace_id.as_deref());
            if let Some(batch) = publication.batch() {
                self.settled(batch, publication.fates(), trace);
            }
            self.metrics.latency(publication.batch());
            let batch = Arc::into_inner(publication).and_then(Publication::into_batch);
            if let Some(batch) = batch {
                self.assembly.keep(batch.into_memory());
            }
        }
        self.report_positions();
    }

    /// Every record of the batch has its outcome.
    fn settled(&self, batch: &Batch, fates: &Fates, trace: Option<Box<BatchTrace>>) {
        let outcomes = Outcomes::of(fates);
        self.metrics.outcomes(&outcomes);
        self.metrics.replayed(batch.source().count_with_header(REPLAYS_HEADER));
        self.board.settled(&outcomes);
        if let Some(trace) = trace {
            trace.settled(&outcomes);
        }
    }

    fn report_positions(&self) {
        let live = self.slots.iter().filter_map(|(partition, slot)| match slot {
            Slot::Live(live) => Some((*partition, live.applied, live.committed, live.timestamp)),
            _ => None,
        });
        self.board.positions(metrics::now(), live);
    }

    /// Compares the cursors with what this lane believes, as in each new session. True: go on writing.
    async fn check_session(&mut self) -> Result<bool, IdentityDoubt> {
        let live: Vec<Partition> =
            self.slots.iter().filter(|(_, s)| matches!(s, Slot::Live(_))).map(|(p, _)| *p).collect();
        let rows = match self.ledger.cursors(&live).await {
            Ok(rows) => rows,
            Err(failure) => {
                self.ledger_failed("reading the cursors", failure)?;
                return Ok(false);
            }
        };
        // With a batch at hand the write that follows tells: what it needs may be missing still.
        if self.writing.is_none() {
            self.database_up();
        }
        self.compared_at = Instant::now();
        let planned: BTreeMap<Partition, NextOffset> = self
            .writing
            .iter()
            .flat_map(|batch| batch.progress())
            .filter(|p| p.applied() != p.seen)
            .map(|p| (p.partition, p.applied()))
            .collect();
        let (mut as_seen, mut as_planned) = (true, !planned.is_empty());
        for (partition, row) in &rows {
            let found = row.as_ref().map(|r| r.applied);
            let expected = match self.slots.get_mut(partition) {
                Some(Slot::Live(live)) => {
                    // An older copy of K is none to go back to, but one to renew.
                    live.stored = row.as_ref().and_then(|r| r.published);
                    Some(live.applied)
                }
                _ => None,
            };
            as_seen &= found == expected;
            as_planned &= found == planned.get(partition).copied().or(expected);
        }
        if as_planned && !as_seen {
            // The reply to COMMIT was lost. Ownership tells the fates; nothing is written again.
            if let Some(batch) = &mut self.writing {
                batch.was_committed();
            }
            for (partition, next) in planned {
                if let Some(Slot::Live(live)) = self.slots.get_mut(&partition) {
                    live.applied = next;
                }
            }
        } else if !as_seen {
            static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(
                    lane = self.settings.index,
                    suppressed,
                    "the database's cursors are not where this lane left them, as after a failover or a restore"
                );
            }
            self.reset("the database's cursors differ");
            self.is_session_checked = true;
            return Ok(false);
        }
        self.is_session_checked = true;
        Ok(true)
    }

    /// Copies the group's offsets to the database when no batch has done so for a while.
    async fn copy_when_idle(&mut self) -> Result<(), IdentityDoubt> {
        let is_time = self.wrote_at.elapsed() >= IDLE_COPY_AFTER && self.database.is_due();
        if !is_time || self.writing.is_some() || !self.pending.is_empty() {
            return Ok(());
        }
        let is_live = self.slots.values().any(|slot| matches!(slot, Slot::Live(_)));
        if is_live && self.compared_at.elapsed() >= IDLE_COMPARE_AFTER {
            // A restore breaks sessions, but a lane that asks for nothing does not hear of it; without
            // this the lost rows would come again only with the next record.
            self.compared_at = Instant::now();
            if !self.check_session().await? {
                return Ok(());
            }
        }
        self.copy_positions().await
    }

    async fn copy_positions(&mut self) -> Result<(), IdentityDoubt> {
        let moves = self.moves(&[]);
        self.wrote_at = Instant::now();
        if moves.is_empty() {
            return Ok(());
        }
        match self.ledger.move_cursors(&moves).await {
            Ok(()) => {
                self.database_up();
                for moved in &moves {
                    if let Some(Slot::Live(live)) = self.slots.get_mut(&moved.partition) {
                        live.stored = moved.published.or(live.stored);
                    }
                }
                Ok(())
            }
            Err(failure) => self.ledger_failed("copying the group's offsets", failure),
        }
    }

    /// Publishes what is written, notes it in the database, and is done.
    async fn drain(&mut self) -> Result<(), IdentityDoubt> {
        while let Some(publication) = self.first_pending() {
            if !self.is_producer_ready {
                break;
            }
            match self.log.publish(&publication).await {
                Ok(sent) => {
                    drop(publication);
                    self.published(sent);
                }
                Err(PublishFailure::Identity(doubt)) => return Err(doubt),
                Err(PublishFailure::Aborted { class, message }) => {
                    self.broker_failed(class, "publishing a batch", &message);
                    sleep_until(self.broker.due_at()).await;
                }
                Err(PublishFailure::Fenced(_)) => {
                    self.metrics.kafka_error(FailureClass::Fenced);
                    break;
                }
                Err(PublishFailure::Unknown(_)) => {
                    self.metrics.kafka_error(FailureClass::Passing);
                    break;
                }
            }
        }
        if self.pending.is_empty() {
            self.copy_positions().await?;
        }
        Ok(())
    }
}

/// Takes in what happens while something is in flight, and ends when that is to be given up.
async fn given_up(events: &mut mpsc::Receiver<LaneEvent>, inbox: &mut VecDeque<LaneEvent>) {
    loop {
        let event = events.recv().await.unwrap_or(LaneEvent::Drain);
        let grace = match &event {
            LaneEvent::Assigned(_) | LaneEvent::Answered { .. } | LaneEvent::GapsProved { .. } => None,
            LaneEvent::Revoked { is_lost: true, .. } => Some(LOST_GRACE),
            LaneEvent::Revoked { is_lost: false, .. } => Some(REVOKE_GRACE),
            LaneEvent::Drain => {
                inbox.push_back(event);
                // Nothing follows a drain; what is in flight has its own time limits.
                return future::pending().await;
            }
        };
        inbox.push_back(event);
        if let Some(grace) = grace {
            return sleep(grace).await;
        }
    }
}
