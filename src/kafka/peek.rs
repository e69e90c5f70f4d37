//! The timestamps of single records: reads one record a partition, as a member of no group.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;

use super::fetcher::{Fetcher, reader_config};
use super::librdkafka::fetch::FetchItem;
use crate::config::KafkaSettings;
use crate::record::{NextOffset, Partition, TimestampMs};

const POLL: Duration = Duration::from_millis(100);
/// A partition that fails so often is not waited for.
const FAILURES_MAX: u32 = 3;
/// One record of each partition is wanted, not a backlog.
const DEFAULTS: [(&str, &str); 4] = [
    ("queued.min.messages", "1"),
    ("queued.max.messages.kbytes", "1024"),
    ("fetch.min.bytes", "1"),
    ("fetch.message.max.bytes", "16384"),
];

/// What is at a position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peeked {
    /// A record with this timestamp, in ms; `None` if it has none.
    Record(Option<TimestampMs>),
    /// Nothing but control records up to the end of the log.
    End,
}

/// What is the first record at or after each position, committed or not: what a transaction that is still open
/// holds back is to come yet, and so is all behind it. Partitions that did not answer
/// until `limit` are absent.
///
/// # Errors
/// When the client cannot be made; what fails per partition makes it absent.
pub fn peek(
    kafka: &KafkaSettings,
    topic: &str,
    positions: &[(Partition, NextOffset)],
    limit: Duration,
) -> Result<BTreeMap<Partition, Peeked>, KafkaError> {
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
            let (partition, peeked) = match item {
                FetchItem::Record(record) => (record.partition(), Some(Peeked::Record(record.timestamp()))),
                FetchItem::End { partition, .. } => (partition, Some(Peeked::End)),
                // The client tries again. One that cannot be read stays absent.
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
                found.extend(peeked.map(|peeked| (partition, peeked)));
                done.push(partition);
            }
        });
        // Or the client goes on to fetch its backlog for as long as another is waited for.
        fetcher.stop(&done).map_err(given_up)?;
    }
    Ok(found)
}
