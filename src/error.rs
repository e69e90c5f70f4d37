//! Errors of commands, classified by what the operator can do about them.

use std::fmt::Display;

use crate::config::ConfigError;

/// What the operator can do about an error. `cli` maps it to an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Trying again may help.
    Failed,
    /// The command line or the settings are wrong.
    Usage,
    /// Continuing automatically would risk a payment: the operator has to decide.
    PersonMustDecide,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CommandError {
    /// What the operator can do about it.
    pub kind: ErrorKind,
    /// What went wrong, and what to do about it.
    pub message: String,
}

impl CommandError {
    /// An error that may go away when the command is run again.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Failed, message: message.into() }
    }

    /// A wrong command line or setting.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Usage, message: message.into() }
    }

    /// A state that only the operator can resolve.
    pub fn person_must_decide(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::PersonMustDecide, message: message.into() }
    }
}

impl From<ConfigError> for CommandError {
    fn from(error: ConfigError) -> Self {
        Self::usage(error.to_string())
    }
}

/// Turns the error of a result into [`CommandError::failed`].
pub trait OrFailed<T> {
    /// Keeps the error's text.
    fn or_failed(self) -> Result<T, CommandError>;

    /// Puts what was being done before the error's text.
    fn or_failed_to(self, doing: impl Display) -> Result<T, CommandError>;
}

impl<T, E: Display> OrFailed<T> for Result<T, E> {
    fn or_failed(self) -> Result<T, CommandError> {
        self.map_err(|error| CommandError::failed(error.to_string()))
    }

    fn or_failed_to(self, doing: impl Display) -> Result<T, CommandError> {
        self.map_err(|error| CommandError::failed(format!("{doing}: {error}")))
    }
}
