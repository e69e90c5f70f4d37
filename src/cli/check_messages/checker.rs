//! The outcome of one message after the other, by the daemon's code. Pure.

use std::collections::HashMap;

use crate::domain::batch::{Answer, Batch, Owner, Progress, Refused};
use crate::domain::outcome::Outcome;
use crate::domain::publication::{DeadLetter, dead_letter};
use crate::domain::record::{NextOffset, Offset, Partition, SourceBatch};
use crate::domain::wire::{Reason, Rules};
use crate::error::CommandError;

/// Most message ids that are remembered, to find duplicates and conflicts.
pub(super) const IDS_MAX: u64 = 5_000_000;

/// A record of the input.
pub(super) type Place = (Partition, Offset);

/// What the daemon would do with a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It would be written.
    Written {
        /// Whether it would also get an e-mail event.
        has_email: bool,
    },
    /// The record at `first` has the same id and payload.
    Duplicate { first: Place },
    /// It would be dead-lettered.
    DeadLettered {
        reason: Reason,
        /// `dlq-detail`, without contents of the message.
        detail: String,
        /// The record with the same id and another payload.
        first: Option<Place>,
    },
}

/// Checks messages in the order in which they are passed.
pub(super) struct Checker {
    rules: Rules,
    owners: HashMap<[u8; 16], Owner>,
}

impl Checker {
    pub(super) fn new(rules: Rules) -> Self {
        Self { rules, owners: HashMap::new() }
    }

    /// Decides the outcome of the one record of `source`, which is returned parsed.
    ///
    /// # Errors
    /// When there are more message ids than can be remembered.
    pub(super) fn check(&mut self, source: SourceBatch) -> Result<(Batch, Verdict), CommandError> {
        // Nothing was written before, so every valid record makes a claim.
        let progress = source.get(0).map(|record| Progress {
            partition: record.partition,
            seen: NextOffset(0),
            reached: record.offset.next(),
            timestamp: Some(record.timestamp),
        });
        let batch = Batch::assemble(source, progress.into_iter().collect(), &self.rules);
        let none_refused = Refused::default();
        let claim = batch.claims(&none_refused).next();
        let owner = claim.and_then(|claim| self.owners.get(&claim.message_id).copied());
        let mut answer = Answer::default();
        match (claim, owner) {
            (Some(claim), Some(owner)) => drop(answer.owners.insert(claim.message_id, owner)),
            (Some(_), None) if self.owners.len() as u64 >= IDS_MAX => {
                return Err(CommandError::failed(format!(
                    "more than {IDS_MAX} message ids: check fewer messages at once"
                )));
            }
            (Some(claim), None) => {
                let (partition, offset, payload_hash) = (claim.partition, claim.offset, claim.payload_hash);
                self.owners.insert(claim.message_id, Owner { partition, offset, payload_hash });
            }
            (None, _) => {}
        }
        let outcome = batch.decide(&answer, &none_refused).first().copied();
        let first = owner.map(|owner| (owner.partition, owner.offset));
        let verdict = verdict(&batch, outcome, first)
            .ok_or_else(|| CommandError::failed("a message without an outcome"))?;
        Ok((batch, verdict))
    }
}

fn verdict(batch: &Batch, outcome: Option<Outcome>, first: Option<Place>) -> Option<Verdict> {
    let (view, outcome) = (batch.published_view(0)?, outcome?);
    if let Some(DeadLetter { reason, detail, .. }) = dead_letter(&view, &outcome) {
        return Some(Verdict::DeadLettered { reason, detail: detail.into_owned(), first });
    }
    Some(match first {
        Some(first) => Verdict::Duplicate { first },
        None => Verdict::Written { has_email: view.email_event.is_some() },
    })
}
