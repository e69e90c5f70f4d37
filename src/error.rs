//! Errors of commands, classified by what the operator can do about them.

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
