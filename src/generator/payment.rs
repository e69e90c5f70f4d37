//! A generated payment, small enough to be remembered, and its message.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::{GeneratorConfig, IdKind, below};

/// Currency and ISO 4217 minor unit, most frequent first.
pub const CURRENCIES: [(&str, u32); 8] =
    [("EUR", 2), ("USD", 2), ("GBP", 2), ("CHF", 2), ("SEK", 2), ("JPY", 0), ("KWD", 3), ("BGN", 2)];

/// Maximum length of a comment by the contract.
const COMMENT_CHARS_MAX: usize = 1_000;

/// A valid payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payment {
    /// The 128 bits of the message id.
    pub id: u128,
    /// Whether the id is written as a ULID.
    pub ulid: bool,
    /// `custId`
    pub account: u64,
    /// The amount in the currency's minor unit.
    pub minor_units: u64,
    /// Index in [`CURRENCIES`].
    pub currency: u8,
    /// 2, 0 or -2.
    pub status: i8,
    /// Index in `payment.types`.
    pub kind: u8,
    /// Selects the comment.
    pub comment: u8,
    /// `externalRefId`, if present.
    pub external_ref: Option<u32>,
}

impl Payment {
    pub(super) fn random(rng: &mut ChaCha8Rng, config: &GeneratorConfig, now_ms: i64) -> Self {
        let now_ms = u64::try_from(now_ms).unwrap_or_default();
        let (high, low, draw) = (rng.next_u64(), rng.next_u64(), rng.next_u64());
        // Amounts from cents to millions: first the number of digits, then the value.
        let magnitude = 10u64.pow(2 + (draw % 8) as u32);
        let currency = match (draw >> 8) % 16 {
            at @ 1..=7 => at as u8,
            _ => 0,
        };
        let status = match (draw >> 16) % 20 {
            0..=1 => 0,
            2 => -2,
            _ => 2,
        };
        Self {
            id: message_id(config.ids, now_ms, high, low),
            ulid: config.ids == IdKind::Ulid,
            account: 1 + ((u128::from(rng.next_u64()) * u128::from(config.accounts)) >> 64) as u64,
            minor_units: 1 + ((u128::from(rng.next_u64()) * u128::from(magnitude)) >> 64) as u64,
            currency,
            status,
            kind: below(rng, config.types.len() as u32) as u8,
            comment: (draw >> 24) as u8,
            external_ref: ((draw >> 32) % 5 == 0).then_some((draw >> 35) as u32),
        }
    }

    /// Alphabetic code and minor unit of the currency.
    pub fn currency(&self) -> (&'static str, u32) {
        CURRENCIES.get(usize::from(self.currency)).copied().unwrap_or(("EUR", 2))
    }

    pub(super) fn write_key(&self, out: &mut Vec<u8>) {
        write_number(self.account, 1, out);
    }

    /// Writes the message in the format of the original producer.
    pub(super) fn write_json(&self, config: &GeneratorConfig, out: &mut Vec<u8>) {
        let (currency, scale) = self.currency();
        let kind = config.types.get(usize::from(self.kind)).map_or("BWI", String::as_str);
        out.extend_from_slice(b"{\"messageId\":\"");
        self.write_id(out);
        out.extend_from_slice(b"\",\"amount\":");
        write_amount(self.minor_units, scale, out);
        out.extend_from_slice(match self.status {
            0 => b",\"status\":0,\"currency\":\"".as_slice(),
            -2 => b",\"status\":-2,\"currency\":\"",
            _ => b",\"status\":2,\"currency\":\"",
        });
        out.extend_from_slice(currency.as_bytes());
        out.extend_from_slice(b"\",\"custId\":");
        write_number(self.account, 1, out);
        out.extend_from_slice(b",\"type\":\"");
        out.extend_from_slice(kind.as_bytes());
        out.push(b'"');
        if let Some(reference) = self.external_ref {
            out.extend_from_slice(b",\"externalRefId\":\"INV-");
            write_number(u64::from(reference), 10, out);
            out.push(b'"');
        }
        self.write_comment(kind, currency, config, out);
        out.push(b'}');
    }

    /// Writes the comment last, so that it can be padded; padding that exceeds a comment goes to a field that
    /// the daemon does not know.
    fn write_comment(&self, kind: &str, currency: &str, config: &GeneratorConfig, out: &mut Vec<u8>) {
        if self.comment < 16 && config.value_bytes.is_none() {
            return;
        }
        out.extend_from_slice(b",\"comment\":\"");
        let start = out.len();
        match self.comment {
            16..32 => out.extend_from_slice("Zahlung fällig – 支払い 💶 \\\"".as_bytes()),
            _ => {
                out.extend_from_slice(b"Creating ");
                out.extend_from_slice(kind.as_bytes());
                out.extend_from_slice(b" trn in ");
                out.extend_from_slice(currency.as_bytes());
            }
        }
        let Some(wanted) = config.value_bytes else { return out.push(b'"') };
        // Counts bytes instead of characters, so the comment is never too long.
        let room = COMMENT_CHARS_MAX - (out.len() - start);
        let padding = wanted.saturating_sub(out.len() + 2).min(room);
        out.resize(out.len() + padding, b'.');
        out.push(b'"');
        const PADDING: &[u8] = b",\"padding\":\"";
        let missing = wanted.saturating_sub(out.len() + PADDING.len() + 2);
        if missing > 0 {
            out.extend_from_slice(PADDING);
            out.resize(out.len() + missing, b'.');
            out.push(b'"');
        }
    }

    fn write_id(&self, out: &mut Vec<u8>) {
        if self.ulid {
            out.extend_from_slice(&ulid_text(self.id));
        } else {
            let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
            let id = uuid::Uuid::from_u128(self.id);
            out.extend_from_slice(id.hyphenated().encode_lower(&mut text).as_bytes());
        }
    }
}

/// Builds a message id of a kind from random bits.
pub(super) fn message_id(kind: IdKind, time_ms: u64, high: u64, low: u64) -> u128 {
    let random = u128::from(high) << 64 | u128::from(low);
    match kind {
        IdKind::V4 => uuid::Builder::from_random_bytes(random.to_be_bytes()).into_uuid().as_u128(),
        IdKind::V7 => {
            let [_, _, _, _, _, _, bytes @ ..] = random.to_be_bytes();
            uuid::Builder::from_unix_timestamp_millis(time_ms, &bytes).into_uuid().as_u128()
        }
        IdKind::Ulid => u128::from(time_ms & 0xffff_ffff_ffff) << 80 | random >> 48,
    }
}

/// 26 digits of five bits each, in Crockford's base 32.
pub(super) fn ulid_text(id: u128) -> [u8; 26] {
    const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    std::array::from_fn(|at| {
        let digit = (id >> (125 - 5 * at)) as usize & 31;
        DIGITS.get(digit).copied().unwrap_or(b'0')
    })
}

/// Writes decimal digits, zero-padded to `digits_min`.
fn write_number(mut number: u64, digits_min: usize, out: &mut Vec<u8>) {
    let start = out.len();
    while number > 0 || out.len() - start < digits_min {
        out.push(b'0' + (number % 10) as u8);
        number /= 10;
    }
    if let Some(digits) = out.get_mut(start..) {
        digits.reverse();
    }
}

/// `12345` with two decimals is `123.45`.
pub(super) fn write_amount(minor_units: u64, scale: u32, out: &mut Vec<u8>) {
    let factor = 10u64.pow(scale);
    write_number(minor_units / factor, 1, out);
    if scale > 0 {
        out.push(b'.');
        write_number(minor_units % factor, scale as usize, out);
    }
}
