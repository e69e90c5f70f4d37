//! Rechecks records whose events and rows do not match because an earlier database (restored, replaced or
//! rebuilt since) decided differently about their message id. If several records have the same id, another
//! one may have been first there; a duplicate may have arrived after its original was forgotten. Pure.

use std::collections::HashMap;
use std::time::Duration;

use uuid::Uuid;

use super::database::Claimed;
use super::judge::{Outcome, Verdict, Wrong};
use super::log::Identified;
use super::table::{Entry, Part, Place};
use crate::domain::columns::from_postgres_timestamp;
use crate::domain::wire::Reason;

/// A record with a deviation that an earlier database may explain.
pub struct Suspect {
    /// Position of the record.
    pub place: Place,
    /// The deviations.
    pub wrongs: Vec<Wrong>,
    /// It has its rows, a dead letter as rejected by the database, and no event.
    was_refused: bool,
}

/// Information about the message ids of suspects.
#[derive(Default)]
pub struct Evidence {
    /// The suspects.
    pub identified: HashMap<Place, Identified>,
    /// Claim of each id.
    pub claims: HashMap<Uuid, Claimed>,
    /// Records with a read event for each id.
    pub senders: HashMap<Uuid, Vec<Place>>,
}

impl Suspect {
    /// Takes a record if an earlier database may explain its deviation; `None` if it is simply wrong.
    pub fn of(entry: &Entry, verdict: &Verdict) -> Option<Self> {
        let is_explicable = |wrong: &Wrong| match wrong {
            Wrong::Missing(part) | Wrong::Extra(part, _) => Part::OUTPUTS.contains(part),
            Wrong::OtherReason(..) => true,
            _ => false,
        };
        if !verdict.wrongs.iter().all(is_explicable) {
            return None;
        }
        let (read, email, letter) = (entry.found.read, entry.found.email, entry.found.letter);
        if [read, email, letter].iter().any(|seen| seen.differs) || letter.count > 1 {
            return None;
        }
        let is_letter_due_to_database =
            matches!(entry.reason, Some(Reason::MessageIdConflict | Reason::RejectedByDatabase));
        if letter.count == 1 && !is_letter_due_to_database {
            return None;
        }
        let is_silent = read.count == 0 && email.count == 0;
        let is_sender = read.count == 1 && email.count == u8::from(entry.expected.email != 0);
        let is_written = verdict.outcome == Outcome::Written;
        if !is_silent && (is_written || !is_sender) {
            return None;
        }
        let was_refused =
            is_written && is_silent && letter.count == 1 && entry.reason == Some(Reason::RejectedByDatabase);
        Some(Self { place: entry.place, wrongs: verdict.wrongs.clone(), was_refused })
    }

    /// Why the deviation is allowed; `None` if it is wrong.
    pub fn explanation(&self, evidence: &Evidence, window: Duration) -> Option<String> {
        let identified = evidence.identified.get(&self.place)?;
        let claimed = evidence.claims.get(&identified.message_id)?;
        let owner = claimed.place;
        let senders = evidence.senders.get(&identified.message_id).map(Vec::as_slice).unwrap_or_default();
        match senders {
            // Rejected at first, and accepted when it was written again.
            [] if self.was_refused && self.place == owner => Some(
                "rejected by the database at first, written later: it has a dead letter and no events"
                    .to_owned(),
            ),
            // One record has the rows, another one has the events.
            [sender] if *sender != owner => {
                let ((p, o), what) = if self.place == owner {
                    (*sender, "the rows are its own, the events are those")
                } else {
                    (owner, "the rows are those")
                };
                Some(format!("several records have its message id: {what} of partition {p}, offset {o}"))
            }
            // Its own claim expired earlier; the database that has the rows now still remembered the id.
            _ if senders.contains(&self.place) && self.place != owner => {
                let owned_at = from_postgres_timestamp(claimed.created_at_us);
                let apart_ms = identified.timestamp.0.saturating_sub(owned_at.0).unsigned_abs();
                (u128::from(apart_ms) > window.as_millis()).then(|| {
                    format!(
                        "a duplicate of partition {}, offset {}, further apart than idempotency.window: written \
                         and sent by an earlier database",
                        owner.0, owner.1
                    )
                })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::{Claim, Hashes, Notes};
    use super::super::{judge::judge, table::Seen};
    use super::*;
    use crate::domain::columns::postgres_timestamp;
    use crate::domain::record::{Offset, Partition, TimestampMs};

    const ONE: Seen = Seen { count: 1, differs: false };
    const WINDOW: Duration = Duration::from_secs(100);
    const ID: Uuid = Uuid::from_u128(7);

    fn place(offset: i64) -> Place {
        (Partition(0), Offset(offset))
    }

    /// A record with rows and no events, and one with events and no rows.
    fn entries() -> [Entry; 2] {
        let hashes = Hashes { metadata: 1, core: 2, notes: 0, read: 4, email: 5, letter: 6 };
        let mut winner = Entry::new(place(1), Claim::Own, Notes::default(), hashes);
        (winner.found.metadata, winner.found.core) = (ONE, ONE);
        let mut sender = Entry::new(place(2), Claim::Same, Notes::default(), hashes);
        (sender.found.read, sender.found.email) = (ONE, ONE);
        [winner, sender]
    }

    fn evidence(senders: Vec<Place>, apart_ms: i64) -> Evidence {
        let created_at_us = postgres_timestamp(TimestampMs(0));
        let claimed = Claimed { place: place(1), payload_hash: 0, created_at_us };
        let identified = |ms| Identified { message_id: ID, payload_hash: 0, timestamp: TimestampMs(ms) };
        Evidence {
            identified: [(place(1), identified(0)), (place(2), identified(apart_ms))].into(),
            claims: [(ID, claimed)].into(),
            senders: [(ID, senders)].into(),
        }
    }

    fn resolved(entries: [&Entry; 2], evidence: &Evidence) -> (u64, u64) {
        let (mut allowed, mut wrong) = (0, 0);
        for entry in entries {
            let verdict = judge(entry, true, |_| false);
            match Suspect::of(entry, &verdict) {
                _ if verdict.wrongs.is_empty() => {}
                Some(suspect) if suspect.explanation(evidence, WINDOW).is_some() => allowed += 1,
                Some(suspect) => wrong += suspect.wrongs.len() as u64,
                None => wrong += 1,
            }
        }
        (allowed, wrong)
    }

    #[test]
    fn rows_of_one_record_and_events_of_another_are_allowed_for_one_id_only() {
        let [winner, sender] = entries();
        let both = [&winner, &sender];
        assert_eq!(resolved(both, &evidence(vec![place(2)], 0)), (2, 0));
        // With two senders or none, something was sent twice or not at all.
        let wrongs_of_both = 2 + 2;
        assert_eq!(resolved(both, &evidence(vec![place(2), place(3)], 0)), (0, wrongs_of_both));
        assert_eq!(resolved(both, &evidence(vec![], 0)), (0, wrongs_of_both));
        // Another id.
        let mut other = evidence(vec![place(2)], 0);
        other.senders = [(Uuid::from_u128(8), vec![place(2)])].into();
        assert_eq!(resolved(both, &other), (0, wrongs_of_both));
    }

    #[test]
    fn a_duplicate_may_have_been_sent_only_if_it_is_further_away_than_the_window() {
        let [mut original, sender] = entries();
        (original.found.read, original.found.email) = (ONE, ONE);
        let both = [&original, &sender];
        let senders = vec![place(1), place(2)];
        assert_eq!(resolved(both, &evidence(senders.clone(), 100_001)), (1, 0));
        assert_eq!(resolved(both, &evidence(senders, 100_000)), (0, 2));
    }

    #[test]
    fn events_that_differ_or_come_twice_are_never_explained() {
        let [winner, sender] = entries();
        for harm in [
            |e: &mut Entry| e.found.read.differs = true,
            |e: &mut Entry| e.found.read.count = 2,
            |e: &mut Entry| e.found.email.count = 0,
        ] {
            let mut harmed = sender.clone();
            harm(&mut harmed);
            let both = [&winner, &harmed];
            assert_eq!(resolved(both, &evidence(vec![place(2)], 0)), (1, 1));
        }
    }
}
