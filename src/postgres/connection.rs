//! Connections to Postgres, with timeouts and the same session settings everywhere.
//!
//! Errors name hosts, database and user, never a password.

use std::error::Error as StdError;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use futures_util::future::BoxFuture;
use postgres_openssl::{MakeTlsConnector, TlsConnector, TlsStream};
use tokio::task::JoinHandle;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, Socket};

use crate::config::{Endpoint, EndpointError};
use crate::domain::outcome::{FailureClass, class_of_sqlstate};
use crate::secrets::{READ_MAX, output_of};

/// Timeout for opening a session: TCP, TLS, authentication, session settings. It also covers a server that
/// accepts connections and then does not answer (stopped, out of memory).
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);
/// A password command that takes longer is killed.
const PASSWORD_MAX: Duration = Duration::from_secs(10);
/// Connections that are opened together share the output of one run.
const PASSWORD_SHARED: Duration = Duration::from_secs(5);
/// Timeout for finding out whether there is a pooler in transaction mode.
const POOLER_CHECK_DEADLINE: Duration = Duration::from_secs(5);
/// Timeout for a free connection of a pool.
const POOL_WAIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Settings of every session. All that the program depends on are set, because `ALTER ROLE` and `ALTER DATABASE` can
/// change their defaults; `default_transaction_read_only` stays, because it can be deliberate.
///
/// `row_security = off` makes the server refuse a query whose rows a policy would hide.
/// `synchronous_commit` is raised to `on` if it is weaker, and kept if it is stronger (`remote_apply`). An
/// idle transaction of a stopped or disconnected lane holds row locks that the next owner of its partitions
/// waits for, so the server ends it after 30 s (25P03). The TCP settings do the same for a client machine
/// that disappears in the middle of a COPY. `jit` is slower for statements of a few milliseconds.
const SESSION_SETTINGS: &str = "\
    SET statement_timeout = 0; SET lock_timeout = 0; SET idle_session_timeout = 0; \
    SELECT set_config('transaction_timeout', '0', false) FROM pg_settings WHERE name = 'transaction_timeout'; \
    SELECT set_config('synchronous_commit', 'on', false) \
      WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply'); \
    SET TimeZone = 'UTC'; \
    SET DateStyle = 'ISO'; \
    SET default_transaction_isolation = 'read committed'; SET default_transaction_deferrable = off; \
    SET row_security = off; SET client_min_messages = 'notice'; SET extra_float_digits = 1; \
    SET quote_all_identifiers = off; \
    SET idle_in_transaction_session_timeout = '30s'; \
    SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; \
    SET tcp_user_timeout = '20s'; \
    SET jit = off";

/// The settings of [`SESSION_SETTINGS`] that this session does not have, as `name=value`: something between it and
/// the server does not keep a session. The TCP settings do not exist on a socket of the machine.
pub async fn lost_settings(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let query = "
        SELECT name || '=' || current_setting(name) FROM unnest($1::text[], $2::text[]) AS s (name, value)
        WHERE current_setting(name) NOT LIKE value || '%' AND name NOT LIKE 'tcp%'";
    let set =
        SESSION_SETTINGS.split(';').filter_map(|set| set.trim().strip_prefix("SET ")?.split_once(" = "));
    let (names, values): (Vec<&str>, Vec<&str>) =
        set.map(|(name, value)| (name, value.trim_matches('\''))).unzip();
    client.query(query, &[&names, &values]).await?.iter().map(|row| row.try_get(0)).collect()
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server cannot be reached or refuses the connection.
    #[error("cannot connect to {target}: {}", describe(.source))]
    Refused {
        /// User, hosts and database.
        target: String,
        /// The driver's error.
        source: tokio_postgres::Error,
    },
    /// The session was not open in time.
    #[error("cannot connect to {target}: no session within {} s", CONNECT_DEADLINE.as_secs())]
    TimedOut {
        /// User, hosts and database.
        target: String,
    },
    /// Statements of one session are given to several server processes, so that settings, prepared statements and
    /// locks of the session are lost.
    #[error(
        "cannot connect to {target}: the database is reached through a pooler in transaction mode; use its session \
         mode (pool_mode = session of PgBouncer) or a direct connection"
    )]
    Pooled {
        /// User, hosts and database.
        target: String,
    },
    /// The pool cannot be built: an error in this program.
    #[error("cannot build the connection pool: {0}")]
    Pool(#[from] deadpool_postgres::BuildError),
}

impl ConnectError {
    /// The class of the failure.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Refused { source, .. } => class_of(source),
            Self::TimedOut { .. } | Self::Pool(_) => FailureClass::Transient,
            Self::Pooled { .. } => FailureClass::Persistent,
        }
    }
}

/// The class of a database error. An error without a SQLSTATE (no answer from the server) is transient.
pub fn class_of(error: &tokio_postgres::Error) -> FailureClass {
    match error.as_db_error() {
        Some(db) => class_of_sqlstate(db.code().code(), db.constraint()),
        None => FailureClass::Transient,
    }
}

/// A database error in one line: SQLSTATE and the server's message, or the chain of causes without an answer
/// from the server.
///
/// Messages of classes 22 (data exception) and 23 (integrity violation) can quote values of a row, and
/// `DETAIL` can quote whole rows: these are omitted. The names of table, column and constraint are not.
pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        let code = db.code().code();
        return match code.get(..2) {
            Some("22" | "23") => format!("SQLSTATE {code}{}", named(db)),
            // read_only_sql_transaction
            _ if code == "25006" => format!(
                "SQLSTATE {code}: {} (the server is a standby, or default_transaction_read_only is on)",
                db.message()
            ),
            // invalid_password, also once a password has expired
            _ if code == "28P01" => {
                format!("SQLSTATE {code}: {} (or the role's VALID UNTIL has passed)", db.message())
            }
            _ => format!("SQLSTATE {code}: {}", db.message()),
        };
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(own) = inner.downcast_ref::<EndpointError>() {
            return own.to_string();
        }
        // TLS errors repeat their causes in their own text.
        let words = inner.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = inner.source();
    }
    text
}

/// The names in an error; with the remedy for a column that may not be null and that this program may not know.
fn named(error: &DbError) -> String {
    let name = |what: &str, name: Option<&str>| name.map_or(String::new(), |name| format!(" {what} {name}"));
    let table = name("of", error.table());
    match (error.column(), error.constraint()) {
        (Some(column), _) if *error.code() == SqlState::NOT_NULL_VIOLATION => {
            format!(
                ": column {column}{table} may not be null; ALTER COLUMN {column} SET DEFAULT or DROP NOT NULL of the payment \
                 table lets rows in again"
            )
        }
        (_, None) => String::new(),
        (_, constraint) => format!(":{}{table}", name("constraint", constraint)),
    }
}

/// COMMITs of this process that were committed on the primary alone, because their wait for a standby was cancelled.
static CANCELLED_STANDBY_WAITS: AtomicU64 = AtomicU64::new(0);

/// Number of COMMITs of this process whose wait for a standby was cancelled. It is up to date when a COMMIT returns.
pub(super) fn cancelled_standby_waits() -> u64 {
    CANCELLED_STANDBY_WAITS.load(Ordering::Acquire)
}

/// Drives a connection. The server tells only by a warning that the wait for a standby was cancelled; its SQLSTATE is
/// that of all warnings, and its text is translated.
async fn drive(mut connection: Connection<Socket, TlsStream<Socket>>) {
    loop {
        match poll_fn(|context| connection.poll_message(context)).await {
            Some(Ok(AsyncMessage::Notice(notice))) if notice.routine() == Some("SyncRepWaitForLSN") => {
                CANCELLED_STANDBY_WAITS.fetch_add(1, Ordering::AcqRel);
            }
            Some(Ok(_)) => {}
            None => return,
            // The user of the client gets the same error and handles it, once the connection is dropped.
            Some(Err(e)) => return tracing::debug!(error = describe(&e), "database connection ended"),
        }
    }
}

/// Process id of the session's server process.
pub async fn backend_pid(client: &Client) -> Result<i32, tokio_postgres::Error> {
    // Without a prepared statement, which may be lost.
    client.query_typed_one("SELECT pg_backend_pid()", &[]).await?.try_get(0)
}

impl Endpoint {
    /// Opens one connection. The task that drives it ends when the client is dropped or the connection
    /// breaks.
    pub async fn connect(&self) -> Result<(Client, JoinHandle<()>), ConnectError> {
        let target = || self.to_string();
        let opened = match tokio::time::timeout(CONNECT_DEADLINE, self.open()).await {
            Ok(opened) => opened.map_err(|source| ConnectError::Refused { target: target(), source }),
            Err(_) => Err(ConnectError::TimedOut { target: target() }),
        };
        let connection = opened.inspect_err(|_| self.is_direct.store(false, Ordering::Relaxed))?;
        if !self.is_direct.load(Ordering::Relaxed) {
            // Without an answer it stays unknown: the server may permit no second connection.
            match tokio::time::timeout(POOLER_CHECK_DEADLINE, self.shares_sessions(&connection.0)).await {
                Ok(Ok(true)) => return Err(ConnectError::Pooled { target: target() }),
                Ok(Ok(false)) => self.is_direct.store(true, Ordering::Relaxed),
                Ok(Err(_)) | Err(_) => {}
            }
        }
        Ok(connection)
    }

    /// Whether a session of the client is not one of the server, as behind a pooler in transaction mode: two sessions have
    /// the same server process, or one changes it. In this order that cannot be missed while a pooler has no other
    /// clients, whether it takes the server connection that was used last (as PgBouncer does) or the one that was used
    /// first (`server_round_robin`).
    async fn shares_sessions(&self, client: &Client) -> Result<bool, tokio_postgres::Error> {
        let (other, _driver) = self.open().await?;
        let first = backend_pid(client).await?;
        let second = backend_pid(&other).await?;
        let is_stable = backend_pid(&other).await? == second && backend_pid(client).await? == first;
        Ok(first == second || !is_stable)
    }

    async fn open(&self) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        let mut config = self.config.clone();
        let secrets = async {
            let endpoint = self.clone();
            let read = move || Ok((endpoint.password()?, endpoint.tls.connector()?));
            let read = self.files.within(READ_MAX, read).await;
            let (password, tls) = read.map_err(EndpointError::Unread).flatten()?;
            if let Some(password) = self.printed_password().await?.or(password) {
                config.password(password);
            }
            Ok(tls)
        };
        let secrets = Secrets(secrets.await);
        let (client, connection) = config.connect(secrets).await?;
        let driver = tokio::spawn(drive(connection));
        client.batch_execute(SESSION_SETTINGS).await?;
        Ok((client, driver))
    }

    /// The password that the password command prints at this moment; `None` without such a command.
    async fn printed_password(&self) -> Result<Option<String>, EndpointError> {
        if self.password_command.is_empty() {
            return Ok(None);
        }
        let mut last = self.printed.lock().await;
        let printed = match last.take() {
            Some((at, printed)) if at.elapsed() < PASSWORD_SHARED => (at, printed),
            _ => {
                let (command, variables) = (self.password_command.clone(), self.variables());
                let run = move || output_of(&command, &variables, PASSWORD_MAX);
                let output = self.files.within(PASSWORD_MAX + READ_MAX, run).await.flatten();
                let password = output.map(|output| output.trim_end_matches(['\r', '\n']).to_owned());
                (
                    Instant::now(),
                    match password {
                        Ok(password) if password.is_empty() => Err("it printed nothing".to_owned()),
                        password => password,
                    },
                )
            }
        };
        let (_, password) = last.insert(printed);
        password.clone().map(Some).map_err(EndpointError::PasswordCommand)
    }

    /// A pool of at most `size` connections, which are opened on demand.
    pub fn pool(&self, size: usize) -> Result<Pool, ConnectError> {
        let config = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(self.config.clone(), self.clone(), config);
        Ok(Pool::builder(manager)
            .max_size(size)
            .wait_timeout(Some(POOL_WAIT_TIMEOUT))
            .create_timeout(Some(CONNECT_DEADLINE))
            .recycle_timeout(Some(CONNECT_DEADLINE))
            .runtime(Runtime::Tokio1)
            .build()?)
    }
}

/// TLS with what the files and the command say at this moment, or why they cannot be used: the driver and the pool take
/// no other error before a connection is open.
struct Secrets(Result<MakeTlsConnector, EndpointError>);

impl MakeTlsConnect<Socket> for Secrets {
    type Stream = TlsStream<Socket>;
    type TlsConnect = TlsConnector;
    type Error = EndpointError;

    fn make_tls_connect(&mut self, host: &str) -> Result<TlsConnector, EndpointError> {
        let tls = self.0.as_mut().map_err(|error| error.clone())?;
        Ok(MakeTlsConnect::<Socket>::make_tls_connect(tls, host)?)
    }
}

// For the pool.
impl Connect for Endpoint {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        Box::pin(self.open())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_with_the_reason() {
        // No process listens on port 1 of the loopback, and unprivileged ones cannot.
        let endpoint = Endpoint::parse("postgres://writer:s3cret@127.0.0.1:1/payments").unwrap();
        let text = endpoint.connect().await.err().unwrap().to_string();
        assert!(text.contains("writer@127.0.0.1:1/payments"), "{text}");
        assert!(text.to_lowercase().contains("refused"), "{text}");
        assert!(!text.contains("s3cret"), "{text}");
    }

    #[tokio::test]
    async fn what_keeps_a_secret_from_being_read_is_the_reason_without_the_secret() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("passwords");
        std::fs::write(&file, "*:*:*:*:s3cret").unwrap();
        let url = format!("postgres://writer@{}/payments", server.local_addr().unwrap());
        for (script, words) in [
            ("echo s3cret; echo s3cret >&2; exit 3", "exit status: 3"),
            ("echo", "it printed nothing"),
            ("exec /no/such/s3cret", "exit status: 127"),
        ] {
            let mut endpoint = Endpoint::parse(&url).unwrap();
            endpoint.password_command = ["sh", "-c", script].map(str::to_owned).to_vec();
            let text = endpoint.connect().await.err().unwrap().to_string();
            assert!(text.contains("postgres.password_command") && text.contains(words), "{text}");
            assert!(!text.contains("s3cret") && !text.contains("TLS"), "{text}");
        }
        let endpoint = Endpoint::parse(&format!("{url}?passfile={}", file.display())).unwrap();
        std::fs::write(&file, "other:*:*:*:s3cret").unwrap();
        let text = endpoint.connect().await.err().unwrap().to_string();
        assert!(
            text.contains("passfile") && text.contains("no line fits") && !text.contains("s3cret"),
            "{text}"
        );
    }
}
