//! Decides whether a record's outcome is correct. Pure.

use serde::{Serialize, Serializer};

use super::table::{Claim, Entry, Part};
use crate::domain::wire::Reason;

/// Outcome of a record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, thiserror::Error)]
pub enum Outcome {
    /// It was written.
    #[error("written")]
    Written,
    /// Another record with the same payload was written.
    #[error("duplicate")]
    Duplicate,
    /// It was dead-lettered.
    #[error("dead-lettered: {0}")]
    DeadLetter(Reason),
    /// An operator skipped it, and it has no outcome.
    #[error("given up")]
    GivenUp,
    /// It has no outcome.
    #[error("lost")]
    Lost,
}

impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A deviation from the expected outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Wrong {
    /// Valid, but without any outcome.
    #[error("lost: it is valid, its id is not claimed, and it has no outcome")]
    Lost,
    /// Written, but its message id is not claimed.
    #[error("written, but its message id is not in idempotency")]
    Unclaimed,
    /// Its claim does not match the record.
    #[error("its row in idempotency is not what the record says")]
    ClaimDiffers,
    /// A later record of its partition has claimed its id.
    #[error("a later record of its partition has its message id")]
    OwnedLater,
    /// At least one table has more than one row.
    #[error("its rows exist more than once ({0} in a join of the tables)")]
    RowsTwice(u8),
    /// A row or an output is missing.
    #[error("no {0}")]
    Missing(Part),
    /// A row or an output should not exist.
    #[error("{article} {0}, though it should be {1}", article = .0.article())]
    Extra(Part, Outcome),
    /// A row or an output does not match the record.
    #[error("its {0} is not what the record says")]
    Differs(Part),
    /// There are this many outputs instead of one.
    #[error("its {0} is there {1} times")]
    OutputTwice(Part, u8),
    /// The dead letter has another reason than expected.
    #[error("dead-lettered as {found}, not as {1}", found = .0.map_or("an unknown reason", Reason::as_str))]
    OtherReason(Option<Reason>, Reason),
}

/// Verdict on a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// Actual or expected outcome.
    pub outcome: Outcome,
    /// Deviations.
    pub wrongs: Vec<Wrong>,
    /// Missing outputs that may have been removed from their topic by retention.
    pub untold: u64,
}

/// Reason of a record whose only trace is a dead letter for a rule that it fulfils by the current settings:
/// the settings were different when it was processed. It claimed no id, so its replay may have been written
/// since.
pub fn refused_by_other_settings(entry: &Entry, publishes: bool) -> Option<Reason> {
    let is_valid_now = !matches!(entry.claim, Claim::Refused(_) | Claim::Own);
    let is_alone = !entry.has_row() && entry.found.read.count == 0 && entry.found.letter.count == 1;
    entry.reason.filter(|reason| {
        publishes
            && is_valid_now
            && is_alone
            && !matches!(reason, Reason::MessageIdConflict | Reason::RejectedByDatabase)
    })
}

/// Expected outcome by the log, the claims and, where claims may have been pruned, the rows.
fn outcome(entry: &Entry, publishes: bool) -> Outcome {
    let notes = &entry.circumstances;
    let has_row = entry.has_row();
    let is_nothing = !has_row && Part::OUTPUTS.iter().all(|part| entry.found.of(*part).count == 0);
    if notes.is_given_up && is_nothing && entry.claim != Claim::Own {
        return Outcome::GivenUp;
    }
    // Such a record claims no id, so that its replay, a later record with the same id, can be written.
    let is_rejected = publishes && !has_row && entry.reason == Some(Reason::RejectedByDatabase);
    if let Some(reason) = refused_by_other_settings(entry, publishes) {
        return Outcome::DeadLetter(reason);
    }
    match entry.claim {
        Claim::Refused(reason) => Outcome::DeadLetter(reason),
        Claim::Own => Outcome::Written,
        // Its own claim was dropped with its generation, and a later record claimed the id again.
        Claim::Same | Claim::Other if notes.is_prunable && has_row => Outcome::Written,
        Claim::Same | Claim::Other | Claim::Nobody if is_rejected => {
            Outcome::DeadLetter(Reason::RejectedByDatabase)
        }
        Claim::Same => Outcome::Duplicate,
        Claim::Other => Outcome::DeadLetter(Reason::MessageIdConflict),
        Claim::Nobody if has_row => Outcome::Written,
        Claim::Nobody if notes.is_prunable && notes.is_elsewhere => match entry.reason {
            Some(Reason::MessageIdConflict) => Outcome::DeadLetter(Reason::MessageIdConflict),
            _ => Outcome::Duplicate,
        },
        Claim::Nobody => Outcome::Lost,
    }
}

/// Judges a record. `is_cut_off` tells for an output whether it may have been removed by retention.
pub fn judge(entry: &Entry, publishes: bool, is_cut_off: impl Fn(Part) -> bool) -> Verdict {
    let outcome = outcome(entry, publishes);
    let mut verdict = Verdict { outcome, wrongs: Vec::new(), untold: 0 };
    let notes = &entry.circumstances;
    let wrongs = &mut verdict.wrongs;
    match outcome {
        Outcome::GivenUp => return verdict,
        Outcome::Lost if notes.is_given_up => return Verdict { outcome: Outcome::GivenUp, ..verdict },
        Outcome::Lost => {
            wrongs.push(Wrong::Lost);
            return verdict;
        }
        Outcome::Written | Outcome::Duplicate | Outcome::DeadLetter(_) => {}
    }
    let is_written = outcome == Outcome::Written;
    if is_written && entry.claim == Claim::Nobody && !notes.is_prunable {
        wrongs.push(Wrong::Unclaimed);
    }
    if notes.is_claim_wrong {
        wrongs.push(Wrong::ClaimDiffers);
    }
    // Without dead letters it is unknown whether the database rejected it.
    let is_excused = notes.is_given_up
        || notes.is_prunable
        || !publishes
        || outcome == Outcome::DeadLetter(Reason::RejectedByDatabase)
        || refused_by_other_settings(entry, publishes).is_some();
    if notes.is_owned_later && !is_written && !is_excused {
        wrongs.push(Wrong::OwnedLater);
    }
    let is_due = |part| match part {
        Part::Metadata | Part::Core | Part::Read => is_written,
        Part::Notes | Part::Email => is_written && entry.expected.of(part) != 0,
        Part::DeadLetter => matches!(outcome, Outcome::DeadLetter(_)),
    };
    rows(entry, outcome, is_due, wrongs);
    if !publishes {
        return verdict;
    }
    for part in Part::OUTPUTS {
        let seen = entry.found.of(part);
        match (is_due(part), seen.count) {
            (true, 0) if notes.is_given_up => {}
            (true, 0) if is_cut_off(part) => verdict.untold += 1,
            (true, 0) => wrongs.push(Wrong::Missing(part)),
            (true, 1) if seen.differs => wrongs.push(Wrong::Differs(part)),
            (true, 1) | (false, 0) => {}
            (true, count) => wrongs.push(Wrong::OutputTwice(part, count)),
            (false, _) => wrongs.push(Wrong::Extra(part, outcome)),
        }
    }
    if let Outcome::DeadLetter(reason) = outcome
        && entry.found.letter.count > 0
        && entry.reason != Some(reason)
    {
        wrongs.push(Wrong::OtherReason(entry.reason, reason));
    }
    verdict
}

fn rows(entry: &Entry, outcome: Outcome, is_due: impl Fn(Part) -> bool, wrongs: &mut Vec<Wrong>) {
    let count = entry.found.metadata.count;
    if is_due(Part::Metadata) && count == 0 {
        // The other tables are found through this row only; they do not contain the source position.
        if !entry.circumstances.is_archived && !entry.circumstances.is_given_up {
            wrongs.push(Wrong::Missing(Part::Metadata));
        }
        return;
    }
    if is_due(Part::Metadata) && count > 1 {
        wrongs.push(Wrong::RowsTwice(count));
    }
    for part in Part::ROWS {
        let seen = entry.found.of(part);
        match (is_due(part), seen.count) {
            (true, 0) => wrongs.push(Wrong::Missing(part)),
            (true, _) if seen.differs => wrongs.push(Wrong::Differs(part)),
            (false, 1..) => wrongs.push(Wrong::Extra(part, outcome)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::{Each, Hashes, Notes, Place, Seen};
    use super::*;
    use crate::domain::record::{Offset, Partition};

    const PLACE: Place = (Partition(0), Offset(0));
    const ONE: Seen = Seen { count: 1, differs: false };

    fn hashes() -> Hashes {
        Hashes { metadata: 1, core: 2, notes: 3, read: 4, email: 5, letter: 6 }
    }

    fn written() -> Entry {
        let mut entry = Entry::new(PLACE, Claim::Own, Notes::default(), hashes());
        entry.found =
            Each { metadata: ONE, core: ONE, notes: ONE, read: ONE, email: ONE, letter: Seen::default() };
        entry
    }

    fn letter(claim: Claim, reason: Reason) -> Entry {
        let mut entry = Entry::new(PLACE, claim, Notes::default(), hashes());
        entry.found.letter = ONE;
        entry.reason = Some(reason);
        entry
    }

    fn wrongs(entry: &Entry) -> Vec<Wrong> {
        judge(entry, true, |_| false).wrongs
    }

    #[test]
    fn each_right_outcome_passes() {
        for (entry, expected) in [
            (written(), Outcome::Written),
            (Entry::new(PLACE, Claim::Same, Notes::default(), hashes()), Outcome::Duplicate),
            (letter(Claim::Other, Reason::MessageIdConflict), Outcome::DeadLetter(Reason::MessageIdConflict)),
            (
                letter(Claim::Refused(Reason::EmptyValue), Reason::EmptyValue),
                Outcome::DeadLetter(Reason::EmptyValue),
            ),
            (
                letter(Claim::Nobody, Reason::RejectedByDatabase),
                Outcome::DeadLetter(Reason::RejectedByDatabase),
            ),
        ] {
            let verdict = judge(&entry, true, |_| false);
            assert_eq!(verdict, Verdict { outcome: expected, wrongs: vec![], untold: 0 });
        }
    }

    #[test]
    fn each_single_fault_of_a_written_record_is_named() {
        type Harm = fn(&mut Entry);
        let harms: [(Harm, Wrong); 13] = [
            (|e| e.found.metadata = Seen::default(), Wrong::Missing(Part::Metadata)),
            (|e| e.found.core = Seen::default(), Wrong::Missing(Part::Core)),
            (|e| e.found.notes = Seen::default(), Wrong::Missing(Part::Notes)),
            (|e| e.expected.notes = 0, Wrong::Extra(Part::Notes, Outcome::Written)),
            (|e| e.found.core.differs = true, Wrong::Differs(Part::Core)),
            (|e| e.found.metadata.count = 2, Wrong::RowsTwice(2)),
            (|e| e.found.read.count = 0, Wrong::Missing(Part::Read)),
            (|e| e.found.email.count = 2, Wrong::OutputTwice(Part::Email, 2)),
            (|e| e.expected.email = 0, Wrong::Extra(Part::Email, Outcome::Written)),
            (|e| e.found.read.differs = true, Wrong::Differs(Part::Read)),
            (|e| e.found.letter.count = 1, Wrong::Extra(Part::DeadLetter, Outcome::Written)),
            (|e| e.claim = Claim::Nobody, Wrong::Unclaimed),
            (|e| e.circumstances.is_claim_wrong = true, Wrong::ClaimDiffers),
        ];
        for (harm, expected) in harms {
            let mut entry = written();
            harm(&mut entry);
            assert_eq!(wrongs(&entry), [expected]);
        }
    }

    #[test]
    fn a_record_without_an_outcome_is_lost_and_a_dead_letter_must_name_the_reason() {
        assert_eq!(wrongs(&Entry::new(PLACE, Claim::Nobody, Notes::default(), hashes())), [Wrong::Lost]);
        let claimed = Entry::new(PLACE, Claim::Own, Notes::default(), hashes());
        let missing =
            [Wrong::Missing(Part::Metadata), Wrong::Missing(Part::Read), Wrong::Missing(Part::Email)];
        assert_eq!(wrongs(&claimed), missing, "a claim without rows");
        let other = letter(Claim::Refused(Reason::EmptyValue), Reason::TooLarge);
        assert_eq!(wrongs(&other), [Wrong::OtherReason(Some(Reason::TooLarge), Reason::EmptyValue)]);
        assert_eq!(
            wrongs(&letter(Claim::Same, Reason::MessageIdConflict)),
            [Wrong::Extra(Part::DeadLetter, Outcome::Duplicate)]
        );
    }

    #[test]
    fn what_may_be_gone_for_a_good_reason_is_no_fault() {
        let pruned = Notes { is_prunable: true, ..Notes::default() };
        for claim in [Claim::Nobody, Claim::Same, Claim::Other] {
            let mut entry = written();
            (entry.claim, entry.circumstances) = (claim, pruned);
            assert_eq!(judge(&entry, true, |_| false).outcome, Outcome::Written);
            assert_eq!(wrongs(&entry), []);
        }
        let elsewhere = Notes { is_elsewhere: true, ..pruned };
        assert_eq!(wrongs(&Entry::new(PLACE, Claim::Nobody, elsewhere, hashes())), []);
        // Rejected by the database, and its replay was written.
        let mut replayed = letter(Claim::Same, Reason::RejectedByDatabase);
        replayed.circumstances.is_owned_later = true;
        assert_eq!(wrongs(&replayed), []);
        let mut overtaken = Entry::new(PLACE, Claim::Same, Notes::default(), hashes());
        overtaken.circumstances.is_owned_later = true;
        assert_eq!(wrongs(&overtaken), [Wrong::OwnedLater]);
        let given_up = Notes { is_given_up: true, ..Notes::default() };
        assert_eq!(
            judge(&Entry::new(PLACE, Claim::Nobody, given_up, hashes()), true, |_| false).outcome,
            Outcome::GivenUp
        );
        let mut entry = written();
        entry.found.email.count = 0;
        let verdict = judge(&entry, true, |topic| topic == Part::Email);
        assert_eq!((verdict.wrongs, verdict.untold), (vec![], 1));
        // Without publishing, outputs are not checked.
        (entry.found.read, entry.found.email) = Default::default();
        assert_eq!(judge(&entry, false, |_| false).wrongs, []);
    }
}
