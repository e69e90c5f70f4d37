//! Checks whether a range of a partition that a reader passed over (a gap) holds committed records.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::Offset as KafkaOffset;
use rdkafka::types::RDKafkaErrorCode;

use super::fetcher::{Fetcher, reader_config};
use super::librdkafka::fetch::FetchItem;
use super::offsets::offsets_at;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition};
use crate::failpoint;
use crate::ports::{Gap, GapAnswer};

/// Partitions without an answer by then are checked again later.
const CHECK_MAX: Duration = Duration::from_secs(10);
/// Small fetches: the first record of each gap is enough.
const DEFAULTS: [(&str, &str); 6] = [
    ("fetch.min.bytes", "1"),
    ("fetch.wait.max.ms", "10"),
    ("fetch.queue.backoff.ms", "20"),
    ("queued.max.messages.kbytes", "2048"),
    ("fetch.max.bytes", "2097152"),
    ("fetch.message.max.bytes", "65536"),
];

/// Checks what is in these gaps with a new client that starts at each gap's start. A gap is empty if the
/// first record or end that this client delivers is at or beyond the gap's end, and the log's start has not
/// moved past the gap's start meanwhile. Blocks for up to ten seconds.
pub fn check(kafka: &KafkaSettings, gaps: &[Gap]) -> Vec<(Gap, GapAnswer)> {
    failpoint::hit("before_gap_check");
    match read(kafka, gaps) {
        Ok(answers) => answers,
        Err(error) => {
            let failed = |gap: &Gap| (*gap, GapAnswer::Failed(error.clone()));
            gaps.iter().map(failed).collect()
        }
    }
}

fn read(kafka: &KafkaSettings, gaps: &[Gap]) -> Result<Vec<(Gap, GapAnswer)>, String> {
    let config = reader_config(kafka, &DEFAULTS);
    let fetcher = Fetcher::new(&config, &kafka.input_topic).map_err(|e| e.to_string())?;
    let positions: Vec<_> = gaps.iter().map(|gap| (gap.partition, gap.from)).collect();
    let by_partition: BTreeMap<Partition, &Gap> = gaps.iter().map(|gap| (gap.partition, gap)).collect();
    let mut answers = fetcher
        .first_answers(&positions, Instant::now() + CHECK_MAX, |partition, item| {
            by_partition.get(&partition).and_then(|gap| answer_of(gap, &item))
        })
        .map_err(|e| e.to_string())?;
    // Records that were removed from the log may have been in the gap. The log's start is read last, so that
    // it covers the whole time of the check.
    let empty = answers.iter().filter(|(_, answer)| **answer == GapAnswer::Empty);
    let empty: Vec<Partition> = empty.map(|(partition, _)| *partition).collect();
    if !empty.is_empty() {
        let starts = offsets_at(fetcher.consumer(), &kafka.input_topic, &empty, KafkaOffset::Beginning)
            .map_err(|e| e.to_string())?;
        for (partition, start) in empty.into_iter().zip(starts) {
            if by_partition.get(&partition).is_some_and(|gap| start > gap.from) {
                answers.insert(partition, GapAnswer::Removed);
            }
        }
    }
    let late = || GapAnswer::Failed("no answer in time".to_owned());
    Ok(gaps.iter().map(|gap| (*gap, answers.remove(&gap.partition).unwrap_or_else(late))).collect())
}

/// The answer that an item of its partition implies for a gap; `None`: not decided yet.
fn answer_of(gap: &Gap, item: &FetchItem<'_>) -> Option<GapAnswer> {
    match item {
        FetchItem::Record(record) if gap.from.is_past(record.offset()) => None,
        FetchItem::Record(record) if gap.to.is_past(record.offset()) => {
            Some(GapAnswer::Record(NextOffset(record.offset().0)))
        }
        FetchItem::Record(_) => Some(GapAnswer::Empty),
        // A new leader may report an end that lags.
        FetchItem::End { position, .. } => (*position >= gap.to).then_some(GapAnswer::Empty),
        FetchItem::Failed {
            code: RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset,
            ..
        } => Some(GapAnswer::Removed),
        FetchItem::Failed { code, .. } => Some(GapAnswer::Failed(code.to_string())),
    }
}
