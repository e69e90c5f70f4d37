//! Any input bytes lead to an outcome of the contract.

use std::collections::BTreeSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use uuid::Uuid;

use crate::audit::audit;
use crate::support::{AT_MS, Message, Payment, Scope, Servers, ulid, uuid_v4, uuid_v7};

const RECORDS: usize = 100_000;
const PARTITIONS: i32 = 4;
/// Inserted in every field that can hold it; the daemon must never log it.
const SECRET: &str = "tell-no-one";

struct Fuzzer(ChaCha8Rng);

impl Fuzzer {
    fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end.max(1) as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill_bytes(&mut bytes);
        bytes
    }

    /// A valid message. Ids repeat now and then, mostly with the same payload in another spelling.
    fn payment(&mut self) -> Payment {
        let seed = self.below(30_000) as u64;
        let mut content = Fuzzer(ChaCha8Rng::seed_from_u64(seed));
        if self.one_in(10) {
            content.0 = ChaCha8Rng::seed_from_u64(self.0.next_u64());
        }
        let id = match seed % 3 {
            0 => uuid_v4(seed),
            1 => uuid_v7(AT_MS - (seed * 20_000) as i64, seed),
            _ => uuid_v7(AT_MS + (seed * 150) as i64, seed),
        };
        let id = match self.below(4) {
            0 => id.to_string(),
            1 => id.to_string().to_uppercase(),
            2 => ulid(id),
            _ => ulid(id).to_lowercase(),
        };
        let amounts =
            [["10", "\"10.0\"", "1.0e1"], ["99999999999999", "\"999999999999990E-1\"", "99999999999999.000"]];
        let amount = content.pick(&amounts)[self.below(3)];
        let mut payment = Payment::new(id, content.pick(&[0, 1, 31, 4711, 4712, i64::MAX]))
            .amount(amount)
            .currency(content.pick(&["EUR", "EUR", "USD", "JPY", "KWD", "CLF", "BGN"]))
            .status(content.pick(&[2, 2, 0, -2]))
            .kind(content.pick(&["BWI", "BWI", "VSA", "MSC"]));
        let more = [
            format!(r#","comment":"{SECRET}""#),
            format!(r#","comment":"{SECRET}\u00e9\ud83d\ude00\n""#),
            format!(r#","externalRefId":"{SECRET}","comment":null"#),
            format!(r#","{SECRET}":{{"{SECRET}":["{SECRET}",1e5,-0.0,true,null]}}"#),
            String::new(),
        ];
        payment.more = content.pick(&more);
        payment
    }

    /// A well-formed message that breaks a rule, or looks as if it did.
    fn strange(&mut self) -> String {
        let levels = self.pick(&[31, 32, 33, 500, 4_000]);
        let digits = self.pick(&[14, 15, 400, 8_000]);
        let more = [
            format!(r#","x":{}{}"#, "[".repeat(levels), "]".repeat(levels)),
            format!(r#","x":{}1{}"#, "{\"a\":".repeat(levels), "}".repeat(levels)),
            format!(r#","x":{}"#, "[".repeat(levels)),
            format!(r#","x":{}"#, "9".repeat(digits)),
            format!(r#","x":1e{}"#, "9".repeat(digits)),
            format!(r#","{SECRET}":1,"{SECRET}":2"#),
            r#","x":{"a":1,"b":2,"\u0061":3}"#.to_owned(),
            r#","amount":1"#.to_owned(),
            format!(r#","x":"\ud800{SECRET}""#),
            r#","x":"\udc00\ud800""#.to_owned(),
            r#","\ud83d\ude00":"\ud83d\ude00""#.to_owned(),
            format!(",\"comment\":\"{SECRET}\u{1}\""),
            format!(r#","comment":"{SECRET}\u0000""#),
            format!(r#","comment":"{}""#, "😀".repeat(self.pick(&[999, 1_000, 1_001]))),
            format!(r#","externalRefId":"{}""#, "é".repeat(self.pick(&[63, 64, 65]))),
            format!(r#","comment":["{SECRET}"]"#),
            r#","comment":"#.to_owned(),
        ];
        let amounts = [
            "9".repeat(digits),
            format!("0.{}1", "0".repeat(digits)),
            format!("1{}", "0".repeat(digits)),
            format!("1e-{digits}"),
            format!("1e{digits}"),
            format!("1e{}", "9".repeat(digits)),
            format!("{}e-{digits}", "1".repeat(digits)),
            format!(r#""{SECRET}""#),
            r#""""#.to_owned(),
            "-1".to_owned(),
            "0e0".to_owned(),
            "+1".to_owned(),
            ".5".to_owned(),
            "NaN".to_owned(),
            "null".to_owned(),
            "{}".to_owned(),
        ];
        let mut payment = self.payment();
        match self.below(6) {
            0 => payment.more = self.pick(&more),
            1 => payment.amount = self.pick(&amounts),
            2 => {
                payment.message_id =
                    self.pick(&["", SECRET, "00000000000000000000000000", "\\u0030"]).to_owned()
            }
            3 => payment.status = self.pick(&[1, -1, 3, i64::MIN]),
            4 => payment.currency = self.pick(&["", "eur", "XXX", "ZZZ", SECRET]).to_owned(),
            _ => payment.kind = self.pick(&["", "bwi", SECRET, "BW\\u0049"]).to_owned(),
        }
        payment.json()
    }

    fn mutate(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let to = (at + self.below(20)).min(bytes.len());
            match self.below(6) {
                0 if !bytes.is_empty() => bytes[at] = self.0.next_u64() as u8,
                1 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                2 => drop(bytes.drain(at..to)),
                3 => {
                    let copy = bytes[at..to].to_vec();
                    bytes.splice(at..at, copy);
                }
                4 => bytes.truncate(at),
                _ => {
                    let odd: [&[u8]; 8] =
                        [b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xef\xbb\xbf", b"\"", b"\\u", b"}{"];
                    let insert = self.pick(&odd);
                    bytes.splice(at..at, insert.iter().copied());
                }
            }
        }
        bytes
    }

    fn headers(&mut self, message: &mut Message) {
        let names = [
            "schema-version",
            "source",
            "dlq-reason",
            "dlq-offset",
            "dlq-replays",
            "dlq-value-sha256",
            "correlation-id",
            "traceparent",
            "",
            SECRET,
            "naïve",
            "X",
        ];
        for _ in 0..self.below(5) {
            let name = self.pick(&names).to_owned();
            let value = match self.below(6) {
                0 => None,
                1 => Some(Vec::new()),
                2 => Some(b"1".to_vec()),
                3 => {
                    let len = self.below(40);
                    Some(self.bytes(len))
                }
                // The contract allows these two in a record's log lines.
                _ if ["correlation-id", "traceparent"].contains(&name.as_str()) => Some(b"an-id".to_vec()),
                _ => Some(SECRET.as_bytes().to_vec()),
            };
            // Another version would make most of these messages invalid at the first byte.
            let value = if name == "schema-version" && !self.one_in(4) { Some(b"1".to_vec()) } else { value };
            message.headers.push((name, value));
        }
    }

    fn message(&mut self) -> Message {
        let payment = self.payment();
        let value = match self.below(20) {
            0 => None,
            1 => Some(Vec::new()),
            2..=4 => {
                let len = self.below(300);
                Some(self.bytes(len))
            }
            5..=8 => Some(self.strange().into_bytes()),
            9..=14 => Some(self.mutate(payment.json().into_bytes())),
            15 if self.one_in(20) => {
                // Around the limit of 16 KiB, and far above it.
                let len = self.pick(&[16_383, 16_384, 16_385, 200_000]);
                let mut value = payment.json().into_bytes();
                value.resize(len, b' ');
                Some(value)
            }
            _ => Some(payment.json().into_bytes()),
        };
        let key = match self.below(20) {
            0 => None,
            1 => Some(Vec::new()),
            2 => Some(SECRET.as_bytes().to_vec()),
            3 => {
                let len = self.below(40);
                Some(self.bytes(len))
            }
            4 => Some(format!("0{}", payment.cust_id).into_bytes()),
            _ => Some(payment.cust_id.to_string().into_bytes()),
        };
        let partition = self.below(PARTITIONS as usize) as i32;
        let timestamp_ms = match self.below(30) {
            0 => self.pick(&[1, 946_684_799_999, 946_684_800_000, 4_102_444_799_999, 4_102_444_800_000]),
            1 => (self.0.next_u64() >> 16) as i64 + 1,
            _ => AT_MS + self.below(2_000_000) as i64,
        };
        let mut message = Message {
            key,
            value,
            partition: Some(partition),
            timestamp_ms: Some(timestamp_ms),
            headers: vec![],
        };
        if self.one_in(3) {
            self.headers(&mut message);
        }
        message
    }
}

#[test]
fn any_bytes_lead_to_one_outcome_and_are_never_logged() {
    // GIVEN 100,000 random, mutated and unusual records, in a topic that accepts any timestamp
    let scope = Scope::new(Servers::shared(), "fuzz");
    let any_time = ("message.timestamp.after.max.ms", "9223372036854775807");
    scope.create_topics_with(PARTITIONS, 2, &[any_time]);
    scope.command(&["migrate"]).succeeds();
    let mut fuzzer = Fuzzer(ChaCha8Rng::seed_from_u64(20_260_801));
    let places = scope.produce(&scope.input_topic, (0..RECORDS).map(|_| fuzzer.message()));

    // WHEN a daemon with the most verbose log level drains them
    let wordy =
        [("PAYMENT_WRITER__LOG__LEVEL", "debug"), ("PAYMENT_WRITER__KAFKA__PROPERTIES__DEBUG", "cgrp,fetch")];
    let daemon = scope.drain_with(&wordy);

    // THEN each record was written, dead-lettered or a duplicate, and the daemon's counters agree
    let all: BTreeSet<(i32, i64)> = places.into_iter().collect();
    assert_eq!(all.len(), RECORDS);
    let rows = scope.sql(
        "SELECT source_partition, source_offset, message_id FROM payment_writer.payment_metadata
         ORDER BY message_id",
        &[],
    );
    let written: Vec<(i32, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let uuids: Vec<Uuid> = rows.iter().step_by(500).map(|row| row.get(2)).collect();
    let sources = |topic: &str| -> Vec<(i32, i64)> {
        let place = |source: &str| {
            let mut parts = source.split('/').skip(1).map(|part| part.parse::<i64>().unwrap());
            (parts.next().unwrap() as i32, parts.next().unwrap())
        };
        scope.read_all(topic).iter().map(|record| place(record.header("source"))).collect()
    };
    let dead = sources(&scope.dead_letter_topic);
    let mut settled: BTreeSet<(i32, i64)> = BTreeSet::new();
    for place in written.iter().chain(&dead) {
        assert!(settled.insert(*place), "{place:?} has two outcomes");
        assert!(all.contains(place), "{place:?} was never sent");
    }
    let duplicates = all.len() - settled.len();
    let log = daemon.log();
    let totals = format!(
        "written={} duplicates={duplicates} dead_letters={} redelivered=0",
        written.len(),
        dead.len()
    );
    assert!(log.contains(&totals), "{totals} is not what the daemon says");
    for (outcome, count) in [("written", written.len()), ("dead", dead.len()), ("duplicate", duplicates)] {
        assert!(count > 1_000, "only {count} records {outcome}: the fuzzer no longer covers this outcome");
    }
    // AND what was written was published exactly once
    let (mut written, mut read) = (written, sources(&scope.read_topic));
    written.sort_unstable();
    read.sort_unstable();
    assert_eq!(written, read);
    // AND the log contains nothing of their contents
    assert!(log.contains("DEBUG"), "the log was to be at level debug");
    assert!(!log.contains(SECRET), "a payload in the log");
    for bytes in uuids.iter().map(Uuid::as_bytes) {
        let id = Uuid::from_bytes(*bytes);
        let as_list = format!("{bytes:?}");
        for form in
            [id.to_string(), id.simple().to_string(), ulid(id), as_list[1..as_list.len() - 1].to_owned()]
        {
            assert!(!log.contains(&form), "message id {id} in the log as {form}");
        }
    }
    // AND the auditor, which has its own implementation of the rules, finds the same outcomes
    audit(&scope).succeeds();
}
