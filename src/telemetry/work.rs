//! What the lanes of this process did since its start: latencies, and time by phase. Never reset; whoever wants a
//! rate takes differences. And what they do now.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::activity::LaneActivity;

/// Phases of a lane's work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
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
    /// All phases.
    pub const ALL: [Self; 4] = [Self::Waiting, Self::Assembling, Self::Database, Self::Kafka];
}

/// Bounds of latencies grow by a quarter of a power of two, from 1 ms to 4.6 h.
const LATENCY_BUCKETS: usize = 96;
const BUCKETS_PER_DOUBLING: f64 = 4.0;

/// Sums that the lanes add to.
pub struct Work {
    latency: [AtomicU64; LATENCY_BUCKETS],
    phases: [AtomicU64; LanePhase::ALL.len()],
    activities: Mutex<BTreeMap<usize, Arc<LaneActivity>>>,
}

/// The sums at one time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkSums {
    latency: [u64; LATENCY_BUCKETS],
    /// Nanoseconds by phase, of all lanes.
    phases: [u64; LanePhase::ALL.len()],
}

impl Default for Work {
    fn default() -> Self {
        Self {
            latency: std::array::from_fn(|_| AtomicU64::new(0)),
            phases: Default::default(),
            activities: Mutex::default(),
        }
    }
}

impl Work {
    /// Adds records with the same latency.
    pub fn latency(&self, seconds: f64, records: u64) {
        if let Some(bucket) = self.latency.get(bucket_of(seconds)) {
            bucket.fetch_add(records, Ordering::Relaxed);
        }
    }

    /// Adds time of a lane.
    pub fn phase(&self, phase: LanePhase, took: Duration) {
        if let Some(sum) = self.phases.get(phase as usize) {
            sum.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// What lane `index` does.
    pub fn activity(&self, index: usize) -> Arc<LaneActivity> {
        let mut activities = self.activities.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(activities.entry(index).or_default())
    }

    /// The sums now.
    pub fn sums(&self) -> WorkSums {
        let load = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        WorkSums { latency: self.latency.each_ref().map(load), phases: self.phases.each_ref().map(load) }
    }
}

impl WorkSums {
    /// Median and 99th percentile in seconds, exact to a fifth, of the records since `before`; `None` without
    /// records.
    pub fn latency_since(&self, before: &Self) -> Option<[f32; 2]> {
        let pairs = self.latency.iter().zip(&before.latency);
        let counts: Vec<u64> = pairs.map(|(after, before)| after - before).collect();
        Some([quantile(&counts, 0.5)?, quantile(&counts, 0.99)?])
    }

    /// Seconds by phase since `before`, of all lanes, in the order of [`LanePhase::ALL`].
    pub fn phases_since(&self, before: &Self) -> [f64; LanePhase::ALL.len()] {
        let mut seconds = [0.0; LanePhase::ALL.len()];
        for (seconds, (after, before)) in seconds.iter_mut().zip(self.phases.iter().zip(&before.phases)) {
            *seconds = (after - before) as f64 / 1e9;
        }
        seconds
    }
}

fn bucket_of(seconds: f64) -> usize {
    let doublings = (seconds * 1_000.0).max(1.0).log2();
    // Saturates.
    ((doublings * BUCKETS_PER_DOUBLING) as usize).min(LATENCY_BUCKETS - 1)
}

/// The middle of a bucket.
fn seconds_of(bucket: usize) -> f64 {
    ((bucket as f64 + 0.5) / BUCKETS_PER_DOUBLING).exp2() / 1_000.0
}

fn quantile(counts: &[u64], share: f64) -> Option<f32> {
    let total: u64 = counts.iter().sum();
    let rank = (total as f64 * share).ceil() as u64;
    let mut reached = 0;
    let bucket = counts.iter().position(|count| {
        reached += count;
        reached >= rank
    })?;
    (total > 0).then(|| seconds_of(bucket) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_a_fifth_and_absent_without_records() {
        let mut counts = [0; LATENCY_BUCKETS];
        assert_eq!(quantile(&counts, 0.5), None);
        for seconds in [0.0, 0.001, 0.0123, 1.7, 299.0, 15_000.0, 1e9, f64::NAN] {
            counts = [0; LATENCY_BUCKETS];
            counts[bucket_of(seconds)] = 1;
            let found = f64::from(quantile(&counts, 0.99).unwrap());
            let expected = if seconds.is_nan() { 0.001 } else { seconds.clamp(0.001, 15_000.0) };
            assert!((expected / 1.2..expected * 1.2).contains(&found), "{seconds}: {found}");
        }
    }
}
