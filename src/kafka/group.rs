//! Membership of the consumer group: one member a process, its partitions dealt to lanes by number.
//!
//! The member never fetches: it answers each assignment and each revocation with an empty list, and only notes what
//! it was given. Records come by clients that are in no group ([`Fetcher`](super::fetcher::Fetcher)), so that a
//! rebalance, in which the library pauses all that a member fetches, touches none of them.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::OAuthToken;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{ClientConfig, ClientContext, TopicPartitionList};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

use super::librdkafka::add_brokers;
use super::reminder::Reminder;
use super::token;
use crate::cursor::IdentityDoubt;
use crate::disposition::is_refusal;
use crate::failpoint;
use crate::kafka_client::make_client;
use crate::lane::ports::{LaneEvent, RevokeDone};
use crate::logging::RateLimited;
use crate::record::Partition;
use crate::status::Board;

/// The group waits this long for its lanes to finish what was revoked; longer than a lane's own grace.
const REVOKE_WAIT: Duration = Duration::from_secs(10);
/// A lane whose channel of events stays full for so long hangs.
const LANE_WAIT: Duration = Duration::from_secs(60);
const LANE_TICK: Duration = Duration::from_millis(10);
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
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

    fn log(&self, _: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(target: "librdkafka", facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(target: "librdkafka", %error, reason);
    }
}

impl ConsumerContext for QuietLog {}

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

    /// Whether the lane is there to take the event. It takes events while it waits for anything else, so that a
    /// channel which stays full means that it hangs: the process ends then, and whoever starts it again begins anew.
    fn send(&self, lane: usize, seat: &Seat, event: LaneEvent) -> bool {
        let deadline = Instant::now() + LANE_WAIT;
        let mut event = event;
        loop {
            event = match seat.events.try_send(event) {
                Ok(()) => return true,
                // As in a shutdown.
                Err(TrySendError::Closed(_)) => return false,
                Err(TrySendError::Full(event)) => event,
            };
            if Instant::now() >= deadline || self.is_closing.load(Ordering::Acquire) {
                let reason = format!("lane {lane} takes no events");
                self.ended.send_replace(Some(MemberEnd::Fatal(reason)));
                return false;
            }
            std::thread::sleep(LANE_TICK);
        }
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
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

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
        // The member fetches nothing.
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
                self.send(lane, seat, LaneEvent::Assigned(partitions));
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
            if self.send(lane, seat, LaneEvent::Revoked { partitions, is_lost, done }) {
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
        failpoint::hit("before_revoked");
        if let Err(error) = consumer.incremental_unassign(&TopicPartitionList::new()) {
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
            board,
            ended,
            is_closing: AtomicBool::new(false),
            all_brokers_down: AtomicBool::new(false),
            polled_at: Mutex::new(Instant::now()),
        });
        let consumer = make_client(config, GroupContext(Arc::clone(&shared)))?;
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
            // Nothing is ever assigned to this client, so that no record can come.
            None | Some(Ok(_)) => {}
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
