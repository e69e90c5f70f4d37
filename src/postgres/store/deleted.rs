//! Claims that somebody deleted, as by TRUNCATE of a generation.
//!
//! Everything that is written once depends on the claims, so their loss must never look like something else:
//!
//! - *After a crash* the records below `applied` are looked up to publish what was not. `applied` moved in the same
//!   transaction that claimed their ids, or noted that the database refused them ([`note_refused`]), or found another
//!   owner. A claim leaves its generation with the whole generation only, once the records are written, published and
//!   older than the window. So a record below `applied` without an owner and without such a note was written, and its
//!   claim was deleted: taken for a refused one, its event would be lost, and its dead letter, replayed, would write it
//!   again. [`refused_or_fail`] lets nothing of the batch commit instead.
//! - *While the daemon runs* a lane looks, in each transaction and after its own claims, for a claim that it made before
//!   in a partition of the batch ([`Remembered`]). The lock that its claims hold keeps the table from being truncated
//!   until the COMMIT. So after a TRUNCATE each lane that claimed in this generation stops at its next batch, before a
//!   repeat is written. A failover or restore that loses the claim also moves `applied` back before its record, and then
//!   the claim is not looked for.
//!
//! What is left: claims deleted while no daemon runs, of records that are published. The audit reports them
//! (`crate::audit`), if it reads them again, and `reconcile` does.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::session::{Session, deleted_claims};
use super::{Begun, array, owners};
use crate::domain::batch::{Answer, Batch, Claim, Refused};
use crate::domain::record::{Offset, Partition};
use crate::ports::StoreError;

const COMMAND: &str = "rejected";

/// Parameters: command, topic's name and id, parallel arrays of partitions and offsets.
const NOTE: &str = "
    INSERT INTO payment_writer.cursor_audit (command, topic, topic_id, partition, after)
    SELECT $1, $2, $3, partition, jsonb_build_object('offsets', jsonb_agg(number))
    FROM unnest($4::integer[], $5::bigint[]) AS refused (partition, number) GROUP BY partition";

/// Parameters: command, topic id, partitions, offsets.
const NOTED: &str = "
    SELECT a.partition, offsets.number::bigint
    FROM payment_writer.cursor_audit a, jsonb_array_elements_text(a.after -> 'offsets') AS offsets (number)
    WHERE a.command = $1 AND a.topic_id = $2 AND a.partition = ANY ($3)
        AND offsets.number::bigint = ANY ($4)";

/// Notes in `cursor_audit` which records the database refused, in the transaction that moves the cursors past them.
pub(super) async fn note_refused(
    session: &Session,
    topic: &str,
    topic_id: &Uuid,
    batch: &Batch,
    refused: &Refused,
) -> Result<(), StoreError> {
    let places = refused.keys().filter_map(|index| batch.source().get(*index as usize));
    let (partitions, offsets): (Vec<i32>, Vec<i64>) = places.map(|r| (r.partition.0, r.offset.0)).unzip();
    if !partitions.is_empty() {
        session.client.execute(NOTE, &[&COMMAND, &topic, topic_id, &partitions, &offsets]).await?;
    }
    Ok(())
}

/// Checks that the database refused the records below `applied` that no claim accounts for.
///
/// # Errors
/// A persistent failure if it did not refuse one of them: its claim was deleted.
pub(super) async fn refused_or_fail(
    session: &Session,
    topic_id: &Uuid,
    batch: &Batch,
    answer: &Answer,
    current: i64,
) -> Result<(), StoreError> {
    let mut left: HashSet<(Partition, Offset)> = batch.unclaimed(answer).collect();
    if left.is_empty() {
        return Ok(());
    }
    let (partitions, offsets): (Vec<i32>, Vec<i64>) = left.iter().map(|(p, o)| (p.0, o.0)).unzip();
    for row in session.client.query(NOTED, &[&COMMAND, topic_id, &partitions, &offsets]).await? {
        left.remove(&(Partition(row.try_get(0)?), Offset(row.try_get(1)?)));
    }
    match left.iter().min() {
        None => Ok(()),
        Some(first) => Err(deleted_claims(current, *first)),
    }
}

/// A claim that this lane committed, and its generation.
#[derive(Debug, Default)]
pub(super) struct Remembered(Option<(i64, Claim)>);

impl Remembered {
    /// Remembers a claim of a batch that is committed.
    pub(super) fn note(&mut self, current: i64, batch: &Batch, answer: &Answer) {
        let none = Refused::default();
        let own = batch.claims(&none).find(|claim| !answer.owners.contains_key(&claim.message_id));
        self.0 = own.map(|claim| (current, claim)).or(self.0.take());
    }

    /// Looks for the claim if the batch's cursors are past its record.
    ///
    /// # Errors
    /// A persistent failure if it is gone.
    pub(super) async fn is_there(
        &self,
        session: &Session,
        begun: &Begun,
        batch: &Batch,
    ) -> Result<(), StoreError> {
        let is_past = |claim: &Claim| {
            batch.progress().iter().any(|p| p.partition == claim.partition && p.seen.is_past(claim.offset))
        };
        let Some((_, claim)) = self.0.filter(|(of, claim)| *of == begun.current && is_past(claim)) else {
            return Ok(());
        };
        let mut found = HashMap::new();
        if let Some(ids) = array([claim.message_id].into_iter()) {
            owners(session, begun.current, &ids, &mut found).await?;
        }
        match found.is_empty() {
            false => Ok(()),
            true => Err(deleted_claims(begun.current, (claim.partition, claim.offset))),
        }
    }
}
