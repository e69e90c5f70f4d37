//! Metrics: updated once per batch; labels have small fixed sets of values, and names include the unit.

mod memory;

use std::collections::BTreeMap;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

use strum::VariantArray;

use crate::domain::batch::{Batch, OutcomeCounts};
use crate::domain::outcome::{FailureClass, SQLSTATE_CLASSES, sqlstate_label};
use crate::domain::publication::{OutputCounts, OutputTopic};
use crate::domain::record::TimestampMs;
use crate::domain::wire::Reason;
use crate::ports::WriteStats;

/// Phases of a lane's work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LanePhase {
    /// Waiting for records, or for a batch to fill.
    Waiting,
    /// Parsing and encoding.
    Assembling,
    /// The Postgres transaction.
    Database,
    /// The Kafka transaction.
    Kafka,
}

impl LanePhase {
    const ALL: [Self; 4] = [Self::Waiting, Self::Assembling, Self::Database, Self::Kafka];

    fn label(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Assembling => "assembling",
            Self::Database => "database",
            Self::Kafka => "kafka",
        }
    }
}

/// Bucket bounds of all duration histograms, in seconds.
pub const SECONDS_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Bucket bounds of the batch size histogram, in records.
pub const RECORDS_BUCKETS: [f64; 11] =
    [1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 500.0, 1_000.0, 5_000.0, 10_000.0, 50_000.0];
/// Bucket bounds of the batch size histogram, in bytes.
pub const BYTES_BUCKETS: [f64; 8] = [1e3, 1e4, 1e5, 5e5, 1e6, 2.5e6, 5e6, 1e7];

/// Registers the HELP text of each metric.
pub fn describe() {
    describe_counter!(
        "payment_writer_records_total",
        "Input records by outcome, counted when their rows and events are durable"
    );
    describe_counter!("payment_writer_dead_letters_total", "Dead letters published, by reason");
    describe_counter!(
        "payment_writer_published_total",
        "Messages in committed Kafka transactions, by output topic"
    );
    describe_counter!("payment_writer_batches_total", "Batches closed, by lane; a retry does not count");
    describe_histogram!("payment_writer_batch_records", "Records in a batch");
    describe_histogram!(
        "payment_writer_batch_bytes",
        Unit::Bytes,
        "Bytes of keys, values and headers in a batch"
    );
    describe_histogram!("payment_writer_phase_seconds", Unit::Seconds, "Time of a lane by phase of a batch");
    describe_histogram!(
        "payment_writer_database_step_seconds",
        Unit::Seconds,
        "Time of the steps of a database transaction"
    );
    describe_histogram!(
        "payment_writer_kafka_step_seconds",
        Unit::Seconds,
        "Time of the steps of a Kafka transaction"
    );
    describe_histogram!(
        "payment_writer_end_to_end_seconds",
        Unit::Seconds,
        "From the record's timestamp to the commit of its events; sampled"
    );
    describe_counter!("payment_writer_database_errors_total", "Database errors by class of SQLSTATE");
    describe_gauge!("payment_writer_partitions_assigned", "Partitions assigned, by lane");
    describe_gauge!(
        "payment_writer_partitions_halted",
        "Partitions halted until an operator resolves them or they can be read again, by lane"
    );
    describe_counter!("payment_writer_rebalances_total", "Rebalances by kind");
    describe_counter!(
        "payment_writer_lane_resets_total",
        "Number of times that a lane dropped its records in memory and read its cursors again"
    );
    describe_counter!(
        "payment_writer_kafka_throttled_milliseconds_total",
        "Time for which brokers throttled this process's clients by quotas, by client"
    );
    describe_counter!(
        "payment_writer_fetch_gaps_total",
        "Number of times that the client skipped records after a fetch start; they were read, nothing is lost"
    );
    describe_counter!(
        "payment_writer_fetch_failures_total",
        "Number of times that fetching a partition failed and was restarted"
    );
    describe_counter!(
        "payment_writer_fetch_clients_renewed_total",
        "Number of times that a lane replaced its fetch client because a partition with records was silent"
    );
    describe_gauge!(
        "payment_writer_database_up",
        "1 while the database answers a lane, or it has no partitions"
    );
    describe_gauge!("payment_writer_broker_up", "1 while the broker answers a lane, or it has no partitions");
    describe_gauge!(
        "payment_writer_lag_records",
        "Records between what is written and published, and the end of an assigned partition"
    );
    describe_gauge!(
        "payment_writer_lag_seconds",
        Unit::Seconds,
        "Age of a partition's oldest record not yet written and published, as far as known; 0 when caught up"
    );
    describe_gauge!(
        "payment_writer_oldest_pending_seconds",
        Unit::Seconds,
        "Age of this process's oldest record not yet written and published, as far as known; 0 when caught up"
    );
    describe_gauge!("payment_writer_ready", "1 while /readyz answers 200");
    describe_gauge!(
        "payment_writer_missing",
        "1 while /readyz names the database, the broker or the group as missing"
    );
    describe_gauge!(
        "payment_writer_breaker_open",
        "1 while a lane backs off from a dependency whose requests fail"
    );
    describe_counter!("payment_writer_kafka_errors_total", "Kafka requests of lanes that failed, by class");
    describe_gauge!("payment_writer_input_partitions", "Partitions of the input topic, as last asked");
    describe_gauge!(
        "payment_writer_input_retention_seconds",
        Unit::Seconds,
        "Retention by time of the input topic, as last asked; +Inf when unlimited"
    );
    describe_counter!(
        "payment_writer_replayed_records_total",
        "Input records with a dlq-replays header, counted when their rows and events are durable"
    );
    describe_gauge!(
        "payment_writer_memory_limit_bytes",
        Unit::Bytes,
        "Memory limit of this process: the lowest of its control groups, or the machine's memory"
    );
    describe_counter!(
        "payment_writer_claims_older_total",
        "Claims by whether an older generation was searched for their id"
    );
    describe_gauge!("payment_writer_generations_live", "Generations that are written to or searched");
    describe_gauge!(
        "payment_writer_generation_rows",
        "Rows of a live generation, 0 being the current one; an estimate"
    );
    describe_gauge!(
        "payment_writer_generation_bytes",
        Unit::Bytes,
        "Size of a live generation with its index, 0 being the current one"
    );
    describe_gauge!(
        "payment_writer_horizon_timestamp_seconds",
        Unit::Seconds,
        "Log time up to which every partition is written and published, as last known"
    );
    describe_gauge!(
        "payment_writer_horizon_held",
        "1 while the horizon is unknown: a partition is halted, or the broker does not answer"
    );
    describe_gauge!(
        "payment_writer_housekeeping_last_pass_timestamp_seconds",
        Unit::Seconds,
        "Start of the last complete housekeeping pass of any process"
    );
    describe_histogram!(
        "payment_writer_housekeeping_pass_seconds",
        Unit::Seconds,
        "Duration of the housekeeping passes of this process"
    );
    describe_counter!("payment_writer_generation_rotations_total", "Rotations by this process");
    describe_counter!("payment_writer_generations_dropped_total", "Generations dropped by this process");
    describe_gauge!(
        "payment_writer_default_partition_rows",
        "Rows in the payment tables' default partitions, counted up to 100,000 for each"
    );
    describe_counter!(
        "payment_writer_audit_records_total",
        "Records that the audit read again behind the cursors, by result"
    );
    describe_counter!(
        "payment_writer_audit_dropped_offsets_total",
        "Offsets dropped from the audit: too many waited, they could not be read, or they left the log"
    );
    describe_counter!("payment_writer_audit_errors_total", "Failed requests of the audit, by dependency");
    describe_gauge!(
        "payment_writer_audit_waiting_offsets",
        "Offsets that the cursors have passed and that wait for the audit"
    );
    describe_gauge!(
        "payment_writer_audit_behind_seconds",
        Unit::Seconds,
        "Age of the oldest offset that waits for the audit, or of the oldest suspect"
    );
    describe_gauge!(
        "payment_writer_audit_suspects",
        "Records that the claims do not account for and that are being examined"
    );
    describe_gauge!("payment_writer_build_info", "1, with version and group as labels");
    metrics_process::Collector::default().describe();
    begin_at_zero();
}

/// Creates the counters of rare events with value 0: Prometheus does not see an increase of a counter that
/// first appears with value 1.
fn begin_at_zero() {
    for class in SQLSTATE_CLASSES.into_iter().chain(["cursor", "other", "connection"]) {
        counter!("payment_writer_database_errors_total", "sqlstate_class" => class).increment(0);
    }
    for reason in Reason::ALL {
        counter!("payment_writer_dead_letters_total", "reason" => reason.as_str()).increment(0);
    }
    for kind in ["assigned", "revoked", "lost"] {
        counter!("payment_writer_rebalances_total", "kind" => kind).increment(0);
    }
    for name in ["written", "redelivered", "duplicate", "dead_lettered"] {
        outcome(name).increment(0);
    }
    for topic in OutputTopic::ALL {
        published(topic).increment(0);
    }
    for class in FailureClass::VARIANTS {
        kafka_errors(*class).increment(0);
    }
    for result in AuditResult::ALL {
        audited(result).increment(0);
    }
    for client in ["producer", "reader"] {
        counter!("payment_writer_kafka_throttled_milliseconds_total", "client" => client).increment(0);
    }
    for dependency in ["broker", "database"] {
        counter!("payment_writer_audit_errors_total", "dependency" => dependency).increment(0);
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

fn published(topic: OutputTopic) -> Counter {
    counter!("payment_writer_published_total", "topic" => topic.label())
}

fn kafka_errors(class: FailureClass) -> Counter {
    counter!("payment_writer_kafka_errors_total", "class" => class.as_str())
}

/// Sets the gauges that are computed at each scrape.
pub fn scraped(missing: &BTreeMap<&'static str, String>, oldest_pending_ms: i64) {
    gauge!("payment_writer_ready").set(f64::from(u8::from(missing.is_empty())));
    for what in ["database", "broker", "group"] {
        gauge!("payment_writer_missing", "what" => what).set(f64::from(u8::from(missing.contains_key(what))));
    }
    gauge!("payment_writer_oldest_pending_seconds").set(oldest_pending_ms as f64 / 1_000.0);
    if let Some(bytes) = memory::recent_limit_bytes() {
        gauge!("payment_writer_memory_limit_bytes").set(bytes as f64);
    }
}

/// Whether the process backs off at its start, before there are lanes; exported as lane 0.
pub fn breaker_at_start(dependency: &'static str, is_open: bool) {
    gauge!("payment_writer_breaker_open", "dependency" => dependency, "lane" => "0")
        .set(f64::from(u8::from(is_open)));
}

/// Resets the gauges of lanes when no lane has a partition any more.
pub fn lanes_left(lanes: usize) {
    (0..lanes).map(LaneMetrics::new).for_each(drop);
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

/// Metric handles of a lane.
pub struct LaneMetrics {
    written: Counter,
    redelivered: Counter,
    duplicate: Counter,
    dead_lettered: Counter,
    published: [Counter; 3],
    batches: Counter,
    batch_records: Histogram,
    batch_bytes: Histogram,
    phases: [Histogram; 4],
    claim: Histogram,
    copy: Histogram,
    commit: Histogram,
    probed: Counter,
    spared: Counter,
    end_to_end: Histogram,
    assigned: Gauge,
    halted: Gauge,
    fetch_gaps: Counter,
    fetch_failures: Counter,
    fetch_clients_renewed: Counter,
    resets: Counter,
    database_up: Gauge,
    broker_up: Gauge,
    database_breaker: Gauge,
    broker_breaker: Gauge,
    replayed: Counter,
}

fn outcome(name: &'static str) -> Counter {
    counter!("payment_writer_records_total", "outcome" => name)
}

impl LaneMetrics {
    /// Creates the handles of lane `index`, which has no partitions yet.
    pub fn new(index: usize) -> Self {
        let lane = index.to_string();
        let step = |step: &'static str| histogram!("payment_writer_database_step_seconds", "step" => step);
        let older = |probe: &'static str| counter!("payment_writer_claims_older_total", "probe" => probe);
        let gauge_of = |name: &'static str| gauge!(name, "lane" => lane.clone());
        let breaker_of = |dependency: &'static str| gauge!("payment_writer_breaker_open", "dependency" => dependency, "lane" => lane.clone());
        let lane = Self {
            written: outcome("written"),
            redelivered: outcome("redelivered"),
            duplicate: outcome("duplicate"),
            dead_lettered: outcome("dead_lettered"),
            published: OutputTopic::ALL.map(published),
            batches: counter!("payment_writer_batches_total", "lane" => lane.clone()),
            batch_records: histogram!("payment_writer_batch_records"),
            batch_bytes: histogram!("payment_writer_batch_bytes"),
            phases: LanePhase::ALL.map(|p| histogram!("payment_writer_phase_seconds", "phase" => p.label())),
            claim: step("claim"),
            copy: step("copy"),
            commit: step("commit"),
            probed: older("probed"),
            spared: older("spared"),
            end_to_end: histogram!("payment_writer_end_to_end_seconds"),
            assigned: gauge_of("payment_writer_partitions_assigned"),
            halted: gauge_of("payment_writer_partitions_halted"),
            fetch_gaps: counter!("payment_writer_fetch_gaps_total", "lane" => lane.clone()),
            fetch_failures: counter!("payment_writer_fetch_failures_total", "lane" => lane.clone()),
            fetch_clients_renewed: counter!("payment_writer_fetch_clients_renewed_total", "lane" => lane.clone()),
            resets: counter!("payment_writer_lane_resets_total", "lane" => lane.clone()),
            database_up: gauge_of("payment_writer_database_up"),
            broker_up: gauge_of("payment_writer_broker_up"),
            database_breaker: breaker_of("database"),
            broker_breaker: breaker_of("broker"),
            replayed: counter!("payment_writer_replayed_records_total"),
        };
        lane.assigned(0, 0);
        lane.at_rest();
        lane
    }

    /// Sets the numbers of assigned and halted partitions of the lane.
    pub fn assigned(&self, assigned: usize, halted: usize) {
        self.assigned.set(assigned as f64);
        self.halted.set(halted as f64);
    }

    /// Counts a gap: the client skipped records.
    pub fn fetch_gap(&self) {
        self.fetch_gaps.increment(1);
    }

    /// Counts a failed fetch of a partition.
    pub fn fetch_failed(&self) {
        self.fetch_failures.increment(1);
    }

    /// Counts a replaced fetch client.
    pub fn fetch_silent(&self) {
        self.fetch_clients_renewed.increment(1);
    }

    /// Counts a reset: the lane dropped what it held.
    pub fn reset(&self) {
        self.resets.increment(1);
    }

    /// Sets whether the broker answers.
    pub fn broker_up(&self, is_up: bool) {
        self.broker_up.set(f64::from(u8::from(is_up)));
        self.broker_breaker.set(f64::from(u8::from(!is_up)));
    }

    /// Resets the dependency gauges of a lane without partitions: both up, no backoff.
    pub fn at_rest(&self) {
        self.database_up(true);
        self.broker_up(true);
    }

    /// Counts a failed Kafka request.
    pub fn kafka_error(&self, class: FailureClass) {
        kafka_errors(class).increment(1);
    }

    /// Sets whether the database answers.
    pub fn database_up(&self, is_up: bool) {
        self.database_up.set(f64::from(u8::from(is_up)));
        self.database_breaker.set(f64::from(u8::from(!is_up)));
    }

    /// Counts a database error; `None` means that the connection broke without an SQLSTATE.
    pub fn database_error(&self, sqlstate: Option<&str>) {
        let class = sqlstate.map_or("connection", sqlstate_label);
        counter!("payment_writer_database_errors_total", "sqlstate_class" => class).increment(1);
    }

    /// Records the time spent in a phase.
    pub fn phase(&self, phase: LanePhase, took: Duration) {
        if let Some(histogram) = self.phases.get(phase as usize) {
            histogram.record(took.as_secs_f64());
        }
    }

    /// Counts a closed batch.
    pub fn batch(&self, records: usize, bytes: usize) {
        self.batches.increment(1);
        self.batch_records.record(records as f64);
        self.batch_bytes.record(bytes as f64);
    }

    /// Records the steps of a database transaction.
    pub fn write_stats(&self, times: &WriteStats) {
        self.claim.record(times.claim.as_secs_f64());
        self.copy.record(times.copy.as_secs_f64());
        self.commit.record(times.commit.as_secs_f64());
        self.probed.increment(times.claims_probed);
        self.spared.increment(times.claims_spared);
    }

    /// Counts completed records that had been replayed from dead letters.
    pub fn replayed(&self, count: usize) {
        self.replayed.increment(count as u64);
    }

    /// Counts completed records by outcome.
    pub fn outcomes(&self, outcomes: &OutcomeCounts) {
        self.written.increment(outcomes.written);
        self.redelivered.increment(outcomes.redelivered);
        self.duplicate.increment(outcomes.duplicate);
        self.dead_lettered.increment(outcomes.dead_lettered);
    }

    /// Counts the messages of a committed Kafka transaction.
    pub fn outputs(&self, counts: &OutputCounts) {
        for (counter, count) in self.published.iter().zip(counts.by_topic) {
            counter.increment(count);
        }
        for (reason, count) in Reason::ALL.iter().zip(counts.by_reason) {
            if count > 0 {
                counter!("payment_writer_dead_letters_total", "reason" => reason.as_str()).increment(count);
            }
        }
    }

    /// Records the end-to-end latency of a published batch.
    pub fn latency(&self, batch: Option<&Batch>) {
        const SAMPLES: usize = 16;
        let Some(batch) = batch else { return };
        let now = now();
        let weight = (batch.len() / SAMPLES).max(1);
        for at in batch.sample_timestamps(SAMPLES) {
            let seconds = (now.0 - at.0).max(0) as f64 / 1_000.0;
            self.end_to_end.record_many(seconds, weight);
        }
    }
}

/// Audit result of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AuditResult {
    /// It owns its message id.
    Owned,
    /// Another record with the same payload owns the id.
    Duplicate,
    /// Another record with another payload owns the id.
    Conflict,
    /// It violates a rule and needs no claim.
    Invalid,
    /// Its id has no owner, and it has a dead letter.
    DeadLetter,
    /// Its id has no owner, and an operator skipped it.
    GivenUp,
    /// Unknown: the claim may have been dropped.
    Unknown,
    /// Nothing accounts for it.
    Unaccounted,
}

impl AuditResult {
    const ALL: [Self; 8] = [
        Self::Owned,
        Self::Duplicate,
        Self::Conflict,
        Self::Invalid,
        Self::DeadLetter,
        Self::GivenUp,
        Self::Unknown,
        Self::Unaccounted,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Owned => "owned",
            Self::Duplicate => "duplicate",
            Self::Conflict => "conflict",
            Self::Invalid => "invalid",
            Self::DeadLetter => "dead_letter",
            Self::GivenUp => "given_up",
            Self::Unknown => "unknown",
            Self::Unaccounted => "unaccounted",
        }
    }
}

fn audited(result: AuditResult) -> Counter {
    counter!("payment_writer_audit_records_total", "result" => result.label())
}

/// Metric handles of the audit.
pub struct AuditMetrics {
    dropped: Counter,
    waiting: Gauge,
    behind: Gauge,
    suspects: Gauge,
}

impl Default for AuditMetrics {
    fn default() -> Self {
        Self {
            dropped: counter!("payment_writer_audit_dropped_offsets_total"),
            waiting: gauge!("payment_writer_audit_waiting_offsets"),
            behind: gauge!("payment_writer_audit_behind_seconds"),
            suspects: gauge!("payment_writer_audit_suspects"),
        }
    }
}

impl AuditMetrics {
    /// Counts records by result.
    pub fn count(&self, result: AuditResult, records: u64) {
        if records > 0 {
            audited(result).increment(records);
        }
    }

    /// Counts offsets that should have been audited and were not.
    pub fn dropped(&self, offsets: u64) {
        self.dropped.increment(offsets);
    }

    /// Counts a failed request to a dependency.
    pub fn failed(&self, dependency: &'static str) {
        counter!("payment_writer_audit_errors_total", "dependency" => dependency).increment(1);
    }

    /// Sets the amount and age of waiting work.
    pub fn behind(&self, offsets: u64, oldest: Duration, suspects: usize) {
        self.waiting.set(offsets as f64);
        self.behind.set(oldest.as_secs_f64());
        self.suspects.set(suspects as f64);
    }
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
