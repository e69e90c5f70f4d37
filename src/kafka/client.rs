//! Settings that every Kafka client of this program shares, and the one function that creates clients.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::AdminClient;
use rdkafka::client::{Client, ClientContext};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::metadata::MetadataTopic;

use crate::config::{KafkaSettings, TOKEN_PROPERTY};
use crate::kafka::librdkafka::ProducerClient;
use crate::kafka::token;
use crate::secrets::Blocking;
use crate::telemetry::logging::RateLimited;

/// The partitioner of the Java client, so that a key goes to the same partition whoever produces it.
pub const PARTITIONER: &str = "murmur2_random";

/// Timeout of a metadata or admin request that a command makes once.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of creating a client, which may wait 20 s for a token, and of its first request.
pub const CLIENT_MAX: Duration = Duration::from_secs(30);
/// Timeout of one attempt of a request that is made again if it fails.
pub(super) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Name of all clients in brokers' logs and for quotas, unless `kafka.properties` has another `client.id`.
pub const CLIENT_ID: &str = "payment-writer";

/// Brokers, client id and `kafka.properties`. Callers set the properties that exactly-once depends on
/// afterwards; the settings reject these in `kafka.properties`.
pub fn base_client_config(kafka: &KafkaSettings) -> ClientConfig {
    client_config_over(kafka, &[])
}

/// As [`base_client_config`], with defaults that `kafka.properties` may override.
///
/// Takes the properties from the settings each time, because passwords cannot be copied from one
/// `ClientConfig` to another: `ClientConfig::config_map` replaces them by placeholders.
pub fn client_config_over(kafka: &KafkaSettings, defaults: &[(&str, &str)]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("client.id", CLIENT_ID)
        // Detects a broker that vanished without closing its connection, also while nothing is sent.
        .set("socket.keepalive.enable", "true")
        // The default is 10 s, and a reconnect may be needed two or three times (as a broker, as a
        // coordinator) before records flow again.
        .set("reconnect.backoff.max.ms", "2000")
        // A broker that was fenced for a moment answers that the cluster has no brokers. librdkafka then
        // forgets its last one, and bootstraps again after five minutes by default, or never
        // (`kafka::rebootstrap`).
        .set("metadata.recovery.rebootstrap.trigger.ms", "5000");
    for (name, value) in defaults {
        config.set(*name, *value);
    }
    for (name, value) in kafka.properties.iter() {
        config.set(name, value);
    }
    match kafka.password() {
        Ok(Some(password)) => drop(config.set("sasl.password", password)),
        Ok(None) => {}
        // Without a password the client cannot be created.
        Err(error) => {
            static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(error, suppressed, "the password file cannot be used");
            }
        }
    }
    if !kafka.token_command.is_empty() {
        config.set(TOKEN_PROPERTY, token::property_of(&kafka.token_command));
    }
    config
        .set("bootstrap.servers", &kafka.bootstrap_servers)
        // The default of a producer is true.
        .set("allow.auto.create.topics", "false");
    config
}

/// [`base_client_config`] for a producer: idempotent, `acks=all`, Java's partitioner.
pub fn producer_config(kafka: &KafkaSettings) -> ClientConfig {
    producer_config_over(kafka, &[])
}

/// As [`producer_config`], with defaults that `kafka.properties` may override.
pub fn producer_config_over(kafka: &KafkaSettings, defaults: &[(&str, &str)]) -> ClientConfig {
    let mut config = client_config_over(kafka, defaults);
    config.set("partitioner", PARTITIONER).set("enable.idempotence", "true").set("acks", "all");
    config
}

/// A consumer, producer or admin client that [`make_client`] can create.
pub trait Clients<C: ClientContext>: FromClientConfigAndContext<C> {
    /// The underlying client of rdkafka.
    fn inside(&self) -> &Client<C>;
}

impl<C: ConsumerContext> Clients<C> for BaseConsumer<C> {
    fn inside(&self) -> &Client<C> {
        self.client()
    }
}

/// The crate's own producers are not made here: they report messages as delivered that no broker confirmed.
impl<C: ClientContext> Clients<C> for ProducerClient<C> {
    fn inside(&self) -> &Client<C> {
        self.client()
    }
}

impl<C: ClientContext> Clients<C> for AdminClient<C> {
    fn inside(&self) -> &Client<C> {
        self.inner()
    }
}

/// Runs a call that creates clients or their settings on another thread: it reads certificates and passwords, and may wait
/// for a token.
///
/// # Errors
/// When it does not return in time.
pub async fn creating<T: Send + 'static>(
    limit: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    static CREATING: LazyLock<Blocking> = LazyLock::new(Blocking::new);
    CREATING.within(limit, call).await
}

/// Creates a client. All clients of this program are created here, so that with SASL OAUTHBEARER each has its
/// first token; its context provides the next ones.
///
/// # Errors
/// When librdkafka rejects the configuration.
#[expect(clippy::disallowed_methods, reason = "nowhere else")]
pub fn make_client<T: Clients<C>, C: ClientContext>(
    config: &ClientConfig,
    context: C,
) -> Result<T, KafkaError> {
    const { assert!(C::ENABLE_REFRESH_OAUTH_TOKEN, "the client could not renew its first token") };
    let made = T::from_config_and_context(config, context)?;
    token::authorize(config, made.inside());
    Ok(made)
}

/// Partition count of every usable topic: one without an error, whose partitions all have a leader.
///
/// Requests all topics, because brokers may create a topic that is requested by name.
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
    use crate::kafka::group::member_config;
    use crate::kafka::lane_client::lane_reader_config;
    use crate::kafka::publisher_settings::transactional_config;

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
        let consumer = member_config(&kafka);
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
