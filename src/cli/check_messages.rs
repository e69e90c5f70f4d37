//! `check-messages`: shows what the daemon would do with messages, without writing anything.

mod checker;
mod lines;
mod range;
mod report;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::output::warn;
use crate::config::{KafkaSettings, Settings};
use crate::domain::cursor::LogBounds;
use crate::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use crate::error::{CommandError, OrFailed};
use crate::kafka::last_stable::stable_high_watermarks;
use crate::kafka::scan::{ScanRange, Scanner};
use crate::telemetry::metrics;
use checker::{Checker, IDS_MAX};
use lines::Format;
use range::{Asked, Skipped};
use report::{Origin, Report};

const AFTER_HELP: &str = "\
Checks by the daemon's own rules and the settings payment.*, email.* and idempotency.window, or their
defaults. Writes nothing, joins no group and commits nothing; without --topic it connects to nothing.

Each line of a file is one value. Without a key in the line, the rule that the key is the text of custId
is not checked. Lines of other formats:
  --key-separator '\\t'   57<tab>{\"messageId\":...}    kcat -C -f '%k\\t%s\\n'; also read by kcat -P -K '\\t'
  --kcat-json            {\"key\":\"57\",\"payload\":\"{\\\"messageId\\\":...}\",\"headers\":[\"schema-version\",\"1\"],\"ts\":1772366400000}
                         kcat -C -J; `payload` may also be the JSON object itself

Duplicates and conflicts are found among the messages that are checked. Not known here are ids that were
written before (message_id_conflict, duplicate) and rows that the database refuses (rejected_by_database).

The output contains no contents of messages, except with --payload: consider who can see it.

Exits with 0 if no message would be dead-lettered, 1 if one would or the check failed, 2 on wrong usage
and if there is no message to check.

Examples:
  payment-writer check-messages --file messages.jsonl
  payment-writer check-messages --key-separator '\\t' --quiet < messages.tsv
  payment-writer check-messages --topic payments-test --json
  payment-writer check-messages --topic payments-test --partition 3 --from 1200 --to 1300 --payload";

/// Longest line; far longer than any valid message.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// `check-messages`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CheckMessagesArgs {
    /// File with one message per line; - is standard input, the default
    #[arg(long, value_name = "FILE", conflicts_with = "topic")]
    pub file: Option<PathBuf>,
    /// Each line is a key, this text (\t is a tab) and a value; a line without the text has no key
    #[arg(long, value_name = "TEXT", value_parser = separator, conflicts_with_all = ["kcat_json", "topic"])]
    pub key_separator: Option<String>,
    /// Each line is a JSON object with key, payload, headers and ts, as written by kcat -J
    #[arg(long, conflicts_with = "topic")]
    pub kcat_json: bool,
    /// Timestamp of records that a file gives none: 2026-03-01T12:00:00Z, or ms since 1970; default: now
    #[arg(long, value_name = "TIMESTAMP", value_parser = timestamp, conflicts_with = "topic", allow_negative_numbers = true)]
    pub at: Option<TimestampMs>,
    /// Check the committed records of this topic instead of a file
    #[arg(long, value_name = "TOPIC", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub topic: Option<String>,
    /// Only this partition
    #[arg(long, value_name = "N", requires = "topic", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: Option<i32>,
    /// First offset; default: the first one of the log
    #[arg(long, value_name = "OFFSET", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    pub from: Option<i64>,
    /// Offset to stop before; default: the present end of the log
    #[arg(long, value_name = "OFFSET", requires = "partition", value_parser = clap::value_parser!(i64).range(0..))]
    pub to: Option<i64>,
    /// Check at most this many offsets of a topic, the first ones, evenly over its partitions
    #[arg(long, value_name = "N", default_value_t = 100_000, requires = "topic", value_parser = clap::value_parser!(u64).range(1..=IDS_MAX))]
    pub max: u64,
    /// Stop reading a topic after this time
    #[arg(long, value_name = "TIME", default_value = "10m", requires = "topic", value_parser = super::duration)]
    pub time_limit: Duration,
    /// Print only messages that would be dead-lettered, and the summary
    #[arg(long)]
    pub quiet: bool,
    /// Also print keys, headers and values
    #[arg(long)]
    pub payload: bool,
    /// As one JSON object per message, and one with the summary
    #[arg(long)]
    pub json: bool,
}

fn separator(text: &str) -> Result<String, String> {
    let separator = text.replace("\\t", "\t");
    if separator.is_empty() { Err("a text that is not empty".to_owned()) } else { Ok(separator) }
}

fn timestamp(text: &str) -> Result<TimestampMs, String> {
    let parsed = text.parse().or_else(|_| text.parse().map(|t: jiff::Timestamp| t.as_millisecond()));
    parsed.map(TimestampMs).map_err(|_| "a time such as 2026-03-01T12:00:00Z, or ms since 1970".to_owned())
}

/// Checks messages and prints what would become of them.
pub fn check_messages(settings: &Settings, args: &CheckMessagesArgs) -> Result<(), CommandError> {
    let mut check = Check {
        checker: Checker::new(settings.rules()),
        report: Report::new(
            if args.topic.is_some() { Origin::Topic } else { Origin::Lines },
            args.json,
            args.quiet,
            args.payload,
        ),
    };
    match &args.topic {
        Some(topic) => check.topic(&settings.kafka, topic, args)?,
        None => check.file(args)?,
    }
    check.report.finish()
}

struct Check {
    checker: Checker,
    report: Report,
}

impl Check {
    fn record(&mut self, source: SourceBatch) -> Result<(), CommandError> {
        let (batch, verdict) = self.checker.check(source)?;
        self.report.message(&batch, &verdict)
    }

    fn file(&mut self, args: &CheckMessagesArgs) -> Result<(), CommandError> {
        let format = match &args.key_separator {
            Some(separator) => Format::KeyAndValue(separator.clone()),
            None if args.kcat_json => Format::KcatJson,
            None => Format::Value,
        };
        self.report.keys_are_unknown = format == Format::Value;
        match args.file.as_deref().filter(|file| file.as_os_str() != "-") {
            Some(path) => {
                let shown = path.display();
                let file = File::open(path)
                    .map_err(|error| CommandError::usage(format!("cannot open {shown}: {error}")))?;
                self.lines(BufReader::new(file), &format, args.at)
            }
            None => {
                let stdin = io::stdin().lock();
                if stdin.is_terminal() {
                    warn("reading messages from standard input, one per line");
                }
                self.lines(stdin, &format, args.at)
            }
        }
    }

    fn lines(
        &mut self,
        mut input: impl BufRead,
        format: &Format,
        at: Option<TimestampMs>,
    ) -> Result<(), CommandError> {
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            // One byte more, for the line break.
            let mut limited = io::Read::take(&mut input, LINE_BYTES_MAX.saturating_add(1));
            let length = limited
                .read_until(b'\n', &mut line)
                .or_failed_to(format_args!("cannot read line {number}"))?;
            if length == 0 {
                break;
            }
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            let wrong = |what: &str| CommandError::usage(format!("line {number}: {what}"));
            if text.len() as u64 > LINE_BYTES_MAX {
                return Err(wrong("is longer than 16 MiB"));
            }
            let message = lines::parse(text, format).map_err(|what| wrong(&what))?;
            self.record(message.into_batch(Offset(number), at.unwrap_or_else(metrics::now)))?;
        }
        Ok(())
    }

    fn topic(
        &mut self,
        kafka: &KafkaSettings,
        topic: &str,
        args: &CheckMessagesArgs,
    ) -> Result<(), CommandError> {
        let began = Instant::now();
        let asked = Asked {
            from: args.from.map(NextOffset),
            to: args.to.map(NextOffset),
            offsets_max: i64::try_from(args.max).unwrap_or(i64::MAX),
        };
        let scanner = Scanner::new(kafka, topic).or_failed()?;
        if !scanner.exists().or_failed()? {
            return Err(CommandError::usage(format!(
                "topic {topic}: does not exist, or may not be seen with these settings"
            )));
        }
        let logs = logs(&scanner, kafka, args.partition.map(Partition), asked.to)?;
        let chosen = asked
            .choose(&logs)
            .map_err(|reason| CommandError::usage(format!("topic {topic}: nothing to check: {reason}")))?;
        self.report.skipped = chosen.skipped;
        self.report.ranges.clone_from(&chosen.ranges);
        let mut ranges = chosen.ranges.iter();
        // One partition after the other: the result does not depend on which one answers first.
        while let Some(range) = ranges.next() {
            let Some(rest) = self.range(&scanner, range, began, args.time_limit)? else { continue };
            let rest = std::iter::once(rest).chain(ranges.by_ref().copied());
            self.report.skipped.extend(rest.map(|range| Skipped { range, why: "--time-limit" }));
            self.report.is_out_of_time = true;
        }
        Ok(())
    }

    /// Checks the records of a range. Returns what remains of it when the time is over.
    fn range(
        &mut self,
        scanner: &Scanner,
        range: &ScanRange,
        began: Instant,
        time_limit: Duration,
    ) -> Result<Option<ScanRange>, CommandError> {
        let mut outcome = Ok(());
        let mut rest = None;
        // `outcome` and `rest` say why the callback stopped the scan.
        let _ = scanner
            .read(&[*range], |record| {
                if began.elapsed() > time_limit {
                    rest = Some(ScanRange { from: NextOffset(record.offset().0), ..*range });
                    return ControlFlow::Break(());
                }
                let mut source = SourceBatch::new();
                record.copy_into(&mut source);
                outcome = self.record(source);
                if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
            .or_failed()?;
        outcome.map(|()| rest)
    }
}

/// The partitions to check, with their logs up to everything that is committed now.
fn logs(
    scanner: &Scanner,
    kafka: &KafkaSettings,
    partition: Option<Partition>,
    to: Option<NextOffset>,
) -> Result<Vec<(Partition, LogBounds)>, CommandError> {
    let (_, mut partitions) = scanner.describe().or_failed()?;
    if let Some(partition) = partition {
        if !partitions.contains(&partition) {
            let (topic, count) = (scanner.topic(), partitions.len());
            return Err(CommandError::usage(format!(
                "topic {topic}: has no partition {partition}, only {count} from 0"
            )));
        }
        partitions = vec![partition];
    }
    let mut bounds = scanner.bounds(&partitions).or_failed()?;
    // A commit is acknowledged before the last stable offset moves. A range that ends before it need not wait.
    if bounds.iter().any(|bounds| to.is_none_or(|to| to > bounds.end)) {
        let ends = stable_high_watermarks(kafka, scanner.topic(), &partitions).map_err(|error| {
            CommandError::failed(format!("{error}; --partition and --to choose what comes before it"))
        })?;
        for (bounds, end) in bounds.iter_mut().zip(ends) {
            bounds.end = end;
        }
    }
    Ok(partitions.into_iter().zip(bounds).collect())
}
