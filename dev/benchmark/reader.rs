//! A consumer with manually assigned partitions that reads like the daemon: one queue a lane, no allocation a
//! record.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use payment_writer::domain::record::{NextOffset, Partition};
use payment_writer::kafka::fetcher::Fetcher;
use payment_writer::kafka::group::lane_of;
use payment_writer::kafka::librdkafka::NativeRecord;
use payment_writer::kafka::librdkafka::fetch::FetchItem;
use rdkafka::ClientConfig;
use rdkafka::consumer::Consumer;

use crate::Outcome;
use crate::site::failed;

const REQUEST_LIMIT: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(100);

/// All partitions of one topic, distributed over clients.
pub struct Reader {
    lanes: Vec<(Fetcher, Vec<(Partition, NextOffset)>)>,
}

impl Reader {
    /// Fetches the topic's metadata, and does not read yet. Every partition is read from `from`.
    pub fn new(config: &ClientConfig, topic: &str, from: NextOffset, lanes: usize) -> Outcome<Self> {
        let mut dealt = Vec::new();
        for _ in 0..lanes {
            dealt.push((Fetcher::new(config, topic).map_err(failed("creating a consumer"))?, Vec::new()));
        }
        let (asked, _) = dealt.first().ok_or("no lanes")?;
        let metadata = asked
            .consumer()
            .fetch_metadata(Some(topic), REQUEST_LIMIT)
            .map_err(failed("fetching a topic's metadata"))?;
        let partitions: Vec<Partition> = metadata
            .topics()
            .iter()
            .flat_map(|topic| topic.partitions())
            .map(|partition| Partition(partition.id()))
            .collect();
        if partitions.is_empty() {
            return Err(format!("topic {topic} does not exist"));
        }
        for partition in partitions {
            dealt[lane_of(partition, lanes)].1.push((partition, from));
        }
        Ok(Self { lanes: dealt })
    }

    /// Starts reading; each client's records are passed to its own `take`, on its own thread, until `is_over`
    /// returns true or for at most `limit`. Returns the state of each `take`.
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
        let deadline = Instant::now() + limit;
        let broken = AtomicBool::new(false);
        let work = |fetcher: Fetcher, state: &mut T| -> Outcome<()> {
            while !is_over.load(Ordering::Acquire) {
                let mut failure = None;
                fetcher.drain(usize::MAX, TICK, |item| match item {
                    FetchItem::Record(record) => take(state, record),
                    FetchItem::End { .. } => {}
                    FetchItem::Failed { code, .. } => failure = Some(code),
                });
                if let Some(code) = failure {
                    broken.store(true, Ordering::Release);
                    return Err(format!("reading a topic: {code}"));
                }
                if Instant::now() > deadline || broken.load(Ordering::Acquire) {
                    return Err(format!("a topic was not read within {} s", limit.as_secs()));
                }
            }
            Ok(())
        };
        for (fetcher, positions) in &self.lanes {
            fetcher.start(positions).map_err(failed("starting to read"))?;
        }
        std::thread::scope(|scope| {
            let lanes: Vec<_> = self
                .lanes
                .into_iter()
                .zip(&mut states)
                .map(|((fetcher, _), state)| scope.spawn(|| work(fetcher, state)))
                .collect();
            lanes
                .into_iter()
                .try_for_each(|lane| lane.join().map_err(|_| "a reading thread panicked".to_owned())?)
        })?;
        Ok(states)
    }
}
