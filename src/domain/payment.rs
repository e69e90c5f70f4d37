//! The payment, independent of message, row and event formats. No I/O.

mod amount;
mod currency;
mod message_id;

use std::borrow::Cow;

use uuid::Uuid;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_128};

pub use amount::{Amount, AmountFault};
pub use currency::Currency;
pub use message_id::{MessageId, MessageIdFault, ParsedMessageId};

use crate::domain::record::TimestampMs;

/// Status of a payment, as in its message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::FromRepr)]
#[repr(i16)]
pub enum Status {
    /// Code 2.
    Success = 2,
    /// Code 0.
    Pending = 0,
    /// Code -2.
    Failed = -2,
}

impl Status {
    /// The status of a code in messages, tables and settings.
    pub fn from_code(code: i64) -> Option<Self> {
        Self::from_repr(i16::try_from(code).ok()?)
    }

    /// The code in messages, tables and settings.
    pub fn code(self) -> i16 {
        self as i16
    }
}

/// A valid payment message, borrowed from its record where possible.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Payment<'a> {
    /// The idempotency key.
    pub message_id: MessageId,
    /// The message id as sent: a UUID or ULID in ASCII that needs no JSON escapes.
    pub message_id_text: Cow<'a, str>,
    /// The account, not negative.
    pub cust_id: i64,
    /// Exact, with at most the currency's decimal places.
    pub amount: Amount,
    /// An ISO 4217 currency.
    pub currency: Currency,
    /// The status in the message.
    pub status: Status,
    /// One of `payment.types`.
    pub payment_type: Cow<'a, str>,
    /// Never empty; up to 1,000 Unicode scalar values.
    pub comment: Option<Cow<'a, str>>,
    /// Never empty; up to 64 Unicode scalar values.
    pub external_ref_id: Option<Cow<'a, str>>,
    /// The record's timestamp, in the years 2000 to 2099. Not part of the hashed payload.
    pub created_at: TimestampMs,
}

/// Payloads up to this many bytes are hashed at once from the stack; longer ones are streamed.
const PAYLOAD_BUFFER_BYTES: usize = 256;

impl Payment<'_> {
    /// The hash that distinguishes a duplicate from a conflict: XXH3-64, seed 0, of the payload's encoding.
    ///
    /// Hashes of this encoding are stored (`idempotency.payload_hash`), so it must never change; a new field
    /// may only be appended, and only where it is present. In this order, integers big-endian:
    ///
    /// | part | bytes |
    /// | - | - |
    /// | custId | 8 |
    /// | amount times 10^6 | 16 |
    /// | status | 2, two's complement |
    /// | currency code | 3 |
    /// | type | 4 for its length in bytes, then UTF-8 |
    /// | comment | the same; absent is length 0 |
    /// | externalRefId | the same; absent is length 0 |
    pub fn payload_hash(&self) -> i64 {
        let mut buffer = PayloadBuffer { bytes: [0; PAYLOAD_BUFFER_BYTES], len: 0 };
        if self.encode_payload(|part| buffer.push(part)).is_some() {
            return xxh3_64(buffer.filled()).cast_signed();
        }
        let mut stream = Xxh3::new();
        self.encode_payload(|part| {
            stream.update(part);
            Some(())
        });
        stream.digest().cast_signed()
    }

    /// Passes the encoding to `take` in parts; stops if `take` returns `None`.
    fn encode_payload(&self, mut take: impl FnMut(&[u8]) -> Option<()>) -> Option<()> {
        take(&self.cust_id.to_be_bytes())?;
        take(&self.amount.millionths().to_be_bytes())?;
        take(&self.status.code().to_be_bytes())?;
        take(self.currency.code().as_bytes())?;
        let texts = [
            self.payment_type.as_ref(),
            self.comment.as_deref().unwrap_or_default(),
            self.external_ref_id.as_deref().unwrap_or_default(),
        ];
        for text in texts {
            take(&(text.len() as u32).to_be_bytes())?;
            take(text.as_bytes())?;
        }
        Some(())
    }

    /// The id of this payment, see [`payment_id`].
    pub fn payment_id(&self) -> Uuid {
        payment_id(self.message_id, self.created_at)
    }
}

struct PayloadBuffer {
    bytes: [u8; PAYLOAD_BUFFER_BYTES],
    len: usize,
}

impl PayloadBuffer {
    /// Appends a part; `None` if it does not fit.
    fn push(&mut self, part: &[u8]) -> Option<()> {
        let end = self.len.checked_add(part.len())?;
        self.bytes.get_mut(self.len..end)?.copy_from_slice(part);
        self.len = end;
        Some(())
    }

    fn filled(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The payment id for a message id and a record timestamp: a UUIDv7 (RFC 9562) of the timestamp's 48 bits of
/// ms and, for `rand_a` and then `rand_b`, the leading 74 bits of the XXH3-128 hash (seed 0, canonical
/// big-endian) of the message id's 16 bytes. The same record always gives the same id.
pub fn payment_id(message_id: MessageId, timestamp: TimestampMs) -> Uuid {
    const RAND_B_BITS: u32 = 62;
    let hash = xxh3_128(message_id.as_bytes());
    let time = u128::from(timestamp.0.cast_unsigned() & 0xFFFF_FFFF_FFFF);
    let rand_a = hash >> 116;
    let rand_b = (hash >> (116 - RAND_B_BITS)) & ((1 << RAND_B_BITS) - 1);
    Uuid::from_u128((time << 80) | (0x7 << 76) | (rand_a << 64) | (0b10 << RAND_B_BITS) | rand_b)
}

#[cfg(test)]
mod tests;
