//! A lane's session: its settings, prepared statements and errors.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use deadpool_postgres::{ClientWrapper, Object, Pool, PoolError};
use tokio_postgres::Statement;

use crate::domain::cursor::{Identity, IdentityMismatch};
use crate::domain::outcome::{FailureClass, SqlState};
use crate::ports::StoreError;
use crate::postgres::binding::database_id;
use crate::postgres::connection::{backend_pid, class_of, describe};
use crate::postgres::schema::locks::LockKey;
use crate::postgres::schema::{SchemaError, shape};
use crate::telemetry::logging::RateLimited;

/// Settings of a lane's session. `transaction_timeout` (from Postgres 17) is just longer than the limit for
/// bisecting a batch. Nested loops and sequential scans are disabled: the planner may choose them while
/// tables are empty, and they are very slow on full tables.
const SETTINGS: &str = "
    SET statement_timeout = '45s';
    SET lock_timeout = '30s';
    SET enable_nestloop = off;
    SET enable_seqscan = off;
    SELECT set_config('transaction_timeout', '360s', false) FROM pg_settings WHERE name = 'transaction_timeout';
";

/// `replaces` is read from the row as JSON, which has no such field before step 9.
const CURSORS: &str = "
    SELECT c.partition, c.applied, c.published, c.applied_timestamp, s.committed, to_jsonb(s) ->> 'replaces'
    FROM payment_writer.source_cursor c
    LEFT JOIN payment_writer.cursor_settlement s USING (topic_id, partition)
    WHERE c.topic_id = $1 AND c.partition = ANY ($2)";

/// The parameters are documented in `sql/V3__cursors_and_identity.sql`.
const MOVE_CURSORS: &str = "SELECT payment_writer.move_cursors_v1($1, $2, $3, $4, $5, $6)";

/// Moves cursors whose place in the table is known, without a look at their earlier versions: while a snapshot is
/// held, all of them stay, and every index of the row leads to each. Parameters and rules are those of
/// `move_cursors_v1`, and the places; returns partition and new place of each row that was moved. The conditions on
/// `topic_id` and `partition` are written so that no index can serve them. Rows are locked in the order of their places,
/// not of partitions: two lanes that both believe to own several partitions may deadlock, which the server ends with
/// 40P01, a transient failure.
const MOVE_KNOWN: &str = "
    UPDATE payment_writer.source_cursor c
    SET applied = greatest(c.applied, m.applied),
        published = greatest(c.published, m.published),
        applied_timestamp = CASE
            WHEN m.applied > c.applied
                THEN nullif(coalesce(m.applied_timestamp, c.applied_timestamp), '-infinity')
            ELSE c.applied_timestamp
        END
    FROM unnest($2::integer[], $3::bigint[], $4::bigint[], $5::bigint[], $6::timestamptz[])
        AS m (partition, seen, applied, published, applied_timestamp)
    WHERE c.ctid = ANY ($7::text[]::tid[]) AND c.topic_id::text = $1::uuid::text
        AND c.partition + 0 = m.partition AND c.applied = m.seen
    RETURNING c.partition, c.ctid::text";

/// Where cursors are in the table. Parameters: topic id, partitions.
const PLACES: &str = "
    SELECT partition, ctid::text FROM payment_writer.source_cursor
    WHERE topic_id = $1 AND partition = ANY ($2)";

/// The generations, and the UTC date as days since 2000-01-01.
const GENERATIONS: &str = "
    SELECT current_generation, older_generations, older_v7_time_max, older_other_time_max,
        (now() AT TIME ZONE 'UTC')::date - date '2000-01-01'
    FROM payment_writer.idempotency_current";

const COPY_CORE: &str = "
    COPY payment_writer.payment_core (payment_id, created_at, cust_id, amount, currency, status, type)
    FROM STDIN (FORMAT binary)";
const COPY_METADATA: &str = "
    COPY payment_writer.payment_metadata
        (payment_id, created_at, updated_at, version, message_id, source_partition, source_offset)
    FROM STDIN (FORMAT binary)";
const COPY_NOTES: &str = "
    COPY payment_writer.payment_notes (payment_id, created_at, external_ref_id, comment)
    FROM STDIN (FORMAT binary)";

/// Parameters: topic id, partitions, `applied` as last read (null: no row), new `applied` and `published`.
pub(super) const UPDATE_CURSORS: &str = "
    UPDATE payment_writer.source_cursor c
    SET applied = n.applied, published = n.published
    FROM unnest($2::integer[], $3::bigint[], $4::bigint[], $5::bigint[])
        AS n (partition, seen, applied, published)
    WHERE c.topic_id = $1 AND c.partition = n.partition AND c.applied = n.seen";

/// Parameters: the topic's name, then those of [`UPDATE_CURSORS`].
pub(super) const INSERT_CURSORS: &str = "
    INSERT INTO payment_writer.source_cursor (topic, topic_id, partition, applied, published)
    SELECT $1, $2, n.partition, n.applied, n.published
    FROM unnest($3::integer[], $4::bigint[], $5::bigint[], $6::bigint[])
        AS n (partition, seen, applied, published)
    WHERE n.seen IS NULL
    ON CONFLICT (topic_id, partition) DO NOTHING";

pub(super) const DELETE_SETTLEMENTS: &str = "
    DELETE FROM payment_writer.cursor_settlement s
    USING unnest($2::integer[], $3::bigint[]) AS taken (partition, committed)
    WHERE s.topic_id = $1 AND s.partition = taken.partition AND s.committed = taken.committed";

/// Whether a generation has the key that prevents claiming an id twice. Parameter: its number.
const HAS_KEY: &str = "
    SELECT EXISTS (
        SELECT FROM pg_catalog.pg_index i
        JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = to_regclass('payment_writer.idempotency_g' || $1::bigint)
            AND a.attname = 'message_id' AND i.indnatts = 1
            AND i.indisunique AND i.indisvalid AND i.indisready AND i.indimmediate
            AND i.indpred IS NULL AND i.indexprs IS NULL)";

/// Interval between comparisons of the schema's shape by a session in use.
const SHAPE_CHECK: Duration = Duration::from_secs(60);

/// Proof that the claims of the open transaction are in a table in which no id can be twice.
pub(super) struct KeyHolds(());

/// Ends the sessions of hung processes with an open transaction that moved cursors, but not those that only read them,
/// as a backup. For the server, a session
/// that waits for COPY data is not idle, and no server timeout interrupts it. Ending it is safe: uncommitted
/// work is repeated by the owner of the partition. Of other roles, the server permits to end sessions to their members
/// alone.
const END_HUNG_SESSIONS: &str = "
    SELECT count(pg_terminate_backend(a.pid))
    FROM (
        SELECT DISTINCT pid FROM pg_locks
        WHERE relation = 'payment_writer.source_cursor'::regclass AND granted AND pid <> pg_backend_pid()
            AND mode <> 'AccessShareLock'
    ) l
    JOIN pg_stat_activity a USING (pid)
    WHERE pg_has_role(a.usesysid, 'USAGE') AND a.wait_event_type = 'Client'
        AND a.xact_start < clock_timestamp() - interval '30 seconds'";

/// Claims ids in order and returns those that already exist. If there are none, the count avoids the
/// anti-join.
fn claim_sql(generation: i64) -> String {
    format!(
        "WITH input AS MATERIALIZED (
            SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::timestamptz[], $5::integer[])
                AS i (message_id, source_offset, payload_hash, created_at, source_partition)
        ), claimed AS (
            INSERT INTO payment_writer.idempotency_g{generation}
                (message_id, source_offset, payload_hash, created_at, source_partition, date)
            SELECT message_id, source_offset, payload_hash, created_at, source_partition,
                (SELECT (now() AT TIME ZONE 'UTC')::date)
            FROM input
            ON CONFLICT (message_id) DO NOTHING
            RETURNING message_id
        )
        SELECT i.message_id FROM input i
        WHERE (SELECT count(*) FROM claimed) < cardinality($1::uuid[])
            AND NOT EXISTS (SELECT 1 FROM claimed c WHERE c.message_id = i.message_id)"
    )
}

/// An error that the server did not report itself.
pub(super) fn store_error(class: FailureClass, message: String) -> StoreError {
    StoreError { class, sqlstate: None, message, identity: None }
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self {
            sqlstate: error.code().map(|c| c.code().to_owned()),
            ..store_error(class_of(&error), describe(&error))
        }
    }
}

fn pool_error(error: PoolError) -> StoreError {
    let error = match error {
        PoolError::Backend(error) => error.into(),
        other => store_error(FailureClass::Transient, other.to_string()),
    };
    StoreError { message: format!("connecting: {}", error.message), ..error }
}

/// The generation lacks the key that prevents claiming an id twice.
pub fn no_key(generation: i64) -> StoreError {
    let table = format!("payment_writer.idempotency_g{generation}");
    let message = format!(
        "{table} has no valid unique key on (message_id), without which payments are written twice: nothing is \
         written until it has one again; ALTER TABLE {table} ADD PRIMARY KEY (message_id)"
    );
    incomplete(message)
}

/// Counted like the errors of the server about a missing table or column.
fn incomplete(message: String) -> StoreError {
    let sqlstate = tokio_postgres::error::SqlState::UNDEFINED_OBJECT.code().to_owned();
    StoreError { sqlstate: Some(sqlstate), ..store_error(FailureClass::Persistent, message) }
}

async fn check_shape(client: &ClientWrapper) -> Result<(), StoreError> {
    match shape::missing(client).await? {
        missing if missing.is_empty() => Ok(()),
        missing => Err(incomplete(SchemaError::Incomplete(missing).to_string())),
    }
}

/// A session with its prepared statements.
pub(super) struct Session {
    /// Not returned to the pool: a session that failed inside a transaction must not be reused.
    pub client: ClientWrapper,
    pub pid: i32,
    pub cursors: Statement,
    pub move_cursors: Statement,
    pub move_known: Statement,
    pub places: Statement,
    /// `ctid` of the cursors that this session moved last. A wrong one, as after VACUUM FULL, moves nothing.
    pub known_places: BTreeMap<i32, String>,
    pub lock_generations: Statement,
    pub generations: Statement,
    has_key: Statement,
    pub copy_core: Statement,
    pub copy_metadata: Statement,
    pub copy_notes: Statement,
    shape_checked_at: Instant,
    /// The current generation when the cached statements were prepared.
    cached_for: i64,
}

impl Session {
    /// Takes a connection from the pool and checks the id of its database.
    pub(super) async fn open(pool: &Pool, identity: &Identity) -> Result<Self, StoreError> {
        let client = Object::take(pool.get().await.map_err(pool_error)?);
        client.batch_execute(SETTINGS).await?;
        let found = database_id(&client).await?;
        if found != identity.database_id {
            let mismatch = IdentityMismatch::OtherDatabase { expected: identity.database_id, found };
            let error = store_error(FailureClass::Persistent, mismatch.to_string());
            return Err(StoreError { identity: Some(mismatch), ..error });
        }
        check_shape(&client).await?;
        let pid = backend_pid(&client).await?;
        let lock = format!("SELECT pg_advisory_xact_lock_shared({})", LockKey::Rotation);
        Ok(Self {
            cursors: client.prepare(CURSORS).await?,
            move_cursors: client.prepare(MOVE_CURSORS).await?,
            move_known: client.prepare(MOVE_KNOWN).await?,
            places: client.prepare(PLACES).await?,
            known_places: BTreeMap::new(),
            lock_generations: client.prepare(&lock).await?,
            generations: client.prepare(GENERATIONS).await?,
            has_key: client.prepare(HAS_KEY).await?,
            copy_core: client.prepare(COPY_CORE).await?,
            copy_metadata: client.prepare(COPY_METADATA).await?,
            copy_notes: client.prepare(COPY_NOTES).await?,
            client,
            pid,
            shape_checked_at: Instant::now(),
            cached_for: 0,
        })
    }

    /// Compares the schema's shape if that was not done for [`SHAPE_CHECK`].
    pub(super) async fn check_shape_when_due(&mut self) -> Result<(), StoreError> {
        if self.shape_checked_at.elapsed() >= SHAPE_CHECK {
            check_shape(&self.client).await?;
            self.shape_checked_at = Instant::now();
        }
        Ok(())
    }

    /// Checks the generation's key. Called after the claims of the transaction, whose lock on the table keeps the key
    /// until the COMMIT.
    ///
    /// # Errors
    /// A persistent failure without the key: every payment could be written twice.
    pub(super) async fn key_of(&self, generation: i64) -> Result<KeyHolds, StoreError> {
        if self.client.query_one(&self.has_key, &[&generation]).await?.try_get(0)? {
            return Ok(KeyHolds(()));
        }
        Err(no_key(generation))
    }

    /// Ends sessions that lock cursors, wait for their client and are in a transaction of more than 30 s.
    pub(super) async fn end_hung_sessions(&self) -> Result<(), StoreError> {
        let ended: i64 = self.client.query_one(END_HUNG_SESSIONS, &[]).await?.try_get(0)?;
        static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
        if ended > 0
            && let Some(suppressed) = LIMIT.pass()
        {
            tracing::warn!(ended, suppressed, "ended sessions of processes that hung in a transaction");
        }
        Ok(())
    }

    /// Drops the cached statements after a rotation, so that they do not accumulate.
    pub(super) fn forget_rotated(&mut self, current: i64) {
        if self.cached_for != current {
            self.client.statement_cache.clear();
            self.cached_for = current;
        }
    }

    /// The statement that looks up owners of ids in this generation. It uses the generation's own table,
    /// because a batch must not touch tables that are being dropped.
    pub(super) async fn owners_in(&self, generation: i64) -> Result<Statement, StoreError> {
        let sql = format!(
            "SELECT message_id, source_partition, source_offset, payload_hash
             FROM payment_writer.idempotency_g{generation} WHERE message_id = ANY ($1::uuid[])"
        );
        Ok(self.client.prepare_cached(&sql).await?)
    }

    /// The statement that claims ids in this generation row by row.
    pub(super) async fn claim_into(&self, generation: i64) -> Result<Statement, StoreError> {
        Ok(self.client.prepare_cached(&claim_sql(generation)).await?)
    }

    /// The COPY statement that claims ids in this generation.
    pub(super) async fn copy_into(&self, generation: i64) -> Result<Statement, StoreError> {
        let sql = format!(
            "COPY payment_writer.idempotency_g{generation}
             (message_id, source_offset, payload_hash, created_at, source_partition, date)
             FROM STDIN (FORMAT binary)"
        );
        Ok(self.client.prepare_cached(&sql).await?)
    }

    /// Runs `work` under a savepoint and rolls it back if it fails or if `stays` is false. Returns the
    /// SQLSTATE if a row was refused.
    pub(super) async fn under_savepoint(
        &self,
        stays: bool,
        work: impl Future<Output = Result<(), StoreError>>,
    ) -> Result<Option<SqlState>, StoreError> {
        self.client.batch_execute("SAVEPOINT part").await?;
        let done = async {
            work.await?;
            // Checks deferred constraints now; at the COMMIT the failing row could not be determined.
            self.client.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").await.map_err(StoreError::from)
        };
        let refused = match done.await {
            Ok(()) => None,
            Err(error) => {
                let sqlstate = error.sqlstate.as_deref().and_then(SqlState::new);
                Some(sqlstate.filter(|_| error.class == FailureClass::Record).ok_or(error)?)
            }
        };
        let end = if stays && refused.is_none() {
            "RELEASE SAVEPOINT part"
        } else {
            "ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part"
        };
        self.client.batch_execute(end).await?;
        Ok(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules by which a cursor moves are written twice, in a migration that never changes and here.
    #[test]
    fn a_cursor_moves_by_the_same_rules_wherever_its_place_is_known() {
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let in_database = words(include_str!("../../../sql/V3__cursors_and_identity.sql"));
        let here = words(MOVE_KNOWN);
        let rules = |text: &str| {
            let begin = text.find("SET applied = greatest").unwrap();
            let end = text[begin..].find("FROM unnest").unwrap();
            text[begin..begin + end].to_owned()
        };
        assert_eq!(rules(&here), rules(&in_database));
        assert!(here.contains("c.applied = m.seen") && in_database.contains("c.applied = m.seen"));
    }
}
