//! Finds the rows that the database refuses by bisecting the batch under savepoints.
//!
//! Rows of accepted parts stay written, so that in the end all acceptable rows are written in the transaction
//! that also moves the cursors. k refused rows among n take O(k log n) attempts.
//!
//! A refusal can be a fault of the row or of the database. A row is dead-lettered only if
//!
//! - no constraint or trigger can have changed meanwhile: all tables are locked before the first savepoint,
//!   because a rollback to a savepoint releases the locks taken after it,
//! - it is refused a second time when all others are written, because a trigger can depend on other rows,
//! - the batch has no more such rows than [`Refusals`] allows, and
//! - the database then accepts another row in its place ([`witness`](super::witness)).

use std::collections::HashSet;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::claims::claim;
use super::copy::copy_in_turn;
use super::cursors::Moves;
use super::session::{Session, store_error};
use super::{Begun, Written, begin, commit, witness};
use crate::domain::batch::{Batch, Claim, Refused};
use crate::domain::outcome::{FailureClass, Refusals, SqlState};
use crate::failpoint;
use crate::ports::StoreError;
use crate::postgres::schema::months::PARTITIONED_TABLES;
use crate::telemetry::logging::RateLimited;

/// Number of random rows that are tried to find out early whether most rows are refused.
const SAMPLE: usize = 32;
/// A batch with at least this many rows is sampled before bisecting, which takes as long down to the first
/// row.
const SAMPLE_FIRST_MIN: usize = 1_000;
/// After this many refused rows the rest is sampled, and again each time their number has doubled.
const SAMPLE_AFTER: usize = 11;

/// Result of bisecting a batch.
pub(super) enum Bisected {
    /// All rows that the database accepts are written; the others are dead-lettered.
    Written(Written),
    /// Rows are refused, possibly by a fault of the database. Nothing is written.
    Undecided(StoreError),
}

/// Repeats the transaction of a batch after a refusal, without the rows that are refused individually.
///
/// # Errors
/// A persistent failure if so many rows are refused that the database is assumed to be at fault.
pub(super) async fn write(
    session: &mut Session,
    topic_id: &Uuid,
    batch: &Batch,
    moves: &Moves,
    refusals: &mut Refusals,
) -> Result<Bisected, StoreError> {
    let mut begun = begin(session, topic_id, batch, moves).await?;
    let session = &*session;
    begun.stats.claim = begun.at.elapsed();
    lock(session, begun.current).await?;
    let mut sieve = Sieve { session, batch, begun: &mut begun, refusals, rows: 0, suspects: 0, tries: 0 };
    let refused = sieve.bisect().await?;
    let Sieve { rows, tries, .. } = sieve;
    if let Some(sqlstate) = witness::missing(session, batch, &begun, &refused).await? {
        return Ok(Bisected::Undecided(undecided(refused.len(), rows, sqlstate)));
    }
    let outcomes = batch.decide(&begun.answer, &refused);
    let key = session.key_of(begun.current).await?;
    let written = commit(session, begun, outcomes, key).await?;
    refusals.note(Instant::now(), rows, refused.len());
    static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
    if !refused.is_empty()
        && let Some(suppressed) = LIMIT.pass()
    {
        tracing::warn!(
            refused = refused.len(),
            rows,
            tries,
            suppressed,
            "the database refused rows of a batch: they are dead-lettered, all others are written"
        );
    }
    Ok(Bisected::Written(written))
}

fn undecided(refused: usize, rows: usize, sqlstate: SqlState) -> StoreError {
    let message = format!(
        "the database refuses {refused} of the {rows} rows of this batch (SQLSTATE {sqlstate}), and accepts \
         no other row in their place: it is assumed to be at fault, and no row is dead-lettered"
    );
    StoreError { sqlstate: Some(sqlstate.to_string()), ..store_error(FailureClass::Undecided, message) }
}

/// So many rows were refused that the database is assumed to be at fault.
fn too_many(last: SqlState, refused: usize, rows: usize) -> StoreError {
    let message = format!(
        "the database refuses too many rows ({refused} of {rows}, the last with SQLSTATE {last}): it is \
         assumed to be at fault, and no row is dead-lettered"
    );
    StoreError { sqlstate: Some(last.to_string()), ..store_error(FailureClass::Persistent, message) }
}

/// Prevents changes of constraints and triggers until the transaction ends: these need stronger locks, also
/// on a single month's table.
async fn lock(session: &Session, generation: i64) -> Result<(), StoreError> {
    let mut tables = PARTITIONED_TABLES.map(|table| format!("payment_writer.{table}")).to_vec();
    tables.push(format!("payment_writer.idempotency_g{generation}"));
    let lock = format!("LOCK TABLE {} IN ROW EXCLUSIVE MODE", tables.join(", "));
    Ok(session.client.batch_execute(&lock).await?)
}

/// Whether rows that the database accepts are kept or rolled back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Taken {
    Stay,
    AreTakenBack,
}

struct Sieve<'s> {
    session: &'s Session,
    batch: &'s Batch,
    begun: &'s mut Begun,
    refusals: &'s Refusals,
    /// Rows to write.
    rows: usize,
    /// Rows that were refused at the first attempt.
    suspects: usize,
    tries: usize,
}

impl Sieve<'_> {
    /// Claims and writes all rows of the batch that the database accepts; returns the others.
    async fn bisect(&mut self) -> Result<Refused, StoreError> {
        let mut refused = Refused::default();
        let owners = &self.begun.answer.owners;
        let whole: Vec<Claim> =
            self.batch.claims(&refused).filter(|c| !owners.contains_key(&c.message_id)).collect();
        self.rows = whole.len();
        // The whole batch was already refused.
        let mut parts = Vec::new();
        halve(whole, &mut parts);
        if self.rows >= SAMPLE_FIRST_MIN {
            self.sample(&parts).await?;
        }
        loop {
            let mut ids = HashSet::new();
            for suspect in self.halves(parts).await? {
                if let Some(sqlstate) = self.attempt(&[suspect], Taken::Stay).await? {
                    refused.insert(suspect.index, sqlstate);
                    ids.insert(suspect.message_id);
                }
            }
            // Other records of the batch with the refused rows' ids can claim these now.
            let twins = if ids.is_empty() { Vec::new() } else { self.twins(&refused, &ids) };
            if twins.is_empty() {
                return Ok(refused);
            }
            self.rows += twins.len();
            parts = vec![twins];
        }
    }

    fn twins(&self, refused: &Refused, ids: &HashSet<[u8; 16]>) -> Vec<Claim> {
        self.batch.claims(refused).filter(|claim| ids.contains(&claim.message_id)).collect()
    }

    /// Writes the acceptable rows of these parts, starting with the last part; returns the rows that were
    /// refused individually.
    async fn halves(&mut self, mut parts: Vec<Vec<Claim>>) -> Result<Vec<Claim>, StoreError> {
        let mut suspects = Vec::new();
        let mut sample_at = SAMPLE_AFTER;
        while let Some(part) = parts.pop() {
            let Some(sqlstate) = self.attempt(&part, Taken::Stay).await? else { continue };
            let [alone] = part[..] else {
                halve(part, &mut parts);
                continue;
            };
            suspects.push(alone);
            self.suspects += 1;
            failpoint::hit("after_part_refused");
            if let Some((refused, rows)) = self.refusals.excess(Instant::now(), self.rows, self.suspects) {
                return Err(too_many(sqlstate, refused, rows));
            }
            if suspects.len() == sample_at {
                sample_at *= 2;
                self.sample(&parts).await?;
            }
        }
        Ok(suspects)
    }

    /// Tries random rows without writing them, and gives up if most are refused: bisecting holds table locks
    /// that would delay a repair of the tables.
    async fn sample(&mut self, parts: &[Vec<Claim>]) -> Result<(), StoreError> {
        let rest: usize = parts.iter().map(Vec::len).sum();
        if rest < SAMPLE {
            return Ok(());
        }
        let (mut refused, mut taken) = (0, 0);
        let places = rand::seq::index::sample(&mut rand::rng(), rest, SAMPLE);
        for place in places {
            let Some(claim) = parts.iter().flatten().nth(place) else { continue };
            match self.attempt(&[*claim], Taken::AreTakenBack).await? {
                Some(sqlstate) => {
                    refused += 1;
                    if refused > SAMPLE / 2 {
                        return Err(too_many(sqlstate, refused, refused + taken));
                    }
                }
                None => {
                    taken += 1;
                    if taken >= SAMPLE / 2 {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Claims and writes these rows. Returns the SQLSTATE if they are refused; then nothing was changed.
    async fn attempt(&mut self, part: &[Claim], taken: Taken) -> Result<Option<SqlState>, StoreError> {
        self.tries += 1;
        let Self { session, batch, begun, .. } = self;
        let work = async {
            let owners = &mut begun.answer.owners;
            claim(session, begun.current, part, owners).await?;
            let mut written: Vec<u32> =
                part.iter().filter(|c| !owners.contains_key(&c.message_id)).map(|c| c.index).collect();
            written.sort_unstable();
            copy_in_turn(session, &batch.rows_at(&written)).await
        };
        session.under_savepoint(taken == Taken::Stay, work).await
    }
}

/// Pushes both halves on the stack so that the lower ids come first: claims in the order of ids prevent
/// deadlocks between lanes. Repeated attempts and records with a repeated id are out of order; if that causes
/// a deadlock, the server ends it and the batch is retried.
fn halve(mut part: Vec<Claim>, parts: &mut Vec<Vec<Claim>>) {
    let upper = part.split_off(part.len().div_ceil(2));
    for half in [upper, part] {
        if !half.is_empty() {
            parts.push(half);
        }
    }
}
