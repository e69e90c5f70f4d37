//! The transactions of one transactional id: a batch's outputs and offsets, all of them or none.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientConfig, Offset as KafkaOffset, TopicPartitionList};

use super::librdkafka::{GroupMetadata, NativeError, QuietContext, TxnProducer, add_brokers, topic_setting};
use super::publisher::{INIT_TIMEOUT, PublishReply, PublisherSettings, transactional_id};
use super::throttle::{ProducerCallbacks, STATISTICS_INTERVAL};
use crate::config::KafkaSettings;
use crate::disposition::{FailureClass, class_of_kafka};
use crate::failpoint;
use crate::kafka_client::{make_client, producer_config_over};
use crate::lane::ports::{LogFailure, PublishFailure, PublishTimes};
use crate::logging::RateLimited;
use crate::metrics::{KafkaSteps, now, timed};
use crate::publication::{OutputCounts, Publication};

const METADATA_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for room in the producer's queue before looking around; also the least that a call is given.
const SLICE: Duration = Duration::from_millis(50);
/// Deliveries are waited for in slices of a growing length. The client's threads are woken only when a flush
/// begins, and a partition that the broker lets into the transaction after that waits for the next one: with
/// slices of 50 ms a transaction of a few messages took 80.
const FLUSH_SLICE_MIN: Duration = Duration::from_millis(1);
const FLUSH_SLICE_MAX: Duration = Duration::from_millis(10);

/// After so many aborted transactions in a row for a reason that should have passed, the producer is made anew.
const ABORTED_MAX: u32 = 5;

/// What `kafka.properties` may change of a lane's producer.
const PRODUCER_DEFAULTS: [(&str, &str); 10] = [
    STATISTICS_INTERVAL,
    ("transaction.timeout.ms", "15000"),
    ("linger.ms", "20"),
    ("batch.size", "900000"),
    ("batch.num.messages", "20000"),
    ("queue.buffering.max.messages", "200000"),
    ("queue.buffering.max.kbytes", "65536"),
    ("message.max.bytes", "4000000"),
    ("retry.backoff.ms", "5"),
    // Would begin at `retry.backoff.ms`.
    ("topic.metadata.refresh.fast.interval.ms", "20"),
];

/// Configuration of a lane's producer.
pub fn transactional_config(kafka: &KafkaSettings, lane: usize) -> ClientConfig {
    let mut config = producer_config_over(kafka, &PRODUCER_DEFAULTS);
    config
        .set("transactional.id", transactional_id(&kafka.group_id, &kafka.instance_id, lane))
        .set("delivery.report.only.error", "true");
    config
}

/// The thread's producer. Only the thread holds it for longer than the lock, so that no other has to wait until it
/// is destroyed.
#[derive(Clone, Default)]
pub struct Slot(Arc<Mutex<Option<Arc<TxnProducer<ProducerCallbacks>>>>>);

impl Slot {
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

    /// Names the brokers to the client once more, if there is one: it may have forgotten them all.
    pub fn remind(&self, bootstrap_servers: &str) {
        if let Some(producer) = &*self.lock() {
            tracing::debug!(target: "librdkafka", "a producer is told of its brokers once more");
            add_brokers(producer.inner().client(), bootstrap_servers);
        }
    }
}

/// Runs the transactions of one transactional id, one at a time. Calls block, each within its time limit.
pub struct Transactions {
    settings: PublisherSettings,
    slot: Slot,
    steps: KafkaSteps,
    /// Transactions that were aborted since the last one that was committed.
    aborted: u32,
}

impl Transactions {
    /// With a producer that is made when it is needed, in `slot`.
    pub fn new(settings: PublisherSettings, slot: Slot) -> Self {
        Self { settings, slot, steps: KafkaSteps::default(), aborted: 0 }
    }

    /// Takes up the transactional id: fences older producers of it and settles what they left open, after the
    /// output topics are known to exist.
    ///
    /// # Errors
    /// As the broker or the client says; the producer is made anew if it can be of no more use.
    pub fn init(&mut self) -> Result<(), LogFailure> {
        init(&mut self.settings, &self.slot)
    }

    /// Runs one transaction.
    ///
    /// # Errors
    /// What is known of the transaction: see [`PublishFailure`].
    pub fn publish(&mut self, publication: &Publication, group: &GroupMetadata) -> PublishReply {
        self.run(publication, Some(group))
    }

    /// Sends the outputs and commits them, without any offsets: for measurements.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn send_alone(&mut self, publication: &Publication) -> Result<(), PublishFailure> {
        self.run(publication, None).map(|_| ())
    }

    /// Takes what the client has to tell while there is nothing to publish: it keeps errors and statistics
    /// until they are taken, without a limit.
    pub fn rest(&self) {
        if let Some(producer) = self.slot.get() {
            producer.take_events();
        }
    }

    fn run(&mut self, publication: &Publication, group: Option<&GroupMetadata>) -> PublishReply {
        let Some(producer) = self.slot.get() else {
            return Err(PublishFailure::Unknown("the producer is not initialised".to_owned()));
        };
        let reply = publish(&producer, &self.settings, &self.steps, publication, group);
        self.aborted =
            if matches!(reply, Err(PublishFailure::Aborted { .. })) { self.aborted + 1 } else { 0 };
        let reply = match reply {
            // It may be the client that does not find its brokers any more: another one is tried.
            Err(PublishFailure::Aborted { class: FailureClass::Passing, message })
                if self.aborted >= ABORTED_MAX =>
            {
                Err(PublishFailure::Unknown(message))
            }
            reply => reply,
        };
        if matches!(reply, Err(PublishFailure::Unknown(_))) {
            drop(producer);
            self.slot.clear();
        }
        reply
    }
}

impl Drop for Transactions {
    fn drop(&mut self) {
        // Here, for whoever holds the slot as well would have to wait for it.
        self.slot.clear();
    }
}

fn create(settings: &PublisherSettings) -> Result<TxnProducer<ProducerCallbacks>, LogFailure> {
    let native =
        make_client::<BaseProducer<_>, _>(&settings.client, QuietContext(ProducerCallbacks::default()))
            .map_err(|e| LogFailure::passing(format!("creating the producer: {e}")))?;
    let names: Vec<&str> = settings.outputs.iter().map(String::as_str).collect();
    Ok(TxnProducer::new(native, &names))
}

fn init(settings: &mut PublisherSettings, slot: &Slot) -> Result<(), LogFailure> {
    if slot.lock().is_none() {
        *slot.lock() = Some(Arc::new(create(settings)?));
    }
    let Some(mut producer) = slot.get() else { return Ok(()) };
    if let Err(failure) = outputs_exist(settings, &producer) {
        // Or it is asked for ever, though it may be the client that knows no broker any more.
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
        LogFailure::Failed {
            class: class_of_kafka(error.code),
            message: format!("init_transactions: {error}"),
        }
    })
}

/// The largest record batch that every output topic takes, if it is smaller than the producer's.
fn smaller_batches(settings: &PublisherSettings, producer: &TxnProducer<ProducerCallbacks>) -> Option<usize> {
    let own: usize = settings.client.get("batch.size")?.parse().ok()?;
    let limit = |topic: &String| -> Option<usize> {
        let told = topic_setting(producer.inner().client(), topic, "max.message.bytes", METADATA_TIMEOUT);
        // Without the right to ask, a batch that is too large is refused, and the refusal says what to do.
        told.inspect_err(|error| tracing::debug!(topic, %error, "max.message.bytes is not told"))
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
) -> Result<(), LogFailure> {
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

/// Says of whom another producer took the transactional id over, if that is what the error says.
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
            "this lane's producer was fenced: another one took up its transactional id, or the broker ended a transaction \
             that took too long. The lane takes the id up again; if that goes on, two processes have the same \
             kafka.group_id and kafka.instance_id"
        );
    }
}

/// What went wrong inside a transaction that is still open.
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
        return Err(PublishFailure::Unknown(format!("begin_transaction: {error}")));
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
    // The offsets first: until the broker has ended the transaction before this one, it answers "try again", and the
    // client asks again after `retry.backoff.ms`, which doubles; of the outputs' partitions it would do so after 20 ms.
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
    // One time for all, or the client would ask the clock for each message.
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
) -> Result<(), PublishFailure> {
    loop {
        match producer.commit(remaining(deadline)) {
            Ok(()) => return Ok(()),
            Err(error) if error.requires_abort => {
                return Err(abort(producer, settings, Broken::Native(error)));
            }
            Err(error) if error.is_retriable && !error.is_fatal && Instant::now() < deadline => {}
            Err(error) => {
                tell_of_fencing(settings, &error);
                return Err(PublishFailure::Unknown(format!("commit_transaction: {error}")));
            }
        }
    }
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(SLICE)
}

/// The error, with what is to be done about it where a setting outside the daemon is at fault.
fn explained(error: &NativeError, settings: &PublisherSettings) -> String {
    let [read, email, dead_letters] = &settings.outputs;
    match error.code {
        RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::MessageBatchTooLarge => format!(
            "{error}: an output is larger than its topic takes; raise max.message.bytes of {read} and {email} to 64 KiB, \
             of {dead_letters} to 1 MiB at least"
        ),
        _ => error.to_string(),
    }
}

/// Aborts the open transaction; only when that succeeded is it certain that nothing is visible.
fn abort(
    producer: &TxnProducer<ProducerCallbacks>,
    settings: &PublisherSettings,
    broken: Broken,
) -> PublishFailure {
    if let Broken::Native(error) = &broken {
        tell_of_fencing(settings, error);
    }
    let (message, code) = match &broken {
        Broken::Native(error) if error.is_fatal => {
            return PublishFailure::Unknown(error.to_string());
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
                return PublishFailure::Unknown(format!("{message}; abort_transaction: {error}"));
            }
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
