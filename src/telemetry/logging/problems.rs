//! Keeps the last warnings and errors for `/status`.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Maximum number of lines kept.
pub const PROBLEMS_MAX: usize = 20;
/// Maximum length of a line; longer ones are truncated.
const CHARS_MAX: usize = 600;
/// Fields with values chosen by producers. They stay in the log, which has restricted access, and are left
/// out of `/status`, which has not. The `source` field still identifies the record.
const LEFT_OUT: [&str; 2] = ["correlation_id", "traceparent"];

/// A line of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Time at which it was logged.
    pub at: jiff::Timestamp,
    /// `WARN` or `ERROR`.
    pub level: &'static str,
    /// Message with its fields, as in the log, on one line without control characters. Contains no payment
    /// data and no header values of producers.
    pub message: String,
}

/// The last warnings and errors that passed the log filter.
#[derive(Default)]
pub struct Problems {
    kept: Mutex<VecDeque<Problem>>,
    warnings: AtomicU64,
    errors: AtomicU64,
}

impl Problems {
    /// All lines, oldest first.
    pub fn all(&self) -> Vec<Problem> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Numbers of warnings and of errors since the start.
    pub fn counts(&self) -> (u64, u64) {
        (self.warnings.load(Ordering::Relaxed), self.errors.load(Ordering::Relaxed))
    }

    fn push(&self, problem: Problem) {
        let count = if problem.level == "ERROR" { &self.errors } else { &self.warnings };
        count.fetch_add(1, Ordering::Relaxed);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= PROBLEMS_MAX {
            kept.pop_front();
        }
        kept.push_back(problem);
    }
}

/// Log layer that records the lines.
pub(super) struct Keeper(Arc<Problems>);

impl Keeper {
    pub(super) fn new(problems: Arc<Problems>) -> Self {
        Self(problems)
    }
}

impl<S: Subscriber> Layer<S> for Keeper {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "ERROR",
            Level::WARN => "WARN",
            _ => return,
        };
        let mut line = Line::default();
        event.record(&mut line);
        let message = format!("{}{}", line.message, line.fields).replace(char::is_control, "\u{fffd}");
        let message = match message.char_indices().nth(CHARS_MAX) {
            Some((end, _)) => format!("{}…", message.get(..end).unwrap_or_default()),
            None => message,
        };
        self.0.push(Problem { at: jiff::Timestamp::now(), level, message });
    }
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            // Location fields added by the `log` crate.
            name if name.starts_with("log.") || LEFT_OUT.contains(&name) => Ok(()),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn the_last_warnings_and_errors_are_kept_and_nothing_else() {
        let problems = Arc::new(Problems::default());
        let subscriber = tracing_subscriber::registry().with(Keeper::new(Arc::clone(&problems)));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("not this");
            for number in 0..30 {
                tracing::warn!(number, reason = "why", "it failed");
            }
            tracing::warn!(
                source = "s/1/2",
                correlation_id = "c-1",
                traceparent = "00-",
                "one\n\u{1b}[31mtwo"
            );
            tracing::error!(text = "x".repeat(5_000), "long");
        });
        let kept = problems.all();
        assert_eq!(kept.len(), PROBLEMS_MAX);
        assert_eq!((kept[0].level, kept[0].message.as_str()), ("WARN", "it failed number=12 reason=why"));
        assert_eq!(kept[PROBLEMS_MAX - 2].message, "one\u{fffd}\u{fffd}[31mtwo source=s/1/2");
        let last = kept.last().unwrap();
        assert_eq!((last.level, last.message.chars().count()), ("ERROR", CHARS_MAX + 1));
    }
}
