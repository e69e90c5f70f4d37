//! The database's schema: its migration steps, their history, and whether this program can use it.
//!
//! Steps are numbered SQL files, each with an undo file; refinery runs them and stores the history. An
//! applied step is never edited: its checksum is in the history.

pub mod cursors;
pub mod locks;
pub mod months;
mod report;
mod undo;

use std::time::{Duration, Instant};

use refinery::{Migration, Runner};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::postgres::connection::describe;
use locks::LockKey;

pub use report::{print_migrate, print_status, print_undo};
pub use undo::{UndoReport, undo};

/// The schema that contains all objects of this program, including the history.
pub const SCHEMA: &str = "payment_writer";
const HISTORY: &str = "payment_writer.schema_history";

/// Longest wait for another session that changes the schema.
const MIGRATE_WAIT_MAX: Duration = Duration::from_secs(60);
const MIGRATE_POLL: Duration = Duration::from_millis(100);
/// Lock timeout of DDL statements: other sessions queue behind a waiting DDL statement.
const DDL_LOCK_TIMEOUT_MS: u32 = 1_000;

/// A migration step with its undo.
struct Step {
    /// File name without extension.
    name: &'static str,
    up: &'static str,
    down: &'static str,
}

macro_rules! step {
    ($version:literal, $name:literal) => {
        Step {
            name: concat!("V", $version, "__", $name),
            up: include_str!(concat!("../../sql/V", $version, "__", $name, ".sql")),
            down: include_str!(concat!("../../sql/undo/U", $version, "__", $name, ".sql")),
        }
    };
}

/// An explicit list instead of refinery's directory scan: a step without an undo file does not compile, and
/// undo files are never run as steps.
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
/// The oldest schema that this program can use: at least one release behind [`NEWEST_KNOWN`] once there are
/// releases.
pub const OLDEST_SUPPORTED: SchemaVersion = SchemaVersion(5);

/// Tables that the daemon needs; they are checked because one may have been dropped after the migration.
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

/// Number of the last applied step.
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
        /// The action that failed.
        doing: String,
        /// The driver's error.
        source: tokio_postgres::Error,
    },
    /// No step was applied to this database.
    #[error("this database has no payment-writer schema; run `payment-writer migrate`")]
    Absent,
    /// Steps that this program needs were not applied.
    #[error("the schema is at version {found}, this program needs {needed}; run `payment-writer migrate`")]
    TooOld {
        /// Version of the schema.
        found: SchemaVersion,
        /// Oldest version that this program can use.
        needed: SchemaVersion,
    },
    /// A newer program changed the schema in a way that this one does not support.
    #[error(
        "the schema is at version {found} and usable by programs that know version {oldest_known} or newer; \
         this one knows {known}: use the release that ran `migrate`"
    )]
    TooNew {
        /// Version of the schema.
        found: SchemaVersion,
        /// Version that a program must know to use the schema.
        oldest_known: SchemaVersion,
        /// Newest version that this program knows.
        known: SchemaVersion,
    },
    /// An applied step differs from this program's step of the same number.
    #[error(
        "step {version} of the schema was applied as {applied}, which differs from this program's {known}; \
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
    /// All steps were applied, but tables or functions are missing.
    #[error("the schema is incomplete, {} missing from schema {SCHEMA}: restore it", .0.join(", "))]
    Incomplete(Vec<String>),
    /// Another session has been changing the schema for more than a minute.
    #[error("another session has been changing the schema for {} s", .0.as_secs())]
    Busy(Duration),
    /// A step failed; the steps before it stay applied.
    #[error("{}", describe_migration(.0))]
    Step(Box<refinery::Error>),
    /// Undoing would delete rows.
    #[error("undo would delete the rows of {}; use --force to do it nevertheless", .0.join(", "))]
    NotEmpty(Vec<String>),
    /// The step is not known to this program, which therefore cannot undo it.
    #[error("step {0} is newer than this program, which cannot undo it; use the release that applied it")]
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

/// For `map_err`: adds the action that failed to a database error.
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

/// An applied or pending step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StepStatus {
    /// The step's number.
    pub version: SchemaVersion,
    /// The step's name, without number and extension.
    pub name: String,
    /// Whether it was applied.
    pub state: StepState,
}

/// Whether a step was applied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StepState {
    /// Applied at this time (RFC 3339, by the clock of the machine that ran it).
    Applied(String),
    /// Applied at this time with another name or checksum than this program's step.
    Divergent(String),
    /// Applied at this time; newer than this program.
    Unknown(String),
    /// Known to this program and not applied.
    Pending,
}

/// The history of a database with the pending steps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// All steps, by number.
    pub steps: Vec<StepStatus>,
}

impl Status {
    /// The last applied step; `None` if there is none.
    pub fn version(&self) -> Option<SchemaVersion> {
        self.steps.iter().filter(|s| s.state != StepState::Pending).map(|s| s.version).max()
    }

    fn pending(&self) -> bool {
        self.steps.iter().any(|s| s.state == StepState::Pending)
    }

    /// Fails if an applied step differs from this program's.
    fn agrees(&self) -> Result<(), SchemaError> {
        match self.steps.iter().find(|s| matches!(s.state, StepState::Divergent(_))) {
            None => Ok(()),
            Some(step) => Err(step.divergence()),
        }
    }
}

impl StepStatus {
    /// The error for an applied step that differs from this program's.
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

/// Reads the history and adds the pending steps. Needs only the right to read the history.
pub async fn status(client: &Client) -> Result<Status, SchemaError> {
    const DOING: &str = "cannot read the history of the schema";
    // Fails with 42501 if the role may not use the schema, instead of reporting it as absent.
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
    /// The steps that it applied, with their numbers.
    pub applied: Vec<String>,
    /// Version of the schema; newer than [`NEWEST_KNOWN`] if a newer program migrated it.
    pub version: SchemaVersion,
}

/// Brings the schema up to date, with one transaction per step.
///
/// Can be started concurrently: one process does it, the others wait for it for up to a minute. With a newer
/// schema that this program can use, there is nothing to do. The role needs CREATE on the database the first
/// time, and must own the schema later; without pending steps it only needs to read. Does not work through a
/// transaction pooler, because the lock is held by the session.
pub async fn migrate(client: &mut Client) -> Result<MigrateReport, SchemaError> {
    if let Some(report) = nothing_to_do(client).await? {
        return Ok(report);
    }
    alone(client, async |client: &mut Client| {
        if let Some(report) = nothing_to_do(client).await? {
            return Ok(report);
        }
        // CREATE SCHEMA IF NOT EXISTS fails for a role that owns the schema but may not create others.
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
                // A long statement blocks the step. Applied steps stay and are not run again.
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
    // Polls instead of waiting in a statement: a waiting statement holds a snapshot and looks like a stuck
    // session.
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
    // If the connection is lost, the lock is released as well.
    let released = client.batch_execute("RESET lock_timeout").await.is_ok()
        && client.query_one("SELECT pg_advisory_unlock($1, $2)", &key).await.is_ok();
    if !released {
        tracing::debug!("the session ended before it released the migration lock");
    }
    result
}

/// Checks that this program can use the schema, before the daemon writes anything.
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
            "SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass('payment_writer.' || name) IS \
             NULL UNION ALL SELECT name FROM unnest($2::text[]) AS name WHERE \
             to_regprocedure('payment_writer.' || name) IS NULL",
            &[&REQUIRED_RELATIONS, &REQUIRED_FUNCTIONS],
        )
        .await
        .map_err(doing("cannot look for the tables"))?;
    if missing.is_empty() { Ok(found) } else { Err(SchemaError::Incomplete(names(&missing))) }
}

fn names(rows: &[tokio_postgres::Row]) -> Vec<String> {
    rows.iter().map(|row| row.get(0)).collect()
}

/// A newer schema is usable if its table `schema_compatibility` says so: see step 1.
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
            // Not a step: grants that the owner runs by hand.
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
