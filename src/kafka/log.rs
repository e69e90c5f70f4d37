//! The [`Log`] of a lane over a real cluster.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use super::fetcher::{Fetcher, reader_config};
use super::gaps;
use super::group::{Group, REQUEST_TIMEOUT, Seat};
use super::librdkafka::fetch::FetchItem;
use super::librdkafka::{GroupMetadata, NativeError, topic_id};
use super::publisher::{Publisher, PublisherSettings};
use super::scan::ScanError;
use super::tails;
use super::throttle::STATISTICS_INTERVAL;
use crate::config::KafkaSettings;
use crate::cursor::{GroupOffset, IdentityDoubt, LogBounds};
use crate::disposition::{FailureClass, class_of_kafka};
use crate::failpoint;
use crate::intake::{FetchFault, Intake};
use crate::lane::ports::{
    Gap, GapAnswer, LaneEvent, Log, LogFailure, Positions, Proved, PublishFailure, PublishTimes, Question,
};
use crate::publication::{OutputCounts, Publication, Published};
use crate::record::{NextOffset, Partition, TimestampMs};

/// A missed wake-up costs at most this.
const FETCH_TICK: Duration = Duration::from_millis(100);
/// A call that begins or stops partitions takes microseconds each; a client in which it takes longer hangs.
const START_MAX: Duration = Duration::from_secs(10);
/// What `kafka.properties` may change of a lane's reader.
const FETCH_DEFAULTS: [(&str, &str); 9] = [
    STATISTICS_INTERVAL,
    // At low rates a fetch that is answered with its first record costs the broker as much as one with
    // twenty: it waits for more, though not long.
    ("fetch.min.bytes", "65536"),
    ("fetch.wait.max.ms", "10"),
    ("fetch.queue.backoff.ms", "20"),
    // Prefetched records wait in memory, whatever the backlog: bound their number and bytes. What is
    // fetched at once comes on top of what is queued.
    ("queued.min.messages", "20000"),
    ("queued.max.messages.kbytes", "2048"),
    ("fetch.max.bytes", "2097152"),
    ("fetch.message.max.bytes", "1048576"),
    ("topic.metadata.refresh.interval.ms", "60000"),
];

/// Configuration of the client by which a lane reads.
pub fn lane_reader_config(kafka: &KafkaSettings) -> rdkafka::ClientConfig {
    reader_config(kafka, &FETCH_DEFAULTS)
}

/// One lane's share of the cluster.
pub struct KafkaLog {
    group: Group,
    /// Made when partitions are started, and anew when it hangs or is given up.
    fetcher: Option<Arc<Fetcher>>,
    settings: PublisherSettings,
    publisher: Option<Publisher>,
    /// True while a transaction's outcome is awaited, and after it was not learnt.
    is_in_doubt: bool,
    overtaken: Arc<AtomicI64>,
    /// Where answers go. Weak, or the lane would never see that nobody can tell it anything any more.
    events: mpsc::WeakSender<LaneEvent>,
    /// Woken when fetching failed: the topic's id is asked for at once.
    suspicion: Arc<Notify>,
    kafka: Arc<KafkaSettings>,
    /// A search through the outputs that is under way.
    search: Option<JoinHandle<Result<Vec<Proved>, ScanError>>>,
}

impl KafkaLog {
    /// The log of the lane that has this seat in the group.
    pub fn new(
        group: Group,
        settings: PublisherSettings,
        seat: &Seat,
        suspicion: Arc<Notify>,
        kafka: Arc<KafkaSettings>,
    ) -> Self {
        Self {
            group,
            fetcher: None,
            settings,
            publisher: None,
            is_in_doubt: false,
            overtaken: Arc::clone(&seat.overtaken),
            events: seat.events.downgrade(),
            suspicion,
            kafka,
            search: None,
        }
    }

    /// Runs calls of the reader that block, within a limit. A reader that fails is given up.
    async fn with_fetcher(
        &mut self,
        doing: &str,
        work: impl FnOnce(&Fetcher) -> Result<(), NativeError> + Send + 'static,
    ) -> Result<(), LogFailure> {
        let fetcher = match &self.fetcher {
            Some(fetcher) => Arc::clone(fetcher),
            None => {
                let made = Fetcher::new(&lane_reader_config(&self.kafka), &self.kafka.input_topic)
                    .map_err(|e| failed(doing, &e))?;
                Arc::clone(self.fetcher.insert(Arc::new(made)))
            }
        };
        let called = tokio::task::spawn_blocking(move || work(&fetcher));
        let failure = match tokio::time::timeout(START_MAX, called).await {
            Ok(Ok(Ok(()))) => return Ok(()),
            Ok(Ok(Err(error))) => passing(doing, error),
            Ok(Err(error)) => passing(doing, error),
            Err(_) => passing(doing, "the client hangs and was abandoned"),
        };
        self.renew_fetching();
        Err(failure)
    }

    /// Hands an answer to the lane, if there still is one.
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

impl Drop for KafkaLog {
    fn drop(&mut self) {
        self.renew_fetching();
    }
}

/// What a lane has to know of partitions before it takes them up: topic id, group's offsets, bounds.
fn positions(
    group: &Group,
    expected: uuid::Uuid,
    partitions: &[Partition],
) -> Result<Vec<Positions>, LogFailure> {
    let offsets = group_offsets(group, partitions)?;
    let (found, _) =
        topic_id(group.consumer(), group.topic(), REQUEST_TIMEOUT).map_err(|e| LogFailure::Failed {
            class: class_of_kafka(e.code),
            message: format!("asking for the topic's id: {e}"),
        })?;
    if found != expected {
        return Err(IdentityDoubt::OtherTopic { marked: expected, found }.into());
    }
    let bounds = log_bounds(group, partitions)?;
    let answers = partitions.iter().zip(offsets).zip(bounds);
    Ok(answers
        .map(|((partition, group), bounds)| Positions { partition: *partition, group, bounds })
        .collect())
}

fn passing(doing: &str, error: impl std::fmt::Display) -> LogFailure {
    LogFailure::passing(format!("{doing}: {error}"))
}

fn failed(doing: &str, error: &KafkaError) -> LogFailure {
    let class = error.rdkafka_error_code().map_or(FailureClass::Passing, class_of_kafka);
    LogFailure::Failed { class, message: format!("{doing}: {error}") }
}

fn list_at(topic: &str, partitions: &[Partition], at: KafkaOffset) -> Result<TopicPartitionList, LogFailure> {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        list.add_partition_offset(topic, partition.0, at).map_err(|e| failed("listing partitions", &e))?;
    }
    Ok(list)
}

/// The offsets that `ListOffsets` answers for the start or the (last stable) end of partitions.
pub(super) fn listed<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    at: KafkaOffset,
) -> Result<Vec<i64>, LogFailure> {
    answered(consumer, topic, partitions, at)?
        .into_iter()
        .map(|found| match found {
            KafkaOffset::Offset(offset) => Ok(offset),
            other => Err(passing("asking for the log's bounds", format!("{other:?}"))),
        })
        .collect()
}

/// The first offsets whose timestamps are at or after `time`; `None` where there is no such record.
pub(super) fn positions_at<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    time: TimestampMs,
) -> Result<Vec<Option<NextOffset>>, LogFailure> {
    // The client takes the time in the field of the offset.
    let answers = answered(consumer, topic, partitions, KafkaOffset::Offset(time.0.max(0)))?;
    let position = |found| match found {
        KafkaOffset::Offset(offset) => Some(NextOffset(offset)),
        _ => None,
    };
    Ok(answers.into_iter().map(position).collect())
}

fn answered<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
    at: KafkaOffset,
) -> Result<Vec<KafkaOffset>, LogFailure> {
    let list = list_at(topic, partitions, at)?;
    let answer = consumer
        .offsets_for_times(list, REQUEST_TIMEOUT)
        .map_err(|e| failed("asking for the log's bounds", &e))?;
    partitions
        .iter()
        .map(|partition| {
            let element = answer
                .find_partition(topic, partition.0)
                .ok_or_else(|| passing("asking for the log's bounds", "a partition is missing"))?;
            element.error().map_err(|e| failed("asking for the log's bounds", &e))?;
            Ok(element.offset())
        })
        .collect()
}

/// Start and last stable offset of each partition, in the order given.
pub fn log_bounds(group: &Group, partitions: &[Partition]) -> Result<Vec<LogBounds>, LogFailure> {
    bounds_of(group.consumer(), group.topic(), partitions)
}

/// As [`log_bounds`], of any topic.
pub(super) fn bounds_of<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[Partition],
) -> Result<Vec<LogBounds>, LogFailure> {
    // The start first: what retention removes in between only makes it older than it is.
    let starts = listed(consumer, topic, partitions, KafkaOffset::Beginning)?;
    let ends = listed(consumer, topic, partitions, KafkaOffset::End)?;
    Ok(starts
        .into_iter()
        .zip(ends)
        .map(|(start, end)| LogBounds { start: NextOffset(start), end: NextOffset(end) })
        .collect())
}

/// The last stable offsets alone.
pub fn log_ends(group: &Group, partitions: &[Partition]) -> Result<Vec<NextOffset>, LogFailure> {
    let ends = listed(group.consumer(), group.topic(), partitions, KafkaOffset::End)?;
    Ok(ends.into_iter().map(NextOffset).collect())
}

/// How long a coordinator that is changing or loading is waited for.
const COORDINATOR_SETTLES: Duration = Duration::from_secs(10);

/// Whether there will be a coordinator in a moment.
fn is_settling(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::NotCoordinator | Code::CoordinatorNotAvailable | Code::CoordinatorLoadInProgress)
}

/// The group's committed offsets, once no transaction that would change them is pending.
pub fn group_offsets(
    group: &Group,
    partitions: &[Partition],
) -> Result<Vec<Option<GroupOffset>>, LogFailure> {
    let list = list_at(group.topic(), partitions, KafkaOffset::Invalid)?;
    let began = Instant::now();
    let answer = loop {
        match group.consumer().committed_offsets(list.clone(), REQUEST_TIMEOUT) {
            Ok(answer) => break answer,
            // Brokers that have just changed their roles answer so for a moment.
            Err(error)
                if error.rdkafka_error_code().is_some_and(is_settling)
                    && began.elapsed() < COORDINATOR_SETTLES =>
            {
                std::thread::sleep(Duration::from_millis(200));
            }
            Err(error) => return Err(failed("asking for the group's offsets", &error)),
        }
    };
    partitions
        .iter()
        .map(|partition| {
            let element = answer
                .find_partition(group.topic(), partition.0)
                .ok_or_else(|| passing("asking for the group's offsets", "a partition is missing"))?;
            element.error().map_err(|e| failed("asking for the group's offsets", &e))?;
            Ok(match element.offset() {
                KafkaOffset::Offset(offset) => Some(GroupOffset {
                    position: NextOffset(offset),
                    metadata: element.metadata().to_owned(),
                }),
                _ => None,
            })
        })
        .collect()
}

/// Puts one thing that was fetched into the intake.
fn take(intake: &mut Intake, suspicion: &Notify, item: FetchItem<'_>) {
    let partition = match &item {
        FetchItem::Record(record) => Some(record.partition()),
        FetchItem::End { partition, .. } => Some(*partition),
        FetchItem::Failed { .. } => None,
    };
    if partition.is_some_and(|partition| failpoint::withholds(partition.0)) {
        return;
    }
    match item {
        FetchItem::Record(record) => intake.record(
            record.partition(),
            record.offset(),
            record.timestamp(),
            record.key(),
            record.value(),
            record.headers(),
        ),
        FetchItem::End { partition, position } => intake.end(partition, position),
        FetchItem::Failed { partition, code, offset } => {
            tracing::debug!(target: "librdkafka", partition = partition.map(|p| p.0), %code, "fetch");
            suspicion.notify_one();
            if let Some(partition) = partition {
                intake.fail(partition, FetchFault::new(code, offset));
            }
        }
    }
}

impl Log for KafkaLog {
    fn ask(&mut self, question: Question) {
        let Question { id, partitions } = question;
        let (group, expected) = (self.group.clone(), self.settings.identity.topic_id);
        self.answer(
            move || LaneEvent::Answered { id, found: positions(&group, expected, &partitions) },
            move |error| LaneEvent::Answered {
                id,
                found: Err(LogFailure::passing(format!("the request was given up: {error}"))),
            },
        );
    }

    fn prove_gaps(&mut self, id: u64, gaps: Vec<Gap>) {
        let kafka = Arc::clone(&self.kafka);
        let asked = gaps.clone();
        self.answer(
            move || LaneEvent::GapsProved { id, answers: gaps::prove(&kafka, &asked) },
            move |error| {
                let failed = |gap| (gap, GapAnswer::Failed(error.clone()));
                LaneEvent::GapsProved { id, answers: gaps.into_iter().map(failed).collect() }
            },
        );
    }

    async fn prove(&mut self, wanted: &[(Partition, NextOffset)]) -> Result<Option<Vec<Proved>>, LogFailure> {
        match self.search.take() {
            Some(search) if !search.is_finished() => {
                self.search = Some(search);
                Ok(None)
            }
            Some(search) => match search.await {
                Ok(Ok(proved)) => Ok(Some(proved)),
                Ok(Err(error)) => Err(passing("searching the outputs", error)),
                Err(error) => Err(passing("searching the outputs", error)),
            },
            None => {
                let (kafka, wanted) = (Arc::clone(&self.kafka), wanted.to_vec());
                let topic_id = self.settings.identity.topic_id;
                self.search =
                    Some(tokio::task::spawn_blocking(move || tails::search(&kafka, topic_id, &wanted)));
                Ok(None)
            }
        }
    }

    async fn start(&mut self, positions: &[(Partition, NextOffset)]) -> Result<(), LogFailure> {
        failpoint::begun(positions.iter().map(|(partition, _)| partition.0));
        let positions = positions.to_vec();
        self.with_fetcher("starting to fetch", move |fetcher| fetcher.start(&positions)).await
    }

    async fn stop(&mut self, partitions: &[Partition]) -> Result<(), LogFailure> {
        if self.fetcher.is_none() {
            return Ok(());
        }
        let partitions = partitions.to_vec();
        self.with_fetcher("stopping to fetch", move |fetcher| fetcher.stop(&partitions)).await
    }

    fn renew_fetching(&mut self) {
        if let Some(fetcher) = self.fetcher.take() {
            // The end of a client blocks, that of one that hangs for ever: on a thread that nobody waits for. If there
            // is no thread to be had, the closure is dropped here, and with it the client.
            let _ = std::thread::Builder::new().name("reader-end".to_owned()).spawn(move || drop(fetcher));
        }
    }

    fn listen(&self) {
        if let Some(fetcher) = &self.fetcher {
            fetcher.listen();
        }
    }

    async fn fetch(&mut self, intake: &mut Intake, wait: Duration) {
        let Some(fetcher) = &self.fetcher else {
            tokio::time::sleep(wait.min(FETCH_TICK)).await;
            return;
        };
        let suspicion = &self.suspicion;
        let mut drain = || {
            let mut taken = 0;
            loop {
                let room = intake.room();
                if room == 0 {
                    return true;
                }
                let count = fetcher.drain(room, Duration::ZERO, |item| take(intake, suspicion, item));
                if count == 0 {
                    return taken > 0;
                }
                taken += count;
            }
        };
        if drain() || wait.is_zero() {
            return;
        }
        // Whether it was woken or not, what is there is taken.
        let _ = tokio::time::timeout(wait.min(FETCH_TICK), fetcher.wait_filled()).await;
        drain();
    }

    async fn publish(
        &mut self,
        publication: &Arc<Publication>,
    ) -> Result<(Published, OutputCounts, PublishTimes), PublishFailure> {
        if self.is_in_doubt {
            return Err(PublishFailure::Unknown("an earlier transaction was given up".to_owned()));
        }
        let Some(publisher) = &self.publisher else {
            return Err(PublishFailure::Unknown("there is no producer yet".to_owned()));
        };
        let Some(metadata) = GroupMetadata::of(self.group.consumer()) else {
            return Err(PublishFailure::Fenced("the consumer has no group".to_owned()));
        };
        // A commit with generation -1 would not be fenced.
        if metadata.generation() < 0 {
            return Err(PublishFailure::Fenced("the consumer is between two generations".to_owned()));
        }
        // In this order: a generation that came after a revocation implies that the revocation's mark is
        // visible here.
        if self.overtaken.load(Ordering::Acquire) != 0 {
            return Err(PublishFailure::Fenced("partitions were taken away meanwhile".to_owned()));
        }
        self.is_in_doubt = true;
        let answer = publisher.publish(Arc::clone(publication), metadata);
        let outcome = match publisher.answer(answer).await {
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(PublishFailure::Unknown("the publisher's thread is gone".to_owned())),
            None => Err(PublishFailure::Unknown("the producer hangs and was abandoned".to_owned())),
        };
        self.is_in_doubt = matches!(outcome, Err(PublishFailure::Unknown(_)));
        outcome
    }

    async fn renew(&mut self) -> Result<(), LogFailure> {
        if self.is_in_doubt {
            self.publisher = None;
            self.is_in_doubt = false;
        }
        let publisher = match self.publisher.take() {
            Some(publisher) => publisher,
            None => Publisher::spawn(self.settings.clone())
                .map_err(|e| passing("starting the publisher's thread", e))?,
        };
        match publisher.answer(publisher.init()).await {
            Some(Ok(Ok(()))) => {
                self.publisher = Some(publisher);
                Ok(())
            }
            Some(Ok(Err(failure))) => {
                self.publisher = Some(publisher);
                Err(failure)
            }
            Some(Err(_)) | None => Err(LogFailure::passing("the producer does not answer and was abandoned")),
        }
    }
}
