//! Logging to stderr, as text or JSON. The level can be changed at run time, and the last warnings and errors
//! are kept for `/status`.

mod problems;
mod rate;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::{Level, Metadata};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

pub use self::problems::{PROBLEMS_MAX, Problem, Problems};
pub use self::rate::{Lasting, RateLimited, Repeated};
use crate::config::{LogFormat, LogSettings, log_filter};

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// `log.level` is not a valid filter.
    #[error("log.level: {0}")]
    Level(String),
    /// Another logger is already installed.
    #[error("cannot set up the log: {0}")]
    AlreadySet(Box<dyn std::error::Error + Send + Sync>),
}

/// Handle of this process's log.
pub struct LogHandle {
    level: Mutex<String>,
    filter: reload::Handle<EnvFilter, Registry>,
    problems: Arc<Problems>,
}

/// Directives before the configured ones, which override them. These libraries report errors that this
/// program reports itself: broken sessions and failed exports of spans.
const BASE: &str = "deadpool.postgres=error,opentelemetry=off";

/// Directives after the configured ones, which they override: a change of the log level is always logged.
const FIXED: &str = "payment_writer::telemetry::logging=info";

/// Blocks lines that no filter may enable, as the directive of a library could: below `WARN`,
/// `tokio_postgres` logs statement parameters, which include payment ids, and notices raised by triggers.
fn may_be_logged(line: &Metadata<'_>) -> bool {
    *line.level() <= Level::WARN || !line.target().starts_with("tokio_postgres")
}

fn filter(level: &str) -> Result<EnvFilter, String> {
    log_filter(level)?;
    EnvFilter::try_new(format!("{BASE},{level},{FIXED}")).map_err(|error| error.to_string())
}

/// Sets up logging. Includes messages of libraries that use the `log` crate, such as librdkafka's.
pub fn init(settings: &LogSettings) -> Result<LogHandle, LoggingError> {
    let (log, filter) = LogHandle::new(&settings.level).map_err(LoggingError::Level)?;
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match settings.format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(filter_fn(may_be_logged))
        .with(lines)
        .with(problems::Keeper::new(log.problems()))
        .try_init()
        .map_err(|error| LoggingError::AlreadySet(error.into()))?;
    Ok(log)
}

impl LogHandle {
    /// Creates a log with this filter, and the layer to install.
    pub(crate) fn new(level: &str) -> Result<(Self, reload::Layer<EnvFilter, Registry>), String> {
        let (layer, handle) = reload::Layer::new(filter(level)?);
        let log = Self { level: Mutex::new(level.to_owned()), filter: handle, problems: Arc::default() };
        Ok((log, layer))
    }

    /// Current filter, as it was set.
    pub fn level(&self) -> String {
        self.level.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the filter until the process ends.
    ///
    /// # Errors
    /// A description of what is wrong with `level`.
    pub fn set_level(&self, level: &str) -> Result<(), String> {
        let level = level.trim();
        let wanted = filter(level)?;
        let mut present = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        self.filter.reload(wanted).map_err(|error| error.to_string())?;
        // The `log` crate checks its own limit first; its levels have the same names.
        let limit = tracing::level_filters::LevelFilter::current().to_string().parse();
        log::set_max_level(limit.unwrap_or(log::LevelFilter::Trace));
        tracing::info!(from = %present, to = level, "the log level was changed");
        level.clone_into(&mut present);
        Ok(())
    }

    /// The last warnings and errors.
    pub fn problems(&self) -> Arc<Problems> {
        Arc::clone(&self.problems)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::{Event, Subscriber};
    use tracing_subscriber::layer::Context;

    /// Records the targets of lines.
    #[derive(Clone, Default)]
    struct Targets(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Targets {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(event.metadata().target().to_owned());
        }
    }

    #[test]
    fn no_filter_lets_statements_through_or_hides_that_it_was_changed() {
        let logged = Targets::default();
        let (log, filter) =
            LogHandle::new("debug,tokio_postgres::query=trace,payment_writer::telemetry::logging=off")
                .unwrap();
        let subscriber =
            tracing_subscriber::registry().with(filter).with(filter_fn(may_be_logged)).with(logged.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!(target: "tokio_postgres::query", "executing a statement with parameters");
            tracing::info!(target: "tokio_postgres::connection", "a remark of the server");
            tracing::warn!(target: "tokio_postgres::connection", "broken");
            tracing::debug!(target: "payment_writer::lane", "said");
            log.set_level("off").unwrap();
            tracing::error!(target: "payment_writer::lane", "not said");
        });
        let logged = logged.0.lock().unwrap().clone();
        assert_eq!(
            logged,
            ["tokio_postgres::connection", "payment_writer::lane", "payment_writer::telemetry::logging"]
        );
    }
}
