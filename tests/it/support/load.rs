//! Payments to be written, in an order that only the seed decides, and a flow of them beside a test.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use uuid::Builder;

use super::{Message, Scope};

/// An endless supply of records: most are new payments, some repeat or contradict an earlier one.
pub struct Load {
    random: ChaCha8Rng,
    sent: Vec<(u64, String, u64, i64)>,
    has_bad_records: bool,
    has_good_records: bool,
}

impl Load {
    /// The same records for the same seed.
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

    /// Only records that break the rules.
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
            // In another spelling, or with another amount: a conflict.
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

    /// A moment between `from` and `to` milliseconds, or any other number.
    pub fn number(&mut self, from: u64, to: u64) -> u64 {
        self.random.random_range(from..to)
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

/// Records that keep coming while a test does something else. Outages of the broker only delay them.
pub struct Flow {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Load>>,
}

impl Flow {
    /// Sends `per_tick` records every 20 ms until it is ended.
    pub fn start(scope: &Scope<'_>, mut load: Load, per_tick: usize) -> Flow {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, topic) = (Arc::clone(&stop), scope.input_topic.clone());
        let producer: BaseProducer = idempotent(scope.client_config()).create().unwrap();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for message in load.take(per_tick) {
                    let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(&topic);
                    record.key = message.key.as_deref();
                    record.payload = message.value.as_deref();
                    producer.send(record).unwrap_or_else(|(error, _)| panic!("producing: {error}"));
                }
                producer.poll(Duration::from_millis(20));
                std::thread::sleep(Duration::from_millis(20));
            }
            // A client that lost its broker under load may not get over it. What counts is the log: what did
            // not arrive there is no record, and every check reads the log.
            if let Err(error) = producer.flush(Duration::from_secs(60)) {
                eprintln!("the load's own client did not deliver the rest: {error}");
            }
            load
        });
        Flow { stop, thread: Some(thread) }
    }

    /// Stops and waits until all that was sent has arrived.
    pub fn end(mut self) -> Load {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn idempotent(mut config: ClientConfig) -> ClientConfig {
    config.set("enable.idempotence", "true");
    config
}
