//! Advisory locks, which coordinate all processes that use one database.
//!
//! All keys have the form `pg_advisory_lock(CLASS, key)`: the first number identifies this program, the
//! second the purpose. Keys are never reused for another purpose.

use std::fmt;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// First number of every key: "PWRT" in ASCII.
const CLASS: i32 = 0x5057_5254;

/// Second number of a key: the purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum LockKey {
    /// Held by a session while it changes the schema.
    Migrate = 1,
    /// Held by a transaction while it creates or archives a month.
    Months = 2,
    /// Held in shared mode by every batch's transaction, in exclusive mode by a change of generations.
    Rotation = 3,
    /// Held by the one session that prunes.
    Prune = 4,
    /// Held by a transaction while it binds the database to a group.
    Binding = 5,
    /// Held by the one session that replays dead letters.
    Replay = 6,
}

/// The arguments of `pg_advisory_lock` and similar functions.
impl fmt::Display for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{CLASS}, {}", *self as i32)
    }
}

impl LockKey {
    /// Takes the lock for this session; false if another session holds it.
    pub async fn try_lock(self, client: &Client) -> Result<bool, tokio_postgres::Error> {
        client.query_one(&format!("SELECT pg_try_advisory_lock({self})"), &[]).await?.try_get(0)
    }
}

/// Longest time that a writer waits for a change of months or generations.
pub const LOCK_TIMEOUT_MS: u32 = 50;

/// Result of a step that needs a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The step was done.
    Done,
    /// Other sessions held the lock during all attempts; the next pass retries.
    Locked,
}

/// Runs statements as one transaction with a lock timeout of [`LOCK_TIMEOUT_MS`], up to `tries` times while it
/// fails with one of the `retried` codes. They are sent in one message together with the COMMIT, so a process
/// that is stopped or disconnected does not keep the locks.
pub(crate) async fn with_short_locks(
    client: &Client,
    statements: &str,
    retried: &[SqlState],
    tries: u32,
    pause: Duration,
) -> Result<Step, tokio_postgres::Error> {
    let transaction = format!("BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; {statements}; COMMIT");
    for attempt in 1..=tries {
        let Err(error) = client.batch_execute(&transaction).await else { return Ok(Step::Done) };
        client.batch_execute("ROLLBACK").await?;
        if !error.code().is_some_and(|code| retried.contains(code)) {
            return Err(error);
        }
        if attempt < tries {
            tokio::time::sleep(pause).await;
        }
    }
    Ok(Step::Locked)
}
