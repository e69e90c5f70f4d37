//! Contents of the page, computed from two samples of each daemon. Pure.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::console::samples::quantile;
use crate::console::source::{FetchError, Instance};
use crate::console::status::{PartitionRow, Problem};

const OUTCOMES: [&str; 4] = ["written", "redelivered", "duplicate", "dead_lettered"];
const PHASES: [&str; 4] = ["waiting", "assembling", "database", "kafka"];

/// One daemon.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) url: String,
    /// Version, group and use of resources; empty if the daemon does not answer.
    pub(super) what: String,
    /// What is missing, or why the daemon does not answer; empty if it is ready.
    pub(super) trouble: String,
    /// Dependencies with an open breaker.
    pub(super) breakers: BTreeSet<String>,
}

/// The whole page.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub(super) rows: Vec<Row>,
    /// By outcome: per second, and since the start.
    pub(super) outcomes: Vec<(&'static str, f64, f64)>,
    /// Of database and Kafka: transactions and errors per second.
    pub(super) transactions: Vec<(&'static str, f64, f64)>,
    pub(super) batch_records: f64,
    /// Share of the lanes' time by phase; database and Kafka overlap.
    pub(super) phases: Vec<(&'static str, f64)>,
    /// Upper bounds of the latency from record to event, in seconds: median and 99th percentile.
    pub(super) latency: [Option<f64>; 2],
    /// By partition.
    pub(super) lags: Vec<(i64, PartitionRow)>,
    pub(super) oldest_seconds: f64,
    /// Oldest first.
    pub(super) problems: Vec<Problem>,
}

/// A daemon's address with two samples: the previous one, if any, and the last one.
pub type Looks<'a> = (&'a str, Option<&'a Instance>, &'a Result<Instance, FetchError>);

impl Page {
    /// Computes the page from the answers of the daemons.
    pub fn of<'a>(looks: impl Iterator<Item = Looks<'a>>) -> Self {
        let mut page = Self {
            outcomes: OUTCOMES.map(|name| (name, 0.0, 0.0)).to_vec(),
            transactions: ["database", "kafka"].map(|name| (name, 0.0, 0.0)).to_vec(),
            phases: PHASES.map(|name| (name, 0.0)).to_vec(),
            ..Self::default()
        };
        let mut lanes = 0;
        let (mut batches, mut records) = (0.0, 0.0);
        let (mut buckets_before, mut buckets_after) = (Vec::new(), Vec::new());
        for (url, before, now) in looks {
            let now = match now {
                Ok(now) => now,
                Err(error) => {
                    page.rows.push(Row {
                        url: url.to_owned(),
                        trouble: format!("does not answer: {}", error.reason),
                        ..Row::default()
                    });
                    continue;
                }
            };
            page.rows.push(row(url, now));
            lanes += now.samples.count("payment_writer_database_up");
            let lags = now.status.partitions.iter();
            page.lags.extend(lags.map(|(number, lag)| (number.parse().unwrap_or_default(), lag.clone())));
            let oldest = now.samples.max("payment_writer_oldest_pending_seconds").unwrap_or_default();
            page.oldest_seconds = page.oldest_seconds.max(oldest);
            page.problems.extend(now.status.recent_problems.iter().cloned());
            for (name, _, total) in &mut page.outcomes {
                *total += now.samples.sum("payment_writer_records_total", &[("outcome", name)]);
            }
            let Some(before) = before else { continue };
            let seconds = now.at.saturating_duration_since(before.at).as_secs_f64().max(0.001);
            // The counters of a restarted daemon start at 0 again.
            let rate = |name: &str, labels: &[(&str, &str)]| {
                (now.samples.sum(name, labels) - before.samples.sum(name, labels)).max(0.0) / seconds
            };
            for (name, a_second, _) in &mut page.outcomes {
                *a_second += rate("payment_writer_records_total", &[("outcome", name)]);
            }
            for (name, share) in &mut page.phases {
                *share += rate("payment_writer_phase_seconds_sum", &[("phase", name)]);
            }
            for (name, a_second, errors) in &mut page.transactions {
                let step = format!("payment_writer_{name}_step_seconds_count");
                *a_second += rate(&step, &[("step", "commit")]);
                *errors += rate(&format!("payment_writer_{name}_errors_total"), &[]);
            }
            batches += rate("payment_writer_batch_records_count", &[]);
            records += rate("payment_writer_batch_records_sum", &[]);
            add(&mut buckets_before, before.samples.buckets("payment_writer_end_to_end_seconds"));
            add(&mut buckets_after, now.samples.buckets("payment_writer_end_to_end_seconds"));
        }
        for (_, share) in &mut page.phases {
            *share /= (lanes.max(1)) as f64;
        }
        page.batch_records = if batches > 0.0 { records / batches } else { 0.0 };
        page.latency = [0.5, 0.99].map(|share| quantile(&buckets_before, &buckets_after, share));
        page.lags.sort_by_key(|(partition, _)| *partition);
        page.problems.sort();
        page
    }

    /// The partitions with the most lag, worst first; without those that are caught up.
    pub(super) fn worst(&self, count: usize) -> Vec<&(i64, PartitionRow)> {
        let is_behind = |(_, lag): &&(i64, PartitionRow)| lag.lag_records != Some(0) || lag.state != "live";
        let mut worst: Vec<_> = self.lags.iter().filter(is_behind).collect();
        worst.sort_by_key(|(partition, lag)| {
            let records = lag.lag_records.unwrap_or(i64::MAX);
            (Reverse((lag.state == "halted", records)), *partition)
        });
        worst.truncate(count);
        worst
    }
}

fn row(url: &str, now: &Instance) -> Row {
    let Instance { samples, status, .. } = now;
    let group = samples.by_label("payment_writer_build_info", "group");
    let group = group.first().map_or("", |(group, _)| group.as_str());
    let sum = |name| samples.sum(name, &[]);
    let mib = |bytes: f64| format!("{:.0} MiB", bytes / f64::from(1 << 20));
    let missing: Vec<String> =
        status.missing.iter().map(|(name, why)| format!("{name} is missing: {why}")).collect();
    let breakers = samples.by_label("payment_writer_breaker_open", "dependency").into_iter();
    Row {
        url: url.to_owned(),
        what: format!(
            "{} group {group}  partitions {}  memory {} of {}  fds {:.0}  threads {:.0}",
            status.build.version,
            status.partitions.len(),
            mib(sum("process_resident_memory_bytes")),
            mib(sum("payment_writer_memory_limit_bytes")),
            sum("process_open_fds"),
            sum("process_threads")
        ),
        trouble: missing.join("; "),
        breakers: breakers.filter(|(_, open)| *open > 0.0).map(|(dependency, _)| dependency).collect(),
    }
}

/// Adds counts of histograms with the same bounds.
fn add(sums: &mut Vec<(f64, f64)>, buckets: Vec<(f64, f64)>) {
    if sums.is_empty() {
        *sums = buckets;
        return;
    }
    for (bound, count) in buckets {
        if let Some((_, sum)) = sums.iter_mut().find(|(b, _)| *b == bound) {
            *sum += count;
        }
    }
}
