//! A setting's effective value and the layer that it comes from.

use std::fmt;
use std::path::PathBuf;

use config::Value;
use serde::{Serialize, Serializer};

/// Prefix of environment variables. Container platforms set variables such as `PAYMENT_WRITER_SERVICE_HOST`
/// for a service of this name; the second underscore tells them from settings.
pub(super) const PREFIX: &str = "PAYMENT_WRITER__";

/// The layer that a setting's effective value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Neither the file nor the environment sets it.
    Default,
    /// The settings file.
    File(PathBuf),
    /// This environment variable.
    Environment(String),
}

impl Origin {
    pub(super) fn of(value: &Value) -> Self {
        match value.origin() {
            None => Self::Default,
            Some(variable) if variable.starts_with(PREFIX) => Self::Environment(variable.to_owned()),
            Some(path) => Self::File(PathBuf::from(path)),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(variable) => write!(f, "environment {variable}"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A setting as it takes effect.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Effective {
    /// Dotted name.
    pub key: String,
    /// The value in the type in which it is set.
    pub value: serde_json::Value,
    /// Where it came from.
    pub origin: Origin,
}
