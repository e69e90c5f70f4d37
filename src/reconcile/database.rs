//! Database queries of the comparison: short statements for claims, and one stream of rows per slice.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::ops::Range;
use std::pin::pin;

use futures_util::TryStreamExt;
use tokio::runtime::Handle;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Client, Error, Row, ToStatement};
use uuid::Uuid;

use super::hash;
use super::range::Exempt;
use super::report::Orphans;
use super::table::{Part, Place};
use crate::config::Endpoint;
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::error::CommandError;
use crate::kafka::scan::ScanRange;
use crate::postgres::connection::describe;

/// Read-only as a safeguard. Joins of whole months need memory. Without statistics, as after a restore, the
/// planner expects few rows and would join them by nested loops, in quadratic time. No timeouts: the server
/// waits while the client reads Kafka between two rows, and large sorts take minutes.
const SESSION: &str = "\
    SET default_transaction_read_only = on; SET work_mem = '64MB'; SET enable_nestloop = off; \
    SET tcp_user_timeout = 0";

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
/// the binary format has exactly one form per value. Returns `false` if the first column is null.
pub(crate) fn encode(row: &Row, columns: Range<usize>, out: &mut Vec<u8>) -> Result<bool, Error> {
    out.clear();
    out.extend_from_slice(&(columns.len() as i16).to_be_bytes());
    let is_there = row.try_get::<_, Raw<'_>>(columns.start)?.0.is_some();
    for column in columns {
        match row.try_get::<_, Raw<'_>>(column)?.0 {
            Some(bytes) => {
                out.extend_from_slice(&(bytes.len() as i32).to_be_bytes());
                out.extend_from_slice(bytes);
            }
            None => out.extend_from_slice(&(-1_i32).to_be_bytes()),
        }
    }
    Ok(is_there)
}

/// A timestamp in microseconds since 2000.
pub(crate) fn timestamp_us(row: &Row, column: usize) -> Result<i64, Error> {
    let Raw(time) = row.try_get(column)?;
    Ok(time.and_then(|t| t.try_into().ok()).map(i64::from_be_bytes).unwrap_or_default())
}

/// The record in two adjacent columns: partition and offset.
pub(crate) fn place(row: &Row, column: usize) -> Result<Place, Error> {
    Ok((Partition(row.try_get(column)?), Offset(row.try_get(column + 1)?)))
}

/// The claim of a message id.
#[derive(Clone, Copy, Debug)]
pub struct Claimed {
    /// The record that claimed the id.
    pub place: Place,
    /// Hash of its payload.
    pub payload_hash: i64,
    /// Timestamp of that record, in microseconds since 2000.
    pub created_at_us: i64,
}

/// A range, and the earliest and latest timestamp of its records' rows.
pub type Months = (ScanRange, Option<(TimestampMs, TimestampMs)>);

/// Adds a range of a partition to those before it. It extends the last one of its partition if both are of the same
/// months: each row is compared with all of them.
pub fn add_months(months: &mut Vec<Months>, range: ScanRange, times: Option<(TimestampMs, TimestampMs)>) {
    let of =
        |times: Option<(TimestampMs, TimestampMs)>| times.map(|(first, last)| (month(first), month(last)));
    let last = months.iter_mut().rfind(|(known, _)| known.partition == range.partition);
    match last.filter(|(known, known_times)| known.to == range.from && of(*known_times) == of(times)) {
        Some((known, _)) => known.to = range.to,
        None => months.push((range, times)),
    }
}

/// The first day of a time's month in UTC; `None` out of jiff's range.
fn month(at: TimestampMs) -> Option<jiff::civil::Date> {
    let at = jiff::Timestamp::from_millisecond(at.0).ok()?;
    Some(at.to_zoned(jiff::tz::TimeZone::UTC).date().first_of_month())
}

/// The columns of the payment tables, joined: 7 of metadata, 7 of core, 4 of notes.
pub(crate) const PAYMENT_COLUMNS: &str = "\
    m.payment_id, m.created_at, m.updated_at, m.version, m.message_id, m.source_partition, m.source_offset,
    c.payment_id, c.created_at, c.cust_id, c.amount, c.currency, c.status, c.type,
    n.payment_id, n.created_at, n.external_ref_id, n.comment";

/// The joined payment tables, for records in the ranges $1 (partitions), $2 (from), $3 (to). With `timed`,
/// only the rows of metadata of the months from $4 to $5 (ms), and the other rows from $4 to $5: only these are
/// sorted or hashed for the join, and Postgres prunes partitions.
pub(crate) fn payment_tables(timed: bool) -> String {
    let between = |table: &str| match (timed, table) {
        (false, _) => String::new(),
        (true, "m") => "AND m.created_at >= date_trunc('month', to_timestamp($4::bigint / 1000))
             AND m.created_at < date_trunc('month', to_timestamp($5::bigint / 1000)) + interval '1 month'"
            .to_owned(),
        (true, _) => format!(
            "AND {table}.created_at >= to_timestamp($4::bigint / 1000)
             AND {table}.created_at < to_timestamp($5::bigint / 1000 + 1)"
        ),
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

/// Error mapping that says what was being done.
pub(crate) fn failed(doing: &'static str) -> impl Fn(Error) -> CommandError {
    move |error| CommandError::failed(format!("{doing}: {}", describe(&error)))
}

/// Runs a query and passes each row to `each`.
pub(crate) async fn rows<T, Q: ToStatement + ?Sized>(
    client: &Client,
    query: &Q,
    parameters: &[&(dyn ToSql + Sync)],
    each: impl FnMut(&Row) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    client.query(query, parameters).await?.iter().map(each).collect()
}

/// Records that operators skipped, from `cursor_audit`.
pub(crate) async fn exempt(client: &Client, topic_id: Uuid) -> Result<Exempt, Error> {
    let query = "SELECT partition, (before->>'applied')::bigint, (before->>'published')::bigint,
             (after->>'applied')::bigint
         FROM payment_writer.cursor_audit
         WHERE topic_id = $1 AND command LIKE 'cursors skip%' AND partition IS NOT NULL
             AND after->>'applied' IS NOT NULL";
    let mut exempt = Exempt::default();
    for row in client.query(query, &[&topic_id]).await? {
        let position = |column| Ok::<_, Error>(row.try_get::<_, Option<i64>>(column)?.map(NextOffset));
        let to = NextOffset(row.try_get(3)?);
        exempt.skip(Partition(row.try_get(0)?), position(1)?, position(2)?, to);
    }
    Ok(exempt)
}

/// A read-only session for blocking callers.
pub struct Database {
    runtime: Handle,
    /// The underlying client.
    pub client: Client,
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

    /// Runs a query; `doing` describes it in errors.
    pub fn query<T>(
        &self,
        doing: &'static str,
        query: &str,
        parameters: &[&(dyn ToSql + Sync)],
        each: impl FnMut(&Row) -> Result<T, Error>,
    ) -> Result<Vec<T>, CommandError> {
        self.runtime.block_on(rows(&self.client, query, parameters, each)).map_err(failed(doing))
    }

    /// Looks up the claims of message ids.
    pub fn claims(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Claimed>, CommandError> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let claims = self.query(
            "looking up who has claimed message ids",
            "SELECT message_id, source_partition, source_offset, payload_hash, created_at
             FROM payment_writer.idempotency WHERE message_id = ANY ($1)",
            &[&ids],
            |row| {
                let (payload_hash, created_at_us) = (row.try_get(3)?, timestamp_us(row, 4)?);
                Ok((row.try_get(0)?, Claimed { place: place(row, 1)?, payload_hash, created_at_us }))
            },
        )?;
        Ok(claims.into_iter().collect())
    }

    /// The records that have a row with one of these message ids, claimed or not. Scans the whole table.
    pub fn written_ids(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Vec<Place>>, CommandError> {
        let rows = self.query(
            "looking for message ids in payment_metadata",
            "SELECT m.message_id, m.source_partition, m.source_offset FROM payment_writer.payment_metadata m
             JOIN (SELECT DISTINCT unnest($1::uuid[])) AS wanted (message_id) USING (message_id)",
            &[&ids],
            |row| Ok((row.try_get(0)?, place(row, 1)?)),
        )?;
        let mut written: HashMap<Uuid, Vec<Place>> = HashMap::new();
        rows.into_iter().for_each(|(id, place)| written.entry(id).or_default().push(place));
        Ok(written)
    }

    /// The records of these ranges with a row of `payment_metadata` in none of the months that [`payment_rows`] reads
    /// for them. Scans the whole table.
    ///
    /// [`payment_rows`]: Self::payment_rows
    pub fn rows_of_other_months(&self, slices: &[Months]) -> Result<Vec<Place>, CommandError> {
        let ranges: Vec<ScanRange> = slices.iter().map(|(range, _)| *range).collect();
        let (partitions, from, to) = arrays(&ranges);
        let times = |of: fn((TimestampMs, TimestampMs)) -> TimestampMs| -> Vec<Option<i64>> {
            slices.iter().map(|(_, times)| times.map(|times| of(times).0)).collect()
        };
        let (first, last) = (times(|times| times.0), times(|times| times.1));
        self.query(
            "looking for rows of other months",
            "SELECT m.source_partition, m.source_offset
             FROM unnest($1::integer[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[])
                 AS r (partition, first, past, oldest, youngest)
             JOIN payment_writer.payment_metadata m ON m.source_partition = r.partition
                 AND m.source_offset >= r.first AND m.source_offset < r.past
                 AND (m.created_at >= date_trunc('month', to_timestamp(r.oldest / 1000))
                     AND m.created_at < date_trunc('month', to_timestamp(r.youngest / 1000)) + interval '1 month')
                     IS NOT TRUE",
            &[&partitions, &from, &to, &first, &last],
            |row| place(row, 0),
        )
    }

    /// Claims of records up to this time may have been dropped with their generation.
    pub fn pruned_until(&self) -> Result<Option<TimestampMs>, CommandError> {
        self.time(
            "reading which claims were dropped",
            "SELECT ceil(extract(epoch FROM max(youngest_record)) * 1000)::bigint
             FROM payment_writer.idempotency_generation WHERE state IN ('retired', 'detached', 'dropped')",
        )
    }

    /// Rows of records before this time may have been detached with their month; `None` if all months are
    /// kept.
    pub fn archived_before(&self, months: Option<u32>) -> Result<Option<TimestampMs>, CommandError> {
        let Some(months) = months else { return Ok(None) };
        self.time(
            "asking for the oldest month",
            &format!(
                "SELECT (extract(epoch FROM (date_trunc('month', now() AT TIME ZONE 'UTC')
                     - make_interval(months => {months})) AT TIME ZONE 'UTC') * 1000)::bigint"
            ),
        )
    }

    fn time(&self, doing: &'static str, query: &str) -> Result<Option<TimestampMs>, CommandError> {
        let times = self.query(doing, query, &[], |row| row.try_get::<_, Option<i64>>(0))?;
        Ok(times.into_iter().flatten().next().map(TimestampMs))
    }

    /// Counts rows of `payment_core`, `payment_notes` and `idempotency` without a row of `payment_metadata`.
    /// Scans the whole tables.
    pub fn orphans(&self, archived_before: Option<TimestampMs>) -> Result<Orphans, CommandError> {
        let counts = self.query(
            "looking for rows that belong to nothing",
            "SELECT
                 (SELECT count(*) FROM payment_writer.payment_core t WHERE NOT EXISTS (
                     SELECT FROM payment_writer.payment_metadata m
                     WHERE m.payment_id = t.payment_id AND m.created_at = t.created_at)),
                 (SELECT count(*) FROM payment_writer.payment_notes t WHERE NOT EXISTS (
                     SELECT FROM payment_writer.payment_metadata m
                     WHERE m.payment_id = t.payment_id AND m.created_at = t.created_at)),
                 (SELECT count(*) FROM payment_writer.idempotency t
                     WHERE t.created_at >= to_timestamp($1::bigint / 1000) AND NOT EXISTS (
                         SELECT FROM payment_writer.payment_metadata m
                         WHERE m.message_id = t.message_id AND m.source_partition = t.source_partition
                             AND m.source_offset = t.source_offset))",
            &[&archived_before.map_or(0, |before| before.0)],
            |row| {
                let (payment_core, payment_notes) = (row.try_get(0)?, row.try_get(1)?);
                Ok(Orphans { payment_core, payment_notes, idempotency: row.try_get(2)? })
            },
        )?;
        Ok(counts.into_iter().next().unwrap_or_default())
    }

    /// Records that operators skipped.
    pub fn exempt(&self, topic_id: Uuid) -> Result<Exempt, CommandError> {
        self.runtime.block_on(exempt(&self.client, topic_id)).map_err(failed("reading cursor_audit"))
    }

    /// Passes every row of these ranges, in the months from the first to the last of `times`, to `each`: the
    /// record, the hashes of its rows (0 means none), and currency and amount in millionths. Uses one
    /// statement and therefore one snapshot.
    pub fn payment_rows(
        &self,
        ranges: &[ScanRange],
        times: (TimestampMs, TimestampMs),
        mut each: impl FnMut(Place, [(Part, u32); 3], Option<(String, i128)>),
    ) -> Result<(), CommandError> {
        let tables = payment_tables(true);
        let query = format!("SELECT {PAYMENT_COLUMNS}, trunc(c.amount * 1000000)::text FROM {tables}");
        let (partitions, from, to) = arrays(ranges);
        let (first, last) = (times.0.0, times.1.0);
        let parameters: [&(dyn ToSql + Sync); 5] = [&partitions, &from, &to, &first, &last];
        let read = async {
            let mut rows = pin!(self.client.query_raw(&query, parameters).await?);
            let mut buffer = Vec::with_capacity(512);
            while let Some(row) = rows.try_next().await? {
                let mut hash = |columns| {
                    Ok::<_, Error>(if encode(&row, columns, &mut buffer)? { hash::row(&buffer) } else { 0 })
                };
                let (metadata, core, notes) = (hash(0..7)?, hash(7..14)?, hash(14..18)?);
                let currency: Option<String> = row.try_get(11)?;
                let millionths = row.try_get::<_, Option<&str>>(18)?.and_then(|text| text.parse().ok());
                let hashes = [(Part::Metadata, metadata), (Part::Core, core), (Part::Notes, notes)];
                each(place(&row, 5)?, hashes, currency.map(|of| (of, millionths.unwrap_or_default())));
            }
            Ok(())
        };
        self.runtime.block_on(read).map_err(failed("reading the payment tables"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::NextOffset;

    #[test]
    fn ranges_of_the_same_months_are_one() {
        let range = |partition, from, to| ScanRange {
            partition: Partition(partition),
            from: NextOffset(from),
            to: NextOffset(to),
        };
        let times = |first: &str, last: &str| {
            let at = |text: &str| TimestampMs(text.parse::<jiff::Timestamp>().unwrap().as_millisecond());
            Some((at(first), at(last)))
        };
        let march = times("2026-03-01T00:00:00Z", "2026-03-31T23:59:59Z");
        let both = times("2026-03-31T23:59:59Z", "2026-04-01T00:00:00Z");
        let mut months = Vec::new();
        for (range, times) in [
            (range(0, 0, 10), march),
            (range(1, 0, 5), march),
            (range(0, 10, 20), times("2026-03-07T00:00:00Z", "2026-03-08T00:00:00Z")),
            (range(1, 6, 9), march),
            (range(0, 20, 30), both),
            (range(0, 30, 40), None),
            (range(0, 40, 50), None),
        ] {
            add_months(&mut months, range, times);
        }
        let expected = [
            (range(0, 0, 20), march),
            (range(1, 0, 5), march),
            (range(1, 6, 9), march),
            (range(0, 20, 30), both),
            (range(0, 30, 50), None),
        ];
        assert_eq!(months, expected);
    }
}
