//! Backoff with jitter towards one dependency, and one log line when its state changes, though not too many of them.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::Instant;

use crate::disposition::FailureClass;
use crate::logging::RateLimited;

const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// While somebody waits for a dependency to come back, it is asked at least this often: the longest
/// recovery is bounded by it.
const BACKOFF_PASSING_MAX: Duration = Duration::from_secs(5);
/// What a person has to mend takes longer.
const BACKOFF_SYSTEMIC_MAX: Duration = Duration::from_secs(10);

/// It may come and go many times a minute; the first times are told.
const LINES_MAX: u32 = 5;
const LINES_PER: Duration = Duration::from_secs(60);

struct Down {
    class: FailureClass,
    since: Instant,
    /// Whether a line says that it is down, for this class.
    is_told: bool,
    /// Whether one says so for any class: then one has to say when that is over.
    was_told: bool,
}

/// The state of one dependency as one lane sees it.
pub struct Breaker {
    name: &'static str,
    lane: usize,
    down: Option<Down>,
    away: RateLimited,
    /// Apart: what a person has to mend is told, however often the rest flaps.
    blocked: RateLimited,
    failures: u32,
    due_at: Instant,
    jitter: ChaCha8Rng,
}

impl Breaker {
    /// A dependency that is believed to answer.
    pub fn new(name: &'static str, lane: usize) -> Self {
        let jitter = ChaCha8Rng::seed_from_u64(rand::random());
        Self {
            name,
            lane,
            down: None,
            away: RateLimited::new(LINES_MAX, LINES_PER),
            blocked: RateLimited::new(LINES_MAX, LINES_PER),
            failures: 0,
            due_at: Instant::now(),
            jitter,
        }
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
        if let Some(down) = self.down.take().filter(|down| down.was_told) {
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
        let limit = match class {
            FailureClass::Systemic | FailureClass::Record => &self.blocked,
            FailureClass::Passing | FailureClass::Fenced => &self.away,
        };
        let before = self.down.as_ref();
        let suppressed = match before.filter(|down| down.class == class) {
            Some(down) if down.is_told => return,
            // It was left out, and is still so.
            Some(_) => limit.pass_late(),
            None => limit.pass(),
        };
        self.down = Some(Down {
            class,
            since: before.map_or_else(Instant::now, |down| down.since),
            is_told: suppressed.is_some(),
            was_told: suppressed.is_some() || before.is_some_and(|down| down.was_told),
        });
        let Some(suppressed) = suppressed else { return };
        match class {
            FailureClass::Systemic | FailureClass::Record => tracing::error!(
                lane = self.lane,
                dependency = self.name,
                doing,
                error = message,
                suppressed,
                "blocked until somebody mends this; nothing is lost, retrying with backoff"
            ),
            FailureClass::Passing | FailureClass::Fenced => tracing::warn!(
                lane = self.lane,
                dependency = self.name,
                doing,
                error = message,
                suppressed,
                "does not answer; nothing is lost, retrying with backoff"
            ),
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{Event, Level, Subscriber};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    use super::*;

    #[derive(Clone, Default)]
    struct Levels(Arc<Mutex<Vec<Level>>>);

    impl<S: Subscriber> Layer<S> for Levels {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(*event.metadata().level());
        }
    }

    #[test]
    fn a_dependency_that_comes_and_goes_is_told_of_so_often_and_no_more() {
        let told = Levels::default();
        let count = |level: Level| told.0.lock().unwrap().iter().filter(|found| **found == level).count();
        let subscriber = tracing_subscriber::registry().with(told.clone());
        tracing::subscriber::with_default(subscriber, || {
            let mut breaker = Breaker::new("database", 0);
            for _ in 0..50 {
                for _ in 0..3 {
                    breaker.failed(FailureClass::Passing, "asking", "no");
                }
                breaker.succeeded();
            }
            assert_eq!((count(Level::WARN), count(Level::INFO)), (5, 5));

            // What a person has to mend is told all the same, and that it is over.
            breaker.failed(FailureClass::Passing, "asking", "no");
            breaker.failed(FailureClass::Systemic, "asking", "no such table");
            breaker.failed(FailureClass::Systemic, "asking", "no such table");
            breaker.succeeded();
            assert_eq!((count(Level::WARN), count(Level::INFO), count(Level::ERROR)), (5, 6, 1));
        });
    }
}
