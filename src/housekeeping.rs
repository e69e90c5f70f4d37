//! Housekeeping: rotates and prunes the idempotency generations and maintains the monthly partitions of the
//! payment tables.
//!
//! One pass does all of it, in the daemon on schedule or with `payment-writer prune`; an advisory lock allows
//! one pass at a time per database. Every step is its own transaction that stores a state in
//! `idempotency_generation`, so the next pass finishes what a crash interrupted. A writer waits for
//! housekeeping at most [`generations::LOCK_TIMEOUT_MS`] at a time.

pub mod generations;
pub mod horizon;
mod pass_metrics;
pub mod schedule;

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use tokio_postgres::Client;

use self::generations::{Generation, State, Step};
use self::horizon::{Hold, Horizon, PartitionTime, goes_at, horizon, log_time};
use crate::config::Settings;
use crate::domain::cursor::{Decision, Mode};
use crate::domain::record::{Partition, TimestampMs};
use crate::error::CommandError;
use crate::failpoint;
use crate::kafka::timestamp_lookup::{FirstTimestamp, first_timestamps};
use crate::postgres::binding;
use crate::postgres::schema::locks::{self, LockKey};
use crate::postgres::schema::months::{self, MonthsReport};
use crate::postgres::schema::{SchemaError, doing};
use crate::resolution;
use crate::telemetry::metrics;

/// A pass is incomplete if a generation can be dropped within this time.
const DUE_SOON: Duration = Duration::from_secs(2 * 3_600);
/// Time limit for reading one record of each lagging partition.
const PEEK_LIMIT: Duration = Duration::from_secs(15);
/// A generation is rotated when its age reaches this share of the window. With a weekly schedule and a window
/// of one week, every pass rotates, even if it starts a little earlier than the week before.
const ROTATE_AT: f64 = 6.0 / 7.0;
/// Rows of `housekeeping_pass` that are kept.
const PASSES_KEPT: i64 = 1_000;

/// Why a pass did not finish. The next one continues where it stopped.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The database failed.
    #[error(transparent)]
    Database(#[from] SchemaError),
    /// The database cannot be reached.
    #[error("{0}")]
    Connect(#[from] crate::postgres::connection::ConnectError),
    /// The broker could not be queried, or an operator must decide.
    #[error("the horizon is unknown, so nothing was pruned: {0}")]
    Log(#[source] CommandError),
}

/// What a pass does with one generation, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Kept: batches write their claims to it.
    Current,
    /// Kept: created for the next rotation.
    Ready,
    /// Dropped, or in a dry run to be dropped.
    Goes,
    /// Kept: its youngest record is within the window; it can be dropped when the horizon is past this time.
    TooYoung(TimestampMs),
    /// Kept: the horizon is unknown because of this partition.
    Held(Hold, Partition),
    /// Kept: not measured yet, as in a dry run after a rotation.
    Unmeasured,
    /// Kept: another session uses its table.
    Locked(State),
}

/// Formats a time in seconds precision, for display.
pub fn time(at: TimestampMs) -> String {
    jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| at.0.to_string(), |t| format!("{t:.0}"))
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Current => f.write_str("stays: it is the current generation"),
            Self::Ready => f.write_str("stays: it is ready for the next rotation"),
            Self::Goes => f.write_str("goes"),
            Self::TooYoung(at) => {
                write!(f, "stays: it can be dropped when every partition is published beyond {}", time(*at))
            }
            Self::Held(why, partition) => write!(f, "stays: partition {partition} {why}"),
            Self::Unmeasured => f.write_str("stays: its youngest record is not known yet"),
            Self::Locked(state) => {
                write!(f, "stays, {state}: another session uses its table; the next pass continues")
            }
        }
    }
}

/// What a pass did, or would do in a dry run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PassReport {
    /// Another pass was running; this one did nothing.
    pub is_busy: bool,
    /// Dry run: nothing was changed.
    pub is_dry_run: bool,
    /// Number of the new current generation.
    pub rotated_to: Option<i64>,
    /// A rotation is due, but the lock could not be taken, or this is a dry run.
    pub rotation_waits: bool,
    /// Each generation as it was, and what was decided.
    pub generations: Vec<(Generation, Verdict)>,
    /// The horizon and the slowest partition; `None` if the horizon was not needed or is unknown.
    pub horizon: Option<(TimestampMs, Option<Partition>)>,
    /// What was done with the monthly partitions of the payment tables.
    pub months: MonthsReport,
    /// Why maintaining the monthly partitions failed. Other steps do not depend on it.
    pub months_error: Option<String>,
    /// In a dry run, rows in the payment tables' default partitions, counted up to a limit.
    pub default_rows: i64,
    /// Duration of the pass.
    pub took: Duration,
}

impl PassReport {
    /// Whether the pass left nothing that a retry before the next scheduled pass could do.
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

    /// The generations that were dropped, or would be dropped.
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

/// Log time of every partition, from both cursors and the log.
///
/// # Errors
/// If the broker or the database cannot be queried, or if the topic, database or group is not the expected
/// one.
pub async fn partition_times(settings: &Settings) -> Result<Vec<(Partition, PartitionTime)>, CommandError> {
    let view = resolution::view(settings).await?;
    let (client, _driver) =
        settings.postgres.url.connect().await.map_err(|error| CommandError::failed(error.to_string()))?;
    // The horizon of another cluster or group would be wrong for this database.
    binding::is_bound_to(&client, &settings.kafka.group_id, view.identity.topic_id, settings.kafka.publish)
        .await
        .map_err(|error| CommandError::person_must_decide(error.to_string()))?;
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
            Some(Decision::Halt(reason)) => {
                times.push((partition, PartitionTime::Unknown(Hold::Halted(reason))))
            }
            Some(Decision::Stop(mismatch)) => {
                return Err(CommandError::person_must_decide(mismatch.to_string()));
            }
            None => {}
        }
    }
    let wanted: Vec<_> = positions.iter().map(|(partition, position, _)| (*partition, *position)).collect();
    let kafka = settings.kafka.clone();
    let timestamps = tokio::task::spawn_blocking(move || {
        first_timestamps(&kafka, &kafka.input_topic, &wanted, PEEK_LIMIT)
    })
    .await
    .map_err(|error| CommandError::failed(error.to_string()))?
    .map_err(|error| CommandError::failed(format!("reading records at the cursors: {error}")))?;
    for (partition, _, before) in positions {
        let time = match timestamps.get(&partition) {
            None => PartitionTime::Unknown(Hold::Unread),
            Some(FirstTimestamp::End) => PartitionTime::CaughtUp,
            Some(FirstTimestamp::Record(at)) => match log_time(before, *at) {
                Some(at) => PartitionTime::At(at),
                None => PartitionTime::Unknown(Hold::NoTimestamp),
            },
        };
        times.push((partition, time));
    }
    times.sort_by_key(|(partition, _)| *partition);
    Ok(times)
}

/// The earlier of the database's and this machine's clocks: a clock that is ahead must not cause an early
/// drop.
async fn now(client: &Client) -> Result<TimestampMs, SchemaError> {
    let theirs: i64 = client
        .query_one("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint", &[])
        .await
        .map_err(doing("cannot read the database's clock"))?
        .get(0);
    Ok(TimestampMs(theirs).min(metrics::now()))
}

/// The current horizon.
///
/// # Errors
/// As [`partition_times`], and if the database's clock cannot be read.
pub async fn current_horizon(client: &Client, settings: &Settings) -> Result<Horizon, PassError> {
    let now = now(client).await?;
    let times = partition_times(settings).await.map_err(PassError::Log)?;
    Ok(horizon(now, &times))
}

/// Runs one pass: finishes an earlier one, rotates, prunes, and maintains the monthly partitions.
///
/// # Errors
/// See [`PassError`]. Steps done until then stay done; the next pass continues from there.
pub async fn pass(settings: &Settings, is_dry_run: bool) -> Result<PassReport, PassError> {
    let (mut client, _driver) = settings.postgres.housekeeping_url.connect().await?;
    crate::postgres::schema::check(&client).await?;
    let began = (Instant::now(), SystemTime::now());
    let locked: bool = client
        .query_one("SELECT pg_try_advisory_lock($1, $2)", &[&locks::CLASS, &LockKey::Prune.number()])
        .await
        .map_err(doing("cannot take the lock for pruning"))?
        .get(0);
    if !locked {
        return Ok(PassReport { is_busy: true, is_dry_run, ..PassReport::default() });
    }
    // The lock is released when the session ends.
    let mut report = PassReport { is_dry_run, ..PassReport::default() };
    if is_dry_run {
        report.default_rows = months::default_rows(&client).await?;
        weigh(&client, settings, &mut report).await?;
        report.took = began.0.elapsed();
        return Ok(report);
    }
    make_ready(&client).await?;
    rotate_when_due(&client, settings, &mut report).await?;
    // In advance, so that the next rotation only has to update rows.
    make_ready(&client).await?;
    measure_closed(&mut client).await?;
    let weighed = weigh(&client, settings, &mut report).await;
    if weighed.is_err() {
        // Generations that an earlier pass retired can be removed without the horizon.
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
        .map_err(doing("cannot read the current generation"))?
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

/// Decides about each generation without changing anything.
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
