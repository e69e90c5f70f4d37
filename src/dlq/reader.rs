//! Reads the dead-letter topic record by record, without buffering.

use std::ops::ControlFlow;

use uuid::Uuid;

use super::DlqError;
use super::filter::{Filter, Ranges};
use super::letter::{Letter, Place};
use crate::config::KafkaSettings;
use crate::domain::record::Partition;
use crate::kafka::scan::Scanner;

/// A reader of the dead-letter topic.
pub struct Reader {
    scanner: Scanner,
    topic_id: Uuid,
    partitions: Vec<Partition>,
}

impl Reader {
    /// Connects and asks for the topic's id and partitions.
    pub fn open(kafka: &KafkaSettings) -> Result<Self, DlqError> {
        let scanner = Scanner::new(kafka, &kafka.dead_letter_topic)?;
        let (topic_id, partitions) = scanner.describe()?;
        Ok(Self { scanner, topic_id, partitions })
    }

    /// Id of the dead-letter topic.
    pub fn topic_id(&self) -> Uuid {
        self.topic_id
    }

    /// Ranges to read for a filter.
    pub fn ranges(&self, filter: &Filter) -> Result<Ranges, DlqError> {
        filter.ranges(&self.scanner, &self.partitions)
    }

    /// Passes every record of the ranges to `each` until it breaks; in order within a partition.
    pub fn read(
        &self,
        ranges: &Ranges,
        mut each: impl FnMut(&Letter<'_>) -> Result<ControlFlow<()>, DlqError>,
    ) -> Result<ControlFlow<()>, DlqError> {
        for wave in &ranges.0 {
            let mut outcome = Ok(ControlFlow::Continue(()));
            // `outcome` says whether the callback stopped the scan.
            let _ = self.scanner.read(wave, |record| {
                let place = Place { partition: record.partition(), offset: record.offset() };
                let headers = record.headers();
                outcome =
                    each(&Letter::read(place, record.timestamp(), record.key(), record.value(), headers));
                match outcome {
                    Ok(ControlFlow::Continue(())) => ControlFlow::Continue(()),
                    _ => ControlFlow::Break(()),
                }
            })?;
            if outcome?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}
