//! Records that the claims do not account for, until their outcome is known. Pure.

use std::time::{Duration, Instant};

use super::verdict::{Payment, Suspicion};

/// Maximum number of suspects; no further range is audited while there is no room for the records of a piece.
const SUSPECTS_MAX: usize = 5_000;
/// Maximum number of suspects checked together.
const TAKE_MAX: usize = 1_000;
/// Delay before a suspect is checked, so that transactions in flight can finish.
const LOOK_AFTER: Duration = Duration::from_secs(5);
/// Delay before the next check of a suspect that is not published yet or could not be checked.
const AGAIN: Duration = Duration::from_secs(30);

/// A suspect.
#[derive(Clone, Copy, Debug)]
pub struct Suspect {
    /// The record.
    pub payment: Payment,
    /// What is suspicious.
    pub suspicion: Suspicion,
    since: Instant,
    due_at: Instant,
}

/// Suspects that wait for a check.
#[derive(Debug, Default)]
pub struct Suspects(Vec<Suspect>);

impl Suspects {
    /// Whether there is room for a piece of this many records.
    pub fn has_room(&self, piece: usize) -> bool {
        self.0.len().saturating_add(piece) <= SUSPECTS_MAX
    }

    /// Number of suspects.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds a suspect, to be checked after a delay.
    pub fn add(&mut self, payment: Payment, suspicion: Suspicion, now: Instant) {
        self.0.push(Suspect { payment, suspicion, since: now, due_at: now + LOOK_AFTER });
    }

    /// Takes the suspects that are due.
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

    /// Returns suspects that cannot be decided yet.
    pub fn wait(&mut self, suspects: impl IntoIterator<Item = Suspect>, now: Instant) {
        self.0.extend(suspects.into_iter().map(|suspect| Suspect { due_at: now + AGAIN, ..suspect }));
    }

    /// Time at which the oldest suspect was added.
    pub fn oldest(&self) -> Option<Instant> {
        self.0.iter().map(|suspect| suspect.since).min()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::record::{Offset, Partition, TimestampMs};
    use crate::reconcile::log::Identified;

    fn payment(offset: i64) -> Payment {
        Payment {
            place: (Partition(0), Offset(offset)),
            record: Identified { message_id: Uuid::from_u128(1), payload_hash: 0, timestamp: TimestampMs(0) },
            decided_after: TimestampMs(0),
        }
    }

    #[test]
    fn a_suspicion_is_looked_into_later_and_again_until_it_is_judged() {
        let began = Instant::now();
        let mut suspects = Suspects::default();
        suspects.add(payment(1), Suspicion::Nobody, began);
        assert!(suspects.take(began).is_empty());
        let mut now = began + LOOK_AFTER;
        for _ in 0..3 {
            let taken = suspects.take(now);
            assert_eq!((taken.len(), suspects.len()), (1, 0));
            suspects.wait(taken, now);
            assert!(suspects.take(now).is_empty());
            assert_eq!(suspects.oldest(), Some(began));
            now += AGAIN;
        }
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
