//! Searches dead letters of single records: a record that the database rejected has no claim.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::input::small;
use super::verdict::Payment;
use crate::config::KafkaSettings;
use crate::domain::record::{Offset, Partition, TimestampMs};
use crate::kafka::last_stable::stable_high_watermarks;
use crate::kafka::scan::{ScanRange, Scanner};
use crate::reconcile::source_place;

/// Maximum number of dead letters read in a search.
const LETTERS_MAX: u64 = 1_000_000;
/// Time limit of a search.
const SEARCH_MAX: Duration = Duration::from_secs(120);
/// A dead letter has the timestamp of the process that sent it, after its record was written to the log. The
/// record's timestamp may be up to an hour ahead of that.
const BEFORE_RECORD_MS: i64 = (60 + 10) * 60 * 1_000;

/// Result of a search.
#[derive(Debug, Default)]
pub struct Searched {
    /// Records with a dead letter.
    pub found: HashSet<(Partition, Offset)>,
    /// Why a dead letter may have been missed; empty if that is impossible.
    pub but: &'static str,
}

/// Searches the dead letters of these payments, up to the current end of the topic.
///
/// # Errors
/// A description, if the topic cannot be read.
pub fn search(kafka: &KafkaSettings, topic_id: Uuid, payments: &[Payment]) -> Result<Searched, String> {
    let failed = |error: &dyn std::fmt::Display| format!("searching the dead letters: {error}");
    let Some(earliest) = payments.iter().map(|payment| payment.timestamp.0).min() else {
        return Ok(Searched::default());
    };
    let wanted: HashSet<(Partition, Offset)> = payments.iter().map(|p| (p.partition, p.offset)).collect();
    let prefix = format!("{:08x}", topic_id.as_fields().0);
    let topic = &kafka.dead_letter_topic;
    let scanner = Scanner::new(&small(kafka), topic).map_err(|e| failed(&e))?;
    let (_, partitions) = scanner.describe().map_err(|e| failed(&e))?;
    let ends = stable_high_watermarks(kafka, topic, &partitions).map_err(|e| failed(&e))?;
    let bounds = scanner.bounds(&partitions).map_err(|e| failed(&e))?;
    let from = TimestampMs(earliest.saturating_sub(BEFORE_RECORD_MS));
    let positions = scanner.positions_at(&partitions, from).map_err(|e| failed(&e))?;
    let mut searched = Searched::default();
    let mut ranges = Vec::new();
    let mut is_cut = false;
    for (((partition, to), bounds), position) in partitions.into_iter().zip(ends).zip(bounds).zip(positions) {
        let first = position.unwrap_or(to).max(bounds.start);
        // The oldest dead letter left is recent enough that relevant ones may have been removed.
        is_cut |= bounds.start.0 > 0 && first <= bounds.start;
        ranges.push(ScanRange { partition, from: first, to });
    }
    if is_cut {
        searched.but = "; its dead letter may have left the topic";
    }
    let began = Instant::now();
    let mut seen = 0_u64;
    let flow = scanner
        .read(&ranges, |record| {
            let source = record.headers().filter(|(name, _)| *name == b"source").last();
            let place = source.and_then(|(_, value)| source_place(value?, &prefix));
            searched.found.extend(place.filter(|place| wanted.contains(place)));
            seen += 1;
            let is_over = seen >= LETTERS_MAX || seen.is_multiple_of(1_000) && began.elapsed() > SEARCH_MAX;
            if is_over || searched.found.len() == wanted.len() {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })
        .map_err(|e| failed(&e))?;
    // Stopped because all were found.
    if flow.is_break() && searched.found.len() < wanted.len() {
        searched.but = "; there are too many dead letters to be searched";
    }
    Ok(searched)
}
