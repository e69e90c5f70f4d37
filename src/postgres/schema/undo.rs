//! Undoes migration steps, newest first.

use tokio_postgres::{Client, Transaction};

use super::migrate::alone;
use super::{HISTORY, SCHEMA, SchemaError, SchemaVersion, StepState, column, doing, known, status, value};

/// Tables whose rows cannot be recovered by migrating again.
const PRECIOUS: &[&str] = &["payment_core", "idempotency", "source_cursor", "dead_letter_replay"];

/// What was undone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UndoReport {
    /// The steps in the order in which they were undone.
    pub undone: Vec<String>,
    /// Version of the schema; `None` if it was removed.
    pub version: Option<SchemaVersion>,
}

/// Undoes the last `count` steps, one transaction each. Undoing the first step also drops the schema itself.
///
/// Refuses while there are payments, claimed message ids, cursors or records of replays, unless `force` is
/// set. Also refuses steps that differ from this program's.
pub async fn undo(client: &mut Client, count: u32, force: bool) -> Result<UndoReport, SchemaError> {
    alone(client, async |client: &mut Client| {
        let status_before = status(client).await?;
        let mut steps = Vec::new();
        // All steps are checked before the first is undone, so that undo does not stop half-way.
        let ran = status_before.steps.iter().rev().filter(|s| s.state != StepState::Pending);
        for last in ran.take(usize::try_from(count).unwrap_or(usize::MAX)) {
            match &last.state {
                StepState::Applied(_) => {
                    steps
                        .push((last.version, known(last.version).ok_or(SchemaError::NotOurs(last.version))?));
                }
                StepState::Divergent(_) => return Err(last.divergence()),
                StepState::Unknown(_) | StepState::Pending => return Err(SchemaError::NotOurs(last.version)),
            }
        }

        let mut undone = Vec::new();
        for (version, step) in steps {
            let transaction = client.transaction().await.map_err(doing("cannot begin"))?;
            if !force {
                refuse_if_not_empty(&transaction).await?;
            }
            transaction
                .batch_execute(step.down)
                .await
                .map_err(doing(format!("cannot undo {}", step.name)))?;
            transaction
                .execute(&format!("DELETE FROM {HISTORY} WHERE version = $1"), &[&version.0])
                .await
                .map_err(doing("cannot remove the step from the history"))?;
            if !status_before.steps.iter().any(|s| s.version < version) {
                transaction
                    .batch_execute(&format!("DROP TABLE {HISTORY}; DROP SCHEMA {SCHEMA}"))
                    .await
                    .map_err(doing("cannot drop the schema"))?;
            }
            transaction.commit().await.map_err(doing(format!("cannot undo {}", step.name)))?;
            undone.push(step.name.to_owned());
        }
        Ok(UndoReport { undone, version: status(client).await?.version() })
    })
    .await
}

/// Fails if a table has rows. Locks the tables until the transaction ends, so that empty ones stay empty.
async fn refuse_if_not_empty(transaction: &Transaction<'_>) -> Result<(), SchemaError> {
    let present = "
        SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass('payment_writer.' || name) IS NOT NULL";
    let present: Vec<String> =
        column(transaction, "cannot look for the tables", present, &[&PRECIOUS]).await?;
    let mut filled = Vec::new();
    for table in present {
        let lock = format!("LOCK TABLE {SCHEMA}.{table} IN ACCESS EXCLUSIVE MODE");
        transaction.batch_execute(&lock).await.map_err(doing(format!("cannot lock {table}")))?;
        let exists = format!("SELECT EXISTS (SELECT FROM {SCHEMA}.{table})");
        if value(transaction, &format!("cannot read {table}"), &exists, &[]).await? {
            filled.push(table);
        }
    }
    if filled.is_empty() { Ok(()) } else { Err(SchemaError::NotEmpty(filled)) }
}
