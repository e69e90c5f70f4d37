//! Detects that brokers throttle a client because of a quota: they answer at once, and then do not read its
//! connection for a while (KIP-219). librdkafka reports this only in its statistics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use ::metrics::{Counter, counter};
use serde::Deserialize;

use super::callbacks::Listener;
use crate::domain::record::TimestampMs;
use crate::telemetry::logging::RateLimited;
use crate::telemetry::metrics;

/// How often a lane's clients produce statistics, in milliseconds; `kafka.properties` may override it.
pub const STATISTICS_INTERVAL: (&str, &str) = ("statistics.interval.ms", "5000");

/// The part of librdkafka's statistics that is used (see its STATISTICS.md).
#[derive(Deserialize)]
struct Statistics {
    brokers: HashMap<String, BrokerStatistics>,
}

#[derive(Deserialize)]
struct BrokerStatistics {
    throttle: Window,
}

/// Sum over the time since the last statistics, in milliseconds.
#[derive(Deserialize)]
struct Window {
    sum: u64,
}

/// Throttle time of all responses since the last statistics, in milliseconds.
fn held_back(statistics: &[u8]) -> Option<u64> {
    let found: Statistics = serde_json::from_slice(statistics).ok()?;
    Some(found.brokers.values().map(|broker| broker.throttle.sum).sum())
}

/// A client without throttle time for this long is no longer throttled. With a quota just below the load, brokers
/// throttle some responses only.
const QUIET_MS: i64 = 60_000;

/// Kinds of clients, as in the metric's label, and when brokers last throttled one of them; 0 if never.
static LAST_MS: [(&str, AtomicI64); 2] = [("reader", AtomicI64::new(0)), ("producer", AtomicI64::new(0))];

/// The kinds of clients that brokers have throttled within the last minute.
pub fn throttled(now: TimestampMs) -> Vec<&'static str> {
    let lately = |last: &AtomicI64| now.0 - last.load(Ordering::Relaxed) < QUIET_MS;
    LAST_MS.iter().filter(|(_, last)| lately(last)).map(|(client, _)| *client).collect()
}

/// Throttle time of all clients of the process, in milliseconds.
static TOTAL_MS: AtomicU64 = AtomicU64::new(0);

/// How long brokers have throttled this process's clients since its start, in milliseconds, summed over all answers.
pub fn total_ms() -> u64 {
    TOTAL_MS.load(Ordering::Relaxed)
}

/// Counts the throttle time of one client, and logs when throttling starts and ends.
pub struct Throttle {
    client: &'static str,
    milliseconds: Counter,
    /// When it was last throttled; 0 if it is not.
    last: AtomicI64,
    /// Whether the start was logged.
    is_logged: AtomicBool,
}

impl Throttle {
    /// `client`: the label of the metric, `producer` or `reader`.
    pub fn of(client: &'static str) -> Self {
        let milliseconds = counter!("payment_writer_kafka_throttled_milliseconds_total", "client" => client);
        Self { client, milliseconds, last: AtomicI64::default(), is_logged: AtomicBool::default() }
    }

    /// Whether brokers throttled this client lately.
    pub fn is_held_back(&self) -> bool {
        self.last.load(Ordering::Acquire) > 0
    }

    fn note(&self, milliseconds: u64, now: TimestampMs) {
        /// Each lane has its clients.
        static LIMIT: RateLimited = RateLimited::new(4, Duration::from_secs(600));
        self.milliseconds.increment(milliseconds);
        TOTAL_MS.fetch_add(milliseconds, Ordering::Relaxed);
        let last = self.last.load(Ordering::Acquire);
        if milliseconds > 0 {
            self.last.store(now.0, Ordering::Release);
            for (_, last) in LAST_MS.iter().filter(|(client, _)| *client == self.client) {
                last.store(now.0, Ordering::Relaxed);
            }
            if last == 0
                && let Some(suppressed) = LIMIT.pass()
            {
                self.is_logged.store(true, Ordering::Release);
                tracing::warn!(
                    client = self.client,
                    milliseconds,
                    suppressed,
                    "brokers throttle this client because of a quota, which slows the payments down"
                );
            }
        } else if last > 0 && now.0 - last >= QUIET_MS {
            self.last.store(0, Ordering::Release);
            if self.is_logged.swap(false, Ordering::AcqRel) {
                tracing::info!(client = self.client, "brokers no longer throttle this client");
            }
        }
    }
}

impl Listener for Throttle {
    fn statistics(&self, statistics: &[u8]) {
        if let Some(milliseconds) = held_back(statistics) {
            self.note(milliseconds, metrics::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use rdkafka::ClientContext;
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    use super::*;

    #[test]
    fn the_statistics_of_all_brokers_count() {
        let statistics = br#"{"name":"x","brokers":{
            "a:1/1":{"name":"a:1/1","throttle":{"min":0,"max":0,"avg":0,"sum":0,"cnt":0},"toppars":{}},
            "a:2/2":{"throttle":{"min":5,"max":1200,"avg":9,"sum":1500,"cnt":3}},
            "a:3/3":{"throttle":{"min":5,"max":70,"avg":9,"sum":90,"cnt":2}}},"topics":{}}"#;
        assert_eq!(held_back(statistics), Some(1_590));
        assert_eq!(held_back(b"{}"), None);
    }

    #[test]
    fn a_client_that_is_throttled_now_and_then_is_logged_once() {
        #[derive(Clone, Default)]
        struct Levels(Arc<Mutex<String>>);
        impl<S: tracing::Subscriber> Layer<S> for Levels {
            fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
                self.0.lock().unwrap().push_str(event.metadata().level().as_str());
            }
        }
        let levels = Levels::default();
        let subscriber = tracing_subscriber::registry().with(levels.clone());
        tracing::subscriber::with_default(subscriber, || {
            let throttle = Throttle::of("reader");
            for second in 1..200 {
                throttle.note(if second % 2 == 0 { 700 } else { 0 }, TimestampMs(second * 5_000));
                assert_eq!(throttle.is_held_back(), second > 1);
            }
            assert_eq!(throttled(TimestampMs(1_000_000)), ["reader"]);
            assert!(throttled(TimestampMs(1_060_000)).is_empty());
            throttle.note(0, TimestampMs(2_000_000));
            assert!(!throttle.is_held_back());
        });
        assert_eq!(*levels.0.lock().unwrap(), "WARNINFO");
    }

    #[test]
    fn what_the_library_makes_is_understood() {
        // Statistics of a client without a broker still have librdkafka's field names.
        let mut config = rdkafka::ClientConfig::new();
        config.set("bootstrap.servers", "127.0.0.1:1").set("statistics.interval.ms", "1");
        struct Keep(std::sync::Mutex<Vec<Option<u64>>>);
        impl ClientContext for Keep {
            const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

            fn stats_raw(&self, statistics: &[u8]) {
                self.0.lock().unwrap().push(held_back(statistics));
            }
        }
        impl rdkafka::consumer::ConsumerContext for Keep {}
        let client: rdkafka::consumer::BaseConsumer<Keep> =
            crate::kafka::client::make_client(&config, Keep(std::sync::Mutex::default())).unwrap();
        while rdkafka::consumer::Consumer::context(&client).0.lock().unwrap().len() < 3 {
            let _ = client.poll(std::time::Duration::from_millis(10));
        }
        let kept = rdkafka::consumer::Consumer::context(&client).0.lock().unwrap().clone();
        assert!(kept.iter().all(|found| *found == Some(0)), "{kept:?}");
    }
}
