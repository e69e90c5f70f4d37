//! What a lane does when the group revokes partitions.
//!
//! The rebalance callback waits for the lane (`kafka::group`), at most ten seconds. The lane
//!
//! 1. lets running transactions finish, within a grace of eight seconds ([`receive_until_grace_ends`]);
//! 2. publishes what is written and pending, within another eight seconds; not if the partitions are lost
//!    already. Together this can take longer than the callback waits, see below;
//! 3. drops everything that it holds if anything is left, and forgets the partitions;
//! 4. stops fetching them, and tells the callback that it is done.
//!
//! Work that was dropped is not lost: the next owner starts from both cursors. A lane that is late cannot
//! publish: the broker refuses its outdated generation, or the lane sees that the callback has stopped
//! waiting for it.

use std::collections::VecDeque;
use std::future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::{Lane, Producer};
use crate::domain::cursor::IdentityMismatch;
use crate::domain::record::Partition;
use crate::ports::{KafkaPort, LaneEvent, RevokeDone, Store};
use crate::telemetry::activity::LaneStep;
use crate::telemetry::status::Dependency;

/// Time for transactions in flight to finish when partitions are revoked.
const REVOKE_GRACE: Duration = Duration::from_secs(8);
/// The same for partitions that are lost: their next owner may have started already.
const LOST_GRACE: Duration = Duration::from_secs(1);

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Publishes or drops what is pending, then releases these partitions.
    pub(super) async fn revoke(
        &mut self,
        partitions: &[Partition],
        is_lost: bool,
        done: RevokeDone,
    ) -> Result<(), IdentityMismatch> {
        let _in_step = self.metrics.begin(LaneStep::Revoking);
        if !is_lost && self.producer == Producer::Ready {
            let deadline = Instant::now() + REVOKE_GRACE;
            while let Some(publication) = self.first_pending() {
                match tokio::time::timeout_at(deadline, self.kafka.publish(&publication)).await {
                    Ok(Ok(sent)) => {
                        drop(publication);
                        self.publication_committed(sent);
                    }
                    Ok(Err(error)) => {
                        self.publish_failed("publishing before a revocation", error)?;
                        break;
                    }
                    // The transaction may still be committed.
                    Err(_) => {
                        self.producer_lost();
                        break;
                    }
                }
            }
        }
        if self.pending.is_empty() && !self.has_batch() {
            self.builder.forget(partitions);
        } else {
            // A batch has records of other partitions, too, and the fetch buffer is past them already. When it
            // is dropped, those partitions must be fetched again from their cursors as well.
            self.reset("a batch in flight was dropped when partitions were revoked");
        }
        self.questions.forget(partitions);
        self.fetch_states.forget(partitions);
        for partition in partitions {
            self.partitions.remove(partition);
            self.status.revoked(*partition);
        }
        self.stop_fetching(partitions).await?;
        if self.partitions.is_empty() {
            // Without partitions the lane makes no requests, so it no longer knows the state of either side.
            self.status.database(self.settings.index, Dependency::Unknown);
            self.status.broker(self.settings.index, Dependency::Unknown);
            self.metrics.at_rest();
            self.fenced.ends();
        }
        self.note_assigned();
        done.finish();
        Ok(())
    }
}

/// Receives events while transactions are in flight; returns when the grace of a revocation is over.
pub(super) async fn receive_until_grace_ends(
    events: &mut mpsc::Receiver<LaneEvent>,
    inbox: &mut VecDeque<LaneEvent>,
) {
    loop {
        let event = events.recv().await.unwrap_or(LaneEvent::Drain);
        let grace = match &event {
            LaneEvent::Assigned(_) | LaneEvent::Answered { .. } | LaneEvent::GapsChecked { .. } => None,
            LaneEvent::Revoked { is_lost: true, .. } => Some(LOST_GRACE),
            LaneEvent::Revoked { is_lost: false, .. } => Some(REVOKE_GRACE),
            LaneEvent::Drain => {
                inbox.push_back(event);
                // No event follows a drain, and the transactions have time limits of their own.
                return future::pending().await;
            }
        };
        inbox.push_back(event);
        if let Some(grace) = grace {
            return sleep(grace).await;
        }
    }
}
