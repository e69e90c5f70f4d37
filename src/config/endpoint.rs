//! Postgres URLs: hosts, TLS and timeouts. Never prints a password.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use openssl::error::ErrorStack;
use openssl::ssl::{SslConnector, SslFiletype, SslMethod, SslVerifyMode};
use openssl::x509::store::X509StoreBuilder;
use percent_encoding::percent_decode_str;
use postgres_openssl::{MakeTlsConnector, set_postgresql_alpn};
use serde::de::{Deserialize, Deserializer, Error as _};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, SslNegotiation};

use super::values::checked;

/// Parameters that the URL can override. An unreachable host is given up after 5 s. Unacknowledged data is a
/// failure after 20 s, so that a server that vanished is noticed sooner than by TCP's default of 15 minutes.
const DEFAULTS: &str = "application_name=payment-writer&connect_timeout=5&tcp_user_timeout=20\
    &keepalives_idle=15&keepalives_interval=5&keepalives_retries=3";

const EXPECTED_FORM: &str = "expected postgres://user:password@host:port/database?parameter=value, with known \
    parameters, and special characters in user and password percent-encoded";

/// Parameters of libpq that have no effect here: there is no GSSAPI, and the driver always uses SNI and protocol 3.0.
const WITHOUT_EFFECT: [&str; 8] = [
    "gssencmode",
    "gssdelegation",
    "gsslib",
    "krbsrvname",
    "sslsni",
    "sslcompression",
    "min_protocol_version",
    "max_protocol_version",
];

/// Parameters of libpq that are refused, because without their effect another server or a weaker connection could be
/// used.
const NOT_SUPPORTED: [&str; 12] = [
    "service",
    "servicefile",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
    "sslcertmode",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "requirepeer",
    "require_auth",
    "requiressl",
    "replication",
];

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

/// URL parameters that tokio-postgres does not know, by name.
type OwnParameters = BTreeMap<&'static str, String>;

struct Parameters {
    /// The URL as tokio-postgres takes it.
    plain_url: String,
    own: OwnParameters,
    ignored: Vec<String>,
}

/// Sorts the parameters of the URL, because tokio-postgres rejects those that it does not know, and adds [`DEFAULTS`].
fn take_parameters(url: &str) -> Result<Parameters, EndpointError> {
    let authority = url
        .strip_prefix("postgres://")
        .or_else(|| url.strip_prefix("postgresql://"))
        .ok_or_else(|| invalid("it does not begin with postgres:// or postgresql://"))?;
    // A question mark before the first @ belongs to the password.
    let credentials = authority.find('@').map_or(0, |at| at + 1);
    let mark = authority.get(credentials..).and_then(|rest| rest.find('?')).map(|at| credentials + at);
    let (place, query) = mark.and_then(|at| authority.split_at_checked(at)).unwrap_or((authority, ""));
    let (mut fallback_name, mut rest) = (String::new(), String::new());
    let mut own = OwnParameters::new();
    let mut is_encrypted = false;
    let mut ignored = Vec::new();
    for parameter in query.trim_start_matches('?').split('&').filter(|p| !p.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let own_name = ["sslmode", "sslrootcert", "sslcert", "sslkey", "passfile"]
            .into_iter()
            .find(|known| *known == name);
        if let Some(name) = own_name {
            let value = percent_decode_str(value)
                .decode_utf8()
                .map_err(|_| invalid(&format!("the value of {name} is not well encoded")))?;
            own.insert(name, value.into_owned());
            continue;
        }
        match (name, value) {
            // As in libpq, which knows no other value.
            ("ssl", "true") => is_encrypted = true,
            ("ssl", _) => return Err(invalid("ssl takes no value but true; use sslmode")),
            ("keepalives_count", count) => rest.extend(["&keepalives_retries=", count]),
            ("fallback_application_name", name) => fallback_name = format!("&application_name={name}"),
            ("target_session_attrs", "primary") => rest.push_str("&target_session_attrs=read-write"),
            ("target_session_attrs", "standby") => rest.push_str("&target_session_attrs=read-only"),
            ("target_session_attrs", "prefer-standby") => {
                return Err(invalid("target_session_attrs=prefer-standby is not supported"));
            }
            // The driver uses no other encoding.
            ("client_encoding", encoding)
                if ["utf8", "utf-8", "auto"].contains(&encoding.to_ascii_lowercase().as_str()) => {}
            ("client_encoding", _) => return Err(invalid("client_encoding is not UTF8")),
            ("gssencmode", "disable") => {}
            ("gssencmode", "require") => return Err(invalid("gssencmode=require is not supported")),
            _ if WITHOUT_EFFECT.contains(&name) => ignored.push(name.to_owned()),
            _ if NOT_SUPPORTED.contains(&name) => return Err(invalid(&format!("{name} is not supported"))),
            _ => rest.extend(["&", parameter]),
        }
    }
    if is_encrypted {
        let mode = own.entry("sslmode").or_insert_with(|| "require".to_owned());
        if !["require", "verify-ca", "verify-full"].contains(&mode.as_str()) {
            return Err(invalid("ssl=true contradicts sslmode"));
        }
    }
    let plain_url = format!("postgres://{place}?{DEFAULTS}{fallback_name}{rest}");
    Ok(Parameters { plain_url, own, ignored })
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
mod tests {
    use std::time::Duration;

    use tokio_postgres::config::TargetSessionAttrs;

    use super::*;

    fn refusal(url: &str) -> String {
        Endpoint::parse(url).map(|e| e.to_string()).unwrap_err().to_string()
    }

    #[test]
    fn a_url_is_shown_without_its_password() {
        let endpoint = Endpoint::parse("postgres://writer:s3cret@db1:5433,db2:5434/payments").unwrap();
        assert_eq!(endpoint.to_string(), "writer@db1:5433,db2:5434/payments");
        assert!(!format!("{endpoint:?}").contains("s3cret"));
    }

    #[test]
    fn a_refused_url_never_repeats_the_password() {
        for url in [
            "mysql://writer:s3cret@db/payments",
            "writer:s3cret@db/payments",
            "postgres://writer:s3cret/x@db:port/payments",
            "postgres://writer:x@s3cret=1@db:5432/payments",
            "postgres://writer:x?s3cret=1@db/payments?no_such_option=1",
            "postgres://writer:x@db/payments?s3cret=1",
            "postgres://writer:s3cret@db/payments?sslmode=maybe",
            "postgres://writer:s3cret@db/payments?connect_timeout=s3cret",
            "host=db password=s3cret",
            "postgres://writer:w@:x:s3cret/",
            "s3cret",
        ] {
            let text = refusal(url);
            assert!(!text.contains("s3cret"), "{url}: {text}");
        }
    }

    #[test]
    fn a_refused_url_says_what_is_wrong() {
        assert!(refusal("host=db").contains("postgres://"));
        assert!(refusal("postgres://db/x?sslmode=maybe").contains("verify-full"));
        assert!(refusal("postgres://db:70000/x").contains("port"));
        assert!(refusal("postgres:///x").contains("no host"));
        assert!(refusal("postgres://db/x?sslrootcert=/no/such%20file").contains("/no/such file"));
    }

    #[test]
    fn tls_parameters_mean_what_they_mean_to_libpq() {
        let cases = [
            ("", SslMode::Prefer, Verify::Nothing),
            ("?sslmode=disable", SslMode::Disable, Verify::Nothing),
            ("?sslmode=prefer", SslMode::Prefer, Verify::Nothing),
            ("?sslmode=allow", SslMode::Prefer, Verify::Nothing),
            ("?ssl=true", SslMode::Require, Verify::Nothing),
            ("?sslmode=verify-ca&ssl=true", SslMode::Require, Verify::Issuer),
            ("?sslmode=require", SslMode::Require, Verify::Nothing),
            ("?sslmode=require&sslrootcert=system", SslMode::Require, Verify::Issuer),
            ("?connect_timeout=3&sslmode=verify-ca", SslMode::Require, Verify::Issuer),
            ("?sslmode=verify-full&sslrootcert=system", SslMode::Require, Verify::IssuerAndHost),
        ];
        for (query, mode, verify) in cases {
            let url = format!("postgres://u:p?w@db/x{query}");
            let own = take_parameters(&url).unwrap().own;
            assert_eq!(mode_and_verify(&own).unwrap(), (mode, verify), "{query}");
            assert_eq!(Endpoint::parse(&url).unwrap().config.get_ssl_mode(), mode, "{query}");
        }
    }

    #[test]
    fn parameters_of_the_url_override_the_defaults() {
        let config = |url| Endpoint::parse(url).unwrap().config;
        let default = config("postgres://u@db/x");
        assert_eq!(default.get_application_name(), Some("payment-writer"));
        assert_eq!(default.get_connect_timeout(), Some(&Duration::from_secs(5)));
        assert_eq!(default.get_tcp_user_timeout(), Some(&Duration::from_secs(20)));
        assert_eq!(default.get_keepalives_idle(), Duration::from_secs(15));
        assert_eq!(default.get_keepalives_interval(), Some(Duration::from_secs(5)));
        assert_eq!(default.get_keepalives_retries(), Some(3));
        let set = config("postgres://u@db/x?application_name=other&connect_timeout=1");
        assert_eq!(set.get_application_name(), Some("other"));
        assert_eq!(set.get_connect_timeout(), Some(&Duration::from_secs(1)));
    }

    #[test]
    fn parameters_of_libpq_are_taken_ignored_or_refused_by_name() {
        let parse = |query: &str| Endpoint::parse(&format!("postgres://u:p@db/x?{query}"));
        let taken = parse(
            "keepalives_count=7&fallback_application_name=other&client_encoding=UTF8&target_session_attrs=primary",
        )
        .unwrap();
        assert_eq!(taken.config.get_keepalives_retries(), Some(7));
        assert_eq!(taken.config.get_application_name(), Some("other"));
        assert_eq!(taken.config.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
        assert!(taken.ignored.is_empty());
        let both = parse("application_name=mine&fallback_application_name=other").unwrap();
        assert_eq!(both.config.get_application_name(), Some("mine"));
        let standby = parse("target_session_attrs=standby").unwrap();
        assert_eq!(standby.config.get_target_session_attrs(), TargetSessionAttrs::ReadOnly);

        for name in WITHOUT_EFFECT {
            assert_eq!(parse(&format!("{name}=1")).unwrap().ignored, [name]);
        }
        for name in NOT_SUPPORTED {
            assert!(refusal(&format!("postgres://u:p@db/x?{name}=1")).contains(name), "{name}");
        }
        for (parameter, name) in [
            ("target_session_attrs=prefer-standby", "prefer-standby"),
            ("client_encoding=LATIN1", "client_encoding"),
            ("gssencmode=require", "gssencmode"),
            ("ssl=yes", "sslmode"),
        ] {
            let text = refusal(&format!("postgres://u:p@db/x?{parameter}"));
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn the_password_file_is_read_again_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        let url = format!("postgres://u@db1,db2:6000/x?passfile={}", path.display());
        assert!(refusal(&url).contains("passwords"));
        std::fs::write(&path, "# comment\ndb1:5433:x:u:no\nother:*:*:*:no\n").unwrap();
        assert!(refusal(&url).contains("no line fits"));
        for (hosts, line, password) in [
            ("db1", "db1:*:x:u:one", "one"),
            ("db2:6000", "db2:6000:*:u:with\\:colon\\\\", "with:colon\\"),
            ("db1,db2:6000", "*:*:*:*:any:rest", "any"),
            // The password of one host is not given to another.
            ("db1,db2:6000", "db1:*:x:u:one", "later"),
        ] {
            std::fs::write(&path, format!("no:*:*:*:no\n{line}\n*:*:*:*:later\n")).unwrap();
            let url = url.replace("db1,db2:6000", hosts);
            assert_eq!(
                Endpoint::parse(&url).unwrap().password().unwrap().as_deref(),
                Some(password),
                "{line}"
            );
        }
        let endpoint = Endpoint::parse(&url).unwrap();
        std::fs::write(&path, "*:*:x:u:changed").unwrap();
        assert_eq!(endpoint.password().unwrap().as_deref(), Some("changed"));
        // A password of the URL precedes it.
        let url = url.replace("u@", "u:p@");
        assert_eq!(Endpoint::parse(&url).unwrap().password_file, None);
    }
}
