//! Dead letters counted by reason, partition, day and replays: pure, and bounded whatever the letters say.

use std::collections::BTreeMap;

use super::letter::Letter;
use crate::record::{Partition, TimestampMs};
use crate::wire::Reason;

/// So many groups of one kind are told apart. Headers can claim any partition.
pub const GROUPS_MAX: usize = 2_000;
/// Letters that were replayed so often or more often are counted together.
pub const REPLAYS_SHOWN_MAX: u32 = 10;

/// Letters of one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Group {
    /// How many.
    pub letters: u64,
    /// When the first of them was dead-lettered.
    pub oldest: Option<TimestampMs>,
    /// When the last of them was.
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

/// Groups by one property, the first [`GROUPS_MAX`] of them apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Groups<K> {
    groups: BTreeMap<K, Group>,
    /// Letters of all other groups.
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

    /// The groups, in the order of what they have in common.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &Group)> {
        self.groups.iter()
    }
}

/// A UTC day, by the number of days since 1970-01-01.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Day(pub i64);

impl Day {
    const MS: i64 = 86_400_000;

    fn of(at: TimestampMs) -> Self {
        Self(at.0.div_euclid(Self::MS))
    }
}

impl std::fmt::Display for Day {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0.saturating_mul(Self::MS)) {
            Ok(at) => write!(f, "{}", at.strftime("%Y-%m-%d")),
            Err(_) => write!(f, "day {}", self.0),
        }
    }
}

/// The counts of `dlq list`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// All letters, with those that are counted nowhere else.
    pub all: Group,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// By reason; `None`: one that this version does not know.
    pub by_reason: Groups<Option<Reason>>,
    /// By partition of the input topic.
    pub by_partition: Groups<Partition>,
    /// By the UTC day on which they were dead-lettered.
    pub by_day: Groups<Day>,
    /// By how often they had been replayed, up to [`REPLAYS_SHOWN_MAX`].
    pub by_replays: Groups<u32>,
    /// Records in the topic that no daemon put there.
    pub not_dead_letters: u64,
    /// Letters of another input topic than the settings name.
    pub of_other_topics: u64,
}

impl Tally {
    /// Counts one more.
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
            self.by_day.add(Day::of(at), Some(at));
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
        assert_eq!(Day::of(TimestampMs(86_399_999)).to_string(), "1970-01-01");
        assert_eq!(Day::of(TimestampMs(86_400_000)).to_string(), "1970-01-02");
        assert_eq!(Day::of(TimestampMs(1_709_251_199_999)).to_string(), "2024-02-29");
    }
}
