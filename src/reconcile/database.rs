//! Database queries of the comparison: short statements for claims, and one stream of rows per slice.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::pin::pin;

use futures_util::TryStreamExt;
use tokio::runtime::Handle;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::hash;
use super::range::Skip;
use super::sums::numeric_millionths;
use super::table::RowSeen;
use crate::config::Endpoint;
use crate::domain::batch::Owner;
use crate::domain::columns::postgres_timestamp;
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::error::CommandError;
use crate::kafka::scan::ScanRange;
use crate::postgres::connection::describe;

/// Read-only as a safeguard. Joins of whole months need memory. No timeouts: the server waits while the
/// client reads Kafka between two rows, and large sorts take minutes.
const SESSION: &str =
    "SET default_transaction_read_only = on; SET work_mem = '64MB'; SET tcp_user_timeout = 0";

/// A field in the binary format of the server.
struct Raw<'a>(Option<&'a [u8]>);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(Some(raw)))
    }

    fn from_sql_null(_: &Type) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(None))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// Encodes columns of a row in the format of a binary COPY. The result equals what the daemon wrote, because
/// the binary format has exactly one form per value.
pub(crate) fn encode(
    row: &Row,
    columns: std::ops::Range<usize>,
    out: &mut Vec<u8>,
) -> Result<(), tokio_postgres::Error> {
    out.clear();
    out.extend_from_slice(&(columns.len() as i16).to_be_bytes());
    for column in columns {
        match row.try_get::<_, Raw<'_>>(column)?.0 {
            Some(bytes) => {
                out.extend_from_slice(&(bytes.len() as i32).to_be_bytes());
                out.extend_from_slice(bytes);
            }
            None => out.extend_from_slice(&(-1_i32).to_be_bytes()),
        }
    }
    Ok(())
}

/// Whether a column is null.
pub(crate) fn is_null(row: &Row, column: usize) -> Result<bool, tokio_postgres::Error> {
    Ok(row.try_get::<_, Raw<'_>>(column)?.0.is_none())
}

/// The claim of a message id.
#[derive(Clone, Copy, Debug)]
pub struct Claimed {
    /// The record that claimed the id, and the hash of its payload.
    pub owner: Owner,
    /// Timestamp of that record, in microseconds since 2000.
    pub created_at_us: i64,
}

impl Claimed {
    /// Whether a record with this timestamp makes this claim.
    pub fn is_of(&self, timestamp: TimestampMs) -> bool {
        self.created_at_us == postgres_timestamp(timestamp)
    }
}

/// Joined row of the payment tables.
pub struct PaymentRow {
    /// Partition of the record.
    pub partition: Partition,
    /// Offset of the record.
    pub offset: Offset,
    /// Hashes of the rows.
    pub seen: RowSeen,
    /// Currency and amount in millionths, from `payment_core`.
    pub amount: Option<(String, i128)>,
}

/// The columns of the payment tables, joined: 7 of metadata, 7 of core, 4 of notes.
pub(crate) const PAYMENT_COLUMNS: &str = "\
    m.payment_id, m.created_at, m.updated_at, m.version, m.message_id, m.source_partition, m.source_offset,
    c.payment_id, c.created_at, c.cust_id, c.amount, c.currency, c.status, c.type,
    n.payment_id, n.created_at, n.external_ref_id, n.comment";
/// The joined payment tables, for records in the ranges $1 (partitions), $2 (from), $3 (to). With `timed`,
/// only the months from $4 to $5 (ms); the condition is repeated for each table so that Postgres prunes
/// partitions.
pub(crate) fn payment_tables(timed: bool) -> String {
    let between = |table: &str| {
        match timed {
        true => format!(
            "AND {table}.created_at >= date_trunc('month', to_timestamp($4::bigint / 1000))
             AND {table}.created_at < date_trunc('month', to_timestamp($5::bigint / 1000)) + interval '1 month'"
        ),
        false => String::new(),
    }
    };
    format!(
        "unnest($1::integer[], $2::bigint[], $3::bigint[]) AS r (partition, first, past)
         JOIN payment_writer.payment_metadata m ON m.source_partition = r.partition
             AND m.source_offset >= r.first AND m.source_offset < r.past {}
         LEFT JOIN payment_writer.payment_core c
             ON c.payment_id = m.payment_id AND c.created_at = m.created_at {}
         LEFT JOIN payment_writer.payment_notes n
             ON n.payment_id = m.payment_id AND n.created_at = m.created_at {}",
        between("m"),
        between("c"),
        between("n")
    )
}

/// Converts ranges to three arrays.
pub(crate) fn arrays(ranges: &[ScanRange]) -> (Vec<i32>, Vec<i64>, Vec<i64>) {
    (
        ranges.iter().map(|r| r.partition.0).collect(),
        ranges.iter().map(|r| r.from.0).collect(),
        ranges.iter().map(|r| r.to.0).collect(),
    )
}

/// A read-only session for blocking callers.
pub struct Database {
    runtime: Handle,
    client: Client,
}

/// Error mapping that says what was being done.
fn failed(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> CommandError {
    move |error| CommandError::failed(format!("{doing}: {}", describe(&error)))
}

impl Database {
    /// Opens a session.
    pub fn open(runtime: &Handle, endpoint: &Endpoint) -> Result<Self, CommandError> {
        let client = runtime.block_on(async {
            let (client, _) = endpoint.connect().await.map_err(|e| CommandError::failed(e.to_string()))?;
            client.batch_execute(SESSION).await.map_err(failed("setting up the session"))?;
            Ok::<_, CommandError>(client)
        })?;
        Ok(Self { runtime: runtime.clone(), client })
    }

    /// The underlying client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Looks up the claims of message ids.
    pub fn claims(&self, ids: &[Uuid]) -> Result<HashMap<[u8; 16], Claimed>, CommandError> {
        let mut found = HashMap::with_capacity(ids.len());
        if ids.is_empty() {
            return Ok(found);
        }
        let rows = self
            .runtime
            .block_on(self.client.query(
                "SELECT message_id, source_partition, source_offset, payload_hash, created_at
                 FROM payment_writer.idempotency WHERE message_id = ANY ($1)",
                &[&ids],
            ))
            .map_err(failed("looking up who has claimed message ids"))?;
        let broken = failed("reading claims");
        for row in rows {
            let id: Uuid = row.try_get(0).map_err(&broken)?;
            let owner = Owner {
                partition: Partition(row.try_get(1).map_err(&broken)?),
                offset: Offset(row.try_get(2).map_err(&broken)?),
                payload_hash: row.try_get(3).map_err(&broken)?,
            };
            let Raw(time) = row.try_get(4).map_err(&broken)?;
            let created_at_us =
                time.and_then(|t| t.try_into().ok()).map(i64::from_be_bytes).unwrap_or_default();
            found.insert(id.into_bytes(), Claimed { owner, created_at_us });
        }
        Ok(found)
    }

    /// The message ids among these that occur in a payment row, claimed or not. Scans the whole table.
    pub fn written_ids(&self, ids: &[Uuid]) -> Result<Vec<Uuid>, CommandError> {
        let rows = self
            .runtime
            .block_on(self.client.query(
                "SELECT DISTINCT m.message_id FROM payment_writer.payment_metadata m
                 JOIN unnest($1::uuid[]) AS wanted (message_id) USING (message_id)",
                &[&ids],
            ))
            .map_err(failed("looking for message ids in payment_metadata"))?;
        rows.iter().map(|row| row.try_get(0).map_err(failed("reading message ids"))).collect()
    }

    /// Claims of records up to this time may have been dropped with their generation.
    pub fn pruned_until(&self) -> Result<Option<TimestampMs>, CommandError> {
        self.one(
            "SELECT ceil(extract(epoch FROM max(youngest_record)) * 1000)::bigint
             FROM payment_writer.idempotency_generation WHERE state IN ('retired', 'detached', 'dropped')",
            "reading which claims were dropped",
        )
    }

    /// Rows of records before this time may have been detached with their month.
    pub fn archived_before(&self, months: u32) -> Result<Option<TimestampMs>, CommandError> {
        self.one(
            &format!(
                "SELECT (extract(epoch FROM (date_trunc('month', now() AT TIME ZONE 'UTC')
                     - make_interval(months => {months})) AT TIME ZONE 'UTC') * 1000)::bigint"
            ),
            "asking for the oldest month",
        )
    }

    fn one(&self, query: &str, doing: &'static str) -> Result<Option<TimestampMs>, CommandError> {
        let row = self.runtime.block_on(self.client.query_one(query, &[])).map_err(failed(doing))?;
        Ok(row.try_get::<_, Option<i64>>(0).map_err(failed(doing))?.map(TimestampMs))
    }

    /// Counts rows of `payment_core`, `payment_notes` and `idempotency` without a row of `payment_metadata`.
    /// Scans the whole tables.
    pub fn orphans(&self, archived_before: Option<TimestampMs>) -> Result<[u64; 3], CommandError> {
        const DOING: &str = "looking for rows that belong to nothing";
        let of_payments = |table: &str| {
            format!(
                "SELECT count(*) FROM payment_writer.{table} t WHERE NOT EXISTS (
                     SELECT FROM payment_writer.payment_metadata m
                     WHERE m.payment_id = t.payment_id AND m.created_at = t.created_at)"
            )
        };
        let archived_before = archived_before.map_or(0, |before| before.0);
        let of_claims = format!(
            "SELECT count(*) FROM payment_writer.idempotency t
             WHERE t.created_at >= to_timestamp({archived_before} / 1000) AND NOT EXISTS (
                 SELECT FROM payment_writer.payment_metadata m
                 WHERE m.message_id = t.message_id AND m.source_partition = t.source_partition
                     AND m.source_offset = t.source_offset)"
        );
        let mut counts = [0; 3];
        let queries = [of_payments("payment_core"), of_payments("payment_notes"), of_claims];
        for (count, query) in counts.iter_mut().zip(queries) {
            let row = self.runtime.block_on(self.client.query_one(&query, &[])).map_err(failed(DOING))?;
            *count = row.try_get::<_, i64>(0).map_err(failed(DOING))?.unsigned_abs();
        }
        Ok(counts)
    }

    /// Skips in this topic by operators.
    pub fn skips(&self, topic_id: Uuid) -> Result<Vec<Skip>, CommandError> {
        self.runtime.block_on(skips(&self.client, topic_id)).map_err(failed("reading cursor_audit"))
    }

    /// Passes every row of these ranges, in the months from the first to the last of `times`, to `each`. Uses
    /// one statement and therefore one snapshot.
    pub fn payment_rows(
        &self,
        ranges: &[ScanRange],
        times: (TimestampMs, TimestampMs),
        mut each: impl FnMut(PaymentRow),
    ) -> Result<(), CommandError> {
        let query = format!("SELECT {PAYMENT_COLUMNS} FROM {}", payment_tables(true));
        let (partitions, from, to) = arrays(ranges);
        let (first, last) = (times.0.0, times.1.0);
        let parameters: [&(dyn ToSql + Sync); 5] = [&partitions, &from, &to, &first, &last];
        self.runtime
            .block_on(async {
                let rows = self.client.query_raw(&query, parameters).await?;
                let mut rows = pin!(rows);
                let mut buffer = Vec::with_capacity(512);
                while let Some(row) = rows.try_next().await? {
                    each(payment_row(&row, &mut buffer)?);
                }
                Ok(())
            })
            .map_err(failed("reading the payment tables"))
    }
}

/// Skips in this topic by operators, from `cursor_audit`.
pub async fn skips(client: &Client, topic_id: Uuid) -> Result<Vec<Skip>, tokio_postgres::Error> {
    let rows = client
        .query(
            "SELECT partition, (before->>'applied')::bigint, (before->>'published')::bigint,
                 (after->>'applied')::bigint
             FROM payment_writer.cursor_audit
             WHERE topic_id = $1 AND command LIKE 'cursors skip%' AND partition IS NOT NULL
                 AND after->>'applied' IS NOT NULL",
            &[&topic_id],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Skip {
                partition: Partition(row.try_get(0)?),
                applied: row.try_get::<_, Option<i64>>(1)?.map(NextOffset),
                published: row.try_get::<_, Option<i64>>(2)?.map(NextOffset),
                to: NextOffset(row.try_get(3)?),
            })
        })
        .collect()
}

fn payment_row(row: &Row, buffer: &mut Vec<u8>) -> Result<PaymentRow, tokio_postgres::Error> {
    encode(row, 0..7, buffer)?;
    let metadata = hash::row(buffer);
    let mut amount = None;
    let mut core = None;
    if !is_null(row, 7)? {
        encode(row, 7..14, buffer)?;
        core = Some(hash::row(buffer));
        let millionths = row.try_get::<_, Raw<'_>>(10)?.0.and_then(numeric_millionths);
        amount = Some((row.try_get::<_, String>(11)?, millionths.unwrap_or_default()));
    }
    let mut notes = None;
    if !is_null(row, 14)? {
        encode(row, 14..18, buffer)?;
        notes = Some(hash::row(buffer));
    }
    Ok(PaymentRow {
        partition: Partition(row.try_get(5)?),
        offset: Offset(row.try_get(6)?),
        seen: RowSeen { metadata, core, notes },
        amount,
    })
}
