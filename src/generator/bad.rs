//! Records that must be dead-lettered, each with exactly the requested reason.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::payment::{Payment, message_id};
use super::respell::{Fields, fields, join, set};
use super::{GeneratorConfig, IdKind, Record, below, pick};
use crate::domain::wire::Reason;

/// The dead-letter reasons that a single record can cause, with the kind of record.
pub const BAD_REASONS: [(Reason, &str); 9] = [
    (Reason::EmptyValue, "Null or zero bytes"),
    (Reason::TooLarge, "Longer than payment.max_bytes"),
    (Reason::UnsupportedSchemaVersion, "A schema-version header other than 1"),
    (Reason::MalformedJson, "Not JSON, or no object"),
    (Reason::MissingField, "A required field absent or null; `{}` among them"),
    (Reason::InvalidField, "A field against its rule"),
    (Reason::KeyMismatch, "The key is not custId"),
    (Reason::InvalidTimestamp, "A timestamp before the year 2000"),
    (Reason::StaleMessageId, "A message id whose own time is far from the record's"),
];

/// Invalid values of the schema-version header, including repeated headers.
const WRONG_VERSIONS: [&[&[u8]]; 5] = [&[b"2"], &[b""], &[b"1", b"2"], &[b"01"], &[b"1 "]];

const REQUIRED: [&str; 6] = ["messageId", "custId", "amount", "currency", "status", "type"];

const HOUR_MS: i64 = 3_600_000;
const YEAR_1999_MS: i64 = 915_148_800_000;

/// Turns the record of a valid payment into a bad one.
pub(super) fn spoil(
    record: &mut Record,
    reason: Reason,
    payment: Payment,
    rng: &mut ChaCha8Rng,
    config: &GeneratorConfig,
) {
    let good = payment.json(config);
    let mut fields = fields(&payment, &good);
    match reason {
        Reason::EmptyValue => record.value = (below(rng, 2) != 0).then(Vec::new),
        Reason::TooLarge => {
            let short = config.value_bytes_max.saturating_sub(good.len()) + 1;
            set(&mut fields, "bulk", format!("\"{}\"", ".".repeat(short)));
            record.value = Some(join(&fields, "").into_bytes());
        }
        Reason::UnsupportedSchemaVersion => {
            let versions = pick(rng, &WRONG_VERSIONS);
            record.headers.extend(versions.iter().map(|version| ("schema-version", version.to_vec())));
        }
        Reason::MalformedJson => record.value = Some(malformed(rng, &fields, &good)),
        Reason::MissingField => record.value = Some(missing(rng, fields).into_bytes()),
        Reason::InvalidField => record.value = Some(invalid(rng, fields).into_bytes()),
        Reason::KeyMismatch => record.key = wrong_key(rng, payment.account).map(String::into_bytes),
        Reason::InvalidTimestamp => record.timestamp_ms = YEAR_1999_MS,
        Reason::StaleMessageId => {
            let window_ms = i64::try_from(config.window.as_millis()).unwrap_or(i64::MAX / 4);
            let off_ms = if below(rng, 2) == 0 { -window_ms - HOUR_MS } else { 2 * HOUR_MS };
            let time_ms = u64::try_from(record.timestamp_ms + off_ms).unwrap_or_default();
            let ulid = below(rng, 2) == 0;
            let kind = if ulid { IdKind::Ulid } else { IdKind::V7 };
            let id = message_id(kind, time_ms, rng.next_u64(), rng.next_u64());
            record.value = Some(Payment { id, ulid, ..payment }.json(config).into_bytes());
        }
        // Not of a single record.
        Reason::MessageIdConflict | Reason::RejectedByDatabase => {}
    }
}

fn malformed(rng: &mut ChaCha8Rng, fields: &Fields, good: &str) -> Vec<u8> {
    let open = good.strip_suffix('}').unwrap_or(good);
    let text = match below(rng, 12) {
        0 => "not json".to_owned(),
        1 => return good.bytes().take(good.len() / 2).collect(),
        2 => format!("[{good}]"),
        3 => "null".to_owned(),
        4 => format!("\u{feff}{good}"),
        5 => format!("{open},\"type\":\"BWI\"}}"),
        6 => format!("{open},\"x\":\"\\ud800\"}}"),
        7 => format!("{open},\"x\":{}{}}}", "[".repeat(32), "]".repeat(32)),
        8 => format!("{open},\"x\":01}}"),
        9 => return [b"{\"x\":\"\xff\",".as_slice(), good.as_bytes().get(1..).unwrap_or_default()].concat(),
        10 => format!("{good}{{}}"),
        _ => join(fields, "\u{a0}"),
    };
    text.into_bytes()
}

fn missing(rng: &mut ChaCha8Rng, mut fields: Fields) -> String {
    let name = pick(rng, &REQUIRED);
    match below(rng, 3) {
        // The original producer sends this as a warm-up.
        0 => return "{}".to_owned(),
        1 => set(&mut fields, name, "null"),
        _ => fields.retain(|(field, _)| field != name),
    }
    join(&fields, "")
}

fn invalid(rng: &mut ChaCha8Rng, mut fields: Fields) -> String {
    let long_comment = format!("\"{}\"", "ü".repeat(1_001));
    let long_reference = format!("\"{}\"", "8".repeat(65));
    let wrong: [(&str, &str); 27] = [
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
    let (name, text) = pick(rng, &wrong);
    set(&mut fields, name, text);
    join(&fields, "")
}

fn wrong_key(rng: &mut ChaCha8Rng, account: u64) -> Option<String> {
    match below(rng, 4) {
        0 => None,
        1 => Some((account + 1).to_string()),
        2 => Some(format!("0{account}")),
        _ => Some(String::new()),
    }
}
