//! Typed settings and their rules.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};

use super::endpoint::Endpoint;
use super::properties::{KafkaProperties, TOKEN_PROPERTY, is_file};
use super::values;
use crate::domain::payment::Status;
use crate::domain::wire::Rules;

/// All settings.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `[kafka]`
    pub kafka: KafkaSettings,
    /// `[postgres]`
    pub postgres: PostgresSettings,
    /// `lanes`: number of lanes that share this process's partitions, each with its own producer and database
    /// connection.
    #[serde(deserialize_with = "values::integer::<_, _, 1, 32>")]
    pub lanes: usize,
    /// `[batch]`
    pub batch: BatchSettings,
    /// `[payment]`
    pub payment: PaymentSettings,
    /// `[email]`
    pub email: EmailSettings,
    /// `[idempotency]`
    pub idempotency: IdempotencySettings,
    /// `[audit]`
    pub audit: AuditSettings,
    /// `[admin]`
    pub admin: AdminSettings,
    /// `[console]`
    pub console: ConsoleSettings,
    /// `[retention]`
    pub retention: RetentionSettings,
    /// `[shutdown]`
    pub shutdown: ShutdownSettings,
    /// `[log]`
    pub log: LogSettings,
    /// `[tracing]`
    pub tracing: TracingSettings,
}

/// `[kafka]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct KafkaSettings {
    /// `host:port,host:port`
    #[serde(deserialize_with = "servers")]
    pub bootstrap_servers: String,
    /// The consumer group, which is also bound to one database.
    #[serde(deserialize_with = "values::name::<_, 150>")]
    pub group_id: String,
    /// Identifies this process within the group; the same after a restart.
    #[serde(deserialize_with = "values::name::<_, 80>")]
    pub instance_id: String,
    /// Topic of the payments.
    #[serde(deserialize_with = "values::name::<_, 249>")]
    pub input_topic: String,
    /// Topic of the read events.
    #[serde(deserialize_with = "values::name::<_, 249>")]
    pub read_topic: String,
    /// Topic of the e-mail events.
    #[serde(deserialize_with = "values::name::<_, 249>")]
    pub email_topic: String,
    /// Topic of the records that cannot be written.
    #[serde(deserialize_with = "values::name::<_, 249>")]
    pub dead_letter_topic: String,
    /// Whether to send events and dead letters, or only write rows.
    #[serde(deserialize_with = "values::boolean")]
    pub publish: bool,
    /// File with the password for SASL PLAIN or SCRAM; `None`: it is in the properties, or there is none.
    #[serde(deserialize_with = "password_file")]
    pub password_file: Option<String>,
    /// Program and arguments that print tokens for SASL OAUTHBEARER; empty for none.
    #[serde(deserialize_with = "command")]
    pub token_command: Vec<String>,
    /// Properties passed to librdkafka.
    #[serde(deserialize_with = "properties")]
    pub properties: KafkaProperties,
}

/// `[postgres]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PostgresSettings {
    /// URL for the role that writes payments.
    pub url: Endpoint,
    /// URL for the role that creates and drops partitions.
    pub housekeeping_url: Endpoint,
    /// Program and arguments that print the password of a URL that has none; empty for none.
    #[serde(deserialize_with = "command")]
    pub password_command: Vec<String>,
}

/// `[batch]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct BatchSettings {
    /// Number of records at which a batch is closed.
    #[serde(deserialize_with = "values::integer::<_, _, 1, 100_000>")]
    pub max_payments: usize,
    /// Bytes of keys, values and headers at which a batch is closed.
    #[serde(deserialize_with = "batch_bytes")]
    pub max_bytes: usize,
    /// How long a batch that is not full waits for more records.
    #[serde(deserialize_with = "linger")]
    pub linger: Duration,
}

/// `[payment]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PaymentSettings {
    /// Allowed values of the field `type`.
    #[serde(deserialize_with = "payment_types")]
    pub types: Vec<String>,
    /// Maximum size of a value; longer ones are dead-lettered as `too_large`.
    #[serde(deserialize_with = "payment_bytes")]
    pub max_bytes: usize,
}

/// `[email]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct EmailSettings {
    /// Statuses of payments that cause an e-mail event.
    #[serde(deserialize_with = "statuses")]
    pub statuses: Vec<i16>,
}

/// `[idempotency]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct IdempotencySettings {
    /// Minimum time for which a message id is remembered, in log time.
    #[serde(deserialize_with = "window")]
    pub window: Duration,
    /// When to drop old generations, five cron fields in UTC; `None`: only by command.
    #[serde(deserialize_with = "prune_schedule")]
    pub prune_schedule: Option<String>,
}

/// `[audit]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct AuditSettings {
    /// Share of the offsets that are audited, besides all just behind a fetch start; 0 disables the audit.
    #[serde(deserialize_with = "values::share")]
    pub share: f64,
}

/// `[retention]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct RetentionSettings {
    /// Months of the payment tables to keep before the current one; `None`: all.
    #[serde(deserialize_with = "months")]
    pub payment_months: Option<u32>,
}

/// `[admin]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct AdminSettings {
    /// Address of the admin server.
    #[serde(deserialize_with = "socket_address")]
    pub listen: SocketAddr,
    /// Another address for metrics and probes alone, which needs no token; `None`: only the admin server.
    #[serde(deserialize_with = "metrics_address")]
    pub metrics_listen: Option<SocketAddr>,
    /// File with the token that callers must have; `None`: everybody may ask.
    #[serde(deserialize_with = "file")]
    pub token_file: Option<PathBuf>,
    /// Names of this host that callers may use, in lower case.
    #[serde(deserialize_with = "hosts")]
    pub hosts: Vec<String>,
}

/// `[console]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSettings {
    /// Admin addresses of the other daemons of the group.
    #[serde(deserialize_with = "peers")]
    pub peers: Vec<String>,
}

/// `[shutdown]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ShutdownSettings {
    /// Time limit of a drain.
    #[serde(deserialize_with = "timeout")]
    pub timeout: Duration,
}

/// `[log]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    /// Format of the log.
    #[serde(deserialize_with = "log_format")]
    pub format: LogFormat,
    /// Level, or directives such as `info,payment_writer=debug`.
    #[serde(deserialize_with = "log_level")]
    pub level: String,
}

/// `[tracing]`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct TracingSettings {
    /// Base address of an OTLP collector; `None` disables traces.
    #[serde(deserialize_with = "otlp_endpoint")]
    pub otlp_endpoint: Option<String>,
    /// Share of the batches that are traced, 0 to 1.
    #[serde(deserialize_with = "values::share")]
    pub sample_ratio: f64,
}

/// `log.format`
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text lines.
    Text,
    /// One JSON object per line.
    Json,
}

impl Settings {
    /// Rules for valid messages.
    pub fn rules(&self) -> Rules {
        let codes = self.email.statuses.iter();
        Rules {
            payment_types: self.payment.types.clone(),
            payment_bytes_max: self.payment.max_bytes,
            idempotency_window: self.idempotency.window,
            email_statuses: codes.filter_map(|code| Status::from_code(i64::from(*code))).collect(),
        }
    }

    /// What is wrong with settings together: the one to change, the others, and the rule.
    pub(super) fn conflicts(&self) -> Vec<(Vec<&'static str>, String)> {
        let mut conflicts = Vec::new();
        let kafka = &self.kafka;
        let topics = [
            ("kafka.input_topic", &kafka.input_topic),
            ("kafka.read_topic", &kafka.read_topic),
            ("kafka.email_topic", &kafka.email_topic),
            ("kafka.dead_letter_topic", &kafka.dead_letter_topic),
        ];
        for (at, (key, topic)) in topics.iter().enumerate() {
            if let Some((other, _)) = topics.iter().take(at).find(|(_, other)| other == topic) {
                conflicts.push((vec![*key, *other], format!("must not be the same topic as {other}")));
            }
        }
        if self.batch.max_bytes < self.payment.max_bytes {
            let keys = vec!["batch.max_bytes", "payment.max_bytes"];
            conflicts.push((keys, "must not be smaller than payment.max_bytes".to_owned()));
        }
        let rules = kafka.token_conflicts().into_iter();
        conflicts.extend(rules.map(|rule| (vec!["kafka.token_command"], rule.to_owned())));
        if kafka.password_file.is_some() && kafka.properties.get("sasl.password").is_some() {
            let rule = "cannot be combined with sasl.password of kafka.properties";
            conflicts.push((vec!["kafka.password_file"], rule.to_owned()));
        }
        let postgres = &self.postgres;
        if !postgres.password_command.is_empty() && postgres.url.has_password() {
            let rule = "needs a postgres.url without a password and without a password file";
            conflicts.push((vec!["postgres.password_command", "postgres.url"], rule.to_owned()));
        }
        conflicts
    }
}

impl PostgresSettings {
    /// A URL with the password command, if it needs one.
    #[must_use]
    pub fn with_password(&self, mut url: Endpoint) -> Endpoint {
        if !url.has_password() {
            url.password_command.clone_from(&self.password_command);
        }
        url
    }
}

impl KafkaSettings {
    /// The present password of the password file; `None` without such a file.
    ///
    /// # Errors
    /// Why there is none, with the path.
    pub fn password(&self) -> Result<Option<String>, String> {
        let Some(path) = &self.password_file else { return Ok(None) };
        read_password(path).map(Some).map_err(|error| format!("kafka.password_file, {path}: {error}"))
    }

    /// The files whose contents clients read when they are created.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let named = self.properties.iter().filter(|(name, _)| is_file(name));
        named.map(|(_, path)| path).chain(self.password_file.as_deref())
    }

    /// Tokens come from a command, from a server (OIDC), or are unsecured test tokens; exactly one source
    /// must be set.
    fn token_conflicts(&self) -> Vec<&'static str> {
        let is = |name: &str, wanted: &str| {
            self.properties.get(name).is_some_and(|value| value.eq_ignore_ascii_case(wanted))
        };
        let are_wanted = is("sasl.mechanism", "OAUTHBEARER") || is("sasl.mechanisms", "OAUTHBEARER");
        let come_from_elsewhere = is("sasl.oauthbearer.method", "oidc")
            || is("enable.sasl.oauthbearer.unsecure.jwt", "true")
            || is("enable.sasl.oauthbearer.unsecure.jwt", "1");
        let has_command = !self.token_command.is_empty();
        let mut conflicts = Vec::new();
        if are_wanted && !has_command && !come_from_elsewhere {
            conflicts.push(
                "must be the command that prints tokens for sasl.mechanism OAUTHBEARER of kafka.properties \
                 (or set sasl.oauthbearer.method = oidc, with a binary that has the Cargo feature `curl`)",
            );
        }
        if has_command && (!are_wanted || come_from_elsewhere) {
            conflicts
                .push("needs sasl.mechanism OAUTHBEARER in kafka.properties, and no other source of tokens");
        }
        if has_command && self.properties.get(TOKEN_PROPERTY).is_some() {
            conflicts.push("cannot be combined with sasl.oauthbearer.config");
        }
        conflicts
    }
}

fn servers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    values::text(deserializer, "must be host:port, or several between commas", |text| {
        let servers: Vec<&str> = text.split(',').map(str::trim).collect();
        servers.iter().all(|server| values::is_host_and_port(server)).then(|| servers.join(","))
    })
}

fn password_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be the path of a file with a password in one line, or empty";
    values::text(deserializer, rule, |path| match path {
        "" => Some(None),
        path => read_password(path).ok().map(|_| Some(path.to_owned())),
    })
}

/// The password in a file.
///
/// # Errors
/// Why there is none.
fn read_password(path: &str) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err("it is empty".to_owned()),
        password => Ok(password.to_owned()),
    }
}

fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let rule = "must be an array of texts (in the environment: in JSON, or only the name of a program)";
    values::checked(deserializer, rule, Some)
}

// Added one by one afterwards, so that every problem is reported.
fn properties<'de, D: Deserializer<'de>>(deserializer: D) -> Result<KafkaProperties, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| KafkaProperties::default())
}

fn batch_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    values::size(deserializer, "64KiB", "256MiB")
}

fn linger<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    values::duration(deserializer, "0s", "10s")
}

fn payment_types<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let rule = "must be 1 to 64 different names, each of 1 to 32 ASCII letters, digits, underscores or \
                hyphens, in an array of texts (in the environment: between commas)";
    values::checked(deserializer, rule, |types: Vec<String>| {
        let are_allowed = types.iter().all(|name| values::is_word(name, "_-", 32))
            && (1..=64).contains(&types.len())
            && values::are_different(&types);
        are_allowed.then_some(types)
    })
}

// A dead letter does not contain a value of more than 512 KiB.
fn payment_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    values::size(deserializer, "256B", "512KiB")
}

fn statuses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i16>, D::Error> {
    let rule =
        "must be an array of different statuses of payments: 2, 0, -2 (in the environment: between commas)";
    values::checked(deserializer, rule, |statuses: Vec<i16>| {
        let are_known = statuses.iter().all(|code| Status::from_code(i64::from(*code)).is_some());
        (are_known && values::are_different(&statuses)).then_some(statuses)
    })
}

fn window<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    values::duration(deserializer, "1m", "366d")
}

fn prune_schedule<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be five cron fields (minute, hour, day of month, month, day of week) or empty";
    values::text(deserializer, rule, |text| match text.trim() {
        "" => Some(None),
        text => values::cron(text).map(|_| Some(text.to_owned())),
    })
}

fn months<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let months = values::integer::<_, u32, 0, 1_200>(deserializer)?;
    Ok((months > 0).then_some(months))
}

fn socket_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let rule = "must be an IP address and a port, like 127.0.0.1:9464 or [::]:9464";
    values::text(deserializer, rule, |text| text.trim().parse().ok())
}

fn metrics_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let rule = "must be an IP address and a port, like 127.0.0.1:9465, or empty";
    values::text(deserializer, rule, |text| match text.trim() {
        "" => Some(None),
        text => text.parse().ok().map(Some),
    })
}

fn file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    values::text(deserializer, "must be the path of a file, or empty", |text| {
        Some(Some(PathBuf::from(text)).filter(|_| !text.is_empty()))
    })
}

fn hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let rule = "must be an array of up to 64 different names of hosts, without ports (in the environment: in \
                JSON, or only one name)";
    values::checked(deserializer, rule, |hosts: Vec<String>| {
        let hosts: Vec<String> =
            hosts.iter().map(|host| host.trim().trim_end_matches('.').to_ascii_lowercase()).collect();
        let are_allowed = hosts.iter().all(|host| values::is_word(host, "._-", 253))
            && hosts.len() <= 64
            && values::are_different(&hosts);
        are_allowed.then_some(hosts)
    })
}

fn peers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let rule = "must be an array of up to 64 different host:port (in the environment: in JSON, or only one)";
    values::checked(deserializer, rule, |peers: Vec<String>| {
        let is_allowed = |peer: &String| {
            peer.rsplit_once(':').is_some_and(|(host, port)| {
                let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
                values::is_word(host, "._-:", 253) && port.parse::<u16>().is_ok_and(|port| port > 0)
            })
        };
        (peers.iter().all(is_allowed) && peers.len() <= 64 && values::are_different(&peers)).then_some(peers)
    })
}

fn timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    values::duration(deserializer, "1s", "10m")
}

fn log_format<'de, D: Deserializer<'de>>(deserializer: D) -> Result<LogFormat, D::Error> {
    values::checked(deserializer, "must be text or json", Some)
}

fn log_level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let rule = "must be error, warn, info, debug or trace, or directives like info,librdkafka=debug";
    values::text(deserializer, rule, |text| {
        values::log_filter(text.trim()).ok().map(|()| text.trim().to_owned())
    })
}

fn otlp_endpoint<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be http://host:port of an OTLP collector, or empty";
    values::text(deserializer, rule, |text| {
        let text = text.trim();
        let address = text.strip_prefix("http://").unwrap_or_default().trim_end_matches('/');
        let is_allowed = text.is_empty() || values::is_host_and_port(address);
        is_allowed.then(|| Some(text.to_owned()).filter(|text| !text.is_empty()))
    })
}
