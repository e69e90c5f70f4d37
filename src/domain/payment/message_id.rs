//! Message ids: the idempotency key, 128 bits in UUID or ULID notation.
//!
//! Sources: RFC 9562 (UUID and its version 7), the ULID specification (Crockford base 32, 48 bits of time
//! first).

use std::fmt;

use uuid::Uuid;

use crate::domain::record::TimestampMs;

/// The idempotency key of a message. Not all bits are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId([u8; 16]);

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
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MessageIdFault {
    /// Neither a hyphenated UUID nor a ULID.
    Form,
    /// 128 zero bits.
    Nil,
}

impl MessageId {
    /// Parses a hyphenated UUID of any version, or a ULID, in upper or lower case.
    ///
    /// # Errors
    /// See [`MessageIdFault`].
    pub fn parse(text: &str) -> Result<ParsedMessageId, MessageIdFault> {
        let (bits, carries_time) = match text.len() {
            UUID_LEN => {
                let bits = uuid_bits(text.as_bytes()).ok_or(MessageIdFault::Form)?;
                (bits, (bits >> 76) & 0xF == 7 && (bits >> 62) & 0b11 == 0b10)
            }
            ULID_LEN => (ulid_bits(text.as_bytes()).ok_or(MessageIdFault::Form)?, true),
            _ => return Err(MessageIdFault::Form),
        };
        if bits == 0 {
            return Err(MessageIdFault::Nil);
        }
        let embedded_time = carries_time.then_some(TimestampMs((bits >> 80) as i64));
        Ok(ParsedMessageId { id: MessageId(bits.to_be_bytes()), embedded_time })
    }

    /// The id with these bits, as read from the database; `None` if they are all zero.
    pub fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        (bytes != [0; 16]).then_some(MessageId(bytes))
    }

    /// The bits, first byte first.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The same bits as a UUID, the type of the table columns.
    pub fn to_uuid(self) -> Uuid {
        Uuid::from_bytes(self.0)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_uuid().fmt(f)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageId({self})")
    }
}

const UUID_LEN: usize = 36;
const ULID_LEN: usize = 26;

/// Not a digit of the alphabet.
const NONE: u8 = 0xFF;

/// The value of each character in an alphabet, in upper and lower case.
const fn alphabet(digits: &[u8]) -> [u8; 256] {
    let mut table = [NONE; 256];
    let mut value = 0;
    // Indexing in a constant is checked by the compiler.
    #[allow(clippy::indexing_slicing)]
    while value < digits.len() {
        table[digits[value] as usize] = value as u8;
        table[digits[value].to_ascii_lowercase() as usize] = value as u8;
        value += 1;
    }
    table
}

static HEX: [u8; 256] = alphabet(b"0123456789ABCDEF");
static CROCKFORD: [u8; 256] = alphabet(b"0123456789ABCDEFGHJKMNPQRSTVWXYZ");

fn value(table: &[u8; 256], c: u8) -> u8 {
    table.get(usize::from(c)).copied().unwrap_or(NONE)
}

/// Digits of `bits` bits each, most significant first, as one number; `None` if one is not in the alphabet.
fn number(table: &[u8; 256], bits: u32, digits: &[u8]) -> Option<u64> {
    let mut sum = 0u64;
    let mut seen = 0u8;
    for &c in digits {
        let v = value(table, c);
        seen |= v;
        sum = (sum << bits) | u64::from(v & 0x1F);
    }
    // Values are below 32, so only NONE sets the upper bits.
    (seen & 0xE0 == 0).then_some(sum)
}

fn uuid_bits(text: &[u8]) -> Option<u128> {
    let (a, text) = text.split_at_checked(8)?;
    let (b, text) = after_hyphen(text)?.split_at_checked(4)?;
    let (c, text) = after_hyphen(text)?.split_at_checked(4)?;
    let (d, text) = after_hyphen(text)?.split_at_checked(4)?;
    let e = after_hyphen(text)?;
    let hex = |digits| number(&HEX, 4, digits);
    let high = (hex(a)? << 32) | (hex(b)? << 16) | hex(c)?;
    let low = (hex(d)? << 48) | hex(e)?;
    Some((u128::from(high) << 64) | u128::from(low))
}

fn after_hyphen(text: &[u8]) -> Option<&[u8]> {
    text.strip_prefix(b"-")
}

fn ulid_bits(text: &[u8]) -> Option<u128> {
    // 26 digits of 5 bits are 130 bits, so the first digit may only be 0 to 7.
    if text.first().is_none_or(|&c| c > b'7') {
        return None;
    }
    let (time, random) = text.split_at_checked(10)?;
    let (random_high, random_low) = random.split_at_checked(8)?;
    let base32 = |digits| number(&CROCKFORD, 5, digits);
    let (time, high, low) = (base32(time)?, base32(random_high)?, base32(random_low)?);
    Some((u128::from(time) << 80) | (u128::from(high) << 40) | u128::from(low))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bits(text: &str) -> Option<u128> {
        MessageId::parse(text).ok().map(|p| u128::from_be_bytes(*p.id.as_bytes()))
    }

    /// Crockford base 32, digit by digit.
    fn ulid_text(bits: u128) -> String {
        let alphabet = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
        (0..26).rev().map(|i| char::from(alphabet[(bits >> (5 * i)) as usize & 31])).collect()
    }

    #[test]
    fn uuids_of_any_version_and_case_are_read() {
        let expected = 0x0197b2a4_5f0e_7c3a_9d1e_2f4b8c6d7e8f;
        assert_eq!(bits("0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f"), Some(expected));
        assert_eq!(bits("0197B2A4-5F0E-7c3a-9D1E-2F4B8C6D7E8F"), Some(expected));
        assert_eq!(bits("00000000-0000-0000-0000-000000000001"), Some(1));
        assert_eq!(bits("ffffffff-ffff-ffff-ffff-ffffffffffff"), Some(u128::MAX));
    }

    #[test]
    fn ulids_of_any_case_are_read() {
        let parsed = MessageId::parse("01ARZ3NDEKTSV4RRFFQ69G5FAV").unwrap();
        assert_eq!(parsed, MessageId::parse("01arz3ndektsv4rrffq69g5fav").unwrap());
        // The ULID specification's example: its time is the first ten digits.
        assert_eq!(parsed.embedded_time, Some(TimestampMs(1_469_922_850_259)));
        assert_eq!(bits("7ZZZZZZZZZZZZZZZZZZZZZZZZZ"), Some(u128::MAX));
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "",
            "0197b2a45f0e7c3a9d1e2f4b8c6d7e8f",
            "{0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f}",
            "urn:uuid:0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f",
            "0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8g",
            "0197b2a45-f0e-7c3a-9d1e-2f4b8c6d7e8f",
            "0197b2a4-5f0e-7c3a-9d1e_2f4b8c6d7e8f",
            "0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8é",
            "8ZZZZZZZZZZZZZZZZZZZZZZZZZ",
            "01ARZ3NDEKTSV4RRFFQ69G5FA",
            "01ARZ3NDEKTSV4RRFFQ69G5FAVX",
            "01ARZ3NDEKTSV4RRFFQ69G5FAI",
            "01ARZ3NDEKTSV4RRFFQ69G5FAL",
            "01ARZ3NDEKTSV4RRFFQ69G5FAO",
            "01ARZ3NDEKTSV4RRFFQ69G5FAU",
            "01ARZ3NDEKTSV4RRFFQ69G5FA ",
            "l1ARZ3NDEKTSV4RRFFQ69G5FAV",
            "-0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8",
            "01ARZ3NDEKTSV4RRFFQ69G5FÄ",
        ] {
            assert_eq!(MessageId::parse(text), Err(MessageIdFault::Form), "{text}");
        }
        for text in ["00000000-0000-0000-0000-000000000000", "00000000000000000000000000"] {
            assert_eq!(MessageId::parse(text), Err(MessageIdFault::Nil), "{text}");
        }
    }

    #[test]
    fn only_version_7_of_variant_10_and_ulids_carry_a_time() {
        let time = |text| MessageId::parse(text).unwrap().embedded_time;
        assert_eq!(time("0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f"), Some(TimestampMs(0x0197_b2a4_5f0e)));
        assert_eq!(time("0197b2a4-5f0e-7c3a-bd1e-2f4b8c6d7e8f"), Some(TimestampMs(0x0197_b2a4_5f0e)));
        assert_eq!(time("0197b2a4-5f0e-4c3a-9d1e-2f4b8c6d7e8f"), None);
        assert_eq!(time("0197b2a4-5f0e-7c3a-1d1e-2f4b8c6d7e8f"), None);
        assert_eq!(time("0197b2a4-5f0e-7c3a-cd1e-2f4b8c6d7e8f"), None);
    }

    proptest! {
        #[test]
        fn the_same_bits_in_either_form_are_one_id(raw in 1u128.., lower: bool) {
            let uuid = Uuid::from_u128(raw).to_string();
            let ulid = if lower { ulid_text(raw).to_lowercase() } else { ulid_text(raw) };
            let (uuid, ulid) = (MessageId::parse(&uuid).unwrap(), MessageId::parse(&ulid).unwrap());
            prop_assert_eq!(uuid.id, ulid.id);
            prop_assert_eq!(uuid.id.to_uuid().as_u128(), raw);
            prop_assert_eq!(ulid.embedded_time, Some(TimestampMs((raw >> 80) as i64)));
        }

        #[test]
        fn uuids_are_read_as_the_uuid_crate_reads_them(text in "[0-9a-fA-Fg]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F-]{12}") {
            let oracle = Uuid::try_parse(&text).ok().map(|u| u.as_u128());
            prop_assert_eq!(bits(&text), oracle);
        }

        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in ".{26}|.{36}|[0-9A-Z]{26}") {
            let _ = MessageId::parse(&text);
        }
    }
}
