use proptest::prelude::*;

use super::*;

const HERE: Identity = Identity { topic_id: Uuid::from_u128(1), database_id: Uuid::from_u128(2) };
const ELSEWHERE: Uuid = Uuid::from_u128(9);
const PUBLISHES: Mode = Mode { publishes: true, adopts_database: false };
const ROWS_ONLY: Mode = Mode { publishes: false, adopts_database: false };

fn marked(position: i64) -> Option<GroupOffset> {
    let position = NextOffset(position);
    Some(GroupOffset { position, metadata: CommitMetadata::new(&HERE, position).to_string() })
}

fn unmarked(position: i64) -> Option<GroupOffset> {
    Some(GroupOffset { position: NextOffset(position), metadata: "by hand".to_owned() })
}

fn row(applied: i64, published: Option<i64>) -> Option<CursorRow> {
    Some(CursorRow {
        applied: NextOffset(applied),
        published: published.map(NextOffset),
        applied_timestamp: None,
        settled: None,
    })
}

fn known(group: Option<GroupOffset>, row: Option<CursorRow>, start: i64, end: i64) -> Known {
    let bounds = LogBounds { start: NextOffset(start), end: NextOffset(end) };
    Known { partition: Partition(3), group, row, bounds, scan: OutputScan::Unclear(NextOffset(0)) }
}

/// The log contains offsets 2 to 100.
fn decided(group: Option<GroupOffset>, row: Option<CursorRow>) -> Decision {
    decide(&known(group, row, 2, 100), &HERE, &PUBLISHES)
}

fn go(from: i64, applied: i64, publish_from: i64, must_commit: bool, must_store: bool) -> Decision {
    Decision::Go(Start {
        from: NextOffset(from),
        applied: NextOffset(applied),
        publish_from: NextOffset(publish_from),
        committed: NextOffset(publish_from),
        must_commit,
        must_store,
    })
}

fn unproved(from: i64, to: i64) -> Decision {
    Decision::Halt(HaltReason::Unproved { from: NextOffset(from), to: NextOffset(to) })
}

fn moved_forward(committed: i64, applied: i64, published: i64) -> Decision {
    Decision::Halt(HaltReason::MovedForward {
        committed: NextOffset(committed),
        applied: NextOffset(applied),
        published: NextOffset(published),
    })
}

#[test]
fn a_partition_that_stands_still_is_taken_up_without_a_write() {
    assert_eq!(decided(marked(7), row(7, Some(7))), go(7, 7, 7, false, false));
}

#[test]
fn what_is_written_and_not_published_is_read_again() {
    assert_eq!(decided(marked(5), row(9, Some(5))), go(5, 9, 5, false, false));
    // The copy lags; it is updated before the first batch.
    assert_eq!(decided(marked(5), row(9, Some(4))), go(5, 9, 5, false, true));
    assert_eq!(decided(marked(5), row(9, None)), go(5, 9, 5, false, true));
}

#[test]
fn after_a_restore_rows_come_again_and_events_do_not() {
    assert_eq!(decided(marked(9), row(5, Some(4))), go(5, 5, 9, false, true));
}

#[test]
fn a_group_offset_that_was_rolled_back_with_its_mark_proves_nothing() {
    // The database's copy lags behind it, so it cannot be ahead.
    assert_eq!(decided(marked(4), row(9, Some(9))), go(9, 9, 9, true, false));
    assert_eq!(decided(marked(4), row(9, Some(10))), go(9, 9, 10, true, false));
    assert_eq!(decided(marked(4), row(9, Some(6))), unproved(6, 9));
}

#[test]
fn an_empty_database_begins_at_the_start_of_the_log_and_sends_nothing_again() {
    assert_eq!(decided(marked(50), None), go(2, 2, 50, false, true));
    // The group's offset is below the log's start: the deleted records were never published.
    assert_eq!(
        decided(marked(1), None),
        Decision::Halt(HaltReason::LogGap { needed: NextOffset(1), log_start: NextOffset(2) })
    );
}

#[test]
fn a_new_group_on_an_empty_database_begins_at_the_start_of_the_log() {
    assert_eq!(decided(None, None), go(2, 2, 2, true, true));
    assert_eq!(decided(unmarked(2), None), go(2, 2, 2, true, true));
    assert_eq!(decided(unmarked(0), None), go(2, 2, 2, true, true));
    assert_eq!(decided(unmarked(3), None), moved_forward(3, 2, 2));
}

#[test]
fn lost_group_offsets_are_taken_from_the_database_if_it_knows() {
    for group in [None, unmarked(2), unmarked(7)] {
        assert_eq!(decided(group.clone(), row(7, Some(7))), go(7, 7, 7, true, false));
        // A restored database to which the group's offset was copied at assignment.
        assert_eq!(decided(group, row(7, Some(9))), go(7, 7, 9, true, false));
    }
}

#[test]
fn lost_group_offsets_that_nobody_knows_halt_the_partition() {
    for group in [None, unmarked(2), unmarked(7)] {
        assert_eq!(decided(group.clone(), row(7, Some(6))), unproved(6, 7));
        assert_eq!(decided(group, row(7, None)), unproved(2, 7));
    }
}

#[test]
fn a_group_offset_moved_over_unwritten_records_halts_the_partition() {
    for (published, known) in [(None, 2), (Some(6), 6), (Some(7), 7)] {
        assert_eq!(decided(unmarked(8), row(7, published)), moved_forward(8, 7, known));
    }
    // An offset below the published ones was moved back, even if the database lost rows.
    assert_eq!(decided(unmarked(8), row(7, Some(9))), go(7, 7, 9, true, false));
}

#[test]
fn the_advice_after_a_move_forward_does_not_give_up_events_in_doubt() {
    let advice = |published| {
        let Decision::Halt(reason) = decided(unmarked(8), row(7, published)) else { panic!("no halt") };
        reason.advice(Partition(3))
    };
    assert!(
        advice(Some(5))
            .contains("--published 7 (if no events of records from 5 on were sent: --published 5)")
    );
    assert!(!advice(Some(7)).contains("(if no events"));
}

#[test]
fn a_mark_that_speaks_of_another_offset_is_none() {
    // Tools that move an offset keep the metadata.
    let moved = |to| Some(GroupOffset { position: NextOffset(to), ..marked(7).unwrap() });
    assert_eq!(decided(moved(3), row(7, Some(7))), go(7, 7, 7, true, false));
    assert_eq!(decided(moved(3), row(7, Some(6))), unproved(6, 7));
    assert_eq!(decided(moved(8), row(7, Some(7))), moved_forward(8, 7, 7));
}

#[test]
fn a_settled_partition_goes_on_where_the_person_said() {
    let decided_on = |at, replaces| Some(Settlement { committed: NextOffset(at), replaces });
    let settled = |applied, published, at| {
        row(applied, published).map(|row| CursorRow { settled: decided_on(at, None), ..row })
    };
    for group in [None, unmarked(2), unmarked(50), marked(30)] {
        assert_eq!(decided(group.clone(), settled(20, Some(10), 15)), go(15, 20, 15, true, true));
        assert_eq!(decided(group, settled(20, None, 25)), go(20, 20, 25, true, true));
    }
    // The resolution is removed from the database even if it changes nothing else.
    assert_eq!(decided(marked(20), settled(20, Some(20), 20)), go(20, 20, 20, false, true));

    // A decision holds for what the operator saw, and until a lane has committed it.
    let over = |group: Option<GroupOffset>, seen: Option<GroupOffset>| {
        let settled = decided_on(15, Some(Settlement::replaced(seen.as_ref())));
        decided(group, row(20, Some(10)).map(|row| CursorRow { settled, ..row }))
    };
    for (group, seen) in [
        (None, None),
        (unmarked(50), unmarked(50)),
        (marked(30), marked(30)),
        (marked(15), unmarked(50)),
        (marked(12), marked(10)),
    ] {
        let must_commit = group != marked(15);
        assert_eq!(over(group, seen), go(15, 20, 15, must_commit, true));
    }
    // The group has moved on since: the database is older, and the decision was taken up.
    for seen in [None, unmarked(18), unmarked(50)] {
        assert_eq!(over(marked(18), seen), go(18, 20, 18, false, true));
    }
    assert_eq!(over(unmarked(15), unmarked(50)), unproved(10, 20));
    assert_eq!(over(None, unmarked(50)), unproved(10, 20));
}

#[test]
fn a_gap_in_the_log_halts_the_partition() {
    let gap =
        |needed| Decision::Halt(HaltReason::LogGap { needed: NextOffset(needed), log_start: NextOffset(2) });
    assert_eq!(decided(marked(1), row(7, Some(1))), gap(1));
    assert_eq!(decided(marked(7), row(1, Some(1))), gap(1));
    assert_eq!(decided(None, row(1, Some(1))), gap(1));
}

#[test]
fn a_cursor_beyond_the_end_halts_the_partition() {
    let beyond = |position| {
        Decision::Halt(HaltReason::BeyondEnd { position: NextOffset(position), end: NextOffset(100) })
    };
    assert_eq!(decided(marked(101), row(101, Some(101))), beyond(101));
    assert_eq!(decided(marked(50), row(101, Some(50))), beyond(101));
    assert_eq!(decided(marked(101), row(50, Some(50))), beyond(101));
    assert_eq!(decided(marked(101), None), beyond(101));
    assert_eq!(decided(marked(100), row(100, Some(100))), go(100, 100, 100, false, false));
}

#[test]
fn another_topic_or_database_stops_the_daemon() {
    let offset = |identity: &Identity| {
        let position = NextOffset(7);
        Some(GroupOffset { position, metadata: CommitMetadata::new(identity, position).to_string() })
    };
    let other_topic = Identity { topic_id: ELSEWHERE, ..HERE };
    let other_database = Identity { database_id: ELSEWHERE, ..HERE };
    let adopts = Mode { adopts_database: true, ..PUBLISHES };
    for row in [None, row(7, Some(7))] {
        assert_eq!(
            decided(offset(&other_topic), row.clone()),
            Decision::Stop(IdentityMismatch::OtherTopic { expected: ELSEWHERE, found: HERE.topic_id })
        );
        assert_eq!(
            decided(offset(&other_database), row.clone()),
            Decision::Stop(IdentityMismatch::OtherDatabase { expected: ELSEWHERE, found: HERE.database_id })
        );
        // `--adopt-database` allows another database, but not another topic.
        let known = known(offset(&other_topic), row, 2, 100);
        assert!(matches!(decide(&known, &HERE, &adopts), Decision::Stop(_)));
    }
    // The adopted database's id is committed before the first batch.
    let known = known(offset(&other_database), None, 2, 100);
    assert_eq!(decide(&known, &HERE, &adopts), go(2, 2, 7, true, true));
}

#[test]
fn without_publishing_the_rows_alone_decide() {
    let decided = |group, row| decide(&known(group, row, 2, 100), &HERE, &ROWS_ONLY);
    assert_eq!(decided(None, None), go(2, 2, 2, true, true));
    assert_eq!(decided(marked(7), row(7, None)), go(7, 7, 7, false, false));
    assert_eq!(decided(marked(50), None), go(2, 2, 2, true, true));
    let gap = HaltReason::LogGap { needed: NextOffset(1), log_start: NextOffset(2) };
    assert_eq!(decided(marked(1), None), Decision::Halt(gap));
    for group in [None, unmarked(50), marked(5), marked(50)] {
        assert_eq!(decided(group, row(7, None)), go(7, 7, 7, true, false));
    }
}

#[test]
fn a_mark_survives_its_text_and_nothing_else_is_one() {
    let mark = CommitMetadata::new(&HERE, NextOffset(42));
    let text = mark.to_string();
    assert_eq!(CommitMetadata::parse(&text), Some(mark));
    for other in ["", "42", &format!("{text} more"), &text.replace("pw1", "pw2"), &text.replace("42", "x")] {
        assert_eq!(CommitMetadata::parse(other), None, "{other}");
    }
}

fn some_known() -> impl Strategy<Value = Known> {
    let position = 0_i64..12;
    let group = prop_oneof![
        Just(None),
        position.clone().prop_map(unmarked),
        position.clone().prop_map(marked),
        (position.clone(), position.clone()).prop_map(|(at, text)| {
            Some(GroupOffset { position: NextOffset(at), metadata: marked(text).unwrap().metadata })
        }),
    ];
    let replaces = proptest::option::of(group.clone().prop_map(|group| Settlement::replaced(group.as_ref())));
    let settlement = (position.clone(), replaces)
        .prop_map(|(at, replaces)| Settlement { committed: NextOffset(at), replaces });
    let settled = prop_oneof![3 => Just(None), 1 => settlement.prop_map(Some)];
    let row = prop_oneof![
        Just(None),
        (position.clone(), proptest::option::of(position.clone()), settled)
            .prop_map(|(a, p, settled)| { row(a, p).map(|row| CursorRow { settled, ..row }) }),
    ];
    (group, row, position.clone(), position)
        .prop_map(|(group, row, start, length)| known(group, row, start, start + length))
}

proptest! {
    #[test]
    fn no_decision_passes_over_a_record_in_silence(known in some_known(), publishes: bool) {
        let mode = Mode { publishes, adopts_database: false };
        let Decision::Go(start) = decide(&known, &HERE, &mode) else { return Ok(()) };
        let bounds = known.bounds;
        // All records to read are in the log, and no earlier record is needed.
        prop_assert!(start.from >= bounds.start);
        prop_assert!(start.from <= start.applied, "unwritten records are read");
        prop_assert!(start.from <= start.publish_from, "unpublished records are read");
        prop_assert!(start.applied.max(start.publish_from) <= bounds.end, "records to come are read");
        // `applied` comes from the database only.
        let applied = known.row.as_ref().map_or(bounds.start, |r| r.applied);
        prop_assert_eq!(start.applied, applied);
        prop_assert_eq!(start.committed, start.publish_from);
        if !publishes {
            return Ok(());
        }
        let settled = known.settlement();
        let published = known.row.as_ref().and_then(|r| r.published);
        let scanned = known
            .group
            .as_ref()
            .filter(|g| g.commit_metadata().is_some() && published.is_none_or(|copy| copy <= g.position))
            .map(|g| g.position);
        match settled {
            Some(settled) => prop_assert_eq!(start.publish_from, settled, "the operator's resolution"),
            None => {
                // Events are skipped only if they were found by the scan, and such events are not sent again.
                let sent = published.max(scanned);
                prop_assert_eq!(start.publish_from, sent.unwrap_or(bounds.start));
                if scanned.is_none() && let Some(row) = &known.row {
                    prop_assert!(row.published >= Some(row.applied), "what was sent is known");
                }
                // An offset that another program moved past unwritten records is never used silently.
                let by_hand = known.group.as_ref().filter(|_| scanned.is_none()).map(|g| g.position);
                // If it is not beyond what is known to be sent, it has no effect: the rows below are read
                // anyway.
                prop_assert!(by_hand.is_none_or(|k| k <= applied.max(start.publish_from)));
            }
        }
        // The decision is durable on both sides, or becomes so before the first batch.
        let mark = known.group.as_ref().and_then(GroupOffset::commit_metadata);
        let is_marked = mark.is_some_and(|mark| mark.position == start.publish_from);
        prop_assert!(start.must_commit || is_marked);
        let is_stored = known.row.as_ref().is_some_and(|r| {
            r.applied == start.applied && r.published == Some(start.publish_from) && r.settled.is_none()
        });
        prop_assert!(start.must_store != is_stored);
    }
}

#[test]
fn a_database_that_has_not_heard_of_the_group_offset_asks_the_outputs() {
    let scanned = |group, row, scan| decide(&Known { scan, ..known(group, row, 2, 100) }, &HERE, &PUBLISHES);
    let (sent, unclear) = (|k| OutputScan::Sent(NextOffset(k)), |k| OutputScan::Unclear(NextOffset(k)));
    for (row, applied) in [(None, 2), (row(5, Some(4)), 5), (row(5, None), 5)] {
        assert_eq!(
            scanned(marked(9), row.clone(), OutputScan::NotScanned),
            Decision::ScanOutputs { from: NextOffset(9) }
        );
        // The outputs agree with it, or do not tell.
        for scan in [sent(9), unclear(0), unclear(9)] {
            assert_eq!(scanned(marked(9), row.clone(), scan), go(applied, applied, 9, false, true));
        }
        // It was rolled back.
        assert_eq!(scanned(marked(9), row.clone(), sent(30)), go(applied, applied, 30, true, true));
        assert_eq!(scanned(marked(9), row.clone(), unclear(30)), unproved(30, 30));
        // No record comes after it.
        assert_eq!(scanned(marked(100), row, OutputScan::NotScanned), go(applied, applied, 100, false, true));
    }
    // It was copied to the restored database when the partition was taken over.
    assert_eq!(scanned(marked(9), row(5, Some(9)), OutputScan::NotScanned), go(5, 5, 9, false, false));
    // What a crash leaves is no older database.
    assert_eq!(scanned(marked(9), row(11, Some(4)), OutputScan::NotScanned), go(9, 11, 9, false, true));
}

#[test]
fn without_a_group_offset_the_outputs_are_asked_and_believed() {
    let scanned = |group, row, scan| decide(&Known { scan, ..known(group, row, 2, 100) }, &HERE, &PUBLISHES);
    let sent = |offset| OutputScan::Sent(NextOffset(offset));
    for group in [None, unmarked(2), unmarked(7), marked(4)] {
        let asks = |row, from| {
            let decision = Decision::ScanOutputs { from: NextOffset(from) };
            assert_eq!(scanned(group.clone(), row, OutputScan::NotScanned), decision);
        };
        asks(row(9, Some(6)), 6);
        asks(row(9, Some(9)), 9);
        // No events, some events or all events were sent.
        for (found, publish_from) in [(6, 6), (8, 8), (9, 9)] {
            let decision = scanned(group.clone(), row(9, Some(6)), sent(found));
            assert_eq!(decision, go(publish_from, 9, publish_from, true, publish_from != 6));
        }
        // An older database: events beyond its rows were sent.
        assert_eq!(scanned(group.clone(), row(9, Some(9)), sent(20)), go(9, 9, 20, true, true));
    }
    assert_eq!(
        scanned(None, row(7, None), OutputScan::NotScanned),
        Decision::ScanOutputs { from: NextOffset(2) }
    );
    assert_eq!(scanned(None, row(7, None), sent(5)), go(5, 7, 5, true, true));
    // If the log lost its end, no output scan is needed.
    assert!(matches!(
        scanned(None, row(101, Some(100)), OutputScan::NotScanned),
        Decision::Halt(HaltReason::BeyondEnd { .. })
    ));
    // An operator's resolution or an offset with commit metadata needs no output scan.
    assert_eq!(scanned(marked(7), row(7, Some(7)), OutputScan::NotScanned), go(7, 7, 7, false, false));
    assert_eq!(scanned(unmarked(8), row(7, Some(7)), sent(7)), moved_forward(8, 7, 7));
    // An offset beyond the rows was moved forward only if it is also beyond what was sent.
    assert_eq!(scanned(unmarked(8), row(7, Some(7)), sent(9)), go(7, 7, 9, true, true));
    assert_eq!(scanned(unmarked(8), row(6, Some(9)), sent(9)), go(6, 6, 9, true, false));
    assert_eq!(scanned(marked(8), row(6, Some(9)), sent(9)), go(6, 6, 9, true, false));
}

#[test]
fn with_nothing_left_but_the_outputs_they_decide() {
    let scanned = |scan| decide(&Known { scan, ..known(None, None, 2, 100) }, &HERE, &PUBLISHES);
    assert_eq!(scanned(OutputScan::NotScanned), Decision::ScanOutputs { from: NextOffset(2) });
    assert_eq!(scanned(OutputScan::Sent(NextOffset(2))), go(2, 2, 2, true, true));
    assert_eq!(scanned(OutputScan::Sent(NextOffset(50))), go(2, 2, 50, true, true));
    assert_eq!(scanned(OutputScan::Unclear(NextOffset(2))), go(2, 2, 2, true, true));
    assert_eq!(scanned(OutputScan::Unclear(NextOffset(50))), unproved(50, 50));
}

#[test]
fn outputs_that_do_not_tell_all_are_not_contradicted() {
    let unclear = |row, seen| {
        let scan = OutputScan::Unclear(NextOffset(seen));
        decide(&Known { scan, ..known(None, row, 2, 100) }, &HERE, &PUBLISHES)
    };
    // Nothing contradicts the database's copy.
    assert_eq!(unclear(row(9, Some(9)), 9), go(9, 9, 9, true, false));
    // More was sent than the copy says: an operator must find out how much.
    assert_eq!(unclear(row(9, Some(9)), 20), unproved(20, 20));
    assert_eq!(unclear(row(9, Some(6)), 8), unproved(8, 9));
}
