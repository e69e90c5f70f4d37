//! Every setting there is: name, default, and whether its value is a secret.

use config::{Map, Value, ValueKind};

/// What a setting is when nobody sets it.
#[derive(Clone, Copy)]
pub(super) enum Fallback {
    Text(&'static str),
    Integer(i64),
    Number(f64),
    Boolean(bool),
    Texts(&'static [&'static str]),
    Integers(&'static [i64]),
    /// The name of this host.
    HostName,
    /// Whatever that other setting is.
    SameAs(&'static str),
    /// A table of free names, empty.
    Table,
}

/// One setting.
pub(super) struct Spec {
    /// Dotted name.
    pub(super) key: &'static str,
    pub(super) fallback: Fallback,
    pub(super) secret: bool,
}

const fn plain(key: &'static str, fallback: Fallback) -> Spec {
    Spec { key, fallback, secret: false }
}

const fn secret(key: &'static str, fallback: Fallback) -> Spec {
    Spec { key, fallback, secret: true }
}

/// The one table whose names are not settings of ours.
pub(super) const PROPERTIES: &str = "kafka.properties";

/// All settings, in the order in which they are shown.
pub(super) const SETTINGS: [Spec; 29] = [
    plain("kafka.bootstrap_servers", Fallback::Text("127.0.0.1:9092")),
    plain("kafka.group_id", Fallback::Text("payment-writer")),
    plain("kafka.instance_id", Fallback::HostName),
    plain("kafka.input_topic", Fallback::Text("payment_writer_topic")),
    plain("kafka.read_topic", Fallback::Text("payment_read_topic")),
    plain("kafka.email_topic", Fallback::Text("payment_email")),
    plain("kafka.dead_letter_topic", Fallback::Text("payment_writer_topic.dlq")),
    plain("kafka.publish", Fallback::Boolean(true)),
    plain("kafka.token_command", Fallback::Texts(&[])),
    plain(PROPERTIES, Fallback::Table),
    secret("postgres.url", Fallback::Text("postgresql://payment_writer@127.0.0.1:5432/payment_writer")),
    secret("postgres.housekeeping_url", Fallback::SameAs("postgres.url")),
    plain("lanes", Fallback::Integer(2)),
    plain("batch.max_payments", Fallback::Integer(20_000)),
    plain("batch.max_bytes", Fallback::Text("16MiB")),
    plain("batch.linger", Fallback::Text("25ms")),
    plain("payment.types", Fallback::Texts(&["BWI", "VSA", "MSC"])),
    plain("payment.max_bytes", Fallback::Text("16KiB")),
    plain("email.statuses", Fallback::Integers(&[2])),
    plain("idempotency.window", Fallback::Text("7d")),
    plain("idempotency.prune_schedule", Fallback::Text("0 3 * * 0")),
    plain("audit.share", Fallback::Number(0.001)),
    plain("retention.payment_months", Fallback::Integer(0)),
    plain("admin.listen", Fallback::Text("127.0.0.1:9464")),
    plain("shutdown.timeout", Fallback::Text("30s")),
    plain("log.format", Fallback::Text("text")),
    plain("log.level", Fallback::Text("info")),
    plain("tracing.otlp_endpoint", Fallback::Text("")),
    plain("tracing.sample_ratio", Fallback::Number(0.01)),
];

/// The setting of that name.
pub(super) fn find(key: &str) -> Option<&'static Spec> {
    SETTINGS.iter().find(|spec| spec.key == key)
}

/// Whether settings live under that name.
pub(super) fn is_section(name: &str) -> bool {
    SETTINGS.iter().any(|spec| spec.key.split_once('.').is_some_and(|(section, _)| section == name))
}

/// The known setting most like `key`. A right name in the wrong section counts for nearly as much
/// as a misspelt one.
pub(super) fn nearest(key: &str) -> &'static str {
    let last = |key: &'static str| key.rsplit('.').next().unwrap_or(key);
    let wanted_last = key.rsplit('.').next().unwrap_or(key);
    let likeness = |known: &'static str| {
        let whole = strsim::jaro_winkler(known, key);
        let name = strsim::jaro_winkler(last(known), wanted_last) - 0.05;
        whole.max(name)
    };
    SETTINGS
        .iter()
        .map(|spec| spec.key)
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .unwrap_or("kafka.bootstrap_servers")
}

/// The lowest layer: every default, as the `config` crate wants it.
pub(super) fn defaults() -> Map<String, Value> {
    let mut root = Map::new();
    for spec in &SETTINGS {
        let kind = match spec.fallback {
            Fallback::Text(text) => ValueKind::from(text),
            Fallback::Integer(number) => ValueKind::from(number),
            Fallback::Number(number) => ValueKind::from(number),
            Fallback::Boolean(value) => ValueKind::from(value),
            Fallback::Texts(texts) => ValueKind::from(texts.to_vec()),
            Fallback::Integers(numbers) => ValueKind::from(numbers.to_vec()),
            Fallback::HostName => ValueKind::from(host_name()),
            Fallback::Table => ValueKind::Table(Map::new()),
            Fallback::SameAs(_) => continue,
        };
        super::tree::insert(&mut root, spec.key, Value::new(None, kind));
    }
    root
}

fn host_name() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_setting_is_the_one_that_was_meant() {
        for (written, meant) in [
            ("kafka.groupid", "kafka.group_id"),
            ("kafka.bootstrap.servers", "kafka.bootstrap_servers"),
            ("kafak.group_id", "kafka.group_id"),
            ("lane", "lanes"),
            ("batch.max_payment", "batch.max_payments"),
            ("max_payments", "batch.max_payments"),
            ("kafka.lanes", "lanes"),
            ("postgres.uri", "postgres.url"),
            ("log.fromat", "log.format"),
            ("idempotency.windows", "idempotency.window"),
            ("admin.port", "admin.listen"),
        ] {
            assert_eq!(nearest(written), meant, "{written}");
        }
    }
}
