//! The [`KafkaPort`] of a lane: its reader, its transactional producer, and requests in the background.
//!
//! [`LaneClient::publish`] has the checks that fence a lane after a revocation: it refuses while the member
//! has no valid generation or a revocation is unhandled; the broker refuses an outdated generation.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use super::client::{ATTEMPT_TIMEOUT, creating};
use super::fetcher::{Fetcher, reader_config};
use super::gaps;
use super::group::{Group, LaneHandle};
use super::librdkafka::fetch::FetchItem;
use super::librdkafka::{GroupMetadata, NativeError, topic_id};
use super::offsets::{failed, group_offsets, log_bounds, native_failed, transient};
use super::output_scan;
use super::publisher::Publisher;
use super::publisher_settings::PublisherSettings;
use super::scan::ScanError;
use super::throttle::STATISTICS_INTERVAL;
use super::transactions::Transactions;
use crate::config::KafkaSettings;
use crate::domain::cursor::IdentityMismatch;
use crate::domain::publication::{Committed, OutputCounts, Publication};
use crate::domain::record::{NextOffset, Partition};
use crate::failpoint;
use crate::ports::fetch_buffer::{FetchBuffer, FetchFault};
use crate::ports::{
    Gap, GapAnswer, KafkaPort, KafkaPortError, LaneEvent, Positions, PublishError, PublishTimes, Question,
    ScannedOutputs,
};

/// Longest wait for records in one call; bounds the cost of a missed wake-up.
const FETCH_TICK: Duration = Duration::from_millis(100);
/// Starting or stopping a partition takes microseconds; a client that takes this long hangs.
const START_MAX: Duration = Duration::from_secs(10);
/// An output scan ends within half of it, unless its client hangs.
const SCAN_HANGS: Duration = Duration::from_secs(600);
/// Defaults of a lane's reader that `kafka.properties` may override.
const FETCH_DEFAULTS: [(&str, &str); 9] = [
    STATISTICS_INTERVAL,
    // At low rates a fetch with one record costs the broker as much as one with twenty, so it waits for more,
    // but not for long.
    ("fetch.min.bytes", "65536"),
    ("fetch.wait.max.ms", "10"),
    ("fetch.queue.backoff.ms", "20"),
    // Bounds the memory of prefetched records in a backlog: the queue, plus one fetch on top of it.
    ("queued.min.messages", "20000"),
    ("queued.max.messages.kbytes", "2048"),
    ("fetch.max.bytes", "2097152"),
    ("fetch.message.max.bytes", "1048576"),
    ("topic.metadata.refresh.interval.ms", "60000"),
];

/// Configuration of a lane's reader.
pub fn lane_reader_config(kafka: &KafkaSettings) -> rdkafka::ClientConfig {
    reader_config(kafka, &FETCH_DEFAULTS)
}

type Scanned = Result<Vec<ScannedOutputs>, ScanError>;

/// The lane's transactional producer.
#[derive(Default)]
enum Producer {
    /// There is none, or the outcome of its transaction is unknown: it is replaced.
    #[default]
    Absent,
    /// `init_transactions` failed and may be repeated.
    Starting(Publisher),
    /// No transaction is open.
    Ready(Publisher),
}

/// The Kafka clients of one lane.
pub struct LaneClient {
    group: Group,
    /// Created when partitions are started; replaced when it fails or hangs.
    fetcher: Option<Arc<Fetcher>>,
    settings: PublisherSettings,
    producer: Producer,
    unhandled_revocations: Arc<AtomicI64>,
    /// The lane's own event channel, for answers. Weak, so that the channel closes when the group drops its
    /// sender.
    events: mpsc::WeakSender<LaneEvent>,
    /// Notified when fetching failed, so that the topic id is checked at once.
    suspicion: Arc<Notify>,
    /// The running output scan, and since when it runs.
    output_scan: Option<(JoinHandle<Scanned>, Instant)>,
}

impl LaneClient {
    /// Creates the clients' owner for the lane with this handle; no client is created yet.
    pub fn new(group: Group, settings: PublisherSettings, lane: &LaneHandle, suspicion: Arc<Notify>) -> Self {
        Self {
            group,
            fetcher: None,
            settings,
            producer: Producer::Absent,
            unhandled_revocations: Arc::clone(&lane.unhandled_revocations),
            events: lane.events.downgrade(),
            suspicion,
            output_scan: None,
        }
    }

    /// Runs a blocking call of the reader within [`START_MAX`]. A reader that fails is abandoned.
    async fn with_fetcher(
        &mut self,
        doing: &str,
        work: impl FnOnce(&Fetcher) -> Result<(), NativeError> + Send + 'static,
    ) -> Result<(), KafkaPortError> {
        let fetcher = match &self.fetcher {
            Some(fetcher) => Arc::clone(fetcher),
            None => {
                let (kafka, topic) = (Arc::clone(&self.settings.kafka), self.group.topic().to_owned());
                let create = move || Fetcher::new(&lane_reader_config(&kafka), &topic);
                let created = creating(START_MAX, create).await.map_err(|e| transient(doing, e))?;
                let made = created.map_err(|e| failed(doing, &e))?;
                Arc::clone(self.fetcher.insert(Arc::new(made)))
            }
        };
        let called = tokio::task::spawn_blocking(move || work(&fetcher));
        let failure = match tokio::time::timeout(START_MAX, called).await {
            Ok(Ok(Ok(()))) => return Ok(()),
            Ok(Ok(Err(error))) => transient(doing, error),
            Ok(Err(error)) => transient(doing, error),
            Err(_) => transient(doing, "the client hangs and was abandoned"),
        };
        self.abandon_fetcher();
        Err(failure)
    }

    /// Runs blocking work in the background and sends its answer to the lane.
    fn answer(
        &self,
        work: impl FnOnce() -> LaneEvent + Send + 'static,
        given_up: impl FnOnce(String) -> LaneEvent + Send + 'static,
    ) {
        let events = self.events.clone();
        tokio::spawn(async move {
            let answer = match tokio::task::spawn_blocking(work).await {
                Ok(answer) => answer,
                Err(error) => given_up(error.to_string()),
            };
            if let Some(events) = events.upgrade() {
                // An error means that the lane has ended.
                let _ = events.send(answer).await;
            }
        });
    }
}

impl Drop for LaneClient {
    fn drop(&mut self) {
        self.abandon_fetcher();
    }
}

/// Committed offsets and log bounds of partitions, after a check of the topic id.
fn positions(
    group: &Group,
    expected: uuid::Uuid,
    partitions: &[Partition],
) -> Result<Vec<Positions>, KafkaPortError> {
    let offsets = group_offsets(group, partitions)?;
    let (found, _) = topic_id(group.consumer(), group.topic(), ATTEMPT_TIMEOUT)
        .map_err(|e| native_failed("asking for the topic's id", &e))?;
    if found != expected {
        return Err(IdentityMismatch::OtherTopic { expected, found }.into());
    }
    let bounds = log_bounds(group, partitions)?;
    let answers = partitions.iter().zip(offsets).zip(bounds);
    Ok(answers
        .map(|((partition, group), bounds)| Positions { partition: *partition, group, bounds })
        .collect())
}

/// Puts one fetched item into the buffer.
fn take(buffer: &mut FetchBuffer, suspicion: &Notify, item: FetchItem<'_>) {
    let is_failure = matches!(item, FetchItem::Failed { .. });
    if !is_failure && item.partition().is_some_and(|partition| failpoint::withholds(partition.0)) {
        return;
    }
    match item {
        FetchItem::Record(record) => buffer.record(
            record.partition(),
            record.offset(),
            record.timestamp(),
            record.key(),
            record.value(),
            record.headers(),
        ),
        FetchItem::End { partition, position } => buffer.end(partition, position),
        FetchItem::Failed { partition, code, offset } => {
            // A fault that lasts halts its partition, which is logged.
            tracing::debug!(target: "librdkafka", partition = partition.map(|p| p.0), %code, "fetch");
            suspicion.notify_one();
            if let Some(partition) = partition {
                buffer.fail(partition, FetchFault::new(code, offset));
            }
        }
    }
}

impl KafkaPort for LaneClient {
    fn ask(&mut self, question: Question) {
        let Question { id, partitions } = question;
        let (group, expected) = (self.group.clone(), self.settings.identity.topic_id);
        self.answer(
            move || LaneEvent::Answered { id, found: positions(&group, expected, &partitions) },
            move |error| LaneEvent::Answered {
                id,
                found: Err(KafkaPortError::transient(format!("the request was abandoned: {error}"))),
            },
        );
    }

    fn check_gaps(&mut self, id: u64, gaps: Vec<Gap>) {
        let kafka = Arc::clone(&self.settings.kafka);
        let asked = gaps.clone();
        self.answer(
            move || LaneEvent::GapsChecked { id, answers: gaps::check(&kafka, &asked) },
            move |error| {
                let failed = |gap| (gap, GapAnswer::Failed(error.clone()));
                LaneEvent::GapsChecked { id, answers: gaps.into_iter().map(failed).collect() }
            },
        );
    }

    async fn scan_outputs(
        &mut self,
        wanted: &[(Partition, NextOffset)],
    ) -> Result<Option<Vec<ScannedOutputs>>, KafkaPortError> {
        let Some((scan, _)) = self.output_scan.take_if(|(scan, _)| scan.is_finished()) else {
            if let Some((_, began)) = &self.output_scan {
                if began.elapsed() >= SCAN_HANGS {
                    return Err(transient(
                        "searching the outputs",
                        "no answer for ten minutes, still waiting",
                    ));
                }
            } else {
                let (kafka, wanted) = (Arc::clone(&self.settings.kafka), wanted.to_vec());
                let topic_id = self.settings.identity.topic_id;
                let scan = move || output_scan::scan(&kafka, topic_id, &wanted);
                self.output_scan = Some((tokio::task::spawn_blocking(scan), Instant::now()));
            }
            return Ok(None);
        };
        match scan.await {
            Ok(Ok(scanned)) => Ok(Some(scanned)),
            Ok(Err(error)) => Err(transient("searching the outputs", error)),
            Err(error) => Err(transient("searching the outputs", error)),
        }
    }

    async fn start(&mut self, positions: &[(Partition, NextOffset)]) -> Result<(), KafkaPortError> {
        failpoint::begun(positions.iter().map(|(partition, _)| partition.0));
        let positions = positions.to_vec();
        self.with_fetcher("starting to fetch", move |fetcher| fetcher.start(&positions)).await
    }

    async fn stop(&mut self, partitions: &[Partition]) -> Result<(), KafkaPortError> {
        if self.fetcher.is_none() {
            return Ok(());
        }
        let partitions = partitions.to_vec();
        self.with_fetcher("stopping to fetch", move |fetcher| fetcher.stop(&partitions)).await
    }

    fn abandon_fetcher(&mut self) {
        if let Some(fetcher) = self.fetcher.take() {
            // Destroying a client blocks, for ever if it hangs: a detached thread does it. If no thread can
            // be started, the closure, and with it the client, is dropped here.
            let _ = std::thread::Builder::new().name("reader-end".to_owned()).spawn(move || drop(fetcher));
        }
    }

    fn is_throttled(&self) -> bool {
        self.fetcher.as_ref().is_some_and(|fetcher| fetcher.is_throttled())
    }

    fn listen(&self) {
        if let Some(fetcher) = &self.fetcher {
            fetcher.listen();
        }
    }

    async fn fetch(&mut self, buffer: &mut FetchBuffer, wait: Duration) {
        let Some(fetcher) = &self.fetcher else {
            tokio::time::sleep(wait.min(FETCH_TICK)).await;
            return;
        };
        let suspicion = &self.suspicion;
        let mut drain = || {
            let mut taken = 0;
            loop {
                let room = buffer.room();
                if room == 0 {
                    return true;
                }
                let count = fetcher.drain(room, Duration::ZERO, |item| take(buffer, suspicion, item));
                if count == 0 {
                    return taken > 0;
                }
                taken += count;
            }
        };
        if drain() || wait.is_zero() {
            return;
        }
        // Drain after a timeout, too.
        let _ = tokio::time::timeout(wait.min(FETCH_TICK), fetcher.wait_filled()).await;
        drain();
    }

    async fn publish(
        &mut self,
        publication: &Arc<Publication>,
    ) -> Result<(Committed, OutputCounts, PublishTimes), PublishError> {
        let replace = |reason: &str| Err(PublishError::ReplaceProducer(reason.to_owned()));
        let stale = |reason: &str| Err(PublishError::StaleGeneration(reason.to_owned()));
        let Some(metadata) = GroupMetadata::of(self.group.consumer()) else {
            return stale("the consumer has no group");
        };
        // The broker does not fence a commit with generation -1.
        if metadata.generation() < 0 {
            return stale("the consumer is between two generations");
        }
        if !self.group.has_assigned_as(&metadata) {
            return stale("the lanes' partitions were assigned to an earlier membership");
        }
        // First the metadata, then the counter. In a generation that the member joined after a revocation that no
        // lane has handled yet, the counter is up and visible here; an earlier generation is refused by the broker.
        if self.unhandled_revocations.load(Ordering::Acquire) != 0 {
            return stale("a revocation is not handled yet");
        }
        // Put back once the outcome is known; if this future is dropped before, there is no producer.
        let Producer::Ready(publisher) = std::mem::take(&mut self.producer) else {
            return replace("no producer is ready");
        };
        let publication = Arc::clone(publication);
        let sent =
            publisher.run(move |transactions| transactions.publish(&publication, Some(&metadata))).await;
        let outcome = sent.unwrap_or_else(replace);
        if !matches!(outcome, Err(PublishError::ReplaceProducer(_))) {
            self.producer = Producer::Ready(publisher);
        }
        outcome
    }

    async fn renew(&mut self) -> Result<(), KafkaPortError> {
        let publisher = match std::mem::take(&mut self.producer) {
            Producer::Starting(publisher) => publisher,
            // `init_transactions` fails on a producer that is ready.
            Producer::Absent | Producer::Ready(_) => Publisher::spawn(self.settings.clone())
                .map_err(|e| transient("starting the publisher thread", e))?,
        };
        let initialised = publisher
            .run(Transactions::init)
            .await
            .map_err(|_| KafkaPortError::transient("the producer does not answer and was abandoned"))?;
        self.producer = match initialised {
            Ok(()) => Producer::Ready(publisher),
            Err(_) => Producer::Starting(publisher),
        };
        initialised
    }
}
