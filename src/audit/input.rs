//! Reads ranges of the input topic with the audit's own client, which is not a member of the group and
//! fetches little at a time.

use std::ops::ControlFlow;
use std::time::Instant;

use uuid::Uuid;

use super::plan::Part;
use super::verdict::Payment;
use crate::config::KafkaSettings;
use crate::domain::cursor::LogBounds;
use crate::domain::record::{Partition, SourceBatch, TimestampMs};
use crate::domain::wire::{self, Rules};
use crate::kafka::scan::{ScanError, ScanRange, Scanner};
use crate::telemetry::metrics;

/// Fetch limits: about one record batch per partition, and no prefetching.
const PROPERTIES: [(&str, &str); 4] = [
    ("fetch.message.max.bytes", "65536"),
    ("max.partition.fetch.bytes", "65536"),
    ("queued.min.messages", "1"),
    // No waiting: the requested records exist.
    ("fetch.min.bytes", "1"),
];

/// Settings of a client that fetches little.
pub fn small(kafka: &KafkaSettings) -> KafkaSettings {
    KafkaSettings { properties: kafka.properties.overridden(&PROPERTIES), ..kafka.clone() }
}

/// Result of reading ranges.
#[derive(Debug, Default)]
pub struct Read {
    /// Valid records.
    pub payments: Vec<Payment>,
    /// Number of invalid records.
    pub invalid: u64,
}

/// Input topic with a client that is created on demand.
pub struct Input {
    kafka: KafkaSettings,
    rules: Rules,
    scanner: Option<Scanner>,
    one: SourceBatch,
}

impl Input {
    /// Creates a handle without a client.
    pub fn new(kafka: &KafkaSettings, rules: Rules) -> Self {
        Self { kafka: small(kafka), rules, scanner: None, one: SourceBatch::new() }
    }

    /// Closes the client until the next read; an idle client still sends requests to its brokers.
    pub fn rest(&mut self) {
        self.scanner = None;
    }

    /// Runs `question` on the client; closes the client after an error.
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

    /// Id of the input topic.
    pub fn topic_id(&mut self) -> Result<Uuid, ScanError> {
        self.ask(|scanner, _, _| scanner.describe().map(|(id, _)| id))
    }

    /// Log bounds of the partitions of these ranges, in the same order.
    pub fn bounds(&mut self, parts: &[Part]) -> Result<Vec<LogBounds>, ScanError> {
        let partitions: Vec<Partition> = parts.iter().map(|part| part.range.partition).collect();
        self.ask(|scanner, _, _| scanner.bounds(&partitions))
    }

    /// Reads all records of these ranges; each partition may occur once.
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
            // The callback never stops the scan.
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
