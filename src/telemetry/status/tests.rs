use super::*;
use crate::domain::cursor::{CursorRow, LogBounds, OutputScan};

const SUSPICION: Duration = Duration::from_secs(60);

fn lag_ms(status: &StatusRegistry, now: i64) -> i64 {
    status.partitions().get(&Partition(0)).unwrap().lag_ms(TimestampMs(now))
}

fn at(offset: i64) -> NextOffset {
    NextOffset(offset)
}

const P: Partition = Partition(0);

/// Positions of a partition with a cursor row.
fn known(applied: i64, end: i64, last: Option<i64>) -> Known {
    Known {
        partition: P,
        group: None,
        row: Some(CursorRow {
            applied: at(applied),
            published: None,
            applied_timestamp: last.map(TimestampMs),
            settled: None,
        }),
        bounds: LogBounds { start: at(0), end: at(end) },
        scan: OutputScan::NotScanned,
    }
}

#[test]
fn lag_in_time_is_that_of_the_oldest_record_as_far_as_it_is_known() {
    let status = StatusRegistry::default();
    let ends = |now, end| status.ends(TimestampMs(now), [(P, at(end))].into_iter());
    let positions = |published, last: Option<i64>| {
        let last = last.map(TimestampMs);
        status.positions(TimestampMs(1_000), [(P, at(published), at(published), last)].into_iter());
    };
    let taken = |end, stamp| status.taken(TimestampMs(1_000), [(P, at(end), TimestampMs(stamp))].into_iter());

    // Before the cursors are read, the age of the lag is not known.
    status.opening(TimestampMs(100), P);
    assert_eq!(lag_ms(&status, 1_000), 900);
    status.found(TimestampMs(150), &known(0, 10, None));
    let found = status.partitions()[&P].clone();
    assert_eq!((found.lag(), found.published), (Some(10), None), "a lowest cursor is no position");
    assert_eq!(lag_ms(&status, 1_000), 900);

    // Nothing was ever written, and the first records are in flight.
    positions(0, None);
    taken(4, 200);
    taken(8, 300);
    assert_eq!(lag_ms(&status, 1_000), 800);
    positions(4, Some(290));
    assert_eq!(lag_ms(&status, 1_000), 700);

    // The remaining records are not fetched yet; they are not older than the last written one.
    positions(8, Some(350));
    assert_eq!(lag_ms(&status, 1_000), 650);

    // Caught up and idle for long: a new record is not as old as the last one.
    positions(10, Some(400));
    assert_eq!(lag_ms(&status, 1_000), 0);
    ends(90_000, 10);
    ends(92_000, 11);
    assert_eq!(lag_ms(&status, 92_500), 2_500);

    // Batches that a lane drops are no longer in flight.
    taken(11, 500);
    assert_eq!(lag_ms(&status, 92_500), 92_000);
    status.opening(TimestampMs(92_400), P);
    assert_eq!(lag_ms(&status, 92_500), 2_500);
}

#[test]
fn a_partition_that_does_not_go_on_grows_older_from_the_start() {
    // Its cursors cannot be read, or it is halted by recovery.
    let status = StatusRegistry::default();
    status.opening(TimestampMs(1_000), P);
    assert_eq!((lag_ms(&status, 1_000), lag_ms(&status, 61_000)), (0, 60_000));
    status.found(TimestampMs(62_000), &known(3, 8, Some(500)));
    status.halted(TimestampMs(62_000), P, HaltReason::LogGap { needed: at(3), log_start: at(5) });
    assert_eq!(status.partitions()[&P].lag(), Some(5));
    assert_eq!(lag_ms(&status, 62_500), 62_000);
    // Halted since then, also when more records have gone in the meantime.
    status.halted(TimestampMs(63_000), P, HaltReason::LogGap { needed: at(3), log_start: at(6) });
    assert_eq!(status.partitions()[&P].since, TimestampMs(62_000));

    // A partition that was revoked and assigned again starts afresh.
    status.revoked(P);
    status.opening(TimestampMs(70_000), P);
    assert_eq!(lag_ms(&status, 70_500), 500);
}

#[test]
fn what_is_written_again_in_a_restored_database_is_lag() {
    let status = StatusRegistry::default();
    let positions = |applied| {
        let last = Some(TimestampMs(700));
        status.positions(TimestampMs(1_000), [(P, at(applied), at(10), last)].into_iter());
    };
    status.opening(TimestampMs(100), P);
    status.found(TimestampMs(100), &known(2, 10, None));
    positions(2);
    status.taken(TimestampMs(1_000), [(P, at(6), TimestampMs(300))].into_iter());
    positions(2);
    assert_eq!((status.partitions()[&P].lag(), lag_ms(&status, 1_000)), (Some(8), 700));
    positions(6);
    assert_eq!((status.partitions()[&P].lag(), lag_ms(&status, 1_000)), (Some(4), 300));
    positions(10);
    assert_eq!(lag_ms(&status, 1_000), 0);
}

#[test]
fn a_partition_is_stuck_since_something_waits_and_nothing_moves() {
    let status = StatusRegistry::default();
    let stuck = || status.partitions()[&P].stuck_since();
    let positions = |now, done| {
        status.positions(TimestampMs(now), [(P, at(done), at(done), Some(TimestampMs(1)))].into_iter());
    };
    let ends = |now, end| status.ends(TimestampMs(now), [(P, at(end))].into_iter());
    status.opening(TimestampMs(100), P);
    status.found(TimestampMs(100), &known(2, 10, None));
    positions(200, 2);
    assert_eq!(stuck(), Some(TimestampMs(200)));
    positions(300, 2);
    assert_eq!(stuck(), Some(TimestampMs(200)), "nothing moved");
    // It writes, with a lag that stays.
    positions(400, 4);
    ends(500, 12);
    assert_eq!(stuck(), Some(TimestampMs(400)));
    positions(600, 12);
    assert_eq!(stuck(), None, "nothing waits");
    ends(9_000, 12);
    ends(9_100, 13);
    assert_eq!(stuck(), Some(TimestampMs(9_000)), "the wait began after it was last caught up");
}

#[test]
fn a_clock_that_is_ahead_hides_no_lag() {
    let status = StatusRegistry::default();
    let ahead = Some(TimestampMs(3_600_000));
    status.opening(TimestampMs(0), P);
    status.found(TimestampMs(1_000), &known(0, 9, Some(3_600_000)));
    assert_eq!(lag_ms(&status, 5_000), 4_000);
    let positions = |now, last| status.positions(TimestampMs(now), [(P, at(4), at(4), last)].into_iter());
    positions(6_000, ahead);
    assert_eq!(lag_ms(&status, 7_000), 6_000, "the same record is noted once");
    positions(8_000, Some(TimestampMs(3_600_001)));
    assert_eq!(lag_ms(&status, 9_000), 1_000);
    status.taken(TimestampMs(10_000), [(P, at(9), TimestampMs(3_600_002))].into_iter());
    assert_eq!(lag_ms(&status, 12_000), 2_000);
}

#[test]
fn a_process_that_is_no_member_counts_for_how_long() {
    let status = StatusRegistry::default();
    let oldest = |now| status.oldest_pending_ms(TimestampMs(now));
    status.waits(TimestampMs(1_000));
    assert_eq!(oldest(31_000), 30_000);
    status.assigned(TimestampMs(40_000), &[]);
    assert_eq!(oldest(50_000), 0, "a member without partitions");

    // Pending records age, also when the membership is lost.
    status.opening(TimestampMs(60_000), P);
    assert_eq!(oldest(61_000), 1_000);
    status.lost(TimestampMs(65_000));
    status.revoked(P);
    assert_eq!(oldest(70_000), 10_000);
    status.left(TimestampMs(70_000));
    status.waits(TimestampMs(71_000));
    assert_eq!(oldest(72_000), 12_000);
    status.assigned(TimestampMs(73_000), &[P]);
    assert_eq!(oldest(74_000), 14_000, "positions are not known yet");
    status.opening(TimestampMs(74_000), P);
    status.ends(TimestampMs(74_000), [(P, at(9))].into_iter());
    assert_eq!(oldest(75_000), 15_000);
    status.found(TimestampMs(75_000), &known(8, 9, Some(74_500)));
    assert_eq!(oldest(76_000), 1_500);
}

#[test]
fn a_cursor_beyond_the_end_is_not_caught_up_once_it_is_halted() {
    let status = StatusRegistry::default();
    status.opening(TimestampMs(0), P);
    status.found(TimestampMs(1_000), &known(20, 15, Some(500)));
    assert_eq!(lag_ms(&status, 9_000), 0, "a leader may lag");
    status.halted(TimestampMs(1_000), P, HaltReason::BeyondEnd { position: at(20), end: at(15) });
    assert_eq!(lag_ms(&status, 9_000), 8_000);
    status.found(TimestampMs(10_000), &known(20, 15, Some(500)));
    status.ends(TimestampMs(11_000), [(P, at(16))].into_iter());
    assert_eq!((lag_ms(&status, 12_000), status.oldest_pending_ms(TimestampMs(12_000))), (11_000, 11_000));
}

#[test]
fn what_was_caught_up_before_a_restore_is_no_news_of_what_comes_again() {
    let status = StatusRegistry::default();
    let positions = |applied, last| {
        let last = Some(TimestampMs(last));
        status.positions(TimestampMs(60_000), [(P, at(applied), at(10), last)].into_iter());
    };
    status.opening(TimestampMs(100), P);
    status.found(TimestampMs(100), &known(10, 10, Some(50)));
    positions(10, 50);
    status.ends(TimestampMs(60_000), [(P, at(10))].into_iter());
    assert_eq!(lag_ms(&status, 61_000), 0);

    // An older database, and an empty one.
    status.opening(TimestampMs(61_000), P);
    status.found(TimestampMs(61_000), &known(4, 10, Some(20)));
    assert_eq!(lag_ms(&status, 61_000), 60_980);
    positions(4, 20);
    assert_eq!(lag_ms(&status, 61_000), 60_980);
    status.found(TimestampMs(61_000), &Known { row: None, ..known(0, 10, None) });
    assert_eq!(lag_ms(&status, 61_000), 60_900, "since it was assigned");
}

#[test]
fn each_loss_of_the_broker_explains_one_fencing() {
    let status = StatusRegistry::default();
    status.fenced(SUSPICION);
    assert!(!status.was_fenced_after_loss(), "nothing was lost");

    // However close together, as when a broker dies twice within minutes.
    for _ in 0..3 {
        status.broker_lost();
        status.fenced(SUSPICION);
        assert!(status.was_fenced_after_loss());
        status.left(TimestampMs(1));
    }

    status.fenced(SUSPICION);
    assert!(!status.was_fenced_after_loss(), "no new loss: another process uses the instance id");
}
