//! Looks for the dead letters of single records: a record that the database refused has claimed no id.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::input::small;
use super::verdict::Payment;
use crate::config::KafkaSettings;
use crate::kafka::scan::{ScanRange, Scanner};
use crate::kafka::stable::stable_ends;
use crate::reconcile::source_place;
use crate::record::{Offset, Partition, TimestampMs};

/// Dead letters that are read for one search, at most.
const LETTERS_MAX: u64 = 1_000_000;
/// How long a search may take.
const SEARCH_MAX: Duration = Duration::from_secs(120);
/// A letter is stamped by the clock of the process that sent it, after its record was written to the log; a record may
/// be stamped up to an hour ahead of that.
const BEFORE_RECORD_MS: i64 = (60 + 10) * 60 * 1_000;

/// What a search found.
#[derive(Debug, Default)]
pub struct Searched {
    /// Records that have a dead letter.
    pub found: HashSet<(Partition, Offset)>,
    /// Why the others may have one all the same; empty if they cannot.
    pub but: &'static str,
}

/// Searches the dead letters for those of these payments, up to the end that the topic has now.
///
/// # Errors
/// In words, when the topic cannot be read.
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
    let ends = stable_ends(kafka, topic, &partitions).map_err(|e| failed(&e))?;
    let bounds = scanner.bounds(&partitions).map_err(|e| failed(&e))?;
    let from = TimestampMs(earliest.saturating_sub(BEFORE_RECORD_MS));
    let positions = scanner.positions_at(&partitions, from).map_err(|e| failed(&e))?;
    let mut searched = Searched::default();
    let mut ranges = Vec::new();
    let mut is_cut = false;
    for (((partition, to), bounds), position) in partitions.into_iter().zip(ends).zip(bounds).zip(positions) {
        let first = position.unwrap_or(to).max(bounds.start);
        // Everything that is left was sent late enough: what was removed may have been as well.
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
    // All were found: the rest need not be read.
    if flow.is_break() && searched.found.len() < wanted.len() {
        searched.but = "; there are too many dead letters to be searched";
    }
    Ok(searched)
}
