//! Membership of the consumer group: one member a process, its partitions dealt to lanes by number.
//!
//! A rebalance only notes what was assigned; fetching of a partition begins when its lane has found
//! out where ([`Group::start`]). So no callback waits for the database, and a halted partition is
//! simply one that was never started.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{ClientConfig, ClientContext, Offset as KafkaOffset, TopicPartitionList};
use tokio::sync::{mpsc, watch};

use super::librdkafka::{LaneQueue, add_brokers};
use super::reminder::Reminder;
use crate::cursor::IdentityDoubt;
use crate::disposition::is_refusal;
use crate::failpoint;
use crate::lane::ports::{LaneEvent, RevokeDone};
use crate::logging::RateLimited;
use crate::record::{NextOffset, Partition};
use crate::status::Board;

/// The group waits this long for its lanes to finish what was revoked; longer than a lane's own grace.
const REVOKE_WAIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
/// A fencing this soon after the broker was away may be by an earlier request of our own: one that was sent
/// to the dying broker, or whose answer was lost, and that gave our place to a member that nobody is.
const OWN_FENCING_WITHIN: Duration = Duration::from_secs(60);
/// A process that is not stopped polls this often. One that was stopped may have been replaced meanwhile.
const AWAKE_WITHIN: Duration = Duration::from_secs(3);
/// A client that is not polled otherwise is listened to for so long.
const LISTEN: Duration = Duration::from_millis(50);
/// Limit of one request to the broker.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends the client library's log lines to ours. They name brokers and topics, never a message; most
/// repeat while a broker is away, which our own lines say once, so they are for debugging.
#[derive(Clone, Copy, Default)]
pub struct QuietLog;

impl ClientContext for QuietLog {
    fn log(&self, _: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(target: "librdkafka", facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, reason);
    }
}

/// The group's side of one lane.
#[derive(Clone)]
pub struct Seat {
    /// Where the lane takes its events from.
    pub events: mpsc::Sender<LaneEvent>,
    /// Revocations for which the group no longer waits and which the lane has not handled. While there
    /// are any, the lane must commit nothing: the generation may be one that it has no part in.
    pub overtaken: Arc<AtomicI64>,
}

/// Why the member cannot go on.
#[derive(Clone, Debug)]
pub enum MemberEnd {
    /// A person has to decide.
    Identity(IdentityDoubt),
    /// The client library gave up.
    Fatal(String),
}

struct Shared {
    topic: String,
    instance_id: String,
    bootstrap_servers: String,
    seats: Vec<Seat>,
    /// Assigned partitions; true once fetching was started.
    assigned: Mutex<BTreeMap<Partition, bool>>,
    board: Arc<Board>,
    ended: watch::Sender<Option<MemberEnd>>,
    is_closing: AtomicBool,
    /// No broker can be reached, as the client says. The poll takes it.
    all_brokers_down: AtomicBool,
    polled_at: Mutex<Instant>,
}

impl Shared {
    fn polled_at(&self) -> MutexGuard<'_, Instant> {
        self.polled_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assigned(&self) -> MutexGuard<'_, BTreeMap<Partition, bool>> {
        self.assigned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn by_lane(&self, partitions: &[Partition]) -> BTreeMap<usize, Vec<Partition>> {
        let mut lanes: BTreeMap<usize, Vec<Partition>> = BTreeMap::new();
        for partition in partitions {
            lanes.entry(lane_of(*partition, self.seats.len())).or_default().push(*partition);
        }
        lanes
    }
}

/// The lane of a partition: by residue, so that with murmur2 keys and an output partition count that
/// divides the input's, a lane touches few output partitions.
pub fn lane_of(partition: Partition, lanes: usize) -> usize {
    usize::try_from(partition.0).unwrap_or(0) % lanes.max(1)
}

/// Callbacks of the group's consumer.
pub struct GroupContext(Arc<Shared>);

impl ClientContext for GroupContext {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        QuietLog.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if matches!(
            error.rdkafka_error_code(),
            Some(RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::AllBrokersDown)
        ) {
            self.0.board.broker_lost();
        }
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.0.all_brokers_down.store(true, Ordering::Release);
        }
        if error.rdkafka_error_code().is_some_and(is_refusal) {
            self.0.board.broker_refused(reason);
        }
        QuietLog.error(error, reason);
    }
}

const WAITING: u8 = 0;
const DONE: u8 = 1;
const OVERTAKEN: u8 = 2;

/// One revocation that the group waits for and a lane answers.
struct Ticket {
    state: AtomicU8,
    overtaken: Arc<AtomicI64>,
    count: Arc<(Mutex<usize>, Condvar)>,
}

impl Ticket {
    fn finish(&self) {
        if self.state.compare_exchange(WAITING, DONE, Ordering::AcqRel, Ordering::Acquire).is_err() {
            self.overtaken.fetch_sub(1, Ordering::AcqRel);
        }
        let (count, changed) = &*self.count;
        *count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        changed.notify_all();
    }

    /// The group waits no longer. The counter goes up before the lane can find out.
    fn overtake(&self) {
        self.overtaken.fetch_add(1, Ordering::AcqRel);
        if self.state.compare_exchange(WAITING, OVERTAKEN, Ordering::AcqRel, Ordering::Acquire).is_err() {
            self.overtaken.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl ConsumerContext for GroupContext {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let partitions: Vec<Partition> = list
            .elements_for_topic(&self.0.topic)
            .iter()
            .map(|element| Partition(element.partition()))
            .collect();
        match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                self.0.assign(consumer, &partitions);
            }
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => {
                self.0.revoke(consumer, &partitions);
            }
            other => {
                let code: RDKafkaErrorCode = other.into();
                static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    tracing::warn!(%code, suppressed, "a rebalance failed, the client joins again");
                }
            }
        }
    }
}

impl Shared {
    fn assign(&self, consumer: &BaseConsumer<GroupContext>, partitions: &[Partition]) {
        static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
        if let Some(suppressed) = LIMIT.pass() {
            tracing::info!(partitions = partitions.len(), suppressed, "assigned");
        }
        metrics::counter!("payment_writer_rebalances_total", "kind" => "assigned").increment(1);
        self.board.assigned(crate::metrics::now(), partitions);
        {
            let mut assigned = self.assigned();
            for partition in partitions {
                assigned.insert(*partition, false);
            }
        }
        // Answers the group without fetching anything yet.
        if let Err(error) = consumer.incremental_assign(&TopicPartitionList::new()) {
            static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(%error, suppressed, "the assignment was not taken");
            }
        }
        if self.is_closing.load(Ordering::Acquire) {
            return;
        }
        for (lane, partitions) in self.by_lane(partitions) {
            if let Some(seat) = self.seats.get(lane) {
                // An error means that the lane has ended, as in a shutdown.
                let _ = seat.events.blocking_send(LaneEvent::Assigned(partitions));
            }
        }
    }

    fn revoke(&self, consumer: &BaseConsumer<GroupContext>, partitions: &[Partition]) {
        let is_lost = consumer.assignment_lost();
        let kind = if is_lost { "lost" } else { "revoked" };
        if is_lost {
            self.board.lost(crate::metrics::now());
            // A broker that hangs breaks no connection: it is missed when the session is over, and may still
            // do with our requests what it likes once it wakes up. Not so if it was us who slept, or if we were
            // fenced to begin with.
            let is_awake = self.polled_at().elapsed() < AWAKE_WITHIN;
            if is_awake && consumer.client().fatal_error().is_none() {
                self.board.broker_lost();
            }
        }
        static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
        if !self.is_closing.load(Ordering::Acquire)
            && let Some(suppressed) = LIMIT.pass()
        {
            tracing::info!(partitions = partitions.len(), kind, suppressed, "revoked");
        }
        metrics::counter!("payment_writer_rebalances_total", "kind" => kind).increment(1);
        let count = Arc::new((Mutex::new(0), Condvar::new()));
        let mut tickets = Vec::new();
        // While the process closes, the lanes have ended; and this may be called where the consumer is dropped,
        // on a thread of the runtime, which must not block.
        let is_closing = self.is_closing.load(Ordering::Acquire);
        for (lane, partitions) in self.by_lane(if is_closing { &[] } else { partitions }) {
            let Some(seat) = self.seats.get(lane) else { continue };
            let ticket = Arc::new(Ticket {
                state: AtomicU8::new(WAITING),
                overtaken: Arc::clone(&seat.overtaken),
                count: Arc::clone(&count),
            });
            let done = Arc::clone(&ticket);
            let done = RevokeDone::new(move || done.finish());
            if seat.events.blocking_send(LaneEvent::Revoked { partitions, is_lost, done }).is_ok() {
                tickets.push(ticket);
            }
        }
        let (finished, changed) = &*count;
        let guard = finished.lock().unwrap_or_else(PoisonError::into_inner);
        // A lane that ended with the event in its channel never answers: hence the bound.
        let _ = changed.wait_timeout_while(guard, REVOKE_WAIT, |finished| {
            *finished < tickets.len() && !self.is_closing.load(Ordering::Acquire)
        });
        for ticket in &tickets {
            ticket.overtake();
        }
        let mut assigned = self.assigned();
        let mut started = TopicPartitionList::new();
        for partition in partitions {
            if assigned.remove(partition) == Some(true) {
                started.add_partition(&self.topic, partition.0);
            }
        }
        failpoint::hit("before_revoked");
        if let Err(error) = consumer.incremental_unassign(&started) {
            static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(%error, suppressed, "the revocation was not taken");
            }
        }
    }
}

/// The process's membership.
#[derive(Clone)]
pub struct Group {
    consumer: Arc<BaseConsumer<GroupContext>>,
    shared: Arc<Shared>,
    thread: Arc<OnceLock<std::thread::JoinHandle<()>>>,
}

impl Group {
    /// Creates the consumer; [`join`](Self::join) subscribes it.
    pub fn new(
        config: &ClientConfig,
        topic: &str,
        instance_id: &str,
        seats: Vec<Seat>,
        board: Arc<Board>,
    ) -> Result<(Self, watch::Receiver<Option<MemberEnd>>), KafkaError> {
        let (ended, end) = watch::channel(None);
        let shared = Arc::new(Shared {
            topic: topic.to_owned(),
            instance_id: instance_id.to_owned(),
            bootstrap_servers: config.get("bootstrap.servers").unwrap_or_default().to_owned(),
            seats,
            assigned: Mutex::default(),
            board,
            ended,
            is_closing: AtomicBool::new(false),
            all_brokers_down: AtomicBool::new(false),
            polled_at: Mutex::new(Instant::now()),
        });
        let consumer = config.create_with_context(GroupContext(Arc::clone(&shared)))?;
        let group = Self { consumer: Arc::new(consumer), shared, thread: Arc::new(OnceLock::new()) };
        Ok((group, end))
    }

    /// The consumer, for questions to the broker.
    pub fn consumer(&self) -> &Arc<BaseConsumer<GroupContext>> {
        &self.consumer
    }

    /// The input topic's name.
    pub fn topic(&self) -> &str {
        &self.shared.topic
    }

    /// Subscribes, and polls from a thread of its own until [`close`](Self::close).
    pub fn join(&self) -> Result<(), KafkaError> {
        self.consumer.subscribe(&[&self.shared.topic])?;
        let consumer = Arc::clone(&self.consumer);
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new()
            .name("group".to_owned())
            .spawn(move || poll(&consumer, &shared))
            .map_err(|e| KafkaError::ClientCreation(format!("no thread for the group: {e}")))?;
        // A second join would be an error of ours; the first thread serves both.
        let _ = self.thread.set(spawned);
        Ok(())
    }

    /// Hears what the client has to tell, before [`join`](Self::join) does so all the time.
    pub fn listen(&self) {
        let until = Instant::now() + LISTEN;
        while Instant::now() < until {
            let _ = self.consumer.poll(LISTEN);
        }
    }

    /// Stops polling. A static member says no goodbye: its place is kept for `session.timeout.ms`.
    pub fn close(&self) {
        self.shared.is_closing.store(true, Ordering::Release);
    }

    /// Begins, or begins again, to fetch partitions at these positions into `queue`. Partitions that are
    /// no longer assigned are left out: their revocation is on its way to the lane.
    pub fn start<C: ConsumerContext>(
        &self,
        queue: &LaneQueue<C>,
        positions: &[(Partition, NextOffset)],
    ) -> Result<(), String> {
        let mut assigned = self.shared.assigned();
        let mut fresh = TopicPartitionList::new();
        let mut running = TopicPartitionList::new();
        for (partition, position) in positions {
            let list = match assigned.get(partition) {
                None => continue,
                Some(false) => &mut fresh,
                Some(true) => &mut running,
            };
            list.add_partition_offset(&self.shared.topic, partition.0, KafkaOffset::Offset(position.0))
                .map_err(|e| e.to_string())?;
        }
        if fresh.count() > 0 {
            for element in fresh.elements() {
                queue.attach(&self.shared.topic, Partition(element.partition()));
            }
            self.consumer.incremental_assign(&fresh).map_err(|e| e.to_string())?;
            for element in fresh.elements() {
                assigned.insert(Partition(element.partition()), true);
            }
        }
        self.seek(queue, running)
    }

    fn seek<C: ConsumerContext>(
        &self,
        queue: &LaneQueue<C>,
        mut list: TopicPartitionList,
    ) -> Result<(), String> {
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        while list.count() > 0 {
            let sought =
                self.consumer.seek_partitions(list, REQUEST_TIMEOUT).map_err(|e| format!("seeking: {e}"))?;
            let mut again = TopicPartitionList::new();
            let mut stranded = TopicPartitionList::new();
            for element in sought.elements() {
                let list = match element.error() {
                    Ok(()) => continue,
                    Err(KafkaError::OffsetFetch(RDKafkaErrorCode::PreviousInProgress))
                        if Instant::now() < deadline =>
                    {
                        &mut again
                    }
                    // Not fetching: assigned a moment ago, or given up by the client after an error
                    // (such as an offset that is not in the log), out of which no seek leads.
                    Err(KafkaError::OffsetFetch(RDKafkaErrorCode::State)) => &mut stranded,
                    Err(error) => {
                        return Err(format!("seeking partition {}: {error}", element.partition()));
                    }
                };
                list.add_partition_offset(&self.shared.topic, element.partition(), element.offset())
                    .map_err(|e| e.to_string())?;
            }
            if stranded.count() > 0 {
                self.consumer.incremental_unassign(&stranded).map_err(|e| e.to_string())?;
                for element in stranded.elements() {
                    queue.attach(&self.shared.topic, Partition(element.partition()));
                }
                self.consumer.incremental_assign(&stranded).map_err(|e| e.to_string())?;
            }
            list = again;
            if list.count() > 0 {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Stops fetching these partitions; they stay assigned.
    pub fn stop(&self, partitions: &[Partition]) -> Result<(), String> {
        let mut assigned = self.shared.assigned();
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            if let Some(is_started) = assigned.get_mut(partition)
                && *is_started
            {
                *is_started = false;
                list.add_partition(&self.shared.topic, partition.0);
            }
        }
        if list.count() == 0 {
            return Ok(());
        }
        self.consumer.incremental_unassign(&list).map_err(|e| e.to_string())
    }
}

fn poll(consumer: &BaseConsumer<GroupContext>, shared: &Shared) {
    let mut reminder = Reminder::default();
    let mut was_out = true;
    while !shared.is_closing.load(Ordering::Acquire) {
        *shared.polled_at() = Instant::now();
        let is_out = !shared.board.is_member();
        if was_out && !is_out {
            reminder.settle();
        }
        was_out = is_out;
        if shared.all_brokers_down.swap(false, Ordering::AcqRel) {
            reminder.suspect(Instant::now());
        }
        if reminder.is_due(Instant::now(), is_out) {
            tracing::debug!(target: "librdkafka", "the group's client is told of its brokers once more");
            add_brokers(consumer.client(), &shared.bootstrap_servers);
        }
        match consumer.poll(POLL) {
            None => {}
            Some(Ok(message)) => {
                // Cannot happen while partitions are attached before they are assigned; if it does, the
                // partition is taken up again, so that no record is passed over.
                let partition = Partition(rdkafka::Message::partition(&message));
                static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    tracing::warn!(
                        topic = shared.topic,
                        partition = partition.0,
                        offset = rdkafka::Message::offset(&message),
                        suppressed,
                        "a record missed its lane's queue, taken up again"
                    );
                }
                drop(message);
                restart(consumer, shared, partition);
            }
            Some(Err(error)) => tracing::debug!(target: "librdkafka", %error, "poll"),
        }
        if let Some((code, reason)) = consumer.client().fatal_error() {
            let end = match code {
                RDKafkaErrorCode::FencedInstanceId => {
                    shared.board.fenced(OWN_FENCING_WITHIN);
                    let instance_id = shared.instance_id.clone();
                    MemberEnd::Identity(IdentityDoubt::InstanceTaken { instance_id })
                }
                _ => MemberEnd::Fatal(format!("{code}: {reason}")),
            };
            shared.ended.send_replace(Some(end));
            return;
        }
    }
}

fn restart(consumer: &BaseConsumer<GroupContext>, shared: &Shared, partition: Partition) {
    {
        let mut assigned = shared.assigned();
        let mut list = TopicPartitionList::new();
        match assigned.get_mut(&partition) {
            Some(is_started) if *is_started => {
                *is_started = false;
                list.add_partition(&shared.topic, partition.0);
            }
            _ => return,
        }
        if let Err(error) = consumer.incremental_unassign(&list) {
            static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(%error, suppressed, "unassigning a partition to take it up again");
            }
        }
    }
    let Some(seat) = shared.seats.get(lane_of(partition, shared.seats.len())) else { return };
    let done = RevokeDone::new(|| {});
    let partitions = vec![partition];
    let _ = seat.events.blocking_send(LaneEvent::Revoked {
        partitions: partitions.clone(),
        is_lost: false,
        done,
    });
    let _ = seat.events.blocking_send(LaneEvent::Assigned(partitions));
}
