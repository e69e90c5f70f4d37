//! Which dead letters are meant.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::letter::{Letter, Place};
use crate::cursor::LogBounds;
use crate::kafka::scan::{ScanError, ScanRange, Scanner};
use crate::record::{NextOffset, Partition, TimestampMs};
use crate::wire::Reason;

/// So many letters can be named one by one.
pub const PLACES_MAX: usize = 1_000;

/// A choice of dead letters: all that is set has to hold, an empty list holds for everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Choice {
    /// For one of these reasons.
    pub reasons: Vec<Reason>,
    /// Records of one of these partitions of the input topic.
    pub partitions: Vec<Partition>,
    /// Dead-lettered at this time or later.
    pub since: Option<TimestampMs>,
    /// Dead-lettered before this time.
    pub until: Option<TimestampMs>,
    /// These alone.
    pub places: BTreeSet<Place>,
}

/// What has to be read of the dead-letter topic, as far as it goes now.
#[derive(Debug, Default)]
pub struct Ranges {
    /// One after the other; a partition occurs once in each.
    pub waves: Vec<Vec<ScanRange>>,
    /// Offsets in all of them.
    pub offsets: u64,
}

fn time(at: TimestampMs) -> String {
    jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| at.0.to_string(), |t| format!("{t:.3}"))
}

/// In words, for the audit.
impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |items: Vec<String>| items.join(", ");
        let mut words = Vec::new();
        if !self.reasons.is_empty() {
            words.push(format!("reason {}", join(self.reasons.iter().map(ToString::to_string).collect())));
        }
        if !self.partitions.is_empty() {
            let partitions = self.partitions.iter().map(ToString::to_string).collect();
            words.push(format!("partition {}", join(partitions)));
        }
        words.extend(self.since.map(|at| format!("since {}", time(at))));
        words.extend(self.until.map(|at| format!("until {}", time(at))));
        if !self.places.is_empty() {
            words.push(format!("at {}", join(self.places.iter().map(ToString::to_string).collect())));
        }
        if words.is_empty() { f.write_str("all") } else { f.write_str(&words.join("; ")) }
    }
}

impl Choice {
    /// Whether nothing narrows it down.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// Whether this letter is meant.
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

    /// What to read to find them. Letters that come later are not among it: a replay does not run after its
    /// own failures.
    ///
    /// # Errors
    /// When the broker does not answer, or a letter is named that the topic does not hold.
    pub fn ranges(&self, scanner: &Scanner, partitions: &[Partition]) -> Result<Ranges, RangesError> {
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
        Ok(Ranges::of(vec![wave]))
    }

    fn named(&self, topic: &str, bounds: &BTreeMap<Partition, LogBounds>) -> Result<Ranges, RangesError> {
        let mut waves: Vec<Vec<ScanRange>> = Vec::new();
        let mut depths: BTreeMap<Partition, usize> = BTreeMap::new();
        for place in &self.places {
            let (from, to) = (NextOffset(place.offset.0), place.offset.next());
            if !bounds.get(&place.partition).is_some_and(|b| b.start <= from && to <= b.end) {
                return Err(RangesError::Absent { topic: topic.to_owned(), place: *place });
            }
            let depth = depths.entry(place.partition).or_default();
            let range = ScanRange { partition: place.partition, from, to };
            match waves.get_mut(*depth) {
                Some(wave) => wave.push(range),
                None => waves.push(vec![range]),
            }
            *depth += 1;
        }
        Ok(Ranges::of(waves))
    }
}

/// Why it is not known what to read.
#[derive(Debug, thiserror::Error)]
pub enum RangesError {
    /// The broker did not answer.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// A letter was named that is not there.
    #[error("{topic} holds no record at {place}")]
    Absent {
        /// The dead-letter topic.
        topic: String,
        /// What was named.
        place: Place,
    },
}

impl Ranges {
    fn of(waves: Vec<Vec<ScanRange>>) -> Self {
        let offsets = waves.iter().flatten().map(|r| (r.to.0 - r.from.0).unsigned_abs()).sum();
        Self { waves, offsets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Offset;

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
        let any = Choice::default();
        assert!(any.is_everything() && any.has(&letter));
        let cases = [
            (Choice { reasons: vec![Reason::TooLarge, Reason::EmptyValue], ..Choice::default() }, true),
            (Choice { reasons: vec![Reason::TooLarge], ..Choice::default() }, false),
            (Choice { partitions: vec![Partition(4)], ..Choice::default() }, true),
            (Choice { partitions: vec![Partition(5)], ..Choice::default() }, false),
            (Choice { since: Some(TimestampMs(100)), ..Choice::default() }, true),
            (Choice { since: Some(TimestampMs(101)), ..Choice::default() }, false),
            (Choice { until: Some(TimestampMs(101)), ..Choice::default() }, true),
            (Choice { until: Some(TimestampMs(100)), ..Choice::default() }, false),
            (Choice { places: [place(0, 7)].into(), ..Choice::default() }, true),
            (Choice { places: [place(1, 7)].into(), ..Choice::default() }, false),
            (
                Choice {
                    reasons: vec![Reason::EmptyValue],
                    since: Some(TimestampMs(101)),
                    ..Choice::default()
                },
                false,
            ),
        ];
        for (choice, expected) in cases {
            assert_eq!(choice.has(&letter), expected, "{choice}");
        }
    }

    #[test]
    fn what_is_no_dead_letter_has_no_reason_and_no_partition() {
        let foreign = Letter::read(place(0, 7), None, None, None, []);
        assert!(Choice::default().has(&foreign));
        assert!(!Choice { reasons: Reason::ALL.to_vec(), ..Choice::default() }.has(&foreign));
        assert!(!Choice { since: Some(TimestampMs(0)), ..Choice::default() }.has(&foreign));
    }

    #[test]
    fn named_letters_are_read_one_by_one_and_must_be_there() {
        let bounds = [0, 1].map(|p| (Partition(p), LogBounds { start: NextOffset(5), end: NextOffset(50) }));
        let bounds = BTreeMap::from(bounds);
        let choice = Choice { places: [place(0, 5), place(0, 49), place(1, 7)].into(), ..Choice::default() };
        let ranges = choice.named("dlq", &bounds).unwrap();
        assert_eq!((ranges.waves.len(), ranges.offsets), (2, 3));
        for absent in [place(0, 4), place(0, 50), place(2, 7)] {
            let choice = Choice { places: [absent].into(), ..Choice::default() };
            let error = choice.named("dlq", &bounds).unwrap_err();
            assert_eq!(error.to_string(), format!("dlq holds no record at {absent}"));
        }
    }

    #[test]
    fn a_choice_is_told_in_words() {
        assert_eq!(Choice::default().to_string(), "all");
        let choice = Choice {
            reasons: vec![Reason::EmptyValue],
            partitions: vec![Partition(1), Partition(2)],
            since: Some(TimestampMs(0)),
            ..Choice::default()
        };
        assert_eq!(choice.to_string(), "reason empty_value; partition 1, 2; since 1970-01-01T00:00:00.000Z");
    }
}
