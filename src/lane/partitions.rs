//! The state of one partition of a lane: being opened, live or halted, with its positions. `/status` shows the
//! same states.

use tokio::time::Instant;

use crate::domain::cursor::{HaltReason, Known};
use crate::domain::record::{NextOffset, TimestampMs};

/// Positions of a partition that is being written and published.
#[derive(Clone, Debug)]
pub(super) struct LivePositions {
    /// Next offset to write, as last read from or written to the database.
    pub(super) applied: NextOffset,
    /// Fixed at the start: events of records below it were published before.
    pub(super) publish_from: NextOffset,
    /// The group's committed offset; moves with each publication.
    pub(super) committed: NextOffset,
    /// `committed` as last copied into the database (column `published`).
    pub(super) copied: Option<NextOffset>,
    /// Timestamp of the last record before `applied`.
    pub(super) timestamp: Option<TimestampMs>,
}

#[derive(Clone, Debug)]
pub(super) enum PartitionState {
    /// Its start position is not decided yet, after an assignment or a reset.
    Opening,
    /// A cursor is beyond the last stable offset. A new leader may lag; after a while the partition halts.
    BeyondEnd { since: Instant, known: Known, again_at: Instant },
    /// The group's offset is unusable: the output topics are being scanned for the events that were sent.
    /// `halted`: why the partition was halted before.
    ScanningOutputs { again_at: Instant, halted: Option<HaltReason> },
    /// Being written and published.
    Live(LivePositions),
    /// Halted until an operator resolves it, or until it can be read again.
    Halted { reason: HaltReason, known: Option<Known>, again_at: Instant },
}

impl PartitionState {
    /// The halt reason.
    pub(super) fn halted(&self) -> Option<&HaltReason> {
        match self {
            Self::Halted { reason, .. } => Some(reason),
            Self::ScanningOutputs { halted, .. } => halted.as_ref(),
            Self::Opening | Self::BeyondEnd { .. } | Self::Live(_) => None,
        }
    }

    /// The positions, if the partition is live.
    pub(super) fn live(&self) -> Option<&LivePositions> {
        match self {
            Self::Live(live) => Some(live),
            _ => None,
        }
    }

    /// As [`live`](Self::live), mutable.
    pub(super) fn live_mut(&mut self) -> Option<&mut LivePositions> {
        match self {
            Self::Live(live) => Some(live),
            _ => None,
        }
    }
}
