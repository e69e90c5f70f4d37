//! The timestamps of single records: reads one record a partition, as a member of no group.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::{ClientConfig, Message, Offset as KafkaOffset, TopicPartitionList};

use super::group::QuietLog;
use crate::record::{NextOffset, Partition, TimestampMs};

const POLL: Duration = Duration::from_millis(100);

/// What is at a position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peeked {
    /// A record with this timestamp, in ms; `None` if it has none.
    Record(Option<TimestampMs>),
    /// Nothing but control records up to the end of the log.
    End,
}

impl ConsumerContext for QuietLog {}

/// What is the first record at or after each position, committed or not: what a transaction that is still open
/// holds back is to come yet, and so is all behind it. Partitions that did not answer
/// until `limit` are absent.
///
/// # Errors
/// When the client cannot be made; what fails per partition makes it absent.
pub fn peek(
    config: &ClientConfig,
    topic: &str,
    positions: &[(Partition, NextOffset)],
    limit: Duration,
) -> Result<BTreeMap<Partition, Peeked>, KafkaError> {
    let mut found = BTreeMap::new();
    if positions.is_empty() {
        return Ok(found);
    }
    let mut config = config.clone();
    config
        // One record of each is wanted, not a backlog.
        .set("queued.min.messages", "1")
        .set("queued.max.messages.kbytes", "1024")
        .set("fetch.min.bytes", "1")
        .set("fetch.message.max.bytes", "16384")
        .set("enable.partition.eof", "true")
        .set("isolation.level", "read_uncommitted")
        .set("auto.offset.reset", "error")
        .set("enable.auto.commit", "false")
        .remove("group.instance.id");
    let consumer: BaseConsumer<QuietLog> = BaseConsumer::from_config_and_context(&config, QuietLog)?;
    let mut list = TopicPartitionList::with_capacity(positions.len());
    for (partition, position) in positions {
        list.add_partition_offset(topic, partition.0, KafkaOffset::Offset(position.0))?;
    }
    consumer.assign(&list)?;
    let deadline = Instant::now() + limit;
    while found.len() < positions.len() && Instant::now() < deadline {
        match consumer.poll(POLL) {
            Some(Ok(message)) => {
                let partition = Partition(message.partition());
                let record = Peeked::Record(message.timestamp().to_millis().map(TimestampMs));
                if let Entry::Vacant(place) = found.entry(partition) {
                    place.insert(record);
                    // Or the client goes on to fetch its backlog for as long as another is waited for. That it throws
                    // away what it has of this partition is just right.
                    let mut done = TopicPartitionList::with_capacity(1);
                    done.add_partition(topic, partition.0);
                    consumer.pause(&done)?;
                }
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                found.entry(Partition(partition)).or_insert(Peeked::End);
            }
            // The client tries again, or the partition stays absent.
            Some(Err(_)) | None => {}
        }
    }
    Ok(found)
}
