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
use crate::domain::wire::Rules;
use crate::kafka::scan::{ScanError, ScanRange, Scanner};
use crate::kafka::topic_rules::TIMESTAMP_AHEAD_MAX_MS;
use crate::reconcile::log::Identified;
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

/// Input topic with a client that is created on demand.
pub struct Input {
    kafka: KafkaSettings,
    rules: Rules,
    scanner: Option<Scanner>,
}

impl Input {
    /// Creates a handle without a client.
    pub fn new(kafka: &KafkaSettings, rules: Rules) -> Self {
        Self { kafka: small(kafka), rules, scanner: None }
    }

    /// Closes the client until the next read; an idle client still sends requests to its brokers.
    pub fn rest(&mut self) {
        self.scanner = None;
    }

    /// Runs `question` on the client; closes the client after an error.
    fn ask<T>(
        &mut self,
        question: impl FnOnce(&Scanner, &Rules) -> Result<T, ScanError>,
    ) -> Result<T, ScanError> {
        let scanner = match self.scanner.take() {
            Some(scanner) => scanner,
            None => Scanner::new(&self.kafka, &self.kafka.input_topic)?,
        };
        let answer = question(&scanner, &self.rules)?;
        self.scanner = Some(scanner);
        Ok(answer)
    }

    /// Id of the input topic.
    pub fn topic_id(&mut self) -> Result<Uuid, ScanError> {
        self.ask(|scanner, _| scanner.describe().map(|(id, _)| id))
    }

    /// Log bounds of the partitions of these ranges, in the same order.
    pub fn bounds(&mut self, parts: &[Part]) -> Result<Vec<LogBounds>, ScanError> {
        let partitions: Vec<Partition> = parts.iter().map(|part| part.range.partition).collect();
        self.ask(|scanner, _| scanner.bounds(&partitions))
    }

    /// Reads all records of these ranges; each partition may occur once. Returns the valid records, and the
    /// number of invalid ones.
    pub fn read(&mut self, parts: &[Part]) -> Result<(Vec<Payment>, u64), ScanError> {
        let ranges: Vec<ScanRange> = parts.iter().map(|part| part.range).collect();
        let now = (metrics::now(), Instant::now());
        let decided_after = |partition: Partition, timestamp: TimestampMs| {
            let part = parts.iter().find(|part| part.range.partition == partition);
            let (time, before) = match part.and_then(|part| part.decided_after) {
                Some(at) => (now.0, i64::try_from(now.1.saturating_duration_since(at).as_millis())),
                // It was decided before this process observed the partition.
                None => (timestamp, Ok(TIMESTAMP_AHEAD_MAX_MS)),
            };
            TimestampMs(time.0.saturating_sub(before.unwrap_or(i64::MAX)))
        };
        self.ask(|scanner, rules| {
            let (mut payments, mut invalid) = (Vec::new(), 0);
            let mut one = SourceBatch::new();
            // The callback never stops the scan.
            let _ = scanner.read(&ranges, |record| {
                match Identified::parse(record, &mut one, rules) {
                    Some(identified) => payments.push(Payment {
                        place: (record.partition(), record.offset()),
                        record: identified,
                        decided_after: decided_after(record.partition(), identified.timestamp),
                    }),
                    None => invalid += 1,
                }
                ControlFlow::Continue(())
            })?;
            Ok((payments, invalid))
        })
    }
}
