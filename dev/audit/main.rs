//! Independent check that every record of the input topic had exactly one outcome.
//!
//! Reads the whole input topic, the three outputs and the tables, as any other system would. Prints counts and
//! samples; reports what is wrong, and then exits with 1.
// It shares no code with the daemon.
#![allow(clippy::disallowed_methods)]
// The auditor panics on what it cannot interpret.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod checker;

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use clap::Parser;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde::Deserialize;
use tokio_postgres::NoTls;

use checker::{Checker, Exceptions, Output, Result, Rules, Seen};

/// Time limit for open transactions: longer than the transaction timeout of a crashed producer.
const MARKERS_MAX: Duration = Duration::from_secs(20);
const KAFKA_TIMEOUT: Duration = Duration::from_secs(30);

/// Checks that every record of the input topic had exactly one outcome.
#[derive(Parser)]
struct Arguments {
    /// Kafka's bootstrap servers
    #[arg(long)]
    kafka: String,
    /// The database, e.g. postgres://user:password@host:port/database
    #[arg(long)]
    postgres_url: String,
    #[arg(long, default_value = "payment_writer_topic")]
    input_topic: String,
    #[arg(long, default_value = "payment_read_topic")]
    read_topic: String,
    #[arg(long, default_value = "payment_email")]
    email_topic: String,
    #[arg(long, default_value = "payment_writer_topic.dlq")]
    dead_letter_topic: String,
    /// The value of `payment.types`
    #[arg(long, value_delimiter = ',', default_value = "BWI,VSA,MSC")]
    types: Vec<String>,
    /// The value of `email.statuses`
    #[arg(long, value_delimiter = ',', default_value = "2", allow_negative_numbers = true)]
    email_statuses: Vec<i8>,
    /// The value of `payment.max_bytes`
    #[arg(long, default_value_t = 16 * 1024)]
    max_bytes: usize,
    /// The value of `idempotency.window`, in hours
    #[arg(long, default_value_t = 7 * 24)]
    window_hours: i64,
    /// Housekeeping may have dropped message ids: they need not be in the idempotency table
    #[arg(long)]
    pruned: bool,
    /// Print no samples
    #[arg(long)]
    quiet: bool,
    /// A report that `produce --report` wrote: all records that it sent must exist, with the outcomes it
    /// expects
    #[arg(long, value_name = "FILE")]
    report: Option<std::path::PathBuf>,
}

/// The outcomes that `produce` expects for what it sent.
#[derive(Deserialize)]
struct Report {
    records: u64,
    undelivered: u64,
    expected: Expected,
}

#[derive(Deserialize)]
struct Expected {
    written: u64,
    read_events: u64,
    email_events: u64,
    duplicates: u64,
    dead_letters_by_reason: BTreeMap<String, u64>,
}

impl Report {
    fn read(path: &std::path::Path) -> Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// Expected numbers, with the names of the auditor's own.
    fn numbers(&self) -> BTreeMap<String, u64> {
        let expected = &self.expected;
        let mut numbers: BTreeMap<String, u64> = [
            ("records", self.records - self.undelivered),
            ("written", expected.written),
            ("duplicate", expected.duplicates),
            ("read events", expected.read_events),
            ("e-mail events", expected.email_events),
        ]
        .map(|(name, number)| (name.to_owned(), number))
        .into();
        for (reason, number) in &expected.dead_letters_by_reason {
            numbers.insert(format!("dead letter: {reason}"), *number);
        }
        numbers.retain(|_, number| *number > 0);
        numbers
    }
}

/// A Kafka message for the checker.
fn seen<'m>(message: &'m BorrowedMessage<'_>) -> Seen<'m> {
    let headers = message.headers().into_iter();
    Seen {
        partition: message.partition(),
        offset: message.offset(),
        timestamp_ms: message.timestamp().to_millis(),
        key: message.key(),
        value: message.payload(),
        headers: headers.flat_map(|h| h.iter().map(|header| (header.key, header.value))).collect(),
    }
}

/// Text of a message, to be printed.
fn sample(message: &Seen<'_>) -> String {
    let text =
        |bytes: Option<&[u8]>| bytes.map_or("null".into(), |b| String::from_utf8_lossy(b).into_owned());
    let mut shown = format!("key {}", text(message.key));
    for (name, value) in &message.headers {
        shown += &format!("\n{name}: {}", text(*value));
    }
    shown + &format!("\n{}", text(message.value))
}

/// Passes every committed record of a topic to `each`, and returns the partitions' end offsets.
fn read_topic(kafka: &str, topic: &str, mut each: impl FnMut(&Seen<'_>)) -> Result<BTreeMap<i32, i64>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "payment-writer-audit")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "50")
        .set("fetch.queue.backoff.ms", "10")
        // By default 64 MiB of each partition.
        .set("queued.max.messages.kbytes", "2048")
        .create()?;
    let metadata = consumer.fetch_metadata(Some(topic), KAFKA_TIMEOUT)?;
    let partitions = metadata.topics()[0].partitions().len();
    if partitions == 0 {
        return Err(format!("topic {topic} does not exist").into());
    }
    let mut assignment = TopicPartitionList::new();
    let mut ends = BTreeMap::new();
    let uncommitted: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka)
        .set("group.id", "payment-writer-audit")
        .set("isolation.level", "read_uncommitted")
        .create()?;
    let deadline = Instant::now() + MARKERS_MAX;
    for partition in 0..i32::try_from(partitions)? {
        // Before fetching starts: these requests would wait behind a long-polling fetch.
        let end = loop {
            let (_, end) = consumer.fetch_watermarks(topic, partition, KAFKA_TIMEOUT)?;
            let (_, written) = uncommitted.fetch_watermarks(topic, partition, KAFKA_TIMEOUT)?;
            if end >= written || Instant::now() > deadline {
                break end;
            }
            // The broker answers a commit before the transaction's control records are in the partitions.
            std::thread::sleep(Duration::from_millis(20));
        };
        ends.insert(partition, end);
        assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&assignment)?;
    let mut at_end = vec![false; partitions];
    while at_end.contains(&false) {
        match consumer.poll(KAFKA_TIMEOUT) {
            None => return Err(format!("topic {topic}: no data for {KAFKA_TIMEOUT:?}").into()),
            Some(Ok(message)) => each(&seen(&message)),
            Some(Err(KafkaError::PartitionEOF(partition))) => at_end[usize::try_from(partition)?] = true,
            Some(Err(error)) => return Err(format!("reading topic {topic}: {error}").into()),
        }
    }
    Ok(ends)
}

async fn audit(arguments: &Arguments) -> Result<usize> {
    let (postgres, connection) = tokio_postgres::connect(&arguments.postgres_url, NoTls).await?;
    tokio::spawn(connection);
    let rules = Rules {
        types: arguments.types.clone(),
        email_statuses: arguments.email_statuses.clone(),
        max_bytes: arguments.max_bytes,
        window_hours: arguments.window_hours,
    };
    let exceptions = Exceptions { is_pruned: arguments.pruned, ..Exceptions::default() };
    let (kafka, input_topic) = (&arguments.kafka, &arguments.input_topic);
    let mut checker = Checker::new(input_topic, rules, exceptions);
    let ends = read_topic(kafka, input_topic, |message| checker.add_input(message))?;
    checker.read_topic_id(&postgres, input_topic).await?;
    checker.check_cursors(&postgres, input_topic, &ends, None).await?;
    checker.read_tables(&postgres).await?;
    let mut samples = Vec::new();
    for (output, topic, title) in [
        (Output::Read, &arguments.read_topic, "a read event"),
        (Output::Email, &arguments.email_topic, "an e-mail event"),
        (Output::DeadLetter, &arguments.dead_letter_topic, "a dead letter"),
    ] {
        let mut first = None;
        read_topic(kafka, topic, |message| {
            first.get_or_insert_with(|| sample(message));
            checker.add_output(output, topic, message);
        })?;
        samples.extend(first.map(|sample| (title, sample)));
    }
    let outcomes: BTreeMap<String, u64> =
        checker.judge().into_iter().map(|(outcome, count)| (outcome.to_string(), count)).collect();

    let records = checker.records();
    println!("{:<40}{records:>12}", format!("records in {}", arguments.input_topic));
    for (outcome, count) in &outcomes {
        println!("  {outcome:<38}{count:>12}");
    }
    let [read_events, email_events, dead_letters] = checker.outputs();
    println!("{:<40}{read_events:>12}", "read events");
    println!("{:<40}{email_events:>12}", "e-mail events");
    println!("{:<40}{dead_letters:>12}", "dead letters");
    println!("{:<40}{:>12}", "lost", checker.lost_count);
    if let Some(path) = &arguments.report {
        let expected = Report::read(path)?.numbers();
        let mut found = outcomes.clone();
        found.insert("records".to_owned(), records as u64);
        found.insert("read events".to_owned(), read_events);
        found.insert("e-mail events".to_owned(), email_events);
        found.retain(|_, number| *number > 0);
        let names: HashSet<&String> = expected.keys().chain(found.keys()).collect();
        for name in names {
            let [sent, seen] = [&expected, &found].map(|n| n.get(name).copied().unwrap_or_default());
            if sent != seen {
                checker.wrong(format!("{name}: {seen}, but produce expects {sent}"));
            }
        }
        println!("compared with the report of produce");
    }
    println!("\npayments by currency");
    let sums = postgres
        .query(
            "SELECT currency, count(*), trim_scale(sum(amount))::text FROM payment_writer.payment_core
             GROUP BY currency ORDER BY currency",
            &[],
        )
        .await?;
    for row in sums {
        let (currency, count, sum): (&str, i64, &str) = (row.get(0), row.get(1), row.get(2));
        println!("  {currency:<6}{count:>12}{sum:>26}");
    }
    if !arguments.quiet {
        for (title, sample) in &samples {
            println!("\n{title}\n  {}", sample.replace('\n', "\n  "));
        }
    }
    for what in &checker.findings {
        println!("WRONG: {what}");
    }
    if checker.wrong_count > checker.findings.len() {
        println!("... and {} more", checker.wrong_count - checker.findings.len());
    }
    Ok(checker.wrong_count)
}

#[tokio::main]
async fn main() -> Result<()> {
    let wrong_count = audit(&Arguments::parse()).await?;
    if wrong_count > 0 {
        println!("\nFAILED: {wrong_count} findings");
        std::process::exit(1);
    }
    println!("\nevery record had exactly one outcome");
    Ok(())
}
