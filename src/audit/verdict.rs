//! Judges a record that a cursor has passed, by the owners of its message id. Pure.

use crate::domain::record::{NextOffset, TimestampMs};
use crate::reconcile::judge::judge;
use crate::reconcile::log::Identified;
use crate::reconcile::table::{Claim, Entry, Hashes, Notes, Place, Seen};
use crate::telemetry::metrics::AuditResult;

/// Allowance for clock differences between this process and the database, and for the delay of the status
/// registry.
const CLOCK_SLACK_MS: i64 = 10 * 60 * 1_000;

/// A valid record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Payment {
    /// Position of the record.
    pub place: Place,
    /// Message id, payload and timestamp.
    pub record: Identified,
    /// Earliest time at which the record can have been decided, by this process's clock.
    pub decided_after: TimestampMs,
}

/// The record that owns a message id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Position of the record.
    pub place: Place,
    /// Hash of its payload.
    pub payload_hash: i64,
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
    fn may_explain(&self, payment: &Payment) -> bool {
        let is_own_gone = self.until.is_some_and(|until| payment.record.timestamp <= until);
        let decided_after = payment.decided_after.0.saturating_sub(CLOCK_SLACK_MS);
        is_own_gone || self.at.is_some_and(|at| at.0 >= decided_after)
    }
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
///
/// # Errors
/// If the claims do not account for the record.
pub fn standing(payment: &Payment, owners: &[Owner], pruned: &Pruned) -> Result<AuditResult, Suspicion> {
    let (partition, offset) = payment.place;
    let is_same = |owner: &Owner| owner.payload_hash == payment.record.payload_hash;
    if let Some(own) = owners.iter().find(|owner| owner.place == payment.place) {
        return if is_same(own) { Ok(AuditResult::Owned) } else { Err(Suspicion::Differs) };
    }
    let is_seen = |owner: &&Owner| owner.place.0 != partition || owner.place.1 < offset;
    let mut seen = owners.iter().filter(is_seen).peekable();
    if seen.peek().is_some() {
        return Ok(if seen.any(is_same) { AuditResult::Duplicate } else { AuditResult::Conflict });
    }
    if pruned.may_explain(payment) {
        return Ok(AuditResult::Unknown);
    }
    Err(owners.first().map_or(Suspicion::Nobody, |owner| Suspicion::OwnedLater(is_same(owner))))
}

/// Describes what is wrong with a suspect that has no dead letter and was not skipped, in the words of
/// `reconcile`. `None` where `reconcile` allows it: a database without dead letters cannot tell what it
/// rejected. `has_row` tells whether `payment_metadata` has a row of the record; `None` if unknown.
pub fn charge(place: Place, suspicion: Suspicion, has_row: Option<bool>, publishes: bool) -> Option<String> {
    let claim = match suspicion {
        Suspicion::Nobody => Claim::Nobody,
        Suspicion::OwnedLater(true) => Claim::Same,
        Suspicion::OwnedLater(false) => Claim::Other,
        Suspicion::Differs => Claim::Own,
    };
    let notes = Notes {
        is_owned_later: matches!(suspicion, Suspicion::OwnedLater(_)),
        is_claim_wrong: suspicion == Suspicion::Differs,
        ..Notes::default()
    };
    let mut entry = Entry::new(place, claim, notes, Hashes::default());
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
    use uuid::Uuid;

    use super::*;
    use crate::domain::record::{Offset, Partition};

    const PAYMENT: Payment = Payment {
        place: (Partition(3), Offset(50)),
        record: Identified {
            message_id: Uuid::from_u128(7),
            payload_hash: 11,
            timestamp: TimestampMs(1_000_000_000),
        },
        decided_after: TimestampMs(2_000_000_000),
    };

    fn owner(partition: i32, offset: i64, payload_hash: i64) -> Owner {
        Owner { place: (Partition(partition), Offset(offset)), payload_hash }
    }

    fn stands(owners: &[Owner]) -> Result<AuditResult, Suspicion> {
        standing(&PAYMENT, owners, &Pruned::default())
    }

    #[test]
    fn a_record_is_accounted_for_by_an_owner_that_was_there_before_it() {
        for (owners, expected) in [
            (vec![owner(3, 50, 11)], Ok(AuditResult::Owned)),
            (vec![owner(3, 49, 11)], Ok(AuditResult::Duplicate)),
            (vec![owner(3, 49, 12)], Ok(AuditResult::Conflict)),
            (vec![owner(4, 99, 11)], Ok(AuditResult::Duplicate)),
            (vec![owner(4, 99, 12)], Ok(AuditResult::Conflict)),
            // In a retired generation and in the current one.
            (vec![owner(3, 90, 11), owner(3, 50, 11)], Ok(AuditResult::Owned)),
            (vec![owner(3, 90, 11), owner(4, 9, 11)], Ok(AuditResult::Duplicate)),
            (vec![owner(4, 9, 12), owner(4, 80, 11)], Ok(AuditResult::Duplicate)),
        ] {
            assert_eq!(stands(&owners), expected, "{owners:?}");
        }
    }

    #[test]
    fn a_record_without_such_an_owner_is_suspicious() {
        assert_eq!(stands(&[]), Err(Suspicion::Nobody));
        assert_eq!(stands(&[owner(3, 51, 11)]), Err(Suspicion::OwnedLater(true)));
        assert_eq!(stands(&[owner(3, 51, 12)]), Err(Suspicion::OwnedLater(false)));
        assert_eq!(stands(&[owner(3, 50, 12)]), Err(Suspicion::Differs));
    }

    #[test]
    fn claims_that_were_dropped_explain_what_nobody_owns_but_no_later_decision() {
        let stands = |until: i64, at: i64, owners: &[Owner]| {
            let pruned = Pruned { until: Some(TimestampMs(until)), at: Some(TimestampMs(at)) };
            standing(&PAYMENT, owners, &pruned)
        };
        let suspect = Err(Suspicion::Nobody);
        assert_eq!(stands(1_000_000_000, 0, &[]), Ok(AuditResult::Unknown), "its own claim may be gone");
        assert_eq!(stands(999_999_999, 0, &[]), suspect);
        assert_eq!(stands(0, 2_000_000_000, &[]), Ok(AuditResult::Unknown), "its original's may be gone");
        assert_eq!(stands(0, 2_000_000_000 - CLOCK_SLACK_MS, &[]), Ok(AuditResult::Unknown));
        assert_eq!(stands(0, 2_000_000_000 - CLOCK_SLACK_MS - 1, &[]), suspect);
        assert_eq!(stands(1_000_000_000, 0, &[owner(3, 51, 11)]), Ok(AuditResult::Unknown));
        assert_eq!(stands(1_000_000_000, 0, &[owner(3, 50, 11)]), Ok(AuditResult::Owned));
    }

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_reconcile() {
        let said = |suspicion, has_row| charge(PAYMENT.place, suspicion, has_row, true).unwrap();
        assert!(said(Suspicion::Nobody, Some(false)).starts_with("lost: "));
        assert!(said(Suspicion::Nobody, None).ends_with("(its rows could not be read)"));
        assert_eq!(said(Suspicion::Nobody, Some(true)), "written, but its message id is not in idempotency");
        assert!(said(Suspicion::OwnedLater(true), Some(false)).contains("later record"));
        assert!(said(Suspicion::OwnedLater(false), Some(false)).contains("later record"));
        assert_eq!(charge(PAYMENT.place, Suspicion::OwnedLater(true), Some(false), false), None);
        assert!(charge(PAYMENT.place, Suspicion::Nobody, Some(false), false).unwrap().starts_with("lost: "));
        assert!(said(Suspicion::Differs, Some(true)).contains("idempotency is not what the record says"));
    }
}
