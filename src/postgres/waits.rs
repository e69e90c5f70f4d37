//! Tells what a session waits for: a lock of another session, or a standby.

use std::fmt;
use std::future::Future;
use std::io::Write;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use deadpool_postgres::{Object, Pool};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use crate::config::Endpoint;
use crate::postgres::connection::ConnectError;
use crate::telemetry::logging::RateLimited;

/// How often a call that does not return is explained.
const TICK: Duration = Duration::from_secs(5);
/// After this time the same reason is logged again. Longer than the pauses between the attempts of a lane.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// The last session in the chain of those that wait for each other's locks; parameter: the pid of the first. Any role
/// may see pid, role and application name; what a session waits for, its state and when its transaction began, only the
/// role itself and members of `pg_read_all_stats`.
const ROOT: &str = r#"
    WITH RECURSIVE chain (pid, depth) AS (
        SELECT $1::integer, 0
        UNION
        SELECT unnest(pg_blocking_pids(pid)), depth + 1 FROM chain WHERE depth < 9
    )
    SELECT c.pid, a.usename::text, a.application_name, coalesce(a.wait_event = 'SyncRep', false), c.depth > 0,
        current_setting('synchronous_standby_names'),
        (SELECT relation::regclass::text FROM pg_locks WHERE pid = $1 AND NOT granted LIMIT 1),
        a.state || coalesce(', in a transaction since '
            || to_char(a.xact_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), '')
    FROM chain c LEFT JOIN pg_stat_activity a USING (pid)
    ORDER BY depth DESC LIMIT 1"#;

/// Explains calls that wait, in the log and by a callback.
pub struct Waits {
    pool: Pool,
    tell: Box<dyn Fn(String) + Send + Sync>,
    /// What was told last, and when.
    told: Mutex<Option<(String, Instant)>>,
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waits").finish_non_exhaustive()
    }
}

/// Adds to the message of a failed call what it waited for last.
pub fn with_reason(message: String, reason: Option<String>) -> String {
    match reason {
        Some(reason) => format!("{message}; {reason}"),
        None => message,
    }
}

impl Waits {
    /// `tell` gets what waits and for what, again every five seconds while it lasts. The sessions that look for the
    /// reason are from `pool`.
    pub fn new(pool: Pool, tell: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self { pool, tell: Box::new(tell), told: Mutex::default() }
    }

    /// For commands: what waits and for what goes to stderr, once each.
    ///
    /// # Errors
    /// If the pool cannot be built.
    pub fn on_stderr(endpoint: &Endpoint) -> Result<Self, ConnectError> {
        let last = Mutex::new(String::new());
        Ok(Self::new(endpoint.pool(1)?, move |reason| {
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            if *last != reason {
                // The command itself goes on.
                let _ = writeln!(std::io::stderr(), "waiting: {reason}");
                *last = reason;
            }
        }))
    }

    /// Runs `work` of the session `pid`. Returns what it waited for last, too.
    pub async fn explain<T>(
        &self,
        pid: i32,
        doing: &str,
        work: impl Future<Output = T>,
    ) -> (T, Option<String>) {
        let mut work = pin!(work);
        let mut reason = None;
        loop {
            let look = async {
                sleep(TICK).await;
                self.reason(pid).await
            };
            tokio::select! {
                biased;
                done = &mut work => return (done, reason),
                found = look => {
                    if let Some(found) = &found {
                        self.note(doing, found);
                    }
                    reason = found;
                }
            }
        }
    }

    /// `None` if it is neither a lock nor a standby, or if that cannot be found out.
    async fn reason(&self, pid: i32) -> Option<String> {
        // One look at a time in this process: a lock that all lanes wait for must not double their connections.
        static LOOKS: Semaphore = Semaphore::const_new(1);
        let _one = LOOKS.acquire().await.ok()?;
        // Not returned to the pool: it is rarely needed.
        let client = Object::take(self.pool.get().await.ok()?);
        let row = client.query_one(ROOT, &[&pid]).await.ok()?;
        if row.try_get(3).ok()? {
            let names: String = row.try_get(5).ok()?;
            return Some(format!(
                "a COMMIT waits for a standby (SyncRep): synchronous_standby_names is {names:?}; pg_stat_replication \
                 lists the standbys that are connected"
            ));
        }
        if !row.try_get(4).ok()? {
            return None;
        }
        let holder: i32 = row.try_get(0).ok()?;
        // None for the lock of a transaction, which who waits for a row asks for.
        let table = row.try_get::<_, Option<String>>(6).ok()?;
        let on = table.map_or_else(String::new, |table| format!(", on {table}"));
        let state = row.try_get::<_, Option<String>>(7).ok()?;
        let state = state.map_or_else(String::new, |state| format!(" ({state})"));
        Some(match (row.try_get::<_, Option<String>>(1).ok()?, row.try_get::<_, Option<String>>(2).ok()?) {
            (Some(role), application) => format!(
                "a lock is held by the session with pid {holder}, role {role:?}, application_name {:?}{state}{on}; \
                 if that hangs, SELECT pg_terminate_backend({holder}) ends it",
                application.unwrap_or_default()
            ),
            (None, _) => "a lock is held by a prepared transaction (pg_prepared_xacts)".to_owned(),
        })
    }

    fn note(&self, doing: &str, reason: &str) {
        static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
        (self.tell)(format!("{doing}: {reason}"));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = told.as_ref().is_none_or(|(last, at)| last != reason || at.elapsed() >= FORGOTTEN_AFTER);
        if is_new && let Some(suppressed) = LIMIT.pass() {
            tracing::warn!(dependency = "database", doing, reason, suppressed, "waits; nothing is lost");
        }
        *told = Some((reason.to_owned(), Instant::now()));
    }
}
