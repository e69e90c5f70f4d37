//! The daemon: checks its identity, starts the lanes, supervises them, and drains.

mod catch_up;
mod reload;
mod startup;
mod watchers;

use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use self::catch_up::Targets;
pub use self::reload::{OnHangup, Reload};
use self::startup::Found;
use crate::audit::{self, Audit};
use crate::config::Settings;
use crate::domain::cursor::{Identity, IdentityMismatch, Mode};
use crate::error::CommandError;
use crate::housekeeping::months::MonthsKeeper;
use crate::housekeeping::schedule;
use crate::kafka::client::{CLIENT_MAX, creating};
use crate::kafka::group::{Group, LaneHandle, MemberEnd};
use crate::kafka::lane_client::LaneClient;
use crate::kafka::token::first_token;
use crate::kafka::unassigned;
use crate::lane::{Lane, LaneSettings};
use crate::ports::LaneEvent;
use crate::postgres::store::PgStore;
use crate::telemetry::metrics;
use crate::telemetry::status::{Dependency, StatusRegistry};
use crate::telemetry::trace::BatchTracer;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The time limit of a drain before all clients are made anew: the former ones may not work any more.
const RELOAD_DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long the process waits for the end of its former member before it joins again.
const MEMBER_END_WAIT: Duration = Duration::from_secs(5);
/// Queue length of a lane's events; the group's thread waits when it is full.
const LANE_EVENTS_MAX: usize = 64;

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
    /// The daemon starts again, which takes the partitions over anew.
    #[error("the group removed this member, and took it in again as another one")]
    Replaced,
}

impl From<RunError> for CommandError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Failed(_) | RunError::Replaced => Self::failed(error.to_string()),
            RunError::Identity(mismatch) => Self::person_must_decide(mismatch.to_string()),
            RunError::Halted(message) => Self::person_must_decide(message),
        }
    }
}

/// The arguments of [`run`].
#[derive(Clone, Copy)]
struct Daemon<'d> {
    settings: &'d Settings,
    options: RunOptions,
    status: &'d Arc<StatusRegistry>,
    tracer: Option<&'d Arc<BatchTracer>>,
    /// Whether this process has not tried to start before.
    is_first: bool,
}

/// Runs until `stop` is set, until caught up, or until it cannot continue. Starts again when `reload` is due, and tells
/// `in_use` with which settings.
///
/// # Errors
/// See [`RunError`]. Being fenced is an error, except once after each loss of the broker connection: a second
/// fencing means that another process uses the same `instance_id`.
pub async fn run(
    options: RunOptions,
    status: Arc<StatusRegistry>,
    tracer: Option<&Arc<BatchTracer>>,
    mut stop: watch::Receiver<bool>,
    mut reload: Reload,
    in_use: &watch::Sender<Settings>,
) -> Result<(), RunError> {
    let mut is_first = true;
    // Where the cursors lead since the first start: what is reloaded later must lead there, too.
    let mut identity: Option<Identity> = None;
    let mut targets = None;
    loop {
        let settings = &reload.begin().await;
        in_use.send_replace(settings.clone());
        let daemon = Daemon { settings, options, status: &status, tracer, is_first };
        is_first = false;
        status.waits(metrics::now());
        let started = tokio::select! {
            started = daemon.start() => started,
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
            () = reload.due(identity.as_ref()) => continue,
        };
        let mut member = Weak::new();
        let ended = match started {
            Ok(running) => {
                member = Arc::downgrade(running.group.consumer());
                identity = Some(running.identity.clone());
                running.supervise(&mut stop, &mut reload, &mut targets).await
            }
            Err(error) => Err(error),
        };
        match &ended {
            Ok(End::Reload) => {}
            Err(error) if is_joined_again(error, &status, &stop) => {
                let reason = match error {
                    RunError::Replaced => "replaced as a member after the broker connection was lost",
                    _ => "fenced soon after the broker connection was lost, possibly by its own request",
                };
                tracing::warn!(instance = settings.kafka.instance_id, reason, "joining again");
            }
            _ => return ended.map(drop),
        }
        ended_in_time(&member).await;
        status.left(metrics::now());
        metrics::lanes_left(settings.lanes);
    }
}

/// Waits for the end of the process's former member, within [`MEMBER_END_WAIT`]: while it lives, its heartbeats go on,
/// and a join request of it that arrives after the next member's would fence that one.
async fn ended_in_time<T>(member: &Weak<T>) {
    let deadline = Instant::now() + MEMBER_END_WAIT;
    while member.strong_count() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether the daemon starts again after this error: the member was replaced, or fenced, possibly by a request of its
/// own.
fn is_joined_again(error: &RunError, status: &StatusRegistry, stop: &watch::Receiver<bool>) -> bool {
    let is_excused = match error {
        RunError::Replaced => true,
        RunError::Identity(IdentityMismatch::InstanceTaken { .. }) => status.was_fenced_after_loss(),
        _ => false,
    };
    is_excused && !*stop.borrow()
}

/// How the daemon ended by a drain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Stop,
    Reload,
}

struct RunningDaemon<'d> {
    daemon: Daemon<'d>,
    group: Group,
    member_end: watch::Receiver<Option<MemberEnd>>,
    handles: Vec<LaneHandle>,
    lanes: JoinSet<Result<(), IdentityMismatch>>,
    identity: Identity,
    found: Found,
    suspicion: Arc<Notify>,
    months: MonthsKeeper<'d>,
    _audit: Option<Audit>,
}

impl<'d> Daemon<'d> {
    async fn start(self) -> Result<RunningDaemon<'d>, RunError> {
        let Self { settings, options, status, tracer, .. } = self;
        let kafka = &settings.kafka;
        let endpoint = &settings.postgres.url;
        for dependency in ["database", "broker"] {
            metrics::breaker_at_start(dependency, false);
        }
        if !endpoint.ignored.is_empty() {
            tracing::warn!(
                detail = endpoint.ignored.join(", "),
                "parameters of postgres.url without an effect"
            );
        }
        let database_id = self.database_ready().await?;
        let (mut receivers, mut handles) = (Vec::new(), Vec::new());
        for _ in 0..settings.lanes {
            let (events, receiver) = mpsc::channel(LANE_EVENTS_MAX);
            handles.push(LaneHandle { events, unhandled_revocations: Arc::new(AtomicI64::new(0)) });
            receivers.push(receiver);
        }
        let with_token = kafka.clone();
        // A client reports the failure.
        let _ = creating(CLIENT_MAX, move || first_token(&with_token)).await;
        let (group, member_end) = self.member(&handles).await?;
        let found = self.broker_ready(&group).await?;
        let identity = Identity { topic_id: found.topic_id, database_id };
        self.bind(&found).await?;
        // Before the first row, so that no row goes to a default partition because its month is missing.
        let months = MonthsKeeper::start(settings).await;

        // One session per lane, plus one to replace a broken one that the server still counts.
        let pool = endpoint
            .pool(settings.lanes.saturating_mul(2))
            .map_err(|error| RunError::Failed(error.to_string()))?;
        let rules = Arc::new(settings.rules());
        let suspicion = Arc::new(Notify::new());
        let mut lanes = JoinSet::new();
        let publishers = self.publishers(&identity).await?;
        for (index, ((handle, receiver), publisher)) in
            handles.iter().zip(receivers).zip(publishers).enumerate()
        {
            let publication_max = publisher.deadline;
            let client = LaneClient::new(group.clone(), publisher, handle, Arc::clone(&suspicion));
            let waiting = Arc::clone(status);
            let store = PgStore::new(pool.clone(), kafka.input_topic.clone(), identity.clone())
                .telling(move |reason| waiting.database(index, Dependency::Down(reason)));
            let lane_settings = LaneSettings {
                index,
                rules: Arc::clone(&rules),
                input_topic: kafka.input_topic.clone(),
                identity: identity.clone(),
                mode: Mode { publishes: kafka.publish, adopts_database: options.adopt_database },
                batch_payments_max: settings.batch.max_payments,
                batch_bytes_max: settings.batch.max_bytes,
                linger: settings.batch.linger,
                publication_max,
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
        Ok(RunningDaemon {
            daemon: self,
            group,
            member_end,
            handles,
            lanes,
            identity,
            found,
            suspicion,
            months,
            _audit: audit,
        })
    }
}

impl RunningDaemon<'_> {
    async fn supervise(
        mut self,
        stop: &mut watch::Receiver<bool>,
        reload: &mut Reload,
        targets: &mut Option<Targets>,
    ) -> Result<End, RunError> {
        let Daemon { settings, options, status, .. } = self.daemon;
        let mut ended = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => Ok(End::Stop),
            () = reload.due(Some(&self.identity)) => Ok(End::Reload),
            ended = self.lanes.join_next() => Err(lane_end(ended)),
            ended = member_end(&mut self.member_end) => Err(ended),
            mismatch = watchers::topic(&self.group, self.found.topic_id, &self.suspicion, status) => {
                Err(mismatch.into())
            }
            () = unassigned::watch(&self.group, self.found.partitions) => Ok(End::Stop),
            () = watchers::readiness(&self.group, status) => Ok(End::Stop),
            () = watchers::ends(&self.group, status) => Ok(End::Stop),
            () = watchers::outputs(&self.group) => Ok(End::Stop),
            () = watchers::topic_settings(&self.group) => Ok(End::Stop),
            () = watchers::database(&settings.postgres.url, status) => Ok(End::Stop),
            () = schedule::run(settings) => Ok(End::Stop),
            () = self.months.run() => Ok(End::Stop),
            caught_up = catch_up::caught_up(&self.group, status, self.found.partitions, targets),
                if options.until_caught_up => caught_up.map(|()| End::Stop),
        };
        match &ended {
            Err(error) if is_joined_again(error, status, stop) => {
                tracing::warn!(%error, "draining, to join again");
            }
            Err(error) => tracing::error!(%error, "stopping"),
            Ok(End::Reload) => tracing::info!("draining, to make all connections anew"),
            Ok(End::Stop) => tracing::info!("draining"),
        }
        let is_reload = matches!(ended, Ok(End::Reload));
        let limit = match is_reload {
            true => settings.shutdown.timeout.min(RELOAD_DRAIN_MAX),
            false => settings.shutdown.timeout,
        };
        let deadline = Instant::now() + limit;
        for handle in &self.handles {
            // A lane that has ended needs no drain.
            let _ = tokio::time::timeout_at(deadline, handle.events.send(LaneEvent::Drain)).await;
        }
        let drained = async {
            while let Some(end) = self.lanes.join_next().await {
                if ended.is_ok() && !matches!(end, Ok(Ok(()))) {
                    ended = Err(lane_end(Some(end)));
                }
            }
        };
        if tokio::time::timeout_at(deadline, drained).await.is_err() && ended.is_ok() {
            if is_reload {
                tracing::warn!(
                    seconds = limit.as_secs_f64(),
                    "not drained in time before the reload; what was in flight is read again, nothing is lost"
                );
            } else {
                tracing::warn!(
                    "not drained within shutdown.timeout; what was in flight is redelivered to the next daemon, nothing \
                     is lost"
                );
            }
        }
        self.group.close();
        let is_end = match &ended {
            Err(error) => !is_joined_again(error, status, stop),
            Ok(end) => *end == End::Stop,
        };
        let totals = status.totals();
        tracing::info!(
            written = totals.written,
            duplicates = totals.duplicates,
            dead_letters = totals.dead_letters,
            redelivered = totals.redelivered,
            "{}",
            if is_end { "stopped" } else { "the lanes have ended, starting again" }
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
        Ok(Some(MemberEnd::Replaced)) => RunError::Replaced,
        Ok(Some(MemberEnd::Identity(mismatch))) => mismatch.into(),
        Ok(Some(MemberEnd::Fatal(reason))) => {
            RunError::Failed(format!("the Kafka consumer failed: {reason}"))
        }
        Ok(None) | Err(_) => RunError::Failed("the Kafka consumer's thread ended unexpectedly".to_owned()),
    }
}

/// Runs a blocking request to the broker on another thread.
async fn ask<T: Send + 'static>(
    group: &Group,
    request: impl FnOnce(&Group) -> T + Send + 'static,
) -> Result<T, JoinError> {
    let group = group.clone();
    tokio::task::spawn_blocking(move || request(&group)).await
}

fn ticks(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_next_member_waits_for_the_end_of_the_former_one_but_not_forever() {
        let member = Arc::new(());
        let (held, began) = (Arc::downgrade(&member), Instant::now());
        ended_in_time(&held).await;
        let limit = MEMBER_END_WAIT..2 * MEMBER_END_WAIT;
        assert!(limit.contains(&began.elapsed()), "{:?}", began.elapsed());
        let soon = Duration::from_secs(1);
        tokio::spawn(async move {
            tokio::time::sleep(soon).await;
            drop(member);
        });
        let began = Instant::now();
        ended_in_time(&held).await;
        assert!((soon..MEMBER_END_WAIT).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert_eq!(held.strong_count(), 0);
    }
}
