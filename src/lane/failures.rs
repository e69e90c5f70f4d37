//! The lane's reaction to each class of failure of Kafka and of the database: retry, wait, recover or stop.

use std::time::Duration;

use super::{Lane, Producer, Session};
use crate::domain::cursor::IdentityMismatch;
use crate::domain::outcome::FailureClass;
use crate::ports::{KafkaPort, KafkaPortError, PublishError, Store, StoreError};
use crate::telemetry::logging::RateLimited;
use crate::telemetry::status::Dependency;

/// The lane's reaction to a failed Kafka transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AfterFailure {
    /// It was aborted: the same publication is tried again after a backoff.
    Retry,
    /// The group is between two generations: wait for the next one.
    AwaitGeneration,
    /// Its outcome is unknown: a new producer ends it, then both cursors are read again.
    Recover,
}

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Decides what follows a failed Kafka transaction.
    pub(super) fn publish_failed(
        &mut self,
        doing: &str,
        error: PublishError,
    ) -> Result<AfterFailure, IdentityMismatch> {
        match error {
            PublishError::Aborted { class, message } => {
                self.broker_failed(class, doing, &message);
                Ok(AfterFailure::Retry)
            }
            PublishError::StaleGeneration(message) => {
                self.fenced(&message);
                Ok(AfterFailure::AwaitGeneration)
            }
            PublishError::ReplaceProducer(message) => {
                self.producer_lost();
                self.broker_failed(FailureClass::Transient, doing, &message);
                Ok(AfterFailure::Recover)
            }
            PublishError::Identity(mismatch) => Err(mismatch),
        }
    }

    /// The producer may have left a transaction open, so answers about the group's offsets are outdated.
    pub(super) fn producer_lost(&mut self) {
        self.producer = Producer::Unsettled;
        self.questions.forget_all();
    }

    /// The group is between two generations, as in every rebalance; the broker is fine.
    pub(super) fn fenced(&mut self, message: &str) {
        let lane = self.settings.index;
        if self.fenced.holds(message) {
            tracing::warn!(lane, reason = message, "still waiting for the group's next generation");
        } else {
            tracing::debug!(lane, reason = message, "waiting for the group's next generation");
        }
        self.metrics.kafka_error(FailureClass::Fenced);
        self.broker.delay();
    }

    /// The cluster answered a question. That proves nothing for a publication that failed and is tried again.
    pub(super) fn broker_answered(&mut self) {
        if self.pending.is_empty() {
            self.broker_up();
        }
    }

    /// A publication succeeded, or the start of a producer.
    pub(super) fn broker_up(&mut self) {
        self.broker.succeeded();
        self.fenced.ends();
        self.metrics.broker_up(true);
        self.status.broker(self.settings.index, Dependency::Up);
    }

    pub(super) fn broker_failed(&mut self, class: FailureClass, doing: &str, message: &str) {
        let (class, message) = self.refused_or(class, message);
        self.broker.failed(class, doing, &message);
        self.metrics.kafka_error(class);
        self.broker_down(class, doing, &message);
    }

    /// Replaces the failure by the broker's refusal of the connection, if there is one: such a client sees
    /// only timeouts.
    pub(super) fn refused_or(&self, class: FailureClass, message: &str) -> (FailureClass, String) {
        match self.status.broker_refusal() {
            Some(refusal) => (FailureClass::Persistent, refusal),
            None => (class, message.to_owned()),
        }
    }

    pub(super) fn broker_down(&self, class: FailureClass, doing: &str, message: &str) {
        self.metrics.broker_up(false);
        let down = Dependency::Down(format!("{doing}: {message} ({})", class.as_str()));
        self.status.broker(self.settings.index, down);
    }

    /// The database answered a read.
    pub(super) fn database_answered(&mut self) {
        if self.database.is_proved_by_a_read() {
            self.database_up();
        }
    }

    /// A write to the database succeeded.
    pub(super) fn database_up(&mut self) {
        self.database.succeeded();
        self.metrics.database_up(true);
        self.status.database(self.settings.index, Dependency::Up);
    }

    pub(super) fn kafka_failed(
        &mut self,
        doing: &str,
        failure: KafkaPortError,
    ) -> Result<(), IdentityMismatch> {
        match failure {
            KafkaPortError::Failed { class, message } => {
                self.broker_failed(class, doing, &message);
                Ok(())
            }
            KafkaPortError::Identity(mismatch) => Err(mismatch),
        }
    }

    pub(super) fn write_failed(&mut self, doing: &str, failure: StoreError) -> Result<(), IdentityMismatch> {
        self.database.write_failed();
        self.store_failed(doing, failure)
    }

    pub(super) fn store_failed(&mut self, doing: &str, failure: StoreError) -> Result<(), IdentityMismatch> {
        self.session = Session::Unchecked;
        self.metrics.database_error(failure.sqlstate.as_deref());
        if let Some(mismatch) = failure.identity {
            return Err(mismatch);
        }
        match failure.class {
            FailureClass::Fenced => {
                static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    tracing::warn!(
                        lane = self.settings.index,
                        detail = %failure.message,
                        suppressed,
                        "a cursor is not where this lane left it: another writer moved it"
                    );
                }
                self.reset("a cursor was moved by another writer");
                self.database.delay();
            }
            class => {
                self.database.failed(class, doing, &failure.message);
                self.metrics.database_up(false);
                self.status.database(
                    self.settings.index,
                    Dependency::Down(format!("{doing}: {} ({})", failure.message, class.as_str())),
                );
            }
        }
        Ok(())
    }
}
