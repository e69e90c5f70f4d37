//! `topics create`: creates the four topics where absent, and checks existing ones.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::Args;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::types::RDKafkaErrorCode;

use super::output::{print, warn};
use crate::config::Settings;
use crate::error::{CommandError, OrFailed};
use crate::kafka::callbacks::QuietLog;
use crate::kafka::client::{REQUEST_TIMEOUT, base_client_config, make_client, partition_counts};
use crate::kafka::topic_rules::{self, Role, TIMESTAMP_AHEAD};

/// Time limit for the brokers to propagate the metadata of a new topic.
const VISIBLE_WITHIN: Duration = Duration::from_secs(30);

/// A dead letter contains a value of up to 512 KiB plus headers; this is twice Kafka's default.
const DEAD_LETTER_BYTES_MAX: &str = "2097152";

/// Topic settings that keep dead letters until an operator has handled them.
const DEAD_LETTER_CONFIG: [(&str, &str); 3] =
    [("retention.ms", "-1"), ("retention.bytes", "-1"), ("max.message.bytes", DEAD_LETTER_BYTES_MAX)];

const AFTER_HELP: &str = "\
An existing topic is not changed; the command warns if its number of partitions or, for the dead-letter
topic, its retention differs, if it is compacted, and if the input has message.timestamp.type=LogAppendTime or
accepts timestamps that are more than an hour ahead.

Never change the input's number of partitions: an account's payments would move to another partition
and lose their order.

Examples:
  payment-writer topics create
  payment-writer topics create --partitions 100 --replication-factor 3";

/// `topics create`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CreateTopicsArgs {
    /// Partitions of the input topic
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub partitions: i32,
    /// Partitions of each output topic; most efficient if it divides the input's number
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub output_partitions: i32,
    /// Replicas of each partition; default: the brokers' default.replication.factor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=32))]
    pub replication_factor: Option<i32>,
}

struct Wanted<'a> {
    name: &'a str,
    partitions: i32,
    role: Role,
}

/// Creates absent topics and waits until all four are visible to every client.
pub async fn create(settings: &Settings, args: &CreateTopicsArgs) -> Result<(), CommandError> {
    let kafka = &settings.kafka;
    let output = |role: Role| Wanted { name: role.topic(kafka), partitions: args.output_partitions, role };
    let wanted = [
        Wanted { partitions: args.partitions, ..output(Role::Input) },
        output(Role::Read),
        output(Role::Email),
        output(Role::DeadLetter),
    ];
    let admin: AdminClient<QuietLog> = make_client(&base_client_config(kafka), QuietLog::default())
        .or_failed_to("cannot make a Kafka client")?;
    let present = partition_counts(admin.inner())
        .or_failed_to(format_args!("no answer from Kafka at {}", kafka.bootstrap_servers))?;
    let replication = args.replication_factor.unwrap_or(-1);
    let new_topics: Vec<NewTopic<'_>> = wanted
        .iter()
        .filter(|topic| !present.contains_key(topic.name))
        .map(|topic| new_topic(topic, replication))
        .collect();
    let mut result = create_topics(&admin, &new_topics).await?;
    // Kafka 3.5 does not know the limit of timestamps.
    let is_unknown = |(name, code): &mut (String, _)| {
        *name == kafka.input_topic && *code == RDKafkaErrorCode::InvalidConfig
    };
    if result.refused.extract_if(.., is_unknown).next().is_some() {
        let mut input = new_topic(&wanted[0], replication);
        input.config.retain(|(name, _)| *name != TIMESTAMP_AHEAD.setting);
        let again = create_topics(&admin, &[input]).await?;
        result.created.extend(again.created);
        result.refused.extend(again.refused);
    }
    let created = result.all()?;
    let present = wait_until_visible(&admin, &wanted).await?;
    for topic in &wanted {
        let partitions = present.get(topic.name).copied().unwrap_or_default();
        let what = if created.iter().any(|name| name == topic.name) { "created" } else { "already there" };
        print(format_args!("{}: {what}, {partitions} partitions", topic.name))?;
        if partitions != topic.partitions {
            warn(format_args!(
                "warning: {} has {partitions} partitions, not {}",
                topic.name, topic.partitions
            ));
        }
        if topic.role == Role::DeadLetter && what != "created" {
            warn_of_retention(&admin, topic.name).await;
        }
    }
    // A topic that this call created has no violation.
    for violation in topic_rules::check(admin.inner(), kafka).into_iter().filter_map(|c| c.violation.ok()?) {
        warn(format_args!("warning: {violation}"));
    }
    Ok(())
}

fn new_topic<'a>(topic: &Wanted<'a>, replication_factor: i32) -> NewTopic<'a> {
    let replication = TopicReplication::Fixed(replication_factor);
    let new = NewTopic::new(topic.name, topic.partitions, replication).set("cleanup.policy", "delete");
    let more: &[(&str, &str)] = match topic.role {
        Role::Input => &[(TIMESTAMP_AHEAD.setting, TIMESTAMP_AHEAD.wanted)],
        Role::Read | Role::Email => &[],
        Role::DeadLetter => &DEAD_LETTER_CONFIG,
    };
    more.iter().fold(new, |new, (name, value)| new.set(name, value))
}

/// What the brokers answered to a request to create topics.
#[derive(Default)]
struct Created {
    /// Names of the topics that the call created.
    created: Vec<String>,
    /// The topics that were refused, and why.
    refused: Vec<(String, RDKafkaErrorCode)>,
}

impl Created {
    /// The names, if nothing was refused.
    fn all(self) -> Result<Vec<String>, CommandError> {
        if self.refused.is_empty() {
            return Ok(self.created);
        }
        let refused: Vec<String> =
            self.refused.iter().map(|(name, code)| format!("{name}: {code}")).collect();
        let mut message = format!("cannot create topics: {}", refused.join("; "));
        if !self.created.is_empty() {
            message.push_str(&format!(" (created: {})", self.created.join(", ")));
        }
        Err(CommandError::failed(message))
    }
}

/// Creates topics; one that another call created first is not refused.
async fn create_topics(
    admin: &AdminClient<QuietLog>,
    new_topics: &[NewTopic<'_>],
) -> Result<Created, CommandError> {
    let mut created = Created::default();
    if new_topics.is_empty() {
        return Ok(created);
    }
    let options =
        AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT)).operation_timeout(Some(REQUEST_TIMEOUT));
    for result in admin.create_topics(new_topics, &options).await.or_failed_to("cannot create topics")? {
        match result {
            Ok(name) => created.created.push(name),
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err(refused) => created.refused.push(refused),
        }
    }
    Ok(created)
}

/// Waits until each topic is visible and each of its partitions has a leader.
async fn wait_until_visible(
    admin: &AdminClient<QuietLog>,
    wanted: &[Wanted<'_>],
) -> Result<BTreeMap<String, i32>, CommandError> {
    let deadline = Instant::now() + VISIBLE_WITHIN;
    loop {
        let error = match partition_counts(admin.inner()) {
            Ok(present) => {
                let missing: Vec<&str> =
                    wanted.iter().map(|t| t.name).filter(|name| !present.contains_key(*name)).collect();
                if missing.is_empty() {
                    return Ok(present);
                }
                format!("absent, or a partition without leader: {}", missing.join(", "))
            }
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(CommandError::failed(format!("the topics cannot be used yet: {error}")));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn warn_of_retention(admin: &AdminClient<QuietLog>, topic: &str) {
    let options = AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT));
    let Ok(answers) = admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options).await else {
        return warn(format_args!(
            "warning: cannot read the configuration of {topic}; it should never delete dead letters"
        ));
    };
    for resource in answers.iter().flatten() {
        for (name, expected) in DEAD_LETTER_CONFIG {
            let value = resource.get(name).and_then(|entry| entry.value.as_deref());
            if value != Some(expected) {
                let value = value.unwrap_or("unknown");
                warn(format_args!("warning: {topic} has {name}={value}; {expected} is advised"));
            }
        }
    }
}
