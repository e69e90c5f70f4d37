//! Claims message ids in `idempotency`, the cheapest way first.
//!
//! 1. COPY, and the index is asked for nothing but the ids that this lane has met lately: most batches hold no other
//!    that was there before. If one does, the unique index ends the COPY, a savepoint takes it back, and
//! 2. the index is asked which ids it has, in one scan of sorted ids, and COPY takes the others. A lane that met
//!    such a repeated id does so at once for a while. If another transaction brings one in between,
//! 3. `INSERT ... ON CONFLICT DO NOTHING` does both in one, row by row. Small batches are claimed so from the start:
//!    they are not worth a savepoint.
//!
//! All three claim in the order of the ids, or two transactions that share some would deadlock.

use std::collections::HashMap;

use futures_util::{TryFutureExt, future};
use uuid::Uuid;

use super::recent::Recent;
use super::session::{Failed, Session};
use super::{Begun, array, copy, owners};
use crate::batch::{Claim, Owner, Rows};
use crate::columns::{ArrayParam, postgres_timestamp};

/// unique_violation
const SQLSTATE_UNIQUE: &str = "23505";
/// Fewer claims than these go by `INSERT ... ON CONFLICT` at once.
const COPY_MIN: usize = 200;
/// After a batch with a repeated id that nobody had expected, the index is asked first in so many batches.
const ASK_FIRST: u32 = 32;

/// Which way was right lately.
#[derive(Debug, Default)]
pub(super) struct Claiming {
    /// Batches for which the index is to be asked first.
    ask_first: u32,
    recent: Recent,
}

impl Claiming {
    /// Claims what can be claimed; adds the owners of what could not.
    pub(super) async fn claim(
        &mut self,
        session: &mut Session,
        begun: &mut Begun,
        mut claims: Vec<Claim>,
    ) -> Result<(), Failed> {
        let known = begun.answer.owners.len();
        self.ask_first = self.ask_first.saturating_sub(1);
        // In the order of the ids, as the claims are.
        let suspects: Vec<[u8; 16]> =
            claims.iter().map(|claim| claim.message_id).filter(|id| self.recent.meet(id)).collect();
        if claims.len() >= COPY_MIN && self.copy_what_is_free(session, begun, &mut claims, &suspects).await? {
            return Ok(());
        }
        claim(session, begun.current, &claims, &mut begun.answer.owners).await?;
        if begun.answer.owners.len() > known {
            self.ask_first = ASK_FIRST;
        }
        Ok(())
    }

    /// The first two ways. False if neither would do: then `claims` are still to be claimed.
    async fn copy_what_is_free(
        &mut self,
        session: &mut Session,
        begun: &mut Begun,
        claims: &mut Vec<Claim>,
        suspects: &[[u8; 16]],
    ) -> Result<bool, Failed> {
        if self.ask_first == 0 {
            sort_out(session, begun, claims, suspects.iter().copied()).await?;
            if copied(session, begun, claims).await? {
                return Ok(true);
            }
            self.ask_first = ASK_FIRST;
        }
        let ids: Vec<[u8; 16]> = claims.iter().map(|claim| claim.message_id).collect();
        sort_out(session, begun, claims, ids.iter().copied()).await?;
        let is_unexpected =
            |id: &[u8; 16]| begun.answer.owners.contains_key(id) && suspects.binary_search(id).is_err();
        if ids.iter().any(is_unexpected) {
            self.ask_first = ASK_FIRST;
        }
        copied(session, begun, claims).await
    }
}

/// Asks the index for these ids, and leaves those out of `claims` that it has.
async fn sort_out(
    session: &mut Session,
    begun: &mut Begun,
    claims: &mut Vec<Claim>,
    ids: impl Iterator<Item = [u8; 16]>,
) -> Result<(), Failed> {
    if let Some(ids) = array(ids) {
        owners(session, begun.current, &ids, &mut begun.answer.owners).await?;
        claims.retain(|claim| !begun.answer.owners.contains_key(&claim.message_id));
    }
    Ok(())
}

/// Claims all by COPY; false if one of the ids is taken, and then nothing was done.
async fn copied(session: &mut Session, begun: &Begun, claims: &[Claim]) -> Result<bool, Failed> {
    if claims.is_empty() {
        return Ok(true);
    }
    let statement = session.copy_into(begun.current).await?;
    let mut bytes = Vec::with_capacity(claims.len() * Claim::ROW_BYTES);
    for claim in claims {
        claim.write_row(begun.today, &mut bytes);
    }
    let rows = Rows { bytes: bytes.into(), count: claims.len() };
    let savepoint = session.client.batch_execute("SAVEPOINT claims").map_err(Failed::from);
    // The savepoint stays: the COMMIT releases it.
    match future::try_join(savepoint, copy(session, &statement, &rows)).await {
        Ok(_) => Ok(true),
        Err(failed) if failed.sqlstate() == Some(SQLSTATE_UNIQUE) => {
            session.client.batch_execute("ROLLBACK TO SAVEPOINT claims; RELEASE SAVEPOINT claims").await?;
            Ok(false)
        }
        Err(failed) => Err(failed),
    }
}

/// Claims row by row what can be claimed; adds the owners of what could not.
pub(super) async fn claim(
    session: &mut Session,
    leaf: i64,
    claims: &[Claim],
    taken: &mut HashMap<[u8; 16], Owner>,
) -> Result<(), Failed> {
    if claims.is_empty() {
        return Ok(());
    }
    let column = |size| ArrayParam::with_capacity(claims.len(), size);
    let (mut ids, mut offsets, mut hashes) = (column(16), column(8), column(8));
    let (mut timestamps, mut partitions) = (column(8), column(4));
    for claim in claims {
        ids.push(&claim.message_id);
        offsets.push(&claim.offset.0.to_be_bytes());
        hashes.push(&claim.payload_hash.to_be_bytes());
        timestamps.push(&postgres_timestamp(claim.timestamp).to_be_bytes());
        partitions.push(&claim.partition.0.to_be_bytes());
    }
    let statement = session.claim_into(leaf).await?;
    let rows = session.client.query(&statement, &[&ids, &offsets, &hashes, &timestamps, &partitions]).await?;
    let unclaimed: Vec<Uuid> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    if let Some(ids) = array(unclaimed.iter().map(|id| *id.as_bytes())) {
        // A statement of its own: its snapshot sees the owners that were committed meanwhile.
        owners(session, leaf, &ids, taken).await?;
        if unclaimed.iter().any(|id| !taken.contains_key(id.as_bytes())) {
            return Err(Failed::unexpected("an id was taken, but its owner is not to be seen".to_owned()));
        }
    }
    Ok(())
}
