//! Generations of the idempotency table: rotated by a flip of one row, dropped as wholes.
//!
//! Every batch holds the rotation lock shared from before it reads which generation is current until its
//! commit. What changes that row holds it exclusively, so no batch claims into a generation that is no longer
//! current, and none looks into one that is being dropped. The exclusive lock is asked for with a limit of
//! [`LOCK_TIMEOUT_MS`]: writers queue behind the request for no longer than that, whoever holds the lock.

use std::fmt;
use std::time::{Duration, SystemTime};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::record::TimestampMs;
use crate::schema::locks::{self, LockKey};
use crate::schema::{SchemaError, doing};

/// How long a writer can be made to wait for a change of generations.
pub const LOCK_TIMEOUT_MS: u32 = 50;
/// Tries for each lock; what cannot be had is left to the next pass.
const TRIES_MAX: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(250);
/// A scan of a whole generation, once in its life.
const MEASURE_TIMEOUT: &str = "2h";

/// Where a generation is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Its table was made ahead of time.
    Ready,
    /// Claims go there.
    Current,
    /// Looked into, not written.
    Older,
    /// Nobody looks any more; its table still hangs below `idempotency`.
    Retired,
    /// A table on its own.
    Detached,
}

impl State {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "ready" => Self::Ready,
            "current" => Self::Current,
            "older" => Self::Older,
            "retired" => Self::Retired,
            "detached" => Self::Detached,
            _ => return None,
        })
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Current => "current",
            Self::Older => "older",
            Self::Retired => "retired",
            Self::Detached => "detached",
        })
    }
}

/// One generation that has a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Generation {
    /// Its number.
    pub number: i64,
    /// Name of its table, without the schema.
    pub leaf: String,
    /// Where it is in its life.
    pub state: State,
    /// Time since it became current, by the database's clock; `None` if it never was.
    pub age: Option<Duration>,
    /// Largest record timestamp in it; `None` while it is written or not measured. `i64::MIN`: it is empty.
    pub youngest: Option<TimestampMs>,
    /// Rows: counted once it is no longer written, the planner's estimate before.
    pub rows: i64,
    /// Bytes of table and index.
    pub bytes: i64,
}

/// All generations that have a table, oldest first.
pub async fn list(client: &Client) -> Result<Vec<Generation>, SchemaError> {
    let rows = client
        .query(
            "SELECT g.generation, g.leaf, g.state,
                    extract(epoch FROM now() - g.made_current_at)::float8,
                    CASE WHEN g.youngest_record = '-infinity' THEN -9223372036854775808
                         ELSE floor(extract(epoch FROM g.youngest_record) * 1000)::bigint END,
                    coalesce(g.row_count, greatest(c.reltuples, 0)::bigint, 0),
                    coalesce(pg_total_relation_size(c.oid), 0)
             FROM payment_writer.idempotency_generation g
             LEFT JOIN pg_class c ON c.oid = to_regclass('payment_writer.' || quote_ident(g.leaf))
             WHERE g.state <> 'dropped'
             ORDER BY g.generation",
            &[],
        )
        .await
        .map_err(doing("cannot read the generations"))?;
    Ok(rows
        .iter()
        .filter_map(|row| {
            let seconds: Option<f64> = row.get(3);
            Some(Generation {
                number: row.get(0),
                leaf: row.get(1),
                state: State::parse(row.get(2))?,
                // A clock that stepped back makes a young generation, not a negative age.
                age: seconds.map(|s| Duration::from_secs_f64(s.max(0.0))),
                youngest: row.get::<_, Option<i64>>(4).map(TimestampMs),
                rows: row.get(5),
                bytes: row.get(6),
            })
        })
        .collect())
}

/// How a step that needs a lock ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Done.
    Done,
    /// Somebody held the lock all the time; the next pass tries again.
    Locked,
}

/// Runs statements as one transaction whose locks are waited for briefly, again and again. They go out in one
/// message together with the COMMIT: a housekeeper that is stopped or cut off does not hold the locks.
async fn with_short_locks(client: &Client, what: &str, statements: &str) -> Result<Step, SchemaError> {
    let transaction = format!("BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; {statements}; COMMIT");
    for attempt in 1..=TRIES_MAX {
        let Err(error) = client.batch_execute(&transaction).await else { return Ok(Step::Done) };
        client.batch_execute("ROLLBACK").await.map_err(doing(what.to_owned()))?;
        if error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Err(doing(what.to_owned())(error));
        }
        if attempt < TRIES_MAX {
            tokio::time::sleep(BETWEEN_TRIES).await;
        }
    }
    Ok(Step::Locked)
}

fn lock_rotation() -> String {
    format!("SELECT pg_advisory_xact_lock({}, {})", locks::CLASS, LockKey::Rotation.number())
}

/// Makes the table of a generation, ahead of the rotation that will need it.
pub async fn make(client: &Client, number: i64) -> Result<Step, SchemaError> {
    let make = format!("SELECT payment_writer.make_generation_v1({number})");
    with_short_locks(client, "cannot make a generation", &make).await
}

/// Makes `next` the current generation. Batches that are under way finish in the old one first.
pub async fn rotate(client: &Client, current: i64, next: i64) -> Result<Step, SchemaError> {
    // Newest first: that is where a duplicate most likely is.
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
    with_short_locks(client, "cannot rotate", &rotate).await
}

/// Reads a generation that is no longer written from end to end: its youngest record, its rows, and the
/// largest first 48 bits of its ids. Takes no lock that anybody waits for.
pub async fn measure(client: &mut Client, generation: &Generation) -> Result<(), SchemaError> {
    let failed = |error| doing(format!("cannot measure {}", generation.leaf))(error);
    let transaction = client.transaction().await.map_err(failed)?;
    transaction
        .batch_execute(&format!("SET LOCAL statement_timeout = '{MEASURE_TIMEOUT}'"))
        .await
        .map_err(failed)?;
    // By itself, so that the server may use several processes for it. Two texts of twelve hexadecimal digits
    // compare as their numbers do.
    let measure = format!(
        "SELECT count(*), max(created_at),
                max(head COLLATE \"C\") FILTER (WHERE is_v7), max(head COLLATE \"C\") FILTER (WHERE NOT is_v7)
         FROM (SELECT created_at, left(id, 8) || substr(id, 10, 4) AS head,
                      substr(id, 15, 1) = '7' AND substr(id, 20, 1) IN ('8', '9', 'a', 'b') AS is_v7
               FROM (SELECT created_at, message_id::text AS id FROM payment_writer.\"{}\") AS ids) AS heads",
        generation.leaf
    );
    let row = transaction.query_one(&measure, &[]).await.map_err(failed)?;
    let (rows, youngest): (i64, Option<SystemTime>) = (row.get(0), row.get(1));
    // Above the bound of a kind that has no id there is everything.
    let bound = |index| {
        row.get::<_, Option<&str>>(index).and_then(|head| i64::from_str_radix(head, 16).ok()).unwrap_or(-1)
    };
    let (v7_max, other_max): (i64, i64) = (bound(2), bound(3));
    transaction
        .execute(
            "WITH noted AS (
                 UPDATE payment_writer.idempotency_generation
                 SET row_count = $2, youngest_record = coalesce($3::timestamptz, '-infinity'), v7_time_max = $4,
                     other_time_max = $5
                 WHERE generation = $1 AND state IN ('older', 'retired')
             )
             UPDATE payment_writer.idempotency_current
             SET older_youngest[array_position(older_generations, $1)] = coalesce($3::timestamptz, '-infinity'),
                 older_v7_time_max[array_position(older_generations, $1)] = $4,
                 older_other_time_max[array_position(older_generations, $1)] = $5
             WHERE $1 = ANY (older_generations)",
            &[&generation.number, &rows, &youngest, &v7_max, &other_max],
        )
        .await
        .map_err(failed)?;
    transaction.commit().await.map_err(failed)
}

/// Takes a generation out of those that batches look into.
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
    with_short_locks(client, "cannot retire a generation", &retire).await
}

/// Makes the table of a retired generation one of its own. Waits, briefly, for readers of it; writers do
/// not use it any more.
pub async fn detach(client: &Client, generation: &Generation) -> Result<Step, SchemaError> {
    let Generation { number, leaf, .. } = generation;
    let detach = format!(
        "ALTER TABLE payment_writer.\"{leaf}\" NO INHERIT payment_writer.idempotency;
         UPDATE payment_writer.idempotency_generation SET state = 'detached', detached_at = now()
         WHERE generation = {number} AND state = 'retired'"
    );
    with_short_locks(client, "cannot detach a generation", &detach).await
}

/// Drops the table of a detached generation; only its row in `idempotency_generation` is left.
pub async fn drop_table(client: &Client, generation: &Generation) -> Result<Step, SchemaError> {
    let Generation { number, leaf, .. } = generation;
    let drop = format!(
        "DROP TABLE IF EXISTS payment_writer.\"{leaf}\";
         UPDATE payment_writer.idempotency_generation SET state = 'dropped', dropped_at = now()
         WHERE generation = {number} AND state = 'detached'"
    );
    with_short_locks(client, "cannot drop a generation", &drop).await
}
