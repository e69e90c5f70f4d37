//! Taking partitions up: reading both cursors, deciding, and settling what has to be settled first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::ports::{Ledger, Log, LogFailure, Positions, PublishFailure};
use super::questions::Asked;
use super::{Lane, LaneSettings, Live, Slot, told};
use crate::cursor::{CursorRow, Decision, Doubt, IdentityDoubt, Known, Proof, Start, decide};
use crate::disposition::FailureClass;
use crate::failpoint;
use crate::logging::RateLimited;
use crate::metrics;
use crate::publication::{Publication, Span};
use crate::record::{NextOffset, Partition};

/// A cursor beyond the log's end is believed to be a lagging leader for this long.
const BEYOND_END_PATIENCE: Duration = Duration::from_secs(30);
const BEYOND_END_TICK: Duration = Duration::from_secs(1);
/// A search through the outputs is asked this often whether it is done.
const PROVING_TICK: Duration = Duration::from_millis(50);
/// A search that failed is tried again after this time.
const PROVING_RETRY: Duration = Duration::from_secs(5);
/// A halted partition is looked at again this often: a person may have settled it.
const HALTED_TICK: Duration = Duration::from_secs(5);

/// What the cluster is asked, for the log.
const ASKING: &str = "reading the group's offsets and the log's bounds";

impl<L: Log, D: Ledger> Lane<L, D> {
    /// Asks about partitions that wait to be taken up, if both sides are due for a try. The answer comes later; the
    /// partitions that are live go on meanwhile. The group's offset is asked for only after transactions of former
    /// producers are settled.
    pub(super) async fn ask_if_due(&mut self) -> Result<(), IdentityDoubt> {
        let now = Instant::now();
        let waiting: Vec<Partition> = self
            .slots
            .iter()
            .filter(|(partition, slot)| match slot {
                Slot::Opening => !self.questions.is_asked(**partition),
                Slot::BeyondEnd { again_at, .. }
                | Slot::Halted { again_at, .. }
                | Slot::Proving { again_at, .. } => *again_at <= now && !self.questions.is_asked(**partition),
                Slot::Live(_) => false,
            })
            .map(|(partition, _)| *partition)
            .collect();
        let is_due =
            self.is_producer_ready && self.database.is_due() && self.broker.is_due() && self.asking.is_due();
        if waiting.is_empty() || !is_due || !self.questions.has_room() {
            return Ok(());
        }
        let parts = self.questions.divided(waiting);
        let rows = match self.ledger.cursors(&parts.concat()).await {
            Ok(rows) => rows,
            Err(failure) => return self.ledger_failed("reading the cursors", failure),
        };
        let mut rows: BTreeMap<_, _> = rows.into_iter().collect();
        for partitions in parts {
            let rows = partitions.into_iter().map(|p| (p, rows.remove(&p).flatten())).collect();
            let question = self.questions.ask(Asked { rows, at: metrics::now() });
            self.log.ask(question);
        }
        Ok(())
    }

    /// An answer came. What of it is out of date is dropped.
    pub(super) async fn answered(
        &mut self,
        id: u64,
        found: Result<Vec<Positions>, LogFailure>,
    ) -> Result<(), IdentityDoubt> {
        let Some((mut asked, partitions)) = self.questions.take(id) else { return Ok(()) };
        let found = match found {
            Ok(found) => found,
            Err(LogFailure::Identity(doubt)) => return Err(doubt),
            Err(LogFailure::Failed { .. }) if partitions.is_empty() => return Ok(()),
            Err(LogFailure::Failed { class, message }) => {
                self.questions.failed(&partitions);
                self.asking_failed(class, &message);
                return Ok(());
            }
        };
        self.asking.succeeded();
        self.questions.succeeded(&partitions);
        let mut starts: Vec<(Known, Start)> = Vec::new();
        let mut to_prove: Vec<(Known, NextOffset)> = Vec::new();
        for positions in found {
            let Positions { partition, group, bounds } = positions;
            if !partitions.contains(&partition) {
                continue;
            }
            let row = asked.rows.remove(&partition).flatten();
            let mut known = Known { partition, group, row, bounds, proof: Proof::NotAsked };
            // Asked once: while the cursors stay, the outputs tell nothing else the next time.
            if let Some(Slot::Halted { known: Some(last), .. } | Slot::BeyondEnd { known: last, .. }) =
                self.slots.get(&partition)
                && last.group == known.group
                && last.row == known.row
            {
                known.proof = last.proof;
            }
            self.board.found(asked.at, &known);
            match self.decide(&known) {
                Decision::Go(start) if self.is_held(&known, &start) => {}
                Decision::Go(start) => starts.push((known, start)),
                Decision::Prove { from } => to_prove.push((known, from)),
                Decision::Halt(doubt) => self.doubt(known, doubt).await?,
                Decision::Stop(doubt) => return Err(doubt),
            }
        }
        self.prove(to_prove, &mut starts).await?;
        self.note_assigned();
        if starts.is_empty() {
            self.database_up();
            return Ok(());
        }
        self.settle_and_start(starts).await
    }

    /// The live partitions of this lane have no part in it.
    fn asking_failed(&mut self, class: FailureClass, message: &str) {
        let is_idle = !self.slots.values().any(|slot| matches!(slot, Slot::Live(_)));
        let (class, message) = self.refused_or(class, message);
        self.asking.failed(class, ASKING, &message);
        self.metrics.kafka_error(class);
        if is_idle {
            self.broker_down(class, ASKING, &message);
        }
    }

    /// Whether a partition that could be taken up is held back, because it cannot be read and its next try is not due.
    /// Not so if a person decided to skip what cannot be read.
    fn is_held(&mut self, known: &Known, start: &Start) -> bool {
        let now = Instant::now();
        let partition = known.partition;
        let Some(Slot::Halted { doubt, again_at, .. }) = self.slots.get_mut(&partition) else { return false };
        let until = self.fetches.held_until(partition).filter(|until| *until > now);
        let is_settled = known.row.as_ref().is_some_and(|row| row.settled.is_some());
        match until {
            Some(until)
                if doubt.is_about_reading() && !is_settled && start.from <= doubt.first_in_doubt() =>
            {
                *again_at = until.min(now + HALTED_TICK);
                true
            }
            _ => false,
        }
    }

    fn decide(&self, known: &Known) -> Decision {
        decide(known, &self.settings.identity, &self.settings.mode)
    }

    /// Asks the outputs about partitions whose group offset proves nothing; those that they tell about are
    /// decided.
    async fn prove(
        &mut self,
        wanted: Vec<(Known, NextOffset)>,
        starts: &mut Vec<(Known, Start)>,
    ) -> Result<(), IdentityDoubt> {
        if wanted.is_empty() {
            return Ok(());
        }
        let positions: Vec<_> = wanted.iter().map(|(known, from)| (known.partition, *from)).collect();
        let told = match self.log.prove(&positions).await {
            Ok(told) => told.unwrap_or_default(),
            Err(LogFailure::Identity(doubt)) => return Err(doubt),
            Err(LogFailure::Failed { message, .. }) => {
                // The other partitions of this lane have no part in it.
                static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    let lane = self.settings.index;
                    tracing::warn!(
                        lane,
                        error = message,
                        suppressed,
                        "the outputs could not be searched, trying again"
                    );
                }
                let again_at = Instant::now() + PROVING_RETRY;
                for (known, _) in wanted {
                    self.proving(known.partition, again_at);
                }
                return Ok(());
            }
        };
        let again_at = Instant::now() + PROVING_TICK;
        for (mut known, from) in wanted {
            let partition = known.partition;
            let Some(proved) = told.iter().find(|p| p.partition == partition && p.from == from) else {
                self.proving(partition, again_at);
                continue;
            };
            known.proof = proved.proof;
            static LIMIT: RateLimited = RateLimited::new(10, Duration::from_secs(60));
            if let Some(suppressed) = LIMIT.pass() {
                tracing::info!(
                    lane = self.settings.index,
                    topic = self.settings.input_topic,
                    partition = partition.0,
                    from = from.0,
                    proof = ?proved.proof,
                    suppressed,
                    "the group's offset is gone or was set by other hands: the outputs tell what was sent"
                );
            }
            match self.decide(&known) {
                Decision::Go(start) => starts.push((known, start)),
                Decision::Halt(doubt) => self.doubt(known, doubt).await?,
                Decision::Stop(doubt) => return Err(doubt),
                // Never asked again with an answer at hand.
                Decision::Prove { .. } => {}
            }
        }
        Ok(())
    }

    /// Waits for the outputs. A partition that was halted is so until they have told.
    fn proving(&mut self, partition: Partition, again_at: Instant) {
        let halted = match self.slots.remove(&partition) {
            Some(Slot::Halted { doubt, .. }) => Some(doubt),
            Some(Slot::Proving { halted, .. }) => halted,
            _ => None,
        };
        self.slots.insert(partition, Slot::Proving { again_at, halted });
    }

    /// Halts a partition, or waits a while for what may pass.
    async fn doubt(&mut self, known: Known, doubt: Doubt) -> Result<(), IdentityDoubt> {
        let now = Instant::now();
        let partition = known.partition;
        let slot = self.slots.get(&partition);
        let halted = slot.and_then(Slot::halted);
        if let Doubt::BeyondEnd { .. } = doubt
            && halted.is_none()
        {
            let since = match slot {
                Some(Slot::BeyondEnd { since, .. }) => *since,
                _ => now,
            };
            if now - since < BEYOND_END_PATIENCE {
                let again_at = now + BEYOND_END_TICK;
                self.slots.insert(partition, Slot::BeyondEnd { since, known, again_at });
                return Ok(());
            }
        }
        // The ends of a doubt move with the log; that is no other doubt.
        let is_same =
            |last: &Doubt| last.label() == doubt.label() && last.first_in_doubt() == doubt.first_in_doubt();
        if !halted.is_some_and(is_same) {
            let LaneSettings { index, input_topic, identity, .. } = &self.settings;
            told::halted(*index, input_topic, identity.topic_id, partition, &doubt);
        }
        self.board.halted(partition, doubt.clone());
        let slot = Slot::Halted { doubt, known: Some(known), again_at: now + HALTED_TICK };
        self.slots.insert(partition, slot);
        self.fetches.forget(&[partition]);
        self.end(&[partition]).await?;
        Ok(())
    }

    async fn settle_and_start(&mut self, starts: Vec<(Known, Start)>) -> Result<(), IdentityDoubt> {
        // The group's offset first: a crash after it finds a marked offset and no row, and begins again
        // at the same place; the other way round it would find written records of unknown publication.
        let spans: Vec<Span> = starts
            .iter()
            .filter(|(_, start)| start.must_commit)
            .map(|(known, start)| Span {
                partition: known.partition,
                gate: start.gate,
                commit: start.committed,
            })
            .collect();
        if !spans.is_empty() {
            match self.log.publish(&Arc::new(Publication::of_offsets(spans))).await {
                Ok(_) => {
                    failpoint::hit("after_first_offsets");
                    self.broker_up();
                }
                Err(PublishFailure::Aborted { class, message }) => {
                    self.broker_failed(class, "committing the first offsets", &message);
                    return Ok(());
                }
                Err(PublishFailure::Fenced(message)) => {
                    self.fenced(&message);
                    return Ok(());
                }
                Err(PublishFailure::Unknown(message)) => {
                    self.producer_lost();
                    self.broker_failed(FailureClass::Passing, "committing the first offsets", &message);
                    self.reset("whether a transaction was committed is not known");
                    return Ok(());
                }
                Err(PublishFailure::Identity(doubt)) => return Err(doubt),
            }
        }
        let publishes = self.settings.mode.publishes;
        let rows: Vec<_> = starts
            .iter()
            .filter(|(_, start)| start.must_store)
            .map(|(known, start)| {
                (
                    known.partition,
                    known.row.as_ref().map(|r| r.applied),
                    CursorRow {
                        applied: start.applied,
                        published: publishes.then_some(start.gate),
                        applied_timestamp: known.row.as_ref().and_then(|r| r.applied_timestamp),
                        settled: known.row.as_ref().and_then(|r| r.settled),
                    },
                )
            })
            .collect();
        failpoint::hit("before_store_cursors");
        if !rows.is_empty()
            && let Err(failure) = self.ledger.store_cursors(&rows).await
        {
            return self.ledger_failed("storing the first cursors", failure);
        }
        // Only now: a server that reads and does not write, like a standby, is not there yet.
        self.database_up();
        failpoint::hit("after_store_cursors");
        let positions: Vec<_> = starts.iter().map(|(known, start)| (known.partition, start.from)).collect();
        if !self.begin(&positions).await? {
            return Ok(());
        }
        self.broker_up();
        for (known, start) in starts {
            self.assembly.intake.begin(known.partition, start.from);
            self.slots.insert(
                known.partition,
                Slot::Live(Live {
                    applied: start.applied,
                    gate: start.gate,
                    committed: start.committed,
                    stored: publishes.then_some(start.gate),
                    timestamp: known.row.as_ref().and_then(|r| r.applied_timestamp),
                }),
            );
        }
        self.note_assigned();
        self.report_positions();
        Ok(())
    }
}
