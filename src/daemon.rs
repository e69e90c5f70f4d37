//! The daemon: checks its identity, starts the lanes, supervises them, and drains.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use rdkafka::consumer::Consumer;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use uuid::Uuid;

use crate::audit::{self, Audit};
use crate::config::{Endpoint, Settings};
use crate::domain::cursor::{Identity, IdentityMismatch, Mode};
use crate::domain::outcome::{FailureClass, class_of_sqlstate};
use crate::domain::record::{NextOffset, Partition};
use crate::error::CommandError;
use crate::housekeeping::schedule;
use crate::kafka::group::{Group, LaneHandle, MemberEnd, member_config};
use crate::kafka::lane_client::LaneClient;
use crate::kafka::librdkafka::{topic_id, topic_setting};
use crate::kafka::offsets::{group_offsets, log_bounds, log_ends};
use crate::kafka::publisher_settings::PublisherSettings;
use crate::kafka::token::first_token;
use crate::kafka::unassigned::{self, Membership};
use crate::lane::backoff::Backoff;
use crate::lane::{Lane, LaneSettings};
use crate::ports::LaneEvent;
use crate::postgres::binding::{self, Binding, BindingError};
use crate::postgres::schema::months::{self, Obstacle};
use crate::postgres::schema::{self, SchemaError};
use crate::postgres::store::PgStore;
use crate::telemetry::metrics;
use crate::telemetry::status::{Dependency, Phase, StatusRegistry};
use crate::telemetry::trace::BatchTracer;

/// Interval between checks of the topic's id: librdkafka does not notice that a topic was recreated
/// (librdkafka #3255).
const TOPIC_CHECK: Duration = Duration::from_secs(5);
/// Interval between reads of the input topic's retention.
const RETENTION_CHECK: Duration = Duration::from_secs(60);
/// Interval between reads of the log ends, for lag.
const ENDS_TICK: Duration = Duration::from_secs(2);
const CAUGHT_UP_TICK: Duration = Duration::from_millis(100);
const MONTHS_TICK: Duration = Duration::from_secs(24 * 60 * 60);
const MONTHS_RETRY: Duration = Duration::from_secs(60);
const MONTHS_FIRST_WAIT: Duration = Duration::from_secs(10);
/// Interval between database checks, for readiness.
const DATABASE_PROBE: Duration = Duration::from_secs(2);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Queue length of a lane's events; the group's thread waits when it is full.
const LANE_EVENTS_MAX: usize = 64;
/// Interval between reads of partitions that no lane of this process reports on.
const FOREIGN_TICK: Duration = Duration::from_secs(1);

/// Options of `run`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RunOptions {
    /// `--until-caught-up`
    pub until_caught_up: bool,
    /// `--adopt-database`
    pub adopt_database: bool,
}

/// Why the daemon ended, other than by a drain.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// Exit code 3.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
    /// Exit code 3.
    #[error("{0}")]
    Halted(String),
}

impl From<RunError> for CommandError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Failed(message) => Self::failed(message),
            RunError::Identity(mismatch) => Self::person_must_decide(mismatch.to_string()),
            RunError::Halted(message) => Self::person_must_decide(message),
        }
    }
}

/// Identity of the cluster and the topic at the start.
struct Found {
    topic_id: Uuid,
    cluster_id: String,
    partitions: usize,
}

/// Runs until `stop` is set, until caught up, or until it cannot continue.
///
/// # Errors
/// See [`RunError`]. Being fenced is an error, except once after each loss of the broker connection: a second
/// fencing means that another process uses the same `instance_id`.
pub async fn run(
    settings: &Settings,
    options: RunOptions,
    status: Arc<StatusRegistry>,
    tracer: Option<&Arc<BatchTracer>>,
    stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    loop {
        status.waits(metrics::now());
        let ended = run_as_member(settings, options, Arc::clone(&status), tracer, stop.clone()).await;
        let Err(RunError::Identity(IdentityMismatch::InstanceTaken { instance_id })) = &ended else {
            return ended;
        };
        if !status.was_fenced_after_loss() || *stop.borrow() {
            return ended;
        }
        tracing::warn!(
            instance = instance_id,
            "fenced soon after the broker connection was lost, possibly by its own request: joining again"
        );
        status.left(metrics::now());
        metrics::lanes_left(settings.lanes);
    }
}

async fn run_as_member(
    settings: &Settings,
    options: RunOptions,
    status: Arc<StatusRegistry>,
    tracer: Option<&Arc<BatchTracer>>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let start = tokio::select! {
        started = start(settings, options, &status, tracer) => started?,
        _ = stop.wait_for(|stop| *stop) => return Ok(()),
    };
    start.supervise(settings, options, stop).await
}

struct Running {
    group: Group,
    member_end: watch::Receiver<Option<MemberEnd>>,
    handles: Vec<LaneHandle>,
    lanes: JoinSet<Result<(), IdentityMismatch>>,
    found: Found,
    suspicion: Arc<Notify>,
    months: AbortHandle,
    status: Arc<StatusRegistry>,
    _audit: Option<Audit>,
}

async fn start(
    settings: &Settings,
    options: RunOptions,
    status: &Arc<StatusRegistry>,
    tracer: Option<&Arc<BatchTracer>>,
) -> Result<Running, RunError> {
    let kafka = &settings.kafka;
    let endpoint = settings.postgres.url.endpoint();
    for dependency in ["database", "broker"] {
        metrics::breaker_at_start(dependency, false);
    }
    let database_id = database_ready(endpoint, status).await?;
    let (mut receivers, mut handles) = (Vec::new(), Vec::new());
    for _ in 0..settings.lanes {
        let (events, receiver) = mpsc::channel(LANE_EVENTS_MAX);
        handles.push(LaneHandle { events, unhandled_revocations: Arc::new(AtomicI64::new(0)) });
        receivers.push(receiver);
    }
    let consumer = member_config(kafka);
    first_token(&consumer).await;
    let (group, member_end) =
        Group::new(&consumer, &kafka.input_topic, &kafka.instance_id, handles.clone(), Arc::clone(status))
            .map_err(|error| RunError::Failed(format!("creating the Kafka consumer: {error}")))?;
    let found = broker_ready(&group, status).await?;
    let identity = Identity { topic_id: found.topic_id, database_id };
    bind(settings, options, endpoint, &found, status).await?;
    let housekeeping = settings.postgres.housekeeping_url.endpoint().clone();
    // Before the first row, so that no row goes to a default partition because its month is missing.
    let mut keeper = MonthsKeeper::default();
    let kept = settings.retention.payment_months;
    let first = tokio::time::timeout(MONTHS_FIRST_WAIT, keeper.make_ahead(&housekeeping, kept)).await;
    let months = tokio::spawn(async move {
        let mut pause = first.unwrap_or(MONTHS_RETRY);
        loop {
            tokio::time::sleep(pause).await;
            pause = keeper.make_ahead(&housekeeping, kept).await;
        }
    });

    // One session per lane, plus one to replace a broken one that the server still counts.
    let pool = endpoint
        .pool(settings.lanes.saturating_mul(2))
        .map_err(|error| RunError::Failed(error.to_string()))?;
    let rules = Arc::new(settings.rules());
    let suspicion = Arc::new(Notify::new());
    let shared_kafka = Arc::new(kafka.clone());
    let mut lanes = JoinSet::new();
    for (index, receiver) in receivers.into_iter().enumerate() {
        let Some(handle) = handles.get(index) else { continue };
        let client = LaneClient::new(
            group.clone(),
            PublisherSettings::of(kafka, &identity, index),
            handle,
            Arc::clone(&suspicion),
            Arc::clone(&shared_kafka),
        );
        let store = PgStore::new(pool.clone(), kafka.input_topic.clone(), identity.clone());
        let lane_settings = LaneSettings {
            index,
            rules: Arc::clone(&rules),
            input_topic: kafka.input_topic.clone(),
            identity: identity.clone(),
            mode: Mode { publishes: kafka.publish, adopts_database: options.adopt_database },
            batch_payments_max: settings.batch.max_payments,
            batch_bytes_max: settings.batch.max_bytes.bytes(),
            linger: settings.batch.linger,
            tracer: tracer.cloned(),
        };
        lanes.spawn(Lane::new(lane_settings, client, store, receiver, Arc::clone(status)).run());
    }
    let audit = audit::spawn(settings, found.topic_id, status)
        .map_err(|error| RunError::Failed(format!("starting the audit: {error}")))?;
    group
        .join()
        .map_err(|error| RunError::Failed(format!("subscribing to {}: {error}", kafka.input_topic)))?;
    tracing::info!(
        topic = kafka.input_topic,
        topic_id = %found.topic_id,
        partitions = found.partitions,
        group = kafka.group_id,
        instance = kafka.instance_id,
        database = %endpoint,
        database_id = %identity.database_id,
        lanes = settings.lanes,
        publishes = kafka.publish,
        "started"
    );
    let status = Arc::clone(status);
    let months = months.abort_handle();
    Ok(Running { group, member_end, handles, lanes, found, suspicion, months, status, _audit: audit })
}

/// Waits for a database with a schema that this version knows.
async fn database_ready(endpoint: &Endpoint, status: &StatusRegistry) -> Result<Uuid, RunError> {
    let mut breaker = Backoff::new("database", 0);
    loop {
        let tried = async {
            let (client, _driver) =
                endpoint.connect().await.map_err(|e| (e.sqlstate().map(str::to_owned), e.to_string()))?;
            match schema::check(&client).await {
                Ok(_) => {}
                // Waiting does not help: the schema of a newer version stays.
                Err(error @ SchemaError::TooNew { .. }) => return Ok(Err(error)),
                Err(error) => {
                    let sqlstate = error.sqlstate().map(|s| s.code().to_owned());
                    // A missing or old schema: wait for the operator to migrate it.
                    return Err((sqlstate.or(Some("42P01".to_owned())), error.to_string()));
                }
            }
            binding::database_id(&client).await.map(Ok).map_err(|e| {
                (e.code().map(|c| c.code().to_owned()), crate::postgres::connection::describe(&e))
            })
        };
        match tried.await {
            Ok(Ok(id)) => {
                breaker.succeeded();
                metrics::breaker_at_start("database", false);
                status.probed(Some(Dependency::Up), None);
                return Ok(id);
            }
            Ok(Err(error)) => return Err(RunError::Failed(error.to_string())),
            Err((sqlstate, message)) => {
                let class =
                    sqlstate.as_deref().map_or(FailureClass::Transient, |code| class_of_sqlstate(code, None));
                breaker.failed(class, "reading the identity of the database", &message);
                metrics::breaker_at_start("database", true);
                status.probed(Some(Dependency::Down(message)), None);
            }
        }
        sleep_until(breaker.due_at()).await;
    }
}

/// Waits for a broker that knows the input topic.
async fn broker_ready(group: &Group, status: &StatusRegistry) -> Result<Found, RunError> {
    let mut breaker = Backoff::new("broker", 0);
    loop {
        let asked = group.clone();
        let answer = tokio::task::spawn_blocking(move || {
            let (topic_id, partitions) = topic_id(asked.consumer(), asked.topic(), REQUEST_TIMEOUT)
                .map_err(|error| format!("topic {}: {error}", asked.topic()))?;
            let cluster_id = asked
                .consumer()
                .client()
                .fetch_cluster_id(REQUEST_TIMEOUT)
                .ok_or_else(|| "the cluster does not report its id".to_owned())?;
            Ok::<_, String>(Found { topic_id, cluster_id, partitions })
        })
        .await;
        match answer {
            Ok(Ok(found)) => {
                breaker.succeeded();
                metrics::breaker_at_start("broker", false);
                status.probed(None, Some(Dependency::Up));
                metrics::input_partitions(found.partitions);
                return Ok(found);
            }
            Ok(Err(message)) => {
                group.listen();
                let refusal = status.broker_refusal();
                let class =
                    if refusal.is_some() { FailureClass::Persistent } else { FailureClass::Transient };
                let message = refusal.unwrap_or(message);
                breaker.failed(class, "asking for the input topic", &message);
                metrics::breaker_at_start("broker", true);
                status.probed(None, Some(Dependency::Down(message)));
            }
            Err(error) => return Err(RunError::Failed(format!("asking for the input topic: {error}"))),
        }
        sleep_until(breaker.due_at()).await;
    }
}

async fn bind(
    settings: &Settings,
    options: RunOptions,
    endpoint: &Endpoint,
    found: &Found,
    status: &StatusRegistry,
) -> Result<(), RunError> {
    let wanted = Binding {
        group_id: settings.kafka.group_id.clone(),
        cluster_id: found.cluster_id.clone(),
        topic: settings.kafka.input_topic.clone(),
        topic_id: found.topic_id,
        publishes: settings.kafka.publish,
    };
    let mut breaker = Backoff::new("database", 0);
    loop {
        let message = match endpoint.connect().await {
            Ok((mut client, _driver)) => {
                match binding::bind(&mut client, &wanted, options.adopt_database).await {
                    Ok(()) => {
                        breaker.succeeded();
                        metrics::breaker_at_start("database", false);
                        status.probed(Some(Dependency::Up), None);
                        return Ok(());
                    }
                    Err(BindingError::Identity(mismatch)) => return Err(mismatch.into()),
                    Err(error @ BindingError::Database(_)) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        breaker.failed(FailureClass::Transient, "binding the database to the group", &message);
        metrics::breaker_at_start("database", true);
        status.probed(Some(Dependency::Down(message)), None);
        sleep_until(breaker.due_at()).await;
    }
}

/// Creates months of the payment tables ahead of time. Failures are not fatal: without its month, a row goes
/// to the default partition.
#[derive(Default)]
struct MonthsKeeper {
    has_told: bool,
}

impl MonthsKeeper {
    /// Makes one attempt and returns the delay before the next.
    async fn make_ahead(&mut self, endpoint: &Endpoint, kept: Option<u32>) -> Duration {
        let outcome = match endpoint.connect().await {
            Ok((mut client, _driver)) => months::keep(&mut client, kept).await.map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match outcome {
            Ok(report) => {
                if !report.made.is_empty() {
                    tracing::info!(months = report.made.join(", "), "made months of the payment tables");
                }
                if report.moved > 0 {
                    tracing::warn!(
                        rows = report.moved,
                        "moved rows from the default partitions to their months"
                    );
                }
                if !report.archived.is_empty() {
                    tracing::info!(
                        tables = report.archived.join(", "),
                        "detached months of the payment tables; they can be archived and dropped"
                    );
                }
                let is_by_hand = |o: &Obstacle| matches!(o, Obstacle::TooLarge | Obstacle::NameTaken);
                if report.waiting.iter().all(|(_, obstacle)| is_by_hand(obstacle)) {
                    self.has_told = false;
                    for (month, obstacle) in &report.waiting {
                        tracing::warn!(month, %obstacle, "a month of the payment tables cannot be made");
                    }
                    return MONTHS_TICK;
                }
                if !self.has_told {
                    for (month, obstacle) in &report.waiting {
                        tracing::warn!(month, %obstacle, "a month of the payment tables cannot be made yet");
                    }
                }
            }
            Err(error) if !self.has_told => {
                tracing::warn!(error, "making months of the payment tables failed, retrying every minute");
            }
            Err(_) => {}
        }
        self.has_told = true;
        MONTHS_RETRY
    }
}

impl Running {
    async fn supervise(
        mut self,
        settings: &Settings,
        options: RunOptions,
        mut stop: watch::Receiver<bool>,
    ) -> Result<(), RunError> {
        let membership = Membership {
            config: member_config(&settings.kafka),
            group_id: settings.kafka.group_id.clone(),
            instance_id: settings.kafka.instance_id.clone(),
            partitions: self.found.partitions,
        };
        let mut ended = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => Ok(()),
            ended = self.lanes.join_next() => Err(lane_end(ended)),
            ended = member_end(&mut self.member_end) => Err(ended),
            mismatch = watch_topic(&self.group, self.found.topic_id, &self.suspicion, &self.status) => {
                Err(mismatch.into())
            }
            () = unassigned::watch(&self.group, &membership) => Ok(()),
            () = watch_ends(&self.group, &self.status) => Ok(()),
            () = watch_retention(&self.group) => Ok(()),
            () = watch_database(settings.postgres.url.endpoint(), &self.status) => Ok(()),
            () = schedule::run(settings) => Ok(()),
            caught_up = catch_up(&self.group, &self.status, self.found.partitions, options) => caught_up,
        };
        if let Err(error) = &ended {
            tracing::error!(%error, "stopping");
        } else {
            tracing::info!("draining");
        }
        let deadline = Instant::now() + settings.shutdown.timeout;
        for handle in &self.handles {
            // A lane that has ended needs no drain.
            let _ = tokio::time::timeout_at(deadline, handle.events.send(LaneEvent::Drain)).await;
        }
        while !self.lanes.is_empty() {
            match tokio::time::timeout_at(deadline, self.lanes.join_next()).await {
                Ok(Some(Ok(Ok(())))) => {}
                Ok(None) => break,
                Ok(end) => {
                    if ended.is_ok() {
                        ended = Err(lane_end(end));
                    }
                }
                Err(_) => {
                    if ended.is_ok() {
                        ended = Err(RunError::Failed(
                            "not drained within shutdown.timeout; what was in flight is redelivered to the next \
                             daemon, nothing is lost"
                                .to_owned(),
                        ));
                    }
                    break;
                }
            }
        }
        self.months.abort();
        self.group.close();
        let totals = self.status.totals();
        tracing::info!(
            written = totals.written,
            duplicates = totals.duplicates,
            dead_letters = totals.dead_letters,
            redelivered = totals.redelivered,
            "stopped"
        );
        ended
    }
}

fn lane_end(ended: Option<Result<Result<(), IdentityMismatch>, tokio::task::JoinError>>) -> RunError {
    match ended {
        Some(Ok(Err(mismatch))) => mismatch.into(),
        Some(Ok(Ok(()))) | None => RunError::Failed("a lane ended unexpectedly".to_owned()),
        Some(Err(error)) => RunError::Failed(format!("a lane failed: {error}")),
    }
}

async fn member_end(end: &mut watch::Receiver<Option<MemberEnd>>) -> RunError {
    match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
        Ok(Some(MemberEnd::Identity(mismatch))) => mismatch.into(),
        Ok(Some(MemberEnd::Fatal(reason))) => {
            RunError::Failed(format!("the Kafka consumer failed: {reason}"))
        }
        Ok(None) | Err(_) => RunError::Failed("the Kafka consumer's thread ended unexpectedly".to_owned()),
    }
}

/// Checks the topic's id periodically; returns when it has changed.
async fn watch_topic(
    group: &Group,
    expected: Uuid,
    suspicion: &Notify,
    status: &StatusRegistry,
) -> IdentityMismatch {
    loop {
        // Errors trigger an early check, but at most one per second.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let _ = tokio::time::timeout(TOPIC_CHECK, suspicion.notified()).await;
        let asked = group.clone();
        let answer =
            tokio::task::spawn_blocking(move || topic_id(asked.consumer(), asked.topic(), REQUEST_TIMEOUT));
        match answer.await {
            Ok(Ok((found, _))) if found != expected => {
                return IdentityMismatch::OtherTopic { marked: expected, found };
            }
            Ok(Ok((_, partitions))) => {
                status.probed(None, Some(Dependency::Up));
                metrics::input_partitions(partitions);
            }
            Ok(Err(error)) => {
                let why = status.broker_refusal().unwrap_or_else(|| error.to_string());
                status.probed(None, Some(Dependency::Down(format!("asking for the input topic: {why}"))));
            }
            Err(_) => {}
        }
    }
}

/// Keeps the log ends in the status registry up to date, for lag. Never returns.
async fn watch_ends(group: &Group, status: &StatusRegistry) {
    let mut tick = interval(ENDS_TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let partitions: Vec<Partition> = status.partitions().into_keys().collect();
        if partitions.is_empty() {
            continue;
        }
        let asked = group.clone();
        // Taken before the request: records that arrive during it are not in the answer.
        let asked_at = metrics::now();
        let answer = tokio::task::spawn_blocking(move || {
            log_ends(&asked, &partitions).map(|ends| partitions.into_iter().zip(ends).collect::<Vec<_>>())
        });
        match answer.await {
            Ok(Ok(ends)) => {
                status.ends(asked_at, ends.into_iter());
                status.probed(None, Some(Dependency::Up));
            }
            Ok(Err(error)) => {
                let why = status.broker_refusal().unwrap_or_else(|| error.to_string());
                status.probed(None, Some(Dependency::Down(why)));
            }
            Err(_) => {}
        }
    }
}

/// Exports the input topic's retention, for alerts on records that are about to be deleted. The metric is
/// absent without the permission to read it. Never returns.
async fn watch_retention(group: &Group) {
    let mut tick = interval(RETENTION_CHECK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let asked = group.clone();
        let answer = tokio::task::spawn_blocking(move || {
            topic_setting(asked.consumer().client(), asked.topic(), "retention.ms", REQUEST_TIMEOUT)
        });
        match answer.await {
            // -1 means unlimited.
            Ok(Ok(ms)) => metrics::input_retention(ms.parse().ok().map(Duration::from_millis)),
            Ok(Err(error)) => tracing::debug!(%error, "cannot read the retention of the input topic"),
            Err(_) => {}
        }
    }
}

/// Keeps the database's availability in the status registry up to date, also when no lane uses it. Never
/// returns.
async fn watch_database(endpoint: &Endpoint, status: &StatusRegistry) {
    let mut tick = interval(DATABASE_PROBE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut session = None;
    loop {
        tick.tick().await;
        let client = match session.take() {
            Some(client) => client,
            None => match endpoint.connect().await {
                Ok((client, _driver)) => client,
                Err(error) => {
                    status.probed(Some(Dependency::Down(error.to_string())), None);
                    continue;
                }
            },
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, client.batch_execute("SELECT 1")).await {
            Ok(Ok(())) => {
                status.probed(Some(Dependency::Up), None);
                session = Some(client);
            }
            Ok(Err(error)) => {
                status.probed(Some(Dependency::Down(crate::postgres::connection::describe(&error))), None);
            }
            Err(_) => status.probed(Some(Dependency::Down("no answer in time".to_owned())), None),
        }
    }
}

/// Returns once every partition's committed offset has reached the end that it had at the start.
async fn catch_up(
    group: &Group,
    status: &StatusRegistry,
    partitions: usize,
    options: RunOptions,
) -> Result<(), RunError> {
    if !options.until_caught_up {
        return std::future::pending().await;
    }
    let all: Vec<Partition> = (0..i32::try_from(partitions).unwrap_or(i32::MAX)).map(Partition).collect();
    let mut targets: BTreeMap<Partition, NextOffset> = loop {
        let (asked, wanted) = (group.clone(), all.clone());
        let answer = tokio::task::spawn_blocking(move || log_bounds(&asked, &wanted)).await;
        if let Ok(Ok(bounds)) = answer {
            // An empty partition is already caught up.
            let targets = all.iter().copied().zip(bounds);
            break targets.filter(|(_, b)| b.end > b.start).map(|(p, b)| (p, b.end)).collect();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let mut tick = interval(CAUGHT_UP_TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut foreign_at = Instant::now() + FOREIGN_TICK;
    loop {
        tick.tick().await;
        let assigned = status.partitions();
        targets.retain(|partition, target| {
            // In a restored or replaced database, the rows may be behind what was published.
            let live = assigned.get(partition).filter(|status| matches!(status.phase, Phase::Live));
            let reached = live.and_then(|status| status.applied.min(status.published));
            reached.is_none_or(|reached| reached < *target)
        });
        let foreign: Vec<Partition> = targets.keys().filter(|p| !assigned.contains_key(p)).copied().collect();
        if !foreign.is_empty() && Instant::now() >= foreign_at {
            foreign_at = Instant::now() + FOREIGN_TICK;
            let (asked, wanted) = (group.clone(), foreign.clone());
            if let Ok(Ok(offsets)) = tokio::task::spawn_blocking(move || group_offsets(&asked, &wanted)).await
            {
                for (partition, offset) in foreign.iter().zip(offsets) {
                    if let (Some(offset), Some(target)) = (offset, targets.get(partition))
                        && offset.position >= *target
                    {
                        targets.remove(partition);
                    }
                }
            }
        }
        if targets.is_empty() {
            return Ok(());
        }
        let halted =
            |p: &Partition| assigned.get(p).is_some_and(|status| matches!(status.phase, Phase::Halted(_)));
        if targets.keys().all(halted) {
            return Err(RunError::Halted(format!(
                "caught up, except for {} halted partition(s); see `payment-writer cursors show`",
                targets.len()
            )));
        }
    }
}
