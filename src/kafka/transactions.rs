//! The Kafka transactions of one lane's producer: a batch's outputs and the group's offsets, all or none.
//!
//! The order within a transaction is: begin, `send_offsets_to_transaction` with the member's generation,
//! produce, wait for the acknowledgements, commit. Each transaction has a time limit. A failure before the
//! commit aborts it; if even the abort or the commit fails, the outcome is unknown and the producer is
//! replaced.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use super::librdkafka::{GroupMetadata, NativeError, QuietContext, TxnProducer, add_brokers, topic_setting};
use super::publisher_settings::PublisherSettings;
use super::throttle::ProducerCallbacks;
use crate::domain::outcome::{FailureClass, class_of_kafka};
use crate::domain::publication::{OutputCounts, Publication, Published};
use crate::failpoint;
use crate::kafka::client::make_client;
use crate::ports::{KafkaPortError, PublishError, PublishTimes};
use crate::telemetry::logging::RateLimited;
use crate::telemetry::metrics::{KafkaSteps, now, timed};

/// Timeout of `init_transactions` and `abort_transaction`.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for room in the producer's queue at a time; also the shortest timeout of a call.
const SLICE: Duration = Duration::from_millis(50);
/// Deliveries are waited for in slices of growing length. A flush wakes the client's threads only when it
/// begins, and a partition that the broker adds to the transaction later waits for the next flush: with
/// slices of 50 ms a transaction of a few messages took 80 ms.
const FLUSH_SLICE_MIN: Duration = Duration::from_millis(1);
const FLUSH_SLICE_MAX: Duration = Duration::from_millis(10);

/// The producer is replaced after this many aborts in a row with a transient cause.
const ABORTED_MAX: u32 = 5;

/// The outcome of a transaction.
pub type PublishReply = Result<(Published, OutputCounts, PublishTimes), PublishError>;

/// The publisher thread's producer. Only that thread keeps a reference after the lock is released, so no
/// other thread destroys the producer, which blocks.
#[derive(Clone, Default)]
pub struct ProducerSlot(Arc<Mutex<Option<Arc<TxnProducer<ProducerCallbacks>>>>>);

impl ProducerSlot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<TxnProducer<ProducerCallbacks>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self) -> Option<Arc<TxnProducer<ProducerCallbacks>>> {
        self.lock().clone()
    }

    fn clear(&self) {
        // Destroyed after the lock is released.
        let producer = self.lock().take();
        drop(producer);
    }

    /// Bootstraps the client again, if there is one.
    pub fn remind(&self, bootstrap_servers: &str) {
        if let Some(producer) = &*self.lock() {
            tracing::debug!(target: "librdkafka", "bootstrapping a producer again");
            add_brokers(producer.inner().client(), bootstrap_servers);
        }
    }
}

/// Runs the transactions of one `transactional.id`, one at a time. Calls block, each within a time limit.
pub struct Transactions {
    settings: PublisherSettings,
    slot: ProducerSlot,
    steps: KafkaSteps,
    /// Aborted transactions in a row.
    aborted: u32,
}

impl Transactions {
    /// The producer is created by [`init`](Self::init), in `slot`.
    pub fn new(settings: PublisherSettings, slot: ProducerSlot) -> Self {
        Self { settings, slot, steps: KafkaSteps::default(), aborted: 0 }
    }

    /// Runs `init_transactions`, which fences older producers of the id and ends transactions that they left
    /// open; first checks that the output topics exist.
    ///
    /// # Errors
    /// An error of the broker or the client; the next call creates a new producer if this one cannot be used
    /// any more.
    pub fn init(&mut self) -> Result<(), KafkaPortError> {
        init(&mut self.settings, &self.slot)
    }

    /// Runs one transaction.
    ///
    /// # Errors
    /// The state of the transaction, see [`PublishError`].
    pub fn publish(&mut self, publication: &Publication, group: &GroupMetadata) -> PublishReply {
        self.run(publication, Some(group))
    }

    /// Runs a transaction without offsets, for benchmarks.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn send_alone(&mut self, publication: &Publication) -> Result<(), PublishError> {
        self.run(publication, None).map(|_| ())
    }

    /// Polls errors and statistics while there is nothing to publish; the client keeps them without a limit
    /// otherwise.
    pub fn rest(&self) {
        if let Some(producer) = self.slot.get() {
            producer.take_events();
        }
    }

    fn run(&mut self, publication: &Publication, group: Option<&GroupMetadata>) -> PublishReply {
        let Some(producer) = self.slot.get() else {
            return Err(PublishError::Unknown("the producer is not initialised".to_owned()));
        };
        let reply = publish(&producer, &self.settings, &self.steps, publication, group);
        self.aborted = if matches!(reply, Err(PublishError::Aborted { .. })) { self.aborted + 1 } else { 0 };
        let reply = match reply {
            // The client may have lost its brokers: it is replaced.
            Err(PublishError::Aborted { class: FailureClass::Transient, message })
                if self.aborted >= ABORTED_MAX =>
            {
                Err(PublishError::Unknown(message))
            }
            reply => reply,
        };
        if matches!(reply, Err(PublishError::Unknown(_))) {
            drop(producer);
            self.slot.clear();
        }
        reply
    }
}

impl Drop for Transactions {
    fn drop(&mut self) {
        // Destroys the producer on this thread; another holder of the slot would block.
        self.slot.clear();
    }
}

fn create(settings: &PublisherSettings) -> Result<TxnProducer<ProducerCallbacks>, KafkaPortError> {
    let native =
        make_client::<BaseProducer<_>, _>(&settings.client, QuietContext(ProducerCallbacks::default()))
            .map_err(|e| KafkaPortError::transient(format!("creating the producer: {e}")))?;
    let names: Vec<&str> = settings.outputs.iter().map(String::as_str).collect();
    Ok(TxnProducer::new(native, &names))
}

fn init(settings: &mut PublisherSettings, slot: &ProducerSlot) -> Result<(), KafkaPortError> {
    if slot.lock().is_none() {
        *slot.lock() = Some(Arc::new(create(settings)?));
    }
    let Some(mut producer) = slot.get() else { return Ok(()) };
    if let Err(failure) = outputs_exist(settings, &producer) {
        // The client may have lost its brokers: the next try creates another one.
        slot.clear();
        return Err(failure);
    }
    if let Some(smaller) = smaller_batches(settings, &producer) {
        settings.client.set("batch.size", smaller.to_string());
        slot.clear();
        producer = Arc::new(create(settings)?);
        *slot.lock() = Some(Arc::clone(&producer));
    }
    producer.init(INIT_TIMEOUT).map_err(|error| {
        tell_of_fencing(settings, &error);
        if !error.is_retriable {
            slot.clear();
        }
        KafkaPortError::Failed {
            class: class_of_kafka(error.code),
            message: format!("init_transactions: {error}"),
        }
    })
}

/// The smallest `max.message.bytes` of the output topics, if it is below the producer's `batch.size`.
fn smaller_batches(settings: &PublisherSettings, producer: &TxnProducer<ProducerCallbacks>) -> Option<usize> {
    let own: usize = settings.client.get("batch.size")?.parse().ok()?;
    let limit = |topic: &String| -> Option<usize> {
        let told = topic_setting(producer.inner().client(), topic, "max.message.bytes", METADATA_TIMEOUT);
        // Without the right to read it, the broker refuses a batch that is too large, and the error says what
        // to do.
        told.inspect_err(|error| tracing::debug!(topic, %error, "reading max.message.bytes failed"))
            .ok()?
            .parse()
            .ok()
    };
    let smallest = settings.outputs.iter().filter(|_| settings.publishes).filter_map(limit).min()?;
    (smallest < own).then_some(smallest)
}

/// A message produced before its topic's metadata is known can abort the transaction.
fn outputs_exist(
    settings: &PublisherSettings,
    producer: &TxnProducer<ProducerCallbacks>,
) -> Result<(), KafkaPortError> {
    for topic in settings.outputs.iter().filter(|_| settings.publishes) {
        let metadata =
            producer.inner().client().fetch_metadata(Some(topic), METADATA_TIMEOUT).map_err(|e| {
                KafkaPortError::Failed {
                    class: e.rdkafka_error_code().map_or(FailureClass::Transient, class_of_kafka),
                    message: format!("asking for output topic {topic}: {e}"),
                }
            })?;
        if metadata.topics().iter().any(|t| t.error().is_some() || t.partitions().is_empty()) {
            return Err(KafkaPortError::Failed {
                class: FailureClass::Persistent,
                message: format!(
                    "output topic {topic} is missing or unusable; `payment-writer topics create` creates it"
                ),
            });
        }
    }
    Ok(())
}

/// Logs that the producer was fenced, if that is the error.
fn tell_of_fencing(settings: &PublisherSettings, error: &NativeError) {
    static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
    let is_fenced = matches!(
        error.code,
        RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::Fenced | RDKafkaErrorCode::InvalidProducerEpoch
    );
    if let Some(suppressed) = is_fenced.then(|| LIMIT.pass()).flatten() {
        tracing::warn!(
            transactional_id = settings.client.get("transactional.id"),
            %error,
            suppressed,
            "this lane's producer was fenced: another producer has its transactional id, or the broker \
             aborted a transaction that took too long. The lane initialises its producer again; if this \
             repeats, two processes have the same kafka.group_id and kafka.instance_id"
        );
    }
}

/// Why an open transaction has to be aborted.
enum Broken {
    Native(NativeError),
    Late(&'static str),
}

fn publish(
    producer: &TxnProducer<ProducerCallbacks>,
    settings: &PublisherSettings,
    steps: &KafkaSteps,
    publication: &Publication,
    group: Option<&GroupMetadata>,
) -> PublishReply {
    let deadline = Instant::now() + settings.deadline;
    failpoint::hit("before_kafka_begin");
    if let Err(error) = producer.begin() {
        tell_of_fencing(settings, &error);
        return Err(PublishError::Unknown(format!("begin_transaction: {error}")));
    }
    let mut times = PublishTimes::default();
    match fill(producer, settings, steps, &mut times, publication, group, deadline) {
        Ok(counts) => {
            failpoint::hit("before_kafka_commit");
            timed(&steps.commit, &mut times.commit, || commit(producer, settings, deadline))?;
            failpoint::hit("after_kafka_commit");
            Ok((publication.committed(), counts, times))
        }
        Err(broken) => Err(abort(producer, settings, broken)),
    }
}

fn fill(
    producer: &TxnProducer<ProducerCallbacks>,
    settings: &PublisherSettings,
    steps: &KafkaSteps,
    times: &mut PublishTimes,
    publication: &Publication,
    group: Option<&GroupMetadata>,
    deadline: Instant,
) -> Result<OutputCounts, Broken> {
    // Offsets are sent first. Until the broker has completed the previous transaction it refuses requests of
    // the next one. The client repeats the request for offsets after `retry.backoff.ms`, which doubles; it
    // would repeat the one for output partitions only after 20 ms.
    if let Some(group) = group {
        timed(&steps.offsets, &mut times.offsets, || {
            send_offsets(producer, settings, publication, group, deadline)
        })?;
    }
    failpoint::hit("after_send_offsets");
    let counts =
        timed(&steps.produce, &mut times.produce, || produce(producer, settings, publication, deadline))?;
    failpoint::hit("after_produce");
    timed(&steps.deliver, &mut times.deliver, || deliver(producer, deadline))?;
    Ok(counts)
}

fn produce(
    producer: &TxnProducer<ProducerCallbacks>,
    settings: &PublisherSettings,
    publication: &Publication,
    deadline: Instant,
) -> Result<OutputCounts, Broken> {
    // One timestamp for all outputs, so that the client does not read the clock for each message.
    let now = now();
    publication.for_each_output(&settings.input_topic, settings.identity.topic_id, |output| {
        loop {
            let produced = producer.produce_at(
                output.topic.index(),
                now,
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
    producer: &TxnProducer<ProducerCallbacks>,
    settings: &PublisherSettings,
    publication: &Publication,
    group: &GroupMetadata,
    deadline: Instant,
) -> Result<(), Broken> {
    let mut offsets = TopicPartitionList::with_capacity(publication.commits().len());
    for (partition, position, mark) in publication.offsets(&settings.identity) {
        let mut element = offsets.add_partition(&settings.input_topic, partition.0);
        element.set_metadata(mark);
        if element.set_offset(KafkaOffset::Offset(position.0)).is_err() {
            return Err(Broken::Late("an offset that cannot be represented"));
        }
    }
    // Repeating the call with the same arguments continues one that timed out.
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

/// Waits until all outputs are acknowledged. `commit_transaction` would wait in steps of 100 ms.
fn deliver(producer: &TxnProducer<ProducerCallbacks>, deadline: Instant) -> Result<(), Broken> {
    let mut slice = FLUSH_SLICE_MIN;
    while !producer.flush(slice) {
        if Instant::now() > deadline {
            return Err(Broken::Late("waiting for deliveries"));
        }
        slice = (slice * 2).min(FLUSH_SLICE_MAX);
    }
    Ok(())
}

fn commit(
    producer: &TxnProducer<ProducerCallbacks>,
    settings: &PublisherSettings,
    deadline: Instant,
) -> Result<(), PublishError> {
    loop {
        match producer.commit(remaining(deadline)) {
            Ok(()) => return Ok(()),
            Err(error) if error.requires_abort => {
                return Err(abort(producer, settings, Broken::Native(error)));
            }
            Err(error) if error.is_retriable && !error.is_fatal && Instant::now() < deadline => {}
            Err(error) => {
                tell_of_fencing(settings, &error);
                return Err(PublishError::Unknown(format!("commit_transaction: {error}")));
            }
        }
    }
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(SLICE)
}

/// The error's text, with a remedy if a setting outside the daemon is the cause.
fn explained(error: &NativeError, settings: &PublisherSettings) -> String {
    let [read, email, dead_letters] = &settings.outputs;
    match error.code {
        RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::MessageBatchTooLarge => format!(
            "{error}: an output is larger than its topic permits; raise max.message.bytes of {read} and \
             {email} to at least 64 KiB, of {dead_letters} to at least 1 MiB"
        ),
        _ => error.to_string(),
    }
}

/// Aborts the open transaction. Only a successful abort guarantees that nothing is visible.
fn abort(
    producer: &TxnProducer<ProducerCallbacks>,
    settings: &PublisherSettings,
    broken: Broken,
) -> PublishError {
    if let Broken::Native(error) = &broken {
        tell_of_fencing(settings, error);
    }
    let (message, code) = match &broken {
        Broken::Native(error) if error.is_fatal => {
            return PublishError::Unknown(error.to_string());
        }
        Broken::Native(error) => (explained(error, settings), Some(error.code)),
        Broken::Late(doing) => (format!("no answer in time: {doing}"), None),
    };
    let deadline = Instant::now() + INIT_TIMEOUT;
    loop {
        match producer.abort(remaining(deadline)) {
            Ok(()) => break,
            Err(error) if error.is_retriable && !error.is_fatal && Instant::now() < deadline => {}
            Err(error) => {
                tell_of_fencing(settings, &error);
                return PublishError::Unknown(format!("{message}; abort_transaction: {error}"));
            }
        }
    }
    match (code, code.map_or(FailureClass::Transient, class_of_kafka)) {
        // Another producer has the transactional id: this one is useless, even if the abort succeeded.
        (Some(RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::Fenced), _) => {
            PublishError::Unknown(message)
        }
        (_, FailureClass::Fenced) => PublishError::Fenced(message),
        (_, class) => PublishError::Aborted { class, message },
    }
}
