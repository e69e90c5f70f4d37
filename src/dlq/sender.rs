//! Kafka side of a replay: one transaction per chunk, with commit metadata in a separate consumer group.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use super::DlqError;
use super::run_metadata::RunMetadata;
use crate::config::KafkaSettings;
use crate::domain::record::{RecordView, TimestampMs};
use crate::failpoint;
use crate::kafka::callbacks::QuietLog;
use crate::kafka::client::{REQUEST_TIMEOUT, base_client_config, make_client, producer_config};
use crate::kafka::librdkafka::{GroupMetadata, NativeError, ProducerClient, TxnProducer};

/// `init_transactions` waits until the transaction of an older run is aborted or completed.
const INIT_DEADLINE: Duration = Duration::from_secs(60);
/// Time limit of a whole transaction.
const TRANSACTION_DEADLINE: Duration = Duration::from_secs(20);
/// Transaction timeout on the broker. Consumers wait at most this long for an abandoned transaction.
const TRANSACTION_TIMEOUT_MS: &str = "15000";
const ABORT_DEADLINE: Duration = Duration::from_secs(10);
/// Minimum timeout of a call, and interval between checks of the producer queue and of deliveries.
const SLICE: Duration = Duration::from_millis(50);
/// Index of the input topic among the producer's topics.
const INPUT: usize = 0;

/// Producer of replays. A group has one at a time: the next one fences it.
pub struct Sender {
    producer: TxnProducer<QuietLog>,
    /// Provides the group metadata and reads the group's offset; never joins the group.
    consumer: BaseConsumer<QuietLog>,
    input_topic: String,
    dead_letter_topic: String,
    group_id: String,
}

fn failed(doing: &str, error: impl std::fmt::Display) -> DlqError {
    DlqError::Kafka(format!("{doing}: {error}"))
}

/// Consumer group, and transactional id, of the replays of a daemon's group.
pub fn replay_group(kafka: &KafkaSettings) -> String {
    format!("{}-dlq-replay", kafka.group_id)
}

impl Sender {
    /// Creates the clients and checks that the input topic exists.
    pub fn connect(kafka: &KafkaSettings) -> Result<Self, DlqError> {
        let group_id = replay_group(kafka);
        let mut config = producer_config(kafka);
        config
            .set("transactional.id", &group_id)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS)
            .set("message.max.bytes", "4000000")
            .set("linger.ms", "5")
            .set("delivery.report.only.error", "true");
        let native = make_client::<ProducerClient<_>, _>(&config, QuietLog::default())
            .map_err(|e| failed("creating the producer of replays", e))?;
        let producer = TxnProducer::new(native, &[&kafka.input_topic]);
        let mut config = base_client_config(kafka);
        config
            .set("group.id", &group_id)
            // Wait for the offset of an open transaction instead of reading the previous one.
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .remove("group.instance.id");
        let consumer = make_client::<BaseConsumer<_>, _>(&config, QuietLog::default())
            .map_err(|e| failed("creating the consumer of the replay group", e))?;
        let sender = Self {
            producer,
            consumer,
            input_topic: kafka.input_topic.clone(),
            dead_letter_topic: kafka.dead_letter_topic.clone(),
            group_id,
        };
        // A message produced before the topic's metadata is known can abort the transaction.
        let doing = format!("asking for input topic {}", sender.input_topic);
        let client = sender.producer.client();
        let metadata = client
            .fetch_metadata(Some(&sender.input_topic), REQUEST_TIMEOUT)
            .map_err(|e| failed(&doing, e))?;
        if metadata.topics().iter().any(|t| t.error().is_some() || t.partitions().is_empty()) {
            return Err(failed(&doing, "it does not exist or cannot be used"));
        }
        Ok(sender)
    }

    /// Group that holds the commit metadata.
    pub fn group_id(&self) -> &str {
        &self.group_id
    }

    /// Calls `init_transactions`: aborts or completes what an older run left open, and fences it.
    pub fn fence(&self) -> Result<(), DlqError> {
        repeated("init_transactions", Instant::now() + INIT_DEADLINE, |left| self.producer.init(left))
    }

    /// Commit metadata of the group; `None` if there is none or a replay did not write it.
    pub fn metadata(&self) -> Result<Option<RunMetadata>, DlqError> {
        let doing = format!("asking for the offset of group {}", self.group_id);
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition(&self.dead_letter_topic, 0);
        let answer = self.consumer.committed_offsets(list, REQUEST_TIMEOUT).map_err(|e| failed(&doing, e))?;
        let found = answer
            .find_partition(&self.dead_letter_topic, 0)
            .ok_or_else(|| failed(&doing, "the partition is missing in the answer"))?;
        found.error().map_err(|e| failed(&doing, e))?;
        Ok(match found.offset() {
            KafkaOffset::Offset(_) => RunMetadata::parse(found.metadata()),
            _ => None,
        })
    }

    /// Sends records and commits the metadata in one transaction. After an error only the next
    /// [`fence`](Self::fence) and [`metadata`](Self::metadata) show whether it was committed.
    pub fn send<'r>(
        &self,
        records: impl Iterator<Item = RecordView<'r>>,
        metadata: &RunMetadata,
    ) -> Result<(), DlqError> {
        let deadline = Instant::now() + TRANSACTION_DEADLINE;
        self.producer.begin().map_err(|e| failed("begin_transaction", e))?;
        let outcome = self.fill(records, metadata, deadline).and_then(|()| {
            failpoint::hit("dlq_before_commit");
            repeated("commit_transaction", deadline, |left| self.producer.commit(left))
        });
        if outcome.is_err() {
            // Errors do not matter: the next `fence` or the transaction timeout ends an open transaction.
            let _ = self.producer.abort(ABORT_DEADLINE);
        }
        outcome
    }

    fn fill<'r>(
        &self,
        records: impl Iterator<Item = RecordView<'r>>,
        metadata: &RunMetadata,
        deadline: Instant,
    ) -> Result<(), DlqError> {
        let doing = format!("sending to {}", self.input_topic);
        for record in records {
            self.produce(&record, deadline).map_err(|e| failed(&doing, e))?;
        }
        failpoint::hit("dlq_after_produce");
        self.send_metadata(metadata, deadline)?;
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
        // Never 0: dead letters without a timestamp are refused.
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

    fn send_metadata(&self, metadata: &RunMetadata, deadline: Instant) -> Result<(), DlqError> {
        let doing = format!("committing the metadata of group {}", self.group_id);
        let group = GroupMetadata::of(&self.consumer)
            .ok_or_else(|| failed(&doing, "the client does not know its group"))?;
        let mut list = TopicPartitionList::with_capacity(1);
        {
            // Only the metadata matters, not the offset.
            let mut element = list.add_partition(&self.dead_letter_topic, 0);
            element.set_metadata(metadata.to_string());
            element.set_offset(KafkaOffset::Offset(0)).map_err(|e| failed(&doing, e))?;
        }
        repeated(&doing, deadline, |left| self.producer.send_offsets(&list, &group, left))
    }
}

/// Repeats a call until `deadline` while librdkafka marks its error as retriable; the same call resumes what
/// timed out.
fn repeated(
    doing: &str,
    deadline: Instant,
    call: impl Fn(Duration) -> Result<(), NativeError>,
) -> Result<(), DlqError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Err(error) = call(left.max(SLICE)) else { return Ok(()) };
        let is_retriable = error.is_retriable && !error.is_fatal && !error.requires_abort;
        if !is_retriable || Instant::now() >= deadline {
            return Err(failed(doing, error));
        }
        std::thread::sleep(SLICE);
    }
}
