//! The horizon: a moment in log time before which nothing can come any more. Pure.
//!
//! A generation may go when its youngest record lies more than the idempotency window before the horizon.
//! Time is that of the log, as far as it is written *and* published: after an outage of eight days of the
//! daemon, of the database or of an output topic, the records that were written just before it are still
//! known when their duplicates, or they themselves, are delivered.

use std::time::Duration;

use crate::cursor::Doubt;
use crate::record::{Partition, TimestampMs};
use crate::wire::{TIMESTAMP_MAX, TIMESTAMP_MIN};

/// A record is stamped when it is sent and in the log a while later: what is caught up now counts as far as
/// this long ago. The same hour by which an id may be ahead of its record.
pub const DELIVERY: Duration = Duration::from_secs(3_600);

/// How far one partition is, in log time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PartitionTime {
    /// Everything in it is written and published: as far as now, less [`DELIVERY`].
    CaughtUp,
    /// As far as this.
    At(TimestampMs),
    /// It cannot be said.
    Unknown(Hold),
}

/// Why a partition has no log time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hold {
    /// It is halted.
    Halted(Doubt),
    /// The record at its position was not delivered in time.
    Unread,
    /// Neither the record at its position nor the one before has a timestamp that can be used.
    NoTimestamp,
}

impl std::fmt::Display for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Halted(doubt) => write!(f, "is halted ({})", doubt.label()),
            Self::Unread => f.write_str("has a record at its position that could not be read in time"),
            Self::NoTimestamp => f.write_str("has no usable timestamp at its position"),
        }
    }
}

/// The log time of the slowest partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Horizon {
    /// It is this; the partition that holds it there, if one lags.
    At(TimestampMs, Option<Partition>),
    /// It cannot be said, because of this partition among so many.
    Held {
        /// The first one.
        partition: Partition,
        /// Why.
        why: Hold,
        /// How many there are.
        count: usize,
    },
}

/// Log time at a position, from the record before it and the one at it. Producers' clocks differ: of the two
/// the earlier counts, and one that no calendar has counts for nothing.
pub fn log_time(before: Option<TimestampMs>, at: Option<TimestampMs>) -> Option<TimestampMs> {
    let usable = |t: &TimestampMs| (TIMESTAMP_MIN..=TIMESTAMP_MAX).contains(t);
    match (before.filter(usable), at.filter(usable)) {
        (Some(before), Some(at)) => Some(before.min(at)),
        (before, at) => before.or(at),
    }
}

/// The horizon over all partitions. Never later than `now` less [`DELIVERY`], whatever a record says.
pub fn horizon(now: TimestampMs, times: &[(Partition, PartitionTime)]) -> Horizon {
    let delivery = i64::try_from(DELIVERY.as_millis()).unwrap_or(i64::MAX);
    let mut slowest = (TimestampMs(now.0.saturating_sub(delivery)), None);
    let mut held: Option<(Partition, &Hold)> = None;
    let mut count = 0;
    for (partition, time) in times {
        match time {
            PartitionTime::CaughtUp => {}
            PartitionTime::At(at) if *at < slowest.0 => slowest = (*at, Some(*partition)),
            PartitionTime::At(_) => {}
            PartitionTime::Unknown(why) => {
                held.get_or_insert((*partition, why));
                count += 1;
            }
        }
    }
    match held {
        Some((partition, why)) => Horizon::Held { partition, why: why.clone(), count },
        None => Horizon::At(slowest.0, slowest.1),
    }
}

/// The moment from which on a generation with this youngest record may go.
pub fn goes_at(youngest: TimestampMs, window: Duration) -> TimestampMs {
    let window = i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
    TimestampMs(youngest.0.saturating_add(window))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: TimestampMs = TimestampMs(1_800_000_000_000);
    const DAY: i64 = 86_400_000;

    fn at(days_ago: i64) -> PartitionTime {
        PartitionTime::At(TimestampMs(NOW.0 - days_ago * DAY))
    }

    #[test]
    fn the_slowest_partition_is_the_horizon() {
        let times = [(Partition(0), PartitionTime::CaughtUp), (Partition(1), at(8)), (Partition(2), at(2))];
        assert_eq!(horizon(NOW, &times), Horizon::At(TimestampMs(NOW.0 - 8 * DAY), Some(Partition(1))));
    }

    #[test]
    fn caught_up_partitions_count_as_an_hour_ago() {
        let times = [(Partition(0), PartitionTime::CaughtUp), (Partition(1), PartitionTime::CaughtUp)];
        assert_eq!(horizon(NOW, &times), Horizon::At(TimestampMs(NOW.0 - DAY / 24), None));
    }

    #[test]
    fn a_record_from_the_future_does_not_carry_the_horizon_beyond_now() {
        assert_eq!(
            horizon(NOW, &[(Partition(0), at(-400))]),
            Horizon::At(TimestampMs(NOW.0 - DAY / 24), None)
        );
    }

    #[test]
    fn one_partition_without_log_time_holds_everything_back() {
        let times = [(Partition(0), at(1)), (Partition(1), PartitionTime::Unknown(Hold::Unread))];
        assert_eq!(
            horizon(NOW, &times),
            Horizon::Held { partition: Partition(1), why: Hold::Unread, count: 1 }
        );
    }

    #[test]
    fn of_two_timestamps_the_earlier_counts_and_an_absurd_one_for_nothing() {
        let (early, late) = (TimestampMs(NOW.0 - DAY), NOW);
        assert_eq!(log_time(Some(late), Some(early)), Some(early));
        assert_eq!(log_time(Some(early), Some(late)), Some(early));
        assert_eq!(log_time(None, Some(late)), Some(late));
        assert_eq!(log_time(Some(TimestampMs(-1)), Some(late)), Some(late));
        assert_eq!(log_time(Some(early), Some(TimestampMs(i64::MAX))), Some(early));
        assert_eq!(log_time(None, Some(TimestampMs(-1))), None);
    }

    #[test]
    fn an_empty_generation_may_go_at_once() {
        assert!(goes_at(TimestampMs(i64::MIN), Duration::from_secs(7 * 86_400)) < NOW);
    }
}
