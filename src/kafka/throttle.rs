//! Detects that brokers throttle a client because of a quota: they answer at once, and then do not read its
//! connection for a while (KIP-219). librdkafka reports this only in its statistics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use metrics::{Counter, counter};
use serde::Deserialize;

use super::callbacks::Listener;

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

/// Counts the throttle time of one client, and logs when throttling starts and ends.
pub struct Throttle {
    client: &'static str,
    milliseconds: Counter,
    is_held_back: AtomicBool,
}

impl Throttle {
    /// `client`: the label of the metric, `producer` or `reader`.
    pub fn of(client: &'static str) -> Self {
        let milliseconds = counter!("payment_writer_kafka_throttled_milliseconds_total", "client" => client);
        Self { client, milliseconds, is_held_back: AtomicBool::new(false) }
    }
}

impl Listener for Throttle {
    fn statistics(&self, statistics: &[u8]) {
        let Some(milliseconds) = held_back(statistics) else { return };
        self.milliseconds.increment(milliseconds);
        let was = self.is_held_back.swap(milliseconds > 0, Ordering::AcqRel);
        match (was, milliseconds > 0) {
            (false, true) => tracing::warn!(
                client = self.client,
                milliseconds,
                "brokers throttle this client because of a quota, which slows the payments down"
            ),
            (true, false) => tracing::info!(client = self.client, "brokers no longer throttle this client"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientContext;

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
