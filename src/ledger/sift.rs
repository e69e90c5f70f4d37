//! Finds the rows that the database refuses by themselves: the batch in halves, under savepoints.
//!
//! What a half writes stays, so in the end all is written that can be, in the one transaction that also moves
//! the cursors. k bad rows among n take O(k log n) tries.
//!
//! A refusal alone does not tell whether the row is at fault or the database. A row is set aside only if
//!
//! - no constraint or trigger can have come or gone meanwhile: all tables are locked before the first savepoint, since
//!   rolling back to a savepoint gives back the locks that were taken after it,
//! - it is refused a second time, when all others are written: what a trigger goes by may have changed,
//! - the batch has no more such rows than [`Refusals`] allows, and
//! - the database takes another row in its place after that ([`witness`](super::witness)).

use std::collections::HashSet;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::session::{Failed, Session};
use super::{Begun, Moves, Written, begin, claim, commit, copy_in_turn, witness};
use crate::batch::{Batch, Claim, Refused};
use crate::disposition::{FailureClass, Refusals, SqlState};
use crate::failpoint;
use crate::lane::ports::LedgerFailure;
use crate::logging::RateLimited;
use crate::schema::months::PARTITIONED_TABLES;

/// Rows that are tried at random to find out at once whether most are refused.
const SAMPLE: usize = 32;
/// A batch with so many rows is sampled before it is halved: halving it down to one row takes as long.
const SAMPLE_FIRST_MIN: usize = 1_000;
/// With so many refused rows the rest is sampled, and again each time that there are twice as many.
const SAMPLE_AFTER: usize = 11;

/// How it ended.
pub(super) enum Sifted {
    /// All that the database takes is written, the rest is set aside.
    Written(Written),
    /// Rows are refused, and nothing tells whether that is their fault. Nothing is written.
    Undecided(LedgerFailure),
}

/// After the database refused something in the batch: the same transaction once more, without the rows that
/// it refuses by themselves.
///
/// # Errors
/// Systemic when so many rows are refused that the database is taken to be ill.
pub(super) async fn write(
    session: &mut Session,
    topic_id: &Uuid,
    batch: &Batch,
    moves: &Moves,
    refusals: &mut Refusals,
) -> Result<Sifted, Failed> {
    let mut begun = begin(session, topic_id, batch, moves).await?;
    begun.stats.claim = begun.at.elapsed();
    lock(session, begun.current).await?;
    let mut sieve = Sieve { session, batch, begun: &mut begun, refusals, rows: 0, suspects: 0, tries: 0 };
    let refused = sieve.sift().await?;
    let Sieve { rows, tries, .. } = sieve;
    if let Some(sqlstate) = witness::missing(session, batch, &begun, &refused).await? {
        return Ok(Sifted::Undecided(undecided(refused.len(), rows, sqlstate)));
    }
    let fates = batch.decide(&begun.answer, &refused);
    let written = commit(session, begun, fates).await?;
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
            "the database refused rows of a batch: they go to the dead letters, all others are written"
        );
    }
    Ok(Sifted::Written(written))
}

fn undecided(refused: usize, rows: usize, sqlstate: SqlState) -> LedgerFailure {
    LedgerFailure {
        class: FailureClass::Record,
        sqlstate: Some(sqlstate.to_string()),
        message: format!(
            "the database refuses {refused} of the {rows} rows of this batch (SQLSTATE {sqlstate}), and no other row in \
             their place: it is taken to be ill, and none goes to the dead letters"
        ),
        identity: None,
    }
}

/// Keeps the rules of all tables as they are until the transaction ends. Constraints and triggers come and go under
/// stronger locks, also those of a single month.
async fn lock(session: &Session, generation: i64) -> Result<(), Failed> {
    let mut tables = PARTITIONED_TABLES.map(|table| format!("payment_writer.{table}")).to_vec();
    tables.push(format!("payment_writer.idempotency_g{generation}"));
    let lock = format!("LOCK TABLE {} IN ROW EXCLUSIVE MODE", tables.join(", "));
    Ok(session.client.batch_execute(&lock).await?)
}

/// What becomes of rows that the database takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Taken {
    Stay,
    AreTakenBack,
}

struct Sieve<'s> {
    session: &'s mut Session,
    batch: &'s Batch,
    begun: &'s mut Begun,
    refusals: &'s Refusals,
    /// Rows that were to be written.
    rows: usize,
    /// Rows of these that were refused at the first try.
    suspects: usize,
    tries: usize,
}

impl Sieve<'_> {
    /// Claims and writes all of the batch that the database takes; returns the rest.
    async fn sift(&mut self) -> Result<Refused, Failed> {
        let mut refused = Refused::default();
        let owners = &self.begun.answer.owners;
        let whole: Vec<Claim> =
            self.batch.claims(&refused).filter(|c| !owners.contains_key(&c.message_id)).collect();
        self.rows = whole.len();
        // The whole was refused just now.
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
            // Their twins in the batch, if there are any, may claim these ids now.
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

    /// Writes what can be written of these parts, the first one last; returns the rows that were refused alone.
    async fn halves(&mut self, mut parts: Vec<Vec<Claim>>) -> Result<Vec<Claim>, Failed> {
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
                return Err(Failed::ill(sqlstate, refused, rows));
            }
            if suspects.len() == sample_at {
                sample_at *= 2;
                self.sample(&parts).await?;
            }
        }
        Ok(suspects)
    }

    /// Tries rows at random, without writing them. Of a database that refuses most, nothing more need be asked: its
    /// tables are locked meanwhile, and whoever wants to mend them waits.
    async fn sample(&mut self, parts: &[Vec<Claim>]) -> Result<(), Failed> {
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
                        return Err(Failed::ill(sqlstate, refused, refused + taken));
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

    /// Claims and writes these rows; the SQLSTATE if they are refused, and then nothing was done.
    async fn attempt(&mut self, part: &[Claim], taken: Taken) -> Result<Option<SqlState>, Failed> {
        self.tries += 1;
        let Self { session, batch, begun, .. } = self;
        let work = async |session: &mut Session| {
            let owners = &mut begun.answer.owners;
            claim(session, begun.current, part, owners).await?;
            let mut written: Vec<u32> =
                part.iter().filter(|c| !owners.contains_key(&c.message_id)).map(|c| c.index).collect();
            written.sort_unstable();
            copy_in_turn(session, &batch.rows_at(&written)).await
        };
        under_savepoint(session, taken == Taken::Stay, work).await
    }
}

/// Puts both halves on the stack, so that the lower ids come first: as everywhere, ids are claimed in their
/// order, or two lanes would deadlock. Rows that are tried again, and twins, come out of turn; such a deadlock the
/// server ends, and the batch is tried again.
fn halve(mut part: Vec<Claim>, parts: &mut Vec<Vec<Claim>>) {
    let upper = part.split_off(part.len().div_ceil(2));
    for half in [upper, part] {
        if !half.is_empty() {
            parts.push(half);
        }
    }
}

/// Runs `work`, and takes back what it did unless it is to stay; the SQLSTATE if a row was refused.
pub(super) async fn under_savepoint(
    session: &mut Session,
    stays: bool,
    work: impl AsyncFnOnce(&mut Session) -> Result<(), Failed>,
) -> Result<Option<SqlState>, Failed> {
    const TAKE_BACK: &str = "ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part";
    session.client.batch_execute("SAVEPOINT part").await?;
    let worked = match work(session).await {
        // Deferred constraints speak now, not at the COMMIT, where nobody could tell whose fault it is.
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
