//! Claims message ids in `idempotency`, with the cheapest method first.
//!
//! 1. Look up only the ids that this lane has seen recently, and COPY the others. Most batches contain no
//!    other existing id. If one does, the unique index fails the COPY, and a savepoint rolls it back.
//! 2. Look up all ids in one index scan of sorted ids, and COPY those that are free. After an unexpected
//!    existing id, a lane starts with this method for [`ASK_FIRST`] batches. The COPY fails if another
//!    transaction inserts one of the ids in between.
//! 3. `INSERT ... ON CONFLICT DO NOTHING`, row by row. Small batches start with it, because a savepoint costs
//!    more.
//!
//! All methods claim in the order of the ids, because transactions that share ids could deadlock otherwise.

use std::collections::HashMap;

use futures_util::{TryFutureExt, future};
use uuid::Uuid;

use super::copy::copy_rows;
use super::recent::Recent;
use super::session::{Session, no_key, store_error};
use super::{Begun, array, owners};
use crate::domain::batch::{Claim, Owner, Rows};
use crate::domain::columns::{ArrayParam, postgres_timestamp};
use crate::domain::outcome::FailureClass;
use crate::ports::StoreError;

/// unique_violation
const SQLSTATE_UNIQUE: &str = "23505";
/// invalid_column_reference: ON CONFLICT without a unique index for it
const SQLSTATE_NO_KEY: &str = "42P10";
/// Batches with fewer claims than this start with `INSERT ... ON CONFLICT`.
const COPY_MIN: usize = 200;
/// Number of batches that start with a lookup of all ids after one with an unexpected existing id.
const ASK_FIRST: u32 = 32;

/// What a lane remembers to choose the method.
#[derive(Debug, Default)]
pub(super) struct Claiming {
    /// Number of batches that still start with a lookup of all ids.
    ask_first: u32,
    recent: Recent,
}

impl Claiming {
    /// Claims the free ids; adds the owners of the others.
    pub(super) async fn claim(
        &mut self,
        session: &Session,
        begun: &mut Begun,
        mut claims: Vec<Claim>,
    ) -> Result<(), StoreError> {
        let known = begun.answer.owners.len();
        self.ask_first = self.ask_first.saturating_sub(1);
        // Sorted by id, like the claims.
        let suspects: Vec<[u8; 16]> = claims
            .iter()
            .map(|claim| claim.message_id)
            .filter(|id| self.recent.check_and_insert(id))
            .collect();
        if claims.len() >= COPY_MIN && self.copy_what_is_free(session, begun, &mut claims, &suspects).await? {
            return Ok(());
        }
        claim(session, begun.current, &claims, &mut begun.answer.owners).await?;
        if begun.answer.owners.len() > known {
            self.ask_first = ASK_FIRST;
        }
        Ok(())
    }

    /// Methods 1 and 2. Returns false if both failed: then `claims` are still to be claimed.
    async fn copy_what_is_free(
        &mut self,
        session: &Session,
        begun: &mut Begun,
        claims: &mut Vec<Claim>,
        suspects: &[[u8; 16]],
    ) -> Result<bool, StoreError> {
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

/// Looks up these ids and removes existing ones from `claims`.
async fn sort_out(
    session: &Session,
    begun: &mut Begun,
    claims: &mut Vec<Claim>,
    ids: impl Iterator<Item = [u8; 16]>,
) -> Result<(), StoreError> {
    if let Some(ids) = array(ids) {
        owners(session, begun.current, &ids, &mut begun.answer.owners).await?;
        claims.retain(|claim| !begun.answer.owners.contains_key(&claim.message_id));
    }
    Ok(())
}

/// Claims all by COPY. Returns false if one of the ids exists; then nothing was changed.
async fn copied(session: &Session, begun: &Begun, claims: &[Claim]) -> Result<bool, StoreError> {
    if claims.is_empty() {
        return Ok(true);
    }
    let statement = session.copy_into(begun.current).await?;
    let mut bytes = Vec::with_capacity(claims.len() * Claim::ROW_BYTES);
    for claim in claims {
        claim.write_row(begun.today, &mut bytes);
    }
    let rows = Rows { bytes: bytes.into(), count: claims.len() };
    let savepoint = session.client.batch_execute("SAVEPOINT claims").map_err(StoreError::from);
    // The COMMIT releases the savepoint.
    match future::try_join(savepoint, copy_rows(session, "idempotency", &statement, &rows)).await {
        Ok(_) => Ok(true),
        Err(error) if error.sqlstate.as_deref() == Some(SQLSTATE_UNIQUE) => {
            session.client.batch_execute("ROLLBACK TO SAVEPOINT claims; RELEASE SAVEPOINT claims").await?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Method 3. Claims the free ids row by row; adds the owners of the others.
pub(super) async fn claim(
    session: &Session,
    leaf: i64,
    claims: &[Claim],
    taken: &mut HashMap<[u8; 16], Owner>,
) -> Result<(), StoreError> {
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
    let rows = session.client.query(&statement, &[&ids, &offsets, &hashes, &timestamps, &partitions]).await;
    let rows = rows.map_err(StoreError::from).map_err(|error| match error.sqlstate.as_deref() {
        Some(SQLSTATE_NO_KEY) => no_key(leaf),
        _ => error,
    })?;
    let unclaimed: Vec<Uuid> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    if let Some(ids) = array(unclaimed.iter().map(|id| *id.as_bytes())) {
        // A separate statement, so that its snapshot includes owners committed meanwhile.
        owners(session, leaf, &ids, taken).await?;
        if unclaimed.iter().any(|id| !taken.contains_key(id.as_bytes())) {
            let message = "an id is claimed, but its owner is not visible";
            return Err(store_error(FailureClass::Transient, message.to_owned()));
        }
    }
    Ok(())
}
