//! Independent check that every record of the input topic had exactly one outcome.
//!
//! Shares no code with the program: it has its own implementation of the rules that decide each record's
//! outcome. The caller reads topics and database as any other system would, and passes everything on: first
//! the input, then tables and outputs; then [`Checker::judge`] decides. It needs about 300 bytes of memory a
//! record. The auditor of demo and fault suite, and the tests, use it.
// It panics on what it cannot interpret.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod contract;
mod outputs;
mod tables;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error::Error;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use sha2::{Digest, Sha256};

use contract::{Payment, judge, payment_id};
pub use contract::{Reason, Rules};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Findings that are kept; the others are counted.
const FINDINGS_MAX: usize = 20;

/// A record of a topic.
pub struct Seen<'m> {
    pub partition: i32,
    pub offset: i64,
    pub timestamp_ms: Option<i64>,
    pub key: Option<&'m [u8]>,
    pub value: Option<&'m [u8]>,
    pub headers: Vec<(&'m str, Option<&'m [u8]>)>,
}

/// An output topic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    Read,
    Email,
    DeadLetter,
}

/// Ranges of offsets with their partitions.
pub type Records = Vec<(i32, Range<i64>)>;

/// Deviations from "everything was written and published". Without any, the check is complete.
#[derive(Default)]
pub struct Exceptions {
    /// Records that an operator skipped: they have at most one outcome.
    pub given_up: BTreeSet<(i32, i64)>,
    /// Records whose event or e-mail event may be missing, because the topic was created again.
    pub unseen: Option<(Output, Records)>,
    /// The group writes rows and publishes nothing.
    pub rows_only: bool,
    /// Message ids may have been dropped.
    pub is_pruned: bool,
}

/// What is kept of a record: enough to recognise its outputs and rows, mostly as hashes.
struct Record {
    offset: i64,
    /// `None` if it is valid by itself.
    refused: Option<Reason>,
    timestamp_ms: i64,
    message_id: u128,
    payment_id: u128,
    cust_id: i64,
    payload: u64,
    core: u64,
    notes: Option<u64>,
    read_event: u64,
    /// `None` if its status causes no e-mail event.
    email_event: Option<u64>,
    key: u64,
    value: u64,
    copied_headers: u64,
    found: Found,
}

/// How often each output or row of a record was found.
#[derive(Default)]
struct Found {
    metadata: u8,
    core: u8,
    notes: u8,
    idempotency: u8,
    read_events: u8,
    email_events: u8,
    dead_letters: u8,
    reason: Option<Reason>,
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The leading bits of the SHA-256 that dead letters of large values have instead of the value.
fn value_hash(value: Option<&[u8]>) -> u64 {
    u64::from_be_bytes(Sha256::digest(value.unwrap_or_default())[..8].try_into().unwrap())
}

/// The headers that are copied to every output of a record.
fn copied_headers(message: &Seen<'_>) -> u64 {
    let copied: Vec<_> =
        message.headers.iter().filter(|(name, _)| ["correlation-id", "traceparent"].contains(name)).collect();
    hash(copied)
}

impl Record {
    fn of(message: &Seen<'_>, rules: &Rules) -> Record {
        let timestamp_ms = message.timestamp_ms.unwrap_or(-1);
        let judged = judge(message, rules);
        let mut record = Record {
            offset: message.offset,
            refused: judged.as_ref().err().copied(),
            timestamp_ms,
            message_id: 0,
            payment_id: 0,
            cust_id: 0,
            payload: 0,
            core: 0,
            notes: None,
            read_event: 0,
            email_event: None,
            key: hash(message.key),
            value: value_hash(message.value),
            copied_headers: copied_headers(message),
            found: Found::default(),
        };
        if let Ok(payment) = judged {
            let Payment { message_id, cust_id, amount, currency, status, kind, .. } = &payment;
            let text = payment.message_id_text.as_str();
            record.message_id = *message_id;
            record.cust_id = *cust_id;
            record.payment_id = payment_id(timestamp_ms, *message_id);
            let (comment, reference) = (payment.comment.as_deref(), payment.external_ref_id.as_deref());
            record.payload = hash((cust_id, amount, currency, status, kind, comment, reference));
            record.core = hash((timestamp_ms, cust_id, amount, currency.as_str(), status, kind.as_str()));
            record.notes =
                (comment.is_some() || reference.is_some()).then(|| hash((timestamp_ms, reference, comment)));
            let common = hash((
                record.payment_id,
                text,
                cust_id,
                amount,
                currency.as_str(),
                kind.as_str(),
                timestamp_ms,
            ));
            record.read_event = hash((common, status, comment));
            record.email_event = rules.email_statuses.contains(status).then_some(common);
        }
        record
    }
}

/// What became of a record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    Written,
    Duplicate,
    DeadLettered(Reason),
    GivenUp,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Written => f.write_str("written"),
            Outcome::Duplicate => f.write_str("duplicate"),
            Outcome::DeadLettered(reason) => write!(f, "dead letter: {reason}"),
            Outcome::GivenUp => f.write_str("given up"),
        }
    }
}

/// The check: what is known of each record, and what is wrong.
#[derive(Default)]
pub struct Checker {
    rules: Rules,
    exceptions: Exceptions,
    input_topic: String,
    /// The first digits of the input topic's id, which all sources begin with; empty without a cursor.
    pub topic_id_prefix: String,
    partitions: Vec<Vec<Record>>,
    /// Offset of the latest event by output, account and partition.
    latest: HashMap<(Output, i64, i32), i64>,
    /// The first findings.
    pub findings: Vec<String>,
    /// Number of findings.
    pub wrong_count: usize,
    /// Number of records without an outcome.
    pub lost_count: usize,
}

impl Checker {
    pub fn new(input_topic: &str, rules: Rules, exceptions: Exceptions) -> Self {
        Self { rules, exceptions, input_topic: input_topic.to_owned(), ..Self::default() }
    }

    /// Counts a finding.
    pub fn wrong(&mut self, what: impl fmt::Display) {
        self.wrong_count += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(what.to_string());
        }
    }

    /// Adds a record of the input; in the order of offsets within a partition.
    pub fn add_input(&mut self, message: &Seen<'_>) {
        let partition = usize::try_from(message.partition).unwrap();
        if self.partitions.len() <= partition {
            self.partitions.resize_with(partition + 1, Vec::new);
        }
        self.partitions[partition].push(Record::of(message, &self.rules));
    }

    fn record(&mut self, partition: i32, offset: i64) -> Option<&mut Record> {
        let records = self.partitions.get_mut(usize::try_from(partition).ok()?)?;
        let at = records.binary_search_by_key(&offset, |record| record.offset).ok()?;
        records.get_mut(at)
    }

    /// Number of records.
    pub fn records(&self) -> usize {
        self.partitions.iter().map(Vec::len).sum()
    }

    /// Number of records in the outputs: read events, e-mail events, dead letters.
    pub fn outputs(&self) -> [u64; 3] {
        self.partitions.iter().flatten().fold([0; 3], |[read, email, letters], Record { found, .. }| {
            [
                read + u64::from(found.read_events),
                email + u64::from(found.email_events),
                letters + u64::from(found.dead_letters),
            ]
        })
    }

    /// Decides each record's outcome, and compares it with what was found.
    pub fn judge(&mut self) -> BTreeMap<Outcome, u64> {
        let mut winners: HashMap<u128, (usize, i64, u64)> = HashMap::new();
        let mut twice = Vec::new();
        for (partition, records) in self.partitions.iter().enumerate() {
            for record in records.iter().filter(|record| record.found.metadata > 0) {
                let place = (partition, record.offset, record.payload);
                if let Some((other, offset, _)) = winners.insert(record.message_id, place) {
                    twice.push(format!(
                        "{other}/{offset} and {partition}/{} share a message id",
                        record.offset
                    ));
                }
            }
        }
        for what in twice {
            self.wrong(format!("written twice: {what}"));
        }
        let mut outcomes: BTreeMap<Outcome, u64> = BTreeMap::new();
        let mut wrong = Vec::new();
        for (partition, records) in self.partitions.iter().enumerate() {
            for record in records {
                let place = format!("{partition}/{}", record.offset);
                let found = &record.found;
                let traces = [
                    (found.metadata, "payment_metadata"),
                    (found.core, "payment_core"),
                    (found.notes, "payment_notes"),
                    (found.idempotency, "idempotency"),
                    (found.read_events, "read events"),
                    (found.email_events, "e-mail events"),
                    (found.dead_letters, "dead letters"),
                ];
                let number = i32::try_from(partition).unwrap();
                if self.exceptions.given_up.contains(&(number, record.offset)) {
                    for (found, what) in traces.into_iter().filter(|(found, _)| *found > 1) {
                        wrong.push(format!("{place} (given up): {found} in {what}"));
                    }
                    if [found.core, found.idempotency] != [found.metadata; 2] {
                        wrong.push(format!("{place} (given up): its rows are incomplete"));
                    }
                    *outcomes.entry(Outcome::GivenUp).or_default() += 1;
                    continue;
                }
                let outcome = match (record.refused, winners.get(&record.message_id)) {
                    (Some(reason), _) => Outcome::DeadLettered(reason),
                    (None, Some(&(p, o, _))) if (p, o) == (partition, record.offset) => Outcome::Written,
                    // The id of a rejected row may have another record that the database accepted, then or
                    // later.
                    (None, Some(&(p, o, _)))
                        if record.found.reason == Some(Reason::RejectedByDatabase)
                            && (p != partition || o > record.offset) =>
                    {
                        Outcome::DeadLettered(Reason::RejectedByDatabase)
                    }
                    (None, Some(&(p, o, _))) if p == partition && o > record.offset => {
                        wrong.push(format!(
                            "{place}: a later record of its partition, {p}/{o}, claimed its id"
                        ));
                        continue;
                    }
                    (None, Some(&(_, _, payload))) if payload == record.payload => Outcome::Duplicate,
                    (None, Some(_)) => Outcome::DeadLettered(Reason::MessageIdConflict),
                    // Only the database's own constraints can keep a valid record with an unclaimed id from
                    // being written.
                    (None, None) if record.found.reason == Some(Reason::RejectedByDatabase) => {
                        Outcome::DeadLettered(Reason::RejectedByDatabase)
                    }
                    (None, None) => {
                        self.lost_count += 1;
                        wrong.push(format!("{place}: lost: valid, and its message id was never written"));
                        continue;
                    }
                };
                let notes = u8::from(record.notes.is_some());
                let email = u8::from(record.email_event.is_some());
                let published = u8::from(!self.exceptions.rows_only);
                let expected = match outcome {
                    Outcome::Written => [1, 1, notes, 1, published, email * published, 0],
                    Outcome::Duplicate | Outcome::GivenUp => [0; 7],
                    Outcome::DeadLettered(_) => [0, 0, 0, 0, 0, 0, published],
                };
                let unseen = self.exceptions.unseen.as_ref().filter(|(_, records)| {
                    records.iter().any(|(p, offsets)| *p == number && offsets.contains(&record.offset))
                });
                let may_be_missing = match unseen {
                    Some((Output::Read, _)) => "read events",
                    Some((Output::Email, _)) => "e-mail events",
                    Some((Output::DeadLetter, _)) => "dead letters",
                    None => "",
                };
                for ((found, what), expected) in traces.into_iter().zip(expected) {
                    let is_pruned = self.exceptions.is_pruned && what == "idempotency";
                    if found != expected && !(found == 0 && (what == may_be_missing || is_pruned)) {
                        wrong.push(format!("{place} ({outcome}): {found} in {what}, not {expected}"));
                    }
                }
                if let (Outcome::DeadLettered(reason), Some(found)) = (outcome, found.reason)
                    && reason != found
                {
                    wrong.push(format!("{place}: dead-lettered for {found}, not {reason}"));
                }
                *outcomes.entry(outcome).or_default() += 1;
            }
        }
        for what in wrong {
            self.wrong(what);
        }
        outcomes
    }
}
