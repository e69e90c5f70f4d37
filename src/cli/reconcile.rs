//! `reconcile`: checks that every record has exactly one outcome.

use clap::Args;
use tokio::runtime::Handle;

use super::output::{print, progress_bar, table};
use crate::config::{ByteSize, Settings};
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::error::CommandError;
use crate::reconcile::{Findings, Progress, Report, Wanted, reconcile as compare};

const AFTER_HELP: &str = "\
Reads the log, determines the expected outcome of each record by the daemon's own rules, and checks that
its rows, events and dead letter exist exactly once and match the record. Writes nothing, joins no group,
and can run beside the daemon: it compares up to both cursors as they were at its start. Rows and events
of records that have left the log are not compared. Outputs are read from their start.

Findings contain partition and offset, never the contents of a record. Differences that the contract
allows after a recovery are listed separately and are not findings.

Exits with 0 if everything is correct, 1 if there are findings or something cannot be read, 3 if group,
topic and database do not belong together.

Examples:
  payment-writer reconcile
  payment-writer reconcile --partition 7 --from-offset 120000 --to-offset 130000
  payment-writer reconcile --since 2026-03-01T00:00:00Z --json";

/// Minimum memory of a slice.
const MEMORY_BYTES_MIN: usize = 4 * 1024;

/// `reconcile`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ReconcileArgs {
    /// Only this partition of the input topic; can be repeated
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: Vec<i32>,
    /// First offset to compare; needs exactly one --partition
    #[arg(long, value_name = "OFFSET", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    pub from_offset: Option<i64>,
    /// Offset to stop before; needs exactly one --partition
    #[arg(long, value_name = "OFFSET", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    pub to_offset: Option<i64>,
    /// Start each partition at its first record of this time or later (2026-03-01T00:00:00Z)
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub since: Option<TimestampMs>,
    /// Stop each partition before its first record of this time or later
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub until: Option<TimestampMs>,
    /// Memory for the records that are compared at once; less memory means more passes over the outputs
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = memory)]
    pub memory: usize,
    /// Number of findings to list; the others are counted
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = limit)]
    pub limit: usize,
    /// Also look for rows of payment_core, payment_notes and idempotency without a row of payment_metadata,
    /// regardless of the range; scans these tables completely
    #[arg(long)]
    pub orphans: bool,
    /// As one JSON object
    #[arg(long)]
    pub json: bool,
}

fn time(text: &str) -> Result<TimestampMs, String> {
    text.parse::<jiff::Timestamp>()
        .map(|t| TimestampMs(t.as_millisecond()))
        .map_err(|_| "a time such as 2026-03-01T00:00:00Z".to_owned())
}

fn memory(text: &str) -> Result<usize, String> {
    match ByteSize::parse(text).map(ByteSize::bytes) {
        Some(bytes) if bytes >= MEMORY_BYTES_MIN => Ok(bytes),
        _ => Err("a size of 4KiB or more, such as 256MiB".to_owned()),
    }
}

pub(super) fn limit(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(limit) if limit <= 1_000_000 => Ok(limit),
        _ => Err("a number up to 1000000".to_owned()),
    }
}

/// Compares and prints the result.
pub fn reconcile(settings: &Settings, args: &ReconcileArgs, runtime: &Handle) -> Result<(), CommandError> {
    if (args.from_offset.is_some() || args.to_offset.is_some()) && args.partition.len() != 1 {
        return Err(CommandError::usage("--from-offset and --to-offset need exactly one --partition"));
    }
    let wanted = Wanted {
        partitions: args.partition.iter().copied().map(Partition).collect(),
        from: args.from_offset.map(NextOffset),
        to: args.to_offset.map(NextOffset),
        since: args.since,
        until: args.until,
        memory_bytes: args.memory,
        limit: args.limit,
        looks_for_orphans: args.orphans,
    };
    let report = with_progress(|progress| compare(settings, runtime, &wanted, progress))?;
    print(if args.json { report.json().to_string() } else { describe(&report) })?;
    if report.is_fine() {
        return Ok(());
    }
    let orphans: u64 = report.orphans.iter().flatten().sum();
    let count = report.findings.count.saturating_add(orphans);
    Err(CommandError::failed(format!("findings: {count}, in {} records", report.records)))
}

/// Shows the progress of a comparison while it runs.
pub(super) fn with_progress<T>(compare: impl FnOnce(&Progress) -> T) -> T {
    let bar = progress_bar(Some(0), "{spinner} {msg:14} {wide_bar} {human_pos}/{human_len} {per_sec}");
    let outcome = compare(&Progress::on(bar.clone()));
    bar.finish_and_clear();
    outcome
}

pub(super) fn described(findings: &Findings, into: &mut Vec<String>) {
    for finding in &findings.named {
        into.push(format!("  partition {}, offset {}: {}", finding.partition, finding.offset, finding.what));
    }
    let unnamed = findings.count.saturating_sub(findings.named.len() as u64);
    if unnamed > 0 {
        into.push(format!("  and {unnamed} more (--limit)"));
    }
}

fn describe(report: &Report) -> String {
    let mut text = Vec::new();
    let with_records = report.compared.iter().filter(|c| c.to > c.from).count();
    text.push(format!(
        "{} records of {} in {with_records} of {} partitions, up to both cursors of group {}",
        report.records,
        report.topic,
        report.compared.len(),
        report.group_id
    ));
    text.push(format!("rows in {}", report.database));
    if report.compared.iter().any(|c| c.from.0 > 0) {
        text.push(
            "not compared: records before the range or no longer in the log, with their rows and events"
                .to_owned(),
        );
    }
    if report.halted > 0 {
        text.push(format!(
            "halted partitions: {}, compared up to the halt (see `cursors show`)",
            report.halted
        ));
    }
    let outcomes = report.outcomes.iter().map(|(outcome, count)| [outcome.to_string(), count.to_string()]);
    let sums = report.currencies().into_iter().map(|currency| {
        let (log, rows) = (report.log.of(currency), report.rows.of(currency).text());
        let events = if report.publishes { report.events.of(currency).text() } else { "-".to_owned() };
        [currency.to_owned(), log.count.to_string(), log.text(), rows, events]
    });
    let header = ["currency", "payments", "sum by the log", "by the rows", "by the read events"];
    text.push(format!("\n{}\n\n{}\n", table(["outcome", "records"], outcomes), table(header, sums)));
    if report.publishes {
        let [read, email, letters] = report.outputs;
        text.push(format!("read events {read}, e-mail events {email}, dead letters {letters}"));
    }
    if report.foreign > 0 {
        text.push(format!("outputs with a source in another topic, or without a source: {}", report.foreign));
    }
    if report.former > 0 {
        text.push(format!(
            "rows and outputs of records that the log lost and whose offsets were used again: {}",
            report.former
        ));
    }
    if report.untold > 0 {
        text.push(format!(
            "outputs that may have left their topic, which has lost its beginning: {}",
            report.untold
        ));
    }
    if !report.allowed.is_empty() {
        text.push(format!(
            "\ndecided differently by an earlier database or by other settings, as the contract allows: {}",
            report.allowed.count
        ));
        described(&report.allowed, &mut text);
    }
    for (table, count) in
        ["payment_core", "payment_notes", "idempotency"].iter().zip(report.orphans.into_iter().flatten())
    {
        text.push(format!("rows of {table} without payment_metadata: {count}"));
    }
    if report.is_fine() {
        text.push("\neverything is correct: every record has exactly one outcome".to_owned());
    } else {
        text.push(format!("\nOFF: {}", report.findings.count));
        described(&report.findings, &mut text);
    }
    text.join("\n")
}
