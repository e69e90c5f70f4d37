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

/// When a line about a state that lasts is written: when its text changes, and once a day.
#[derive(Debug, Default)]
pub struct Repeated(Option<(String, Instant)>);

impl Repeated {
    const PER: Duration = Duration::from_secs(24 * 60 * 60);

    /// Whether the line is to be written now; [`written`](Self::written) records that it was.
    pub fn is_due(&self, text: &str) -> bool {
        self.0.as_ref().is_none_or(|(last, at)| last != text || at.elapsed() >= Self::PER)
    }

    /// Records that the line was written.
    pub fn written(&mut self, text: String) {
        self.0 = Some((text, Instant::now()));
    }

    /// The state has ended: the next line is written whatever its text.
    pub fn end(&mut self) {
        self.0 = None;
    }
}

/// When a line about a condition that usually passes within seconds is written: once it has lasted for
/// [`Self::LONG`], then as [`Repeated`].
#[derive(Debug, Default)]
pub struct Lasting {
    since: Option<Instant>,
    line: Repeated,
}

impl Lasting {
    const LONG: Duration = Duration::from_secs(10);

    /// Notes that the condition holds. Whether it has lasted for long and its line is to be written now.
    pub fn holds(&mut self, text: &str) -> bool {
        self.since.get_or_insert_with(Instant::now);
        let is_due = self.is_long() && self.line.is_due(text);
        if is_due {
            self.line.written(text.to_owned());
        }
        is_due
    }

    /// Whether the condition has lasted for [`Self::LONG`].
    pub fn is_long(&self) -> bool {
        self.since.is_some_and(|since| since.elapsed() >= Self::LONG)
    }

    /// Notes that the condition has ended. Returns how long it lasted if its line was written.
    pub fn ends(&mut self) -> Option<Duration> {
        let ended = std::mem::take(self);
        ended.line.0.and(ended.since).map(|since| since.elapsed())
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

    #[test]
    fn a_state_that_lasts_is_logged_when_it_changes_and_daily() {
        let mut line = Repeated::default();
        assert!(line.is_due("locked"));
        line.written("locked".to_owned());
        assert!(!line.is_due("locked") && line.is_due("refused"));
        line.0 = Instant::now().checked_sub(Repeated::PER).map(|at| ("locked".to_owned(), at));
        assert!(line.is_due("locked"));
        line.written("locked".to_owned());
        line.end();
        assert!(line.is_due("locked"));
    }

    #[test]
    fn a_condition_is_logged_when_it_has_lasted_for_long_and_when_it_changes() {
        let mut line = Lasting::default();
        assert!(!line.holds("no leader") && line.ends().is_none(), "it was short");
        let lasts = |line: &mut Lasting| line.since = Instant::now().checked_sub(Lasting::LONG);
        assert!(!line.holds("no leader"));
        lasts(&mut line);
        assert!(line.holds("no leader") && !line.holds("no leader") && line.holds("no broker"));
        assert!(line.ends().is_some_and(|lasted| lasted >= Lasting::LONG));
        assert!(!line.holds("no broker"), "it begins anew");
    }
}
