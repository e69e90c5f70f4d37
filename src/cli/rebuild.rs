//! `rebuild`: writes the rows of the whole log to a second database and compares it.

use clap::Args;
use tokio::runtime::Handle;

use super::output::print;
use super::reconcile::{describe_findings, describe_not_compared, json, limit, with_progress};
use crate::config::{Endpoint, Settings};
use crate::error::CommandError;
use crate::rebuild::{Comparison, Wanted, rebuild as run};

/// Environment variable for the URL of the second database, because other users can see the command line.
const INTO_VARIABLE: &str = "PAYMENT_WRITER_REBUILD_INTO";

const AFTER_HELP: &str = "\
Migrates the second database, which must be empty or filled by an earlier `rebuild`, and writes the rows
of everything in the log, in a separate consumer group, <group>-rebuild-<id>, that publishes nothing.
The daemon can keep running; the first database is only read. After SIGTERM or SIGINT the same command
continues where it stopped.

Then both databases are compared row by row, up to where both have written. Allowed differences are
listed: if several records have the same id, another of them may have been written first; and records
that the first database rejected or an operator skipped may be present.

To switch to the second database: stop all daemons, set postgres.url to it, and start one with
`run --adopt-database`. docs/how-to/recover.md describes the steps.

Exits with 0 if they are equal, 1 if they differ or something failed, 3 if a person must decide.

Examples:
  payment-writer rebuild --into postgresql://payment_writer@db2:5432/payments
  PAYMENT_WRITER_REBUILD_INTO=postgresql://... payment-writer rebuild --compare-only";

/// `rebuild`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RebuildArgs {
    /// URL of the second database; default: environment variable PAYMENT_WRITER_REBUILD_INTO
    #[arg(long, value_name = "URL")]
    pub into: Option<String>,
    /// Write nothing; compare what an earlier rebuild wrote
    #[arg(long)]
    pub compare_only: bool,
    /// Number of differences to list; the others are counted
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = limit)]
    pub limit: usize,
    /// As one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Rebuilds, compares and prints the result.
pub fn rebuild(settings: &Settings, args: &RebuildArgs, runtime: &Handle) -> Result<(), CommandError> {
    let into = args.into.clone().or_else(|| std::env::var(INTO_VARIABLE).ok());
    let into =
        into.ok_or_else(|| CommandError::usage(format!("--into URL, or {INTO_VARIABLE}, must be given")))?;
    let into = Endpoint::parse(&into).map_err(|error| CommandError::usage(format!("--into: {error}")))?;
    let into = settings.postgres.with_password(into);
    let wanted = Wanted { into, is_compare_only: args.compare_only, limit: args.limit };
    let comparison = with_progress(|progress| run(settings, runtime, &wanted, progress))?;
    print(if args.json { json(&comparison)? } else { describe(&comparison) })?;
    if comparison.is_equal {
        return Ok(());
    }
    Err(CommandError::failed(format!("the databases differ in {} payments", comparison.findings.count)))
}

fn describe(comparison: &Comparison) -> String {
    let offsets: i64 = comparison.partitions.iter().map(|range| range.to.0 - range.from.0).sum();
    let mut text = vec![
        format!("second database: {}, written by group {}", comparison.into, comparison.group),
        format!("compared: {offsets} offsets of {} partitions", comparison.partitions.len()),
        format!("payments that are the same in both: {}", comparison.equal),
    ];
    if comparison.older_than_the_log > 0 {
        text.push(format!(
            "payments only in the first database because their records had left the log: {}",
            comparison.older_than_the_log
        ));
    }
    describe_not_compared(&comparison.not_compared, &mut text);
    if comparison.allowed.count > 0 {
        describe_findings("\ndecided differently, as the contract allows", &comparison.allowed, &mut text);
    }
    if comparison.is_equal {
        text.push("\nequal: the second database can replace the first".to_owned());
    } else {
        describe_findings("\nDIFFERENT", &comparison.findings, &mut text);
    }
    text.join("\n")
}
