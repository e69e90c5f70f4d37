//! What the daemon depends on in topics, group, schema and sessions, as one list.
//!
//! docs/reference/dependencies.md is generated from it, and `doctor` checks each item. The words come from the
//! daemon's own checks.

use rdkafka::types::RDKafkaErrorCode as Code;
use uuid::Uuid;

use crate::domain::cursor::IdentityMismatch;
use crate::kafka::join_failure;
use crate::kafka::librdkafka::NO_TOPIC_IDS;
use crate::kafka::topic_rules::{Action, CLEANUP_POLICY, Rule, TIMESTAMP_TYPE};
use crate::kafka::transactions::{missing_output, too_large};
use crate::postgres::schema::{NEWEST_KNOWN, OLDEST_SUPPORTED, SchemaError, SchemaVersion};
use crate::postgres::store::no_key;

/// One thing that the daemon depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
#[expect(missing_docs, reason = "`fact` describes each")]
pub enum Dependency {
    InputTopic,
    TopicIds,
    TopicIdentity,
    CleanupPolicy,
    TimestampType,
    OutputTopics,
    OutputSizes,
    InputRights,
    OutputRights,
    GroupRights,
    TransactionRights,
    GroupProtocol,
    SessionTimeout,
    GroupSize,
    TransactionTimeout,
    DatabaseReachable,
    SchemaVersion,
    SchemaNewer,
    SchemaSteps,
    SchemaShape,
    GenerationKey,
    DatabaseIdentity,
    Binding,
    RoleRights,
    RowSecurity,
    Writable,
    SessionSettings,
}

/// When the daemon checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr)]
pub enum When {
    /// Before the first batch.
    #[strum(serialize = "at the start")]
    Start,
    /// When a lane opens a session.
    #[strum(serialize = "in each session")]
    Session,
    /// Before each COMMIT.
    #[strum(serialize = "in each batch")]
    Batch,
    /// Beside the lanes.
    #[strum(serialize = "every few seconds")]
    Seconds,
    /// Beside the lanes, or in a used session.
    #[strum(serialize = "every minute")]
    Minute,
}

/// What tells the daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// A check of its own, at these times.
    Checks(&'static [When]),
    /// This error of the brokers.
    Kafka(Code),
    /// This SQLSTATE.
    Postgres(&'static str),
}

/// What the daemon does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Does {
    /// Waits at the start; while it runs it logs an error and goes on.
    Refuse,
    /// Waits, not ready, and goes on when it is right.
    Wait,
    /// Logs a warning.
    Warn,
    /// Ends: an operator must decide.
    Stop,
    /// Sets it itself.
    Set,
}

/// The facts of a dependency.
pub struct Fact {
    /// What tells the daemon that it is not met.
    pub told: Told,
    /// What it does then.
    pub does: Does,
    /// What it says then, with names in capitals for those of topics.
    pub says: String,
    /// The command or setting that answers it; in what the daemon says, if a check of its own says it.
    pub remedy: String,
}

const START: Told = Told::Checks(&[When::Start]);
const SESSIONS: Told = Told::Checks(&[When::Start, When::Session, When::Minute]);

fn fact(told: Told, does: Does, says: impl ToString, remedy: &str) -> Fact {
    Fact { told, does, says: says.to_string(), remedy: remedy.to_owned() }
}

fn rule(rule: &Rule) -> Fact {
    let does = match rule.action {
        Action::Refuse => Does::Refuse,
        Action::Warn => Does::Warn,
    };
    let told = Told::Checks(&[When::Start, When::Minute]);
    fact(told, does, rule.violation("TOPIC", rule.refused), &rule.remedy("TOPIC"))
}

/// An error with which the brokers keep a member out of the group.
fn join(code: Code, remedy: &str) -> Fact {
    fact(Told::Kafka(code), Does::Wait, join_failure::advice(code).unwrap_or_default(), remedy)
}

fn right(code: Code, says: &str, arguments: &str) -> Fact {
    let remedy =
        format!("kafka-acls.sh --bootstrap-server BROKER --add --allow-principal User:NAME {arguments}");
    fact(Told::Kafka(code), Does::Wait, says, &remedy)
}

impl Dependency {
    /// Its name.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether Kafka is asked for it; otherwise Postgres.
    pub fn is_of_kafka(self) -> bool {
        (self as usize) < (Self::DatabaseReachable as usize)
    }

    /// Its facts.
    pub fn fact(self) -> Fact {
        let nil = Uuid::nil();
        match self {
            Self::InputTopic => fact(
                Told::Kafka(Code::UnknownTopicOrPartition),
                Does::Wait,
                "the topic kafka.input_topic is there",
                "payment-writer topics create",
            ),
            Self::TopicIds => fact(
                Told::Checks(&[When::Start, When::Seconds]),
                Does::Wait,
                NO_TOPIC_IDS,
                "need Kafka 2.8 with metadata version 2.8",
            ),
            Self::TopicIdentity => fact(
                Told::Checks(&[When::Start, When::Seconds]),
                Does::Stop,
                IdentityMismatch::OtherTopic { expected: nil, found: nil },
                "start with a new kafka.group_id and a new, empty database",
            ),
            Self::CleanupPolicy => rule(&CLEANUP_POLICY),
            Self::TimestampType => rule(&TIMESTAMP_TYPE),
            Self::OutputTopics => {
                fact(START, Does::Wait, missing_output("TOPIC"), "payment-writer topics create")
            }
            Self::OutputSizes => fact(
                Told::Kafka(Code::MessageSizeTooLarge),
                Does::Wait,
                too_large("READ", "EMAIL", "DEAD_LETTERS"),
                "raise max.message.bytes",
            ),
            Self::InputRights => right(
                Code::TopicAuthorizationFailed,
                join_failure::advice(Code::TopicAuthorizationFailed).unwrap_or_default(),
                "--operation Read --operation Describe --topic TOPIC",
            ),
            Self::OutputRights => right(
                Code::TopicAuthorizationFailed,
                "the rights Write, Read and Describe on the output topics are missing",
                "--operation Write --operation Read --operation Describe --topic TOPIC",
            ),
            Self::GroupRights => right(
                Code::GroupAuthorizationFailed,
                join_failure::advice(Code::GroupAuthorizationFailed).unwrap_or_default(),
                "--operation Read --operation Describe --group GROUP",
            ),
            Self::TransactionRights => right(
                Code::TransactionalIdAuthorizationFailed,
                "the rights Write and Describe on transactional ids with the prefix of group and instance are missing",
                "--operation Write --operation Describe --transactional-id PREFIX --resource-pattern-type prefixed",
            ),
            Self::GroupProtocol => join(Code::InconsistentGroupProtocol, "set another kafka.group_id"),
            Self::SessionTimeout => {
                join(Code::InvalidSessionTimeout, "session.timeout.ms in kafka.properties")
            }
            Self::GroupSize => join(Code::GroupMaxSizeReached, "run fewer instances, or raise it"),
            Self::TransactionTimeout => fact(
                Told::Kafka(Code::InvalidTransactionTimeout),
                Does::Wait,
                "transaction.timeout.ms is above the brokers' transaction.max.timeout.ms",
                "transaction.timeout.ms in kafka.properties",
            ),
            Self::DatabaseReachable => fact(
                Told::Checks(&[When::Start, When::Session, When::Seconds]),
                Does::Wait,
                "the server at postgres.url cannot be reached, or refuses the connection",
                "postgres.url",
            ),
            Self::SchemaVersion => {
                let error = SchemaError::TooOld { found: SchemaVersion(1), needed: OLDEST_SUPPORTED };
                fact(START, Does::Wait, error, "payment-writer migrate")
            }
            Self::SchemaNewer => {
                let (found, known) = (SchemaVersion(99), NEWEST_KNOWN);
                let error = SchemaError::TooNew { found, oldest_known: found, known };
                fact(START, Does::Stop, error, "use the release that ran `migrate`")
            }
            Self::SchemaSteps => {
                let (applied, known) = ("V1__theirs".to_owned(), "V1__ours".to_owned());
                let error = SchemaError::Divergent { version: SchemaVersion(1), applied, known };
                fact(START, Does::Wait, error, "payment-writer migrate status")
            }
            Self::SchemaShape => fact(
                SESSIONS,
                Does::Wait,
                SchemaError::Incomplete(vec!["not null payment_core.amount".to_owned()]),
                "ALTER TABLE",
            ),
            Self::GenerationKey => fact(
                Told::Checks(&[When::Start, When::Session, When::Batch]),
                Does::Wait,
                no_key(7).message,
                "ALTER TABLE payment_writer.idempotency_g7 ADD PRIMARY KEY (message_id)",
            ),
            Self::DatabaseIdentity => fact(
                Told::Checks(&[When::Start, When::Session]),
                Does::Stop,
                IdentityMismatch::OtherDatabase { expected: nil, found: nil },
                "run --adopt-database",
            ),
            Self::Binding => {
                let (bound, found) = ("group \"a\"".to_owned(), "group \"b\"".to_owned());
                let mismatch = IdentityMismatch::OtherGroup { bound, found };
                fact(START, Does::Stop, mismatch, "correct kafka.group_id, kafka.publish or postgres.url")
            }
            Self::RoleRights => fact(
                Told::Postgres("42501"),
                Does::Wait,
                "the role of postgres.url lacks rights that sql/roles.sql grants",
                "psql \"$OWNER_URL\" -f sql/roles.sql",
            ),
            Self::RowSecurity => fact(
                Told::Postgres("42501"),
                Does::Wait,
                "a row security policy hides rows from the role of postgres.url",
                "ALTER TABLE payment_writer.TABLE DISABLE ROW LEVEL SECURITY",
            ),
            Self::Writable => fact(
                Told::Postgres("25006"),
                Does::Wait,
                "the server is a standby, or default_transaction_read_only is on",
                "target_session_attrs=read-write in postgres.url",
            ),
            Self::SessionSettings => fact(
                Told::Checks(&[When::Session]),
                Does::Set,
                "time limits, isolation, synchronous_commit and formats of a session, whatever the defaults of role and \
                 database are",
                "connect directly, or through a pooler in session mode",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use strum::VariantArray;

    use super::*;
    use crate::domain::outcome::{FailureClass, class_of_kafka, class_of_sqlstate};

    #[test]
    fn what_the_daemon_says_names_the_remedy() {
        for dependency in Dependency::VARIANTS {
            let Fact { told, does, says, remedy } = dependency.fact();
            assert!(!says.is_empty() && !remedy.is_empty(), "{dependency:?}");
            let says_it = matches!(told, Told::Checks(_)) && does != Does::Set;
            assert!(!says_it || says.contains(&remedy), "{dependency:?}: {says}");
        }
    }

    #[test]
    fn an_error_that_names_a_dependency_never_dead_letters_a_payment() {
        for dependency in Dependency::VARIANTS {
            let class = match dependency.fact().told {
                Told::Checks(when) => {
                    assert!(!when.is_empty(), "{dependency:?}");
                    continue;
                }
                Told::Kafka(code) => class_of_kafka(code),
                Told::Postgres(sqlstate) => class_of_sqlstate(sqlstate, None),
            };
            let waits = [FailureClass::Persistent, FailureClass::Transient, FailureClass::Fenced];
            assert!(waits.contains(&class), "{dependency:?}: {class:?}");
        }
    }

    #[test]
    fn each_rule_about_topics_is_a_dependency() {
        let named: BTreeSet<String> = Dependency::VARIANTS.iter().map(|d| d.fact().remedy).collect();
        for rule in crate::kafka::topic_rules::RULES {
            assert!(named.contains(&rule.remedy("TOPIC")), "{}", rule.setting);
        }
    }
}
