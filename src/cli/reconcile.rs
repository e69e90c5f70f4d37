//! `reconcile`: is every record's one outcome there, exactly once?

use std::io::IsTerminal;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use super::output::{print, table};
use crate::config::{ByteSize, Settings};
use crate::reconcile::{Findings, Progress, Report, Wanted, reconcile as compare};
use crate::record::{NextOffset, Partition, TimestampMs};

const AFTER_HELP: &str = "\
Reads the log, decides by the daemon's own rules what should have become of each record, and looks for
its rows, its events and its dead letter: there, once, and saying what the record says. Writes nothing,
joins no group, and may run beside the daemon: it compares up to both cursors as they were when it began.
Rows and events of records that have left the log are not compared. Outputs are read from their start.

Findings name partition and offset, never what is in a record. Ids that the contract allows to be
decided otherwise after a recovery are listed, and are no findings.

Exits with 0 when all is right, 1 when something is off or cannot be read, 3 when group, topic and
database do not belong together.

Examples:
  payment-writer reconcile
  payment-writer reconcile --partition 7 --from-offset 120000 --to-offset 130000
  payment-writer reconcile --since 2026-03-01T00:00:00Z --json";

/// The least that one slice may take.
const MEMORY_BYTES_MIN: usize = 4 * 1024;

/// `reconcile`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ReconcileArgs {
    /// Only this partition of the input topic; may be given more than once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: Vec<i32>,
    /// Not before this offset of the one --partition
    #[arg(long, value_name = "OFFSET", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    pub from_offset: Option<i64>,
    /// Only before this offset of the one --partition
    #[arg(long, value_name = "OFFSET", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    pub to_offset: Option<i64>,
    /// Of each partition, begin at the first record of this time or later (2026-03-01T00:00:00Z)
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub since: Option<TimestampMs>,
    /// Of each partition, stop before the first record of this time or later
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub until: Option<TimestampMs>,
    /// What the records that are compared at once may take; less memory, more passes over the outputs
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = memory)]
    pub memory: usize,
    /// How many findings are named; the others are counted
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = limit)]
    pub limit: usize,
    /// Look as well for rows of payment_core, payment_notes and idempotency that belong to no row of
    /// payment_metadata, whatever the range; reads these tables from end to end
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

/// Compares, and says what was found.
pub fn reconcile(settings: &Settings, args: &ReconcileArgs) -> Result<(), Failure> {
    if (args.from_offset.is_some() || args.to_offset.is_some()) && args.partition.len() != 1 {
        return Err(Failure::usage("--from-offset and --to-offset need exactly one --partition"));
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
    let runtime = super::large_runtime()?;
    let bar = progress_bar();
    let report = compare(settings, runtime.handle(), &wanted, &Progress::on(bar.clone()));
    bar.finish_and_clear();
    // Not waited for: a request to a broker that is away may still block its thread.
    runtime.shutdown_background();
    let report = report?;
    if args.json {
        print(&report.json().to_string())?;
    } else {
        print(&describe(&report))?;
    }
    if report.is_fine() {
        return Ok(());
    }
    let orphans: u64 = report.orphans.iter().flatten().sum();
    let count = report.findings.count.saturating_add(orphans);
    Err(Failure::failed(format!("findings: {count}, in {} records", report.records)))
}

/// A bar on a terminal, nothing elsewhere.
pub(super) fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{spinner} {msg:14} {wide_bar} {human_pos}/{human_len} {per_sec}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
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
    let settled = report.compared.iter().filter(|c| c.to > c.from).count();
    text.push(format!(
        "{} records of {} in {settled} of {} partitions, up to both cursors of group {}",
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
            "halted partitions: {}, compared up to where they halted (cursors show)",
            report.halted
        ));
    }
    let mut rows = vec![["outcome", "records"].map(str::to_owned)];
    rows.extend(report.outcomes.iter().map(|(outcome, count)| [outcome.to_string(), count.to_string()]));
    text.push(String::new());
    text.push(table(&rows));
    let mut rows = vec![
        ["currency", "payments", "sum by the log", "by the rows", "by the read events"].map(str::to_owned),
    ];
    for currency in report.currencies() {
        let log = report.log.of(currency);
        let events = if report.publishes { report.events.of(currency).text() } else { "-".to_owned() };
        rows.push([
            currency.to_owned(),
            log.count.to_string(),
            log.text(),
            report.rows.of(currency).text(),
            events,
        ]);
    }
    text.push(String::new());
    text.push(table(&rows));
    text.push(String::new());
    if report.publishes {
        let [read, email, letters] = report.outputs;
        text.push(format!("read events {read}, e-mail events {email}, dead letters {letters}"));
    }
    if report.foreign > 0 {
        text.push(format!("outputs of other topics, or without a source: {}", report.foreign));
    }
    if report.former > 0 {
        text.push(format!(
            "rows and outputs of records that the log lost, whose offsets were used again: {}",
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
            "\ndecided otherwise by an earlier database or by other settings, as the contract allows: {}",
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
        text.push("\nall is right: every record has exactly its one outcome".to_owned());
    } else {
        text.push(format!("\nOFF: {}", report.findings.count));
        described(&report.findings, &mut text);
    }
    text.join("\n")
}
