//! Settings of a lane's publisher: producer configuration, `transactional.id`, topics and time limit.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use xxhash_rust::xxh3::xxh3_64;

use super::client::producer_config_over;
use super::throttle::STATISTICS_INTERVAL;
use crate::config::KafkaSettings;
use crate::domain::cursor::Identity;

/// Time limit of a transaction, whatever `transaction.timeout.ms` is.
const DEADLINE_MAX: Duration = Duration::from_secs(12);
/// Defaults of a lane's producer that `kafka.properties` may override.
const PRODUCER_DEFAULTS: [(&str, &str); 10] = [
    STATISTICS_INTERVAL,
    ("transaction.timeout.ms", "15000"),
    ("linger.ms", "20"),
    ("batch.size", "900000"),
    ("batch.num.messages", "20000"),
    ("queue.buffering.max.messages", "200000"),
    ("queue.buffering.max.kbytes", "65536"),
    ("message.max.bytes", "4000000"),
    ("retry.backoff.ms", "5"),
    // The default starts at `retry.backoff.ms`.
    ("topic.metadata.refresh.fast.interval.ms", "20"),
];

/// Configuration of a lane's producer.
pub fn transactional_config(kafka: &KafkaSettings, lane: usize) -> ClientConfig {
    let mut config = producer_config_over(kafka, &PRODUCER_DEFAULTS);
    config
        .set("transactional.id", transactional_id(&kafka.group_id, &kafka.instance_id, lane))
        .set("delivery.report.only.error", "true");
    config
}

/// Settings of a lane's publisher, fixed at start.
#[derive(Clone)]
pub struct PublisherSettings {
    /// Configuration of the producer, with its `transactional.id`.
    pub client: ClientConfig,
    /// Time limit of a transaction. It is shorter than `transaction.timeout.ms`, after which the broker would
    /// abort the transaction and fence the producer.
    pub deadline: Duration,
    /// Topics; if `publish` is false, only offsets are committed, and the output topics need not exist.
    pub kafka: Arc<KafkaSettings>,
    /// Topic and database, for commit metadata and `source` headers.
    pub identity: Identity,
}

/// The `transactional.id` of a lane, or of `doctor`, the same after a restart. It starts with group, instance and lane, so
/// that ACLs can be granted by prefix. The hash at its end distinguishes group `payments` with instance
/// `eu-0` from `payments-eu` with `0`.
pub fn transactional_id(group: &str, instance: &str, lane: impl Display) -> String {
    // Neither name can contain a NUL.
    let hash = xxh3_64(format!("{group}\0{instance}").as_bytes()) >> 32;
    format!("{group}-{instance}-{lane}-{hash:08x}")
}

impl PublisherSettings {
    /// The settings of a lane's publisher.
    pub fn of(kafka: &KafkaSettings, identity: &Identity, lane: usize) -> Self {
        let client = transactional_config(kafka, lane);
        let timeout = client.get("transaction.timeout.ms").and_then(|ms| ms.parse().ok());
        let deadline = timeout.map_or(DEADLINE_MAX, |ms| Duration::from_millis(ms) * 4 / 5).min(DEADLINE_MAX);
        Self { client, deadline, kafka: Arc::new(kafka.clone()), identity: identity.clone() }
    }

    /// Output topics in the order of `OutputTopic::ALL`.
    pub fn outputs(&self) -> [&str; 3] {
        [&self.kafka.read_topic, &self.kafka.email_topic, &self.kafka.dead_letter_topic]
    }
}
