//! The Kafka transactions of one lane's producer: a batch's outputs and the group's offsets, all or none.
//!
//! The order within a transaction is: begin, `send_offsets_to_transaction` with the member's generation,
//! produce, wait for the acknowledgements, commit. Each transaction has a time limit. A failure before the
//! commit aborts it; if even the abort or the commit fails, the producer is replaced.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};

use super::callbacks::Callbacks;
use super::librdkafka::{
    GroupMetadata, NativeError, ProducerClient, TxnProducer, add_brokers, topic_setting,
};
use super::offsets::{failed, native_failed, transient};
use super::publisher_settings::PublisherSettings;
use super::throttle::Throttle;
use crate::domain::outcome::{FailureClass, class_of_kafka};
use crate::domain::publication::{Committed, OutputCounts, Publication};
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
pub type PublishReply = Result<(Committed, OutputCounts, PublishTimes), PublishError>;

type Producer = TxnProducer<Callbacks<Throttle>>;

/// The publisher thread's producer. Only that thread keeps a reference after the lock is released, so no
/// other thread destroys the producer, which blocks.
#[derive(Clone, Default)]
pub struct ProducerSlot(Arc<Mutex<Option<Arc<Producer>>>>);

impl ProducerSlot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Producer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self) -> Option<Arc<Producer>> {
        self.lock().clone()
    }

    fn clear(&self) {
        // Destroyed after the lock is released.
        let producer = self.lock().take();
        drop(producer);
    }

    /// Bootstraps the client again, if there is one.
    pub fn rebootstrap(&self, bootstrap_servers: &str) {
        if let Some(producer) = &*self.lock() {
            tracing::debug!(target: "librdkafka", "bootstrapping a producer again");
            add_brokers(producer.client(), bootstrap_servers);
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
        let producer = match self.slot.get() {
            Some(producer) => producer,
            None => self.create()?,
        };
        // If this fails, the client may have lost its brokers: the next try creates another one.
        self.outputs_exist(&producer).inspect_err(|_| self.slot.clear())?;
        let producer = match self.smaller_batches(&producer) {
            Some(smaller) => {
                self.settings.client.set("batch.size", smaller.to_string());
                drop(producer);
                self.slot.clear();
                self.create()?
            }
            None => producer,
        };
        producer.init(INIT_TIMEOUT).map_err(|error| {
            warn_if_fenced(&self.settings, &error);
            if !error.is_retriable {
                self.slot.clear();
            }
            native_failed("init_transactions", &error)
        })
    }

    fn create(&self) -> Result<Arc<Producer>, KafkaPortError> {
        let native =
            make_client::<ProducerClient<_>, _>(&self.settings.client, Callbacks(Throttle::of("producer")))
                .map_err(|e| transient("creating the producer", e))?;
        let producer = Arc::new(TxnProducer::new(native, &self.settings.outputs()));
        *self.slot.lock() = Some(Arc::clone(&producer));
        Ok(producer)
    }

    fn published_outputs(&self) -> impl Iterator<Item = &str> {
        self.settings.outputs().into_iter().filter(|_| self.settings.kafka.publish)
    }

    /// A message produced before its topic's metadata is known can abort the transaction.
    fn outputs_exist(&self, producer: &Producer) -> Result<(), KafkaPortError> {
        for topic in self.published_outputs() {
            let is_usable = is_usable(producer, topic);
            if !is_usable.map_err(|e| failed(&format!("asking for output topic {topic}"), &e))? {
                return Err(KafkaPortError::Failed {
                    class: FailureClass::Persistent,
                    message: missing_output(topic),
                });
            }
        }
        Ok(())
    }

    /// The smallest `max.message.bytes` of the output topics, if it is below the producer's `batch.size`.
    fn smaller_batches(&self, producer: &Producer) -> Option<usize> {
        let own: usize = self.settings.client.get("batch.size")?.parse().ok()?;
        let limit = |topic: &str| -> Option<usize> {
            topic_setting(producer.client(), topic, "max.message.bytes", METADATA_TIMEOUT)
                // Without the right to read it, the broker refuses a batch that is too large, and the error
                // says what to do.
                .inspect_err(|error| tracing::debug!(topic, %error, "reading max.message.bytes failed"))
                .ok()?
                .parse()
                .ok()
        };
        self.published_outputs().filter_map(limit).min().filter(|smallest| *smallest < own)
    }

    /// Runs one transaction; without a group, as in benchmarks, it carries no offsets.
    ///
    /// # Errors
    /// The state of the transaction, see [`PublishError`].
    pub fn publish(&mut self, publication: &Publication, group: Option<&GroupMetadata>) -> PublishReply {
        let Some(producer) = self.slot.get() else {
            return Err(PublishError::ReplaceProducer("the producer is not initialised".to_owned()));
        };
        let deadline = Instant::now() + self.settings.deadline;
        let Self { settings, steps, .. } = self;
        let reply = Transaction { producer: &producer, settings, steps, deadline }.run(publication, group);
        self.aborted = if matches!(reply, Err(PublishError::Aborted { .. })) { self.aborted + 1 } else { 0 };
        let reply = match reply {
            // The client may have lost its brokers: it is replaced.
            Err(PublishError::Aborted { class: FailureClass::Transient, message })
                if self.aborted >= ABORTED_MAX =>
            {
                Err(PublishError::ReplaceProducer(message))
            }
            reply => reply,
        };
        if matches!(reply, Err(PublishError::ReplaceProducer(_))) {
            drop(producer);
            self.slot.clear();
        }
        reply
    }

    /// Polls errors and statistics while there is nothing to publish; the client keeps them without a limit
    /// otherwise.
    pub fn rest(&self) {
        if let Some(producer) = self.slot.get() {
            producer.take_events();
        }
    }
}

impl Drop for Transactions {
    fn drop(&mut self) {
        // Destroys the producer on this thread; another holder of the slot would block.
        self.slot.clear();
    }
}

/// Whether an output topic is there, by the metadata of the brokers.
fn is_usable(producer: &Producer, topic: &str) -> Result<bool, KafkaError> {
    let metadata = producer.client().fetch_metadata(Some(topic), METADATA_TIMEOUT)?;
    Ok(metadata.topics().iter().all(|t| t.error().is_none() && !t.partitions().is_empty()))
}

/// Logs that another producer, or the broker, fenced this one, if that is the error.
fn warn_if_fenced(settings: &PublisherSettings, error: &NativeError) {
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
            "this lane's producer was fenced: the broker aborted a transaction that took too long, as while the \
             database or a broker was slow; the lane initialises its producer again. Only if this repeats while \
             nothing is slow do two processes have the same kafka.group_id and kafka.instance_id"
        );
    }
}

/// Why an open transaction has to be aborted.
enum AbortCause {
    Native(NativeError),
    /// The time limit passed during this step.
    TimedOut(&'static str),
    /// A position is not a valid offset.
    Offset(KafkaError),
}

/// One transaction.
struct Transaction<'t> {
    producer: &'t Producer,
    settings: &'t PublisherSettings,
    steps: &'t KafkaSteps,
    deadline: Instant,
}

impl Transaction<'_> {
    fn run(&self, publication: &Publication, group: Option<&GroupMetadata>) -> PublishReply {
        failpoint::hit("before_kafka_begin");
        self.producer.begin().map_err(|error| self.replace_producer("begin_transaction", &error))?;
        let mut times = PublishTimes::default();
        let counts = self.fill(&mut times, publication, group).map_err(|cause| self.abort(cause))?;
        failpoint::hit("before_kafka_commit");
        timed(&self.steps.commit, &mut times.commit, || self.commit())?;
        failpoint::hit("after_kafka_commit");
        Ok((publication.committed(), counts, times))
    }

    fn fill(
        &self,
        times: &mut PublishTimes,
        publication: &Publication,
        group: Option<&GroupMetadata>,
    ) -> Result<OutputCounts, AbortCause> {
        // Offsets are sent first. Until the broker has completed the previous transaction it refuses requests
        // of the next one. The client repeats the request for offsets after `retry.backoff.ms`, which
        // doubles; it would repeat the one for output partitions only after 20 ms.
        if let Some(group) = group {
            timed(&self.steps.offsets, &mut times.offsets, || self.send_offsets(publication, group))?;
        }
        failpoint::hit("after_send_offsets");
        let counts = timed(&self.steps.produce, &mut times.produce, || self.produce(publication))?;
        failpoint::hit("after_produce");
        timed(&self.steps.deliver, &mut times.deliver, || self.deliver())?;
        Ok(counts)
    }

    fn produce(&self, publication: &Publication) -> Result<OutputCounts, AbortCause> {
        // One timestamp for all outputs, so that the client does not read the clock for each message.
        let now = now();
        let PublisherSettings { kafka, identity, .. } = self.settings;
        publication.for_each_output(&kafka.input_topic, identity.topic_id, |output| {
            let topic = output.topic.index();
            loop {
                let headers = output.headers.iter().copied();
                match self.producer.produce_at(topic, now, output.key, output.value, headers) {
                    Err(error) if error.code == RDKafkaErrorCode::QueueFull => {
                        self.in_time("producing")?;
                        self.producer.flush(SLICE);
                    }
                    other => return other.map_err(AbortCause::Native),
                }
            }
        })
    }

    fn send_offsets(&self, publication: &Publication, group: &GroupMetadata) -> Result<(), AbortCause> {
        let mut offsets = TopicPartitionList::with_capacity(publication.commits().len());
        for (partition, position, mark) in publication.offsets(&self.settings.identity) {
            let mut element = offsets.add_partition(&self.settings.kafka.input_topic, partition.0);
            element.set_metadata(mark);
            element.set_offset(KafkaOffset::Offset(position.0)).map_err(AbortCause::Offset)?;
        }
        // Repeating the call with the same arguments continues one that timed out.
        while let Err(error) = self.producer.send_offsets(&offsets, group, self.remaining()) {
            if !error.is_retriable || error.is_fatal || error.requires_abort {
                return Err(AbortCause::Native(error));
            }
            self.in_time("send_offsets_to_transaction")?;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits until all outputs are acknowledged. `commit_transaction` would wait in steps of 100 ms.
    fn deliver(&self) -> Result<(), AbortCause> {
        let mut slice = FLUSH_SLICE_MIN;
        while !self.producer.flush(slice) {
            self.in_time("waiting for deliveries")?;
            slice = (slice * 2).min(FLUSH_SLICE_MAX);
        }
        Ok(())
    }

    fn commit(&self) -> Result<(), PublishError> {
        loop {
            match self.producer.commit(self.remaining()) {
                Ok(()) => return Ok(()),
                Err(error) if error.requires_abort => return Err(self.abort(AbortCause::Native(error))),
                Err(error) if may_continue(&error, self.deadline) => {}
                Err(error) => return Err(self.replace_producer("commit_transaction", &error)),
            }
        }
    }

    /// Aborts the open transaction. Only a successful abort guarantees that nothing is visible.
    fn abort(&self, cause: AbortCause) -> PublishError {
        let (message, code) = match &cause {
            AbortCause::Native(error) => {
                warn_if_fenced(self.settings, error);
                if error.is_fatal {
                    return PublishError::ReplaceProducer(error.to_string());
                }
                (self.explained(error), Some(error.code))
            }
            AbortCause::TimedOut(step) => (format!("no answer in time: {step}"), None),
            AbortCause::Offset(error) => (format!("an offset cannot be represented: {error}"), None),
        };
        let deadline = Instant::now() + INIT_TIMEOUT;
        loop {
            match self.producer.abort(remaining(deadline)) {
                Ok(()) => break,
                Err(error) if may_continue(&error, deadline) => {}
                Err(error) => return self.replace_producer(&format!("{message}; abort_transaction"), &error),
            }
        }
        match (code, code.map_or(FailureClass::Transient, class_of_kafka)) {
            // Another producer has the transactional id: this one is useless, even if the abort succeeded.
            (Some(RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::Fenced), _) => {
                PublishError::ReplaceProducer(message)
            }
            (_, FailureClass::Fenced) => PublishError::StaleGeneration(message),
            (_, class) => PublishError::Aborted { class, message },
        }
    }

    fn replace_producer(&self, doing: &str, error: &NativeError) -> PublishError {
        warn_if_fenced(self.settings, error);
        PublishError::ReplaceProducer(format!("{doing}: {error}"))
    }

    fn in_time(&self, step: &'static str) -> Result<(), AbortCause> {
        if Instant::now() > self.deadline { Err(AbortCause::TimedOut(step)) } else { Ok(()) }
    }

    fn remaining(&self) -> Duration {
        remaining(self.deadline)
    }

    /// The error's text, with a remedy if a setting outside the daemon is the cause.
    fn explained(&self, error: &NativeError) -> String {
        let [read, email, dead_letters] = self.settings.outputs();
        match error.code {
            RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::MessageBatchTooLarge => {
                format!("{error}: {}", too_large(read, email, dead_letters))
            }
            RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownPartition => {
                let outputs = [read, email, dead_letters];
                match outputs.iter().find(|topic| is_usable(self.producer, topic).is_ok_and(|is| !is)) {
                    Some(topic) => format!("{error}: {}", missing_output(topic)),
                    None => format!("{error}: one of the output topics {} was missing", outputs.join(", ")),
                }
            }
            _ => error.to_string(),
        }
    }
}

/// What is said about an output topic whose id has changed.
pub fn recreated_output(topic: &str) -> String {
    format!(
        "output topic {topic} was deleted and created again: the events that it had are gone and are not sent again, so \
         its readers have to take them from the payment tables; `payment-writer doctor` checks its settings"
    )
}

/// What is said about an output topic that cannot be used.
pub fn missing_output(topic: &str) -> String {
    format!("output topic {topic} is missing or unusable; `payment-writer topics create` creates it")
}

/// `max.message.bytes` that every event fits into.
pub const EVENT_BYTES: usize = 64 << 10;
/// `max.message.bytes` that every dead letter fits into.
pub const DEAD_LETTER_BYTES: usize = 1 << 20;

/// What is said about an output that its topic does not take.
pub fn too_large(read: &str, email: &str, dead_letters: &str) -> String {
    format!(
        "an output is larger than its topic permits; raise max.message.bytes of {read} and {email} to at least \
         {} KiB, of {dead_letters} to at least {} MiB",
        EVENT_BYTES >> 10,
        DEAD_LETTER_BYTES >> 20
    )
}

/// Whether the same call continues what failed.
fn may_continue(error: &NativeError, deadline: Instant) -> bool {
    error.is_retriable && !error.is_fatal && Instant::now() < deadline
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(SLICE)
}
