use super::*;

struct Timeline {
    plan: Plan,
    now: Instant,
}

impl Timeline {
    fn new(share: f64) -> Self {
        Self { plan: Plan::new(share, 5), now: Instant::now() }
    }

    fn later(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    fn passed(&mut self, cursors: &[(i32, i64)]) {
        let cursors: Vec<_> = cursors.iter().map(|(p, a)| (Partition(*p), NextOffset(*a))).collect();
        self.plan.passed(&cursors, self.now);
    }

    fn begun(&mut self, partition: i32, position: i64, applied: i64) {
        let (position, applied) = (NextOffset(position), NextOffset(applied));
        self.plan.begun(FetchStart { partition: Partition(partition), position, applied }, self.now);
    }

    /// Everything due now, as partition, first offset and end offset.
    fn take(&mut self) -> Vec<(i32, i64, i64)> {
        let mut taken = Vec::new();
        loop {
            let parts = self.plan.take(self.now);
            if parts.is_empty() {
                return taken;
            }
            taken.extend(parts.iter().map(|p| (p.range.partition.0, p.range.from.0, p.range.to.0)));
        }
    }
}

#[test]
fn all_offsets_behind_a_begin_are_audited_once_they_are_passed() {
    let mut t = Timeline::new(0.0);
    t.begun(3, 5_000, 5_000);
    t.passed(&[(3, 5_000)]);
    assert_eq!(t.take(), []);
    t.passed(&[(3, 5_999)]);
    assert_eq!(t.take(), [], "soon the rest is passed, too");
    t.passed(&[(3, 9_000)]);
    assert_eq!(t.take(), [(3, 5_000, 6_000)]);
    assert_eq!(t.plan.behind(t.now).0, 0);
    // If the cursor is ahead of the fetch start, as with events to be sent again, both are audited.
    t.begun(3, 8_500, 12_000);
    t.passed(&[(3, 12_000)]);
    assert_eq!(t.take(), [(3, 8_500, 9_500)]);
    t.passed(&[(3, 14_000)]);
    assert_eq!(t.take(), [(3, 12_000, 13_000)]);
    // If a lane was ahead of the cursor, everything up to its position is audited.
    t.begun(3, 14_300, 14_000);
    t.passed(&[(3, 20_000)]);
    assert_eq!(t.take(), [(3, 14_000, 15_000), (3, 15_000, 15_300)]);
}

#[test]
fn what_waits_is_not_counted_where_the_cursor_has_gone_back() {
    let mut t = Timeline::new(0.0);
    t.begun(3, 5_000, 5_000);
    t.passed(&[(3, 6_000)]);
    assert_eq!(t.plan.behind(t.now).0, 1_000);
    t.passed(&[(3, 5_200)]);
    assert_eq!(t.plan.behind(t.now).0, 200);
    t.passed(&[(3, 1_000)]);
    assert_eq!(t.plan.behind(t.now).0, 0);
}

#[test]
fn a_quiet_partition_is_audited_as_far_as_it_has_come() {
    let mut t = Timeline::new(0.0);
    t.passed(&[(3, 100)]);
    t.begun(3, 100, 100);
    t.passed(&[(3, 130)]);
    assert_eq!(t.take(), []);
    t.later(30);
    t.passed(&[(3, 130)]);
    assert_eq!(t.take(), [(3, 100, 130)]);
    t.passed(&[(3, 150)]);
    assert_eq!(t.take(), []);
    t.later(30);
    t.passed(&[(3, 150)]);
    assert_eq!(t.take(), [(3, 130, 150)]);
    t.later(300);
    assert_eq!((t.take(), t.plan.behind(t.now)), (vec![], (0, Duration::ZERO)));
}

#[test]
fn of_a_partition_that_goes_what_was_passed_is_audited_at_once_and_the_rest_is_left() {
    let mut t = Timeline::new(0.0);
    t.begun(3, 0, 0);
    t.begun(4, 0, 0);
    t.passed(&[(3, 10), (4, 0)]);
    t.passed(&[]);
    assert_eq!(t.take(), [(3, 0, 10)]);
    t.passed(&[]);
    assert!(t.plan.shares.is_empty());
    // The partition may come back and starts afresh.
    t.begun(3, 10, 10);
    t.passed(&[(3, 2_000)]);
    assert_eq!(t.take(), [(3, 10, 1_010)]);
}

#[test]
fn overlapping_ranges_are_audited_once_and_pieces_are_small() {
    let mut t = Timeline::new(1.0);
    t.begun(3, 0, 0);
    t.passed(&[(3, 0)]);
    t.begun(3, 300, 300);
    t.passed(&[(3, 2_349)]);
    let taken = t.take();
    let mut covered: Vec<i64> = taken.iter().flat_map(|(_, from, to)| *from..*to).collect();
    assert!(taken.iter().all(|(_, from, to)| to - from <= PIECE_OFFSETS_MAX));
    covered.sort_unstable();
    assert_eq!(covered, (0..2_300).collect::<Vec<_>>(), "whole blocks, each offset once");
    t.passed(&[(3, 2_350)]);
    assert_eq!(t.take(), [(3, 2_300, 2_350)]);
    // A restored database passes them again.
    t.passed(&[(3, 1_000)]);
    t.passed(&[(3, 1_100)]);
    assert_eq!(t.take(), [(3, 1_000, 1_050), (3, 1_050, 1_100)]);
}

#[test]
fn a_share_of_what_is_passed_is_chosen_and_nothing_of_before_this_process_came() {
    let mut t = Timeline::new(0.01);
    t.passed(&[(3, 1_000_025), (5, 7)]);
    let mut offsets = 0;
    for step in 1..=100 {
        t.later(1);
        t.passed(&[(3, 1_000_025 + step * 10_000), (5, 7 + step * 10_000)]);
        let taken = t.take();
        assert!(taken.iter().all(|(p, from, _)| *from >= if *p == 3 { 1_000_025 } else { 7 }));
        offsets += taken.iter().map(|(_, from, to)| to - from).sum::<i64>();
    }
    assert!((15_000..25_000).contains(&offsets), "{offsets} of 2,000,000");
}

#[test]
fn about_the_share_is_chosen_whatever_the_size_of_the_steps() {
    for (share, step) in [(0.001, 7), (0.001, 100_000), (0.01, 1), (0.3, 11)] {
        let mut t = Timeline::new(share);
        t.passed(&[(3, 0)]);
        let (steps, mut chosen) = (300_000 / step, 0);
        for at in 1..=steps {
            t.passed(&[(3, at * step * BLOCK)]);
            t.plan.shares.values_mut().for_each(|share| chosen += share.waiting.drain(..).count());
            t.plan.ranges = 0;
        }
        let expected = share * (steps * step) as f64;
        // Six standard deviations.
        let slack = 6.0 * (expected * (1.0 - share)).sqrt();
        assert!((chosen as f64 - expected).abs() < slack, "{share}: {chosen} of {expected}");
    }
}

#[test]
fn what_cannot_be_read_is_tried_again_by_itself_and_dropped_in_the_end() {
    let mut t = Timeline::new(0.0);
    t.begun(3, 0, 0);
    t.begun(4, 0, 0);
    t.passed(&[(3, 500), (4, 500)]);
    t.later(30);
    t.passed(&[(3, 500), (4, 500)]);
    let parts = t.plan.take(t.now);
    assert_eq!(parts.len(), 2);
    for part in parts {
        t.plan.put_back(part, None, t.now);
    }
    assert_eq!(t.plan.behind(t.now).0, 1_000);
    assert_eq!(t.take(), []);
    t.later(30);
    let alone = t.plan.take(t.now);
    assert_eq!(alone.len(), 1);
    // The log has lost its beginning since.
    let bounds = LogBounds { start: NextOffset(400), end: NextOffset(2_000) };
    t.plan.put_back(alone[0], Some(bounds), t.now);
    assert_eq!(t.plan.take_dropped(), 400);
    t.later(4_000);
    t.passed(&[(3, 500), (4, 500)]);
    let other = t.plan.take(t.now)[0];
    assert_eq!(t.plan.behind(t.now).1, Duration::from_secs(4_030));
    t.plan.put_back(other, None, t.now);
    assert_eq!(t.plan.take_dropped(), (other.range.to.0 - other.range.from.0).unsigned_abs());
    assert_eq!(t.take().len(), 1);
    assert_eq!(t.plan.ranges, t.plan.shares.values().map(|s| s.waiting.len()).sum::<usize>());
}

#[test]
fn the_number_of_ranges_is_bounded() {
    let mut t = Timeline::new(1.0);
    t.passed(&[(3, 0)]);
    t.passed(&[(3, (RANGES_MAX as i64 + 7) * BLOCK)]);
    assert_eq!((t.plan.ranges, t.plan.take_dropped()), (RANGES_MAX, 7 * BLOCK as u64));
}

#[test]
fn it_is_known_after_which_moment_records_were_decided() {
    let mut t = Timeline::new(1.0);
    t.passed(&[(3, 0)]);
    let before = t.now;
    t.later(2);
    t.passed(&[(3, 50)]);
    assert_eq!(t.plan.take(t.now)[0].decided_after, Some(before));
    t.begun(3, 20, 50);
    t.passed(&[(3, 50)]);
    assert_eq!(t.plan.take(t.now)[0].decided_after, None, "decided before this begin");
    t.passed(&[(3, 60)]);
    t.later(30);
    t.passed(&[(3, 60)]);
    assert_eq!(t.plan.take(t.now)[0].decided_after, Some(before + Duration::from_secs(2)));
}

#[test]
fn a_range_that_was_ready_waits_again_when_the_cursor_goes_back() {
    let mut t = Timeline::new(0.0);
    t.begun(3, 0, 0);
    t.passed(&[(3, 2_000)]);
    t.passed(&[(3, 0)]);
    assert_eq!(t.take(), []);
    t.passed(&[(3, 400)]);
    assert_eq!(t.take(), [(3, 0, 400)]);
    t.passed(&[(3, 1_000)]);
    assert_eq!(t.take(), [(3, 400, 1_000)]);
}

#[test]
fn what_is_passed_and_not_audited_is_known_when_the_audit_ends() {
    let mut t = Timeline::new(0.0);
    t.begun(3, 5_000, 5_000);
    t.begun(4, 100, 100);
    assert_eq!(t.plan.passed_and_waiting(), 0, "what is read later is audited by the next process");
    t.passed(&[(3, 5_400), (4, 9_000)]);
    assert_eq!(t.plan.passed_and_waiting(), 1_400);
    t.take();
    assert_eq!(t.plan.passed_and_waiting(), 400);
}
