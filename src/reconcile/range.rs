//! Selects the records to compare: up to both cursors, in slices that fit into memory. Pure.

use super::table::Place;
use crate::domain::cursor::{GroupOffset, Identity, Known};
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

/// Splits ranges into slices of at most `offsets_max` offsets, in order.
pub fn slices(ranges: &[ScanRange], offsets_max: i64) -> Vec<Vec<ScanRange>> {
    let offsets_max = offsets_max.max(1);
    let mut slices: Vec<Vec<ScanRange>> = Vec::new();
    let mut room = 0;
    for range in ranges {
        let mut from = range.from.0;
        while from < range.to.0 {
            if room == 0 {
                slices.push(Vec::new());
                room = offsets_max;
            }
            let to = range.to.0.min(from.saturating_add(room));
            let part = ScanRange { partition: range.partition, from: NextOffset(from), to: NextOffset(to) };
            if let Some(slice) = slices.last_mut() {
                slice.push(part);
            }
            room -= to - from;
            from = to;
        }
    }
    slices
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::domain::cursor::{CommitMetadata, CursorRow, LogBounds, Proof};
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
            Known { partition: Partition(0), group, row, bounds, proof: Proof::Unclear(NextOffset(0)) },
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
    fn slices_cover_every_offset_once_and_hold_no_more_than_they_may() {
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
            let all = ranges.iter().flat_map(|r| (r.from.0..r.to.0).map(|o| (r.partition.0, o)));
            assert_eq!(covered, all.collect::<Vec<_>>());
        }
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
