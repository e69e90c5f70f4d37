//! Records that the claims do not account for, until it is known what became of them. Pure.

use std::time::{Duration, Instant};

use super::verdict::{Payment, Suspicion};

/// So many wait at most; no further range is audited while there is no room for a piece's records.
const SUSPECTS_MAX: usize = 5_000;
/// Looked into at once, at most.
const TAKE_MAX: usize = 1_000;
/// A suspicion is looked into after this time: something may have been under way.
const LOOK_AFTER: Duration = Duration::from_secs(5);
/// What is not published yet is looked at again after this time.
const AGAIN: Duration = Duration::from_secs(10);
/// After a look that failed.
const RETRY: Duration = Duration::from_secs(60);
/// Looks that may fail before the record is counted all the same.
const TRIES_MAX: u32 = 5;

/// A suspicious record.
#[derive(Clone, Copy, Debug)]
pub struct Suspect {
    /// The record.
    pub payment: Payment,
    /// What is suspicious.
    pub suspicion: Suspicion,
    due_at: Instant,
    tries: u32,
}

/// Those that wait.
#[derive(Debug, Default)]
pub struct Suspects(Vec<Suspect>);

impl Suspects {
    /// Whether as many as a piece may bring have room.
    pub fn has_room(&self, piece: usize) -> bool {
        self.0.len().saturating_add(piece) <= SUSPECTS_MAX
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds one, to be looked into in a while.
    pub fn add(&mut self, payment: Payment, suspicion: Suspicion, now: Instant) {
        self.0.push(Suspect { payment, suspicion, due_at: now + LOOK_AFTER, tries: 0 });
    }

    /// Takes those that are due.
    pub fn take(&mut self, now: Instant) -> Vec<Suspect> {
        let mut taken = Vec::new();
        self.0.retain(|suspect| {
            let is_taken = suspect.due_at <= now && taken.len() < TAKE_MAX;
            if is_taken {
                taken.push(*suspect);
            }
            !is_taken
        });
        taken
    }

    /// Puts back one whose events, or dead letter, may not be sent yet.
    pub fn wait(&mut self, suspect: Suspect, now: Instant) {
        self.0.push(Suspect { due_at: now + AGAIN, ..suspect });
    }

    /// Puts back those that could not be looked into; returns those that were tried often enough.
    pub fn retry(&mut self, suspects: Vec<Suspect>, now: Instant) -> Vec<Suspect> {
        let (again, over): (Vec<_>, Vec<_>) = suspects
            .into_iter()
            .map(|suspect| Suspect { due_at: now + RETRY, tries: suspect.tries + 1, ..suspect })
            .partition(|suspect| suspect.tries < TRIES_MAX);
        self.0.extend(again);
        over
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::record::{Offset, Partition, TimestampMs};

    fn payment(offset: i64) -> Payment {
        Payment {
            partition: Partition(0),
            offset: Offset(offset),
            message_id: Uuid::from_u128(1),
            payload_hash: 0,
            timestamp: TimestampMs(0),
            decided_after: TimestampMs(0),
        }
    }

    #[test]
    fn a_suspicion_is_looked_into_later_and_tried_a_bounded_number_of_times() {
        let mut now = Instant::now();
        let mut suspects = Suspects::default();
        suspects.add(payment(1), Suspicion::Nobody, now);
        assert!(suspects.take(now).is_empty());
        now += LOOK_AFTER;
        for try_ in 1..TRIES_MAX {
            let taken = suspects.take(now);
            assert_eq!((taken.len(), suspects.len()), (1, 0));
            assert!(suspects.retry(taken, now).is_empty(), "{try_}");
            assert!(suspects.take(now).is_empty());
            now += RETRY;
        }
        let taken = suspects.take(now);
        assert_eq!(suspects.retry(taken, now).len(), 1);
        assert_eq!(suspects.len(), 0);
    }

    #[test]
    fn their_number_is_bounded_by_asking_for_room() {
        let now = Instant::now();
        let mut suspects = Suspects::default();
        assert!(suspects.has_room(SUSPECTS_MAX));
        (0..4_500).for_each(|offset| suspects.add(payment(offset), Suspicion::Nobody, now));
        assert!(suspects.has_room(500) && !suspects.has_room(501));
        assert_eq!(suspects.take(now + LOOK_AFTER).len(), TAKE_MAX);
    }
}
