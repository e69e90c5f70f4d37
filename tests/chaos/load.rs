//! Records that make trouble, and a flow of them that goes on whatever happens to the servers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdkafka::config::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use uuid::{Builder, Uuid};

use crate::support::{Message, Payment, Scope, ulid, uuid_v7};

const TICK: Duration = Duration::from_millis(20);
/// Earlier payments that may be repeated or contradicted.
const REMEMBERED_MAX: usize = 2_000;
/// So recent that their batches may still be on the way.
const RECENT: usize = 30;
const ACCOUNTS: i64 = 80;
const FLUSH_MAX: Duration = Duration::from_secs(60);
/// A client that delivers nothing for so long has not got over what happened to its broker.
const DELIVERY_MAX: Duration = Duration::from_secs(40);

#[derive(Clone)]
struct Sent {
    id: Uuid,
    account: i64,
    cents: u64,
    status: i64,
    comment: bool,
}

/// An endless supply of records, in an order that only the seed decides: new payments, repeated ones in other
/// spellings, contradictions, and what is no payment at all.
pub struct Adversary {
    random: ChaCha8Rng,
    sent: VecDeque<Sent>,
    partitions: i32,
    has_twins: bool,
}

impl Adversary {
    /// With twins, one id also stands on several partitions: which of its records wins is a race.
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
                // The same payment by a producer that chooses partitions in another way.
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

    /// In one of the many ways in which the same can be said.
    fn spell(&mut self, sent: &Sent) -> Message {
        let (units, hundredths) = (sent.cents / 100, sent.cents % 100);
        let id = match self.random.random_range(0..4) {
            0 => sent.id.to_string().to_uppercase(),
            // A ULID carries a time: it would be another one than that of the record.
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
        // At a time of its own, as its client says.
        Message { timestamp_ms: None, ..payment.message() }
    }
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_millis()).unwrap()
}

const RUNS: u8 = 0;
const PAUSES: u8 = 1;
const STOPS: u8 = 2;

struct Orders {
    wanted: AtomicU8,
    is_idle: AtomicBool,
}

/// Records that keep coming. Outages of the broker only delay them.
pub struct Flow {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

impl Flow {
    /// Sends `per_tick` records every 20 ms.
    pub fn start(scope: &Scope<'_>, mut adversary: Adversary, per_tick: usize) -> Flow {
        let orders = Arc::new(Orders { wanted: AtomicU8::new(RUNS), is_idle: AtomicBool::new(false) });
        let (shared, topic) = (Arc::clone(&orders), scope.input_topic.clone());
        let mut config = scope.client_config();
        config.set("enable.idempotence", "true");
        let thread = std::thread::spawn(move || {
            let mut producer = client(&config);
            let mut delivered_at = Instant::now();
            loop {
                let waiting = producer.in_flight_count();
                let mut added = 0;
                match shared.wanted.load(Ordering::Acquire) {
                    RUNS => {
                        for _ in 0..per_tick {
                            added += i32::from(send(&producer, &topic, &adversary.next()));
                        }
                        producer.poll(Duration::ZERO);
                    }
                    wanted => {
                        if !shared.is_idle.load(Ordering::Acquire) {
                            if !flush(&producer) {
                                producer = client(&config);
                            }
                            shared.is_idle.store(true, Ordering::Release);
                        }
                        if wanted == STOPS {
                            return;
                        }
                    }
                }
                // A client that lost its broker under load may not get over it. What counts is the log:
                // what did not arrive there is no record, and every check reads the log.
                if producer.in_flight_count() < waiting + added || producer.in_flight_count() == 0 {
                    delivered_at = Instant::now();
                }
                if producer.client().fatal_error().is_some() || delivered_at.elapsed() > DELIVERY_MAX {
                    producer = client(&config);
                    delivered_at = Instant::now();
                }
                std::thread::sleep(TICK);
            }
        });
        Flow { orders, thread: Some(thread) }
    }

    /// Returns when all that was sent has arrived.
    pub fn pause(&self) {
        self.orders.wanted.store(PAUSES, Ordering::Release);
        while !self.orders.is_idle.load(Ordering::Acquire) {
            assert!(!self.thread.as_ref().unwrap().is_finished(), "the load's own thread is gone");
            std::thread::sleep(TICK);
        }
    }

    pub fn resume(&self) {
        self.orders.is_idle.store(false, Ordering::Release);
        self.orders.wanted.store(RUNS, Ordering::Release);
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.orders.wanted.store(STOPS, Ordering::Release);
        if !std::thread::panicking() {
            let _ = self.thread.take().unwrap().join();
        }
    }
}

fn client(config: &ClientConfig) -> BaseProducer {
    config.create().unwrap()
}

/// Whether the client has taken it.
fn send(producer: &BaseProducer, topic: &str, message: &Message) -> bool {
    let mut headers = OwnedHeaders::new();
    for (key, value) in &message.headers {
        headers = headers.insert(Header { key, value: value.as_ref() });
    }
    let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).headers(headers);
    record.key = message.key.as_deref();
    record.payload = message.value.as_deref();
    record.partition = message.partition;
    // Refused, as by a full queue: then it was never sent.
    producer.send(record).is_ok()
}

/// False: the client did not get over what happened to its broker, and never will.
fn flush(producer: &BaseProducer) -> bool {
    let flushed = producer.flush(FLUSH_MAX);
    if let Err(error) = &flushed {
        eprintln!("the load's own client did not deliver the rest, another one goes on: {error}");
    }
    flushed.is_ok()
}
