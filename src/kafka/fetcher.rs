//! A client that fetches partitions of one topic from positions that its owner names. It is in no consumer
//! group, so rebalances do not affect it.
//!
//! Partitions are started and stopped, never paused or sought: librdkafka keeps a position of its own across
//! a pause, and that position was wrong in tests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

use super::callbacks::{Callbacks, Listener};
use super::librdkafka::fetch::{FetchItem, FetchQueue};
use super::librdkafka::{NativeError, add_brokers};
use super::rebootstrap::Rebootstrap;
use super::throttle::Throttle;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::client::{client_config_over, make_client};

/// How long [`Fetcher::first_answers`] waits for items at a time.
const POLL: Duration = Duration::from_millis(50);
/// How often the client's log lines and errors are polled.
const LISTEN_EVERY: Duration = Duration::from_millis(100);
/// Polls at a time.
const EVENTS_MAX: usize = 10;

/// Configuration of every client that reads records. Whatever `kafka.properties` says: only committed
/// records, checksums verified (brokers do not verify them on a fetch), and no `auto.offset.reset`.
pub fn reader_config(kafka: &KafkaSettings, defaults: &[(&str, &str)]) -> ClientConfig {
    let mut config = client_config_over(kafka, defaults);
    config
        .set("isolation.level", "read_committed")
        .set("check.crcs", "true")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error");
    config
}

/// What a reader does in its callbacks.
pub struct ReaderListener {
    /// The client reported that no broker can be reached.
    all_brokers_down: AtomicBool,
    throttle: Throttle,
}

impl Listener for ReaderListener {
    fn error(&self, code: Option<RDKafkaErrorCode>, _: &str) {
        if code == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.all_brokers_down.store(true, Ordering::Release);
        }
    }

    fn statistics(&self, statistics: &[u8]) {
        self.throttle.statistics(statistics);
    }
}

impl ConsumerContext for Callbacks<ReaderListener> {}

struct Listening {
    at: Instant,
    rebootstrap: Rebootstrap,
}

/// A reader of one topic.
pub struct Fetcher {
    queue: FetchQueue<Callbacks<ReaderListener>>,
    bootstrap_servers: String,
    listening: Mutex<Listening>,
}

impl Fetcher {
    /// Creates a reader of `topic` from a configuration of [`reader_config`], without a request to the
    /// brokers.
    ///
    /// # Errors
    /// When the client cannot be created.
    pub fn new(config: &ClientConfig, topic: &str) -> Result<Self, KafkaError> {
        let bootstrap_servers = config.get("bootstrap.servers").unwrap_or_default().to_owned();
        let listener =
            ReaderListener { all_brokers_down: AtomicBool::default(), throttle: Throttle::of("reader") };
        let consumer = make_client::<BaseConsumer<_>, _>(config, Callbacks(listener))?;
        let queue = FetchQueue::new(consumer, topic)
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        let listening = Mutex::new(Listening { at: Instant::now(), rebootstrap: Rebootstrap::default() });
        Ok(Self { queue, bootstrap_servers, listening })
    }

    /// The underlying consumer, for requests to the brokers.
    pub fn consumer(&self) -> &BaseConsumer<Callbacks<ReaderListener>> {
        self.queue.consumer()
    }

    /// Starts to fetch these partitions at these positions; nothing fetched before is delivered.
    ///
    /// # Errors
    /// An error of librdkafka. The client has to be replaced then.
    pub fn start(&self, positions: &[(Partition, NextOffset)]) -> Result<(), NativeError> {
        positions.iter().try_for_each(|(partition, position)| self.queue.start(*partition, *position))
    }

    /// Stops fetching these partitions; nothing more of them is delivered.
    ///
    /// # Errors
    /// An error of librdkafka. The client has to be replaced then.
    pub fn stop(&self, partitions: &[Partition]) -> Result<(), NativeError> {
        partitions.iter().try_for_each(|partition| self.queue.stop(*partition))
    }

    /// Passes at most `max` available items to `take`, and returns their number. Blocks for at most `wait`
    /// until the first one arrives.
    pub fn drain(&self, max: usize, wait: Duration, take: impl FnMut(FetchItem<'_>)) -> usize {
        self.listen();
        self.queue.drain(max, wait, take)
    }

    /// Reads at these positions until `answer` has returned something about each partition, and returns that.
    /// Partitions without an answer at the deadline are absent. Blocks until then.
    ///
    /// # Errors
    /// An error of librdkafka. The client has to be replaced then.
    pub fn first_answers<T>(
        &self,
        positions: &[(Partition, NextOffset)],
        deadline: Instant,
        mut answer: impl FnMut(Partition, FetchItem<'_>) -> Option<T>,
    ) -> Result<BTreeMap<Partition, T>, NativeError> {
        self.start(positions)?;
        let mut answers = BTreeMap::new();
        while answers.len() < positions.len() && Instant::now() < deadline {
            let mut answered = Vec::new();
            self.drain(usize::MAX, POLL, |item| {
                let Some(partition) = item.partition().filter(|p| !answers.contains_key(p)) else { return };
                if let Some(answer) = answer(partition, item) {
                    answers.insert(partition, answer);
                    answered.push(partition);
                }
            });
            // Otherwise the client would fetch their backlogs while others are still waited for.
            self.stop(&answered)?;
        }
        positions.iter().try_for_each(|(partition, _)| self.queue.stop(*partition))?;
        Ok(answers)
    }

    /// Whether brokers throttled this client lately.
    pub fn is_throttled(&self) -> bool {
        self.consumer().context().0.throttle.is_held_back()
    }

    /// Completes when the queue has become non-empty since the last wait.
    pub async fn wait_filled(&self) {
        self.queue.wait_filled().await;
    }

    /// Polls the client's log lines and errors, and bootstraps it again if it may have lost all its brokers.
    pub fn listen(&self) {
        let now = Instant::now();
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(listening.at) < LISTEN_EVERY {
            return;
        }
        listening.at = now;
        // Records arrive in the queue; this poll returns one log line or error per call.
        for _ in 0..EVENTS_MAX {
            let _ = self.consumer().poll(Duration::ZERO);
        }
        if self.consumer().context().0.all_brokers_down.swap(false, Ordering::AcqRel) {
            listening.rebootstrap.suspect(now);
        }
        if listening.rebootstrap.is_due(now, false) {
            add_brokers(self.consumer().client(), &self.bootstrap_servers);
        }
    }
}
