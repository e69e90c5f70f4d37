//! Decides the outcomes of a batch's records.

use std::collections::{BTreeMap, HashMap};
use std::ops::AddAssign;

use super::{Batch, Candidate, Place};
use crate::domain::outcome::{Outcome, SqlState};
use crate::domain::record::{Offset, Partition};
use crate::domain::wire::Reason;

/// The record that claimed a message id, as stored in `idempotency`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Partition of the owning record.
    pub partition: Partition,
    /// Offset of the owning record.
    pub offset: Offset,
    /// Hash of its payload.
    pub payload_hash: i64,
}

/// The database's answer to a batch's claims and lookups.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Owners of the ids that could not be claimed and of those that were looked up. An id of
    /// [`Batch::claims`] that is not in here was claimed by this transaction.
    pub owners: HashMap<[u8; 16], Owner>,
}

/// Records that the database refused one by one, by index in the batch, with the SQLSTATE.
pub type Refused = BTreeMap<u32, SqlState>;

/// The outcomes of a batch's records, by index.
pub type Outcomes = Vec<Outcome>;

/// Number of records by outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OutcomeCounts {
    /// Records written by this transaction.
    pub written: u64,
    /// Records already written in an earlier attempt.
    pub redelivered: u64,
    /// Duplicates.
    pub duplicates: u64,
    /// Dead letters, for any reason.
    pub dead_letters: u64,
}

impl OutcomeCounts {
    /// Counts the outcomes.
    pub fn of(outcomes: &[Outcome]) -> Self {
        let mut counts = Self::default();
        for outcome in outcomes {
            *match outcome {
                Outcome::Written => &mut counts.written,
                Outcome::WrittenBefore => &mut counts.redelivered,
                Outcome::Duplicate => &mut counts.duplicates,
                Outcome::DeadLetter(_) | Outcome::Rejected(_) => &mut counts.dead_letters,
            } += 1;
        }
        counts
    }
}

impl OutcomeCounts {
    /// What was counted after `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            written: self.written - before.written,
            redelivered: self.redelivered - before.redelivered,
            duplicates: self.duplicates - before.duplicates,
            dead_letters: self.dead_letters - before.dead_letters,
        }
    }
}

impl AddAssign for OutcomeCounts {
    fn add_assign(&mut self, more: Self) {
        self.written += more.written;
        self.redelivered += more.redelivered;
        self.duplicates += more.duplicates;
        self.dead_letters += more.dead_letters;
    }
}

impl Batch {
    /// Decides the outcome of every record.
    pub fn decide(&self, answer: &Answer, refused: &Refused) -> Outcomes {
        let unclaimed = |place: &Place| match &place.payment {
            Err(refusal) => Outcome::DeadLetter(refusal.reason),
            // Replaced below: every valid record is a candidate or a lookup.
            Ok(_) => Outcome::Rejected(None),
        };
        let mut outcomes: Outcomes = self.places.iter().map(unclaimed).collect();
        let mut set = |index: u32, outcome| {
            if let Some(slot) = outcomes.get_mut(index as usize) {
                *slot = outcome;
            }
        };
        let mut winner: Option<([u8; 16], Owner)> = None;
        for (index, place, candidate) in self.valid(&self.candidates) {
            if let Some(sqlstate) = refused.get(&index) {
                set(index, Outcome::Rejected(Some(*sqlstate)));
                continue;
            }
            let stranger = match &winner {
                // An earlier record of the batch has the same id: it claimed the id or found its owner.
                Some((id, owner)) if *id == candidate.message_id => Some(*owner),
                _ => {
                    let stranger = answer.owners.get(&candidate.message_id).copied();
                    let owner = stranger.unwrap_or(Owner {
                        partition: place.partition,
                        offset: place.offset,
                        payload_hash: candidate.payload_hash,
                    });
                    winner = Some((candidate.message_id, owner));
                    stranger
                }
            };
            set(index, stranger.map_or(Outcome::Written, |owner| against_owner(place, candidate, &owner)));
        }
        for (index, place, candidate) in self.valid(&self.lookups) {
            let outcome = match answer.owners.get(&candidate.message_id) {
                // A later record of the partition owns the id, so it was free when this record was written:
                // the database must have refused this record.
                Some(owner) if owner.partition == place.partition && place.offset < owner.offset => {
                    Outcome::Rejected(None)
                }
                Some(owner) => against_owner(place, candidate, owner),
                // Valid and below the cursor, but no record owns its id: the database refused it.
                None => Outcome::Rejected(None),
            };
            set(index, outcome);
        }
        outcomes
    }
}

fn against_owner(place: &Place, candidate: &Candidate, owner: &Owner) -> Outcome {
    if (owner.partition, owner.offset) == (place.partition, place.offset) {
        Outcome::WrittenBefore
    } else if owner.payload_hash == candidate.payload_hash {
        Outcome::Duplicate
    } else {
        Outcome::DeadLetter(Reason::MessageIdConflict)
    }
}
