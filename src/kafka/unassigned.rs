//! Detects unassigned partitions, and makes the group assign them.
//!
//! A cooperative rebalance has two rounds: the first revokes partitions, the second, which the members that
//! gave up partitions trigger, assigns them to their new owners. A static member that dies between the two
//! returns to its assignment of the first round, without another rebalance (KIP-345). The partitions that it
//! gave up then stay unassigned until the membership changes; restarts of static members do not change it.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdkafka::client::OAuthToken;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientConfig, ClientContext, TopicPartitionList};

use super::group::{Group, QuietLog, REQUEST_TIMEOUT};
use super::token;
use crate::kafka::client::make_client;
use crate::telemetry::logging::RateLimited;

/// How often the group is checked.
const TICK: Duration = Duration::from_secs(5);
/// Partitions that are unassigned in two checks this far apart stay so: the second round of a rebalance
/// follows the first at once.
const SECOND_LOOK: Duration = Duration::from_secs(3);
/// How long the temporary member waits for its rebalance.
const VISIT_MAX: Duration = Duration::from_secs(60);

/// The group as one member sees it.
#[derive(Clone)]
pub struct Membership {
    /// Configuration of a consumer of the group.
    pub config: ClientConfig,
    /// `group.id`.
    pub group_id: String,
    /// `group.instance.id` of this member.
    pub instance_id: String,
    /// Number of partitions of the topic.
    pub partitions: usize,
}

/// The same state, or the same failure, may be found every few seconds.
static FOUND: RateLimited = RateLimited::new(5, Duration::from_secs(60));
static FAILED: RateLimited = RateLimited::new(5, Duration::from_secs(60));

/// Checks the group periodically; never returns.
pub async fn watch(group: &Group, membership: &Membership) {
    let mut was_orphaned = false;
    loop {
        tokio::time::sleep(if was_orphaned { SECOND_LOOK } else { TICK }).await;
        let (asked, member) = (group.clone(), membership.clone());
        let look = tokio::task::spawn_blocking(move || look(&asked, &member)).await;
        let Ok(Ok(Some(look))) = look else {
            was_orphaned = false;
            continue;
        };
        let is_orphaned = look.owned < membership.partitions;
        if is_orphaned && was_orphaned && look.is_ours_to_mend {
            if let Some(suppressed) = FOUND.pass() {
                tracing::warn!(
                    owned = look.owned,
                    partitions = membership.partitions,
                    suppressed,
                    "partitions of the group are unassigned, triggering a rebalance"
                );
            }
            let (topic, member) = (group.topic().to_owned(), membership.clone());
            let visit = tokio::task::spawn_blocking(move || visit(&topic, &member)).await;
            if let Ok(Err(error)) = visit
                && let Some(suppressed) = FAILED.pass()
            {
                tracing::warn!(%error, suppressed, "triggering a rebalance for unassigned partitions failed");
            }
        }
        was_orphaned = is_orphaned;
    }
}

struct Look {
    owned: usize,
    /// True for one member only, so that not all of them trigger rebalances at once.
    is_ours_to_mend: bool,
}

/// `None` while the group is not in state `Stable`.
fn look(group: &Group, membership: &Membership) -> Result<Option<Look>, KafkaError> {
    let groups = group.consumer().fetch_group_list(Some(&membership.group_id), REQUEST_TIMEOUT)?;
    let Some(found) = groups.groups().iter().find(|g| g.name() == membership.group_id) else {
        return Ok(None);
    };
    if found.state() != "Stable" {
        return Ok(None);
    }
    let owned = found.members().iter().map(|m| assigned(m.assignment().unwrap_or_default(), group.topic()));
    // The broker derives a static member's id from its `group.instance.id`.
    let first = found.members().iter().map(|m| m.id()).min().unwrap_or_default();
    let is_ours_to_mend = first.starts_with(&format!("{}-", membership.instance_id));
    Ok(Some(Look { owned: owned.sum(), is_ours_to_mend }))
}

/// Number of partitions of `topic` in a member's assignment in the format of the consumer protocol: version,
/// then an array of topics, each a name and an array of partitions.
fn assigned(bytes: &[u8], topic: &str) -> usize {
    fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (taken, left) = rest.split_at_checked(count)?;
        *rest = left;
        Some(taken)
    }
    fn count(rest: &mut &[u8]) -> Option<usize> {
        usize::try_from(i32::from_be_bytes(take(rest, 4)?.try_into().ok()?)).ok()
    }
    fn sum(rest: &mut &[u8], topic: &str) -> Option<usize> {
        take(rest, 2)?;
        let mut found = 0;
        for _ in 0..count(rest)? {
            let length = u16::from_be_bytes(take(rest, 2)?.try_into().ok()?);
            let is_ours = take(rest, usize::from(length))? == topic.as_bytes();
            let partitions = count(rest)?;
            take(rest, partitions.checked_mul(4)?)?;
            found += if is_ours { partitions } else { 0 };
        }
        Some(found)
    }
    let mut rest = bytes;
    sum(&mut rest, topic).unwrap_or(0)
}

/// A temporary member: takes part in one rebalance, fetches nothing, and leaves.
#[derive(Default)]
struct Visitor(AtomicBool);

impl ClientContext for Visitor {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        QuietLog.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        QuietLog.error(error, reason);
    }
}

impl ConsumerContext for Visitor {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, _: &mut TopicPartitionList) {
        let nothing = TopicPartitionList::new();
        // An error means that the next rebalance has begun, which serves the purpose, too.
        let _ = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => consumer.incremental_assign(&nothing),
            _ => consumer.incremental_unassign(&nothing),
        };
        self.0.store(true, Ordering::Release);
    }
}

/// Joins the group as a dynamic member and leaves at once. Both change the membership, so the group assigns
/// all its partitions again.
fn visit(topic: &str, membership: &Membership) -> Result<(), KafkaError> {
    let mut config = membership.config.clone();
    config.remove("group.instance.id");
    let visitor: BaseConsumer<Visitor> = make_client(&config, Visitor::default())?;
    visitor.subscribe(&[topic])?;
    let deadline = Instant::now() + VISIT_MAX;
    while !visitor.context().0.load(Ordering::Acquire) && Instant::now() < deadline {
        // No record can arrive, because nothing is assigned.
        let _ = visitor.poll(Duration::from_millis(100));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::assigned;

    #[test]
    fn partitions_are_counted_in_the_consumer_protocols_assignment() {
        let mut bytes = vec![0, 1, 0, 0, 0, 2];
        bytes.extend([0, 1, b'x', 0, 0, 0, 1, 0, 0, 0, 7]);
        bytes.extend([0, 2, b'i', b'n', 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]);
        bytes.extend([0xff; 4]);
        assert_eq!(assigned(&bytes, "in"), 2);
        assert_eq!(assigned(&bytes, "x"), 1);
        assert_eq!(assigned(&bytes, "y"), 0);
        assert_eq!(assigned(&[], "in"), 0);
        assert_eq!(assigned(&bytes[..20], "in"), 0);
    }
}
