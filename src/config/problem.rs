//! What is wrong with the settings: all of it at once.

use std::fmt;
use std::path::PathBuf;

use super::origin::Origin;
use super::secret::HIDDEN;

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A file that was named, or is there by default, cannot be read.
    #[error("cannot read settings file {}: {reason}", path.display())]
    UnreadableFile {
        /// The file.
        path: PathBuf,
        /// The operating system's word for it.
        reason: String,
    },
    /// The file is not TOML. The parser's message names no value.
    #[error("settings file {} is not valid TOML{}: {reason}", path.display(), Place(*line))]
    NotToml {
        /// The file.
        path: PathBuf,
        /// Line and column, counted from 1, where the parser knows them.
        line: Option<(usize, usize)>,
        /// What the parser expected.
        reason: String,
    },
    /// A name that is no setting.
    #[error("unknown setting {name}{}; the nearest known one is {nearest}", InFile(origin))]
    Unknown {
        /// The name as it was written.
        name: String,
        /// Where it was written.
        origin: Origin,
        /// The known name most like it, in the same form.
        nearest: String,
    },
    /// The same setting twice in the environment.
    #[error("setting {key} is given by two environment variables, {first} and {second}")]
    Twice {
        /// The setting.
        key: String,
        /// One of the variables.
        first: String,
        /// The other one.
        second: String,
    },
    /// A value that is not allowed.
    #[error("{key}{} ({origin}) {rule}", Shown(value))]
    Invalid {
        /// The setting.
        key: String,
        /// The value, already without secrets; `None` where it says nothing.
        value: Option<String>,
        /// Where it came from.
        origin: Origin,
        /// What is allowed: "must be …".
        rule: String,
    },
}

struct Place(Option<(usize, usize)>);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some((line, column)) => write!(f, " at line {line}, column {column}"),
            None => Ok(()),
        }
    }
}

/// The name of an environment variable says itself where it was found.
struct InFile<'a>(&'a Origin);

impl fmt::Display for InFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Origin::Environment(_) => f.write_str(" in the environment"),
            other => write!(f, " ({other})"),
        }
    }
}

struct Shown<'a>(&'a Option<String>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) if value == HIDDEN => f.write_str(" = (hidden)"),
            Some(value) => write!(f, " = {value}"),
            None => Ok(()),
        }
    }
}

/// The settings cannot be used; every problem found is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// At least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [one] => one.fmt(f),
            many => {
                write!(f, "{} problems in the settings:", many.len())?;
                for problem in many {
                    write!(f, "\n  - {problem}")?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for ConfigError {}
