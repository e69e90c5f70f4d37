//! Metrics of a lane.

use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::{by_outcome, dead_letters, flag, kafka_errors, now, outcomes, published};
use crate::domain::batch::{Batch, OutcomeCounts};
use crate::domain::outcome::{FailureClass, sqlstate_label};
use crate::domain::publication::{OutputCounts, OutputTopic};
use crate::domain::wire::Reason;
use crate::ports::WriteStats;
use crate::telemetry::activity::{InStep, LaneActivity, LaneStep};
use crate::telemetry::work::{LanePhase, Work};

/// Metric handles of a lane.
pub struct LaneMetrics {
    outcomes: [Counter; 4],
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
    activity: Arc<LaneActivity>,
    work: Arc<Work>,
    assigned: Gauge,
    halted: Gauge,
    /// Fetch gaps: the client skipped records.
    pub fetch_gaps: Counter,
    /// Failed fetches of a partition.
    pub fetch_failures: Counter,
    /// Replaced fetch clients.
    pub fetch_clients_renewed: Counter,
    /// Resets: the lane dropped what it held.
    pub resets: Counter,
    database_up: Gauge,
    broker_up: Gauge,
    database_breaker: Gauge,
    broker_breaker: Gauge,
    /// Completed records that had been replayed from dead letters.
    pub replayed: Counter,
}

impl LaneMetrics {
    /// Creates the handles of lane `index`, which has no partitions yet.
    pub fn new(index: usize, work: Arc<Work>) -> Self {
        let lane = index.to_string();
        let step = |step: &'static str| histogram!("payment_writer_database_step_seconds", "step" => step);
        let older = |probe: &'static str| counter!("payment_writer_claims_older_total", "probe" => probe);
        let gauge_of = |name: &'static str| gauge!(name, "lane" => lane.clone());
        let counter_of = |name: &'static str| counter!(name, "lane" => lane.clone());
        let breaker_of = |dependency: &'static str| gauge!("payment_writer_breaker_open", "dependency" => dependency, "lane" => lane.clone());
        let lane = Self {
            outcomes: outcomes(),
            published: OutputTopic::ALL.map(published),
            batches: counter_of("payment_writer_batches_total"),
            batch_records: histogram!("payment_writer_batch_records"),
            batch_bytes: histogram!("payment_writer_batch_bytes"),
            phases: LanePhase::ALL
                .map(|phase| histogram!("payment_writer_phase_seconds", "phase" => <&str>::from(phase))),
            claim: step("claim"),
            copy: step("copy"),
            commit: step("commit"),
            probed: older("probed"),
            spared: older("spared"),
            end_to_end: histogram!("payment_writer_end_to_end_seconds"),
            activity: work.activity(index),
            work,
            assigned: gauge_of("payment_writer_partitions_assigned"),
            halted: gauge_of("payment_writer_partitions_halted"),
            fetch_gaps: counter_of("payment_writer_fetch_gaps_total"),
            fetch_failures: counter_of("payment_writer_fetch_failures_total"),
            fetch_clients_renewed: counter_of("payment_writer_fetch_clients_renewed_total"),
            resets: counter_of("payment_writer_lane_resets_total"),
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

    /// Sets whether the broker answers.
    pub fn broker_up(&self, is_up: bool) {
        self.broker_up.set(flag(is_up));
        self.broker_breaker.set(flag(!is_up));
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
        self.database_up.set(flag(is_up));
        self.database_breaker.set(flag(!is_up));
    }

    /// Counts a database error; `None` means that the connection broke without an SQLSTATE.
    pub fn database_error(&self, sqlstate: Option<&str>) {
        let class = sqlstate.map_or("connection", sqlstate_label);
        counter!("payment_writer_database_errors_total", "sqlstate_class" => class).increment(1);
    }

    /// The lane is in this step until the returned value is dropped.
    pub fn begin(&self, step: LaneStep) -> InStep {
        self.activity.begin(step)
    }

    /// Records the time spent in a phase.
    pub fn phase(&self, phase: LanePhase, took: Duration) {
        self.work.phase(phase, took);
        if let Some(histogram) = self.phases.get(phase as usize) {
            histogram.record(took.as_secs_f64());
        }
    }

    /// Counts a closed batch.
    pub fn batch(&self, records: usize, bytes: usize) {
        self.activity.set_records(records);
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

    /// Counts completed records by outcome.
    pub fn outcomes(&self, outcomes: &OutcomeCounts) {
        for (counter, count) in self.outcomes.iter().zip(by_outcome(outcomes)) {
            counter.increment(count);
        }
    }

    /// Counts the messages of a committed Kafka transaction.
    pub fn outputs(&self, counts: &OutputCounts) {
        for (counter, count) in self.published.iter().zip(counts.by_topic) {
            counter.increment(count);
        }
        for (reason, count) in Reason::ALL.iter().zip(counts.by_reason).filter(|(_, count)| *count > 0) {
            dead_letters(*reason).increment(count);
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
            self.work.latency(seconds, weight as u64);
        }
    }
}
