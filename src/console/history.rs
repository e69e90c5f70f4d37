//! The last 15 minutes, a point a second, for whoever looks after the event. Of fixed size.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::domain::batch::OutcomeCounts;
use crate::domain::record::TimestampMs;
use crate::kafka::group::lane_of;
use crate::kafka::throttle;
use crate::telemetry::metrics::now;
use crate::telemetry::status::StatusRegistry;
use crate::telemetry::work::{LanePhase, WorkSums};

/// Distance of two points.
pub const INTERVAL: Duration = Duration::from_secs(1);
const POINTS_MAX: usize = 900;

/// The points, the oldest first, and since when something is missing.
#[derive(Default)]
pub struct History {
    points: Mutex<VecDeque<Point>>,
    missing_since: Mutex<BTreeMap<&'static str, TimestampMs>>,
}

/// Sums over the last points.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Recent {
    /// Seconds that the points cover.
    pub seconds: f64,
    /// Records by outcome.
    pub outcomes: OutcomeCounts,
    /// Lag in records before the first of the points; `None` if there is no earlier point, or if the partitions whose lag
    /// is known are others now.
    pub lag_before: Option<i64>,
    /// Milliseconds by which brokers throttled the clients.
    pub throttled_ms: u64,
    /// Mean share of the lanes' time in the database.
    pub database: f64,
    /// Whether something was missing in one of them.
    pub was_unready: bool,
}

impl Recent {
    /// Records by second.
    pub fn per_second(&self, records: u64) -> f64 {
        if self.seconds > 0.0 { records as f64 / self.seconds } else { 0.0 }
    }
}

/// One second.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Point {
    at: TimestampMs,
    /// Records by outcome.
    outcomes: OutcomeCounts,
    /// Seconds from a record's timestamp to the commit of its events; `None` without records.
    latency: Option<[f32; 2]>,
    lag_records: u32,
    /// Age of the oldest record that is not written and published.
    oldest_seconds: f32,
    is_ready: bool,
    /// Cores used.
    cpu: f32,
    resident_bytes: u64,
    /// Share of the time of the lanes with partitions, by phase; those of database and Kafka overlap. A phase counts when
    /// it ends, and may have lasted for longer than the second.
    phases: [f32; LanePhase::ALL.len()],
    /// How long brokers throttled the clients, summed over their answers.
    throttled_ms: u32,
    /// Partitions whose lag is known.
    partitions: u16,
    /// What the point covers.
    seconds: f32,
}

/// Points as columns, the oldest first.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct Columns {
    /// End of the second, in milliseconds since 1970.
    at_ms: Vec<i64>,
    /// Records written.
    written: Vec<u64>,
    /// Records that repeat a written one.
    duplicates: Vec<u64>,
    /// Records sent to the dead letters.
    dead_letters: Vec<u64>,
    /// Records that were written before, and were read again.
    redelivered: Vec<u64>,
    /// Median in seconds, to a fifth; null without records.
    latency_p50_seconds: Vec<Option<f32>>,
    /// 99th percentile in seconds, to a fifth; null without records.
    latency_p99_seconds: Vec<Option<f32>>,
    /// Records not yet written and published.
    lag_records: Vec<u32>,
    /// Age of the oldest of them.
    oldest_pending_seconds: Vec<f32>,
    /// As `/readyz`.
    ready: Vec<bool>,
    /// Cores used.
    cpu_cores: Vec<f32>,
    /// Resident memory.
    resident_bytes: Vec<u64>,
    /// Share of the time of the lanes with partitions, by phase.
    waiting: Vec<f32>,
    assembling: Vec<f32>,
    database: Vec<f32>,
    kafka: Vec<f32>,
    /// How long brokers throttled the clients by quotas, summed over their answers.
    throttled_ms: Vec<u32>,
}

/// Totals at one time.
struct Totals {
    at: Instant,
    outcomes: OutcomeCounts,
    work: WorkSums,
    cpu: Duration,
    throttled_ms: u64,
}

impl Totals {
    fn now(status: &StatusRegistry) -> Self {
        Self {
            at: Instant::now(),
            outcomes: status.totals(),
            work: status.work().sums(),
            cpu: Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default(),
            throttled_ms: throttle::total_ms(),
        }
    }
}

impl History {
    /// Adds a point each second, until the process ends. `lanes` is their number.
    pub async fn run(&self, status: &StatusRegistry, lanes: usize) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut before = Totals::now(status);
        loop {
            tick.tick().await;
            // The first tick is at once.
            if before.at.elapsed() >= INTERVAL / 2 {
                let (after, now) = (Totals::now(status), now());
                self.push(point(&before, &after, status, lanes, now));
                self.note_missing(now, status.missing().into_keys());
                before = after;
            }
        }
    }

    /// The points after this time.
    pub fn after(&self, after: TimestampMs) -> Columns {
        let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        let mut columns = Columns::default();
        for point in points.iter().filter(|point| point.at > after) {
            columns.push(point);
        }
        columns
    }

    fn note_missing(&self, now: TimestampMs, missing: impl Iterator<Item = &'static str>) {
        let mut since = self.missing_since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = missing.map(|what| (what, since.get(what).copied().unwrap_or(now))).collect();
    }

    /// Since when each of these has been missing.
    pub fn missing_since(&self) -> BTreeMap<&'static str, TimestampMs> {
        self.missing_since.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sums over the last `count` points, a second each; wall clocks may be set.
    pub fn last(&self, count: usize) -> Recent {
        let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        let mut recent = Recent::default();
        let before = points.len().checked_sub(count + 1).and_then(|at| points.get(at));
        let mut is_comparable = before.is_some();
        for point in points.iter().rev().take(count) {
            let Point { outcomes, throttled_ms, phases: [_, _, in_database, _], seconds, .. } = *point;
            recent.outcomes += outcomes;
            recent.throttled_ms += u64::from(throttled_ms);
            recent.database += f64::from(in_database * seconds);
            recent.seconds += f64::from(seconds);
            recent.was_unready |= !point.is_ready;
            is_comparable &= before.is_some_and(|before| before.partitions == point.partitions);
        }
        recent.database /= recent.seconds.max(1.0);
        recent.lag_before = before.filter(|_| is_comparable).map(|point| point.lag_records.into());
        recent
    }

    /// When what `holds` of the records by outcome and of the throttle time in milliseconds began: the first such point
    /// without `quiet` points between it and the next one. `None` if it did not hold within the last `quiet` points.
    pub fn since(&self, quiet: usize, holds: impl Fn(&OutcomeCounts, u32) -> bool) -> Option<TimestampMs> {
        let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut first, mut gap) = (None, 0);
        for point in points.iter().rev() {
            if holds(&point.outcomes, point.throttled_ms) {
                (first, gap) = (Some(point.at), 0);
            } else {
                gap += 1;
            }
            if gap >= quiet {
                break;
            }
        }
        first
    }

    fn push(&self, point: Point) {
        let mut points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        if points.len() >= POINTS_MAX {
            points.pop_front();
        }
        points.push_back(point);
    }
}

fn point(before: &Totals, after: &Totals, status: &StatusRegistry, lanes: usize, now: TimestampMs) -> Point {
    let seconds = (after.at - before.at).as_secs_f64();
    let partitions = status.partition_lags();
    let in_use: BTreeSet<usize> = partitions.keys().map(|partition| lane_of(*partition, lanes)).collect();
    let lane_seconds = seconds * in_use.len().max(1) as f64;
    Point {
        at: now,
        outcomes: after.outcomes.since(&before.outcomes),
        latency: after.work.latency_since(&before.work),
        lag_records: u32::try_from(partitions.values().flatten().sum::<i64>()).unwrap_or(u32::MAX),
        oldest_seconds: status.oldest_pending_ms(now) as f32 / 1_000.0,
        is_ready: status.missing().is_empty(),
        cpu: (after.cpu.saturating_sub(before.cpu).as_secs_f64() / seconds) as f32,
        resident_bytes: resident_bytes(),
        phases: after.work.phases_since(&before.work).map(|spent| (spent / lane_seconds) as f32),
        throttled_ms: u32::try_from(after.throttled_ms.saturating_sub(before.throttled_ms))
            .unwrap_or(u32::MAX),
        partitions: u16::try_from(partitions.values().flatten().count()).unwrap_or(u16::MAX),
        seconds: seconds as f32,
    }
}

/// The second field of `/proc/self/statm`, in pages.
fn resident_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or_default();
    pages * rustix::param::page_size() as u64
}

impl Columns {
    fn push(&mut self, point: &Point) {
        let Point {
            at,
            outcomes,
            latency,
            lag_records,
            oldest_seconds,
            is_ready,
            cpu,
            resident_bytes,
            phases,
            throttled_ms,
            partitions: _,
            seconds: _,
        } = *point;
        self.at_ms.push(at.0);
        self.written.push(outcomes.written);
        self.duplicates.push(outcomes.duplicates);
        self.dead_letters.push(outcomes.dead_letters);
        self.redelivered.push(outcomes.redelivered);
        self.latency_p50_seconds.push(latency.map(|[p50, _]| p50));
        self.latency_p99_seconds.push(latency.map(|[_, p99]| p99));
        self.lag_records.push(lag_records);
        self.oldest_pending_seconds.push(oldest_seconds);
        self.ready.push(is_ready);
        self.cpu_cores.push(cpu);
        self.resident_bytes.push(resident_bytes);
        let [waiting, assembling, database, kafka] = phases.map(|share| share.min(1.0));
        self.waiting.push(waiting);
        self.assembling.push(assembling);
        self.database.push(database);
        self.kafka.push(kafka);
        self.throttled_ms.push(throttled_ms);
    }
}

#[cfg(test)]
impl History {
    /// Points of so many equal seconds; lag grows by a record in each.
    pub fn of_equal_seconds(count: i64, outcomes: OutcomeCounts, throttled_ms: u32, database: f32) -> Self {
        let history = Self::default();
        for second in 0..count {
            history.push(Point {
                at: TimestampMs(1_000_000_000 - (count - second) * 1_000),
                outcomes,
                latency: None,
                lag_records: second as u32,
                oldest_seconds: 0.0,
                is_ready: true,
                cpu: 0.0,
                resident_bytes: 0,
                phases: [0.0, 0.0, database, 0.0],
                throttled_ms,
                partitions: 1,
                seconds: 1.0,
            });
        }
        history
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::Partition;

    fn taken_at(at: Instant, status: &StatusRegistry, outcomes: OutcomeCounts) -> Totals {
        Totals { at, outcomes, ..Totals::now(status) }
    }

    #[test]
    fn a_point_is_the_difference_of_a_second() {
        // GIVEN a second in which 100 records took about 20 ms, one took 3 s, and two lanes wrote half of the time
        let (status, began) = (StatusRegistry::default(), Instant::now());
        status.assigned(TimestampMs(0), &[Partition(0), Partition(1)]);
        status.work().latency(9.0, 1);
        let before = taken_at(began, &status, OutcomeCounts { written: 7, ..OutcomeCounts::default() });
        status.work().latency(0.02, 100);
        status.work().latency(3.0, 1);
        status.work().phase(LanePhase::Database, Duration::from_secs(1));
        let outcomes = OutcomeCounts { written: 107, dead_letters: 1, ..OutcomeCounts::default() };
        let after = taken_at(began + INTERVAL, &status, outcomes);

        // WHEN its point is made
        let point = point(&before, &after, &status, 2, TimestampMs(1_000));

        // THEN it has what came in that second, and nothing of before
        assert_eq!((point.outcomes.written, point.outcomes.dead_letters), (100, 1));
        let [p50, p99] = point.latency.unwrap();
        assert!((0.016..0.024).contains(&p50) && (0.016..0.024).contains(&p99), "{p50} {p99}");
        assert_eq!(point.phases, [0.0, 0.0, 0.5, 0.0]);
        assert!(!point.is_ready && point.resident_bytes > 1 << 20);

        // AND a transaction that took ten seconds counts as such, though it is drawn as one second
        let before = taken_at(began, &status, OutcomeCounts::default());
        status.work().phase(LanePhase::Database, Duration::from_secs(10));
        let point = super::point(
            &before,
            &taken_at(began + INTERVAL, &status, outcomes),
            &status,
            2,
            TimestampMs(1_000),
        );
        assert_eq!(point.phases, [0.0, 0.0, 5.0, 0.0]);
        let history = History::default();
        history.push(point);
        assert_eq!((history.last(10).database, history.after(TimestampMs(0)).database), (5.0, vec![1.0]));
    }

    #[test]
    fn sums_are_of_the_points_since_a_time() {
        let (history, status, began) = (History::default(), StatusRegistry::default(), Instant::now());
        let before = taken_at(began, &status, OutcomeCounts::default());
        for second in 1..=20 {
            let written = OutcomeCounts { written: second, ..OutcomeCounts::default() };
            let after = taken_at(began + INTERVAL, &status, written);
            let mut point = point(&before, &after, &status, 1, TimestampMs(second as i64 * 1_000));
            point.lag_records = second as u32;
            history.push(point);
        }
        let recent = history.last(10);
        assert_eq!((recent.seconds, recent.outcomes.written, recent.lag_before), (10.0, 155, Some(10)));
        assert_eq!(recent.per_second(recent.outcomes.written), 15.5);
        assert_eq!(history.last(20).lag_before, None, "there is none before the first");
        assert_eq!(history.last(100).outcomes.written, 210);
        // From 13 on, with a pause of four; not from 3 on.
        let often = |outcomes: &OutcomeCounts, _| matches!(outcomes.written, 3 | 13 | 18);
        assert_eq!(history.since(5, often), Some(TimestampMs(13_000)));
        assert_eq!(history.since(2, often), None);

        // Partitions that came since had their own lag before.
        let assigned = |point: &mut Point| (point.partitions, point.lag_records) = (1, 1_000);
        assigned(history.points.lock().unwrap().back_mut().unwrap());
        assert_eq!(history.last(10).lag_before, None);

        history.note_missing(TimestampMs(1), ["database"].into_iter());
        history.note_missing(TimestampMs(2), ["broker", "database"].into_iter());
        let missing = [("broker", TimestampMs(2)), ("database", TimestampMs(1))];
        assert_eq!(history.missing_since(), missing.into());
        history.note_missing(TimestampMs(3), ["broker"].into_iter());
        assert_eq!(history.missing_since(), [("broker", TimestampMs(2))].into());
    }

    #[test]
    fn fifteen_minutes_are_kept_and_asked_for_from_a_time_on() {
        let (history, status, began) = (History::default(), StatusRegistry::default(), Instant::now());
        let [before, after] =
            [began, began + INTERVAL].map(|at| taken_at(at, &status, OutcomeCounts::default()));
        for second in 0..1_000 {
            history.push(point(&before, &after, &status, 1, TimestampMs(second * 1_000)));
        }
        let all = history.after(TimestampMs(-1));
        assert_eq!((all.at_ms.len(), all.at_ms[0], all.at_ms[899]), (POINTS_MAX, 100_000, 999_000));
        assert_eq!(all.latency_p50_seconds, [None; POINTS_MAX]);
        assert_eq!(history.after(TimestampMs(997_000)).at_ms, [998_000, 999_000]);
        // What docs/reference/http.md promises.
        assert!(size_of::<Point>() <= 104, "{}", size_of::<Point>());
    }
}
