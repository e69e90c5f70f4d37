//! Waits for last stable offsets that cover everything committed before the call.

use std::time::{Duration, Instant};

use rdkafka::Offset as KafkaOffset;
use rdkafka::consumer::BaseConsumer;

use super::callbacks::QuietLog;
use super::offsets::offsets_at;
use super::scan::ScanError;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::client::{base_client_config, make_client};

const POLL: Duration = Duration::from_millis(50);
/// Longer than an abandoned transaction of this program stays open (`transaction.timeout.ms`: 15 s);
/// transactions of other producers may be longer.
const STABLE_WAIT: Duration = Duration::from_secs(60);

fn client(kafka: &KafkaSettings, isolation: &str) -> Result<BaseConsumer<QuietLog>, String> {
    let mut config = base_client_config(kafka);
    config
        // Never joined; the group that this principal has rights for.
        .set("group.id", &kafka.group_id)
        .set("isolation.level", isolation)
        .set("enable.auto.commit", "false")
        .remove("group.instance.id");
    make_client(&config, QuietLog::default()).map_err(|e| format!("creating a consumer: {e}"))
}

/// Returns the present high watermarks of these partitions, as soon as the last stable offsets have reached
/// them. The broker acknowledges a commit before its markers are written to all partitions, so the last
/// stable offset of that moment may exclude records that are already committed.
///
/// # Errors
/// When the broker does not answer, or a transaction stays open for a minute.
pub fn stable_high_watermarks(
    kafka: &KafkaSettings,
    topic: &str,
    partitions: &[Partition],
) -> Result<Vec<NextOffset>, ScanError> {
    let error = |reason: String| ScanError::new(topic, reason);
    let ends = |consumer: &BaseConsumer<QuietLog>| {
        offsets_at(consumer, topic, partitions, KafkaOffset::End).map_err(|e| error(e.to_string()))
    };
    let high_watermarks = ends(&client(kafka, "read_uncommitted").map_err(error)?)?;
    let committed = client(kafka, "read_committed").map_err(error)?;
    let began = Instant::now();
    loop {
        let last_stable = ends(&committed)?;
        let mut pairs = partitions.iter().zip(last_stable.iter().zip(&high_watermarks));
        let Some((partition, (last_stable, _))) = pairs.find(|(_, (stable, high))| stable < high) else {
            return Ok(high_watermarks);
        };
        if began.elapsed() > STABLE_WAIT {
            return Err(error(format!(
                "partition {partition} has had an open transaction at offset {last_stable} for {} s",
                STABLE_WAIT.as_secs()
            )));
        }
        std::thread::sleep(POLL);
    }
}
