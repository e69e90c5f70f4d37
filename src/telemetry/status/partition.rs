//! State of one assigned partition: its phase, its positions and its lag.

use std::collections::VecDeque;

use super::fetch_starts::FetchStart;
use crate::domain::cursor::HaltReason;
use crate::domain::record::{NextOffset, Partition, TimestampMs};

/// Phase of a partition.
#[derive(Clone, PartialEq, Eq, Debug, Default, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Phase {
    /// Assigned; recovery determines where to continue.
    #[default]
    Opening,
    /// Being written and published.
    Live,
    /// Halted until an operator resolves it.
    Halted(HaltReason),
}

/// State of an assigned partition.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PartitionStatus {
    /// Current phase.
    pub phase: Phase,
    /// Since when it is in this phase, by the wall clock.
    pub since: TimestampMs,
    /// Next offset to write.
    pub applied: Option<NextOffset>,
    /// Next offset to publish.
    pub published: Option<NextOffset>,
    /// The lowest of the cursors, during recovery or while halted.
    pub unpublished_from: Option<NextOffset>,
    /// Timestamp of the last written record, but at most the time at which this was recorded: a producer
    /// clock that is ahead must not hide lag.
    pub(super) applied_timestamp: Option<TimestampMs>,
    /// That timestamp as it is in the record.
    pub(super) stamped: Option<TimestampMs>,
    /// Last stable offset, when last read.
    pub end: Option<NextOffset>,
    pub(super) open: Option<OpenTransaction>,
    /// When the partition was last caught up to the end, by the wall clock.
    pub(super) caught_up_at: Option<TimestampMs>,
    /// When more of it was last written and published, by the wall clock.
    pub(super) moved_at: Option<TimestampMs>,
    /// When the partition was assigned, by the wall clock.
    pub(super) assigned_at: TimestampMs,
    /// `applied` in the database at the last recovery.
    pub found_applied: Option<NextOffset>,
    /// End offset and first timestamp of each batch in flight.
    pub(super) in_hand: VecDeque<(NextOffset, TimestampMs)>,
}

/// The first open transaction of a partition, at its last stable offset. Records from there on are not read
/// until it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenTransaction {
    /// The last stable offset.
    pub at: NextOffset,
    /// Number of records between the last stable offset and the high watermark.
    pub records: i64,
    since: TimestampMs,
}

impl OpenTransaction {
    /// How long the last stable offset has been there, in milliseconds, as far as this process knows.
    pub fn age_ms(&self, now: TimestampMs) -> i64 {
        (now.0 - self.since.0).max(0)
    }
}

/// Maximum number of batches of a partition in flight: one being written and those that wait for their Kafka
/// transaction.
pub(super) const IN_HAND_MAX: usize = 4;

impl PartitionStatus {
    pub(super) fn opening(now: TimestampMs) -> Self {
        Self { assigned_at: now, since: now, ..Self::default() }
    }

    /// Halted for another reason, it is halted anew; that the affected range grows is no other reason.
    pub(super) fn enter(&mut self, now: TimestampMs, phase: Phase) {
        let is_same = match (&self.phase, &phase) {
            (Phase::Halted(before), Phase::Halted(reason)) => {
                (before.label(), before.first_offset()) == (reason.label(), reason.first_offset())
            }
            (before, phase) => before == phase,
        };
        if !is_same {
            self.since = now;
        }
        self.phase = phase;
    }

    /// Position of the lane at a rebalance that may have interrupted fetching; for the audit.
    pub(super) fn interrupted(&self, partition: Partition) -> Option<FetchStart> {
        let applied = self.applied?;
        let position = self.in_hand.back().map_or(applied, |(reached, _)| applied.max(*reached));
        Some(FetchStart { partition, position, applied })
    }

    /// Everything before this offset is written and published.
    pub(super) fn done_to(&self) -> Option<NextOffset> {
        // In a restored database, the rows may be behind what was published.
        self.unpublished_from.or_else(|| Some(self.applied?.min(self.published?)))
    }

    /// Number of records between what is written and published and the end.
    pub fn lag(&self) -> Option<i64> {
        Some((self.end?.0 - self.done_to()?.0).max(0))
    }

    /// Since when records wait and none of them was written and published; `None` if none waits, as far as is known.
    pub fn stuck_since(&self) -> Option<TimestampMs> {
        let waits = self.lag().is_some_and(|lag| lag > 0);
        waits.then(|| self.since.max(self.moved_at.max(self.caught_up_at).unwrap_or_default()))
    }

    /// Age in milliseconds of the oldest record that is not yet written and published; 0 when caught up.
    /// While that record is in flight, its timestamp is used. Otherwise the record arrived after the last
    /// written record and after the partition was last caught up; the later of these times is used. If
    /// neither is known, the time of the assignment is used.
    pub fn lag_ms(&self, now: TimestampMs) -> i64 {
        if self.is_caught_up() {
            return 0;
        }
        let oldest = match self.in_hand.front() {
            Some((_, at)) => *at,
            None => self.applied_timestamp.max(self.caught_up_at).unwrap_or(self.assigned_at),
        };
        (now.0 - oldest.0).max(0)
    }

    /// The first open transaction, when the high watermark was last read.
    pub fn open_transaction(&self) -> Option<OpenTransaction> {
        self.open
    }

    /// `high` was read before the end.
    pub(super) fn note_high_watermark(&mut self, now: TimestampMs, high: NextOffset) {
        let open = self.end.filter(|end| *end < high).map(|at| {
            let since = self.open.filter(|open| open.at == at).map_or(now, |open| open.since);
            OpenTransaction { at, records: high.0 - at.0, since }
        });
        self.open = open;
    }

    /// A cursor beyond the end has a lag of 0, but new records will not be written either.
    pub(super) fn is_caught_up(&self) -> bool {
        let is_beyond_end = matches!(self.phase, Phase::Halted(HaltReason::BeyondEnd { .. }));
        self.lag() == Some(0) && !is_beyond_end
    }

    pub(super) fn note_written(&mut self, now: TimestampMs, timestamp: Option<TimestampMs>) {
        // Keep the first value: `now` only grows.
        if timestamp.is_some() && timestamp != self.stamped {
            self.stamped = timestamp;
            self.applied_timestamp = timestamp.map(|at| at.min(now));
        }
    }

    /// Positions went back, as in a restored database: earlier observations do not apply to the records that
    /// are read again.
    pub(super) fn note_went_back(&mut self) {
        self.caught_up_at = None;
        self.applied_timestamp = None;
        self.stamped = None;
    }

    pub(super) fn note_caught_up(&mut self, now: TimestampMs) {
        if self.is_caught_up() {
            self.caught_up_at = Some(now);
        }
    }
}
