//! Passes records to librdkafka as fast as it accepts them.

use std::error::Error;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::client::OAuthToken;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{
    BaseRecord, DeliveryResult, NoCustomPartitioner, Producer, ProducerContext, ThreadedProducer,
};

use super::super::stop::StopSignal;
use super::ProduceArgs;
use crate::config::KafkaSettings;
use crate::error::CommandError;
use crate::generator::Record;
use crate::kafka::client::{REQUEST_TIMEOUT, make_client, partition_counts, producer_config};
use crate::kafka::token;

/// Maximum number of records queued in the client: about a second at full speed.
const QUEUE_RECORDS_MAX: &str = "200000";
const QUEUE_KIB_MAX: &str = "131072";

/// Pause before a retry when the client's queue is full.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(2);

/// Interval between checks for undelivered records. librdkafka fails a record after its `message.timeout.ms`.
const DELIVERY_LOOK: Duration = Duration::from_millis(1);

/// Maximum number of attempts of a retriable call, each for at most [`REQUEST_TIMEOUT`].
const TRIES_MAX: u32 = 4;

/// Result of passing a record to the client.
pub(super) enum Sending {
    /// The client accepted it.
    Taken,
    /// The client's queue was full until a signal arrived.
    Interrupted,
}

/// Counts failed deliveries; successful ones are not reported individually.
#[derive(Default)]
struct Deliveries {
    failed: AtomicU64,
    first_error: Mutex<Option<String>>,
    last_fault: Mutex<Option<RDKafkaErrorCode>>,
}

impl ClientContext for Deliveries {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

    /// librdkafka repeats an error many times per second while it lasts; log it once.
    fn error(&self, error: KafkaError, reason: &str) {
        let Ok(mut last) = self.last_fault.lock() else { return };
        let code = error.rdkafka_error_code();
        if *last != code {
            tracing::warn!("Kafka: {reason}");
            *last = code;
        }
    }
}

impl ProducerContext<NoCustomPartitioner> for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.failed.fetch_add(1, Ordering::Relaxed);
            if let Ok(mut first) = self.first_error.lock() {
                first.get_or_insert_with(|| error.to_string());
            }
        }
    }
}

fn linger_ms(args: &ProduceArgs) -> &'static str {
    match (args.transaction_size, args.rate) {
        (Some(_), _) => "1",
        (None, Some(_)) => "5",
        (None, None) => "20",
    }
}

/// A producer for one topic.
pub(super) struct Sender {
    producer: ThreadedProducer<Deliveries>,
    topic: String,
}

impl Sender {
    /// Connects and checks that the topic exists.
    pub(super) fn connect(kafka: &KafkaSettings, args: &ProduceArgs) -> Result<Self, CommandError> {
        let mut config = producer_config(kafka);
        config
            // At full speed, batches should be large over many partitions; at a given rate, the delay should
            // be small; and the end of a transaction waits for its last records.
            .set("linger.ms", linger_ms(args))
            .set("queue.buffering.max.messages", QUEUE_RECORDS_MAX)
            .set("queue.buffering.max.kbytes", QUEUE_KIB_MAX)
            .set("delivery.report.only.error", "true")
            .set("compression.type", args.compression.name());
        if args.transaction_size.is_some() {
            // Unique per run, so that concurrent runs do not fence each other.
            config.set("transactional.id", format!("payment-writer-produce-{:032x}", rand::random::<u128>()));
        }
        let producer: ThreadedProducer<Deliveries> = make_client(&config, Deliveries::default())
            .map_err(|error| CommandError::failed(format!("cannot make a Kafka client: {error}")))?;
        let topics = partition_counts(producer.client()).map_err(|error| {
            CommandError::failed(format!("no answer from Kafka at {}: {error}", kafka.bootstrap_servers))
        })?;
        if !topics.contains_key(&kafka.input_topic) {
            let topic = &kafka.input_topic;
            return Err(CommandError::failed(format!(
                "topic {topic} does not exist, or a partition of it has no leader; \
                 `payment-writer topics create` creates it"
            )));
        }
        let sender = Self { producer, topic: kafka.input_topic.clone() };
        if args.transaction_size.is_some() {
            sender.retried("start transactions", || sender.producer.init_transactions(REQUEST_TIMEOUT))?;
        }
        Ok(sender)
    }

    /// Begins a transaction.
    pub(super) fn begin(&self) -> Result<(), CommandError> {
        self.retried("begin a transaction", || self.producer.begin_transaction())
    }

    /// Commits the open transaction after every record of it is delivered.
    pub(super) fn commit(&self) -> Result<(), CommandError> {
        self.deliver()?;
        self.retried("commit a transaction", || self.producer.commit_transaction(REQUEST_TIMEOUT))
    }

    /// Aborts the open transaction after every record of it is delivered: undelivered records would be
    /// purged, and the log would contain no aborted records.
    pub(super) fn abort(&self) -> Result<(), CommandError> {
        self.deliver()?;
        self.retried("abort a transaction", || self.producer.abort_transaction(REQUEST_TIMEOUT))
    }

    /// Waits until every record is delivered or has failed. Without per-record delivery reports, librdkafka's
    /// own waits have steps of 100 ms.
    fn deliver(&self) -> Result<(), CommandError> {
        while self.producer.in_flight_count() > 0 {
            std::thread::sleep(DELIVERY_LOOK);
        }
        self.flush()
    }

    /// Retries a call whose error librdkafka marks as retriable.
    fn retried(&self, doing: &str, call: impl Fn() -> Result<(), KafkaError>) -> Result<(), CommandError> {
        let mut tries = 1;
        loop {
            match call() {
                Ok(()) => return Ok(()),
                Err(KafkaError::Transaction(error)) if error.is_retriable() && tries < TRIES_MAX => {
                    tries += 1
                }
                Err(error) => {
                    return Err(CommandError::failed(format!("cannot {doing} in {}: {error}", self.topic)));
                }
            }
        }
    }

    /// Passes a record to the client and waits while the client's queue is full.
    pub(super) fn send(&self, record: &Record, stop: &StopSignal) -> Result<Sending, CommandError> {
        self.send_unless(record, || stop.is_set())
    }

    /// Like [`send`](Self::send), but ignores signals: an aborted transaction is always completed.
    pub(super) fn send_again(&self, record: &Record) -> Result<(), CommandError> {
        self.send_unless(record, || false).map(|_| ())
    }

    fn send_unless(&self, record: &Record, is_stopped: impl Fn() -> bool) -> Result<Sending, CommandError> {
        let mut base: BaseRecord<'_, [u8], [u8], ()> =
            BaseRecord::with_opaque_to(&self.topic, ()).timestamp(record.timestamp_ms);
        if let Some(key) = record.key() {
            base = base.key(key);
        }
        if let Some(value) = record.value() {
            base = base.payload(value);
        }
        if !record.headers.is_empty() {
            let headers = OwnedHeaders::new_with_capacity(record.headers.len());
            base = base.headers(record.headers.iter().fold(headers, |headers, (name, value)| {
                headers.insert(Header { key: name, value: Some(value) })
            }));
        }
        loop {
            match self.producer.send(base) {
                Ok(()) => return Ok(Sending::Taken),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), same)) => {
                    if is_stopped() {
                        return Ok(Sending::Interrupted);
                    }
                    base = same;
                    std::thread::sleep(QUEUE_FULL_PAUSE);
                }
                Err((error, _)) => {
                    return Err(CommandError::failed(format!("cannot send to {}: {error}", self.topic)));
                }
            }
        }
    }

    /// Waits until every record is delivered or has failed, which happens after librdkafka's
    /// `message.timeout.ms`.
    pub(super) fn flush(&self) -> Result<(), CommandError> {
        while self.producer.in_flight_count() > 0 {
            match self.producer.flush(Duration::from_secs(1)) {
                Ok(()) | Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) => {}
                Err(error) => {
                    return Err(CommandError::failed(format!("cannot flush {}: {error}", self.topic)));
                }
            }
        }
        let first_error = self.producer.context().first_error.lock().ok().and_then(|first| first.clone());
        match first_error {
            None => Ok(()),
            Some(error) => Err(CommandError::failed(format!(
                "{} records were not delivered to {}, or not acknowledged; the first error: {error}",
                self.undelivered(),
                self.topic
            ))),
        }
    }

    /// Number of records that could not be delivered so far.
    pub(super) fn undelivered(&self) -> u64 {
        self.producer.context().failed.load(Ordering::Relaxed)
    }
}
