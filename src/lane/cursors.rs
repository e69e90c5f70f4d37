//! The cursors in the database (table `source_cursor`): `applied` moves with each batch, `published` is a
//! copy of the group's committed offset that may be behind. In each new session `applied` is compared with
//! what the lane has in memory: it shows whether the last transaction was committed.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::partitions::PartitionState;
use super::{Lane, Session};
use crate::domain::batch::Progress;
use crate::domain::cursor::IdentityMismatch;
use crate::domain::record::{NextOffset, Partition};
use crate::ports::{CursorMove, KafkaPort, Store};
use crate::telemetry::activity::LaneStep;
use crate::telemetry::logging::RateLimited;

/// A lane without a write for this long copies the group's offsets into the database.
const IDLE_COPY_AFTER: Duration = Duration::from_secs(1);
/// A lane that had nothing to write compares the cursors after this time.
const IDLE_COMPARE_AFTER: Duration = Duration::from_secs(5);

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Cursor moves of a write: those of `progress`, and copies of committed offsets that the database lacks.
    pub(super) fn moves(&self, progress: &[Progress]) -> Vec<CursorMove> {
        let mut moves: BTreeMap<Partition, CursorMove> = BTreeMap::new();
        for (partition, state) in &self.partitions {
            let PartitionState::Live(live) = state else { continue };
            let published =
                Some(live.committed).filter(|k| self.settings.mode.publishes && live.copied != Some(*k));
            if published.is_some() {
                moves.insert(
                    *partition,
                    CursorMove {
                        partition: *partition,
                        seen: live.applied,
                        applied: live.applied,
                        published,
                        timestamp: None,
                    },
                );
            }
        }
        for p in progress {
            let published = moves.get(&p.partition).and_then(|m| m.published);
            moves.insert(
                p.partition,
                CursorMove {
                    partition: p.partition,
                    seen: p.seen,
                    applied: p.applied(),
                    published,
                    timestamp: p.timestamp,
                },
            );
        }
        moves.into_values().collect()
    }

    /// Compares the cursors in the database with the lane's, as in each new session. True: the lane may
    /// write.
    pub(super) async fn compare_cursors(&mut self) -> Result<bool, IdentityMismatch> {
        let live: Vec<Partition> =
            self.partitions.iter().filter(|(_, state)| state.live().is_some()).map(|(p, _)| *p).collect();
        let in_step = self.metrics.begin(LaneStep::Database);
        let rows = match self.store.cursors(&live).await {
            Ok(rows) => rows,
            Err(failure) => {
                self.store_failed("reading the cursors", failure)?;
                return Ok(false);
            }
        };
        drop(in_step);
        self.database_answered();
        self.compared_at = Instant::now();
        let planned: BTreeMap<Partition, NextOffset> = self
            .writing
            .iter()
            .flat_map(|batch| batch.progress())
            .filter(|p| p.applied() != p.seen)
            .map(|p| (p.partition, p.applied()))
            .collect();
        let (mut as_seen, mut as_planned) = (true, !planned.is_empty());
        for (partition, row) in &rows {
            let found = row.as_ref().map(|r| r.applied);
            let expected = match self.partitions.get_mut(partition) {
                Some(PartitionState::Live(live)) => {
                    // A `published` that is behind does not matter: the next write copies the committed
                    // offset again.
                    live.copied = row.as_ref().and_then(|r| r.published);
                    Some(live.applied)
                }
                _ => None,
            };
            as_seen &= found == expected;
            as_planned &= found == planned.get(partition).copied().or(expected);
        }
        if as_planned && !as_seen {
            // Only the reply to COMMIT was lost. The batch runs again and finds its outcomes in
            // `idempotency`, by the owner of each message id; no row is written twice.
            if let Some(batch) = &mut self.writing {
                batch.mark_committed();
            }
            for (partition, next) in planned {
                if let Some(PartitionState::Live(live)) = self.partitions.get_mut(&partition) {
                    live.applied = next;
                }
            }
        } else if !as_seen {
            static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::warn!(
                    lane = self.settings.index,
                    suppressed,
                    "the database's cursors are not where this lane left them, as after a failover or restore"
                );
            }
            self.reset("the database's cursors differ");
            // No partition is live any more that could differ.
            self.session = Session::Checked;
            return Ok(false);
        }
        self.session = Session::Checked;
        Ok(true)
    }

    /// Copies the group's offsets to the database when no batch has done so for a while.
    pub(super) async fn copy_when_idle(&mut self) -> Result<(), IdentityMismatch> {
        let is_time = self.copied_at.elapsed() >= IDLE_COPY_AFTER && self.database.is_due();
        if !is_time || self.writing.is_some() || !self.pending.is_empty() {
            return Ok(());
        }
        let is_live = self.partitions.values().any(|state| state.live().is_some());
        if is_live && self.compared_at.elapsed() >= IDLE_COMPARE_AFTER {
            // A restore breaks sessions, but an idle lane does not notice. Without this check the lost rows
            // would be written again only when the next record arrives.
            self.compared_at = Instant::now();
            if !self.compare_cursors().await? {
                return Ok(());
            }
        }
        self.copy_positions().await
    }

    pub(super) async fn copy_positions(&mut self) -> Result<(), IdentityMismatch> {
        let moves = self.moves(&[]);
        self.copied_at = Instant::now();
        if moves.is_empty() {
            return Ok(());
        }
        let _in_step = self.metrics.begin(LaneStep::Database);
        match self.store.move_cursors(&moves).await {
            Ok(()) => {
                self.database_up();
                for moved in &moves {
                    if let Some(PartitionState::Live(live)) = self.partitions.get_mut(&moved.partition) {
                        live.copied = moved.published.or(live.copied);
                    }
                }
                Ok(())
            }
            Err(failure) => self.write_failed("copying the group's offsets", failure),
        }
    }
}
