use super::*;

#[test]
fn gap_checks_that_hang_and_end_later_do_not_keep_others_from_beginning() {
    // GIVEN as many checks that hang as may be
    let (mut states, mut now) = (FetchStates::new(), Instant::now());
    let mut begun = Vec::new();
    while states.may_check(now).is_some() {
        begun.push(states.check_begins(now));
        now += HUNG_AFTER;
    }
    assert_eq!(begun.len(), CHECKS_HUNG_MAX as usize + 1);

    // WHEN one of them ends THEN another may begin; and each pair of a begin and a late end changes nothing
    for id in begun {
        states.check_ended(id);
        assert_eq!(states.may_check(now), Some(true));
        states.check_begins(now);
        assert_eq!(states.may_check(now), None);
        now += HUNG_AFTER;
    }
}

#[test]
fn only_time_in_which_the_lane_could_receive_counts_as_silence() {
    // GIVEN a partition of which nothing arrives although it has records
    let (mut states, mut now) = (FetchStates::new(), Instant::now());
    let (partition, position) = (Partition(0), NextOffset(7));
    states.silence_checked_at = now;
    states.by_partition.insert(partition, Fetch::started(position, now));
    let mut silent_after = |states: &mut FetchStates, pause: Duration| {
        now += pause;
        states.silent(now, false, |_| Some((position, true)))
    };
    assert_eq!(silent_after(&mut states, SILENCE_TICK), None);

    // WHEN the lane waits in a transaction for longer than a silence may last, twice, THEN the client is not blamed
    for _ in 0..2 {
        assert_eq!(silent_after(&mut states, SILENCE_MAX * 2), None);
    }

    // AND it is for as long a silence of a lane that receives
    let rounds = SILENCE_MAX.as_secs() / SILENCE_TICK.as_secs() - 3;
    for _ in 1..rounds {
        assert_eq!(silent_after(&mut states, SILENCE_TICK), None);
    }
    assert_eq!(silent_after(&mut states, SILENCE_TICK), Some((partition, position)));
}
