//! A consumer that is told what to read, in the daemon's own cheap way: one queue a lane, no allocation a record.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use payment_writer::kafka::group::lane_of;
use payment_writer::kafka::librdkafka::{LaneQueue, NativeRecord, QueueItem};
use payment_writer::record::Partition;
use rdkafka::consumer::{BaseConsumer, Consumer, DefaultConsumerContext};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::Outcome;
use crate::site::failed;

/// Records taken in one call, as in the daemon.
const CHUNK_MAX: usize = 1_000;
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(100);

/// All partitions of one topic, dealt to queues.
pub struct Reader {
    consumer: Arc<BaseConsumer<DefaultConsumerContext>>,
    list: TopicPartitionList,
    queues: Vec<LaneQueue<DefaultConsumerContext>>,
}

impl Reader {
    /// Knows the topic, and does not read yet.
    pub fn new(config: &ClientConfig, topic: &str, from: Offset, lanes: usize) -> Outcome<Self> {
        let consumer: BaseConsumer<DefaultConsumerContext> =
            config.create().map_err(failed("making a consumer"))?;
        let consumer = Arc::new(consumer);
        let metadata =
            consumer.fetch_metadata(Some(topic), REQUEST_LIMIT).map_err(failed("asking for a topic"))?;
        let queues: Vec<_> = (0..lanes).map(|_| LaneQueue::new(Arc::clone(&consumer), CHUNK_MAX)).collect();
        let mut list = TopicPartitionList::new();
        for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
            queues[lane_of(Partition(partition.id()), lanes)].attach(topic, Partition(partition.id()));
            list.add_partition_offset(topic, partition.id(), from).map_err(failed("listing partitions"))?;
        }
        if list.count() == 0 {
            return Err(format!("topic {topic} is not there"));
        }
        Ok(Self { consumer, list, queues })
    }

    /// Begins to read; each queue's records go to a `take` of its own, on a thread of its own, until `is_over`
    /// or for at most `limit`. Returns what `take`s were made of.
    ///
    /// # Errors
    /// If a partition cannot be read, or `limit` passes first.
    pub fn read<T: Send>(
        self,
        limit: Duration,
        mut states: Vec<T>,
        is_over: &AtomicBool,
        take: impl Fn(&mut T, NativeRecord<'_>) + Sync,
    ) -> Outcome<Vec<T>> {
        let Self { consumer, list, queues } = self;
        let deadline = Instant::now() + limit;
        let broken = AtomicBool::new(false);
        let work = |mut queue: LaneQueue<DefaultConsumerContext>, state: &mut T| -> Outcome<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(failed("making a runtime"))?;
            while !is_over.load(Ordering::Acquire) {
                let mut failure = None;
                let count = queue.drain(CHUNK_MAX, |item| match item {
                    QueueItem::Record(record) => take(state, record),
                    QueueItem::End { .. } => {}
                    QueueItem::Failed { code, .. } => failure = Some(code),
                });
                if let Some(code) = failure {
                    broken.store(true, Ordering::Release);
                    return Err(format!("reading a topic: {code}"));
                }
                if Instant::now() > deadline || broken.load(Ordering::Acquire) {
                    return Err(format!("a topic was not read within {} s", limit.as_secs()));
                }
                if count == 0 {
                    let _ = runtime.block_on(async { tokio::time::timeout(TICK, queue.wait_filled()).await });
                }
            }
            Ok(())
        };
        consumer.assign(&list).map_err(failed("assigning partitions"))?;
        std::thread::scope(|scope| {
            let lanes: Vec<_> = queues
                .into_iter()
                .zip(&mut states)
                .map(|(queue, state)| scope.spawn(|| work(queue, state)))
                .collect();
            // Statistics and errors of the client come by the main queue.
            while lanes.iter().any(|lane| !lane.is_finished()) {
                let _ = consumer.poll(Duration::from_millis(10));
            }
            lanes
                .into_iter()
                .try_for_each(|lane| lane.join().map_err(|_| "a reading thread died".to_owned())?)
        })?;
        Ok(states)
    }
}
