//! Records as real producers write them: compressed, many of them in transactions, of which some are aborted and
//! sent again.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdkafka::producer::{BaseProducer, Producer};
use xxhash_rust::xxh3::Xxh3;

use super::kafka::{Deliveries, send};
use super::{Message, Scope};

pub const COMPRESSIONS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];
/// Records of the largest transaction.
pub const TRANSACTION_MAX: usize = 2_000;
/// One transaction in so many is aborted, and its records are sent again in the next one.
pub const ABORTED_ONE_IN: u32 = 10;
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);

/// A producer that writes its records in transactions.
pub struct Transactional {
    producer: BaseProducer<Deliveries>,
    topic: String,
}

impl Transactional {
    /// Takes over `transactional_id`, which aborts what another one left open.
    pub fn new(scope: &Scope<'_>, transactional_id: &str, compression: &str) -> Transactional {
        let producer: BaseProducer<Deliveries> = scope
            .client_config()
            .set("transactional.id", transactional_id)
            .set("compression.type", compression)
            .create_with_context(Deliveries::default())
            .unwrap();
        producer.init_transactions(TRANSACTION_TIMEOUT).unwrap();
        Transactional { producer, topic: scope.input_topic.clone() }
    }

    /// Writes records in one transaction that is committed; returns partition and offset of each.
    pub fn commit(&self, messages: &[Message]) -> Vec<(i32, i64)> {
        self.producer.begin_transaction().unwrap();
        let places = send(&self.producer, &self.topic, messages.iter().cloned());
        self.producer.commit_transaction(TRANSACTION_TIMEOUT).unwrap();
        places
    }

    /// Writes records in one transaction that is aborted: they stand in the log, and no reader may see them.
    pub fn abort(&self, messages: &[Message]) {
        self.producer.begin_transaction().unwrap();
        send(&self.producer, &self.topic, messages.iter().cloned());
        self.producer.abort_transaction(TRANSACTION_TIMEOUT).unwrap();
    }
}

/// A number from 1 to `max`; its logarithm is evenly distributed.
pub fn transaction_size(random: &mut ChaCha8Rng, max: usize) -> usize {
    let exponent = random.random_range(0.0..(max as f64).log2().max(f64::MIN_POSITIVE));
    (exponent.exp2() as usize).clamp(1, max)
}

impl Scope<'_> {
    /// Sends records to the input topic as real producers do, and waits for all of them: compressed, at least half
    /// of them in transactions, the last ones among these, some of which are aborted and sent again. The records
    /// decide which. Returns partition and offset of each that is committed.
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
                // Each abort comes before a commit: one in nine commits makes it one in ten transactions.
                if random.random_ratio(1, ABORTED_ONE_IN - 1) {
                    transactional.abort(now);
                }
                places.extend(transactional.commit(now));
            }
            rest = later;
        }
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
