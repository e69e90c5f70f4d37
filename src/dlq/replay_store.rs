//! Database side of a replay: ownership, claims, sent chunks and the audit table.
//!
//! All calls block; a replay is sequential.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tokio::runtime::Handle;
use tokio_postgres::types::{FromSql, ToSql};
use tokio_postgres::{Client, Row, Transaction};
use uuid::Uuid;

use super::DlqError;
use super::letter::Place;
use super::run_metadata::{ChunkOutcome, Unfinished};
use crate::config::Settings;
use crate::domain::record::{Offset, Partition, TimestampMs};
use crate::postgres::binding;
use crate::postgres::connection::backend_pid;
use crate::postgres::schema::locks::LockKey;
use crate::postgres::schema::{self, SchemaError, SchemaVersion, doing};
use crate::postgres::waits::Waits;

/// First schema version with the replay tables.
const NEEDED: SchemaVersion = SchemaVersion(6);

const DOING: &str = "recording the replay";

/// Every statement is small, so short timeouts only abort on an unresponsive server.
const SESSION_SETTINGS: &str = "SET statement_timeout = '45s'; SET lock_timeout = '30s'";

/// A database session.
pub struct ReplayStore {
    runtime: Handle,
    client: Client,
    pid: i32,
    waits: Waits,
    database_id: Uuid,
    run_id: Option<Uuid>,
}

/// Audit entry written at the start of a run.
#[derive(Clone, Debug)]
pub struct Audit {
    /// The dead-letter topic.
    pub topic: String,
    /// Id of the dead-letter topic.
    pub topic_id: Uuid,
    /// The filter, in words.
    pub filter: String,
    /// Whether `--force` was given.
    pub is_forced: bool,
    /// The operator's reason.
    pub note: String,
}

/// Dead letters that this run alone may replay.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    /// Id of the chunk.
    pub chunk_id: Uuid,
    /// Places in the dead-letter topic.
    pub places: BTreeSet<Place>,
}

fn columns(places: &BTreeSet<Place>) -> (Vec<i32>, Vec<i64>) {
    places.iter().map(|place| (place.partition.0, place.offset.0)).unzip()
}

fn place(row: &tokio_postgres::Row) -> Place {
    Place { partition: Partition(row.get(0)), offset: Offset(row.get(1)) }
}

impl ReplayStore {
    /// Connects and checks that the database belongs to the daemon that reads `input_topic_id`. The threads of
    /// `runtime` drive the connection, also while this thread waits for Kafka.
    pub fn open(runtime: &Handle, settings: &Settings, input_topic_id: Uuid) -> Result<Self, DlqError> {
        runtime.block_on(async {
            let (client, _) = settings.postgres.url.connect().await?;
            client.batch_execute(SESSION_SETTINGS).await.map_err(doing("cannot prepare the session"))?;
            let found = schema::check(&client).await?;
            if found < NEEDED {
                return Err(SchemaError::TooOld { found, needed: NEEDED }.into());
            }
            let kafka = &settings.kafka;
            binding::is_bound_to(&client, &kafka.group_id, input_topic_id, kafka.publish).await?;
            let id =
                binding::database_id(&client).await.map_err(doing("cannot read which database this is"))?;
            let pid = backend_pid(&client).await.map_err(doing("cannot ask for the session's pid"))?;
            let waits = Waits::on_stderr(&settings.postgres.url)?;
            Ok::<_, DlqError>(Self {
                runtime: runtime.clone(),
                client,
                pid,
                waits,
                database_id: id,
                run_id: None,
            })
        })
    }

    /// Id of the database.
    pub fn database_id(&self) -> Uuid {
        self.database_id
    }

    fn query(
        &self,
        what: &'static str,
        query: &str,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, DlqError> {
        let asked = self.waits.explain(self.pid, DOING, self.client.query(query, values));
        Ok(self.runtime.block_on(asked).0.map_err(doing(what))?)
    }

    fn query_one<T: for<'r> FromSql<'r>>(
        &self,
        what: &'static str,
        query: &str,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<T, DlqError> {
        let asked = self.waits.explain(self.pid, DOING, self.client.query_one(query, values));
        let row = self.runtime.block_on(asked).0;
        Ok(row.and_then(|row| row.try_get(0)).map_err(doing(what))?)
    }

    /// Runs statements in a transaction that fails unless this is the newest run. The lock of the owner's row
    /// keeps other runs from starting until the transaction ends.
    fn as_owner<T>(
        &mut self,
        what: &'static str,
        statements: impl AsyncFnOnce(&Transaction<'_>) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, DlqError> {
        let (client, run_id) = (&mut self.client, self.run_id);
        let work = async {
            let transaction = client.transaction().await?;
            let owner = "SELECT FROM payment_writer.dead_letter_replay_owner WHERE run_id = $1 FOR SHARE";
            if transaction.query_opt(owner, &[&run_id]).await?.is_none() {
                return Ok(None);
            }
            let done = statements(&transaction).await?;
            transaction.commit().await?;
            Ok::<_, tokio_postgres::Error>(Some(done))
        };
        let (done, _) = self.runtime.block_on(self.waits.explain(self.pid, DOING, work));
        done.map_err(doing(what))?.ok_or(DlqError::TakenOver)
    }

    /// Current time by the database's clock.
    pub fn now(&self) -> Result<TimestampMs, DlqError> {
        let query = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint";
        self.query_one("cannot read the clock", query, &[]).map(TimestampMs)
    }

    /// The claimed ones among `wanted`, each with whether it is recorded as sent.
    pub fn claimed(
        &self,
        topic_id: Uuid,
        wanted: &BTreeSet<Place>,
    ) -> Result<BTreeMap<Place, bool>, DlqError> {
        let (partitions, offsets) = columns(wanted);
        let query = "SELECT r.partition, r.letter_offset, c.state = 'sent'
             FROM unnest($2::integer[], $3::bigint[]) AS wanted (partition, letter_offset)
             JOIN payment_writer.dead_letter_replay r USING (partition, letter_offset)
             JOIN payment_writer.dead_letter_replay_chunk c USING (chunk_id)
             WHERE r.topic_id = $1";
        let rows =
            self.query("cannot look for replayed letters", query, &[&topic_id, &partitions, &offsets])?;
        Ok(rows.iter().map(|row| (place(row), row.get(2))).collect())
    }

    /// Starts a run: from here on no older run can claim or resolve anything.
    ///
    /// # Errors
    /// [`DlqError::Busy`] if another session holds the advisory lock. The lock only spares two simultaneous
    /// runs the fencing; correctness does not depend on it.
    pub fn take_over(&mut self, audit: &Audit) -> Result<Uuid, DlqError> {
        let locked = self.runtime.block_on(LockKey::Replay.try_lock(&self.client));
        if !locked.map_err(doing("cannot take the lock for replays"))? {
            return Err(DlqError::Busy);
        }
        let query = "WITH run AS (
                 INSERT INTO payment_writer.dead_letter_replay_run (topic, topic_id, choice, is_forced, note)
                 VALUES ($1, $2, $3, $4, $5) RETURNING run_id
             )
             UPDATE payment_writer.dead_letter_replay_owner o SET run_id = run.run_id FROM run
             RETURNING run.run_id";
        let values: [&(dyn ToSql + Sync); 5] =
            [&audit.topic, &audit.topic_id, &audit.filter, &audit.is_forced, &audit.note];
        let run_id = self.query_one("cannot begin a run", query, &values)?;
        self.run_id = Some(run_id);
        Ok(run_id)
    }

    /// Fails if another run has started since.
    pub fn is_owner(&mut self) -> Result<(), DlqError> {
        self.as_owner("cannot read who replays", async |_| Ok(()))
    }

    /// Whether an id from commit metadata is a run or chunk of this database.
    pub fn knows(&self, id: Uuid) -> Result<bool, DlqError> {
        let query = "SELECT EXISTS (SELECT FROM payment_writer.dead_letter_replay_run WHERE run_id = $1)
                         OR EXISTS (SELECT FROM payment_writer.dead_letter_replay_chunk WHERE chunk_id = $1)";
        self.query_one("cannot look for a run", query, &[&id])
    }

    /// Claimed chunks that are not recorded as sent: at most one, unless a run ended before it resolved the
    /// earlier one.
    pub fn unfinished(&self) -> Result<Vec<Unfinished>, DlqError> {
        let query = "SELECT chunk_id, previous, letters, claimed_at::text
                     FROM payment_writer.dead_letter_replay_chunk WHERE state = 'claimed' ORDER BY claimed_at";
        let rows = self.query("cannot look for unfinished replays", query, &[])?;
        let chunk = |row: &Row| Unfinished {
            chunk_id: row.get(0),
            previous: row.get(1),
            letters: row.get(2),
            claimed_at: row.get(3),
        };
        Ok(rows.iter().map(chunk).collect())
    }

    /// Records whether a chunk was sent; the dead letters of a chunk that was not sent can be claimed again.
    pub fn resolve(&mut self, chunk_id: Uuid, outcome: ChunkOutcome) -> Result<(), DlqError> {
        let run_id = self.run_id;
        self.as_owner("cannot record whether a chunk was sent", async |transaction| {
            let state = match outcome {
                ChunkOutcome::Sent => "sent",
                ChunkOutcome::NotSent => "released",
            };
            let update = "UPDATE payment_writer.dead_letter_replay_chunk
                 SET state = $2, settled_at = now(), settled_by = $3
                 WHERE chunk_id = $1 AND state = 'claimed'";
            transaction.execute(update, &[&chunk_id, &state, &run_id]).await?;
            if outcome == ChunkOutcome::NotSent {
                let release = "DELETE FROM payment_writer.dead_letter_replay WHERE chunk_id = $1";
                transaction.execute(release, &[&chunk_id]).await?;
            }
            Ok(())
        })
    }

    /// Claims the unclaimed ones among `wanted`; `None` if there are none. `previous` is the id that the
    /// commit metadata names now.
    pub fn claim(
        &mut self,
        topic_id: Uuid,
        wanted: &BTreeSet<Place>,
        previous: Uuid,
    ) -> Result<Option<Claim>, DlqError> {
        let run_id = self.run_id;
        let (partitions, offsets) = columns(wanted);
        self.as_owner("cannot claim dead letters", async |transaction| {
            let chunk_id: Uuid = transaction.query_one("SELECT gen_random_uuid()", &[]).await?.get(0);
            let claim =
                "INSERT INTO payment_writer.dead_letter_replay (topic_id, partition, letter_offset, chunk_id)
                 SELECT $1, partition, letter_offset, $4
                 FROM unnest($2::integer[], $3::bigint[]) AS wanted (partition, letter_offset)
                 ON CONFLICT DO NOTHING RETURNING partition, letter_offset";
            let rows = transaction.query(claim, &[&topic_id, &partitions, &offsets, &chunk_id]).await?;
            let places: BTreeSet<Place> = rows.iter().map(place).collect();
            if places.is_empty() {
                return Ok(None);
            }
            let letters = i32::try_from(places.len()).unwrap_or(i32::MAX);
            let chunk =
                "INSERT INTO payment_writer.dead_letter_replay_chunk (chunk_id, run_id, previous, letters)
                 VALUES ($1, $2, $3, $4)";
            transaction.execute(chunk, &[&chunk_id, &run_id, &previous, &letters]).await?;
            Ok(Some(Claim { chunk_id, places }))
        })
    }

    /// Records the end of the run.
    pub fn finish(&self, outcome: &Value) -> Result<(), DlqError> {
        let update = "UPDATE payment_writer.dead_letter_replay_run SET finished_at = now(), outcome = $2
                      WHERE run_id = $1";
        self.query("cannot record the end of the replay", update, &[&self.run_id, outcome])?;
        Ok(())
    }
}
