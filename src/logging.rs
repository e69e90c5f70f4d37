//! The log: lines for people or JSON for machines, always on stderr. Its level can be changed while it runs, and
//! its last warnings and errors are kept for `/status`.

mod problems;
mod rate;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

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
/// itself, as does our exporter of spans; and a change of the level is told at any level.
const BASE: &str = "deadpool.postgres=error,opentelemetry=off,payment_writer::logging=info";

/// What goes after them, and so cannot be set: at a lower level this library writes down the parameters of
/// statements, among them the ids of payments.
const FIXED: &str = "tokio_postgres=info";

fn filter(level: &str) -> Result<EnvFilter, String> {
    log_filter(level)?;
    EnvFilter::try_new(format!("{BASE},{level},{FIXED}")).map_err(|error| error.to_string())
}

/// Sets up the log of this process. What libraries say through the `log` crate, librdkafka
/// included, comes with it.
pub fn init(settings: &LogSettings) -> Result<Log, LoggingError> {
    let filter = filter(&settings.level).map_err(LoggingError::Level)?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match settings.format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    };
    let problems = Arc::new(Problems::default());
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(problems::Keeper::new(Arc::clone(&problems)))
        .try_init()
        .map_err(|error| LoggingError::AlreadySet(error.into()))?;
    Ok(Log { level: Mutex::new(settings.level.clone()), filter: handle, problems })
}

impl Log {
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
