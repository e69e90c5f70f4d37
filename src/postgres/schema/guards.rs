//! The triggers and functions of step 8, which refuse to remove message ids. They get lost without any error: on a
//! subscriber of logical replication the tables of generations are made by hand, and their rows in
//! `idempotency_generation` fire no trigger.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::locks::{LockKey, Step, with_short_locks};
use super::{SchemaError, column, doing};

const STEP: &str = include_str!("../../../sql/V8__message_ids_stay.sql");
const FUNCTIONS: [&str; 2] = ["refuse_removal_v1()", "guard_generation_v1()"];
const TRIES_MAX: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(250);

/// What is missing; nothing before step 8. `tgtype` 42: BEFORE DELETE OR TRUNCATE, of statements; 5: AFTER INSERT, of
/// rows. Parameters: the functions, and their bodies.
const MISSING: &str = "
    WITH expected (relation, function, mask, type) AS (
        SELECT 'payment_writer.idempotency_generation'::regclass, 'guard_generation_v1()', 7, 5
        UNION ALL
        SELECT 'payment_writer.idempotency'::regclass, 'refuse_removal_v1()', 43, 42
        UNION ALL
        SELECT inhrelid::regclass, 'refuse_removal_v1()', 43, 42
        FROM pg_inherits WHERE inhparent = 'payment_writer.idempotency'::regclass
    ), missing (fact) AS (
        SELECT 'function ' || function FROM unnest($1::text[], $2::text[]) AS f (function, body)
        WHERE NOT EXISTS (
            SELECT FROM pg_proc WHERE oid = to_regprocedure('payment_writer.' || function)
                AND prosrc = body AND proconfig = ARRAY['search_path=pg_catalog'])
        UNION ALL
        SELECT 'trigger on ' || c.relname FROM expected e JOIN pg_class c ON c.oid = e.relation
        WHERE NOT EXISTS (
            SELECT FROM pg_trigger WHERE tgrelid = e.relation AND tgenabled IN ('O', 'A') AND tgtype & mask = type
                AND tgqual IS NULL AND tgfoid = to_regprocedure('payment_writer.' || function))
    )
    SELECT fact FROM missing WHERE EXISTS (SELECT FROM payment_writer.schema_history WHERE version >= 8)
    ORDER BY fact";

/// The body of a function in the step.
fn body(function: &str) -> Option<&'static str> {
    let (_, rest) = STEP.split_once(&format!("FUNCTION payment_writer.{function} RETURNS"))?;
    Some(rest.split_once("AS $$")?.1.split_once("$$;")?.0)
}

/// Returns what is missing of the functions and triggers, sorted.
///
/// # Errors
/// If the database fails.
pub async fn missing(client: &Client) -> Result<Vec<String>, SchemaError> {
    let bodies = FUNCTIONS.map(body);
    column(
        client,
        "cannot look for the triggers that keep message ids",
        MISSING,
        &[&&FUNCTIONS[..], &&bodies[..]],
    )
    .await
}

/// Applies step 8 again if something of it is missing. A role that does not own `idempotency` changes nothing.
///
/// # Errors
/// If the database fails, or other sessions keep locks on the tables.
pub async fn restore(client: &Client) -> Result<(), SchemaError> {
    const DOING: &str = "cannot restore the triggers that keep message ids";
    let owns = "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('payment_writer.idempotency')";
    if column::<bool>(client, DOING, owns, &[]).await? != [true] || missing(client).await?.is_empty() {
        return Ok(());
    }
    // Two sessions cannot replace the same function at once.
    let statements = format!("SELECT pg_advisory_xact_lock({}); {STEP}", LockKey::Migrate)
        .replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
        .replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER");
    let lock = [SqlState::LOCK_NOT_AVAILABLE];
    match with_short_locks(client, &statements, &lock, TRIES_MAX, BETWEEN_TRIES)
        .await
        .map_err(doing(DOING))?
    {
        Step::Done => Ok(()),
        Step::Locked => Err(SchemaError::Locked(DOING)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_has_the_functions() {
        for function in FUNCTIONS {
            assert!(
                body(function).is_some_and(|body| body.contains("RETURN NULL") || body.contains("RAISE"))
            );
        }
    }
}
