//! Which offsets are to be audited, and when. Pure: time and chance are handed in.
//!
//! All offsets just behind a begin, and blocks chosen at random of everything that cursors pass. A range waits until
//! its partition's cursor has passed it; one that is passed in part for long is audited in part.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::begins::Begin;
use super::sampler::Sampler;
use crate::cursor::LogBounds;
use crate::kafka::scan::ScanRange;
use crate::record::{NextOffset, Partition};

/// Offsets behind a begin, all of which are audited.
pub const AFTER_BEGIN: i64 = 1_000;
/// Offsets of a block that is chosen at random. A run of lost records is the likelier met the shorter blocks are, and
/// each block costs a fetch.
const BLOCK: i64 = 50;
/// Ranges that wait, of all partitions. Those that come beyond it are dropped and counted.
const RANGES_MAX: usize = 20_000;
/// Offsets that are read and asked for at once.
const PIECE_OFFSETS_MAX: i64 = 1_000;
/// Partitions of a piece.
const PIECE_PARTS_MAX: usize = 20;
/// A range whose end is not passed is audited as far as it is after this time.
const PARTLY_AFTER: Duration = Duration::from_secs(30);
/// A range that could not be read is tried again after this time, by itself.
const RETRY: Duration = Duration::from_secs(30);
/// What could not be audited for so long is dropped and counted.
const GIVE_UP: Duration = Duration::from_secs(60 * 60);

/// A range to be audited now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Its offsets; they have been passed.
    pub range: ScanRange,
    /// None of its records was decided before this moment; `None`: that is not known.
    pub decided_after: Option<Instant>,
    ready_since: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    from: NextOffset,
    to: NextOffset,
    decided_after: Option<Instant>,
    /// When it may be audited in part.
    partly_at: Instant,
    /// Since when it is to be audited, in whole or in part.
    ready_since: Option<Instant>,
    /// After a try that failed: when the next one is due.
    again_at: Option<Instant>,
}

/// What is known of one partition.
#[derive(Debug)]
struct Share {
    /// The cursor as last seen.
    applied: NextOffset,
    /// Where this process began to see it pass.
    seen_from: NextOffset,
    /// When it was last seen: what lies beyond was decided later.
    seen_at: Instant,
    /// The partition is assigned to this process.
    is_ours: bool,
    /// Disjoint, in order.
    waiting: Vec<Waiting>,
}

/// The ranges of all partitions.
#[derive(Debug)]
pub struct Plan {
    sampler: Sampler,
    shares: BTreeMap<Partition, Share>,
    /// Ranges that wait.
    ranges: usize,
    /// Offsets that were dropped since they were last asked for.
    dropped: u64,
}

impl Plan {
    /// A plan that chooses this share of the offsets that are passed.
    pub fn new(share: f64, seed: u64) -> Self {
        Self { sampler: Sampler::new(share, seed), shares: BTreeMap::new(), ranges: 0, dropped: 0 }
    }

    /// Notes how far the cursors of this process's partitions are. A partition that is not named went elsewhere: what it
    /// had not passed is left to the process that has it now.
    pub fn passed(&mut self, cursors: &[(Partition, NextOffset)], now: Instant) {
        for share in self.shares.values_mut() {
            share.is_ours = false;
        }
        for (partition, applied) in cursors {
            self.passed_to(*partition, *applied, now);
        }
        for share in self.shares.values_mut().filter(|share| !share.is_ours) {
            let applied = share.applied;
            share.waiting.retain(|w| w.from < applied);
            share.waiting.iter_mut().for_each(|w| w.to = w.to.min(applied));
        }
        self.shares.retain(|_, share| share.is_ours || !share.waiting.is_empty());
        for share in self.shares.values_mut() {
            share.note_ready(now);
        }
        self.ranges = self.shares.values().map(|share| share.waiting.len()).sum();
    }

    fn passed_to(&mut self, partition: Partition, applied: NextOffset, now: Instant) {
        let share = self.shares.entry(partition).or_insert_with(|| Share::at(applied, now));
        share.is_ours = true;
        if applied < share.applied {
            // A database that was restored: what it passes again is chosen from again.
            (share.applied, share.seen_from) = (applied, applied);
        }
        let (first, past) = (share.applied.0 / BLOCK, applied.0 / BLOCK);
        let (seen_from, seen_at) = (share.seen_from, share.seen_at);
        (share.applied, share.seen_at) = (applied, now);
        for place in self.sampler.choose(u64::try_from(past - first).unwrap_or_default()) {
            let from = (first + i64::try_from(place).unwrap_or_default()).saturating_mul(BLOCK);
            let to = NextOffset(from + BLOCK);
            let range = ScanRange { partition, from: NextOffset(from).max(seen_from), to };
            self.insert(range, Some(seen_at), now);
        }
    }

    /// Notes a begin.
    pub fn begun(&mut self, begin: Begin, now: Instant) {
        let Begin { partition, position, applied } = begin;
        self.shares.entry(partition).or_insert_with(|| Share::at(applied, now));
        let after = |at: NextOffset| NextOffset(at.0.saturating_add(AFTER_BEGIN));
        // Below the cursor, records were decided before this begin.
        let before = ScanRange { partition, from: position, to: after(position).min(applied) };
        self.insert(before, None, now);
        let later = ScanRange { partition, from: applied, to: after(applied.max(position)) };
        self.insert(later, Some(now), now);
    }

    /// Adds what of a range does not wait yet.
    fn insert(&mut self, range: ScanRange, decided_after: Option<Instant>, now: Instant) {
        let Some(share) = self.shares.get_mut(&range.partition) else { return };
        let mut from = range.from;
        let mut fresh = Vec::new();
        for waiting in share.waiting.iter().filter(|w| w.to > range.from && w.from < range.to) {
            fresh.push((from, waiting.from));
            from = from.max(waiting.to);
        }
        fresh.push((from, range.to));
        for (from, to) in fresh.into_iter().filter(|(from, to)| from < to) {
            if self.ranges >= RANGES_MAX {
                self.dropped += (to.0 - from.0).unsigned_abs();
                continue;
            }
            let partly_at = now + PARTLY_AFTER;
            share.put(Waiting { from, to, decided_after, partly_at, ready_since: None, again_at: None });
            self.ranges += 1;
        }
    }

    /// Takes what is to be audited next: ranges of different partitions, those that wait longest first. What was
    /// tried in vain comes by itself, so that it holds up nothing else.
    pub fn take(&mut self, now: Instant) -> Vec<Part> {
        let mut ready: Vec<(Instant, Partition, usize)> = Vec::new();
        for (partition, share) in &self.shares {
            let places =
                share.waiting.iter().enumerate().filter(|(_, w)| w.again_at.is_none_or(|at| now >= at));
            ready.extend(places.filter_map(|(at, w)| Some((w.ready_since?, *partition, at))));
        }
        ready.sort_unstable();
        let mut parts: Vec<Part> = Vec::new();
        let mut room = PIECE_OFFSETS_MAX;
        let mut is_alone = false;
        for (ready_since, partition, at) in ready {
            if room <= 0 || parts.len() >= PIECE_PARTS_MAX || is_alone {
                break;
            }
            if parts.iter().any(|part| part.range.partition == partition) {
                continue;
            }
            let Some(share) = self.shares.get_mut(&partition) else { continue };
            let applied = share.applied;
            let Some(waiting) = share.waiting.get_mut(at) else { continue };
            if waiting.again_at.is_some() && !parts.is_empty() {
                continue;
            }
            let to = waiting.to.min(applied).min(NextOffset(waiting.from.0.saturating_add(room)));
            // A cursor that went back since has yet to come here again.
            if to <= waiting.from {
                continue;
            }
            let range = ScanRange { partition, from: waiting.from, to };
            room -= to.0 - range.from.0;
            is_alone = waiting.again_at.is_some();
            parts.push(Part { range, decided_after: waiting.decided_after, ready_since });
            if to < waiting.to {
                // The rest keeps its age, unless it has yet to be passed.
                waiting.from = to;
                waiting.partly_at = now + PARTLY_AFTER;
                waiting.ready_since = waiting.ready_since.filter(|_| to < applied);
            } else {
                share.waiting.remove(at);
                self.ranges = self.ranges.saturating_sub(1);
            }
        }
        parts
    }

    /// Puts back what could not be audited. `bounds` is what the log has of the partition, if that is known: the
    /// rest cannot be audited any more.
    pub fn put_back(&mut self, part: Part, bounds: Option<LogBounds>, now: Instant) {
        let Part { range: ScanRange { partition, from, to }, decided_after, ready_since } = part;
        let is_over = now.saturating_duration_since(ready_since) >= GIVE_UP;
        let (mut first, mut past) = (from, to);
        if let Some(bounds) = bounds {
            (first, past) = (from.max(bounds.start), to.min(bounds.end));
        }
        if is_over || first >= past {
            self.dropped += (to.0 - from.0).unsigned_abs();
            return;
        }
        self.dropped += (to.0 - from.0).abs_diff(past.0 - first.0);
        let share =
            self.shares.entry(partition).or_insert_with(|| Share { is_ours: false, ..Share::at(past, now) });
        share.put(Waiting {
            from: first,
            to: past,
            decided_after,
            partly_at: now,
            ready_since: Some(ready_since),
            again_at: Some(now + RETRY),
        });
        self.ranges += 1;
    }

    /// Offsets that are to be audited now, and how long the oldest of them has waited.
    pub fn behind(&self, now: Instant) -> (u64, Duration) {
        let mut offsets = 0;
        let mut oldest = now;
        for share in self.shares.values() {
            for waiting in &share.waiting {
                let Some(since) = waiting.ready_since else { continue };
                offsets += (waiting.to.min(share.applied).0 - waiting.from.0).unsigned_abs();
                oldest = oldest.min(since);
            }
        }
        (offsets, now.saturating_duration_since(oldest))
    }

    /// Takes the number of offsets that were chosen and dropped since the last time.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

impl Share {
    fn at(applied: NextOffset, now: Instant) -> Self {
        Self { applied, seen_from: applied, seen_at: now, is_ours: true, waiting: Vec::new() }
    }

    /// Marks what has been passed far enough: to its end, or in part and long enough ago.
    fn note_ready(&mut self, now: Instant) {
        let (applied, is_ours) = (self.applied, self.is_ours);
        for waiting in self.waiting.iter_mut().filter(|w| w.ready_since.is_none() && w.from < applied) {
            if waiting.to <= applied || !is_ours || now >= waiting.partly_at {
                waiting.ready_since = Some(now);
            }
        }
    }

    fn put(&mut self, waiting: Waiting) {
        let at = self.waiting.partition_point(|w| w.from < waiting.from);
        self.waiting.insert(at, waiting);
    }
}

#[cfg(test)]
mod tests;
