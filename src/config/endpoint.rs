//! Postgres URLs: hosts, TLS and timeouts. Never prints a password.

mod parameters;

use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use openssl::error::ErrorStack;
use openssl::ssl::{SslConnector, SslFiletype, SslMethod, SslVerifyMode};
use openssl::x509::store::X509StoreBuilder;
use postgres_openssl::{MakeTlsConnector, set_postgresql_alpn};
use serde::de::{Deserialize, Deserializer, Error as _};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, SslNegotiation};

use self::parameters::{OwnParameters, Parameters, take_parameters};
use super::values::checked;

const EXPECTED_FORM: &str = "expected postgres://user:password@host:port/database?parameter=value, with known \
    parameters, and special characters in user and password percent-encoded";

/// Why a URL cannot be used.
#[derive(Debug, thiserror::Error)]
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
    /// OpenSSL cannot be initialized.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] ErrorStack),
}

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
    pub(crate) tls: MakeTlsConnector,
    /// It was found that no pooler shares sessions between connections.
    pub(crate) is_direct: Arc<AtomicBool>,
    /// Read again for each connection, so that a new password is used.
    pub(crate) password_file: Option<PathBuf>,
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
            match host {
                Host::Tcp(name) => f.write_str(name)?,
                #[cfg(unix)]
                Host::Unix(path) => write!(f, "{}", path.display())?,
            }
            // One port for all hosts, or one for each.
            if let Some(port) = ports.get(i).or(ports.first()) {
                write!(f, ":{port}")?;
            }
        }
        write!(f, "/{}", self.config.get_dbname().unwrap_or_default())
    }
}

impl PartialEq for Endpoint {
    // Certificate files are not compared.
    fn eq(&self, other: &Self) -> bool {
        self.config == other.config && self.password_file == other.password_file
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
        let (mode, verify) = mode_and_verify(&own)?;
        config.ssl_mode(mode);
        let tls = connector(&own, verify, config.get_ssl_negotiation())?;
        let named = own.get("passfile").map(PathBuf::from);
        let is_named = named.is_some();
        let password_file = named
            .or_else(|| std::env::var_os("PGPASSFILE").map(PathBuf::from))
            .filter(|_| config.get_password().is_none());
        let mut endpoint = Self { config, tls, is_direct: Arc::default(), password_file, ignored };
        if let Err(reason) = endpoint.password() {
            // PGPASSFILE may be meant for other databases.
            let file = endpoint.password_file.take().filter(|_| is_named);
            if let Some(path) = file {
                return Err(EndpointError::PasswordFile { path: path.display().to_string(), reason });
            }
        }
        Ok(endpoint)
    }

    /// The present password of the password file; `None` without such a file.
    ///
    /// # Errors
    /// Why the file has none, without its contents.
    pub(crate) fn password(&self) -> Result<Option<String>, String> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        let found =
            text.lines().filter(|line| !line.starts_with('#')).find_map(|line| self.password_in(line));
        found.map(Some).ok_or_else(|| "no line fits host, port, database and user".to_owned())
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
            let found = match found {
                Host::Tcp(name) => name.clone(),
                #[cfg(unix)]
                Host::Unix(path) => path.display().to_string(),
            };
            fits(host, &found) && fits(port, &found_port.to_string())
        });
        let is_fit = is_host && fits(database, config.get_dbname().unwrap_or(name)) && fits(user, name);
        is_fit.then(|| password.clone())
    }
}

/// How the server's certificate is verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verify {
    Nothing,
    Issuer,
    IssuerAndHost,
}

fn mode_and_verify(tls: &OwnParameters) -> Result<(SslMode, Verify), EndpointError> {
    match tls.get("sslmode").map(String::as_str) {
        Some("disable") => Ok((SslMode::Disable, Verify::Nothing)),
        None | Some("prefer" | "allow") => Ok((SslMode::Prefer, Verify::Nothing)),
        Some("require") if tls.contains_key("sslrootcert") => Ok((SslMode::Require, Verify::Issuer)),
        Some("require") => Ok((SslMode::Require, Verify::Nothing)),
        Some("verify-ca") => Ok((SslMode::Require, Verify::Issuer)),
        Some("verify-full") => Ok((SslMode::Require, Verify::IssuerAndHost)),
        Some(_) => Err(invalid("sslmode is none of disable, allow, prefer, require, verify-ca, verify-full")),
    }
}

fn connector(
    tls: &OwnParameters,
    verify: Verify,
    negotiation: SslNegotiation,
) -> Result<MakeTlsConnector, EndpointError> {
    let file = |parameter, path: &str| {
        let path = path.to_owned();
        move |source| EndpointError::TlsFile { parameter, path, source }
    };
    let mut builder = SslConnector::builder(SslMethod::tls_client())?;
    if let Some(path) = tls.get("sslrootcert").filter(|path| *path != "system") {
        // Replaces the system's certificates: only the issuers in the file are trusted.
        builder.set_cert_store(X509StoreBuilder::new()?.build());
        builder.set_ca_file(path).map_err(file("sslrootcert", path))?;
    }
    if let Some(path) = tls.get("sslcert") {
        builder.set_certificate_chain_file(path).map_err(file("sslcert", path))?;
    }
    if let Some(path) = tls.get("sslkey") {
        builder.set_private_key_file(path, SslFiletype::PEM).map_err(file("sslkey", path))?;
    }
    if negotiation == SslNegotiation::Direct {
        set_postgresql_alpn(&mut builder)?;
    }
    builder.set_verify(match verify {
        Verify::Nothing => SslVerifyMode::NONE,
        Verify::Issuer | Verify::IssuerAndHost => SslVerifyMode::PEER,
    });
    let mut connector = MakeTlsConnector::new(builder.build());
    connector.set_callback(move |session, _host| {
        session.set_verify_hostname(verify == Verify::IssuerAndHost);
        Ok(())
    });
    Ok(connector)
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
