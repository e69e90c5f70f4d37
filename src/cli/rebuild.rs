//! `rebuild`: the rows of the whole log again, in a second database.

use clap::Args;

use super::Failure;
use super::output::print;
use super::reconcile::{described, limit, progress_bar};
use crate::config::{PostgresUrl, Settings};
use crate::rebuild::{Comparison, Wanted, rebuild as run};
use crate::reconcile::Progress;

/// Names the second database where the command line, which others can see, does not.
const INTO_VARIABLE: &str = "PAYMENT_WRITER_REBUILD_INTO";

const AFTER_HELP: &str = "\
Migrates the second database, which must be empty or one that an earlier `rebuild` began, and writes the
rows of all that is in the log now, as a consumer group of its own, <group>-rebuild-<id>, that publishes
nothing. The daemon may run beside it, and the first database is only read. Stopped with SIGTERM or
SIGINT, it goes on where it was when it is started again.

Then both databases are compared, row by row, as far as both have written. They are equal but for ids
that stand on several records, where another of them may have won, and records that the first database
once refused or a person gave up; these are listed.

To move to the second database: stop all daemons, set postgres.url to it, start one with
`run --adopt-database`. docs/how-to/recover.md walks through it.

Exits with 0 when they are equal, 1 when they differ or something failed, 3 when a person must decide.

Examples:
  payment-writer rebuild --into postgresql://payment_writer@db2:5432/payments
  PAYMENT_WRITER_REBUILD_INTO=postgresql://... payment-writer rebuild --compare-only";

/// `rebuild`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RebuildArgs {
    /// The second database; by default what the variable PAYMENT_WRITER_REBUILD_INTO says
    #[arg(long, value_name = "URL")]
    pub into: Option<String>,
    /// Write nothing; compare what an earlier rebuild wrote
    #[arg(long)]
    pub compare_only: bool,
    /// How many differences are named; the others are counted
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = limit)]
    pub limit: usize,
    /// As one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Rebuilds, compares, and says what was found.
pub fn rebuild(settings: &Settings, args: &RebuildArgs) -> Result<(), Failure> {
    let into = match (&args.into, std::env::var(INTO_VARIABLE)) {
        (Some(into), _) => into.clone(),
        (None, Ok(into)) => into,
        (None, Err(_)) => {
            return Err(Failure::usage(format!("--into URL, or {INTO_VARIABLE}, must be given")));
        }
    };
    let into = PostgresUrl::parse(&into).map_err(|error| Failure::usage(format!("--into: {error}")))?;
    let wanted = Wanted { into, is_compare_only: args.compare_only, limit: args.limit };
    let runtime = super::large_runtime()?;
    let bar = progress_bar();
    let outcome = run(settings, runtime.handle(), &wanted, &Progress::on(bar.clone()));
    bar.finish_and_clear();
    // Not waited for: a request to a broker that is away may still block its thread.
    runtime.shutdown_background();
    let comparison = outcome?;
    if args.json {
        print(&comparison.json().to_string())?;
    } else {
        print(&describe(&comparison))?;
    }
    if comparison.is_equal() {
        return Ok(());
    }
    Err(Failure::failed(format!("the databases differ in {} payments", comparison.findings.count)))
}

fn describe(comparison: &Comparison) -> String {
    let offsets: i64 = comparison.compared.iter().map(|(_, from, to)| to.0 - from.0).sum();
    let mut text = vec![
        format!("second database: {}, written by group {}", comparison.into, comparison.group_id),
        format!("compared: {offsets} offsets of {} partitions", comparison.compared.len()),
        format!("payments that are the same in both: {}", comparison.equal),
    ];
    if comparison.older > 0 {
        text.push(format!(
            "payments of the first database whose records had left the log, and that the second has not: {}",
            comparison.older
        ));
    }
    if !comparison.allowed.is_empty() {
        text.push(format!("\ndecided otherwise, as the contract allows: {}", comparison.allowed.count));
        described(&comparison.allowed, &mut text);
    }
    if comparison.is_equal() {
        text.push("\nequal: the second database can take the place of the first".to_owned());
    } else {
        text.push(format!("\nDIFFERENT: {}", comparison.findings.count));
        described(&comparison.findings, &mut text);
    }
    text.join("\n")
}
