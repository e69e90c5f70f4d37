//! `prune`: one housekeeping pass, for cron.

use clap::Args;

use super::output::{print, table};
use super::{Exit, Failure};
use crate::config::Settings;
use crate::housekeeping::{PassError, PassReport, pass, time};

const AFTER_HELP: &str = "\
One pass finishes what an earlier one left, makes months of the payment tables, rotates the
idempotency table when its current generation is old enough, and drops the generations whose
youngest record every partition has passed, written and published, by idempotency.window.
Uses postgres.housekeeping_url, and asks the broker how far the group is. Rotating and dropping
never hold a writer up for longer than 50 ms at a time; what is in use by others is left to the
next pass.

Exits with 0 also when there was nothing to do, or when another pass is under way.";

/// `prune`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct PruneArgs {
    /// Say what would go, how many rows and bytes, and why the rest stays; change nothing
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
    let mut rows = vec![["generation", "rows", "size", "what becomes of it"].map(str::to_owned)];
    for (generation, verdict) in &report.generations {
        rows.push([
            generation.number.to_string(),
            generation.rows.to_string(),
            size(generation.bytes),
            verdict.to_string(),
        ]);
    }
    let mut text = vec![table(&rows)];
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
        (None, true) => text.push("a rotation waits: batches held its lock all the time".to_owned()),
        (None, false) => {}
    }
    if !report.months.made.is_empty() {
        text.push(format!("months made: {}", report.months.made.join(", ")));
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
    if let Some(error) = &report.months_error {
        text.push(format!("the months could not be seen to: {error}"));
    }
    for archived in &report.months.archived {
        text.push(format!("detached for archiving: payment_writer.{archived}"));
    }
    for (month, obstacle) in &report.months.waiting {
        text.push(format!("month not made: {month}: {obstacle}"));
    }
    let gone = report.gone().count();
    let (rows, bytes) = report.gone().fold((0, 0), |(r, b), g| (r + g.rows, b + g.bytes));
    let verb = if report.is_dry_run { "would go" } else { "dropped" };
    text.push(match gone {
        0 => "no generation to drop".to_owned(),
        _ => format!("generations {verb}: {gone}, {rows} rows, {}", size(bytes)),
    });
    text.join("\n")
}

/// Runs one pass and says what it did.
pub fn prune(settings: &Settings, args: &PruneArgs) -> Result<(), Failure> {
    let report = super::small_runtime()?.block_on(pass(settings, args.dry_run)).map_err(|error| {
        let exit = match &error {
            PassError::Log(failure) => failure.exit,
            PassError::Database(_) | PassError::Connect(_) => Exit::Failed,
        };
        Failure { exit, message: error.to_string() }
    })?;
    print(&describe(&report))
}
