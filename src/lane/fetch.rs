//! Fetches records for the next batch. A lane that has a batch, or written batches that wait for publication,
//! fetches nothing here: it waits until one of them can be processed. Every wait ends with an event.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{IDLE_TICK, Lane, PENDING_MAX, Producer};
use crate::ports::{KafkaPort, LaneEvent, Store};
use crate::telemetry::activity::LaneStep;
use crate::telemetry::work::LanePhase;

impl<K: KafkaPort, S: Store> Lane<K, S> {
    /// Fetches until a batch can be closed, an event arrives, a batch can be published, or nothing came for a
    /// while.
    pub(super) async fn fetch(&mut self) {
        let _in_step = self.metrics.begin(LaneStep::Waiting);
        if self.has_batch() || self.pending.len() >= PENDING_MAX {
            self.fetch_states.pause_silence_check();
            self.kafka.listen();
            if !(self.has_batch() && self.can_write() || self.can_publish()) {
                self.wait_for_event(self.next_due()).await;
            }
        } else {
            self.fill().await;
        }
        if self.builder.is_full() {
            self.fetch_states.pause_silence_check();
        }
    }

    pub(super) async fn fill(&mut self) {
        let began = Instant::now();
        loop {
            let now = Instant::now();
            let wait = if self.can_publish() {
                Duration::ZERO
            } else {
                let until = self.builder.due_at().unwrap_or_else(|| self.next_due());
                until.saturating_duration_since(now)
            };
            let interrupted = {
                let Self { kafka, builder, events, inbox, .. } = self;
                tokio::select! {
                    biased;
                    event = events.recv() => {
                        inbox.push_back(event.unwrap_or(LaneEvent::Drain));
                        true
                    }
                    () = builder.fetch(kafka, wait) => false,
                }
            };
            let is_done =
                self.builder.is_full() || self.builder.is_over() || self.builder.buffer.is_interrupted();
            if interrupted || is_done || self.can_publish() {
                break;
            }
        }
        self.metrics.phase(LanePhase::Waiting, began.elapsed());
    }

    /// The earliest time at which the lane may have work without an event or a record.
    pub(super) fn next_due(&self) -> Instant {
        let now = Instant::now();
        let mut due = now + IDLE_TICK;
        let has_batch = self.has_batch();
        if has_batch && self.pending.len() < PENDING_MAX {
            due = due.min(self.database.due_at());
        }
        if !self.pending.is_empty() || self.producer != Producer::Ready {
            due = due.min(self.broker.due_at());
        } else if let Some(due_at) = self.builder.due_at()
            && !has_batch
        {
            due = due.min(due_at);
        }
        due.max(now)
    }

    pub(super) async fn wait_for_event(&mut self, until: Instant) {
        let Self { events, inbox, .. } = self;
        tokio::select! {
            biased;
            event = events.recv() => inbox.push_back(event.unwrap_or(LaneEvent::Drain)),
            () = sleep_until(until) => {}
        }
    }
}
