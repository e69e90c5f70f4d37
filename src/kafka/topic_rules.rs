//! Topic settings that the daemon depends on, as a table, and the one function that checks them.

use rdkafka::client::{Client, ClientContext};

use super::client::ATTEMPT_TIMEOUT;
use super::librdkafka::topic_setting;
use crate::config::KafkaSettings;
use crate::telemetry::metrics::topic_misconfigured;

/// Role of a topic of this program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Role {
    /// `kafka.input_topic`
    Input,
    /// `kafka.read_topic`
    Read,
    /// `kafka.email_topic`
    Email,
    /// `kafka.dead_letter_topic`
    DeadLetter,
}

impl Role {
    /// The outputs.
    pub const OUTPUTS: [Self; 3] = [Self::Read, Self::Email, Self::DeadLetter];

    /// The topic's name.
    pub fn topic(self, kafka: &KafkaSettings) -> &str {
        match self {
            Self::Input => &kafka.input_topic,
            Self::Read => &kafka.read_topic,
            Self::Email => &kafka.email_topic,
            Self::DeadLetter => &kafka.dead_letter_topic,
        }
    }
}

/// What the daemon does about a topic that breaks a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Waits at the start; logs an error while it runs.
    Refuse,
    /// Logs a warning.
    Warn,
}

/// Values that a rule refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Those that contain this word.
    Word(&'static str),
    /// Numbers above this one.
    Above(i64),
}

impl Refused {
    fn has(self, value: &str) -> bool {
        match self {
            Self::Word(word) => value.contains(word),
            Self::Above(most) => value.parse().is_ok_and(|number: i64| number > most),
        }
    }

    /// A value that is refused.
    pub fn example(self) -> String {
        match self {
            Self::Word(word) => word.to_owned(),
            Self::Above(_) => i64::MAX.to_string(),
        }
    }
}

/// A rule about one setting of topics.
pub struct Rule {
    /// The topics it applies to.
    pub roles: &'static [Role],
    /// Name of the setting in Kafka.
    pub setting: &'static str,
    /// What the setting's value must not be.
    pub refused: Refused,
    /// The value that satisfies the rule.
    pub wanted: &'static str,
    /// What is done about it.
    pub action: Action,
    /// What happens otherwise.
    pub consequence: &'static str,
}

/// Brokers compact each topic whose policy contains this word.
pub const CLEANUP_POLICY: Rule = Rule {
    roles: &[Role::Input, Role::Read, Role::Email, Role::DeadLetter],
    setting: "cleanup.policy",
    refused: Refused::Word("compact"),
    wanted: "delete",
    action: Action::Refuse,
    consequence: "compaction removes all but the last record of each key, read or not, and refuses records without key",
};

/// Timestamps of records are part of payments' ids and of the time by which ids are forgotten.
pub const TIMESTAMP_TYPE: Rule = Rule {
    roles: &[Role::Input],
    setting: "message.timestamp.type",
    refused: Refused::Word("LogAppendTime"),
    wanted: "CreateTime",
    action: Action::Warn,
    consequence: "a record that is sent again, as by dlq replay, gets another timestamp, and so another payment id",
};

/// How far the timestamp of a record of the input may be ahead of the broker's clock, in ms: the default since Kafka 4.0.
/// Before, there was no limit.
pub const TIMESTAMP_AHEAD_MAX_MS: i64 = 3_600_000;

/// An output is sent after its record was appended, so it is no older than the record's timestamp less this.
pub const TIMESTAMP_AHEAD: Rule = Rule {
    roles: &[Role::Input],
    setting: "message.timestamp.after.max.ms",
    refused: Refused::Above(TIMESTAMP_AHEAD_MAX_MS),
    wanted: "3600000",
    action: Action::Warn,
    consequence: "a record's timestamp does not tell how old its events are, so that a lost group offset is looked for \
                  in whole output topics, and a partition without a result halts; a change counts for later records \
                  alone, so make it while the group's offsets are there",
};

/// All rules.
pub const RULES: [&Rule; 3] = [&CLEANUP_POLICY, &TIMESTAMP_TYPE, &TIMESTAMP_AHEAD];

/// The command that changes a setting of a topic.
pub fn alter(topic: &str, setting: &str, value: &str) -> String {
    format!(
        "kafka-configs.sh --bootstrap-server BROKER --entity-type topics --entity-name {topic} --alter --add-config \
         {setting}={value}"
    )
}

/// Result of a rule for one topic.
pub struct Checked {
    /// The topic.
    pub role: Role,
    /// The rule.
    pub rule: &'static Rule,
    /// What is wrong, why it matters and how to change it; `None` if the topic satisfies the rule. The error
    /// tells why its setting cannot be read.
    pub violation: Result<Option<String>, String>,
}

impl Rule {
    /// Checks one topic.
    ///
    /// # Errors
    /// If the topic does not exist or its settings cannot be read.
    pub fn check<C: ClientContext>(
        &self,
        client: &Client<C>,
        kafka: &KafkaSettings,
        role: Role,
    ) -> Result<Option<String>, String> {
        let (topic, setting) = (role.topic(kafka), self.setting);
        let value = topic_setting(client, topic, setting, ATTEMPT_TIMEOUT)
            .map_err(|error| format!("{topic} {setting}: {error}"))?;
        let violation = self.breach(topic, &value);
        topic_misconfigured(role.into(), setting, violation.is_some());
        Ok(violation)
    }

    /// What is wrong about a topic whose setting has this value; `None` if nothing is.
    pub fn breach(&self, topic: &str, value: &str) -> Option<String> {
        self.refused.has(value).then(|| self.violation(topic, value))
    }

    /// What is said about a topic whose setting has this value.
    pub fn violation(&self, topic: &str, value: &str) -> String {
        let Self { setting, consequence, .. } = self;
        format!("{topic} has {setting}={value}: {consequence}; change it with {}", self.remedy(topic))
    }

    /// The command that changes the setting of a topic.
    pub fn remedy(&self, topic: &str) -> String {
        alter(topic, self.setting, self.wanted)
    }
}

/// Checks all rules, but not the outputs of a daemon that does not publish.
pub fn check<C: ClientContext>(client: &Client<C>, kafka: &KafkaSettings) -> Vec<Checked> {
    let of_rule = |rule: &'static Rule| rule.roles.iter().map(move |role| (rule, *role));
    let used = RULES.into_iter().flat_map(of_rule).filter(|(_, role)| kafka.publish || *role == Role::Input);
    used.map(|(rule, role)| Checked { role, rule, violation: rule.check(client, kafka, role) }).collect()
}
