//! Passes records to librdkafka as fast as it accepts them.

use std::error::Error;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::client::OAuthToken;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{
    BaseRecord, DeliveryResult, NoCustomPartitioner, Producer, ProducerContext, ThreadedProducer,
};

use super::ProduceArgs;
use crate::config::KafkaSettings;
use crate::error::{CommandError, OrFailed};
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

/// Counts failed deliveries; successful ones are not reported individually.
#[derive(Default)]
struct Deliveries {
    failed: AtomicU64,
    first_error: OnceLock<KafkaError>,
    /// librdkafka's code of the last logged error.
    last_fault: AtomicI32,
}

impl ClientContext for Deliveries {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

    /// librdkafka repeats an error many times per second while it lasts; log it once.
    fn error(&self, error: KafkaError, reason: &str) {
        let code = error.rdkafka_error_code().map_or(0, |code| code as i32);
        if self.last_fault.swap(code, Ordering::Relaxed) != code {
            tracing::warn!("Kafka: {reason}");
        }
    }
}

impl ProducerContext<NoCustomPartitioner> for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.failed.fetch_add(1, Ordering::Relaxed);
            self.first_error.get_or_init(|| error.clone());
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
            .set("compression.type", &args.compression);
        if args.transaction_size.is_some() {
            // Unique per run, so that concurrent runs do not fence each other.
            config.set("transactional.id", format!("payment-writer-produce-{:032x}", rand::random::<u128>()));
        }
        let producer: ThreadedProducer<Deliveries> =
            make_client(&config, Deliveries::default()).or_failed_to("cannot make a Kafka client")?;
        let topics = partition_counts(producer.client())
            .or_failed_to(format_args!("no answer from Kafka at {}", kafka.bootstrap_servers))?;
        let topic = kafka.input_topic.clone();
        if !topics.contains_key(&topic) {
            return Err(CommandError::failed(format!(
                "topic {topic} does not exist, or a partition of it has no leader; \
                 `payment-writer topics create` creates it"
            )));
        }
        let sender = Self { producer, topic };
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
        let mut result = call();
        for _ in 1..TRIES_MAX {
            match &result {
                Err(KafkaError::Transaction(error)) if error.is_retriable() => result = call(),
                _ => break,
            }
        }
        result.or_failed_to(format_args!("cannot {doing} in {}", self.topic))
    }

    /// Passes a record to the client, and waits while the client's queue is full. False: `stop` was set
    /// meanwhile.
    pub(super) fn send(&self, record: &Record, stop: Option<&AtomicBool>) -> Result<bool, CommandError> {
        let mut base: BaseRecord<'_, [u8], [u8], ()> =
            BaseRecord::with_opaque_to(&self.topic, ()).timestamp(record.timestamp_ms);
        (base.key, base.payload) = (record.key.as_deref(), record.value.as_deref());
        if !record.headers.is_empty() {
            let headers = OwnedHeaders::new_with_capacity(record.headers.len());
            base = base.headers(record.headers.iter().fold(headers, |headers, (name, value)| {
                headers.insert(Header { key: name, value: Some(value) })
            }));
        }
        loop {
            match self.producer.send(base) {
                Ok(()) => return Ok(true),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), same)) => {
                    if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                        return Ok(false);
                    }
                    base = same;
                    std::thread::sleep(QUEUE_FULL_PAUSE);
                }
                Err((error, _)) => {
                    return Err(error).or_failed_to(format_args!("cannot send to {}", self.topic));
                }
            }
        }
    }

    /// Waits until every record is delivered or has failed, which happens after librdkafka's
    /// `message.timeout.ms`.
    pub(super) fn flush(&self) -> Result<(), CommandError> {
        while self.producer.in_flight_count() > 0 {
            match self.producer.flush(Duration::from_secs(1)) {
                Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) => {}
                flushed => flushed.or_failed_to(format_args!("cannot flush {}", self.topic))?,
            }
        }
        match self.producer.context().first_error.get() {
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
