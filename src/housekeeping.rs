//! Housekeeping: rotation and pruning of the idempotency generations, months of the payment tables.
//!
//! One pass does all of it, in the daemon on its schedule or by `payment-writer prune`; an advisory lock makes
//! it one pass at a time over all of them. Every step is a transaction of its own that leaves a state in
//! `idempotency_generation`, so what a crash interrupts the next pass finishes. Nothing here is waited for by
//! a writer for longer than [`generations::LOCK_TIMEOUT_MS`].

pub mod generations;
pub mod horizon;
pub mod schedule;

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use tokio_postgres::Client;

use self::generations::{Generation, State, Step};
use self::horizon::{Hold, Horizon, PartitionTime, goes_at, horizon, log_time};
use crate::binding;
use crate::cli::Failure;
use crate::config::Settings;
use crate::cursor::{Decision, Mode};
use crate::failpoint;
use crate::kafka::peek::{Peeked, peek};
use crate::metrics;
use crate::record::{Partition, TimestampMs};
use crate::schema::locks::{self, LockKey};
use crate::schema::months::{self, MonthsReport};
use crate::schema::{SchemaError, doing};
use crate::settlement;

/// A pass that leaves a generation that will be due within this time is not the last one for a week.
const DUE_SOON: Duration = Duration::from_secs(2 * 3_600);
/// Reading one record of each partition that lags.
const PEEK_LIMIT: Duration = Duration::from_secs(15);
/// A generation is left for a new one when it is this share of the window old: a weekly pass with a window of
/// a week rotates every time, though it starts a little earlier than the week before.
const ROTATE_AT: f64 = 6.0 / 7.0;
/// Rows of the audit trail that are kept.
const PASSES_KEPT: i64 = 1_000;

/// Why a pass did not come to its end. The next one goes on where it stopped.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The database failed.
    #[error(transparent)]
    Database(#[from] SchemaError),
    /// Connecting failed.
    #[error("{0}")]
    Connect(#[from] crate::postgres::ConnectError),
    /// The broker could not be asked, or a person must decide.
    #[error("the positions in the log are not known, so nothing was pruned: {0}")]
    Log(#[source] Failure),
}

/// What is done with one generation, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Claims go there.
    Current,
    /// Waits for the next rotation.
    Ready,
    /// Dropped, or about to be in a dry run.
    Goes,
    /// Its youngest record has not passed the horizon by the window: not before this.
    TooYoung(TimestampMs),
    /// The horizon is not known.
    Held(Hold, Partition),
    /// Not measured yet, as in a dry run after a rotation.
    Unmeasured,
    /// Another session uses its table.
    Locked(State),
}

/// A moment for people, to the second.
pub fn time(at: TimestampMs) -> String {
    jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| at.0.to_string(), |t| format!("{t:.0}"))
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Current => f.write_str("stays: claims go there"),
            Self::Ready => f.write_str("stays: waits for the next rotation"),
            Self::Goes => f.write_str("goes"),
            Self::TooYoung(at) => {
                write!(f, "stays: may go when every partition is published beyond {}", time(*at))
            }
            Self::Held(why, partition) => write!(f, "stays: partition {partition} {why}"),
            Self::Unmeasured => f.write_str("stays: its youngest record is not known yet"),
            Self::Locked(state) => {
                write!(f, "stays, {state}: another session uses its table; the next pass goes on")
            }
        }
    }
}

/// What a pass did, or in a dry run would do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PassReport {
    /// Another pass was under way; this one did nothing.
    pub is_busy: bool,
    /// Nothing was changed.
    pub is_dry_run: bool,
    /// Number of the new current generation.
    pub rotated_to: Option<i64>,
    /// The current generation is old enough, but batches held the lock all the time, or it is a dry run.
    pub rotation_waits: bool,
    /// Each generation as it was, and what was decided.
    pub generations: Vec<(Generation, Verdict)>,
    /// The horizon; `None` when there was no older generation to hold against it.
    pub horizon: Option<(TimestampMs, Option<Partition>)>,
    /// Months of the payment tables.
    pub months: MonthsReport,
    /// Why the months could not be seen to. Nothing else waits for them.
    pub months_error: Option<String>,
    /// In a dry run, rows in the payment tables' default partitions, counted up to a limit.
    pub default_rows: i64,
    /// How long it took.
    pub took: Duration,
}

impl PassReport {
    /// Whether a later try could do more before the next scheduled pass.
    pub fn is_complete(&self) -> bool {
        let soon = i64::try_from(DUE_SOON.as_millis()).unwrap_or(i64::MAX);
        let waits = |v: &Verdict| match v {
            Verdict::Held(..) | Verdict::Locked(_) | Verdict::Unmeasured => true,
            Verdict::TooYoung(goes_at) => self.horizon.is_some_and(|(at, _)| goes_at.0 - at.0 <= soon),
            Verdict::Current | Verdict::Ready | Verdict::Goes => false,
        };
        !self.is_busy
            && !self.rotation_waits
            && self.months.waiting.is_empty()
            && self.months_error.is_none()
            && !self.generations.iter().any(|(_, verdict)| waits(verdict))
    }

    /// The generations that went, or would go.
    pub fn gone(&self) -> impl Iterator<Item = &Generation> {
        self.generations.iter().filter(|(_, v)| *v == Verdict::Goes).map(|(g, _)| g)
    }

    fn detail(&self) -> serde_json::Value {
        json!({
            "rotated_to": self.rotated_to,
            "dropped": self.gone().map(|g| g.number).collect::<Vec<_>>(),
            "dropped_rows": self.gone().map(|g| g.rows).sum::<i64>(),
            "dropped_bytes": self.gone().map(|g| g.bytes).sum::<i64>(),
            "kept": self.generations.iter().filter(|(_, v)| *v != Verdict::Goes)
                .map(|(g, v)| json!({"generation": g.number, "why": v.to_string()})).collect::<Vec<_>>(),
            "horizon_ms": self.horizon.map(|(at, _)| at.0),
            "slowest_partition": self.horizon.and_then(|(_, slowest)| slowest).map(|p| p.0),
            "months_made": self.months.made,
            "months_archived": self.months.archived,
            "rows_moved": self.months.moved,
            "months_error": self.months_error,
        })
    }
}

/// Log time of every partition, from both cursors and the log itself.
///
/// # Errors
/// When the broker or the database cannot be asked, or an identity is in doubt.
pub async fn partition_times(settings: &Settings) -> Result<Vec<(Partition, PartitionTime)>, Failure> {
    let view = settlement::view(settings).await?;
    let (client, _driver) = settings
        .postgres
        .url
        .endpoint()
        .connect()
        .await
        .map_err(|error| Failure::failed(error.to_string()))?;
    // Another cluster or group would make up a horizon that says nothing of this database.
    binding::is_bound_to(&client, &settings.kafka.group_id, view.identity.topic_id, settings.kafka.publish)
        .await
        .map_err(|error| Failure::person_must_decide(error.to_string()))?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    let (mut times, mut positions) = (Vec::new(), Vec::new());
    for (index, known) in view.known.iter().enumerate() {
        let partition = known.partition;
        match view.decision(index, &mode) {
            Some(Decision::Go(start)) => {
                let row = known.row.as_ref().filter(|row| row.applied == start.from);
                positions.push((partition, start.from, row.and_then(|row| row.applied_timestamp)));
            }
            Some(Decision::Prove { from }) => positions.push((partition, from, None)),
            Some(Decision::Halt(doubt)) => {
                times.push((partition, PartitionTime::Unknown(Hold::Halted(doubt))))
            }
            Some(Decision::Stop(doubt)) => return Err(Failure::person_must_decide(doubt.to_string())),
            None => {}
        }
    }
    let wanted: Vec<_> = positions.iter().map(|(partition, position, _)| (*partition, *position)).collect();
    let kafka = settings.kafka.clone();
    let peeked = tokio::task::spawn_blocking(move || peek(&kafka, &kafka.input_topic, &wanted, PEEK_LIMIT))
        .await
        .map_err(|error| Failure::failed(error.to_string()))?
        .map_err(|error| Failure::failed(format!("reading records at the cursors: {error}")))?;
    for (partition, _, before) in positions {
        let time = match peeked.get(&partition) {
            None => PartitionTime::Unknown(Hold::Unread),
            Some(Peeked::End) => PartitionTime::CaughtUp,
            Some(Peeked::Record(at)) => match log_time(before, *at) {
                Some(at) => PartitionTime::At(at),
                None => PartitionTime::Unknown(Hold::NoTimestamp),
            },
        };
        times.push((partition, time));
    }
    times.sort_by_key(|(partition, _)| *partition);
    Ok(times)
}

/// Now, by the earlier of the database's clock and ours: a clock that is ahead must not let anything go early.
async fn now(client: &Client) -> Result<TimestampMs, SchemaError> {
    let theirs: i64 = client
        .query_one("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint", &[])
        .await
        .map_err(doing("cannot read the database's clock"))?
        .get(0);
    Ok(TimestampMs(theirs).min(metrics::now()))
}

/// The horizon as it stands.
///
/// # Errors
/// As [`partition_times`], and when the database cannot be asked for the time.
pub async fn current_horizon(client: &Client, settings: &Settings) -> Result<Horizon, PassError> {
    let now = now(client).await?;
    let times = partition_times(settings).await.map_err(PassError::Log)?;
    Ok(horizon(now, &times))
}

/// One pass: finishes what an earlier one left, rotates, prunes, and sees to the months.
///
/// # Errors
/// See [`PassError`]. What was done until then is done; the next pass goes on from there.
pub async fn pass(settings: &Settings, is_dry_run: bool) -> Result<PassReport, PassError> {
    let (mut client, _driver) = settings.postgres.housekeeping_url.endpoint().connect().await?;
    crate::schema::check(&client).await?;
    let began = (Instant::now(), SystemTime::now());
    let locked: bool = client
        .query_one("SELECT pg_try_advisory_lock($1, $2)", &[&locks::CLASS, &LockKey::Prune.number()])
        .await
        .map_err(doing("cannot take the lock for pruning"))?
        .get(0);
    if !locked {
        return Ok(PassReport { is_busy: true, is_dry_run, ..PassReport::default() });
    }
    // Released with the session, however this ends.
    let mut report = PassReport { is_dry_run, ..PassReport::default() };
    if is_dry_run {
        report.default_rows = months::default_rows(&client).await?;
        weigh(&client, settings, &mut report).await?;
        report.took = began.0.elapsed();
        return Ok(report);
    }
    make_ready(&client).await?;
    rotate_when_due(&client, settings, &mut report).await?;
    // Ahead of time: the next rotation is to be a flip of a row, whenever it comes.
    make_ready(&client).await?;
    measure_closed(&mut client).await?;
    let weighed = weigh(&client, settings, &mut report).await;
    if weighed.is_err() {
        // What an earlier pass began needs no horizon any more.
        report.generations = begun(&client).await?;
    }
    remove(&client, &mut report.generations).await?;
    match months::keep(&mut client, settings.retention.payment_months).await {
        Ok(months) => report.months = months,
        Err(error) => report.months_error = Some(error.to_string()),
    }
    report.took = began.0.elapsed();
    record(&client, &report, weighed.is_ok() && report.is_complete(), began.1).await?;
    weighed.map(|()| report)
}

/// Generations that an earlier pass has retired or detached.
async fn begun(client: &Client) -> Result<Vec<(Generation, Verdict)>, SchemaError> {
    let generations = generations::list(client).await?.into_iter();
    Ok(generations
        .filter(|g| matches!(g.state, State::Retired | State::Detached))
        .map(|g| (g, Verdict::Goes))
        .collect())
}

async fn make_ready(client: &Client) -> Result<(), SchemaError> {
    let row = client
        .query_one(
            "SELECT max(generation) + 1, count(*) FILTER (WHERE state = 'ready')
             FROM payment_writer.idempotency_generation",
            &[],
        )
        .await
        .map_err(doing("cannot read the generations"))?;
    if row.get::<_, i64>(1) == 0 {
        generations::make(client, row.get(0)).await?;
    }
    Ok(())
}

fn rotation_due(generations: &[Generation], window: Duration) -> Option<(i64, Option<i64>)> {
    let current = generations.iter().find(|g| g.state == State::Current)?;
    let is_old = current.age.is_some_and(|age| age >= window.mul_f64(ROTATE_AT));
    let next = generations.iter().find(|g| g.state == State::Ready).map(|g| g.number);
    is_old.then_some((current.number, next))
}

async fn rotate_when_due(
    client: &Client,
    settings: &Settings,
    report: &mut PassReport,
) -> Result<(), SchemaError> {
    let generations = generations::list(client).await?;
    let Some((current, next)) = rotation_due(&generations, settings.idempotency.window) else {
        return Ok(());
    };
    let is_empty = client
        .query_one(&format!("SELECT NOT EXISTS (SELECT FROM payment_writer.idempotency_g{current})"), &[])
        .await
        .map_err(doing("cannot look into the current generation"))?
        .get(0);
    if is_empty {
        return Ok(());
    }
    match next {
        Some(next) if generations::rotate(client, current, next).await? == Step::Done => {
            report.rotated_to = Some(next);
        }
        _ => report.rotation_waits = true,
    }
    Ok(())
}

async fn measure_closed(client: &mut Client) -> Result<(), SchemaError> {
    for generation in generations::list(client).await? {
        if generation.state == State::Older && generation.youngest.is_none() {
            generations::measure(client, &generation).await?;
        }
    }
    Ok(())
}

/// Decides about each generation, and changes nothing.
async fn weigh(client: &Client, settings: &Settings, report: &mut PassReport) -> Result<(), PassError> {
    let window = settings.idempotency.window;
    let generations = generations::list(client).await?;
    if report.is_dry_run {
        report.rotation_waits = rotation_due(&generations, window).is_some();
    }
    let has_older = generations.iter().any(|g| g.state == State::Older);
    let horizon = if has_older { Some(current_horizon(client, settings).await?) } else { None };
    if let Some(Horizon::At(at, slowest)) = &horizon {
        report.horizon = Some((*at, *slowest));
    }
    report.generations = generations
        .into_iter()
        .map(|generation| {
            let verdict = match (generation.state, generation.youngest, &horizon) {
                (State::Current, ..) => Verdict::Current,
                (State::Ready, ..) => Verdict::Ready,
                (State::Retired | State::Detached, ..) => Verdict::Goes,
                (State::Older, None, _) | (State::Older, _, None) => Verdict::Unmeasured,
                (State::Older, Some(_), Some(Horizon::Held { partition, why, .. })) => {
                    Verdict::Held(why.clone(), *partition)
                }
                (State::Older, Some(youngest), Some(Horizon::At(at, _))) => {
                    let goes_at = goes_at(youngest, window);
                    if goes_at < *at { Verdict::Goes } else { Verdict::TooYoung(goes_at) }
                }
            };
            (generation, verdict)
        })
        .collect();
    Ok(())
}

async fn remove(client: &Client, generations: &mut [(Generation, Verdict)]) -> Result<(), SchemaError> {
    for (generation, verdict) in generations {
        if *verdict != Verdict::Goes {
            continue;
        }
        if generation.state == State::Older {
            if generations::retire(client, generation.number).await? == Step::Locked {
                *verdict = Verdict::Locked(generation.state);
                continue;
            }
            generation.state = State::Retired;
            failpoint::hit("after_retire");
        }
        if generation.state == State::Retired {
            if generations::detach(client, generation).await? == Step::Locked {
                *verdict = Verdict::Locked(generation.state);
                continue;
            }
            generation.state = State::Detached;
            failpoint::hit("after_detach");
        }
        if generations::drop_table(client, generation).await? == Step::Locked {
            *verdict = Verdict::Locked(generation.state);
        }
    }
    Ok(())
}

async fn record(
    client: &Client,
    report: &PassReport,
    is_complete: bool,
    began: SystemTime,
) -> Result<(), SchemaError> {
    client
        .execute(
            "WITH pass AS (
                 INSERT INTO payment_writer.housekeeping_pass (started_at, is_complete, detail)
                 VALUES ($1, $2, $3) RETURNING id
             )
             DELETE FROM payment_writer.housekeeping_pass p USING pass WHERE p.id <= pass.id - $4",
            &[&began, &is_complete, &report.detail(), &PASSES_KEPT],
        )
        .await
        .map_err(doing("cannot record the pass"))?;
    Ok(())
}
