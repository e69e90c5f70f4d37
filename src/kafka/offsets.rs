//! Requests for offsets: log bounds, offsets by timestamp, and the group's committed offsets.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use super::client::ATTEMPT_TIMEOUT;
use super::group::Group;
use super::librdkafka::{self, NativeError};
use crate::domain::cursor::{GroupOffset, LogBounds};
use crate::domain::outcome::{FailureClass, class_of_kafka};
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::ports::KafkaPortError;

const LIST_OFFSETS: &str = "asking for the log's bounds";
const OFFSET_FETCH: &str = "asking for the group's offsets";

/// Time limit of a request for high watermarks: they are for display, and last stable offsets wait for them.
const HIGH_WATERMARKS_MAX: Duration = Duration::from_secs(2);

pub(super) fn transient(doing: &str, error: impl std::fmt::Display) -> KafkaPortError {
    KafkaPortError::transient(format!("{doing}: {error}"))
}

pub(super) fn failed(doing: &str, error: &KafkaError) -> KafkaPortError {
    let class = error.rdkafka_error_code().map_or(FailureClass::Transient, class_of_kafka);
    KafkaPortError::Failed { class, message: format!("{doing}: {error}") }
}

pub(super) fn native_failed(doing: &str, error: &NativeError) -> KafkaPortError {
    KafkaPortError::Failed { class: class_of_kafka(error.code), message: format!("{doing}: {error}") }
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

/// Reads the answer about each partition, in the order given.
fn each<T>(
    doing: &str,
    answer: &TopicPartitionList,
    topic: &str,
    partitions: &[Partition],
    read: impl Fn(&TopicPartitionListElem<'_>) -> Result<T, KafkaPortError>,
) -> Result<Vec<T>, KafkaPortError> {
    let read_one = |partition: &Partition| {
        let element = answer
            .find_partition(topic, partition.0)
            .ok_or_else(|| transient(doing, "a partition is missing"))?;
        element.error().map_err(|e| failed(doing, &e))?;
        read(&element)
    };
    partitions.iter().map(read_one).collect()
}

/// `ListOffsets`. The timestamp to look for, if any, takes the place of an offset.
fn list_offsets<C: ConsumerContext, T>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    at: KafkaOffset,
    read: impl Fn(KafkaOffset) -> Result<T, KafkaPortError>,
) -> Result<Vec<T>, KafkaPortError> {
    let list = list_at(topic, partitions, at)?;
    let answer = consumer.offsets_for_times(list, ATTEMPT_TIMEOUT).map_err(|e| failed(LIST_OFFSETS, &e))?;
    each(LIST_OFFSETS, &answer, topic, partitions, |element| read(element.offset()))
}

/// The start or the end of partitions. The end is the last stable offset if the consumer is read_committed,
/// else the high watermark.
pub(super) fn offsets_at<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    at: KafkaOffset,
) -> Result<Vec<NextOffset>, KafkaPortError> {
    list_offsets(consumer, topic, partitions, at, |found| match found {
        KafkaOffset::Offset(offset) => Ok(NextOffset(offset)),
        other => Err(transient(LIST_OFFSETS, format!("{other:?}"))),
    })
}

/// The first offset of each partition whose timestamp is at or after `time`; `None` if there is no such
/// record.
pub(super) fn positions_at<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    time: TimestampMs,
) -> Result<Vec<Option<NextOffset>>, KafkaPortError> {
    list_offsets(consumer, topic, partitions, KafkaOffset::Offset(time.0.max(0)), |found| match found {
        KafkaOffset::Offset(offset) => Ok(Some(NextOffset(offset))),
        _ => Ok(None),
    })
}

/// First offset and last stable offset of each partition, in the order given.
pub fn log_bounds(group: &Group, partitions: &[Partition]) -> Result<Vec<LogBounds>, KafkaPortError> {
    bounds_of(group.consumer(), group.topic(), partitions)
}

/// As [`log_bounds`], for any topic and a read_committed consumer.
pub(super) fn bounds_of<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
) -> Result<Vec<LogBounds>, KafkaPortError> {
    // The start first: if retention moves it in between, the answer is only outdated, never beyond the end.
    let starts = offsets_at(consumer, topic, partitions, KafkaOffset::Beginning)?;
    let ends = offsets_at(consumer, topic, partitions, KafkaOffset::End)?;
    Ok(starts.into_iter().zip(ends).map(|(start, end)| LogBounds { start, end }).collect())
}

/// Last stable offset of each partition, in the order given.
pub fn last_stable_offsets(
    group: &Group,
    partitions: &[Partition],
) -> Result<Vec<NextOffset>, KafkaPortError> {
    offsets_at(group.consumer(), group.topic(), partitions, KafkaOffset::End)
}

/// High watermark of each partition whose leader answers.
///
/// Read it before the last stable offset: records below it that are then still beyond the last stable offset
/// are behind an open transaction.
pub fn high_watermarks(
    group: &Group,
    partitions: &[Partition],
) -> Result<BTreeMap<Partition, NextOffset>, KafkaPortError> {
    high_watermarks_of(group.consumer(), group.topic(), partitions, HIGH_WATERMARKS_MAX)
}

/// As [`high_watermarks`], for any topic and consumer.
pub(super) fn high_watermarks_of<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    timeout: Duration,
) -> Result<BTreeMap<Partition, NextOffset>, KafkaPortError> {
    let numbers: Vec<i32> = partitions.iter().map(|partition| partition.0).collect();
    let found = librdkafka::high_watermarks(consumer, topic, &numbers, timeout)
        .map_err(|e| native_failed(LIST_OFFSETS, &e))?;
    Ok(found.into_iter().map(|(partition, offset)| (Partition(partition), NextOffset(offset))).collect())
}

/// How long to wait for a coordinator that is moving or loading.
const COORDINATOR_SETTLES: Duration = Duration::from_secs(10);

/// Asks a group's coordinator, again while it is moving or loading, as it is on a broker that has just started.
///
/// # Errors
/// The last one.
pub fn once_settled<T, E>(
    code: impl Fn(&E) -> Option<RDKafkaErrorCode>,
    mut ask: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    use RDKafkaErrorCode as Code;
    let began = Instant::now();
    loop {
        match ask() {
            Err(error)
                if began.elapsed() < COORDINATOR_SETTLES
                    && matches!(
                        code(&error),
                        Some(
                            Code::NotCoordinator
                                | Code::CoordinatorNotAvailable
                                | Code::CoordinatorLoadInProgress
                        )
                    ) =>
            {
                std::thread::sleep(Duration::from_millis(200));
            }
            answer => return answer,
        }
    }
}

/// The group's committed offsets. The broker answers only once no pending transaction could change them
/// (KIP-447).
pub fn group_offsets(
    group: &Group,
    partitions: &[Partition],
) -> Result<Vec<Option<GroupOffset>>, KafkaPortError> {
    let list = list_at(group.topic(), partitions, KafkaOffset::Invalid)?;
    let ask = || group.consumer().committed_offsets(list.clone(), ATTEMPT_TIMEOUT);
    let answer = once_settled(KafkaError::rdkafka_error_code, ask).map_err(|e| failed(OFFSET_FETCH, &e))?;
    each(OFFSET_FETCH, &answer, group.topic(), partitions, |element| match element.offset() {
        KafkaOffset::Offset(offset) => {
            let metadata = element.metadata().to_owned();
            Ok(Some(GroupOffset { position: NextOffset(offset), metadata }))
        }
        _ => Ok(None),
    })
}
