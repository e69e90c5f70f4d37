//! What the console shows of the database: generations, months, and the tasks of housekeeping. Asked for while a page is
//! open.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cronexpr::MakeTimestamp;
use jiff::Timestamp;
use serde::Serialize;
use strum::VariantArray;
use tokio::time::timeout;
use tokio_postgres::Client;

use crate::config::{self, Settings};
use crate::domain::record::TimestampMs;
use crate::housekeeping::generations::{self, State};
use crate::housekeeping::{Task, goes_at};
use crate::postgres::connection::describe;
use crate::postgres::schema::months::PARTITIONED_TABLES;
use crate::telemetry::metrics::now;

/// How old an answer may be.
pub const AGE: Duration = Duration::from_secs(30);
/// Time limit of the questions.
pub const LIMIT: Duration = Duration::from_secs(10);
const STATEMENT_LIMIT: &str = "SET statement_timeout = '5s'; SET default_transaction_read_only = on";

/// The answer of the database.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tables {
    /// Why there is none.
    pub error: Option<String>,
    generations: Vec<GenerationRow>,
    months: Vec<MonthRow>,
    #[serde(skip)]
    tasks: Vec<(String, Option<f64>)>,
}

#[derive(Clone, Debug, Serialize)]
struct GenerationRow {
    name: String,
    state: String,
    began_ms: Option<i64>,
    /// When it may be dropped at the earliest, as far as that is known.
    drops_ms: Option<i64>,
    rows: i64,
    bytes: i64,
    is_current: bool,
}

#[derive(Clone, Debug, Serialize)]
struct MonthRow {
    month: String,
    bytes: i64,
}

impl Tables {
    /// When the task last succeeded, in milliseconds since 1970.
    pub fn last_ok(&self, task: &str) -> Option<i64> {
        let (_, seconds) = self.tasks.iter().find(|(name, _)| name == task)?;
        seconds.map(|seconds| (seconds * 1_000.0) as i64)
    }
}

/// The last answer with tables. While the database does not answer, it is still shown, with its time.
#[derive(Default)]
pub struct Kept(Mutex<(Option<TimestampMs>, Arc<Tables>)>);

impl Kept {
    /// The newest tables with their time, and the error of this answer.
    pub fn with(&self, answer: Option<(TimestampMs, Arc<Tables>)>) -> (Option<TimestampMs>, Tables) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let error = answer.as_ref().and_then(|(_, tables)| tables.error.clone());
        if let (Some((at, tables)), None) = (answer, &error) {
            *kept = (Some(at), tables);
        }
        (kept.0, Tables { error, ..(*kept.1).clone() })
    }
}

/// Asks the database.
pub async fn ask(settings: Settings) -> Tables {
    // Shorter than the limit of the question, so that an answer says so.
    let answer = timeout(LIMIT.mul_f32(0.9), read(&settings)).await;
    match answer.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
        Ok(tables) => tables,
        Err(error) => Tables { error: Some(error), ..Tables::default() },
    }
}

async fn read(settings: &Settings) -> Result<Tables, String> {
    let session = settings.postgres.housekeeping_url.connect().await;
    let client = session.map_err(|error| error.to_string())?.0;
    client.batch_execute(STATEMENT_LIMIT).await.map_err(|error| describe(&error))?;
    let (window, now) = (settings.idempotency.window, now());
    let generations = generations::list(&client).await.map_err(|error| error.to_string())?;
    let generations = generations.into_iter().map(|generation| GenerationRow {
        is_current: generation.state == State::Current,
        state: generation.state.to_string(),
        began_ms: generation.age.map(|age| now.0 - i64::try_from(age.as_millis()).unwrap_or_default()),
        drops_ms: generation
            .youngest
            .filter(|youngest| *youngest > TimestampMs(i64::MIN))
            .map(|youngest| goes_at(youngest, window).0),
        name: generation.leaf,
        rows: generation.rows,
        bytes: generation.bytes,
    });
    let generations = generations.collect();
    let (months, tasks) = (months(&client).await?, tasks(&client).await?);
    Ok(Tables { error: None, generations, months, tasks })
}

async fn months(client: &Client) -> Result<Vec<MonthRow>, String> {
    let query = "
        SELECT coalesce(substring(c.relname FROM '_([0-9]{4}_[0-9]{2})$'), 'default'),
            sum(pg_total_relation_size(c.oid))::bigint
        FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent IN (SELECT to_regclass('payment_writer.' || name) FROM unnest($1::text[]) AS name)
        GROUP BY 1 ORDER BY 1";
    let rows =
        client.query(query, &[&PARTITIONED_TABLES.as_slice()]).await.map_err(|error| describe(&error))?;
    Ok(rows
        .iter()
        .map(|row| MonthRow { month: row.get::<_, String>(0).replace('_', "-"), bytes: row.get(1) })
        .collect())
}

async fn tasks(client: &Client) -> Result<Vec<(String, Option<f64>)>, String> {
    let query = "
        SELECT task, (
            SELECT extract(epoch FROM max(started_at))::float8 FROM payment_writer.housekeeping_pass
            WHERE is_complete AND NOT coalesce(detail -> 'failed' ? task, false)
        ) FROM unnest($1::text[]) AS task";
    let names: Vec<&str> = Task::VARIANTS.iter().map(Into::into).collect();
    let rows = client.query(query, &[&names]).await.map_err(|error| describe(&error))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// The next time of the schedule, in milliseconds since 1970.
pub fn next_pass(settings: &Settings) -> Option<i64> {
    let schedule = config::cron(settings.idempotency.prune_schedule.as_deref()?)?;
    let next = schedule.find_next(MakeTimestamp(Timestamp::now())).ok()?;
    Some(next.timestamp().as_millisecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_kept_while_the_database_does_not_answer() {
        let (kept, at) = (Kept::default(), TimestampMs);
        let some = |months: &[&str]| {
            let months = months.iter().map(|month| MonthRow { month: (*month).to_owned(), bytes: 1 });
            Arc::new(Tables { months: months.collect(), ..Tables::default() })
        };
        let none = Arc::new(Tables { error: Some("refused".to_owned()), ..Tables::default() });
        let seen = |answer| {
            let (at, tables) = kept.with(answer);
            let months: Vec<String> = tables.months.iter().map(|row| row.month.clone()).collect();
            (at.map(|at| at.0), months.concat(), tables.error.unwrap_or_default())
        };
        let expected = |at: Option<i64>, months: &str, error: &str| (at, months.to_owned(), error.to_owned());
        assert_eq!(seen(None), expected(None, "", ""));
        assert_eq!(seen(Some((at(1), none.clone()))), expected(None, "", "refused"));
        assert_eq!(seen(Some((at(2), some(&["2026-11"])))), expected(Some(2), "2026-11", ""));
        assert_eq!(seen(Some((at(3), none))), expected(Some(2), "2026-11", "refused"));
        assert_eq!(seen(None), expected(Some(2), "2026-11", ""));
        assert_eq!(seen(Some((at(4), some(&["2026-12"])))), expected(Some(4), "2026-12", ""));
    }
}
