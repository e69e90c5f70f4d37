//! Decides which offsets to audit, and when. Pure: time and randomness are inputs.
//!
//! All offsets just behind a fetch start are audited, and randomly chosen blocks of all other offsets that
//! the cursors pass. A range waits until its partition's cursor has passed it; after a while, the passed part
//! of it is audited.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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

/// A range to audit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Offsets; if the part was taken, the cursor has passed them.
    pub range: ScanRange,
    /// All records of the range were decided after this time; `None` if unknown.
    pub decided_after: Option<Instant>,
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
    waiting: Vec<Part>,
}

/// Ranges of all partitions.
#[derive(Debug)]
pub struct Plan {
    /// Probability with which each block is chosen.
    share: f64,
    random: ChaCha8Rng,
    shares: BTreeMap<Partition, Share>,
    /// Number of waiting ranges.
    ranges: usize,
    /// Offsets dropped since the last [`take_dropped`](Self::take_dropped).
    dropped: u64,
}

impl Plan {
    /// Creates a plan that audits this share of the passed offsets.
    pub fn new(share: f64, seed: u64) -> Self {
        let random = ChaCha8Rng::seed_from_u64(seed);
        Self { share, random, shares: BTreeMap::new(), ranges: 0, dropped: 0 }
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
        self.shares.retain(|_, share| {
            let applied = share.applied;
            if !share.is_ours {
                share.waiting.retain(|w| w.range.from < applied);
                share.waiting.iter_mut().for_each(|w| w.range.to = w.range.to.min(applied));
            }
            share.note_ready(now);
            share.is_ours || !share.waiting.is_empty()
        });
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
        for block in first..past {
            if self.random.random::<f64>() < self.share {
                let (from, to) = (NextOffset(block * BLOCK), NextOffset((block + 1) * BLOCK));
                let range = ScanRange { partition, from: from.max(seen_from), to };
                self.insert(range, Some(seen_at), now);
            }
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
        let (mut rest, mut fresh) = (range, Vec::new());
        for waiting in &share.waiting {
            let waiting = waiting.range;
            if waiting.to > range.from && waiting.from < range.to {
                fresh.push(ScanRange { to: waiting.from, ..rest });
                rest.from = rest.from.max(waiting.to);
            }
        }
        fresh.push(rest);
        for range in fresh.into_iter().filter(|range| !range.is_empty()) {
            if self.ranges >= RANGES_MAX {
                self.dropped += offsets(range);
                continue;
            }
            let partly_at = now + PARTLY_AFTER;
            share.put(Part { range, decided_after, partly_at, ready_since: None, again_at: None });
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
        for (_, partition, at) in ready {
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
            let ScanRange { from, to, .. } = waiting.range;
            let past = to.min(applied).min(NextOffset(from.0.saturating_add(room)));
            // The cursor went back and has not reached this range again.
            if past <= from {
                continue;
            }
            room -= past.0 - from.0;
            is_alone = waiting.again_at.is_some();
            parts.push(Part { range: ScanRange { partition, from, to: past }, ..*waiting });
            if past < to {
                // The rest keeps its age, unless the cursor has not passed it yet.
                waiting.range.from = past;
                waiting.partly_at = now + PARTLY_AFTER;
                waiting.ready_since = waiting.ready_since.filter(|_| past < applied);
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
        let is_over = part.ready_since.is_some_and(|since| now.saturating_duration_since(since) >= GIVE_UP);
        let mut range = part.range;
        if let Some(bounds) = bounds {
            (range.from, range.to) = (range.from.max(bounds.start), range.to.min(bounds.end));
        }
        if is_over || range.is_empty() {
            self.dropped += offsets(part.range);
            return;
        }
        self.dropped += offsets(part.range) - offsets(range);
        let share = self
            .shares
            .entry(range.partition)
            .or_insert_with(|| Share { is_ours: false, ..Share::at(range.to, now) });
        share.put(Part { range, partly_at: now, again_at: Some(now + RETRY), ..part });
        self.ranges += 1;
    }

    /// Number of offsets that can be audited now, and the age of the oldest.
    pub fn behind(&self, now: Instant) -> (u64, Duration) {
        let mut offsets = 0;
        let mut oldest = now;
        for share in self.shares.values() {
            for waiting in &share.waiting {
                let Some(since) = waiting.ready_since else { continue };
                let passed = ScanRange { to: waiting.range.to.min(share.applied), ..waiting.range };
                // The cursor may have gone back.
                offsets += if passed.is_empty() { 0 } else { self::offsets(passed) };
                oldest = oldest.min(since);
            }
        }
        (offsets, now.saturating_duration_since(oldest))
    }

    /// Number of offsets that the cursors have passed and that are not audited.
    pub fn passed_and_waiting(&self) -> u64 {
        let passed = |share: &Share| {
            let parts =
                share.waiting.iter().map(|w| ScanRange { to: w.range.to.min(share.applied), ..w.range });
            parts.filter(|range| !range.is_empty()).map(offsets).sum::<u64>()
        };
        self.shares.values().map(passed).sum()
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
        let is_passed = |w: &&mut Part| w.ready_since.is_none() && w.range.from < applied;
        for waiting in self.waiting.iter_mut().filter(is_passed) {
            if waiting.range.to <= applied || !is_ours || now >= waiting.partly_at {
                waiting.ready_since = Some(now);
            }
        }
    }

    fn put(&mut self, part: Part) {
        let at = self.waiting.partition_point(|w| w.range.from < part.range.from);
        self.waiting.insert(at, part);
    }
}

fn offsets(range: ScanRange) -> u64 {
    range.to.0.abs_diff(range.from.0)
}

#[cfg(test)]
mod tests;
