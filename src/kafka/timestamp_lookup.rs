//! Looks up timestamps of single records: reads one record per partition, without a consumer group.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;

use super::fetcher::{Fetcher, reader_config};
use super::librdkafka::fetch::FetchItem;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition, TimestampMs};

/// A partition that fails this often is left out.
const FAILURES_MAX: u32 = 3;
/// Small fetches: one record of each partition is enough.
const DEFAULTS: [(&str, &str); 4] = [
    ("queued.min.messages", "1"),
    ("queued.max.messages.kbytes", "1024"),
    ("fetch.min.bytes", "1"),
    ("fetch.message.max.bytes", "16384"),
];

/// The first record at or after a position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FirstTimestamp {
    /// A record with this timestamp in ms, if it has one.
    Record(Option<TimestampMs>),
    /// There are only control records up to the end of the log.
    End,
}

/// Returns the timestamp of the first record at or after each position. Reads uncommitted records, too,
/// because records of an open transaction are still to be processed. Partitions that fail or do not answer
/// within `limit` are absent.
///
/// # Errors
/// When the client cannot be created or fails as a whole.
pub fn first_timestamps(
    kafka: &KafkaSettings,
    topic: &str,
    positions: &[(Partition, NextOffset)],
    limit: Duration,
) -> Result<BTreeMap<Partition, FirstTimestamp>, KafkaError> {
    if positions.is_empty() {
        return Ok(BTreeMap::new());
    }
    let mut config = reader_config(kafka, &DEFAULTS);
    config.set("isolation.level", "read_uncommitted");
    let fetcher = Fetcher::new(&config, topic)?;
    let mut failures: BTreeMap<Partition, u32> = BTreeMap::new();
    let answers = fetcher.first_answers(positions, Instant::now() + limit, |partition, item| match item {
        FetchItem::Record(record) => Some(Some(FirstTimestamp::Record(record.timestamp()))),
        FetchItem::End { .. } => Some(Some(FirstTimestamp::End)),
        // The client retries. A partition that cannot be read is not waited for.
        FetchItem::Failed { .. } => {
            let failures = failures.entry(partition).or_default();
            *failures += 1;
            (*failures >= FAILURES_MAX).then_some(None)
        }
    });
    let answers = answers.map_err(|error| KafkaError::MessageConsumption(error.code))?;
    Ok(answers.into_iter().filter_map(|(partition, found)| Some((partition, found?))).collect())
}
