//! Finds the rows that the database refuses by themselves: the batch in halves, under savepoints.
//!
//! What a half writes stays, so in the end all is written that can be, in the one transaction that also moves
//! the cursors. k bad rows among n take O(k log n) tries.

use std::time::Instant;

use super::session::{Failed, Session};
use super::{Begun, claim, copy_in_turn};
use crate::batch::{Batch, Claim, Refused};
use crate::disposition::{FailureClass, Refusals, SqlState};
use crate::failpoint;

/// What came of it.
pub(super) struct Sifted {
    pub refused: Refused,
    /// Rows that were to be written.
    pub rows: usize,
    pub tries: usize,
}

/// Claims and writes all of the batch that the database takes.
///
/// # Errors
/// Systemic when so many rows are refused that the database is taken to be ill.
pub(super) async fn sift(
    session: &mut Session,
    batch: &Batch,
    begun: &mut Begun,
    refusals: &Refusals,
) -> Result<Sifted, Failed> {
    let mut refused = Refused::default();
    let whole: Vec<Claim> =
        batch.claims(&refused).filter(|c| !begun.answer.owners.contains_key(&c.message_id)).collect();
    let (mut rows, mut tries) = (whole.len(), 0);
    // The whole was refused just now.
    let mut parts = Vec::new();
    halve(whole, &mut parts);
    while let Some(part) = parts.pop() {
        tries += 1;
        session.client.batch_execute("SAVEPOINT part").await?;
        match attempt(session, batch, begun, &part).await {
            Ok(()) => continue,
            Err(failed) if failed.class() == FailureClass::Record => {
                session.client.batch_execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part").await?;
                let [alone] = part[..] else {
                    halve(part, &mut parts);
                    continue;
                };
                let Some(sqlstate) = failed.sqlstate().and_then(SqlState::new) else { return Err(failed) };
                refused.insert(alone.index, sqlstate);
                failpoint::hit("after_part_refused");
                if refusals.are_too_many(Instant::now(), rows, refused.len()) {
                    return Err(Failed::ill(sqlstate, refused.len(), rows));
                }
                // Its twin in the batch, if there is one, may claim the id now.
                if let Some(twin) = batch.claims(&refused).find(|c| c.message_id == alone.message_id) {
                    rows += 1;
                    parts.push(vec![twin]);
                }
            }
            Err(failed) => return Err(failed),
        }
    }
    Ok(Sifted { refused, rows, tries })
}

/// Puts both halves on the stack, so that the lower ids come first: as everywhere, ids are claimed in their
/// order, or two lanes would deadlock.
fn halve(mut part: Vec<Claim>, parts: &mut Vec<Vec<Claim>>) {
    let upper = part.split_off(part.len().div_ceil(2));
    for half in [upper, part] {
        if !half.is_empty() {
            parts.push(half);
        }
    }
}

async fn attempt(
    session: &mut Session,
    batch: &Batch,
    begun: &mut Begun,
    part: &[Claim],
) -> Result<(), Failed> {
    let owners = &mut begun.answer.owners;
    claim(session, begun.current, part, owners).await?;
    let mut written: Vec<u32> =
        part.iter().filter(|c| !owners.contains_key(&c.message_id)).map(|c| c.index).collect();
    written.sort_unstable();
    copy_in_turn(session, &batch.rows_at(&written)).await?;
    // Deferred constraints speak now, not at the COMMIT, where nobody could tell whose fault it is.
    session.client.batch_execute("SET CONSTRAINTS ALL IMMEDIATE; RELEASE SAVEPOINT part").await?;
    Ok(())
}
