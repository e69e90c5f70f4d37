//! Number of records due at a time.

use std::time::Duration;

/// Interval between bursts at an even rate.
const TICK: Duration = Duration::from_millis(1);

/// Optional rate and optional end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Total number of records; `None`: no end.
    pub(super) total: Option<u64>,
    per_second: Option<f64>,
}

impl Pace {
    pub(super) fn new(count: Option<u64>, per_second: Option<f64>, duration: Option<Duration>) -> Self {
        let by_time = per_second.zip(duration).map(|(rate, time)| (rate * time.as_secs_f64()).round() as u64);
        Self { total: count.or(by_time), per_second }
    }

    /// Number of records that should have been sent by now; a sender that falls behind catches up.
    pub(super) fn due(self, elapsed: Duration) -> u64 {
        let due = self.per_second.map_or(u64::MAX, |rate| (rate * elapsed.as_secs_f64()) as u64);
        due.min(self.total.unwrap_or(u64::MAX))
    }

    /// How long until the next record is due, limited so that signals are noticed.
    pub(super) fn pause(self, sent: u64, elapsed: Duration) -> Option<Duration> {
        let rate = self.per_second?;
        if self.due(elapsed) > sent {
            return None;
        }
        let next = (sent + 1) as f64 / rate - elapsed.as_secs_f64();
        Some(Duration::try_from_secs_f64(next).unwrap_or_default().clamp(TICK, 100 * TICK))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_met_at_every_moment_and_in_total() {
        let pace = Pace::new(None, Some(1_500.0), Some(Duration::from_secs(4)));
        assert_eq!(pace.total, Some(6_000));
        for (millis, due) in [(0, 0), (1, 1), (2, 3), (1_000, 1_500), (3_999, 5_998), (9_000, 6_000)] {
            assert_eq!(pace.due(Duration::from_millis(millis)), due, "{millis} ms");
        }
    }

    #[test]
    fn without_a_rate_everything_is_due_at_once() {
        let pace = Pace::new(Some(10), None, None);
        assert_eq!(pace.due(Duration::ZERO), 10);
        assert_eq!(pace.pause(0, Duration::ZERO), None);
    }

    #[test]
    fn a_slow_rate_pauses_until_the_next_record_but_listens_meanwhile() {
        let pace = Pace::new(None, Some(0.5), None);
        assert_eq!(pace.total, None);
        assert_eq!(pace.pause(0, Duration::ZERO), Some(Duration::from_millis(100)));
        assert_eq!(pace.pause(0, Duration::from_millis(1_950)), Some(Duration::from_millis(50)));
        assert_eq!(pace.pause(0, Duration::from_secs(2)), None);
    }
}
