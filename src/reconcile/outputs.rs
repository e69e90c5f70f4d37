//! Last pass over a slice: every event and dead letter whose `source` is a record of the slice.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::report::Findings;
use super::sums::Sums;
use super::table::{Placed, Table};
use super::{Fault, Progress, hash, judge};
use crate::config::KafkaSettings;
use crate::domain::payment::{Amount, MessageId};
use crate::domain::publication::OutputTopic;
use crate::domain::record::{NextOffset, Offset, Partition};
use crate::error::CommandError;
use crate::kafka::last_stable::stable_ends;
use crate::kafka::librdkafka::NativeRecord;
use crate::kafka::scan::{ScanRange, Scanner};

/// An output topic and the ends up to which it is read.
struct Topic {
    output: OutputTopic,
    scanner: Scanner,
    /// End of every partition, determined after the cursors were read.
    ends: Vec<(Partition, NextOffset)>,
}

/// The output topics.
pub(super) struct Outputs {
    topics: Vec<Topic>,
    prefix: String,
}

/// Counts of a slice.
pub(super) struct Counted {
    /// Outputs of the slice's records, by [`OutputTopic::index`].
    pub outputs: [u64; 3],
    /// Sums of the amounts in read events.
    pub sums: Sums,
    /// Outputs whose `source` is in another topic or missing.
    pub foreign: u64,
    /// Outputs of records that the log has lost and whose offsets were used again.
    pub former: u64,
    /// Sources within the slice for which the log has no record.
    pub nowhere: Findings,
    /// Output partitions that no longer start at offset 0: the lowest source offset by output, source
    /// partition and output partition; absent if the partition is empty.
    cut: Cut,
}

#[derive(Default)]
struct Cut {
    partitions: [Vec<bool>; 3],
    first: HashMap<(usize, i32, i32), i64>,
}

impl Counted {
    /// Creates empty counts; at most `limit` findings are listed.
    pub fn new(limit: usize) -> Self {
        Self {
            outputs: [0; 3],
            sums: Sums::default(),
            foreign: 0,
            former: 0,
            nowhere: Findings::new(limit),
            cut: Cut::default(),
        }
    }

    /// Whether the output of this record may have been removed by retention. Each output partition holds the
    /// outputs of an input partition in offset order, and retention removes the oldest first.
    pub fn is_cut_off(
        &self,
        topic: OutputTopic,
        partition: Partition,
        offset: Offset,
        key: Option<u32>,
    ) -> bool {
        let Some(cut) = self.cut.partitions.get(topic.index()).filter(|cut| !cut.is_empty()) else {
            return false;
        };
        let may_be = |at: usize| {
            cut.get(at).copied().unwrap_or_default()
                && i32::try_from(at)
                    .ok()
                    .and_then(|at| self.cut.first.get(&(topic.index(), partition.0, at)))
                    .is_none_or(|first| offset.0 < *first)
        };
        match key {
            Some(key) => may_be(key as usize % cut.len()),
            None => (0..cut.len()).any(may_be),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    message_id: String,
}

#[derive(Deserialize)]
struct Money<'m> {
    #[serde(borrow)]
    amount: &'m RawValue,
    currency: String,
}

impl Outputs {
    /// Determines the ends of the outputs. Call it after reading the cursors: outputs covered by the group's
    /// offset are then below these ends.
    pub fn open(kafka: &KafkaSettings, topic_id: Uuid) -> Result<Self, CommandError> {
        let failed = |e: &dyn std::fmt::Display| CommandError::failed(format!("an output: {e}"));
        let mut topics = Vec::new();
        for (output, name) in [
            (OutputTopic::Read, &kafka.read_topic),
            (OutputTopic::Email, &kafka.email_topic),
            (OutputTopic::DeadLetter, &kafka.dead_letter_topic),
        ] {
            let scanner = Scanner::new(kafka, name).map_err(|e| failed(&e))?;
            let (_, partitions) = scanner.describe().map_err(|e| failed(&e))?;
            let ends = stable_ends(kafka, name, &partitions).map_err(|e| failed(&e))?;
            topics.push(Topic { output, scanner, ends: partitions.into_iter().zip(ends).collect() });
        }
        Ok(Self { topics, prefix: format!("{:08x}", topic_id.as_fields().0) })
    }

    /// Maximum number of records in the outputs.
    pub fn len(&self) -> u64 {
        self.topics.iter().flat_map(|t| &t.ends).map(|(_, end)| end.0.unsigned_abs()).sum()
    }

    /// Records every output of the table's records.
    pub fn read(&self, table: &mut Table, limit: usize, progress: &Progress) -> Result<Counted, Fault> {
        let mut counted = Counted::new(limit);
        for topic in &self.topics {
            self.read_topic(topic, table, &mut counted, progress)?;
        }
        Ok(counted)
    }

    /// Finds the records that have a read event with one of these message ids.
    pub fn senders(&self, ids: &HashSet<Uuid>) -> Result<HashMap<Uuid, Vec<(Partition, Offset)>>, Fault> {
        let mut found: HashMap<Uuid, Vec<(Partition, Offset)>> = HashMap::new();
        for topic in self.topics.iter().filter(|t| t.output == OutputTopic::Read) {
            // The callback never stops the scan.
            let _ = topic
                .scanner
                .read(&ranges(topic)?, |record| {
                    let source = record.headers().filter(|(name, _)| *name == b"source").last();
                    let place = source.and_then(|(_, value)| source_place(value?, &self.prefix));
                    let named = record.value().and_then(|v| serde_json::from_slice::<Named>(v).ok());
                    if let (Some(place), Some(named)) = (place, named)
                        && let Ok(parsed) = MessageId::parse(&named.message_id)
                        && ids.contains(&parsed.id.to_uuid())
                    {
                        let places = found.entry(parsed.id.to_uuid()).or_default();
                        if !places.contains(&place) {
                            places.push(place);
                        }
                    }
                    ControlFlow::Continue(())
                })
                .map_err(|e| Fault::Scan(e.to_string()))?;
        }
        Ok(found)
    }

    fn read_topic(
        &self,
        topic: &Topic,
        table: &mut Table,
        counted: &mut Counted,
        progress: &Progress,
    ) -> Result<(), Fault> {
        let ranges = ranges(topic)?;
        let index = topic.output.index();
        if let Some(cut) = counted.cut.partitions.get_mut(index)
            && ranges.iter().any(|range| range.from.0 > 0)
        {
            *cut = ranges.iter().map(|range| range.from.0 > 0).collect();
        }
        let mut seen = 0_u64;
        // The callback never stops the scan.
        let _ = topic
            .scanner
            .read(&ranges, |record| {
                seen += 1;
                if seen.is_multiple_of(1_000) {
                    progress.advance(1_000);
                }
                self.note(topic, record, table, counted);
                ControlFlow::Continue(())
            })
            .map_err(|e| Fault::Scan(e.to_string()))?;
        progress.advance(seen % 1_000);
        Ok(())
    }

    fn note(&self, topic: &Topic, record: &NativeRecord<'_>, table: &mut Table, counted: &mut Counted) {
        let (mut source, mut reason, mut digest) = (None, None, None);
        for (name, value) in record.headers() {
            match name {
                b"source" => source = value,
                b"dlq-reason" => reason = value,
                b"dlq-value-sha256" => digest = value,
                _ => {}
            }
        }
        let Some((partition, offset)) = source.and_then(|source| source_place(source, &self.prefix)) else {
            counted.foreign += 1;
            return;
        };
        let index = topic.output.index();
        if counted.cut.partitions.get(index).is_some_and(|cut| !cut.is_empty()) {
            counted.cut.first.entry((index, partition.0, record.partition().0)).or_insert(offset.0);
        }
        let (key, value) = (record.key(), record.value());
        let (hash, reason) = if topic.output == OutputTopic::DeadLetter {
            let stands_for = digest.filter(|_| value.is_none());
            let reason = reason.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
            (hash::message(key, stands_for.or(value)), reason)
        } else {
            (hash::message(key, value), None)
        };
        match table.note_output(partition, offset, topic.output, hash, reason) {
            Placed::Outside => {}
            Placed::Nowhere => {
                let what = format!("{}, but the log has no record there", judge::an_output(topic.output));
                counted.nowhere.push(partition, offset, what);
            }
            Placed::Former => counted.former += 1,
            Placed::Here => {
                if let Some(count) = counted.outputs.get_mut(index) {
                    *count += 1;
                }
                if topic.output == OutputTopic::Read
                    && let Some(Ok(money)) = value.map(serde_json::from_slice::<Money<'_>>)
                    && let Ok(amount) = Amount::parse(money.amount.get())
                {
                    counted
                        .sums
                        .add(&money.currency, i128::try_from(amount.millionths()).unwrap_or_default());
                }
            }
        }
    }
}

/// Ranges of a topic that still exist, up to the recorded ends.
fn ranges(topic: &Topic) -> Result<Vec<ScanRange>, Fault> {
    let partitions: Vec<Partition> = topic.ends.iter().map(|(partition, _)| *partition).collect();
    let bounds = topic.scanner.bounds(&partitions).map_err(|e| Fault::Scan(e.to_string()))?;
    let ends = topic.ends.iter().zip(bounds);
    Ok(ends
        .map(|((partition, to), bounds)| ScanRange { partition: *partition, from: bounds.start, to: *to })
        .collect())
}

/// Parses partition and offset of a `source` of this topic.
pub(crate) fn source_place(source: &[u8], prefix: &str) -> Option<(Partition, Offset)> {
    let mut parts = std::str::from_utf8(source).ok()?.split('/');
    let (topic, partition, offset) = (parts.next()?, parts.next()?, parts.next()?);
    if topic != prefix || parts.next().is_some() {
        return None;
    }
    Some((Partition(partition.parse().ok()?), Offset(offset.parse().ok()?)))
}
