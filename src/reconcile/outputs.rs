//! Last pass over a slice: every event and dead letter whose `source` is a record of the slice.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use indicatif::ProgressBar;
use serde::Deserialize;
use uuid::Uuid;

use super::report::Report;
use super::table::{Part, Place, Placed, Table};
use super::{Fault, hash};
use crate::config::KafkaSettings;
use crate::domain::payment::MessageId;
use crate::domain::publication::Source;
use crate::domain::record::{NextOffset, Offset, Partition};
use crate::domain::wire::Reason;
use crate::error::CommandError;
use crate::kafka::last_stable::stable_high_watermarks;
use crate::kafka::librdkafka::NativeRecord;
use crate::kafka::scan::{ScanError, ScanRange, Scanner};

/// An output topic and the ends up to which it is read.
pub(crate) struct Topic {
    /// Reader of the topic.
    pub scanner: Scanner,
    /// The partitions.
    pub partitions: Vec<Partition>,
    /// End of each partition when the topic was opened.
    ends: Vec<NextOffset>,
}

impl Topic {
    /// Determines the ends, which cover everything committed before.
    ///
    /// # Errors
    /// A description, if the topic cannot be read.
    pub fn open(kafka: &KafkaSettings, name: &str) -> Result<Self, String> {
        let scanner = Scanner::new(kafka, name).map_err(|e| e.to_string())?;
        let (_, partitions) = scanner.describe().map_err(|e| e.to_string())?;
        let ends = stable_high_watermarks(kafka, name, &partitions).map_err(|e| e.to_string())?;
        Ok(Self { scanner, partitions, ends })
    }

    /// Ranges that still exist, up to the ends.
    pub fn ranges(&self) -> Result<Vec<ScanRange>, ScanError> {
        let bounds = self.scanner.bounds(&self.partitions)?;
        let partitions = self.partitions.iter().zip(bounds).zip(&self.ends);
        Ok(partitions
            .map(|((partition, bounds), to)| ScanRange { partition: *partition, from: bounds.start, to: *to })
            .collect())
    }
}

/// The output topics.
pub(super) struct Outputs {
    topics: Vec<(Part, Topic)>,
    topic_id: Uuid,
}

/// Partitions of an output topic. Those that no longer start at offset 0 have the lowest source offset by
/// partition of the input topic.
type Firsts = Vec<Option<HashMap<Partition, Offset>>>;

/// Outputs that may have been removed by retention.
#[derive(Default)]
pub(super) struct CutOff(Vec<(Part, Firsts)>);

impl CutOff {
    /// Whether the output of this record may have been removed by retention. Each output partition holds the
    /// outputs of an input partition in offset order, and retention removes the oldest first.
    pub fn has(&self, part: Part, (partition, offset): Place, key: Option<u32>) -> bool {
        let Some((_, firsts)) = self.0.iter().find(|(of, _)| *of == part) else { return false };
        let may_be = |firsts: &Option<HashMap<Partition, Offset>>| {
            firsts.as_ref().is_some_and(|firsts| firsts.get(&partition).is_none_or(|first| offset < *first))
        };
        match key {
            Some(key) => {
                (key as usize).checked_rem(firsts.len()).and_then(|at| firsts.get(at)).is_some_and(may_be)
            }
            None => firsts.iter().any(may_be),
        }
    }
}

/// What the headers of an output say.
pub(crate) struct Label<'r> {
    /// The record of the input topic that it belongs to.
    pub place: Option<Place>,
    /// Reason of a dead letter.
    pub reason: Option<Reason>,
    /// Hash of a key that was left out.
    key_digest: Option<&'r [u8]>,
    /// Hash of a value that was left out.
    value_digest: Option<&'r [u8]>,
}

impl<'r> Label<'r> {
    /// Reads the headers; `topic_id` is the id of the input topic.
    pub fn of(record: &NativeRecord<'r>, topic_id: Uuid) -> Self {
        let mut label = Self { place: None, reason: None, key_digest: None, value_digest: None };
        for (name, value) in record.headers() {
            match name {
                b"source" => {
                    let source = value.and_then(Source::parse);
                    let is_ours = |s: &Source| s.topic_id_prefix == topic_id.as_fields().0;
                    label.place = source.filter(is_ours).map(|s| (s.partition, s.offset));
                }
                b"dlq-reason" => {
                    label.reason = value.and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
                }
                b"dlq-key-sha256" => label.key_digest = value,
                b"dlq-value-sha256" => label.value_digest = value,
                _ => {}
            }
        }
        label
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    message_id: String,
}

impl Outputs {
    /// Determines the ends of the outputs. Call it after reading the cursors: outputs covered by the group's
    /// offset are then below these ends.
    pub fn open(kafka: &KafkaSettings, topic_id: Uuid) -> Result<Self, CommandError> {
        let topics = [
            (Part::Read, &kafka.read_topic),
            (Part::Email, &kafka.email_topic),
            (Part::DeadLetter, &kafka.dead_letter_topic),
        ];
        let open = |(part, name): (Part, &String)| Ok((part, Topic::open(kafka, name)?));
        let topics: Result<_, String> = topics.into_iter().map(open).collect();
        let topics = topics.map_err(|e| CommandError::failed(format!("an output: {e}")))?;
        Ok(Self { topics, topic_id })
    }

    /// Maximum number of records in the outputs.
    pub fn len(&self) -> u64 {
        self.topics.iter().flat_map(|(_, topic)| &topic.ends).map(|end| end.0.unsigned_abs()).sum()
    }

    /// Counts every output of the table's records.
    pub fn read(
        &self,
        table: &mut Table,
        report: &mut Report,
        progress: &ProgressBar,
    ) -> Result<CutOff, Fault> {
        let mut cut_off = CutOff::default();
        let mut foreign = 0;
        for (part, topic) in &self.topics {
            let ranges = topic.ranges()?;
            let mut firsts: Firsts =
                ranges.iter().map(|range| (range.from.0 > 0).then(HashMap::new)).collect();
            let mut seen = 0_u64;
            // The callback never stops the scan.
            let _ = topic.scanner.read(&ranges, |record| {
                seen += 1;
                if seen.is_multiple_of(1_000) {
                    progress.inc(1_000);
                }
                let label = Label::of(record, self.topic_id);
                let Some((partition, offset)) = label.place else {
                    foreign += 1;
                    return ControlFlow::Continue(());
                };
                let at = usize::try_from(record.partition().0).unwrap_or(usize::MAX);
                if let Some(Some(firsts)) = firsts.get_mut(at) {
                    firsts.entry(partition).or_insert(offset);
                }
                let value = record.value();
                let (hash, reason) = match part {
                    Part::DeadLetter => {
                        let (key, value) = (record.key().or(label.key_digest), value.or(label.value_digest));
                        (hash::message(key, value), label.reason)
                    }
                    _ => (hash::message(record.key(), value), None),
                };
                match table.note((partition, offset), &[(*part, hash)], reason) {
                    Placed::Outside => {}
                    Placed::Nowhere => {
                        let what = format!("{} {part}, but the log has no record there", part.article());
                        report.findings.push((partition, offset), what);
                    }
                    Placed::Former => report.of_lost_records += 1,
                    Placed::Here => report.note_output(*part, value),
                }
                ControlFlow::Continue(())
            })?;
            progress.inc(seen % 1_000);
            cut_off.0.push((*part, firsts));
        }
        if let Some(outputs) = &mut report.outputs {
            // Every slice reads all outputs and counts the same foreign ones.
            outputs.foreign = outputs.foreign.max(foreign);
        }
        Ok(cut_off)
    }

    /// Finds the records that have a read event with one of these message ids.
    pub fn senders(&self, ids: &HashSet<Uuid>) -> Result<HashMap<Uuid, Vec<Place>>, Fault> {
        let mut found: HashMap<Uuid, Vec<Place>> = HashMap::new();
        for (_, topic) in self.topics.iter().filter(|(part, _)| *part == Part::Read) {
            // The callback never stops the scan.
            let _ = topic.scanner.read(&topic.ranges()?, |record| {
                let named = record.value().and_then(|v| serde_json::from_slice::<Named>(v).ok());
                if let (Some(place), Some(named)) = (Label::of(record, self.topic_id).place, named)
                    && let Ok(parsed) = MessageId::parse(&named.message_id)
                    && ids.contains(&parsed.id.to_uuid())
                {
                    let places = found.entry(parsed.id.to_uuid()).or_default();
                    if !places.contains(&place) {
                        places.push(place);
                    }
                }
                ControlFlow::Continue(())
            })?;
        }
        Ok(found)
    }
}
