//! The [`Log`] of a lane over a real cluster.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::{Offset as KafkaOffset, TopicPartitionList};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::group::{Group, GroupContext, REQUEST_TIMEOUT};
use super::librdkafka::{GroupMetadata, LaneQueue, QueueItem, topic_id};
use super::publisher::{Publisher, PublisherSettings};
use super::scan::ScanError;
use super::tails;
use crate::config::KafkaSettings;
use crate::cursor::{GroupOffset, IdentityDoubt, LogBounds};
use crate::disposition::{FailureClass, class_of_kafka};
use crate::intake::Intake;
use crate::lane::ports::{Log, LogFailure, Proved, PublishFailure, PublishTimes};
use crate::publication::{OutputCounts, Publication, Published};
use crate::record::{NextOffset, Partition, TimestampMs};

/// Records taken from the client in one call.
const CHUNK_MAX: usize = 1_000;
/// A missed wake-up costs at most this.
const FETCH_TICK: Duration = Duration::from_millis(100);

/// One lane's share of the cluster.
pub struct KafkaLog {
    group: Group,
    queue: Arc<tokio::sync::Mutex<LaneQueue<GroupContext>>>,
    settings: PublisherSettings,
    publisher: Option<Publisher>,
    /// True while a transaction's outcome is awaited, and after it was not learnt.
    is_in_doubt: bool,
    overtaken: Arc<AtomicI64>,
    /// Woken when fetching failed: the topic's id is asked for at once.
    suspicion: Arc<Notify>,
    kafka: Arc<KafkaSettings>,
    /// A search through the outputs that is under way.
    search: Option<JoinHandle<Result<Vec<Proved>, ScanError>>>,
}

impl KafkaLog {
    /// The log of the lane whose revocations `overtaken` counts.
    pub fn new(
        group: Group,
        settings: PublisherSettings,
        overtaken: Arc<AtomicI64>,
        suspicion: Arc<Notify>,
        kafka: Arc<KafkaSettings>,
    ) -> Self {
        let queue = LaneQueue::new(Arc::clone(group.consumer()), CHUNK_MAX);
        Self {
            group,
            queue: Arc::new(tokio::sync::Mutex::new(queue)),
            settings,
            publisher: None,
            is_in_doubt: false,
            overtaken,
            suspicion,
            kafka,
            search: None,
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(Group) -> Result<T, LogFailure> + Send + 'static,
    ) -> Result<T, LogFailure> {
        let group = self.group.clone();
        match tokio::task::spawn_blocking(move || work(group)).await {
            Ok(outcome) => outcome,
            Err(error) => Err(LogFailure::passing(format!("the request was given up: {error}"))),
        }
    }
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

/// The group's committed offsets, once no transaction that would change them is pending.
pub fn group_offsets(
    group: &Group,
    partitions: &[Partition],
) -> Result<Vec<Option<GroupOffset>>, LogFailure> {
    let list = list_at(group.topic(), partitions, KafkaOffset::Invalid)?;
    let answer = group
        .consumer()
        .committed_offsets(list, REQUEST_TIMEOUT)
        .map_err(|e| failed("asking for the group's offsets", &e))?;
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

impl Log for KafkaLog {
    async fn group_offsets(
        &mut self,
        partitions: &[Partition],
    ) -> Result<Vec<(Partition, Option<GroupOffset>)>, LogFailure> {
        let partitions = partitions.to_vec();
        self.blocking(move |group| {
            let offsets = group_offsets(&group, &partitions)?;
            Ok(partitions.into_iter().zip(offsets).collect())
        })
        .await
    }

    async fn bounds(&mut self, partitions: &[Partition]) -> Result<Vec<(Partition, LogBounds)>, LogFailure> {
        let partitions = partitions.to_vec();
        let expected = self.settings.identity.topic_id;
        self.blocking(move |group| {
            let (found, _) = topic_id(group.consumer(), group.topic(), REQUEST_TIMEOUT).map_err(|e| {
                LogFailure::Failed {
                    class: class_of_kafka(e.code),
                    message: format!("asking for the topic's id: {e}"),
                }
            })?;
            if found != expected {
                return Err(IdentityDoubt::OtherTopic { marked: expected, found }.into());
            }
            let bounds = log_bounds(&group, &partitions)?;
            Ok(partitions.into_iter().zip(bounds).collect())
        })
        .await
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
        let positions = positions.to_vec();
        let queue = Arc::clone(&self.queue);
        self.blocking(move |group| {
            let queue = queue.blocking_lock();
            group.start(&queue, &positions).map_err(LogFailure::passing)
        })
        .await
    }

    async fn stop(&mut self, partitions: &[Partition]) -> Result<(), LogFailure> {
        let partitions = partitions.to_vec();
        self.blocking(move |group| group.stop(&partitions).map_err(LogFailure::passing)).await
    }

    async fn fetch(&mut self, intake: &mut Intake, wait: Duration) {
        let suspicion = &self.suspicion;
        let mut queue = self.queue.lock().await;
        let mut drain = |queue: &mut LaneQueue<GroupContext>| {
            let mut taken = 0;
            loop {
                let room = intake.room();
                if room == 0 {
                    return true;
                }
                let count = queue.drain(room, |item| match item {
                    QueueItem::Record(record) => intake.record(
                        record.partition(),
                        record.offset(),
                        record.timestamp(),
                        record.key(),
                        record.value(),
                        record.headers(),
                    ),
                    QueueItem::End { partition, position } => {
                        intake.end(partition, NextOffset(position));
                    }
                    QueueItem::Failed { partition, code } => {
                        tracing::debug!(target: "librdkafka", partition = partition.map(|p| p.0), %code, "fetch");
                        suspicion.notify_one();
                        if let Some(partition) = partition {
                            intake.disturb(partition);
                        }
                    }
                });
                if count == 0 {
                    return taken > 0;
                }
                taken += count;
            }
        };
        if drain(&mut queue) || wait.is_zero() {
            return;
        }
        // Whether it was woken or not, what is there is taken.
        let _ = tokio::time::timeout(wait.min(FETCH_TICK), queue.wait_filled()).await;
        drain(&mut queue);
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
