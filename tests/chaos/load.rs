//! Adversarial records.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::{Builder, Uuid};

use crate::support::{Message, Payment, Source, ulid, uuid_v7};

/// Earlier payments that may be repeated or conflicted with.
const REMEMBERED_MAX: usize = 2_000;
/// Payments recent enough that their batches may still be in flight.
const RECENT: usize = 30;
const ACCOUNTS: i64 = 80;

#[derive(Clone)]
struct Sent {
    id: Uuid,
    account: i64,
    cents: u64,
    status: i64,
    comment: bool,
}

/// An endless supply of records, in an order that depends only on the seed: new payments, repeats in other
/// spellings, conflicts, and invalid records.
pub struct Adversary {
    random: ChaCha8Rng,
    sent: VecDeque<Sent>,
    partitions: i32,
    has_twins: bool,
}

impl Adversary {
    /// With twins, one id also occurs on several partitions: which of its records is written depends on
    /// timing.
    pub fn new(seed: u64, partitions: i32, has_twins: bool) -> Adversary {
        Adversary { random: ChaCha8Rng::seed_from_u64(seed), sent: VecDeque::new(), partitions, has_twins }
    }

    fn next(&mut self) -> Message {
        let kind = self.random.random_range(0..100);
        if !self.sent.is_empty() {
            let recent = self.sent.len().min(RECENT);
            let from = if self.random.random_bool(0.5) { self.sent.len() - recent } else { 0 };
            let earlier = self.sent[self.random.random_range(from..self.sent.len())].clone();
            match kind {
                0..6 => return self.spell(&earlier),
                6..9 => return self.spell(&Sent { cents: earlier.cents + 1, ..earlier }),
                // The same payment from a producer with another partitioner.
                9..12 if self.has_twins => {
                    let partition = self.random.random_range(0..self.partitions);
                    return self.spell(&earlier).partition(partition);
                }
                // The same id for another customer, and so on another partition.
                12..15 if self.has_twins => {
                    let account = earlier.account % ACCOUNTS + 1;
                    return self.spell(&Sent { account, ..earlier });
                }
                _ => {}
            }
        }
        match kind {
            15 => Message::new("57", "{}"),
            16 => Message { value: None, ..Message::new("57", "") },
            17 => {
                let payment = self.payment();
                Message { key: Some(b"another".to_vec()), ..self.spell(&payment) }
            }
            18 => {
                let payment = self.payment();
                self.spell(&payment).header("schema-version", "2")
            }
            _ => {
                let payment = self.payment();
                if self.sent.len() == REMEMBERED_MAX {
                    self.sent.pop_front();
                }
                self.sent.push_back(payment.clone());
                self.spell(&payment)
            }
        }
    }

    fn payment(&mut self) -> Sent {
        let id = if self.random.random_bool(0.5) {
            uuid_v7(now_ms(), self.random.random())
        } else {
            Builder::from_random_bytes(self.random.random()).into_uuid()
        };
        Sent {
            id,
            account: self.random.random_range(1..=ACCOUNTS),
            cents: self.random.random_range(1..10_000_000),
            status: [2, 2, 0, -2][self.random.random_range(0..4)],
            comment: self.random.random_bool(0.5),
        }
    }

    /// One of many spellings of the same payload.
    fn spell(&mut self, sent: &Sent) -> Message {
        let (units, hundredths) = (sent.cents / 100, sent.cents % 100);
        let id = match self.random.random_range(0..4) {
            0 => sent.id.to_string().to_uppercase(),
            // A ULID contains a time, which would differ from the record's.
            1 if sent.id.get_version_num() == 7 => ulid(sent.id),
            _ => sent.id.to_string(),
        };
        let amount = match self.random.random_range(0..4) {
            0 => format!("\"{units}.{hundredths:02}\""),
            1 => format!("{}e-2", sent.cents),
            _ => format!("{units}.{hundredths:02}"),
        };
        let comment = if sent.comment { r#","comment":"again and again""# } else { "" };
        let payment = Payment::new(id, sent.account).amount(&amount).status(sent.status).more(comment);
        // With a timestamp set by the client.
        Message { timestamp_ms: None, ..payment.message() }
    }
}

impl Source for Adversary {
    fn next_record(&mut self) -> Message {
        self.next()
    }
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_millis()).unwrap()
}
