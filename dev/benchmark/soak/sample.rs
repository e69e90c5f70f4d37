//! What the daemon and its servers use, every ten seconds.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_postgres::Client;

use super::Clock;
use crate::Outcome;
use crate::daemon::{Daemon, Metrics, Progress};
use crate::latency::Probe;
use crate::processes::{cpu_seconds, memory};
use crate::site::{Site, failed};
use crate::stats::Histogram;

/// After a burst, until the daemon has caught up; at least this long.
const AFTER_BURST: Duration = Duration::from_secs(30);
/// Half of the events arrive within this time unless the daemon is behind.
const CAUGHT_UP_MS: f64 = 2_000.0;

const TABLES: &str = "
    SELECT
        coalesce(sum(n_dead_tup) FILTER (WHERE relname = 'source_cursor'), 0)::float8 AS dead_cursor,
        coalesce(sum(n_dead_tup) FILTER (WHERE is_own AND relname <> 'source_cursor'), 0)::float8 AS dead_others,
        coalesce(sum(n_dead_tup) FILTER (WHERE is_catalog), 0)::float8 AS dead_catalog,
        coalesce(sum(bytes) FILTER (WHERE relname = 'source_cursor'), 0)::float8 AS bytes_cursor,
        coalesce(sum(bytes) FILTER (WHERE relname LIKE 'idempotency%'), 0)::float8 AS bytes_idempotency,
        coalesce(sum(bytes) FILTER (WHERE is_catalog), 0)::float8 AS bytes_catalog,
        count(*) FILTER (WHERE is_own)::float8 AS tables,
        (SELECT sum(size) FROM pg_ls_waldir())::float8 AS bytes_wal
    FROM (
        SELECT relname, n_dead_tup, schemaname = 'payment_writer' AS is_own, schemaname = 'pg_catalog' AS is_catalog,
            CASE WHEN relname NOT LIKE '%payment\\_%' THEN pg_total_relation_size(relid) END AS bytes
        FROM pg_stat_all_tables
    ) AS t";

/// Values by name.
#[derive(Default)]
pub struct Sample {
    pub second: u64,
    /// Outside of bursts and of catching up after one.
    pub is_steady: bool,
    values: BTreeMap<String, f64>,
}

impl Sample {
    /// 0 if it was not measured.
    pub fn get(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or_default()
    }

    #[cfg(test)]
    pub fn of(second: u64, is_steady: bool, name: &str, value: f64) -> Self {
        Self { second, is_steady, values: BTreeMap::from([(name.to_owned(), value)]) }
    }

    fn set(&mut self, name: &str, value: f64) {
        self.values.insert(name.to_owned(), value);
    }

    pub fn json(&self) -> Value {
        let rounded = |value: &f64| (value * 1_000.0).round() / 1_000.0;
        let values: BTreeMap<_, _> = self.values.iter().map(|(name, value)| (name, rounded(value))).collect();
        json!({"benchmark": "soak", "second": self.second, "is_steady": self.is_steady, "values": values})
    }
}

/// Counters as they were at the last sample.
struct Counted {
    at: Instant,
    settled: u64,
    daemon: f64,
    servers: [f64; 2],
}

pub struct Sampler<'a> {
    site: &'a Site<'a>,
    folder: PathBuf,
    before: Counted,
    /// Bytes of the daemon's log that were counted.
    log_read: usize,
    burst_seen: Option<Instant>,
}

impl<'a> Sampler<'a> {
    pub fn start(site: &'a Site<'a>, folder: &std::path::Path, daemon: &mut Daemon) -> Outcome<Self> {
        let progress = daemon.progress()?;
        let before = Self::count(site, daemon, progress);
        // The data may be elsewhere.
        let folder = folder.join("data").canonicalize().map_err(failed("resolving the servers' folder"))?;
        Ok(Self { site, folder, before, log_read: 0, burst_seen: None })
    }

    fn count(site: &Site<'_>, daemon: &Daemon, progress: Progress) -> Counted {
        Counted {
            at: Instant::now(),
            settled: progress.settled(),
            daemon: cpu_seconds(&[daemon.id()]),
            servers: [&site.servers.broker, &site.servers.postgres].map(|pids| cpu_seconds(pids)),
        }
    }

    pub fn take(
        &mut self,
        clock: &Clock,
        daemon: &Daemon,
        probe: &Probe,
        progress: Progress,
        metrics: &Metrics,
    ) -> Outcome<Sample> {
        let mut sample = Sample { second: clock.began.elapsed().as_secs(), ..Sample::default() };
        let now = Self::count(self.site, daemon, progress);
        let seconds = now.at.duration_since(self.before.at).as_secs_f64();
        self.take_process(&mut sample, daemon);
        self.take_rates(&mut sample, &now, seconds);
        self.take_log(&mut sample, daemon, seconds);
        take_latency(&mut sample, &probe.taken());
        for (name, metric) in [
            ("lag_records", "payment_writer_lag_records"),
            ("generations", "payment_writer_generations_live"),
            ("rotations", "payment_writer_generation_rotations_total"),
            ("dropped", "payment_writer_generations_dropped_total"),
            ("rebalances", "payment_writer_rebalances_total"),
            ("resets", "payment_writer_lane_resets_total"),
            ("unaccounted", "payment_writer_audit_records_total{result=\"unaccounted\"}"),
        ] {
            sample.set(name, metrics.sum(metric));
        }
        let admin = self.site.servers.admin_url(&self.site.name)?;
        self.site.servers.connected(&admin, async |client| take_tables(&mut sample, client).await)?;
        sample.set("disk_bytes", disk_bytes(&self.folder)?);
        if clock.burst_is_on.load(std::sync::atomic::Ordering::Acquire) {
            self.burst_seen = Some(Instant::now());
        }
        let is_behind = sample.get("p50_ms") > CAUGHT_UP_MS || sample.get("events") == 0.0;
        if self.burst_seen.is_some_and(|seen| seen.elapsed() > AFTER_BURST) && !is_behind {
            self.burst_seen = None;
        }
        sample.is_steady = self.burst_seen.is_none();
        self.before = now;
        Ok(sample)
    }

    fn take_process(&self, sample: &mut Sample, daemon: &Daemon) {
        let files =
            |what| std::fs::read_dir(format!("/proc/{}/{what}", daemon.id())).map_or(0, Iterator::count);
        sample.set("fds", files("fd") as f64);
        sample.set("threads", files("task") as f64);
        for (name, file, field) in [("rss_bytes", "status", "VmRSS"), ("pss_bytes", "smaps_rollup", "Pss")] {
            sample.set(name, memory(daemon.id(), file, field).unwrap_or_default() as f64);
        }
    }

    fn take_rates(&self, sample: &mut Sample, now: &Counted, seconds: f64) {
        let settled = (now.settled - self.before.settled) as f64;
        let cpu = now.daemon - self.before.daemon;
        sample.set("settled_per_s", settled / seconds);
        if settled > 0.0 {
            sample.set("cpu_ms_per_1000", cpu * 1e6 / settled);
        }
        for (name, (now, before)) in
            ["cpu_broker", "cpu_postgres"].iter().zip(now.servers.iter().zip(&self.before.servers))
        {
            sample.set(name, (now - before) / seconds * 100.0);
        }
    }

    fn take_log(&mut self, sample: &mut Sample, daemon: &Daemon, seconds: f64) {
        let text = daemon.said();
        let new = text.get(self.log_read..).unwrap_or_default();
        self.log_read = text.len();
        for (name, level) in [("log_info", "INFO"), ("log_warn", "WARN"), ("log_error", "ERROR")] {
            let lines =
                new.lines().filter(|line| line.split_ascii_whitespace().nth(1) == Some(level)).count();
            sample.set(name, lines as f64 * 60.0 / seconds);
        }
    }
}

fn take_latency(sample: &mut Sample, latencies: &Histogram) {
    sample.set("events", latencies.total() as f64);
    for (name, share) in [("p50_ms", 0.5), ("p99_ms", 0.99), ("max_ms", 1.0)] {
        if let Some(ms) = latencies.at(share) {
            sample.set(name, ms as f64);
        }
    }
}

async fn take_tables(sample: &mut Sample, client: &Client) -> Outcome<()> {
    let row = client.query_one(TABLES, &[]).await.map_err(failed("reading statistics of tables"))?;
    for (at, column) in row.columns().iter().enumerate() {
        sample.set(column.name(), row.get(at));
    }
    Ok(())
}

/// Bytes that a folder takes on disk: files have holes.
fn disk_bytes(folder: &std::path::Path) -> Outcome<f64> {
    // It fails when a file is removed meanwhile, and prints the sum nevertheless.
    let said = Command::new("du").args(["-s", "-B1"]).arg(folder).output().map_err(failed("du"))?;
    let text = String::from_utf8_lossy(&said.stdout);
    let bytes = text.split_ascii_whitespace().next().and_then(|bytes| bytes.parse().ok());
    bytes.ok_or_else(|| "du printed no size".to_owned())
}
