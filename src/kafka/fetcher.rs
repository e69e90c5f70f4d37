//! A client that fetches partitions of one topic from positions that its owner names. It is in no consumer
//! group, so rebalances do not affect it.
//!
//! Partitions are started and stopped, never paused or sought: librdkafka keeps a position of its own across
//! a pause, and that position was wrong in tests.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::OAuthToken;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientConfig, ClientContext};

use super::group::QuietLog;
use super::librdkafka::fetch::{FetchItem, FetchQueue};
use super::librdkafka::{NativeError, add_brokers};
use super::rebootstrap::Rebootstrap;
use super::throttle::Throttle;
use super::token;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::client::{client_config_over, make_client};

/// Items taken from the client in one call.
const CHUNK_MAX: usize = 1_000;
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

/// Callbacks of a reader.
pub struct ReaderContext {
    /// The client reported that no broker can be reached.
    all_brokers_down: AtomicBool,
    throttle: Throttle,
}

impl Default for ReaderContext {
    fn default() -> Self {
        Self { all_brokers_down: AtomicBool::default(), throttle: Throttle::of("reader") }
    }
}

impl ClientContext for ReaderContext {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        QuietLog.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.all_brokers_down.store(true, Ordering::Release);
        }
        QuietLog.error(error, reason);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.throttle.statistics(statistics);
    }
}

impl ConsumerContext for ReaderContext {}

struct Listening {
    at: Instant,
    rebootstrap: Rebootstrap,
}

/// A reader of one topic.
pub struct Fetcher {
    queue: FetchQueue<ReaderContext>,
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
        let consumer = make_client::<BaseConsumer<_>, _>(config, ReaderContext::default())?;
        let queue = FetchQueue::new(consumer, topic, CHUNK_MAX)
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        let listening = Mutex::new(Listening { at: Instant::now(), rebootstrap: Rebootstrap::default() });
        Ok(Self { queue, bootstrap_servers, listening })
    }

    /// The underlying consumer, for requests to the brokers.
    pub fn consumer(&self) -> &BaseConsumer<ReaderContext> {
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
        if self.consumer().context().all_brokers_down.swap(false, Ordering::AcqRel) {
            listening.rebootstrap.suspect(now);
        }
        if listening.rebootstrap.is_due(now, false) {
            add_brokers(self.consumer().client(), &self.bootstrap_servers);
        }
    }
}
