//! A replay: chosen letters are collected, claimed, sent, and noted, chunk by chunk.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use uuid::Uuid;

use super::DlqError;
use super::letter::{Letter, Place, REPLAYS_HEADER};
use super::mark::{Doubt, Fate, Mark, fate};
use super::register::{Audit, Register};
use super::sender::Sender;
use super::terms::{Judgement, Objection, Terms};
use crate::config::Settings;
use crate::failpoint;
use crate::record::{RecordView, SourceBatch};

/// Letters of one chunk, at most.
pub const CHUNK_LETTERS_MAX: usize = 500;
/// A chunk is sent when it holds so many bytes; the last letter may exceed it.
pub const CHUNK_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What became of the chosen letters; in a dry run, what would.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Letters that were chosen.
    pub chosen: u64,
    /// Sent to the input topic.
    pub replayed: u64,
    /// Of these, those that only `--force` lets through.
    pub at_risk: u64,
    /// An earlier run did it.
    pub already_replayed: u64,
    /// A run that was cut off has claimed it; the next one finds out what became of it. Only in a dry run.
    pub unsettled: u64,
    /// By why.
    pub refused: BTreeMap<Objection, u64>,
}

impl Outcome {
    /// Letters that were refused, for whatever reason.
    pub fn refused_total(&self) -> u64 {
        self.refused.values().sum()
    }

    /// For machines.
    pub fn to_json(&self) -> Value {
        let refused: BTreeMap<&str, u64> =
            self.refused.iter().map(|(objection, count)| (objection.as_str(), *count)).collect();
        json!({
            "chosen": self.chosen,
            "replayed": self.replayed,
            "at_risk": self.at_risk,
            "already_replayed": self.already_replayed,
            "unsettled": self.unsettled,
            "refused": refused,
        })
    }
}

/// Letters on their way, as the records that they become.
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
    /// An empty one for at most so many letters.
    pub fn new(letters_max: usize) -> Self {
        Self {
            letters: SourceBatch::new(),
            at_risk: BTreeSet::new(),
            letters_max: letters_max.clamp(1, CHUNK_LETTERS_MAX),
        }
    }

    /// Judges a chosen letter, and takes it in if it may go.
    pub fn consider(&mut self, letter: &Letter<'_>, terms: &Terms, outcome: &mut Outcome) {
        outcome.chosen += 1;
        match terms.judge(letter) {
            Judgement::Refuse(objection) => *outcome.refused.entry(objection).or_default() += 1,
            Judgement::Go { timestamp, is_at_risk } => {
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

    /// Whether it is time to send it.
    pub fn is_full(&self) -> bool {
        self.letters.len() >= self.letters_max || self.letters.bytes() >= CHUNK_BYTES_MAX
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.letters.is_empty()
    }

    fn places(&self) -> BTreeSet<Place> {
        self.letters.iter().map(|record| place(&record)).collect()
    }

    fn clear(&mut self) {
        self.letters.clear();
        self.at_risk.clear();
    }

    /// Counts the letters that went, the others as replayed before, and is empty afterwards.
    fn count(&mut self, gone: &BTreeSet<Place>, outcome: &mut Outcome) {
        let gone_count = gone.len() as u64;
        outcome.replayed += gone_count;
        outcome.already_replayed += (self.letters.len() as u64).saturating_sub(gone_count);
        outcome.at_risk += self.at_risk.intersection(gone).count() as u64;
        self.clear();
    }
}

/// Says what would become of a chunk, and changes nothing.
pub fn look_at(
    chunk: &mut Chunk,
    register: &Register,
    topic_id: Uuid,
    outcome: &mut Outcome,
) -> Result<(), DlqError> {
    if chunk.is_empty() {
        return Ok(());
    }
    let places = chunk.places();
    let claimed = register.claimed(topic_id, &places)?;
    let unsettled = claimed.values().filter(|is_sent| !**is_sent).count() as u64;
    chunk.count(&places.into_iter().filter(|place| !claimed.contains_key(place)).collect(), outcome);
    outcome.already_replayed -= unsettled;
    outcome.unsettled += unsettled;
    Ok(())
}

/// What a person says where nothing proves it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Word {
    /// `--unfinished`: what became of a chunk.
    pub unfinished: Option<Fate>,
    /// `--after-restore`: the database may have forgotten replays.
    pub is_after_restore: bool,
}

/// A run that owns the register and the transactional id.
pub struct Replay {
    register: Register,
    sender: Sender,
    topic_id: Uuid,
    /// What the mark names now.
    stands: Uuid,
    run_id: Uuid,
}

impl Replay {
    /// Takes over from whatever run was before, and settles what it left.
    pub fn begin(
        mut register: Register,
        settings: &Settings,
        audit: &Audit,
        word: Word,
    ) -> Result<Self, DlqError> {
        let sender = Sender::connect(&settings.kafka)?;
        let run_id = register.take_over(audit)?;
        failpoint::hit("dlq_after_take_over");
        // In this order: whatever claims a letter from here on has begun later, and fences us.
        sender.fence()?;
        failpoint::hit("dlq_after_fence");
        register.is_owner()?;
        settle(&mut register, &sender, word)?;
        failpoint::hit("dlq_after_settle");
        // A mark of our own, so that the next run finds one that proves something.
        let mark = Mark { id: run_id, database_id: register.database_id() };
        sender.send(std::iter::empty(), &mark)?;
        failpoint::hit("dlq_after_mark");
        Ok(Self { register, sender, topic_id: audit.topic_id, stands: run_id, run_id })
    }

    /// The run, as the audit has it.
    pub fn run_id(&self) -> Uuid {
        self.run_id
    }

    /// Sends those letters of the chunk that nobody has sent.
    pub fn send(&mut self, chunk: &mut Chunk, outcome: &mut Outcome) -> Result<(), DlqError> {
        if chunk.is_empty() {
            return Ok(());
        }
        let Some(claim) = self.register.claim(self.topic_id, &chunk.places(), self.stands)? else {
            chunk.count(&BTreeSet::new(), outcome);
            return Ok(());
        };
        failpoint::hit("dlq_after_claim");
        let mark = Mark { id: claim.chunk_id, database_id: self.register.database_id() };
        let claimed = chunk.letters.iter().filter(|record| claim.places.contains(&place(record)));
        self.sender.send(claimed, &mark)?;
        failpoint::hit("dlq_after_commit");
        self.stands = claim.chunk_id;
        self.register.settle(claim.chunk_id, Fate::Sent)?;
        failpoint::hit("dlq_after_note");
        chunk.count(&claim.places, outcome);
        Ok(())
    }

    /// Writes down how it ended.
    pub fn finish(mut self, outcome: &Outcome, is_interrupted: bool) -> Result<(), DlqError> {
        let mut value = outcome.to_json();
        if let Some(object) = value.as_object_mut() {
            object.insert("interrupted".to_owned(), Value::Bool(is_interrupted));
        }
        self.register.finish(&value)
    }
}

/// Finds out what became of chunks that were cut off. Only after the take-over and the fence is the answer final.
fn settle(register: &mut Register, sender: &Sender, word: Word) -> Result<(), DlqError> {
    let mark = sender.mark()?;
    let database_id = register.database_id();
    for chunk in register.unfinished()? {
        let fate = fate(&chunk, mark.as_ref(), database_id).or(word.unfinished).ok_or(Doubt::Unfinished {
            group: sender.group_id().to_owned(),
            letters: chunk.letters,
            claimed_at: chunk.claimed_at,
        })?;
        register.settle(chunk.chunk_id, fate)?;
        failpoint::hit("dlq_after_settle_one");
    }
    let is_known = match mark {
        Some(mark) => mark.database_id == database_id && register.knows(mark.id)?,
        None => true,
    };
    if is_known || word.is_after_restore {
        Ok(())
    } else {
        Err(Doubt::Forgotten { group: sender.group_id().to_owned() }.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publication::Header;
    use crate::record::TimestampMs;
    use std::time::Duration;

    fn terms() -> Terms {
        Terms {
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
        assert!(chunk.is_empty());
        assert_eq!((outcome.chosen, outcome.replayed, outcome.already_replayed), (4, 1, 2));
        assert_eq!((outcome.at_risk, outcome.refused_total()), (1, 1));
        assert_eq!(outcome.to_json()["refused"]["too_many_replays"], 1);
    }
}
