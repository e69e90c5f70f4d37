//! What every Kafka client of this program has in common.

use std::time::Duration;

use rdkafka::ClientConfig;

use crate::config::KafkaSettings;

/// Java's partitioner: a key lands where every other client of the topic puts it.
pub const PARTITIONER: &str = "murmur2_random";

/// How long a request for metadata or to the admin API may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Brokers, name and properties. What is set on top of it wins over `kafka.properties`, which
/// cannot hold what the program must own.
pub fn base_client_config(kafka: &KafkaSettings) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("client.id", "payment-writer");
    for (name, value) in kafka.properties.iter() {
        config.set(name, value);
    }
    config.set("bootstrap.servers", &kafka.bootstrap_servers);
    config
}

/// [`base_client_config`] for a producer: nothing lost, nothing twice, keys where Java puts them.
pub fn producer_config(kafka: &KafkaSettings) -> ClientConfig {
    let mut config = base_client_config(kafka);
    config.set("partitioner", PARTITIONER).set("enable.idempotence", "true").set("acks", "all");
    config
}
