//! A lane processes one share of the partitions. [`Lane::run`] is its loop; each step has a file of its own.
//!
//! How a payment goes through:
//!
//! 1. [`fetch`]: the lane's own Kafka client, which is in no consumer group, delivers records into the fetch
//!    buffer.
//! 2. [`batch_builder`]: the buffer is closed as a batch when it is full or has waited for `linger`.
//! 3. [`transactions`]: one Postgres transaction moves the `applied` cursors, claims the message ids and
//!    writes the rows. Then one Kafka transaction publishes the events and dead letters and commits the
//!    group's offsets. It runs beside the Postgres transaction of the next batch.
//!
//! Each partition has two cursors: `applied` in Postgres (the next offset to write) and the group's committed
//! offset in Kafka (the next offset to publish). Postgres commits first, so `applied` is behind only after a
//! restore. A partition starts at the lower of the two. Records below `applied` are then looked up instead of
//! written, and events of records below the committed offset are not published again.
//!
//! On a revocation ([`revocation`]) the lane lets running transactions finish and publishes what is written, each
//! for at most eight seconds, drops what is left, and tells the group that it is done. A lane that does not know how far it has come, because a
//! transaction ended with an unknown outcome or a cursor is not where it left it, drops everything that it
//! holds and starts its partitions again from both cursors ([`recovery`]). Every start goes this way.
//!
//! The lane owns the state of its partitions ([`partitions`]), without locks, and it alone decides about
//! retries ([`failures`]), halts, and which events are still to be published.

pub mod backoff;
mod batch_builder;
mod cursors;
mod drain;
mod failures;
mod fetch;
mod fetch_states;
mod log_lines;
mod partitions;
mod questions;
mod recovery;
mod revocation;
mod transactions;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use self::backoff::Backoff;
use self::batch_builder::BatchBuilder;
use self::fetch_states::FetchStates;
use self::partitions::PartitionState;
use self::questions::Questions;
use crate::domain::batch::Batch;
use crate::domain::cursor::{Identity, IdentityMismatch, Mode};
use crate::domain::publication::Publication;
use crate::domain::record::Partition;
use crate::domain::wire::Rules;
use crate::ports::{KafkaPort, LaneEvent, Store};
use crate::telemetry::logging::Lasting;
use crate::telemetry::metrics::{self, LaneMetrics};
use crate::telemetry::status::StatusRegistry;
use crate::telemetry::trace::{BatchTrace, BatchTracer};

/// The longest wait of an idle lane.
const IDLE_TICK: Duration = Duration::from_millis(200);
/// Written batches that wait for their Kafka transaction.
const PENDING_MAX: usize = 2;

/// Settings of a lane, fixed at start.
#[derive(Clone)]
pub struct LaneSettings {
    /// Number of the lane within the process, from 0.
    pub index: usize,
    /// Rules that a valid message fulfils.
    pub rules: Arc<Rules>,
    /// Name of the input topic, for log lines.
    pub input_topic: String,
    /// The topic and the database that the cursors belong to.
    pub identity: Identity,
    /// Whether the daemon publishes, and whether it adopts another database.
    pub mode: Mode,
    /// Records in a batch, at most.
    pub batch_payments_max: usize,
    /// Bytes in a batch, checked between chunks of up to 1,000 records.
    pub batch_bytes_max: usize,
    /// How long the first record of a batch waits for others.
    pub linger: Duration,
    /// Time limit of a publication.
    pub publication_max: Duration,
    /// Traces a sample of the batches; `None`: tracing is off.
    pub tracer: Option<Arc<BatchTracer>>,
}

/// A written batch that waits for its Kafka transaction.
struct Pending {
    publication: Arc<Publication>,
    trace: Option<Box<BatchTrace>>,
}

/// Whether the database session's cursors are known to equal those in the lane's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Session {
    /// The session is new, or the last one failed: the cursors are compared before the next write.
    Unchecked,
    Checked,
}

/// The transactional producer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Producer {
    /// An earlier transaction may be open: `init_transactions` has to end it.
    Unsettled,
    Ready,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    Continue,
    Drain,
}

/// One lane over Kafka and a store.
pub struct Lane<K: KafkaPort, S: Store> {
    settings: LaneSettings,
    kafka: K,
    store: S,
    events: mpsc::Receiver<LaneEvent>,
    /// Events taken from the channel and not yet handled.
    inbox: VecDeque<LaneEvent>,
    partitions: BTreeMap<Partition, PartitionState>,
    questions: Questions,
    fetch_states: FetchStates,
    builder: BatchBuilder,
    writing: Option<Batch>,
    /// Trace of the batch that is being written.
    trace: Option<Box<BatchTrace>>,
    pending: VecDeque<Pending>,
    session: Session,
    producer: Producer,
    database: Backoff,
    broker: Backoff,
    /// For questions about partitions that are not live yet.
    asking: Backoff,
    /// While transactions are refused until the group's next generation.
    fenced: Lasting,
    /// When the group's offsets were last copied into the database, with a batch or alone.
    copied_at: Instant,
    /// When the cursors in the database were last known to equal the lane's.
    compared_at: Instant,
    status: Arc<StatusRegistry>,
    metrics: LaneMetrics,
}

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Creates a lane without partitions.
    pub fn new(
        settings: LaneSettings,
        kafka: K,
        store: S,
        events: mpsc::Receiver<LaneEvent>,
        status: Arc<StatusRegistry>,
    ) -> Self {
        let builder = BatchBuilder::new(&settings);
        let index = settings.index;
        let metrics = LaneMetrics::new(index, Arc::clone(status.work()));
        Self {
            settings,
            kafka,
            store,
            events,
            inbox: VecDeque::new(),
            partitions: BTreeMap::new(),
            questions: Questions::default(),
            fetch_states: FetchStates::new(),
            builder,
            writing: None,
            trace: None,
            pending: VecDeque::new(),
            session: Session::Unchecked,
            producer: Producer::Unsettled,
            database: Backoff::new("database", index),
            broker: Backoff::new("broker", index),
            asking: Backoff::new("group offsets", index),
            fenced: Lasting::default(),
            copied_at: Instant::now(),
            compared_at: Instant::now(),
            status,
            metrics,
        }
    }

    /// Seeds the jitter of all backoffs, for reproducible tests.
    pub fn with_jitter(mut self, seed: u64) -> Self {
        self.database.seed(seed);
        self.broker.seed(seed ^ u64::MAX);
        self.asking.seed(seed.rotate_left(32));
        self
    }

    /// Runs until it is drained.
    ///
    /// # Errors
    /// When the topic or the database is not the one that the cursors belong to.
    pub async fn run(mut self) -> Result<(), IdentityMismatch> {
        while self.handle_events().await? == Next::Continue {
            self.renew_producer().await?;
            self.recover_partitions().await?;
            self.supervise_fetching().await?;
            self.fetch().await;
            if self.is_revocation_waiting() {
                continue;
            }
            self.close_batch().await;
            self.write_and_publish().await?;
        }
        self.drain().await
    }

    async fn handle_events(&mut self) -> Result<Next, IdentityMismatch> {
        loop {
            let event = match self.inbox.pop_front() {
                Some(event) => event,
                None => match self.events.try_recv() {
                    Ok(event) => event,
                    Err(mpsc::error::TryRecvError::Empty) => return Ok(Next::Continue),
                    Err(mpsc::error::TryRecvError::Disconnected) => LaneEvent::Drain,
                },
            };
            match event {
                LaneEvent::Assigned(partitions) => {
                    self.questions.forget(&partitions);
                    self.fetch_states.forget(&partitions);
                    for partition in partitions {
                        self.status.opening(metrics::now(), partition);
                        self.partitions.insert(partition, PartitionState::Opening);
                    }
                    self.note_assigned();
                }
                LaneEvent::Revoked { partitions, is_lost, done } => {
                    self.revoke(&partitions, is_lost, done).await?;
                }
                LaneEvent::Answered { id, found } => self.answered(id, found).await?,
                LaneEvent::GapsChecked { id, answers } => self.gaps_checked(id, answers).await?,
                LaneEvent::Drain => return Ok(Next::Drain),
            }
        }
    }

    /// Whether a revocation arrived during the fetch. It is handled before another batch is written: the
    /// rebalance callback waits for the lane, and what was fetched is read again by the next owner.
    fn is_revocation_waiting(&self) -> bool {
        self.inbox.iter().any(|event| matches!(event, LaneEvent::Revoked { .. }))
    }

    fn note_assigned(&self) {
        // A partition that cannot be read stays in state `Live` until its batches in flight are published.
        let unreadable = self.fetch_states.halted().filter(|(partition, _)| self.is_live(*partition)).count();
        let halted = self.partitions.values().filter(|state| state.halted().is_some()).count();
        self.metrics.assigned(self.partitions.len(), halted + unreadable);
    }

    fn is_live(&self, partition: Partition) -> bool {
        self.partitions.get(&partition).is_some_and(|state| state.live().is_some())
    }

    fn first_pending(&self) -> Option<Arc<Publication>> {
        self.pending.front().map(|pending| Arc::clone(&pending.publication))
    }

    fn can_publish(&self) -> bool {
        !self.pending.is_empty() && self.producer == Producer::Ready && self.broker.is_due()
    }

    fn can_write(&self) -> bool {
        self.pending.len() < PENDING_MAX && self.database.is_due()
    }

    /// Whether a batch is closed, or is being built on another thread.
    fn has_batch(&self) -> bool {
        self.writing.is_some() || self.builder.has_next()
    }

    fn report_positions(&self) {
        let live = self.partitions.iter().filter_map(|(partition, state)| {
            state.live().map(|r| (*partition, r.applied, r.committed, r.timestamp))
        });
        self.status.positions(metrics::now(), live);
    }
}
