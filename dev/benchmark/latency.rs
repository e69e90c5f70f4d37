//! Latency as a consumer of the read topic measures it: from the input record's timestamp, which is the
//! event's `createdAt`, until a `read_committed` consumer has received the event.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use payment_writer::domain::record::NextOffset;
use rdkafka::ClientConfig;
use serde_json::json;

use crate::daemon::Daemon;
use crate::processes::{Meter, own_cpu_seconds, reaped_cpu_seconds};
use crate::reader::Reader;
use crate::report::{self, Lines};
use crate::row;
use crate::site::{Amount, Input, Servers, Site};
use crate::stats::Histogram;
use crate::{BaselineArguments, Outcome, ServersArguments};

/// Time limit for events after the last record was sent: a daemon that is behind catches up in this time, or
/// is reported as not having kept up.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(120);
const FETCH_LIMIT: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(20);
/// At a thousand records a second, the broker would take hours to reach the same state of JIT compilation.
const WARM_UP_RATE: u64 = 20_000;
/// Warm-up before each further daemon, in seconds: the broker's code is compiled by then.
const WARM_UP_AGAIN: u64 = 10;

/// `bench latency`
#[derive(Parser)]
pub struct Arguments {
    #[command(flatten)]
    servers: ServersArguments,
    #[command(flatten)]
    baseline: BaselineArguments,
    /// How often each rate is measured
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    repeat: u64,
    /// Records a second
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1_000, 10_000, 50_000], value_parser = clap::value_parser!(u64).range(2..))]
    rates: Vec<u64>,
    /// Seconds at each rate
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Seconds of warm-up at 20,000 a second, not measured: a broker that has just started compiles its code
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    warm_up: u64,
    /// Version of the message ids
    #[arg(long, default_value = "v7", value_parser = ["v4", "v7"])]
    ids: String,
    /// How the input is written; with `mixed`, a transaction has the records of 20 ms, 500 at most
    #[arg(long, value_enum, default_value = "mixed")]
    input: Input,
}

/// Parses the time format of events, `2026-01-02T03:04:05.678Z`, from 1970 on; milliseconds since 1970.
fn parse_time(text: &[u8]) -> Option<i64> {
    let digits = |range: std::ops::Range<usize>| {
        text.get(range)?.iter().try_fold(0, |number: i64, byte| {
            byte.is_ascii_digit().then(|| number * 10 + i64::from(byte - b'0'))
        })
    };
    let (year, month, day) = (digits(0..4)?, digits(5..7)?, digits(8..10)?);
    let (hours, minutes, seconds, ms) = (digits(11..13)?, digits(14..16)?, digits(17..19)?, digits(20..23)?);
    let is_laid_out = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':'), (19, b'.'), (23, b'Z')]
        .iter()
        .all(|(at, byte)| text.get(*at) == Some(byte));
    if !is_laid_out || !(1..=12).contains(&month) {
        return None;
    }
    // Days of the proleptic Gregorian calendar, with years that start in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    Some((((days * 24 + hours) * 60 + minutes) * 60 + seconds) * 1_000 + ms)
}

/// The record's timestamp in a read event, without parsing the rest.
fn created_at(event: &[u8]) -> Option<i64> {
    const NAME: &[u8] = b"\"createdAt\":\"";
    // Only two ids come before it, and they cannot contain this text.
    let at = event.windows(NAME.len()).position(|window| window == NAME)?;
    parse_time(event.get(at + NAME.len()..)?.get(..24)?)
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// State shared between the probe's thread and the others.
#[derive(Default)]
pub struct Probe {
    /// Events of records from this time on count.
    since: AtomicI64,
    seen: AtomicU64,
    pub is_over: AtomicBool,
    odd: AtomicU64,
    histogram: Mutex<Option<Histogram>>,
}

impl Probe {
    pub fn take(&self, event: &[u8]) {
        let Some(created) = created_at(event) else {
            self.odd.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if created < self.since.load(Ordering::Acquire) {
            return;
        }
        let mut histogram = self.histogram.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(histogram) = histogram.as_mut() {
            histogram.add(now_ms() - created);
        }
        self.seen.fetch_add(1, Ordering::Release);
    }

    /// Resets the counts; only records sent from now on are measured.
    pub fn begin(&self) {
        let mut histogram = self.histogram.lock().unwrap_or_else(PoisonError::into_inner);
        *histogram = Some(Histogram::new());
        self.since.store(now_ms(), Ordering::Release);
        self.seen.store(0, Ordering::Release);
    }

    /// What was counted since the last call; counting goes on.
    pub fn taken(&self) -> Histogram {
        let mut histogram = self.histogram.lock().unwrap_or_else(PoisonError::into_inner);
        histogram.replace(Histogram::new()).unwrap_or_else(Histogram::new)
    }

    fn finish(&self) -> Histogram {
        let mut histogram = self.histogram.lock().unwrap_or_else(PoisonError::into_inner);
        histogram.take().unwrap_or_else(Histogram::new)
    }
}

/// A consumer of the events with settings for low latency.
pub fn probe_config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", "10")
        .set("fetch.queue.backoff.ms", "20");
    config
}

/// The result for one rate.
struct Rate {
    input: Input,
    is_baseline: bool,
    wanted: u64,
    sent: u64,
    sent_per_second: f64,
    latencies: Histogram,
    /// Seconds from the last record until its event was received; `None` if it was not received in time.
    behind: Option<f64>,
    /// CPU use in cores: daemon, broker, Postgres, probe, load generator.
    cores: [f64; 5],
    others: f64,
}

const SHARES: [(&str, f64); 5] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
const WHO: [&str; 5] = ["daemon", "broker", "postgres", "probe", "load"];

fn measure(
    site: &Site<'_>,
    daemon: &mut Daemon,
    probe: &Probe,
    (ids, input): (&str, Input),
    wanted: u64,
    seconds: u64,
) -> Outcome<Rate> {
    let pids = [daemon.id()];
    let meter = Meter::start(vec![&pids, &site.servers.broker, &site.servers.postgres]);
    let (own, reaped, began) = (own_cpu_seconds(), reaped_cpu_seconds(), Instant::now());
    probe.begin();
    let amount = Amount::Rate { per_second: wanted, seconds };
    let sending = site.write(input, &["--ids", ids], amount, rand::random::<u32>().into())?;
    let sent = sending.finish(Duration::from_secs(seconds) + CATCH_UP_LIMIT)?;
    let took = began.elapsed().as_secs_f64();
    let used = meter.read();
    let (probe_used, load_used) = (own_cpu_seconds() - own, reaped_cpu_seconds() - reaped);
    let others = meter.share_of_others(used.iter().sum::<f64>() + probe_used + load_used);
    let ended = Instant::now();
    let behind = loop {
        if probe.seen.load(Ordering::Acquire) >= sent.records {
            break Some(ended.elapsed().as_secs_f64());
        }
        if ended.elapsed() > CATCH_UP_LIMIT {
            break None;
        }
        if probe.is_over.load(Ordering::Acquire) {
            return Err("the probe has ended".to_owned());
        }
        daemon.check_alive()?;
        std::thread::sleep(TICK);
    };
    let cores = [used[0], used[1], used[2], probe_used, load_used].map(|seconds| seconds / took);
    let latencies = probe.finish();
    let (sent, sent_per_second) = (sent.records, sent.records_per_second);
    let is_baseline = site.is_baseline();
    Ok(Rate { input, is_baseline, wanted, sent, sent_per_second, latencies, behind, cores, others })
}

/// `bench latency`
pub fn run(arguments: &Arguments) -> Outcome<()> {
    let mut lines = Lines::new(arguments.servers.json.as_deref())?;
    let servers = Servers::find(&arguments.servers)?;
    let mut programs = vec![servers.program.as_path()];
    programs.extend(arguments.baseline.baseline.as_deref());
    let mut measured = Vec::new();
    let mut warm_up = arguments.warm_up;
    for round in 1..=arguments.repeat {
        for program in &programs {
            eprintln!("bench: run {round} of {}", program.display());
            measured.extend(measure_rates(&servers, program, arguments, warm_up, &mut lines)?);
            warm_up = arguments.warm_up.min(WARM_UP_AGAIN);
        }
        // Every second round runs backwards: a steady drift affects both alike.
        programs.reverse();
    }
    measured.sort_by_key(|rate| (rate.wanted, rate.is_baseline));
    print(&measured);
    lines.finish();
    Ok(())
}

/// All rates, one after the other, with a daemon of this build.
fn measure_rates(
    servers: &Servers,
    program: &Path,
    arguments: &Arguments,
    warm_up: u64,
    lines: &mut Lines,
) -> Outcome<Vec<Rate>> {
    let site = Site::create_for(servers, program)?;
    let mut daemon = Daemon::start(&site, 0, &[])?;
    let kafka = site.settings()?.kafka;
    let reader = Reader::new(&probe_config(&kafka.bootstrap_servers), &kafka.read_topic, NextOffset(0), 1)?;
    let began = Instant::now();
    while !daemon.progress()?.is_fetching {
        if began.elapsed() > FETCH_LIMIT {
            return Err(daemon.complain("the daemon does not start fetching"));
        }
        std::thread::sleep(TICK);
    }
    // The maximum for all rates, each with its time to catch up.
    let rates = arguments.rates.len() as u64 + 1;
    let limit = Duration::from_secs(rates * (arguments.seconds + 10) + warm_up)
        + 2 * CATCH_UP_LIMIT * u32::try_from(rates).unwrap_or(u32::MAX);
    let probe = Probe::default();
    let measured = std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let outcome = reader.read(limit, vec![()], &probe.is_over, |(), record| {
                probe.take(record.value().unwrap_or_default());
            });
            probe.is_over.store(true, Ordering::Release);
            outcome
        });
        let measured = (|| {
            eprintln!("bench: warming up for {} s", warm_up);
            // A broker that has just started cannot keep up with transactions every 20 ms.
            measure(&site, &mut daemon, &probe, (&arguments.ids, Input::Plain), WARM_UP_RATE, warm_up)?;
            let mut measured = Vec::new();
            for wanted in &arguments.rates {
                eprintln!("bench: {wanted}/s for {} s", arguments.seconds);
                let how = (arguments.ids.as_str(), arguments.input);
                let rate = measure(&site, &mut daemon, &probe, how, *wanted, arguments.seconds)?;
                lines.add(json_line(&rate))?;
                let is_caught_up = rate.behind.is_some();
                measured.push(rate);
                if !is_caught_up {
                    // The next rate would wait behind the remaining records.
                    eprintln!(
                        "bench: the daemon cannot keep up with {wanted}/s here: higher rates are skipped"
                    );
                    break;
                }
            }
            Ok(measured)
        })();
        probe.is_over.store(true, Ordering::Release);
        // The probe's error is more useful than the fact that it ended.
        let read = reading.join().map_err(|_| "the probe's thread panicked".to_owned())?;
        read.and(measured)
    })?;
    daemon.stop()?;
    let odd = probe.odd.load(Ordering::Relaxed);
    if odd > 0 {
        return Err(format!("{odd} read events have no valid time"));
    }
    Ok(measured)
}

fn ms(rate: &Rate, share: f64) -> Option<u64> {
    rate.latencies.at(share)
}

fn json_line(rate: &Rate) -> serde_json::Value {
    let latency: serde_json::Map<_, _> =
        SHARES.iter().map(|(name, share)| ((*name).to_owned(), json!(ms(rate, *share)))).collect();
    let cpu: serde_json::Map<_, _> = WHO
        .iter()
        .zip(rate.cores)
        .map(|(name, share)| ((*name).to_owned(), json!((share * 1_000.0).round() / 10.0)))
        .collect();
    json!({
        "benchmark": "latency", "is_baseline": rate.is_baseline, "input": format!("{:?}", rate.input).to_lowercase(), "rate": rate.wanted, "sent_per_s": rate.sent_per_second.round(), "sent": rate.sent,
        "events": rate.latencies.total(), "latency_ms": latency,
        "caught_up_after_s": rate.behind.map(|seconds| (seconds * 1_000.0).round() / 1_000.0),
        "cpu_percent_of_one_core": cpu, "cpu_share_of_others": (rate.others * 1_000.0).round() / 1_000.0,
    })
}

fn print(rates: &[Rate]) {
    let whose = |rate: &Rate| if rate.is_baseline { "baseline" } else { "" };
    let mut rows = vec![row!["rate", "of", "sent/s", "events"]];
    rows[0].extend(SHARES.iter().map(|(name, _)| format!("{name} ms")));
    rows[0].push("caught up after".to_owned());
    for rate in rates {
        let mut row =
            row![rate.wanted, whose(rate), format!("{:.0}", rate.sent_per_second), rate.latencies.total()];
        row.extend(
            SHARES.iter().map(|(_, share)| ms(rate, *share).map_or("-".to_owned(), |ms| ms.to_string())),
        );
        row.push(rate.behind.map_or("never".to_owned(), |seconds| format!("{seconds:.1} s")));
        rows.push(row);
    }
    report::print("From the record's timestamp to the visible read event", &rows);
    let mut rows = vec![row!["rate", "of"]];
    rows[0].extend(WHO.iter().map(|who| format!("{who} %")));
    rows[0].push("others %".to_owned());
    for rate in rates {
        let mut row = row![rate.wanted, whose(rate)];
        row.extend(rate.cores.iter().map(|share| format!("{:.1}", share * 100.0)));
        row.push(format!("{:.1}", rate.others * 100.0));
        rows.push(row);
    }
    report::print("CPU in percent of one core; others: of the whole machine", &rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iso8601(ms: i64) -> String {
        format!("{:.3}", jiff::Timestamp::from_millisecond(ms).unwrap())
    }

    #[test]
    fn times_are_read_as_the_daemon_writes_them() {
        // Leap days, the ends of years and of February, and days in between.
        let mut times = vec![0, 951_782_400_000, 951_868_799_999, 1_767_225_599_999, 1_767_225_600_000];
        times.extend((0..2_000).map(|n| n * 1_234_567_891));
        for ms in times {
            let text = iso8601(ms);
            assert_eq!(parse_time(text.as_bytes()), Some(ms), "{text}");
        }
    }

    #[test]
    fn other_texts_are_no_times() {
        for text in ["", "2026-01-02T03:04:05.678", "2026-01-02 03:04:05.678Z", "2026-13-02T03:04:05.678Z"] {
            assert_eq!(parse_time(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_time_is_found_in_an_event() {
        let event = br#"{"messageId":"x","id":"y","createdAt":"1970-01-01T00:00:01.500Z","updatedAt":"?"}"#;
        assert_eq!(created_at(event), Some(1_500));
        assert_eq!(created_at(b"{}"), None);
    }

    #[test]
    fn a_probe_counts_what_came_after_it_began() {
        let probe = Probe::default();
        probe.begin();
        probe.take(br#"{"createdAt":"1970-01-01T00:00:01.500Z"}"#);
        assert_eq!(probe.seen.load(Ordering::Acquire), 0);
        probe.take(format!("{{\"createdAt\":\"{}\"", iso8601(now_ms() + 1)).as_bytes());
        probe.take(b"nonsense");
        assert_eq!((probe.seen.load(Ordering::Acquire), probe.odd.load(Ordering::Relaxed)), (1, 1));
        assert_eq!(probe.finish().total(), 1);
    }
}
