//! Records that must be dead-lettered, each with exactly the requested reason.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::payment::{Payment, message_id};
use super::respell::{Fields, fields, join, set};
use super::{GeneratorConfig, IdKind, Record, below, pick};
use crate::domain::wire::Reason;

/// The dead-letter reasons that a single record can cause, named as in `dlq-reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum BadReason {
    /// Null or zero bytes
    EmptyValue,
    /// Longer than payment.max_bytes
    TooLarge,
    /// A schema-version header other than 1
    UnsupportedSchemaVersion,
    /// Not JSON, or no object
    MalformedJson,
    /// A required field absent or null; `{}` among them
    MissingField,
    /// A field against its rule
    InvalidField,
    /// The key is not custId
    KeyMismatch,
    /// A timestamp before the year 2000
    InvalidTimestamp,
    /// A message id whose own time is far from the record's
    StaleMessageId,
}

impl BadReason {
    /// Reasons used by default: all but [`BadReason::InvalidTimestamp`], because a broker may delete a
    /// segment whose timestamps are all that old before it is read.
    pub const DEFAULT: [Self; 8] = [
        Self::EmptyValue,
        Self::TooLarge,
        Self::UnsupportedSchemaVersion,
        Self::MalformedJson,
        Self::MissingField,
        Self::InvalidField,
        Self::KeyMismatch,
        Self::StaleMessageId,
    ];

    /// Expected reason of the dead letter.
    pub fn reason(self) -> Reason {
        match self {
            Self::EmptyValue => Reason::EmptyValue,
            Self::TooLarge => Reason::TooLarge,
            Self::UnsupportedSchemaVersion => Reason::UnsupportedSchemaVersion,
            Self::MalformedJson => Reason::MalformedJson,
            Self::MissingField => Reason::MissingField,
            Self::InvalidField => Reason::InvalidField,
            Self::KeyMismatch => Reason::KeyMismatch,
            Self::InvalidTimestamp => Reason::InvalidTimestamp,
            Self::StaleMessageId => Reason::StaleMessageId,
        }
    }
}

/// Invalid values of the schema-version header, including repeated headers.
const WRONG_VERSIONS: [&[&[u8]]; 5] = [&[b"2"], &[b""], &[b"1", b"2"], &[b"01"], &[b"1 "]];

const HOUR_MS: i64 = 3_600_000;
const YEAR_1999_MS: i64 = 915_148_800_000;

/// Fills `record` with a bad variant of a valid payment.
pub(super) fn fill(
    reason: BadReason,
    payment: Payment,
    rng: &mut ChaCha8Rng,
    config: &GeneratorConfig,
    now_ms: i64,
    record: &mut Record,
) {
    payment.write_key(&mut record.key);
    payment.write_json(config, &mut record.value);
    let Some(mut fields) = fields(&payment, &record.value) else { return };
    match reason {
        BadReason::EmptyValue => {
            record.value.clear();
            record.value_is_null = below(rng, 2) == 0;
        }
        BadReason::TooLarge => {
            let short = config.value_bytes_max.saturating_sub(record.value.len()) + 1;
            set(&mut fields, "bulk", format!("\"{}\"", ".".repeat(short)));
            record.value = join(&fields, "");
        }
        BadReason::UnsupportedSchemaVersion => {
            let versions = pick(rng, &WRONG_VERSIONS).unwrap_or_default();
            record.headers.extend(versions.iter().map(|version| ("schema-version", version.to_vec())));
        }
        BadReason::MalformedJson => malformed(rng, &fields, &mut record.value),
        BadReason::MissingField => missing(rng, fields, &mut record.value),
        BadReason::InvalidField => invalid(rng, fields, &mut record.value),
        BadReason::KeyMismatch => mismatch(rng, &payment, record),
        BadReason::InvalidTimestamp => record.timestamp_ms = YEAR_1999_MS,
        BadReason::StaleMessageId => {
            let window_ms = i64::try_from(config.window.as_millis()).unwrap_or(i64::MAX / 4);
            let off_ms = if below(rng, 2) == 0 { -window_ms - HOUR_MS } else { 2 * HOUR_MS };
            let time_ms = u64::try_from(now_ms + off_ms).unwrap_or_default();
            let ulid = below(rng, 2) == 0;
            let kind = if ulid { IdKind::Ulid } else { IdKind::V7 };
            let id = message_id(kind, time_ms, rng.next_u64(), rng.next_u64());
            record.value.clear();
            Payment { id, ulid, ..payment }.write_json(config, &mut record.value);
        }
    }
}

fn malformed(rng: &mut ChaCha8Rng, fields: &Fields, value: &mut Vec<u8>) {
    let good = std::mem::take(value);
    let with = |extra: &str| {
        let mut text = good.clone();
        text.pop();
        [text, extra.as_bytes().to_vec()].concat()
    };
    *value = match below(rng, 12) {
        0 => b"not json".to_vec(),
        1 => good.iter().copied().take(good.len() / 2).collect(),
        2 => [b"[".as_slice(), &good, b"]"].concat(),
        3 => b"null".to_vec(),
        4 => [b"\xef\xbb\xbf".as_slice(), &good].concat(),
        5 => with(",\"type\":\"BWI\"}"),
        6 => with(",\"x\":\"\\ud800\"}"),
        7 => with(&format!(",\"x\":{}{}}}", "[".repeat(32), "]".repeat(32))),
        8 => with(",\"x\":01}"),
        9 => [b"{\"x\":\"\xff\",".as_slice(), good.get(1..).unwrap_or_default()].concat(),
        10 => [good, b"{}".to_vec()].concat(),
        _ => join(fields, "\u{a0}"),
    };
}

const REQUIRED: [&str; 6] = ["messageId", "custId", "amount", "currency", "status", "type"];

fn missing(rng: &mut ChaCha8Rng, mut fields: Fields, value: &mut Vec<u8>) {
    let name = pick(rng, &REQUIRED).unwrap_or("type");
    *value = match below(rng, 3) {
        // The original producer sends this as a warm-up.
        0 => b"{}".to_vec(),
        1 => {
            set(&mut fields, name, "null");
            join(&fields, "")
        }
        _ => {
            fields.retain(|(field, _)| field != name);
            join(&fields, "")
        }
    };
}

fn invalid(rng: &mut ChaCha8Rng, mut fields: Fields, value: &mut Vec<u8>) {
    let long_comment = format!("\"{}\"", "ü".repeat(1_001));
    let long_reference = format!("\"{}\"", "8".repeat(65));
    let wrong = [
        ("messageId", "\"0197b2a4-5f0e-7c3a-9d1e\""),
        ("messageId", "\"00000000-0000-0000-0000-000000000000\""),
        ("messageId", "\"01ARZ3NDEKTSV4RRFFQ69G5FAU\""),
        ("messageId", "17"),
        ("custId", "-1"),
        ("custId", "4711.0"),
        ("custId", "\"4711\""),
        ("custId", "9223372036854775808"),
        ("amount", "0"),
        ("amount", "-10.50"),
        ("amount", "0.00001"),
        ("amount", "100000000000000"),
        ("amount", "\"12,50\""),
        ("amount", "true"),
        ("currency", "\"XXX\""),
        ("currency", "\"eur\""),
        ("currency", "978"),
        ("status", "1"),
        ("status", "2.0"),
        ("status", "\"2\""),
        ("type", "\"no such type\""),
        ("type", "\"\""),
        ("comment", &long_comment),
        ("comment", "\"a\\u0000b\""),
        ("comment", "{}"),
        ("externalRefId", &long_reference),
        ("externalRefId", "5"),
    ];
    if let Some((name, text)) = wrong.get(below(rng, wrong.len() as u32) as usize) {
        set(&mut fields, name, *text);
    }
    *value = join(&fields, "");
}

fn mismatch(rng: &mut ChaCha8Rng, payment: &Payment, record: &mut Record) {
    record.key.clear();
    match below(rng, 4) {
        0 => record.key_is_null = true,
        1 => record.key.extend_from_slice(format!("{}", payment.account + 1).as_bytes()),
        2 => record.key.extend_from_slice(format!("0{}", payment.account).as_bytes()),
        _ => {}
    }
}
