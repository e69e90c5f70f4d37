//! Classifies failures by how they are handled: SQLSTATEs and Kafka error codes.
//!
//! docs/reference/failures.md explains each class and each code; a test keeps it equal to this file.

use rdkafka::types::RDKafkaErrorCode as Code;

/// The class of a failure, which determines how it is handled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum FailureClass {
    /// A row of the batch may be at fault: the batch is bisected, and the row is dead-lettered.
    Record,
    /// Rows of the batch are refused, and it is not known whether they or the database are at fault: the
    /// batch is retried together with newer records.
    #[strum(serialize = "record")]
    Undecided,
    /// Goes away by itself: the batch is kept and retried with a backoff.
    #[strum(serialize = "passing")]
    Transient,
    /// No record is at fault, and an operator must fix something: retried as well, logged as an error.
    #[strum(serialize = "systemic")]
    Persistent,
    /// Another process owned the partitions: the lane drops its state and reads both cursors again.
    Fenced,
}

impl FailureClass {
    /// The label used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// The SQLSTATE that `move_cursors` raises when a cursor differs from what the lane last read or wrote.
pub const SQLSTATE_CURSOR_MOVED: &str = "PW001";

/// The class of a SQLSTATE (PostgreSQL manual, appendix A). `constraint` is the constraint's name in the
/// server's error. An unexpected code is a persistent failure, so that it never dead-letters a valid record.
pub fn class_of_sqlstate(code: &str, constraint: Option<&str>) -> FailureClass {
    match code {
        SQLSTATE_CURSOR_MOVED => FailureClass::Fenced,
        // Serialization failure, deadlock, lock not available in time.
        "40001" | "40P01" | "55P03" => FailureClass::Transient,
        // Timeouts; a standby at the moment; an I/O error of the server's disk.
        "57014" | "25P03" | "25P04" | "25006" | "58030" => FailureClass::Transient,
        // The rows do not have the table's format: its columns were changed.
        "22P04" | "22P03" | "22023" => FailureClass::Persistent,
        // No partition exists for the row, or the row violates the partition's bounds.
        "23514" if constraint.is_none() => FailureClass::Persistent,
        // Too large for the database; refused by a trigger.
        "54000" | "P0001" => FailureClass::Record,
        _ => match code.get(..2) {
            Some("08" | "53" | "57") => FailureClass::Transient,
            Some("22" | "23") => FailureClass::Record,
            _ => FailureClass::Persistent,
        },
    }
}

/// The class of an error code of Kafka or of the client library. An unexpected code is a persistent failure.
pub fn class_of_kafka(code: Code) -> FailureClass {
    match code {
        // A broker is unavailable.
        Code::BrokerTransportFailure
        | Code::AllBrokersDown
        | Code::Resolve
        | Code::BrokerDestroy
        | Code::NetworkException
        | Code::BrokerNotAvailable
        | Code::NodeUpdate
        | Code::UnknownBroker => FailureClass::Transient,
        // A timeout, or not ready yet.
        Code::OperationTimedOut
        | Code::RequestTimedOut
        | Code::MessageTimedOut
        | Code::TimedOutQueue
        | Code::ThrottlingQuotaExceeded
        | Code::Retry
        | Code::InProgress
        | Code::PreviousInProgress
        | Code::QueueFull
        | Code::WaitCache
        | Code::PurgeQueue
        | Code::PurgeInflight
        | Code::Outdated
        | Code::Conflict
        | Code::State => FailureClass::Transient,
        // Leaders and replicas are changing.
        Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::ReplicaNotAvailable
        | Code::PreferredLeaderNotAvailable
        | Code::EligibleLeadersNotAvailable
        | Code::FencedLeaderEpoch
        | Code::UnknownLeaderEpoch
        | Code::OffsetNotAvailable
        | Code::NotEnoughReplicas
        | Code::NotEnoughReplicasAfterAppend
        | Code::ISRInsufficient
        | Code::KafkaStorageError
        | Code::ReassignmentInProgress
        | Code::NotController
        | Code::StaleControllerEpoch
        | Code::StaleBrokerEpoch
        | Code::ListenerNotFound
        | Code::FetchSessionIdNotFound
        | Code::InvalidFetchSessionEpoch
        | Code::LogTruncation
        | Code::OffsetOutOfRange
        | Code::AutoOffsetReset
        | Code::RebootstrapRequired => FailureClass::Transient,
        // The group or transaction coordinator is changing; the transaction is aborted and retried.
        Code::CoordinatorLoadInProgress
        | Code::CoordinatorNotAvailable
        | Code::NotCoordinator
        | Code::WaitingForCoordinator
        | Code::ConcurrentTransactions
        | Code::TransactionCoordinatorFenced
        | Code::UnstableOffsetCommit
        | Code::InvalidProducerEpoch
        | Code::InvalidProducerIdMapping
        | Code::UnknownProducerId
        | Code::OutOfOrderSequenceNumber
        | Code::DuplicateSequenceNumber
        | Code::InvalidTransactionalState
        | Code::OperationNotAttempted => FailureClass::Transient,
        // Not a member of the group's current generation.
        Code::IllegalGeneration
        | Code::UnknownMemberId
        | Code::RebalanceInProgress
        | Code::MemberIdRequired
        | Code::AssignmentLost
        | Code::FencedInstanceId
        | Code::StaleMemberEpoch
        | Code::FencedMemberEpoch => FailureClass::Fenced,
        // Another producer took over the transactional id.
        Code::ProducerFenced | Code::Fenced => FailureClass::Fenced,
        _ => FailureClass::Persistent,
    }
}

/// Whether a broker refuses this client because of its credentials, certificate or permissions. The client
/// library keeps retrying, and requests only time out.
pub fn is_refusal(code: Code) -> bool {
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

#[cfg(test)]
mod tests;
