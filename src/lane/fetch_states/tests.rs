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
