//! Compares two databases written from the same log, row by row in log order. Differences that only the order
//! of writing explains are allowed and listed.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::pin::{Pin, pin};

use futures_util::TryStreamExt;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, RowStream};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::{database, ranges};
use crate::config::Settings;
use crate::domain::columns::postgres_timestamp;
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::domain::wire::Reason;
use crate::error::CommandError;
use crate::kafka::scan::{ScanRange, Scanner};
use crate::postgres::connection::describe;
use crate::reconcile::database::{Database, PAYMENT_COLUMNS, arrays, encode, is_null, payment_tables};
use crate::reconcile::{Exempt, Findings, Progress};
use crate::resolution::View;

/// Maximum number of differences to recheck; all others count as wrong without a recheck.
const OPEN_MAX: usize = 100_000;

/// Result of the comparison.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Comparison {
    /// Second database, without the password.
    pub into: String,
    /// Group that wrote the second database.
    pub group_id: String,
    /// Compared ranges of offsets by partition: from, to.
    pub compared: Vec<(Partition, NextOffset, NextOffset)>,
    /// Number of payments with the same rows and the same claim in both databases.
    pub equal: u64,
    /// Number of payments of the first database whose records had left the log when the rebuild started.
    pub older: u64,
    /// Differences that the contract allows.
    pub allowed: Findings,
    /// Differences that are wrong.
    pub findings: Findings,
}

impl Comparison {
    /// Whether the second database can replace the first one.
    pub fn is_equal(&self) -> bool {
        self.findings.is_empty()
    }

    /// Machine-readable form.
    pub fn json(&self) -> Value {
        let compared: Vec<Value> = self
            .compared
            .iter()
            .map(|(partition, from, to)| json!({ "partition": partition.0, "from": from.0, "to": to.0 }))
            .collect();
        json!({
            "is_equal": self.is_equal(),
            "into": self.into,
            "group": self.group_id,
            "partitions": compared,
            "equal": self.equal,
            "older_than_the_log": self.older,
            "allowed": self.allowed.json(),
            "findings": self.findings.json(),
        })
    }
}

type Place = (Partition, Offset);

/// A payment in one of the databases.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Payment {
    place: Place,
    message_id: Uuid,
    created_at_us: i64,
    /// Hash of all columns of the three payment tables.
    rows: u128,
    /// Owner of the message id, and hash of the whole claim.
    claim: Option<(Place, u128)>,
}

/// The database that lacks a payment, or what differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Difference {
    OnlyFirst,
    OnlySecond,
    Claim,
}

/// A difference to be rechecked.
#[derive(Clone, Copy, Debug)]
struct Open {
    difference: Difference,
    payment: Payment,
}

/// Compares what both databases have written since the start of the rebuild.
pub(super) fn compare(
    settings: &Settings,
    rebuilding: &Settings,
    runtime: &Handle,
    view: &View,
    starts: &BTreeMap<Partition, NextOffset>,
    limit: usize,
    progress: &Progress,
) -> Result<Comparison, CommandError> {
    progress.say("comparing");
    let first = Database::open(runtime, &settings.postgres.url)?;
    let second = Database::open(runtime, &rebuilding.postgres.url)?;
    let topic_id = view.identity.topic_id;
    let ranges = runtime.block_on(async {
        Ok::<_, CommandError>(ranges(
            starts,
            &applied(first.client(), topic_id).await?,
            &applied(second.client(), topic_id).await?,
        ))
    })?;
    let mut comparison = Comparison {
        into: rebuilding.postgres.url.to_string(),
        group_id: rebuilding.kafka.group_id.clone(),
        compared: ranges.iter().map(|r| (r.partition, r.from, r.to)).collect(),
        equal: 0,
        older: runtime.block_on(older(first.client(), starts))?,
        allowed: Findings::new(limit),
        findings: Findings::new(limit),
    };
    let open = runtime.block_on(merge(&first, &second, &ranges, &mut comparison))?;
    if !open.is_empty() {
        progress.say("rechecking");
        explain(settings, &first, &second, topic_id, open, &mut comparison)?;
    }
    comparison.findings.named.sort();
    comparison.allowed.named.sort();
    Ok(comparison)
}

async fn applied(client: &Client, topic_id: Uuid) -> Result<BTreeMap<Partition, NextOffset>, CommandError> {
    let failed = database("reading cursors");
    let rows = client
        .query(
            "SELECT partition, applied FROM payment_writer.source_cursor WHERE topic_id = $1",
            &[&topic_id],
        )
        .await
        .map_err(&failed)?;
    rows.iter()
        .map(|row| {
            Ok((Partition(row.try_get(0).map_err(&failed)?), NextOffset(row.try_get(1).map_err(&failed)?)))
        })
        .collect()
}

async fn older(client: &Client, starts: &BTreeMap<Partition, NextOffset>) -> Result<u64, CommandError> {
    let failed = database("counting what is older than the log");
    let partitions: Vec<i32> = starts.keys().map(|p| p.0).collect();
    let from: Vec<i64> = starts.values().map(|o| o.0).collect();
    let row = client
        .query_one(
            "SELECT count(*) FROM unnest($1::integer[], $2::bigint[]) AS r (partition, first)
             JOIN payment_writer.payment_metadata m
                 ON m.source_partition = r.partition AND m.source_offset < r.first",
            &[&partitions, &from],
        )
        .await
        .map_err(&failed)?;
    Ok(row.try_get::<_, i64>(0).map_err(&failed)?.unsigned_abs())
}

async fn stream(client: &Client, ranges: &[ScanRange]) -> Result<RowStream, tokio_postgres::Error> {
    let (partitions, from, to) = arrays(ranges);
    let parameters: [&(dyn ToSql + Sync); 3] = [&partitions, &from, &to];
    let query = format!(
        "SELECT {PAYMENT_COLUMNS},
             i.message_id, i.source_partition, i.source_offset, i.payload_hash, i.created_at
         FROM {} LEFT JOIN payment_writer.idempotency i ON i.message_id = m.message_id
         ORDER BY m.source_partition, m.source_offset, m.payment_id",
        payment_tables(false)
    );
    client.query_raw(&query, parameters).await
}

/// Payments of one database in log order.
struct Side<'s> {
    rows: Pin<&'s mut RowStream>,
    buffer: Vec<u8>,
}

impl Side<'_> {
    async fn next(&mut self) -> Result<Option<Payment>, tokio_postgres::Error> {
        match self.rows.try_next().await? {
            Some(row) => payment(&row, &mut self.buffer).map(Some),
            None => Ok(None),
        }
    }
}

fn payment(row: &Row, buffer: &mut Vec<u8>) -> Result<Payment, tokio_postgres::Error> {
    encode(row, 0..18, buffer)?;
    let rows = xxh3_128(buffer);
    encode(row, 1..2, buffer)?;
    let created_at_us = buffer.last_chunk::<8>().map_or(0, |b| i64::from_be_bytes(*b));
    let mut claim = None;
    if !is_null(row, 18)? {
        encode(row, 18..23, buffer)?;
        let owner = (Partition(row.try_get(19)?), Offset(row.try_get(20)?));
        claim = Some((owner, xxh3_128(buffer)));
    }
    let place = (Partition(row.try_get(5)?), Offset(row.try_get(6)?));
    Ok(Payment { place, message_id: row.try_get(4)?, created_at_us, rows, claim })
}

async fn merge(
    first: &Database,
    second: &Database,
    ranges: &[ScanRange],
    comparison: &mut Comparison,
) -> Result<Vec<Open>, CommandError> {
    let mut open = Vec::new();
    let merged = async {
        let first = pin!(stream(first.client(), ranges).await?);
        let second = pin!(stream(second.client(), ranges).await?);
        let mut first = Side { rows: first, buffer: Vec::new() };
        let mut second = Side { rows: second, buffer: Vec::new() };
        let (mut a, mut b) = (first.next().await?, second.next().await?);
        loop {
            let order = match (&a, &b) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(a), Some(b)) => a.place.cmp(&b.place),
            };
            if order == Ordering::Equal {
                if let (Some(a), Some(b)) = (&a, &b) {
                    same_place(a, b, &mut open, comparison);
                }
                (a, b) = (first.next().await?, second.next().await?);
            } else if order == Ordering::Less {
                if let Some(payment) = a {
                    note(Difference::OnlyFirst, payment, &mut open, comparison);
                }
                a = first.next().await?;
            } else {
                if let Some(payment) = b {
                    note(Difference::OnlySecond, payment, &mut open, comparison);
                }
                b = second.next().await?;
            }
        }
        Ok::<_, tokio_postgres::Error>(())
    };
    merged.await.map_err(|e| CommandError::failed(format!("reading both databases: {}", describe(&e))))?;
    Ok(open)
}

fn same_place(a: &Payment, b: &Payment, open: &mut Vec<Open>, comparison: &mut Comparison) {
    if a.rows != b.rows {
        let (partition, offset) = a.place;
        comparison.findings.push(partition, offset, "its rows are not the same in both databases");
    } else if a.claim != b.claim {
        note(Difference::Claim, *a, open, comparison);
    } else {
        comparison.equal += 1;
    }
}

fn note(difference: Difference, payment: Payment, open: &mut Vec<Open>, comparison: &mut Comparison) {
    if open.len() < OPEN_MAX {
        open.push(Open { difference, payment });
    } else {
        differs(difference, payment.place, comparison);
    }
}

fn differs(difference: Difference, (partition, offset): Place, comparison: &mut Comparison) {
    let what = match difference {
        Difference::OnlyFirst => "its rows are missing in the second database",
        Difference::OnlySecond => "its rows are in the second database only",
        Difference::Claim => "its claim is not the same in both databases",
    };
    comparison.findings.push(partition, offset, what);
}

/// Explains a difference that is allowed: see the contract, "What 'exactly once' covers".
fn explain(
    settings: &Settings,
    first: &Database,
    second: &Database,
    topic_id: Uuid,
    open: Vec<Open>,
    comparison: &mut Comparison,
) -> Result<(), CommandError> {
    let ids: Vec<Uuid> = open.iter().map(|o| o.payment.message_id).collect();
    let (in_first, in_second) = (first.claims(&ids)?, second.claims(&ids)?);
    let exempt = Exempt::of(&first.skips(topic_id)?);
    let pruned = [first.pruned_until()?, second.pruned_until()?];
    let archived_before = match settings.retention.payment_months {
        Some(months) => first.archived_before(months)?,
        None => None,
    };
    let is_before = |limit: Option<TimestampMs>, payment: &Payment| {
        limit.is_some_and(|limit| payment.created_at_us <= postgres_timestamp(limit))
    };
    let mut refused: Vec<Open> = Vec::new();
    for Open { difference, payment } in open {
        let (partition, offset) = payment.place;
        let owner = |claims: &HashMap<[u8; 16], _>| {
            let claimed: &crate::reconcile::database::Claimed = claims.get(payment.message_id.as_bytes())?;
            Some((claimed.owner.partition, claimed.owner.offset)).filter(|owner| *owner != payment.place)
        };
        let allowed = match difference {
            Difference::OnlyFirst => owner(&in_second).map(|(p, o)| {
                format!("several records have its message id: in the second database partition {p}, offset {o} has it")
            }),
            Difference::OnlySecond => match owner(&in_first) {
                Some((p, o)) => Some(format!(
                    "several records have its message id: in the first database partition {p}, offset {o} has it"
                )),
                None if exempt.is_given_up(partition, offset) => {
                    Some("it was skipped in the first database (cursors skip)".to_owned())
                }
                None if is_before(archived_before, &payment) => {
                    Some("its month was detached from the first database".to_owned())
                }
                None => {
                    refused.push(Open { difference, payment });
                    continue;
                }
            },
            Difference::Claim if pruned.iter().any(|until| is_before(*until, &payment)) => {
                Some("its claim is so old that one of the databases has dropped it".to_owned())
            }
            Difference::Claim => None,
        };
        match allowed {
            Some(what) => comparison.allowed.push(partition, offset, what),
            None => differs(difference, payment.place, comparison),
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    let letters = match settings.kafka.publish {
        true => rejected(settings, topic_id, &refused.iter().map(|o| o.payment.place).collect())?,
        false => HashSet::new(),
    };
    for Open { difference, payment } in refused {
        let (partition, offset) = payment.place;
        if letters.contains(&payment.place) {
            comparison.allowed.push(partition, offset, "rejected by the first database, and dead-lettered");
        } else {
            differs(difference, payment.place, comparison);
        }
    }
    Ok(())
}

/// The records among `places` whose dead letter says that the database rejected them.
fn rejected(
    settings: &Settings,
    topic_id: Uuid,
    places: &HashSet<Place>,
) -> Result<HashSet<Place>, CommandError> {
    let failed = |e: crate::kafka::scan::ScanError| CommandError::failed(e.to_string());
    let scanner = Scanner::new(&settings.kafka, &settings.kafka.dead_letter_topic).map_err(failed)?;
    let (_, partitions) = scanner.describe().map_err(failed)?;
    let bounds = scanner.bounds(&partitions).map_err(failed)?;
    let ranges: Vec<ScanRange> = partitions
        .into_iter()
        .zip(bounds)
        .map(|(partition, bounds)| ScanRange { partition, from: bounds.start, to: bounds.end })
        .collect();
    let prefix = format!("{:08x}", topic_id.as_fields().0);
    let mut found = HashSet::new();
    // The callback never stops the scan.
    let _ = scanner
        .read(&ranges, |record| {
            let (mut place, mut is_rejected) = (None, false);
            for (name, value) in record.headers() {
                match name {
                    b"source" => place = value.and_then(|v| crate::reconcile::source_place(v, &prefix)),
                    b"dlq-reason" => {
                        is_rejected = value == Some(Reason::RejectedByDatabase.as_str().as_bytes());
                    }
                    _ => {}
                }
            }
            found.extend(place.filter(|place| is_rejected && places.contains(place)));
            ControlFlow::Continue(())
        })
        .map_err(failed)?;
    Ok(found)
}
