//! Housekeeping: rotates and prunes the idempotency generations and maintains the monthly partitions of the
//! payment tables.
//!
//! One pass does all of it, in the daemon on schedule or with `payment-writer prune`; an advisory lock allows
//! one pass at a time per database. Every step is its own transaction that stores a state in
//! `idempotency_generation`, so the next pass finishes what a crash interrupted. A writer waits for
//! housekeeping at most 50 ms at a time.

pub mod generations;
mod horizon;
mod log_times;
pub mod months;
mod pass_metrics;
mod report;
pub mod schedule;

use std::time::{Duration, Instant, SystemTime};

use tokio_postgres::Client;

use self::generations::{Generation, State, Step};
use self::horizon::Horizon;
pub use self::horizon::goes_at;
use self::log_times::current_horizon;
pub use self::report::{PassError, PassReport, Task, Verdict, time};
use crate::config::Settings;
use crate::failpoint;
use crate::postgres::connection::backend_pid;
use crate::postgres::schema::locks::LockKey;
use crate::postgres::schema::{self, SchemaError, column, doing, months as payment_months, value};
use crate::postgres::waits::Waits;

/// A generation is rotated when its age reaches this share of the window. With a weekly schedule and a window
/// of one week, every pass rotates, even if it starts a little earlier than the week before.
const ROTATE_AT: f64 = 6.0 / 7.0;
/// Rows of `housekeeping_pass` that are kept.
const PASSES_KEPT: i64 = 1_000;

/// Runs one pass: finishes an earlier one, rotates, prunes, and maintains the monthly partitions. `waits` tells what it
/// waits for.
///
/// # Errors
/// See [`PassError`]. Steps done until then stay done; the next pass continues from there.
pub async fn pass(settings: &Settings, waits: &Waits, is_dry_run: bool) -> Result<PassReport, PassError> {
    let (client, _driver) = settings.postgres.housekeeping_url.connect().await?;
    let pid = backend_pid(&client).await.map_err(doing("cannot ask for the session's pid"))?;
    waits.explain(pid, "housekeeping", pass_in(client, settings, is_dry_run)).await.0
}

async fn pass_in(mut client: Client, settings: &Settings, is_dry_run: bool) -> Result<PassReport, PassError> {
    schema::check(&client).await?;
    let began = (Instant::now(), SystemTime::now());
    if !LockKey::Prune.try_lock(&client).await.map_err(doing("cannot take the lock for pruning"))? {
        return Ok(PassReport { is_busy: true, is_dry_run, ..PassReport::default() });
    }
    // The lock is released when the session ends.
    let mut report = PassReport { is_dry_run, ..PassReport::default() };
    if is_dry_run {
        report.default_rows = payment_months::default_rows(&client).await?;
        weigh(&client, settings, &mut report).await?;
        report.took = began.0.elapsed();
        return Ok(report);
    }
    // Otherwise the pass cannot be recorded at its end.
    schema::identity_columns::catch_up(&client).await?;
    report.note(Task::Generation, schema::guards::restore(&client).await);
    report.note(Task::Generation, make_ready(&client).await);
    let rotated = rotate_when_due(&client, settings, &mut report).await;
    report.note(Task::Rotation, rotated);
    // In advance, so that the next rotation only has to update rows.
    report.note(Task::Generation, make_ready(&client).await);
    report.note(Task::Pruning, measure_closed(&mut client).await);
    let weighed = weigh(&client, settings, &mut report).await;
    if let Err(error @ PassError::Database(_)) = &weighed {
        report.note(Task::Pruning, Err(error));
    }
    if weighed.is_err() {
        // Generations that an earlier pass retired can be removed without the horizon.
        match begun(&client).await {
            Ok(generations) => report.generations = generations,
            Err(error) => report.note(Task::Pruning, Err(error)),
        }
    }
    let removed = remove(&client, &mut report.generations).await;
    report.note(Task::Pruning, removed);
    match payment_months::keep(&mut client, settings.retention.payment_months).await {
        Ok(months) => report.months = months,
        Err(error) => report.note(Task::Months, Err(error)),
    }
    report.took = began.0.elapsed();
    record(&client, &report, weighed.is_ok() && report.is_complete(), began.1).await?;
    weighed?;
    // A failure of the months alone is in the report.
    if report.failed.iter().any(|(task, _)| *task != Task::Months) {
        return Err(PassError::Tasks(report.failures()));
    }
    Ok(report)
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
    let next = "SELECT max(generation) + 1 FROM payment_writer.idempotency_generation
                HAVING count(*) FILTER (WHERE state = 'ready') = 0";
    if let Some(next) = column(client, "cannot read the generations", next, &[]).await?.pop() {
        generations::make(client, next).await?;
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
    let is_empty = format!("SELECT NOT EXISTS (SELECT FROM payment_writer.idempotency_g{current})");
    if value(client, "cannot read the current generation", &is_empty, &[]).await? {
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
                (State::Older, Some(_), Some(Horizon::Held(why, partition))) => {
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

/// Tries each generation that goes; returns the first error.
async fn remove(client: &Client, generations: &mut [(Generation, Verdict)]) -> Result<(), SchemaError> {
    let mut removed = Ok(());
    for (generation, verdict) in generations.iter_mut().filter(|(_, verdict)| *verdict == Verdict::Goes) {
        match remove_one(client, generation).await {
            Ok(Step::Done) => {}
            Ok(Step::Locked) => *verdict = Verdict::Locked(generation.state),
            Err(error) => {
                *verdict = Verdict::Failed(generation.state);
                removed = removed.and(Err(error));
            }
        }
    }
    removed
}

/// Does the steps that are left, each in its own transaction.
async fn remove_one(client: &Client, generation: &mut Generation) -> Result<Step, SchemaError> {
    if generation.state == State::Older {
        if generations::retire(client, generation.number).await? == Step::Locked {
            return Ok(Step::Locked);
        }
        generation.state = State::Retired;
        failpoint::hit("after_retire");
    }
    if generation.state == State::Retired {
        if generations::detach(client, generation).await? == Step::Locked {
            return Ok(Step::Locked);
        }
        generation.state = State::Detached;
        failpoint::hit("after_detach");
    }
    generations::drop_table(client, generation).await
}

async fn record(
    client: &Client,
    report: &PassReport,
    is_complete: bool,
    began: SystemTime,
) -> Result<(), SchemaError> {
    let record = "
        WITH pass AS (
            INSERT INTO payment_writer.housekeeping_pass (started_at, is_complete, detail)
            VALUES ($1, $2, $3) RETURNING id
        )
        DELETE FROM payment_writer.housekeeping_pass p USING pass WHERE p.id <= pass.id - $4";
    let recorded = client.execute(record, &[&began, &is_complete, &report.detail(), &PASSES_KEPT]).await;
    recorded.map_err(doing("cannot record the pass"))?;
    Ok(())
}
