//! The horizon: the time in the log before which all records are written and published. Pure.
//!
//! A generation may be dropped when its youngest record is older than the horizon by more than the
//! idempotency window. The horizon follows record timestamps, not the clock: after an outage of eight days
//! (of the daemon, the database or an output topic), the ids of records written just before it are still
//! stored when those records or their duplicates are read.

use std::time::Duration;

use crate::domain::cursor::HaltReason;
use crate::domain::record::{Partition, TimestampMs};
use crate::domain::wire::{TIMESTAMP_MAX, TIMESTAMP_MIN};

/// A record gets its timestamp before it reaches the log, so a partition without lag counts as published up
/// to this long ago. The same hour by which the time in an id may be ahead of its record's.
pub const DELIVERY: Duration = Duration::from_secs(3_600);

/// Log time of one partition: the record timestamp up to which it is written and published.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PartitionTime {
    /// Everything is written and published: log time is now minus [`DELIVERY`].
    CaughtUp,
    /// The log time.
    At(TimestampMs),
    /// The log time is unknown.
    Unknown(Hold),
}

/// Why a partition has no log time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Hold {
    /// The partition is halted.
    Halted(HaltReason),
    /// The record at its position could not be read in time.
    Unread,
    /// Neither the record at its position nor the one before it has a usable timestamp.
    NoTimestamp,
}

impl std::fmt::Display for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Halted(reason) => write!(f, "is halted ({})", reason.label()),
            Self::Unread => f.write_str("has a record at its position that could not be read in time"),
            Self::NoTimestamp => f.write_str("has no usable timestamp at its position"),
        }
    }
}

/// The log time of the slowest partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Horizon {
    /// The horizon, and the slowest partition if one lags.
    At(TimestampMs, Option<Partition>),
    /// Unknown, because this partition, the first of perhaps several, has no log time.
    Held(Hold, Partition),
}

/// Log time at a position, from the timestamps of the record before it and of the record at it: the earlier
/// one, because producers' clocks differ. Timestamps outside the years 2000 to 2099 are ignored.
pub fn log_time(before: Option<TimestampMs>, at: Option<TimestampMs>) -> Option<TimestampMs> {
    let usable = |t: &TimestampMs| (TIMESTAMP_MIN..=TIMESTAMP_MAX).contains(t);
    match (before.filter(usable), at.filter(usable)) {
        (Some(before), Some(at)) => Some(before.min(at)),
        (before, at) => before.or(at),
    }
}

/// The horizon over all partitions. Never later than `now` minus [`DELIVERY`], whatever the record timestamps
/// are.
pub fn horizon(now: TimestampMs, times: &[(Partition, PartitionTime)]) -> Horizon {
    let delivery = i64::try_from(DELIVERY.as_millis()).unwrap_or(i64::MAX);
    let mut slowest = (TimestampMs(now.0.saturating_sub(delivery)), None);
    for (partition, time) in times {
        match time {
            PartitionTime::Unknown(why) => return Horizon::Held(why.clone(), *partition),
            PartitionTime::At(at) if *at < slowest.0 => slowest = (*at, Some(*partition)),
            PartitionTime::At(_) | PartitionTime::CaughtUp => {}
        }
    }
    Horizon::At(slowest.0, slowest.1)
}

/// The horizon beyond which a generation with this youngest record may be dropped.
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
        assert_eq!(horizon(NOW, &times), Horizon::Held(Hold::Unread, Partition(1)));
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
