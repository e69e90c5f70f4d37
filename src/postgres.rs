//! Connections to Postgres: what a URL means, TLS, time limits, and sessions that are all set up alike.
//!
//! Nothing here ever prints a password: errors name hosts, database and user.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use openssl::error::ErrorStack;
use openssl::ssl::{SslConnector, SslFiletype, SslMethod, SslVerifyMode};
use openssl::x509::store::X509StoreBuilder;
use postgres_openssl::{MakeTlsConnector, set_postgresql_alpn};
use tokio::task::JoinHandle;
use tokio_postgres::config::{Host, SslMode, SslNegotiation};
use tokio_postgres::{Client, Config};

use crate::disposition::{FailureClass, class_of_sqlstate};

const APPLICATION_NAME: &str = "payment-writer";
/// For one TCP connection, unless the URL has a `connect_timeout` of its own.
const TCP_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For everything until a session can be used: TCP, TLS, authentication, session settings. A server that
/// accepts connections and then says nothing (stopped, out of memory) is not waited for any longer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);
/// For data that nobody acknowledges: a server that vanished is noticed in this time, not in a quarter hour.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(20);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
/// For a free connection of a pool.
const POOL_WAIT_TIMEOUT: Duration = Duration::from_secs(5);

const EXPECTED_FORM: &str = "expected postgres://user:password@host:port/database?parameter=value, with known \
    parameters, and special characters in user and password percent-encoded";

/// What every session starts with.
///
/// `synchronous_commit` is raised to `on` where it is weaker, and left alone where it is stronger
/// (`remote_apply`). A transaction that sits idle holds row locks that the next owner of its partitions
/// waits for, so the server ends it after 30 s (25P03): its lane was stopped or cut off. The same goes for
/// a transaction whose machine is gone in the middle of a COPY, which only TCP can tell the server. `jit`
/// costs more than it gives on statements of a few milliseconds.
const SESSION_SETTINGS: &str = "\
    SELECT set_config('synchronous_commit', 'on', false) \
      WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply'); \
    SET TimeZone = 'UTC'; \
    SET DateStyle = 'ISO'; \
    SET default_transaction_isolation = 'read committed'; \
    SET idle_in_transaction_session_timeout = '30s'; \
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; \
    SET tcp_user_timeout = '20s'; \
    SET jit = off";

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URL is not one; never retried.
    #[error("the Postgres URL is not valid: {reason}")]
    InvalidUrl {
        /// What is wrong with it, without repeating any of it that could be secret.
        reason: String,
    },
    /// A certificate or key file that the URL names cannot be used.
    #[error("{parameter} of the Postgres URL, {path}: {source}")]
    TlsFile {
        /// The URL's parameter.
        parameter: &'static str,
        /// The file it names.
        path: String,
        /// OpenSSL's reasons.
        source: ErrorStack,
    },
    /// OpenSSL cannot be set up at all.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] ErrorStack),
    /// The server cannot be reached, or does not let us in.
    #[error("cannot connect to {target}: {}", describe(.source))]
    Refused {
        /// User, hosts and database.
        target: String,
        /// The driver's error.
        source: tokio_postgres::Error,
    },
    /// The server was reached and did not answer in time.
    #[error("cannot connect to {target}: no session within {} s", CONNECT_DEADLINE.as_secs())]
    TimedOut {
        /// User, hosts and database.
        target: String,
    },
    /// The pool cannot be built; an error in this program.
    #[error("cannot build the connection pool: {0}")]
    Pool(#[from] deadpool_postgres::BuildError),
}

impl ConnectError {
    /// The SQLSTATE, if the server itself refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Refused { source, .. } => source.code().map(|c| c.code()),
            Self::InvalidUrl { .. }
            | Self::TlsFile { .. }
            | Self::Tls(_)
            | Self::TimedOut { .. }
            | Self::Pool(_) => None,
        }
    }
}

/// The class of a database error. Without a SQLSTATE nobody answered: that passes.
pub fn class_of(error: &tokio_postgres::Error) -> FailureClass {
    match error.as_db_error() {
        Some(db) => class_of_sqlstate(db.code().code(), db.constraint()),
        None => FailureClass::Passing,
    }
}

/// A database error in one line: SQLSTATE and the server's message, or the chain of causes when the server
/// said nothing.
///
/// Messages of classes 22 (data exception) and 23 (integrity violation) may quote values of a row, and
/// `DETAIL` quotes whole rows: these are left out.
pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        let code = db.code().code();
        return match code.get(..2) {
            Some("22" | "23") => format!("SQLSTATE {code}"),
            _ => format!("SQLSTATE {code}: {}", db.message()),
        };
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Errors of TLS repeat their causes in their own text.
        let words = inner.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = inner.source();
    }
    text
}

/// Where and how to connect: a parsed URL.
///
/// `postgres://user:password@host:port,host2:port2/database?parameter=value`, parameters as in libpq:
/// `sslmode` (`disable`, `prefer`, the default, `require`, `verify-ca`, `verify-full`), `sslrootcert` (a
/// file, or `system`; by default the system's certificates), `sslcert`, `sslkey`, `sslnegotiation`,
/// `target_session_attrs`, `connect_timeout`, `application_name` and the others of `tokio-postgres`.
/// As with libpq, `sslmode=require` with an `sslrootcert` verifies like `verify-ca`.
#[derive(Clone)]
pub struct Endpoint {
    config: Config,
    tls: MakeTlsConnector,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.to_string()).finish()
    }
}

/// User, hosts and database, without the password.
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

impl Endpoint {
    /// Reads a URL. Touches the files that it names, but no network.
    pub fn parse(url: &str) -> Result<Self, ConnectError> {
        let (plain_url, tls) = TlsParameters::take_from(url)?;
        let mut config: Config = plain_url.parse().map_err(|e| invalid_url(&e))?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(ConnectError::InvalidUrl { reason: "it names no host".into() });
        }
        // The driver ends the credentials at the first @, and would take the rest of a password for a host.
        if config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if name.contains('@'))) {
            return Err(ConnectError::InvalidUrl { reason: EXPECTED_FORM.into() });
        }
        tls.mode_into(&mut config);
        let connector = tls.connector(config.get_ssl_negotiation())?;

        if config.get_application_name().is_none() {
            config.application_name(APPLICATION_NAME);
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(TCP_CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        if config.get_keepalives_interval().is_none() {
            config.keepalives_idle(KEEPALIVE_IDLE).keepalives_interval(KEEPALIVE_INTERVAL);
        }
        if config.get_keepalives_retries().is_none() {
            config.keepalives_retries(KEEPALIVE_RETRIES);
        }
        Ok(Self { config, tls: connector })
    }

    /// Opens one connection. The task that drives it ends when the client is dropped or the connection
    /// breaks.
    pub async fn connect(&self) -> Result<(Client, JoinHandle<()>), ConnectError> {
        let opened = tokio::time::timeout(CONNECT_DEADLINE, async {
            let (client, connection) = self.config.connect(self.tls.clone()).await?;
            let driver = tokio::spawn(async move {
                // Whoever uses the client gets the same error and knows what it means.
                if let Err(e) = connection.await {
                    tracing::debug!(error = describe(&e), "database connection ended");
                }
            });
            client.batch_execute(SESSION_SETTINGS).await?;
            Ok((client, driver))
        })
        .await;
        match opened {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(source)) => Err(ConnectError::Refused { target: self.to_string(), source }),
            Err(_) => Err(ConnectError::TimedOut { target: self.to_string() }),
        }
    }

    /// A pool of at most `size` connections. Opens none until one is asked for.
    pub fn pool(&self, size: usize) -> Result<Pool, ConnectError> {
        let manager = Manager::from_config(
            self.config.clone(),
            self.tls.clone(),
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        let prepare = Hook::async_fn(|client: &mut deadpool_postgres::ClientWrapper, _| {
            Box::pin(async move { client.batch_execute(SESSION_SETTINGS).await.map_err(HookError::Backend) })
        });
        Ok(Pool::builder(manager)
            .max_size(size)
            .wait_timeout(Some(POOL_WAIT_TIMEOUT))
            .create_timeout(Some(CONNECT_DEADLINE))
            .recycle_timeout(Some(CONNECT_DEADLINE))
            .post_create(prepare)
            .runtime(Runtime::Tokio1)
            .build()?)
    }
}

/// Opens one connection; see [`Endpoint`].
pub async fn connect(url: &str) -> Result<(Client, JoinHandle<()>), ConnectError> {
    Endpoint::parse(url)?.connect().await
}

/// A pool of at most `size` connections; see [`Endpoint`].
pub fn pool(url: &str, size: usize) -> Result<Pool, ConnectError> {
    Endpoint::parse(url)?.pool(size)
}

/// How far the server's certificate is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verify {
    Nothing,
    Issuer,
    IssuerAndHost,
}

/// The parameters that the driver leaves to its TLS connector.
#[derive(Debug, Default)]
struct TlsParameters {
    mode: Option<String>,
    root_certificates: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl TlsParameters {
    /// Takes our parameters out of the URL, since the driver refuses those that it does not know.
    fn take_from(url: &str) -> Result<(String, Self), ConnectError> {
        let invalid = |reason: &str| ConnectError::InvalidUrl { reason: reason.into() };
        let authority = url
            .strip_prefix("postgres://")
            .or_else(|| url.strip_prefix("postgresql://"))
            .ok_or_else(|| invalid("it does not begin with postgres:// or postgresql://"))?;
        // A question mark before the first @ belongs to the password.
        let credentials = authority.find('@').map_or(0, |at| at + 1);
        let prefix = url.len() - authority.len() + credentials;
        let Some(mark) = url.get(prefix..).and_then(|rest| rest.find('?')).map(|at| prefix + at) else {
            return Ok((url.into(), Self::default()));
        };

        let mut tls = Self::default();
        let mut kept = Vec::new();
        for parameter in url.get(mark + 1..).unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let slot = match name {
                "sslmode" => &mut tls.mode,
                "sslrootcert" => &mut tls.root_certificates,
                "sslcert" => &mut tls.certificate,
                "sslkey" => &mut tls.key,
                _ => {
                    kept.push(parameter);
                    continue;
                }
            };
            *slot = Some(
                percent_decoded(value)
                    .ok_or_else(|| invalid(&format!("the value of {name} is not well encoded")))?,
            );
        }
        if let Some(mode) = tls.mode.as_deref()
            && !["disable", "prefer", "require", "verify-ca", "verify-full"].contains(&mode)
        {
            return Err(invalid("sslmode is none of disable, prefer, require, verify-ca, verify-full"));
        }
        let mut plain = url.get(..mark).unwrap_or_default().to_owned();
        if !kept.is_empty() {
            plain.push('?');
            plain.push_str(&kept.join("&"));
        }
        Ok((plain, tls))
    }

    fn mode_into(&self, config: &mut Config) {
        config.ssl_mode(match self.mode.as_deref() {
            Some("disable") => SslMode::Disable,
            Some("require" | "verify-ca" | "verify-full") => SslMode::Require,
            _ => SslMode::Prefer,
        });
    }

    fn verify(&self) -> Verify {
        match self.mode.as_deref() {
            Some("verify-full") => Verify::IssuerAndHost,
            Some("verify-ca") => Verify::Issuer,
            Some("require") if self.root_certificates.is_some() => Verify::Issuer,
            _ => Verify::Nothing,
        }
    }

    fn connector(&self, negotiation: SslNegotiation) -> Result<MakeTlsConnector, ConnectError> {
        let file = |parameter, path: &str| {
            let path = path.to_owned();
            move |source| ConnectError::TlsFile { parameter, path, source }
        };
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        if let Some(path) = self.root_certificates.as_deref().filter(|path| *path != "system") {
            // In place of the system's certificates, not beside them: only who the file names is trusted.
            builder.set_cert_store(X509StoreBuilder::new()?.build());
            builder.set_ca_file(path).map_err(file("sslrootcert", path))?;
        }
        if let Some(path) = self.certificate.as_deref() {
            builder.set_certificate_chain_file(path).map_err(file("sslcert", path))?;
        }
        if let Some(path) = self.key.as_deref() {
            builder.set_private_key_file(path, SslFiletype::PEM).map_err(file("sslkey", path))?;
        }
        if negotiation == SslNegotiation::Direct {
            set_postgresql_alpn(&mut builder)?;
        }
        let verify = self.verify();
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
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let high = char::from(rest.next()?).to_digit(16)?;
        let low = char::from(rest.next()?).to_digit(16)?;
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

/// The driver's own words where they name nothing but one of its options; a badly escaped password can make
/// anything else part of them.
fn invalid_url(error: &tokio_postgres::Error) -> ConnectError {
    let words = error.source().map(ToString::to_string).unwrap_or_default();
    let reason = if words.starts_with("invalid value for option") { words } else { EXPECTED_FORM.to_owned() };
    ConnectError::InvalidUrl { reason }
}

#[cfg(test)]
mod tests {
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
            ("?sslmode=require", SslMode::Require, Verify::Nothing),
            ("?sslmode=require&sslrootcert=system", SslMode::Require, Verify::Issuer),
            ("?connect_timeout=3&sslmode=verify-ca", SslMode::Require, Verify::Issuer),
            ("?sslmode=verify-full&sslrootcert=system", SslMode::Require, Verify::IssuerAndHost),
        ];
        for (query, mode, verify) in cases {
            let url = format!("postgres://u:p?w@db/x{query}");
            let (_, tls) = TlsParameters::take_from(&url).unwrap();
            assert_eq!(tls.verify(), verify, "{query}");
            assert_eq!(Endpoint::parse(&url).unwrap().config.get_ssl_mode(), mode, "{query}");
        }
    }

    #[test]
    fn settings_of_the_url_win_over_ours() {
        let config = |url| Endpoint::parse(url).unwrap().config;
        let ours = config("postgres://u@db/x");
        assert_eq!(ours.get_application_name(), Some("payment-writer"));
        assert_eq!(ours.get_connect_timeout(), Some(&TCP_CONNECT_TIMEOUT));
        assert_eq!(ours.get_keepalives_idle(), KEEPALIVE_IDLE);
        let theirs = config("postgres://u@db/x?application_name=other&connect_timeout=1");
        assert_eq!(theirs.get_application_name(), Some("other"));
        assert_eq!(theirs.get_connect_timeout(), Some(&Duration::from_secs(1)));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_with_the_reason() {
        // Port 1 of the loopback: nobody listens, and nobody else can.
        let text = connect("postgres://writer:s3cret@127.0.0.1:1/payments").await.err().unwrap().to_string();
        assert!(text.contains("writer@127.0.0.1:1/payments"), "{text}");
        assert!(text.to_lowercase().contains("refused"), "{text}");
        assert!(!text.contains("s3cret"), "{text}");
    }
}
