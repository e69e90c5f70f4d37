//! Checks whether a range of a partition that a reader passed over (a gap) holds committed records.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::Offset as KafkaOffset;
use rdkafka::types::RDKafkaErrorCode;

use super::fetcher::{Fetcher, reader_config};
use super::librdkafka::fetch::FetchItem;
use super::offsets::listed;
use crate::config::KafkaSettings;
use crate::domain::record::{NextOffset, Partition};
use crate::failpoint;
use crate::ports::{Gap, GapAnswer};

const POLL: Duration = Duration::from_millis(50);
/// Partitions without an answer by then are checked again later.
const PROOF_MAX: Duration = Duration::from_secs(10);
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
pub fn prove(kafka: &KafkaSettings, gaps: &[Gap]) -> Vec<(Gap, GapAnswer)> {
    failpoint::hit("before_gap_proof");
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
    fetcher.start(&positions).map_err(|e| e.to_string())?;
    let mut open: BTreeMap<Partition, Gap> = gaps.iter().map(|gap| (gap.partition, *gap)).collect();
    let mut answers: Vec<(Gap, GapAnswer)> = Vec::with_capacity(gaps.len());
    let deadline = Instant::now() + PROOF_MAX;
    while !open.is_empty() && Instant::now() < deadline {
        let mut done: Vec<Partition> = Vec::new();
        fetcher.drain(usize::MAX, POLL, |item| {
            let Some((gap, answer)) = met(&open, &item) else { return };
            open.remove(&gap.partition);
            answers.push((gap, answer));
            done.push(gap.partition);
        });
        fetcher.stop(&done).map_err(|e| e.to_string())?;
    }
    answers.extend(open.into_values().map(|gap| (gap, GapAnswer::Failed("no answer in time".to_owned()))));
    // Records that were removed from the log may have been in the gap. The log's start is read last, so that
    // it covers the whole time of the check.
    let empty: Vec<Partition> =
        answers.iter().filter(|(_, a)| *a == GapAnswer::Empty).map(|(gap, _)| gap.partition).collect();
    if !empty.is_empty() {
        let starts = listed(fetcher.consumer(), &kafka.input_topic, &empty, KafkaOffset::Beginning)
            .map_err(|e| e.to_string())?;
        let starts: BTreeMap<Partition, NextOffset> =
            empty.into_iter().zip(starts.into_iter().map(NextOffset)).collect();
        for (gap, answer) in &mut answers {
            if starts.get(&gap.partition).is_some_and(|start| *start > gap.from) {
                *answer = GapAnswer::Removed;
            }
        }
    }
    Ok(answers)
}

/// The answer that an item implies for the gap of its partition; `None`: not decided yet.
fn met(open: &BTreeMap<Partition, Gap>, item: &FetchItem<'_>) -> Option<(Gap, GapAnswer)> {
    match item {
        FetchItem::Record(record) => {
            let gap = open.get(&record.partition())?;
            let offset = record.offset();
            if gap.from.is_past(offset) {
                return None;
            }
            let is_inside = gap.to.is_past(offset);
            let answer = if is_inside { GapAnswer::Record(NextOffset(offset.0)) } else { GapAnswer::Empty };
            Some((*gap, answer))
        }
        FetchItem::End { partition, position } => {
            let gap = open.get(partition)?;
            // A new leader may report an end that lags.
            (*position >= gap.to).then_some((*gap, GapAnswer::Empty))
        }
        FetchItem::Failed { partition, code, .. } => {
            let gap = open.get(&(*partition)?)?;
            let answer = match code {
                RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset => GapAnswer::Removed,
                code => GapAnswer::Failed(code.to_string()),
            };
            Some((*gap, answer))
        }
    }
}
