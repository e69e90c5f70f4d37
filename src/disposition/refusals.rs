//! When refused rows are the database's fault. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// More refused rows than this, and
const REFUSED_MAX: usize = 10;
/// more than one in so many: then it is the database that is ill.
const REFUSED_ONE_IN: usize = 10;
/// A batch with fewer rows is judged together with those that were written shortly before it: or a database
/// that refuses everything would have every payment diverted at a rate of a few a batch.
const ROWS_JUDGED_MIN: usize = 100;
/// Refusals of longer ago are forgotten.
const MEMORY: Duration = Duration::from_secs(600);

/// The refusals of one lane's last batches.
#[derive(Debug, Default)]
pub struct Refusals(VecDeque<Noted>);

#[derive(Clone, Copy, Debug)]
struct Noted {
    at: Instant,
    rows: usize,
    refused: usize,
}

impl Refusals {
    /// Whether a batch with so many rows, of which so many were refused, speaks of an ill database.
    pub fn are_too_many(&self, now: Instant, rows: usize, refused: usize) -> bool {
        let (mut rows, mut refused) = (rows, refused);
        for noted in self.0.iter().rev() {
            if rows >= ROWS_JUDGED_MIN || now.saturating_duration_since(noted.at) > MEMORY {
                break;
            }
            rows += noted.rows;
            refused += noted.refused;
        }
        refused > REFUSED_MAX && refused * REFUSED_ONE_IN > rows
    }

    /// A batch was written, without so many of its rows.
    pub fn note(&mut self, now: Instant, rows: usize, refused: usize) {
        if rows == 0 || (refused == 0 && self.0.is_empty()) {
            return;
        }
        self.0.push_back(Noted { at: now, rows, refused });
        // Each has a row at least: what is further back is never looked at.
        while self.0.len() > ROWS_JUDGED_MIN
            || self.0.front().is_some_and(|n| now.saturating_duration_since(n.at) > MEMORY)
        {
            self.0.pop_front();
        }
        if self.0.iter().all(|noted| noted.refused == 0) {
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_ten_and_more_than_a_tenth_is_too_many() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        assert!(!refusals.are_too_many(now, 10, 10));
        assert!(refusals.are_too_many(now, 11, 11));
        assert!(!refusals.are_too_many(now, 110, 11), "exactly a tenth");
        assert!(refusals.are_too_many(now, 109, 11));
        assert!(!refusals.are_too_many(now, 10_000, 1_000));
        assert!(refusals.are_too_many(now, 10_000, 1_001));
    }

    #[test]
    fn small_batches_are_judged_together() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..5 {
            assert!(!refusals.are_too_many(now, 2, 2));
            refusals.note(now, 2, 2);
        }
        assert!(refusals.are_too_many(now, 2, 2), "the eleventh and twelfth in a row");
        assert!(!refusals.are_too_many(now, 2, 0), "ten are not too many");
        // Good rows between them count, too.
        for _ in 0..60 {
            refusals.note(now, 2, 0);
        }
        assert!(!refusals.are_too_many(now, 2, 2));
    }

    #[test]
    fn a_large_batch_is_judged_alone() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..10 {
            refusals.note(now, 1, 1);
        }
        assert!(!refusals.are_too_many(now, 100, 10));
    }

    #[test]
    fn refusals_of_long_ago_are_forgotten() {
        let (mut refusals, long_ago) = (Refusals::default(), Instant::now());
        for _ in 0..10 {
            refusals.note(long_ago, 1, 1);
        }
        let now = long_ago + MEMORY + Duration::from_secs(1);
        assert!(!refusals.are_too_many(now, 1, 1));
        assert!(refusals.are_too_many(long_ago, 1, 1));
        refusals.note(now, 1, 0);
        assert!(refusals.0.is_empty());
    }
}
