//! What is away is waited for: nothing is lost, nothing diverted, the group keeps its member, and the
//! daemon says what is missing, once.

use serde_json::Value;

use crate::support::{Act, Daemon, Flow, Load, Member, PATIENCE, Scope, Servers, wait_until_within};

/// Waits until the daemon is not ready, for the lack of `what`.
#[track_caller]
fn misses(daemon: &Daemon, what: &str, reason: &str) {
    wait_until_within(PATIENCE, &format!("/readyz names {what} {reason}"), || {
        daemon.get("/readyz").is_some_and(|reply| {
            let json: Value = serde_json::from_str(&reply.body).unwrap();
            let missing = json["missing"][what].as_str();
            missing.is_some_and(|missing| missing.contains(reason)) && reply.status == 503
        })
    });
    assert_eq!(daemon.get("/livez").map(|reply| reply.status), Some(200));
}

/// Waits until the daemon is ready, and has published something since.
#[track_caller]
fn recovers(daemon: &Daemon) {
    wait_until_within(PATIENCE, "the daemon is ready again", || {
        daemon.get("/readyz").is_some_and(|reply| reply.status == 200)
    });
    let published = || daemon.metric("payment_writer_published_total", "topic=\"read\"");
    let before = published();
    wait_until_within(PATIENCE, "it publishes again", || published() > before);
}

/// Lines that say that something is wrong or right again.
fn complaints(daemon: &Daemon) -> usize {
    let words = ["WARN", "ERROR", "answers again"];
    let ours =
        |line: &&str| line.contains(" payment_writer::") && words.iter().any(|word| line.contains(word));
    daemon.log().lines().filter(ours).count()
}

/// Waits until the daemon has tried `count` more times in vain.
#[track_caller]
fn tries(daemon: &Daemon, count: f64) {
    let errors = || daemon.metric("payment_writer_database_errors_total", "");
    let before = errors();
    wait_until_within(PATIENCE, "the database was tried again and again", || errors() >= before + count);
}

#[test]
fn whatever_is_away_is_waited_for_and_the_daemon_recovers_by_itself() {
    // GIVEN servers of our own, no output topics yet, and the database away
    let servers = Servers::own();
    let scope = Scope::new(&servers, "outages");
    scope.create_topic(&scope.input_topic, 6);
    scope.command(&["migrate"]).succeeds();
    let mut load = Load::without_bad_records(31);
    scope.feed(load.take(100));
    servers.postgres(Act::Stop);
    let member = Member::new("a")
        .with("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "6000")
        .with("KAFKA__PROPERTIES__HEARTBEAT_INTERVAL_MS", "1000");
    let mut daemon = member.start(&scope);

    // THEN it waits, first for the one, then for the other
    misses(&daemon, "database", "");
    servers.postgres(Act::Start);
    misses(&daemon, "broker", "output topic");
    for topic in [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic] {
        scope.create_topic(topic, 2);
    }
    wait_until_within(PATIENCE, "it publishes", || {
        daemon.metric("payment_writer_published_total", "topic=\"read\"") > 0.0
    });
    let flow = Flow::start(&scope, load, 6);
    recovers(&daemon);
    let at_start = complaints(&daemon);
    assert!(at_start <= 12, "{at_start} lines");
    let rebalances = daemon.metric("payment_writer_rebalances_total", "");
    let keeps_its_place = |daemon: &Daemon| {
        assert_eq!(daemon.metric("payment_writer_partitions_assigned", ""), 6.0);
        assert_eq!(daemon.metric("payment_writer_rebalances_total", ""), rebalances);
    };

    // WHEN the database stops in the middle of everything, for longer than the group's patience with members
    servers.postgres(Act::Immediate);
    misses(&daemon, "database", "");
    tries(&daemon, 16.0);
    // THEN the group still counts on this one
    keeps_its_place(&daemon);
    servers.postgres(Act::Start);
    recovers(&daemon);
    // AND it said so once for each of its two lanes, not for each of its tries
    let told = complaints(&daemon) - at_start;
    assert!(told <= 8, "{told} lines:\n{}", daemon.log());

    // WHEN connections are cut again and again, before, in and after commits
    let errors = || daemon.metric("payment_writer_database_errors_total", "");
    for _ in 0..20 {
        let before = errors();
        wait_until_within(PATIENCE, "the cut was noticed", || {
            scope.cut_connections();
            errors() > before
        });
    }
    recovers(&daemon);

    // WHEN the password is another one, or a table is not there
    let begin = complaints(&daemon);
    let errors = |class: &str| {
        let label = format!("sqlstate_class=\"{class}\"");
        wait_until_within(PATIENCE, &label, || {
            daemon.metric("payment_writer_database_errors_total", &label) >= 5.0
        });
    };
    scope.execute_as_admin("ALTER ROLE payment_writer PASSWORD 'another'");
    scope.cut_connections();
    misses(&daemon, "database", "systemic");
    errors("28");
    scope.execute_as_admin("ALTER ROLE payment_writer PASSWORD 'payment_writer'");
    recovers(&daemon);
    scope.execute_as_admin("ALTER TABLE payment_writer.payment_core RENAME TO elsewhere");
    misses(&daemon, "database", "systemic");
    errors("42");
    scope.execute_as_admin("ALTER TABLE payment_writer.elsewhere RENAME TO payment_core");
    // THEN it goes on without a restart, and its place in the group was never in question
    recovers(&daemon);
    keeps_its_place(&daemon);
    let told = complaints(&daemon) - begin;
    assert!(told <= 16, "{told} lines:\n{}", daemon.log());

    // WHEN the broker dies. Nothing is on its way meanwhile: a broker alone may drop the markers of transactions
    // when it comes back (known limits). Under load brokers die in the fault suite, which knows that when it sees it.
    let load = flow.end();
    scope.wait_until_caught_up();
    servers.kafka(Act::Kill);
    misses(&daemon, "broker", "");
    servers.kafka(Act::Start);
    let flow = Flow::start(&scope, load, 6);
    recovers(&daemon);

    // WHEN both are gone, the broker when the lanes wait for the database
    let begin = complaints(&daemon);
    servers.postgres(Act::Immediate);
    misses(&daemon, "database", "");
    servers.kafka(Act::Stop);
    misses(&daemon, "broker", "");
    servers.postgres(Act::Start);
    servers.kafka(Act::Start);
    recovers(&daemon);
    let told = complaints(&daemon) - begin;
    assert!(told <= 24, "{told} lines:\n{}", daemon.log());

    // THEN at the end every record had its one outcome, and none was diverted
    drop(flow.end());
    scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = scope.assert_exactly_once();
    assert_eq!(outcomes.dead_letters, 0);
    eprintln!("{outcomes:?}");
}

/// As a standby does that nobody has promoted yet, or a primary that is being replaced.
#[test]
fn a_database_that_reads_and_does_not_write_is_waited_for_without_a_word_a_try() {
    // GIVEN a daemon, and an older copy of its database
    let scope = Scope::new(Servers::shared(), "read_only");
    scope.prepare(2, 2);
    let mut load = Load::new(32);
    let member = Member::new("a").with("LANES", "1");
    scope.feed(load.take(50));
    member.catch_up(&scope);
    scope.back_up_database();
    let mut daemon = member.start(&scope);
    scope.feed(load.take(50));
    scope.wait_until_caught_up();
    let before = complaints(&daemon);

    // WHEN the copy takes the database's place, so that partitions are taken up anew, and cannot be written
    let database = &scope.database;
    let read_only = format!("ALTER DATABASE \"{database}_copy\" SET default_transaction_read_only = on");
    scope.on_server(&[read_only]);
    scope.restore_database();
    scope.feed(load.take(50));
    wait_until_within(PATIENCE, "it was tried again and again", || {
        daemon.metric("payment_writer_database_errors_total", "sqlstate_class=\"25\"") >= 6.0
    });

    // THEN it says so once, however often it can be read meanwhile
    let told = complaints(&daemon) - before;
    assert!(told <= 8, "{told} lines:\n{}", daemon.log());
    misses(&daemon, "database", "25006");

    // AND goes on by itself as soon as it can be written
    scope.on_server(&[format!("ALTER DATABASE \"{database}\" RESET default_transaction_read_only")]);
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
}

/// A broker that hangs breaks no connection. When it wakes up it is fenced for a moment, knows of no broker, and does
/// with old requests what it likes. Nothing is on its way meanwhile: a broker alone may drop the markers of
/// transactions then (known limits).
#[test]
fn a_broker_that_hangs_for_longer_than_its_own_session_is_found_again() {
    // GIVEN two daemons that have nothing left to do
    let servers = Servers::own();
    let scope = Scope::new(&servers, "hung_broker");
    scope.prepare(6, 2);
    let mut load = Load::new(33);
    let member = |name| {
        Member::new(name)
            .with("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "6000")
            .with("KAFKA__PROPERTIES__HEARTBEAT_INTERVAL_MS", "1000")
    };
    let mut daemons = [member("a").start(&scope), member("b").start(&scope)];
    let lost = |daemon: &Daemon| daemon.metric("payment_writer_rebalances_total", "kind=\"lost\"");
    for round in 1..=3 {
        scope.feed(load.take(100));
        scope.wait_until_caught_up();
        // One that is not a member again yet has no place to lose.
        for daemon in &daemons {
            daemon.wait_for_partitions("it is a member again", |partitions| partitions > 0);
        }
        // WHEN the broker hangs until both have lost their places, and its controller has lost the broker
        servers.kafka(Act::Pause);
        wait_until_within(PATIENCE, "both have lost their places", || {
            daemons.iter().all(|daemon| lost(daemon) >= f64::from(round))
        });
        std::thread::sleep(std::time::Duration::from_secs(4));
        servers.kafka(Act::Resume);
        scope.wait_for_brokers();
        // THEN neither takes the other, or its own former self, for a namesake
    }
    scope.feed(load.take(100));
    scope.wait_until_caught_up();
    for daemon in &mut daemons {
        daemon.drains();
    }
    scope.assert_exactly_once();
}
