//! Decides whether a record's outcome is correct. Pure.

use std::fmt;

use super::table::{Claim, Entry, Seen};
use crate::domain::publication::OutputTopic;
use crate::domain::wire::Reason;

/// Outcome of a record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// It was written.
    Written,
    /// Another record with the same payload was written.
    Duplicate,
    /// It was dead-lettered.
    DeadLetter(Reason),
    /// An operator skipped it, and it has no outcome.
    GivenUp,
    /// It has no outcome.
    Lost,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Written => f.write_str("written"),
            Self::Duplicate => f.write_str("duplicate"),
            Self::DeadLetter(reason) => write!(f, "dead-lettered: {reason}"),
            Self::GivenUp => f.write_str("given up"),
            Self::Lost => f.write_str("lost"),
        }
    }
}

/// Name of a table.
pub type TableName = &'static str;

/// A deviation from the expected outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wrong {
    /// Valid, but without any outcome.
    Lost,
    /// Written, but its message id is not claimed.
    Unclaimed,
    /// Its claim does not match the record.
    ClaimDiffers,
    /// A later record of its partition has claimed its id.
    OwnedLater,
    /// A row is missing in this table.
    NoRow(TableName),
    /// This table has a row that should not exist.
    ExtraRow(TableName, Outcome),
    /// The row in this table does not match the record.
    RowDiffers(TableName),
    /// At least one table has more than one row.
    RowsTwice(u8),
    /// An output is missing in this topic.
    NoOutput(OutputTopic),
    /// This topic has an output that should not exist.
    ExtraOutput(OutputTopic, Outcome),
    /// This topic has this many outputs instead of one.
    OutputTwice(OutputTopic, u8),
    /// The output in this topic does not match the record.
    OutputDiffers(OutputTopic),
    /// The dead letter has another reason than expected.
    OtherReason(Option<Reason>, Reason),
}

/// Name of an output of this topic, with its article.
pub fn an_output(topic: OutputTopic) -> &'static str {
    match topic {
        OutputTopic::Read => "a read event",
        OutputTopic::Email => "an e-mail event",
        OutputTopic::DeadLetter => "a dead letter",
    }
}

fn output_name(topic: OutputTopic) -> &'static str {
    match topic {
        OutputTopic::Read => "read event",
        OutputTopic::Email => "e-mail event",
        OutputTopic::DeadLetter => "dead letter",
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost => f.write_str("lost: it is valid, its id is not claimed, and it has no outcome"),
            Self::Unclaimed => f.write_str("written, but its message id is not in idempotency"),
            Self::ClaimDiffers => f.write_str("its row in idempotency is not what the record says"),
            Self::OwnedLater => f.write_str("a later record of its partition has its message id"),
            Self::NoRow(table) => write!(f, "no row in {table}"),
            Self::ExtraRow(table, outcome) => write!(f, "a row in {table}, though it should be {outcome}"),
            Self::RowDiffers(table) => write!(f, "its row in {table} is not what the record says"),
            Self::RowsTwice(count) => {
                write!(f, "its rows exist more than once ({count} in a join of the tables)")
            }
            Self::NoOutput(topic) => write!(f, "no {}", output_name(*topic)),
            Self::ExtraOutput(topic, outcome) => {
                write!(f, "{}, though it should be {outcome}", an_output(*topic))
            }
            Self::OutputTwice(topic, count) => {
                write!(f, "its {} is there {count} times", output_name(*topic))
            }
            Self::OutputDiffers(topic) => {
                write!(f, "its {} is not what the record says", output_name(*topic))
            }
            Self::OtherReason(found, expected) => write!(
                f,
                "dead-lettered as {}, not as {expected}",
                found.map_or("an unknown reason", Reason::as_str)
            ),
        }
    }
}

/// Verdict on a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// Actual or expected outcome.
    pub outcome: Outcome,
    /// Deviations.
    pub wrongs: Vec<Wrong>,
    /// Missing outputs that may have been removed from their topic by retention.
    pub untold: u8,
}

/// Reason of a record whose only trace is a dead letter for a rule that it fulfils by the current settings:
/// the settings were different when it was processed. It claimed no id, so its replay may have been written
/// since.
pub fn refused_by_other_settings(entry: &Entry, publishes: bool) -> Option<Reason> {
    let found = &entry.found;
    let is_valid_now = !matches!(entry.claim, Claim::Refused(_) | Claim::Own);
    let is_alone = found.metadata.count == 0
        && found.output(OutputTopic::Read).count == 0
        && found.output(OutputTopic::DeadLetter).count == 1;
    found.reason.filter(|reason| {
        publishes
            && is_valid_now
            && is_alone
            && !matches!(reason, Reason::MessageIdConflict | Reason::RejectedByDatabase)
    })
}

/// Expected outcome by the log, the claims and, where claims may have been pruned, the rows.
pub fn outcome(entry: &Entry, publishes: bool) -> Outcome {
    let (found, notes) = (&entry.found, &entry.circumstances);
    if notes.is_given_up && found.is_nothing() && !matches!(entry.claim, Claim::Own) {
        return Outcome::GivenUp;
    }
    let has_row = found.metadata.count > 0;
    // Such a record claims no id, so that its replay, a later record with the same id, can be written.
    let is_rejected = publishes && !has_row && found.reason == Some(Reason::RejectedByDatabase);
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
        Claim::Nobody if notes.is_prunable && notes.is_elsewhere => match found.reason {
            Some(Reason::MessageIdConflict) => Outcome::DeadLetter(Reason::MessageIdConflict),
            _ => Outcome::Duplicate,
        },
        Claim::Nobody => Outcome::Lost,
    }
}

/// Judges a record. `is_cut_off` tells for an output topic whether the record's outputs may have been removed
/// by retention.
pub fn judge(entry: &Entry, publishes: bool, is_cut_off: impl Fn(OutputTopic) -> bool) -> Verdict {
    let outcome = outcome(entry, publishes);
    let mut verdict = Verdict { outcome, wrongs: Vec::new(), untold: 0 };
    let (found, notes, expected) = (&entry.found, &entry.circumstances, &entry.expected);
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
    rows(entry, outcome, wrongs);
    if !publishes {
        return verdict;
    }
    let is_letter = matches!(outcome, Outcome::DeadLetter(_));
    for (topic, is_due) in [
        (OutputTopic::Read, is_written),
        (OutputTopic::Email, is_written && expected.email != 0),
        (OutputTopic::DeadLetter, is_letter),
    ] {
        let seen = found.output(topic);
        match (is_due, seen.count) {
            (true, 0) if notes.is_given_up => {}
            (true, 0) if is_cut_off(topic) => verdict.untold += 1,
            (true, 0) => wrongs.push(Wrong::NoOutput(topic)),
            (true, 1) if seen.differs => wrongs.push(Wrong::OutputDiffers(topic)),
            (true, 1) | (false, 0) => {}
            (true, count) => wrongs.push(Wrong::OutputTwice(topic, count)),
            (false, _) => wrongs.push(Wrong::ExtraOutput(topic, outcome)),
        }
    }
    if let Outcome::DeadLetter(reason) = outcome
        && found.output(OutputTopic::DeadLetter).count > 0
        && found.reason != Some(reason)
    {
        wrongs.push(Wrong::OtherReason(found.reason, reason));
    }
    verdict
}

fn rows(entry: &Entry, outcome: Outcome, wrongs: &mut Vec<Wrong>) {
    let (found, notes, expected) = (&entry.found, &entry.circumstances, &entry.expected);
    if outcome != Outcome::Written {
        for (table, seen) in tables(entry) {
            if seen.count > 0 {
                wrongs.push(Wrong::ExtraRow(table, outcome));
            }
        }
        return;
    }
    if found.metadata.count == 0 {
        // The other tables are found through this row only; they do not contain the source position.
        if !notes.is_archived && !notes.is_given_up {
            wrongs.push(Wrong::NoRow("payment_metadata"));
        }
        return;
    }
    if found.metadata.count > 1 {
        wrongs.push(Wrong::RowsTwice(found.metadata.count));
    }
    for (table, seen) in tables(entry) {
        let is_due = table != "payment_notes" || expected.notes != 0;
        match (is_due, seen.count) {
            (true, 0) => wrongs.push(Wrong::NoRow(table)),
            (true, _) if seen.differs => wrongs.push(Wrong::RowDiffers(table)),
            (false, 1..) => wrongs.push(Wrong::ExtraRow(table, outcome)),
            _ => {}
        }
    }
}

fn tables(entry: &Entry) -> [(TableName, Seen); 3] {
    let found = &entry.found;
    [("payment_metadata", found.metadata), ("payment_core", found.core), ("payment_notes", found.notes)]
}

#[cfg(test)]
mod tests {
    use super::super::table::{Found, Hashes, Notes};
    use super::*;

    const ONE: Seen = Seen { count: 1, differs: false };

    fn hashes() -> Hashes {
        Hashes { metadata: 1, core: 2, notes: 3, read: 4, email: 5, letter: 6 }
    }

    fn written() -> Entry {
        let mut entry = Entry::new(Claim::Own, Notes::default(), hashes());
        entry.found = Found {
            metadata: ONE,
            core: ONE,
            notes: ONE,
            outputs: [ONE, ONE, Seen::default()],
            reason: None,
        };
        entry
    }

    fn letter(claim: Claim, reason: Reason) -> Entry {
        let mut entry = Entry::new(claim, Notes::default(), hashes());
        entry.found.outputs[2] = ONE;
        entry.found.reason = Some(reason);
        entry
    }

    fn wrongs(entry: &Entry) -> Vec<Wrong> {
        judge(entry, true, |_| false).wrongs
    }

    #[test]
    fn each_right_outcome_passes() {
        for (entry, expected) in [
            (written(), Outcome::Written),
            (Entry::new(Claim::Same, Notes::default(), hashes()), Outcome::Duplicate),
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
            (|e| e.found.metadata = Seen::default(), Wrong::NoRow("payment_metadata")),
            (|e| e.found.core = Seen::default(), Wrong::NoRow("payment_core")),
            (|e| e.found.notes = Seen::default(), Wrong::NoRow("payment_notes")),
            (|e| e.expected.notes = 0, Wrong::ExtraRow("payment_notes", Outcome::Written)),
            (|e| e.found.core.differs = true, Wrong::RowDiffers("payment_core")),
            (|e| e.found.metadata.count = 2, Wrong::RowsTwice(2)),
            (|e| e.found.outputs[0].count = 0, Wrong::NoOutput(OutputTopic::Read)),
            (|e| e.found.outputs[1].count = 2, Wrong::OutputTwice(OutputTopic::Email, 2)),
            (|e| e.expected.email = 0, Wrong::ExtraOutput(OutputTopic::Email, Outcome::Written)),
            (|e| e.found.outputs[0].differs = true, Wrong::OutputDiffers(OutputTopic::Read)),
            (|e| e.found.outputs[2].count = 1, Wrong::ExtraOutput(OutputTopic::DeadLetter, Outcome::Written)),
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
        assert_eq!(wrongs(&Entry::new(Claim::Nobody, Notes::default(), hashes())), [Wrong::Lost]);
        let claimed = Entry::new(Claim::Own, Notes::default(), hashes());
        let missing = [
            Wrong::NoRow("payment_metadata"),
            Wrong::NoOutput(OutputTopic::Read),
            Wrong::NoOutput(OutputTopic::Email),
        ];
        assert_eq!(wrongs(&claimed), missing, "a claim without rows");
        let other = letter(Claim::Refused(Reason::EmptyValue), Reason::TooLarge);
        assert_eq!(wrongs(&other), [Wrong::OtherReason(Some(Reason::TooLarge), Reason::EmptyValue)]);
        assert_eq!(
            wrongs(&letter(Claim::Same, Reason::MessageIdConflict)),
            [Wrong::ExtraOutput(OutputTopic::DeadLetter, Outcome::Duplicate)]
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
        assert_eq!(wrongs(&Entry::new(Claim::Nobody, elsewhere, hashes())), []);
        // Rejected by the database, and its replay was written.
        let mut replayed = letter(Claim::Same, Reason::RejectedByDatabase);
        replayed.circumstances.is_owned_later = true;
        assert_eq!(wrongs(&replayed), []);
        let mut overtaken = Entry::new(Claim::Same, Notes::default(), hashes());
        overtaken.circumstances.is_owned_later = true;
        assert_eq!(wrongs(&overtaken), [Wrong::OwnedLater]);
        let given_up = Notes { is_given_up: true, ..Notes::default() };
        assert_eq!(
            judge(&Entry::new(Claim::Nobody, given_up, hashes()), true, |_| false).outcome,
            Outcome::GivenUp
        );
        let mut entry = written();
        entry.found.outputs[1].count = 0;
        let verdict = judge(&entry, true, |topic| topic == OutputTopic::Email);
        assert_eq!((verdict.wrongs, verdict.untold), (vec![], 1));
        // Without publishing, outputs are not checked.
        entry.found.outputs = [Seen::default(); 3];
        assert_eq!(judge(&entry, false, |_| false).wrongs, []);
    }
}
