//! A crash at any moment loses nothing and duplicates nothing.

use crate::support::{Flow, Load, Member, PATIENCE, Scope, Servers, wait_until_within};

/// Failpoints between and inside the two transactions of a batch, in order.
const STEPS_OF_A_BATCH: [&str; 7] = [
    "before_postgres_commit",
    "after_postgres_commit",
    "before_kafka_begin",
    "after_produce",
    "after_send_offsets",
    "before_kafka_commit",
    "after_kafka_commit",
];

pub fn small_batches() -> Member {
    Member::new("a").with("LANES", "1").with("BATCH__MAX_PAYMENTS", "40")
}

/// Crashes at each step, the `hit`-th time it is reached, with more than enough records waiting.
pub fn kill_at_each_step(scope: &Scope<'_>, member: &Member, hit: usize, mut load: Load) {
    // GIVEN partitions with a history, so that only batches move the cursors
    scope.prepare(4, 2);
    scope.feed(load.take(60));
    member.catch_up(scope);
    for step in STEPS_OF_A_BATCH {
        scope.feed(load.take(150));

        // WHEN the process dies there, and is started again
        member.die_at(scope, &format!("{step}:{hit}"));
        member.catch_up(scope);

        // THEN
        eprintln!("{step}:{hit}: {:?}", scope.assert_exactly_once());
    }
}

#[test]
fn a_kill_at_any_step_of_the_first_batch_loses_and_duplicates_nothing() {
    let scope = Scope::new(Servers::shared(), "kill_first");
    kill_at_each_step(&scope, &small_batches(), 1, Load::new(1));
}

/// Here the Postgres transaction of a batch overlaps the Kafka transaction of the one before.
#[test]
fn a_kill_at_any_step_of_overlapping_batches_loses_and_duplicates_nothing() {
    let scope = Scope::new(Servers::shared(), "kill_overlap");
    kill_at_each_step(&scope, &small_batches(), 3, Load::new(2));
}

#[test]
fn a_kill_during_the_first_recovery_of_partitions_loses_and_duplicates_nothing() {
    // GIVEN a group and a database without any offset
    let scope = Scope::new(Servers::shared(), "kill_opening");
    scope.prepare(4, 2);
    scope.feed(Load::new(3).take(150));
    let member = small_batches();

    // WHEN the process dies at each step up to the first batch
    for step in [
        "before_kafka_begin",
        "after_send_offsets",
        "before_kafka_commit",
        "after_kafka_commit",
        "before_store_cursors",
        "after_store_cursors",
        "before_postgres_commit",
    ] {
        member.die_at(&scope, step);
    }
    member.catch_up(&scope);

    // THEN
    scope.assert_exactly_once();

    // AND the same when the first offsets are committed in one request
    let other = Scope::new(Servers::shared(), "kill_first_offsets");
    other.prepare(4, 2);
    other.feed(Load::new(4).take(150));
    member.die_at(&other, "after_first_offsets");
    member.catch_up(&other);
    other.assert_exactly_once();
}

#[test]
fn repeated_crashes_at_the_same_step_lose_and_duplicate_nothing() {
    let scope = Scope::new(Servers::shared(), "kill_again");
    scope.prepare(4, 2);
    scope.feed(Load::new(5).take(300));
    let member = small_batches();
    for _ in 0..2 {
        for step in ["after_postgres_commit:2", "before_kafka_commit:2"] {
            member.die_at(&scope, step);
        }
    }
    member.catch_up(&scope);
    scope.assert_exactly_once();
}

#[test]
fn random_kills_of_two_instances_under_load_lose_and_duplicate_nothing() {
    // GIVEN two instances and a flow of records
    let scope = Scope::new(Servers::shared(), "random_kills");
    scope.prepare(8, 4);
    let member = |name| Member::new(name).with("BATCH__MAX_PAYMENTS", "100").soon_forgotten();
    let members = [member("a"), member("b")];
    let flow = Flow::start(&scope, Load::new(6), 12);
    let mut daemons = members.clone().map(|member| member.start(&scope));
    let mut random = Load::new(7);

    // WHEN one or the other is killed, before or after it is ready, and started again
    for _ in 0..10 {
        let victim = usize::from(random.number(0, 2) == 1);
        std::thread::sleep(std::time::Duration::from_millis(random.number(100, 2_000)));
        daemons[victim].kill();
        daemons[victim] = members[victim].start(&scope);
    }
    drop(flow.end());

    // THEN the surviving instances write and publish every record exactly once
    scope.wait_until_caught_up();
    for daemon in &mut daemons {
        daemon.drains();
    }
    wait_until_within(PATIENCE, "the copies of the group's offsets are stored", || {
        scope.cursors().values().all(|(applied, published)| published == &Some(*applied))
    });
    eprintln!("{:?}", scope.assert_exactly_once());
}
