//! Rate limit for log lines.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Allows a number of lines per period and counts the suppressed ones. Each logging site has its own, usually
/// a `static`.
#[derive(Debug)]
pub struct RateLimited {
    lines_max: u32,
    per: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl RateLimited {
    /// Creates a limit of `lines_max` lines per `per`.
    pub const fn new(lines_max: u32, per: Duration) -> Self {
        let state = State { since: None, lines: 0, suppressed: 0 };
        Self { lines_max, per, state: Mutex::new(state) }
    }

    /// Whether a line may be written now: returns the number of lines suppressed since the last one, or
    /// `None`.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now(), false)
    }

    /// Like [`pass`](Self::pass), for a suppressed line that is tried again until it can be written. It
    /// counts as suppressed once, however often it is tried, and not at all when it is written.
    pub fn pass_late(&self) -> Option<u64> {
        self.pass_at(Instant::now(), true)
    }

    /// Counts lines as suppressed without trying each.
    pub fn leave_out(&self, lines: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.suppressed = state.suppressed.saturating_add(lines);
    }

    fn pass_at(&self, now: Instant, is_late: bool) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.since.is_none_or(|since| now.saturating_duration_since(since) >= self.per) {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines >= self.lines_max {
            state.suppressed = state.suppressed.saturating_add(u64::from(!is_late));
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed).saturating_sub(u64::from(is_late)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_bounded_and_what_was_left_out_is_told() {
        static LIMIT: RateLimited = RateLimited::new(2, Duration::from_secs(10));
        let begin = Instant::now();
        let at = |seconds| LIMIT.pass_at(begin + Duration::from_secs(seconds), false);
        let late = |seconds| LIMIT.pass_at(begin + Duration::from_secs(seconds), true);
        assert_eq!((at(0), at(1), at(2), at(9)), (Some(0), Some(0), None, None));
        assert_eq!((at(10), at(11), at(12)), (Some(2), Some(0), None));
        assert_eq!(at(60), Some(1));
        assert_eq!((at(61), at(62), at(63), late(64), late(65)), (Some(0), None, None, None, None));
        assert_eq!(late(70), Some(1), "one was written at last, the other is suppressed");
        LIMIT.leave_out(7);
        assert_eq!(at(80), Some(7));
    }
}
