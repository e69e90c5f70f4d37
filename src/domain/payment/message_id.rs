//! Message ids: the idempotency key, 128 bits in UUID or ULID notation.
//!
//! Sources: RFC 9562 (UUID and its version 7), the ULID specification (Crockford base 32, 48 bits of time
//! first).

use ulid::Ulid;
use uuid::{Uuid, Variant};

use crate::domain::record::TimestampMs;

/// The idempotency key of a message. Not all bits are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MessageId(Uuid);

/// A parsed message id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParsedMessageId {
    /// The 128 bits.
    pub id: MessageId,
    /// The time in this *notation* of the id: every ULID has one, and every UUID of version 7 and variant 10.
    /// The same bits can have one as a ULID and none as a UUID.
    pub embedded_time: Option<TimestampMs>,
}

/// Why a text is not a valid message id.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr)]
pub enum MessageIdFault {
    /// Neither a hyphenated UUID nor a ULID.
    #[strum(serialize = "is neither a hyphenated UUID nor a ULID")]
    Form,
    /// 128 zero bits.
    #[strum(serialize = "is all zero bits")]
    Nil,
}

impl MessageId {
    /// Parses a hyphenated UUID of any version, or a ULID, in upper or lower case.
    ///
    /// # Errors
    /// See [`MessageIdFault`].
    pub fn parse(text: &str) -> Result<ParsedMessageId, MessageIdFault> {
        let (id, carries_time) = match text.len() {
            // Only the hyphenated form has this length.
            uuid::fmt::Hyphenated::LENGTH => {
                let id = Uuid::try_parse(text).map_err(|_| MessageIdFault::Form)?;
                (id, id.get_version_num() == 7 && id.get_variant() == Variant::RFC4122)
            }
            // 26 digits of 5 bits are 130 bits, so the first digit may only be 0 to 7.
            ulid::ULID_LEN if text.as_bytes().first().is_some_and(|first| *first <= b'7') => {
                let id = Ulid::from_string(text).map_err(|_| MessageIdFault::Form)?;
                (Uuid::from_u128(id.0), true)
            }
            _ => return Err(MessageIdFault::Form),
        };
        if id.is_nil() {
            return Err(MessageIdFault::Nil);
        }
        let embedded_time = carries_time.then_some(TimestampMs((id.as_u128() >> 80) as i64));
        Ok(ParsedMessageId { id: MessageId(id), embedded_time })
    }

    /// The bits, first byte first.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The same bits as a UUID, the type of the table columns.
    pub fn to_uuid(self) -> Uuid {
        self.0
    }
}

#[cfg(test)]
mod tests;
