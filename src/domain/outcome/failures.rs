//! Classifies failures by how they are handled: one table for SQLSTATEs, one for Kafka error codes.
//! docs/reference/failures.md has the same tables; a test keeps the two equal.

use std::fmt::Write;

use rdkafka::types::RDKafkaErrorCode;

/// The class of a failure, which determines how it is handled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureClass {
    /// A row of the batch may be at fault: the batch is bisected, and the row is dead-lettered.
    Record,
    /// Goes away by itself: the batch is kept and retried with a backoff.
    Transient,
    /// No record is at fault, and an operator must fix something: retried as well, logged as an error.
    Persistent,
    /// Another process owned the partitions: the lane drops its state and reads both cursors again.
    Fenced,
}

impl FailureClass {
    /// All classes.
    pub const ALL: [Self; 4] = [Self::Record, Self::Transient, Self::Persistent, Self::Fenced];

    /// The label used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Transient => "passing",
            Self::Persistent => "systemic",
            Self::Fenced => "fenced",
        }
    }

    /// How the class is handled, for the documentation.
    pub fn policy(self) -> &'static str {
        match self {
            Self::Record => {
                "the batch is bisected: its halves are written under savepoints, in one transaction. A row \
                 that is refused alone, twice, is dead-lettered as `rejected_by_database` if the database \
                 accepts another row in its place, and all others are written. If it accepts none, the batch \
                 is retried together with newer records, after up to 10 s. If more than 10 and more than 10 \
                 % of the rows are refused: systemic"
            }
            Self::Transient => {
                "the batch stays in memory and is retried after 0.1 to 5 s; nothing is skipped or dead-lettered"
            }
            Self::Persistent => {
                "as passing, but retried after up to 10 s, with an error in the log; readiness reports that \
                 an operator must fix something"
            }
            Self::Fenced => "the lane drops its state and resumes its partitions from both cursors",
        }
    }
}

/// The SQLSTATE that `move_cursors` raises when a cursor differs from what the lane last read or wrote.
pub const SQLSTATE_CURSOR_MOVED: &str = "PW001";

/// One line of a table: codes, their class and their meaning.
#[derive(Clone, Copy, Debug)]
pub struct Rule<C: 'static> {
    /// The codes. Two characters stand for a whole class of SQLSTATEs.
    pub codes: &'static [C],
    /// How the failure is handled.
    pub class: FailureClass,
    /// What the codes mean.
    pub meaning: &'static str,
}

/// SQLSTATEs (PostgreSQL manual, appendix A); the first line with a code, or with its class, applies. Other
/// codes are persistent failures, so that an unexpected code never dead-letters a valid record.
pub const SQLSTATE_RULES: &[Rule<&str>] = &[
    Rule {
        codes: &[SQLSTATE_CURSOR_MOVED],
        class: FailureClass::Fenced,
        meaning: "a cursor differs from what this lane last read or wrote",
    },
    Rule {
        codes: &["40001", "40P01", "55P03"],
        class: FailureClass::Transient,
        meaning: "serialization failure, deadlock, lock not available in time",
    },
    Rule {
        codes: &["57014", "25P03", "25P04"],
        class: FailureClass::Transient,
        meaning: "timeout of a statement, an idle transaction or a transaction",
    },
    Rule {
        codes: &["25006"],
        class: FailureClass::Transient,
        meaning: "the server is a standby at the moment",
    },
    Rule { codes: &["08"], class: FailureClass::Transient, meaning: "connection failure" },
    Rule {
        codes: &["53"],
        class: FailureClass::Transient,
        meaning: "insufficient resources: disk full, out of memory, too many connections",
    },
    Rule {
        codes: &["57"],
        class: FailureClass::Transient,
        meaning: "operator intervention: shutdown, crash of another session, starting up",
    },
    Rule { codes: &["58030"], class: FailureClass::Transient, meaning: "I/O error of the server's disk" },
    Rule {
        codes: &["22P04", "22P03", "22023"],
        class: FailureClass::Persistent,
        meaning: "the rows do not have the table's format: its columns were changed",
    },
    Rule { codes: &["22"], class: FailureClass::Record, meaning: "data: out of range, encoding, too long" },
    Rule {
        codes: &["23"],
        class: FailureClass::Record,
        meaning: "constraint violation. 23514 without a constraint name is systemic: a table lacks a partition",
    },
    Rule {
        codes: &["54000"],
        class: FailureClass::Record,
        meaning: "too large for the database, for example for an added index",
    },
    Rule { codes: &["P0001"], class: FailureClass::Record, meaning: "a trigger refuses the row" },
];

/// The class of a SQLSTATE. `constraint` is the constraint's name in the server's error.
pub fn class_of_sqlstate(code: &str, constraint: Option<&str>) -> FailureClass {
    if code == "23514" && constraint.is_none() {
        // No partition exists for the row, or the row violates the partition's bounds.
        return FailureClass::Persistent;
    }
    let names = |named: &&str| *named == code || (named.len() == 2 && code.get(..2) == Some(*named));
    SQLSTATE_RULES
        .iter()
        .find(|rule| rule.codes.iter().any(names))
        .map_or(FailureClass::Persistent, |rule| rule.class)
}

use RDKafkaErrorCode as Code;

/// Error codes of Kafka and of the client library. Other codes are persistent failures.
pub const KAFKA_RULES: &[Rule<RDKafkaErrorCode>] = &[
    Rule {
        codes: &[
            Code::BrokerTransportFailure,
            Code::AllBrokersDown,
            Code::Resolve,
            Code::BrokerDestroy,
            Code::NetworkException,
            Code::BrokerNotAvailable,
            Code::NodeUpdate,
            Code::UnknownBroker,
        ],
        class: FailureClass::Transient,
        meaning: "a broker is unavailable",
    },
    Rule {
        codes: &[
            Code::OperationTimedOut,
            Code::RequestTimedOut,
            Code::MessageTimedOut,
            Code::TimedOutQueue,
            Code::ThrottlingQuotaExceeded,
            Code::Retry,
            Code::InProgress,
            Code::PreviousInProgress,
            Code::QueueFull,
            Code::WaitCache,
            Code::PurgeQueue,
            Code::PurgeInflight,
            Code::Outdated,
            Code::Conflict,
            Code::State,
        ],
        class: FailureClass::Transient,
        meaning: "a timeout, or not ready yet",
    },
    Rule {
        codes: &[
            Code::LeaderNotAvailable,
            Code::NotLeaderForPartition,
            Code::ReplicaNotAvailable,
            Code::PreferredLeaderNotAvailable,
            Code::EligibleLeadersNotAvailable,
            Code::FencedLeaderEpoch,
            Code::UnknownLeaderEpoch,
            Code::OffsetNotAvailable,
            Code::NotEnoughReplicas,
            Code::NotEnoughReplicasAfterAppend,
            Code::ISRInsufficient,
            Code::KafkaStorageError,
            Code::ReassignmentInProgress,
            Code::NotController,
            Code::StaleControllerEpoch,
            Code::StaleBrokerEpoch,
            Code::ListenerNotFound,
            Code::FetchSessionIdNotFound,
            Code::InvalidFetchSessionEpoch,
            Code::LogTruncation,
            Code::OffsetOutOfRange,
            Code::AutoOffsetReset,
            Code::RebootstrapRequired,
        ],
        class: FailureClass::Transient,
        meaning: "leaders and replicas are changing",
    },
    Rule {
        codes: &[
            Code::CoordinatorLoadInProgress,
            Code::CoordinatorNotAvailable,
            Code::NotCoordinator,
            Code::WaitingForCoordinator,
            Code::ConcurrentTransactions,
            Code::TransactionCoordinatorFenced,
            Code::UnstableOffsetCommit,
            Code::InvalidProducerEpoch,
            Code::InvalidProducerIdMapping,
            Code::UnknownProducerId,
            Code::OutOfOrderSequenceNumber,
            Code::DuplicateSequenceNumber,
            Code::InvalidTransactionalState,
            Code::OperationNotAttempted,
        ],
        class: FailureClass::Transient,
        meaning: "the group or transaction coordinator is changing; the transaction is aborted and \
                  retried",
    },
    Rule {
        codes: &[
            Code::IllegalGeneration,
            Code::UnknownMemberId,
            Code::RebalanceInProgress,
            Code::MemberIdRequired,
            Code::AssignmentLost,
            Code::FencedInstanceId,
            Code::StaleMemberEpoch,
            Code::FencedMemberEpoch,
        ],
        class: FailureClass::Fenced,
        meaning: "not a member of the group's current generation. FENCED_INSTANCE_ID of the consumer itself ends \
                  the daemon",
    },
    Rule {
        codes: &[Code::ProducerFenced, Code::Fenced],
        class: FailureClass::Fenced,
        meaning: "another producer took over the transactional id; a warning names the id",
    },
    Rule {
        codes: &[
            Code::UnknownTopicOrPartition,
            Code::UnknownTopic,
            Code::UnknownPartition,
            Code::UnknownTopicId,
            Code::InvalidTopic,
        ],
        class: FailureClass::Persistent,
        meaning: "a topic is missing",
    },
    Rule {
        codes: &[
            Code::Authentication,
            Code::SaslAuthenticationFailed,
            Code::UnsupportedSASLMechanism,
            Code::IllegalSASLState,
            Code::SSL,
            Code::SecurityDisabled,
            Code::DelegationTokenExpired,
        ],
        class: FailureClass::Persistent,
        meaning: "authentication and TLS",
    },
    Rule {
        codes: &[
            Code::TopicAuthorizationFailed,
            Code::GroupAuthorizationFailed,
            Code::ClusterAuthorizationFailed,
            Code::TransactionalIdAuthorizationFailed,
            Code::PolicyViolation,
        ],
        class: FailureClass::Persistent,
        meaning: "a permission is missing",
    },
    Rule {
        codes: &[
            Code::MessageSizeTooLarge,
            Code::MessageBatchTooLarge,
            Code::InvalidTransactionTimeout,
            Code::InvalidConfig,
            Code::UnsupportedVersion,
            Code::UnsupportedFeature,
        ],
        class: FailureClass::Persistent,
        meaning: "a topic or broker setting does not fit",
    },
];

/// The class of a Kafka error code.
pub fn class_of_kafka(code: RDKafkaErrorCode) -> FailureClass {
    KAFKA_RULES
        .iter()
        .find(|rule| rule.codes.contains(&code))
        .map_or(FailureClass::Persistent, |rule| rule.class)
}

/// Whether a broker refuses this client because of its credentials, certificate or permissions. The client
/// library keeps retrying, and requests only time out.
pub fn is_refusal(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        Code::Authentication
            | Code::SaslAuthenticationFailed
            | Code::UnsupportedSASLMechanism
            | Code::IllegalSASLState
            | Code::SSL
            | Code::SecurityDisabled
            | Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::TransactionalIdAuthorizationFailed
    )
}

/// The SQLSTATE classes that are metric labels.
pub const SQLSTATE_CLASSES: [&str; 14] =
    ["08", "0A", "22", "23", "25", "28", "3D", "40", "42", "53", "54", "55", "57", "58"];

/// The metric label of a SQLSTATE: its class, from a bounded set.
pub fn sqlstate_label(code: &str) -> &'static str {
    let class = code.get(..2).unwrap_or_default();
    SQLSTATE_CLASSES.into_iter().find(|k| *k == class).unwrap_or(if code == SQLSTATE_CURSOR_MOVED {
        "cursor"
    } else {
        "other"
    })
}

/// The three tables of docs/reference/failures.md.
pub fn tables() -> [String; 3] {
    let mut classes = String::from("| class | what is done |\n| - | - |\n");
    for class in FailureClass::ALL {
        // Writing to a String cannot fail.
        let _ = writeln!(classes, "| {} | {} |", class.as_str(), class.policy());
    }
    let mut sqlstates = String::from("| SQLSTATE | class | meaning |\n| - | - | - |\n");
    for rule in SQLSTATE_RULES {
        let codes: Vec<String> = rule
            .codes
            .iter()
            .map(|c| if c.len() == 2 { format!("{c}xxx") } else { (*c).to_owned() })
            .collect();
        let _ = writeln!(sqlstates, "| {} | {} | {} |", codes.join(", "), rule.class.as_str(), rule.meaning);
    }
    let _ = writeln!(sqlstates, "| every other | {} | |", FailureClass::Persistent.as_str());
    let mut kafka = String::from("| code | class | meaning |\n| - | - | - |\n");
    for rule in KAFKA_RULES {
        let codes: Vec<String> = rule.codes.iter().map(|c| format!("{c:?}")).collect();
        let _ = writeln!(kafka, "| {} | {} | {} |", codes.join(", "), rule.class.as_str(), rule.meaning);
    }
    let _ = writeln!(kafka, "| every other | {} | |", FailureClass::Persistent.as_str());
    [classes, sqlstates, kafka]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_code_that_no_line_names_never_passes_by_itself() {
        for code in ["42P01", "42501", "28P01", "XX000", "3D000", "", "zz", "2"] {
            assert_eq!(class_of_sqlstate(code, None), FailureClass::Persistent, "{code}");
        }
        assert_eq!(class_of_kafka(Code::Unknown), FailureClass::Persistent);
    }

    #[test]
    fn what_goes_away_by_itself_is_waited_for() {
        for code in ["08006", "40001", "40P01", "53100", "53300", "57P01", "57P03", "25006", "55P03"] {
            assert_eq!(class_of_sqlstate(code, None), FailureClass::Transient, "{code}");
        }
        assert_eq!(class_of_sqlstate(SQLSTATE_CURSOR_MOVED, None), FailureClass::Fenced);
    }

    #[test]
    fn a_row_is_suspected_only_where_a_row_can_be_at_fault() {
        for code in ["22001", "22003", "22021", "22P05", "23502", "23505", "23P01", "54000", "P0001"] {
            assert_eq!(class_of_sqlstate(code, None), FailureClass::Record, "{code}");
        }
        assert_eq!(class_of_sqlstate("23514", Some("a_check")), FailureClass::Record);
        assert_eq!(class_of_sqlstate("23514", None), FailureClass::Persistent, "no partition for the row");
        assert_eq!(class_of_sqlstate("22P04", None), FailureClass::Persistent, "the table has other columns");
    }

    #[test]
    fn no_code_is_named_twice() {
        let mut sqlstates = BTreeSet::new();
        for code in SQLSTATE_RULES.iter().flat_map(|rule| rule.codes) {
            assert!(sqlstates.insert(*code), "{code}");
        }
        let mut codes = Vec::new();
        for code in KAFKA_RULES.iter().flat_map(|rule| rule.codes) {
            assert!(!codes.contains(code), "{code:?}");
            codes.push(*code);
        }
    }

    #[test]
    fn the_documentation_holds_these_very_tables() {
        let page = include_str!("../../../docs/reference/failures.md");
        for table in tables() {
            assert!(page.contains(&table), "docs/reference/failures.md lacks this table:\n{table}");
        }
        let rows = |text: &str| text.lines().filter(|line| line.starts_with('|')).count();
        assert_eq!(
            rows(page),
            tables().iter().map(|t| rows(t)).sum::<usize>(),
            "docs/reference/failures.md has other tables, too"
        );
    }
}
