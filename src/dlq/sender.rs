//! Kafka's side of a replay: one transaction a chunk, with its mark in a group of its own.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use super::DlqError;
use super::mark::Mark;
use crate::config::KafkaSettings;
use crate::failpoint;
use crate::kafka::group::QuietLog;
use crate::kafka::librdkafka::{GroupMetadata, NativeError, QuietContext, TxnProducer};
use crate::kafka_client::{REQUEST_TIMEOUT, base_client_config, make_client, producer_config};
use crate::record::{RecordView, TimestampMs};

/// `init_transactions` waits until the transaction of an older run is aborted or completed.
const INIT_DEADLINE: Duration = Duration::from_secs(60);
/// All of one transaction has to fit in here.
const TRANSACTION_DEADLINE: Duration = Duration::from_secs(20);
/// The broker's own limit. For so long at most the daemon waits for a transaction that nobody ends.
const TRANSACTION_TIMEOUT_MS: &str = "15000";
const ABORT_DEADLINE: Duration = Duration::from_secs(10);
/// The least that a call is given, and how long to wait for room in the producer's queue or for deliveries.
const SLICE: Duration = Duration::from_millis(50);
/// The input topic, by its place among the producer's topics.
const INPUT: usize = 0;

/// The producer of replays. There is one at a time in a group: the next one fences it.
pub struct Sender {
    producer: TxnProducer<QuietLog>,
    /// A member of no group: names it, and reads its offset.
    consumer: BaseConsumer<QuietLog>,
    input_topic: String,
    dead_letter_topic: String,
    group_id: String,
}

fn failed(doing: &str, error: impl std::fmt::Display) -> DlqError {
    DlqError::Kafka(format!("{doing}: {error}"))
}

/// Group, and transactional id, of the replays of a daemon's group.
pub fn replay_group(kafka: &KafkaSettings) -> String {
    format!("{}-dlq-replay", kafka.group_id)
}

impl Sender {
    /// Makes the clients, and sees whether the input topic is there.
    pub fn connect(kafka: &KafkaSettings) -> Result<Self, DlqError> {
        let group_id = replay_group(kafka);
        let mut config = producer_config(kafka);
        config
            .set("transactional.id", &group_id)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS)
            .set("message.max.bytes", "4000000")
            .set("linger.ms", "5")
            .set("delivery.report.only.error", "true");
        let native = make_client::<BaseProducer<_>, _>(&config, QuietContext(QuietLog))
            .map_err(|e| failed("creating the producer of replays", e))?;
        let producer = TxnProducer::new(native, &[&kafka.input_topic]);
        let mut config = base_client_config(kafka);
        config
            .set("group.id", &group_id)
            // An offset of a transaction that is still open is waited for, not passed over.
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .remove("group.instance.id");
        let consumer = make_client::<BaseConsumer<_>, _>(&config, QuietLog)
            .map_err(|e| failed("creating the consumer of the replay group", e))?;
        let sender = Self {
            producer,
            consumer,
            input_topic: kafka.input_topic.clone(),
            dead_letter_topic: kafka.dead_letter_topic.clone(),
            group_id,
        };
        // A message produced before its topic's metadata is known can abort the transaction.
        let doing = format!("asking for input topic {}", sender.input_topic);
        let client = sender.producer.inner().client();
        let metadata = client
            .fetch_metadata(Some(&sender.input_topic), REQUEST_TIMEOUT)
            .map_err(|e| failed(&doing, e))?;
        if metadata.topics().iter().any(|t| t.error().is_some() || t.partitions().is_empty()) {
            return Err(failed(&doing, "it does not exist or cannot be used"));
        }
        Ok(sender)
    }

    /// The group that the marks stand in.
    pub fn group_id(&self) -> &str {
        &self.group_id
    }

    /// `init_transactions`: what an older run left open is aborted, or completed, and it can send no more.
    pub fn fence(&self) -> Result<(), DlqError> {
        let deadline = Instant::now() + INIT_DEADLINE;
        loop {
            match self.producer.init(remaining(deadline)) {
                Ok(()) => return Ok(()),
                Err(error) if may_repeat(&error, deadline) => std::thread::sleep(SLICE),
                Err(error) => return Err(failed("init_transactions", error)),
            }
        }
    }

    fn partition_of_marks(&self) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition(&self.dead_letter_topic, 0);
        list
    }

    /// The mark that stands in the group. A text of other hands proves as little as none.
    pub fn mark(&self) -> Result<Option<Mark>, DlqError> {
        let doing = format!("asking for the offset of group {}", self.group_id);
        let answer = self
            .consumer
            .committed_offsets(self.partition_of_marks(), REQUEST_TIMEOUT)
            .map_err(|e| failed(&doing, e))?;
        let found = answer
            .find_partition(&self.dead_letter_topic, 0)
            .ok_or_else(|| failed(&doing, "the partition is missing in the answer"))?;
        found.error().map_err(|e| failed(&doing, e))?;
        Ok(match found.offset() {
            KafkaOffset::Offset(_) => Mark::parse(found.metadata()),
            _ => None,
        })
    }

    /// Sends these records and leaves the mark, all or nothing. After an error it is not known which, but for the
    /// next [`fence`](Self::fence) and [`mark`](Self::mark).
    pub fn send<'r>(
        &self,
        records: impl Iterator<Item = RecordView<'r>>,
        mark: &Mark,
    ) -> Result<(), DlqError> {
        let deadline = Instant::now() + TRANSACTION_DEADLINE;
        self.producer.begin().map_err(|e| failed("begin_transaction", e))?;
        let outcome = self.fill(records, mark, deadline).and_then(|()| {
            failpoint::hit("dlq_before_commit");
            self.commit(deadline)
        });
        if outcome.is_err() {
            // Whether this works or not: what is left open ends with the next `fence`, or by its time limit.
            let _ = self.producer.abort(ABORT_DEADLINE);
        }
        outcome
    }

    fn fill<'r>(
        &self,
        records: impl Iterator<Item = RecordView<'r>>,
        mark: &Mark,
        deadline: Instant,
    ) -> Result<(), DlqError> {
        let doing = format!("sending to {}", self.input_topic);
        for record in records {
            self.produce(&record, deadline).map_err(|e| failed(&doing, e))?;
        }
        failpoint::hit("dlq_after_produce");
        self.send_mark(mark, deadline)?;
        failpoint::hit("dlq_after_offsets");
        while !self.producer.flush(SLICE) {
            if Instant::now() > deadline {
                return Err(failed(&doing, "not delivered in time"));
            }
        }
        Ok(())
    }

    fn produce(&self, record: &RecordView<'_>, deadline: Instant) -> Result<(), NativeError> {
        let headers: Vec<_> = record.headers.iter().collect();
        // What has no timestamp was not chosen.
        let timestamp = record.timestamp.unwrap_or(TimestampMs(0));
        loop {
            let headers = headers.iter().copied();
            match self.producer.produce_at(INPUT, timestamp, record.key, record.value, headers) {
                Err(error) if error.code == RDKafkaErrorCode::QueueFull && Instant::now() < deadline => {
                    self.producer.flush(SLICE);
                }
                other => return other,
            }
        }
    }

    fn send_mark(&self, mark: &Mark, deadline: Instant) -> Result<(), DlqError> {
        let doing = format!("committing the mark of group {}", self.group_id);
        let group = GroupMetadata::of(&self.consumer)
            .ok_or_else(|| failed(&doing, "the client does not know its group"))?;
        let mut list = TopicPartitionList::with_capacity(1);
        {
            // Only the text counts.
            let mut element = list.add_partition(&self.dead_letter_topic, 0);
            element.set_metadata(mark.to_string());
            element.set_offset(KafkaOffset::Offset(0)).map_err(|e| failed(&doing, e))?;
        }
        loop {
            // The same call with the same arguments continues one that timed out.
            match self.producer.send_offsets(&list, &group, remaining(deadline)) {
                Ok(()) => return Ok(()),
                Err(error) if may_repeat(&error, deadline) => std::thread::sleep(SLICE),
                Err(error) => return Err(failed(&doing, error)),
            }
        }
    }

    fn commit(&self, deadline: Instant) -> Result<(), DlqError> {
        loop {
            match self.producer.commit(remaining(deadline)) {
                Ok(()) => return Ok(()),
                Err(error) if may_repeat(&error, deadline) => {}
                Err(error) => return Err(failed("commit_transaction", error)),
            }
        }
    }
}

fn may_repeat(error: &NativeError, deadline: Instant) -> bool {
    error.is_retriable && !error.is_fatal && !error.requires_abort && Instant::now() < deadline
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(SLICE)
}
