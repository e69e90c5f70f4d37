//! `prune`: runs one housekeeping pass, for cron.

use clap::Args;

use super::output::{print, table};
use crate::config::Settings;
use crate::error::{CommandError, ErrorKind, OrFailed};
use crate::housekeeping::{PassError, PassReport, Task, pass, time};
use crate::postgres::waits::Waits;

const AFTER_HELP: &str = "\
One pass completes what an earlier one left, creates months of the payment tables, rotates the
idempotency table when its current generation is old enough, and drops generations whose newest record
is older, by at least idempotency.window, than what every partition has written and published.
Uses postgres.housekeeping_url, and reads the group's offsets from the broker. Rotating and dropping
block writers for at most 50 ms at a time; tables in use are left to the next pass.

Exits with 0 also if there was nothing to do, or if another pass is running.";

/// `prune`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct PruneArgs {
    /// Show what would be dropped, with rows and bytes, and why the rest stays; change nothing
    #[arg(long)]
    pub dry_run: bool,
}

fn size(bytes: i64) -> String {
    indicatif::BinaryBytes(bytes.unsigned_abs()).to_string()
}

fn describe(report: &PassReport) -> String {
    if report.is_busy {
        return "another pass is under way; nothing was done".to_owned();
    }
    let rows = report.generations.iter().map(|(generation, verdict)| {
        let (number, rows) = (generation.number.to_string(), generation.rows.to_string());
        [number, rows, size(generation.bytes), verdict.to_string()]
    });
    let mut text = vec![table(["generation", "rows", "size", "what becomes of it"], rows)];
    if let Some((at, slowest)) = report.horizon {
        let time = time(at);
        text.push(match slowest {
            Some(partition) => format!("horizon: {time}, held there by partition {partition}"),
            None => format!("horizon: {time}, every partition is published to its end"),
        });
    }
    match (report.rotated_to, report.rotation_waits) {
        (Some(generation), _) => text.push(format!("rotated: generation {generation} is current")),
        (None, true) if report.is_dry_run => text.push("the current generation would be rotated".to_owned()),
        (None, true) => text.push("rotation postponed: batches held the lock all the time".to_owned()),
        (None, false) => {}
    }
    if !report.months.made.is_empty() {
        text.push(format!("months created: {}", report.months.made.join(", ")));
    }
    if report.months.moved > 0 {
        text.push(format!("rows moved from the default partitions: {}", report.months.moved));
    }
    if report.is_dry_run && report.default_rows > 0 {
        text.push(format!(
            "rows in the default partitions, to be moved to their months: {}",
            report.default_rows
        ));
    }
    if let Some(error) = report.error_of(Task::Months) {
        text.push(format!("maintaining the months failed: {error}"));
    }
    for archived in &report.months.archived {
        text.push(format!("detached for archiving: payment_writer.{archived}"));
    }
    for (month, obstacle) in &report.months.waiting {
        text.push(format!("month not created: {month}: {obstacle}"));
    }
    let gone = report.gone().count();
    let (rows, bytes) = report.gone().fold((0, 0), |(r, b), g| (r + g.rows, b + g.bytes));
    let verb = if report.is_dry_run { "to be dropped" } else { "dropped" };
    text.push(match gone {
        0 => "no generation to drop".to_owned(),
        _ => format!("generations {verb}: {gone}, {rows} rows, {}", size(bytes)),
    });
    text.join("\n")
}

/// Runs one pass and prints its result.
pub async fn prune(settings: &Settings, args: &PruneArgs) -> Result<(), CommandError> {
    let waits = Waits::on_stderr(&settings.postgres.housekeeping_url).or_failed()?;
    let report = pass(settings, &waits, args.dry_run).await.map_err(|error| {
        let kind = match &error {
            PassError::Log(failure) => failure.kind,
            PassError::Database(_) | PassError::Connect(_) | PassError::Tasks(_) => ErrorKind::Failed,
        };
        CommandError { kind, message: error.to_string() }
    })?;
    print(describe(&report))
}
