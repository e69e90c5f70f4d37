//! What is asked of the brokers. Blocks.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer;
use rdkafka::types::RDKafkaErrorCode as Code;

use super::{EACH_MAX, Report};
use crate::config::{KafkaSettings, Settings};
use crate::dependencies::{Dependency, grant};
use crate::domain::outcome::is_refusal;
use crate::kafka::callbacks::QuietLog;
use crate::kafka::client::make_client;
use crate::kafka::group::{Group, member_config};
use crate::kafka::librdkafka::{
    NO_TOPIC_IDS, NativeError, ProducerClient, TxnProducer, describe_group, describe_topic, settings_of,
};
use crate::kafka::offsets::once_settled;
use crate::kafka::publisher_settings::{transactional_config, transactional_id};
use crate::kafka::topic_rules::{CLEANUP_POLICY, Role, TIMESTAMP_AHEAD, TIMESTAMP_TYPE};
use crate::kafka::transactions::{DEAD_LETTER_BYTES, EVENT_BYTES};
use crate::telemetry::status::StatusRegistry;

/// Longest time of one request.
const REQUEST_MAX: Duration = Duration::from_secs(5);
/// Longest time of `init_transactions`, for which a new cluster first creates `__transaction_state`.
const INIT_MAX: Duration = Duration::from_secs(15);
/// How long the reason of a refused connection is waited for.
const REASON_MAX: Duration = Duration::from_secs(1);
/// Shortest retention of the input that docs/how-to/deploy.md advises.
const RETENTION_MIN: Duration = Duration::from_secs(24 * 3600);

struct Brokers<'a> {
    settings: &'a Settings,
    kafka: &'a KafkaSettings,
    group: Group,
    until: Instant,
    report: Report,
}

pub(super) fn examine(settings: &Settings) -> Report {
    let (kafka, status) = (&settings.kafka, Arc::new(StatusRegistry::default()));
    let (servers, reachable) = (&kafka.bootstrap_servers, Dependency::BrokersReachable);
    let mut report = Report::default();
    let group = match Group::new(kafka, Vec::new(), Arc::clone(&status)) {
        Ok((group, _)) => group,
        Err(error) => {
            report.judge(reachable, servers, false, error);
            return report;
        }
    };
    let asked = group.consumer().client().fetch_metadata(Some(&kafka.input_topic), REQUEST_MAX);
    let metadata = match asked {
        Ok(metadata) => metadata,
        Err(error) => {
            let until = Instant::now() + REASON_MAX;
            while status.broker_refusal().is_none() && Instant::now() < until {
                group.listen();
            }
            let reason = status.broker_refusal().unwrap_or_else(|| error.to_string());
            report.judge(reachable, servers, false, reason);
            return report;
        }
    };
    report.judge(reachable, servers, true, format!("{} brokers", metadata.brokers().len()));
    let mut brokers = Brokers { settings, kafka, group, until: Instant::now() + EACH_MAX, report };
    for role in [Role::Input, Role::Read, Role::Email, Role::DeadLetter] {
        if kafka.publish || role == Role::Input {
            brokers.topic(role);
        }
    }
    if !kafka.publish {
        for what in [
            Dependency::OutputTopics,
            Dependency::OutputIdentity,
            Dependency::OutputRights,
            Dependency::OutputSizes,
            Dependency::OutputReplicas,
            Dependency::DeadLetterRetention,
        ] {
            brokers.report.judge(what, "kafka.publish", true, "not needed: kafka.publish is false");
        }
    }
    let members = brokers.group();
    brokers.transactional_id();
    if let Some(broker) = metadata.brokers().first() {
        brokers.limits(broker.id(), members);
    }
    brokers.report
}

fn number<T: FromStr>(settings: &BTreeMap<String, String>, name: &str, otherwise: T) -> T {
    settings.get(name).and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

impl Brokers<'_> {
    /// Time limit of the next request.
    fn limit(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now()).min(REQUEST_MAX)
    }

    fn rights(&mut self, what: Dependency, place: &str, needed: &[&str], found: &[String]) {
        // Whoever may describe something has a right on it.
        if found.is_empty() {
            return self.report.skip(what, place, "the brokers do not tell rights (KIP-430)", String::new());
        }
        let missing: Vec<&str> =
            needed.iter().copied().filter(|right| !found.iter().any(|f| f == right)).collect();
        match missing.is_empty() {
            true => self.report.judge(what, place, true, needed.join(", ")),
            false => self.report.judge(what, place, false, format!("missing: {}", missing.join(", "))),
        }
    }

    /// A missing right, or a broker without an answer, keeps a check from being made.
    fn skip(&mut self, what: Dependency, place: &str, error: &NativeError, right: &str) {
        let remedy = if is_refusal(error.code) { grant(right) } else { String::new() };
        self.report.skip(what, place, error, remedy);
    }

    fn topic(&mut self, role: Role) {
        let topic = role.topic(self.kafka);
        let (there, rights, needed) = match role {
            Role::Input => (Dependency::InputTopic, Dependency::InputRights, &["READ", "DESCRIBE"][..]),
            _ => (Dependency::OutputTopics, Dependency::OutputRights, &["WRITE", "READ", "DESCRIBE"][..]),
        };
        let found = match describe_topic(self.group.consumer().client(), topic, true, self.limit()) {
            Ok(found) => found,
            Err(error) if error.code == Code::TopicAuthorizationFailed => {
                return self.report.judge(rights, topic, false, "missing: DESCRIBE, and perhaps others");
            }
            Err(error) if matches!(error.code, Code::UnknownTopicOrPartition | Code::UnknownTopic) => {
                return self.report.judge(there, topic, false, error);
            }
            Err(error) => return self.report.skip(there, topic, error, String::new()),
        };
        self.report.judge(there, topic, true, format!("{} partitions", found.partitions));
        match (role, found.id.is_nil()) {
            (Role::Input, true) => self.report.judge(Dependency::TopicIds, topic, false, NO_TOPIC_IDS),
            (Role::Input, false) => self.report.judge(Dependency::TopicIds, topic, true, found.id),
            _ => self.report.judge(Dependency::OutputIdentity, topic, true, format!("topic id {}", found.id)),
        }
        self.rights(rights, topic, needed, &found.operations);
        let copies = format!("{} copies of a partition", found.replicas);
        self.report.judge(Dependency::Replication, topic, found.replicas > 1, copies);
        match settings_of(self.group.consumer().client(), topic, None, self.limit()) {
            Ok(settings) => self.topic_settings(role, topic, &settings, found.replicas),
            Err(error) => {
                let right = format!("--operation DescribeConfigs --topic {topic}");
                self.skip(Dependency::CleanupPolicy, topic, &error, &right);
            }
        }
    }

    fn topic_settings(
        &mut self,
        role: Role,
        topic: &str,
        settings: &BTreeMap<String, String>,
        replicas: usize,
    ) {
        let rules = [
            (Dependency::CleanupPolicy, CLEANUP_POLICY),
            (Dependency::TimestampType, TIMESTAMP_TYPE),
            (Dependency::TimestampAhead, TIMESTAMP_AHEAD),
        ];
        for (what, rule) in rules.into_iter().filter(|(_, rule)| rule.roles.contains(&role)) {
            let Some(value) = settings.get(rule.setting) else {
                let unknown = format!("the brokers do not know {}", rule.setting);
                self.report.skip(what, topic, unknown, String::new());
                continue;
            };
            let breach = rule.breach(topic, value);
            let is_fine = breach.is_none();
            self.report.judge(
                what,
                topic,
                is_fine,
                breach.unwrap_or_else(|| format!("{}={value}", rule.setting)),
            );
        }
        let mut judge = |what, is_fine, found: String| self.report.judge(what, topic, is_fine, found);
        let insync = number(settings, "min.insync.replicas", 1);
        let found = format!("min.insync.replicas={insync}, {replicas} copies");
        judge(Dependency::MinInsyncReplicas, insync > 1 || replicas < 2, found.clone());
        if role != Role::Input {
            judge(Dependency::OutputReplicas, insync <= replicas, found);
            let least = if role == Role::DeadLetter { DEAD_LETTER_BYTES } else { EVENT_BYTES };
            let most = number(settings, "max.message.bytes", usize::MAX);
            let found = format!("max.message.bytes={most}, outputs have up to {least}");
            judge(Dependency::OutputSizes, most >= least, found);
        }
        // -1 means unlimited.
        let retention: i128 = number(settings, "retention.ms", -1);
        let found = format!("retention.ms={retention}");
        let wanted = self.settings.idempotency.window.max(RETENTION_MIN).as_millis() as i128;
        match role {
            Role::Input => judge(Dependency::InputRetention, retention < 0 || retention >= wanted, found),
            Role::DeadLetter => judge(Dependency::DeadLetterRetention, retention < 0, found),
            Role::Read | Role::Email => {}
        }
    }

    /// Returns the group's number of members, if the brokers tell.
    fn group(&mut self) -> Option<usize> {
        let (what, id, topic) = (Dependency::GroupRights, &self.kafka.group_id, &self.kafka.input_topic);
        let ask = || describe_group(self.group.consumer().client(), id, topic, self.limit());
        let found = match once_settled(|error: &NativeError| Some(error.code), ask) {
            Ok(found) => found,
            Err(error) => {
                match error.code {
                    Code::GroupAuthorizationFailed => self.report.judge(what, id, false, error),
                    _ => self.skip(what, id, &error, ""),
                }
                return None;
            }
        };
        self.rights(what, id, &["READ", "DESCRIBE"], &found.operations);
        let config = member_config(self.kafka);
        let ours = config.get("partition.assignment.strategy").unwrap_or_default();
        let is_ours = found.members == 0 || found.assignor == ours;
        let found_here = format!("{} members, assignor {:?}", found.members, found.assignor);
        self.report.judge(Dependency::GroupProtocol, id, is_ours, found_here);
        Some(found.members)
    }

    /// Initialises a transactional id with the prefix of the lanes' ids; no lane has it.
    fn transactional_id(&mut self) {
        let KafkaSettings { group_id, instance_id, .. } = self.kafka;
        let prefix = format!("{group_id}-{instance_id}-");
        let mut config = transactional_config(self.kafka, 0);
        config.set("transactional.id", transactional_id(group_id, instance_id, "doctor"));
        let initialised = make_client::<ProducerClient<_>, _>(&config, QuietLog::default())
            .map_err(|error| (error.rdkafka_error_code(), error.to_string()))
            .and_then(|producer| {
                let init = TxnProducer::new(producer, &[]).init(INIT_MAX);
                init.map_err(|error| (Some(error.code), error.to_string()))
            });
        let (code, error) = initialised.err().map_or((None, None), |(code, text)| (code, Some(text)));
        let is_timeout = code == Some(Code::InvalidTransactionTimeout);
        if let Some(error) = &error
            && !is_timeout
            && code != Some(Code::TransactionalIdAuthorizationFailed)
        {
            return self.report.skip(Dependency::TransactionRights, &prefix, error, String::new());
        }
        let found = error.as_ref().map_or_else(|| "initialised".to_owned(), ToString::to_string);
        self.report.judge(Dependency::TransactionRights, &prefix, error.is_none() || is_timeout, &found);
        if error.is_none() || is_timeout {
            self.report.judge(Dependency::TransactionTimeout, &prefix, !is_timeout, found);
        }
    }

    /// Limits of the brokers, as the one with this id has them.
    fn limits(&mut self, broker: i32, members: Option<usize>) {
        let (place, topic) = (format!("broker {broker}"), &self.kafka.input_topic);
        let settings = match settings_of(self.group.consumer().client(), topic, Some(broker), self.limit()) {
            Ok(settings) => settings,
            Err(error) => {
                let right = "--operation DescribeConfigs --cluster";
                return self.skip(Dependency::SessionTimeout, &place, &error, right);
            }
        };
        let config = member_config(self.kafka);
        let ours: u64 = config.get("session.timeout.ms").and_then(|ms| ms.parse().ok()).unwrap_or(0);
        let least = number(&settings, "group.min.session.timeout.ms", 0);
        let most = number(&settings, "group.max.session.timeout.ms", u64::MAX);
        let found = format!("session.timeout.ms={ours}, the brokers accept {least} to {most}");
        self.report.judge(Dependency::SessionTimeout, &place, (least..=most).contains(&ours), found);
        if let Some(members) = members {
            let most = number(&settings, "group.max.size", usize::MAX);
            let found = format!("{members} members, group.max.size={most}");
            self.report.judge(Dependency::GroupSize, &place, members < most, found);
        }
    }
}
