//! What each lane does now, and since when.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use super::metrics::now;
use crate::domain::record::TimestampMs;

/// A step of a lane. The Postgres transaction of one batch and the Kafka transaction of the one before run side by
/// side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum LaneStep {
    /// Waiting for records, for a batch to fill, or for the next try.
    Waiting,
    /// Parsing and encoding.
    Assembling,
    /// The Postgres transaction.
    Database,
    /// The Kafka transaction.
    Kafka,
    /// Finding where to continue, or starting and stopping to fetch.
    Recovering,
    /// Ending what its transactional producer left open.
    StartingProducer,
    /// Finishing what it has of revoked partitions.
    Revoking,
}

const STEPS: usize = <LaneStep as strum::VariantArray>::VARIANTS.len();

/// The steps that a lane is in.
#[derive(Default)]
pub struct LaneActivity {
    /// When each step began; 0 while the lane is not in it.
    began: [AtomicI64; STEPS],
    records: AtomicUsize,
}

impl LaneActivity {
    /// The lane is in this step until the returned value is dropped; then in what it was in before.
    pub fn begin(self: &Arc<Self>, step: LaneStep) -> InStep {
        let mut in_step = InStep { activity: Arc::clone(self), step, before: 0 };
        in_step.before = in_step.set(now().0);
        in_step
    }

    /// Sets the number of records of the batch that was closed last.
    pub fn set_records(&self, records: usize) {
        self.records.store(records, Ordering::Relaxed);
    }

    /// The number of records of the batch that was closed last.
    pub fn records(&self) -> usize {
        self.records.load(Ordering::Relaxed)
    }

    /// The step that began first, of those that the lane is in; waiting only if it is in no other.
    pub fn step(&self) -> Option<(LaneStep, TimestampMs)> {
        let began = |step: &LaneStep| {
            let began = self.began.get(*step as usize)?.load(Ordering::Relaxed);
            (began > 0).then_some((*step, TimestampMs(began)))
        };
        let steps = <LaneStep as strum::VariantArray>::VARIANTS.iter().filter_map(began);
        steps.min_by_key(|(step, began)| (*step == LaneStep::Waiting, *began))
    }
}

/// A step that lasts.
#[must_use]
pub struct InStep {
    activity: Arc<LaneActivity>,
    step: LaneStep,
    /// When the same step began around this one; 0 if it did not.
    before: i64,
}

impl InStep {
    fn set(&self, began: i64) -> i64 {
        self.activity.began.get(self.step as usize).map_or(0, |slot| slot.swap(began, Ordering::Relaxed))
    }
}

impl Drop for InStep {
    fn drop(&mut self) {
        self.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_in_the_step_that_began_first_and_waits_only_if_in_no_other() {
        let activity = Arc::new(LaneActivity::default());
        let step = |activity: &LaneActivity| activity.step().map(|(step, _)| step);
        assert_eq!(step(&activity), None);
        let waiting = activity.begin(LaneStep::Waiting);
        assert_eq!(step(&activity), Some(LaneStep::Waiting));
        let kafka = activity.begin(LaneStep::Kafka);
        kafka.set(5);
        let database = activity.begin(LaneStep::Database);
        assert_eq!(activity.step(), Some((LaneStep::Kafka, TimestampMs(5))));
        drop((waiting, kafka));
        database.set(7);
        drop(activity.begin(LaneStep::Database));
        assert_eq!(activity.step(), Some((LaneStep::Database, TimestampMs(7))), "also after a nested one");
        drop(database);
        assert_eq!(step(&activity), None);
    }
}
