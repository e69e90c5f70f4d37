//! Chooses the offsets of a topic to check. Pure.

use std::fmt;

use crate::domain::cursor::LogBounds;
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::scan::ScanRange;

/// The offsets asked for, in each partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// First offset; `None` for the start of the log.
    pub(super) from: Option<NextOffset>,
    /// Offset to stop before; `None` for the end of the log.
    pub(super) to: Option<NextOffset>,
    /// Most offsets in all.
    pub(super) offsets_max: i64,
}

/// Offsets that are not checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Skipped {
    pub(super) range: ScanRange,
    /// The reason, or the option that is it.
    pub(super) why: &'static str,
}

impl fmt::Display for Skipped {
    /// As options that choose these offsets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ScanRange { partition, from, to } = self.range;
        write!(f, "--partition {partition} --from {from} --to {to} ({})", self.why)
    }
}

/// Offsets to check, in the order of partitions.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Chosen {
    pub(super) ranges: Vec<ScanRange>,
    pub(super) skipped: Vec<Skipped>,
}

impl Asked {
    /// Chooses among these logs, whose ends are last stable offsets.
    ///
    /// # Errors
    /// When nothing is left to check, with the reason.
    pub(super) fn choose(&self, logs: &[(Partition, LogBounds)]) -> Result<Chosen, String> {
        if let (Some(from), Some(to)) = (self.from, self.to)
            && from >= to
        {
            return Err(format!("the range from {from} to before {to} is empty"));
        }
        let mut chosen = Chosen::default();
        for (partition, LogBounds { start, end }) in logs {
            let range = |from, to| ScanRange { partition: *partition, from, to };
            let (from, to) = (self.from.unwrap_or(*start), self.to.unwrap_or(*end));
            let removed = range(from, to.min(*start));
            let absent = range(from.max(*end), to);
            chosen.skip(removed, "no longer in the log");
            chosen.skip(absent, "not in the log yet");
            chosen.ranges.push(range(from.max(*start), to.min(*end)));
        }
        chosen.ranges.retain(|range| !range.is_empty());
        if chosen.ranges.is_empty() {
            return Err(self.nothing(logs, &chosen.skipped));
        }
        chosen.limit(self.offsets_max);
        Ok(chosen)
    }

    fn nothing(&self, logs: &[(Partition, LogBounds)], skipped: &[Skipped]) -> String {
        match logs {
            [(partition, LogBounds { start, end })] => {
                let log =
                    format!("the log of partition {partition} has the offsets from {start} to before {end}");
                let skipped: Vec<String> = skipped.iter().map(Skipped::to_string).collect();
                if skipped.is_empty() { log } else { format!("{}; {log}", skipped.join(", ")) }
            }
            _ => format!("its {} partitions have no records", logs.len()),
        }
    }
}

impl Chosen {
    fn skip(&mut self, range: ScanRange, why: &'static str) {
        if !range.is_empty() {
            self.skipped.push(Skipped { range, why });
        }
    }

    /// Shortens the longest ranges until they have at most this many offsets in all.
    fn limit(&mut self, offsets_max: i64) {
        let len = |range: &ScanRange| range.to.0.saturating_sub(range.from.0);
        let mut shortest_first: Vec<usize> = (0..self.ranges.len()).collect();
        shortest_first.sort_by_key(|index| self.ranges.get(*index).map(len));
        let mut left = offsets_max;
        let mut partitions_left = i64::try_from(self.ranges.len()).unwrap_or(i64::MAX);
        let mut skipped = Vec::new();
        for index in shortest_first {
            let Some(range) = self.ranges.get_mut(index) else { continue };
            let share = left / partitions_left.max(1);
            partitions_left -= 1;
            let to = range.to.min(NextOffset(range.from.0.saturating_add(share)));
            skipped.push(Skipped { range: ScanRange { from: to, ..*range }, why: "--max" });
            range.to = to;
            left -= len(range);
        }
        skipped.retain(|skipped| !skipped.range.is_empty());
        self.skipped.extend(skipped);
        self.skipped.sort_by_key(|skipped| (skipped.range.partition, skipped.range.from));
        self.ranges.retain(|range| !range.is_empty());
    }
}
