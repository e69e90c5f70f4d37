//! `rebuild`: writes the rows of the whole log into a second database with the daemon's own pipeline, and
//! compares it with the first. No events are sent: the second database belongs to a separate group that only
//! writes rows, until the operator lets the real group adopt it.

mod compare;

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::config::{Endpoint, Loaded, Settings};
use crate::daemon::{self, Reload, RunError, RunOptions};
use crate::error::{CommandError, OrFailed};
use crate::postgres::binding;
use crate::postgres::connection::backend_pid;
use crate::postgres::schema::{self, SchemaError};
use crate::postgres::waits::Waits;
use crate::reconcile::database::failed;
use crate::resolution::{self, View, not_bound};
use crate::telemetry::status::StatusRegistry;

pub use self::compare::Comparison;

const PROGRESS_TICK: Duration = Duration::from_millis(200);
/// Command name in `cursor_audit` of the entries that record the start of the log for the second database.
const AUDIT_COMMAND: &str = "rebuild";

/// Options of a rebuild.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Second database.
    pub into: Endpoint,
    /// Only compare what an earlier rebuild wrote.
    pub is_compare_only: bool,
    /// Maximum number of differences to list.
    pub limit: usize,
}

/// Settings for the second database: another group, rows only, and no pruning, so that every message id of
/// the log stays known to the end.
fn settings_for(settings: &Settings, into: &Endpoint, database_id: Uuid) -> Settings {
    let mut settings = settings.clone();
    settings.postgres.url = into.clone();
    settings.postgres.housekeeping_url = into.clone();
    settings.kafka.publish = false;
    settings.kafka.group_id =
        format!("{}-rebuild-{:08x}", settings.kafka.group_id, database_id.as_fields().0);
    settings.idempotency.prune_schedule = None;
    settings.retention.payment_months = None;
    // Both databases are compared completely.
    settings.audit.share = 0.0;
    settings
}

/// Completes the rebuild where needed, and compares.
///
/// # Errors
/// If the second database is the first one, or has rows that no rebuild of this group wrote; if a database or
/// the log cannot be read; if the rebuild was stopped early (running it again continues it).
pub fn rebuild(
    settings: &Settings,
    runtime: &Handle,
    wanted: &Wanted,
    progress: &ProgressBar,
) -> Result<Comparison, CommandError> {
    let view = runtime.block_on(resolution::view(settings))?;
    let target = runtime.block_on(prepare(settings, wanted, &view))?;
    let rebuilding = settings_for(settings, &wanted.into, target);
    if !wanted.is_compare_only {
        runtime.block_on(run(&rebuilding, &view, progress))?;
    }
    compare::compare(settings, &rebuilding, runtime, view.identity.topic_id, wanted.limit, progress)
}

async fn open(url: &Endpoint) -> Result<Client, CommandError> {
    let (client, _) = url.connect().await.map_err(|e| CommandError::failed(e.to_string()))?;
    Ok(client)
}

fn schema_failed(error: SchemaError) -> CommandError {
    CommandError::failed(format!("the second database: {error}"))
}

/// Checks that the second database may be written, and migrates its schema. Returns its id.
async fn prepare(settings: &Settings, wanted: &Wanted, view: &View) -> Result<Uuid, CommandError> {
    let first = open(&settings.postgres.url).await?;
    binding::is_bound_to(&first, &settings.kafka.group_id, view.identity.topic_id, settings.kafka.publish)
        .await
        .map_err(not_bound)?;
    let mut second = open(&wanted.into).await?;
    let is_there = schema::status(&second).await.map_err(schema_failed)?.version().is_some();
    if is_there {
        // Check before changing anything.
        refuse_other(&second, settings, wanted, view).await?;
    } else if wanted.is_compare_only {
        return Err(CommandError::failed(
            "the second database has no payment-writer schema: no rebuild has written to it",
        ));
    }
    if !wanted.is_compare_only {
        let pid =
            backend_pid(&second).await.map_err(failed("asking the second database for a session's pid"))?;
        let waits = Waits::on_stderr(&wanted.into).or_failed()?;
        waits.explain(pid, "migrating", schema::migrate(&mut second)).await.0.map_err(schema_failed)?;
    }
    schema::check(&second).await.map_err(schema_failed)?;
    refuse_other(&second, settings, wanted, view).await
}

/// Refuses the first database, a copy of it, and a database with rows that this rebuild did not write.
async fn refuse_other(
    second: &Client,
    settings: &Settings,
    wanted: &Wanted,
    view: &View,
) -> Result<Uuid, CommandError> {
    let id = binding::database_id(second).await.map_err(failed("asking the second database for its id"))?;
    if id == view.identity.database_id {
        return Err(CommandError::usage(format!(
            "--into names the database {id} that the group writes to, or a copy of it; it must name an \
             empty one"
        )));
    }
    let group = settings_for(settings, &wanted.into, id).kafka.group_id;
    let is_bound = second
        .query_opt("SELECT 1 FROM payment_writer.bound_group", &[])
        .await
        .map_err(failed("asking the second database for its group"))?
        .is_some();
    if is_bound {
        binding::is_bound_to(second, &group, view.identity.topic_id, false).await.map_err(not_bound)?;
        return Ok(id);
    }
    let has_rows: bool = second
        .query_one(
            "SELECT EXISTS (SELECT FROM payment_writer.payment_core)
                 OR EXISTS (SELECT FROM payment_writer.payment_metadata)
                 OR EXISTS (SELECT FROM payment_writer.idempotency)
                 OR EXISTS (SELECT FROM payment_writer.source_cursor)",
            &[],
        )
        .await
        .map_err(failed("looking for rows in the second database"))?
        .get(0);
    if has_rows {
        return Err(CommandError::usage(
            "the second database has rows, and no rebuild wrote them; it must be empty",
        ));
    }
    Ok(id)
}

/// Records the start of the log, unless an earlier run did, and writes all records up to the current end.
async fn run(rebuilding: &Settings, view: &View, progress: &ProgressBar) -> Result<(), CommandError> {
    let second = open(&rebuilding.postgres.url).await?;
    for known in &view.known {
        second
            .execute(
                "INSERT INTO payment_writer.cursor_audit (command, topic, topic_id, partition, after, reason)
                 SELECT $1, $2, $3, $4, jsonb_build_object('from', $5::bigint), 'the log began here'
                 WHERE NOT EXISTS (SELECT FROM payment_writer.cursor_audit
                     WHERE command = $1 AND topic_id = $3 AND partition = $4)",
                &[
                    &AUDIT_COMMAND,
                    &rebuilding.kafka.input_topic,
                    &view.identity.topic_id,
                    &known.partition.0,
                    &known.bounds.start.0,
                ],
            )
            .await
            .map_err(failed("noting where the log begins"))?;
    }
    let (stop, stopped) = watch::channel(false);
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
        return Err(CommandError::failed("cannot listen for SIGTERM and SIGINT"));
    };
    let listening = tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.send_replace(true);
    });
    let status = Arc::new(StatusRegistry::default());
    let options = RunOptions { until_caught_up: true, adopt_database: false };
    let loaded = Loaded { settings: rebuilding.clone(), effective: Vec::new(), file: None };
    let in_use = watch::Sender::new(rebuilding.clone());
    let reload = Reload::new(loaded, None);
    progress.set_message("rebuilding");
    let ended = tokio::select! {
        ended = daemon::run(options, Arc::clone(&status), None, stopped.clone(), reload, &in_use) => ended,
        () = show(&status, view, progress) => Ok(()),
    };
    let is_stopped = *stopped.borrow();
    listening.abort();
    match ended {
        Ok(()) if is_stopped => {
            Err(CommandError::failed("stopped before the end; run the same command again to continue"))
        }
        Ok(()) => Ok(()),
        Err(RunError::Halted(message)) => Err(CommandError::person_must_decide(format!(
            "the rebuild cannot continue, for example because records left the log: {message}; empty the \
             second database and start again"
        ))),
        Err(error) => Err(error.into()),
    }
}

/// Shows the progress of the rows. Never returns.
async fn show(status: &StatusRegistry, view: &View, progress: &ProgressBar) {
    let ends: i64 = view.known.iter().map(|k| k.bounds.end.0.saturating_sub(k.bounds.start.0)).sum();
    progress.inc_length(ends.unsigned_abs());
    loop {
        tokio::time::sleep(PROGRESS_TICK).await;
        let partitions = status.partitions();
        let written = view.known.iter().filter_map(|known| {
            let applied = partitions.get(&known.partition)?.applied?;
            Some((applied.0 - known.bounds.start.0).max(0))
        });
        let written: i64 = written.sum();
        progress.set_position(written.unsigned_abs());
    }
}
