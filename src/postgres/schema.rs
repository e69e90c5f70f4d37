//! The database's schema: its migration steps, their history, and whether this program can use it.
//!
//! Steps are numbered SQL files, each with an undo file; refinery runs them and stores the history. An
//! applied step is never edited: its checksum is in the history.

mod error;
pub mod guards;
mod history;
pub mod identity_columns;
pub mod locks;
mod migrate;
pub mod months;
mod report;
pub mod shape;
mod undo;

use refinery::Migration;
use tokio_postgres::types::{FromSql, ToSql};
use tokio_postgres::{Client, GenericClient};

use crate::domain::record::TimestampMs;

pub use error::SchemaError;
pub use history::{Status, StepState, StepStatus, status};
pub use migrate::{MigrateReport, migrate};
pub use report::{print_migrate, print_status, print_undo};
pub use undo::{UndoReport, undo};

/// The schema that contains all objects of this program, including the history.
pub const SCHEMA: &str = "payment_writer";
const HISTORY: &str = "payment_writer.schema_history";

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
    step!("7", "replica_identity"),
    step!("8", "message_ids_stay"),
    step!("9", "settlement_replaces"),
];

/// The newest step that this program knows.
pub const NEWEST_KNOWN: SchemaVersion = SchemaVersion(STEPS.len() as i32);
/// The oldest schema that this program can use: at least one release behind [`NEWEST_KNOWN`] once there are
/// releases.
pub const OLDEST_SUPPORTED: SchemaVersion = SchemaVersion(5);

/// Tables that the daemon needs; they are checked because one may have been dropped after the migration.
pub const REQUIRED_RELATIONS: &[&str] = &[
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

/// For `map_err`: adds the action that failed to a database error.
pub(crate) fn doing(what: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> SchemaError {
    let doing = what.into();
    move |source| SchemaError::Database { doing, source }
}

/// Reads the first column.
pub(crate) async fn column<T: for<'a> FromSql<'a>>(
    client: &impl GenericClient,
    doing: &str,
    query: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Vec<T>, SchemaError> {
    let rows = client.query(query, parameters).await.map_err(self::doing(doing))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Reads the first column of the only row.
pub(crate) async fn value<T: for<'a> FromSql<'a>>(
    client: &impl GenericClient,
    doing: &str,
    query: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<T, SchemaError> {
    Ok(client.query_one(query, parameters).await.map_err(self::doing(doing))?.get(0))
}

/// Current time by the database's clock.
pub(crate) async fn clock(client: &Client) -> Result<TimestampMs, SchemaError> {
    let query = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint";
    Ok(TimestampMs(value(client, "cannot read the database's clock", query, &[]).await?))
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

/// Checks that this program can use the schema, before the daemon writes anything.
pub async fn check(client: &Client) -> Result<SchemaVersion, SchemaError> {
    let status = status(client).await?;
    let found = status.version().ok_or(SchemaError::Absent)?;
    status.agrees()?;
    if found < OLDEST_SUPPORTED {
        return Err(SchemaError::TooOld { found, needed: OLDEST_SUPPORTED });
    }
    refuse_too_new(client, found).await?;

    let missing = "
        SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass('payment_writer.' || name) IS NULL
        UNION ALL
        SELECT name FROM unnest($2::text[]) AS name WHERE to_regprocedure('payment_writer.' || name) IS NULL";
    let required: [&(dyn ToSql + Sync); 2] = [&REQUIRED_RELATIONS, &REQUIRED_FUNCTIONS];
    let missing = column(client, "cannot look for the tables", missing, &required).await?;
    if !missing.is_empty() {
        return Err(SchemaError::Incomplete(missing));
    }
    let missing = shape::missing(client).await.map_err(doing("cannot compare the tables"))?;
    if missing.is_empty() { Ok(found) } else { Err(SchemaError::Incomplete(missing)) }
}

/// A newer schema is usable if its table `schema_compatibility` says so: see step 1.
async fn refuse_too_new(client: &Client, found: SchemaVersion) -> Result<(), SchemaError> {
    if found <= NEWEST_KNOWN {
        return Ok(());
    }
    let query = "SELECT oldest_known_version FROM payment_writer.schema_compatibility";
    let doing = "cannot read which programs the schema is for";
    let oldest_known = SchemaVersion(value(client, doing, query, &[]).await?);
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
