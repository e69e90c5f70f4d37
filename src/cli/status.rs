//! `status MESSAGE_ID`: shows what is known of a message id.

use clap::Args;
use serde_json::json;
use tokio_postgres::{Client, Row};

use super::output::{aligned, print};
use crate::config::Settings;
use crate::domain::payment::{MessageId, payment_id};
use crate::domain::record::TimestampMs;
use crate::error::{CommandError, OrFailed};
use crate::postgres::connection::describe;
use crate::resolution;

const AFTER_HELP: &str = "\
Searches the idempotency table, which keeps an id for at least idempotency.window. With --search the
payment tables are also scanned completely, because they have no index on the id.

The answer is one of: written (by which record, when, its payment id, whether its events are published),
or unknown: never written, dead-lettered, or older than the idempotency table. With --partition and
--offset the answer is about that record: written, or a duplicate or conflict because another record has
the id.

Examples:
  payment-writer status 0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f
  payment-writer status 01JYSA8QRE7GX9T7HF9E66RZMF --partition 7 --offset 1204 --json";

/// `status`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct StatusArgs {
    /// UUID or ULID, as in the message
    #[arg(value_name = "MESSAGE_ID")]
    pub message_id: String,
    /// Show the outcome of the record at this partition and offset
    #[arg(long, value_name = "N", requires = "offset", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: Option<i32>,
    /// Offset of that record
    #[arg(long, value_name = "OFFSET", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    pub offset: Option<i64>,
    /// Also search the payment tables if the idempotency table does not have the id
    #[arg(long)]
    pub search: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// The record that owns the id.
struct Found {
    partition: i32,
    offset: i64,
    timestamp: TimestampMs,
    /// Date of the claim; `None` if only the payment tables have the id.
    claimed_on: Option<String>,
}

fn found(row: &Row) -> Found {
    Found {
        partition: row.get(0),
        offset: row.get(1),
        timestamp: TimestampMs(row.get(2)),
        claimed_on: row.get(3),
    }
}

/// Record by the claim of its id, with the date of the claim.
const BY_CLAIM: &str = "\
    SELECT source_partition, source_offset, floor(extract(epoch FROM created_at) * 1000)::bigint, date::text
    FROM payment_writer.idempotency WHERE message_id = $1";
/// The same by a scan of the payment tables.
const BY_ROW: &str = "\
    SELECT source_partition, source_offset, floor(extract(epoch FROM created_at) * 1000)::bigint, NULL::text
    FROM payment_writer.payment_metadata WHERE message_id = $1 ORDER BY created_at LIMIT 1";

async fn look_up(client: &Client, query: &str, id: MessageId) -> Result<Option<Found>, CommandError> {
    let row = client.query_opt(query, &[&id.to_uuid()]).await;
    Ok(row.map_err(|e| describe(&e)).or_failed_to("looking for the id")?.as_ref().map(found))
}

/// Whether the group's offset has passed the record; `None` if the broker does not answer.
async fn is_published(settings: &Settings, found: &Found) -> Option<bool> {
    let view = resolution::view(settings).await.ok()?;
    let known = view.known.iter().find(|known| known.partition.0 == found.partition)?;
    let copied = known.row.as_ref().and_then(|row| row.published);
    let committed = known.group.as_ref().map(|group| group.position);
    Some(committed.max(copied).is_some_and(|position| position.0 > found.offset))
}

/// Prints what is known of an id.
pub async fn status(settings: &Settings, args: &StatusArgs) -> Result<(), CommandError> {
    let id = MessageId::parse(&args.message_id)
        .map_err(|_| {
            CommandError::usage("MESSAGE_ID must be a hyphenated UUID or a ULID, and not all zero bits")
        })?
        .id;
    let (client, _) = settings.postgres.url.connect().await.or_failed()?;
    crate::postgres::schema::check(&client).await.or_failed()?;
    let mut answer = look_up(&client, BY_CLAIM, id).await?;
    if answer.is_none() && args.search {
        answer = look_up(&client, BY_ROW, id).await?;
    }
    let published = match &answer {
        Some(answer) if settings.kafka.publish => is_published(settings, answer).await,
        _ => None,
    };
    print(describe_answer(settings, args, id, answer.as_ref(), published))
}

fn describe_answer(
    settings: &Settings,
    args: &StatusArgs,
    id: MessageId,
    found: Option<&Found>,
    published: Option<bool>,
) -> String {
    let asked = args.partition.zip(args.offset);
    let state = match (found, asked) {
        (None, _) => "unknown",
        (Some(found), Some(record)) if record != (found.partition, found.offset) => "duplicate or conflict",
        (Some(_), _) => "written",
    };
    if args.json {
        return json!({
            "message_id": id.to_uuid().to_string(),
            "state": state,
            "partition": found.map(|f| f.partition),
            "offset": found.map(|f| f.offset),
            "record_timestamp": found.map(|f| f.timestamp.to_string()),
            "claimed_on": found.and_then(|f| f.claimed_on.clone()),
            "payment_id": found.map(|f| payment_id(id, f.timestamp).to_string()),
            "is_published": published,
        })
        .to_string();
    }
    let Some(found) = found else {
        let hint = if args.search { "" } else { " (--search also reads the payment tables)" };
        return format!("{state}: never written, dead-lettered, or older than the idempotency table{hint}");
    };
    let events = match published {
        _ if !settings.kafka.publish => "not published by this group",
        Some(true) => "published",
        Some(false) => "not published yet",
        None => "unknown: the broker did not answer",
    };
    let row = |name: &str, value: String| [format!("  {name}"), value];
    let mut rows = vec![
        row("record", format!("partition {}, offset {}", found.partition, found.offset)),
        row("timestamp", found.timestamp.to_string()),
    ];
    rows.extend(found.claimed_on.clone().map(|date| row("claimed on", date)));
    rows.push(row("payment id", payment_id(id, found.timestamp).to_string()));
    rows.push(row("events", events.to_owned()));
    format!("{state}: {} of {}\n{}", args.message_id, settings.kafka.input_topic, aligned(rows))
}
