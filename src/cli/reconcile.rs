//! `reconcile`: checks that every record has exactly one outcome.

use std::collections::BTreeMap;

use bytesize::ByteSize;
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::runtime::Handle;

use super::output::{print, progress_bar, table};
use crate::config::Settings;
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::error::CommandError;
use crate::reconcile::report::{Currency, Findings, NotCompared, Orphans, Report, Sum};
use crate::reconcile::{Wanted, reconcile as compare};

const AFTER_HELP: &str = "\
Reads the log, determines the expected outcome of each record by the daemon's own rules, and checks that
its rows, events and dead letter exist exactly once and match the record. Writes nothing, joins no group,
and can run beside the daemon: it compares up to both cursors as they were at its start. Rows and events
of records that have left the log are not compared. Outputs are read from their start.

Findings contain partition and offset, never the contents of a record. Differences that the contract
allows after a recovery are listed separately and are not findings.

What was not compared is named by partition and offsets: records that are no longer in the log, not written
yet, or behind an open transaction.

Exits with 0 if everything is correct, 1 if there are findings, if something cannot be read, or if a loss may
be hidden in what was not compared (compacted topics, halted partitions, cursors that are missing or beyond
what can be read), 3 if group, topic and database do not belong together.

Examples:
  payment-writer reconcile
  payment-writer reconcile --partition 7 --from-offset 120000 --to-offset 130000
  payment-writer reconcile --since 2026-03-01T00:00:00Z --json";

/// Maximum number of ranges that are listed for a reason.
const RANGES_MAX: usize = 20;
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
    /// Memory for the records that are compared at once; less memory means more scans of the tables
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = memory)]
    pub memory: usize,
    /// Number of findings to list; the others are counted
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = limit)]
    pub limit: usize,
    /// Also look for rows of payment_core, payment_notes and idempotency without a row of payment_metadata,
    /// regardless of the range, and for rows of the compared records in months that are not theirs; scans
    /// these tables completely
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
    let size: Option<ByteSize> = text.trim().parse().ok();
    match size.and_then(|size| usize::try_from(size.as_u64()).ok()) {
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
    print(if args.json { json(&report)? } else { describe(&report) })?;
    if report.is_fine {
        return Ok(());
    }
    let orphans = report.orphans.map_or(0, |orphans| orphans.count());
    let count = report.findings.count.saturating_add(orphans);
    let hidden = report.not_compared.iter().filter(|part| part.may_hide_loss).count();
    Err(CommandError::failed(format!(
        "findings: {count}, in {} records; not compared where a loss may be hidden: {hidden}",
        report.records
    )))
}

/// Shows the progress of a comparison while it runs.
pub(super) fn with_progress<T>(compare: impl FnOnce(&ProgressBar) -> T) -> T {
    let bar = progress_bar(Some(0), "{spinner} {msg:14} {wide_bar} {human_pos}/{human_len} {per_sec}");
    let outcome = compare(&bar);
    bar.finish_and_clear();
    outcome
}

/// As one JSON object, with its keys in alphabetical order.
pub(super) fn json(result: &impl Serialize) -> Result<String, CommandError> {
    let value = serde_json::to_value(result).map_err(|e| CommandError::failed(e.to_string()))?;
    Ok(value.to_string())
}

/// Adds the number of findings, and one line for each that is named.
pub(super) fn describe_findings(title: &str, findings: &Findings, into: &mut Vec<String>) {
    into.push(format!("{title}: {}", findings.count));
    for finding in &findings.named {
        into.push(format!("  partition {}, offset {}: {}", finding.partition, finding.offset, finding.what));
    }
    let unnamed = findings.count.saturating_sub(findings.named.len() as u64);
    if unnamed > 0 {
        into.push(format!("  and {unnamed} more (--limit)"));
    }
}

/// Adds a line for each reason.
pub(super) fn describe_not_compared(parts: &[NotCompared], into: &mut Vec<String>) {
    let mut reasons: BTreeMap<(bool, &str), Vec<String>> = BTreeMap::new();
    for NotCompared { may_hide_loss, why, range } in parts {
        let ranges = reasons.entry((!may_hide_loss, why)).or_default();
        ranges.extend(range.map(|r| format!("partition {} from {} to before {}", r.partition, r.from, r.to)));
    }
    for ((is_harmless, why), ranges) in reasons {
        let title = if is_harmless { "not compared" } else { "NOT COMPARED, A LOSS MAY BE HIDDEN" };
        let mut text = [vec![format!("{title}: {why}")], ranges].concat();
        let unnamed = text.len().saturating_sub(1 + RANGES_MAX);
        text.truncate(1 + RANGES_MAX);
        if unnamed > 0 {
            text.push(format!("and {unnamed} more (--json)"));
        }
        into.push(text.join("; "));
    }
}

fn describe(report: &Report) -> String {
    let compared = report.partitions.iter().filter(|range| !range.is_empty()).count();
    let mut text = vec![
        format!(
            "{} records of {} in {compared} of {} partitions, up to both cursors of group {}",
            report.records,
            report.topic,
            report.partitions.len(),
            report.group
        ),
        format!("rows in {}", report.database),
    ];
    describe_not_compared(&report.not_compared, &mut text);
    if report.partitions_halted > 0 {
        text.push(format!(
            "halted partitions: {}, compared up to the halt (see `cursors show`)",
            report.partitions_halted
        ));
    }
    let outcomes = report.outcomes.iter().map(|(outcome, count)| [outcome.to_string(), count.to_string()]);
    let sums = report.currencies.iter().map(|(code, Currency { log, rows, read_events })| {
        let events = read_events.map_or_else(|| "-".to_owned(), Sum::text);
        [code.clone(), log.count.to_string(), log.text(), rows.text(), events]
    });
    let header = ["currency", "payments", "sum by the log", "by the rows", "by the read events"];
    text.push(format!("\n{}\n\n{}\n", table(["outcome", "records"], outcomes), table(header, sums)));
    let mut counts = Vec::new();
    if let Some(outputs) = &report.outputs {
        text.push(format!(
            "read events {}, e-mail events {}, dead letters {}",
            outputs.read, outputs.email, outputs.dead_letter
        ));
        counts.push(("outputs with a source in another topic, or without a source", outputs.foreign));
    }
    counts.push((
        "rows and outputs of records that the log lost and whose offsets were used again",
        report.of_lost_records,
    ));
    if let Some(outputs) = &report.outputs {
        let what = "outputs that may have left their topic, which has lost its beginning";
        counts.push((what, outputs.beyond_retention));
    }
    text.extend(
        counts.iter().filter(|(_, count)| *count > 0).map(|(what, count)| format!("{what}: {count}")),
    );
    if report.allowed.count > 0 {
        let title =
            "\ndecided differently by an earlier database or by other settings, as the contract allows";
        describe_findings(title, &report.allowed, &mut text);
    }
    if report.orphans.is_none() {
        text.push("not compared without --orphans: rows in other months than their records".to_owned());
    }
    if let Some(Orphans { payment_core, payment_notes, idempotency }) = report.orphans {
        for (table, count) in
            [("payment_core", payment_core), ("payment_notes", payment_notes), ("idempotency", idempotency)]
        {
            text.push(format!("rows of {table} without payment_metadata: {count}"));
        }
    }
    if report.is_fine {
        text.push(
            "\neverything is correct: every record that was compared has exactly one outcome".to_owned(),
        );
    } else {
        describe_findings("\nOFF", &report.findings, &mut text);
    }
    text.join("\n")
}
