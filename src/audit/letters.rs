//! Searches dead letters of single records: a record that the database rejected has no claim.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::input::small;
use super::suspects::Suspect;
use crate::config::KafkaSettings;
use crate::domain::record::TimestampMs;
use crate::reconcile::outputs::{Label, Topic};
use crate::reconcile::table::Place;

/// Maximum number of dead letters read in a search.
const LETTERS_MAX: u64 = 1_000_000;
/// Time limit of a search.
const SEARCH_MAX: Duration = Duration::from_secs(120);
/// A dead letter has the timestamp of the process that sent it, after its record was written to the log. The
/// record's timestamp may be up to an hour ahead of that.
const BEFORE_RECORD_MS: i64 = (60 + 10) * 60 * 1_000;

/// Searches the dead letters of these records, up to the current end of the topic. Returns the records with a
/// dead letter, and why one may have been missed; empty if that is impossible.
///
/// # Errors
/// A description, if the topic cannot be read.
pub fn search(
    kafka: &KafkaSettings,
    topic_id: Uuid,
    suspects: &[Suspect],
) -> Result<(HashSet<Place>, &'static str), String> {
    let failed = |error: &dyn std::fmt::Display| format!("searching the dead letters: {error}");
    let earliest = suspects.iter().map(|s| s.payment.record.timestamp.0).min().unwrap_or_default();
    let wanted: HashSet<Place> = suspects.iter().map(|s| s.payment.place).collect();
    let topic = Topic::open(&small(kafka), &kafka.dead_letter_topic).map_err(|e| failed(&e))?;
    let mut ranges = topic.ranges().map_err(|e| failed(&e))?;
    let from = TimestampMs(earliest.saturating_sub(BEFORE_RECORD_MS));
    let positions = topic.scanner.positions_at(&topic.partitions, from).map_err(|e| failed(&e))?;
    let mut but = "";
    for (range, position) in ranges.iter_mut().zip(positions) {
        let start = range.from;
        range.from = start.max(position.unwrap_or(range.to));
        // The oldest dead letter left is recent enough that relevant ones may have been removed.
        if start.0 > 0 && range.from <= start {
            but = "; its dead letter may have left the topic";
        }
    }
    let began = Instant::now();
    let mut seen = 0_u64;
    let mut found = HashSet::new();
    let flow = topic
        .scanner
        .read(&ranges, |record| {
            found.extend(Label::of(record, topic_id).place.filter(|place| wanted.contains(place)));
            seen += 1;
            let is_over = seen >= LETTERS_MAX || seen.is_multiple_of(1_000) && began.elapsed() > SEARCH_MAX;
            if is_over || found.len() == wanted.len() {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })
        .map_err(|e| failed(&e))?;
    // Not stopped because all were found.
    if flow.is_break() && found.len() < wanted.len() {
        but = "; there are too many dead letters to be searched";
    }
    Ok((found, but))
}
