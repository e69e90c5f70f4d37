//! Where a value came from.

use std::fmt;
use std::path::PathBuf;

const FILE_TAG: &str = "file:";
const ENVIRONMENT_TAG: &str = "env:";

/// The layer that a setting's effective value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The settings file.
    File(PathBuf),
    /// This environment variable.
    Environment(String),
}

impl Origin {
    /// The text under which the `config` crate carries this origin beside each value.
    pub(super) fn tag(&self) -> Option<String> {
        match self {
            Self::Default => None,
            Self::File(path) => Some(format!("{FILE_TAG}{}", path.display())),
            Self::Environment(variable) => Some(format!("{ENVIRONMENT_TAG}{variable}")),
        }
    }

    /// Reads [`Origin::tag`] back.
    pub(super) fn from_tag(tag: Option<&str>) -> Self {
        let Some(tag) = tag else { return Self::Default };
        if let Some(path) = tag.strip_prefix(FILE_TAG) {
            Self::File(PathBuf::from(path))
        } else if let Some(variable) = tag.strip_prefix(ENVIRONMENT_TAG) {
            Self::Environment(variable.to_owned())
        } else {
            Self::Default
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
