//! The connection string of the database: a secret with parts that may be shown.

use std::fmt;
use std::path::{Path, PathBuf};

use tokio_postgres::config::{Host, SslMode};

use super::secret::{HIDDEN, Secret};

/// How the connection is protected: libpq's `sslmode`, without `allow`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Never TLS.
    Disable,
    /// TLS if the server offers it.
    Prefer,
    /// TLS, whoever the server is.
    Require,
    /// TLS, and the certificate is signed by a known authority.
    VerifyCa,
    /// As [`TlsMode::VerifyCa`], and the certificate names the host.
    VerifyFull,
}

/// A checked connection string, `postgresql://…` or `key=value …`.
#[derive(Clone)]
pub struct PostgresUrl {
    text: Secret,
    connection: tokio_postgres::Config,
    tls_mode: TlsMode,
    root_certificate: Option<PathBuf>,
}

impl PostgresUrl {
    /// Reads the string. The error is a rule for people and holds no part of the string, which may
    /// contain the password anywhere.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (rest, tls_mode, root_certificate) = take_tls_options(text)?;
        let mut connection: tokio_postgres::Config = rest.parse().map_err(|_| {
            "must be postgresql://user:password@host:port/database?options or key=value pairs; \
             special characters of a password in a URL are percent-encoded"
        })?;
        if connection.get_hosts().is_empty() && connection.get_hostaddrs().is_empty() {
            return Err("must name a host");
        }
        let tls_mode = match tls_mode {
            Some(mode) => mode,
            None => match connection.get_ssl_mode() {
                SslMode::Disable => TlsMode::Disable,
                SslMode::Require => TlsMode::Require,
                _ => TlsMode::Prefer,
            },
        };
        connection.ssl_mode(match tls_mode {
            TlsMode::Disable => SslMode::Disable,
            TlsMode::Prefer => SslMode::Prefer,
            TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull => SslMode::Require,
        });
        Ok(Self { text: Secret::new(text), connection, tls_mode, root_certificate })
    }

    /// What the driver connects with; the caller adds the application name and time limits.
    pub fn connection(&self) -> &tokio_postgres::Config {
        &self.connection
    }

    /// How the connection is protected.
    pub fn tls_mode(&self) -> TlsMode {
        self.tls_mode
    }

    /// `sslrootcert`: the file of certificate authorities to trust; `None` means the system's.
    pub fn root_certificate(&self) -> Option<&Path> {
        self.root_certificate.as_deref()
    }
}

impl PartialEq for PostgresUrl {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// User, hosts, ports and database, for people; the password is hidden.
impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("postgresql://")?;
        if let Some(user) = self.connection.get_user() {
            f.write_str(user)?;
            if self.connection.get_password().is_some() {
                write!(f, ":{HIDDEN}")?;
            }
            f.write_str("@")?;
        }
        let ports = self.connection.get_ports();
        for (index, host) in self.connection.get_hosts().iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match host {
                Host::Tcp(name) => f.write_str(name)?,
                #[cfg(unix)]
                Host::Unix(path) => write!(f, "{}", path.display())?,
            }
            // One port may stand for all hosts.
            if let Some(port) = ports.get(index).or_else(|| ports.first()) {
                write!(f, ":{port}")?;
            }
        }
        if let Some(database) = self.connection.get_dbname() {
            write!(f, "/{database}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

type WithoutTls = (String, Option<TlsMode>, Option<PathBuf>);

/// The driver knows neither `verify-ca`, `verify-full` nor `sslrootcert`, which every other client
/// takes: they are read here and taken out of a URL's options.
fn take_tls_options(text: &str) -> Result<WithoutTls, &'static str> {
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let (base, query) = match text.split_once('?') {
        Some((base, query)) if is_url => (base, query),
        _ => return Ok((text.to_owned(), None, None)),
    };
    let (mut mode, mut root_certificate, mut kept) = (None, None, Vec::new());
    for option in query.split('&') {
        match option.split_once('=') {
            Some(("sslmode", value)) => {
                mode = Some(match value {
                    "disable" => TlsMode::Disable,
                    "prefer" => TlsMode::Prefer,
                    "require" => TlsMode::Require,
                    "verify-ca" => TlsMode::VerifyCa,
                    "verify-full" => TlsMode::VerifyFull,
                    _ => {
                        return Err(
                            "has an sslmode other than disable, prefer, require, verify-ca, verify-full",
                        );
                    }
                });
            }
            Some(("sslrootcert", value)) => {
                let path =
                    percent_decode(value).ok_or("has an sslrootcert that is not percent-encoded UTF-8")?;
                root_certificate = Some(PathBuf::from(path));
            }
            _ => kept.push(option),
        }
    }
    let rest = if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) };
    Ok((rest, mode, root_certificate))
}

fn percent_decode(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        bytes.extend_from_slice(part.get(2..)?.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_connection_string_has_no_password() {
        for text in [
            "postgresql://writer:hunter2@db1:5433,db2:5434/payments?connect_timeout=5",
            "host=db1,db2 port=5433,5434 user=writer password=hunter2 dbname=payments",
        ] {
            let url = PostgresUrl::parse(text).unwrap();
            assert_eq!(url.to_string(), "postgresql://writer:***@db1:5433,db2:5434/payments");
            assert!(!format!("{url:?}").contains("hunter2"));
        }
    }

    #[test]
    fn a_refused_connection_string_is_not_repeated() {
        for text in [
            "postgresql://writer:hunter2@db/x?hunter2=1",
            "hunter2",
            "postgresql://w:h@:x:hunter2/",
            "port=hunter2",
        ] {
            assert!(!PostgresUrl::parse(text).unwrap_err().contains("hunter2"));
        }
        assert_eq!(PostgresUrl::parse("user=x").unwrap_err(), "must name a host");
    }

    #[test]
    fn tls_options_that_the_driver_does_not_know_are_understood() {
        let url = PostgresUrl::parse(
            "postgres://w@db/p?sslmode=verify-full&connect_timeout=3&sslrootcert=/a%20b.pem",
        )
        .unwrap();
        assert_eq!(url.tls_mode(), TlsMode::VerifyFull);
        assert_eq!(url.root_certificate(), Some(Path::new("/a b.pem")));
        assert_eq!(url.connection().get_ssl_mode(), SslMode::Require);
        assert!(url.connection().get_connect_timeout().is_some());
        assert_eq!(PostgresUrl::parse("postgres://w@db/p").unwrap().tls_mode(), TlsMode::Prefer);
        assert!(PostgresUrl::parse("postgres://w@db/p?sslmode=allow").is_err());
    }
}
