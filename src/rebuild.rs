//! `rebuild`: writes the rows of the whole log into a second database, by the daemon's own machinery, and proves
//! it equal to the first. No event is sent: the second database belongs to a group of its own that writes rows
//! only, until somebody lets the real group adopt it.

mod compare;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::binding::{self, BindingError};
use crate::cli::Failure;
use crate::config::{PostgresUrl, Settings};
use crate::daemon::{self, RunError, RunOptions};
use crate::kafka::scan::ScanRange;
use crate::postgres::describe;
use crate::reconcile::Progress;
use crate::record::{NextOffset, Partition};
use crate::schema::{self, SchemaError};
use crate::settlement::{self, View};
use crate::status::Board;

pub use self::compare::Comparison;

const PROGRESS_TICK: Duration = Duration::from_millis(200);
/// `cursor_audit` keeps under this where the log began for the second database.
const AUDIT_COMMAND: &str = "rebuild";

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The second database.
    pub into: PostgresUrl,
    /// Write nothing; compare what an earlier rebuild wrote.
    pub is_compare_only: bool,
    /// Differences that are named.
    pub limit: usize,
}

/// The settings under which the second database is written: another group, rows only, nothing ever pruned, so
/// that every id of the log is known to the end.
fn settings_for(settings: &Settings, into: &PostgresUrl, database_id: Uuid) -> Settings {
    let mut settings = settings.clone();
    settings.postgres.url = into.clone();
    settings.postgres.housekeeping_url = into.clone();
    settings.kafka.publish = false;
    settings.kafka.group_id =
        format!("{}-rebuild-{:08x}", settings.kafka.group_id, database_id.as_fields().0);
    settings.idempotency.prune_schedule = None;
    settings.retention.payment_months = None;
    // Both databases are compared as a whole.
    settings.audit.share = 0.0;
    settings
}

/// Rebuilds, as far as that is still to be done, and compares.
///
/// # Errors
/// When the second database is the first one, or holds what no rebuild of this group wrote; when one of the two,
/// or the log, cannot be read; when it was stopped before its end (it goes on when started again).
pub fn rebuild(
    settings: &Settings,
    runtime: &Handle,
    wanted: &Wanted,
    progress: &Progress,
) -> Result<Comparison, Failure> {
    let view = runtime.block_on(settlement::view(settings))?;
    let target = runtime.block_on(prepare(settings, wanted, &view))?;
    let rebuilding = settings_for(settings, &wanted.into, target);
    if !wanted.is_compare_only {
        runtime.block_on(run(&rebuilding, &view, progress))?;
    }
    let starts = runtime.block_on(starts(&rebuilding, &view))?;
    compare::compare(settings, &rebuilding, runtime, &view, &starts, wanted.limit, progress)
}

async fn open(url: &PostgresUrl) -> Result<Client, Failure> {
    let (client, _) = url.endpoint().connect().await.map_err(|e| Failure::failed(e.to_string()))?;
    Ok(client)
}

fn database(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Failure {
    move |error| Failure::failed(format!("{doing}: {}", describe(&error)))
}

fn schema_failed(error: SchemaError) -> Failure {
    Failure::failed(format!("the second database: {error}"))
}

/// Makes sure that the second database may be written, and brings its schema up to date. Returns its id.
async fn prepare(settings: &Settings, wanted: &Wanted, view: &View) -> Result<Uuid, Failure> {
    let first = open(&settings.postgres.url).await?;
    binding::is_bound_to(&first, &settings.kafka.group_id, view.identity.topic_id, settings.kafka.publish)
        .await
        .map_err(identity)?;
    let mut second = open(&wanted.into).await?;
    let is_there = schema::status(&second).await.map_err(schema_failed)?.version().is_some();
    if is_there {
        // Before anything is changed there.
        refuse_other(&second, settings, wanted, view).await?;
    } else if wanted.is_compare_only {
        return Err(Failure::failed(
            "the second database has no payment-writer schema: nothing was rebuilt there",
        ));
    }
    if !wanted.is_compare_only {
        schema::migrate(&mut second).await.map_err(schema_failed)?;
    }
    schema::check(&second).await.map_err(schema_failed)?;
    refuse_other(&second, settings, wanted, view).await
}

fn identity(error: BindingError) -> Failure {
    match error {
        BindingError::Database(_) => Failure::failed(error.to_string()),
        BindingError::Identity(doubt) => Failure::person_must_decide(doubt.to_string()),
    }
}

/// Refuses the first database, a copy of it, and a database with anybody else's rows.
async fn refuse_other(
    second: &Client,
    settings: &Settings,
    wanted: &Wanted,
    view: &View,
) -> Result<Uuid, Failure> {
    let id = binding::database_id(second).await.map_err(database("asking the second database for its id"))?;
    if id == view.identity.database_id {
        return Err(Failure::usage(format!(
            "--into leads to the database {id} that the group writes to, or to a copy of it; it must lead to an \
             empty one"
        )));
    }
    let group = settings_for(settings, &wanted.into, id).kafka.group_id;
    let is_bound = second
        .query_opt("SELECT 1 FROM payment_writer.bound_group", &[])
        .await
        .map_err(database("asking the second database for its group"))?
        .is_some();
    if is_bound {
        binding::is_bound_to(second, &group, view.identity.topic_id, false).await.map_err(identity)?;
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
        .map_err(database("looking for rows in the second database"))?
        .get(0);
    if has_rows {
        return Err(Failure::usage(
            "the second database has rows, and no rebuild wrote them; it must be empty",
        ));
    }
    Ok(id)
}

/// Notes where the log begins, unless an earlier start did, and writes all that is in it now.
async fn run(rebuilding: &Settings, view: &View, progress: &Progress) -> Result<(), Failure> {
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
            .map_err(database("noting where the log begins"))?;
    }
    let (stop, stopped) = watch::channel(false);
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
        return Err(Failure::failed("cannot listen for SIGTERM and SIGINT"));
    };
    let listening = tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.send_replace(true);
    });
    let board = Arc::new(Board::default());
    let options = RunOptions { until_caught_up: true, adopt_database: false };
    progress.say("rebuilding");
    let ended = tokio::select! {
        ended = daemon::run(rebuilding, options, Arc::clone(&board), None, stopped.clone()) => ended,
        () = show(&board, view, progress) => Ok(()),
    };
    let is_stopped = *stopped.borrow();
    listening.abort();
    match ended {
        Ok(()) if is_stopped => {
            Err(Failure::failed("stopped before the end; the same command goes on where it was"))
        }
        Ok(()) => Ok(()),
        Err(RunError::Halted(message)) => Err(Failure::person_must_decide(format!(
            "the rebuild cannot go on, as when records left the log meanwhile: {message}; empty the second database \
             and start again"
        ))),
        Err(error) => Err(error.into()),
    }
}

/// Shows how far the rows are. Never returns.
async fn show(board: &Board, view: &View, progress: &Progress) {
    let starts: BTreeMap<Partition, NextOffset> =
        view.known.iter().map(|known| (known.partition, known.bounds.start)).collect();
    let ends: i64 = view.known.iter().map(|k| k.bounds.end.0.saturating_sub(k.bounds.start.0)).sum();
    progress.more(ends.unsigned_abs());
    loop {
        tokio::time::sleep(PROGRESS_TICK).await;
        let written: i64 = board
            .partitions()
            .iter()
            .filter_map(|(partition, status)| Some(status.applied?.0 - starts.get(partition)?.0))
            .map(|count| count.max(0))
            .sum();
        progress.at(written.unsigned_abs());
    }
}

/// Where the log began for each partition when its rebuild did.
async fn starts(rebuilding: &Settings, view: &View) -> Result<BTreeMap<Partition, NextOffset>, Failure> {
    const DOING: &str = "asking where the rebuild began";
    let second = open(&rebuilding.postgres.url).await?;
    let rows = second
        .query(
            "SELECT partition, (after->>'from')::bigint FROM payment_writer.cursor_audit
             WHERE command = $1 AND topic_id = $2 AND partition IS NOT NULL AND after->>'from' IS NOT NULL",
            &[&AUDIT_COMMAND, &view.identity.topic_id],
        )
        .await
        .map_err(database(DOING))?;
    rows.iter()
        .map(|row| {
            let failed = database(DOING);
            Ok((Partition(row.try_get(0).map_err(&failed)?), NextOffset(row.try_get(1).map_err(&failed)?)))
        })
        .collect()
}

/// Of each partition what both databases have written.
fn ranges(
    starts: &BTreeMap<Partition, NextOffset>,
    first: &BTreeMap<Partition, NextOffset>,
    second: &BTreeMap<Partition, NextOffset>,
) -> Vec<ScanRange> {
    starts
        .iter()
        .filter_map(|(partition, from)| {
            let to = *first.get(partition)?.min(second.get(partition)?);
            Some(ScanRange { partition: *partition, from: *from, to: to.max(*from) })
        })
        .collect()
}
