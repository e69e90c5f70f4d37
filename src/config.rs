//! Settings: defaults, overridden by a TOML file, overridden by environment variables.
//!
//! `PAYMENT_WRITER__KAFKA__GROUP_ID=x` overrides `group_id` of `[kafka]`. Every value is checked, unknown
//! names are errors, and all errors are reported together.

mod endpoint;
mod layers;
mod origin;
mod properties;
mod sections;
mod token_file;
mod values;

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub use endpoint::{Endpoint, EndpointError};
pub use origin::{Effective, Origin};
pub use properties::{KafkaProperties, TOKEN_PROPERTY};
pub use sections::{
    AdminSettings, AuditSettings, BatchSettings, EmailSettings, IdempotencySettings, KafkaSettings,
    LogFormat, LogSettings, PaymentSettings, PostgresSettings, Settings, ShutdownSettings, TracingSettings,
};
pub use token_file::read_token;
pub use values::{cron, log_filter};

/// Settings file used by default; it may be absent.
pub const DEFAULT_PATH: &str = "config/payment-writer.toml";

/// Settings file of packages, used by default if [`DEFAULT_PATH`] is absent; it may be absent, too.
pub const PACKAGE_PATH: &str = "/etc/payment-writer/payment-writer.toml";

/// Environment variable with the path of the settings file; the command line has priority.
pub const PATH_VARIABLE: &str = "PAYMENT_WRITER_CONFIG";

/// Loaded settings and their origins.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Typed settings.
    pub settings: Settings,
    /// Every value with its origin; secrets are hidden.
    pub effective: Vec<Effective>,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
}

/// The settings cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Every problem that was found, at least one. Secrets are hidden.
    pub problems: Vec<String>,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.as_slice() {
            [one] => f.write_str(one),
            many => write!(f, "{} problems in the settings:\n  - {}", many.len(), many.join("\n  - ")),
        }
    }
}

impl Settings {
    /// Loads the settings from `path`, otherwise from the file named in the environment, otherwise from
    /// [`DEFAULT_PATH`] or [`PACKAGE_PATH`], the first that exists; then from the environment.
    pub fn load(path: Option<&Path>) -> Result<Loaded, ConfigError> {
        let mut known = [DEFAULT_PATH, PACKAGE_PATH].into_iter().map(Path::new);
        // What cannot be looked at is an error when it is read.
        let default = known.find(|path| path.try_exists().unwrap_or(true));
        Self::load_from(path, default.unwrap_or(Path::new(DEFAULT_PATH)), env::vars_os())
    }

    /// Like [`Settings::load`], with all inputs as parameters.
    pub fn load_from(
        path: Option<&Path>,
        default_path: &Path,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Loaded, ConfigError> {
        let variables: Vec<_> = variables.into_iter().collect();
        let named = path.map(Path::to_path_buf).or_else(|| {
            let (_, path) = variables.iter().find(|(name, _)| name == PATH_VARIABLE)?;
            (!path.is_empty()).then(|| PathBuf::from(path))
        });
        let mut layers = layers::Layers::defaults();
        let path = named.as_deref().unwrap_or(default_path);
        let mut file = None;
        match std::fs::read_to_string(path) {
            Ok(text) => {
                layers.add_file(path, &text);
                file = Some(path.to_path_buf());
            }
            Err(error) if error.kind() == ErrorKind::NotFound && named.is_none() => {}
            Err(error) => {
                layers.problems.push(format!("cannot read settings file {}: {error}", path.display()));
            }
        }
        layers.add_environment(variables);
        match layers.settings() {
            Some(settings) if layers.problems.is_empty() => {
                Ok(Loaded { effective: layers.effective(&settings), settings, file })
            }
            _ => Err(ConfigError { problems: layers.problems }),
        }
    }
}

#[cfg(test)]
mod tests;
