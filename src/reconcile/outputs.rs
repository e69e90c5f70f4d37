//! Last pass over a slice: every event and dead letter whose `source` is a record of the slice.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use indicatif::ProgressBar;
use serde::Deserialize;
use uuid::Uuid;

use super::report::Report;
use super::table::{Entry, Part, Place, Placed, Table};
use super::{Fault, hash};
use crate::config::KafkaSettings;
use crate::domain::payment::MessageId;
use crate::domain::publication::Source;
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::domain::wire::Reason;
use crate::error::CommandError;
use crate::kafka::last_stable::stable_high_watermarks;
use crate::kafka::librdkafka::NativeRecord;
use crate::kafka::output_scan::{CLOCK_SKEW_MS, RECORD_AHEAD_MAX_MS};
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
    /// Whether timestamps of the input's records are limited by [`TIMESTAMP_AHEAD`].
    has_times: bool,
    indexes: RefCell<HashMap<Part, Index>>,
}

/// The oldest of what is left of an output partition that no longer starts at offset 0.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Oldest {
    /// Timestamp of the first output; `None` if there is no output, or it has none.
    at: Option<TimestampMs>,
    /// The first source offset by partition of the input topic.
    firsts: HashMap<Partition, Offset>,
}

/// Partitions of an output topic; `None` if nothing was removed.
type Firsts = Vec<Option<Oldest>>;

/// Outputs that may have been removed by retention.
#[derive(Default)]
pub(super) struct CutOff {
    topics: Vec<(Part, Firsts)>,
    /// Whether the timestamps of records tell how old their outputs are.
    has_times: bool,
}

/// How much later than the oldest output a removed one's record may be: two daemons may have sent them.
const LATER_MAX_MS: i64 = RECORD_AHEAD_MAX_MS + CLOCK_SKEW_MS;

/// Number of blocks of an output topic, beside the last one of each partition. A block is remembered with 24 bytes for
/// each input partition that it has outputs of.
const BLOCKS_MAX: i64 = 4_096;
const BLOCK_OFFSETS_MIN: i64 = 1_000;
/// Upper limit of the memory of an output topic's blocks, in entries of 24 bytes.
const BLOCK_ENTRIES_MAX: i64 = 1_000_000;

/// Which records the outputs of a block belong to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Block {
    /// Timestamp of the first output.
    at: Option<TimestampMs>,
    /// Lowest and highest offset by partition of the input topic.
    sources: Vec<(Partition, Offset, Offset)>,
}

impl Block {
    fn add(&mut self, at: Option<TimestampMs>, (partition, offset): Place) {
        if self.sources.is_empty() {
            self.at = at;
        }
        let at = self.sources.partition_point(|(other, ..)| *other < partition);
        match self.sources.get_mut(at).filter(|(other, ..)| *other == partition) {
            Some((_, low, high)) => (*low, *high) = ((*low).min(offset), (*high).max(offset)),
            None => self.sources.insert(at, (partition, offset, offset)),
        }
    }

    fn meets(&self, ranges: &[ScanRange]) -> bool {
        let meets = |range: &ScanRange| {
            let at = self.sources.binary_search_by_key(&range.partition, |(partition, ..)| *partition);
            at.ok()
                .and_then(|at| self.sources.get(at))
                .is_some_and(|(_, low, high)| low.0 < range.to.0 && high.0 >= range.from.0)
        };
        ranges.iter().any(meets)
    }
}

/// Where the outputs of each record are in a topic, from its first complete reading: later slices read only what they
/// need of it.
#[derive(Clone, Debug, Default)]
struct Index {
    /// What was read.
    read: Vec<ScanRange>,
    /// What is left of it.
    left: Vec<ScanRange>,
    block_offsets: i64,
    /// By partition of the topic, in the order of offsets.
    blocks: Vec<Vec<Block>>,
    foreign: u64,
}

impl Index {
    /// An index of these ranges, with the outputs of this number of input partitions.
    fn new(ranges: Vec<ScanRange>, sources: usize) -> Self {
        let offsets: i64 = ranges.iter().map(|range| range.to.0.saturating_sub(range.from.0)).sum();
        let blocks_max =
            (BLOCK_ENTRIES_MAX / i64::try_from(sources).unwrap_or(i64::MAX).max(1)).clamp(1, BLOCKS_MAX);
        Self {
            block_offsets: (offsets / blocks_max).max(BLOCK_OFFSETS_MIN),
            blocks: vec![Vec::new(); ranges.len()],
            left: ranges.clone(),
            read: ranges,
            foreign: 0,
        }
    }

    /// Adds an output: its own position and timestamp, and the position of its record.
    fn add(&mut self, own: Place, at: Option<TimestampMs>, source: Option<Place>) {
        let Some(source) = source else {
            self.foreign += 1;
            return;
        };
        let index = usize::try_from(own.0.0).unwrap_or(usize::MAX);
        let (Some(range), Some(blocks)) = (self.read.get(index), self.blocks.get_mut(index)) else { return };
        let number = usize::try_from((own.1.0 - range.from.0) / self.block_offsets).unwrap_or_default();
        if blocks.len() <= number {
            blocks.resize_with(number + 1, Block::default);
        }
        if let Some(block) = blocks.get_mut(number) {
            block.add(at, source);
        }
    }

    /// Takes note of what retention has removed since. False if the topic was changed otherwise.
    fn follow(&mut self, all: Vec<ScanRange>) -> bool {
        let follows = |(new, old): (&ScanRange, &ScanRange)| new.to == old.to && new.from >= old.from;
        let is_same = all.len() == self.left.len() && all.iter().zip(&self.left).all(follows);
        if is_same {
            self.left = all;
        }
        is_same
    }

    /// The oldest outputs that are left, apart from those that share a block with removed ones.
    fn firsts(&self) -> Firsts {
        let first = |((left, read), blocks): ((&ScanRange, &ScanRange), &Vec<Block>)| {
            if left.from.0 == 0 {
                return None;
            }
            let removed = (left.from.0 - read.from.0 + self.block_offsets - 1) / self.block_offsets;
            let mut oldest = Oldest::default();
            for block in blocks.iter().skip(usize::try_from(removed).unwrap_or_default()) {
                oldest.at = oldest.at.or(block.at);
                for (partition, low, _) in &block.sources {
                    oldest.firsts.entry(*partition).or_insert(*low);
                }
            }
            Some(oldest)
        };
        self.left.iter().zip(&self.read).zip(&self.blocks).map(first).collect()
    }

    /// The parts of the topic from the first to the last block with outputs of these records.
    fn needed(&self, records: &[ScanRange]) -> Vec<ScanRange> {
        let needed = |((left, read), blocks): ((&ScanRange, &ScanRange), &Vec<Block>)| {
            let first = blocks.iter().position(|block| block.meets(records))? as i64;
            let last = blocks.iter().rposition(|block| block.meets(records))? as i64;
            let start = |number: i64| NextOffset(read.from.0 + number * self.block_offsets).min(left.to);
            let (from, to) = (start(first).max(left.from), start(last + 1));
            (from < to).then_some(ScanRange { from, to, ..*left })
        };
        self.left.iter().zip(&self.read).zip(&self.blocks).filter_map(needed).collect()
    }
}

impl CutOff {
    /// Whether the output of this record may have been removed by retention. Each output partition holds the
    /// outputs of an input partition in offset order, and retention removes the oldest first. An output is sent after
    /// its record.
    pub fn has(&self, part: Part, entry: &Entry) -> bool {
        let Some((_, firsts)) = self.topics.iter().find(|(of, _)| *of == part) else { return false };
        let (partition, offset) = entry.place;
        let may_be = |oldest: &Option<Oldest>| {
            oldest.as_ref().is_some_and(|oldest| {
                let is_newer = |at: TimestampMs| i64::from(entry.second) * 1_000 > at.0 + LATER_MAX_MS;
                !(self.has_times && oldest.at.is_some_and(is_newer))
                    && oldest.firsts.get(&partition).is_none_or(|first| offset < *first)
            })
        };
        match entry.key {
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
    pub fn open(kafka: &KafkaSettings, topic_id: Uuid, has_times: bool) -> Result<Self, CommandError> {
        let topics = [
            (Part::Read, &kafka.read_topic),
            (Part::Email, &kafka.email_topic),
            (Part::DeadLetter, &kafka.dead_letter_topic),
        ];
        let open = |(part, name): (Part, &String)| Ok((part, Topic::open(kafka, name)?));
        let topics: Result<_, String> = topics.into_iter().map(open).collect();
        let topics = topics.map_err(|e| CommandError::failed(format!("an output: {e}")))?;
        Ok(Self { topics, topic_id, has_times, indexes: RefCell::default() })
    }

    /// Counts every output of the table's records.
    pub fn read(
        &self,
        table: &mut Table,
        report: &mut Report,
        progress: &ProgressBar,
    ) -> Result<CutOff, Fault> {
        let mut cut_off = CutOff { has_times: self.has_times, ..CutOff::default() };
        let mut foreign = 0;
        let mut indexes = self.indexes.borrow_mut();
        for (part, topic) in &self.topics {
            let all = topic.ranges()?;
            let mut known = indexes.remove(part);
            if !known.as_mut().is_some_and(|known| known.follow(all.clone())) {
                known = None;
            }
            let mut index = known.is_none().then(|| Index::new(all.clone(), table.ranges().len()));
            let ranges = known.as_ref().map_or(all, |known| known.needed(table.ranges()));
            let offsets: i64 = ranges.iter().map(|range| range.to.0.saturating_sub(range.from.0)).sum();
            progress.inc_length(offsets.unsigned_abs());
            let mut seen = 0_u64;
            // The callback never stops the scan.
            let _ = topic.scanner.read(&ranges, |record| {
                seen += 1;
                if seen.is_multiple_of(1_000) {
                    progress.inc(1_000);
                }
                let label = Label::of(record, self.topic_id);
                if let Some(index) = &mut index {
                    index.add((record.partition(), record.offset()), record.timestamp(), label.place);
                }
                let Some((partition, offset)) = label.place else { return ControlFlow::Continue(()) };
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
            if let Some(index) = known.or(index) {
                foreign += index.foreign;
                cut_off.topics.push((*part, index.firsts()));
                indexes.insert(*part, index);
            }
        }
        if let Some(outputs) = &mut report.outputs {
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

#[cfg(test)]
mod tests {
    use super::super::table::{Claim, Hashes, Notes};
    use super::*;

    fn range(partition: i32, from: i64, to: i64) -> ScanRange {
        ScanRange { partition: Partition(partition), from: NextOffset(from), to: NextOffset(to) }
    }

    #[test]
    fn a_later_slice_reads_every_block_with_an_output_of_its_records_and_few_others() {
        // GIVEN 20 blocks of one output partition with the outputs of two input partitions in their order, another
        // partition, and one output that was sent again much later
        let mut index = Index::new(vec![range(0, 500, 20_500), range(1, 0, 5_000)], 100);
        assert_eq!(index.block_offsets, BLOCK_OFFSETS_MIN);
        for offset in 0..20_000 {
            let source = (Partition((offset % 2) as i32), Offset(offset / 2));
            index.add((Partition(0), Offset(500 + offset)), Some(TimestampMs(7 + offset)), Some(source));
        }
        index.add((Partition(1), Offset(4_999)), None, Some((Partition(7), Offset(3))));
        index.add((Partition(1), Offset(0)), None, None);
        let firsts = [(Partition(0), Offset(0)), (Partition(1), Offset(0))].into();
        let oldest = Oldest { at: Some(TimestampMs(7)), firsts };
        assert_eq!((index.foreign, index.firsts()), (1, vec![Some(oldest), None]));

        // THEN a slice reads its blocks
        let needed = |records: &[ScanRange]| index.needed(records);
        assert_eq!(needed(&[range(0, 0, 1), range(1, 0, 1)]), [range(0, 500, 1_500)]);
        assert_eq!(needed(&[range(0, 2_499, 2_501), range(1, 2_000, 2_001)]), [range(0, 4_500, 6_500)]);
        assert_eq!(needed(&[range(1, 9_999, 12_000)]), [range(0, 19_500, 20_500)]);
        assert_eq!(needed(&[range(7, 0, 10)]), [range(1, 4_000, 5_000)]);
        assert_eq!(needed(&[range(7, 4, 10), range(0, 10_000, 10_001)]), []);

        // AND what retention removes meanwhile is known
        assert!(index.follow(vec![range(0, 2_600, 20_500), range(1, 0, 5_000)]));
        let firsts = [(Partition(0), Offset(1_500)), (Partition(1), Offset(1_500))].into();
        assert_eq!(index.firsts(), [Some(Oldest { at: Some(TimestampMs(3_007)), firsts }), None]);
        assert_eq!(index.needed(&[range(0, 0, 1)]), []);
        assert_eq!(index.needed(&[range(0, 1_000, 1_600)]), [range(0, 2_600, 4_500)]);
        assert!(!index.follow(vec![range(0, 2_600, 20_501), range(1, 0, 5_000)]));
        assert!(!index.follow(vec![range(0, 2_600, 20_500)]));
    }

    #[test]
    fn only_what_is_older_than_the_oldest_output_may_have_been_removed() {
        // GIVEN an output partition from which outputs were removed
        let at = 1_000_000 * 1_000;
        let firsts = [(Partition(0), Offset(50))].into();
        let cut_off = CutOff {
            topics: vec![(Part::Read, vec![Some(Oldest { at: Some(TimestampMs(at)), firsts }), None])],
            has_times: true,
        };
        let may_be = |partition, offset, second, key| {
            let place = (Partition(partition), Offset(offset));
            let mut entry = Entry::new(place, Claim::Own, Notes::default(), Hashes::default());
            (entry.second, entry.key) = (second, key);
            cut_off.has(Part::Read, &entry)
        };
        // THEN the outputs of older records may be gone, unless a later one of its partition came before them
        for key in [Some(0), None] {
            assert!(may_be(0, 49, 999_000, key) && may_be(0, 49, 1_004_800, key) && may_be(3, 0, 0, key));
            assert!(!may_be(0, 50, 999_000, key));
            assert!(!may_be(0, 49, 1_004_801, key) && !may_be(3, 0, 1_004_801, key));
        }
        // AND those of another partition, or of another topic, are there
        assert!(!may_be(0, 49, 999_000, Some(1)));
        let entry = Entry::new((Partition(0), Offset(0)), Claim::Own, Notes::default(), Hashes::default());
        assert!(!cut_off.has(Part::Email, &entry));
    }
}
