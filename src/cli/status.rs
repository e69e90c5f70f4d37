//! `status MESSAGE_ID`: shows what is known of a message id.

use clap::Args;
use serde_json::json;
use tokio_postgres::{Client, Row};

use super::output::print;
use crate::config::Settings;
use crate::domain::payment::{MessageId, payment_id};
use crate::domain::record::TimestampMs;
use crate::error::CommandError;
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

fn failed(error: &tokio_postgres::Error) -> CommandError {
    CommandError::failed(format!("looking for the id: {}", describe(error)))
}

fn found(row: &Row) -> Found {
    Found {
        partition: row.get(0),
        offset: row.get(1),
        timestamp: TimestampMs(row.get(2)),
        claimed_on: row.get(3),
    }
}

async fn look_up(client: &Client, id: MessageId) -> Result<Option<Found>, CommandError> {
    let row = client
        .query_opt(
            "SELECT source_partition, source_offset, floor(extract(epoch FROM created_at) * 1000)::bigint, date::text
             FROM payment_writer.idempotency WHERE message_id = $1",
            &[&id.to_uuid()],
        )
        .await
        .map_err(|e| failed(&e))?;
    Ok(row.as_ref().map(found))
}

async fn search(client: &Client, id: MessageId) -> Result<Option<Found>, CommandError> {
    let rows = client
        .query(
            "SELECT source_partition, source_offset, floor(extract(epoch FROM created_at) * 1000)::bigint, NULL::text
             FROM payment_writer.payment_metadata WHERE message_id = $1 ORDER BY created_at LIMIT 1",
            &[&id.to_uuid()],
        )
        .await
        .map_err(|e| failed(&e))?;
    Ok(rows.first().map(found))
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
pub fn status(settings: &Settings, args: &StatusArgs) -> Result<(), CommandError> {
    let parsed = MessageId::parse(&args.message_id).map_err(|_| {
        CommandError::usage(
            "MESSAGE_ID must be a hyphenated UUID or a ULID, and not all zero bits".to_owned(),
        )
    })?;
    super::small_runtime()?.block_on(async {
        let endpoint = &settings.postgres.url;
        let (client, _driver) = endpoint.connect().await.map_err(|e| CommandError::failed(e.to_string()))?;
        crate::postgres::schema::check(&client).await.map_err(|e| CommandError::failed(e.to_string()))?;
        let mut answer = look_up(&client, parsed.id).await?;
        if answer.is_none() && args.search {
            answer = search(&client, parsed.id).await?;
        }
        let published = match &answer {
            Some(answer) if settings.kafka.publish => is_published(settings, answer).await,
            _ => None,
        };
        tell(settings, args, parsed.id, answer.as_ref(), published)
    })
}

fn tell(
    settings: &Settings,
    args: &StatusArgs,
    id: MessageId,
    found: Option<&Found>,
    published: Option<bool>,
) -> Result<(), CommandError> {
    let asked = args.partition.zip(args.offset);
    let state = match (found, asked) {
        (None, _) => "unknown",
        (Some(found), Some(record)) if record != (found.partition, found.offset) => "duplicate or conflict",
        (Some(_), _) => "written",
    };
    let events = match published {
        _ if !settings.kafka.publish => "not published by this group",
        Some(true) => "published",
        Some(false) => "not published yet",
        None => "unknown: the broker did not answer",
    };
    let time = |at: TimestampMs| {
        jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| at.0.to_string(), |t| format!("{t:.3}"))
    };
    if args.json {
        return print(
            &json!({
                "message_id": id.to_uuid().to_string(),
                "state": state,
                "partition": found.map(|f| f.partition),
                "offset": found.map(|f| f.offset),
                "record_timestamp": found.map(|f| time(f.timestamp)),
                "claimed_on": found.and_then(|f| f.claimed_on.clone()),
                "payment_id": found.map(|f| payment_id(id, f.timestamp).to_string()),
                "is_published": published,
            })
            .to_string(),
        );
    }
    let Some(found) = found else {
        let hint = if args.search { "" } else { " (--search also reads the payment tables)" };
        return print(&format!(
            "{state}: never written, dead-lettered, or older than the idempotency table{hint}"
        ));
    };
    print(&format!("{state}: {} of {}", args.message_id, settings.kafka.input_topic))?;
    print(&format!("  record      partition {}, offset {}", found.partition, found.offset))?;
    print(&format!("  timestamp   {}", time(found.timestamp)))?;
    if let Some(date) = &found.claimed_on {
        print(&format!("  claimed on  {date}"))?;
    }
    print(&format!("  payment id  {}", payment_id(id, found.timestamp)))?;
    print(&format!("  events      {events}"))
}
