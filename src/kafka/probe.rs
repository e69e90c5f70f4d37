//! Checks whether partitions can be read at their cursors, for commands that run outside the daemon.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::fetcher::{Fetcher, reader_config};
use super::librdkafka::NativeError;
use super::librdkafka::fetch::FetchItem;
use crate::config::KafkaSettings;
use crate::domain::cursor::LogBounds;
use crate::domain::record::{NextOffset, Partition};
use crate::ports::fetch_buffer::FetchFault;

/// Limit for the answers of all partitions together.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Limit for finding the ends of all unreadable batches together.
const SEARCH_MAX: Duration = Duration::from_secs(20);
const DEFAULTS: [(&str, &str); 6] = [
    ("fetch.min.bytes", "1"),
    ("fetch.wait.max.ms", "10"),
    ("fetch.queue.backoff.ms", "10"),
    // librdkafka's pause after an error; each step of `end_of_batch` causes one.
    ("fetch.error.backoff.ms", "10"),
    ("queued.min.messages", "1"),
    ("queued.max.messages.kbytes", "1024"),
];

/// Whether a partition can be read at its cursor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Probed {
    /// It can be read, or there is nothing to read.
    Readable,
    /// It cannot be read.
    Unreadable {
        /// The error.
        fault: FetchFault,
        /// The offset after the unreadable batch, if it was found in time.
        after: Option<NextOffset>,
    },
    /// No answer in time.
    NoAnswer,
}

/// Reads one batch at each of these positions of the input topic. Blocks for half a minute at most.
///
/// # Errors
/// When the client cannot be created, or fails as a whole.
pub fn probe(
    kafka: &KafkaSettings,
    positions: &[(Partition, NextOffset, LogBounds)],
) -> Result<BTreeMap<Partition, Probed>, String> {
    let mut probed: BTreeMap<Partition, Probed> =
        positions.iter().map(|(partition, ..)| (*partition, Probed::Readable)).collect();
    let is_within = |(_, position, bounds): &&(Partition, NextOffset, LogBounds)| {
        *position >= bounds.start && *position < bounds.end
    };
    let unread: Vec<_> = positions.iter().filter(is_within).collect();
    if unread.is_empty() {
        return Ok(probed);
    }
    let fetcher =
        Fetcher::new(&reader_config(kafka, &DEFAULTS), &kafka.input_topic).map_err(|e| e.to_string())?;
    let starts: Vec<_> = unread.iter().map(|(partition, position, _)| (*partition, *position)).collect();
    let faults = first_faults(&fetcher, &starts, Instant::now() + ANSWER_MAX).map_err(|e| e.to_string())?;
    let search_until = Instant::now() + SEARCH_MAX;
    for (partition, position, bounds) in unread {
        let answer = match faults.get(partition) {
            None => Probed::NoAnswer,
            Some(None) => Probed::Readable,
            Some(Some(fault)) => {
                let is_inside = |at: NextOffset| {
                    let found = first_faults(&fetcher, &[(*partition, at)], search_until).ok()?;
                    found.get(partition).map(|found| found.is_some_and(|found| found.batch == fault.batch))
                };
                let after = fault.batch.and_then(|_| end_of_batch(*position, bounds.end, is_inside));
                Probed::Unreadable { fault: *fault, after }
            }
        };
        probed.insert(*partition, answer);
    }
    Ok(probed)
}

/// The fault at each position, `None` if it can be read; partitions without an answer in time are absent.
fn first_faults(
    fetcher: &Fetcher,
    positions: &[(Partition, NextOffset)],
    deadline: Instant,
) -> Result<BTreeMap<Partition, Option<FetchFault>>, NativeError> {
    fetcher.first_answers(positions, deadline, |_, item| {
        Some(match item {
            FetchItem::Record(_) | FetchItem::End { .. } => None,
            FetchItem::Failed { code, offset, .. } => Some(FetchFault::new(code, offset)),
        })
    })
}

/// The first offset after the batch that contains `inside`. `is_inside` returns whether an offset is in the
/// same batch; `None`: no answer in time.
fn end_of_batch(
    inside: NextOffset,
    end: NextOffset,
    is_inside: impl Fn(NextOffset) -> Option<bool>,
) -> Option<NextOffset> {
    let (mut low, mut step) = (inside.0, 1_i64);
    // The batch may reach up to `end`, which is not part of it.
    let mut high = loop {
        let next = low.saturating_add(step).min(end.0);
        if next >= end.0 || !is_inside(NextOffset(next))? {
            break next;
        }
        low = next;
        step = step.saturating_mul(2);
    };
    while high.saturating_sub(low) > 1 {
        let middle = low + (high - low) / 2;
        if is_inside(NextOffset(middle))? { low = middle } else { high = middle }
    }
    Some(NextOffset(high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_batch_is_found_wherever_it_lies() {
        for last in 10..60 {
            for inside in 10..=last {
                let is_inside = |at: NextOffset| Some((10..=last).contains(&at.0));
                let found = end_of_batch(NextOffset(inside), NextOffset(200), is_inside);
                assert_eq!(found, Some(NextOffset(last + 1)), "{inside} of 10 to {last}");
            }
        }
        assert_eq!(end_of_batch(NextOffset(5), NextOffset(6), |_| Some(true)), Some(NextOffset(6)));
        assert_eq!(end_of_batch(NextOffset(5), NextOffset(60), |_| None), None);
    }
}
