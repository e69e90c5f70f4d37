//! Counts of dead letters by reason, partition, day and replays, with bounded memory. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::letter::Letter;
use crate::domain::record::{Partition, TimestampMs};
use crate::domain::wire::Reason;

/// Maximum number of distinct groups per property; headers can contain any partition.
pub const GROUPS_MAX: usize = 2_000;
/// Records with at least this many replays are counted together.
pub const REPLAYS_SHOWN_MAX: u32 = 10;

/// Dead letters of one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Group {
    /// Number of dead letters.
    pub letters: u64,
    /// Time of the oldest.
    pub oldest: Option<TimestampMs>,
    /// Time of the newest.
    pub newest: Option<TimestampMs>,
}

impl Group {
    fn add(&mut self, at: Option<TimestampMs>) {
        self.letters += 1;
        if let Some(at) = at {
            self.oldest = Some(self.oldest.map_or(at, |oldest| oldest.min(at)));
            self.newest = Some(self.newest.map_or(at, |newest| newest.max(at)));
        }
    }
}

/// Groups by one property; at most [`GROUPS_MAX`] are counted separately.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Groups<K> {
    groups: BTreeMap<K, Group>,
    /// Dead letters of all other groups.
    pub others: Group,
}

impl<K> Default for Groups<K> {
    fn default() -> Self {
        Self { groups: BTreeMap::new(), others: Group::default() }
    }
}

impl<K: Ord> Groups<K> {
    fn add(&mut self, key: K, at: Option<TimestampMs>) {
        let is_known = self.groups.contains_key(&key);
        if is_known || self.groups.len() < GROUPS_MAX {
            self.groups.entry(key).or_default().add(at);
        } else {
            self.others.add(at);
        }
    }

    /// The groups, ordered by the property.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &Group)> {
        self.groups.iter()
    }
}

/// The day in UTC.
fn day(at: TimestampMs) -> Date {
    let limit = if at.0 < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_millisecond(at.0).unwrap_or(limit).to_zoned(TimeZone::UTC).date()
}

/// The counts of `dlq list`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// All dead letters, including those that no other count covers.
    pub all: Group,
    /// Total bytes of keys and values.
    pub bytes: u64,
    /// By reason; `None` for a reason that this version does not know.
    pub by_reason: Groups<Option<Reason>>,
    /// By partition of the input topic.
    pub by_partition: Groups<Partition>,
    /// By the UTC day on which they were dead-lettered.
    pub by_day: Groups<Date>,
    /// By number of earlier replays, up to [`REPLAYS_SHOWN_MAX`].
    pub by_replays: Groups<u32>,
    /// Records in the topic that the daemon did not write.
    pub not_dead_letters: u64,
    /// Dead letters from a topic other than the configured input topic.
    pub of_other_topics: u64,
}

impl Summary {
    /// Counts a dead letter.
    pub fn add(&mut self, letter: &Letter<'_>, input_topic: &str) {
        let at = letter.lettered_at;
        let Some(label) = &letter.label else {
            self.not_dead_letters += 1;
            return;
        };
        self.all.add(at);
        self.bytes += letter.bytes() as u64;
        self.by_reason.add(label.reason, at);
        self.by_partition.add(label.partition, at);
        if let Some(at) = at {
            self.by_day.add(day(at), Some(at));
        }
        self.by_replays.add(letter.replays.min(REPLAYS_SHOWN_MAX), at);
        if label.topic != input_topic {
            self.of_other_topics += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_knows_its_first_and_its_last() {
        let mut group = Group::default();
        for at in [Some(5), None, Some(3), Some(9)] {
            group.add(at.map(TimestampMs));
        }
        assert_eq!(group, Group { letters: 4, oldest: Some(TimestampMs(3)), newest: Some(TimestampMs(9)) });
    }

    #[test]
    fn more_groups_than_the_bound_are_counted_together() {
        let mut groups = Groups::default();
        for key in 0..GROUPS_MAX + 5 {
            groups.add(key, None);
        }
        groups.add(0, None);
        assert_eq!(groups.iter().count(), GROUPS_MAX);
        assert_eq!(groups.others.letters, 5);
        assert_eq!(groups.iter().next().unwrap().1.letters, 2);
    }

    #[test]
    fn a_day_is_that_of_utc() {
        assert_eq!(day(TimestampMs(86_399_999)).to_string(), "1970-01-01");
        assert_eq!(day(TimestampMs(86_400_000)).to_string(), "1970-01-02");
        assert_eq!(day(TimestampMs(1_709_251_199_999)).to_string(), "2024-02-29");
    }
}
