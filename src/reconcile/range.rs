//! Selects the records to compare: up to both cursors, in slices that fit into memory. Pure.

use std::collections::BTreeMap;

use super::report::NotCompared;
use super::table::Place;
use crate::domain::cursor::{GroupOffset, HaltReason, Identity, Known, LogBounds};
use crate::domain::record::{NextOffset, Partition};
use crate::kafka::scan::ScanRange;

/// Offset below which a partition's records are written and their outputs are committed. `None` if there is
/// no such offset.
pub fn settled_up_to(known: &Known, identity: &Identity, publishes: bool) -> Option<NextOffset> {
    let row = known.row.as_ref()?;
    if !publishes {
        return Some(row.applied);
    }
    // A committed offset without our commit metadata was set by others and does not prove what was sent.
    // `published` is a copy of an offset that had the metadata.
    let is_ours = |group: &&GroupOffset| {
        group
            .commit_metadata()
            .is_some_and(|m| m.topic_id == identity.topic_id && m.database_id == identity.database_id)
    };
    let committed = known.group.as_ref().filter(is_ours).map(|group| group.position);
    committed.max(row.published).map(|sent| sent.min(row.applied))
}

/// A partition's range to compare, and everything that is not compared up to the high watermark. Offsets that were
/// not asked for are in neither.
pub fn select(
    known: &Known,
    settled: Option<NextOffset>,
    halted: Option<&HaltReason>,
    high_watermark: NextOffset,
    asked: (NextOffset, NextOffset),
) -> (ScanRange, Vec<NotCompared>) {
    let LogBounds { start, end } = known.bounds;
    let part = |from: NextOffset, to: NextOffset| {
        let from = from.max(asked.0);
        ScanRange { partition: known.partition, from, to: to.min(asked.1).max(from) }
    };
    // Records before this were written and published, or should have been.
    let cut = settled.or(halted.map(HaltReason::first_offset)).unwrap_or(start);
    let compared_to = settled.map_or(start, |settled| settled.clamp(start, end.max(start)));
    let is_unknown = known.row.is_none() && known.group.as_ref().is_some_and(|group| group.position > start);
    let (unwritten, is_abnormal) = match halted {
        Some(reason) => (format!("halted: {}", reason.label()), true),
        None if is_unknown => ("the group has an offset, but the database has no cursor".to_owned(), true),
        None => ("not written and published yet".to_owned(), false),
    };
    let parts = [
        (NextOffset(0), start.min(cut), "no longer in the log", false),
        (cut, start, "left the log before they were written and published", true),
        (compared_to, end, unwritten.as_str(), is_abnormal),
        (end, cut, "before the cursors, but beyond what can be read of the log", true),
        (end.max(cut), high_watermark, "behind an open transaction", false),
    ];
    let named = parts.into_iter().map(|(from, to, why, may_hide_loss)| NotCompared {
        may_hide_loss,
        why: why.to_owned(),
        range: Some(part(from, to)).filter(|range| !range.is_empty()),
    });
    (part(start, compared_to), named.filter(|not_compared| not_compared.range.is_some()).collect())
}

/// Records that need no outcome, by decision of an operator.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exempt {
    /// Skipped: they may have an outcome, completely or partly, or none.
    given_up: Vec<ScanRange>,
    /// The log lost these records and their offsets were used again: rows and events of the lost records may
    /// exist.
    rewound: Vec<ScanRange>,
}

impl Exempt {
    /// Adds a cursor skip by an operator: `applied` (none if the partition had no row) and `published` before
    /// it, and the offset at which the partition continued.
    pub fn skip(
        &mut self,
        partition: Partition,
        applied: Option<NextOffset>,
        published: Option<NextOffset>,
        to: NextOffset,
    ) {
        let applied = applied.unwrap_or(NextOffset(0));
        // In a database without events, `applied` alone counts.
        let from = applied.min(published.unwrap_or(applied));
        self.given_up.push(ScanRange { partition, from, to });
        self.rewound.push(ScanRange { partition, from: to, to: applied });
    }

    /// Whether an operator skipped this record.
    pub fn is_given_up(&self, (partition, offset): Place) -> bool {
        self.given_up.iter().any(|range| range.contains(partition, offset))
    }

    /// Whether this offset was used twice.
    pub fn is_rewound(&self, (partition, offset): Place) -> bool {
        self.rewound.iter().any(|range| range.contains(partition, offset))
    }
}

/// More offsets without a record in a row are not control records of transactions that ended at the same time.
const CONTROL_RECORDS_MAX: i64 = 1_000;

/// Finds long runs of offsets without a record, also over the ends of slices. Each partition has one range.
pub struct Gaps {
    ranges: BTreeMap<Partition, ScanRange>,
    found: Vec<ScanRange>,
}

impl Gaps {
    /// Starts at the beginning of these ranges.
    pub fn new(ranges: &[ScanRange]) -> Self {
        Self { ranges: ranges.iter().map(|range| (range.partition, *range)).collect(), found: Vec::new() }
    }

    /// Passes the next record of its partition.
    pub fn pass(&mut self, (partition, offset): Place) {
        self.skip(ScanRange { partition, from: NextOffset(offset.0), to: offset.next() });
    }

    /// Passes offsets that are not looked at.
    pub fn skip(&mut self, range: ScanRange) {
        let Some(rest) = self.ranges.get_mut(&range.partition) else { return };
        let gap = ScanRange { to: range.from, ..*rest };
        rest.from = range.to;
        self.note(gap);
    }

    fn note(&mut self, gap: ScanRange) {
        if gap.to.0.saturating_sub(gap.from.0) > CONTROL_RECORDS_MAX {
            self.found.push(gap);
        }
    }

    /// All gaps, including those at the ends of the ranges.
    pub fn found(mut self) -> Vec<ScanRange> {
        std::mem::take(&mut self.ranges).into_values().for_each(|rest| self.note(rest));
        self.found
    }
}

/// Splits ranges into slices of at most `offsets_max` offsets. Each slice takes about the same share of every range:
/// its records are then of about the same time, and their rows and outputs lie together.
pub fn slices(ranges: &[ScanRange], offsets_max: i64) -> Vec<Vec<ScanRange>> {
    let offsets_max = offsets_max.max(1);
    let length = |range: &ScanRange| i128::from(range.to.0.saturating_sub(range.from.0).max(0));
    // Shares are rounded, by less than an offset of each range.
    let share_max = offsets_max - i64::try_from(ranges.len()).unwrap_or(i64::MAX).min(offsets_max / 2);
    let shares = ranges.iter().map(length).sum::<i128>() / i128::from(share_max) + 1;
    let mut slices: Vec<Vec<ScanRange>> = Vec::new();
    for share in 0..shares {
        let mut room = 0;
        for range in ranges {
            let at = |share: i128| range.from.0.saturating_add((length(range) * share / shares) as i64);
            let (mut from, end) = (at(share), at(share + 1));
            while from < end {
                if room == 0 {
                    slices.push(Vec::new());
                    room = offsets_max;
                }
                let to = end.min(from.saturating_add(room));
                let part =
                    ScanRange { partition: range.partition, from: NextOffset(from), to: NextOffset(to) };
                if let Some(slice) = slices.last_mut() {
                    slice.push(part);
                }
                room -= to - from;
                from = to;
            }
        }
    }
    slices
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::cursor::{CommitMetadata, CursorRow, LogBounds, OutputScan};
    use crate::domain::record::Offset;

    fn range(partition: i32, from: i64, to: i64) -> ScanRange {
        ScanRange { partition: Partition(partition), from: NextOffset(from), to: NextOffset(to) }
    }

    fn known(applied: i64, published: Option<i64>, committed: Option<(i64, Uuid)>) -> (Known, Identity) {
        let identity = Identity { topic_id: Uuid::from_u128(1), database_id: Uuid::from_u128(2) };
        let group = committed.map(|(position, database_id)| {
            let marked = Identity { database_id, ..identity.clone() };
            let position = NextOffset(position);
            GroupOffset { position, metadata: CommitMetadata::new(&marked, position).to_string() }
        });
        let row = Some(CursorRow {
            applied: NextOffset(applied),
            published: published.map(NextOffset),
            applied_timestamp: None,
            settled: None,
        });
        let bounds = LogBounds { start: NextOffset(0), end: NextOffset(1_000) };
        (
            Known { partition: Partition(0), group, row, bounds, scan: OutputScan::Unclear(NextOffset(0)) },
            identity,
        )
    }

    #[test]
    fn nothing_is_compared_beyond_what_is_written_and_published() {
        let ours = Uuid::from_u128(2);
        for (applied, published, committed, publishes, expected) in [
            (100, Some(80), Some((90, ours)), true, Some(90)),
            // A restored database: published, but not written again yet.
            (50, Some(40), Some((90, ours)), true, Some(50)),
            // Set by hand, or by the daemon of another database: only the copy counts.
            (100, Some(80), Some((90, Uuid::from_u128(3))), true, Some(80)),
            (100, Some(80), None, true, Some(80)),
            (100, None, None, true, None),
            (100, None, None, false, Some(100)),
        ] {
            let (known, identity) = known(applied, published, committed);
            assert_eq!(settled_up_to(&known, &identity, publishes), expected.map(NextOffset));
        }
    }

    #[test]
    fn what_is_not_compared_is_named_up_to_the_high_watermark() {
        let all = (NextOffset(0), NextOffset(i64::MAX));
        let gap = HaltReason::LogGap { needed: NextOffset(3), log_start: NextOffset(10) };
        type Named = [(i64, i64, bool)];
        type Case<'a> = (i64, i64, i64, Option<i64>, Option<&'a HaltReason>, (i64, i64), &'a Named);
        let cases: [Case<'_>; 8] = [
            (0, 20, 20, Some(20), None, (0, 20), &[]),
            (0, 20, 30, Some(20), None, (0, 20), &[(20, 30, false)]),
            (10, 20, 20, Some(15), None, (10, 15), &[(0, 10, false), (15, 20, false)]),
            // Removed before they were written.
            (10, 20, 20, Some(3), Some(&gap), (10, 10), &[(0, 3, false), (3, 10, true), (10, 20, true)]),
            (10, 10, 10, None, Some(&gap), (10, 10), &[(0, 3, false), (3, 10, true)]),
            // The log ends before the cursors, or an open transaction begins there.
            (0, 20, 20, Some(25), None, (0, 20), &[(20, 25, true)]),
            (0, 20, 30, Some(25), None, (0, 20), &[(20, 25, true), (25, 30, false)]),
            (0, 20, 20, None, None, (0, 0), &[(0, 20, false)]),
        ];
        for (start, end, high, settled, halted, compared, named) in cases {
            let (mut known, _) = known(0, None, None);
            known.bounds = LogBounds { start: NextOffset(start), end: NextOffset(end) };
            let (range_, not_compared) =
                select(&known, settled.map(NextOffset), halted, NextOffset(high), all);
            assert_eq!((range_.from.0, range_.to.0), compared);
            let found: Vec<_> = not_compared
                .iter()
                .map(|n| n.range.map(|r| (r.from.0, r.to.0, n.may_hide_loss)).unwrap())
                .collect();
            assert_eq!(found, named);
        }
        // Only what was asked for; a cursor that only the group has.
        let (mut other, _) = known(0, None, Some((40, Uuid::from_u128(2))));
        other.row = None;
        other.bounds = LogBounds { start: NextOffset(0), end: NextOffset(50) };
        let (compared, named) = select(&other, None, None, NextOffset(60), (NextOffset(45), NextOffset(55)));
        assert!(compared.is_empty());
        let parts: Vec<_> = named.iter().map(|n| (n.range.unwrap(), n.may_hide_loss)).collect();
        assert_eq!(parts, [(range(0, 45, 50), true), (range(0, 50, 55), false)]);
    }

    #[test]
    fn only_runs_that_no_control_records_explain_are_gaps() {
        let ranges = [range(0, 0, 5_000), range(1, 10, 1_011), range(2, 0, 1_000)];
        let mut gaps = Gaps::new(&ranges);
        for offset in [0, 1_001, 2_003, 2_004] {
            gaps.pass((Partition(0), Offset(offset)));
        }
        assert_eq!(gaps.found(), [range(0, 1_002, 2_003), range(0, 2_005, 5_000), range(1, 10, 1_011)]);
        // What is not looked at is no gap, and ends one.
        let mut gaps = Gaps::new(&ranges);
        gaps.skip(range(0, 900, 4_500));
        gaps.skip(range(1, 10, 11));
        assert_eq!(gaps.found(), []);
    }

    #[test]
    fn slices_cover_every_offset_once_and_each_has_a_share_of_every_partition() {
        let ranges = [range(0, 0, 7), range(1, 5, 5), range(2, 3, 4), range(3, 0, 25)];
        for offsets_max in 1..40 {
            let slices = slices(&ranges, offsets_max);
            let mut covered: Vec<(i32, i64)> = Vec::new();
            for slice in &slices {
                let offsets = slice.iter().flat_map(|r| (r.from.0..r.to.0).map(|o| (r.partition.0, o)));
                let before = covered.len();
                covered.extend(offsets);
                assert!(covered.len() - before <= offsets_max as usize);
                assert!(slice.windows(2).all(|w| w[0].partition < w[1].partition));
            }
            // In the order of offsets within a partition.
            covered.sort_by_key(|(partition, _)| *partition);
            let all = ranges.iter().flat_map(|r| (r.from.0..r.to.0).map(|o| (r.partition.0, o)));
            assert_eq!(covered, all.collect::<Vec<_>>());
        }
        let shares = slices(&[range(0, 0, 1_000), range(1, 0, 3_000)], 1_002);
        let expected = |share: i64| {
            vec![range(0, share * 200, share * 200 + 200), range(1, share * 600, share * 600 + 600)]
        };
        assert_eq!(shares, [0, 1, 2, 3, 4].map(expected));
        assert!(slices(&[], 10).is_empty());
    }

    #[test]
    fn records_that_a_person_gave_up_are_known_by_the_audit() {
        let mut exempt = Exempt::default();
        for (applied, published, to) in [(20, 15, 37), (60, 60, 50)] {
            let (applied, published) = (Some(NextOffset(applied)), Some(NextOffset(published)));
            exempt.skip(Partition(2), applied, published, NextOffset(to));
        }
        let given_up = |offset| exempt.is_given_up((Partition(2), Offset(offset)));
        assert_eq!([14, 15, 36, 37].map(given_up), [false, true, true, false]);
        let rewound = |offset| exempt.is_rewound((Partition(2), Offset(offset)));
        assert_eq!([49, 50, 59, 60].map(rewound), [false, true, true, false]);
        assert!(!exempt.is_given_up((Partition(1), Offset(20))));
    }
}
