//! Why the brokers refuse a member. librdkafka reports these errors to the poll, and tries again; it does not
//! report transient ones, as of a coordinator that is not available
//! ([`join_wait`](super::group::Group::join_wait)).

use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode as Code;

use crate::telemetry::logging::RateLimited;

/// The reasons may alternate.
static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));

/// What decides whether the brokers accept a member, for the errors with which they refuse it.
pub fn advice(code: Code) -> Option<&'static str> {
    Some(match code {
        Code::InconsistentGroupProtocol => {
            "members with another partition.assignment.strategy than cooperative-sticky, or another \
             group.protocol than classic, are in it; stop them, or set another kafka.group_id"
        }
        Code::InvalidSessionTimeout => {
            "session.timeout.ms in kafka.properties is outside of the brokers' group.min.session.timeout.ms to \
             group.max.session.timeout.ms"
        }
        Code::GroupMaxSizeReached => {
            "it has as many members as the brokers' group.max.size allows; run fewer instances, or raise it"
        }
        Code::InvalidGroupId => "kafka.group_id is not a valid name of a group",
        Code::GroupAuthorizationFailed => "the right Read on the group kafka.group_id is missing",
        Code::TopicAuthorizationFailed => "the rights Read and Describe on kafka.input_topic are missing",
        _ => return None,
    })
}

/// The last error, logged once.
#[derive(Default)]
pub struct JoinFailure(Option<Code>);

impl JoinFailure {
    /// Logs an error that is not the last one; returns the reason if it is about joining.
    pub fn note(&mut self, code: Code) -> Option<String> {
        let advice = advice(code)?;
        if self.0 != Some(code)
            && let Some(suppressed) = LIMIT.pass_late()
        {
            self.0 = Some(code);
            tracing::warn!(?code, detail = advice, suppressed, "the group cannot be joined, trying again");
        }
        Some(format!("not joined yet: {code:?}: {advice}"))
    }
}
