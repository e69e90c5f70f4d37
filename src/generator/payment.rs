//! A generated payment, small enough to be remembered, and its message.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::{GeneratorConfig, IdKind, below};

/// Currency and ISO 4217 minor unit, most frequent first.
const CURRENCIES: [(&str, u32); 8] =
    [("EUR", 2), ("USD", 2), ("GBP", 2), ("CHF", 2), ("SEK", 2), ("JPY", 0), ("KWD", 3), ("BGN", 2)];

/// Maximum length of a comment by the contract.
const COMMENT_CHARS_MAX: usize = 1_000;

/// Start of a field that the daemon does not know.
const PADDING: &str = ",\"padding\":\"";

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
    /// Index in the list of currencies.
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

    /// The amount as a decimal number.
    pub(super) fn amount(&self) -> String {
        let (_, scale) = self.currency();
        decimal(self.minor_units.into(), scale)
    }

    /// The message in the format of the original producer.
    pub(super) fn json(&self, config: &GeneratorConfig) -> String {
        let (currency, _) = self.currency();
        let kind = config.types.get(usize::from(self.kind)).map_or("BWI", String::as_str);
        let id = if self.ulid { ulid_text(self.id) } else { uuid::Uuid::from_u128(self.id).to_string() };
        let mut json = format!(
            r#"{{"messageId":"{id}","amount":{},"status":{},"currency":"{currency}","custId":{},"type":"{kind}""#,
            self.amount(),
            self.status,
            self.account
        );
        if let Some(reference) = self.external_ref {
            json.push_str(&format!(r#","externalRefId":"INV-{reference:010}""#));
        }
        if self.comment >= 16 || config.value_bytes.is_some() {
            let comment = match self.comment {
                16..32 => "Zahlung fällig – 支払い 💶 \\\"".to_owned(),
                _ => format!("Creating {kind} trn in {currency}"),
            };
            self.write_comment(&comment, config.value_bytes.unwrap_or_default(), &mut json);
        }
        json.push('}');
        json
    }

    /// Pads the message to about `wanted` bytes. The comment is the last field, so that it can be padded;
    /// padding that exceeds a comment goes to a field that the daemon does not know.
    fn write_comment(&self, comment: &str, wanted: usize, json: &mut String) {
        let fill = |json: &mut String, room: usize| {
            let missing = wanted.saturating_sub(json.len() + 2).min(room);
            json.extend(std::iter::repeat_n('.', missing));
            json.push('"');
        };
        json.push_str(",\"comment\":\"");
        json.push_str(comment);
        // Counts bytes instead of characters, so the comment is never too long.
        fill(json, COMMENT_CHARS_MAX - comment.len());
        if json.len() + PADDING.len() + 2 < wanted {
            json.push_str(PADDING);
            fill(json, usize::MAX);
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
pub(super) fn ulid_text(id: u128) -> String {
    ulid::Ulid(id).to_string()
}

/// `12345` with two decimals is `123.45`.
pub(super) fn decimal(minor_units: u128, scale: u32) -> String {
    let (factor, width) = (10u128.pow(scale), scale as usize);
    match scale {
        0 => minor_units.to_string(),
        _ => format!("{}.{:0width$}", minor_units / factor, minor_units % factor),
    }
}
