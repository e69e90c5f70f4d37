//! Reading the dead-letter topic, letter by letter: nothing is held.

use std::ops::ControlFlow;

use uuid::Uuid;

use super::DlqError;
use super::choice::{Choice, Ranges};
use super::letter::{Letter, Place};
use crate::config::KafkaSettings;
use crate::kafka::scan::Scanner;
use crate::record::Partition;

/// A reader of the dead-letter topic.
pub struct Reader {
    scanner: Scanner,
    topic_id: Uuid,
    partitions: Vec<Partition>,
}

impl Reader {
    /// Connects, and learns what the topic is.
    pub fn open(kafka: &KafkaSettings) -> Result<Self, DlqError> {
        let scanner = Scanner::new(kafka, &kafka.dead_letter_topic)?;
        let (topic_id, partitions) = scanner.describe()?;
        Ok(Self { scanner, topic_id, partitions })
    }

    /// The topic's id.
    pub fn topic_id(&self) -> Uuid {
        self.topic_id
    }

    /// What has to be read to find the letters of a choice.
    pub fn ranges(&self, choice: &Choice) -> Result<Ranges, DlqError> {
        Ok(choice.ranges(&self.scanner, &self.partitions)?)
    }

    /// Hands every record of the ranges to `each`, those of a partition in their order, until it breaks.
    pub fn read(
        &self,
        ranges: &Ranges,
        mut each: impl FnMut(&Letter<'_>) -> Result<ControlFlow<()>, DlqError>,
    ) -> Result<ControlFlow<()>, DlqError> {
        for wave in &ranges.waves {
            let mut outcome = Ok(ControlFlow::Continue(()));
            // Whether it was broken off, `outcome` says.
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
