//! Messages as lines of a file. Pure.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::domain::record::{Offset, Partition, SourceBatch, TimestampMs};

/// Format of the lines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Format {
    /// A value. The key is the one that the value needs.
    Value,
    /// Key, this text, value; as `kcat -K`.
    KeyAndValue(String),
    /// A JSON object as of `kcat -J`.
    KcatJson,
}

/// A message in a line.
#[derive(PartialEq, Eq, Debug, Default)]
pub(super) struct Message<'a> {
    pub(super) key: Option<Cow<'a, [u8]>>,
    pub(super) value: Option<Cow<'a, [u8]>>,
    pub(super) headers: Vec<(Cow<'a, str>, Option<Cow<'a, str>>)>,
    /// The timestamp in ms, if the line has one; negative for a record without one.
    pub(super) timestamp_ms: Option<i64>,
}

impl Message<'_> {
    /// The record at this offset. `at` is its timestamp if the line has none.
    pub(super) fn into_batch(self, offset: Offset, at: TimestampMs) -> SourceBatch {
        let timestamp = match self.timestamp_ms {
            Some(ms) => (ms >= 0).then_some(TimestampMs(ms)),
            None => Some(at),
        };
        let headers =
            self.headers.iter().map(|(name, value)| (name.as_bytes(), value.as_deref().map(str::as_bytes)));
        let mut batch = SourceBatch::new();
        batch.push(Partition(0), offset, timestamp, self.key.as_deref(), self.value.as_deref(), headers);
        batch
    }
}

/// Parses a line without its line break.
///
/// # Errors
/// When it does not have this format. The text contains nothing of the line.
pub(super) fn parse<'a>(line: &'a [u8], format: &Format) -> Result<Message<'a>, String> {
    match format {
        Format::Value => {
            let key = fitting_key(line).map(|key| key.into_bytes().into());
            Ok(Message { key, value: Some(line.into()), ..Message::default() })
        }
        Format::KeyAndValue(separator) => Ok(match split_once(line, separator.as_bytes()) {
            Some((key, value)) => {
                Message { key: Some(key.into()), value: Some(value.into()), ..Message::default() }
            }
            None => Message { value: Some(line.into()), ..Message::default() },
        }),
        Format::KcatJson => kcat_json(line),
    }
}

/// The decimal text of `custId`, whenever all else in the value that precedes the key's rule is valid.
fn fitting_key(value: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Account {
        #[serde(rename = "custId")]
        cust_id: i64,
    }
    serde_json::from_slice(value).ok().map(|account: Account| account.cust_id.to_string())
}

fn split_once<'a>(line: &'a [u8], separator: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = line.windows(separator.len()).position(|window| window == separator)?;
    let (key, rest) = line.split_at_checked(at)?;
    Some((key, rest.strip_prefix(separator)?))
}

/// The fields of `kcat -J` that matter; the others are ignored.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow)]
    payload: &'a RawValue,
    /// Names and values in turn.
    #[serde(default)]
    headers: Vec<Option<String>>,
    ts: Option<i64>,
}

fn kcat_json(line: &[u8]) -> Result<Message<'_>, String> {
    const WRONG: &str = "is not a JSON object as of kcat -J, with `payload`, `key`, `headers` and `ts`";
    // The text of serde_json's error could contain parts of the line.
    let wrong = |error: serde_json::Error| format!("{WRONG} (byte {})", error.column());
    let envelope: Envelope<'_> = serde_json::from_slice(line).map_err(wrong)?;
    let payload = envelope.payload.get();
    let value = match payload.as_bytes().first() {
        Some(b'n') => None,
        Some(b'"') => {
            let text: Cow<'_, str> = serde_json::from_str::<Text<'_>>(payload).map_err(wrong)?.0;
            Some(bytes(text))
        }
        _ => Some(payload.as_bytes().into()),
    };
    let mut headers = Vec::new();
    let mut parts = envelope.headers.into_iter();
    while let Some(name) = parts.next() {
        let (Some(name), Some(value)) = (name, parts.next()) else {
            return Err(format!("{WRONG}: `headers` is not names and values in turn"));
        };
        headers.push((name.into(), value.map(Cow::from)));
    }
    Ok(Message { key: envelope.key.map(bytes), value, headers, timestamp_ms: envelope.ts })
}

/// Borrows where a plain `Cow` would be copied.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

fn bytes(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => text.as_bytes().into(),
        Cow::Owned(text) => text.into_bytes().into(),
    }
}
