//! A lane's session: its settings, prepared statements and errors.

use std::time::Duration;

use bytes::BytesMut;
use deadpool_postgres::{ClientWrapper, Object, Pool};
use tokio_postgres::Statement;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};
use uuid::Uuid;

use crate::domain::cursor::{Identity, IdentityMismatch};
use crate::domain::outcome::{FailureClass, SQLSTATE_CURSOR_MOVED, SqlState};
use crate::ports::StoreError;
use crate::postgres::schema::locks::{self, LockKey};
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

const CURSORS: &str = "
    SELECT c.partition, c.applied, c.published, c.applied_timestamp, s.committed
    FROM payment_writer.source_cursor c
    LEFT JOIN payment_writer.cursor_settlement s USING (topic_id, partition)
    WHERE c.topic_id = $1 AND c.partition = ANY ($2)";

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

/// Ends the sessions of hung processes with an open transaction on the cursors. For the server, a session
/// that waits for COPY data is not idle, and no server timeout interrupts it. Ending it is safe: uncommitted
/// work is repeated by the owner of the partition.
const END_HUNG_SESSIONS: &str = "
    SELECT count(pg_terminate_backend(a.pid))
    FROM (
        SELECT DISTINCT pid FROM pg_locks
        WHERE relation = 'payment_writer.source_cursor'::regclass AND granted AND pid <> pg_backend_pid()
    ) l
    JOIN pg_stat_activity a USING (pid)
    WHERE a.usename = current_user AND a.wait_event_type = 'Client'
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

/// A `timestamptz` in binary form: microseconds since 2000-01-01 UTC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timestamp(pub i64);

impl ToSql for Timestamp {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql(ty, out)
    }

    accepts!(TIMESTAMPTZ);
    to_sql_checked!();
}

impl<'a> FromSql<'a> for Timestamp {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        i64::from_sql(&Type::INT8, raw).map(Self)
    }

    accepts!(TIMESTAMPTZ);
}

/// An error inside a session.
pub(super) struct Failed {
    class: FailureClass,
    sqlstate: Option<String>,
    message: String,
}

impl Failed {
    pub(super) fn unexpected(message: String) -> Self {
        Self { class: FailureClass::Transient, sqlstate: None, message }
    }

    pub(super) fn cursor_moved(message: String) -> Self {
        Self { class: FailureClass::Fenced, sqlstate: Some(SQLSTATE_CURSOR_MOVED.to_owned()), message }
    }

    /// So many rows were refused that the database is assumed to be at fault.
    pub(super) fn ill(last: SqlState, refused: usize, rows: usize) -> Self {
        Self {
            class: FailureClass::Persistent,
            sqlstate: Some(last.to_string()),
            message: format!(
                "the database refuses too many rows ({refused} of {rows}, the last with SQLSTATE {last}): \
                 it is assumed to be at fault, and no row is dead-lettered"
            ),
        }
    }

    pub(super) fn class(&self) -> FailureClass {
        self.class
    }

    pub(super) fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }
}

impl From<tokio_postgres::Error> for Failed {
    fn from(error: tokio_postgres::Error) -> Self {
        Self {
            class: crate::postgres::connection::class_of(&error),
            sqlstate: error.code().map(|c| c.code().to_owned()),
            message: crate::postgres::connection::describe(&error),
        }
    }
}

impl From<Failed> for StoreError {
    fn from(failed: Failed) -> Self {
        Self { class: failed.class, sqlstate: failed.sqlstate, message: failed.message, identity: None }
    }
}

pub(super) fn gave_up(doing: &str, limit: Duration) -> StoreError {
    StoreError {
        class: FailureClass::Transient,
        sqlstate: None,
        message: format!("{doing}: no answer within {} s", limit.as_secs()),
        identity: None,
    }
}

/// A session with its prepared statements.
pub(super) struct Session {
    /// Not returned to the pool: a session that failed inside a transaction must not be reused.
    pub client: ClientWrapper,
    pub cursors: Statement,
    pub move_cursors: Statement,
    pub lock_generations: Statement,
    pub generations: Statement,
    pub copy_core: Statement,
    pub copy_metadata: Statement,
    pub copy_notes: Statement,
    claim: Option<(i64, Statement)>,
    copy_claims: Option<(i64, Statement)>,
    owners: Vec<(i64, Statement)>,
}

impl Session {
    /// Takes a connection from the pool and checks the id of its database.
    pub(super) async fn open(pool: &Pool, identity: &Identity) -> Result<Self, StoreError> {
        let client = Object::take(pool.get().await.map_err(|error| pool_failure(&error))?);
        let prepared = async {
            client.batch_execute(SETTINGS).await?;
            let row =
                client.query_one("SELECT database_id FROM payment_writer.database_identity", &[]).await?;
            let found: Uuid = row.try_get(0)?;
            if found != identity.database_id {
                return Ok(Err(IdentityMismatch::OtherDatabase { expected: identity.database_id, found }));
            }
            let lock = format!(
                "SELECT pg_advisory_xact_lock_shared({}, {})",
                locks::CLASS,
                LockKey::Rotation.number()
            );
            Ok(Ok([
                client.prepare(CURSORS).await?,
                client.prepare("SELECT payment_writer.move_cursors_v1($1, $2, $3, $4, $5, $6)").await?,
                client.prepare(&lock).await?,
                client
                    .prepare(
                        "SELECT current_generation, older_generations, older_v7_time_max, \
                         older_other_time_max, (now() AT TIME ZONE 'UTC')::date - date '2000-01-01'
                         FROM payment_writer.idempotency_current",
                    )
                    .await?,
                client
                    .prepare(
                        "COPY payment_writer.payment_core
                         (payment_id, created_at, cust_id, amount, currency, status, type)
                         FROM STDIN (FORMAT binary)",
                    )
                    .await?,
                client
                    .prepare(
                        "COPY payment_writer.payment_metadata
                         (payment_id, created_at, updated_at, version, message_id, source_partition, \
                         source_offset)
                         FROM STDIN (FORMAT binary)",
                    )
                    .await?,
                client
                    .prepare(
                        "COPY payment_writer.payment_notes (payment_id, created_at, external_ref_id, comment)
                         FROM STDIN (FORMAT binary)",
                    )
                    .await?,
            ]))
        };
        let prepared: Result<Result<[Statement; 7], IdentityMismatch>, tokio_postgres::Error> =
            prepared.await;
        match prepared {
            Ok(Ok(
                [cursors, move_cursors, lock_generations, generations, copy_core, copy_metadata, copy_notes],
            )) => Ok(Self {
                client,
                cursors,
                move_cursors,
                lock_generations,
                generations,
                copy_core,
                copy_metadata,
                copy_notes,
                claim: None,
                copy_claims: None,
                owners: Vec::new(),
            }),
            Ok(Err(mismatch)) => Err(StoreError {
                class: FailureClass::Persistent,
                sqlstate: None,
                message: mismatch.to_string(),
                identity: Some(mismatch),
            }),
            Err(error) => Err(Failed::from(error).into()),
        }
    }

    /// Ends sessions that lock cursors, wait for their client and are in a transaction of more than 30 s.
    pub(super) async fn end_hung_sessions(&self) -> Result<(), Failed> {
        let ended: i64 = self.client.query_one(END_HUNG_SESSIONS, &[]).await?.try_get(0)?;
        static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
        if ended > 0
            && let Some(suppressed) = LIMIT.pass()
        {
            tracing::warn!(ended, suppressed, "ended sessions of processes that hung in a transaction");
        }
        Ok(())
    }

    /// The statement that looks up owners of ids in this generation. It uses the generation's own table,
    /// because a batch must not touch tables that are being dropped.
    pub(super) async fn owners_in(&mut self, generation: i64) -> Result<Statement, Failed> {
        if let Some((_, statement)) = self.owners.iter().find(|(prepared, _)| *prepared == generation) {
            return Ok(statement.clone());
        }
        let sql = format!(
            "SELECT message_id, source_partition, source_offset, payload_hash
             FROM payment_writer.idempotency_g{generation} WHERE message_id = ANY ($1::uuid[])"
        );
        let statement = self.client.prepare(&sql).await?;
        self.owners.push((generation, statement.clone()));
        Ok(statement)
    }

    /// Drops the statements of generations that are no longer read.
    pub(super) fn forget_all_but(&mut self, live: impl Fn(i64) -> bool) {
        self.owners.retain(|(generation, _)| live(*generation));
    }

    /// The statement that claims ids in this generation row by row.
    pub(super) async fn claim_into(&mut self, generation: i64) -> Result<Statement, Failed> {
        prepared(&self.client, &mut self.claim, generation, || claim_sql(generation)).await
    }

    /// The COPY statement that claims ids in this generation.
    pub(super) async fn copy_into(&mut self, generation: i64) -> Result<Statement, Failed> {
        let sql = || {
            format!(
                "COPY payment_writer.idempotency_g{generation}
                 (message_id, source_offset, payload_hash, created_at, source_partition, date)
                 FROM STDIN (FORMAT binary)"
            )
        };
        prepared(&self.client, &mut self.copy_claims, generation, sql).await
    }
}

/// A statement on the current generation's table, prepared once per generation.
async fn prepared(
    client: &ClientWrapper,
    slot: &mut Option<(i64, Statement)>,
    generation: i64,
    sql: impl FnOnce() -> String,
) -> Result<Statement, Failed> {
    match slot {
        Some((of, statement)) if *of == generation => Ok(statement.clone()),
        _ => {
            let statement = client.prepare(&sql()).await?;
            *slot = Some((generation, statement.clone()));
            Ok(statement)
        }
    }
}

fn pool_failure(error: &deadpool_postgres::PoolError) -> StoreError {
    match error {
        deadpool_postgres::PoolError::Backend(error) => StoreError {
            class: crate::postgres::connection::class_of(error),
            sqlstate: error.code().map(|c| c.code().to_owned()),
            message: format!("connecting: {}", crate::postgres::connection::describe(error)),
            identity: None,
        },
        other => StoreError {
            class: FailureClass::Transient,
            sqlstate: None,
            message: format!("connecting: {other}"),
            identity: None,
        },
    }
}

/// Runs `work` under a savepoint and rolls it back if it fails or if `stays` is false. Returns the SQLSTATE
/// if a row was refused.
pub(super) async fn under_savepoint(
    session: &mut Session,
    stays: bool,
    work: impl AsyncFnOnce(&mut Session) -> Result<(), Failed>,
) -> Result<Option<SqlState>, Failed> {
    const TAKE_BACK: &str = "ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part";
    session.client.batch_execute("SAVEPOINT part").await?;
    let worked = match work(session).await {
        // Checks deferred constraints now; at the COMMIT the failing row could not be determined.
        Ok(()) => Ok(session.client.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").await?),
        Err(failed) => Err(failed),
    };
    let end = if stays && worked.is_ok() { "RELEASE SAVEPOINT part" } else { TAKE_BACK };
    match worked {
        Ok(()) => {
            session.client.batch_execute(end).await?;
            Ok(None)
        }
        Err(failed) if failed.class() == FailureClass::Record => {
            session.client.batch_execute(end).await?;
            match failed.sqlstate().and_then(SqlState::new) {
                Some(sqlstate) => Ok(Some(sqlstate)),
                None => Err(failed),
            }
        }
        Err(failed) => Err(failed),
    }
}
