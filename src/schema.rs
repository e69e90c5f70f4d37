//! The database's schema: its steps, what ran when, and whether this program can work with it.
//!
//! Steps are numbered SQL files, each with a file that undoes it; refinery runs them and keeps the history.
//! A step that ran is never edited: its checksum is in the history.

pub mod cursors;
pub mod locks;
pub mod months;
mod report;
mod undo;

use std::time::{Duration, Instant};

use refinery::{Migration, Runner};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::postgres::describe;
use locks::LockKey;

pub use report::{print_migrate, print_status, print_undo};
pub use undo::{UndoReport, undo};

/// The schema that holds everything of ours, the history included.
pub const SCHEMA: &str = "payment_writer";
const HISTORY: &str = "payment_writer.schema_history";

/// How long to wait for another session that is changing the schema.
const MIGRATE_WAIT_MAX: Duration = Duration::from_secs(60);
const MIGRATE_POLL: Duration = Duration::from_millis(100);
/// For each lock on a table: whoever queues behind a waiting DDL statement waits as long as it does.
const DDL_LOCK_TIMEOUT_MS: u32 = 1_000;

/// One step forward and the way back.
struct Step {
    /// File name without its ending.
    name: &'static str,
    up: &'static str,
    down: &'static str,
}

macro_rules! step {
    ($version:literal, $name:literal) => {
        Step {
            name: concat!("V", $version, "__", $name),
            up: include_str!(concat!("../sql/V", $version, "__", $name, ".sql")),
            down: include_str!(concat!("../sql/undo/U", $version, "__", $name, ".sql")),
        }
    };
}

/// A list by hand instead of refinery's search through the folder: a step without its undo file does not
/// compile, and undo files are never taken for steps.
const STEPS: &[Step] = &[
    step!("1", "payment_tables"),
    step!("2", "idempotency_generations"),
    step!("3", "cursors_and_identity"),
    step!("4", "settlements"),
    step!("5", "housekeeping"),
    step!("6", "dead_letter_replays"),
];

/// The newest step that this program knows.
pub const NEWEST_KNOWN: SchemaVersion = SchemaVersion(STEPS.len() as i32);
/// The oldest schema that this program can work with: it is kept at least one release behind
/// [`NEWEST_KNOWN`] once there is a release to keep up with.
pub const OLDEST_SUPPORTED: SchemaVersion = SchemaVersion(5);

/// What must be there for the daemon to work; a schema of the right version may still have lost a table.
const REQUIRED_RELATIONS: &[&str] = &[
    "payment_core",
    "payment_metadata",
    "payment_notes",
    "idempotency",
    "idempotency_generation",
    "idempotency_current",
    "source_cursor",
    "database_identity",
    "bound_group",
    "cursor_audit",
    "cursor_settlement",
    "housekeeping_pass",
];
const REQUIRED_FUNCTIONS: &[&str] = &[
    "move_cursors_v1(uuid,integer[],bigint[],bigint[],bigint[],timestamp with time zone[])",
    "make_generation_v1(bigint)",
];

/// Number of the last step that ran.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SchemaVersion(pub i32);

impl std::fmt::Display for SchemaVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Why the schema cannot be used, or could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// The database failed; see [`SchemaError::sqlstate`].
    #[error("{doing}: {}", describe(.source))]
    Database {
        /// What was being done.
        doing: String,
        /// The driver's error.
        source: tokio_postgres::Error,
    },
    /// No step ran here.
    #[error("this database has no payment-writer schema; run `payment-writer migrate`")]
    Absent,
    /// Steps are missing that this program needs.
    #[error("the schema is at version {found}, this program needs {needed}; run `payment-writer migrate`")]
    TooOld {
        /// What the database has.
        found: SchemaVersion,
        /// The least that will do.
        needed: SchemaVersion,
    },
    /// A newer program changed the schema in a way that this one cannot follow.
    #[error(
        "the schema is at version {found} and usable by programs that know version {oldest_known} or newer; \
         this one knows {known}: use the release that ran `migrate`"
    )]
    TooNew {
        /// What the database has.
        found: SchemaVersion,
        /// What it asks of programs.
        oldest_known: SchemaVersion,
        /// What this program knows.
        known: SchemaVersion,
    },
    /// A step that ran is not the one of that number that this program knows.
    #[error(
        "step {version} of the schema ran as {applied}, which is not this program's {known}; \
         use the release that ran `migrate`, see `payment-writer migrate status`"
    )]
    Divergent {
        /// The step's number.
        version: SchemaVersion,
        /// Name in the history.
        applied: String,
        /// Name in this program; the same if only the contents differ.
        known: String,
    },
    /// The history says that all ran, but something was dropped since.
    #[error("the schema is incomplete, {} missing from schema {SCHEMA}: restore it", .0.join(", "))]
    Incomplete(Vec<String>),
    /// Another session is changing the schema, for longer than anybody should.
    #[error("another session has been changing the schema for {} s", .0.as_secs())]
    Busy(Duration),
    /// A step failed; those before it stay.
    #[error("{}", describe_migration(.0))]
    Step(Box<refinery::Error>),
    /// Undoing would destroy rows.
    #[error("undo would destroy what is in {}; --force does it nevertheless", .0.join(", "))]
    NotEmpty(Vec<String>),
    /// Only the program that knows a step knows how to undo it.
    #[error("step {0} is newer than this program and cannot be undone by it; use the release that ran it")]
    NotOurs(SchemaVersion),
}

impl SchemaError {
    /// The SQLSTATE, if the database gave one.
    pub fn sqlstate(&self) -> Option<&SqlState> {
        match self {
            Self::Database { source, .. } => source.code(),
            Self::Step(source) => database_cause(source).and_then(tokio_postgres::Error::code),
            Self::Absent
            | Self::TooOld { .. }
            | Self::TooNew { .. }
            | Self::Divergent { .. }
            | Self::Incomplete(_)
            | Self::Busy(_)
            | Self::NotEmpty(_)
            | Self::NotOurs(_) => None,
        }
    }
}

/// For `map_err`: what was being done when the database failed.
pub(crate) fn doing(what: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> SchemaError {
    let doing = what.into();
    move |source| SchemaError::Database { doing, source }
}

fn database_cause(error: &refinery::Error) -> Option<&tokio_postgres::Error> {
    match error.kind() {
        refinery::error::Kind::Connection(_, cause) => cause.downcast_ref(),
        _ => None,
    }
}

fn describe_migration(error: &refinery::Error) -> String {
    match (error.kind(), database_cause(error)) {
        (refinery::error::Kind::Connection(what, _), Some(cause)) => format!("{what}: {}", describe(cause)),
        _ => error.to_string(),
    }
}

/// One line of the history, or of what is still to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StepStatus {
    /// The step's number.
    pub version: SchemaVersion,
    /// Its name, without number and ending.
    pub name: String,
    /// Whether it ran.
    pub state: StepState,
}

/// Whether a step ran.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StepState {
    /// Ran at this time (RFC 3339, by the clock of the machine that ran it), as this program knows it.
    Applied(String),
    /// Ran at this time, but not as this program knows it.
    Divergent(String),
    /// Ran at this time; this program is too old to know it.
    Unknown(String),
    /// Is known and did not run.
    Pending,
}

/// The history of a database, with what is still to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// By number.
    pub steps: Vec<StepStatus>,
}

impl Status {
    /// The last step that ran; `None` if none did.
    pub fn version(&self) -> Option<SchemaVersion> {
        self.steps.iter().filter(|s| s.state != StepState::Pending).map(|s| s.version).max()
    }

    fn pending(&self) -> bool {
        self.steps.iter().any(|s| s.state == StepState::Pending)
    }

    /// Fails if a step that ran is not the one we know.
    fn agrees(&self) -> Result<(), SchemaError> {
        match self.steps.iter().find(|s| matches!(s.state, StepState::Divergent(_))) {
            None => Ok(()),
            Some(step) => Err(step.divergence()),
        }
    }
}

impl StepStatus {
    /// The error that says that this step ran otherwise than we know it.
    fn divergence(&self) -> SchemaError {
        SchemaError::Divergent {
            version: self.version,
            applied: self.name.clone(),
            known: known(self.version).map(|s| s.name.to_owned()).unwrap_or_default(),
        }
    }
}

fn known(version: SchemaVersion) -> Option<&'static Step> {
    let index = usize::try_from(version.0).ok()?.checked_sub(1)?;
    STEPS.get(index)
}

fn migrations() -> Result<Vec<Migration>, SchemaError> {
    STEPS
        .iter()
        .map(|step| Migration::unapplied(step.name, step.up))
        .collect::<Result<_, _>>()
        .map_err(|e| SchemaError::Step(Box::new(e)))
}

/// What ran when, and what is still to run. Needs no more than to read the history.
pub async fn status(client: &Client) -> Result<Status, SchemaError> {
    const DOING: &str = "cannot read the history of the schema";
    // Fails with 42501 if the role may not use the schema, instead of calling it absent.
    let exists: bool = client
        .query_one("SELECT to_regclass($1) IS NOT NULL", &[&HISTORY])
        .await
        .map_err(doing(DOING))?
        .get(0);
    let rows = if exists {
        let select = format!("SELECT version, name, applied_on, checksum FROM {HISTORY} ORDER BY version");
        client.query(&select, &[]).await.map_err(doing(DOING))?
    } else {
        Vec::new()
    };

    let known = migrations()?;
    let mut steps = Vec::new();
    for row in &rows {
        let version: i32 = row.get(0);
        let name: String = row.get(1);
        let applied_on: String = row.get(2);
        let checksum: String = row.get(3);
        let state = match known.iter().find(|m| m.version() == version) {
            None => StepState::Unknown(applied_on),
            Some(m) if m.checksum().to_string() == checksum && m.name() == name => {
                StepState::Applied(applied_on)
            }
            Some(_) => StepState::Divergent(applied_on),
        };
        steps.push(StepStatus { version: SchemaVersion(version), name, state });
    }
    for migration in known {
        if !steps.iter().any(|s| s.version.0 == migration.version()) {
            steps.push(StepStatus {
                version: SchemaVersion(migration.version()),
                name: migration.name().to_owned(),
                state: StepState::Pending,
            });
        }
    }
    steps.sort_by_key(|s| s.version);
    Ok(Status { steps })
}

/// What a migration did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MigrateReport {
    /// The steps that ran now, with their numbers.
    pub applied: Vec<String>,
    /// Where the schema is now. Newer than [`NEWEST_KNOWN`] if a newer program was here.
    pub version: SchemaVersion,
}

/// Brings the schema up to date, one transaction a step.
///
/// May be started from many places at once: one does it, the others wait for it, for up to a minute. An
/// older program finds nothing to do in a schema that it can work with. The role needs CREATE on the
/// database the first time, later on to own the schema; nothing but reading when there is nothing to do.
/// Not through a pooler that hands out connections by transaction: the lock is the session's.
pub async fn migrate(client: &mut Client) -> Result<MigrateReport, SchemaError> {
    if let Some(report) = nothing_to_do(client).await? {
        return Ok(report);
    }
    alone(client, async |client: &mut Client| {
        if let Some(report) = nothing_to_do(client).await? {
            return Ok(report);
        }
        // Asked first: with IF NOT EXISTS alone a role that owns the schema but may not create others fails.
        let exists = "SELECT to_regnamespace($1) IS NOT NULL";
        let create = format!("CREATE SCHEMA IF NOT EXISTS {SCHEMA}");
        if !client
            .query_one(exists, &[&SCHEMA])
            .await
            .map_err(doing("cannot look for the schema"))?
            .get::<_, bool>(0)
        {
            client.batch_execute(&create).await.map_err(doing("cannot create the schema"))?;
        }
        let mut runner = Runner::new(&migrations()?);
        runner.set_migration_table_name(HISTORY);
        let deadline = Instant::now() + MIGRATE_WAIT_MAX;
        loop {
            match runner.run_async(client).await {
                Ok(report) => {
                    return Ok(MigrateReport {
                        applied: report.applied_migrations().iter().map(|m| m.to_string()).collect(),
                        version: NEWEST_KNOWN,
                    });
                }
                // A long statement is in the way. Steps that ran stay, and are not run again.
                Err(e)
                    if database_cause(&e).and_then(|c| c.code()) == Some(&SqlState::LOCK_NOT_AVAILABLE)
                        && Instant::now() < deadline =>
                {
                    tokio::time::sleep(MIGRATE_POLL).await;
                }
                Err(e) => return Err(SchemaError::Step(Box::new(e))),
            }
        }
    })
    .await
}

async fn nothing_to_do(client: &Client) -> Result<Option<MigrateReport>, SchemaError> {
    let status = status(client).await?;
    status.agrees()?;
    match status.version() {
        Some(version) if !status.pending() => {
            refuse_too_new(client, version).await?;
            Ok(Some(MigrateReport { applied: Vec::new(), version }))
        }
        _ => Ok(None),
    }
}

/// Runs `work` as the only session that changes the schema.
async fn alone<T>(
    client: &mut Client,
    work: impl AsyncFnOnce(&mut Client) -> Result<T, SchemaError>,
) -> Result<T, SchemaError> {
    let key: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&locks::CLASS, &LockKey::Migrate.number()];
    let started = Instant::now();
    // Asked again and again rather than waited for: a session that waits inside a statement holds a snapshot,
    // and looks like a stuck one from outside.
    while !client
        .query_one("SELECT pg_try_advisory_lock($1, $2)", &key)
        .await
        .map_err(doing("cannot take the migration lock"))?
        .get::<_, bool>(0)
    {
        if started.elapsed() > MIGRATE_WAIT_MAX {
            return Err(SchemaError::Busy(started.elapsed()));
        }
        tokio::time::sleep(MIGRATE_POLL).await;
    }
    let settings = format!("SET lock_timeout = {DDL_LOCK_TIMEOUT_MS}");
    let result = match client.batch_execute(&settings).await {
        Ok(()) => work(client).await,
        Err(e) => Err(doing("cannot prepare the session")(e)),
    };
    // If the connection is gone, so is the lock.
    let released = client.batch_execute("RESET lock_timeout").await.is_ok()
        && client.query_one("SELECT pg_advisory_unlock($1, $2)", &key).await.is_ok();
    if !released {
        tracing::debug!("the session ended before it gave the migration lock back");
    }
    result
}

/// Whether this program can work with the schema as it is, asked before the daemon writes anything.
pub async fn check(client: &Client) -> Result<SchemaVersion, SchemaError> {
    let status = status(client).await?;
    let found = status.version().ok_or(SchemaError::Absent)?;
    status.agrees()?;
    if found < OLDEST_SUPPORTED {
        return Err(SchemaError::TooOld { found, needed: OLDEST_SUPPORTED });
    }
    refuse_too_new(client, found).await?;

    let missing = client
        .query(
            "SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass('payment_writer.' || name) IS NULL \
             UNION ALL \
             SELECT name FROM unnest($2::text[]) AS name WHERE to_regprocedure('payment_writer.' || name) IS NULL",
            &[&REQUIRED_RELATIONS, &REQUIRED_FUNCTIONS],
        )
        .await
        .map_err(doing("cannot look for the tables"))?;
    if missing.is_empty() { Ok(found) } else { Err(SchemaError::Incomplete(names(&missing))) }
}

fn names(rows: &[tokio_postgres::Row]) -> Vec<String> {
    rows.iter().map(|row| row.get(0)).collect()
}

/// A schema newer than we know is usable if it says so itself: see `schema_compatibility` in step 1.
async fn refuse_too_new(client: &Client, found: SchemaVersion) -> Result<(), SchemaError> {
    if found <= NEWEST_KNOWN {
        return Ok(());
    }
    let row = client
        .query_one("SELECT oldest_known_version FROM payment_writer.schema_compatibility", &[])
        .await
        .map_err(doing("cannot read which programs the schema is for"))?;
    let oldest_known = SchemaVersion(row.get(0));
    if oldest_known <= NEWEST_KNOWN {
        Ok(())
    } else {
        Err(SchemaError::TooNew { found, oldest_known, known: NEWEST_KNOWN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn sql_files(folder: &str) -> BTreeSet<String> {
        std::fs::read_dir(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder))
            .unwrap()
            .filter_map(|entry| {
                entry.unwrap().file_name().into_string().unwrap().strip_suffix(".sql").map(String::from)
            })
            // Not a step: rights, which the owner grants by hand.
            .filter(|name| name != "roles")
            .collect()
    }

    #[test]
    fn every_step_file_is_listed_and_has_its_undo_file() {
        let listed: BTreeSet<String> = STEPS.iter().map(|s| s.name.to_owned()).collect();
        assert_eq!(sql_files("sql"), listed);
        let undo: BTreeSet<String> = listed.iter().map(|name| name.replacen('V', "U", 1)).collect();
        assert_eq!(sql_files("sql/undo"), undo);
    }

    #[test]
    fn steps_are_numbered_without_gaps() {
        let versions: Vec<i32> = migrations().unwrap().iter().map(|m| m.version()).collect();
        assert_eq!(versions, (1..=NEWEST_KNOWN.0).collect::<Vec<_>>());
    }
}
