//! Judges a record that a cursor has passed, by the owners of its message id. Pure.

use uuid::Uuid;

use crate::domain::batch::Owner;
use crate::domain::record::{NextOffset, Offset, Partition, TimestampMs};
use crate::reconcile::judge::judge;
use crate::reconcile::table::{Claim, Entry, Hashes, Notes, Seen};

/// Allowance for clock differences between this process and the database, and for the delay of the status
/// registry.
const CLOCK_SLACK_MS: i64 = 10 * 60 * 1_000;
/// How far a record's timestamp may be ahead of the time at which it was written to the log.
const STAMPED_AHEAD_MS: i64 = 60 * 60 * 1_000;

/// A valid record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Payment {
    /// Partition of the record.
    pub partition: Partition,
    /// Offset of the record.
    pub offset: Offset,
    /// Message id.
    pub message_id: Uuid,
    /// Hash of the payload.
    pub payload_hash: i64,
    /// Timestamp of the record.
    pub timestamp: TimestampMs,
    /// Earliest time at which the record can have been decided, by this process's clock.
    pub decided_after: TimestampMs,
}

impl Payment {
    /// Earliest decision time of a record that was decided before this process observed the partition.
    pub fn decided_after_log(timestamp: TimestampMs) -> TimestampMs {
        TimestampMs(timestamp.0.saturating_sub(STAMPED_AHEAD_MS))
    }
}

/// Cursor of a partition, from the same snapshot as the owners.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cursor {
    /// Next offset to write.
    pub applied: NextOffset,
    /// Next offset to publish.
    pub published: Option<NextOffset>,
}

/// Claims that have been dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pruned {
    /// Claims of records up to this timestamp may have been dropped.
    pub until: Option<TimestampMs>,
    /// When claims were last dropped, by the database's clock.
    pub at: Option<TimestampMs>,
}

impl Pruned {
    /// Whether the claim that decided this record may have been dropped: its own, which has the record's age,
    /// or that of an earlier record with the same id, if claims were dropped after the decision.
    pub fn may_explain(&self, payment: &Payment) -> bool {
        let is_own_gone = self.until.is_some_and(|until| payment.timestamp <= until);
        let decided_after = payment.decided_after.0.saturating_sub(CLOCK_SLACK_MS);
        is_own_gone || self.at.is_some_and(|at| at.0 >= decided_after)
    }
}

/// Status of a record by the owners of its id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It owns its id.
    Owned,
    /// Another record with the same payload owns the id.
    Duplicate,
    /// Another record with another payload owns the id.
    Conflict,
    /// The id has no owner, and the claim may have been dropped with its generation.
    Forgotten,
    /// The claims do not account for the record.
    Suspect(Suspicion),
}

/// What is suspicious about a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Suspicion {
    /// Its id has no owner.
    Nobody,
    /// A later record of its partition owns its id; `true` if the payload is the same.
    OwnedLater(bool),
    /// It owns its id, but with another payload.
    Differs,
}

/// Judges a record by the owners of its id. A retired generation may hold an owner beside a later one.
pub fn standing(payment: &Payment, owners: &[Owner], pruned: &Pruned) -> Standing {
    let is_at = |owner: &&Owner| owner.partition == payment.partition && owner.offset == payment.offset;
    let is_same = |owner: &Owner| owner.payload_hash == payment.payload_hash;
    if let Some(own) = owners.iter().find(is_at) {
        return if is_same(own) { Standing::Owned } else { Standing::Suspect(Suspicion::Differs) };
    }
    let is_seen = |owner: &&Owner| owner.partition != payment.partition || owner.offset < payment.offset;
    let mut seen = owners.iter().filter(is_seen).peekable();
    if seen.peek().is_some() {
        return if seen.any(is_same) { Standing::Duplicate } else { Standing::Conflict };
    }
    if pruned.may_explain(payment) {
        return Standing::Forgotten;
    }
    Standing::Suspect(match owners.first() {
        Some(owner) => Suspicion::OwnedLater(is_same(owner)),
        None => Suspicion::Nobody,
    })
}

/// Describes what is wrong with a suspect that has no dead letter and was not skipped, in the words of
/// `reconcile`. `None` where `reconcile` allows it: a database without dead letters cannot tell what it
/// rejected. `has_row` tells whether `payment_metadata` has a row of the record; `None` if unknown.
pub fn charge(suspicion: Suspicion, has_row: Option<bool>, publishes: bool) -> Option<String> {
    let (claim, notes) = match suspicion {
        Suspicion::Nobody => (Claim::Nobody, Notes::default()),
        Suspicion::OwnedLater(is_same) => {
            let claim = if is_same { Claim::Same } else { Claim::Other };
            (claim, Notes { is_owned_later: true, ..Notes::default() })
        }
        Suspicion::Differs => (Claim::Own, Notes { is_claim_wrong: true, ..Notes::default() }),
    };
    let mut entry = Entry::new(claim, notes, Hashes::default());
    if has_row == Some(true) {
        // The other tables are not read and are assumed to be correct.
        let one = Seen { count: 1, differs: false };
        (entry.found.metadata, entry.found.core) = (one, one);
    }
    // Only dead letters were searched, so missing events are not reported.
    let verdict = judge(&entry, publishes, |_| true);
    let wrong = verdict.wrongs.first()?.to_string();
    Some(match has_row {
        Some(_) => wrong,
        None => format!("{wrong} (its rows could not be read)"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYMENT: Payment = Payment {
        partition: Partition(3),
        offset: Offset(50),
        message_id: Uuid::from_u128(7),
        payload_hash: 11,
        timestamp: TimestampMs(1_000_000_000),
        decided_after: TimestampMs(2_000_000_000),
    };

    fn owner(partition: i32, offset: i64, payload_hash: i64) -> Owner {
        Owner { partition: Partition(partition), offset: Offset(offset), payload_hash }
    }

    fn stands(owners: &[Owner]) -> Standing {
        standing(&PAYMENT, owners, &Pruned::default())
    }

    #[test]
    fn a_record_is_accounted_for_by_an_owner_that_was_there_before_it() {
        for (owners, expected) in [
            (vec![owner(3, 50, 11)], Standing::Owned),
            (vec![owner(3, 49, 11)], Standing::Duplicate),
            (vec![owner(3, 49, 12)], Standing::Conflict),
            (vec![owner(4, 99, 11)], Standing::Duplicate),
            (vec![owner(4, 99, 12)], Standing::Conflict),
            // In a retired generation and in the current one.
            (vec![owner(3, 90, 11), owner(3, 50, 11)], Standing::Owned),
            (vec![owner(3, 90, 11), owner(4, 9, 11)], Standing::Duplicate),
            (vec![owner(4, 9, 12), owner(4, 80, 11)], Standing::Duplicate),
        ] {
            assert_eq!(stands(&owners), expected, "{owners:?}");
        }
    }

    #[test]
    fn a_record_without_such_an_owner_is_suspicious() {
        assert_eq!(stands(&[]), Standing::Suspect(Suspicion::Nobody));
        assert_eq!(stands(&[owner(3, 51, 11)]), Standing::Suspect(Suspicion::OwnedLater(true)));
        assert_eq!(stands(&[owner(3, 51, 12)]), Standing::Suspect(Suspicion::OwnedLater(false)));
        assert_eq!(stands(&[owner(3, 50, 12)]), Standing::Suspect(Suspicion::Differs));
    }

    #[test]
    fn claims_that_were_dropped_explain_what_nobody_owns_but_no_later_decision() {
        let stands = |until: i64, at: i64, owners: &[Owner]| {
            let pruned = Pruned { until: Some(TimestampMs(until)), at: Some(TimestampMs(at)) };
            standing(&PAYMENT, owners, &pruned)
        };
        let suspect = Standing::Suspect(Suspicion::Nobody);
        assert_eq!(stands(1_000_000_000, 0, &[]), Standing::Forgotten, "its own claim may be gone");
        assert_eq!(stands(999_999_999, 0, &[]), suspect);
        assert_eq!(stands(0, 2_000_000_000, &[]), Standing::Forgotten, "its original's may be gone");
        assert_eq!(stands(0, 2_000_000_000 - CLOCK_SLACK_MS, &[]), Standing::Forgotten);
        assert_eq!(stands(0, 2_000_000_000 - CLOCK_SLACK_MS - 1, &[]), suspect);
        assert_eq!(stands(1_000_000_000, 0, &[owner(3, 51, 11)]), Standing::Forgotten);
        assert_eq!(stands(1_000_000_000, 0, &[owner(3, 50, 11)]), Standing::Owned);
    }

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_reconcile() {
        let said = |suspicion, has_row| charge(suspicion, has_row, true).unwrap();
        assert!(said(Suspicion::Nobody, Some(false)).starts_with("lost: "));
        assert!(said(Suspicion::Nobody, None).ends_with("(its rows could not be read)"));
        assert_eq!(said(Suspicion::Nobody, Some(true)), "written, but its message id is not in idempotency");
        assert!(said(Suspicion::OwnedLater(true), Some(false)).contains("later record"));
        assert!(said(Suspicion::OwnedLater(false), Some(false)).contains("later record"));
        assert_eq!(charge(Suspicion::OwnedLater(true), Some(false), false), None);
        assert!(charge(Suspicion::Nobody, Some(false), false).unwrap().starts_with("lost: "));
        assert!(said(Suspicion::Differs, Some(true)).contains("idempotency is not what the record says"));
    }
}
