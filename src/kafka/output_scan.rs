//! The output scan: determines from the output topics which events were sent, when the group's offset is
//! missing, not ours, or unknown to the database. Every output names its input record in the header `source`.
//!
//! The events of one input partition are sent in the order of its offsets, and each transaction carries all
//! outputs of its records. So everything up to the largest offset that an output names was sent; records
//! between it and the lost committed offset had no outputs. The scan reads each output partition backward, in
//! growing steps, and stops where no output at or after the position in question can lie further back:
//!
//! - at any output of that input partition, because they are in order;
//! - at outputs older than the input record at that position, if brokers refuse records stamped more than an
//!   hour ahead ([`TIMESTAMP_AHEAD`](super::topic_rules::TIMESTAMP_AHEAD)): that record was appended an hour before its timestamp at the earliest;
//! - at the start of the log, if nothing was removed there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::last_stable::stable_high_watermarks;
use super::librdkafka::NativeRecord;
use super::scan::{ScanError, ScanRange, Scanner};
use super::timestamp_lookup::{FirstTimestamp, first_timestamps};
use super::topic_rules::TIMESTAMP_AHEAD_MAX_MS;
use crate::config::KafkaSettings;
use crate::domain::cursor::{LogBounds, OutputScan};
use crate::domain::publication::Source;
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::ports::ScannedOutputs;
use crate::telemetry::logging::RateLimited;

/// Records of one output partition in the first step; each further step is four times as long.
const STEP_MIN: i64 = 2_000;
const STEP_GROWTH: i64 = 4;
/// A scan ends without a result after this many records, or after [`SEARCH_MAX`].
const RECORDS_MAX: u64 = 20_000_000;
const SEARCH_MAX: Duration = Duration::from_secs(180);
const PEEK_MAX: Duration = Duration::from_secs(20);
/// Assumed maximum difference between the clocks of two hosts.
pub const CLOCK_SKEW_MS: i64 = 600_000;
/// How much later than its outputs a record's timestamp may be, where the input's topic has [`TIMESTAMP_AHEAD`](super::topic_rules::TIMESTAMP_AHEAD) limited.
pub const RECORD_AHEAD_MAX_MS: i64 = TIMESTAMP_AHEAD_MAX_MS + CLOCK_SKEW_MS;

/// What the scan knows about one input partition.
#[derive(Debug)]
struct Wanted {
    from: NextOffset,
    /// Outputs of records at or after `from` are no older than this; `None`: unknown.
    not_before: Option<TimestampMs>,
    /// The offset after the last record whose events were sent, as found so far.
    sent: NextOffset,
    /// Timestamp of the latest output of a record before `from`.
    last_before: Option<TimestampMs>,
}

impl Wanted {
    fn floor(&self) -> Option<TimestampMs> {
        let since = self.last_before.map(|at| TimestampMs(at.0 - CLOCK_SKEW_MS));
        self.not_before.max(since)
    }
}

/// One partition of an output topic.
struct Region {
    partition: Partition,
    bounds: LogBounds,
    /// Everything at or after this offset was read.
    low: NextOffset,
    /// Nothing before this offset matters.
    floor: NextOffset,
    /// Input partitions with an output in what was read. The scan goes backward, so it contains their latest
    /// outputs.
    passed: BTreeSet<Partition>,
}

impl Region {
    fn is_done(&self, wanted: &BTreeMap<Partition, Wanted>) -> bool {
        self.low <= self.floor || wanted.keys().all(|p| self.passed.contains(p))
    }

    /// Whether no output of this input partition at or after its `from` can be in the unread part.
    fn is_conclusive(&self, partition: Partition) -> bool {
        // A log that starts above 0 has lost records, perhaps the ones in question.
        let is_whole = self.floor > self.bounds.start || self.bounds.start.0 == 0;
        self.passed.contains(&partition) || (self.low <= self.floor && is_whole)
    }
}

/// Scans the output topics for outputs of records at or after these positions.
///
/// # Errors
/// When a topic cannot be read; the scan may be repeated. If this principal has no right to read an output,
/// the result is [`OutputScan::Unclear`], not an error.
pub fn scan(
    kafka: &KafkaSettings,
    topic_id: Uuid,
    positions: &[(Partition, NextOffset)],
) -> Result<Vec<ScannedOutputs>, ScanError> {
    match scan_topics(kafka, topic_id, positions) {
        Err(error) if error.is_refusal() => {
            static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(
                    %error,
                    suppressed,
                    "no right to read the outputs, so they cannot show which events were sent"
                );
            }
            let unclear = |(partition, from): &(Partition, NextOffset)| ScannedOutputs {
                partition: *partition,
                from: *from,
                scan: OutputScan::Unclear(*from),
                is_refused: true,
            };
            Ok(positions.iter().map(unclear).collect())
        }
        other => other,
    }
}

fn scan_topics(
    kafka: &KafkaSettings,
    topic_id: Uuid,
    positions: &[(Partition, NextOffset)],
) -> Result<Vec<ScannedOutputs>, ScanError> {
    let began = Instant::now();
    let (mut wanted, at_end) = wanted(kafka, positions)?;
    let prefix = topic_id.as_fields().0;
    let (mut read, mut is_given_up) = (0_u64, false);
    let mut inconclusive: BTreeSet<Partition> = BTreeSet::new();
    for topic in [&kafka.read_topic, &kafka.email_topic, &kafka.dead_letter_topic] {
        if wanted.is_empty() {
            break;
        }
        let scanner = Scanner::new(kafka, topic)?;
        let mut regions = regions(kafka, &scanner)?;
        let mut step = STEP_MIN;
        loop {
            raise_floors(&scanner, &mut regions, &wanted)?;
            is_given_up = read > RECORDS_MAX || began.elapsed() > SEARCH_MAX;
            let ranges = next_ranges(&mut regions, &wanted, step, is_given_up);
            if ranges.is_empty() {
                break;
            }
            let _ = scanner.read(&ranges, |record| {
                read += 1;
                if let Some(input) = note(record, prefix, &mut wanted)
                    && let Some(region) = regions.iter_mut().find(|r| r.partition == record.partition())
                {
                    region.passed.insert(input);
                }
                ControlFlow::Continue(())
            })?;
            step = step.saturating_mul(STEP_GROWTH);
        }
        for partition in wanted.keys() {
            if regions.iter().any(|region| !region.is_conclusive(*partition)) {
                inconclusive.insert(*partition);
            }
        }
    }
    static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
    if let Some(suppressed) = LIMIT.pass() {
        tracing::info!(
            records = read,
            partitions = wanted.len(),
            given_up = is_given_up,
            seconds = began.elapsed().as_secs_f64(),
            suppressed,
            "searched the outputs for what was sent"
        );
    }
    let scanned = wanted.iter().map(|(partition, w)| {
        let is_unclear = inconclusive.contains(partition);
        let scan = if is_unclear { OutputScan::Unclear(w.sent) } else { OutputScan::Sent(w.sent) };
        ScannedOutputs { partition: *partition, from: w.from, scan, is_refused: false }
    });
    Ok(scanned.chain(at_end).collect())
}

/// The partitions to scan for, and the results of those without a record at or after their position.
fn wanted(
    kafka: &KafkaSettings,
    positions: &[(Partition, NextOffset)],
) -> Result<(BTreeMap<Partition, Wanted>, Vec<ScannedOutputs>), ScanError> {
    let input = Scanner::new(kafka, &kafka.input_topic)?;
    let partitions: Vec<Partition> = positions.iter().map(|(partition, _)| *partition).collect();
    let bounds = input.bounds(&partitions)?;
    let inside: Vec<_> = positions
        .iter()
        .zip(&bounds)
        .filter(|((_, from), bounds)| bounds.start <= *from && *from < bounds.end)
        .map(|(position, _)| *position)
        .collect();
    let now = jiff::Timestamp::now().as_millisecond();
    let is_limited = input.limits_timestamps(kafka);
    let timestamps = first_timestamps(kafka, &kafka.input_topic, &inside, PEEK_MAX)
        .map_err(|e| input.error(format!("reading the timestamps of single records: {e}")))?;
    let (mut wanted, mut at_end) = (BTreeMap::new(), Vec::new());
    for ((partition, from), bounds) in positions.iter().zip(&bounds) {
        let not_before = match timestamps.get(partition) {
            timestamps if *from >= bounds.end || matches!(timestamps, Some(FirstTimestamp::End)) => {
                at_end.push(ScannedOutputs {
                    partition: *partition,
                    from: *from,
                    scan: OutputScan::Sent(*from),
                    is_refused: false,
                });
                continue;
            }
            // One that is further ahead is from before the limit was set.
            Some(FirstTimestamp::Record(Some(at))) if is_limited && at.0 <= now + RECORD_AHEAD_MAX_MS => {
                Some(TimestampMs(at.0.min(now) - RECORD_AHEAD_MAX_MS))
            }
            // Without a timestamp that is limited the whole log is read.
            _ => None,
        };
        wanted.insert(*partition, Wanted { from: *from, not_before, sent: *from, last_before: None });
    }
    Ok((wanted, at_end))
}

/// The partitions of an output topic. Waits until the transactions that are open now have ended.
fn regions(kafka: &KafkaSettings, scanner: &Scanner) -> Result<Vec<Region>, ScanError> {
    let (_, partitions) = scanner.describe()?;
    let ends = stable_high_watermarks(kafka, scanner.topic(), &partitions)?;
    let bounds = scanner.bounds(&partitions)?;
    let bounds = bounds.into_iter().zip(ends).map(|(bounds, end)| LogBounds { end, ..bounds });
    let region = |(partition, bounds): (Partition, LogBounds)| Region {
        partition,
        bounds,
        low: bounds.end,
        floor: bounds.start,
        passed: BTreeSet::new(),
    };
    Ok(partitions.into_iter().zip(bounds).map(region).collect())
}

/// Raises the floors to the earliest possible time of the outputs in question.
fn raise_floors(
    scanner: &Scanner,
    regions: &mut [Region],
    wanted: &BTreeMap<Partition, Wanted>,
) -> Result<(), ScanError> {
    // The earliest time of all input partitions; none if it is unknown for one of them.
    let Some(since) = wanted.values().map(Wanted::floor).min().flatten() else { return Ok(()) };
    let partitions: Vec<Partition> = regions.iter().map(|region| region.partition).collect();
    let positions = scanner.positions_at(&partitions, since)?;
    for (region, position) in regions.iter_mut().zip(positions) {
        // `None`: every record is older than that.
        region.floor = region.floor.max(position.unwrap_or(region.bounds.end));
    }
    Ok(())
}

/// The next step backward of every region that is not done. Returned ranges count as read, so nothing is
/// returned once the scan has reached its limit.
fn next_ranges(
    regions: &mut [Region],
    wanted: &BTreeMap<Partition, Wanted>,
    step: i64,
    is_given_up: bool,
) -> Vec<ScanRange> {
    let mut ranges = Vec::new();
    if is_given_up {
        return ranges;
    }
    for region in regions.iter_mut().filter(|region| !region.is_done(wanted)) {
        let from = NextOffset(region.low.0.saturating_sub(step)).max(region.floor).max(region.bounds.start);
        ranges.push(ScanRange { partition: region.partition, from, to: region.low });
        region.low = from;
    }
    ranges
}

/// Notes one output; returns its input partition, if that is wanted.
fn note(
    record: &NativeRecord<'_>,
    prefix: u32,
    wanted: &mut BTreeMap<Partition, Wanted>,
) -> Option<Partition> {
    // A dead letter also carries the headers of its record, which may include another `source`.
    let source = record
        .headers()
        .filter(|(name, _)| *name == Source::HEADER.as_bytes())
        .filter_map(|(_, value)| Source::parse(value?))
        .find(|source| source.topic_id_prefix == prefix)?;
    let wanted = wanted.get_mut(&source.partition)?;
    if wanted.from.is_past(source.offset) {
        let sent_at = record.timestamp();
        wanted.last_before = wanted.last_before.max(sent_at);
    } else {
        wanted.sent = wanted.sent.max(source.offset.next());
    }
    Some(source.partition)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(not_before: Option<i64>, last_before: Option<i64>) -> Wanted {
        Wanted {
            from: NextOffset(5),
            not_before: not_before.map(TimestampMs),
            sent: NextOffset(5),
            last_before: last_before.map(TimestampMs),
        }
    }

    fn region(start: i64, end: i64, floor: i64, low: i64) -> Region {
        Region {
            partition: Partition(0),
            bounds: LogBounds { start: NextOffset(start), end: NextOffset(end) },
            low: NextOffset(low),
            floor: NextOffset(floor),
            passed: BTreeSet::new(),
        }
    }

    #[test]
    fn the_later_of_two_bounds_of_time_counts() {
        let day = 86_400_000;
        assert_eq!(wanted(None, None).floor(), None);
        assert_eq!(wanted(Some(day), None).floor(), Some(TimestampMs(day)));
        assert_eq!(wanted(Some(day), Some(day)).floor(), Some(TimestampMs(day)), "clocks may differ");
        assert_eq!(wanted(None, Some(day)).floor(), Some(TimestampMs(day - CLOCK_SKEW_MS)));
        assert_eq!(wanted(Some(day), Some(2 * day)).floor(), Some(TimestampMs(2 * day - CLOCK_SKEW_MS)));
    }

    #[test]
    fn where_something_was_removed_only_an_earlier_output_is_conclusive() {
        let p = Partition(7);
        assert!(region(0, 100, 0, 0).is_conclusive(p), "read to its very start");
        assert!(!region(0, 100, 0, 50).is_conclusive(p), "not read to its start");
        assert!(region(10, 100, 40, 40).is_conclusive(p), "what is older was read, too");
        assert!(!region(10, 100, 10, 10).is_conclusive(p), "what was removed may have been it");
        assert!(!region(100, 100, 100, 100).is_conclusive(p), "everything was removed");
        assert!(region(0, 0, 0, 0).is_conclusive(p), "nothing was ever there");
        let mut passed = region(10, 100, 10, 50);
        passed.passed.insert(p);
        assert!(passed.is_conclusive(p));
    }

    #[test]
    fn steps_go_backward_without_a_gap_and_end_at_the_floor() {
        let wanted = BTreeMap::from([(Partition(7), wanted(None, None))]);
        let mut regions = [region(0, 100, 30, 100)];
        let mut read = Vec::new();
        loop {
            let ranges = next_ranges(&mut regions, &wanted, 40, false);
            if ranges.is_empty() {
                break;
            }
            read.extend(ranges.iter().map(|r| (r.from.0, r.to.0)));
        }
        assert_eq!(read, [(60, 100), (30, 60)]);
    }

    #[test]
    fn a_scan_that_is_given_up_does_not_count_as_done() {
        let wanted = BTreeMap::from([(Partition(7), wanted(None, None))]);
        // One step more would have reached the floor.
        let mut regions = [region(0, 100, 30, 60)];
        assert!(next_ranges(&mut regions, &wanted, 40, true).is_empty());
        assert!(!regions[0].is_conclusive(Partition(7)));
        assert!(!next_ranges(&mut regions, &wanted, 40, false).is_empty());
        assert!(regions[0].is_conclusive(Partition(7)));
    }
}
