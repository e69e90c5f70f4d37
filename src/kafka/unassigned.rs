//! Detects unassigned partitions, and makes the group assign them.
//!
//! A cooperative rebalance has two rounds: the first revokes partitions, the second, which the members that
//! gave up partitions trigger, assigns them to their new owners. A static member that dies between the two
//! returns to its assignment of the first round, without another rebalance (KIP-345). The partitions that it
//! gave up then stay unassigned until the membership changes; restarts of static members do not change it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, TryGetError};
use rdkafka::TopicPartitionList;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaRespErr;

use super::callbacks::{Callbacks, Listener};
use super::client::{ATTEMPT_TIMEOUT, make_client};
use super::group::{Group, member_config};
use crate::config::KafkaSettings;
use crate::telemetry::logging::{Lasting, RateLimited};

/// How often the group is checked.
const TICK: Duration = Duration::from_secs(5);
/// Partitions that are unassigned in two checks this far apart stay so: the second round of a rebalance
/// follows the first at once.
const SECOND_LOOK: Duration = Duration::from_secs(3);
/// How long the temporary member waits for its rebalance.
const VISIT_MAX: Duration = Duration::from_secs(60);

/// The same state, or the same failure, may be found every few seconds.
static FOUND: RateLimited = RateLimited::new(5, Duration::from_secs(60));
static FAILED: RateLimited = RateLimited::new(5, Duration::from_secs(60));

/// Checks periodically whether all `partitions` of the topic are assigned; never returns.
pub async fn watch(group: &Group, partitions: usize) {
    let (mut was_unassigned, mut unknown) = (false, Lasting::default());
    loop {
        tokio::time::sleep(if was_unassigned { SECOND_LOOK } else { TICK }).await;
        let asked = group.clone();
        let looked = tokio::task::spawn_blocking(move || look(&asked)).await;
        match &looked {
            Ok(Err(error)) if unknown.holds(error) => tracing::warn!(
                error,
                "the group's members are unknown, so partitions that stay unassigned are not noticed"
            ),
            Ok(Ok(_)) => drop(unknown.ends()),
            _ => {}
        }
        let Ok(Ok(Some(found))) = looked else {
            was_unassigned = false;
            continue;
        };
        let is_unassigned = found.assigned < partitions;
        if is_unassigned && was_unassigned && found.is_ours_to_mend {
            if let Some(suppressed) = FOUND.pass() {
                tracing::warn!(
                    owned = found.assigned,
                    partitions,
                    suppressed,
                    "partitions of the group are unassigned, triggering a rebalance"
                );
            }
            let kafka = group.settings().clone();
            let visit = tokio::task::spawn_blocking(move || visit(&kafka)).await;
            if let Ok(Err(error)) = visit
                && let Some(suppressed) = FAILED.pass()
            {
                tracing::warn!(%error, suppressed, "triggering a rebalance for unassigned partitions failed");
            }
        }
        was_unassigned = is_unassigned;
    }
}

struct Look {
    /// Number of assigned partitions.
    assigned: usize,
    /// True for one member only, so that not all of them trigger rebalances at once.
    is_ours_to_mend: bool,
}

/// `None` while the group is not in state `Stable`.
fn look(group: &Group) -> Result<Option<Look>, String> {
    let KafkaSettings { group_id, instance_id, .. } = group.settings();
    let groups = group.consumer().fetch_group_list(Some(group_id), ATTEMPT_TIMEOUT);
    let groups = groups.map_err(|error| error.to_string())?;
    // Brokers leave out a group, or its state, without the right to describe it.
    let Some(found) = groups.groups().iter().find(|g| g.name() == group_id && !g.state().is_empty()) else {
        return Err(format!(
            "the brokers do not describe group {group_id}; is the right Describe on it missing?"
        ));
    };
    let stable = Some(found).filter(|found| found.state() == "Stable");
    Ok(stable.map(|found| {
        let assigned =
            found.members().iter().map(|m| assigned(m.assignment().unwrap_or_default(), group.topic()));
        // The broker derives a static member's id from its `group.instance.id`.
        let first = found.members().iter().map(|m| m.id()).min().unwrap_or_default();
        Look { assigned: assigned.sum(), is_ours_to_mend: is_member_of(first, instance_id) }
    }))
}

/// Whether the broker gave this member id to the static member of this name: the name, a dash and a UUID.
fn is_member_of(member_id: &str, instance_id: &str) -> bool {
    let suffix = member_id.strip_prefix(instance_id).and_then(|rest| rest.strip_prefix('-'));
    suffix.is_some_and(|suffix| uuid::Uuid::try_parse(suffix).is_ok())
}

/// Number of partitions of `topic` in a member's assignment in the format of the consumer protocol: version,
/// then an array of topics, each a name and an array of partitions.
fn assigned(mut bytes: &[u8], topic: &str) -> usize {
    let mut count = || -> Result<usize, TryGetError> {
        let mut found = 0;
        bytes.try_get_u16()?;
        for _ in 0..bytes.try_get_u32()? {
            let mut name = vec![0; usize::from(bytes.try_get_u16()?)];
            bytes.try_copy_to_slice(&mut name)?;
            for _ in 0..bytes.try_get_u32()? {
                bytes.try_get_u32()?;
                found += usize::from(name == topic.as_bytes());
            }
        }
        Ok(found)
    };
    count().unwrap_or(0)
}

/// A temporary member: takes part in one rebalance, fetches nothing, and leaves.
#[derive(Default)]
struct Visitor(AtomicBool);

impl Listener for Visitor {}

impl ConsumerContext for Callbacks<Visitor> {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, _: &mut TopicPartitionList) {
        let nothing = TopicPartitionList::new();
        // An error means that the next rebalance has begun, which serves the purpose, too.
        let _ = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => consumer.incremental_assign(&nothing),
            _ => consumer.incremental_unassign(&nothing),
        };
        self.0.0.store(true, Ordering::Release);
    }
}

/// Joins the group as a dynamic member and leaves at once. Both change the membership, so the group assigns
/// all its partitions again.
fn visit(kafka: &KafkaSettings) -> Result<(), KafkaError> {
    let mut config = member_config(kafka);
    config.remove("group.instance.id");
    let visitor: BaseConsumer<Callbacks<Visitor>> = make_client(&config, Callbacks::default())?;
    visitor.subscribe(&[&kafka.input_topic])?;
    let deadline = Instant::now() + VISIT_MAX;
    while !visitor.context().0.0.load(Ordering::Acquire) && Instant::now() < deadline {
        // No record can arrive, because nothing is assigned.
        let _ = visitor.poll(Duration::from_millis(100));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{assigned, is_member_of};

    #[test]
    fn a_member_id_belongs_to_one_static_member() {
        let id = "eu-0-1f0c64c2-9f5e-4b2c-8a51-9d6ab0e1c111";
        assert!(is_member_of(id, "eu-0"));
        assert!(!is_member_of(id, "eu") && !is_member_of(id, "eu-") && !is_member_of("eu-0-x", "eu-0"));
    }

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
