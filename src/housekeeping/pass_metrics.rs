//! Metrics of housekeeping.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use strum::VariantArray;

use super::{PassReport, Task};
use crate::domain::record::TimestampMs;

/// The metrics of housekeeping passes, generations and the horizon.
pub struct HousekeepingMetrics {
    live: Gauge,
    horizon: Gauge,
    is_held: Gauge,
    /// Start of the last complete pass, of any process, in seconds.
    pub last_pass: Gauge,
    seconds: Histogram,
    rotations: Counter,
    dropped: Counter,
    /// Number of rows in default partitions, which should be 0.
    pub default_rows: Gauge,
    /// Number of months after the current one that have their partitions.
    pub months_ahead: Gauge,
}

impl Default for HousekeepingMetrics {
    fn default() -> Self {
        Self {
            live: gauge!("payment_writer_generations_live"),
            horizon: gauge!("payment_writer_horizon_timestamp_seconds"),
            is_held: gauge!("payment_writer_horizon_held"),
            last_pass: gauge!("payment_writer_housekeeping_last_pass_timestamp_seconds"),
            seconds: histogram!("payment_writer_housekeeping_pass_seconds"),
            rotations: counter!("payment_writer_generation_rotations_total"),
            dropped: counter!("payment_writer_generations_dropped_total"),
            default_rows: gauge!("payment_writer_default_partition_rows"),
            months_ahead: gauge!("payment_writer_months_ahead"),
        }
    }
}

impl HousekeepingMetrics {
    /// Labels of generations by age: a small fixed set.
    const AGES: [&str; 4] = ["0", "1", "2", "3"];

    /// Sets rows and bytes of the live generations, the current one first; the fourth and older ones are
    /// added up.
    pub fn generations(&self, sizes: impl Iterator<Item = (i64, i64)>) {
        let mut by_age = [(0, 0); Self::AGES.len()];
        let mut count = 0;
        for (index, (rows, bytes)) in sizes.enumerate() {
            count += 1;
            if let Some(sum) = by_age.get_mut(index.min(Self::AGES.len() - 1)) {
                *sum = (sum.0 + rows, sum.1 + bytes);
            }
        }
        self.live.set(f64::from(count));
        for (age, (rows, bytes)) in Self::AGES.iter().zip(by_age) {
            gauge!("payment_writer_generation_rows", "age" => *age).set(rows as f64);
            gauge!("payment_writer_generation_bytes", "age" => *age).set(bytes as f64);
        }
    }

    /// Sets the horizon. With `None` (unknown) the last value stays and grows old.
    pub fn horizon(&self, at: Option<TimestampMs>) {
        self.is_held.set(f64::from(u8::from(at.is_none())));
        if let Some(at) = at {
            self.horizon.set(at.0 as f64 / 1_000.0);
        }
    }

    /// Sets which tasks failed in the last pass.
    pub fn failing(&self, tasks: &[String]) {
        for task in Task::VARIANTS {
            let name: &'static str = task.into();
            let is_failing = tasks.iter().any(|failed| failed == name);
            gauge!("payment_writer_housekeeping_failing", "task" => name)
                .set(f64::from(u8::from(is_failing)));
        }
    }

    /// Records a finished pass of this process.
    pub fn pass(&self, report: &PassReport) {
        self.seconds.record(report.took.as_secs_f64());
        self.rotations.increment(u64::from(report.rotated_to.is_some()));
        self.dropped.increment(report.gone().count() as u64);
    }
}
