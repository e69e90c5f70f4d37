//! Records as real producers write them: compressed, many of them in transactions, some of which are aborted
//! and sent again.

use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;
use xxhash_rust::xxh3::Xxh3;

use super::flow::TransactionWriter;
use super::kafka::{Deliveries, send};
use super::{Message, Scope};

pub const COMPRESSIONS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];
/// Records in the largest transaction.
pub const TRANSACTION_MAX: usize = 2_000;
const SMALL_TRANSACTION_MAX: usize = 100;
/// One transaction in so many is aborted, and its records are sent again in the next one.
pub const ABORTED_ONE_IN: u32 = 10;
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of one client call during outages, and of all calls of one transaction together.
const CALL_MAX: Duration = Duration::from_secs(5);
const WRITE_MAX: Duration = Duration::from_secs(20);
/// After this time the broker aborts a transaction of a client that does not come back.
const ABANDONED_MS: &str = "5000";

/// A producer that writes its records in transactions.
pub struct Transactional {
    producer: BaseProducer<Deliveries>,
    topic: String,
}

impl Transactional {
    /// Initialises `transactional_id`, which aborts an open transaction of an earlier producer.
    pub fn new(scope: &Scope<'_>, transactional_id: &str, compression: &str) -> Transactional {
        let producer: BaseProducer<Deliveries> = scope
            .client_config()
            .set("transactional.id", transactional_id)
            .set("compression.type", compression)
            .create_with_context(Deliveries::default())
            .unwrap();
        retried(|| producer.init_transactions(TRANSACTION_TIMEOUT)).unwrap();
        Transactional { producer, topic: scope.input_topic.clone() }
    }

    /// Writes records in one committed transaction; returns partition and offset of each.
    pub fn commit(&self, messages: &[Message]) -> Vec<(i32, i64)> {
        loop {
            self.producer.begin_transaction().unwrap();
            let places = send(&self.producer, &self.topic, messages.iter().cloned());
            match retried(|| self.producer.commit_transaction(TRANSACTION_TIMEOUT)) {
                Ok(()) => return places,
                // A broker that was paused may have aborted a transaction that was open for too long.
                Err(KafkaError::Transaction(error)) if error.txn_requires_abort() => {
                    eprintln!("a test's transaction was aborted, writing it again: {error}");
                    retried(|| self.producer.abort_transaction(TRANSACTION_TIMEOUT)).unwrap();
                }
                Err(error) => panic!("committing a transaction: {error}"),
            }
        }
    }

    /// Writes records in one aborted transaction: they are in the log, and invisible to read_committed
    /// consumers.
    pub fn abort(&self, messages: &[Message]) {
        self.producer.begin_transaction().unwrap();
        send(&self.producer, &self.topic, messages.iter().cloned());
        retried(|| self.producer.abort_transaction(TRANSACTION_TIMEOUT)).unwrap();
    }
}

/// A librdkafka producer of transactions that is recreated if it does not recover from an outage.
pub struct LibrdkafkaWriter {
    config: ClientConfig,
    topic: String,
    producer: Option<BaseProducer>,
}

impl LibrdkafkaWriter {
    pub fn new(scope: &Scope<'_>, compression: &str) -> LibrdkafkaWriter {
        let mut config = scope.client_config();
        config
            .set("transactional.id", format!("{}_flow", scope.input_topic))
            .set("transaction.timeout.ms", ABANDONED_MS)
            .set("message.timeout.ms", ABANDONED_MS)
            .set("compression.type", compression);
        LibrdkafkaWriter { config, topic: scope.input_topic.clone(), producer: None }
    }

    fn connect(&mut self) -> Result<BaseProducer, KafkaError> {
        match self.producer.take() {
            Some(producer) => Ok(producer),
            None => {
                let producer: BaseProducer = self.config.create()?;
                retried(|| producer.init_transactions(CALL_MAX))?;
                Ok(producer)
            }
        }
    }
}

impl TransactionWriter for LibrdkafkaWriter {
    fn write(&mut self, records: &[Message], is_committed: bool) -> Result<(), String> {
        let producer = self.connect().map_err(|error| format!("starting a producer: {error}"))?;
        let written = write_transaction(&producer, &self.topic, records, is_committed);
        let is_usable = match &written {
            Ok(()) => true,
            Err(KafkaError::Transaction(error)) if error.is_fatal() => false,
            Err(_) => retried(|| producer.abort_transaction(CALL_MAX)).is_ok(),
        };
        self.producer = is_usable.then_some(producer);
        written.map_err(|error| error.to_string())
    }
}

fn write_transaction(
    producer: &BaseProducer,
    topic: &str,
    records: &[Message],
    is_committed: bool,
) -> Result<(), KafkaError> {
    let began = Instant::now();
    producer.begin_transaction()?;
    for message in records {
        let mut record = record_of(topic, message);
        loop {
            match producer.send(record) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), same))
                    if began.elapsed() < WRITE_MAX =>
                {
                    record = same;
                    producer.poll(Duration::from_millis(10));
                }
                Err((error, _)) => return Err(error),
            }
        }
    }
    // Before an abort, too: messages still in the queue would be purged, and never reach the log.
    producer.flush(WRITE_MAX)?;
    if is_committed {
        retried(|| producer.commit_transaction(CALL_MAX))
    } else {
        retried(|| producer.abort_transaction(CALL_MAX))
    }
}

/// Retries calls that fail with a retriable error.
fn retried(call: impl Fn() -> Result<(), KafkaError>) -> Result<(), KafkaError> {
    let began = Instant::now();
    loop {
        match call() {
            Err(KafkaError::Transaction(error)) if error.is_retriable() && began.elapsed() < WRITE_MAX => {}
            answer => return answer,
        }
    }
}

/// A message as the client accepts it.
pub(super) fn record_of<'m>(topic: &'m str, message: &'m Message) -> BaseRecord<'m, [u8], [u8]> {
    let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic);
    record.key = message.key.as_deref();
    record.payload = message.value.as_deref();
    record.partition = message.partition;
    record.timestamp = message.timestamp_ms;
    if !message.headers.is_empty() {
        let headers = OwnedHeaders::new_with_capacity(message.headers.len());
        let insert = |headers: OwnedHeaders, (key, value): &(String, Option<Vec<u8>>)| {
            headers.insert(Header { key, value: value.as_ref() })
        };
        record.headers = Some(message.headers.iter().fold(headers, insert));
    }
    record
}

/// A number from 1 to `max`: nine of ten are small ones, and logarithms are evenly distributed.
pub fn transaction_size(random: &mut ChaCha8Rng, max: usize) -> usize {
    let max = if random.random_ratio(9, 10) { max.min(SMALL_TRANSACTION_MAX) } else { max };
    let exponent = random.random_range(0.0..(max as f64).log2().max(f64::MIN_POSITIVE));
    (exponent.exp2() as usize).clamp(1, max)
}

impl Scope<'_> {
    /// Sends records to the input topic as real producers do, and waits for all of them: compressed, at least
    /// half of them in transactions, including the last ones; some transactions are aborted and sent again.
    /// The choice depends on the records. Returns partition and offset of each committed record.
    pub fn feed(&self, messages: impl IntoIterator<Item = Message>) -> Vec<(i32, i64)> {
        let messages: Vec<Message> = messages.into_iter().collect();
        let mut random = ChaCha8Rng::seed_from_u64(digest(&messages));
        let mut compression = || COMPRESSIONS[random.random_range(0..COMPRESSIONS.len())];
        let (plain_compression, compression) = (compression(), compression());
        let transactional =
            Transactional::new(self, &format!("{}_test_producer", self.input_topic), compression);
        let plain: BaseProducer<Deliveries> = self
            .client_config()
            .set("enable.idempotence", "true")
            .set("compression.type", plain_compression)
            .create_with_context(Deliveries::default())
            .unwrap();
        let (mut in_transactions, mut in_none) = (0, 0);
        let (mut places, mut rest) = (Vec::new(), &messages[..]);
        while !rest.is_empty() {
            let size = transaction_size(&mut random, TRANSACTION_MAX.min(rest.len()));
            let (now, later) = rest.split_at(size);
            let may_be_plain = in_none + size <= in_transactions && !later.is_empty();
            if may_be_plain && random.random_ratio(2, 3) {
                in_none += size;
                places.extend(send(&plain, &self.input_topic, now.iter().cloned()));
            } else {
                in_transactions += size;
                // Each abort is followed by a commit: aborting before one in nine commits makes it one in ten
                // transactions.
                if random.random_ratio(1, ABORTED_ONE_IN - 1) {
                    transactional.abort(now);
                }
                places.extend(transactional.commit(now));
            }
            rest = later;
        }
        self.await_input_markers();
        places
    }
}

fn digest(messages: &[Message]) -> u64 {
    let mut hasher = Xxh3::new();
    for message in messages {
        hasher.update(message.key.as_deref().unwrap_or_default());
        hasher.update(message.value.as_deref().unwrap_or_default());
    }
    hasher.digest()
}
