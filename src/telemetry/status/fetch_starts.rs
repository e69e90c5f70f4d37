//! Fetch starts: reported by lanes through the status registry, taken by the audit. Bounded; never blocks a
//! lane.

use std::collections::VecDeque;

use crate::domain::record::{NextOffset, Partition};

/// Maximum number of fetch starts that wait for the audit, which takes them every second; beyond it the
/// oldest is dropped.
const STARTS_MAX: usize = 16_384;

/// Position at which fetching of a partition started, or at which a rebalance interrupted it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchStart {
    /// The partition.
    pub partition: Partition,
    /// Where fetching started, or the lane's position at the rebalance.
    pub position: NextOffset,
    /// `applied` at that time: records below it were decided earlier.
    pub applied: NextOffset,
}

/// Fetch starts that wait for the audit.
#[derive(Debug, Default)]
pub struct FetchStarts {
    is_enabled: bool,
    waiting: VecDeque<FetchStart>,
    dropped: u64,
}

impl FetchStarts {
    /// Enables recording; without it nothing is kept.
    pub fn enable(&mut self) {
        self.is_enabled = true;
    }

    /// Adds a fetch start.
    pub fn push(&mut self, start: FetchStart) {
        if !self.is_enabled {
            return;
        }
        if self.waiting.len() >= STARTS_MAX {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        self.waiting.push_back(start);
    }

    /// Takes all, and the number of those dropped since the last call.
    pub fn take(&mut self) -> (VecDeque<FetchStart>, u64) {
        (std::mem::take(&mut self.waiting), std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(position: i64) -> FetchStart {
        FetchStart { partition: Partition(0), position: NextOffset(position), applied: NextOffset(0) }
    }

    #[test]
    fn without_an_audit_nothing_is_kept_and_with_one_no_more_than_the_bound() {
        let mut starts = FetchStarts::default();
        starts.push(start(1));
        assert!(starts.take().0.is_empty());
        starts.enable();
        (0..STARTS_MAX as i64 + 3).for_each(|position| starts.push(start(position)));
        let (taken, dropped) = starts.take();
        assert_eq!((taken.len(), dropped), (STARTS_MAX, 3));
        assert_eq!(taken[0], start(3));
        assert_eq!(starts.take().1, 0);
    }
}
