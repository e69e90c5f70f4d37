//! Generations of the idempotency table: a rotation updates one row, pruning drops whole tables.
//!
//! Every batch takes the rotation lock in shared mode before it reads the current generation, and holds it
//! until its commit. A change of that row takes the lock in exclusive mode, so no batch claims into a
//! generation that is no longer current or looks into one that is being dropped. The exclusive request has a
//! timeout of [`LOCK_TIMEOUT_MS`](crate::postgres::schema::locks::LOCK_TIMEOUT_MS): writers queue behind it for at most that long, whoever holds the lock.

use std::fmt;
use std::time::{Duration, SystemTime};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use crate::domain::record::TimestampMs;
pub use crate::postgres::schema::locks::Step;
use crate::postgres::schema::locks::{LockKey, with_short_locks};
use crate::postgres::schema::{SchemaError, doing};

/// Attempts for each lock; after that the step is left to the next pass.
const TRIES_MAX: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(250);
/// Timeout of the scan of a whole generation, which is done once per generation.
const MEASURE_TIMEOUT: &str = "2h";

/// The lifecycle state of a generation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Its table was created in advance.
    Ready,
    /// Batches write their claims to it.
    Current,
    /// Batches read it, but do not write it.
    Older,
    /// Batches do not use it; its table still inherits from `idempotency`.
    Retired,
    /// Its table does not inherit from `idempotency` any more.
    Detached,
}

impl State {
    const NAMES: [(Self, &str); 5] = [
        (Self::Ready, "ready"),
        (Self::Current, "current"),
        (Self::Older, "older"),
        (Self::Retired, "retired"),
        (Self::Detached, "detached"),
    ];

    fn parse(text: &str) -> Option<Self> {
        Self::NAMES.into_iter().find(|(_, name)| *name == text).map(|(state, _)| state)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::NAMES.into_iter().find(|(state, _)| state == self);
        f.write_str(named.map_or("", |(_, name)| name))
    }
}

/// One generation that has a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Generation {
    /// Number of the generation; later ones have higher numbers.
    pub number: i64,
    /// Name of its table, without the schema.
    pub leaf: String,
    /// The lifecycle state.
    pub state: State,
    /// Time since it became current, by the database's clock; `None` if it never was.
    pub age: Option<Duration>,
    /// Largest record timestamp; `None` while it is current or not measured; `i64::MIN` if it is empty.
    pub youngest: Option<TimestampMs>,
    /// Rows: the planner's estimate, or the exact count once measured.
    pub rows: i64,
    /// Bytes of table and index.
    pub bytes: i64,
}

/// All generations that have a table, oldest first.
pub async fn list(client: &Client) -> Result<Vec<Generation>, SchemaError> {
    let query = "
        SELECT g.generation, g.leaf, g.state,
            extract(epoch FROM now() - g.made_current_at)::float8,
            CASE WHEN g.youngest_record = '-infinity' THEN -9223372036854775808
                 ELSE floor(extract(epoch FROM g.youngest_record) * 1000)::bigint END,
            coalesce(g.row_count, greatest(c.reltuples, 0)::bigint, 0),
            coalesce(pg_total_relation_size(c.oid), 0)
        FROM payment_writer.idempotency_generation g
        LEFT JOIN pg_class c ON c.oid = to_regclass('payment_writer.' || quote_ident(g.leaf))
        WHERE g.state <> 'dropped'
        ORDER BY g.generation";
    let rows = client.query(query, &[]).await.map_err(doing("cannot read the generations"))?;
    let generation = |row: &Row| {
        Some(Generation {
            number: row.get(0),
            leaf: row.get(1),
            state: State::parse(row.get(2))?,
            // After the clock stepped back the age would be negative.
            age: row.get::<_, Option<f64>>(3).map(|s| Duration::from_secs_f64(s.max(0.0))),
            youngest: row.get::<_, Option<i64>>(4).map(TimestampMs),
            rows: row.get(5),
            bytes: row.get(6),
        })
    };
    Ok(rows.iter().filter_map(generation).collect())
}

async fn step(client: &Client, what: &str, statements: &str) -> Result<Step, SchemaError> {
    with_short_locks(client, statements, &[SqlState::LOCK_NOT_AVAILABLE], TRIES_MAX, BETWEEN_TRIES)
        .await
        .map_err(doing(what))
}

fn lock_rotation() -> String {
    format!("SELECT pg_advisory_xact_lock({})", LockKey::Rotation)
}

/// Creates the table of a generation in advance of the rotation that needs it.
pub async fn make(client: &Client, number: i64) -> Result<Step, SchemaError> {
    let make = format!("SELECT payment_writer.make_generation_v1({number})");
    step(client, "cannot create a generation", &make).await
}

/// Makes `next` the current generation. Batches in progress finish in the old one first.
pub async fn rotate(client: &Client, current: i64, next: i64) -> Result<Step, SchemaError> {
    // Newest first, because duplicates are most likely there.
    let rotate = format!(
        "{lock};
         UPDATE payment_writer.idempotency_generation SET state = 'older', made_older_at = now()
         WHERE generation = {current} AND state = 'current';
         UPDATE payment_writer.idempotency_generation SET state = 'current', made_current_at = now()
         WHERE generation = {next} AND state = 'ready';
         UPDATE payment_writer.idempotency_current
         SET current_generation = {next}, changed_at = now(),
             older_generations = current_generation || older_generations,
             older_youngest = NULL::timestamptz || older_youngest,
             older_v7_time_max = NULL::bigint || older_v7_time_max,
             older_other_time_max = NULL::bigint || older_other_time_max
         WHERE current_generation = {current}",
        lock = lock_rotation()
    );
    step(client, "cannot rotate", &rotate).await
}

/// Scans a generation that is no longer current: its youngest record, its number of rows, and the largest
/// value of the first 48 bits of its ids. Takes no lock that blocks other sessions.
pub async fn measure(client: &mut Client, generation: &Generation) -> Result<(), SchemaError> {
    let measured = measure_in_transaction(client, generation).await;
    measured.map_err(doing(format!("cannot measure {}", generation.leaf)))
}

const NOTE_MEASURED: &str = "
    WITH noted AS (
        UPDATE payment_writer.idempotency_generation
        SET row_count = $2, youngest_record = coalesce($3::timestamptz, '-infinity'), v7_time_max = $4,
            other_time_max = $5
        WHERE generation = $1 AND state IN ('older', 'retired')
    )
    UPDATE payment_writer.idempotency_current
    SET older_youngest[array_position(older_generations, $1)] = coalesce($3::timestamptz, '-infinity'),
        older_v7_time_max[array_position(older_generations, $1)] = $4,
        older_other_time_max[array_position(older_generations, $1)] = $5
    WHERE $1 = ANY (older_generations)";

async fn measure_in_transaction(
    client: &mut Client,
    generation: &Generation,
) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction.batch_execute(&format!("SET LOCAL statement_timeout = '{MEASURE_TIMEOUT}'")).await?;
    // A separate SELECT, so that the server can run it in parallel. Texts of twelve hexadecimal digits
    // compare like their numbers.
    let measure = format!(
        "SELECT count(*), max(created_at),
                max(head COLLATE \"C\") FILTER (WHERE is_v7), max(head COLLATE \"C\") FILTER (WHERE NOT is_v7)
         FROM (SELECT created_at, left(id, 8) || substr(id, 10, 4) AS head,
                      substr(id, 15, 1) = '7' AND substr(id, 20, 1) IN ('8', '9', 'a', 'b') AS is_v7
               FROM (SELECT created_at, message_id::text AS id FROM payment_writer.\"{}\") AS ids) AS heads",
        generation.leaf
    );
    let row = transaction.query_one(&measure, &[]).await?;
    let (rows, youngest): (i64, Option<SystemTime>) = (row.get(0), row.get(1));
    // Without an id of a kind, the bound is below every id of that kind.
    let bound = |index| {
        row.get::<_, Option<&str>>(index).and_then(|head| i64::from_str_radix(head, 16).ok()).unwrap_or(-1)
    };
    let bounds: (i64, i64) = (bound(2), bound(3));
    let parameters: [&(dyn ToSql + Sync); 5] = [&generation.number, &rows, &youngest, &bounds.0, &bounds.1];
    transaction.execute(NOTE_MEASURED, &parameters).await?;
    transaction.commit().await
}

/// Removes a generation from those that batches read.
pub async fn retire(client: &Client, number: i64) -> Result<Step, SchemaError> {
    let retire = format!(
        "{lock};
         WITH kept AS (
             SELECT coalesce(array_agg(g ORDER BY n), '{{}}') AS generations,
                    coalesce(array_agg(y ORDER BY n), '{{}}') AS youngest,
                    coalesce(array_agg(v ORDER BY n), '{{}}') AS v7_max,
                    coalesce(array_agg(o ORDER BY n), '{{}}') AS other_max
             FROM payment_writer.idempotency_current,
                  unnest(older_generations, older_youngest, older_v7_time_max, older_other_time_max)
                      WITH ORDINALITY AS u (g, y, v, o, n)
             WHERE g <> {number}
         )
         UPDATE payment_writer.idempotency_current
         SET older_generations = generations, older_youngest = youngest,
             older_v7_time_max = v7_max, older_other_time_max = other_max, changed_at = now()
         FROM kept;
         UPDATE payment_writer.idempotency_generation SET state = 'retired', retired_at = now()
         WHERE generation = {number} AND state = 'older'",
        lock = lock_rotation()
    );
    step(client, "cannot retire a generation", &retire).await
}

/// Ends the inheritance of a retired generation's table. Waits briefly for its readers; writers do not use it
/// any more.
pub async fn detach(client: &Client, generation: &Generation) -> Result<Step, SchemaError> {
    let Generation { number, leaf, .. } = generation;
    let detach = format!(
        "ALTER TABLE payment_writer.\"{leaf}\" NO INHERIT payment_writer.idempotency;
         UPDATE payment_writer.idempotency_generation SET state = 'detached', detached_at = now()
         WHERE generation = {number} AND state = 'retired'"
    );
    step(client, "cannot detach a generation", &detach).await
}

/// Drops the table of a detached generation; its row in `idempotency_generation` stays.
pub async fn drop_table(client: &Client, generation: &Generation) -> Result<Step, SchemaError> {
    let Generation { number, leaf, .. } = generation;
    let drop = format!(
        "DROP TABLE IF EXISTS payment_writer.\"{leaf}\";
         UPDATE payment_writer.idempotency_generation SET state = 'dropped', dropped_at = now()
         WHERE generation = {number} AND state = 'detached'"
    );
    step(client, "cannot drop a generation", &drop).await
}
