//! Medians, spreads and percentiles.

use std::fmt;

/// Several measurements of the same quantity.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

impl Spread {
    /// `None` without measurements.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        };
        Some(Self { min, median, max })
    }
}

impl fmt::Display for Spread {
    /// The median, followed by minimum and maximum if they differ, with this many decimals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let decimals = f.precision().unwrap_or(0);
        if self.min == self.max {
            return write!(f, "{:.*}", decimals, self.median);
        }
        write!(f, "{:.*} ({:.*}..{:.*})", decimals, self.median, decimals, self.min, decimals, self.max)
    }
}

/// Durations counted in whole milliseconds: exact percentiles in bounded memory.
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

/// Longer durations count as this long.
const MS_MAX: usize = 600_000;

impl Histogram {
    pub fn new() -> Self {
        Self { counts: vec![0; MS_MAX + 1], total: 0 }
    }

    /// Counts one duration; a negative one, after a clock step, counts as 0.
    pub fn add(&mut self, ms: i64) {
        self.counts[usize::try_from(ms).unwrap_or(0).min(MS_MAX)] += 1;
        self.total += 1;
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// The smallest duration that at least this share of all do not exceed; `None` if there are none.
    pub fn at(&self, share: f64) -> Option<u64> {
        let rank = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        self.counts
            .iter()
            .position(|count| {
                seen += count;
                seen >= rank
            })
            .filter(|_| self.total > 0)
            .map(|ms| ms as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two_middles() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(format!("{:.1}", Spread::of([1.0, 2.25, 4.0]).unwrap()), "2.2 (1.0..4.0)");
        assert_eq!(format!("{:.0}", Spread::of([7.0]).unwrap()), "7");
    }

    #[test]
    fn percentiles_are_the_values_of_their_rank() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.at(0.5), None);
        for ms in (1..=1_000).rev() {
            histogram.add(ms);
        }
        assert_eq!(histogram.total(), 1_000);
        assert_eq!(histogram.at(0.5), Some(500));
        assert_eq!(histogram.at(0.99), Some(990));
        assert_eq!(histogram.at(0.999), Some(999));
        assert_eq!(histogram.at(1.0), Some(1_000));
        assert_eq!(histogram.at(0.0), Some(1));
    }

    #[test]
    fn what_lies_outside_counts_at_the_edge() {
        let mut histogram = Histogram::new();
        histogram.add(-5);
        histogram.add(i64::MAX);
        assert_eq!((histogram.at(0.5), histogram.at(1.0)), (Some(0), Some(MS_MAX as u64)));
    }
}
