//! The daemon: finds out who it is, starts the lanes, watches over them, and drains.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::Consumer;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use uuid::Uuid;

use crate::audit::{self, Audit};
use crate::binding::{self, Binding, BindingError};
use crate::config::{KafkaSettings, Settings};
use crate::cursor::{Identity, IdentityDoubt, Mode};
use crate::disposition::{FailureClass, class_of_sqlstate};
use crate::housekeeping::schedule;
use crate::kafka::group::{Group, MemberEnd, Seat};
use crate::kafka::librdkafka::{topic_id, topic_setting};
use crate::kafka::log::{KafkaLog, group_offsets, log_bounds, log_ends};
use crate::kafka::orphans::{self, Membership};
use crate::kafka::publisher::PublisherSettings;
use crate::kafka::token::first_token;
use crate::kafka_client::client_config_over;
use crate::lane::breaker::Breaker;
use crate::lane::ports::LaneEvent;
use crate::lane::{Lane, LaneSettings};
use crate::ledger::PgLedger;
use crate::metrics;
use crate::payment::Status;
use crate::postgres::Endpoint;
use crate::record::{NextOffset, Partition};
use crate::schema::months::{self, Obstacle};
use crate::schema::{self, SchemaError};
use crate::status::{Board, Dependency, Phase};
use crate::trace::BatchTracer;
use crate::wire::Rules;

/// The topic's id is asked for this often: the client library goes on over a re-created topic
/// (librdkafka #3255).
const TOPIC_CHECK: Duration = Duration::from_secs(5);
/// The input topic's retention is asked for this often.
const RETENTION_CHECK: Duration = Duration::from_secs(60);
/// How often the log's ends are asked for, for lag.
const ENDS_TICK: Duration = Duration::from_secs(2);
const CAUGHT_UP_TICK: Duration = Duration::from_millis(100);
const MONTHS_TICK: Duration = Duration::from_secs(24 * 60 * 60);
const MONTHS_RETRY: Duration = Duration::from_secs(60);
const MONTHS_FIRST_WAIT: Duration = Duration::from_secs(10);
/// How often the database is asked whether it is there, for readiness.
const DATABASE_PROBE: Duration = Duration::from_secs(2);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Events that a lane has not taken yet; the group waits beyond it.
const LANE_EVENTS_MAX: usize = 64;
/// Partitions of which this process is told nothing by its lanes are asked for this often.
const FOREIGN_TICK: Duration = Duration::from_secs(1);

/// How `run` was started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RunOptions {
    /// `--until-caught-up`
    pub until_caught_up: bool,
    /// `--adopt-database`
    pub adopt_database: bool,
}

/// Why the daemon ended other than by a drain.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// Exit code 3.
    #[error(transparent)]
    Identity(#[from] IdentityDoubt),
    /// Exit code 3.
    #[error("{0}")]
    Halted(String),
}

/// What `kafka.properties` may change of the group's member.
const MEMBER_DEFAULTS: [(&str, &str); 3] = [
    ("session.timeout.ms", "10000"),
    ("heartbeat.interval.ms", "2000"),
    ("topic.metadata.refresh.interval.ms", "60000"),
];

/// Configuration of the group's member. It fetches nothing.
pub fn consumer_config(kafka: &KafkaSettings) -> ClientConfig {
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

/// The rules of valid messages, from the settings.
pub fn rules(settings: &Settings) -> Rules {
    Rules {
        payment_types: settings.payment.types.clone(),
        payment_bytes_max: settings.payment.max_bytes.bytes(),
        idempotency_window: settings.idempotency.window,
        email_statuses: settings
            .email
            .statuses
            .iter()
            .filter_map(|code| Status::from_code(i64::from(*code)))
            .collect(),
    }
}

/// A consumer of the group that is never subscribed: for questions to the broker.
pub fn bystander(settings: &Settings) -> Result<Group, RunError> {
    let kafka = &settings.kafka;
    let board = Arc::new(Board::default());
    Group::new(&consumer_config(kafka), &kafka.input_topic, &kafka.instance_id, Vec::new(), board)
        .map(|(group, _)| group)
        .map_err(|error| RunError::Failed(format!("creating the Kafka consumer: {error}")))
}

/// Who the cluster and the topic are, as found at the start.
struct Found {
    topic_id: Uuid,
    cluster_id: String,
    partitions: usize,
}

/// Runs until `stop` is set, until caught up, or until it cannot go on.
///
/// # Errors
/// See [`RunError`]. Being fenced is one of them, except once after each time that the broker was away: who
/// is fenced again without that has a namesake.
pub async fn run(
    settings: &Settings,
    options: RunOptions,
    board: Arc<Board>,
    tracer: Option<&Arc<BatchTracer>>,
    stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    loop {
        board.waits(metrics::now());
        let ended = run_as_member(settings, options, Arc::clone(&board), tracer, stop.clone()).await;
        let Err(RunError::Identity(IdentityDoubt::InstanceTaken { instance_id })) = &ended else {
            return ended;
        };
        if !board.was_fenced_after_loss() || *stop.borrow() {
            return ended;
        }
        tracing::warn!(
            instance = instance_id,
            "fenced just after the broker was away, perhaps by a request of its own: joining once more"
        );
        board.left(metrics::now());
        metrics::lanes_left(settings.lanes);
    }
}

async fn run_as_member(
    settings: &Settings,
    options: RunOptions,
    board: Arc<Board>,
    tracer: Option<&Arc<BatchTracer>>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let start = tokio::select! {
        started = start(settings, options, &board, tracer) => started?,
        _ = stop.wait_for(|stop| *stop) => return Ok(()),
    };
    start.supervise(settings, options, stop).await
}

struct Running {
    group: Group,
    member_end: watch::Receiver<Option<MemberEnd>>,
    seats: Vec<Seat>,
    lanes: JoinSet<Result<(), IdentityDoubt>>,
    found: Found,
    suspicion: Arc<Notify>,
    months: AbortHandle,
    board: Arc<Board>,
    _audit: Option<Audit>,
}

async fn start(
    settings: &Settings,
    options: RunOptions,
    board: &Arc<Board>,
    tracer: Option<&Arc<BatchTracer>>,
) -> Result<Running, RunError> {
    let kafka = &settings.kafka;
    let endpoint = settings.postgres.url.endpoint();
    for dependency in ["database", "broker"] {
        metrics::breaker_at_start(dependency, false);
    }
    let database_id = database_ready(endpoint, board).await?;
    let (mut receivers, mut seats) = (Vec::new(), Vec::new());
    for _ in 0..settings.lanes {
        let (events, receiver) = mpsc::channel(LANE_EVENTS_MAX);
        seats.push(Seat { events, overtaken: Arc::new(AtomicI64::new(0)) });
        receivers.push(receiver);
    }
    let consumer = consumer_config(kafka);
    first_token(&consumer).await;
    let (group, member_end) =
        Group::new(&consumer, &kafka.input_topic, &kafka.instance_id, seats.clone(), Arc::clone(board))
            .map_err(|error| RunError::Failed(format!("creating the Kafka consumer: {error}")))?;
    let found = broker_ready(&group, board).await?;
    let identity = Identity { topic_id: found.topic_id, database_id };
    bind(settings, options, endpoint, &found, board).await?;
    let housekeeping = settings.postgres.housekeeping_url.endpoint().clone();
    // Once before the first row, so that none goes to a default partition for want of a month.
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

    // A session a lane, and one to replace a broken one whose server has not noticed yet.
    let pool = endpoint
        .pool(settings.lanes.saturating_mul(2))
        .map_err(|error| RunError::Failed(error.to_string()))?;
    let rules = Arc::new(rules(settings));
    let suspicion = Arc::new(Notify::new());
    let shared_kafka = Arc::new(kafka.clone());
    let mut lanes = JoinSet::new();
    for (index, receiver) in receivers.into_iter().enumerate() {
        let Some(seat) = seats.get(index) else { continue };
        let log = KafkaLog::new(
            group.clone(),
            PublisherSettings::of(kafka, &identity, index),
            seat,
            Arc::clone(&suspicion),
            Arc::clone(&shared_kafka),
        );
        let ledger = PgLedger::new(pool.clone(), kafka.input_topic.clone(), identity.clone());
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
        lanes.spawn(Lane::new(lane_settings, log, ledger, receiver, Arc::clone(board)).run());
    }
    let audit = audit::spawn(settings, found.topic_id, board)
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
    let board = Arc::clone(board);
    let months = months.abort_handle();
    Ok(Running { group, member_end, seats, lanes, found, suspicion, months, board, _audit: audit })
}

/// Waits for a database with a schema that this program knows.
async fn database_ready(endpoint: &Endpoint, board: &Board) -> Result<Uuid, RunError> {
    let mut breaker = Breaker::new("database", 0);
    loop {
        let tried = async {
            let (client, _driver) =
                endpoint.connect().await.map_err(|e| (e.sqlstate().map(str::to_owned), e.to_string()))?;
            match schema::check(&client).await {
                Ok(_) => {}
                // A newer program's schema does not go back by itself.
                Err(error @ SchemaError::TooNew { .. }) => return Ok(Err(error)),
                Err(error) => {
                    let sqlstate = error.sqlstate().map(|s| s.code().to_owned());
                    // A schema that is missing or old is mended by a person.
                    return Err((sqlstate.or(Some("42P01".to_owned())), error.to_string()));
                }
            }
            binding::database_id(&client)
                .await
                .map(Ok)
                .map_err(|e| (e.code().map(|c| c.code().to_owned()), crate::postgres::describe(&e)))
        };
        match tried.await {
            Ok(Ok(id)) => {
                breaker.succeeded();
                metrics::breaker_at_start("database", false);
                board.probed(Some(Dependency::Up), None);
                return Ok(id);
            }
            Ok(Err(error)) => return Err(RunError::Failed(error.to_string())),
            Err((sqlstate, message)) => {
                let class =
                    sqlstate.as_deref().map_or(FailureClass::Passing, |code| class_of_sqlstate(code, None));
                breaker.failed(class, "asking the database who it is", &message);
                metrics::breaker_at_start("database", true);
                board.probed(Some(Dependency::Down(message)), None);
            }
        }
        sleep_until(breaker.due_at()).await;
    }
}

/// Waits for a broker that knows the input topic.
async fn broker_ready(group: &Group, board: &Board) -> Result<Found, RunError> {
    let mut breaker = Breaker::new("broker", 0);
    loop {
        let asked = group.clone();
        let answer = tokio::task::spawn_blocking(move || {
            let (topic_id, partitions) = topic_id(asked.consumer(), asked.topic(), REQUEST_TIMEOUT)
                .map_err(|error| format!("topic {}: {error}", asked.topic()))?;
            let cluster_id = asked
                .consumer()
                .client()
                .fetch_cluster_id(REQUEST_TIMEOUT)
                .ok_or_else(|| "the cluster does not tell its id".to_owned())?;
            Ok::<_, String>(Found { topic_id, cluster_id, partitions })
        })
        .await;
        match answer {
            Ok(Ok(found)) => {
                breaker.succeeded();
                metrics::breaker_at_start("broker", false);
                board.probed(None, Some(Dependency::Up));
                metrics::input_partitions(found.partitions);
                return Ok(found);
            }
            Ok(Err(message)) => {
                group.listen();
                let refusal = board.broker_refusal();
                let class = if refusal.is_some() { FailureClass::Systemic } else { FailureClass::Passing };
                let message = refusal.unwrap_or(message);
                breaker.failed(class, "asking for the input topic", &message);
                metrics::breaker_at_start("broker", true);
                board.probed(None, Some(Dependency::Down(message)));
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
    board: &Board,
) -> Result<(), RunError> {
    let wanted = Binding {
        group_id: settings.kafka.group_id.clone(),
        cluster_id: found.cluster_id.clone(),
        topic: settings.kafka.input_topic.clone(),
        topic_id: found.topic_id,
        publishes: settings.kafka.publish,
    };
    let mut breaker = Breaker::new("database", 0);
    loop {
        let message = match endpoint.connect().await {
            Ok((mut client, _driver)) => {
                match binding::bind(&mut client, &wanted, options.adopt_database).await {
                    Ok(()) => {
                        breaker.succeeded();
                        metrics::breaker_at_start("database", false);
                        board.probed(Some(Dependency::Up), None);
                        return Ok(());
                    }
                    Err(BindingError::Identity(doubt)) => return Err(doubt.into()),
                    Err(error @ BindingError::Database(_)) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        breaker.failed(FailureClass::Passing, "binding the database to the group", &message);
        metrics::breaker_at_start("database", true);
        board.probed(Some(Dependency::Down(message)), None);
        sleep_until(breaker.due_at()).await;
    }
}

/// Makes the payment tables' months ahead of time. Without them rows go to the default partitions: no
/// failure here stops anything.
#[derive(Default)]
struct MonthsKeeper {
    has_told: bool,
}

impl MonthsKeeper {
    /// One try; returns how long to wait for the next.
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
                        "detached months of the payment tables: archive and drop them when you like"
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
            config: consumer_config(&settings.kafka),
            group_id: settings.kafka.group_id.clone(),
            instance_id: settings.kafka.instance_id.clone(),
            partitions: self.found.partitions,
        };
        let mut ended = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => Ok(()),
            ended = self.lanes.join_next() => Err(lane_end(ended)),
            ended = member_end(&mut self.member_end) => Err(ended),
            doubt = watch_topic(&self.group, self.found.topic_id, &self.suspicion, &self.board) => {
                Err(doubt.into())
            }
            () = orphans::watch(&self.group, &membership) => Ok(()),
            () = watch_ends(&self.group, &self.board) => Ok(()),
            () = watch_retention(&self.group) => Ok(()),
            () = watch_database(settings.postgres.url.endpoint(), &self.board) => Ok(()),
            () = schedule::run(settings) => Ok(()),
            caught_up = catch_up(&self.group, &self.board, self.found.partitions, options) => caught_up,
        };
        if let Err(error) = &ended {
            tracing::error!(%error, "stopping");
        } else {
            tracing::info!("draining");
        }
        let deadline = Instant::now() + settings.shutdown.timeout;
        for seat in &self.seats {
            // A lane that is gone needs no drain.
            let _ = tokio::time::timeout_at(deadline, seat.events.send(LaneEvent::Drain)).await;
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
        let totals = self.board.totals();
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

fn lane_end(ended: Option<Result<Result<(), IdentityDoubt>, tokio::task::JoinError>>) -> RunError {
    match ended {
        Some(Ok(Err(doubt))) => doubt.into(),
        Some(Ok(Ok(()))) | None => RunError::Failed("a lane ended by itself".to_owned()),
        Some(Err(error)) => RunError::Failed(format!("a lane failed: {error}")),
    }
}

async fn member_end(end: &mut watch::Receiver<Option<MemberEnd>>) -> RunError {
    match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
        Ok(Some(MemberEnd::Identity(doubt))) => doubt.into(),
        Ok(Some(MemberEnd::Fatal(reason))) => {
            RunError::Failed(format!("the Kafka consumer gave up: {reason}"))
        }
        Ok(None) | Err(_) => RunError::Failed("the Kafka consumer's thread ended".to_owned()),
    }
}

/// Asks for the topic's id again and again; returns when it is another one.
async fn watch_topic(group: &Group, expected: Uuid, suspicion: &Notify, board: &Board) -> IdentityDoubt {
    loop {
        // Errors wake it up early, but never more often than once a second.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let _ = tokio::time::timeout(TOPIC_CHECK, suspicion.notified()).await;
        let asked = group.clone();
        let answer =
            tokio::task::spawn_blocking(move || topic_id(asked.consumer(), asked.topic(), REQUEST_TIMEOUT));
        match answer.await {
            Ok(Ok((found, _))) if found != expected => {
                return IdentityDoubt::OtherTopic { marked: expected, found };
            }
            Ok(Ok((_, partitions))) => {
                board.probed(None, Some(Dependency::Up));
                metrics::input_partitions(partitions);
            }
            Ok(Err(error)) => {
                board.probed(None, Some(Dependency::Down(format!("asking for the input topic: {error}"))));
            }
            Err(_) => {}
        }
    }
}

/// Keeps the ends of the log on the board, for lag. Never returns.
async fn watch_ends(group: &Group, board: &Board) {
    let mut tick = interval(ENDS_TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let partitions: Vec<Partition> = board.partitions().into_keys().collect();
        if partitions.is_empty() {
            continue;
        }
        let asked = group.clone();
        // From before the answer: what came since is not in it.
        let asked_at = metrics::now();
        let answer = tokio::task::spawn_blocking(move || {
            log_ends(&asked, &partitions).map(|ends| partitions.into_iter().zip(ends).collect::<Vec<_>>())
        });
        match answer.await {
            Ok(Ok(ends)) => {
                board.ends(asked_at, ends.into_iter());
                board.probed(None, Some(Dependency::Up));
            }
            Ok(Err(error)) => board.probed(None, Some(Dependency::Down(error.to_string()))),
            Err(_) => {}
        }
    }
}

/// Keeps the input topic's retention in the metrics, for alerts on what is about to be lost. Without the right
/// to ask, the metric is absent. Never returns.
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
            // -1: unlimited.
            Ok(Ok(ms)) => metrics::input_retention(ms.parse().ok().map(Duration::from_millis)),
            Ok(Err(error)) => tracing::debug!(%error, "the input topic's retention is not told"),
            Err(_) => {}
        }
    }
}

/// Keeps on the board whether the database answers, also when no lane has anything to ask. Never returns.
async fn watch_database(endpoint: &Endpoint, board: &Board) {
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
                    board.probed(Some(Dependency::Down(error.to_string())), None);
                    continue;
                }
            },
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, client.batch_execute("SELECT 1")).await {
            Ok(Ok(())) => {
                board.probed(Some(Dependency::Up), None);
                session = Some(client);
            }
            Ok(Err(error)) => {
                board.probed(Some(Dependency::Down(crate::postgres::describe(&error))), None);
            }
            Err(_) => board.probed(Some(Dependency::Down("no answer in time".to_owned())), None),
        }
    }
}

/// Returns once every partition's group offset has reached the end that it had at the start.
async fn catch_up(
    group: &Group,
    board: &Board,
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
            // An empty partition has nothing to be caught up with.
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
        let assigned = board.partitions();
        targets.retain(|partition, target| {
            // In a database that was restored or replaced, rows have yet to reach what was published.
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
                "caught up, except for {} halted partition(s); payment-writer cursors show tells more",
                targets.len()
            )));
        }
    }
}
