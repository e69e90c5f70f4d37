//! Sends records to a scope's topics and reads them, as other systems would.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{DeliveryResult, Header, Headers, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientContext, Timestamp};

use super::{DEADLINE, PATIENCE, Scope, wait_until, wait_until_within};

/// Longer than the transaction timeout of a crashed producer.
const MARKERS_MAX: Duration = Duration::from_secs(20);

/// A record to send. Unset fields are left to the client.
#[derive(Clone, Debug, Default)]
pub struct Message {
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    pub timestamp_ms: Option<i64>,
    pub partition: Option<i32>,
}

impl Message {
    pub fn new(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Message {
        Message { key: Some(key.into()), value: Some(value.into()), ..Message::default() }
    }

    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Message {
        self.headers.push((name.to_owned(), Some(value.into())));
        self
    }

    pub fn timestamp_ms(mut self, timestamp_ms: i64) -> Message {
        self.timestamp_ms = Some(timestamp_ms);
        self
    }

    pub fn partition(mut self, partition: i32) -> Message {
        self.partition = Some(partition);
        self
    }
}

/// A consumed record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub partition: i32,
    pub offset: i64,
    pub timestamp_ms: Option<i64>,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Received {
    /// The text of a header that must occur exactly once.
    #[track_caller]
    pub fn header(&self, name: &str) -> &str {
        let mut found = self.headers.iter().filter(|(key, _)| key == name);
        let (Some((_, Some(value))), None) = (found.next(), found.next()) else {
            panic!("header {name} does not occur exactly once: {:?}", self.headers)
        };
        std::str::from_utf8(value).unwrap()
    }

    pub fn has_header(&self, name: &str) -> bool {
        self.headers.iter().any(|(key, _)| key == name)
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(self.value.as_deref().unwrap()).unwrap()
    }

    #[track_caller]
    pub fn key_text(&self) -> &str {
        std::str::from_utf8(self.key.as_deref().unwrap()).unwrap()
    }
}

/// A record batch in a segment on disk (message format 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoredBatch {
    pub codec: &'static str,
    pub records: usize,
    pub is_transactional: bool,
    /// For a control record that ends a transaction: whether it is an abort.
    pub marker: Option<Marker>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Marker {
    Abort,
    Commit,
}

/// Collects the offset of each delivered record.
#[derive(Default)]
pub(super) struct Deliveries(Mutex<Vec<Option<(i32, i64)>>>);

impl ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = Box<usize>;

    fn delivery(&self, result: &DeliveryResult<'_>, index: Box<usize>) {
        if let Ok(message) = result {
            self.0.lock().unwrap()[*index] = Some((message.partition(), message.offset()));
        }
    }
}

impl Scope<'_> {
    /// This scope's Kafka, for clients with other settings.
    pub fn client_config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", self.servers.bootstrap_servers())
            // The partitioner of the Java clients.
            .set("partitioner", "murmur2_random")
            .set("retry.backoff.ms", "20")
            // As in the daemon: a broker that was paused reports for a moment that there are no brokers.
            .set("metadata.recovery.rebootstrap.trigger.ms", "5000");
        config
    }

    /// Sends records and waits for all of them; returns partition and offset of each.
    pub fn produce(&self, topic: &str, messages: impl IntoIterator<Item = Message>) -> Vec<(i32, i64)> {
        let producer: BaseProducer<Deliveries> = self
            .client_config()
            // Larger than any topic accepts: the limit under test is the topic's.
            .set("message.max.bytes", "16000000")
            .create_with_context(Deliveries::default())
            .unwrap();
        send(&producer, topic, messages)
    }

    /// Sends one record as a compressed batch of its own, whatever its uncompressed size.
    pub fn produce_compressed(&self, codec: &str, message: Message) {
        let producer: BaseProducer<Deliveries> = self
            .client_config()
            .set("compression.type", codec)
            .set("compression.level", if codec == "gzip" { "9" } else { "-1" })
            .set("message.max.bytes", "1000000000")
            .set("queue.buffering.max.kbytes", "2000000")
            .create_with_context(Deliveries::default())
            .unwrap();
        send(&producer, &self.input_topic, [message]);
    }

    /// Sends records in one transaction, which is committed or aborted.
    pub fn produce_in_transaction(
        &self,
        topic: &str,
        messages: impl IntoIterator<Item = Message>,
        commit: bool,
    ) -> Vec<(i32, i64)> {
        let producer: BaseProducer<Deliveries> = self
            .client_config()
            .set("transactional.id", format!("{topic}_test_producer"))
            .create_with_context(Deliveries::default())
            .unwrap();
        producer.init_transactions(DEADLINE).unwrap();
        producer.begin_transaction().unwrap();
        let sent = send(&producer, topic, messages);
        if commit {
            producer.commit_transaction(DEADLINE).unwrap();
        } else {
            producer.abort_transaction(DEADLINE).unwrap();
        }
        sent
    }

    /// All committed records of a topic, ordered by partition and offset.
    pub fn read_all(&self, topic: &str) -> Vec<Received> {
        let consumer: BaseConsumer = self
            .client_config()
            .set("group.id", format!("{topic}_test_reader"))
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "10")
            .create()
            .unwrap();
        let metadata = consumer.fetch_metadata(Some(topic), DEADLINE).unwrap();
        let partitions: Vec<i32> =
            metadata.topics()[0].partitions().iter().map(|partition| partition.id()).collect();
        self.await_markers(&consumer, topic, &partitions);
        let mut assignment = TopicPartitionList::new();
        for &partition in &partitions {
            assignment.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&assignment).unwrap();
        let begin = Instant::now();
        let mut at_end = vec![false; partitions.len()];
        let mut received = Vec::new();
        while at_end.contains(&false) {
            assert!(begin.elapsed() < DEADLINE, "topic {topic} was not read to its end within {DEADLINE:?}");
            match consumer.poll(Duration::from_millis(100)) {
                None => {}
                Some(Ok(message)) => received.push(Received {
                    partition: message.partition(),
                    offset: message.offset(),
                    timestamp_ms: match message.timestamp() {
                        Timestamp::NotAvailable => None,
                        Timestamp::CreateTime(ms) | Timestamp::LogAppendTime(ms) => Some(ms),
                    },
                    key: message.key().map(<[u8]>::to_vec),
                    value: message.payload().map(<[u8]>::to_vec),
                    headers: message.headers().map_or(Vec::new(), |headers| {
                        headers.iter().map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec))).collect()
                    }),
                }),
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    at_end[usize::try_from(partition).unwrap()] = true
                }
                // One of several brokers may be down: the client asks the others.
                Some(Err(error))
                    if error.rdkafka_error_code() == Some(RDKafkaErrorCode::BrokerTransportFailure) => {}
                Some(Err(error)) => panic!("reading {topic}: {error}"),
            }
        }
        received.sort_by_key(|record| (record.partition, record.offset));
        received
    }

    /// The batches of a partition on the first broker's disk, including aborted ones and control records.
    pub fn batches(&self, topic: &str, partition: i32) -> Vec<StoredBatch> {
        let folder = self.servers.dir().join(format!("data/kafka-1/{topic}-{partition}"));
        let bytes = std::fs::read(folder.join("00000000000000000000.log")).unwrap();
        let mut rest = &bytes[..];
        let mut batches = Vec::new();
        while rest.len() > 61 {
            let number = |at: usize, length: usize| {
                rest[at..at + length].iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
            };
            let attributes = number(21, 2);
            // The type is in the key of the only record, after its version.
            let marker = || if number(68, 2) == 0 { Marker::Abort } else { Marker::Commit };
            batches.push(StoredBatch {
                codec: ["none", "gzip", "snappy", "lz4", "zstd"][attributes & 7],
                records: number(57, 4),
                is_transactional: attributes & 16 != 0,
                marker: (attributes & 32 != 0).then(marker),
            });
            rest = &rest[12 + number(8, 4)..];
        }
        batches
    }

    /// Waits until no transaction of the input is open, and the control records of all ended ones are in the
    /// log.
    pub fn await_input_markers(&self) {
        let consumer: BaseConsumer = self
            .client_config()
            .set("group.id", format!("{}_test_reader", self.input_topic))
            .create()
            .unwrap();
        let metadata = consumer.fetch_metadata(Some(&self.input_topic), DEADLINE).unwrap();
        let partitions: Vec<i32> = metadata.topics()[0].partitions().iter().map(|p| p.id()).collect();
        self.await_markers(&consumer, &self.input_topic, &partitions);
    }

    /// Waits until the last stable offsets are the end offsets: the broker answers the commit of a
    /// transaction before its control records are in the partitions. For a transaction that a test leaves
    /// open, the wait is short.
    fn await_markers(&self, committed: &BaseConsumer, topic: &str, partitions: &[i32]) {
        let uncommitted: BaseConsumer = self
            .client_config()
            .set("group.id", format!("{topic}_test_reader"))
            .set("isolation.level", "read_uncommitted")
            .create()
            .unwrap();
        let begin = Instant::now();
        let end = |consumer: &BaseConsumer, partition| loop {
            match consumer.fetch_watermarks(topic, partition, DEADLINE) {
                Ok((_, end)) => break end,
                // A new leader may not be in every broker's metadata yet.
                Err(error) => {
                    assert!(begin.elapsed() < DEADLINE, "fetching the end offsets of {topic}: {error}")
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        for &partition in partitions {
            while end(committed, partition) < end(&uncommitted, partition) && begin.elapsed() < MARKERS_MAX {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// The group's committed offset and its metadata, if it has one.
    pub fn committed(&self, partition: i32) -> Option<(i64, String)> {
        self.committed_all().remove(&partition)
    }

    /// Waits until the cluster reports brokers. One that was paused reports none for a moment, and a client
    /// may keep that for ever (librdkafka #5301): so each attempt uses a new client.
    pub fn wait_for_brokers(&self) {
        wait_until("the cluster reports brokers", || {
            let consumer: BaseConsumer = self.client_config().create().unwrap();
            let metadata = consumer.fetch_metadata(Some(&self.input_topic), Duration::from_secs(2));
            metadata.is_ok_and(|metadata| !metadata.brokers().is_empty())
        });
    }

    /// Waits until a new topic is visible to clients.
    pub(super) fn wait_for_topic(&self, topic: &str, partitions: i32) {
        let consumer: BaseConsumer = self.client_config().create().unwrap();
        wait_until_within(PATIENCE, "the topic's partitions have leaders", || {
            let metadata = consumer.fetch_metadata(Some(topic), DEADLINE).unwrap();
            let found = metadata.topics()[0].partitions();
            found.len() == usize::try_from(partitions).unwrap() && found.iter().all(|p| p.leader() >= 0)
        });
    }
}

/// Sends records and waits for all of them; returns partition and offset of each.
pub(super) fn send(
    producer: &BaseProducer<Deliveries>,
    topic: &str,
    messages: impl IntoIterator<Item = Message>,
) -> Vec<(i32, i64)> {
    producer.context().0.lock().unwrap().clear();
    for message in messages {
        let index = {
            let mut deliveries = producer.context().0.lock().unwrap();
            deliveries.push(None);
            deliveries.len() - 1
        };
        let mut headers = OwnedHeaders::new();
        for (key, value) in &message.headers {
            headers = headers.insert(Header { key, value: value.as_ref() });
        }
        let mut record: BaseRecord<'_, [u8], [u8], Box<usize>> =
            BaseRecord::with_opaque_to(topic, Box::new(index));
        record.key = message.key.as_deref();
        record.payload = message.value.as_deref();
        record.partition = message.partition;
        record.timestamp = message.timestamp_ms;
        if !message.headers.is_empty() {
            record.headers = Some(headers);
        }
        let mut unsent = Some(record);
        while let Some(record) = unsent.take() {
            match producer.send(record) {
                Ok(()) => {}
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), record)) => {
                    producer.poll(Duration::from_millis(10));
                    unsent = Some(record);
                }
                Err((error, _)) => panic!("producing to {topic}: {error}"),
            }
        }
        producer.poll(Duration::ZERO);
    }
    producer.flush(DEADLINE).unwrap();
    let deliveries = producer.context().0.lock().unwrap();
    deliveries.iter().map(|delivered| delivered.expect("the record was not delivered")).collect()
}
