//! Waits for last stable offsets that cover everything committed before the call.

use std::time::{Duration, Instant};

use rdkafka::Offset as KafkaOffset;
use rdkafka::consumer::BaseConsumer;

use super::group::QuietLog;
use super::offsets::listed;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::client::{base_client_config, make_client};

const POLL: Duration = Duration::from_millis(50);
/// Longer than an abandoned transaction of this program stays open (`transaction.timeout.ms`: 15 s);
/// transactions of other producers may be longer.
const STABLE_WAIT: Duration = Duration::from_secs(60);

/// Why the ends could not be determined.
#[derive(Debug, thiserror::Error)]
#[error("topic {topic}: {reason}")]
pub struct UnstableError {
    topic: String,
    reason: String,
}

fn client(kafka: &KafkaSettings, isolation: &str) -> Result<BaseConsumer<QuietLog>, String> {
    let mut config = base_client_config(kafka);
    config
        // Never joined; the group that this principal has rights for.
        .set("group.id", &kafka.group_id)
        .set("isolation.level", isolation)
        .set("enable.auto.commit", "false")
        .remove("group.instance.id");
    make_client(&config, QuietLog).map_err(|e| format!("creating a consumer: {e}"))
}

/// Returns the present high watermarks of these partitions, as soon as the last stable offsets have reached
/// them. The broker acknowledges a commit before its markers are written to all partitions, so the last
/// stable offset of that moment may exclude records that are already committed.
///
/// # Errors
/// When the broker does not answer, or a transaction stays open for a minute.
pub fn stable_ends(
    kafka: &KafkaSettings,
    topic: &str,
    partitions: &[Partition],
) -> Result<Vec<NextOffset>, UnstableError> {
    let error = |reason: String| UnstableError { topic: topic.to_owned(), reason };
    let ask = |consumer: &BaseConsumer<QuietLog>| {
        listed(consumer, topic, partitions, KafkaOffset::End).map_err(|e| error(e.to_string()))
    };
    let written = ask(&client(kafka, "read_uncommitted").map_err(error)?)?;
    let committed = client(kafka, "read_committed").map_err(error)?;
    let began = Instant::now();
    loop {
        let stable = ask(&committed)?;
        let mut open = partitions.iter().zip(stable.iter().zip(&written)).filter(|(_, (s, w))| s < w);
        let Some((partition, (stable, _))) = open.next() else {
            return Ok(written.into_iter().map(NextOffset).collect());
        };
        if began.elapsed() > STABLE_WAIT {
            return Err(error(format!(
                "partition {partition} has had an open transaction at offset {stable} for {} s",
                STABLE_WAIT.as_secs()
            )));
        }
        std::thread::sleep(POLL);
    }
}
