//! Months of the payment tables, made ahead of the records that will need them.
//!
//! A month is made as a table of its own and then attached. `CREATE TABLE … PARTITION OF` would be one
//! statement, but locks the parent against everybody (ACCESS EXCLUSIVE), and so waits for every writer and
//! reader and makes all later ones wait for itself. ATTACH takes SHARE UPDATE EXCLUSIVE on the parent, which
//! writers and readers do not notice, and ACCESS EXCLUSIVE only on the new table, which nobody else can see
//! yet, and on the default partition, which is empty unless something is wrong. The new table is empty, so
//! no CHECK constraint is needed to save a scan of it. Rows of the month that are in the default partition are
//! moved in the same transaction: most before the default partition is locked, those that came meanwhile
//! after. It is scanned under its lock, and `statement_timeout` bounds that.

use std::fmt;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::locks::{self, LockKey};
use super::{SchemaError, doing};
use crate::record::TimestampMs;

/// The tables that are partitioned by month of `created_at`.
pub const PARTITIONED_TABLES: [&str; 3] = ["payment_core", "payment_metadata", "payment_notes"];

/// How many months after the current one are made.
pub const MONTHS_AHEAD: u32 = 2;

/// Rows in the default partitions get a month of their own when it lies no further back than this: a
/// producer's wrong clock must not fill the catalog with tables.
const MONTHS_BACK: u32 = 24;
/// Months that are made of default rows in one pass.
const FOUND_MAX: i64 = 12;
/// How long rows may be moved out of a default partition; writers are not held up by that.
const MOVE_TIMEOUT: &str = "10min";

/// How long a writer that needs the default partition can be made to wait.
const LOCK_TIMEOUT_MS: u32 = 50;
/// How long the default partition may be scanned under the lock.
const STATEMENT_TIMEOUT_MS: u32 = 250;
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

    /// The month of this time; `None` outside the years 1 to 9998.
    pub fn of(at: TimestampMs) -> Option<Self> {
        let date = jiff::Timestamp::from_millisecond(at.0).ok()?.to_zoned(jiff::tz::TimeZone::UTC).date();
        Self::new(date.year().into(), date.month().unsigned_abs().into())
    }

    /// The month before this one.
    #[must_use]
    pub fn previous(self) -> Self {
        match self.month {
            1 => Self { year: self.year - 1, month: 12 },
            _ => Self { month: self.month - 1, ..self },
        }
    }

    /// So many months earlier.
    #[must_use]
    pub fn back(self, months: u32) -> Self {
        (0..months).fold(self, |month, _| month.previous())
    }

    /// The month after this one.
    #[must_use]
    pub fn next(self) -> Self {
        match self.month {
            12 => Self { year: self.year + 1, month: 1 },
            _ => Self { month: self.month + 1, ..self },
        }
    }

    /// What a row of a payment table of this month satisfies.
    pub fn condition(self) -> String {
        format!("created_at >= {} AND created_at < {}", self.start(), self.next().start())
    }

    /// Its first moment, as a literal.
    fn start(self) -> String {
        format!("'{:04}-{:02}-01 00:00:00+00'", self.year, self.month)
    }
}

/// Why a month could not be made this time. None of these keeps payments from being written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// A long statement on the default partition is in the way.
    Locked,
    /// A table of that name exists and is no partition: it was detached, or is somebody's.
    NameTaken,
    /// The default partition is too large to be looked through while writers wait.
    TooLarge,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Locked => "a long statement holds the default partition",
            Self::TooLarge => {
                "the default partition is too large to be looked through while writers wait; move its rows by hand"
            }
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
    /// Rows that were moved out of default partitions.
    pub moved: u64,
    /// Names, as they are now, of the tables that were handed over for archiving.
    pub archived: Vec<String>,
}

/// All that is due: months ahead, months for rows that are in the default partitions, and, if so many are to
/// be kept, months handed over for archiving.
pub async fn keep(client: &mut Client, kept: Option<u32>) -> Result<MonthsReport, SchemaError> {
    let current = Month::current(client).await?;
    // From the month before: at the start of one, what waits in the log is of the last.
    let mut report = make_months(client, current.previous(), MONTHS_AHEAD + 2).await?;
    for month in found_in_default(client, current).await? {
        add_month(client, month, &mut report).await?;
    }
    if let Some(kept) = kept {
        archive(client, current.back(kept), &mut report).await?;
    }
    Ok(report)
}

/// Rows in the default partitions, counted up to a limit for each.
pub async fn default_rows(client: &Client) -> Result<i64, SchemaError> {
    let counts: Vec<String> = PARTITIONED_TABLES
        .iter()
        .map(|t| format!("(SELECT count(*) FROM (SELECT FROM payment_writer.{t}_default LIMIT 100000) AS r)"))
        .collect();
    let row = client
        .query_one(&format!("SELECT {}", counts.join(" + ")), &[])
        .await
        .map_err(doing("cannot count the rows of the default partitions"))?;
    Ok(row.get(0))
}

/// Months of rows in the default partitions, oldest first.
async fn found_in_default(client: &Client, current: Month) -> Result<Vec<Month>, SchemaError> {
    let mut end = current;
    for _ in 0..=MONTHS_AHEAD {
        end = end.next();
    }
    let of_table: Vec<String> = PARTITIONED_TABLES
        .iter()
        .map(|table| {
            format!(
                "SELECT date_trunc('month', created_at AT TIME ZONE 'UTC') AS m FROM payment_writer.{table}_default \
                 WHERE created_at >= {} AND created_at < {}",
                current.back(MONTHS_BACK).start(),
                end.start()
            )
        })
        .collect();
    let select = format!(
        "SELECT extract(year FROM m)::int, extract(month FROM m)::int FROM ({}) AS found \
         GROUP BY m ORDER BY m LIMIT {FOUND_MAX}",
        of_table.join(" UNION ALL ")
    );
    let rows = client.query(&select, &[]).await.map_err(doing("cannot read the default partitions"))?;
    Ok(rows
        .iter()
        .map(|row| Month { year: row.get(0), month: row.get::<_, i32>(1).unsigned_abs() })
        .collect())
}

/// Detaches the months before `first_kept` and renames them. The parent is locked for the moment of the
/// detachment, and waited for as briefly as anything here.
async fn archive(
    client: &mut Client,
    first_kept: Month,
    report: &mut MonthsReport,
) -> Result<(), SchemaError> {
    for table in PARTITIONED_TABLES {
        let attached = client
            .query(
                "SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid \
                 WHERE i.inhparent = to_regclass($1) AND c.relname ~ $2 AND c.relname < $3 ORDER BY 1",
                &[
                    &format!("payment_writer.{table}"),
                    &format!("^{table}_[0-9]{{4}}_[0-9]{{2}}$"),
                    &format!("{table}_{first_kept}"),
                ],
            )
            .await
            .map_err(doing(format!("cannot read the months of {table}")))?;
        for row in &attached {
            let partition: String = row.get(0);
            match hand_over(client, table, &partition).await {
                Ok(Some(archived)) => report.archived.push(archived),
                Ok(None) => report.waiting.push((partition, Obstacle::Locked)),
                Err(e) => return Err(doing(format!("cannot detach {partition}"))(e)),
            }
        }
    }
    Ok(())
}

/// Detaches one month, and says what its table is called now; `None` if it was locked all the time, or is
/// gone already.
async fn hand_over(
    client: &Client,
    table: &str,
    partition: &str,
) -> Result<Option<String>, tokio_postgres::Error> {
    // The name may be taken by what came late for the same month the last time.
    let row = client
        .query_one(
            "SELECT name FROM (SELECT 'archived_' || $1 || suffix AS name, n
                 FROM (SELECT n, CASE n WHEN 1 THEN '' ELSE '_' || n END AS suffix FROM generate_series(1, 1000) AS n) AS s
             ) AS names
             WHERE to_regclass('payment_writer.' || name) IS NULL ORDER BY n LIMIT 1",
            &[&partition],
        )
        .await?;
    let archived: String = row.get(0);
    // What is locked for everybody, the parent, comes last and is locked for a moment; in one message, so that
    // nobody who is stopped or cut off holds it.
    let transaction = format!(
        "BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS};
         SELECT pg_advisory_xact_lock({class}, {key});
         LOCK TABLE payment_writer.{partition} IN ACCESS EXCLUSIVE MODE;
         LOCK TABLE payment_writer.{table}_default IN ACCESS EXCLUSIVE MODE;
         ALTER TABLE payment_writer.{table} DETACH PARTITION payment_writer.{partition};
         ALTER TABLE payment_writer.{partition} RENAME TO {archived};
         COMMIT",
        class = locks::CLASS,
        key = LockKey::Months.number(),
    );
    for attempt in 1..=TRIES_MAX {
        let Err(error) = client.batch_execute(&transaction).await else { return Ok(Some(archived)) };
        client.batch_execute("ROLLBACK").await?;
        match error.code() {
            Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED) => {}
            // Another daemon was faster.
            Some(&SqlState::UNDEFINED_TABLE) => return Ok(None),
            _ => return Err(error),
        }
        if attempt < TRIES_MAX {
            tokio::time::sleep(BETWEEN_TRIES).await;
        }
    }
    Ok(None)
}

/// Makes the current month and [`MONTHS_AHEAD`] more where they are absent; [`keep`] is what the daemon does.
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
        add_month(client, month, &mut report).await?;
        month = month.next();
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
    /// With so many rows that had been in the default partition.
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
            Err(e) => match e.code() {
                Some(&SqlState::LOCK_NOT_AVAILABLE) if attempt < TRIES_MAX => {
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                Some(&SqlState::LOCK_NOT_AVAILABLE) => return Ok(Made::Not(Obstacle::Locked)),
                Some(&SqlState::QUERY_CANCELED) => return Ok(Made::Not(Obstacle::TooLarge)),
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
    let in_month = month.condition();
    let move_rows = format!(
        "WITH moved AS (DELETE FROM payment_writer.{table}_default WHERE {in_month} RETURNING *) \
         INSERT INTO payment_writer.{partition} SELECT * FROM moved"
    );
    transaction
        .batch_execute(&format!(
            "CREATE TABLE payment_writer.{partition} \
               (LIKE payment_writer.{table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE); \
             SET LOCAL statement_timeout = '{MOVE_TIMEOUT}'"
        ))
        .await?;
    // Most of them, while writers go on; they are seen in one place or the other, never in none.
    let mut moved = transaction.execute(&move_rows, &[]).await?;
    transaction
        .batch_execute(&format!(
            "SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}; \
             LOCK TABLE payment_writer.{table}_default IN ACCESS EXCLUSIVE MODE"
        ))
        .await?;
    // And those that came meanwhile.
    moved += transaction.execute(&move_rows, &[]).await?;
    transaction
        .batch_execute(&format!(
            "ALTER TABLE payment_writer.{table} ATTACH PARTITION payment_writer.{partition} \
             FOR VALUES FROM ({}) TO ({})",
            month.start(),
            month.next().start()
        ))
        .await?;
    transaction.commit().await?;
    Ok(Made::Now(moved))
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
