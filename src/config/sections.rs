//! Typed settings and their rules.

use std::net::SocketAddr;
use std::time::Duration;

use super::cron::CronSchedule;
use super::postgres_url::PostgresUrl;
use super::properties::{KafkaProperties, TOKEN_PROPERTY};
use super::reader::{Raw, Reader, Rule};
use super::size::ByteSize;
use crate::domain::payment::Status;
use crate::domain::wire::Rules;

/// All settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `[kafka]`
    pub kafka: KafkaSettings,
    /// `[postgres]`
    pub postgres: PostgresSettings,
    /// `lanes`: number of lanes that share this process's partitions, each with its own producer and database
    /// connection.
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
    /// `[retention]`
    pub retention: RetentionSettings,
    /// `[shutdown]`
    pub shutdown: ShutdownSettings,
    /// `[log]`
    pub log: LogSettings,
    /// `[tracing]`
    pub tracing: TracingSettings,
}

impl Settings {
    /// Rules for valid messages.
    pub fn rules(&self) -> Rules {
        let codes = self.email.statuses.iter();
        Rules {
            payment_types: self.payment.types.clone(),
            payment_bytes_max: self.payment.max_bytes.bytes(),
            idempotency_window: self.idempotency.window,
            email_statuses: codes.filter_map(|code| Status::from_code(i64::from(*code))).collect(),
        }
    }
}

/// `[kafka]`
#[derive(Clone, Debug, PartialEq)]
pub struct KafkaSettings {
    /// `host:port,host:port`
    pub bootstrap_servers: String,
    /// The consumer group, which is also bound to one database.
    pub group_id: String,
    /// Identifies this process within the group; the same after a restart.
    pub instance_id: String,
    /// Topic of the payments.
    pub input_topic: String,
    /// Topic of the read events.
    pub read_topic: String,
    /// Topic of the e-mail events.
    pub email_topic: String,
    /// Topic of the records that cannot be written.
    pub dead_letter_topic: String,
    /// Whether to send events and dead letters, or only write rows.
    pub publish: bool,
    /// Program and arguments that print tokens for SASL OAUTHBEARER; empty for none.
    pub token_command: Vec<String>,
    /// Properties passed to librdkafka.
    pub properties: KafkaProperties,
}

/// `[postgres]`
#[derive(Clone, Debug, PartialEq)]
pub struct PostgresSettings {
    /// URL for the role that writes payments.
    pub url: PostgresUrl,
    /// URL for the role that creates and drops partitions.
    pub housekeeping_url: PostgresUrl,
}

/// `[batch]`
#[derive(Clone, Debug, PartialEq)]
pub struct BatchSettings {
    /// Number of records at which a batch is closed.
    pub max_payments: usize,
    /// Bytes of keys, values and headers at which a batch is closed.
    pub max_bytes: ByteSize,
    /// How long a batch that is not full waits for more records.
    pub linger: Duration,
}

/// `[payment]`
#[derive(Clone, Debug, PartialEq)]
pub struct PaymentSettings {
    /// Allowed values of the field `type`.
    pub types: Vec<String>,
    /// Maximum size of a value; longer ones are dead-lettered as `too_large`.
    pub max_bytes: ByteSize,
}

/// `[email]`
#[derive(Clone, Debug, PartialEq)]
pub struct EmailSettings {
    /// Statuses of payments that cause an e-mail event.
    pub statuses: Vec<i16>,
}

/// `[idempotency]`
#[derive(Clone, Debug, PartialEq)]
pub struct IdempotencySettings {
    /// Minimum time for which a message id is remembered, in log time.
    pub window: Duration,
    /// When to drop old generations, in UTC; `None`: only by command.
    pub prune_schedule: Option<CronSchedule>,
}

/// `[audit]`
#[derive(Clone, Debug, PartialEq)]
pub struct AuditSettings {
    /// Share of the offsets that are audited, besides all just behind a fetch start; 0 disables the audit.
    pub share: f64,
}

/// `[retention]`
#[derive(Clone, Debug, PartialEq)]
pub struct RetentionSettings {
    /// Months of the payment tables to keep before the current one; `None`: all.
    pub payment_months: Option<u32>,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq)]
pub struct AdminSettings {
    /// Address of the admin server.
    pub listen: SocketAddr,
}

/// `[shutdown]`
#[derive(Clone, Debug, PartialEq)]
pub struct ShutdownSettings {
    /// Time limit of a drain.
    pub timeout: Duration,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq)]
pub struct LogSettings {
    /// Format of the log.
    pub format: LogFormat,
    /// Level, or directives such as `info,payment_writer=debug`.
    pub level: String,
}

/// `[tracing]`
#[derive(Clone, Debug, PartialEq)]
pub struct TracingSettings {
    /// Base address of an OTLP collector; `None` disables traces.
    pub otlp_endpoint: Option<String>,
    /// Share of the batches that are traced, 0 to 1.
    pub sample_ratio: f64,
}

/// `log.format`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text lines.
    Text,
    /// One JSON object per line.
    Json,
}

const MIB: u64 = 1 << 20;
const DAY: Duration = Duration::from_secs(86_400);

impl Settings {
    // All settings are read first, so that all problems are reported together.
    pub(super) fn read(r: &mut Reader) -> Option<Self> {
        let kafka = KafkaSettings::read(r);
        let postgres = PostgresSettings::read(r);
        let lanes = r.read("lanes", |raw| count(raw, 1, 32));
        let batch = BatchSettings::read(r);
        let payment = PaymentSettings::read(r);
        let email = r.read("email.statuses", statuses).map(|statuses| EmailSettings { statuses });
        let idempotency = IdempotencySettings::read(r);
        let audit = r.read("audit.share", |raw| raw.number(0.0, 1.0)).map(|share| AuditSettings { share });
        let payment_months = r.read("retention.payment_months", |raw| count(raw, 0, 1_200));
        let listen = r.read("admin.listen", socket_address);
        let timeout =
            r.read("shutdown.timeout", |raw| raw.duration(Duration::from_secs(1), Duration::from_secs(600)));
        let log = LogSettings::read(r);
        let tracing = TracingSettings::read(r);
        if let (Some(batch), Some(payment)) = (&batch, &payment)
            && batch.max_bytes < payment.max_bytes
        {
            r.refuse("batch.max_bytes", "must not be smaller than payment.max_bytes");
        }
        Some(Self {
            kafka: kafka?,
            postgres: postgres?,
            lanes: lanes?,
            batch: batch?,
            payment: payment?,
            email: email?,
            idempotency: idempotency?,
            audit: audit?,
            retention: RetentionSettings {
                payment_months: u32::try_from(payment_months?).ok().filter(|months| *months > 0),
            },
            admin: AdminSettings { listen: listen? },
            shutdown: ShutdownSettings { timeout: timeout? },
            log: log?,
            tracing: tracing?,
        })
    }
}

impl KafkaSettings {
    fn read(r: &mut Reader) -> Option<Self> {
        let bootstrap_servers = r.read("kafka.bootstrap_servers", servers);
        let group_id = r.read("kafka.group_id", |raw| name(raw, 150));
        let instance_id = r.read("kafka.instance_id", |raw| name(raw, 80));
        let topics =
            ["kafka.input_topic", "kafka.read_topic", "kafka.email_topic", "kafka.dead_letter_topic"]
                .map(|key| (key, r.read(key, |raw| name(raw, 249))));
        for (index, (key, topic)) in topics.iter().enumerate() {
            let earlier = topics.iter().take(index).find(|(_, other)| other == topic);
            if let (Some((other, _)), Some(_)) = (earlier, topic) {
                r.refuse(key, format!("must not be the same topic as {other}"));
            }
        }
        let publish = r.read("kafka.publish", |raw| raw.boolean());
        let token_command = r.read("kafka.token_command", |raw| raw.words());
        let properties = r.properties();
        if let Some(command) = &token_command {
            check_tokens(r, command, &properties);
        }
        let [(_, input_topic), (_, read_topic), (_, email_topic), (_, dead_letter_topic)] = topics;
        Some(Self {
            bootstrap_servers: bootstrap_servers?,
            group_id: group_id?,
            instance_id: instance_id?,
            input_topic: input_topic?,
            read_topic: read_topic?,
            email_topic: email_topic?,
            dead_letter_topic: dead_letter_topic?,
            publish: publish?,
            token_command: token_command?,
            properties,
        })
    }
}

impl PostgresSettings {
    fn read(r: &mut Reader) -> Option<Self> {
        let parse = |raw: &Raw<'_>| PostgresUrl::parse(raw.text()?);
        let url = r.read_shown("postgres.url", parse, |url| Some(url.to_string()));
        let housekeeping_url = r.read_shown("postgres.housekeeping_url", parse, |url| Some(url.to_string()));
        Some(Self { url: url?, housekeeping_url: housekeeping_url? })
    }
}

impl BatchSettings {
    fn read(r: &mut Reader) -> Option<Self> {
        let max_payments = r.read("batch.max_payments", |raw| count(raw, 1, 100_000));
        let max_bytes = r.read("batch.max_bytes", |raw| {
            raw.size(ByteSize::from_bytes(64 << 10), ByteSize::from_bytes(256 * MIB))
        });
        let linger = r.read("batch.linger", |raw| raw.duration(Duration::ZERO, Duration::from_secs(10)));
        Some(Self { max_payments: max_payments?, max_bytes: max_bytes?, linger: linger? })
    }
}

impl PaymentSettings {
    fn read(r: &mut Reader) -> Option<Self> {
        let types = r.read("payment.types", payment_types);
        // A dead letter does not contain a value of more than 512 KiB.
        let max_bytes = r.read("payment.max_bytes", |raw| {
            raw.size(ByteSize::from_bytes(256), ByteSize::from_bytes(512 << 10))
        });
        Some(Self { types: types?, max_bytes: max_bytes? })
    }
}

impl IdempotencySettings {
    fn read(r: &mut Reader) -> Option<Self> {
        let window = r.read("idempotency.window", |raw| raw.duration(Duration::from_secs(60), 366 * DAY));
        let prune_schedule = r.read("idempotency.prune_schedule", |raw| {
            let text = raw.text()?;
            if text.trim().is_empty() {
                return Ok(None);
            }
            CronSchedule::parse(text).map(Some).ok_or_else(|| {
                "must be five cron fields (minute, hour, day of month, month, day of week) or empty"
                    .to_owned()
            })
        });
        Some(Self { window: window?, prune_schedule: prune_schedule? })
    }
}

impl LogSettings {
    fn read(r: &mut Reader) -> Option<Self> {
        let format = r.read("log.format", |raw| match raw.text()? {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("must be text or json".to_owned()),
        });
        let level = r.read("log.level", |raw| {
            let text = raw.text()?.trim();
            let rule = "must be error, warn, info, debug or trace, or directives like info,librdkafka=debug";
            log_filter(text).map(|()| text.to_owned()).map_err(|_| rule.to_owned())
        });
        Some(Self { format: format?, level: level? })
    }
}

impl TracingSettings {
    fn read(r: &mut Reader) -> Option<Self> {
        let otlp_endpoint = r.read("tracing.otlp_endpoint", |raw| {
            let text = raw.text()?.trim();
            if text.is_empty() {
                return Ok(None);
            }
            let is_base =
                text.strip_prefix("http://").is_some_and(|rest| is_host_and_port(rest.trim_end_matches('/')));
            if is_base {
                Ok(Some(text.to_owned()))
            } else {
                Err("must be http://host:port of an OTLP collector, or empty".to_owned())
            }
        });
        let sample_ratio = r.read("tracing.sample_ratio", |raw| raw.number(0.0, 1.0));
        Some(Self { otlp_endpoint: otlp_endpoint?, sample_ratio: sample_ratio? })
    }
}

/// Checks a log filter as used by `log.level`.
///
/// # Errors
/// A description of what is wrong.
pub fn log_filter(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("empty: expected a level or directives".to_owned());
    }
    if text.contains('[') {
        return Err("no spans and fields in brackets: expected a level, or a target and a level".to_owned());
    }
    tracing_subscriber::EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    // The filter would take any word that is not a level for a target name, and then log nothing.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let mistyped = text.split(',').map(str::trim).find(|directive| {
        !directive.contains(['=', ':']) && !levels.iter().any(|level| level.eq_ignore_ascii_case(directive))
    });
    match mistyped {
        Some(word) => Err(format!("{word:?} is not a level: off, error, warn, info, debug or trace")),
        None => Ok(()),
    }
}

fn count(raw: &Raw<'_>, low: i64, high: i64) -> Result<usize, Rule> {
    let number = raw.integer(low, high)?;
    usize::try_from(number).map_err(|_| format!("must be a whole number from {low} to {high}"))
}

/// Kafka's rule for topic names, which also applies to `group.instance.id` (KIP-345).
fn name(raw: &Raw<'_>, chars_max: usize) -> Result<String, Rule> {
    let text = raw.text()?;
    let legal = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if legal && (1..=chars_max).contains(&text.len()) && text != "." && text != ".." {
        Ok(text.to_owned())
    } else {
        Err(format!("must be 1 to {chars_max} ASCII letters, digits, dots, underscores or hyphens"))
    }
}

fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let is_host = match bare {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        }
    };
    is_host && port.parse::<u16>().is_ok_and(|port| port > 0)
}

fn servers(raw: &Raw<'_>) -> Result<String, Rule> {
    let items: Vec<&str> = raw.text()?.split(',').map(str::trim).collect();
    if items.iter().all(|item| is_host_and_port(item)) {
        Ok(items.join(","))
    } else {
        Err("must be host:port, or several between commas".to_owned())
    }
}

fn socket_address(raw: &Raw<'_>) -> Result<SocketAddr, Rule> {
    let rule = "must be an IP address and a port, like 127.0.0.1:9464 or [::]:9464";
    raw.text()?.trim().parse().map_err(|_| rule.to_owned())
}

/// Tokens come from a command, from a server (OIDC), or are unsecured test tokens; exactly one source must be
/// set.
fn check_tokens(r: &mut Reader, command: &[String], properties: &KafkaProperties) {
    let is = |names: &[&str], wanted: &str| {
        names.iter().any(|name| properties.get(name).is_some_and(|value| value.eq_ignore_ascii_case(wanted)))
    };
    let are_wanted = is(&["sasl.mechanism", "sasl.mechanisms"], "OAUTHBEARER");
    let come_from_elsewhere = is(&["sasl.oauthbearer.method"], "oidc")
        || is(&["enable.sasl.oauthbearer.unsecure.jwt"], "true")
        || is(&["enable.sasl.oauthbearer.unsecure.jwt"], "1");
    if are_wanted && command.is_empty() && !come_from_elsewhere {
        let how = "must be the command that prints tokens for sasl.mechanism OAUTHBEARER of kafka.properties \
                   (or set sasl.oauthbearer.method = oidc, with a binary that has the Cargo feature `curl`)";
        r.refuse("kafka.token_command", how.to_owned());
    }
    if !command.is_empty() && (!are_wanted || come_from_elsewhere) {
        let how = "needs sasl.mechanism OAUTHBEARER in kafka.properties, and no other source of tokens";
        r.refuse("kafka.token_command", how.to_owned());
    }
    if !command.is_empty() && properties.get(TOKEN_PROPERTY).is_some() {
        r.refuse("kafka.token_command", "cannot be combined with sasl.oauthbearer.config".to_owned());
    }
}

fn payment_types(raw: &Raw<'_>) -> Result<Vec<String>, Rule> {
    let types = raw.texts()?;
    let legal = |name: &String| {
        (1..=32).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
    };
    let distinct = types.iter().enumerate().all(|(at, name)| !types.iter().take(at).any(|n| n == name));
    if (1..=64).contains(&types.len()) && types.iter().all(legal) && distinct {
        Ok(types)
    } else {
        Err("must be 1 to 64 different names, each of 1 to 32 ASCII letters, digits, underscores or hyphens"
            .to_owned())
    }
}

fn statuses(raw: &Raw<'_>) -> Result<Vec<i16>, Rule> {
    let numbers = raw.integers()?;
    let mut statuses: Vec<i16> = Vec::new();
    for number in numbers {
        let status = match number {
            2 => 2,
            0 => 0,
            -2 => -2,
            _ => return Err("must be statuses of payments: 2, 0, -2".to_owned()),
        };
        if statuses.contains(&status) {
            return Err("must not name a status twice".to_owned());
        }
        statuses.push(status);
    }
    Ok(statuses)
}
