//! Metrics: updated once per batch; labels have small fixed sets of values, and names include the unit.

mod audit;
mod lane;
mod memory;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Histogram, Unit, counter, gauge, histogram, with_recorder};
use strum::VariantArray;

pub use self::audit::{AuditMetrics, AuditResult};
pub use self::lane::LaneMetrics;
use crate::domain::batch::OutcomeCounts;
use crate::domain::outcome::{FailureClass, SQLSTATE_CLASSES};
use crate::domain::publication::OutputTopic;
use crate::domain::record::TimestampMs;
use crate::domain::wire::Reason;

/// Bucket bounds of all duration histograms, in seconds.
pub const SECONDS_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Bucket bounds of the batch size histogram, in records.
pub const RECORDS_BUCKETS: [f64; 11] =
    [1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 500.0, 1_000.0, 5_000.0, 10_000.0, 50_000.0];
/// Bucket bounds of the batch size histogram, in bytes.
pub const BYTES_BUCKETS: [f64; 8] = [1e3, 1e4, 1e5, 5e5, 1e6, 2.5e6, 5e6, 1e7];

/// Type, name and HELP text of each metric, one a line.
const HELP: &str = include_str!("metrics/help.txt");

/// Registers the HELP text of each metric.
pub fn describe() {
    for line in HELP.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(kind), Some(name), Some(help)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let unit = match name {
            _ if name.ends_with("_seconds") => Some(Unit::Seconds),
            _ if name.ends_with("_bytes") => Some(Unit::Bytes),
            _ => None,
        };
        with_recorder(|recorder| match kind {
            "counter" => recorder.describe_counter(name.into(), unit, help.into()),
            "gauge" => recorder.describe_gauge(name.into(), unit, help.into()),
            _ => recorder.describe_histogram(name.into(), unit, help.into()),
        });
    }
    metrics_process::Collector::default().describe();
    begin_at_zero();
}

/// Creates the counters of rare events with value 0: Prometheus does not see an increase of a counter that
/// first appears with value 1.
fn begin_at_zero() {
    fn begin(name: &'static str, label: &'static str, values: impl IntoIterator<Item = &'static str>) {
        for value in values {
            counter!(name, label => value).increment(0);
        }
    }
    let sqlstates = SQLSTATE_CLASSES.into_iter().chain(["cursor", "other", "connection"]);
    begin("payment_writer_database_errors_total", "sqlstate_class", sqlstates);
    begin("payment_writer_rebalances_total", "kind", ["assigned", "revoked", "lost"]);
    begin("payment_writer_kafka_throttled_milliseconds_total", "client", ["producer", "reader"]);
    begin("payment_writer_audit_errors_total", "dependency", ["broker", "database"]);
    OutputTopic::ALL.map(published).iter().chain(&outcomes()).for_each(|counter| counter.increment(0));
    for reason in Reason::ALL {
        dead_letters(*reason).increment(0);
    }
    for class in FailureClass::VARIANTS {
        kafka_errors(*class).increment(0);
    }
    for result in AuditResult::VARIANTS {
        audit::records(*result).increment(0);
    }
    for name in [
        "payment_writer_audit_dropped_offsets_total",
        "payment_writer_replayed_records_total",
        "payment_writer_generation_rotations_total",
        "payment_writer_generations_dropped_total",
    ] {
        counter!(name).increment(0);
    }
}

/// Records by outcome, in the order of [`by_outcome`].
fn outcomes() -> [Counter; 4] {
    ["written", "redelivered", "duplicate", "dead_lettered"]
        .map(|outcome| counter!("payment_writer_records_total", "outcome" => outcome))
}

fn by_outcome(counts: &OutcomeCounts) -> [u64; 4] {
    [counts.written, counts.redelivered, counts.duplicates, counts.dead_letters]
}

fn dead_letters(reason: Reason) -> Counter {
    counter!("payment_writer_dead_letters_total", "reason" => reason.as_str())
}

fn published(topic: OutputTopic) -> Counter {
    counter!("payment_writer_published_total", "topic" => topic.label())
}

fn kafka_errors(class: FailureClass) -> Counter {
    counter!("payment_writer_kafka_errors_total", "class" => class.as_str())
}

/// 1 for true.
fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// Sets the gauges that are computed at each scrape.
pub fn scraped(missing: &BTreeMap<&'static str, String>, oldest_pending_ms: i64) {
    gauge!("payment_writer_ready").set(flag(missing.is_empty()));
    for what in ["database", "broker", "group"] {
        gauge!("payment_writer_missing", "what" => what).set(flag(missing.contains_key(what)));
    }
    gauge!("payment_writer_oldest_pending_seconds").set(oldest_pending_ms as f64 / 1_000.0);
    if let Some(bytes) = memory::recent_limit_bytes() {
        gauge!("payment_writer_memory_limit_bytes").set(bytes as f64);
    }
}

/// Whether secrets, certificates and settings could be loaded, at the start or later.
pub fn reloaded(is_successful: bool) {
    gauge!("payment_writer_config_last_reload_successful").set(flag(is_successful));
    if is_successful {
        gauge!("payment_writer_config_last_reload_success_timestamp_seconds").set(now().0 as f64 / 1_000.0);
    }
}

/// Whether the process backs off at its start, before there are lanes; exported as lane 0.
pub fn breaker_at_start(dependency: &'static str, is_open: bool) {
    gauge!("payment_writer_breaker_open", "dependency" => dependency, "lane" => "0").set(flag(is_open));
}

/// Resets the gauges of lanes when no lane has a partition any more.
pub fn lanes_left(lanes: usize) {
    (0..lanes).for_each(|lane| drop(LaneMetrics::new(lane, Arc::default())));
}

/// Sets the number of partitions of the input topic.
pub fn input_partitions(count: usize) {
    gauge!("payment_writer_input_partitions").set(count as f64);
}

/// Sets the retention of the input topic; `None` means unlimited.
pub fn input_retention(retention: Option<Duration>) {
    let seconds = retention.map_or(f64::INFINITY, |retention| retention.as_secs_f64());
    gauge!("payment_writer_input_retention_seconds").set(seconds);
}

/// Sets the number of records of a partition behind an open transaction, and its age.
pub fn open_transaction(partition: String, records: i64, age_ms: i64) {
    gauge!("payment_writer_open_transaction_records", "partition" => partition.clone()).set(records as f64);
    gauge!("payment_writer_open_transaction_seconds", "partition" => partition).set(age_ms as f64 / 1_000.0);
}

/// Sets whether a setting of a topic breaks a rule, by the topic's role.
pub fn topic_misconfigured(topic: &'static str, setting: &'static str, is: bool) {
    gauge!("payment_writer_topic_misconfigured", "topic" => topic, "setting" => setting).set(flag(is));
}

/// Durations of the steps of Kafka transactions.
#[derive(Clone)]
pub struct KafkaSteps {
    /// Encoding the outputs into record batches, or passing them to librdkafka.
    pub produce: Histogram,
    /// Sending the group's offsets.
    pub offsets: Histogram,
    /// Sending the outputs until the brokers have acknowledged them.
    pub deliver: Histogram,
    /// Committing.
    pub commit: Histogram,
}

impl Default for KafkaSteps {
    fn default() -> Self {
        let step = |step: &'static str| histogram!("payment_writer_kafka_step_seconds", "step" => step);
        Self {
            produce: step("produce"),
            offsets: step("offsets"),
            deliver: step("deliver"),
            commit: step("commit"),
        }
    }
}

/// Runs a step and records its duration, also if it fails.
pub fn timed<T>(histogram: &Histogram, took: &mut Duration, step: impl FnOnce() -> T) -> T {
    let began = std::time::Instant::now();
    let outcome = step();
    *took = began.elapsed();
    histogram.record(took.as_secs_f64());
    outcome
}

/// Current wall-clock time.
pub fn now() -> TimestampMs {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    TimestampMs(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
