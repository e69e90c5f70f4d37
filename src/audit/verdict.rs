//! What the owners of a message id say about a record that a cursor has passed. Pure.

use uuid::Uuid;

use crate::batch::Owner;
use crate::reconcile::judge::judge;
use crate::reconcile::table::{Claim, Entry, Hashes, Notes, Seen};
use crate::record::{NextOffset, Offset, Partition, TimestampMs};

/// Between this process's clock and the database's, and between a decision and the moment at which the board is told.
const CLOCK_SLACK_MS: i64 = 10 * 60 * 1_000;
/// How far a record's timestamp may lie ahead of the moment at which it was written to the log.
const STAMPED_AHEAD_MS: i64 = 60 * 60 * 1_000;

/// A valid record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Payment {
    /// Where it stands.
    pub partition: Partition,
    /// Where it stands.
    pub offset: Offset,
    /// Its message id.
    pub message_id: Uuid,
    /// Hash of its payload.
    pub payload_hash: i64,
    /// Its timestamp.
    pub timestamp: TimestampMs,
    /// It was decided no earlier than this, by this process's clock.
    pub decided_after: TimestampMs,
}

impl Payment {
    /// A lower bound of the moment at which a record was decided that came before this process looked.
    pub fn decided_after_log(timestamp: TimestampMs) -> TimestampMs {
        TimestampMs(timestamp.0.saturating_sub(STAMPED_AHEAD_MS))
    }
}

/// The cursor of a partition, in the snapshot in which the owners were read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cursor {
    /// Next offset to write.
    pub applied: NextOffset,
    /// Next offset to publish.
    pub published: Option<NextOffset>,
}

/// What has been dropped of the claims.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pruned {
    /// Claims of records up to this time may be gone.
    pub until: Option<TimestampMs>,
    /// When claims were last dropped, by the database's clock.
    pub at: Option<TimestampMs>,
}

impl Pruned {
    /// Whether the claim that decided this record may be gone: its own, which is as old as itself, or that of the
    /// record that it repeated, if claims were dropped after it was decided.
    pub fn may_explain(&self, payment: &Payment) -> bool {
        let is_own_gone = self.until.is_some_and(|until| payment.timestamp <= until);
        let decided_after = payment.decided_after.0.saturating_sub(CLOCK_SLACK_MS);
        is_own_gone || self.at.is_some_and(|at| at.0 >= decided_after)
    }
}

/// Where a record stands by the owners of its id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It owns its id.
    Owned,
    /// Another record owns the id, with the same payload.
    Duplicate,
    /// Another record owns the id, with another payload.
    Conflict,
    /// Nobody owns the id any more, and the claim may have been dropped with its generation.
    Forgotten,
    /// Nothing that the claims say accounts for it.
    Suspect(Suspicion),
}

/// What is suspicious about a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Suspicion {
    /// Nobody owns its id.
    Nobody,
    /// A later record of its partition owns its id; `true` with the same payload.
    OwnedLater(bool),
    /// It owns its id with another payload than its own.
    Differs,
}

/// Judges a record by the owners of its id; a generation that was retired may still show an owner beside a later one.
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

/// What is wrong with a suspicious record that has no dead letter and was not given up, in the words of `reconcile`;
/// `None` where `reconcile` excuses it, because a database without dead letters cannot tell what it refused. `has_row`:
/// whether `payment_metadata` names the record; `None` if that could not be asked.
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
        // The other tables cannot be told from it: they are taken for right.
        let one = Seen { count: 1, differs: false };
        (entry.found.metadata, entry.found.core) = (one, one);
    }
    // Of the outputs only the dead letters were read: what is missing elsewhere is not told.
    let verdict = judge(&entry, publishes, |_| true);
    let wrong = verdict.wrongs.first()?.to_string();
    Some(match has_row {
        Some(_) => wrong,
        None => format!("{wrong} (its rows could not be looked for)"),
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
        assert!(said(Suspicion::Nobody, None).ends_with("(its rows could not be looked for)"));
        assert_eq!(said(Suspicion::Nobody, Some(true)), "written, but its message id is not in idempotency");
        assert!(said(Suspicion::OwnedLater(true), Some(false)).contains("later record"));
        assert!(said(Suspicion::OwnedLater(false), Some(false)).contains("later record"));
        assert_eq!(charge(Suspicion::OwnedLater(true), Some(false), false), None);
        assert!(charge(Suspicion::Nobody, Some(false), false).unwrap().starts_with("lost: "));
        assert!(said(Suspicion::Differs, Some(true)).contains("idempotency is not what the record says"));
    }
}
