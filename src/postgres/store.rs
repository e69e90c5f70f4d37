//! The [`Store`] of a lane on Postgres: one transaction per batch.
//!
//! Statements are pipelined: the driver sends them without waiting, and the answers arrive in order. Each
//! lane keeps one session with prepared statements. Any error ends the session; the next call opens another.

mod bisect;
mod claims;
mod copy;
mod cursors;
mod generations;
mod recent;
mod session;
mod witness;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use futures_util::{TryFutureExt, future};
use uuid::Uuid;

use self::bisect::Bisected;
use self::claims::Claiming;
use self::copy::copy_at_once;
pub use self::copy::feed;
use self::cursors::{Moves, cursors_in, move_cursors, store_in};
use self::generations::OlderGeneration;
pub use self::session::no_key;
use self::session::{KeyHolds, Session, store_error};
use crate::domain::batch::{Answer, Batch, Outcomes, Owner, Refused};
use crate::domain::columns::ArrayParam;
use crate::domain::cursor::{CursorRow, Identity};
use crate::domain::outcome::{FailureClass, Outcome, Refusals};
use crate::domain::record::{NextOffset, Offset, Partition};
use crate::failpoint;
use crate::ports::{CursorMove, Store, StoreError, WriteStats};
use crate::postgres::connection::cancelled_standby_waits;
use crate::postgres::waits::{Waits, with_reason};

/// After this a transaction is given up and its session closed; the server's timeouts are shorter.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);
/// The same limit for bisecting a batch, which takes many attempts, each with the server's timeouts.
const BISECT_TIMEOUT: Duration = Duration::from_secs(300);
/// lock_not_available
const SQLSTATE_LOCK_TIMEOUT: &str = "55P03";

/// One lane's store.
pub struct PgStore {
    connection: Connection,
    topic: String,
    refusals: Refusals,
    claiming: Claiming,
}

impl PgStore {
    /// A store that takes its session from `pool` on first use.
    pub fn new(pool: Pool, topic: String, identity: Identity) -> Self {
        let waits = Waits::new(pool.clone(), |_| {});
        let connection = Connection { pool, identity, session: None, was_locked_out: false, waits };
        Self { connection, topic, refusals: Refusals::default(), claiming: Claiming::default() }
    }

    /// Calls `tell` with the reason while a call waits for a lock or a standby.
    pub fn telling(mut self, tell: impl Fn(String) + Send + Sync + 'static) -> Self {
        self.connection.waits = Waits::new(self.connection.pool.clone(), tell);
        self
    }
}

/// The session of a lane, which is replaced after every error.
struct Connection {
    pool: Pool,
    identity: Identity,
    session: Option<Session>,
    /// The last call failed with a lock timeout: the holder of the lock may be a hung process.
    was_locked_out: bool,
    waits: Waits,
}

impl Connection {
    /// Runs `work` in the current session, or in a new one. The session is put back only after success, so a
    /// failed or cancelled call drops its session.
    async fn run<T>(
        &mut self,
        limit: Duration,
        doing: &str,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut session = match self.session.take() {
            Some(mut session) => {
                session.check_shape_when_due().await?;
                session
            }
            None => {
                let session = Session::open(&self.pool, &self.identity).await?;
                if std::mem::take(&mut self.was_locked_out) {
                    session.end_hung_sessions().await?;
                }
                session
            }
        };
        let pid = session.pid;
        let call = tokio::time::timeout(limit, work(&mut session));
        let (answer, reason) = self.waits.explain(pid, doing, call).await;
        let mut result = answer.unwrap_or_else(|_| {
            let message = format!("{doing}: no answer within {} s", limit.as_secs());
            Err(store_error(FailureClass::Transient, message))
        });
        match &mut result {
            Ok(_) => self.session = Some(session),
            Err(error) => {
                self.was_locked_out = error.sqlstate.as_deref() == Some(SQLSTATE_LOCK_TIMEOUT);
                error.message = with_reason(std::mem::take(&mut error.message), reason);
            }
        }
        result
    }
}

/// No single row is at fault, so the database is.
fn fault_of_database(mut error: StoreError) -> StoreError {
    if error.class == FailureClass::Record {
        error.class = FailureClass::Persistent;
    }
    error
}

/// Looks up `ids` in this generation and adds the owners found.
async fn owners(
    session: &Session,
    generation: i64,
    ids: &ArrayParam,
    into: &mut HashMap<[u8; 16], Owner>,
) -> Result<(), StoreError> {
    let statement = session.owners_in(generation).await?;
    for row in session.client.query(&statement, &[ids]).await? {
        let id: Uuid = row.try_get(0)?;
        into.insert(
            id.into_bytes(),
            Owner {
                partition: Partition(row.try_get(1)?),
                offset: Offset(row.try_get(2)?),
                payload_hash: row.try_get(3)?,
            },
        );
    }
    Ok(())
}

/// The ids as an array parameter; `None` if there are none.
fn array(ids: impl Iterator<Item = [u8; 16]>) -> Option<ArrayParam> {
    let mut array = ArrayParam::default();
    let mut is_empty = true;
    for id in ids {
        array.push(&id);
        is_empty = false;
    }
    (!is_empty).then_some(array)
}

/// Looks up the owners of ids that must not be claimed: of records below `seen` in every generation, of the
/// others in the older generations that may hold the id.
async fn look_up(
    session: &Session,
    batch: &Batch,
    current: i64,
    older: &[OlderGeneration],
    stats: &mut WriteStats,
) -> Result<Answer, StoreError> {
    let mut answer = Answer::default();
    if let Some(ids) = array(batch.lookups()) {
        for generation in older.iter().map(|g| g.number).chain([current]) {
            owners(session, generation, &ids, &mut answer.owners).await?;
        }
    }
    let none = Refused::default();
    for generation in older {
        let ids = batch.claims(&none).map(|claim| claim.message_id).filter(|id| generation.may_hold(id));
        if let Some(ids) = array(ids) {
            owners(session, generation.number, &ids, &mut answer.owners).await?;
        }
    }
    if !older.is_empty() {
        for claim in batch.claims(&none) {
            let is_probed = older.iter().any(|generation| generation.may_hold(&claim.message_id));
            *(if is_probed { &mut stats.claims_probed } else { &mut stats.claims_spared }) += 1;
        }
    }
    Ok(answer)
}

type Written = (Outcomes, Answer, WriteStats);

/// An open transaction of a batch.
struct Begun {
    /// The current generation.
    current: i64,
    /// UTC date by the database's clock, as days since 2000-01-01.
    today: i32,
    /// The owners found so far.
    answer: Answer,
    stats: WriteStats,
    at: Instant,
}

/// Begins the transaction: moves the cursors and looks up ids before anything is claimed.
async fn begin(
    session: &mut Session,
    topic_id: &Uuid,
    batch: &Batch,
    moves: &Moves,
) -> Result<Begun, StoreError> {
    let at = Instant::now();
    // One round trip, once the cursors' places are known. The shared lock prevents a rotation until the commit. The current generation is read by
    // a separate statement, so that its snapshot is taken after the lock is granted.
    let (_, _, generations, places) = future::try_join4(
        session.client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED").map_err(StoreError::from),
        session.client.query(&session.lock_generations, &[]).map_err(StoreError::from),
        session.client.query_one(&session.generations, &[]).map_err(StoreError::from),
        move_cursors(session, topic_id, moves),
    )
    .await?;
    let current: i64 = generations.try_get(0)?;
    let older = older_generations(&generations)?;
    session.forget_rotated(current);
    session.known_places.extend(places);
    let mut stats = WriteStats::default();
    let answer = look_up(session, batch, current, &older, &mut stats).await?;
    Ok(Begun { current, today: generations.try_get(4)?, answer, stats, at })
}

async fn commit(
    session: &Session,
    begun: Begun,
    outcomes: Outcomes,
    _: KeyHolds,
) -> Result<Written, StoreError> {
    let Begun { answer, mut stats, at, .. } = begun;
    stats.copy = at.elapsed().saturating_sub(stats.claim);
    failpoint::hit("before_postgres_commit");
    let cancelled = cancelled_standby_waits();
    session.client.batch_execute("COMMIT").await?;
    // The outcome is unknown: a failover may lose the rows. The next attempt commits the cursors again, which
    // waits for the standby.
    if cancelled_standby_waits() != cancelled {
        let message = "the COMMIT's wait for a standby was cancelled: the rows may not be on any standby";
        return Err(store_error(FailureClass::Transient, message.to_owned()));
    }
    failpoint::hit("after_postgres_commit");
    stats.commit = at.elapsed().saturating_sub(stats.claim + stats.copy);
    Ok((outcomes, answer, stats))
}

/// Writes a batch in the usual case, in which the database accepts every row.
async fn write_whole(
    session: &mut Session,
    topic_id: &Uuid,
    batch: &Batch,
    moves: &Moves,
    claiming: &mut Claiming,
) -> Result<Written, StoreError> {
    let mut begun = begin(session, topic_id, batch, moves).await?;
    let none = Refused::default();
    let mut claims = Vec::with_capacity(batch.claims_max());
    claims.extend(batch.claims(&none).filter(|c| !begun.answer.owners.contains_key(&c.message_id)));
    claiming.claim(session, &mut begun, claims).await?;
    let outcomes = batch.decide(&begun.answer, &none);
    begun.stats.claim = begun.at.elapsed();
    // One round trip.
    let rows = batch.rows(&outcomes);
    let (key, ()) = future::try_join(session.key_of(begun.current), copy_at_once(session, &rows)).await?;
    commit(session, begun, outcomes, key).await
}

fn older_generations(row: &tokio_postgres::Row) -> Result<Vec<OlderGeneration>, StoreError> {
    let numbers: Vec<i64> = row.try_get(1)?;
    let v7: Vec<Option<i64>> = row.try_get(2)?;
    let other: Vec<Option<i64>> = row.try_get(3)?;
    Ok(numbers
        .into_iter()
        .zip(v7.into_iter().zip(other))
        .map(|(number, (v7_time_max, other_time_max))| OlderGeneration {
            number,
            v7_time_max,
            other_time_max,
        })
        .collect())
}

impl Store for PgStore {
    async fn cursors(
        &mut self,
        partitions: &[Partition],
    ) -> Result<Vec<(Partition, Option<CursorRow>)>, StoreError> {
        let topic_id = self.connection.identity.topic_id;
        let read = async |session: &mut Session| cursors_in(session, &topic_id, partitions).await;
        self.connection.run(TRANSACTION_TIMEOUT, "reading cursors", read).await.map_err(fault_of_database)
    }

    async fn store_cursors(
        &mut self,
        rows: &[(Partition, Option<NextOffset>, CursorRow)],
    ) -> Result<(), StoreError> {
        let topic_id = self.connection.identity.topic_id;
        let store = async |session: &mut Session| store_in(session, &self.topic, &topic_id, rows).await;
        self.connection.run(TRANSACTION_TIMEOUT, "storing cursors", store).await.map_err(fault_of_database)
    }

    async fn write(
        &mut self,
        batch: &Batch,
        moves: &[CursorMove],
    ) -> Result<(Outcomes, Answer, WriteStats), StoreError> {
        let Self { connection, refusals, claiming, .. } = self;
        let moves = Moves::new(moves);
        let topic_id = connection.identity.topic_id;
        let whole =
            async |session: &mut Session| write_whole(session, &topic_id, batch, &moves, claiming).await;
        let first = match connection.run(TRANSACTION_TIMEOUT, "writing a batch", whole).await {
            Ok(written) => {
                let rows = written.0.iter().filter(|outcome| **outcome == Outcome::Written).count();
                refusals.note(Instant::now(), rows, 0);
                return Ok(written);
            }
            // A new session: the COPYs that were sent after the refused one confuse the driver
            // (tokio-postgres reports the answers to their Syncs as unexpected).
            Err(error) if error.class == FailureClass::Record => error.message,
            Err(error) => return Err(error),
        };
        let began = Instant::now();
        let doing = "finding the rows that the database refuses (a smaller batch.max_payments helps)";
        let bisect =
            async |session: &mut Session| bisect::write(session, &topic_id, batch, &moves, refusals).await;
        match connection.run(BISECT_TIMEOUT, doing, bisect).await {
            Ok(Bisected::Written(written)) => Ok(written),
            Ok(Bisected::Undecided(mut error)) => {
                // Its transaction is still open.
                connection.session = None;
                error.message.push_str(&format!("; at first {first}"));
                Err(error)
            }
            // A retry would take as long, so an operator must know.
            Err(error) if error.sqlstate.is_none() && began.elapsed() >= BISECT_TIMEOUT => {
                Err(StoreError { class: FailureClass::Persistent, ..error })
            }
            Err(mut error) => {
                error.message.push_str(&format!("; at first {first}"));
                Err(fault_of_database(error))
            }
        }
    }

    async fn move_cursors(&mut self, moves: &[CursorMove]) -> Result<(), StoreError> {
        let moves = Moves::new(moves);
        let topic_id = self.connection.identity.topic_id;
        let work = async |session: &mut Session| {
            let places = move_cursors(session, &topic_id, &moves).await?;
            session.known_places.extend(places);
            Ok(())
        };
        self.connection.run(TRANSACTION_TIMEOUT, "moving cursors", work).await.map_err(fault_of_database)
    }
}
