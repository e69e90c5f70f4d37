//! What every Kafka client of this program has in common.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::AdminClient;
use rdkafka::client::{Client, ClientContext};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{BaseProducer, Producer, ProducerContext, ThreadedProducer};

use crate::config::KafkaSettings;
use crate::kafka::token;

/// Java's partitioner: a key lands where every other client of the topic puts it.
pub const PARTITIONER: &str = "murmur2_random";

/// How long a request for metadata or to the admin API may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Brokers, name and properties. What is set on top of it wins over `kafka.properties`, which
/// cannot hold what the program must own.
pub fn base_client_config(kafka: &KafkaSettings) -> ClientConfig {
    client_config_over(kafka, &[])
}

/// As [`base_client_config`], over values that `kafka.properties` may change.
///
/// The properties are taken from the settings each time: a `ClientConfig` shows its passwords to nobody, not
/// even to one that is to be made of it (`ClientConfig::config_map` has placeholders in their place).
pub fn client_config_over(kafka: &KafkaSettings, defaults: &[(&str, &str)]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("client.id", "payment-writer")
        // A broker that vanished without a word is noticed also where nothing is sent.
        .set("socket.keepalive.enable", "true")
        // The library waits up to 10 s before it tries a broker again, and it has to be found twice or
        // three times (as a broker, as a coordinator) before records flow again.
        .set("reconnect.backoff.max.ms", "2000")
        // A broker that was fenced for a moment answers that the cluster has no brokers at all. The library then
        // forgets the last one that it knew, and looks for others after five minutes, or never (`kafka::reminder`).
        .set("metadata.recovery.rebootstrap.trigger.ms", "5000");
    for (name, value) in defaults {
        config.set(*name, *value);
    }
    for (name, value) in kafka.properties.iter() {
        config.set(name, value);
    }
    if !kafka.token_command.is_empty() {
        config.set(token::PROPERTY, token::property_of(&kafka.token_command));
    }
    config
        .set("bootstrap.servers", &kafka.bootstrap_servers)
        // A producer would let brokers create what it asks for, unless told otherwise.
        .set("allow.auto.create.topics", "false");
    config
}

/// [`base_client_config`] for a producer: nothing lost, nothing twice, keys where Java puts them.
pub fn producer_config(kafka: &KafkaSettings) -> ClientConfig {
    producer_config_over(kafka, &[])
}

/// As [`producer_config`], over values that `kafka.properties` may change.
pub fn producer_config_over(kafka: &KafkaSettings, defaults: &[(&str, &str)]) -> ClientConfig {
    let mut config = client_config_over(kafka, defaults);
    config.set("partitioner", PARTITIONER).set("enable.idempotence", "true").set("acks", "all");
    config
}

/// A client of whichever kind, with the client of the library that is inside it.
pub trait Clients<C: ClientContext>: FromClientConfigAndContext<C> {
    /// The client inside.
    fn inside(&self) -> &Client<C>;
}

impl<C: ConsumerContext> Clients<C> for BaseConsumer<C> {
    fn inside(&self) -> &Client<C> {
        self.client()
    }
}

impl<C: ProducerContext> Clients<C> for BaseProducer<C> {
    fn inside(&self) -> &Client<C> {
        self.client()
    }
}

impl<C: ProducerContext + 'static> Clients<C> for ThreadedProducer<C> {
    fn inside(&self) -> &Client<C> {
        self.client()
    }
}

impl<C: ClientContext> Clients<C> for AdminClient<C> {
    fn inside(&self) -> &Client<C> {
        self.inner()
    }
}

/// Makes a client: the one way in which this program makes any. Where tokens are used, it has its first one, and its
/// context gets it the next ones.
///
/// # Errors
/// When the library refuses the configuration.
#[expect(clippy::disallowed_methods, reason = "nowhere else")]
pub fn make_client<T: Clients<C>, C: ClientContext>(
    config: &ClientConfig,
    context: C,
) -> Result<T, KafkaError> {
    const { assert!(C::ENABLE_REFRESH_OAUTH_TOKEN, "its first token would be its last") };
    let made = T::from_config_and_context(config, context)?;
    token::authorize(config, made.inside());
    Ok(made)
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Settings;
    use crate::daemon::consumer_config;
    use crate::kafka::log::lane_reader_config;
    use crate::kafka::transactions::transactional_config;

    #[test]
    fn every_client_gets_the_passwords_of_the_settings_and_what_they_change() {
        let variables = [
            ("PAYMENT_WRITER__KAFKA__INSTANCE_ID", "test"),
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_PASSWORD", "sesame"),
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__FETCH_MIN_BYTES", "7"),
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__LINGER_MS", "8"),
        ];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        let loaded = Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap();
        let kafka = loaded.settings.kafka;
        let consumer = consumer_config(&kafka);
        let producer = transactional_config(&kafka, 0);
        let reader = lane_reader_config(&kafka);
        for config in [&consumer, &reader, &producer] {
            assert_eq!(config.get("sasl.password"), Some("sesame"));
        }
        for config in [&consumer, &reader] {
            assert_eq!(config.get("fetch.min.bytes"), Some("7"));
        }
        // A reader is in no group, and checks what it reads.
        assert_eq!((reader.get("group.id"), reader.get("check.crcs")), (None, Some("true")));
        assert_eq!(producer.get("linger.ms"), Some("8"));
        assert!(producer.get("transactional.id").is_some_and(|id| id.starts_with("payment-writer-test-0-")));
    }
}
