//! Settings: defaults, overridden by a TOML file, overridden by environment variables.
//!
//! `PAYMENT_WRITER__KAFKA__GROUP_ID=x` overrides `group_id` of `[kafka]`. Every value is checked, unknown
//! names are errors, and all errors are reported together.

mod cron;
pub mod duration;
mod endpoint;
mod layers;
mod origin;
mod postgres_url;
mod problem;
mod properties;
mod reader;
mod schema;
mod secret;
mod sections;
mod size;
mod tree;

use std::env;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub use cron::CronSchedule;
pub use endpoint::{Endpoint, EndpointError};
pub use origin::Origin;
pub use postgres_url::PostgresUrl;
pub use problem::{ConfigError, Problem};
pub use properties::{KafkaProperties, TOKEN_PROPERTY};
pub use reader::Effective;
pub use secret::{HIDDEN, Secret};
pub use sections::{
    AdminSettings, AuditSettings, BatchSettings, EmailSettings, IdempotencySettings, KafkaSettings,
    LogFormat, LogSettings, PaymentSettings, PostgresSettings, Settings, ShutdownSettings, TracingSettings,
    log_filter,
};
pub use size::ByteSize;

/// Settings file used by default; it may be absent.
pub const DEFAULT_PATH: &str = "config/payment-writer.toml";

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

impl Settings {
    /// Loads the settings from `path`, otherwise from the file named in the environment, otherwise from
    /// [`DEFAULT_PATH`] if it exists; then from the environment.
    pub fn load(path: Option<&Path>) -> Result<Loaded, ConfigError> {
        Self::load_from(path, Path::new(DEFAULT_PATH), env::vars_os())
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
        let mut problems = Vec::new();
        let (file, layer) = match read(named.as_deref(), default_path) {
            Ok(Some((path, text))) => {
                let layer = layers::file(&path, &text, &mut problems);
                (Some(path), layer)
            }
            Ok(None) => (None, layers::Layer::default()),
            Err(problem) => {
                problems.push(problem);
                (None, layers::Layer::default())
            }
        };
        let environment = layers::environment(variables, &mut problems);
        let merged = config::Config::builder()
            .add_source(layers::Layer { values: schema::defaults() })
            .add_source(layer)
            .add_source(environment)
            .build();
        let root = match merged {
            Ok(merged) => merged.cache,
            // Layers are in memory and cannot fail.
            Err(_) => config::Value::default(),
        };
        let mut reader = reader::Reader::new(root, problems);
        match Settings::read(&mut reader) {
            Some(settings) if reader.problems.is_empty() => {
                Ok(Loaded { settings, effective: reader.effective, file })
            }
            _ => Err(ConfigError { problems: reader.problems }),
        }
    }
}

fn read(named: Option<&Path>, default_path: &Path) -> Result<Option<(PathBuf, String)>, Problem> {
    let path = named.unwrap_or(default_path);
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.to_path_buf(), text))),
        Err(error) if error.kind() == ErrorKind::NotFound && named.is_none() => Ok(None),
        Err(error) => Err(Problem::UnreadableFile { path: path.to_path_buf(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests;
