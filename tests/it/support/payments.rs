//! Payments as test data, and the outcomes that the contract requires, computed independently of the program.

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::{Daemon, Message, Scope, Servers};

/// 2024-02-29T23:59:59.999Z: a leap day, the last millisecond of a month.
pub const AT_MS: i64 = 1_709_251_199_999;
pub const AT_ISO: &str = "2024-02-29T23:59:59.999Z";

/// A payment message; every field is the JSON text of its value.
#[derive(Clone, Debug)]
pub struct Payment {
    pub message_id: String,
    pub cust_id: i64,
    pub amount: String,
    pub currency: String,
    pub status: i64,
    pub kind: String,
    /// What follows the required fields, e.g. `,"comment":"x"`.
    pub more: String,
}

impl Payment {
    pub fn new(message_id: impl ToString, cust_id: i64) -> Payment {
        Payment {
            message_id: message_id.to_string(),
            cust_id,
            amount: "10.5".into(),
            currency: "EUR".into(),
            status: 2,
            kind: "BWI".into(),
            more: String::new(),
        }
    }

    pub fn amount(mut self, amount: &str) -> Payment {
        self.amount = amount.into();
        self
    }

    pub fn currency(mut self, currency: &str) -> Payment {
        self.currency = currency.into();
        self
    }

    pub fn status(mut self, status: i64) -> Payment {
        self.status = status;
        self
    }

    pub fn kind(mut self, kind: &str) -> Payment {
        self.kind = kind.into();
        self
    }

    pub fn more(mut self, more: &str) -> Payment {
        self.more = more.into();
        self
    }

    pub fn json(&self) -> String {
        format!(
            r#"{{"messageId":"{}","amount":{},"status":{},"currency":"{}","custId":{},"type":"{}"{}}}"#,
            self.message_id, self.amount, self.status, self.currency, self.cust_id, self.kind, self.more
        )
    }

    /// A message with the matching key, at [`AT_MS`].
    pub fn message(&self) -> Message {
        Message::new(self.cust_id.to_string(), self.json()).timestamp_ms(AT_MS)
    }
}

/// A random UUID (version 4); the same seed gives the same UUID.
pub fn uuid_v4(seed: u64) -> Uuid {
    uuid::Builder::from_random_bytes(xxh3_128(&seed.to_be_bytes()).to_be_bytes()).into_uuid()
}

/// A UUID that contains `time_ms` (version 7); the same seed gives the same UUID.
pub fn uuid_v7(time_ms: i64, seed: u64) -> Uuid {
    let random = xxh3_128(&seed.to_be_bytes()) & ((1 << 80) - 1);
    let bits = (u128::try_from(time_ms).unwrap() << 80) | random;
    Uuid::from_u128((bits & !(0xF << 76) & !(0b11 << 62)) | (0x7 << 76) | (0b10 << 62))
}

/// The same 128 bits as a ULID: Crockford's base 32.
pub fn ulid(id: Uuid) -> String {
    let digits = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    (0..26).rev().map(|place| char::from(digits[(id.as_u128() >> (5 * place)) as usize & 31])).collect()
}

/// The contract's payment id, built as a string of 128 binary digits.
pub fn payment_id(message_id: Uuid, timestamp_ms: i64) -> String {
    let hash = format!("{:0128b}", xxh3_128(message_id.as_bytes()));
    let (rand_a, rest) = hash.split_at(12);
    let rand_b = &rest[..62];
    let digits = format!("{timestamp_ms:048b}0111{rand_a}10{rand_b}");
    Uuid::from_u128(u128::from_str_radix(&digits, 2).unwrap()).to_string()
}

impl<'s> Scope<'s> {
    /// A scope on the shared servers with topics and schema: ready for the daemon.
    pub fn ready(name: &str, input_partitions: i32, output_partitions: i32) -> Scope<'static> {
        let scope = Scope::new(Servers::shared(), name);
        scope.create_topics(input_partitions, output_partitions);
        scope.command(&["migrate"]).succeeds();
        scope
    }

    /// Runs the daemon until it has caught up with the current end; each run is a restart of the same member.
    pub fn drain(&self) -> Daemon {
        self.drain_with(&[])
    }

    /// As [`Scope::drain`], with further settings.
    pub fn drain_with(&self, settings: &[(&str, &str)]) -> Daemon {
        let mut with_instance = vec![("PAYMENT_WRITER__KAFKA__INSTANCE_ID", "drain")];
        with_instance.extend_from_slice(settings);
        let mut daemon = self.daemon_with(&["run", "--until-caught-up"], &with_instance);
        let status = daemon.wait();
        assert_eq!(status.code(), Some(0), "run --until-caught-up: {}", daemon.log());
        daemon
    }

    /// The `source` header of the record at this partition and offset.
    pub fn source(&self, partition: i32, offset: i64) -> String {
        let rows = self.sql("SELECT DISTINCT topic_id FROM payment_writer.source_cursor", &[]);
        let topic_id: Uuid = rows[0].get(0);
        format!("{}/{partition}/{offset}", &topic_id.simple().to_string()[..8])
    }

    /// A table's rows as JSON, in column order.
    pub fn rows(&self, table: &str, order_by: &str) -> Vec<String> {
        let query = format!("SELECT row_to_json(t)::text FROM payment_writer.{table} t ORDER BY {order_by}");
        self.sql(&query, &[]).iter().map(|row| row.get(0)).collect()
    }
}
