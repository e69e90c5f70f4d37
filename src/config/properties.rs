//! `kafka.properties`: passed to librdkafka unchanged, except for properties that the daemon must control.

use std::collections::BTreeMap;
use std::fmt;

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaConfRes;
use serde_json::Value;

/// The only table whose names are not settings.
pub(super) const PROPERTIES: &str = "kafka.properties";
/// Shown instead of a secret.
pub(super) const HIDDEN: &str = "***";

/// Property that carries the token command in a client's configuration: librdkafka leaves its meaning to the
/// application.
pub const TOKEN_PROPERTY: &str = "sasl.oauthbearer.config";

/// Properties that exactly-once depends on, or that have their own setting, with the reason for rejecting
/// them.
const OWNED: [(&str, &str); 28] = [
    ("bootstrap.servers", "set kafka.bootstrap_servers instead"),
    ("metadata.broker.list", "set kafka.bootstrap_servers instead"),
    ("group.id", "set kafka.group_id instead"),
    ("group.instance.id", "it is derived from kafka.instance_id"),
    ("transactional.id", "it is derived from kafka.group_id and kafka.instance_id"),
    ("group.protocol", "the daemon needs the classic group protocol"),
    ("group.remote.assignor", "the daemon needs the classic group protocol"),
    ("group.protocol.type", "the daemon needs the classic group protocol"),
    ("partition.assignment.strategy", "the daemon needs cooperative-sticky"),
    ("enable.auto.commit", "offsets move only inside transactions"),
    ("auto.commit.enable", "offsets move only inside transactions"),
    ("auto.commit.interval.ms", "offsets move only inside transactions"),
    ("enable.auto.offset.store", "offsets move only inside transactions"),
    ("offset.store.method", "offsets move only inside transactions"),
    ("offset.store.path", "offsets move only inside transactions"),
    ("auto.offset.reset", "no record may be skipped silently"),
    ("isolation.level", "the input is read with read_committed"),
    ("check.crcs", "checksums are always checked, so that damaged records are not processed"),
    ("enable.partition.eof", "the daemon needs to know where a partition ends"),
    ("enable.idempotence", "output must be in order and without duplicates"),
    ("enable.gapless.guarantee", "output must be in order and without duplicates"),
    ("acks", "all in-sync replicas must acknowledge the output"),
    ("request.required.acks", "all in-sync replicas must acknowledge the output"),
    ("max.in.flight", "output must be in order and without duplicates"),
    ("max.in.flight.requests.per.connection", "output must be in order and without duplicates"),
    ("partitioner", "keys must be partitioned like the Java client's: murmur2_random"),
    ("queuing.strategy", "output must be in order and without duplicates"),
    ("allow.auto.create.topics", "topics are created by `payment-writer topics create`"),
];

/// Values that librdkafka supports only if it was built with an optional library: property and value in
/// capitals, Cargo feature, and whether this binary has it.
const OPTIONAL: [((&str, &str), &str, bool); 3] = [
    (("sasl.mechanism", "GSSAPI"), "gssapi", cfg!(feature = "gssapi")),
    (("sasl.mechanisms", "GSSAPI"), "gssapi", cfg!(feature = "gssapi")),
    (("sasl.oauthbearer.method", "OIDC"), "curl", cfg!(feature = "curl")),
];

/// The full name of a librdkafka property.
pub(super) fn property_key(name: &str) -> String {
    format!("{PROPERTIES}.\"{name}\"")
}

/// Whether a librdkafka property names a file or a folder.
pub(super) fn is_file(property: &str) -> bool {
    property.ends_with(".location") || property.ends_with(".file")
}

/// Whether the value of a librdkafka property is secret.
pub fn is_secret(property: &str) -> bool {
    if is_file(property) {
        return false;
    }
    ["password", "passphrase", "secret", "private.key", "key.pem"].iter().any(|word| property.contains(word))
        || property == "sasl.oauthbearer.config"
}

/// librdkafka properties, validated by librdkafka.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct KafkaProperties(BTreeMap<String, String>);

impl KafkaProperties {
    /// Names and values, including secrets: only for the client's configuration.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Value of a property, if set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A copy with these properties overridden, for a client with limits of its own.
    pub(crate) fn overridden(&self, properties: &[(&str, &str)]) -> Self {
        let mut all = self.0.clone();
        all.extend(properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Self(all)
    }

    /// Adds a property, or says what is wrong with it, without the value if [`is_secret`].
    pub(super) fn add(&mut self, name: &str, value: &Value) -> Result<(), String> {
        let value = match value {
            Value::String(text) => text.clone(),
            Value::Bool(_) => value.to_string(),
            Value::Number(number) if number.is_i64() => value.to_string(),
            _ => return Err("must be a text, a whole number, true or false".to_owned()),
        };
        if let Some((_, reason)) = OWNED.iter().find(|(owned, _)| *owned == name) {
            return Err(format!("cannot be set: {reason}"));
        }
        let capitals = value.to_ascii_uppercase();
        let setting = (name, capitals.as_str());
        if let Some((_, feature, false)) = OPTIONAL.iter().find(|(optional, ..)| *optional == setting) {
            return Err(format!(
                "needs a binary that was built with the Cargo feature `{feature}`, and this one was not"
            ));
        }
        match ClientConfig::new().set(name, &value).create_native_config() {
            Ok(_) => {
                self.0.insert(name.to_owned(), value);
                Ok(())
            }
            Err(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)) => {
                let similarity = |known: &str| strsim::jaro_winkler(known, name);
                let nearest = COMMON
                    .into_iter()
                    .max_by(|a, b| similarity(a).total_cmp(&similarity(b)))
                    .unwrap_or_default();
                Err(format!("is unknown to librdkafka; the nearest known one is {}", property_key(nearest)))
            }
            Err(KafkaError::ClientConfig(_, reason, ..)) if !is_secret(name) => {
                Err(format!("is refused by librdkafka: {reason}"))
            }
            Err(_) => Err("is refused by librdkafka".to_owned()),
        }
    }
}

impl fmt::Debug for KafkaProperties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.iter().map(|(n, v)| (n, if is_secret(n) { HIDDEN } else { v.as_str() }));
        f.debug_map().entries(shown).finish()
    }
}

/// Properties suggested for a misspelled name.
const COMMON: [&str; 48] = [
    "broker.address.family",
    "broker.address.ttl",
    "client.id",
    "client.rack",
    "compression.codec",
    "compression.type",
    "connections.max.idle.ms",
    "debug",
    "delivery.timeout.ms",
    "fetch.max.bytes",
    "fetch.min.bytes",
    "fetch.queue.backoff.ms",
    "fetch.wait.max.ms",
    "heartbeat.interval.ms",
    "linger.ms",
    "log_level",
    "max.partition.fetch.bytes",
    "max.poll.interval.ms",
    "message.max.bytes",
    "message.timeout.ms",
    "metadata.max.age.ms",
    "metadata.recovery.rebootstrap.trigger.ms",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "queued.max.messages.kbytes",
    "queued.min.messages",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "retry.backoff.ms",
    "sasl.kerberos.service.name",
    "sasl.mechanism",
    "sasl.oauthbearer.client.id",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.method",
    "sasl.oauthbearer.token.endpoint.url",
    "sasl.password",
    "sasl.username",
    "security.protocol",
    "session.timeout.ms",
    "socket.keepalive.enable",
    "socket.timeout.ms",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.endpoint.identification.algorithm",
    "ssl.key.location",
    "ssl.key.password",
    "statistics.interval.ms",
    "transaction.timeout.ms",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_property_whose_value_grants_access_is_secret() {
        for name in [
            "sasl.password",
            "ssl.key.password",
            "ssl.keystore.password",
            "ssl.key.pem",
            "sasl.oauthbearer.client.secret",
            "sasl.oauthbearer.assertion.private.key.pem",
            "sasl.oauthbearer.assertion.private.key.passphrase",
            "sasl.oauthbearer.config",
        ] {
            assert!(is_secret(name), "{name}");
        }
        for name in
            ["sasl.username", "ssl.ca.location", "ssl.key.location", "ssl.ca.pem", "ssl.keystore.location"]
        {
            assert!(!is_secret(name), "{name}");
        }
    }

    #[test]
    fn what_this_binary_was_not_built_with_is_refused_by_the_name_of_the_feature() {
        for (property, value, feature, is_built_in) in [
            ("sasl.mechanism", "GSSAPI", "gssapi", cfg!(feature = "gssapi")),
            ("sasl.mechanisms", "GSSAPI", "gssapi", cfg!(feature = "gssapi")),
            ("sasl.oauthbearer.method", "oidc", "curl", cfg!(feature = "curl")),
        ] {
            let added = KafkaProperties::default().add(property, &value.into());
            match added {
                Err(rule) => {
                    assert!(!is_built_in && rule.contains(&format!("`{feature}`")), "{rule}")
                }
                _ => assert!(is_built_in, "{property} was taken"),
            }
        }
        for mechanism in ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] {
            assert!(
                KafkaProperties::default().add("sasl.mechanism", &mechanism.into()).is_ok(),
                "{mechanism}"
            );
        }
    }

    #[test]
    fn common_properties_are_ones_that_librdkafka_knows_and_the_daemon_does_not_own() {
        let native = ClientConfig::new().create_native_config().unwrap();
        for name in COMMON {
            assert!(!OWNED.iter().any(|(owned, _)| *owned == name), "{name}");
            if !name.starts_with("ssl.key") && !name.starts_with("sasl.oauth") {
                // A property without a default has no value to get, but is known.
                let known = ClientConfig::new().set(name, "no such value").create_native_config();
                let unknown =
                    matches!(known, Err(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)));
                assert!(!unknown || native.get(name).is_ok(), "{name}");
            }
        }
    }
}
