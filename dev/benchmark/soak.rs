//! Soak: hours of a steady rate with bursts, while housekeeping is speeded up, snapshots are held, and an
//! instance and consumers come and go. Compares the daemon's use of resources early and late, and checks every
//! outcome at the end.

mod figures;
mod load;
mod sample;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use payment_writer::domain::record::NextOffset;

use crate::daemon::Daemon;
use crate::latency::{Probe, probe_config};
use crate::processes::Guarded;
use crate::reader::Reader;
use crate::report::Lines;
use crate::site::{Servers, Site};
use crate::{Outcome, ServersArguments};
use sample::{Sample, Sampler};

/// Housekeeping every five minutes, and ids that are forgotten after ten.
pub const SETTINGS: &[(&str, &str)] = &[
    ("IDEMPOTENCY__WINDOW", "10m"),
    ("IDEMPOTENCY__PRUNE_SCHEDULE", "*/5 * * * *"),
    ("RETENTION__PAYMENT_MONTHS", "3"),
    ("LOG__LEVEL", "info"),
];
const TICK: Duration = Duration::from_millis(100);
/// Interval between requests of `/status` and `/metrics`, as by a page in a browser.
const LOOK: Duration = Duration::from_secs(5);
/// Requests for each sample.
const LOOKS: u32 = 2;
const WARNINGS_MAX: usize = 40;
const CATCH_UP_LIMIT: Duration = Duration::from_secs(900);
/// `reconcile` and the auditor read everything that was written.
const CHECK_LIMIT: Duration = Duration::from_secs(7_200);

/// `bench soak`
#[derive(Parser)]
pub struct Arguments {
    #[command(flatten)]
    servers: ServersArguments,
    /// Duration of the load
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(3..=10_000))]
    minutes: u64,
    /// Records a second
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(10..))]
    rate: u64,
    /// Further records a second in each burst of 20 s; more than the daemon can write here
    #[arg(long, default_value_t = 50_000)]
    burst: u64,
    /// Gigabytes on disk at which the load ends; the topics are bounded to three fifths
    #[arg(long, default_value_t = 40)]
    disk_gb: u64,
    /// Write the report to this file as Markdown
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// The time since the start, and whether the load is over.
pub struct Clock {
    began: Instant,
    length: Duration,
    is_over: AtomicBool,
    burst_is_on: AtomicBool,
    mishaps: Mutex<Vec<String>>,
}

impl Clock {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire) || self.began.elapsed() >= self.length
    }

    fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Notes an error, for the report; the soak goes on.
    fn note(&self, outcome: Outcome<()>) {
        if let Err(message) = outcome {
            eprintln!("bench: {message}");
            let message = format!("after {} s: {message}", self.began.elapsed().as_secs());
            self.mishaps.lock().unwrap_or_else(PoisonError::into_inner).push(message);
        }
    }

    /// Sleeps for this long, or until the load is over; whether it goes on.
    fn pause(&self, how_long: Duration) -> bool {
        let until = Instant::now() + how_long;
        while Instant::now() < until && !self.is_over() {
            std::thread::sleep(TICK);
        }
        !self.is_over()
    }

    /// Runs `work` first after `first` seconds and then every `period` seconds, or later if it takes longer.
    fn every(&self, first: u64, period: u64, mut work: impl FnMut() -> Outcome<()>) {
        for round in 0.. {
            let due = Duration::from_secs(first + round * period);
            if !self.pause(due.saturating_sub(self.began.elapsed())) {
                break;
            }
            self.note(work());
        }
    }
}

/// `bench soak`
pub fn run(arguments: &Arguments) -> Outcome<()> {
    let mut lines = Lines::new(arguments.servers.json.as_deref())?;
    let servers = Servers::find(&arguments.servers)?;
    let site = Site::create(&servers)?;
    let outcome = soak(arguments, &site, &mut lines);
    lines.finish();
    if outcome.is_err() {
        eprintln!("bench: database and topics {} stay on the servers", site.name);
        std::mem::forget(site);
    }
    outcome
}

fn soak(arguments: &Arguments, site: &Site<'_>, lines: &mut Lines) -> Outcome<()> {
    load::bound_topics(site, arguments.disk_gb)?;
    let kafka = site.settings()?.kafka;
    let mut daemon = Daemon::start(site, 0, SETTINGS)?;
    let reader = Reader::new(&probe_config(&kafka.bootstrap_servers), &kafka.read_topic, NextOffset(0), 1)?;
    let probe = Probe::default();
    probe.begin();
    let clock = Clock {
        began: Instant::now(),
        length: Duration::from_secs(arguments.minutes * 60),
        is_over: AtomicBool::new(false),
        burst_is_on: AtomicBool::new(false),
        mishaps: Mutex::default(),
    };
    let counters = load::Counters::default();
    let limit = clock.length + 2 * CATCH_UP_LIMIT;
    let mut samples = Vec::new();
    let expected = std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let read = reader.read(limit, vec![()], &probe.is_over, |(), record| {
                probe.take(record.value().unwrap_or_default());
            });
            clock.end();
            read
        });
        let loads = load::start(scope, &clock, site, &counters, (arguments.rate, arguments.burst));
        let sampled = take_samples(&clock, site, &mut daemon, &probe, arguments, |sample| {
            lines.add(sample.json())?;
            samples.push(sample);
            Ok(())
        });
        clock.end();
        clock.note(sampled);
        let sent = loads.join();
        probe.is_over.store(true, Ordering::Release);
        clock.note(reading.join().map_err(|_| "the probe's thread panicked".to_owned())?.map(drop));
        sent
    })?;

    let (table, is_steady) = figures::table(&samples, arguments.minutes * 60);
    let mut text = format!(
        "# Soak: {} min at {}/s, bursts of {}/s\n\n{table}\n",
        arguments.minutes, arguments.rate, arguments.burst
    );
    save(arguments, &text)?;
    eprintln!("bench: {} records were sent; waiting for the daemon", expected.records);
    catch_up(&mut daemon)?;
    text.push_str(&warnings(&daemon.said()));
    daemon.stop()?;
    let (checks, is_right) = check(site, expected.written)?;
    text.push_str(&checks);
    let mishaps = clock.mishaps.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !mishaps.is_empty() {
        text.push_str(&format!("\n## Mishaps\n\n- {}\n", mishaps.join("\n- ")));
    }
    save(arguments, &text)?;
    println!("{text}");
    match (is_steady, is_right, mishaps.is_empty()) {
        (true, true, true) => Ok(()),
        (_, false, _) => Err("the check of outcomes failed".to_owned()),
        (false, ..) => Err("something has grown".to_owned()),
        (.., false) => Err("something else failed: the report has it".to_owned()),
    }
}

fn save(arguments: &Arguments, text: &str) -> Outcome<()> {
    let written = arguments.report.as_ref().map(|path| std::fs::write(path, text)).transpose();
    written.map(drop).map_err(|error| format!("writing the report: {error}"))
}

/// Looks at the daemon like a browser, and takes samples, until the load is over or the disk is used up.
fn take_samples(
    clock: &Clock,
    site: &Site<'_>,
    daemon: &mut Daemon,
    probe: &Probe,
    arguments: &Arguments,
    mut keep: impl FnMut(Sample) -> Outcome<()>,
) -> Outcome<()> {
    let mut sampler = Sampler::start(site, &arguments.servers.servers, daemon)?;
    let mut looks = 0;
    while clock.pause(LOOK) {
        looks += 1;
        let looked = daemon.progress().and_then(|progress| Ok((progress, daemon.metrics()?)));
        let taken = looked.and_then(|(progress, metrics)| match looks % LOOKS {
            0 => sampler.take(clock, daemon, probe, progress, &metrics).map(Some),
            _ => Ok(None),
        });
        let sample = match taken {
            Ok(Some(sample)) => sample,
            Ok(None) => continue,
            Err(message) => {
                daemon.check_alive()?;
                clock.note(Err(message));
                continue;
            }
        };
        let disk = sample.get("disk_bytes");
        keep(sample)?;
        if disk > arguments.disk_gb as f64 * 1e9 {
            return Err(format!("{:.1} GB are used: the load ends early", disk / 1e9));
        }
    }
    Ok(())
}

/// Waits until this daemon has all partitions and nothing to read.
fn catch_up(daemon: &mut Daemon) -> Outcome<()> {
    let began = Instant::now();
    let mut calm = 0;
    while calm < 5 {
        if began.elapsed() > CATCH_UP_LIMIT {
            return Err(daemon.complain("the daemon has not caught up"));
        }
        std::thread::sleep(Duration::from_secs(1));
        let metrics = daemon.metrics()?;
        let has_all = metrics.sum("payment_writer_partitions_assigned")
            >= metrics.get("payment_writer_input_partitions").max(1.0);
        let behind = metrics.sum("payment_writer_lag_records");
        calm = if has_all && behind == 0.0 { calm + 1 } else { 0 };
    }
    Ok(())
}

/// The last lines of a log above the level of information, but for those of dead letters, which are part of the load.
fn warnings(log: &str) -> String {
    let is_warning = |line: &&str| matches!(line.split_ascii_whitespace().nth(1), Some("WARN" | "ERROR"));
    let lines: Vec<&str> =
        log.lines().filter(is_warning).filter(|line| !line.contains("dead letter")).collect();
    let last = lines[lines.len().saturating_sub(WARNINGS_MAX)..].join("\n");
    format!("## Warnings and errors of the instance: {}\n\n```text\n{last}\n```\n\n", lines.len())
}

/// Runs `reconcile` and the auditor, and counts the rows; the text says what they found.
fn check(site: &Site<'_>, written: u64) -> Outcome<(String, bool)> {
    eprintln!("bench: reconcile");
    let settings: Vec<(&str, &str)> = [SETTINGS, &[("LOG__LEVEL", "warn")]].concat();
    let mut reconcile = site.start(&["reconcile", "--memory", "2GiB"], &settings)?;
    let is_reconciled = reconcile.wait(CHECK_LIMIT)?.success();

    eprintln!("bench: audit");
    let rows = load::put_back_archived(site)?;
    let settings = site.settings()?;
    let kafka = &settings.kafka;
    let mut command = Command::new(site.servers.program.with_file_name("audit"));
    command.args(["--kafka", &kafka.bootstrap_servers, "--postgres-url", &site.url]);
    command.args(["--input-topic", &kafka.input_topic, "--read-topic", &kafka.read_topic]);
    command.args(["--email-topic", &kafka.email_topic, "--dead-letter-topic", &kafka.dead_letter_topic]);
    // What `produce` sends as stale is older by an hour than the window in `SETTINGS`.
    command.args(["--quiet", "--pruned", "--window-hours", "1"]);
    let mut audit = Guarded::spawn("audit", &mut command, &reconcile.log.with_extension("audit"))?;
    let is_audited = audit.wait(CHECK_LIMIT)?.success();

    let is_counted = rows == written;
    let verdict = |is_right| if is_right { "right" } else { "WRONG" };
    let text = format!(
        "## Outcomes\n\n- payments written: {rows}, as `produce` expects: {written}: {}\n\
         - `reconcile`: {}\n\n```text\n{}\n```\n\n- `audit`: {}\n\n```text\n{}\n```\n",
        verdict(is_counted),
        verdict(is_reconciled),
        reconcile.said().trim_end(),
        verdict(is_audited),
        audit.said().trim_end(),
    );
    Ok((text, is_counted && is_reconciled && is_audited))
}
