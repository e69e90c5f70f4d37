//! Transactions by librdkafka: for what [`direct`](super::direct) does not know, such as Kerberos or compression.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientConfig, Offset as KafkaOffset, TopicPartitionList};

use super::group::QuietLog;
use super::librdkafka::{GroupMetadata, NativeError, QuietContext, TxnProducer, add_brokers};
use super::publisher::{
    INIT_TIMEOUT, PublishReply, PublisherSettings, TRANSACTION_DEADLINE, Transactions, transactional_id,
};
use crate::config::KafkaSettings;
use crate::disposition::{FailureClass, class_of_kafka};
use crate::failpoint;
use crate::kafka_client::producer_config_over;
use crate::lane::ports::{LogFailure, PublishFailure, PublishTimes};
use crate::metrics::{KafkaSteps, timed};
use crate::publication::{OutputCounts, Publication};

const METADATA_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for room in the producer's queue before looking around; also the least that a call is given.
const SLICE: Duration = Duration::from_millis(50);
/// Deliveries are waited for in slices of a growing length. The client's threads are woken only when a flush
/// begins, and a partition that the broker lets into the transaction after that waits for the next one: with
/// slices of 50 ms a transaction of a few messages took 80.
const FLUSH_SLICE_MIN: Duration = Duration::from_millis(1);
const FLUSH_SLICE_MAX: Duration = Duration::from_millis(10);

/// What `kafka.properties` may change of a lane's producer.
const PRODUCER_DEFAULTS: [(&str, &str); 8] = [
    ("transaction.timeout.ms", "15000"),
    ("linger.ms", "20"),
    ("batch.size", "900000"),
    ("batch.num.messages", "20000"),
    ("queue.buffering.max.messages", "200000"),
    ("queue.buffering.max.kbytes", "65536"),
    ("message.max.bytes", "4000000"),
    ("retry.backoff.ms", "20"),
];

/// Configuration of a lane's producer.
pub fn transactional_config(kafka: &KafkaSettings, lane: usize) -> ClientConfig {
    let mut config = producer_config_over(kafka, &PRODUCER_DEFAULTS);
    config.set("transactional.id", transactional_id(kafka, lane)).set("delivery.report.only.error", "true");
    config
}

/// The thread's producer. Only the thread holds it for longer than the lock, so that no other has to wait until it
/// is destroyed.
#[derive(Clone, Default)]
pub struct Slot(Arc<Mutex<Option<Arc<TxnProducer<QuietLog>>>>>);

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<TxnProducer<QuietLog>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self) -> Option<Arc<TxnProducer<QuietLog>>> {
        self.lock().clone()
    }

    fn clear(&self) {
        // Destroyed after the lock is released.
        let producer = self.lock().take();
        drop(producer);
    }

    /// Names the brokers to the client once more, if there is one: it may have forgotten them all.
    pub fn remind(&self, bootstrap_servers: &str) {
        if let Some(producer) = &*self.lock() {
            tracing::debug!(target: "librdkafka", "a producer is told of its brokers once more");
            add_brokers(producer.inner().client(), bootstrap_servers);
        }
    }
}

/// Runs the transactions of one transactional id.
pub struct NativeTransactions {
    config: ClientConfig,
    settings: PublisherSettings,
    slot: Slot,
    steps: KafkaSteps,
}

impl NativeTransactions {
    /// With a producer that is made when it is needed, in `slot`.
    pub fn new(config: ClientConfig, settings: PublisherSettings, slot: Slot) -> Self {
        Self { config, settings, slot, steps: KafkaSteps::default() }
    }
}

impl Drop for NativeTransactions {
    fn drop(&mut self) {
        // Here, for whoever holds the slot as well would have to wait for it.
        self.slot.clear();
    }
}

impl Transactions for NativeTransactions {
    fn init(&mut self) -> Result<(), LogFailure> {
        init(&self.config, &self.settings, &self.slot)
    }

    fn publish(&mut self, publication: &Publication, group: &GroupMetadata) -> PublishReply {
        match &self.slot.get() {
            Some(producer) => publish(producer, &self.settings, &self.steps, publication, group),
            None => Err(PublishFailure::Unknown("the producer is not initialised".to_owned())),
        }
    }
}

fn init(config: &ClientConfig, settings: &PublisherSettings, slot: &Slot) -> Result<(), LogFailure> {
    if slot.lock().is_none() {
        let native = BaseProducer::from_config_and_context(config, QuietContext(QuietLog))
            .map_err(|e| LogFailure::passing(format!("creating the producer: {e}")))?;
        let names: Vec<&str> = settings.outputs.iter().map(String::as_str).collect();
        *slot.lock() = Some(Arc::new(TxnProducer::new(native, &names)));
    }
    let Some(producer) = slot.get() else { return Ok(()) };
    if let Err(failure) = outputs_exist(settings, &producer) {
        // Or it is asked for ever, though it may be the client that knows no broker any more.
        slot.clear();
        return Err(failure);
    }
    producer.init(INIT_TIMEOUT).map_err(|error| {
        if !error.is_retriable {
            slot.clear();
        }
        LogFailure::Failed {
            class: class_of_kafka(error.code),
            message: format!("init_transactions: {error}"),
        }
    })
}

/// A message produced before its topic's metadata is known can abort the transaction.
fn outputs_exist(settings: &PublisherSettings, producer: &TxnProducer<QuietLog>) -> Result<(), LogFailure> {
    for topic in settings.outputs.iter().filter(|_| settings.publishes) {
        let metadata =
            producer.inner().client().fetch_metadata(Some(topic), METADATA_TIMEOUT).map_err(|e| {
                LogFailure::Failed {
                    class: e.rdkafka_error_code().map_or(FailureClass::Passing, class_of_kafka),
                    message: format!("asking for output topic {topic}: {e}"),
                }
            })?;
        if metadata.topics().iter().any(|t| t.error().is_some() || t.partitions().is_empty()) {
            return Err(LogFailure::Failed {
                class: FailureClass::Systemic,
                message: format!(
                    "output topic {topic} does not exist or cannot be used; payment-writer topics create makes it"
                ),
            });
        }
    }
    Ok(())
}

/// What went wrong inside a transaction that is still open.
enum Broken {
    Native(NativeError),
    Late(&'static str),
}

fn publish(
    producer: &TxnProducer<QuietLog>,
    settings: &PublisherSettings,
    steps: &KafkaSteps,
    publication: &Publication,
    group: &GroupMetadata,
) -> PublishReply {
    let deadline = Instant::now() + TRANSACTION_DEADLINE;
    failpoint::hit("before_kafka_begin");
    if let Err(error) = producer.begin() {
        return Err(PublishFailure::Unknown(format!("begin_transaction: {error}")));
    }
    let mut times = PublishTimes::default();
    match fill(producer, settings, steps, &mut times, publication, group, deadline) {
        Ok(counts) => {
            failpoint::hit("before_kafka_commit");
            timed(&steps.commit, &mut times.commit, || commit(producer, deadline))?;
            failpoint::hit("after_kafka_commit");
            Ok((publication.committed(), counts, times))
        }
        Err(broken) => Err(abort(producer, broken)),
    }
}

fn fill(
    producer: &TxnProducer<QuietLog>,
    settings: &PublisherSettings,
    steps: &KafkaSteps,
    times: &mut PublishTimes,
    publication: &Publication,
    group: &GroupMetadata,
    deadline: Instant,
) -> Result<OutputCounts, Broken> {
    let counts =
        timed(&steps.produce, &mut times.produce, || produce(producer, settings, publication, deadline))?;
    failpoint::hit("after_produce");
    timed(&steps.offsets, &mut times.offsets, || {
        send_offsets(producer, settings, publication, group, deadline)
    })?;
    failpoint::hit("after_send_offsets");
    timed(&steps.deliver, &mut times.deliver, || deliver(producer, deadline))?;
    Ok(counts)
}

fn produce(
    producer: &TxnProducer<QuietLog>,
    settings: &PublisherSettings,
    publication: &Publication,
    deadline: Instant,
) -> Result<OutputCounts, Broken> {
    publication.for_each_output(&settings.input_topic, settings.identity.topic_id, |output| {
        loop {
            let produced = producer.produce(
                output.topic.index(),
                output.key,
                output.value,
                output.headers.iter().copied(),
            );
            match produced {
                Err(error) if error.code == RDKafkaErrorCode::QueueFull => {
                    if Instant::now() > deadline {
                        return Err(Broken::Late("producing"));
                    }
                    producer.flush(SLICE);
                }
                other => return other.map_err(Broken::Native),
            }
        }
    })
}

fn send_offsets(
    producer: &TxnProducer<QuietLog>,
    settings: &PublisherSettings,
    publication: &Publication,
    group: &GroupMetadata,
    deadline: Instant,
) -> Result<(), Broken> {
    let mut offsets = TopicPartitionList::with_capacity(publication.spans().len());
    for (partition, position, mark) in publication.offsets(&settings.identity) {
        let mut element = offsets.add_partition(&settings.input_topic, partition.0);
        element.set_metadata(mark);
        if element.set_offset(KafkaOffset::Offset(position.0)).is_err() {
            return Err(Broken::Late("an offset that cannot be represented"));
        }
    }
    // The same call with the same arguments continues one that timed out.
    while let Err(error) = producer.send_offsets(&offsets, group, remaining(deadline)) {
        if !error.is_retriable || error.is_fatal || error.requires_abort {
            return Err(Broken::Native(error));
        }
        if Instant::now() > deadline {
            return Err(Broken::Late("send_offsets_to_transaction"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Waits until nothing is left to deliver. `commit_transaction` would do so in steps of 100 ms.
fn deliver(producer: &TxnProducer<QuietLog>, deadline: Instant) -> Result<(), Broken> {
    let mut slice = FLUSH_SLICE_MIN;
    while !producer.flush(slice) {
        if Instant::now() > deadline {
            return Err(Broken::Late("waiting for deliveries"));
        }
        slice = (slice * 2).min(FLUSH_SLICE_MAX);
    }
    Ok(())
}

fn commit(producer: &TxnProducer<QuietLog>, deadline: Instant) -> Result<(), PublishFailure> {
    loop {
        match producer.commit(remaining(deadline)) {
            Ok(()) => return Ok(()),
            Err(error) if error.requires_abort => return Err(abort(producer, Broken::Native(error))),
            Err(error) if error.is_retriable && !error.is_fatal && Instant::now() < deadline => {}
            Err(error) => {
                return Err(PublishFailure::Unknown(format!("commit_transaction: {error}")));
            }
        }
    }
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(SLICE)
}

/// Aborts the open transaction; only when that succeeded is it certain that nothing is visible.
fn abort(producer: &TxnProducer<QuietLog>, broken: Broken) -> PublishFailure {
    let (message, code) = match &broken {
        Broken::Native(error) if error.is_fatal => {
            return PublishFailure::Unknown(error.to_string());
        }
        Broken::Native(error) => (error.to_string(), Some(error.code)),
        Broken::Late(doing) => (format!("no answer in time: {doing}"), None),
    };
    let deadline = Instant::now() + INIT_TIMEOUT;
    loop {
        match producer.abort(remaining(deadline)) {
            Ok(()) => break,
            Err(error) if error.is_retriable && !error.is_fatal && Instant::now() < deadline => {}
            Err(error) => return PublishFailure::Unknown(format!("{message}; abort_transaction: {error}")),
        }
    }
    match (code, code.map_or(FailureClass::Passing, class_of_kafka)) {
        // Another producer has taken over: this one is of no more use, whatever the abort said.
        (Some(RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::Fenced), _) => {
            PublishFailure::Unknown(message)
        }
        (_, FailureClass::Fenced) => PublishFailure::Fenced(message),
        (_, class) => PublishFailure::Aborted { class, message },
    }
}
