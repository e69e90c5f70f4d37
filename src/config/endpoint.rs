//! Postgres URLs: hosts, TLS and timeouts. Never prints a password.

mod parameters;
mod tls;

use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use openssl::error::ErrorStack;
use serde::de::{Deserialize, Deserializer, Error as _};
use tokio_postgres::Config;
use tokio_postgres::config::Host;

use self::parameters::{Parameters, take_parameters};
use self::tls::Tls;
use super::values::checked;
use crate::secrets::Blocking;

const EXPECTED_FORM: &str = "expected postgres://user:password@host:port/database?parameter=value, with known \
    parameters, and special characters in user and password percent-encoded";

/// Why a URL cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EndpointError {
    /// The URL is invalid; never retried.
    #[error("the Postgres URL is not valid: {reason}")]
    InvalidUrl {
        /// What is wrong; repeats no part of the URL that could be secret.
        reason: String,
    },
    /// A certificate or key file named in the URL cannot be used.
    #[error("{parameter} of the Postgres URL, {path}: {source}")]
    TlsFile {
        /// Parameter of the URL.
        parameter: &'static str,
        /// Path of the file.
        path: String,
        /// Errors of OpenSSL.
        source: ErrorStack,
    },
    /// The password file named in the URL has no password for it.
    #[error("passfile of the Postgres URL, {path}: {reason}")]
    PasswordFile {
        /// Path of the file.
        path: String,
        /// Why there is none.
        reason: String,
    },
    /// The files were not read in time.
    #[error("files of the Postgres URL: {0}")]
    Unread(String),
    /// The password command printed no password.
    #[error("postgres.password_command: {0}")]
    PasswordCommand(String),
    /// OpenSSL cannot be initialized.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] ErrorStack),
}

/// When a password command was run, and its password or why there is none.
pub(crate) type Printed = (Instant, Result<String, String>);

/// A parsed Postgres URL: where and how to connect.
///
/// `postgres://user:password@host:port,host2:port2/database?parameter=value`, with parameters as in libpq:
/// `sslmode` (`disable`, `allow` (as `prefer`), `prefer` (default), `require`, `verify-ca`, `verify-full`),
/// `sslrootcert` (a file, or `system`; by default the system's certificates), `sslcert`, `sslkey`,
/// `sslnegotiation`, `passfile`, `target_session_attrs`, `connect_timeout`, `application_name` and the others
/// of `tokio-postgres`. As in libpq, `sslmode=require` with an `sslrootcert` verifies like `verify-ca`, and
/// without a password the file of `PGPASSFILE` is used.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) config: Config,
    pub(crate) tls: Tls,
    /// It was found that no pooler shares sessions between connections.
    pub(crate) is_direct: Arc<AtomicBool>,
    /// Read again for each connection, so that a new password is used.
    password_file: Option<PathBuf>,
    /// Prints the password of a URL that has none; empty for none.
    pub(crate) password_command: Vec<String>,
    /// What the command printed last.
    pub(crate) printed: Arc<tokio::sync::Mutex<Option<Printed>>>,
    /// Reads its files, and runs the command.
    pub(crate) files: Blocking,
    /// Parameters that have no effect.
    pub(crate) ignored: Vec<String>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.to_string()).finish()
    }
}

// User, hosts and database, without the password.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = self.config.get_user() {
            write!(f, "{user}@")?;
        }
        let ports = self.config.get_ports();
        for (i, host) in self.config.get_hosts().iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(&host_name(host))?;
            // One port for all hosts, or one for each.
            if let Some(port) = ports.get(i).or(ports.first()) {
                write!(f, ":{port}")?;
            }
        }
        write!(f, "/{}", self.config.get_dbname().unwrap_or_default())
    }
}

impl PartialEq for Endpoint {
    fn eq(&self, other: &Self) -> bool {
        self.config == other.config
            && self.tls == other.tls
            && self.password_file == other.password_file
            && self.password_command == other.password_command
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let url: String = checked(deserializer, "must be a text in quotes", Some)?;
        Self::parse(&url).map_err(D::Error::custom)
    }
}

impl Endpoint {
    /// Parses a URL. Reads the files that it names, but does not use the network.
    pub fn parse(url: &str) -> Result<Self, EndpointError> {
        let Parameters { plain_url, own, ignored } = take_parameters(url)?;
        let mut config: Config = plain_url.parse().map_err(|e| invalid_url(&e))?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(invalid("it names no host"));
        }
        // tokio-postgres ends the credentials at the first @ and would take the rest of a password for a
        // host.
        if config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if name.contains('@'))) {
            return Err(invalid(EXPECTED_FORM));
        }
        let (mode, tls) = Tls::of(&own, config.get_ssl_negotiation())?;
        config.ssl_mode(mode);
        // A file that cannot be used is told at once.
        tls.connector()?;
        let named = own.get("passfile").map(PathBuf::from);
        let is_named = named.is_some();
        let password_file = named
            .or_else(|| std::env::var_os("PGPASSFILE").map(PathBuf::from))
            .filter(|_| config.get_password().is_none());
        let mut endpoint = Self {
            config,
            tls,
            is_direct: Arc::default(),
            password_file,
            password_command: Vec::new(),
            printed: Arc::default(),
            files: Blocking::new(),
            ignored,
        };
        if let Err(error) = endpoint.password() {
            if is_named {
                return Err(error);
            }
            // PGPASSFILE may be meant for other databases.
            endpoint.password_file = None;
        }
        Ok(endpoint)
    }

    /// The present password of the password file; `None` without such a file.
    ///
    /// # Errors
    /// Why the file has none, without its contents.
    pub(crate) fn password(&self) -> Result<Option<String>, EndpointError> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let failed = |reason| EndpointError::PasswordFile { path: path.display().to_string(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let found =
            text.lines().filter(|line| !line.starts_with('#')).find_map(|line| self.password_in(line));
        found.map(Some).ok_or_else(|| failed("no line fits host, port, database and user".to_owned()))
    }

    /// Whether the URL has a password, or names a file for it.
    pub(super) fn has_password(&self) -> bool {
        self.config.get_password().is_some() || self.password_file.is_some()
    }

    /// The names and values that libpq's variables have for this URL, for the password command.
    pub(crate) fn variables(&self) -> [(&'static str, String); 4] {
        let hosts = self.config.get_hosts().iter().map(host_name).collect::<Vec<_>>().join(",");
        let port = self.config.get_ports().first().copied().unwrap_or(5432).to_string();
        let user = self.config.get_user().unwrap_or_default();
        let database = self.config.get_dbname().unwrap_or(user);
        [
            ("PGHOST", hosts),
            ("PGPORT", port),
            ("PGUSER", user.to_owned()),
            ("PGDATABASE", database.to_owned()),
        ]
    }

    /// The password of a line `host:port:database:user:password`, if the line fits. `*` fits everything; a backslash
    /// precedes a colon or a backslash of a field.
    fn password_in(&self, line: &str) -> Option<String> {
        let mut fields = vec![String::new()];
        let mut characters = line.chars();
        while let Some(character) = characters.next() {
            match (character, fields.last_mut()) {
                (':', _) => fields.push(String::new()),
                ('\\', Some(field)) => field.extend(characters.next()),
                (_, Some(field)) => field.push(character),
                (_, None) => {}
            }
        }
        let [host, port, database, user, password, ..] = fields.as_slice() else { return None };
        let fits = |field: &String, value: &str| field == "*" || field == value;
        let config = &self.config;
        let name = config.get_user().unwrap_or_default();
        let ports = config.get_ports();
        // With several hosts one password is for all of them, and must be given to no other.
        let is_host = config.get_hosts().iter().enumerate().all(|(at, found)| {
            let found_port = ports.get(at).or(ports.first()).copied().unwrap_or(5432);
            fits(host, &host_name(found)) && fits(port, &found_port.to_string())
        });
        let is_fit = is_host && fits(database, config.get_dbname().unwrap_or(name)) && fits(user, name);
        is_fit.then(|| password.clone())
    }
}

fn host_name(host: &Host) -> String {
    match host {
        Host::Tcp(name) => name.clone(),
        #[cfg(unix)]
        Host::Unix(path) => path.display().to_string(),
    }
}

fn invalid(reason: &str) -> EndpointError {
    EndpointError::InvalidUrl { reason: reason.to_owned() }
}

/// Keeps the driver's message only if it names nothing but an option: with a badly escaped password, any
/// other message may contain a part of it.
fn invalid_url(error: &tokio_postgres::Error) -> EndpointError {
    let words = error.source().map(ToString::to_string).unwrap_or_default();
    invalid(if words.starts_with("invalid value for option") { &words } else { EXPECTED_FORM })
}

#[cfg(test)]
mod tests;
