//! Input records of a history, each with its outcome according to the contract, known by construction.

use payment_writer::domain::record::TimestampMs;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

/// `payment.max_bytes` of the model: small, so that `too_large` is cheap.
pub const PAYMENT_BYTES_MAX: usize = 600;
/// All records have timestamps near this one.
pub const BASE_MS: i64 = 1_767_225_600_000;

/// A record's outcome by itself, without regard to earlier records.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expect {
    /// Valid; records of one `id` are duplicates of each other if `payload` agrees, else conflicts.
    Valid { id: Uuid, payload: u32, is_success: bool },
    /// Dead letter with this reason.
    Invalid(&'static str),
}

/// One input record.
#[derive(Clone, Debug)]
pub struct Record {
    pub expect: Expect,
    pub timestamp: Option<TimestampMs>,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// The message id as written in the message.
    pub id_text: String,
}

fn v4(number: u128) -> Uuid {
    let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
    let cleared = mixed & !((0xF << 76) | (0b11 << 62));
    Uuid::from_u128(cleared | (4 << 76) | (0b10 << 62))
}

/// Generates records.
#[derive(Debug)]
pub struct Generator {
    fresh: u128,
    /// Number of distinct ids.
    pub alphabet: u128,
}

impl Generator {
    pub fn new(alphabet: u128) -> Self {
        Self { fresh: 1_000, alphabet }
    }

    pub fn draw(&mut self, rng: &mut ChaCha8Rng) -> Record {
        let number = if rng.random_bool(0.5) {
            rng.random_range(1..=self.alphabet)
        } else {
            self.fresh += 1;
            self.fresh
        };
        let kind = if rng.random_bool(0.2) { rng.random_range(1..=10) } else { 0 };
        // The first variant is the most frequent, so that there are as many duplicates as conflicts.
        let variant = if rng.random_bool(0.6) { 0 } else { rng.random_range(0..6) };
        self.record(rng, number, variant, kind)
    }

    /// A record with the id of `number`, one of six payloads, and a flaw (0: none).
    pub fn record(&mut self, rng: &mut ChaCha8Rng, number: u128, variant: u32, flaw: u32) -> Record {
        let id = v4(number);
        let id_text = if rng.random_bool(0.3) {
            id.hyphenated().to_string().to_uppercase()
        } else {
            id.hyphenated().to_string()
        };
        let cust = variant % 2 + 1;
        let (amount, status) = match variant {
            0 | 1 => (if rng.random_bool(0.5) { "10.5" } else { "\"10.50\"" }, 2),
            2 | 3 => ("7", 0),
            _ => ("1E+3", -2),
        };
        let spaces = " ".repeat(rng.random_range(0..3));
        let mut key = Some(cust.to_string().into_bytes());
        let mut timestamp = Some(TimestampMs(BASE_MS + i64::from(rng.random_range(0..86_400_000_i32))));
        let mut headers = Vec::new();
        let text = format!(
            r#"{{{spaces}"messageId":"{id_text}","amount":{amount},"status":{status},"currency":"EUR","custId":{cust},"type":"BWI"}}"#
        );
        let mut value = Some(text.clone().into_bytes());
        let mut expect = Expect::Valid { id, payload: variant, is_success: status == 2 };
        match flaw {
            1 => {
                value = None;
                expect = Expect::Invalid("empty_value");
            }
            2 => {
                value = Some(Vec::new());
                expect = Expect::Invalid("empty_value");
            }
            3 => {
                value = Some(format!("{text}{}", " ".repeat(PAYMENT_BYTES_MAX)).into_bytes());
                expect = Expect::Invalid("too_large");
            }
            4 => {
                headers.push((b"schema-version".to_vec(), Some(b"2".to_vec())));
                expect = Expect::Invalid("unsupported_schema_version");
            }
            5 => {
                value = Some(format!("{text}]").into_bytes());
                expect = Expect::Invalid("malformed_json");
            }
            6 => {
                value = Some(text.replace("\"currency\":\"EUR\",", "").into_bytes());
                expect = Expect::Invalid("missing_field");
            }
            7 => {
                value = Some(text.replace("BWI", "bwi").into_bytes());
                expect = Expect::Invalid("invalid_field");
            }
            8 => {
                key = Some(b"99".to_vec());
                expect = Expect::Invalid("key_mismatch");
            }
            9 => {
                timestamp = None;
                expect = Expect::Invalid("invalid_timestamp");
            }
            10 => {
                // A UUIDv7 with a time in the distant past.
                let old = Uuid::from_u128((1_000_000_000_000_u128 << 80) | (7 << 76) | (0b10 << 62) | number);
                value = Some(text.replace(&id_text, &old.to_string()).into_bytes());
                expect = Expect::Invalid("stale_message_id");
            }
            _ => {}
        }
        Record { expect, timestamp, key, value, headers, id_text }
    }
}
