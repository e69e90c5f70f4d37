//! Applies the pending steps.

use std::time::{Duration, Instant};

use refinery::Runner;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::error::database_cause;
use super::locks::LockKey;
use super::{
    DDL_LOCK_TIMEOUT_MS, HISTORY, NEWEST_KNOWN, SCHEMA, SchemaError, SchemaVersion, doing, guards,
    identity_columns, migrations, refuse_too_new, status, value,
};

/// Longest wait for another session that changes the schema.
const WAIT_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

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
///
/// Identity columns go on after their largest number, and triggers that keep message ids are restored, also without
/// pending steps.
pub async fn migrate(client: &mut Client) -> Result<MigrateReport, SchemaError> {
    let report = apply_pending(client).await?;
    identity_columns::catch_up(client).await?;
    guards::restore(client).await?;
    Ok(report)
}

async fn apply_pending(client: &mut Client) -> Result<MigrateReport, SchemaError> {
    if let Some(report) = nothing_to_do(client).await? {
        return Ok(report);
    }
    alone(client, async |client: &mut Client| {
        if let Some(report) = nothing_to_do(client).await? {
            return Ok(report);
        }
        // CREATE SCHEMA IF NOT EXISTS fails for a role that owns the schema but may not create others.
        let exists = "SELECT to_regnamespace($1) IS NOT NULL";
        if !value::<bool>(client, "cannot look for the schema", exists, &[&SCHEMA]).await? {
            let create = format!("CREATE SCHEMA IF NOT EXISTS {SCHEMA}");
            client.batch_execute(&create).await.map_err(doing("cannot create the schema"))?;
        }
        let mut runner = Runner::new(&migrations()?);
        runner.set_migration_table_name(HISTORY);
        let deadline = Instant::now() + WAIT_MAX;
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
                    tokio::time::sleep(POLL).await;
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
pub(super) async fn alone<T>(
    client: &mut Client,
    work: impl AsyncFnOnce(&mut Client) -> Result<T, SchemaError>,
) -> Result<T, SchemaError> {
    let started = Instant::now();
    // Polls instead of waiting in a statement: a waiting statement holds a snapshot and looks like a stuck
    // session.
    while !LockKey::Migrate.try_lock(client).await.map_err(doing("cannot take the migration lock"))? {
        if started.elapsed() > WAIT_MAX {
            return Err(SchemaError::Busy(started.elapsed()));
        }
        tokio::time::sleep(POLL).await;
    }
    let settings = format!("SET lock_timeout = {DDL_LOCK_TIMEOUT_MS}");
    let result = match client.batch_execute(&settings).await {
        Ok(()) => work(client).await,
        Err(e) => Err(doing("cannot prepare the session")(e)),
    };
    // If the connection is lost, the lock is released as well.
    let release = format!("SET lock_timeout = 0; SELECT pg_advisory_unlock({})", LockKey::Migrate);
    if client.batch_execute(&release).await.is_err() {
        // The server releases the lock with the session.
        tracing::debug!("the session ended before it released the migration lock");
    }
    result
}
