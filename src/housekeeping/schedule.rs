//! Housekeeping in the daemon: passes on schedule or after a missed one, and the metrics.

use std::time::{Duration, SystemTime};

use cronexpr::MakeTimestamp;
use jiff::{SignedDuration, Timestamp};
use tokio_postgres::Client;

use super::generations::State;
use super::horizon::Horizon;
use super::pass_metrics::HousekeepingMetrics;
use super::{PassError, PassReport, Task, current_horizon, generations, pass};
use crate::config::{self, Settings};
use crate::postgres::schema::{SchemaError, column, doing, guards, identity_columns, months};
use crate::postgres::waits::Waits;
use crate::telemetry::logging::{RateLimited, Repeated};

/// Interval between checks of the schedule and of the table sizes.
const TICK: Duration = Duration::from_secs(60);
/// A failed or incomplete pass is retried after this.
const RETRY: Duration = Duration::from_secs(15 * 60);
/// Ticks between updates of the horizon, which costs a few requests to the broker.
const HORIZON_TICKS: u32 = 5;
/// The last minute up to `now` that matches the schedule, five cron fields in UTC.
pub fn last_due(schedule: &str, now: Timestamp) -> Option<Timestamp> {
    let schedule = config::cron(schedule)?;
    // Nine years are long enough for a schedule that matches only 29 February.
    [1, 31, 9 * 366].into_iter().find_map(|days| {
        let start = now.checked_sub(SignedDuration::from_hours(24 * days)).ok()?;
        let matching = schedule.iter_after(MakeTimestamp(start)).ok()?.map_while(Result::ok);
        matching.map(|minute| minute.timestamp()).take_while(|minute| *minute <= now).last()
    })
}

/// Start of the last pass, whether it was complete, and start of the last complete pass. Without a pass, both
/// are the time when the schema was created.
async fn last_pass(client: &Client) -> Result<(Timestamp, bool, Timestamp), SchemaError> {
    let query = "
        WITH passes AS (
            SELECT id, started_at, is_complete FROM payment_writer.housekeeping_pass
            UNION ALL SELECT 0, created_at, true FROM payment_writer.database_identity
        ), last AS (SELECT * FROM passes ORDER BY id DESC LIMIT 1)
        SELECT last.started_at, last.is_complete,
            (SELECT started_at FROM passes WHERE is_complete ORDER BY id DESC LIMIT 1)
        FROM last";
    let row = client.query_one(query, &[]).await.map_err(doing("cannot read the passes"))?;
    let time = |index| Timestamp::try_from(row.get::<_, SystemTime>(index)).unwrap_or(Timestamp::UNIX_EPOCH);
    Ok((time(0), row.get(1), time(2)))
}

/// Names of the tasks that failed in the last pass of any process.
async fn failing_tasks(client: &Client) -> Result<Vec<String>, SchemaError> {
    let query = "
        SELECT jsonb_object_keys(detail -> 'failed') FROM payment_writer.housekeeping_pass
        WHERE id = (SELECT max(id) FROM payment_writer.housekeeping_pass)";
    column(client, "cannot read the last pass", query, &[]).await
}

/// Runs forever. Failures are logged and do not stop anything else.
pub async fn run(settings: &Settings) {
    let mut keeper = Keeper::default();
    loop {
        keeper.tick(settings).await;
        tokio::time::sleep(TICK).await;
    }
}

#[derive(Default)]
struct Keeper {
    metrics: HousekeepingMetrics,
    client: Option<Client>,
    retry_at: Option<tokio::time::Instant>,
    ticks: u32,
    /// The last logged error.
    trouble: Repeated,
    /// The last logged months that are not attached.
    unattached: Repeated,
}

impl Keeper {
    async fn tick(&mut self, settings: &Settings) {
        if let Err(error) = self.look(settings).await {
            self.complain(error.to_string());
        }
        self.ticks = self.ticks.wrapping_add(1);
    }

    fn complain(&mut self, message: String) {
        // Two errors may alternate.
        static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(10 * 60));
        if self.trouble.is_due(&message)
            && let Some(suppressed) = LIMIT.pass()
        {
            tracing::warn!(error = message, suppressed, "housekeeping is held up, trying again");
            self.trouble.written(message);
        }
    }

    async fn look(&mut self, settings: &Settings) -> Result<(), PassError> {
        let client = match self.client.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => {
                let client = settings.postgres.housekeeping_url.connect().await?.0;
                // Those of `cursors accept` and the like as well.
                identity_columns::catch_up(&client).await?;
                // Passes go on without.
                if let Err(error) = guards::restore(&client).await {
                    self.complain(error.to_string());
                }
                client
            }
        };
        let (began, was_complete, completed) = last_pass(&client).await?;
        self.metrics.last_pass.set(completed.as_second() as f64);
        let now = Timestamp::now();
        let due = settings.idempotency.prune_schedule.as_ref().and_then(|s| last_due(s, now));
        // A start time in the future comes from a wrong clock.
        let is_due = due.is_some_and(|due| due > began || began > now);
        // An incomplete pass is retried without waiting for the schedule.
        let is_retry = !was_complete && settings.idempotency.prune_schedule.is_some();
        let may_try = self.retry_at.is_none_or(|at| tokio::time::Instant::now() >= at);
        if (is_due || is_retry) && may_try {
            self.retry_at = Some(tokio::time::Instant::now() + RETRY);
            let pool = settings.postgres.housekeeping_url.pool(1)?;
            match pass(settings, &Waits::new(pool, |_| {}), false).await {
                Ok(report) => {
                    if report.is_complete() {
                        self.retry_at = None;
                    }
                    self.told(&report);
                }
                Err(error) => self.complain(error.to_string()),
            }
        }
        let list = generations::list(&client).await?;
        let live = list.iter().filter(|g| matches!(g.state, State::Current | State::Older));
        self.metrics.generations(live.rev().map(|g| (g.rows, g.bytes)));
        let mut failing = failing_tasks(&client).await?;
        let unattached = months::unattached(&client).await?;
        if unattached.is_empty() {
            self.unattached.end();
        } else {
            failing.push(<&str>::from(Task::Months).to_owned());
            let detail = months::detached(&unattached);
            if self.unattached.is_due(&detail) {
                tracing::warn!(detail, "months of the payment tables are not attached");
                self.unattached.written(detail);
            }
        }
        self.metrics.failing(&failing);
        self.metrics.months_ahead.set(months::ahead(&client).await? as f64);
        self.metrics.default_rows.set(months::default_rows(&client).await? as f64);
        if self.ticks.is_multiple_of(HORIZON_TICKS) {
            match current_horizon(&client, settings).await {
                Ok(Horizon::At(at, _)) => self.metrics.horizon(Some(at)),
                Ok(Horizon::Held(..)) | Err(_) => self.metrics.horizon(None),
            }
        }
        self.client = Some(client);
        Ok(())
    }

    fn told(&mut self, report: &PassReport) {
        if report.is_busy {
            return;
        }
        self.trouble.end();
        self.metrics.pass(report);
        let gone: Vec<String> = report.gone().map(|g| g.number.to_string()).collect();
        tracing::info!(
            rotated_to = report.rotated_to,
            dropped = gone.join(","),
            rows = report.gone().map(|g| g.rows).sum::<i64>(),
            bytes = report.gone().map(|g| g.bytes).sum::<i64>(),
            kept = report.generations.len() - gone.len(),
            complete = report.is_complete(),
            took_ms = report.took.as_millis(),
            "housekeeping pass"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(schedule: &str, now: &str) -> Option<String> {
        last_due(schedule, now.parse().unwrap()).map(|t| t.to_string())
    }

    #[test]
    fn the_last_due_minute_is_found_however_long_ago() {
        // 2026-11-21 is a Saturday.
        let now = "2026-11-21T14:35:10Z";
        assert_eq!(last("0 3 * * 0", now).unwrap(), "2026-11-15T03:00:00Z");
        assert_eq!(last("* * * * *", now).unwrap(), "2026-11-21T14:35:00Z");
        assert_eq!(last("0 15 * * *", now).unwrap(), "2026-11-20T15:00:00Z");
        assert_eq!(last("30 4 1 1 *", now).unwrap(), "2026-01-01T04:30:00Z");
        assert_eq!(last("0 0 29 2 *", now).unwrap(), "2024-02-29T00:00:00Z");
        assert_eq!(last("0 0 31 2 *", now), None);
    }

    #[test]
    fn a_minute_that_has_begun_is_due() {
        assert_eq!(last("0 3 * * 0", "2026-11-22T03:00:00Z").unwrap(), "2026-11-22T03:00:00Z");
        assert_eq!(last("0 3 * * 0", "2026-11-22T02:59:59Z").unwrap(), "2026-11-15T03:00:00Z");
    }
}
