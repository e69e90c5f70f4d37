//! Backoff with jitter for one dependency (database or broker), with a rate-limited log line for each change
//! of state.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::Instant;

use crate::domain::outcome::FailureClass;
use crate::telemetry::logging::RateLimited;

const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause after a transient failure. It bounds the time to recover once the dependency is back.
const BACKOFF_TRANSIENT_MAX: Duration = Duration::from_secs(5);
/// Longest pause after a failure that an operator has to fix.
const BACKOFF_PERSISTENT_MAX: Duration = Duration::from_secs(10);
/// For this long after a failed write, a read proves nothing: a standby answers reads, and a database that refuses
/// a row does, too. Longer than any pause between two writes.
const WRITE_FAILURE_COUNTS: Duration = Duration::from_secs(30);

/// A dependency may go away and come back many times a minute.
const LINES_MAX: u32 = 5;
const LINES_PER: Duration = Duration::from_secs(60);

struct Down {
    class: FailureClass,
    since: Instant,
    /// Whether the failure was logged with the present class.
    is_logged: bool,
    /// Whether it was logged with any class: then the end of the failure is logged, too.
    was_logged: bool,
}

/// The state of one dependency as one lane sees it.
pub struct Backoff {
    name: &'static str,
    lane: usize,
    down: Option<Down>,
    away: RateLimited,
    /// A limit of its own, so that transient failures cannot suppress lines about what an operator has to
    /// fix.
    blocked: RateLimited,
    failures: u32,
    write_failed_at: Option<Instant>,
    due_at: Instant,
    jitter: ChaCha8Rng,
}

impl Backoff {
    /// The state of a dependency that is up.
    pub fn new(name: &'static str, lane: usize) -> Self {
        let jitter = ChaCha8Rng::seed_from_u64(rand::random());
        Self {
            name,
            lane,
            down: None,
            away: RateLimited::new(LINES_MAX, LINES_PER),
            blocked: RateLimited::new(LINES_MAX, LINES_PER),
            failures: 0,
            write_failed_at: None,
            due_at: Instant::now(),
            jitter,
        }
    }

    /// Seeds the jitter, for reproducible tests.
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

    /// Notes that a write failed, besides [`failed`](Self::failed).
    pub fn write_failed(&mut self) {
        self.write_failed_at = Some(Instant::now());
    }

    /// Whether a successful read proves that the dependency is up.
    pub fn is_proved_by_a_read(&self) -> bool {
        self.write_failed_at.is_none_or(|at| at.elapsed() > WRITE_FAILURE_COUNTS)
    }

    /// Notes a success: the next call may follow at once.
    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.write_failed_at = None;
        self.due_at = Instant::now();
        if let Some(down) = self.down.take().filter(|down| down.was_logged) {
            let seconds = down.since.elapsed().as_secs_f64();
            tracing::info!(
                lane = self.lane,
                dependency = self.name,
                after_seconds = seconds,
                "works again, going on"
            );
        }
    }

    /// Notes a failure: waits longer each time, and logs when the class of the failure changed.
    pub fn failed(&mut self, class: FailureClass, doing: &str, message: &str) {
        self.delay_within(match class {
            FailureClass::Transient | FailureClass::Fenced => BACKOFF_TRANSIENT_MAX,
            FailureClass::Persistent | FailureClass::Record | FailureClass::Undecided => {
                BACKOFF_PERSISTENT_MAX
            }
        });
        let limit = match class {
            FailureClass::Persistent | FailureClass::Record | FailureClass::Undecided => &self.blocked,
            FailureClass::Transient | FailureClass::Fenced => &self.away,
        };
        let before = self.down.as_ref();
        let suppressed = match before.filter(|down| down.class == class) {
            Some(down) if down.is_logged => return,
            // This state was suppressed before: log it as soon as the limit permits.
            Some(_) => limit.pass_late(),
            None => limit.pass(),
        };
        self.down = Some(Down {
            class,
            since: before.map_or_else(Instant::now, |down| down.since),
            is_logged: suppressed.is_some(),
            was_logged: suppressed.is_some() || before.is_some_and(|down| down.was_logged),
        });
        let Some(suppressed) = suppressed else { return };
        match class {
            FailureClass::Persistent | FailureClass::Record | FailureClass::Undecided => tracing::error!(
                lane = self.lane,
                dependency = self.name,
                doing,
                error = message,
                suppressed,
                "blocked until this is fixed; nothing is lost, retrying with backoff"
            ),
            FailureClass::Transient | FailureClass::Fenced => tracing::warn!(
                lane = self.lane,
                dependency = self.name,
                doing,
                error = message,
                suppressed,
                "a request failed; nothing is lost, retrying with backoff"
            ),
        }
    }

    /// Waits longer than last time without marking the dependency as down.
    pub fn delay(&mut self) {
        self.delay_within(BACKOFF_TRANSIENT_MAX);
    }

    fn delay_within(&mut self, longest: Duration) {
        self.failures = self.failures.saturating_add(1);
        let exponent = self.failures.min(16) - 1;
        let full = BACKOFF_MIN.saturating_mul(1 << exponent).min(longest);
        // Half fixed, half random, so that instances that lost the same server do not return all at once.
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
        let levels = Levels::default();
        let count = |level: Level| levels.0.lock().unwrap().iter().filter(|found| **found == level).count();
        let subscriber = tracing_subscriber::registry().with(levels.clone());
        tracing::subscriber::with_default(subscriber, || {
            let mut backoff = Backoff::new("database", 0);
            for _ in 0..50 {
                for _ in 0..3 {
                    backoff.failed(FailureClass::Transient, "asking", "no");
                }
                backoff.succeeded();
            }
            assert_eq!((count(Level::WARN), count(Level::INFO)), (5, 5));

            // Persistent failures have a limit of their own; so the error and its end are logged.
            backoff.failed(FailureClass::Transient, "asking", "no");
            backoff.failed(FailureClass::Persistent, "asking", "no such table");
            backoff.failed(FailureClass::Persistent, "asking", "no such table");
            backoff.succeeded();
            assert_eq!((count(Level::WARN), count(Level::INFO), count(Level::ERROR)), (5, 6, 1));
        });
    }
}
