//! `produce`: the load generator.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args};
use serde::Serialize;
use serde_json::Value;

use super::output::{self, aligned, print, progress_bar};
use super::{duration, fraction, stop_signal};
use crate::config::{KafkaSettings, Settings};
use crate::domain::wire::Reason;
use crate::error::{CommandError, OrFailed};
use crate::generator::{BAD_REASONS, Generator, GeneratorConfig, IdKind, Tally};
use crate::kafka::group::visible_members;
use pace::Pace;
use sender::Sender;
use transactions::{Transactions, TransactionsReport};

mod pace;
mod sender;
mod transactions;

/// Number of records between checks for signals and updates of the progress bar.
const RECORDS_PER_LOOK: u64 = 1_000;

/// Values are padded to at most this many bytes less than payment.max_bytes, because another spelling of the
/// same payment is longer.
const SPELLING_BYTES: usize = 512;

const AFTER_HELP: &str = "\
Messages have the format of the original producer: key 57, value {\"messageId\":\"<uuid>\",\"amount\":
123131.21,\"status\":2,\"currency\":\"EUR\",\"custId\":57,\"type\":\"BWI\",\"comment\":\"...\"}. Duplicates repeat an
earlier payment, half of them in another spelling; conflicts use an earlier message id with another
amount; bad records must be dead-lettered, and cover every reason that a single record can have.

With --transaction-size the records are sent in transactions. With --aborted-share some of these are
aborted, and their records are sent again in the next one, as by a producer that retries. Aborted
records stay in the log but are invisible to read_committed consumers: they do not count towards
--count or --rate, and the report counts them separately (\"transactions\"), not as records or outcomes.

The producer is idempotent: a record that it retries is in the log only once.

Without --seed each run sends different payments. With the same seed and version 4 ids, a second run
sends the same payments again, which are all duplicates to the daemon.

Ctrl-C stops early: the records sent so far are flushed and reported.

Examples:
  payment-writer produce --count 200000 --duplicates 0.05 --conflicts 0.01 --bad 0.01 --report sent.json
  payment-writer produce --rate 1000 --duration 1m
  payment-writer produce --rate 50 --ids v7
  payment-writer produce --count 200000 --transaction-size 500 --aborted-share 0.1 --compression lz4";

/// `produce`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP, group = ArgGroup::new("how_much").required(true).multiple(true))]
pub struct ProduceArgs {
    /// Number of records to send; without --rate as fast as the brokers accept them
    #[arg(long, value_name = "N", group = "how_much", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Records to send per second, evenly; until --count, --duration or Ctrl-C
    #[arg(long, value_name = "PER_SECOND", group = "how_much", value_parser = rate)]
    pub rate: Option<f64>,
    /// With --rate: stop after this time, such as 30s or 5m
    #[arg(long, value_name = "TIME", requires = "rate", conflicts_with = "count", value_parser = duration)]
    pub duration: Option<Duration>,
    /// Number of accounts
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1 << 62))]
    pub accounts: u64,
    /// Share of records that repeat an earlier payment, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = fraction)]
    pub duplicates: f64,
    /// Share of records that use an earlier message id with another amount, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = fraction)]
    pub conflicts: f64,
    /// Share of records that must be dead-lettered, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = fraction)]
    pub bad: f64,
    /// Kinds of bad records; default: all but invalid_timestamp, whose segments a broker may delete before
    /// they are read
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = bad_reason())]
    pub bad_reasons: Vec<Reason>,
    /// Seed: the same seed produces the same records; default: random
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Kind of message ids
    #[arg(long, value_enum, default_value = "v4")]
    pub ids: IdKind,
    /// Pad values to about this many bytes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(200..=512 << 10))]
    pub value_bytes: Option<u32>,
    /// Compression of record batches
    #[arg(long, default_value = "none", value_parser = ["none", "gzip", "snappy", "lz4", "zstd"])]
    pub compression: String,
    /// Records per transaction; a transaction that has been open for 5 s, as with a low --rate, is committed
    /// with fewer. Default: no transactions
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub transaction_size: Option<u32>,
    /// Share of all transactions that are aborted, 0 to 0.5; the records of each are sent again in the next
    /// one
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, requires = "transaction_size", value_parser = aborted_share)]
    pub aborted_share: f64,
    /// Do not ask before sending to a topic that running members of the group read
    #[arg(long)]
    pub yes: bool,
    /// Write counts and expected outcomes to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

fn bad_reason() -> impl TypedValueParser<Value = Reason> {
    let names = BAD_REASONS.map(|(reason, help)| PossibleValue::new(reason.as_str()).help(help));
    PossibleValuesParser::new(names).try_map(|name| super::reason(&name))
}

/// At most half of the transactions: each aborted one is followed by one that is committed.
fn aborted_share(text: &str) -> Result<f64, String> {
    match fraction(text) {
        Ok(share) if share <= 0.5 => Ok(share),
        _ => Err("a share from 0 to 0.5".to_owned()),
    }
}

/// Parses a rate in records per second.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    match text.strip_suffix("/s").unwrap_or(text).parse::<f64>() {
        Ok(rate) if (0.001..=10_000_000.0).contains(&rate) => Ok(rate),
        _ => Err("records a second, from 0.001 to 10000000".to_owned()),
    }
}

/// Contents of the `--report` file.
#[derive(Serialize)]
struct Report<'a> {
    topic: &'a str,
    seed: u64,
    seconds: f64,
    records_per_second: f64,
    interrupted: bool,
    undelivered: u64,
    transactions: TransactionsReport,
    #[serde(flatten)]
    sent: Value,
}

/// Sends payments and reports what was sent.
pub fn produce(settings: &Settings, args: &ProduceArgs) -> Result<(), CommandError> {
    let seed = args.seed.unwrap_or_else(rand::random);
    let config = generator_config(settings, args, seed)?;
    let sender = Sender::connect(&settings.kafka, args)?;
    if !args.yes {
        confirm(&settings.kafka)?;
    }
    // Fail now rather than after an hour of sending if the report cannot be written.
    let mut report_file = args.report.as_deref().map(create).transpose()?;
    let stop = stop_signal()?;

    let mut transactions = Transactions::new(&sender, args.transaction_size, args.aborted_share);

    let started = Instant::now();
    let (tally, sent_all) = send_all(args, Generator::new(config), &mut transactions, &stop);
    let finished = transactions.finish().and_then(|()| sender.flush());
    let seconds = started.elapsed().as_secs_f64();

    let report = Report {
        topic: &settings.kafka.input_topic,
        seed,
        seconds,
        records_per_second: tally.records as f64 / seconds.max(1e-9),
        interrupted: stop.load(Ordering::Relaxed),
        undelivered: transactions.undelivered(),
        transactions: transactions.report,
        sent: tally.report(&settings.email.statuses),
    };
    if let (Some(file), Some(path)) = (&mut report_file, &args.report) {
        let text = serde_json::to_string_pretty(&report).or_failed()?;
        writeln!(file, "{text}").or_failed_to(format_args!("cannot write {}", path.display()))?;
    }
    print(summary(&report, &tally))?;
    sent_all?;
    finished
}

/// Asks for confirmation if the group has members, because they would write the generated payments.
fn confirm(kafka: &KafkaSettings) -> Result<(), CommandError> {
    let members =
        visible_members(kafka).or_failed_to(format_args!("asking for the members of {}", kafka.group_id))?;
    if members == 0 {
        return Ok(());
    }
    let what = format!(
        "{members} running members of group {} read {}: they would write the generated payments to their \
         database and publish their events",
        kafka.group_id, kafka.input_topic
    );
    output::confirm(&what, "Send them?", "nothing was sent")
}

fn generator_config(
    settings: &Settings,
    args: &ProduceArgs,
    seed: u64,
) -> Result<GeneratorConfig, CommandError> {
    if args.duplicates + args.conflicts + args.bad > 1.0 {
        return Err(CommandError::usage(
            "--duplicates, --conflicts and --bad together must not be more than 1",
        ));
    }
    let value_bytes_max = settings.payment.max_bytes;
    let value_bytes = args.value_bytes.map(|bytes| bytes as usize);
    if value_bytes.is_some_and(|bytes| bytes + SPELLING_BYTES > value_bytes_max) {
        return Err(CommandError::usage(format!(
            "--value-bytes must be at least {SPELLING_BYTES} less than payment.max_bytes, which is {value_bytes_max}"
        )));
    }
    let by_default = BAD_REASONS.map(|(reason, _)| reason).into_iter();
    let bad_reasons = match args.bad_reasons.as_slice() {
        // A broker may delete a segment whose timestamps are all that old before it is read.
        [] => by_default.filter(|reason| *reason != Reason::InvalidTimestamp).collect(),
        chosen => chosen.to_vec(),
    };
    Ok(GeneratorConfig {
        seed,
        accounts: args.accounts,
        duplicates: args.duplicates,
        conflicts: args.conflicts,
        bad: args.bad,
        bad_reasons,
        ids: args.ids,
        value_bytes,
        types: settings.payment.types.clone(),
        value_bytes_max,
        window: settings.idempotency.window,
    })
}

/// Sends until done, interrupted or failed; the tally counts the records passed to the client.
fn send_all(
    args: &ProduceArgs,
    mut generator: Generator,
    transactions: &mut Transactions<'_>,
    stop: &AtomicBool,
) -> (Tally, Result<(), CommandError>) {
    let pace = Pace::new(args.count, args.rate, args.duration);
    let progress = progress_bar(
        pace.total,
        match pace.total {
            Some(_) => "sending {wide_bar} {human_pos}/{human_len}  {per_sec}  {eta} left",
            None => "sending {spinner} {human_pos}  {per_sec}  {elapsed}",
        },
    );
    let mut tally = Tally::default();
    let started = Instant::now();
    let result = loop {
        let goal = pace.due(started.elapsed()).min(tally.records + RECORDS_PER_LOOK);
        let burst = send_until(goal, &mut generator, &mut tally, transactions, stop)
            .and_then(|()| transactions.commit_if_old());
        progress.set_position(tally.records);
        let is_done = pace.total.is_some_and(|total| tally.records >= total);
        if burst.is_err() || stop.load(Ordering::Relaxed) || is_done {
            break burst;
        }
        if let Some(pause) = pace.pause(tally.records, started.elapsed()) {
            std::thread::sleep(pause);
        }
    };
    progress.finish_and_clear();
    (tally, result)
}

/// Sends until the tally reaches `goal`. Stops at a record that the client did not accept, because the next
/// one could be a repeat of it.
fn send_until(
    goal: u64,
    generator: &mut Generator,
    tally: &mut Tally,
    transactions: &mut Transactions<'_>,
    stop: &AtomicBool,
) -> Result<(), CommandError> {
    while tally.records < goal {
        let record = generator.next(jiff::Timestamp::now().as_millisecond());
        if !transactions.send(&record, stop)? {
            break;
        }
        tally.add(&record);
    }
    Ok(())
}

fn create(path: &Path) -> Result<File, CommandError> {
    File::create(path)
        .map_err(|error| CommandError::usage(format!("cannot write {}: {error}", path.display())))
}

fn summary(report: &Report<'_>, tally: &Tally) -> String {
    let transactions = &report.transactions;
    let mut rows = vec![
        ("payments".to_owned(), tally.payments),
        ("duplicates".to_owned(), tally.duplicates),
        ("conflicts".to_owned(), tally.conflicts),
        ("bad".to_owned(), tally.bad_total()),
    ];
    rows.extend(tally.bad.iter().map(|(reason, records)| (format!("  {reason}"), *records)));
    if transactions.committed + transactions.aborted > 0 {
        rows.push(("transactions committed".to_owned(), transactions.committed));
        rows.push(("transactions aborted".to_owned(), transactions.aborted));
        rows.push(("  records in them".to_owned(), transactions.aborted_records));
    }
    if report.undelivered > 0 {
        rows.push(("not delivered".to_owned(), report.undelivered));
    }
    let how = if report.interrupted { ", interrupted" } else { "" };
    format!(
        "sent {} records to {} in {:.2} s ({:.0}/s, seed {}{how})\n{}",
        tally.records,
        report.topic,
        report.seconds,
        report.records_per_second,
        report.seed,
        aligned(rows.into_iter().map(|(what, count)| [format!("  {what}"), count.to_string()]))
    )
}
