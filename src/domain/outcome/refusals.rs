//! Decides when refused rows are a fault of the database and not of the records. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Up to this many refused rows are accepted, whatever their share.
const REFUSED_MAX: usize = 10;
/// Above [`REFUSED_MAX`], more than one refused row in this many is a fault of the database.
const REFUSED_ONE_IN: usize = 10;
/// A batch with fewer rows than this is also judged together with the batches written shortly before it.
/// Otherwise a database that refuses nearly everything would cause a few dead letters for each small batch.
const ROWS_JUDGED_MIN: usize = 100;
/// Older batches are not counted.
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
    /// Whether too many rows were refused; if so, the refused rows and all rows, of this batch alone or of it
    /// and the batches before it.
    pub fn excess(&self, now: Instant, rows: usize, refused: usize) -> Option<(usize, usize)> {
        let (mut rows, mut refused) = (rows, refused);
        let mut before = self.0.iter().rev();
        loop {
            if refused > REFUSED_MAX && refused * REFUSED_ONE_IN > rows {
                return Some((refused, rows));
            }
            let is_fresh = |noted: &&Noted| now.saturating_duration_since(noted.at) <= MEMORY;
            let noted = before.next().filter(is_fresh).filter(|_| rows < ROWS_JUDGED_MIN)?;
            rows += noted.rows;
            refused += noted.refused;
        }
    }

    /// Records that a batch of `rows` was written without its `refused` rows.
    pub fn note(&mut self, now: Instant, rows: usize, refused: usize) {
        if rows == 0 || (refused == 0 && self.0.is_empty()) {
            return;
        }
        self.0.push_back(Noted { at: now, rows, refused });
        // Each batch has at least one row, so older ones are never needed.
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

    fn are_too_many(refusals: &Refusals, now: Instant, rows: usize, refused: usize) -> bool {
        refusals.excess(now, rows, refused).is_some()
    }

    #[test]
    fn more_than_ten_and_more_than_a_tenth_is_too_many() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        assert!(!are_too_many(&refusals, now, 10, 10));
        assert!(are_too_many(&refusals, now, 11, 11));
        assert!(!are_too_many(&refusals, now, 110, 11), "exactly a tenth");
        assert!(are_too_many(&refusals, now, 109, 11));
        assert!(!are_too_many(&refusals, now, 10_000, 1_000));
        assert!(are_too_many(&refusals, now, 10_000, 1_001));
    }

    #[test]
    fn small_batches_are_judged_together() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..5 {
            assert!(!are_too_many(&refusals, now, 2, 2));
            refusals.note(now, 2, 2);
        }
        assert!(are_too_many(&refusals, now, 2, 2), "the eleventh and twelfth in a row");
        assert!(!are_too_many(&refusals, now, 2, 0), "ten are not too many");
        // Accepted rows in between are counted as well.
        for _ in 0..60 {
            refusals.note(now, 2, 0);
        }
        assert!(!are_too_many(&refusals, now, 2, 2));
    }

    #[test]
    fn a_large_batch_is_judged_alone() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..10 {
            refusals.note(now, 1, 1);
        }
        assert!(!are_too_many(&refusals, now, 100, 10));
    }

    #[test]
    fn a_small_batch_is_not_excused_by_a_large_one_before_it() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        refusals.note(now, 1, 1);
        refusals.note(now, 3_000, 0);
        assert_eq!(refusals.excess(now, 72, 60), Some((60, 72)));
        // Several small batches are not excused either.
        assert_eq!(refusals.excess(now, 8, 8), None);
        refusals.note(now, 8, 8);
        assert_eq!(refusals.excess(now, 8, 8), Some((16, 16)));
    }

    #[test]
    fn refusals_of_long_ago_are_forgotten() {
        let (mut refusals, long_ago) = (Refusals::default(), Instant::now());
        for _ in 0..10 {
            refusals.note(long_ago, 1, 1);
        }
        let now = long_ago + MEMORY + Duration::from_secs(1);
        assert!(!are_too_many(&refusals, now, 1, 1));
        assert!(are_too_many(&refusals, long_ago, 1, 1));
        refusals.note(now, 1, 0);
        assert!(refusals.0.is_empty());
    }
}
