//! Selection of dead letters.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::DlqError;
use super::letter::{Letter, Place};
use crate::domain::cursor::LogBounds;
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::domain::wire::Reason;
use crate::kafka::scan::{ScanRange, Scanner};

/// Maximum number of dead letters that can be named one by one.
pub const PLACES_MAX: usize = 1_000;

/// Filter of dead letters: every condition must hold; an empty list matches everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    /// Dead-letter reasons.
    pub reasons: Vec<Reason>,
    /// Partitions of the input topic that hold the original records.
    pub partitions: Vec<Partition>,
    /// Dead-lettered at this time or later.
    pub since: Option<TimestampMs>,
    /// Dead-lettered before this time.
    pub until: Option<TimestampMs>,
    /// Places in the dead-letter topic.
    pub places: BTreeSet<Place>,
}

/// Ranges of the dead-letter topic to read, up to its current end: groups that are read one after the other;
/// each partition occurs at most once in a group.
#[derive(Debug, Default)]
pub struct Ranges(pub Vec<Vec<ScanRange>>);

impl Ranges {
    /// Total number of offsets.
    pub fn offsets(&self) -> u64 {
        self.0.iter().flatten().map(|range| (range.to.0 - range.from.0).unsigned_abs()).sum()
    }
}

fn join(items: impl IntoIterator<Item: ToString>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

// In words, for the audit table.
impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if !self.reasons.is_empty() {
            words.push(format!("reason {}", join(&self.reasons)));
        }
        if !self.partitions.is_empty() {
            words.push(format!("partition {}", join(&self.partitions)));
        }
        words.extend(self.since.map(|at| format!("since {at}")));
        words.extend(self.until.map(|at| format!("until {at}")));
        if !self.places.is_empty() {
            words.push(format!("at {}", join(&self.places)));
        }
        if words.is_empty() { f.write_str("all") } else { f.write_str(&words.join("; ")) }
    }
}

impl Filter {
    /// Whether the filter has no conditions.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// Whether this dead letter matches.
    pub fn has(&self, letter: &Letter<'_>) -> bool {
        let label = letter.label.as_ref();
        let reason = || label.and_then(|l| l.reason).is_some_and(|reason| self.reasons.contains(&reason));
        let partition = || label.is_some_and(|l| self.partitions.contains(&l.partition));
        (self.reasons.is_empty() || reason())
            && (self.partitions.is_empty() || partition())
            && (self.places.is_empty() || self.places.contains(&letter.place))
            && self.since.is_none_or(|since| letter.lettered_at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| letter.lettered_at.is_some_and(|at| at < until))
    }

    /// Determines the ranges to read. Dead letters that arrive later are excluded, so that a replay does not
    /// pick up its own failures.
    ///
    /// # Errors
    /// If the broker does not answer, or the topic has no record at a named place.
    pub fn ranges(&self, scanner: &Scanner, partitions: &[Partition]) -> Result<Ranges, DlqError> {
        let bounds = scanner.bounds(partitions)?;
        let bounds: BTreeMap<Partition, LogBounds> = partitions.iter().copied().zip(bounds).collect();
        if !self.places.is_empty() {
            return self.named(scanner.topic(), &bounds);
        }
        let since = match self.since {
            Some(since) => scanner.positions_at(partitions, since)?,
            None => partitions.iter().map(|p| bounds.get(p).map(|b| b.start)).collect(),
        };
        let wave: Vec<ScanRange> = partitions
            .iter()
            .zip(since)
            .filter_map(|(partition, from)| {
                let bounds = bounds.get(partition)?;
                Some(ScanRange { partition: *partition, from: from?.max(bounds.start), to: bounds.end })
            })
            .filter(|range| !range.is_empty())
            .collect();
        Ok(Ranges(vec![wave]))
    }

    fn named(&self, topic: &str, bounds: &BTreeMap<Partition, LogBounds>) -> Result<Ranges, DlqError> {
        let mut waves: Vec<Vec<ScanRange>> = Vec::new();
        let mut depths: BTreeMap<Partition, usize> = BTreeMap::new();
        for place in &self.places {
            let (from, to) = (NextOffset(place.offset.0), place.offset.next());
            if !bounds.get(&place.partition).is_some_and(|b| b.start <= from && to <= b.end) {
                return Err(DlqError::Absent { topic: topic.to_owned(), place: *place });
            }
            let depth = depths.entry(place.partition).or_default();
            let range = ScanRange { partition: place.partition, from, to };
            match waves.get_mut(*depth) {
                Some(wave) => wave.push(range),
                None => waves.push(vec![range]),
            }
            *depth += 1;
        }
        Ok(Ranges(waves))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::Offset;

    fn place(partition: i32, offset: i64) -> Place {
        Place { partition: Partition(partition), offset: Offset(offset) }
    }

    fn letter(reason: &'static str, partition: &'static str, at: i64) -> Letter<'static> {
        let headers: [(&[u8], Option<&[u8]>); 6] = [
            (b"dlq-reason", Some(reason.as_bytes())),
            (b"dlq-detail", Some(b"x")),
            (b"dlq-topic", Some(b"input")),
            (b"dlq-partition", Some(partition.as_bytes())),
            (b"dlq-offset", Some(b"1")),
            (b"dlq-timestamp", Some(b"1")),
        ];
        Letter::read(place(0, 7), Some(TimestampMs(at)), None, None, headers)
    }

    #[test]
    fn all_that_is_set_has_to_hold() {
        let letter = letter("empty_value", "4", 100);
        let any = Filter::default();
        assert!(any.is_everything() && any.has(&letter));
        let cases = [
            (Filter { reasons: vec![Reason::TooLarge, Reason::EmptyValue], ..Filter::default() }, true),
            (Filter { reasons: vec![Reason::TooLarge], ..Filter::default() }, false),
            (Filter { partitions: vec![Partition(4)], ..Filter::default() }, true),
            (Filter { partitions: vec![Partition(5)], ..Filter::default() }, false),
            (Filter { since: Some(TimestampMs(100)), ..Filter::default() }, true),
            (Filter { since: Some(TimestampMs(101)), ..Filter::default() }, false),
            (Filter { until: Some(TimestampMs(101)), ..Filter::default() }, true),
            (Filter { until: Some(TimestampMs(100)), ..Filter::default() }, false),
            (Filter { places: [place(0, 7)].into(), ..Filter::default() }, true),
            (Filter { places: [place(1, 7)].into(), ..Filter::default() }, false),
            (
                Filter {
                    reasons: vec![Reason::EmptyValue],
                    since: Some(TimestampMs(101)),
                    ..Filter::default()
                },
                false,
            ),
        ];
        for (filter, expected) in cases {
            assert_eq!(filter.has(&letter), expected, "{filter}");
        }
    }

    #[test]
    fn what_is_no_dead_letter_has_no_reason_and_no_partition() {
        let foreign = Letter::read(place(0, 7), None, None, None, []);
        assert!(Filter::default().has(&foreign));
        assert!(!Filter { reasons: Reason::ALL.to_vec(), ..Filter::default() }.has(&foreign));
        assert!(!Filter { since: Some(TimestampMs(0)), ..Filter::default() }.has(&foreign));
    }

    #[test]
    fn named_letters_are_read_one_by_one_and_must_be_there() {
        let bounds = [0, 1].map(|p| (Partition(p), LogBounds { start: NextOffset(5), end: NextOffset(50) }));
        let bounds = BTreeMap::from(bounds);
        let filter = Filter { places: [place(0, 5), place(0, 49), place(1, 7)].into(), ..Filter::default() };
        let ranges = filter.named("dlq", &bounds).unwrap();
        assert_eq!((ranges.0.len(), ranges.offsets()), (2, 3));
        for absent in [place(0, 4), place(0, 50), place(2, 7)] {
            let filter = Filter { places: [absent].into(), ..Filter::default() };
            let error = filter.named("dlq", &bounds).unwrap_err();
            assert_eq!(error.to_string(), format!("dlq holds no record at {absent}"));
        }
    }

    #[test]
    fn a_filter_is_written_in_words() {
        assert_eq!(Filter::default().to_string(), "all");
        let filter = Filter {
            reasons: vec![Reason::EmptyValue],
            partitions: vec![Partition(1), Partition(2)],
            since: Some(TimestampMs(0)),
            ..Filter::default()
        };
        assert_eq!(filter.to_string(), "reason empty_value; partition 1, 2; since 1970-01-01T00:00:00.000Z");
    }
}
