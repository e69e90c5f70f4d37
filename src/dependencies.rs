//! What the daemon depends on in topics, group, schema and sessions, as one list.
//!
//! docs/reference/dependencies.md is generated from it, and `doctor` checks each item. The words come from the
//! daemon's own checks.

use rdkafka::types::RDKafkaErrorCode as Code;
use uuid::Uuid;

use crate::domain::cursor::IdentityMismatch;
use crate::kafka::join_failure;
use crate::kafka::librdkafka::NO_TOPIC_IDS;
use crate::kafka::topic_rules::{Action, CLEANUP_POLICY, Rule, TIMESTAMP_AHEAD, TIMESTAMP_TYPE, alter};
use crate::kafka::transactions::{DEAD_LETTER_BYTES, missing_output, recreated_output, too_large};
use crate::postgres::connection::ConnectError;
use crate::postgres::schema::months::detached;
use crate::postgres::schema::{NEWEST_KNOWN, OLDEST_SUPPORTED, SchemaError, SchemaVersion};
use crate::postgres::store::no_key;

/// One thing that the daemon depends on; those of Kafka come first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
#[expect(missing_docs, reason = "`fact` describes each")]
pub enum Dependency {
    BrokersReachable,
    InputTopic,
    TopicIds,
    TopicIdentity,
    CleanupPolicy,
    TimestampType,
    TimestampAhead,
    OutputTopics,
    OutputIdentity,
    OutputSizes,
    OutputReplicas,
    MinInsyncReplicas,
    Replication,
    InputRetention,
    DeadLetterRetention,
    InputRights,
    OutputRights,
    GroupRights,
    TransactionRights,
    GroupProtocol,
    SessionTimeout,
    GroupSize,
    TransactionTimeout,
    DatabaseReachable,
    Pooling,
    ServerVersion,
    Encoding,
    Durability,
    Connections,
    Clock,
    Writable,
    SessionSettings,
    SchemaVersion,
    SchemaNewer,
    SchemaSteps,
    SchemaShape,
    GenerationKey,
    GenerationGuard,
    Months,
    ForeignColumns,
    ForeignObjects,
    RoleRights,
    RowSecurity,
    HousekeepingRole,
    DatabaseIdentity,
    Binding,
    Cursors,
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
    /// Nothing; only `doctor` checks it.
    Nothing,
}

/// What the daemon does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Does {
    /// Waits at the start; while it runs it logs an error and goes on.
    Refuse,
    /// Waits, not ready, and goes on when it is right.
    Wait,
    /// Logs a warning, or goes on without one if nothing tells it.
    Warn,
    /// Goes on, and loses payments or events, or fails later.
    Lose,
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

/// Something that only `doctor` checks.
fn unnoticed(does: Does, says: &str, remedy: &str) -> Fact {
    fact(Told::Nothing, does, says, remedy)
}

fn rule(rule: &Rule) -> Fact {
    let does = match rule.action {
        Action::Refuse => Does::Refuse,
        Action::Warn => Does::Warn,
    };
    let told = Told::Checks(&[When::Start, When::Minute]);
    fact(told, does, rule.violation("TOPIC", &rule.refused.example()), &rule.remedy("TOPIC"))
}

/// An error with which the brokers keep a member out of the group.
fn join(code: Code, remedy: &str) -> Fact {
    fact(Told::Kafka(code), Does::Wait, join_failure::advice(code).unwrap_or_default(), remedy)
}

fn right(code: Code, says: &str, arguments: &str) -> Fact {
    fact(Told::Kafka(code), Does::Wait, says, &grant(arguments))
}

/// The command that grants a right in Kafka.
pub fn grant(arguments: &str) -> String {
    format!("kafka-acls.sh --bootstrap-server BROKER --add --allow-principal User:NAME {arguments}")
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
            Self::BrokersReachable => fact(
                Told::Checks(&[When::Start, When::Seconds]),
                Does::Wait,
                "the brokers of kafka.bootstrap_servers cannot be reached, or refuse the connection",
                "kafka.bootstrap_servers",
            ),
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
                "Kafka 2.8 with metadata version 2.8",
            ),
            Self::TopicIdentity => fact(
                Told::Checks(&[When::Start, When::Seconds]),
                Does::Stop,
                IdentityMismatch::OtherTopic { expected: nil, found: nil },
                "start with a new kafka.group_id and a new, empty database",
            ),
            Self::CleanupPolicy => rule(&CLEANUP_POLICY),
            Self::TimestampType => rule(&TIMESTAMP_TYPE),
            Self::TimestampAhead => rule(&TIMESTAMP_AHEAD),
            Self::OutputTopics => {
                fact(START, Does::Wait, missing_output("TOPIC"), "payment-writer topics create")
            }
            Self::OutputIdentity => fact(
                Told::Checks(&[When::Seconds]),
                Does::Warn,
                recreated_output("TOPIC"),
                "payment-writer doctor",
            ),
            Self::OutputSizes => fact(
                Told::Kafka(Code::MessageSizeTooLarge),
                Does::Wait,
                too_large("READ", "EMAIL", "DEAD_LETTERS"),
                &alter("TOPIC", "max.message.bytes", &DEAD_LETTER_BYTES.to_string()),
            ),
            Self::OutputReplicas => fact(
                Told::Kafka(Code::NotEnoughReplicas),
                Does::Wait,
                "partitions of the outputs have at least min.insync.replicas copies",
                &alter("TOPIC", "min.insync.replicas", "1"),
            ),
            Self::MinInsyncReplicas => unnoticed(
                Does::Warn,
                "what one broker has counts as written, and is lost with it",
                &alter("TOPIC", "min.insync.replicas", "2"),
            ),
            Self::Replication => unnoticed(
                Does::Warn,
                "what a broker has is lost with it",
                "kafka-reassign-partitions.sh; payment-writer topics create --replication-factor 3 for a new topic",
            ),
            Self::InputRetention => unnoticed(
                Does::Warn,
                "a longer outage loses payments, and a database that is written again from the log does not know all ids \
                 of the last idempotency.window",
                "retention.ms of at least a day and idempotency.window",
            ),
            Self::DeadLetterRetention => unnoticed(
                Does::Warn,
                "dead letters are deleted, replayed or not",
                &alter("TOPIC", "retention.ms", "-1"),
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
            Self::Pooling => fact(
                Told::Checks(&[When::Start, When::Session]),
                Does::Wait,
                ConnectError::Pooled { target: "DATABASE".to_owned() },
                "use its session mode (pool_mode = session of PgBouncer) or a direct connection",
            ),
            Self::ServerVersion => {
                unnoticed(Does::Lose, "older servers were not tried", "Postgres 15 or newer")
            }
            Self::Encoding => unnoticed(
                Does::Lose,
                "not every payment can be stored",
                "CREATE DATABASE ... ENCODING 'UTF8'",
            ),
            Self::Durability => unnoticed(
                Does::Lose,
                "a crash of the machine loses payments, or corrupts the database",
                "ALTER SYSTEM SET fsync = on; ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf()",
            ),
            Self::Connections => unnoticed(
                Does::Warn,
                "with too few connections, lanes and commands wait",
                "max_connections, or CONNECTION LIMIT of role and database",
            ),
            Self::Clock => unnoticed(
                Does::Warn,
                "the time of records is compared with that of the database",
                "synchronise both clocks, as with chrony",
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
                "restore it, with ALTER TABLE payment_writer.TABLE and ADD PRIMARY KEY (COLUMNS), SET LOGGED, or ALTER COLUMN \
                 COLUMN TYPE TYPE",
            ),
            Self::GenerationKey => fact(
                Told::Checks(&[When::Start, When::Session, When::Batch]),
                Does::Wait,
                no_key(7).message,
                "ALTER TABLE payment_writer.idempotency_g7 ADD PRIMARY KEY (message_id)",
            ),
            Self::GenerationGuard => unnoticed(
                Does::Warn,
                "without the triggers and functions that refuse it, DELETE or TRUNCATE of message ids by hand makes later \
                 duplicates be written again",
                "payment-writer migrate",
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
            Self::Months => fact(
                Told::Checks(&[When::Minute]),
                Does::Warn,
                detached(&["payment_core_2026_03".to_owned()]),
                "payment-writer prune",
            ),
            Self::ForeignColumns => fact(
                Told::Nothing,
                Does::Wait,
                "a column that may not be null, without a default and not of this program, refuses every row (23502)",
                "ALTER TABLE payment_writer.TABLE ALTER COLUMN COLUMN DROP NOT NULL",
            ),
            Self::ForeignObjects => unnoticed(
                Does::Warn,
                "triggers, rules and constraints of others can refuse payments, which are then dead-lettered, or drop rows, \
                 which is waited for",
                "DROP TRIGGER, DROP RULE or DROP CONSTRAINT, if it is not meant to do so",
            ),
            Self::RoleRights => fact(
                Told::Postgres("42501"),
                Does::Wait,
                "the role of postgres.url lacks rights that sql/roles.sql grants",
                "psql \"$OWNER_URL\" -f sql/roles.sql",
            ),
            Self::HousekeepingRole => fact(
                Told::Postgres("42501"),
                Does::Wait,
                "the role of postgres.housekeeping_url owns the tables, so that it can make months and generations",
                "postgres.housekeeping_url",
            ),
            Self::Cursors => {
                let says = "a partition is halted; payment-writer cursors show says why";
                fact(START, Does::Wait, says, "payment-writer cursors show")
            }
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
                Told::Nothing => continue,
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
