//! Fetch starts: reported by lanes through the status registry, taken by the audit. Bounded; never blocks a
//! lane.

use std::collections::VecDeque;

use crate::domain::record::{NextOffset, Partition};

/// Maximum number of fetch starts that wait for the audit, which takes them every second; beyond it the
/// oldest is dropped.
const BEGINS_MAX: usize = 16_384;

/// Position at which fetching of a partition started, or at which a rebalance interrupted it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Begin {
    /// The partition.
    pub partition: Partition,
    /// Where fetching started, or the lane's position at the rebalance.
    pub position: NextOffset,
    /// `applied` at that time: records below it were decided earlier.
    pub applied: NextOffset,
}

/// Fetch starts that wait for the audit.
#[derive(Debug, Default)]
pub struct Begins {
    is_wanted: bool,
    waiting: VecDeque<Begin>,
    dropped: u64,
}

impl Begins {
    /// Enables recording; without it nothing is kept.
    pub fn want(&mut self) {
        self.is_wanted = true;
    }

    /// Adds a fetch start.
    pub fn push(&mut self, begin: Begin) {
        if !self.is_wanted {
            return;
        }
        if self.waiting.len() >= BEGINS_MAX {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        self.waiting.push_back(begin);
    }

    /// Takes all, and the number of those dropped since the last call.
    pub fn take(&mut self) -> (VecDeque<Begin>, u64) {
        (std::mem::take(&mut self.waiting), std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(position: i64) -> Begin {
        Begin { partition: Partition(0), position: NextOffset(position), applied: NextOffset(0) }
    }

    #[test]
    fn without_an_audit_nothing_is_kept_and_with_one_no_more_than_the_bound() {
        let mut begins = Begins::default();
        begins.push(begin(1));
        assert!(begins.take().0.is_empty());
        begins.want();
        (0..BEGINS_MAX as i64 + 3).for_each(|position| begins.push(begin(position)));
        let (taken, dropped) = begins.take();
        assert_eq!((taken.len(), dropped), (BEGINS_MAX, 3));
        assert_eq!(taken[0], begin(3));
        assert_eq!(begins.take().1, 0);
    }
}
