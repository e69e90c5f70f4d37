//! Reading ranges of a topic from outside, as a member of no group: what commands look at, and proofs.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};
use uuid::Uuid;

use super::group::{QuietLog, REQUEST_TIMEOUT};
use super::librdkafka::topic_id;
use super::log::{bounds_of, listed, positions_at};
use crate::config::KafkaSettings;
use crate::cursor::LogBounds;
use crate::disposition::{FailureClass, class_of_kafka, is_refusal};
use crate::kafka_client::base_client_config;
use crate::record::{NextOffset, Partition, TimestampMs};

/// A scan that gets nothing for so long is given up: the client itself waits for brokers without end.
const STALL_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

/// Why a topic could not be read; names topic and partitions, never a record's contents.
#[derive(Debug, thiserror::Error)]
#[error("topic {topic}: {reason}")]
pub struct ScanError {
    topic: String,
    reason: String,
    is_refusal: bool,
}

impl ScanError {
    /// Whether the brokers refuse this principal.
    pub fn is_refusal(&self) -> bool {
        self.is_refusal
    }
}

/// Records `from` up to, but not including, `to`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScanRange {
    /// The partition.
    pub partition: Partition,
    /// First offset wanted.
    pub from: NextOffset,
    /// The offset after the last one wanted; at most the last stable offset.
    pub to: NextOffset,
}

impl ScanRange {
    /// Whether no offset is in it.
    pub fn is_empty(&self) -> bool {
        self.from >= self.to
    }
}

/// A reader of one topic's committed records.
pub struct Scanner {
    consumer: BaseConsumer<QuietLog>,
    topic: String,
}

impl Scanner {
    /// A reader of `topic`. Asks nothing of the broker yet.
    pub fn new(kafka: &KafkaSettings, topic: &str) -> Result<Self, ScanError> {
        let mut config = base_client_config(kafka);
        config
            // The client library wants a group, though it is never joined: the one for which there are rights.
            .set("group.id", &kafka.group_id)
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "error")
            .set("allow.auto.create.topics", "false")
            .set("fetch.queue.backoff.ms", "20")
            .set("fetch.wait.max.ms", "50")
            .set("queued.max.messages.kbytes", "16384")
            .set("fetch.max.bytes", "8388608")
            .remove("group.instance.id");
        let consumer = BaseConsumer::from_config_and_context(&config, QuietLog).map_err(|e| ScanError {
            topic: topic.to_owned(),
            reason: format!("creating a consumer: {e}"),
            is_refusal: false,
        })?;
        Ok(Self { consumer, topic: topic.to_owned() })
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// An error about this topic.
    pub(super) fn error(&self, reason: impl ToString) -> ScanError {
        ScanError { topic: self.topic.clone(), reason: reason.to_string(), is_refusal: false }
    }

    /// The topic's id, and all its partitions.
    pub fn describe(&self) -> Result<(Uuid, Vec<Partition>), ScanError> {
        let (id, count) =
            topic_id(&self.consumer, &self.topic, REQUEST_TIMEOUT).map_err(|e| self.error(e))?;
        Ok((id, (0..i32::try_from(count).unwrap_or(i32::MAX)).map(Partition).collect()))
    }

    /// First offset and last stable offset of each of these partitions, in their order.
    pub fn bounds(&self, partitions: &[Partition]) -> Result<Vec<LogBounds>, ScanError> {
        bounds_of(&self.consumer, &self.topic, partitions).map_err(|e| self.error(e))
    }

    /// Of each partition the first offset whose record's timestamp is at or after `time`; `None` if there is
    /// no such record.
    pub fn positions_at(
        &self,
        partitions: &[Partition],
        time: TimestampMs,
    ) -> Result<Vec<Option<NextOffset>>, ScanError> {
        positions_at(&self.consumer, &self.topic, partitions, time).map_err(|e| self.error(e))
    }

    /// Hands every committed record of `ranges` to `each`, in the order of offsets within a partition, until
    /// all are read or `each` breaks. What is beyond a partition's last stable offset is not waited for.
    ///
    /// # Errors
    /// When the client reports an error that it does not mend by itself, or nothing came for a minute. The
    /// error names the partitions that are not done.
    pub fn read(
        &self,
        ranges: &[ScanRange],
        mut each: impl FnMut(&BorrowedMessage<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ScanError> {
        let mut open: BTreeMap<i32, i64> =
            ranges.iter().filter(|r| !r.is_empty()).map(|r| (r.partition.0, r.to.0)).collect();
        let mut list = TopicPartitionList::with_capacity(open.len());
        for range in ranges.iter().filter(|r| !r.is_empty()) {
            list.add_partition_offset(&self.topic, range.partition.0, KafkaOffset::Offset(range.from.0))
                .map_err(|e| self.error(e))?;
        }
        self.consumer.assign(&list).map_err(|e| self.error(e))?;
        let outcome = self.read_assigned(&mut open, &mut each);
        // A partition stays paused when it is not assigned any more, and would be when it is read again.
        let resumed = self.consumer.resume(&list).map_err(|e| self.error(e));
        // Whatever happened, nothing more is fetched.
        let unassigned = resumed.and(self.consumer.unassign().map_err(|e| self.error(e)));
        let flow = outcome?;
        unassigned.map(|()| flow)
    }

    fn read_assigned(
        &self,
        open: &mut BTreeMap<i32, i64>,
        each: &mut impl FnMut(&BorrowedMessage<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ScanError> {
        let mut heard_at = Instant::now();
        while !open.is_empty() {
            match self.consumer.poll(POLL) {
                Some(Ok(message)) => {
                    heard_at = Instant::now();
                    let partition = message.partition();
                    let Some(to) = open.get(&partition).copied() else { continue };
                    if message.offset() < to && each(&message).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                    // Once more: `each` may take its time.
                    heard_at = Instant::now();
                    if message.offset() >= to - 1 {
                        self.done(open, partition)?;
                    }
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    heard_at = Instant::now();
                    // A leader that has just taken over may not know yet how far the log goes.
                    let ends = listed(&self.consumer, &self.topic, &[Partition(partition)], KafkaOffset::End)
                        .map_err(|e| self.error(e))?;
                    if ends.first() >= open.get(&partition) {
                        self.done(open, partition)?;
                    }
                }
                // Brokers that are away are waited for, with a limit.
                Some(Err(error)) if is_passing(&error) => {}
                Some(Err(error)) => {
                    let is_refusal = error.rdkafka_error_code().is_some_and(is_refusal);
                    return Err(ScanError { is_refusal, ..self.error(error) });
                }
                None => {}
            }
            if heard_at.elapsed() > STALL_MAX {
                let waiting: Vec<String> = open.keys().map(i32::to_string).collect();
                return Err(self.error(format!(
                    "nothing came for {} s; not read to the end: partitions {}",
                    STALL_MAX.as_secs(),
                    waiting.join(", ")
                )));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Fetches no more of a partition that is done.
    fn done(&self, open: &mut BTreeMap<i32, i64>, partition: i32) -> Result<(), ScanError> {
        if open.remove(&partition).is_some() && !open.is_empty() {
            let mut list = TopicPartitionList::new();
            list.add_partition(&self.topic, partition);
            self.consumer.pause(&list).map_err(|e| self.error(e))?;
        }
        Ok(())
    }
}

fn is_passing(error: &KafkaError) -> bool {
    use rdkafka::types::RDKafkaErrorCode as Code;
    match error.rdkafka_error_code() {
        // A lane finds another position then; here there is none.
        Some(Code::OffsetOutOfRange | Code::AutoOffsetReset) | None => false,
        Some(code) => class_of_kafka(code) == FailureClass::Passing,
    }
}
