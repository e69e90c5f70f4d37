//! Monthly partitions of the payment tables, created before records need them.
//!
//! A month is created as a separate table and then attached. `CREATE TABLE … PARTITION OF` would be one
//! statement, but takes ACCESS EXCLUSIVE on the parent, so it waits for all writers and readers and blocks
//! all later ones. ATTACH takes SHARE UPDATE EXCLUSIVE on the parent, which does not block writers and
//! readers, and ACCESS EXCLUSIVE only on the new table, which is not visible yet, and on the default
//! partition, which normally is empty. The new table is empty, so its scan needs no CHECK constraint to be
//! avoided. Rows of the month in the default partition are moved in the same transaction: most before the
//! default partition is locked, the rest after. The default partition is scanned under its lock, and
//! `statement_timeout` limits that.

use std::fmt;
use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

use super::locks::{LOCK_TIMEOUT_MS, LockKey, Step, with_short_locks};
use super::{SchemaError, column, doing, value};
use crate::domain::record::TimestampMs;

/// The tables that are partitioned by month of `created_at`.
pub const PARTITIONED_TABLES: [&str; 3] = ["payment_core", "payment_metadata", "payment_notes"];

/// Number of months after the current one that are created in advance.
const MONTHS_AHEAD: i32 = 2;

/// Age in months up to which months are created for rows in the default partitions: a producer's wrong clock
/// must not fill the catalog with tables.
const MONTHS_BACK: i32 = 24;
/// Most months that one pass creates for rows in the default partitions.
const FOUND_MAX: i64 = 12;
/// Timeout for moving rows out of a default partition without blocking writers.
const MOVE_TIMEOUT: &str = "10min";

/// Timeout for scanning the default partition under its lock.
const STATEMENT_TIMEOUT_MS: u32 = 250;
/// Time after which the server ends a session that stopped between the statements of a month.
const IDLE_TIMEOUT: &str = "5s";
/// Attempts per table and month; after that it is left to the next start or the next day.
const TRIES_MAX: u32 = 10;
const BETWEEN_TRIES: Duration = Duration::from_millis(200);

/// A calendar month, UTC: the number of months since January of the year 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Month(i32);

/// The month of the SQL timestamp `t`.
const MONTH_OF_T: &str = "(extract(year FROM t) * 12 + extract(month FROM t))::int - 1";

/// The form used in table names: `2026_03`.
impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month) = self.parts();
        write!(f, "{year:04}_{month:02}")
    }
}

impl Month {
    /// `None` unless `month` is 1 to 12 and `year` 1 to 9998.
    pub fn new(year: i32, month: i32) -> Option<Self> {
        ((1..=12).contains(&month) && (1..=9998).contains(&year)).then_some(Self(year * 12 + month - 1))
    }

    /// The current month by the database's clock.
    pub async fn current(client: &Client) -> Result<Self, SchemaError> {
        let query = format!("SELECT {MONTH_OF_T} FROM (SELECT now() AT TIME ZONE 'UTC' AS t) AS n");
        Ok(Self(value(client, "cannot read the database's clock", &query, &[]).await?))
    }

    /// The month of this time; `None` outside the years 1 to 9998.
    pub fn of(at: TimestampMs) -> Option<Self> {
        let date = jiff::Timestamp::from_millisecond(at.0).ok()?.to_zoned(jiff::tz::TimeZone::UTC).date();
        Self::new(date.year().into(), date.month().into())
    }

    /// Year, and month from 1 to 12.
    fn parts(self) -> (i32, i32) {
        (self.0.div_euclid(12), self.0.rem_euclid(12) + 1)
    }

    /// The month `months` after this one.
    #[must_use]
    fn plus(self, months: i32) -> Self {
        Self(self.0 + months)
    }

    /// The SQL condition for rows of this month.
    pub fn condition(self) -> String {
        format!("created_at >= {} AND created_at < {}", self.start(), self.plus(1).start())
    }

    /// The start of the month as a SQL literal.
    fn start(self) -> String {
        let (year, month) = self.parts();
        format!("'{year:04}-{month:02}-01 00:00:00+00'")
    }
}

/// Why a month could not be created or archived this time. Payments are written nevertheless.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// A long statement holds a lock.
    Locked,
    /// A table of that name exists that is not a partition, for example a detached one.
    NameTaken,
    /// The default partition is too large to be scanned while writers wait.
    TooLarge,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Locked => "a long statement holds the default partition",
            Self::TooLarge => {
                "the default partition is too large to be scanned while writers wait; move its rows by hand"
            }
            Self::NameTaken => "a table of that name exists and is not attached",
        })
    }
}

/// What was done with the months.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MonthsReport {
    /// Names of the created tables.
    pub made: Vec<String>,
    /// Names of the tables that could not be created or archived, and why.
    pub waiting: Vec<(String, Obstacle)>,
    /// Rows moved out of default partitions.
    pub moved: u64,
    /// New names of the tables that were detached for archiving.
    pub archived: Vec<String>,
}

/// Creates months in advance and for rows in the default partitions. With `kept`, also detaches older months
/// for archiving.
pub async fn keep(client: &mut Client, kept: Option<u32>) -> Result<MonthsReport, SchemaError> {
    let current = Month::current(client).await?;
    // From the previous month on: at the start of a month, unread records are still of the previous one.
    let mut report = make_months(client, current.plus(-1), MONTHS_AHEAD + 2).await?;
    for month in found_in_default(client, current).await? {
        add_month(client, month, &mut report).await?;
    }
    if let Some(kept) = kept {
        archive(client, current.plus(-i32::try_from(kept).unwrap_or(i32::MAX)), &mut report).await?;
    }
    Ok(report)
}

/// Number of rows in the default partitions, counted up to a limit for each.
pub async fn default_rows(client: &Client) -> Result<i64, SchemaError> {
    let counts: Vec<String> = PARTITIONED_TABLES
        .iter()
        .map(|t| format!("(SELECT count(*) FROM (SELECT FROM payment_writer.{t}_default LIMIT 100000) AS r)"))
        .collect();
    let query = format!("SELECT {}", counts.join(" + "));
    value(client, "cannot count the rows of the default partitions", &query, &[]).await
}

/// Number of months after the current one that have a partition of every payment table; the daemon keeps it at
/// [`MONTHS_AHEAD`]. 0 also if the current month has none.
pub async fn ahead(client: &Client) -> Result<usize, SchemaError> {
    let current = Month::current(client).await?;
    let attached = "
        SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        JOIN unnest($1::text[]) AS t ON i.inhparent = to_regclass('payment_writer.' || t)";
    let tables = PARTITIONED_TABLES.as_slice();
    let attached: Vec<String> = column(client, "cannot read the months", attached, &[&tables]).await?;
    let has_month = |n: &i32| {
        PARTITIONED_TABLES.iter().all(|table| attached.contains(&format!("{table}_{}", current.plus(*n))))
    };
    Ok((0..=MONTHS_AHEAD).take_while(has_month).count().saturating_sub(1))
}

/// Tables with the name of a month that are not a partition: their payments are missing in the payment tables.
pub async fn unattached(client: &Client) -> Result<Vec<String>, SchemaError> {
    let query = "
        SELECT relname::text FROM pg_class
        WHERE relnamespace = to_regnamespace('payment_writer') AND relkind = 'r' AND NOT relispartition
            AND relname ~ ('^(' || array_to_string($1::text[], '|') || ')_[0-9]{4}_[0-9]{2}$')
        ORDER BY 1";
    column(client, "cannot read the months", query, &[&PARTITIONED_TABLES.as_slice()]).await
}

/// What is said about months that are not attached.
pub fn detached(tables: &[String]) -> String {
    format!(
        "{} detached: payments in it are missing in the payment table, and new ones of its month go to the default \
         partition; rename it, let `payment-writer prune` make the month again, and copy its rows to the payment table \
         with INSERT INTO ... SELECT",
        tables.join(", ") + if tables.len() == 1 { " is" } else { " are" }
    )
}

/// Months of rows in the default partitions, oldest first.
async fn found_in_default(client: &Client, current: Month) -> Result<Vec<Month>, SchemaError> {
    let of_table: Vec<String> = PARTITIONED_TABLES
        .iter()
        .map(|table| {
            format!(
                "SELECT date_trunc('month', created_at AT TIME ZONE 'UTC') AS t FROM \
                 payment_writer.{table}_default WHERE created_at >= {} AND created_at < {}",
                current.plus(-MONTHS_BACK).start(),
                current.plus(MONTHS_AHEAD + 1).start()
            )
        })
        .collect();
    let select = format!(
        "SELECT {MONTH_OF_T} FROM ({}) AS found GROUP BY t ORDER BY t LIMIT {FOUND_MAX}",
        of_table.join(" UNION ALL ")
    );
    let months = column(client, "cannot read the default partitions", &select, &[]).await?;
    Ok(months.into_iter().map(Month).collect())
}

/// Detaches the months before `first_kept` and renames them. The parent is locked briefly, with the same lock
/// timeout as everywhere in this module.
async fn archive(
    client: &mut Client,
    first_kept: Month,
    report: &mut MonthsReport,
) -> Result<(), SchemaError> {
    for table in PARTITIONED_TABLES {
        let older = "
            SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = to_regclass($1) AND c.relname ~ $2 AND c.relname < $3 ORDER BY 1";
        let parent = format!("payment_writer.{table}");
        let pattern = format!("^{table}_[0-9]{{4}}_[0-9]{{2}}$");
        let end = format!("{table}_{first_kept}");
        let doing_this = format!("cannot read the months of {table}");
        for partition in column::<String>(client, &doing_this, older, &[&parent, &pattern, &end]).await? {
            match hand_over(client, table, &partition).await {
                Ok(Some(archived)) => report.archived.push(archived),
                Ok(None) => report.waiting.push((partition, Obstacle::Locked)),
                Err(e) => return Err(doing(format!("cannot detach {partition}"))(e)),
            }
        }
    }
    Ok(())
}

/// Detaches one month and returns the new name of its table; `None` if the lock could not be taken, or if
/// another process detached it.
async fn hand_over(
    client: &Client,
    table: &str,
    partition: &str,
) -> Result<Option<String>, tokio_postgres::Error> {
    // The name can exist already if late records of the same month were archived before.
    let free_name = "
        SELECT name FROM generate_series(1, 1000) AS n,
            concat('archived_', $1::text, CASE WHEN n > 1 THEN '_' || n END) AS name
        WHERE to_regclass('payment_writer.' || name) IS NULL ORDER BY n LIMIT 1";
    let archived: String = client.query_one(free_name, &[&partition]).await?.get(0);
    // The parent, whose lock blocks everyone, is locked last and briefly.
    let detach = format!(
        "SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS};
         SELECT pg_advisory_xact_lock({lock});
         LOCK TABLE payment_writer.{partition} IN ACCESS EXCLUSIVE MODE;
         LOCK TABLE payment_writer.{table}_default IN ACCESS EXCLUSIVE MODE;
         ALTER TABLE payment_writer.{table} DETACH PARTITION payment_writer.{partition};
         ALTER TABLE payment_writer.{partition} RENAME TO {archived}",
        lock = LockKey::Months,
    );
    let retried = [SqlState::LOCK_NOT_AVAILABLE, SqlState::QUERY_CANCELED];
    match with_short_locks(client, &detach, &retried, TRIES_MAX, BETWEEN_TRIES).await {
        Ok(step) => Ok((step == Step::Done).then_some(archived)),
        // Another daemon detached it.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Creates `count` months from `first` on if they are missing.
///
/// Can run concurrently. The role must own the payment tables. Waits for a lock at most 50 ms at a time.
/// Months that cannot be created are in the report and are not an error.
pub async fn make_months(client: &mut Client, first: Month, count: i32) -> Result<MonthsReport, SchemaError> {
    let mut report = MonthsReport::default();
    for n in 0..count {
        add_month(client, first.plus(n), &mut report).await?;
    }
    Ok(report)
}

async fn add_month(client: &mut Client, month: Month, report: &mut MonthsReport) -> Result<(), SchemaError> {
    for table in PARTITIONED_TABLES {
        let partition = format!("{table}_{month}");
        match make_month(client, table, &partition, month).await? {
            Made::Now(moved) => {
                report.made.push(partition);
                report.moved += moved;
            }
            Made::Before => {}
            Made::Not(obstacle) => report.waiting.push((partition, obstacle)),
        }
    }
    Ok(())
}

enum Made {
    /// Created, with this many rows moved from the default partition.
    Now(u64),
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
        match attach(client, table, partition, month).await {
            Ok(made) => return Ok(made),
            Err(e) if e.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {}
            Err(e) if e.code() == Some(&SqlState::QUERY_CANCELED) => {
                return Ok(Made::Not(Obstacle::TooLarge));
            }
            Err(e) => return Err(doing(format!("cannot make {partition}"))(e)),
        }
        if attempt < TRIES_MAX {
            tokio::time::sleep(BETWEEN_TRIES).await;
        }
    }
    Ok(Made::Not(Obstacle::Locked))
}

/// Whether a table of that name exists already.
async fn look_for(client: &Client, table: &str, partition: &str) -> Result<Option<Made>, SchemaError> {
    let query = "
        SELECT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid AND i.inhparent = to_regclass($1))
        FROM pg_class c WHERE c.oid = to_regclass($2)";
    let names = [table, partition].map(|name| format!("payment_writer.{name}"));
    let doing_this = format!("cannot look for {partition}");
    let is_attached = column(client, &doing_this, query, &[&names[0], &names[1]]).await?;
    Ok(is_attached.first().map(|yes| if *yes { Made::Before } else { Made::Not(Obstacle::NameTaken) }))
}

async fn attach(
    client: &mut Client,
    table: &str,
    partition: &str,
    month: Month,
) -> Result<Made, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    // The advisory lock prevents daemons that start together from creating the same table; `lock_timeout`
    // applies to it as well.
    transaction
        .batch_execute(&format!(
            "SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; \
             SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}; \
             SET LOCAL idle_in_transaction_session_timeout = '{IDLE_TIMEOUT}'; \
             SELECT pg_advisory_xact_lock({})",
            LockKey::Months
        ))
        .await?;
    // Read from the catalog: `to_regclass` may use a cache that an advisory lock does not refresh.
    let made_meanwhile = "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                          WHERE n.nspname = 'payment_writer' AND c.relname = $1";
    if transaction.query_opt(made_meanwhile, &[&partition]).await?.is_some() {
        return Ok(Made::Before);
    }
    transaction
        .batch_execute(&format!(
            "CREATE TABLE payment_writer.{partition} \
               (LIKE payment_writer.{table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE); \
             SET LOCAL statement_timeout = '{MOVE_TIMEOUT}'"
        ))
        .await?;
    // The first time moves most rows, without blocking writers, the second those written meanwhile; other
    // sessions always see each row in exactly one of the tables.
    let before = move_rows(&transaction, table, partition, month).await?;
    transaction
        .batch_execute(&format!(
            "SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}; \
             LOCK TABLE payment_writer.{table}_default IN ACCESS EXCLUSIVE MODE"
        ))
        .await?;
    let meanwhile = move_rows(&transaction, table, partition, month).await?;
    transaction
        .batch_execute(&format!(
            "ALTER TABLE payment_writer.{table} ATTACH PARTITION payment_writer.{partition} \
             FOR VALUES FROM ({}) TO ({})",
            month.start(),
            month.plus(1).start()
        ))
        .await?;
    transaction.commit().await?;
    Ok(Made::Now(before + meanwhile))
}

/// Moves the rows of this month out of the default partition. Without such rows there is no DELETE: Postgres
/// refuses it (55000) if the table is published and has no replica identity, as before step 7 of the schema.
async fn move_rows(
    transaction: &Transaction<'_>,
    table: &str,
    partition: &str,
    month: Month,
) -> Result<u64, tokio_postgres::Error> {
    let rows = format!("FROM payment_writer.{table}_default WHERE {}", month.condition());
    if !transaction.query_one(&format!("SELECT EXISTS (SELECT {rows})"), &[]).await?.get::<_, bool>(0) {
        return Ok(0);
    }
    let move_rows = format!(
        "WITH moved AS (DELETE {rows} RETURNING *) \
         INSERT INTO payment_writer.{partition} SELECT * FROM moved"
    );
    transaction.execute(&move_rows, &[]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_follow_each_other_over_the_year() {
        let december = Month::new(2026, 12).unwrap();
        assert_eq!(december.to_string(), "2026_12");
        assert_eq!(december.plus(1).to_string(), "2027_01");
        assert_eq!(december.plus(1).start(), "'2027-01-01 00:00:00+00'");
    }

    #[test]
    fn a_time_has_a_month() {
        let month = |ms| Month::of(TimestampMs(ms)).unwrap().to_string();
        assert_eq!(
            (month(1_709_251_199_999), month(1_709_251_200_000)),
            ("2024_02".into(), "2024_03".into())
        );
        assert_eq!(Month::of(TimestampMs(i64::MAX)), None);
    }

    #[test]
    fn there_is_no_thirteenth_month() {
        assert_eq!(Month::new(2026, 13), None);
        assert_eq!(Month::new(2026, 0), None);
    }
}
