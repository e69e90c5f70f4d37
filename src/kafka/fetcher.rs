//! A client that reads partitions of one topic from positions that its owner names. It is a member of no group, so
//! that no rebalance touches what it fetches.
//!
//! It is begun and stopped, never paused or sought: the library keeps a position of its own across a pause, and
//! that position has been wrong.

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
use super::reminder::Reminder;
use super::throttle::Throttle;
use super::token;
use crate::config::KafkaSettings;
use crate::kafka_client::{client_config_over, make_client};
use crate::record::{NextOffset, Partition};

/// Items taken from the client in one call.
const CHUNK_MAX: usize = 1_000;
/// What the client has to say (log lines, lost brokers) is heard this often.
const LISTEN_EVERY: Duration = Duration::from_millis(100);
/// So much of it at most at a time.
const EVENTS_MAX: usize = 10;

/// What every client that reads records has, whatever the settings say: committed records alone, checked against
/// their checksums (brokers do not check them when they are fetched), and never a position of the library's choice.
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

/// Callbacks of a reader's client.
pub struct ReaderContext {
    /// No broker can be reached, as the client says.
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
    reminder: Reminder,
}

/// A reader of one topic.
pub struct Fetcher {
    queue: FetchQueue<ReaderContext>,
    bootstrap_servers: String,
    listening: Mutex<Listening>,
}

impl Fetcher {
    /// A reader of `topic` by a configuration of [`reader_config`]. Asks nothing of the brokers yet.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn new(config: &ClientConfig, topic: &str) -> Result<Self, KafkaError> {
        let bootstrap_servers = config.get("bootstrap.servers").unwrap_or_default().to_owned();
        let consumer = make_client::<BaseConsumer<_>, _>(config, ReaderContext::default())?;
        let queue = FetchQueue::new(consumer, topic, CHUNK_MAX)
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        let listening = Mutex::new(Listening { at: Instant::now(), reminder: Reminder::default() });
        Ok(Self { queue, bootstrap_servers, listening })
    }

    /// The client, for questions to the brokers.
    pub fn consumer(&self) -> &BaseConsumer<ReaderContext> {
        self.queue.consumer()
    }

    /// Fetches these partitions from these positions on, and delivers nothing of them that was fetched before.
    ///
    /// # Errors
    /// As librdkafka says. The client is of no more use then.
    pub fn start(&self, positions: &[(Partition, NextOffset)]) -> Result<(), NativeError> {
        positions.iter().try_for_each(|(partition, position)| self.queue.start(*partition, *position))
    }

    /// Fetches no more of these partitions, and delivers nothing more of them.
    ///
    /// # Errors
    /// As librdkafka says. The client is of no more use then.
    pub fn stop(&self, partitions: &[Partition]) -> Result<(), NativeError> {
        partitions.iter().try_for_each(|partition| self.queue.stop(*partition))
    }

    /// Hands at most `max` items that are there to `take`, waiting at most `wait` for the first, which blocks.
    /// Returns how many there were.
    pub fn drain(&self, max: usize, wait: Duration, take: impl FnMut(FetchItem<'_>)) -> usize {
        self.listen();
        self.queue.drain(max, wait, take)
    }

    /// Completes when something was put into the empty queue since it was last waited for.
    pub async fn wait_filled(&self) {
        self.queue.wait_filled().await;
    }

    /// Hears what the client has to say, and names the brokers again to one that may have lost them all.
    pub fn listen(&self) {
        let now = Instant::now();
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(listening.at) < LISTEN_EVERY {
            return;
        }
        listening.at = now;
        // Records come by the queue; here come log lines and errors, one a call.
        for _ in 0..EVENTS_MAX {
            let _ = self.consumer().poll(Duration::ZERO);
        }
        if self.consumer().context().all_brokers_down.swap(false, Ordering::AcqRel) {
            listening.reminder.suspect(now);
        }
        if listening.reminder.is_due(now, false) {
            add_brokers(self.consumer().client(), &self.bootstrap_servers);
        }
    }
}
