//! Encodes read events and e-mail events as JSON, with the fields in the contract's order.

use jiff::Timestamp;
use jiff::tz::Offset;
use uuid::Uuid;

use crate::domain::payment::Payment;
use crate::domain::record::TimestampMs;

/// Upper bound of an event's bytes without its texts: names, punctuation, ids, numbers, times.
const EVENT_BYTES: usize = 384;

/// Texts that both events of a payment share.
pub struct EventTexts {
    payment_id: [u8; uuid::fmt::Hyphenated::LENGTH],
    created_at: Iso8601,
}

impl EventTexts {
    /// The texts of a payment. `payment_id` is [`Payment::payment_id`]; the caller already has it for the
    /// rows.
    pub fn of(payment: &Payment<'_>, payment_id: Uuid) -> Self {
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        payment_id.as_hyphenated().encode_lower(&mut text);
        Self { payment_id: text, created_at: Iso8601::of(payment.created_at) }
    }
}

/// Appends the read event of a payment.
pub fn encode_read_event(payment: &Payment<'_>, texts: &EventTexts, out: &mut Vec<u8>) {
    let comment = payment.comment.as_deref();
    out.reserve(EVENT_BYTES.saturating_add(comment.map_or(0, str::len)));
    out.extend_from_slice(b"{\"messageId\":\"");
    // A UUID or ULID needs no escapes.
    out.extend_from_slice(payment.message_id_text.as_bytes());
    out.extend_from_slice(b"\",\"id\":\"");
    out.extend_from_slice(&texts.payment_id);
    out.extend_from_slice(b"\",\"createdAt\":\"");
    out.extend_from_slice(&texts.created_at.0);
    out.extend_from_slice(b"\",\"updatedAt\":\"");
    out.extend_from_slice(&texts.created_at.0);
    out.extend_from_slice(b"\",\"amount\":");
    payment.amount.write_to(out);
    out.extend_from_slice(b",\"status\":");
    write_integer(payment.status.code(), out);
    out.extend_from_slice(b",\"currency\":\"");
    out.extend_from_slice(payment.currency.code().as_bytes());
    out.extend_from_slice(b"\",\"custId\":");
    write_integer(payment.cust_id, out);
    out.extend_from_slice(b",\"type\":");
    write_string(&payment.payment_type, out);
    if let Some(comment) = comment {
        out.extend_from_slice(b",\"comment\":");
        write_string(comment, out);
    }
    out.extend_from_slice(b",\"version\":1}");
}

/// Appends the e-mail event of a payment.
pub fn encode_email_event(payment: &Payment<'_>, texts: &EventTexts, out: &mut Vec<u8>) {
    out.reserve(EVENT_BYTES);
    out.extend_from_slice(b"{\"id\":\"");
    out.extend_from_slice(&texts.payment_id);
    out.extend_from_slice(b"\",\"messageId\":\"");
    out.extend_from_slice(payment.message_id_text.as_bytes());
    out.extend_from_slice(b"\",\"custId\":");
    write_integer(payment.cust_id, out);
    out.extend_from_slice(b",\"amount\":");
    payment.amount.write_to(out);
    out.extend_from_slice(b",\"currency\":\"");
    out.extend_from_slice(payment.currency.code().as_bytes());
    out.extend_from_slice(b"\",\"type\":");
    write_string(&payment.payment_type, out);
    out.extend_from_slice(b",\"createdAt\":\"");
    out.extend_from_slice(&texts.created_at.0);
    out.extend_from_slice(b"\"}");
}

fn write_integer(value: impl itoa::Integer, out: &mut Vec<u8>) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Appends a JSON string (RFC 8259, section 7) with only the required escapes.
fn write_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let mut rest = text.as_bytes();
    while let Some(at) = rest.iter().position(|&c| c < 0x20 || c == b'"' || c == b'\\') {
        let (plain, tail) = rest.split_at_checked(at).unwrap_or_default();
        out.extend_from_slice(plain);
        let Some((&c, tail)) = tail.split_first() else { break };
        match c {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                let hex = |digit: u8| if digit < 10 { b'0' + digit } else { b'a' + digit - 10 };
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(c >> 4), hex(c & 0xF)]);
            }
        }
        rest = tail;
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

/// `YYYY-MM-DDTHH:MM:SS.mmmZ`
struct Iso8601([u8; 24]);

impl Iso8601 {
    /// The text of a payment's time, which is in the years 2000 to 2099.
    fn of(time: TimestampMs) -> Self {
        let time = Offset::UTC.to_datetime(Timestamp::from_millisecond(time.0).unwrap_or_default());
        let digit = |value: i16, unit: i16| b'0'.wrapping_add((value / unit % 10) as u8);
        let two = |value: i8| [digit(value.into(), 10), digit(value.into(), 1)];
        let (year, ms) = (time.year(), time.millisecond());
        let ([mo1, mo0], [d1, d0]) = (two(time.month()), two(time.day()));
        let ([h1, h0], [m1, m0], [s1, s0]) = (two(time.hour()), two(time.minute()), two(time.second()));
        let [y3, y2, y1, y0] = [digit(year, 1_000), digit(year, 100), digit(year, 10), digit(year, 1)];
        let [f2, f1, f0] = [digit(ms, 100), digit(ms, 10), digit(ms, 1)];
        Iso8601([
            y3, y2, y1, y0, b'-', mo1, mo0, b'-', d1, d0, b'T', h1, h0, b':', m1, m0, b':', s1, s0, b'.', f2,
            f1, f0, b'Z',
        ])
    }
}

#[cfg(test)]
mod tests;
