//! Reads ranges of the input with a client that belongs to the audit, is no member of the group, and fetches little at
//! a time.

use std::ops::ControlFlow;
use std::time::Instant;

use uuid::Uuid;

use super::plan::Part;
use super::verdict::Payment;
use crate::config::KafkaSettings;
use crate::cursor::LogBounds;
use crate::kafka::scan::{ScanError, ScanRange, Scanner};
use crate::metrics;
use crate::record::{Partition, SourceBatch, TimestampMs};
use crate::wire::{self, Rules};

/// Limits of what is fetched: a record batch or a little more of each partition, and nothing ahead of what is read.
const PROPERTIES: [(&str, &str); 4] = [
    ("fetch.message.max.bytes", "65536"),
    ("max.partition.fetch.bytes", "65536"),
    ("queued.min.messages", "1"),
    // Waits for nothing: what is read is there.
    ("fetch.min.bytes", "1"),
];

/// The settings of a client that fetches little.
pub fn small(kafka: &KafkaSettings) -> KafkaSettings {
    KafkaSettings { properties: kafka.properties.overridden(&PROPERTIES), ..kafka.clone() }
}

/// What was read of some ranges.
#[derive(Debug, Default)]
pub struct Read {
    /// Valid records.
    pub payments: Vec<Payment>,
    /// Records that break a rule: how many.
    pub invalid: u64,
}

/// The input topic, with a client while there is something to read.
pub struct Input {
    kafka: KafkaSettings,
    rules: Rules,
    scanner: Option<Scanner>,
    one: SourceBatch,
}

impl Input {
    /// The input topic of these settings; makes no client yet.
    pub fn new(kafka: &KafkaSettings, rules: Rules) -> Self {
        Self { kafka: small(kafka), rules, scanner: None, one: SourceBatch::new() }
    }

    /// Gives the client up until there is something to read again: one at rest still talks to its brokers.
    pub fn rest(&mut self) {
        self.scanner = None;
    }

    /// Runs `question` on a client; after an error the client is given up.
    fn ask<T>(
        &mut self,
        question: impl FnOnce(&Scanner, &Rules, &mut SourceBatch) -> Result<T, ScanError>,
    ) -> Result<T, ScanError> {
        let scanner = match self.scanner.take() {
            Some(scanner) => scanner,
            None => Scanner::new(&self.kafka, &self.kafka.input_topic)?,
        };
        let answer = question(&scanner, &self.rules, &mut self.one)?;
        self.scanner = Some(scanner);
        Ok(answer)
    }

    /// The topic's id.
    pub fn topic_id(&mut self) -> Result<Uuid, ScanError> {
        self.ask(|scanner, _, _| scanner.describe().map(|(id, _)| id))
    }

    /// What the log has of the partitions of these ranges, in their order.
    pub fn bounds(&mut self, parts: &[Part]) -> Result<Vec<LogBounds>, ScanError> {
        let partitions: Vec<Partition> = parts.iter().map(|part| part.range.partition).collect();
        self.ask(|scanner, _, _| scanner.bounds(&partitions))
    }

    /// Reads all records of these ranges, each of another partition.
    pub fn read(&mut self, parts: &[Part]) -> Result<Read, ScanError> {
        let ranges: Vec<ScanRange> = parts.iter().map(|part| part.range).collect();
        let now = (metrics::now(), Instant::now());
        let decided_after = |partition: Partition, timestamp: TimestampMs| {
            let part = parts.iter().find(|part| part.range.partition == partition);
            match part.and_then(|part| part.decided_after) {
                Some(at) => {
                    let ago = i64::try_from(now.1.saturating_duration_since(at).as_millis());
                    TimestampMs(now.0.0.saturating_sub(ago.unwrap_or(i64::MAX)))
                }
                None => Payment::decided_after_log(timestamp),
            }
        };
        self.ask(|scanner, rules, one| {
            let mut read = Read::default();
            // Never broken off.
            let _ = scanner.read(&ranges, |record| {
                one.clear();
                let (partition, offset) = (record.partition(), record.offset());
                record.copy_into(one);
                match one.get(0).map(|view| wire::parse(&view, rules)) {
                    Some(Ok(payment)) => read.payments.push(Payment {
                        partition,
                        offset,
                        message_id: payment.message_id.to_uuid(),
                        payload_hash: payment.payload_hash(),
                        timestamp: payment.created_at,
                        decided_after: decided_after(partition, payment.created_at),
                    }),
                    _ => read.invalid += 1,
                }
                ControlFlow::Continue(())
            })?;
            Ok(read)
        })
    }
}
