//! Tests whether the database accepts another row in the place of a refused one. If it does, the row is at
//! fault; otherwise the database is.
//!
//! The other row, the *witness*, is written to the same tables, month and generation as the refused one, and
//! is rolled back. Its contents are those of a payment that the database accepted: one of this batch, or else
//! one written before. The first attempt uses the ids, record position and time of the refused row, because
//! these select the same table partitions. If that is refused, these values may be at fault: the second
//! attempt uses the accepted payment's time and new ids. If some month has constraints or triggers that
//! others lack, that payment must be of the same month.

use std::collections::BTreeMap;
use std::pin::pin;

use bytes::Bytes;
use futures_util::TryStreamExt;

use super::Begun;
use super::copy::{copy_in_turn, copy_rows};
use super::session::Session;
use crate::domain::batch::{Batch, Claim, PaymentView, Refused, Rows, TableRows};
use crate::domain::columns::{COPY_HEADER, COPY_TRAILER, RowWriter, from_postgres_timestamp};
use crate::domain::outcome::SqlState;
use crate::domain::record::{Offset, Partition, TimestampMs};
use crate::ports::StoreError;
use crate::postgres::schema::months::Month;

/// Timeout of each search for a payment written before, which has no index to use.
const LOOK_TIMEOUT: &str = "1s";
/// query_canceled
const SQLSTATE_TIMEOUT: &str = "57014";

const CORE_COLUMNS: &str = "payment_id, created_at, cust_id, amount, currency, status, type";
const NOTES_COLUMNS: &str = "payment_id, created_at, external_ref_id, comment";
/// Bytes at the start of `payment_core` and `payment_notes` rows in binary COPY format: the number of
/// columns, then payment_id and created_at with their lengths.
const HEAD_BYTES: usize = 2 + 4 + 16 + 4 + 8;

/// Whether a month of the payment tables has a constraint, trigger or unique index of its own.
const MONTHS_DIFFER: &str = "
    SELECT EXISTS (
        SELECT FROM pg_inherits i
        WHERE i.inhparent IN ('payment_writer.payment_core'::regclass, 'payment_writer.payment_metadata'::regclass,
                'payment_writer.payment_notes'::regclass)
            AND (EXISTS (SELECT FROM pg_constraint c
                    WHERE c.conrelid = i.inhrelid AND c.coninhcount = 0 AND c.contype <> 't')
                OR EXISTS (SELECT FROM pg_trigger t
                    WHERE t.tgrelid = i.inhrelid AND t.tgparentid = 0 AND NOT t.tgisinternal)
                OR EXISTS (SELECT FROM pg_index x
                    WHERE x.indrelid = i.inhrelid AND x.indisunique
                        AND NOT EXISTS (SELECT FROM pg_inherits p WHERE p.inhrelid = x.indexrelid))
                OR EXISTS (SELECT FROM pg_attribute a JOIN pg_attribute p USING (attname)
                    WHERE a.attrelid = i.inhrelid AND p.attrelid = i.inhparent AND a.attnotnull AND NOT p.attnotnull)))";

/// The values that differ between payments with the same contents.
struct Head {
    payment_id: [u8; 16],
    message_id: [u8; 16],
    at: TimestampMs,
    partition: Partition,
    offset: Offset,
}

/// Contents of a payment that the database accepted.
struct Pattern {
    /// Columns of `payment_core` after the head.
    core: Bytes,
    /// Columns of `payment_notes` after the head; `None` if the refused row has no notes.
    notes: Option<Bytes>,
    /// Head of the accepted payment.
    head: Head,
}

/// Returns the SQLSTATE of a refused row for which no witness is accepted, if there is one. Call it when
/// everything else is written.
pub(super) async fn missing(
    session: &Session,
    batch: &Batch,
    begun: &Begun,
    refused: &Refused,
) -> Result<Option<SqlState>, StoreError> {
    if refused.is_empty() {
        return Ok(None);
    }
    let months_differ: bool = session.client.query_one(MONTHS_DIFFER, &[]).await?.try_get(0)?;
    let written: Vec<u32> = batch
        .claims(refused)
        .filter(|claim| !begun.answer.owners.contains_key(&claim.message_id))
        .map(|claim| claim.index)
        .collect();
    // One row is tested for all that are written to the same tables.
    let mut ways: BTreeMap<(Option<Month>, bool), (u32, SqlState)> = BTreeMap::new();
    for (&index, &sqlstate) in refused {
        let Some(row) = batch.payment_view(index as usize) else { continue };
        let month = Month::of(row.timestamp).filter(|_| months_differ);
        ways.entry((month, row.notes.is_some())).or_insert((index, sqlstate));
    }
    for (index, sqlstate) in ways.into_values() {
        if !is_at_fault(session, batch, begun, &written, index, months_differ).await? {
            return Ok(Some(sqlstate));
        }
    }
    Ok(None)
}

/// Whether the database accepts another row in the place of the one at `index`.
async fn is_at_fault(
    session: &Session,
    batch: &Batch,
    begun: &Begun,
    written: &[u32],
    index: u32,
    months_differ: bool,
) -> Result<bool, StoreError> {
    let (Some(refused), Some(head)) = (batch.payment_view(index as usize), Head::of(batch, index)) else {
        return Ok(false);
    };
    let month = Month::of(refused.timestamp);
    let Some(pattern) = pattern(session, batch, written, &refused, &head).await? else {
        return Ok(false);
    };
    if takes(session, begun, &head, &pattern).await? {
        return Ok(true);
    }
    if months_differ && Month::of(pattern.head.at) != month {
        return Ok(false);
    }
    takes(session, begun, &pattern.head.renamed(&head), &pattern).await
}

/// Contents for a row in the place of `refused`, preferably of the same month.
async fn pattern(
    session: &Session,
    batch: &Batch,
    written: &[u32],
    refused: &PaymentView<'_>,
    refused_head: &Head,
) -> Result<Option<Pattern>, StoreError> {
    let month = Month::of(refused.timestamp);
    let of_batch = |has_notes: bool| {
        let views = || {
            written
                .iter()
                .filter_map(|index| Some((*index, batch.payment_view(*index as usize)?)))
                .filter(|(_, view)| view.notes.is_some() || !has_notes)
        };
        views().find(|(_, view)| Month::of(view.timestamp) == month).or_else(|| views().next())
    };
    let wants_notes = refused.notes.is_some();
    let taken = of_batch(wants_notes).or_else(|| of_batch(false));
    let (core, head) = match taken.and_then(|(index, view)| Some((tail(view.core), Head::of(batch, index)?)))
    {
        Some(found) => found,
        None => {
            let Some(row) = stored(session, "payment_core", CORE_COLUMNS, month).await? else {
                return Ok(None);
            };
            let Some(head) = refused_head.stored_as(&row) else { return Ok(None) };
            (tail(&row), head)
        }
    };
    let notes = match taken.and_then(|(_, view)| view.notes) {
        _ if !wants_notes => None,
        Some(notes) => Some(tail(notes)),
        None => {
            let row = stored(session, "payment_notes", NOTES_COLUMNS, month).await?;
            Some(row.map_or_else(plain_notes, |row| tail(&row)))
        }
    };
    Ok(Some(Pattern { core, notes, head }))
}

/// The columns after the head.
fn tail(row: &[u8]) -> Bytes {
    Bytes::copy_from_slice(row.get(HEAD_BYTES..).unwrap_or_default())
}

/// Default notes: notes are rare, so none may be stored yet when the first ones are refused.
fn plain_notes() -> Bytes {
    let mut row = Vec::new();
    RowWriter::start(&mut row, 4).uuid(&[0; 16]).timestamptz(TimestampMs(0)).text(Some("0")).text(Some("0"));
    tail(&row)
}

/// A row written before, in binary COPY format: of this month, or else of any.
async fn stored(
    session: &Session,
    table: &str,
    columns: &str,
    month: Option<Month>,
) -> Result<Option<Vec<u8>>, StoreError> {
    let of_month = month.map(|month| format!("WHERE {}", month.condition()));
    for condition in of_month.into_iter().chain([String::new()]) {
        let look = format!(
            "COPY (SELECT {columns} FROM payment_writer.{table} {condition} LIMIT 1) TO STDOUT (FORMAT binary)"
        );
        let limit = format!("SAVEPOINT look; SET LOCAL statement_timeout = '{LOOK_TIMEOUT}'");
        session.client.batch_execute(&limit).await?;
        let found = read(session, &look).await;
        session.client.batch_execute("ROLLBACK TO SAVEPOINT look; RELEASE SAVEPOINT look").await?;
        match found {
            Ok(copied) => {
                let row = copied.get(COPY_HEADER.len()..copied.len().saturating_sub(COPY_TRAILER.len()));
                if let Some(row) = row.filter(|row| !row.is_empty()) {
                    return Ok(Some(row.to_vec()));
                }
            }
            Err(error) if error.sqlstate.as_deref() == Some(SQLSTATE_TIMEOUT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

async fn read(session: &Session, copy: &str) -> Result<Vec<u8>, StoreError> {
    let mut stream = pin!(session.client.copy_out(copy).await?);
    let mut copied = Vec::new();
    while let Some(piece) = stream.try_next().await? {
        copied.extend_from_slice(&piece);
    }
    Ok(copied)
}

impl Head {
    fn of(batch: &Batch, index: u32) -> Option<Self> {
        let view = batch.payment_view(index as usize)?;
        let record = batch.source().get(index as usize)?;
        Some(Self {
            payment_id: id_of(view.core)?,
            message_id: view.message_id,
            at: view.timestamp,
            partition: record.partition,
            offset: record.offset,
        })
    }

    /// With the payment id and time of a `payment_core` row, which has no message id and record position.
    fn stored_as(&self, core: &[u8]) -> Option<Self> {
        let at = core.get(HEAD_BYTES - 8..HEAD_BYTES)?.try_into().ok().map(i64::from_be_bytes)?;
        Some(Self { payment_id: id_of(core)?, at: from_postgres_timestamp(at), ..*self })
    }

    /// With new random ids that keep their time, version and variant, and with the partition and offset of
    /// `place`.
    fn renamed(&self, place: &Self) -> Self {
        let [payment_id, message_id] = [self.payment_id, self.message_id].map(|mut id| {
            let mut random: [u8; 8] = rand::random();
            random[0] = id[8] & 0b1100_0000 | random[0] & 0b0011_1111;
            id[8..].copy_from_slice(&random);
            id
        });
        Self { payment_id, message_id, at: self.at, partition: place.partition, offset: place.offset }
    }

    /// The claim and the table rows of a payment with these contents.
    fn rows(&self, pattern: &Pattern, today: i32) -> (Rows, TableRows) {
        let one = |bytes: Vec<u8>| Rows { bytes: bytes.into(), count: 1 };
        let claim = Claim {
            index: 0,
            message_id: self.message_id,
            partition: self.partition,
            offset: self.offset,
            payload_hash: 0,
            timestamp: self.at,
        };
        let mut claimed = Vec::new();
        claim.write_row(today, &mut claimed);
        let mut metadata = Vec::new();
        RowWriter::start(&mut metadata, 7)
            .uuid(&self.payment_id)
            .timestamptz(self.at)
            .timestamptz(self.at)
            .integer(1)
            .uuid(&self.message_id)
            .integer(self.partition.0)
            .bigint(self.offset.0);
        let with_tail = |columns, tail: &[u8]| {
            let mut row = Vec::new();
            RowWriter::start(&mut row, columns).uuid(&self.payment_id).timestamptz(self.at);
            row.extend_from_slice(tail);
            one(row)
        };
        let tables = TableRows {
            core: with_tail(7, &pattern.core),
            metadata: one(metadata),
            notes: pattern.notes.as_ref().map_or_else(Rows::default, |notes| with_tail(4, notes)),
        };
        (one(claimed), tables)
    }
}

fn id_of(row: &[u8]) -> Option<[u8; 16]> {
    row.get(6..22)?.try_into().ok()
}

/// Whether the database accepts such a payment; it is rolled back.
async fn takes(session: &Session, begun: &Begun, head: &Head, pattern: &Pattern) -> Result<bool, StoreError> {
    let (claimed, tables) = head.rows(pattern, begun.today);
    let write = async {
        let statement = session.copy_into(begun.current).await?;
        copy_rows(session, "idempotency", &statement, &claimed).await?;
        copy_in_turn(session, &tables).await
    };
    Ok(session.under_savepoint(false, write).await?.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::batch::Progress;
    use crate::domain::record::{NextOffset, SourceBatch};
    use crate::domain::wire::Rules;

    const AT: TimestampMs = TimestampMs(1_767_225_600_000);

    /// One payment, at offset 5 of partition 1.
    fn batch(amount: &str) -> Batch {
        let value = format!(
            r#"{{"messageId":"0190b2a4-5f0e-4c3a-9d1e-2f4b8c6d7e8f","amount":{amount},"status":2,"currency":"EUR","custId":7,"type":"BWI","comment":"c"}}"#
        );
        let mut source = SourceBatch::new();
        let (partition, offset) = (Partition(1), Offset(5));
        source.push(partition, offset, Some(AT), Some(b"7"), Some(value.as_bytes()), []);
        let progress =
            Progress { partition, seen: NextOffset(0), reached: offset.next(), timestamp: Some(Some(AT)) };
        Batch::assemble(source, vec![progress], &Rules::default())
    }

    fn pattern_of(batch: &Batch) -> Pattern {
        let view = batch.payment_view(0).unwrap();
        Pattern { core: tail(view.core), notes: view.notes.map(tail), head: Head::of(batch, 0).unwrap() }
    }

    #[test]
    fn a_witness_with_a_rows_own_head_and_contents_is_that_row() {
        let batch = batch("1.25");
        let view = batch.payment_view(0).unwrap();
        let (claimed, tables) = Head::of(&batch, 0).unwrap().rows(&pattern_of(&batch), 0);
        assert_eq!(tables.core.bytes, view.core);
        assert_eq!(tables.metadata.bytes, view.metadata);
        assert_eq!(tables.notes.bytes, view.notes.unwrap());
        assert_eq!(claimed.bytes.len(), Claim::ROW_BYTES);
        assert_eq!([&tables.core, &tables.metadata, &tables.notes, &claimed].map(|rows| rows.count), [1; 4]);
    }

    #[test]
    fn a_witness_has_nothing_of_the_refused_rows_contents() {
        let (refused, taken) = (batch("9999"), batch("1.25"));
        let (_, tables) = Head::of(&refused, 0).unwrap().rows(&pattern_of(&taken), 0);
        assert_eq!(tables.core.bytes, taken.payment_view(0).unwrap().core);
    }

    #[test]
    fn other_ids_keep_their_time_version_and_variant() {
        let head = Head::of(&batch("1"), 0).unwrap();
        let other = head.renamed(&head);
        for (id, renamed) in [(head.payment_id, other.payment_id), (head.message_id, other.message_id)] {
            assert_ne!(id, renamed);
            assert_eq!(id[..8], renamed[..8]);
            assert_eq!(id[8] >> 6, renamed[8] >> 6);
        }
        assert_eq!((other.at, other.partition, other.offset), (AT, Partition(1), Offset(5)));
    }

    #[test]
    fn id_and_time_are_read_from_a_stored_row() {
        let batch = batch("1");
        let head = Head { payment_id: [0; 16], at: TimestampMs(0), ..Head::of(&batch, 0).unwrap() };
        let stored = head.stored_as(batch.payment_view(0).unwrap().core).unwrap();
        assert_eq!((stored.payment_id, stored.at), (Head::of(&batch, 0).unwrap().payment_id, AT));
        assert!(head.stored_as(b"").is_none());
    }
}
