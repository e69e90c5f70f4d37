//! Requests for offsets: log bounds, offsets by timestamp, and the group's committed offsets.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use super::group::{Group, REQUEST_TIMEOUT};
use crate::domain::cursor::{GroupOffset, LogBounds};
use crate::domain::outcome::{FailureClass, class_of_kafka};
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::ports::KafkaPortError;

pub(super) fn transient(doing: &str, error: impl std::fmt::Display) -> KafkaPortError {
    KafkaPortError::transient(format!("{doing}: {error}"))
}

pub(super) fn failed(doing: &str, error: &KafkaError) -> KafkaPortError {
    let class = error.rdkafka_error_code().map_or(FailureClass::Transient, class_of_kafka);
    KafkaPortError::Failed { class, message: format!("{doing}: {error}") }
}

fn list_at(
    topic: &str,
    partitions: &[Partition],
    at: KafkaOffset,
) -> Result<TopicPartitionList, KafkaPortError> {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        list.add_partition_offset(topic, partition.0, at).map_err(|e| failed("listing partitions", &e))?;
    }
    Ok(list)
}

/// `ListOffsets` for the start or the end of partitions. The end of a read_committed consumer is the last
/// stable offset.
pub(super) fn listed<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    at: KafkaOffset,
) -> Result<Vec<i64>, KafkaPortError> {
    answered(consumer, topic, partitions, at)?
        .into_iter()
        .map(|found| match found {
            KafkaOffset::Offset(offset) => Ok(offset),
            other => Err(transient("asking for the log's bounds", format!("{other:?}"))),
        })
        .collect()
}

/// The first offset of each partition whose timestamp is at or after `time`; `None` if there is no such
/// record.
pub(super) fn positions_at<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    time: TimestampMs,
) -> Result<Vec<Option<NextOffset>>, KafkaPortError> {
    // The API takes the timestamp in the offset field.
    let answers = answered(consumer, topic, partitions, KafkaOffset::Offset(time.0.max(0)))?;
    let position = |found| match found {
        KafkaOffset::Offset(offset) => Some(NextOffset(offset)),
        _ => None,
    };
    Ok(answers.into_iter().map(position).collect())
}

fn answered<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    at: KafkaOffset,
) -> Result<Vec<KafkaOffset>, KafkaPortError> {
    let list = list_at(topic, partitions, at)?;
    let answer = consumer
        .offsets_for_times(list, REQUEST_TIMEOUT)
        .map_err(|e| failed("asking for the log's bounds", &e))?;
    partitions
        .iter()
        .map(|partition| {
            let element = answer
                .find_partition(topic, partition.0)
                .ok_or_else(|| transient("asking for the log's bounds", "a partition is missing"))?;
            element.error().map_err(|e| failed("asking for the log's bounds", &e))?;
            Ok(element.offset())
        })
        .collect()
}

/// First offset and last stable offset of each partition, in the order given.
pub fn log_bounds(group: &Group, partitions: &[Partition]) -> Result<Vec<LogBounds>, KafkaPortError> {
    bounds_of(group.consumer(), group.topic(), partitions)
}

/// As [`log_bounds`], for any topic.
pub(super) fn bounds_of<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
) -> Result<Vec<LogBounds>, KafkaPortError> {
    // The start first: if retention moves it in between, the answer is only outdated, never beyond the end.
    let starts = listed(consumer, topic, partitions, KafkaOffset::Beginning)?;
    let ends = listed(consumer, topic, partitions, KafkaOffset::End)?;
    Ok(starts
        .into_iter()
        .zip(ends)
        .map(|(start, end)| LogBounds { start: NextOffset(start), end: NextOffset(end) })
        .collect())
}

/// Last stable offset of each partition, in the order given.
pub fn log_ends(group: &Group, partitions: &[Partition]) -> Result<Vec<NextOffset>, KafkaPortError> {
    let ends = listed(group.consumer(), group.topic(), partitions, KafkaOffset::End)?;
    Ok(ends.into_iter().map(NextOffset).collect())
}

/// How long to wait for a coordinator that is moving or loading.
const COORDINATOR_SETTLES: Duration = Duration::from_secs(10);

/// Whether the coordinator is moving or loading.
fn is_settling(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::NotCoordinator | Code::CoordinatorNotAvailable | Code::CoordinatorLoadInProgress)
}

/// The group's committed offsets. The broker answers only once no pending transaction could change them
/// (KIP-447).
pub fn group_offsets(
    group: &Group,
    partitions: &[Partition],
) -> Result<Vec<Option<GroupOffset>>, KafkaPortError> {
    let list = list_at(group.topic(), partitions, KafkaOffset::Invalid)?;
    let began = Instant::now();
    let answer = loop {
        match group.consumer().committed_offsets(list.clone(), REQUEST_TIMEOUT) {
            Ok(answer) => break answer,
            Err(error)
                if error.rdkafka_error_code().is_some_and(is_settling)
                    && began.elapsed() < COORDINATOR_SETTLES =>
            {
                std::thread::sleep(Duration::from_millis(200));
            }
            Err(error) => return Err(failed("asking for the group's offsets", &error)),
        }
    };
    partitions
        .iter()
        .map(|partition| {
            let element = answer
                .find_partition(group.topic(), partition.0)
                .ok_or_else(|| transient("asking for the group's offsets", "a partition is missing"))?;
            element.error().map_err(|e| failed("asking for the group's offsets", &e))?;
            Ok(match element.offset() {
                KafkaOffset::Offset(offset) => Some(GroupOffset {
                    position: NextOffset(offset),
                    metadata: element.metadata().to_owned(),
                }),
                _ => None,
            })
        })
        .collect()
}
