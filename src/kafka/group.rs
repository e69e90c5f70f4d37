//! Membership of the consumer group: one static member per process, `cooperative-sticky`, its partitions
//! dealt to lanes by number. A thread polls the member, and librdkafka runs the rebalance callback in it.
//!
//! The member never fetches: it confirms each assignment and revocation with an empty list, and passes the
//! partitions to the lanes. Records are fetched by clients in no group
//! ([`Fetcher`](super::fetcher::Fetcher)), because librdkafka pauses everything that a member fetches during
//! a rebalance.
//!
//! **Revocation.** The callback sends each lane concerned a [`LaneEvent::Revoked`] and waits for all of them,
//! at most [`REVOKE_WAIT`]. Only then does the member confirm, so the next owner gets the partitions in a
//! later generation. A lane that is late must not commit in that later generation: before the callback
//! returns it raises the lane's counter of unhandled revocations ([`LaneHandle`]), and the lane publishes
//! nothing while the counter is above zero.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{ClientConfig, TopicPartitionList};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

use super::callbacks::{Callbacks, Listener, QuietLog};
use super::client::{ATTEMPT_TIMEOUT, client_config_over, make_client};
use super::join_failure::JoinFailure;
use super::librdkafka::{GroupMetadata, add_brokers};
use super::rebootstrap::Rebootstrap;
use crate::config::KafkaSettings;
use crate::domain::cursor::IdentityMismatch;
use crate::domain::outcome::is_refusal;
use crate::domain::record::Partition;
use crate::failpoint;
use crate::ports::{LaneEvent, RevokeDone};
use crate::telemetry::logging::RateLimited;
use crate::telemetry::status::StatusRegistry;

/// Defaults of the group's member that `kafka.properties` may override.
const MEMBER_DEFAULTS: [(&str, &str); 3] = [
    ("session.timeout.ms", "10000"),
    ("heartbeat.interval.ms", "2000"),
    ("topic.metadata.refresh.interval.ms", "60000"),
];

/// Configuration of the group's member. It fetches nothing, but lanes ask for offsets through it
/// ([`offsets`](super::offsets)): with `read_committed` the end of a log is its last stable offset.
pub fn member_config(kafka: &KafkaSettings) -> ClientConfig {
    let mut config = client_config_over(kafka, &MEMBER_DEFAULTS);
    config
        .set("group.id", &kafka.group_id)
        .set("group.instance.id", &kafka.instance_id)
        .set("group.protocol", "classic")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true");
    config
}

/// How long the callback waits for the lanes to handle a revocation; longer than a lane's grace.
const REVOKE_WAIT: Duration = Duration::from_secs(10);
/// A lane whose event channel stays full for this long hangs.
const LANE_WAIT: Duration = Duration::from_secs(60);
const LANE_TICK: Duration = Duration::from_millis(10);
const POLL: Duration = Duration::from_millis(100);
/// A fencing this soon after a broker was lost may be caused by a join request of this process: the broker
/// died, or its answer was lost, after it had given this `group.instance.id` to a member id that no process
/// has.
const OWN_FENCING_WITHIN: Duration = Duration::from_secs(60);
/// A running process polls more often than this; one that did not was suspended, and may have been replaced
/// meanwhile.
const AWAKE_WITHIN: Duration = Duration::from_secs(3);
/// How often the member's id is compared.
const COMPARED_EVERY: Duration = Duration::from_secs(1);
/// How long [`Group::listen`] polls.
const LISTEN: Duration = Duration::from_millis(50);
/// The present number of members of the group that this principal may see. Without the right to describe the
/// group, the brokers do not list it, and the number is 0.
///
/// # Errors
/// When the brokers do not answer.
pub fn visible_members(kafka: &KafkaSettings) -> Result<usize, KafkaError> {
    let consumer: BaseConsumer<QuietLog> = make_client(&client_config_over(kafka, &[]), QuietLog::default())?;
    let groups = consumer.fetch_group_list(Some(&kafka.group_id), ATTEMPT_TIMEOUT)?;
    let groups = groups.groups().iter().filter(|group| group.name() == kafka.group_id);
    Ok(groups.map(|group| group.members().len()).sum())
}

/// How the group reaches one lane.
#[derive(Clone)]
pub struct LaneHandle {
    /// The lane's event channel.
    pub events: mpsc::Sender<LaneEvent>,
    /// Number of revocations that the callback no longer waits for and the lane has not handled, and of events that
    /// could not be sent to it. While it is above zero the lane must not commit: in the present generation its
    /// partitions may belong to another member.
    pub unhandled_revocations: Arc<AtomicI64>,
}

impl LaneHandle {
    /// Sends an event, and waits while the channel is full and `may_wait`. A lane that misses an event must never
    /// commit again: its counter stays up. False: the channel stayed full; a lane that has ended needs no event.
    fn send(&self, mut event: LaneEvent, may_wait: impl Fn() -> bool) -> bool {
        loop {
            event = match self.events.try_send(event) {
                Ok(()) | Err(TrySendError::Closed(_)) => return true,
                Err(TrySendError::Full(event)) => event,
            };
            if !may_wait() {
                // Before the event is dropped, which ends the wait for the lane.
                self.unhandled_revocations.fetch_add(1, Ordering::AcqRel);
                return false;
            }
            std::thread::sleep(LANE_TICK);
        }
    }
}

/// Why the membership ended.
#[derive(Clone, Debug)]
pub enum MemberEnd {
    /// The group removed this member and took it in again as another one, which librdkafka does not report.
    Replaced,
    /// Another process has this `group.instance.id`: the operator has to decide.
    Identity(IdentityMismatch),
    /// A fatal error of the client, or a lane that hangs.
    Fatal(String),
}

/// The lane of a partition: its number modulo the lanes. With murmur2 keys and a number of output partitions
/// that divides the input's, a lane then writes to few output partitions, which makes its transactions
/// cheaper.
pub fn lane_of(partition: Partition, lanes: usize) -> usize {
    usize::try_from(partition.0).unwrap_or(0) % lanes.max(1)
}

type GroupContext = Callbacks<Arc<Member>>;

impl Listener for Arc<Member> {
    fn error(&self, code: Option<RDKafkaErrorCode>, reason: &str) {
        // The next member has the status by then.
        let Some(code) = code.filter(|_| !self.is_closing()) else { return };
        if matches!(code, RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::AllBrokersDown) {
            self.status.broker_lost();
        }
        if code == RDKafkaErrorCode::AllBrokersDown {
            self.all_brokers_down.store(true, Ordering::Release);
        }
        if is_refusal(code) {
            self.status.broker_refused(reason);
        }
    }
}

impl ConsumerContext for GroupContext {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let elements = list.elements_for_topic(&self.0.kafka.input_topic);
        let partitions: Vec<Partition> = elements.iter().map(|e| Partition(e.partition())).collect();
        match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.0.assign(consumer, &partitions),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => self.0.revoke(consumer, &partitions),
            other => {
                let code: RDKafkaErrorCode = other.into();
                static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    tracing::warn!(%code, suppressed, "a rebalance failed, the member joins again");
                }
            }
        }
    }
}

/// A revocation that the callback waits for.
#[derive(Default)]
struct Revocation {
    open: Mutex<OpenRevocation>,
    finished: Condvar,
}

#[derive(Default)]
struct OpenRevocation {
    /// Lanes that have not finished, each with its counter of unhandled revocations.
    lanes: BTreeMap<usize, Arc<AtomicI64>>,
    /// The callback no longer waits.
    is_overtaken: bool,
}

impl Revocation {
    fn lock(&self) -> MutexGuard<'_, OpenRevocation> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, lane: usize) {
        let mut open = self.lock();
        let unhandled = open.lanes.remove(&lane);
        if let Some(unhandled) = unhandled.filter(|_| open.is_overtaken) {
            unhandled.fetch_sub(1, Ordering::AcqRel);
        }
        self.finished.notify_all();
    }

    /// Waits until all lanes have finished or ended, at most [`REVOKE_WAIT`]. Then raises the counters of the others.
    fn wait(&self, is_closing: impl Fn() -> bool) {
        let is_open = |open: &mut OpenRevocation| !open.lanes.is_empty() && !is_closing();
        let waited = self.finished.wait_timeout_while(self.lock(), REVOKE_WAIT, is_open);
        let (mut open, _) = waited.unwrap_or_else(PoisonError::into_inner);
        open.is_overtaken = true;
        for unhandled in open.lanes.values() {
            unhandled.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// What the callbacks gave the lanes, and as which member. If the coordinator answers a request to join with
/// `UNKNOWN_MEMBER_ID`, librdkafka joins again under a new id and keeps its assignment, without a callback: a static
/// member is admitted at once, and its generation is valid although other members had the partitions meanwhile.
#[derive(Default)]
struct Held {
    member_id: CString,
    partitions: BTreeSet<Partition>,
}

impl Held {
    fn is_replaced(&self, metadata: &GroupMetadata) -> bool {
        let now = metadata.member_id();
        !self.partitions.is_empty() && !now.is_empty() && now != self.member_id.as_c_str()
    }
}

/// The process's member of the group, as its callbacks see it.
pub struct Member {
    kafka: KafkaSettings,
    lanes: Vec<LaneHandle>,
    status: Arc<StatusRegistry>,
    ended: watch::Sender<Option<MemberEnd>>,
    is_closing: AtomicBool,
    /// The client reported that no broker can be reached. The polling thread resets it.
    all_brokers_down: AtomicBool,
    polled_at: Mutex<Instant>,
    held: Mutex<Held>,
}

impl Member {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the membership if the group has replaced this member: what the lanes have may belong to others.
    fn ends_if_replaced(&self, metadata: Option<&GroupMetadata>) -> bool {
        let is_replaced = metadata.is_some_and(|metadata| self.held().is_replaced(metadata));
        if is_replaced && !self.is_closing() {
            self.ended.send_replace(Some(MemberEnd::Replaced));
        }
        is_replaced
    }

    fn polled_at(&self) -> MutexGuard<'_, Instant> {
        self.polled_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Acquire)
    }

    /// Sends an event to a lane. A lane receives events while it fetches and while transactions run, and its
    /// other waits are shorter than `LANE_WAIT`. A channel that stays full means that the lane hangs: the
    /// process then ends, to be restarted.
    fn send(&self, index: usize, lane: &LaneHandle, event: LaneEvent) {
        let deadline = Instant::now() + LANE_WAIT;
        if !lane.send(event, || Instant::now() < deadline && !self.is_closing()) {
            let reason = format!("lane {index} hangs: its event channel stays full");
            self.ended.send_replace(Some(MemberEnd::Fatal(reason)));
        }
    }

    /// Divides partitions among the lanes.
    fn by_lane(
        &self,
        partitions: &[Partition],
    ) -> impl Iterator<Item = (usize, &LaneHandle, Vec<Partition>)> {
        let lanes = self.lanes.iter().enumerate().map(|(index, lane)| {
            let is_of_lane = |p: &&Partition| lane_of(**p, self.lanes.len()) == index;
            (index, lane, partitions.iter().filter(is_of_lane).copied().collect::<Vec<_>>())
        });
        lanes.filter(|(.., partitions)| !partitions.is_empty())
    }

    fn assign(&self, consumer: &BaseConsumer<GroupContext>, partitions: &[Partition]) {
        // A member that closes may still be served an assignment; the next member has the status by then.
        if !self.is_closing() {
            static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::info!(partitions = partitions.len(), suppressed, "assigned");
            }
            metrics::counter!("payment_writer_rebalances_total", "kind" => "assigned").increment(1);
            self.status.assigned(crate::telemetry::metrics::now(), partitions);
        }
        // The member fetches nothing.
        warn_if_refused("assignment", consumer.incremental_assign(&TopicPartitionList::new()));
        let metadata = GroupMetadata::of(consumer);
        if self.is_closing() || self.ends_if_replaced(metadata.as_ref()) {
            return;
        }
        if let Some(metadata) = metadata {
            let mut held = self.held();
            held.member_id = metadata.member_id().to_owned();
            held.partitions.extend(partitions);
        }
        for (index, lane, partitions) in self.by_lane(partitions) {
            self.send(index, lane, LaneEvent::Assigned(partitions));
        }
    }

    fn revoke(&self, consumer: &BaseConsumer<GroupContext>, partitions: &[Partition]) {
        let is_lost =
            consumer.assignment_lost() || self.ends_if_replaced(GroupMetadata::of(consumer).as_ref());
        let kind = if is_lost { "lost" } else { "revoked" };
        // While the process closes, the lanes have ended, and the consumer's drop may run this callback on a
        // thread of the runtime, which must not block. The next member may have the status by then.
        let is_closing = self.is_closing();
        if is_lost && !is_closing {
            self.status.lost(crate::telemetry::metrics::now());
            // A broker that hangs keeps its connections open: it is noticed only when the session expires,
            // and may still process earlier requests later. That explains nothing if this process was
            // suspended or fenced.
            let is_awake = self.polled_at().elapsed() < AWAKE_WITHIN;
            if is_awake && consumer.client().fatal_error().is_none() {
                self.status.broker_lost();
            }
        }
        static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
        if !is_closing && let Some(suppressed) = LIMIT.pass() {
            tracing::info!(partitions = partitions.len(), kind, suppressed, "revoked");
        }
        metrics::counter!("payment_writer_rebalances_total", "kind" => kind).increment(1);
        let revocation = Arc::new(Revocation::default());
        for (index, lane, partitions) in self.by_lane(if is_closing { &[] } else { partitions }) {
            revocation.lock().lanes.insert(index, Arc::clone(&lane.unhandled_revocations));
            let finished = Arc::clone(&revocation);
            let done = RevokeDone::new(move || finished.finish(index));
            self.send(index, lane, LaneEvent::Revoked { partitions, is_lost, done });
        }
        revocation.wait(|| self.is_closing());
        self.held().partitions.retain(|partition| !is_lost && !partitions.contains(partition));
        failpoint::hit("before_revoked");
        warn_if_refused("revocation", consumer.incremental_unassign(&TopicPartitionList::new()));
    }
}

fn warn_if_refused(change: &str, confirmed: Result<(), KafkaError>) {
    static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
    if let Err(error) = confirmed
        && let Some(suppressed) = LIMIT.pass()
    {
        tracing::warn!(%error, suppressed, "the client did not accept the {change}");
    }
}

/// The process's membership of the consumer group.
#[derive(Clone)]
pub struct Group {
    consumer: Arc<BaseConsumer<GroupContext>>,
}

impl Group {
    /// An observer: a consumer that names the group without joining it, to request offsets and log bounds.
    ///
    /// # Errors
    /// When librdkafka rejects the configuration.
    pub fn observer(kafka: &KafkaSettings) -> Result<Self, KafkaError> {
        Self::new(kafka, Vec::new(), Arc::default()).map(|(group, _)| group)
    }

    /// Creates the consumer; [`join`](Self::join) subscribes it.
    pub fn new(
        kafka: &KafkaSettings,
        lanes: Vec<LaneHandle>,
        status: Arc<StatusRegistry>,
    ) -> Result<(Self, watch::Receiver<Option<MemberEnd>>), KafkaError> {
        let (ended, end) = watch::channel(None);
        let member = Arc::new(Member {
            kafka: kafka.clone(),
            lanes,
            status,
            ended,
            is_closing: AtomicBool::new(false),
            all_brokers_down: AtomicBool::new(false),
            polled_at: Mutex::new(Instant::now()),
            held: Mutex::default(),
        });
        let consumer = make_client(&member_config(kafka), Callbacks(member))?;
        Ok((Self { consumer: Arc::new(consumer) }, end))
    }

    /// The underlying consumer, for requests to the brokers.
    pub fn consumer(&self) -> &Arc<BaseConsumer<GroupContext>> {
        &self.consumer
    }

    fn member(&self) -> &Member {
        &self.consumer.context().0
    }

    /// Whether the lanes have their partitions as this member. If not, none of them may commit.
    pub fn has_assigned_as(&self, metadata: &GroupMetadata) -> bool {
        self.member().held().member_id.as_c_str() == metadata.member_id()
    }

    /// The settings that the group was created from.
    pub fn settings(&self) -> &KafkaSettings {
        &self.member().kafka
    }

    /// The input topic's name.
    pub fn topic(&self) -> &str {
        &self.settings().input_topic
    }

    /// Subscribes, and polls on a new thread until [`close`](Self::close).
    pub fn join(&self) -> Result<(), KafkaError> {
        self.consumer.subscribe(&[self.topic()])?;
        let consumer = Arc::clone(&self.consumer);
        std::thread::Builder::new()
            .name("group".to_owned())
            .spawn(move || poll(&consumer))
            .map_err(|e| KafkaError::ClientCreation(format!("starting the group's thread: {e}")))?;
        Ok(())
    }

    /// Why this process is not a member yet although no broker refuses it: librdkafka retries errors such as
    /// `COORDINATOR_NOT_AVAILABLE` without reporting them. Blocks for [`ATTEMPT_TIMEOUT`] at most.
    pub fn join_wait(&self) -> String {
        let group_id = &self.settings().group_id;
        let reason = match self.consumer.fetch_group_list(Some(group_id), ATTEMPT_TIMEOUT) {
            Err(error) => format!("asking the brokers for the group: {error}"),
            Ok(list) => match list.groups().iter().find(|group| group.name() == group_id) {
                Some(group) if group.state().ends_with("Rebalance") => {
                    format!("the group is in state {}: a rebalance waits for all its members", group.state())
                }
                Some(group) => format!("the group is in state {}", group.state()),
                None => "no broker is the group's coordinator: its partition of __consumer_offsets has no \
                         leader, or the topic cannot be created, as when offsets.topic.replication.factor is \
                         above the number of brokers"
                    .to_owned(),
            },
        };
        format!("not joined yet: {reason}")
    }

    /// Polls the client's callbacks for a moment; for clients that have not [joined](Self::join).
    pub fn listen(&self) {
        let until = Instant::now() + LISTEN;
        while Instant::now() < until {
            let _ = self.consumer.poll(LISTEN);
        }
    }

    /// Stops polling. A static member does not leave the group; its assignment is kept for
    /// `session.timeout.ms`.
    pub fn close(&self) {
        self.member().is_closing.store(true, Ordering::Release);
    }
}

fn poll(consumer: &BaseConsumer<GroupContext>) {
    let member = &consumer.context().0;
    let mut rebootstrap = Rebootstrap::default();
    let mut was_out = true;
    let mut compared_at = Instant::now();
    let mut join_failure = JoinFailure::default();
    while !member.is_closing() {
        *member.polled_at() = Instant::now();
        let is_out = !member.status.is_member();
        if was_out && !is_out {
            rebootstrap.settle();
            join_failure = JoinFailure::default();
        }
        was_out = is_out;
        if member.all_brokers_down.swap(false, Ordering::AcqRel) {
            rebootstrap.suspect(Instant::now());
        }
        if rebootstrap.is_due(Instant::now(), is_out) {
            tracing::debug!(target: "librdkafka", "bootstrapping the group's member again");
            add_brokers(consumer.client(), &member.kafka.bootstrap_servers);
        }
        if compared_at.elapsed() >= COMPARED_EVERY {
            compared_at = Instant::now();
            if member.ends_if_replaced(GroupMetadata::of(consumer).as_ref()) {
                return;
            }
        }
        match consumer.poll(POLL) {
            // Nothing is assigned to this client, so no record can arrive.
            None | Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::debug!(target: "librdkafka", %error, "poll");
                // A member's own partitions flow on meanwhile.
                if is_out && let Some(reason) = error.rdkafka_error_code().and_then(|c| join_failure.note(c))
                {
                    member.status.join_failed(reason);
                }
            }
        }
        if let Some((code, reason)) = consumer.client().fatal_error() {
            let end = match code {
                RDKafkaErrorCode::FencedInstanceId => {
                    member.status.fenced(OWN_FENCING_WITHIN);
                    let instance_id = member.kafka.instance_id.clone();
                    MemberEnd::Identity(IdentityMismatch::InstanceTaken { instance_id })
                }
                _ => MemberEnd::Fatal(format!("{code}: {reason}")),
            };
            member.ended.send_replace(Some(end));
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_ends_before_it_handles_a_revocation_is_not_waited_for() {
        // GIVEN a revocation in the event channel of a lane that drains
        let (revocation, unhandled) = (Arc::new(Revocation::default()), Arc::new(AtomicI64::new(0)));
        revocation.lock().lanes.insert(0, Arc::clone(&unhandled));
        let finished = Arc::clone(&revocation);
        let done = RevokeDone::new(move || finished.finish(0));
        let (events, lane) = tokio::sync::mpsc::channel(1);
        let event = LaneEvent::Revoked { partitions: vec![Partition(0)], is_lost: false, done };
        assert!(events.try_send(event).is_ok());

        // WHEN the lane ends THEN the callback returns, and not because its time is over
        drop(lane);
        revocation.wait(|| false);
        assert_eq!(unhandled.load(Ordering::Acquire), 0);
    }

    #[test]
    fn a_new_member_id_counts_while_partitions_are_held() {
        let as_member = |id: &std::ffi::CStr| GroupMetadata::with_member_id(id);
        let held = |partitions: &[i32]| Held {
            member_id: c"one".to_owned(),
            partitions: partitions.iter().copied().map(Partition).collect(),
        };
        assert!(held(&[1]).is_replaced(&as_member(c"two")));
        assert!(!held(&[1]).is_replaced(&as_member(c"one")));
        // Between two memberships: the callback that takes the partitions away comes first, or the library joins again.
        assert!(!held(&[1]).is_replaced(&as_member(c"")));
        assert!(!held(&[]).is_replaced(&as_member(c"two")));
    }

    #[test]
    fn a_lane_whose_channel_stays_full_never_commits_again() {
        // GIVEN a lane that hangs, with a full channel
        let (events, mut hanging) = tokio::sync::mpsc::channel(1);
        let lane = LaneHandle { events, unhandled_revocations: Arc::new(AtomicI64::new(0)) };
        assert!(lane.send(LaneEvent::Assigned(vec![Partition(0)]), || true));

        // WHEN a revocation cannot be sent to it, and it goes on afterwards
        let revocation = Arc::new(Revocation::default());
        revocation.lock().lanes.insert(0, Arc::clone(&lane.unhandled_revocations));
        let finished = Arc::clone(&revocation);
        let done = RevokeDone::new(move || finished.finish(0));
        assert!(
            !lane.send(LaneEvent::Revoked { partitions: vec![Partition(0)], is_lost: false, done }, || false)
        );
        revocation.wait(|| false);
        assert!(hanging.try_recv().is_ok());

        // THEN it may not commit
        assert_eq!(lane.unhandled_revocations.load(Ordering::Acquire), 1);
        drop(hanging);
        assert_eq!(lane.unhandled_revocations.load(Ordering::Acquire), 1);
    }
}
