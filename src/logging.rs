//! The log: lines for people or JSON for machines, always on stderr.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, LogSettings};

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// `log.level` is not a filter.
    #[error("log.level: {0}")]
    Level(#[from] tracing_subscriber::filter::ParseError),
    /// Something else has set up a log already.
    #[error("cannot set up the log: {0}")]
    AlreadySet(Box<dyn std::error::Error + Send + Sync>),
}

/// Sets up the log of this process. What libraries say through the `log` crate, librdkafka
/// included, comes with it.
pub fn init(settings: &LogSettings) -> Result<(), LoggingError> {
    // The settings' own directives come later, and win. Whoever used a session that broke says so itself.
    EnvFilter::try_new(&settings.level)?;
    let filter = EnvFilter::try_new(format!("deadpool.postgres=error,{}", settings.level))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match settings.format {
        LogFormat::Text => builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(LoggingError::AlreadySet)
}
