//! Partitions that move between instances, gracefully and after failures, while records flow.

use std::time::Duration;

use kafka_protocol::messages::ApiKey;
use rdkafka::admin::{AdminOptions, NewPartitions};

use crate::support::{
    Daemon, Flow, KafkaProxy, Load, Lost, Member, PATIENCE, Scope, Servers, block_on, wait_until,
    wait_until_within,
};

fn member(name: &str) -> Member {
    Member::new(name).with("BATCH__MAX_PAYMENTS", "100").soon_forgotten()
}

#[test]
fn an_instance_joins_and_leaves_while_records_flow() {
    // GIVEN one instance with all partitions
    let scope = Scope::new(Servers::shared(), "join_leave");
    scope.prepare(9, 4);
    let flow = Flow::start(&scope, Load::new(21), 10);
    let mut first = member("a").start(&scope);
    first.wait_for_partitions("the first has all", |partitions| partitions == 9);

    for _ in 0..2 {
        // WHEN a second one joins
        let mut second = member("b").start(&scope);
        // THEN they share the partitions
        second.wait_for_partitions("the second has its share", |partitions| partitions >= 4);
        first.wait_for_partitions("the first keeps the rest", |partitions| partitions <= 5);
        wait_until_within(PATIENCE, "the second publishes", || {
            second.metric("payment_writer_published_total", "topic=\"read\"") >= 50.0
        });
        // AND when it leaves, the first has all of them again
        second.drains();
        first.wait_for_partitions("the first has all again", |partitions| partitions == 9);
    }
    drop(flow.end());
    scope.drains_exactly_once([&mut first]);
}

#[test]
fn partitions_revoked_from_a_dying_member_are_reassigned() {
    // GIVEN an instance with all partitions, a static member that stays in the group during a restart
    let scope = Scope::new(Servers::shared(), "given_away");
    scope.prepare(9, 4);
    let mut load = Load::new(29);
    scope.feed(load.take(200));
    let member = |name| Member::new(name).with("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "60000");
    let mut first = member("a").start_at(&scope, "before_revoked");
    first.wait_for_partitions("the first has all", |partitions| partitions == 9);

    // WHEN it dies after it was told to revoke some, and before it rejoined to complete the rebalance
    let mut second = member("b").start(&scope);
    first.wait();
    first = member("a").start(&scope);

    // THEN they are assigned to an instance again
    wait_until_within(PATIENCE, "every partition has an owner", || {
        first.partitions() + second.partitions() == 9
    });
    scope.feed(load.take(200));
    scope.drains_exactly_once([&mut first, &mut second]);
}

#[test]
fn a_member_that_the_group_removes_while_it_joins_sends_nothing_again() {
    // GIVEN a member that reaches its broker through a proxy, and a flow of payments
    let servers = Servers::shared();
    let scope = Scope::new(servers, "removed");
    scope.prepare(4, 2);
    let proxy = KafkaProxy::to(servers.bootstrap_servers());
    let mut first = member("a").with("KAFKA__BOOTSTRAP_SERVERS", &proxy.address()).start(&scope);
    let flow = Flow::start(&scope, Load::without_bad_records(73), 20);
    let published = |daemon: &Daemon| daemon.metric("payment_writer_published_total", "topic=\"read\"");
    wait_until("payments flow", || published(&first) > 200.0);

    // WHEN another one joins, and the first one cannot join anew until its session has ended
    proxy.lose(ApiKey::JoinGroup, Lost::Everything(Duration::from_secs(10)));
    let mut second = member("b").start(&scope);
    wait_until("the second one has all", || second.log().contains("assigned partitions=4"));

    // THEN it notices that it became another member, and starts again, and publishes nothing of what it held
    let is_told = |_| {
        std::thread::sleep(Duration::from_millis(100));
        first.log().contains("replaced as a member")
    };
    let is_noticed = (0..600).any(is_told);
    second.wait_for_partitions("each has its share", |partitions| partitions == 2);
    first.wait_for_partitions("each has its share", |partitions| partitions == 2);
    drop(flow.end());
    scope.drains_exactly_once([&mut first, &mut second]);
    assert!(is_noticed, "{}", first.log());
}

fn rebalances(daemon: &Daemon) -> f64 {
    daemon.metric("payment_writer_rebalances_total", "")
}

#[test]
fn a_rolling_restart_under_load_moves_no_partition() {
    // GIVEN two instances whose session timeout is longer than a restart
    let scope = Scope::new(Servers::shared(), "rolling");
    scope.prepare(8, 4);
    let patient = |name: &str| {
        Member::new(name)
            .with("BATCH__MAX_PAYMENTS", "100")
            .with("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "300000")
    };
    let members = [patient("a"), patient("b")];
    let flow = Flow::start(&scope, Load::new(22), 10);
    let mut daemons = members.clone().map(|member| member.start(&scope));
    for daemon in &daemons {
        daemon.wait_for_partitions("each has its half", |partitions| partitions == 4);
    }

    // WHEN they are restarted one after the other
    for restarted in [0, 1, 0] {
        let other = 1 - restarted;
        let before = rebalances(&daemons[other]);
        daemons[restarted].drains();
        daemons[restarted] = members[restarted].start(&scope);
        daemons[restarted].wait_for_partitions("it has its half again", |partitions| partitions == 4);
        // THEN the other one keeps its partitions
        assert_eq!(rebalances(&daemons[other]), before);
    }
    drop(flow.end());
    scope.drains_exactly_once(&mut daemons);
}

/// A process stops at a step of a batch until the group has assigned its partitions to another, which
/// processes them; then it resumes and tries to finish its batch.
fn zombie(step: &str, seed: u64) {
    let scope = Scope::new(Servers::shared(), step);
    scope.prepare(4, 2);
    let mut load = Load::new(seed);
    scope.feed(load.take(400));
    let member = |name| {
        member(name)
            .with("LANES", "1")
            .with("BATCH__MAX_PAYMENTS", "40")
            .with("KAFKA__PROPERTIES__TRANSACTION_TIMEOUT_MS", "4000")
    };

    // GIVEN a process that hangs
    let mut zombie = member("a").start_at(&scope, &format!("{step}:4:stop"));
    wait_until_within(PATIENCE, "the step is reached", || zombie.is_stopped());

    // WHEN another one takes its partitions over and processes everything
    let mut heir = member("b").start(&scope);
    heir.wait_for_partitions("the other one has taken over", |partitions| partitions == 4);
    scope.feed(load.take(100));
    scope.wait_until_caught_up();
    // AND the first one resumes in the middle of its batch
    // THEN its batch has no effect, and both continue
    resumes(&scope, &mut load, [&mut zombie, &mut heir]);
}

/// A stopped process resumes beside the one that has taken its partitions over, and both continue.
fn resumes(scope: &Scope<'_>, load: &mut Load, [zombie, heir]: [&mut Daemon; 2]) {
    zombie.signal("CONT");
    zombie.wait_for_partitions("it is a member again", |partitions| partitions > 0);
    scope.feed(load.take(100));
    scope.drains_exactly_once([zombie, heir]);
}

#[test]
fn a_zombie_before_its_postgres_commit_changes_nothing() {
    zombie("before_postgres_commit", 23);
}

/// Its session is not idle: it is busy with a COPY, and holds row locks on its cursors.
#[test]
fn a_zombie_in_the_middle_of_a_copy_does_not_block_its_successor() {
    zombie("before_copy_ends", 28);
}

#[test]
fn a_zombie_between_its_two_commits_changes_nothing() {
    zombie("after_postgres_commit", 24);
}

#[test]
fn a_zombie_that_has_sent_its_events_changes_nothing() {
    zombie("after_produce", 25);
}

#[test]
fn a_zombie_before_its_kafka_commit_changes_nothing() {
    zombie("before_kafka_commit", 26);
}

#[test]
fn a_zombie_between_its_first_offsets_and_its_first_cursors_changes_nothing() {
    // GIVEN a process that hangs before it has stored its start offsets
    let scope = Scope::new(Servers::shared(), "zombie_opening");
    scope.prepare(4, 2);
    let mut load = Load::new(27);
    scope.feed(load.take(200));
    let mut zombie = member("a").with("LANES", "1").start_at(&scope, "before_store_cursors:1:stop");
    wait_until_within(PATIENCE, "the step is reached", || zombie.is_stopped());

    // WHEN another one has written everything, and the first resumes
    let mut heir = member("b").start(&scope);
    heir.wait_for_partitions("the other one has taken over", |partitions| partitions == 4);
    scope.wait_until_caught_up();
    // THEN its old cursors do not overwrite the new ones
    resumes(&scope, &mut load, [&mut zombie, &mut heir]);
}

#[test]
#[ignore = "new partitions are found within minutes; `make trials`"]
fn trials_partitions_added_under_load_are_written_and_published() {
    // GIVEN two instances under load
    let scope = Scope::new(Servers::shared(), "added_partitions");
    scope.prepare(6, 2);
    let mut daemons = ["a", "b"].map(|name| Member::new(name).start(&scope));
    for daemon in &daemons {
        daemon.wait_for_partitions("each has its half", |partitions| partitions == 3);
    }
    let flow = Flow::start(&scope, Load::new(31), 5);

    // WHEN the input gets as many partitions again, and producers use them
    let topic = NewPartitions::new(&scope.input_topic, 12);
    for result in block_on(scope.admin().create_partitions([&topic], &AdminOptions::new())).unwrap() {
        result.unwrap();
    }

    // THEN both instances get their share, and each record has its outcome
    for daemon in &daemons {
        daemon.wait_for_partitions("each has half of the new ones", |partitions| partitions == 6);
    }
    let written =
        |partition: i32| scope.read_all(&scope.input_topic).iter().any(|r| r.partition == partition);
    wait_until_within(PATIENCE, "new partitions have records", || (6..12).all(&written));
    drop(flow.end());
    scope.wait_until_caught_up();
    daemons.iter_mut().for_each(Daemon::drains);
    scope.assert_exactly_once();
}
