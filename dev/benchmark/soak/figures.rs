//! Compares the first steady minutes with the last ones.

use super::sample::Sample;
use crate::row;
use crate::stats::Spread;

/// Length of the periods that are compared, unless the soak is shorter than three of them.
const PERIOD_SECONDS: u64 = 1_200;

/// How the samples of a period become one figure.
#[derive(Clone, Copy)]
enum Of {
    Median,
    Mean,
    Max,
}

struct Figure {
    name: &'static str,
    title: &'static str,
    of: Of,
    /// Multiplied with the value.
    scale: f64,
    /// The last figure may be the first by this factor and this much more.
    limit: Option<(f64, f64)>,
}

const fn figure(
    name: &'static str,
    title: &'static str,
    of: Of,
    scale: f64,
    limit: Option<(f64, f64)>,
) -> Figure {
    Figure { name, title, of, scale, limit }
}

const MB: f64 = 1e-6;

const FIGURES: [Figure; 30] = [
    figure("rss_bytes", "daemon: resident memory, MB", Of::Median, MB, Some((1.25, 32.0))),
    figure("rss_bytes", "the same, highest", Of::Max, MB, Some((1.5, 64.0))),
    figure("pss_bytes", "proportional memory, MB", Of::Median, MB, Some((1.25, 32.0))),
    figure("fds", "open file descriptors, highest", Of::Max, 1.0, Some((1.25, 10.0))),
    figure("threads", "threads, highest", Of::Max, 1.0, Some((1.25, 4.0))),
    figure("log_info", "log lines a minute: info", Of::Mean, 1.0, Some((2.0, 10.0))),
    figure("log_warn", "warn", Of::Mean, 1.0, Some((2.0, 5.0))),
    figure("log_error", "error", Of::Mean, 1.0, Some((2.0, 1.0))),
    figure("settled_per_s", "records a second by this instance", Of::Mean, 1.0, None),
    figure("cpu_ms_per_1000", "its CPU ms for 1,000 records", Of::Median, 1.0, None),
    figure("p50_ms", "record to read event, ms: p50", Of::Median, 1.0, None),
    figure("p99_ms", "p99 of ten seconds, median", Of::Median, 1.0, None),
    figure("p99_ms", "p99 of ten seconds, highest", Of::Max, 1.0, None),
    figure("lag_records", "lag, records", Of::Median, 1.0, None),
    figure("rebalances", "rebalance callbacks so far", Of::Max, 1.0, None),
    figure("resets", "lane resets so far", Of::Max, 1.0, None),
    figure("unaccounted", "records that its audit misses", Of::Max, 1.0, Some((1.0, 0.0))),
    figure("dead_cursor", "dead rows, highest: source_cursor", Of::Max, 1.0, Some((3.0, 10_000.0))),
    figure("dead_others", "the schema's other tables", Of::Max, 1.0, Some((3.0, 10_000.0))),
    figure("dead_catalog", "the catalog", Of::Max, 1.0, Some((3.0, 5_000.0))),
    figure("bytes_cursor", "highest size, MB: source_cursor", Of::Max, MB, Some((3.0, 32.0))),
    figure("bytes_catalog", "the catalog", Of::Max, MB, Some((2.0, 32.0))),
    figure("bytes_idempotency", "idempotency, all generations", Of::Max, MB, Some((3.0, 256.0))),
    figure("generations", "generations, most", Of::Max, 1.0, Some((1.0, 2.0))),
    figure("rotations", "rotations by this instance so far", Of::Max, 1.0, None),
    figure("tables", "tables of the schema", Of::Max, 1.0, None),
    figure("bytes_wal", "pg_wal, MB", Of::Max, MB, None),
    figure("disk_bytes", "everything on disk, MB", Of::Max, MB, None),
    figure("cpu_broker", "broker: CPU, % of a core", Of::Median, 1.0, None),
    figure("cpu_postgres", "Postgres: CPU, % of a core", Of::Median, 1.0, None),
];

fn summarised(of: Of, values: &[f64]) -> Option<f64> {
    let spread = Spread::of(values.iter().copied())?;
    Some(match of {
        Of::Median => spread.median,
        Of::Max => spread.max,
        Of::Mean => values.iter().sum::<f64>() / values.len() as f64,
    })
}

/// Slope of the line with the least squared distance from the points.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    let together: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    if spread > 0.0 { together / spread } else { 0.0 }
}

fn shown(value: f64) -> String {
    format!("{value:.*}", if value.abs() < 100.0 { 1 } else { 0 })
}

/// A Markdown table of all figures, and whether each is within its limit. Only samples outside of bursts count, from
/// the end of the first burst on: memory that a first burst needed stays for a while.
pub fn table(samples: &[Sample], seconds: u64) -> (String, bool) {
    let burst = samples.iter().position(|sample| !sample.is_steady).unwrap_or_default();
    let steady: Vec<&Sample> = samples.iter().skip(burst).filter(|sample| sample.is_steady).collect();
    let (Some(begin), Some(end)) = (steady.first(), steady.last()) else {
        return ("no steady samples\n".to_owned(), false);
    };
    let period = PERIOD_SECONDS.min(seconds / 3);
    let early: Vec<&&Sample> = steady.iter().filter(|s| s.second <= begin.second + period).collect();
    let late: Vec<&&Sample> = steady.iter().filter(|s| s.second + period >= end.second).collect();
    let minutes = format!("{:.0} min", period as f64 / 60.0);
    let mut rows = vec![
        row!["figure", format!("first {minutes}"), format!("last {minutes}"), "an hour", "limit", "verdict"],
        row!["-", "-:", "-:", "-:", "-:", "-"],
    ];
    let mut is_steady = true;
    for Figure { name, title, of, scale, limit } in FIGURES {
        let values = |samples: &[&&Sample]| -> Vec<f64> {
            samples.iter().map(|sample| sample.get(name) * scale).collect()
        };
        let (Some(first), Some(last)) = (summarised(of, &values(&early)), summarised(of, &values(&late)))
        else {
            continue;
        };
        let points: Vec<(f64, f64)> =
            steady.iter().map(|s| (s.second as f64 / 3_600.0, s.get(name) * scale)).collect();
        let limit = limit.map(|(factor, more)| first * factor + more);
        let is_within = limit.is_none_or(|limit| last <= limit);
        is_steady &= is_within;
        let verdict = match limit {
            None => "",
            Some(_) if is_within => "right",
            Some(_) => "GROWN",
        };
        rows.push(row![
            title,
            shown(first),
            shown(last),
            format!("{}{}", if slope(&points) < 0.0 { "" } else { "+" }, shown(slope(&points))),
            limit.map_or(String::new(), shown),
            verdict
        ]);
    }
    let text = rows.iter().map(|row| format!("| {} |\n", row.join(" | "))).collect();
    (text, is_steady)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(late: f64) -> (String, bool) {
        let at =
            |second: u64| Sample::of(second, second != 60, "fds", if second < 200 { 40.0 } else { late });
        table(&(0..30).map(|n| at(n * 10)).collect::<Vec<_>>(), 300)
    }

    #[test]
    fn what_has_grown_beyond_its_limit_is_told() {
        let (text, is_steady) = verdict(40.0);
        assert!(
            is_steady
                && text.contains("| open file descriptors, highest | 40.0 | 40.0 | +0.0 | 60.0 | right |")
        );
        let (text, is_steady) = verdict(61.0);
        assert!(!is_steady && text.contains("| 40.0 | 61.0 |") && text.contains("| 60.0 | GROWN |"));
    }

    #[test]
    fn a_slope_is_that_of_the_line_between_the_points() {
        assert_eq!(slope(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]), 2.0);
        assert_eq!(slope(&[(1.0, 7.0)]), 0.0);
    }
}
