//! Waits for last stable offsets that cover everything committed before the call.

use std::time::{Duration, Instant};

use rdkafka::Offset as KafkaOffset;
use rdkafka::consumer::BaseConsumer;

use super::callbacks::QuietLog;
use super::client::make_client;
use super::fetcher::reader_config;
use super::offsets::offsets_at;
use super::scan::ScanError;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition};

const POLL: Duration = Duration::from_millis(50);
/// Longer than an abandoned transaction of this program stays open (`transaction.timeout.ms`: 15 s);
/// transactions of other producers may be longer.
const STABLE_WAIT: Duration = Duration::from_secs(60);

fn client(kafka: &KafkaSettings, topic: &str, isolation: &str) -> Result<BaseConsumer<QuietLog>, ScanError> {
    let mut config = reader_config(kafka, &[]);
    config.set("isolation.level", isolation);
    make_client(&config, QuietLog::default())
        .map_err(|e| ScanError::new(topic, format!("creating a consumer: {e}")))
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
    let ends = |consumer: &BaseConsumer<QuietLog>| {
        offsets_at(consumer, topic, partitions, KafkaOffset::End).map_err(|e| ScanError::new(topic, e))
    };
    let high_watermarks = ends(&client(kafka, topic, "read_uncommitted")?)?;
    let committed = client(kafka, topic, "read_committed")?;
    let began = Instant::now();
    loop {
        let last_stable = ends(&committed)?;
        let mut pairs = partitions.iter().zip(last_stable.iter().zip(&high_watermarks));
        let Some((partition, (last_stable, _))) = pairs.find(|(_, (stable, high))| stable < high) else {
            return Ok(high_watermarks);
        };
        if began.elapsed() > STABLE_WAIT {
            let waited = STABLE_WAIT.as_secs();
            return Err(ScanError::new(
                topic,
                format!(
                    "partition {partition} has had an open transaction at offset {last_stable} for {waited} s"
                ),
            ));
        }
        std::thread::sleep(POLL);
    }
}
