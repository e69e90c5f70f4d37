//! Passes records to librdkafka as fast as it accepts them.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use rdkafka::error::RDKafkaErrorCode;

use super::ProduceArgs;
use crate::config::KafkaSettings;
use crate::domain::record::TimestampMs;
use crate::error::{CommandError, OrFailed};
use crate::generator::Record;
use crate::kafka::callbacks::{Callbacks, Listener};
use crate::kafka::client::{REQUEST_TIMEOUT, make_client, partition_counts, producer_config};
use crate::kafka::librdkafka::{NativeError, ProducerClient, TxnProducer};

/// At full speed, events are served after so many records.
const SERVED_EVERY: u32 = 64;
/// Index of the topic among the producer's topics.
const TOPIC: usize = 0;

/// Maximum number of records queued in the client: about a second at full speed.
const QUEUE_RECORDS_MAX: &str = "200000";
const QUEUE_KIB_MAX: &str = "131072";

/// Pause before a retry when the client's queue is full.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(2);

/// Interval between checks for undelivered records. librdkafka fails a record after its `message.timeout.ms`.
const DELIVERY_LOOK: Duration = Duration::from_millis(1);

/// Maximum number of attempts of a retriable call, each for at most [`REQUEST_TIMEOUT`].
const TRIES_MAX: u32 = 4;

/// Logs an error once, which librdkafka repeats many times per second while it lasts.
#[derive(Default)]
struct LastFault(AtomicI32);

impl Listener for LastFault {
    fn error(&self, code: Option<RDKafkaErrorCode>, reason: &str) {
        let code = code.map_or(0, |code| code as i32);
        if self.0.swap(code, Ordering::Relaxed) != code {
            tracing::warn!("Kafka: {reason}");
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
    producer: TxnProducer<Callbacks<LastFault>>,
    topic: String,
    /// At a given rate, events are served after each record.
    is_paced: bool,
    /// Records since events were last served.
    unserved: Cell<u32>,
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
        let native = make_client::<ProducerClient<_>, _>(&config, Callbacks(LastFault::default()))
            .or_failed_to("cannot make a Kafka client")?;
        let topics = partition_counts(native.client())
            .or_failed_to(format_args!("no answer from Kafka at {}", kafka.bootstrap_servers))?;
        let topic = kafka.input_topic.clone();
        if !topics.contains_key(&topic) {
            return Err(CommandError::failed(format!(
                "topic {topic} does not exist, or a partition of it has no leader; \
                 `payment-writer topics create` creates it"
            )));
        }
        let sender = Self {
            producer: TxnProducer::new(native, &[&topic]),
            topic,
            is_paced: args.rate.is_some(),
            unserved: Cell::new(0),
        };
        if args.transaction_size.is_some() {
            sender.retried("start transactions", || sender.producer.init(REQUEST_TIMEOUT))?;
        }
        Ok(sender)
    }

    /// Begins a transaction.
    pub(super) fn begin(&self) -> Result<(), CommandError> {
        self.retried("begin a transaction", || self.producer.begin())
    }

    /// Commits the open transaction after every record of it is delivered.
    pub(super) fn commit(&self) -> Result<(), CommandError> {
        self.deliver()?;
        self.retried("commit a transaction", || self.producer.commit(REQUEST_TIMEOUT))
    }

    /// Aborts the open transaction after every record of it is delivered: undelivered records would be
    /// purged, and the log would contain no aborted records.
    pub(super) fn abort(&self) -> Result<(), CommandError> {
        self.deliver()?;
        self.retried("abort a transaction", || self.producer.abort(REQUEST_TIMEOUT))
    }

    /// Waits until every record is delivered or has failed. Without per-record delivery reports, librdkafka's
    /// own waits have steps of 100 ms.
    fn deliver(&self) -> Result<(), CommandError> {
        let producer = self.producer.inner();
        while producer.in_flight_count() > 0 {
            producer.poll(DELIVERY_LOOK);
        }
        self.flush()
    }

    /// Retries a call whose error librdkafka marks as retriable.
    fn retried(&self, doing: &str, call: impl Fn() -> Result<(), NativeError>) -> Result<(), CommandError> {
        let mut result = call();
        for _ in 1..TRIES_MAX {
            match &result {
                Err(error) if error.is_retriable => result = call(),
                _ => break,
            }
        }
        result.or_failed_to(format_args!("cannot {doing} in {}", self.topic))
    }

    /// Passes a record to the client, and waits while the client's queue is full. False: `stop` was set
    /// meanwhile.
    pub(super) fn send(&self, record: &Record, stop: Option<&AtomicBool>) -> Result<bool, CommandError> {
        let headers = || record.headers.iter().map(|(name, value)| (name.as_bytes(), Some(value.as_slice())));
        // Stands for the present time if the record has none.
        let timestamp = TimestampMs(record.timestamp_ms);
        loop {
            let (key, value) = (record.key.as_deref(), record.value.as_deref());
            match self.producer.produce_at(TOPIC, timestamp, key, value, headers()) {
                Ok(()) => {
                    self.serve_now_and_then();
                    return Ok(true);
                }
                Err(error) if error.code == RDKafkaErrorCode::QueueFull => {
                    if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                        return Ok(false);
                    }
                    self.producer.inner().poll(QUEUE_FULL_PAUSE);
                }
                Err(error) => return Err(error).or_failed_to(format_args!("cannot send to {}", self.topic)),
            }
        }
    }

    /// Serves errors, log lines and requests for tokens.
    fn serve_now_and_then(&self) {
        self.unserved.set(self.unserved.get() + 1);
        if self.unserved.get() >= SERVED_EVERY || self.is_paced {
            self.unserved.set(0);
            self.producer.take_events();
        }
    }

    /// Waits until every record is delivered or has failed, which happens after librdkafka's
    /// `message.timeout.ms`.
    pub(super) fn flush(&self) -> Result<(), CommandError> {
        while self.producer.inner().in_flight_count() > 0 {
            self.producer.flush(Duration::from_secs(1));
        }
        let undelivered = self.undelivered();
        if undelivered == 0 {
            return Ok(());
        }
        let first = self.producer.inner().first_failure();
        let first =
            first.map_or_else(|| "a later one to the same partition was".to_owned(), |code| code.to_string());
        Err(CommandError::failed(format!(
            "{undelivered} records were not delivered to {}, or not confirmed; the first error: {first}",
            self.topic
        )))
    }

    /// Number of records that could not be delivered so far, or that no broker confirmed.
    pub(super) fn undelivered(&self) -> u64 {
        self.producer.inner().failed() + self.producer.inner().unconfirmed()
    }
}
