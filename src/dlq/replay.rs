//! A replay: dead letters are collected, claimed, sent and recorded as sent, chunk by chunk.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use uuid::Uuid;

use super::DlqError;
use super::eligibility::{Eligibility, Go, Objection};
use super::letter::{Letter, Place};
use super::replay_store::{Audit, ReplayStore};
use super::run_metadata::{self, ChunkOutcome, RunMetadata, UnknownOutcome};
use super::sender::Sender;
use crate::config::Settings;
use crate::domain::publication::REPLAYS_HEADER;
use crate::domain::record::{RecordView, SourceBatch};
use crate::failpoint;

/// Maximum number of dead letters in a chunk.
pub const CHUNK_LETTERS_MAX: usize = 500;
/// A chunk is sent when it reaches this size; the last dead letter may exceed it.
pub const CHUNK_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Result of a replay; in a dry run, the expected result.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Dead letters that match the filter.
    pub chosen: u64,
    /// Sent to the input topic.
    pub replayed: u64,
    /// Replayed only because of `--force`; included in `replayed`.
    pub at_risk: u64,
    /// Replayed by an earlier run.
    pub already_replayed: u64,
    /// Claimed by an interrupted run and not resolved yet; the next run resolves them. Only in a dry run.
    pub unresolved: u64,
    /// Refused dead letters by reason.
    pub refused: BTreeMap<Objection, u64>,
    /// Whether a signal ended it early.
    pub is_interrupted: bool,
}

impl Outcome {
    /// Machine-readable form.
    pub fn to_json(&self) -> Value {
        let refused: BTreeMap<&str, u64> =
            self.refused.iter().map(|(objection, count)| (objection.as_str(), *count)).collect();
        json!({
            "chosen": self.chosen,
            "replayed": self.replayed,
            "at_risk": self.at_risk,
            "already_replayed": self.already_replayed,
            "unresolved": self.unresolved,
            // The former name, kept until 1.0.
            "unsettled": self.unresolved,
            "interrupted": self.is_interrupted,
            "refused": refused,
        })
    }
}

/// Dead letters to be sent, already converted to records of the input topic.
#[derive(Debug)]
pub struct Chunk {
    letters: SourceBatch,
    at_risk: BTreeSet<Place>,
    letters_max: usize,
}

fn place(record: &RecordView<'_>) -> Place {
    Place { partition: record.partition, offset: record.offset }
}

impl Chunk {
    /// Creates an empty chunk.
    pub fn new(letters_max: usize) -> Self {
        Self {
            letters: SourceBatch::new(),
            at_risk: BTreeSet::new(),
            letters_max: letters_max.clamp(1, CHUNK_LETTERS_MAX),
        }
    }

    /// Judges a dead letter and adds it to the chunk if it may be replayed.
    pub fn consider(&mut self, letter: &Letter<'_>, eligibility: &Eligibility, outcome: &mut Outcome) {
        outcome.chosen += 1;
        match eligibility.judge(letter) {
            Err(objection) => *outcome.refused.entry(objection).or_default() += 1,
            Ok(Go { timestamp, is_at_risk }) => {
                if is_at_risk {
                    self.at_risk.insert(letter.place);
                }
                let replays = letter.replays.saturating_add(1).to_string();
                let headers: Vec<_> =
                    letter.replay_headers().chain([(REPLAYS_HEADER, Some(replays.as_bytes()))]).collect();
                let Place { partition, offset } = letter.place;
                self.letters.push(partition, offset, Some(timestamp), letter.key, letter.value, headers);
            }
        }
    }

    /// Whether the chunk must be sent.
    pub fn is_full(&self) -> bool {
        self.letters.len() >= self.letters_max || self.letters.bytes() >= CHUNK_BYTES_MAX
    }

    fn places(&self) -> BTreeSet<Place> {
        self.letters.iter().map(|record| place(&record)).collect()
    }

    fn clear(&mut self) {
        self.letters.clear();
        self.at_risk.clear();
    }

    /// Counts the sent dead letters, counts the others as already replayed, and clears the chunk.
    fn count(&mut self, gone: &BTreeSet<Place>, outcome: &mut Outcome) {
        let gone_count = gone.len() as u64;
        outcome.replayed += gone_count;
        outcome.already_replayed += (self.letters.len() as u64).saturating_sub(gone_count);
        outcome.at_risk += self.at_risk.intersection(gone).count() as u64;
        self.clear();
    }
}

/// Dry run of a chunk: counts what would happen and changes nothing.
pub fn look_at(
    chunk: &mut Chunk,
    store: &ReplayStore,
    topic_id: Uuid,
    outcome: &mut Outcome,
) -> Result<(), DlqError> {
    if chunk.letters.is_empty() {
        return Ok(());
    }
    let places = chunk.places();
    let claimed = store.claimed(topic_id, &places)?;
    let unresolved = claimed.values().filter(|is_sent| !**is_sent).count() as u64;
    chunk.count(&places.into_iter().filter(|place| !claimed.contains_key(place)).collect(), outcome);
    outcome.already_replayed -= unresolved;
    outcome.unresolved += unresolved;
    Ok(())
}

/// Statements of the operator for cases that nothing can prove.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statements {
    /// `--unfinished`: what happened to an interrupted chunk.
    pub unfinished: Option<ChunkOutcome>,
    /// `--after-restore`: the database may have forgotten replays.
    pub is_after_restore: bool,
}

/// A run that owns the replay store and the transactional id.
pub struct Replay {
    store: ReplayStore,
    sender: Sender,
    topic_id: Uuid,
    /// Id that the commit metadata names now.
    stands: Uuid,
    run_id: Uuid,
}

impl Replay {
    /// Takes over from the previous run and resolves the chunks that it left.
    pub fn begin(
        mut store: ReplayStore,
        settings: &Settings,
        audit: &Audit,
        statements: Statements,
    ) -> Result<Self, DlqError> {
        let sender = Sender::connect(&settings.kafka)?;
        let run_id = store.take_over(audit)?;
        failpoint::hit("dlq_after_take_over");
        // After the take-over: a run that claims dead letters from here on started later, and fences this
        // one.
        sender.fence()?;
        failpoint::hit("dlq_after_fence");
        store.is_owner()?;
        resolve(&mut store, &sender, statements)?;
        failpoint::hit("dlq_after_resolve");
        // Commits metadata of this run, so that the next run has metadata to decide by.
        let metadata = RunMetadata { id: run_id, database_id: store.database_id() };
        sender.send(std::iter::empty(), &metadata)?;
        failpoint::hit("dlq_after_metadata");
        Ok(Self { store, sender, topic_id: audit.topic_id, stands: run_id, run_id })
    }

    /// Id of this run in the audit table.
    pub fn run_id(&self) -> Uuid {
        self.run_id
    }

    /// Sends the dead letters of the chunk that no run has claimed.
    pub fn send(&mut self, chunk: &mut Chunk, outcome: &mut Outcome) -> Result<(), DlqError> {
        if chunk.letters.is_empty() {
            return Ok(());
        }
        let Some(claim) = self.store.claim(self.topic_id, &chunk.places(), self.stands)? else {
            chunk.count(&BTreeSet::new(), outcome);
            return Ok(());
        };
        failpoint::hit("dlq_after_claim");
        let metadata = RunMetadata { id: claim.chunk_id, database_id: self.store.database_id() };
        let claimed = chunk.letters.iter().filter(|record| claim.places.contains(&place(record)));
        self.sender.send(claimed, &metadata)?;
        failpoint::hit("dlq_after_commit");
        self.stands = claim.chunk_id;
        self.store.resolve(claim.chunk_id, ChunkOutcome::Sent)?;
        failpoint::hit("dlq_after_note");
        chunk.count(&claim.places, outcome);
        Ok(())
    }

    /// Records the end of the run.
    pub fn finish(self, outcome: &Outcome) -> Result<(), DlqError> {
        self.store.finish(&outcome.to_json())
    }
}

/// Resolves interrupted chunks. The answer is final only after the take-over and the fencing.
fn resolve(store: &mut ReplayStore, sender: &Sender, statements: Statements) -> Result<(), DlqError> {
    let metadata = sender.metadata()?;
    let database_id = store.database_id();
    for chunk in store.unfinished()? {
        let proved = run_metadata::outcome(&chunk, metadata.as_ref(), database_id);
        let outcome = proved.or(statements.unfinished).ok_or(UnknownOutcome::Unfinished {
            group: sender.group_id().to_owned(),
            letters: chunk.letters,
            claimed_at: chunk.claimed_at,
        })?;
        store.resolve(chunk.chunk_id, outcome)?;
        failpoint::hit("dlq_after_resolve_one");
    }
    let is_known = match metadata {
        Some(metadata) => metadata.database_id == database_id && store.knows(metadata.id)?,
        None => true,
    };
    if is_known || statements.is_after_restore {
        Ok(())
    } else {
        Err(UnknownOutcome::Forgotten { group: sender.group_id().to_owned() }.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::publication::Header;
    use crate::domain::record::TimestampMs;
    use std::time::Duration;

    fn terms() -> Eligibility {
        Eligibility {
            input_topic: "input".to_owned(),
            now: TimestampMs(1_700_000_000_000),
            window: Duration::from_secs(86_400),
            replays_max: 3,
            is_forced: true,
        }
    }

    fn headers(replays: &'static [u8]) -> Vec<Header<'static>> {
        vec![
            (b"own", None),
            (b"dlq-replays", Some(replays)),
            (b"own", Some(b"twice")),
            (b"dlq-reason", Some(b"invalid_field")),
            (b"dlq-detail", Some(b"x")),
            (b"dlq-topic", Some(b"input")),
            (b"dlq-partition", Some(b"7")),
            (b"dlq-offset", Some(b"41")),
            (b"dlq-timestamp", Some(b"1600000000000")),
            (b"source", Some(b"00000000/7/41")),
        ]
    }

    #[test]
    fn a_letter_becomes_the_record_that_it_was_and_counts_one_replay_more() {
        let (mut chunk, mut outcome) = (Chunk::new(10), Outcome::default());
        let letter = Letter::read("3/9".parse().unwrap(), None, None, Some(b""), headers(b"1"));
        chunk.consider(&letter, &terms(), &mut outcome);
        let record = chunk.letters.get(0).unwrap();
        assert_eq!((record.key, record.value), (None, Some(&b""[..])));
        assert_eq!(record.timestamp, Some(TimestampMs(1_600_000_000_000)));
        let expected: [Header<'_>; 3] =
            [(b"own", None), (b"own", Some(b"twice")), (b"dlq-replays", Some(b"2"))];
        assert_eq!(record.headers.iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_was_claimed_by_others_counts_as_replayed_before() {
        let (mut chunk, mut outcome) = (Chunk::new(3), Outcome::default());
        for offset in 0..3 {
            let place = format!("0/{offset}").parse().unwrap();
            assert!(!chunk.is_full());
            chunk.consider(&Letter::read(place, None, None, None, headers(b"0")), &terms(), &mut outcome);
        }
        chunk.consider(
            &Letter::read("0/3".parse().unwrap(), None, None, None, headers(b"3")),
            &terms(),
            &mut outcome,
        );
        assert!(chunk.is_full());
        chunk.count(&["0/1".parse().unwrap()].into(), &mut outcome);
        assert!(chunk.letters.is_empty());
        assert_eq!((outcome.chosen, outcome.replayed, outcome.already_replayed), (4, 1, 2));
        assert_eq!((outcome.at_risk, outcome.refused.len()), (1, 1));
        assert_eq!(outcome.to_json()["refused"]["too_many_replays"], 1);
    }
}
