//! The daemon's audit of itself reports skipped records within minutes, and raises no false alarm.

use crate::support::{
    AT_MS, Daemon, Flow, Load, Member, Message, PATIENCE, Payment, Scope, block_on, uuid_v4,
    wait_until_within,
};

fn member() -> Member {
    Member::new("a").soon_forgotten()
}

fn audited(daemon: &Daemon, result: &str) -> f64 {
    daemon.metric("payment_writer_audit_records_total", &format!("result=\"{result}\""))
}

/// Audited records, with any result, including invalid ones.
fn audited_in_all(daemon: &Daemon) -> f64 {
    daemon.metric("payment_writer_audit_records_total", "")
}

fn alarms(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    log.lines().filter(|line| line.contains("are not accounted for")).map(str::to_owned).collect()
}

/// Payments with distinct ids, on one partition.
fn payments(seeds: std::ops::Range<u64>, partition: i32) -> Vec<Message> {
    seeds.map(|seed| Payment::new(uuid_v4(seed), 31).message().partition(partition)).collect()
}

#[test]
fn rows_and_ids_deleted_just_behind_the_fetch_start_are_reported_with_partition_and_offsets() {
    // GIVEN a running daemon with default settings, and an audit that waits for a lock
    let scope = Scope::ready("audit_alarm", 4, 2);
    let mut daemon = member().start(&scope);
    daemon.wait_until_ready();
    daemon.wait_for_partitions("it has all partitions", |partitions| partitions == 4);
    let somebody = scope.connect_to(&scope.servers.postgres_admin_url(&scope.database));
    let run = |statements: &str| block_on(somebody.batch_execute(statements)).unwrap();
    run(
        "SET session_replication_role = replica; BEGIN; LOCK TABLE payment_writer.idempotency_generation IN ACCESS EXCLUSIVE MODE",
    );
    for (partition, seeds) in [(1, 0..60), (2, 100..160), (3, 200..260)] {
        scope.produce(&scope.input_topic, payments(seeds, partition));
    }
    scope.wait_until_caught_up();

    // WHEN payments are deleted just behind the offset at which fetching started; of others the id alone; and
    // others that an operator skipped
    run("
        SET search_path = payment_writer;
        CREATE TEMPORARY TABLE gone AS SELECT payment_id, message_id FROM payment_metadata
            WHERE source_partition = 1 AND source_offset IN (10, 11, 12, 13, 14, 40)
                OR source_partition = 3 AND source_offset < 5;
        DELETE FROM payment_core USING gone WHERE payment_core.payment_id = gone.payment_id;
        DELETE FROM payment_notes USING gone WHERE payment_notes.payment_id = gone.payment_id;
        DELETE FROM idempotency USING gone WHERE idempotency.message_id = gone.message_id;
        DELETE FROM payment_metadata USING gone WHERE payment_metadata.payment_id = gone.payment_id;
        DELETE FROM idempotency WHERE source_partition = 2 AND source_offset = 7;
        INSERT INTO cursor_audit (command, topic, topic_id, partition, before, after)
            SELECT 'cursors skip --to 5', topic, topic_id, 3, '{\"applied\":0,\"published\":0}', '{\"applied\":5}'
            FROM bound_group;
        COMMIT");

    // THEN it is reported within minutes: by the metric of the alert, and by a log line with partition and
    // offsets
    wait_until_within(PATIENCE, "the loss is reported", || audited(&daemon, "unaccounted") == 7.0);
    wait_until_within(PATIENCE, "the lines are logged", || alarms(&daemon).len() == 2);
    let lines = alarms(&daemon);
    let of = |partition: i32| {
        let named = format!("partition={partition} ");
        lines.iter().find(|line| line.contains(&named)).unwrap_or_else(|| panic!("{lines:?}"))
    };
    for words in ["ERROR", &scope.input_topic, "offsets=\"10-14, 40\"", "records=6", "lost: "] {
        assert!(of(1).contains(words), "no {words:?} in {}", of(1));
    }
    assert!(of(1).contains("reconcile --partition 1 --from-offset 10 --to-offset 41"), "{}", of(1));
    assert!(of(2).contains("offsets=\"7\"") && of(2).contains("written, but its message id"), "{}", of(2));
    // AND all others are accounted for
    wait_until_within(PATIENCE, "all are audited", || audited_in_all(&daemon) == 180.0);
    assert_eq!((audited(&daemon, "owned"), audited(&daemon, "given_up")), (168.0, 5.0));
    // AND reconcile finds the same
    let said = scope.command(&["reconcile"]);
    assert_eq!(said.code, Some(1));
    let lost =
        said.stdout.lines().filter(|line| line.contains("partition 1, ") && line.contains("lost: ")).count();
    assert_eq!(lost, 6, "{}", said.stdout);
    daemon.drains();
}

#[test]
fn what_a_reload_interrupts_is_told_and_is_no_audit_that_falls_behind() {
    // GIVEN a daemon that audits all it writes, and falls behind
    let scope = Scope::ready("audit_reload", 1, 1);
    let mut daemon = member().with("AUDIT__SHARE", "1").start(&scope);
    daemon.wait_until_ready();
    scope.produce(&scope.input_topic, payments(0..20_000, 0));
    let waiting = || daemon.metric("payment_writer_audit_waiting_offsets", "");
    wait_until_within(PATIENCE, "much is waiting", || waiting() > 5_000.0);

    // WHEN all connections are made anew THEN the number of offsets that it had not audited is told
    daemon.signal("HUP");
    let told = || daemon.log().contains("so many offsets that were chosen are not read again");
    wait_until_within(PATIENCE, "it is told", told);
    assert_eq!(daemon.metric("payment_writer_audit_dropped_offsets_total", ""), 0.0);
    scope.wait_until_caught_up();
    daemon.drains();
}

#[test]
fn with_the_audit_turned_off_nothing_is_read_again() {
    let scope = Scope::ready("audit_off", 1, 1);
    let mut daemon = member().with("AUDIT__SHARE", "0").start(&scope);
    daemon.wait_until_ready();
    scope.produce(&scope.input_topic, payments(0..20, 0));
    scope.wait_until_caught_up();
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
    let names: Vec<String> =
        threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok()).collect();
    assert!(names.iter().any(|name| name.trim() == "group"), "{names:?}");
    assert!(!names.iter().any(|name| name.trim() == "audit"), "{names:?}");
    daemon.drains();
}

#[test]
fn a_healthy_daemon_with_every_kind_of_outcome_raises_no_alarm() {
    // GIVEN a database with a constraint, an audit that reads everything, and records of every kind
    let scope = Scope::ready("audit_healthy", 4, 2);
    scope.execute(
        "ALTER TABLE payment_writer.payment_core ADD CONSTRAINT no_thirteen CHECK (cust_id <> 1013)",
    );
    let member = member().with("AUDIT__SHARE", "1").with("BATCH__MAX_PAYMENTS", "200");
    let mut daemon = member.start(&scope);
    daemon.wait_until_ready();
    let mut load = Load::new(81);
    let refused = |seed: u64| Payment::new(uuid_v4(seed), 1013).message().partition(0);
    let repeated = Payment::new(uuid_v4(9_000), 7).message();
    let conflict = Payment::new(uuid_v4(9_000), 7).amount("11").message();
    let mut sent = load.take(400);
    sent.extend([refused(9_001), refused(9_002)]);
    sent.extend([
        repeated.clone().partition(1),
        repeated.clone().partition(2),
        conflict.clone().partition(1),
    ]);
    sent.push(Message::new("31", "{}").timestamp_ms(AT_MS).partition(3));
    scope.produce_in_transaction(&scope.input_topic, sent, true);
    // And aborted records.
    scope.produce_in_transaction(&scope.input_topic, payments(20_000..20_020, 2), false);
    scope.produce(&scope.input_topic, payments(9_100..9_130, 3));
    wait_until_within(PATIENCE, "all records have their outcome", || {
        daemon.metric("payment_writer_records_total", "") >= 436.0
    });
    scope.wait_until_caught_up();
    wait_until_within(PATIENCE, "all of it is audited", || audited_in_all(&daemon) >= 436.0);

    // WHEN generations are rotated, and ids of the older one are repeated
    scope.execute(
        "UPDATE payment_writer.idempotency_generation SET made_current_at = now() - interval '30 days'
         WHERE state = 'current'",
    );
    scope.command(&["prune"]).succeeds();
    assert_eq!(
        scope.sql("SELECT 1 FROM payment_writer.idempotency_generation WHERE state = 'older'", &[]).len(),
        1
    );
    scope.produce(&scope.input_topic, [repeated.clone().partition(3), conflict.partition(3), refused(9_003)]);
    scope.produce(&scope.input_topic, load.take(100));
    scope.wait_until_caught_up();
    wait_until_within(PATIENCE, "that is audited", || audited_in_all(&daemon) >= 539.0);
    // Some are both behind a start of fetching and in a sampled block: they are audited twice.
    wait_until_within(PATIENCE, "the dead letters are found", || audited(&daemon, "dead_letter") >= 3.0);
    wait_until_within(PATIENCE, "nothing waits", || {
        daemon.metric("payment_writer_audit_waiting_offsets", "") == 0.0
            && daemon.metric("payment_writer_audit_suspects", "") == 0.0
    });
    assert_eq!((alarms(&daemon), audited(&daemon, "unaccounted")), (vec![], 0.0));
    assert!(audited(&daemon, "duplicate") >= 3.0 && audited(&daemon, "conflict") >= 2.0);
    assert!(audited(&daemon, "invalid") >= 1.0 && audited(&daemon, "owned") > 200.0);
    daemon.drains();

    // WHEN an operator skips records, and the daemon restarts
    scope.produce(&scope.input_topic, payments(9_200..9_220, 2));
    let end = scope.ends()[&2];
    scope.move_group_offset(2, end, "");
    let to = (end - 5).to_string();
    let skip = ["cursors", "skip", "--partition", "2", "--to", &to, "--apply", "--reason", "a test"];
    scope.command(&skip).succeeds();
    let mut daemon = member.start(&scope);
    daemon.wait_until_ready();
    let flow = Flow::start(&scope, Load::new(82), 10);
    wait_until_within(PATIENCE, "records are audited", || audited_in_all(&daemon) > 500.0);
    drop(flow.end());
    scope.wait_until_caught_up();
    assert_eq!((alarms(&daemon), audited(&daemon, "unaccounted")), (vec![], 0.0));
    daemon.drains();
}

#[test]
fn a_restored_database_raises_no_alarm() {
    // GIVEN a backup, and payments written after it
    let scope = Scope::ready("audit_restored", 2, 2);
    let member = member().with("AUDIT__SHARE", "1");
    scope.produce(&scope.input_topic, payments(0..50, 0));
    member.catch_up(&scope);
    scope.back_up_database();
    let mut daemon = member.start(&scope);
    daemon.wait_until_ready();
    scope.produce(&scope.input_topic, payments(100..200, 0));
    scope.produce(&scope.input_topic, payments(200..300, 1));
    scope.wait_until_caught_up();

    // WHEN the backup replaces the database under the running daemon
    scope.restore_database();

    // THEN what is written again is audited, and there is no alarm
    wait_until_within(PATIENCE, "the rows are written again", || scope.count("payment_core") == 250);
    wait_until_within(PATIENCE, "they are audited", || audited(&daemon, "owned") >= 200.0);
    assert_eq!((alarms(&daemon), audited(&daemon, "unaccounted")), (vec![], 0.0));
    daemon.drains();
}
