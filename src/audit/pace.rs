//! Pauses of the audit, which keep its CPU usage small regardless of the amount of work.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Length of the pause after each piece, as a multiple of the thread's CPU time for it. The client's threads
/// use nearly as much again, so the audit uses less than half a percent of one core.
const REST: u32 = 400;
/// During a backlog the CPU is needed for the pipeline and may be shared with others. Then the whole process
/// must have used this multiple of the thread's CPU time. With the client's threads, the audit uses two
/// thirds of a percent of the daemon's CPU time.
const WORK_BETWEEN: u32 = 300;
/// Lag in records from which on there is a backlog.
const BACKLOG: i64 = 10_000;
/// Maximum pause: after an unusually slow piece, or if the process hardly runs.
const REST_MAX: Duration = Duration::from_secs(30);
/// Interval at which a pause is checked.
const LOOK: Duration = Duration::from_millis(250);

/// CPU time used so far.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    thread: Duration,
    process: Duration,
}

impl Used {
    /// CPU time of this thread and of the whole process.
    pub fn now() -> Self {
        let used = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
        Self { thread: used(ClockId::ThreadCPUTime), process: used(ClockId::ProcessCPUTime) }
    }
}

/// Pause after a piece.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rest {
    /// The pause ends at this time, whatever was used.
    until: Instant,
    /// During a backlog, the pause also ends when the process has used this much CPU time.
    until_used: Option<Duration>,
}

impl Rest {
    /// Pause after a piece, from the CPU time before and after it and the lag of the process in records.
    pub fn after(before: Used, after: Used, lag: i64, now: Instant) -> Self {
        let ran = after.thread.saturating_sub(before.thread);
        if lag < BACKLOG {
            return Self { until: now + ran.saturating_mul(REST).min(REST_MAX), until_used: None };
        }
        let until_used = after.process.saturating_add(ran.saturating_mul(WORK_BETWEEN));
        Self { until: now + REST_MAX, until_used: Some(until_used) }
    }

    /// Time until the pause ends or must be checked again; `None` if it is over.
    pub fn left(self, used: Used, now: Instant) -> Option<Duration> {
        let left = self.until.saturating_duration_since(now);
        let is_over = left.is_zero() || self.until_used.is_some_and(|until| used.process >= until);
        (!is_over).then(|| left.min(LOOK))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(thread_ms: u64, process_ms: u64) -> Used {
        Used { thread: Duration::from_millis(thread_ms), process: Duration::from_millis(process_ms) }
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn without_a_backlog_it_rests_in_proportion_to_its_own_work() {
        let now = Instant::now();
        let rest = Rest::after(used(10, 50), used(12, 52), BACKLOG - 1, now);
        assert_eq!(rest.left(used(12, 52), now), Some(LOOK));
        // However much the process uses.
        assert_eq!(rest.left(used(12, 90_000), now + ms(790)), Some(ms(10)));
        assert_eq!(rest.left(used(12, 52), now + ms(800)), None);
    }

    #[test]
    fn in_a_backlog_it_rests_until_the_process_has_done_its_work() {
        let now = Instant::now();
        let rest = Rest::after(used(10, 50), used(12, 52), BACKLOG, now);
        assert_eq!(rest.left(used(12, 651), now + ms(5_000)), Some(LOOK));
        assert_eq!(rest.left(used(12, 652), now + ms(300)), None);
    }

    #[test]
    fn no_rest_is_longer_than_its_bound() {
        let now = Instant::now();
        for lag in [0, BACKLOG] {
            let rest = Rest::after(used(0, 0), used(900, 900), lag, now);
            assert!(rest.left(used(900, 900), now + REST_MAX - ms(1)).is_some(), "{lag}");
            assert_eq!(rest.left(used(900, 900), now + REST_MAX), None, "{lag}");
        }
    }

    #[test]
    fn a_piece_that_took_no_time_needs_no_rest() {
        let now = Instant::now();
        for lag in [0, BACKLOG] {
            assert_eq!(Rest::after(used(5, 9), used(5, 9), lag, now).left(used(5, 9), now), None, "{lag}");
        }
    }

    #[test]
    fn what_is_used_grows_with_work() {
        let before = Used::now();
        let mut sum = 0_u64;
        while Used::now().thread <= before.thread || Used::now().process <= before.process {
            sum = std::hint::black_box(sum + 1);
        }
    }
}
