//! The log: lines for people or JSON for machines, always on stderr. Its level can be changed while it runs, and
//! its last warnings and errors are kept for `/status`.

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
pub use self::rate::RateLimited;
use crate::config::{LogFormat, LogSettings, log_filter};

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// `log.level` is not a filter.
    #[error("log.level: {0}")]
    Level(String),
    /// Something else has set up a log already.
    #[error("cannot set up the log: {0}")]
    AlreadySet(Box<dyn std::error::Error + Send + Sync>),
}

/// The log of this process.
pub struct Log {
    level: Mutex<String>,
    filter: reload::Handle<EnvFilter, Registry>,
    problems: Arc<Problems>,
}

/// What goes before the directives that are set, which win over equals: whoever used a session that broke says so
/// itself, as does our exporter of spans.
const BASE: &str = "deadpool.postgres=error,opentelemetry=off";

/// What goes after them, and wins over equals: a change of the level is told at any level.
const FIXED: &str = "payment_writer::logging=info";

/// What no filter lets through, as a directive for part of a library would: below `WARN` this one writes down the
/// parameters of statements, among them the ids of payments, and what the server's triggers remark.
fn may_be_said(line: &Metadata<'_>) -> bool {
    *line.level() <= Level::WARN || !line.target().starts_with("tokio_postgres")
}

fn filter(level: &str) -> Result<EnvFilter, String> {
    log_filter(level)?;
    EnvFilter::try_new(format!("{BASE},{level},{FIXED}")).map_err(|error| error.to_string())
}

/// Sets up the log of this process. What libraries say through the `log` crate, librdkafka
/// included, comes with it.
pub fn init(settings: &LogSettings) -> Result<Log, LoggingError> {
    let (log, filter) = Log::new(&settings.level).map_err(LoggingError::Level)?;
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match settings.format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(filter_fn(may_be_said))
        .with(lines)
        .with(problems::Keeper::new(log.problems()))
        .try_init()
        .map_err(|error| LoggingError::AlreadySet(error.into()))?;
    Ok(log)
}

impl Log {
    /// A log with this filter, which is to become part of it.
    pub(crate) fn new(level: &str) -> Result<(Self, reload::Layer<EnvFilter, Registry>), String> {
        let (layer, handle) = reload::Layer::new(filter(level)?);
        let log = Self { level: Mutex::new(level.to_owned()), filter: handle, problems: Arc::default() };
        Ok((log, layer))
    }

    /// The filter in effect, as it was set.
    pub fn level(&self) -> String {
        self.level.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another filter from now on, until the process ends.
    ///
    /// # Errors
    /// What is wrong with `level`, in words.
    pub fn set_level(&self, level: &str) -> Result<(), String> {
        let level = level.trim();
        let wanted = filter(level)?;
        let mut present = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        self.filter.reload(wanted).map_err(|error| error.to_string())?;
        // Libraries that speak through the `log` crate look at its own limit first.
        log::set_max_level(match tracing::level_filters::LevelFilter::current().into_level() {
            None => log::LevelFilter::Off,
            Some(tracing::Level::ERROR) => log::LevelFilter::Error,
            Some(tracing::Level::WARN) => log::LevelFilter::Warn,
            Some(tracing::Level::INFO) => log::LevelFilter::Info,
            Some(tracing::Level::DEBUG) => log::LevelFilter::Debug,
            Some(tracing::Level::TRACE) => log::LevelFilter::Trace,
        });
        tracing::info!(from = %present, to = level, "the log's level was changed");
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

    /// Notes of which part of the program a line is.
    #[derive(Clone, Default)]
    struct Targets(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Targets {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(event.metadata().target().to_owned());
        }
    }

    #[test]
    fn no_filter_lets_statements_through_or_hides_that_it_was_changed() {
        let told = Targets::default();
        let (log, filter) =
            Log::new("debug,tokio_postgres::query=trace,payment_writer::logging=off").unwrap();
        let subscriber =
            tracing_subscriber::registry().with(filter).with(filter_fn(may_be_said)).with(told.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!(target: "tokio_postgres::query", "executing a statement with parameters");
            tracing::info!(target: "tokio_postgres::connection", "a remark of the server");
            tracing::warn!(target: "tokio_postgres::connection", "broken");
            tracing::debug!(target: "payment_writer::lane", "said");
            log.set_level("off").unwrap();
            tracing::error!(target: "payment_writer::lane", "not said");
        });
        let told = told.0.lock().unwrap().clone();
        assert_eq!(told, ["tokio_postgres::connection", "payment_writer::lane", "payment_writer::logging"]);
    }
}
