//! Reads ranges of offsets of a topic, without a consumer group: for commands and for the output scan.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::Consumer;
use rdkafka::types::RDKafkaErrorCode;
use uuid::Uuid;

use super::client::ATTEMPT_TIMEOUT;
use super::fetcher::{Fetcher, reader_config};
use super::librdkafka::fetch::FetchItem;
use super::librdkafka::{NativeRecord, topic_id};
use super::offsets::{bounds_of, high_watermarks_of, positions_at};
use super::topic_rules::{Role, Rule, TIMESTAMP_AHEAD};
use crate::config::KafkaSettings;
use crate::domain::cursor::LogBounds;
use crate::domain::outcome::{FailureClass, class_of_kafka, is_refusal};
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};

/// A scan that receives nothing for this long fails; librdkafka itself would wait for brokers for ever.
const STALL_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);
/// The scan fails if a partition has more transient errors in a row.
const FAILURES_MAX: u32 = 20;

/// Why a topic could not be read. Names the topic and partitions, never a record's contents.
#[derive(Debug, thiserror::Error)]
#[error("topic {topic}: {reason}")]
pub struct ScanError {
    topic: String,
    reason: String,
    is_refusal: bool,
}

impl ScanError {
    pub(super) fn new(topic: &str, reason: impl ToString) -> Self {
        Self { topic: topic.to_owned(), reason: reason.to_string(), is_refusal: false }
    }

    /// Whether the brokers denied access.
    pub fn is_refusal(&self) -> bool {
        self.is_refusal
    }
}

/// The offsets from `from` up to, but not including, `to`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
pub struct ScanRange {
    /// The partition.
    pub partition: Partition,
    /// First offset.
    pub from: NextOffset,
    /// The offset after the last one; at most the last stable offset.
    pub to: NextOffset,
}

impl ScanRange {
    /// Whether the range has no offsets.
    pub fn is_empty(&self) -> bool {
        self.from >= self.to
    }

    /// Whether the range has this offset.
    pub fn contains(&self, partition: Partition, offset: Offset) -> bool {
        self.partition == partition && !self.from.is_past(offset) && self.to.is_past(offset)
    }
}

/// Defaults that `kafka.properties` may override. The queue is one partition's: a hundred may be read at once, and what
/// is queued at the end of each range was fetched in vain.
const DEFAULTS: [(&str, &str); 5] = [
    ("fetch.queue.backoff.ms", "10"),
    ("fetch.wait.max.ms", "50"),
    ("queued.max.messages.kbytes", "2048"),
    ("fetch.message.max.bytes", "524288"),
    ("fetch.max.bytes", "8388608"),
];

/// A reader of one topic's committed records.
pub struct Scanner {
    fetcher: Fetcher,
    topic: String,
}

impl Scanner {
    /// Creates a reader of `topic`, without a request to the brokers.
    pub fn new(kafka: &KafkaSettings, topic: &str) -> Result<Self, ScanError> {
        Self::with(&reader_config(kafka, &DEFAULTS), topic)
    }

    /// As [`new`](Self::new), but it also reads aborted records, and those of open transactions.
    pub fn uncommitted(kafka: &KafkaSettings, topic: &str) -> Result<Self, ScanError> {
        Self::with(reader_config(kafka, &DEFAULTS).set("isolation.level", "read_uncommitted"), topic)
    }

    fn with(config: &ClientConfig, topic: &str) -> Result<Self, ScanError> {
        let fetcher = Fetcher::new(config, topic)
            .map_err(|e| ScanError::new(topic, format!("creating a consumer: {e}")))?;
        Ok(Self { fetcher, topic: topic.to_owned() })
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// An error about this topic.
    pub(super) fn error(&self, reason: impl ToString) -> ScanError {
        ScanError::new(&self.topic, reason)
    }

    /// Topic id and partitions.
    pub fn describe(&self) -> Result<(Uuid, Vec<Partition>), ScanError> {
        let (id, count) =
            topic_id(self.fetcher.consumer(), &self.topic, ATTEMPT_TIMEOUT).map_err(|e| self.error(e))?;
        Ok((id, (0..i32::try_from(count).unwrap_or(i32::MAX)).map(Partition).collect()))
    }

    /// Whether the topic exists and this principal may see it. Requests all topics, because brokers may create
    /// a topic that is requested by name.
    pub fn exists(&self) -> Result<bool, ScanError> {
        let metadata = self
            .fetcher
            .consumer()
            .fetch_metadata(None, ATTEMPT_TIMEOUT)
            .map_err(|e| self.error(format!("no broker answers: {e}")))?;
        Ok(metadata.topics().iter().any(|topic| topic.name() == self.topic))
    }

    /// How a topic breaks a rule; `None` if it does not.
    ///
    /// # Errors
    /// If its settings cannot be read.
    pub fn violation(
        &self,
        rule: &Rule,
        kafka: &KafkaSettings,
        role: Role,
    ) -> Result<Option<String>, String> {
        rule.check(self.fetcher.consumer().client(), kafka, role)
    }

    /// Whether the brokers are known to limit by [`TIMESTAMP_AHEAD`] how far records of the input are stamped ahead.
    pub fn limits_timestamps(&self, kafka: &KafkaSettings) -> bool {
        self.violation(&TIMESTAMP_AHEAD, kafka, Role::Input) == Ok(None)
    }

    /// First offset and last stable offset of each partition, in the order given.
    pub fn bounds(&self, partitions: &[Partition]) -> Result<Vec<LogBounds>, ScanError> {
        bounds_of(self.fetcher.consumer(), &self.topic, partitions).map_err(|e| self.error(e))
    }

    /// High watermark of each partition, in the order given. Read it before the [bounds](Self::bounds): what is then
    /// between the last stable offset and this is behind an open transaction.
    pub fn high_watermarks(&self, partitions: &[Partition]) -> Result<Vec<NextOffset>, ScanError> {
        let found = high_watermarks_of(self.fetcher.consumer(), &self.topic, partitions, ATTEMPT_TIMEOUT)
            .map_err(|e| self.error(e))?;
        let of = |partition: &Partition| {
            let missing = || self.error(format!("partition {partition}: no answer about its high watermark"));
            found.get(partition).copied().ok_or_else(missing)
        };
        partitions.iter().map(of).collect()
    }

    /// The first offset of each partition whose timestamp is at or after `time`; `None` if there is no such
    /// record.
    pub fn positions_at(
        &self,
        partitions: &[Partition],
        time: TimestampMs,
    ) -> Result<Vec<Option<NextOffset>>, ScanError> {
        positions_at(self.fetcher.consumer(), &self.topic, partitions, time).map_err(|e| self.error(e))
    }

    /// Passes every committed record of `ranges` to `each`, ordered by offset within a partition, until all
    /// are read or `each` breaks. After an error of a partition, reading restarts at its last position,
    /// because what the client delivers after an error may be at a wrong position.
    ///
    /// # Errors
    /// When a partition cannot be read, or nothing arrives for a minute. The error names the partitions that
    /// are not finished.
    pub fn read(
        &self,
        ranges: &[ScanRange],
        mut each: impl FnMut(&NativeRecord<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ScanError> {
        let mut open: BTreeMap<Partition, Open> = ranges
            .iter()
            .filter(|range| !range.is_empty())
            .map(|range| {
                (range.partition, Open { position: range.from, to: range.to, failures: 0, failed: None })
            })
            .collect();
        let outcome = self.read_open(&mut open, &mut each);
        // Also after an error, so that nothing more is fetched.
        let partitions: Vec<Partition> = ranges.iter().map(|range| range.partition).collect();
        let stopped = self.fetcher.stop(&partitions).map_err(|e| self.error(e));
        let flow = outcome?;
        stopped.map(|()| flow)
    }

    fn read_open(
        &self,
        open: &mut BTreeMap<Partition, Open>,
        each: &mut impl FnMut(&NativeRecord<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ScanError> {
        let starts: Vec<_> = open.iter().map(|(partition, range)| (*partition, range.position)).collect();
        self.fetcher.start(&starts).map_err(|e| self.error(e))?;
        let mut heard_at = Instant::now();
        while !open.is_empty() {
            let mut flow = ControlFlow::Continue(());
            let count = self.fetcher.drain(usize::MAX, POLL, |item| {
                let range = item.partition().and_then(|partition| open.get_mut(&partition));
                if let Some(range) = range.filter(|range| flow.is_continue() && range.is_waiting()) {
                    flow = range.take(item, each);
                }
            });
            if count > 0 {
                // Measured after the drain, because `each` may be slow.
                heard_at = Instant::now();
            }
            if flow.is_break() {
                return Ok(flow);
            }
            self.settle(open)?;
            if heard_at.elapsed() > STALL_MAX {
                let waiting: Vec<String> = open.keys().map(|partition| partition.to_string()).collect();
                return Err(self.error(format!(
                    "nothing arrived for {} s; not read to the end: partitions {}",
                    STALL_MAX.as_secs(),
                    waiting.join(", ")
                )));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Stops finished partitions, and restarts failed ones at their positions.
    fn settle(&self, open: &mut BTreeMap<Partition, Open>) -> Result<(), ScanError> {
        for (partition, range) in open.iter_mut().filter(|(_, range)| !range.is_waiting()) {
            let Some(code) = range.failed.take() else {
                self.fetcher.stop(&[*partition]).map_err(|e| self.error(e))?;
                continue;
            };
            range.failures += 1;
            if !is_transient(code) || range.failures > FAILURES_MAX {
                let is_refusal = is_refusal(code);
                let reason = format!("partition {partition} cannot be read at {}: {code}", range.position);
                return Err(ScanError { is_refusal, ..self.error(reason) });
            }
            self.fetcher.start(&[(*partition, range.position)]).map_err(|e| self.error(e))?;
        }
        open.retain(|_, range| range.is_waiting());
        Ok(())
    }
}

/// A range that is being read.
struct Open {
    /// The offset after the last record that was passed on; `to` if all were.
    position: NextOffset,
    to: NextOffset,
    failures: u32,
    /// An error since the partition was last started; what follows it is ignored.
    failed: Option<RDKafkaErrorCode>,
}

impl Open {
    fn is_waiting(&self) -> bool {
        self.failed.is_none() && self.position < self.to
    }

    fn take(
        &mut self,
        item: FetchItem<'_>,
        each: &mut impl FnMut(&NativeRecord<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        match item {
            FetchItem::Record(record) if self.position.is_past(record.offset()) => {}
            FetchItem::Record(record) if self.to.is_past(record.offset()) => {
                self.position = record.offset().next();
                self.failures = 0;
                return each(&record);
            }
            FetchItem::Record(_) => self.position = self.to,
            // A new leader may report an end that lags: wait for it.
            FetchItem::End { position, .. } if position < self.to => {}
            FetchItem::End { .. } => self.position = self.to,
            FetchItem::Failed { code, .. } => self.failed = Some(code),
        }
        ControlFlow::Continue(())
    }
}

fn is_transient(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    match code {
        // The range is gone; retrying does not help.
        Code::OffsetOutOfRange | Code::AutoOffsetReset => false,
        code => class_of_kafka(code) == FailureClass::Transient,
    }
}
