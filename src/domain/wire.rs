//! Parses payment messages and encodes read and e-mail events. Pure.
//!
//! [`parse`] implements all rules of the contract for a valid payment, except the two that need the database.

mod events;
mod json;
mod refusal;

use std::borrow::Cow;
use std::time::Duration;

pub use events::{EventTexts, encode_email_event, encode_read_event};
pub use refusal::{Reason, Refusal};
use strum::VariantArray;

use self::json::Value;
use self::refusal::{Field, invalid};
use crate::domain::payment::{Amount, Currency, MessageId, ParsedMessageId, Payment, Status};
use crate::domain::record::{Headers, RecordView, TimestampMs};

/// Header that names the version of the message's schema.
pub const SCHEMA_VERSION_HEADER: &str = "schema-version";
/// The only schema version, as the header's value.
const SCHEMA_VERSION: &[u8] = b"1";

const COMMENT_CHARS_MAX: usize = 1_000;
const EXTERNAL_REF_ID_CHARS_MAX: usize = 64;

/// 2000-01-01T00:00:00.000Z, the first timestamp that a record may have.
pub const TIMESTAMP_MIN: TimestampMs = TimestampMs(946_684_800_000);
/// 2099-12-31T23:59:59.999Z, the last timestamp that a record may have.
pub const TIMESTAMP_MAX: TimestampMs = TimestampMs(4_102_444_799_999);

/// Milliseconds by which the time in a message id may be ahead of its record's timestamp.
const ID_AHEAD_MS_MAX: i64 = 60 * 60 * 1_000;

/// The settings that determine which messages are valid and which events are sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rules {
    /// `payment.types`
    pub payment_types: Vec<String>,
    /// `payment.max_bytes`
    pub payment_bytes_max: usize,
    /// `idempotency.window`, in whole milliseconds.
    pub idempotency_window: Duration,
    /// `email.statuses`
    pub email_statuses: Vec<Status>,
}

impl Default for Rules {
    /// The contract's defaults.
    fn default() -> Self {
        Rules {
            payment_types: ["BWI", "VSA", "MSC"].map(String::from).into(),
            payment_bytes_max: 16 * 1024,
            idempotency_window: Duration::from_secs(7 * 24 * 60 * 60),
            email_statuses: vec![Status::Success],
        }
    }
}

impl Rules {
    /// Whether a payment of this status gets an e-mail event.
    pub fn sends_email(&self, status: Status) -> bool {
        self.email_statuses.contains(&status)
    }
}

/// Parses one record. The result depends only on the record and the rules.
///
/// # Errors
/// The first reason, in the contract's order, why the record is not a valid payment.
pub fn parse<'a>(record: &RecordView<'a>, rules: &Rules) -> Result<Payment<'a>, Refusal> {
    let value = record.value.unwrap_or_default();
    if value.is_empty() {
        return Err(Refusal::new(Reason::EmptyValue, "value: null or without a byte"));
    }
    if value.len() > rules.payment_bytes_max {
        return Err(Refusal::new(Reason::TooLarge, "value: larger than payment.max_bytes"));
    }
    check_schema_version(record.headers)?;

    // In the order of `Field`, which is the contract's.
    let [message_id, cust_id, amount, currency, status, payment_type, comment, external_ref_id] =
        json::object::<{ Field::VARIANTS.len() }>(value, Field::index_of).map_err(|fault| fault.refusal())?;
    let message_id = required(message_id, Field::MessageId)?;
    let cust_id = required(cust_id, Field::CustId)?;
    let amount = required(amount, Field::Amount)?;
    let currency = required(currency, Field::Currency)?;
    let status = required(status, Field::Status)?;
    let payment_type = required(payment_type, Field::Type)?;

    let message_id_text = string(&message_id, Field::MessageId)?;
    let ParsedMessageId { id, embedded_time } =
        MessageId::parse(&message_id_text).map_err(|fault| invalid(Field::MessageId, fault.into()))?;
    let (cust_id, cust_id_text) = self::cust_id(&cust_id)?;
    let amount = self::amount(&amount)?;
    let currency = self::currency(&currency)?;
    if !amount.fits(currency) {
        return Err(invalid(Field::Amount, "has a digit beyond the currency's minor unit"));
    }
    let status = self::status(&status)?;
    let payment_type = self::payment_type(&payment_type, rules)?;
    let comment = optional_text(comment, Field::Comment, COMMENT_CHARS_MAX)?;
    let external_ref_id = optional_text(external_ref_id, Field::ExternalRefId, EXTERNAL_REF_ID_CHARS_MAX)?;

    if record.key != Some(cust_id_text.as_bytes()) {
        return Err(Refusal::new(Reason::KeyMismatch, "key: is not the decimal text of custId"));
    }
    let created_at = timestamp(record.timestamp)?;
    check_embedded_time(embedded_time, created_at, rules.idempotency_window)?;

    Ok(Payment {
        message_id: id,
        message_id_text,
        cust_id,
        amount,
        currency,
        status,
        payment_type,
        comment,
        external_ref_id,
        created_at,
    })
}

fn check_schema_version(headers: Headers<'_>) -> Result<(), Refusal> {
    let foreign = headers
        .iter()
        .any(|(name, value)| name == SCHEMA_VERSION_HEADER.as_bytes() && value != Some(SCHEMA_VERSION));
    if foreign {
        return Err(Refusal::new(Reason::UnsupportedSchemaVersion, "header schema-version: is not 1"));
    }
    Ok(())
}

/// A field that must be present; null counts as absent.
fn required(value: Option<Value<'_>>, field: Field) -> Result<Value<'_>, Refusal> {
    value.filter(|value| !value.is_null()).ok_or_else(|| refusal::missing(field))
}

fn string<'a>(value: &Value<'a>, field: Field) -> Result<Cow<'a, str>, Refusal> {
    value.string().ok_or_else(|| invalid(field, "is not a string"))
}

/// Value and text of an integer: digits with an optional leading minus, except `-0`.
fn integer<'a>(value: &Value<'a>, field: Field) -> Result<(i64, &'a str), Refusal> {
    let Some(text) = value.number() else {
        return Err(invalid(field, "is not an integer"));
    };
    let digits = text.strip_prefix('-').unwrap_or(text);
    if text == "-0" || !digits.bytes().all(|c| c.is_ascii_digit()) {
        return Err(invalid(field, "is not written as a plain integer"));
    }
    let number = text.parse().map_err(|_| invalid(field, "is out of range"))?;
    Ok((number, text))
}

fn cust_id<'a>(value: &Value<'a>) -> Result<(i64, &'a str), Refusal> {
    let (number, text) = integer(value, Field::CustId)?;
    if number < 0 {
        return Err(invalid(Field::CustId, "is negative"));
    }
    Ok((number, text))
}

fn amount(value: &Value<'_>) -> Result<Amount, Refusal> {
    let parsed = match (value.number(), value.string()) {
        (Some(text), _) => Amount::parse(text),
        (None, Some(text)) => Amount::parse(&text),
        (None, None) => return Err(invalid(Field::Amount, "is neither a number nor a string")),
    };
    parsed.map_err(|fault| invalid(Field::Amount, fault.into()))
}

fn currency(value: &Value<'_>) -> Result<Currency, Refusal> {
    Currency::from_code(&string(value, Field::Currency)?)
        .ok_or_else(|| invalid(Field::Currency, "is no ISO 4217 code that has a minor unit"))
}

fn status(value: &Value<'_>) -> Result<Status, Refusal> {
    let (code, _) = integer(value, Field::Status)?;
    Status::from_code(code).ok_or_else(|| invalid(Field::Status, "is none of 2, 0, -2"))
}

fn payment_type<'a>(value: &Value<'a>, rules: &Rules) -> Result<Cow<'a, str>, Refusal> {
    let text = string(value, Field::Type)?;
    if rules.payment_types.iter().any(|t| *t == text) {
        Ok(text)
    } else {
        Err(invalid(Field::Type, "is not in payment.types"))
    }
}

/// An optional text; null and an empty one count as absent.
fn optional_text<'a>(
    value: Option<Value<'a>>,
    field: Field,
    chars_max: usize,
) -> Result<Option<Cow<'a, str>>, Refusal> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let text = string(&value, field)?;
    if text.len() > chars_max && text.chars().count() > chars_max {
        return Err(invalid(field, "is too long"));
    }
    // JSON does not allow raw control characters, so only an escape can produce U+0000.
    if matches!(text, Cow::Owned(_)) && text.contains('\0') {
        return Err(invalid(field, "contains U+0000"));
    }
    Ok(Some(text).filter(|t| !t.is_empty()))
}

fn timestamp(timestamp: Option<TimestampMs>) -> Result<TimestampMs, Refusal> {
    let refused = |rule: &'static str| Refusal::new(Reason::InvalidTimestamp, rule);
    match timestamp {
        None => Err(refused("timestamp: the record has none")),
        Some(t) if (TIMESTAMP_MIN..=TIMESTAMP_MAX).contains(&t) => Ok(t),
        Some(_) => Err(refused("timestamp: outside the years 2000 to 2099")),
    }
}

fn check_embedded_time(
    embedded: Option<TimestampMs>,
    created_at: TimestampMs,
    window: Duration,
) -> Result<(), Refusal> {
    let Some(embedded) = embedded else {
        return Ok(());
    };
    // 48 bits and the years 2000 to 2099 cannot overflow.
    let age_ms = created_at.0.saturating_sub(embedded.0);
    let window_ms = i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
    let rule = if age_ms > window_ms {
        "messageId: its time lies more than idempotency.window before the record's timestamp"
    } else if age_ms < -ID_AHEAD_MS_MAX {
        "messageId: its time lies more than an hour after the record's timestamp"
    } else {
        return Ok(());
    };
    Err(Refusal::new(Reason::StaleMessageId, rule))
}

#[cfg(test)]
mod tests;
