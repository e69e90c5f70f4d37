//! Compares two databases written from the same log, row by row in log order. Differences that only the order
//! of writing explains are allowed and listed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::pin::pin;

use futures_util::{Stream, StreamExt, TryStreamExt};
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Row};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::AUDIT_COMMAND;
use crate::config::Settings;
use crate::domain::columns::postgres_timestamp;
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::domain::wire::Reason;
use crate::error::CommandError;
use crate::kafka::scan::ScanRange;
use crate::reconcile::Fault;
use crate::reconcile::database::{
    Claimed, Database, PAYMENT_COLUMNS, arrays, encode, failed, payment_tables, place, timestamp_us,
};
use crate::reconcile::outputs::{Label, Topic};
use crate::reconcile::report::{Findings, NotCompared};
use crate::reconcile::table::Place;

/// Maximum number of differences to recheck; all others count as wrong without a recheck.
const OPEN_MAX: usize = 100_000;

/// Result of the comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Whether the second database can replace the first one.
    pub is_equal: bool,
    /// Second database, without the password.
    pub into: String,
    /// Group that wrote the second database.
    pub group: String,
    /// Compared ranges.
    pub partitions: Vec<ScanRange>,
    /// Ranges that only one of the databases has written.
    pub not_compared: Vec<NotCompared>,
    /// Number of payments with the same rows and the same claim in both databases.
    pub equal: u64,
    /// Number of payments of the first database whose records had left the log when the rebuild started.
    pub older_than_the_log: u64,
    /// Differences that the contract allows.
    pub allowed: Findings,
    /// Differences that are wrong.
    pub findings: Findings,
}

/// A payment in one of the databases.
#[derive(Clone, Copy, Debug)]
struct Payment {
    place: Place,
    message_id: Uuid,
    created_at_us: i64,
    /// Hash of all columns of the three payment tables.
    rows: u128,
    /// Hash of the claim of the message id.
    claim: Option<u128>,
}

/// The database that lacks a payment, or what differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Difference {
    OnlyFirst,
    OnlySecond,
    Claim,
}

/// Compares what both databases have written since the start of the rebuild.
pub(super) fn compare(
    settings: &Settings,
    rebuilding: &Settings,
    runtime: &Handle,
    topic_id: Uuid,
    limit: usize,
    progress: &ProgressBar,
) -> Result<Comparison, CommandError> {
    progress.set_message("comparing");
    let first = Database::open(runtime, &settings.postgres.url)?;
    let second = Database::open(runtime, &rebuilding.postgres.url)?;
    // Start of the log at the time when the rebuild started.
    let starts = positions(
        &second,
        "asking where the rebuild began",
        "SELECT partition, (after->>'from')::bigint FROM payment_writer.cursor_audit
         WHERE command = $1 AND topic_id = $2 AND partition IS NOT NULL AND after->>'from' IS NOT NULL",
        &[&AUDIT_COMMAND, &topic_id],
    )?;
    let applied = |database| {
        let query = "SELECT partition, applied FROM payment_writer.source_cursor WHERE topic_id = $1";
        positions(database, "reading cursors", query, &[&topic_id])
    };
    let (in_first, in_second) = (applied(&first)?, applied(&second)?);
    let is_missing =
        |partition: &&Partition| !starts.contains_key(partition) || !in_second.contains_key(partition);
    let missing = in_first.keys().filter(is_missing).count();
    if missing > 0 {
        return Err(CommandError::failed(format!(
            "{missing} of {} partitions cannot be compared, because no rebuild has reached them in the second \
             database; run it without --compare-only",
            in_first.len()
        )));
    }
    let (mut partitions, mut not_compared) = (Vec::new(), Vec::new());
    for (partition, from) in &starts {
        let cursors = [in_first.get(partition).copied(), in_second.get(partition).copied()];
        let [to, end] =
            [cursors.iter().min(), cursors.iter().max()].map(|c| c.copied().flatten().unwrap_or(*from));
        let range = ScanRange { partition: *partition, from: *from, to: to.max(*from) };
        let rest = ScanRange { from: range.to, to: end, ..range };
        partitions.push(range);
        if !rest.is_empty() {
            let may_hide_loss = cursors.contains(&None);
            let why =
                if may_hide_loss { "one database has no cursor" } else { "written by one database so far" };
            not_compared.push(NotCompared { may_hide_loss, why: why.to_owned(), range: Some(rest) });
        }
    }
    let mut comparison = Comparison {
        is_equal: false,
        into: rebuilding.postgres.url.to_string(),
        group: rebuilding.kafka.group_id.clone(),
        partitions,
        not_compared,
        equal: 0,
        older_than_the_log: older(&first, &starts)?,
        allowed: Findings::new(limit),
        findings: Findings::new(limit),
    };
    let merged = merge(&first.client, &second.client, &mut comparison);
    let open = runtime.block_on(merged).map_err(failed("reading both databases"))?;
    if !open.is_empty() {
        progress.set_message("rechecking");
        explain(settings, &first, &second, topic_id, open, &mut comparison)?;
    }
    comparison.findings.named.sort();
    comparison.allowed.named.sort();
    let is_hidden = comparison.not_compared.iter().any(|part| part.may_hide_loss);
    comparison.is_equal = comparison.findings.count == 0 && !is_hidden;
    Ok(comparison)
}

fn positions(
    database: &Database,
    doing: &'static str,
    query: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<BTreeMap<Partition, NextOffset>, CommandError> {
    let row = |row: &Row| Ok((Partition(row.try_get(0)?), NextOffset(row.try_get(1)?)));
    Ok(database.query(doing, query, parameters, row)?.into_iter().collect())
}

fn older(first: &Database, starts: &BTreeMap<Partition, NextOffset>) -> Result<u64, CommandError> {
    let partitions: Vec<i32> = starts.keys().map(|p| p.0).collect();
    let from: Vec<i64> = starts.values().map(|o| o.0).collect();
    let counts = first.query(
        "counting what is older than the log",
        "SELECT count(*) FROM unnest($1::integer[], $2::bigint[]) AS r (partition, first)
         JOIN payment_writer.payment_metadata m
             ON m.source_partition = r.partition AND m.source_offset < r.first",
        &[&partitions, &from],
        |row| row.try_get::<_, i64>(0),
    )?;
    Ok(counts.iter().map(|count| count.unsigned_abs()).sum())
}

/// Payments of one database in log order.
async fn payments(
    client: &Client,
    ranges: &[ScanRange],
) -> Result<impl Stream<Item = Result<Payment, Error>> + use<>, Error> {
    let (partitions, from, to) = arrays(ranges);
    let parameters: [&(dyn ToSql + Sync); 3] = [&partitions, &from, &to];
    let query = format!(
        "SELECT {PAYMENT_COLUMNS},
             i.message_id, i.source_partition, i.source_offset, i.payload_hash, i.created_at
         FROM {} LEFT JOIN payment_writer.idempotency i ON i.message_id = m.message_id
         ORDER BY m.source_partition, m.source_offset, m.payment_id",
        payment_tables(false)
    );
    let rows = client.query_raw(&query, parameters).await?;
    let mut buffer = Vec::new();
    Ok(rows.map(move |row| payment(&row?, &mut buffer)))
}

fn payment(row: &Row, buffer: &mut Vec<u8>) -> Result<Payment, Error> {
    let claim = encode(row, 18..23, buffer)?.then(|| xxh3_128(buffer));
    encode(row, 0..18, buffer)?;
    Ok(Payment {
        place: place(row, 5)?,
        message_id: row.try_get(4)?,
        created_at_us: timestamp_us(row, 1)?,
        rows: xxh3_128(buffer),
        claim,
    })
}

/// Compares the payments, and returns the differences that may be allowed.
async fn merge(
    first: &Client,
    second: &Client,
    comparison: &mut Comparison,
) -> Result<Vec<(Difference, Payment)>, Error> {
    let mut open = Vec::new();
    let mut first = pin!(payments(first, &comparison.partitions).await?);
    let mut second = pin!(payments(second, &comparison.partitions).await?);
    let (mut a, mut b) = (first.try_next().await?, second.try_next().await?);
    while let Some(place) = [a, b].iter().flatten().map(|payment| payment.place).min() {
        let here = |payment: Option<Payment>| payment.filter(|payment| payment.place == place);
        let (in_first, in_second) = (here(a), here(b));
        let difference = match (in_first, in_second) {
            (Some(one), Some(other)) if one.rows != other.rows => {
                comparison.findings.push(place, "its rows are not the same in both databases");
                None
            }
            (Some(one), Some(other)) if one.claim == other.claim => {
                comparison.equal += 1;
                None
            }
            (Some(one), Some(_)) => Some((Difference::Claim, one)),
            (Some(one), None) => Some((Difference::OnlyFirst, one)),
            (None, other) => other.map(|other| (Difference::OnlySecond, other)),
        };
        match difference {
            Some(difference) if open.len() < OPEN_MAX => open.push(difference),
            Some((difference, _)) => differs(difference, place, comparison),
            None => {}
        }
        if in_first.is_some() {
            a = first.try_next().await?;
        }
        if in_second.is_some() {
            b = second.try_next().await?;
        }
    }
    Ok(open)
}

fn differs(difference: Difference, place: Place, comparison: &mut Comparison) {
    let what = match difference {
        Difference::OnlyFirst => "its rows are missing in the second database",
        Difference::OnlySecond => "its rows are in the second database only",
        Difference::Claim => "its claim is not the same in both databases",
    };
    comparison.findings.push(place, what);
}

/// Explains a difference that is allowed: see the contract, "What 'exactly once' covers".
fn explain(
    settings: &Settings,
    first: &Database,
    second: &Database,
    topic_id: Uuid,
    open: Vec<(Difference, Payment)>,
    comparison: &mut Comparison,
) -> Result<(), CommandError> {
    let ids: Vec<Uuid> = open.iter().map(|(_, payment)| payment.message_id).collect();
    let (in_first, in_second) = (first.claims(&ids)?, second.claims(&ids)?);
    let exempt = first.exempt(topic_id)?;
    let pruned = [first.pruned_until()?, second.pruned_until()?];
    let archived_before = first.archived_before(settings.retention.payment_months)?;
    let mut refused = Vec::new();
    for (difference, payment) in open {
        let is_up_to = |until: TimestampMs| payment.created_at_us <= postgres_timestamp(until);
        let is_before = |time: TimestampMs| payment.created_at_us < postgres_timestamp(time);
        let other_owner = |claims: &HashMap<Uuid, Claimed>, database: &str| {
            let owner = claims.get(&payment.message_id)?.place;
            let (p, o) = Some(owner).filter(|owner| *owner != payment.place)?;
            Some(format!(
                "several records have its message id: in the {database} database partition {p}, offset {o} has it"
            ))
        };
        let allowed = match difference {
            Difference::OnlyFirst => other_owner(&in_second, "second"),
            Difference::OnlySecond => other_owner(&in_first, "first").or_else(|| {
                if exempt.is_given_up(payment.place) {
                    Some("it was skipped in the first database (cursors skip)".to_owned())
                } else {
                    let is_archived = archived_before.is_some_and(is_before);
                    is_archived.then(|| "its month was detached from the first database".to_owned())
                }
            }),
            Difference::Claim => pruned
                .iter()
                .any(|until| until.is_some_and(is_up_to))
                .then(|| "its claim is so old that one of the databases has dropped it".to_owned()),
        };
        match allowed {
            Some(what) => comparison.allowed.push(payment.place, what),
            None if difference == Difference::OnlySecond && settings.kafka.publish => {
                refused.push(payment.place);
            }
            None => differs(difference, payment.place, comparison),
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    let letters = rejected(settings, topic_id, &refused.iter().copied().collect())?;
    for place in refused {
        if letters.contains(&place) {
            comparison.allowed.push(place, "rejected by the first database, and dead-lettered");
        } else {
            differs(Difference::OnlySecond, place, comparison);
        }
    }
    Ok(())
}

/// The records among `places` whose dead letter says that the database rejected them.
fn rejected(settings: &Settings, topic_id: Uuid, places: &HashSet<Place>) -> Result<HashSet<Place>, Fault> {
    let topic =
        Topic::open(&settings.kafka, &settings.kafka.dead_letter_topic).map_err(CommandError::failed)?;
    let mut found = HashSet::new();
    // The callback never stops the scan.
    let _ = topic.scanner.read(&topic.ranges()?, |record| {
        let label = Label::of(record, topic_id);
        let is_rejected = label.reason == Some(Reason::RejectedByDatabase);
        found.extend(label.place.filter(|place| is_rejected && places.contains(place)));
        ControlFlow::Continue(())
    })?;
    Ok(found)
}
