//! `dlq show`: shows one dead letter.

use std::ops::ControlFlow;

use clap::Args;
use serde_json::{Value, json};

use super::super::output::{aligned, print, print_bytes};
use super::{escaped, or_dash, reason_text};
use crate::config::Settings;
use crate::dlq::filter::Filter;
use crate::dlq::letter::{Letter, Place};
use crate::dlq::reader::Reader;
use crate::error::CommandError;

const AFTER_HELP: &str = "\
Without --payload only the sizes of the record's key, value and own headers are shown. With --payload
their contents are printed: consider who can see the terminal and where its output is stored.

Examples:
  payment-writer dlq show 3/120
  payment-writer dlq show 3/120 --payload --raw > value.json";

/// `dlq show`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ShowArgs {
    /// Place in the dead-letter topic, as shown by `dlq list --each`
    #[arg(value_name = "PARTITION/OFFSET")]
    pub at: Place,
    /// Also print key, own headers and value
    #[arg(long)]
    pub payload: bool,
    /// With --payload: print only the bytes of the value
    #[arg(long, requires = "payload", conflicts_with = "json")]
    pub raw: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Prints a dead letter.
pub fn show(settings: &Settings, args: &ShowArgs) -> Result<(), CommandError> {
    let reader = Reader::open(&settings.kafka)?;
    let filter = Filter { places: [args.at].into(), ..Filter::default() };
    let mut shown = None;
    let _ = reader.read(&reader.ranges(&filter)?, |letter| {
        shown = Some(match (args.raw, args.json) {
            (true, _) => print_bytes(letter.value.unwrap_or_default()),
            (_, true) => print(as_json(letter, args.payload)),
            _ => print(as_text(letter, args.payload)),
        });
        Ok(ControlFlow::Break(()))
    })?;
    shown.unwrap_or_else(|| {
        let topic = &settings.kafka.dead_letter_topic;
        Err(CommandError::usage(format!(
            "{topic} holds no record at {}: that offset is a transaction marker",
            args.at
        )))
    })
}

fn size(bytes: Option<&[u8]>) -> String {
    bytes.map_or_else(|| "null".to_owned(), |bytes| format!("{} bytes", bytes.len()))
}

fn shown(bytes: Option<&[u8]>) -> String {
    bytes.map_or_else(|| "null".to_owned(), escaped)
}

fn own_headers(letter: &Letter<'_>) -> (usize, usize) {
    letter.own_headers().fold((0, 0), |(count, bytes), (name, value)| {
        (count + 1, bytes + name.len() + value.map_or(0, <[u8]>::len))
    })
}

fn as_text(letter: &Letter<'_>, payload: bool) -> String {
    let row = |name: &str, value: String| [name.to_owned(), value];
    let mut rows =
        vec![row("at", letter.place.to_string()), row("dead-lettered", or_dash(letter.lettered_at))];
    if let Some(label) = &letter.label {
        rows.push(row("reason", reason_text(label.reason).to_owned()));
        rows.push(row("detail", escaped(label.detail.as_bytes())));
        let topic = escaped(label.topic.as_bytes());
        rows.push(row("record", format!("{topic}, partition {}, offset {}", label.partition, label.offset)));
        rows.push(row("timestamp", or_dash(label.timestamp)));
        rows.push(row("replays", letter.replays.to_string()));
        for (what, left_out) in [("value", &label.left_out), ("key", &label.key_left_out)] {
            let Some(left_out) = left_out else { continue };
            let (bytes, hash) = (escaped(left_out.bytes.as_bytes()), escaped(left_out.sha256.as_bytes()));
            let text = format!("a {what} of {bytes} bytes, SHA-256 {hash}; cannot be replayed");
            rows.push(row("left out", text));
        }
    } else {
        rows.push(row("reason", "none: this record was not written by the daemon".to_owned()));
    }
    let (count, bytes) = own_headers(letter);
    rows.push(row("key", size(letter.key)));
    rows.push(row("value", size(letter.value)));
    rows.push(row("own headers", format!("{count}, {bytes} bytes")));
    let mut text = aligned(rows);
    if payload {
        text.push_str(&format!("\n\nkey: {}", shown(letter.key)));
        for (name, value) in letter.own_headers() {
            text.push_str(&format!("\nheader {}: {}", escaped(name), shown(value)));
        }
        text.push_str(&format!("\nvalue: {}", shown(letter.value)));
    }
    text
}

/// Text if it is valid UTF-8, otherwise hexadecimal digits.
pub(in crate::cli) fn contents(bytes: Option<&[u8]>) -> Value {
    match bytes.map(|bytes| (std::str::from_utf8(bytes), bytes)) {
        None => Value::Null,
        Some((Ok(text), _)) => json!({ "text": text }),
        Some((Err(_), bytes)) => {
            json!({ "hex": bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() })
        }
    }
}

fn as_json(letter: &Letter<'_>, payload: bool) -> Value {
    let label = letter.label.as_ref();
    let (own_headers, own_header_bytes) = own_headers(letter);
    let mut value = json!({
        "at": letter.place.to_string(),
        "dead_lettered": letter.lettered_at.map(|at| at.to_string()),
        "is_dead_letter": label.is_some(),
        "reason": label.map(|l| reason_text(l.reason)),
        "detail": label.map(|l| &l.detail),
        "topic": label.map(|l| &l.topic),
        "partition": label.map(|l| l.partition.0),
        "offset": label.map(|l| l.offset.0),
        "timestamp": label.and_then(|l| l.timestamp).map(|at| at.to_string()),
        "replays": letter.replays,
        "left_out": label.and_then(|l| l.left_out.as_ref()),
        "key_left_out": label.and_then(|l| l.key_left_out.as_ref()),
        "key_bytes": letter.key.map(<[u8]>::len),
        "value_bytes": letter.value.map(<[u8]>::len),
        "own_headers": own_headers,
        "own_header_bytes": own_header_bytes,
    });
    if let (true, Some(object)) = (payload, value.as_object_mut()) {
        let headers =
            letter.own_headers().map(|(name, value)| json!([String::from_utf8_lossy(name), contents(value)]));
        object.insert("headers".to_owned(), headers.collect());
        object.insert("key".to_owned(), contents(letter.key));
        object.insert("value".to_owned(), contents(letter.value));
    }
    value
}
