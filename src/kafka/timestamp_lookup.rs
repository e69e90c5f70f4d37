//! Looks up timestamps of single records: reads one record per partition, without a consumer group.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;

use super::fetcher::{Fetcher, reader_config};
use super::librdkafka::fetch::FetchItem;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition, TimestampMs};

const POLL: Duration = Duration::from_millis(100);
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
    let mut found = BTreeMap::new();
    if positions.is_empty() {
        return Ok(found);
    }
    let mut config = reader_config(kafka, &DEFAULTS);
    config.set("isolation.level", "read_uncommitted");
    let fetcher = Fetcher::new(&config, topic)?;
    let given_up = |error: super::librdkafka::NativeError| KafkaError::MessageConsumption(error.code);
    fetcher.start(positions).map_err(given_up)?;
    let deadline = Instant::now() + limit;
    let mut failures: BTreeMap<Partition, u32> = BTreeMap::new();
    let mut waiting: BTreeSet<Partition> = positions.iter().map(|(partition, _)| *partition).collect();
    while !waiting.is_empty() && Instant::now() < deadline {
        let mut done: Vec<Partition> = Vec::new();
        fetcher.drain(usize::MAX, POLL, |item| {
            let (partition, timestamps) = match item {
                FetchItem::Record(record) => {
                    (record.partition(), Some(FirstTimestamp::Record(record.timestamp())))
                }
                FetchItem::End { partition, .. } => (partition, Some(FirstTimestamp::End)),
                // The client retries. A partition that cannot be read stays absent.
                FetchItem::Failed { partition: Some(partition), .. } => {
                    let failures = failures.entry(partition).or_default();
                    *failures += 1;
                    if *failures < FAILURES_MAX {
                        return;
                    }
                    (partition, None)
                }
                FetchItem::Failed { partition: None, .. } => return,
            };
            if waiting.remove(&partition) {
                found.extend(timestamps.map(|timestamps| (partition, timestamps)));
                done.push(partition);
            }
        });
        // Otherwise the client would fetch their backlogs while others are still waited for.
        fetcher.stop(&done).map_err(given_up)?;
    }
    Ok(found)
}
