//! Ends up to which a topic can be read without missing what was committed before they were asked for.

use std::time::{Duration, Instant};

use rdkafka::Offset as KafkaOffset;
use rdkafka::consumer::BaseConsumer;

use super::group::QuietLog;
use super::log::listed;
use crate::config::KafkaSettings;
use crate::kafka_client::{base_client_config, make_client};
use crate::record::{NextOffset, Partition};

const POLL: Duration = Duration::from_millis(50);
/// Longer than a transaction that nobody ends (`transaction.timeout.ms` is 15 s here); others may be longer.
const STABLE_WAIT: Duration = Duration::from_secs(60);

/// Why there are no such ends.
#[derive(Debug, thiserror::Error)]
#[error("topic {topic}: {reason}")]
pub struct UnstableError {
    topic: String,
    reason: String,
}

fn client(kafka: &KafkaSettings, isolation: &str) -> Result<BaseConsumer<QuietLog>, String> {
    let mut config = base_client_config(kafka);
    config
        // Never joined; the one for which there are rights.
        .set("group.id", &kafka.group_id)
        .set("isolation.level", isolation)
        .set("enable.auto.commit", "false")
        .remove("group.instance.id");
    make_client(&config, QuietLog).map_err(|e| format!("creating a consumer: {e}"))
}

/// The ends that these partitions have now, once everything before them is decided. The broker answers the
/// commit of a transaction before its markers stand in all partitions: who reads up to the last stable offset
/// of that moment misses records that are committed already.
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
