//! Records whose events and rows do not match because an earlier database decided about their message id: one
//! that was restored, replaced or rebuilt. Where one id stands on several records, another of them may have won
//! there; a duplicate may have come when its original was already forgotten. Pure.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use uuid::Uuid;

use super::judge::{Outcome, Verdict, Wrong};
use super::report::Findings;
use super::table::Entry;
use crate::batch::Owner;
use crate::publication::OutputTopic;
use crate::record::{Offset, Partition, TimestampMs};
use crate::wire::Reason;

/// Kept in all, whatever the number of slices; beyond it they count as wrong.
const SUSPECTS_MAX: usize = 100_000;

/// A record that is wrong in a way that an earlier database may explain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Suspect {
    /// Where it stands.
    pub partition: Partition,
    /// Where it stands.
    pub offset: Offset,
    wrongs: Vec<Wrong>,
    /// It has its rows, and no event.
    is_silent_winner: bool,
    /// It has all of its events once, and no row.
    is_sender: bool,
}

/// What one more look at the log and the claims tells of a suspect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identified {
    /// Its message id.
    pub message_id: Uuid,
    /// Its timestamp.
    pub timestamp: TimestampMs,
}

/// All of them.
#[derive(Default)]
pub struct Suspects(Vec<Suspect>);

impl Suspects {
    /// Takes a record, if what is wrong with it may be explained. `false`: it is simply wrong.
    pub fn take(&mut self, partition: Partition, offset: Offset, entry: &Entry, verdict: &Verdict) -> bool {
        let is_explicable = |wrong: &Wrong| match wrong {
            Wrong::NoOutput(_) | Wrong::OtherReason(..) => true,
            Wrong::ExtraOutput(_, outcome) => *outcome != Outcome::GivenUp,
            _ => false,
        };
        if self.0.len() >= SUSPECTS_MAX || !verdict.wrongs.iter().all(is_explicable) {
            return false;
        }
        let output = |topic| entry.found.output(topic);
        let (read, email) = (output(OutputTopic::Read), output(OutputTopic::Email));
        let differs = OutputTopic::ALL.iter().any(|topic| output(*topic).differs);
        let is_written = verdict.outcome == Outcome::Written;
        let is_silent_winner = is_written && read.count == 0 && email.count == 0 && !differs;
        let is_due = u8::from(entry.expected.email != 0);
        let is_sender = !is_written && read.count == 1 && email.count == is_due && !differs;
        let has_letter = output(OutputTopic::DeadLetter).count == 1 && !differs;
        if is_written && !is_silent_winner {
            return false;
        }
        // Without events on the wrong record there must at least be a letter of the time before.
        let is_letter_only = !is_written && !is_sender && read.count == 0 && email.count == 0;
        if !is_silent_winner && !is_sender && !is_letter_only || output(OutputTopic::DeadLetter).count > 1 {
            return false;
        }
        if has_letter
            && !matches!(entry.found.reason, Some(Reason::MessageIdConflict | Reason::RejectedByDatabase))
        {
            return false;
        }
        self.0.push(Suspect {
            partition,
            offset,
            wrongs: verdict.wrongs.clone(),
            is_silent_winner,
            is_sender,
        });
        true
    }

    /// Where they stand.
    pub fn places(&self) -> Vec<(Partition, Offset)> {
        self.0.iter().map(|s| (s.partition, s.offset)).collect()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sorts them into what is allowed and what is wrong.
    pub fn resolve(
        self,
        identified: &HashMap<(Partition, Offset), Identified>,
        owners: &HashMap<Uuid, (Owner, TimestampMs)>,
        window: Duration,
        allowed: &mut Findings,
        findings: &mut Findings,
    ) {
        let window_ms = i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
        let mut by_id: BTreeMap<Option<Uuid>, Vec<Suspect>> = BTreeMap::new();
        for suspect in self.0 {
            let id = identified.get(&(suspect.partition, suspect.offset)).map(|i| i.message_id);
            by_id.entry(id).or_default().push(suspect);
        }
        for (id, members) in by_id {
            let owner = id.and_then(|id| owners.get(&id));
            let Some((owner, owned_at)) = owner else {
                wrong(&members, findings);
                continue;
            };
            let winner = members
                .iter()
                .find(|s| s.is_silent_winner && (s.partition, s.offset) == (owner.partition, owner.offset));
            let mut senders = members.iter().filter(|s| s.is_sender);
            match (winner, senders.next(), senders.next()) {
                // One has the rows, another one the events.
                (Some(winner), Some(sender), None) => {
                    let (winner, sender) = (winner.clone(), sender.clone());
                    for member in &members {
                        let what = if *member == winner {
                            format!(
                                "its message id stands on several records: the rows are its own, the events those of \
                                 partition {}, offset {}",
                                sender.partition, sender.offset
                            )
                        } else {
                            format!(
                                "its message id stands on several records: the rows are those of partition {}, offset {}",
                                winner.partition, winner.offset
                            )
                        };
                        allowed.push(member.partition, member.offset, what);
                    }
                }
                // It was refused when it first came, and accepted when it was written again.
                (Some(winner), None, _) if winner.was_refused() && members.len() == 1 => {
                    allowed.push(
                        winner.partition,
                        winner.offset,
                        "once refused by the database, written since: it has its dead letter and no events",
                    );
                }
                // Its own claim was dropped long before; the database that has the rows now never forgot it.
                (None, Some(_), _)
                    if members.iter().all(|s| {
                        identified.get(&(s.partition, s.offset)).is_some_and(|i| {
                            i.timestamp.0.saturating_sub(owned_at.0).saturating_abs() > window_ms
                        })
                    }) =>
                {
                    for member in &members {
                        allowed.push(
                            member.partition,
                            member.offset,
                            format!(
                                "a duplicate of partition {}, offset {}, further apart than idempotency.window: \
                                 written and sent by an earlier database",
                                owner.partition, owner.offset
                            ),
                        );
                    }
                }
                _ => wrong(&members, findings),
            }
        }
    }
}

impl Suspect {
    /// Whether its dead letter is of the database's refusal: all that is wrong is that it has no events, and that
    /// letter.
    fn was_refused(&self) -> bool {
        self.wrongs.contains(&Wrong::ExtraOutput(OutputTopic::DeadLetter, Outcome::Written))
    }
}

fn wrong(members: &[Suspect], findings: &mut Findings) {
    for member in members {
        for wrong in &member.wrongs {
            findings.push(member.partition, member.offset, wrong.to_string());
        }
    }
}
