//! Failures by what is done about them: one table for SQLSTATEs, one for Kafka's codes. docs/reference/failures.md holds
//! the same tables; a test keeps the two equal.

use std::fmt::Write;

use rdkafka::types::RDKafkaErrorCode;

/// Why a step failed, by what is to be done about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureClass {
    /// A row of the batch may be at fault: it is looked for, and goes to the dead letters.
    Record,
    /// Goes away by itself: keep the batch, back off, try again.
    Passing,
    /// Somebody has to mend something, records are not at fault: as passing, but loud.
    Systemic,
    /// Another owner was there: drop the lane's state and read everything again.
    Fenced,
}

impl FailureClass {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Record, Self::Passing, Self::Systemic, Self::Fenced];

    /// The label used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Passing => "passing",
            Self::Systemic => "systemic",
            Self::Fenced => "fenced",
        }
    }

    /// What is done about it, for the documentation.
    pub fn policy(self) -> &'static str {
        match self {
            Self::Record => {
                "the batch is written again in halves under savepoints, in one transaction; a row that is refused \
                 alone, twice, goes to the dead letters as `rejected_by_database` if the database takes another row in \
                 its place, and all others are written. If it takes none, the batch is tried again together with what \
                 has come since, after up to 10 s. More than 10 and more than 10 % of the rows: systemic"
            }
            Self::Passing => {
                "the batch stays in memory and is tried again, after 100 ms to 5 s; nothing is skipped or diverted"
            }
            Self::Systemic => {
                "as passing, after up to 10 s, with an error in the log; readiness says that a person has to mend \
                 something"
            }
            Self::Fenced => {
                "the lane forgets what it holds and takes its partitions up anew from both cursors"
            }
        }
    }
}

/// The SQLSTATE that `move_cursors` raises when a cursor is not where the lane last saw it.
pub const SQLSTATE_CURSOR_MOVED: &str = "PW001";

/// One line of a table: codes, their class, and why.
#[derive(Clone, Copy, Debug)]
pub struct Rule<C: 'static> {
    /// The codes; of SQLSTATEs also whole classes, by their first two characters.
    pub codes: &'static [C],
    /// What is done.
    pub class: FailureClass,
    /// What the codes mean.
    pub meaning: &'static str,
}

/// SQLSTATEs (PostgreSQL manual, appendix A); the first line that names a code, or its class, counts. What no
/// line names is systemic: never is a good record diverted because of a code that nobody thought of.
pub const SQLSTATE_RULES: &[Rule<&str>] = &[
    Rule {
        codes: &[SQLSTATE_CURSOR_MOVED],
        class: FailureClass::Fenced,
        meaning: "a cursor is not where this lane left it",
    },
    Rule {
        codes: &["40001", "40P01", "55P03"],
        class: FailureClass::Passing,
        meaning: "serialization failure, deadlock, lock not available in time",
    },
    Rule {
        codes: &["57014", "25P03", "25P04"],
        class: FailureClass::Passing,
        meaning: "a time limit: of a statement, of an idle transaction, of a transaction",
    },
    Rule {
        codes: &["25006"],
        class: FailureClass::Passing,
        meaning: "the server is a standby for the moment",
    },
    Rule { codes: &["08"], class: FailureClass::Passing, meaning: "the connection" },
    Rule {
        codes: &["53"],
        class: FailureClass::Passing,
        meaning: "resources: disk full, out of memory, too many connections",
    },
    Rule {
        codes: &["57"],
        class: FailureClass::Passing,
        meaning: "the operator: shutdown, crash of another session, starting up",
    },
    Rule { codes: &["58030"], class: FailureClass::Passing, meaning: "the server's disk does not answer" },
    Rule {
        codes: &["22P04", "22P03", "22023"],
        class: FailureClass::Systemic,
        meaning: "the rows' format is not the table's: its columns were changed",
    },
    Rule { codes: &["22"], class: FailureClass::Record, meaning: "data: out of range, encoding, too long" },
    Rule {
        codes: &["23"],
        class: FailureClass::Record,
        meaning: "integrity: a constraint. 23514 that names no constraint is systemic: a table lacks a partition",
    },
    Rule {
        codes: &["54000"],
        class: FailureClass::Record,
        meaning: "too large for the database, as for an index that was added",
    },
    Rule { codes: &["P0001"], class: FailureClass::Record, meaning: "a trigger refuses" },
];

/// Sorts a SQLSTATE. `constraint` is the name of the constraint that the server gave with it.
pub fn class_of_sqlstate(code: &str, constraint: Option<&str>) -> FailureClass {
    if code == "23514" && constraint.is_none() {
        // A row for which there is no partition, or which does not belong into this one.
        return FailureClass::Systemic;
    }
    let names = |named: &&str| *named == code || (named.len() == 2 && code.get(..2) == Some(*named));
    SQLSTATE_RULES
        .iter()
        .find(|rule| rule.codes.iter().any(names))
        .map_or(FailureClass::Systemic, |rule| rule.class)
}

use RDKafkaErrorCode as Code;

/// Kafka's codes and those of the client library. What no line names is systemic.
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
        class: FailureClass::Passing,
        meaning: "a broker is away",
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
        class: FailureClass::Passing,
        meaning: "not in time, or not yet",
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
        class: FailureClass::Passing,
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
        class: FailureClass::Passing,
        meaning: "the coordinator of the group or of transactions is changing; the transaction is aborted and tried \
                  again",
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
        meaning: "not a member of the group's present generation. FENCED_INSTANCE_ID of the consumer itself ends the \
                  daemon",
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
        class: FailureClass::Systemic,
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
        class: FailureClass::Systemic,
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
        class: FailureClass::Systemic,
        meaning: "a right is missing",
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
        class: FailureClass::Systemic,
        meaning: "settings of topics and brokers that do not fit",
    },
];

/// Sorts a Kafka error code.
pub fn class_of_kafka(code: RDKafkaErrorCode) -> FailureClass {
    KAFKA_RULES
        .iter()
        .find(|rule| rule.codes.contains(&code))
        .map_or(FailureClass::Systemic, |rule| rule.class)
}

/// Whether a broker refuses this client: its credentials, its certificate, its rights. The client library keeps
/// trying, and requests only time out.
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

/// The classes of SQLSTATE that metrics tell apart.
pub const SQLSTATE_CLASSES: [&str; 14] =
    ["08", "0A", "22", "23", "25", "28", "3D", "40", "42", "53", "54", "55", "57", "58"];

/// How a class of SQLSTATE is called in metrics: its first two characters, from a bounded set.
pub fn sqlstate_label(code: &str) -> &'static str {
    let class = code.get(..2).unwrap_or_default();
    SQLSTATE_CLASSES.into_iter().find(|k| *k == class).unwrap_or(if code == SQLSTATE_CURSOR_MOVED {
        "cursor"
    } else {
        "other"
    })
}

/// The three tables as docs/reference/failures.md has them.
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
    let _ = writeln!(sqlstates, "| every other | {} | |", FailureClass::Systemic.as_str());
    let mut kafka = String::from("| code | class | meaning |\n| - | - | - |\n");
    for rule in KAFKA_RULES {
        let codes: Vec<String> = rule.codes.iter().map(|c| format!("{c:?}")).collect();
        let _ = writeln!(kafka, "| {} | {} | {} |", codes.join(", "), rule.class.as_str(), rule.meaning);
    }
    let _ = writeln!(kafka, "| every other | {} | |", FailureClass::Systemic.as_str());
    [classes, sqlstates, kafka]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_code_that_no_line_names_never_passes_by_itself() {
        for code in ["42P01", "42501", "28P01", "XX000", "3D000", "", "zz", "2"] {
            assert_eq!(class_of_sqlstate(code, None), FailureClass::Systemic, "{code}");
        }
        assert_eq!(class_of_kafka(Code::Unknown), FailureClass::Systemic);
    }

    #[test]
    fn what_goes_away_by_itself_is_waited_for() {
        for code in ["08006", "40001", "40P01", "53100", "53300", "57P01", "57P03", "25006", "55P03"] {
            assert_eq!(class_of_sqlstate(code, None), FailureClass::Passing, "{code}");
        }
        assert_eq!(class_of_sqlstate(SQLSTATE_CURSOR_MOVED, None), FailureClass::Fenced);
    }

    #[test]
    fn a_row_is_suspected_only_where_a_row_can_be_at_fault() {
        for code in ["22001", "22003", "22021", "22P05", "23502", "23505", "23P01", "54000", "P0001"] {
            assert_eq!(class_of_sqlstate(code, None), FailureClass::Record, "{code}");
        }
        assert_eq!(class_of_sqlstate("23514", Some("a_check")), FailureClass::Record);
        assert_eq!(class_of_sqlstate("23514", None), FailureClass::Systemic, "no partition for the row");
        assert_eq!(class_of_sqlstate("22P04", None), FailureClass::Systemic, "the table has other columns");
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
        let page = include_str!("../../docs/reference/failures.md");
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
