//! Decides which offsets to audit, and when. Pure: time and randomness are inputs.
//!
//! All offsets just behind a fetch start are audited, and randomly chosen blocks of all other offsets that
//! the cursors pass. A range waits until its partition's cursor has passed it; after a while, the passed part
//! of it is audited.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::sampler::Sampler;
use crate::domain::cursor::LogBounds;
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::scan::ScanRange;
use crate::telemetry::status::fetch_starts::FetchStart;

/// Number of offsets behind a fetch start that are all audited.
pub const AFTER_BEGIN: i64 = 1_000;
/// Offsets per randomly chosen block. Shorter blocks find a run of lost records with higher probability, and
/// each block costs a fetch.
const BLOCK: i64 = 50;
/// Maximum number of waiting ranges of all partitions; further ones are dropped and counted.
const RANGES_MAX: usize = 20_000;
/// Maximum number of offsets that are read and checked together.
const PIECE_OFFSETS_MAX: i64 = 1_000;
/// Maximum number of partitions per piece.
const PIECE_PARTS_MAX: usize = 20;
/// After this time, the passed part of a range is audited.
const PARTLY_AFTER: Duration = Duration::from_secs(30);
/// A range that could not be read is retried alone after this time.
const RETRY: Duration = Duration::from_secs(30);
/// A range that could not be audited for this time is dropped and counted.
const GIVE_UP: Duration = Duration::from_secs(60 * 60);

/// A range to audit now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Offsets; the cursor has passed them.
    pub range: ScanRange,
    /// All records of the range were decided after this time; `None` if unknown.
    pub decided_after: Option<Instant>,
    ready_since: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    from: NextOffset,
    to: NextOffset,
    decided_after: Option<Instant>,
    /// From this time on, a part of it may be audited.
    partly_at: Instant,
    /// Since when it can be audited, completely or partly.
    ready_since: Option<Instant>,
    /// Next attempt, after a failed one.
    again_at: Option<Instant>,
}

/// State of a partition.
#[derive(Debug)]
struct Share {
    /// Last observed cursor.
    applied: NextOffset,
    /// First observed cursor.
    seen_from: NextOffset,
    /// Time of the last observation; records beyond the cursor were decided later.
    seen_at: Instant,
    /// Whether the partition is assigned to this process.
    is_ours: bool,
    /// Disjoint and in order.
    waiting: Vec<Waiting>,
}

/// Ranges of all partitions.
#[derive(Debug)]
pub struct Plan {
    sampler: Sampler,
    shares: BTreeMap<Partition, Share>,
    /// Number of waiting ranges.
    ranges: usize,
    /// Offsets dropped since the last [`take_dropped`](Self::take_dropped).
    dropped: u64,
}

impl Plan {
    /// Creates a plan that audits this share of the passed offsets.
    pub fn new(share: f64, seed: u64) -> Self {
        Self { sampler: Sampler::new(share, seed), shares: BTreeMap::new(), ranges: 0, dropped: 0 }
    }

    /// Updates the cursors of this process's partitions. Partitions that are not listed have been revoked:
    /// the process that has them now audits what their cursors had not passed.
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
            // The database was restored: the range will be passed again and is sampled again.
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

    /// Adds the range behind a fetch start.
    pub fn begun(&mut self, start: FetchStart, now: Instant) {
        let FetchStart { partition, position, applied } = start;
        self.shares.entry(partition).or_insert_with(|| Share::at(applied, now));
        let after = |at: NextOffset| NextOffset(at.0.saturating_add(AFTER_BEGIN));
        // Records below the cursor were decided before this fetch start.
        let before = ScanRange { partition, from: position, to: after(position).min(applied) };
        self.insert(before, None, now);
        let later = ScanRange { partition, from: applied, to: after(applied.max(position)) };
        self.insert(later, Some(now), now);
    }

    /// Adds the parts of a range that are not waiting yet.
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

    /// Takes the next piece: ranges of different partitions, those that have waited longest first. A range
    /// that failed before is taken alone, so that it does not delay others.
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
            // The cursor went back and has not reached this range again.
            if to <= waiting.from {
                continue;
            }
            let range = ScanRange { partition, from: waiting.from, to };
            room -= to.0 - range.from.0;
            is_alone = waiting.again_at.is_some();
            parts.push(Part { range, decided_after: waiting.decided_after, ready_since });
            if to < waiting.to {
                // The rest keeps its age, unless the cursor has not passed it yet.
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

    /// Returns a range that could not be audited. `bounds` are the log bounds of the partition, if known;
    /// offsets outside cannot be audited any more.
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

    /// Number of offsets that can be audited now, and the age of the oldest.
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

    /// Takes the number of offsets that were dropped since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

impl Share {
    fn at(applied: NextOffset, now: Instant) -> Self {
        Self { applied, seen_from: applied, seen_at: now, is_ours: true, waiting: Vec::new() }
    }

    /// Marks ranges that have been passed completely, or partly for long enough.
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
