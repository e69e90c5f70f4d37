//! What every Kafka client of this program has in common.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::error::KafkaError;
use rdkafka::metadata::MetadataTopic;

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

/// Partitions of every topic that can be used: known, and each partition with a leader.
///
/// Asks for all topics, never for one by name: brokers may create a topic that is asked for.
pub fn partition_counts<C: ClientContext>(client: &Client<C>) -> Result<BTreeMap<String, i32>, KafkaError> {
    let metadata = client.fetch_metadata(None, REQUEST_TIMEOUT)?;
    let usable = |topic: &&MetadataTopic| {
        topic.error().is_none() && topic.partitions().iter().all(|partition| partition.leader() >= 0)
    };
    let count = |topic: &MetadataTopic| {
        (topic.name().to_owned(), i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX))
    };
    Ok(metadata.topics().iter().filter(usable).map(count).collect())
}
