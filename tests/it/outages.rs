//! The daemon waits for what is unavailable: nothing is lost or dead-lettered, the group keeps its member,
//! and the daemon logs once what is missing.

use serde_json::Value;

use crate::support::{
    Act, Daemon, Flow, Load, Member, PATIENCE, Scope, Servers, block_on, wait_until_within,
};

/// Waits until readiness fails because of `what`.
#[track_caller]
pub fn misses(daemon: &Daemon, what: &str, reason: &str) {
    wait_until_within(PATIENCE, &format!("/readyz names {what} {reason}"), || {
        daemon.get("/readyz").is_some_and(|reply| {
            let json: Value = serde_json::from_str(&reply.body).unwrap();
            let missing = json["missing"][what].as_str();
            missing.is_some_and(|missing| missing.contains(reason)) && reply.status == 503
        })
    });
    assert_eq!(daemon.get("/livez").map(|reply| reply.status), Some(200));
}

/// Waits until the daemon is ready and has published something since the call.
#[track_caller]
fn recovers(daemon: &Daemon) {
    wait_until_within(PATIENCE, "the daemon is ready again", || {
        daemon.get("/readyz").is_some_and(|reply| reply.status == 200)
    });
    let published = || daemon.metric("payment_writer_published_total", "topic=\"read\"");
    let before = published();
    wait_until_within(PATIENCE, "it publishes again", || published() > before);
}

/// Log lines about a problem or a recovery.
fn complaints(daemon: &Daemon) -> usize {
    let words = ["WARN", "ERROR", "works again"];
    let ours =
        |line: &&str| line.contains(" payment_writer::") && words.iter().any(|word| line.contains(word));
    daemon.log().lines().filter(ours).count()
}

/// Waits until the daemon has failed `count` more attempts.
#[track_caller]
fn tries(daemon: &Daemon, count: f64) {
    let errors = || daemon.metric("payment_writer_database_errors_total", "");
    let before = errors();
    wait_until_within(PATIENCE, "the database was tried again and again", || errors() >= before + count);
}

#[test]
fn the_daemon_waits_for_whatever_is_unavailable_and_recovers_by_itself() {
    // GIVEN own servers, no output topics yet, and a stopped database
    let servers = Servers::own();
    let scope = Scope::new(&servers, "outages");
    scope.create_topic(&scope.input_topic, 6);
    scope.command(&["migrate"]).succeeds();
    let mut load = Load::without_bad_records(31);
    scope.feed(load.take(100));
    servers.postgres(Act::Stop);
    let member = Member::new("a").with_session("6000", "1000");
    let mut daemon = member.start(&scope);

    // THEN it waits, first for the database, then for the topics
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

    // WHEN the database stops in the middle of a load, for longer than the group's session timeout
    servers.postgres(Act::Immediate);
    misses(&daemon, "database", "");
    tries(&daemon, 16.0);
    // THEN it is still a member of the group
    keeps_its_place(&daemon);
    servers.postgres(Act::Start);
    recovers(&daemon);
    // AND it logged that once for each of its two lanes, not for each attempt
    let told = complaints(&daemon) - at_start;
    assert!(told <= 8, "{told} lines:\n{}", daemon.log());

    // WHEN connections are terminated again and again, before, in and after commits
    let errors = || daemon.metric("payment_writer_database_errors_total", "");
    for _ in 0..20 {
        let before = errors();
        wait_until_within(PATIENCE, "the lost connection was noticed", || {
            scope.cut_connections();
            errors() > before
        });
    }
    recovers(&daemon);

    // WHEN the password changes, or a table is missing
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
    // THEN it continues without a restart, and stayed a member throughout
    recovers(&daemon);
    keeps_its_place(&daemon);
    let told = complaints(&daemon) - begin;
    assert!(told <= 16, "{told} lines:\n{}", daemon.log());

    // WHEN the broker is killed. No transaction is open meanwhile: a single broker may drop transaction
    // markers when it restarts (known limits). The fault suite kills brokers under load, and detects that
    // case.
    let load = flow.end();
    scope.wait_until_caught_up();
    servers.kafka(Act::Kill);
    misses(&daemon, "broker", "");
    servers.kafka(Act::Start);
    let flow = Flow::start(&scope, load, 6);
    recovers(&daemon);

    // WHEN both stop, the broker while the lanes wait for the database
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

    // THEN at the end every record had exactly one outcome, and none was dead-lettered
    drop(flow.end());
    scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = scope.assert_exactly_once();
    assert_eq!(outcomes.dead_letters, 0);
    eprintln!("{outcomes:?}");
}

/// A database that is read-only: a standby not promoted yet, or a primary that is being replaced.
#[test]
fn a_read_only_database_is_waited_for_and_logged_once() {
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

    // WHEN the copy replaces the database, so that partitions are recovered, and it is read-only
    let database = &scope.database;
    let read_only = format!("ALTER DATABASE \"{database}_copy\" SET default_transaction_read_only = on");
    scope.on_server(&[read_only]);
    scope.restore_database();
    scope.feed(load.take(50));
    wait_until_within(PATIENCE, "it was tried again and again", || {
        daemon.metric("payment_writer_database_errors_total", "sqlstate_class=\"25\"") >= 6.0
    });

    // THEN the daemon logs that once, however often it can read meanwhile
    let told = complaints(&daemon) - before;
    assert!(told <= 8, "{told} lines:\n{}", daemon.log());
    misses(&daemon, "database", "25006");

    // AND continues by itself as soon as the database accepts writes
    scope.on_server(&[format!("ALTER DATABASE \"{database}\" RESET default_transaction_read_only")]);
    scope.drains_exactly_once([&mut daemon]);
}

/// A paused broker breaks no connection. When it resumes, it is fenced for a moment, reports no brokers, and
/// may or may not process old requests. No transaction is open meanwhile: a single broker may drop
/// transaction markers then (known limits).
#[test]
fn the_daemon_recovers_from_a_broker_that_hangs_for_longer_than_its_session() {
    // GIVEN two daemons that have caught up
    let servers = Servers::own();
    let scope = Scope::new(&servers, "hung_broker");
    scope.prepare(6, 2);
    let mut load = Load::new(33);
    let member = |name| Member::new(name).with_session("6000", "1000");
    let mut daemons = [member("a").start(&scope), member("b").start(&scope)];
    let lost = |daemon: &Daemon| daemon.metric("payment_writer_rebalances_total", "kind=\"lost\"");
    for round in 1..=3 {
        scope.feed(load.take(100));
        scope.wait_until_caught_up();
        // A daemon that is not a member again yet cannot lose its membership.
        for daemon in &daemons {
            daemon.wait_for_partitions("it is a member again", |partitions| partitions > 0);
        }
        // WHEN the broker is paused until both have lost their membership, and the controller has lost the
        // broker
        servers.kafka(Act::Pause);
        wait_until_within(PATIENCE, "both have lost their membership", || {
            daemons.iter().all(|daemon| lost(daemon) >= f64::from(round))
        });
        std::thread::sleep(std::time::Duration::from_secs(4));
        servers.kafka(Act::Resume);
        scope.wait_for_brokers();
        // THEN neither mistakes the other, or its own earlier membership, for a second process with its
        // instance id
    }
    scope.feed(load.take(100));
    scope.drains_exactly_once(&mut daemons);
}

#[test]
#[ignore = "of servers of its own; `make trials`"]
fn trials_a_drain_that_cannot_finish_ends_in_time_with_exit_code_0() {
    // GIVEN written payments whose events cannot be published, because the broker hangs
    let servers = Servers::own();
    let scope = Scope::new(&servers, "endless_drain");
    scope.prepare(4, 2);
    let member = Member::new("a").with("SHUTDOWN__TIMEOUT", "2s");
    let mut daemon = member.start(&scope);
    let flow = Flow::start(&scope, Load::new(32), 10);
    recovers(&daemon);
    // So that a batch is certainly on its way.
    let lock = scope.connect();
    let hold = "BEGIN; LOCK TABLE payment_writer.payment_core IN SHARE ROW EXCLUSIVE MODE";
    block_on(lock.batch_execute(hold)).unwrap();
    let is_waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    wait_until_within(PATIENCE, "a batch waits", || scope.sql(is_waiting, &[])[0].get::<_, i64>(0) > 0);
    let before = scope.count("payment_core");
    servers.kafka(Act::Pause);
    block_on(lock.batch_execute("COMMIT")).unwrap();
    wait_until_within(PATIENCE, "it is written", || scope.count("payment_core") > before);

    // WHEN the daemon is asked to end
    daemon.terminate();

    // THEN it gives up after its limit, and says so; the next start publishes the rest
    let status = daemon.wait();
    servers.kafka(Act::Resume);
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    assert!(daemon.log().contains("shutdown.timeout"), "{}", daemon.log());
    drop(flow.end());
    drop(member.catch_up(&scope));
    scope.assert_exactly_once();
}

#[test]
#[ignore = "minutes"]
fn trials_an_idle_daemon_warns_of_a_broker_that_is_away() {
    // GIVEN a daemon that has nothing to do
    let servers = Servers::own();
    let scope = Scope::new(&servers, "idle");
    scope.prepare(2, 1);
    let daemon = Member::new("a").start(&scope);
    daemon.wait_for_partitions("its partitions are live", |partitions| partitions == 2);

    // WHEN the broker hangs
    servers.kafka(Act::Pause);

    // THEN that is a warning, and so is its end
    let told = |text: &str| daemon.log().lines().filter(|line| line.contains(text)).count();
    wait_until_within(PATIENCE, "it is a warning", || {
        daemon.log().lines().any(|line| line.contains("WARN") && line.contains("dependency=\"broker\""))
    });
    servers.kafka(Act::Resume);
    wait_until_within(PATIENCE, "the log says that it is back", || told("no longer missing") > 0);
    // Once for the broker, and for the group once a reason.
    assert!(told("not ready: this has been missing for long") <= 4, "{}", daemon.log());
}
