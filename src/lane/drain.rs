//! Graceful shutdown of a lane: nothing more is fetched, and what is written is published.

use tokio::time::sleep_until;

use super::failures::AfterFailure;
use super::{Lane, Producer};
use crate::domain::cursor::IdentityMismatch;
use crate::ports::{KafkaPort, Store};

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Publishes what is written, and copies the committed offsets into the database.
    pub(super) async fn drain(&mut self) -> Result<(), IdentityMismatch> {
        while let Some(publication) = self.first_pending() {
            if self.producer != Producer::Ready {
                break;
            }
            match self.kafka.publish(&publication).await {
                Ok(sent) => {
                    drop(publication);
                    self.publication_committed(sent);
                }
                Err(error) => match self.publish_failed("publishing a batch", error)? {
                    AfterFailure::Retry => sleep_until(self.broker.due_at()).await,
                    // The next owner of these partitions starts from both cursors and publishes the rest.
                    AfterFailure::AwaitGeneration | AfterFailure::Recover => break,
                },
            }
        }
        if self.pending.is_empty() {
            self.copy_positions().await?;
        }
        Ok(())
    }
}
