//! Generated payments in an order that depends only on the seed.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::Builder;

use super::{Message, Source};

/// An endless supply of records: most are new payments, some repeat an earlier one or conflict with it.
pub struct Load {
    random: ChaCha8Rng,
    sent: Vec<(u64, String, u64, i64)>,
    has_bad_records: bool,
    has_good_records: bool,
}

impl Load {
    /// The same seed gives the same records.
    pub fn new(seed: u64) -> Load {
        Load {
            random: ChaCha8Rng::seed_from_u64(seed),
            sent: Vec::new(),
            has_bad_records: true,
            has_good_records: true,
        }
    }

    /// Only records that are written or duplicates.
    pub fn without_bad_records(seed: u64) -> Load {
        Load { has_bad_records: false, ..Load::new(seed) }
    }

    /// Only invalid records.
    pub fn of_bad_records(seed: u64) -> Load {
        Load { has_good_records: false, ..Load::new(seed) }
    }

    /// The next `count` records, keyed by their account.
    pub fn take(&mut self, count: usize) -> Vec<Message> {
        (0..count).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> Message {
        let kind = self.random.random_range(0..100);
        if !self.has_good_records {
            return Message::new("57", "{}");
        }
        if !self.sent.is_empty() && kind < 10 {
            let earlier = self.random.random_range(0..self.sent.len());
            let (account, id, cents, status) = self.sent[earlier].clone();
            // In another spelling, or with another amount, which is a conflict.
            let cents = if kind < 3 && self.has_bad_records { cents + 1 } else { cents };
            return message(account, &id.to_uppercase(), cents, status, "\"again\"");
        }
        if kind < 13 && self.has_bad_records {
            return Message::new("57", if kind < 12 { "{}" } else { "" });
        }
        let id = Builder::from_random_bytes(self.random.random()).into_uuid().to_string();
        let account = self.random.random_range(1..=60);
        let (cents, status) = (self.random.random_range(1..10_000_000), [2, 2, 0, -2][kind % 4]);
        self.sent.push((account, id.clone(), cents, status));
        message(account, &id, cents, status, "\"again\"")
    }

    /// A time from `from` to `to` in milliseconds, or any other number in that range.
    pub fn number(&mut self, from: u64, to: u64) -> u64 {
        self.random.random_range(from..to)
    }
}

impl Source for Load {
    fn next_record(&mut self) -> Message {
        self.next()
    }
}

fn message(account: u64, id: &str, cents: u64, status: i64, comment: &str) -> Message {
    let (units, hundredths) = (cents / 100, cents % 100);
    Message::new(
        account.to_string(),
        format!(
            r#"{{"messageId":"{id}","amount":{units}.{hundredths:02},"status":{status},"currency":"EUR","custId":{account},"type":"BWI","comment":{comment}}}"#
        ),
    )
}
