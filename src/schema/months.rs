//! Months of the payment tables, made ahead of the records that will need them.
//!
//! A month is made as a table of its own and then attached. `CREATE TABLE … PARTITION OF` would be one
//! statement, but locks the parent against everybody (ACCESS EXCLUSIVE), and so waits for every writer and
//! reader and makes all later ones wait for itself. ATTACH takes SHARE UPDATE EXCLUSIVE on the parent, which
//! writers and readers do not notice, and ACCESS EXCLUSIVE only on the new table, which nobody else can see
//! yet, and on the default partition, which is empty unless something is wrong. The new table is empty, so
//! no CHECK constraint is needed to save a scan of it. The default partition is scanned under its lock;
//! rows of the month are looked for beforehand without one, and `statement_timeout` bounds the scan.

use std::fmt;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::locks::{self, LockKey};
use super::{SchemaError, doing};

/// The tables that are partitioned by month of `created_at`.
pub const PARTITIONED_TABLES: [&str; 3] = ["payment_core", "payment_metadata", "payment_notes"];

/// How many months after the current one are made.
pub const MONTHS_AHEAD: u32 = 2;

/// How long a writer that needs the default partition can be made to wait.
const LOCK_TIMEOUT_MS: u32 = 50;
/// How long the default partition may be scanned under the lock.
const STATEMENT_TIMEOUT_MS: u32 = 1_000;
/// Tries a table and month; the next try comes with the next start or the next day.
const TRIES_MAX: u32 = 10;
const BETWEEN_TRIES: Duration = Duration::from_millis(200);

/// A month of the calendar, UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Month {
    year: i32,
    /// 1 to 12.
    month: u32,
}

/// As in names of tables: `2026_03`.
impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}_{:02}", self.year, self.month)
    }
}

impl Month {
    /// `None` unless `month` is 1 to 12 and `year` 1 to 9998.
    pub fn new(year: i32, month: u32) -> Option<Self> {
        ((1..=12).contains(&month) && (1..=9998).contains(&year)).then_some(Self { year, month })
    }

    /// The month that it is now, by the database's clock.
    pub async fn current(client: &Client) -> Result<Self, SchemaError> {
        let row = client
            .query_one(
                "SELECT extract(year FROM t)::int, extract(month FROM t)::int FROM (SELECT now() AT TIME ZONE 'UTC' AS t) AS n",
                &[],
            )
            .await
            .map_err(doing("cannot read the database's clock"))?;
        Ok(Self { year: row.get(0), month: row.get::<_, i32>(1).unsigned_abs() })
    }

    /// The month after this one.
    #[must_use]
    pub fn next(self) -> Self {
        match self.month {
            12 => Self { year: self.year + 1, month: 1 },
            _ => Self { month: self.month + 1, ..self },
        }
    }

    /// Its first moment, as a literal.
    fn start(self) -> String {
        format!("'{:04}-{:02}-01 00:00:00+00'", self.year, self.month)
    }
}

/// Why a month could not be made this time. None of these keeps payments from being written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// The default partition holds rows of this month; they must be moved first.
    DefaultHoldsRows,
    /// A long statement on the default partition is in the way.
    Locked,
    /// A table of that name exists and is no partition: it was detached, or is somebody's.
    NameTaken,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DefaultHoldsRows => "the default partition holds rows of that month",
            Self::Locked => "a long statement holds the default partition",
            Self::NameTaken => "a table of that name exists and is not attached",
        })
    }
}

/// What became of the months that were asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MonthsReport {
    /// Names of the tables that were made now.
    pub made: Vec<String>,
    /// Names of the tables that could not be made, and why.
    pub waiting: Vec<(String, Obstacle)>,
}

/// Makes the current month and [`MONTHS_AHEAD`] more where they are absent: at start and daily.
///
/// Many may do it at once. The role must own the payment tables. Never waits for a lock longer than 50 ms
/// at a time; what cannot be made is in the report, not an error.
pub async fn make_months_ahead(client: &mut Client) -> Result<MonthsReport, SchemaError> {
    let current = Month::current(client).await?;
    make_months(client, current, MONTHS_AHEAD + 1).await
}

/// Makes `count` months from `first` on, where they are absent.
pub async fn make_months(client: &mut Client, first: Month, count: u32) -> Result<MonthsReport, SchemaError> {
    let mut report = MonthsReport::default();
    let mut month = first;
    for _ in 0..count {
        for table in PARTITIONED_TABLES {
            let partition = format!("{table}_{month}");
            match make_month(client, table, &partition, month).await? {
                Made::Now => report.made.push(partition),
                Made::Before => {}
                Made::Not(obstacle) => report.waiting.push((partition, obstacle)),
            }
        }
        month = month.next();
    }
    Ok(report)
}

enum Made {
    Now,
    Before,
    Not(Obstacle),
}

async fn make_month(
    client: &mut Client,
    table: &str,
    partition: &str,
    month: Month,
) -> Result<Made, SchemaError> {
    for attempt in 1..=TRIES_MAX {
        if let Some(found) = look_for(client, table, partition).await? {
            return Ok(found);
        }
        if default_holds_rows(client, table, month).await? {
            return Ok(Made::Not(Obstacle::DefaultHoldsRows));
        }
        match attach(client, table, partition, month).await {
            Ok(made) => return Ok(made),
            Err(e) => match e.code() {
                // It took a row between our look and our lock.
                Some(&SqlState::CHECK_VIOLATION) => return Ok(Made::Not(Obstacle::DefaultHoldsRows)),
                Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED) if attempt < TRIES_MAX => {
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED) => {
                    return Ok(Made::Not(Obstacle::Locked));
                }
                _ => return Err(doing(format!("cannot make {partition}"))(e)),
            },
        }
    }
    Ok(Made::Not(Obstacle::Locked))
}

/// Whether there is anything of that name already.
async fn look_for(client: &Client, table: &str, partition: &str) -> Result<Option<Made>, SchemaError> {
    let rows = client
        .query(
            "SELECT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid AND i.inhparent = to_regclass($1)) \
             FROM pg_class c WHERE c.oid = to_regclass($2)",
            &[&format!("payment_writer.{table}"), &format!("payment_writer.{partition}")],
        )
        .await
        .map_err(doing(format!("cannot look for {partition}")))?;
    Ok(rows.first().map(|row| if row.get(0) { Made::Before } else { Made::Not(Obstacle::NameTaken) }))
}

async fn default_holds_rows(client: &Client, table: &str, month: Month) -> Result<bool, SchemaError> {
    let select = format!(
        "SELECT EXISTS (SELECT FROM payment_writer.{table}_default WHERE created_at >= {} AND created_at < {})",
        month.start(),
        month.next().start()
    );
    let row = client.query_one(&select, &[]).await.map_err(doing(format!("cannot read {table}_default")))?;
    Ok(row.get(0))
}

async fn attach(
    client: &mut Client,
    table: &str,
    partition: &str,
    month: Month,
) -> Result<Made, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    // The advisory lock keeps daemons that start together from making the same table; it counts towards
    // `lock_timeout` like any other.
    transaction
        .batch_execute(&format!(
            "SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; \
             SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}; \
             SELECT pg_advisory_xact_lock({}, {})",
            locks::CLASS,
            LockKey::Months.number()
        ))
        .await?;
    // Read from the catalog: `to_regclass` may answer from a cache that an advisory lock does not refresh.
    let made_meanwhile = transaction
        .query(
            "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = 'payment_writer' AND c.relname = $1",
            &[&partition],
        )
        .await?;
    if !made_meanwhile.is_empty() {
        return Ok(Made::Before);
    }
    transaction
        .batch_execute(&format!(
            "CREATE TABLE payment_writer.{partition} \
               (LIKE payment_writer.{table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE); \
             ALTER TABLE payment_writer.{table} ATTACH PARTITION payment_writer.{partition} \
               FOR VALUES FROM ({}) TO ({})",
            month.start(),
            month.next().start()
        ))
        .await?;
    transaction.commit().await?;
    Ok(Made::Now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_follow_each_other_over_the_year() {
        let december = Month::new(2026, 12).unwrap();
        assert_eq!(december.to_string(), "2026_12");
        assert_eq!(december.next().to_string(), "2027_01");
        assert_eq!(december.next().start(), "'2027-01-01 00:00:00+00'");
    }

    #[test]
    fn there_is_no_thirteenth_month() {
        assert_eq!(Month::new(2026, 13), None);
        assert_eq!(Month::new(2026, 0), None);
    }
}
