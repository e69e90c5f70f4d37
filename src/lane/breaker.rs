//! Backoff with jitter towards one dependency, and one log line when its state changes.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::Instant;

use crate::disposition::FailureClass;

const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// While somebody waits for a dependency to come back, it is asked at least this often: the longest
/// recovery is bounded by it.
const BACKOFF_PASSING_MAX: Duration = Duration::from_secs(5);
/// What a person has to mend takes longer.
const BACKOFF_SYSTEMIC_MAX: Duration = Duration::from_secs(10);

#[derive(Clone, PartialEq, Eq)]
struct Down {
    class: FailureClass,
    doing: String,
    since: Instant,
}

/// The state of one dependency as one lane sees it.
pub struct Breaker {
    name: &'static str,
    lane: usize,
    down: Option<Down>,
    failures: u32,
    due_at: Instant,
    jitter: ChaCha8Rng,
}

impl Breaker {
    /// A dependency that is believed to answer.
    pub fn new(name: &'static str, lane: usize) -> Self {
        let jitter = ChaCha8Rng::seed_from_u64(rand::random());
        Self { name, lane, down: None, failures: 0, due_at: Instant::now(), jitter }
    }

    /// Jitter that a test can repeat.
    pub fn seed(&mut self, seed: u64) {
        self.jitter = ChaCha8Rng::seed_from_u64(seed);
    }

    /// Whether it may be tried again.
    pub fn is_due(&self) -> bool {
        Instant::now() >= self.due_at
    }

    /// When it may be tried again.
    pub fn due_at(&self) -> Instant {
        self.due_at
    }

    /// It answered.
    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.due_at = Instant::now();
        if let Some(down) = self.down.take() {
            let seconds = down.since.elapsed().as_secs_f64();
            tracing::info!(
                lane = self.lane,
                dependency = self.name,
                after_seconds = seconds,
                "answers again, going on"
            );
        }
    }

    /// It failed: waits longer each time, and says so when what is wrong changed.
    pub fn failed(&mut self, class: FailureClass, doing: &str, message: &str) {
        self.delay_within(match class {
            FailureClass::Passing | FailureClass::Fenced => BACKOFF_PASSING_MAX,
            FailureClass::Systemic | FailureClass::Record => BACKOFF_SYSTEMIC_MAX,
        });
        let is_news = self.down.as_ref().is_none_or(|d| d.class != class);
        if is_news {
            match class {
                FailureClass::Systemic | FailureClass::Record => tracing::error!(
                    lane = self.lane,
                    dependency = self.name,
                    doing,
                    error = message,
                    "blocked until somebody mends this; nothing is lost, retrying with backoff"
                ),
                FailureClass::Passing | FailureClass::Fenced => tracing::warn!(
                    lane = self.lane,
                    dependency = self.name,
                    doing,
                    error = message,
                    "does not answer; nothing is lost, retrying with backoff"
                ),
            }
            let since = self.down.as_ref().map_or_else(Instant::now, |d| d.since);
            self.down = Some(Down { class, doing: doing.to_owned(), since });
        }
    }

    /// Waits a little longer than last time, without a change of state.
    pub fn delay(&mut self) {
        self.delay_within(BACKOFF_PASSING_MAX);
    }

    fn delay_within(&mut self, longest: Duration) {
        self.failures = self.failures.saturating_add(1);
        let exponent = self.failures.min(16) - 1;
        let full = BACKOFF_MIN.saturating_mul(1 << exponent).min(longest);
        // Half fixed, half random: instances that lost the same server do not come back as one.
        let jitter = self.jitter.random_range(0.5..=1.0);
        self.due_at = Instant::now() + full.mul_f64(jitter);
    }
}
