//! The contract, implemented a second time: what a record is, and which payment it is.

use std::collections::HashMap;
use std::fmt;
use std::result;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Seen;

/// Settings that decide about records, with the program's defaults.
#[derive(Clone, Debug)]
pub struct Rules {
    /// `payment.types`
    pub types: Vec<String>,
    /// `email.statuses`
    pub email_statuses: Vec<i8>,
    /// `payment.max_bytes`
    pub max_bytes: usize,
    /// `idempotency.window`, in hours
    pub window_hours: i64,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            types: ["BWI", "VSA", "MSC"].map(str::to_owned).to_vec(),
            email_statuses: vec![2],
            max_bytes: 16 * 1024,
            window_hours: 7 * 24,
        }
    }
}

/// Reasons for a dead letter, in the order in which they are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    EmptyValue,
    TooLarge,
    UnsupportedSchemaVersion,
    MalformedJson,
    MissingField,
    InvalidField,
    KeyMismatch,
    InvalidTimestamp,
    StaleMessageId,
    MessageIdConflict,
    RejectedByDatabase,
}

impl Reason {
    const ALL: [(Reason, &str); 11] = [
        (Reason::EmptyValue, "empty_value"),
        (Reason::TooLarge, "too_large"),
        (Reason::UnsupportedSchemaVersion, "unsupported_schema_version"),
        (Reason::MalformedJson, "malformed_json"),
        (Reason::MissingField, "missing_field"),
        (Reason::InvalidField, "invalid_field"),
        (Reason::KeyMismatch, "key_mismatch"),
        (Reason::InvalidTimestamp, "invalid_timestamp"),
        (Reason::StaleMessageId, "stale_message_id"),
        (Reason::MessageIdConflict, "message_id_conflict"),
        (Reason::RejectedByDatabase, "rejected_by_database"),
    ];

    pub(super) fn parse(text: &str) -> Option<Reason> {
        Reason::ALL.iter().find(|(_, name)| *name == text).map(|(reason, _)| *reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Reason::ALL.iter().find(|(reason, _)| reason == self).unwrap().1)
    }
}

/// A valid payment, with the fields of its message. Amounts are in ten-thousandths; no currency has more
/// decimals.
pub(super) struct Payment {
    pub(super) message_id: u128,
    pub(super) message_id_text: String,
    pub(super) cust_id: i64,
    pub(super) amount: i64,
    pub(super) currency: String,
    pub(super) status: i8,
    pub(super) kind: String,
    pub(super) comment: Option<String>,
    pub(super) external_ref_id: Option<String>,
}

/// UUIDv7 from the record's time and 74 bits of the hash of the message id.
pub(super) fn payment_id(timestamp_ms: i64, message_id: u128) -> u128 {
    let hash = xxhash_rust::xxh3::xxh3_128(&message_id.to_be_bytes());
    let time = u128::try_from(timestamp_ms).unwrap() << 80;
    let rand_a = hash >> 116;
    let rand_b = (hash >> 54) & ((1 << 62) - 1);
    time | 7 << 76 | rand_a << 64 | 2 << 62 | rand_b
}

/// The members of an object, as text; an error if a name is repeated.
struct Members<'m>(HashMap<String, &'m RawValue>);

impl<'m> Deserialize<'m> for Members<'m> {
    fn deserialize<D: Deserializer<'m>>(deserializer: D) -> result::Result<Self, D::Error> {
        struct Each;
        impl<'m> Visitor<'m> for Each {
            type Value = Members<'m>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object without repeated names")
            }

            fn visit_map<A: MapAccess<'m>>(self, mut map: A) -> result::Result<Members<'m>, A::Error> {
                let mut members = HashMap::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    if members.insert(name, value).is_some() {
                        return Err(serde::de::Error::custom("repeated name"));
                    }
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

fn is_strict_json(text: &str, level: u32) -> bool {
    match text.as_bytes()[0] {
        b'{' if level > 32 => false,
        b'[' if level > 32 => false,
        b'{' => serde_json::from_str::<Members<'_>>(text)
            .is_ok_and(|members| members.0.values().all(|value| is_strict_json(value.get(), level + 1))),
        b'[' => serde_json::from_str::<Vec<&RawValue>>(text)
            .is_ok_and(|values| values.iter().all(|value| is_strict_json(value.get(), level + 1))),
        // Parsing the text, unlike skipping it, detects lone surrogates.
        b'"' => serde_json::from_str::<String>(text).is_ok(),
        _ => true,
    }
}

fn minor_unit(currency: &str) -> Option<u32> {
    const TWO: &str = "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD \
        CDF CHE CHF CHW CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD \
        HKD HNL HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP \
        MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR \
        SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES \
        WST XAD XCD XCG YER ZAR ZMW ZWG";
    const NONE: &str = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF";
    const THREE: &str = "BHD IQD JOD KWD LYD OMR TND";
    const FOUR: &str = "CLF UYW";
    let listed = |list: &str| list.split_whitespace().any(|code| code == currency);
    [(NONE, 0), (TWO, 2), (THREE, 3), (FOUR, 4)]
        .into_iter()
        .find(|(list, _)| listed(list))
        .map(|(_, unit)| unit)
}

/// The value of a JSON number in ten-thousandths; `None` if it breaks a rule for amounts.
fn amount(text: &str, minor_unit: u32) -> Option<i64> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent),
        None => (text, "0"),
    };
    let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits: String = [integer, fraction].concat();
    let significant = digits.trim_start_matches('0');
    if text.starts_with('-') || significant.is_empty() {
        return None;
    }
    // An exponent that does not fit is out of range for any digits that fit into a message.
    let exponent: i64 = exponent.parse().ok()?;
    let fraction_digits = i64::try_from(fraction.len()).ok()?.checked_sub(exponent)?;
    let trimmed = significant.trim_end_matches('0');
    let zeros = i64::try_from(significant.len() - trimmed.len()).ok()?;
    // The value is `trimmed` times ten to the power of -scale.
    let scale = fraction_digits.checked_sub(zeros)?;
    let integer_digits = i64::try_from(trimmed.len()).ok()?.checked_sub(scale)?;
    if scale > i64::from(minor_unit) || integer_digits > 14 {
        return None;
    }
    let power = u32::try_from(4 - scale).ok()?;
    trimmed.parse::<i64>().ok()?.checked_mul(10_i64.checked_pow(power)?)
}

/// True if the whole text is a number in JSON's grammar.
fn is_json_number(text: &str) -> bool {
    let plain = text.bytes().next().is_some_and(|byte| byte == b'-' || byte.is_ascii_digit())
        && text.bytes().last().is_some_and(|byte| byte.is_ascii_digit());
    plain && serde_json::from_str::<&RawValue>(text).is_ok()
}

fn integer(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) && text != "-0";
    if plain { text.parse().ok() } else { None }
}

/// The 128 bits of a message id, and its time if it has one.
fn message_id(text: &str) -> Option<(u128, Option<i64>)> {
    let (id, timed) = if text.len() == 36 {
        let hyphen = |at| [8, 13, 18, 23].contains(&at);
        let fits = |(at, byte): (usize, u8)| if hyphen(at) { byte == b'-' } else { byte.is_ascii_hexdigit() };
        let id = text
            .bytes()
            .enumerate()
            .all(fits)
            .then(|| u128::from_str_radix(&text.replace('-', ""), 16).ok())??;
        (id, id >> 76 & 0xF == 7 && id >> 62 & 3 == 2)
    } else if text.len() == 26 {
        let mut id: u128 = 0;
        for byte in text.to_ascii_uppercase().bytes() {
            let digit = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ".iter().position(|&known| known == byte)?;
            id = if id >> 123 == 0 { id << 5 } else { return None } | u128::try_from(digit).unwrap();
        }
        (id, true)
    } else {
        return None;
    };
    (id != 0).then(|| (id, timed.then(|| i64::try_from(id >> 80).unwrap())))
}

fn optional_text(value: Option<&&RawValue>, chars_max: usize) -> result::Result<Option<String>, Reason> {
    let Some(value) = value else { return Ok(None) };
    let text: Option<String> = serde_json::from_str(value.get()).map_err(|_| Reason::InvalidField)?;
    match text {
        Some(text) if text.chars().count() > chars_max || text.contains('\0') => Err(Reason::InvalidField),
        text => Ok(text.filter(|text| !text.is_empty())),
    }
}

pub(super) fn judge(message: &Seen<'_>, rules: &Rules) -> result::Result<Payment, Reason> {
    let value = message.value.unwrap_or_default();
    if value.is_empty() {
        return Err(Reason::EmptyValue);
    }
    if value.len() > rules.max_bytes {
        return Err(Reason::TooLarge);
    }
    if message.headers.iter().any(|(name, version)| *name == "schema-version" && *version != Some(b"1")) {
        return Err(Reason::UnsupportedSchemaVersion);
    }
    let text = std::str::from_utf8(value).map_err(|_| Reason::MalformedJson)?;
    let whole: &RawValue = serde_json::from_str(text).map_err(|_| Reason::MalformedJson)?;
    if !whole.get().starts_with('{') || !is_strict_json(whole.get(), 1) {
        return Err(Reason::MalformedJson);
    }
    let Members(members) = serde_json::from_str(whole.get()).map_err(|_| Reason::MalformedJson)?;
    for name in ["messageId", "custId", "amount", "currency", "status", "type"] {
        if members.get(name).is_none_or(|value| value.get() == "null") {
            return Err(Reason::MissingField);
        }
    }
    let text_of =
        |name| serde_json::from_str::<String>(members[name].get()).map_err(|_| Reason::InvalidField);
    let message_id_text = text_of("messageId")?;
    let (message_id, id_time_ms) = message_id(&message_id_text).ok_or(Reason::InvalidField)?;
    let cust_id = integer(members["custId"].get()).filter(|&id| id >= 0).ok_or(Reason::InvalidField)?;
    let status =
        integer(members["status"].get()).filter(|s| [2, 0, -2].contains(s)).ok_or(Reason::InvalidField)?;
    let kind = text_of("type")?;
    let currency = text_of("currency")?;
    let minor_unit = minor_unit(&currency).ok_or(Reason::InvalidField)?;
    let amount_text = members["amount"].get();
    let amount_text = if amount_text.starts_with('"') { text_of("amount")? } else { amount_text.to_owned() };
    if !is_json_number(&amount_text) || !rules.types.contains(&kind) {
        return Err(Reason::InvalidField);
    }
    let amount = amount(&amount_text, minor_unit).ok_or(Reason::InvalidField)?;
    let comment = optional_text(members.get("comment"), 1000)?;
    let external_ref_id = optional_text(members.get("externalRefId"), 64)?;
    if message.key != Some(cust_id.to_string().as_bytes()) {
        return Err(Reason::KeyMismatch);
    }
    const YEAR_2000_MS: i64 = 946_684_800_000;
    const YEAR_2100_MS: i64 = 4_102_444_800_000;
    let timestamp_ms = message.timestamp_ms.unwrap_or(-1);
    if !(YEAR_2000_MS..YEAR_2100_MS).contains(&timestamp_ms) {
        return Err(Reason::InvalidTimestamp);
    }
    const HOUR_MS: i64 = 3_600_000;
    if let Some(id_time_ms) = id_time_ms
        && (id_time_ms < timestamp_ms - rules.window_hours * HOUR_MS || id_time_ms > timestamp_ms + HOUR_MS)
    {
        return Err(Reason::StaleMessageId);
    }
    let status = i8::try_from(status).unwrap();
    Ok(Payment {
        message_id,
        message_id_text,
        cust_id,
        amount,
        currency,
        status,
        kind,
        comment,
        external_ref_id,
    })
}

/// A payment id in Postgres's notation.
pub(super) fn written_id(text: &str) -> Option<u128> {
    let id = Uuid::parse_str(text).ok()?;
    (id.to_string() == text).then(|| id.as_u128())
}

/// A plain number with at most as many decimals as its currency has; in ten-thousandths.
pub(super) fn plain_amount(raw: &RawValue, currency: &str) -> Option<i64> {
    let text = raw.get();
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    plain.then(|| amount(text, minor_unit(currency)?))?
}
