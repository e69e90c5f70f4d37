//! Group offsets and cursors that were moved, lost or restored: nothing is lost and nothing is sent twice.

use std::collections::BTreeMap;

use serde_json::Value;
use uuid::Uuid;

use crate::replication::{DAY_MS, now_ms};
use crate::support::{
    Check, Finished, Flow, Load, Member, Message, PATIENCE, Scope, Servers, wait_until_within,
};

fn member() -> Member {
    Member::new("a").soon_forgotten()
}

/// A table's rows as texts, sorted.
fn rows(scope: &Scope<'_>, table: &str) -> Vec<String> {
    let query =
        format!("SELECT (to_jsonb(t) - 'date')::text AS row FROM payment_writer.{table} t ORDER BY row");
    scope.sql(&query, &[]).iter().map(|row| row.get(0)).collect()
}

/// The rows that depend on the log alone.
fn payments(scope: &Scope<'_>) -> Vec<Vec<String>> {
    ["payment_core", "payment_metadata", "payment_notes", "idempotency"].map(|t| rows(scope, t)).into()
}

/// Like `assert_eq`, but prints only the differences.
#[track_caller]
fn same(found: &[Vec<String>], expected: &[Vec<String>]) {
    for (found, expected) in found.iter().zip(expected) {
        let missing: Vec<_> = expected.iter().filter(|row| !found.contains(row)).collect();
        let extra: Vec<_> = found.iter().filter(|row| !expected.contains(row)).collect();
        assert!(missing.is_empty() && extra.is_empty(), "missing: {missing:#?}\nextra: {extra:#?}");
    }
}

fn outputs(scope: &Scope<'_>) -> usize {
    [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic]
        .map(|t| scope.read_all(t).len())
        .iter()
        .sum()
}

fn says(finished: &Finished, code: i32, text: &str) {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    assert!(finished.stdout.contains(text) || finished.stderr.contains(text), "no {text:?}: {finished:?}");
}

#[test]
fn group_offsets_moved_back_or_deleted_after_a_drain_send_nothing_twice() {
    // GIVEN a drained group
    let scope = Scope::new(Servers::shared(), "moved_back");
    scope.prepare(4, 2);
    let mut load = Load::new(11);
    let partitions = [0, 1, 2, 3];
    scope.spread(load.take(120), &partitions);
    member().catch_up(&scope);

    // THEN each of its offsets has our commit metadata: version, topic, offset, database
    let identity = scope.sql(
        "SELECT topic_id, database_id FROM payment_writer.bound_group, payment_writer.database_identity",
        &[],
    );
    let [topic, database] = [0, 1].map(|column| identity[0].get::<_, Uuid>(column).simple());
    let committed = scope.committed_all();
    assert_eq!(committed.len(), 4);
    for (offset, text) in committed.values() {
        assert_eq!(text, &format!("pw1 {topic} {offset} {database}"));
    }

    // WHEN offsets are moved back with and without the old metadata, and then all deleted
    for (partition, offset, text) in [(0, 0, ""), (1, 10, committed[&1].1.as_str()), (2, 29, "by hand")] {
        scope.move_group_offset(partition, offset, text);
    }
    scope.spread(load.take(40), &partitions);
    member().catch_up(&scope);

    // THEN nothing is sent twice, and new records are not lost
    scope.assert_exactly_once();

    scope.delete_group_when_empty();
    scope.spread(load.take(40), &partitions);
    member().catch_up(&scope);
    scope.assert_exactly_once();
}

#[test]
fn only_uncertain_partitions_halt_until_an_operator_resolves_them_beside_the_running_daemon() {
    // GIVEN six partitions, written up to 20, and 20 more records in all but one
    let scope = Scope::new(Servers::shared(), "doubts");
    scope.prepare(6, 2);
    let mut load = Load::new(12);
    scope.spread(load.take(120), &[0, 1, 2, 3, 4, 5]);
    member().catch_up(&scope);
    scope.spread(load.take(100), &[0, 1, 2, 3, 5]);
    let removed =
        scope.read_all(&scope.input_topic).into_iter().filter(|r| r.partition == 3 && r.offset < 20);
    let removed = removed.collect();

    // WHEN two offsets are moved over unwritten records, retention removes some, and a cursor is beyond the
    // end
    scope.move_group_offset(1, 33, "");
    scope.move_group_offset(2, 37, "");
    scope.delete_records(3, 30);
    scope.execute("UPDATE payment_writer.source_cursor SET applied = 25, published = 25 WHERE partition = 4");
    let mut daemon = member().start(&scope);

    // THEN those partitions halt, each with the commands that resolve it, and the others continue
    let doubt = |partition: i32| daemon.status()["partitions"][partition.to_string()]["halted"].clone();
    let settled = |partition: i32| scope.committed_all()[&partition].0 == 40 && doubt(partition).is_null();
    wait_until_within(PATIENCE, "three partitions are halted", || {
        [1, 2, 3].iter().all(|partition| !doubt(*partition).is_null())
    });
    wait_until_within(PATIENCE, "the others continue", || settled(0) && settled(5));
    for (partition, label, advice) in [
        (1, "moved_forward", "cursors accept --partition 1 --published 20"),
        (2, "moved_forward", "cursors skip --partition 2 --to 37"),
        (3, "log_gap", "cursors skip --partition 3 --to 30"),
    ] {
        assert_eq!(doubt(partition)["doubt"], label);
        assert!(doubt(partition)["advice"].as_str().unwrap().contains(advice), "{}", doubt(partition));
        assert!(daemon.log().contains(advice), "{}", daemon.log());
    }
    assert!(daemon.metric("payment_writer_partitions_halted", "") >= 3.0);
    assert_eq!(scope.cursors()[&1].0, 20, "nothing of a halted partition is written");
    let shown: Value =
        serde_json::from_str(&scope.command(&["cursors", "show", "--json"]).succeeds().stdout).unwrap();
    assert_eq!((&shown[0]["state"], &shown[1]["state"]), (&"fine".into(), &"halted".into()), "{shown}");
    assert_eq!(shown[2]["doubt"], "moved_forward");

    // WHEN commands are run that have nothing to do, or must be rejected
    let state = || (scope.cursors()[&1], rows(&scope, "cursor_settlement"), rows(&scope, "cursor_audit"));
    let before = state();
    let accept = ["cursors", "accept", "--partition", "1", "--published", "20"];
    let apply = ["--apply", "--reason", "a test"];
    says(&scope.command(&accept), 0, "nothing was changed");
    says(&scope.command(&[&accept[..], &["--apply"]].concat()), 2, "--reason");
    let beyond = ["cursors", "accept", "--partition", "1", "--published", "33"];
    says(&scope.command(&[&beyond[..], &apply].concat()), 2, "not written yet");
    let healthy = ["cursors", "skip", "--partition", "0", "--to", "40"];
    says(&scope.command(&[&healthy[..], &apply].concat()), 1, "is not halted");
    says(&scope.command(&["cursors", "skip", "--partition", "6", "--to", "0"]), 2, "no partition 6");

    // THEN nothing has changed
    assert_eq!(before, state());

    // WHEN the operator resolves the halts, beside the running daemon
    scope.command(&[&accept[..], &apply].concat()).succeeds();
    for (partition, to) in [("2", "37"), ("3", "30")] {
        let skip = ["cursors", "skip", "--partition", partition, "--to", to];
        scope.command(&[&skip[..], &apply].concat()).succeeds();
    }

    // THEN it continues from there by itself
    wait_until_within(PATIENCE, "the resolved partitions continue", || {
        settled(1) && settled(2) && settled(3)
    });

    // AND a cursor beyond the end is taken for a lagging leader for half a minute, then it is a halt reason
    wait_until_within(PATIENCE, "the partition beyond its end is halted", || {
        doubt(4)["doubt"] == "beyond_end"
    });
    let skip = ["cursors", "skip", "--partition", "4", "--to", "20"];
    scope.command(&[&skip[..], &apply].concat()).succeeds();
    scope.spread(load.take(7), &[4]);
    scope.wait_until_caught_up();
    wait_until_within(PATIENCE, "no partition is halted", || {
        daemon.metric("payment_writer_partitions_halted", "") == 0.0
    });

    // AND who resolved what, and why, is recorded
    let audit = scope.sql("SELECT command, partition, before->>'doubt', reason, who FROM payment_writer.cursor_audit ORDER BY id", &[]);
    let audit: Vec<(String, i32, String)> = audit
        .iter()
        .map(|r| {
            assert_eq!((r.get::<_, &str>(3), r.get::<_, &str>(4)), ("a test", "payment_writer"));
            (r.get(0), r.get(1), r.get(2))
        })
        .collect();
    let expected = [
        ("cursors accept --published 20", 1, "moved_forward"),
        ("cursors skip --to 37", 2, "moved_forward"),
        ("cursors skip --to 30", 3, "log_gap"),
        ("cursors skip --to 20", 4, "beyond_end"),
    ];
    assert_eq!(audit, expected.map(|(c, p, d)| (c.to_owned(), p, d.to_owned())));
    daemon.drains();

    // WHEN the database is restored to the moment of a decision
    assert_eq!(rows(&scope, "cursor_settlement"), [""; 0]);
    scope.execute(
        "INSERT INTO payment_writer.cursor_settlement (topic_id, partition, committed, replaces)
         SELECT topic_id, 1, 20, '33 ' FROM payment_writer.source_cursor WHERE partition = 1",
    );
    let shown: Value =
        serde_json::from_str(&scope.command(&["cursors", "show", "--json"]).succeeds().stdout).unwrap();
    assert_eq!(shown[1]["state"], "fine");
    let log = member().catch_up(&scope).log();

    // THEN it is dropped, since the group has gone on, and no event is sent again
    assert!(log.contains("an operator's decision is dropped"), "{log}");
    assert_eq!(rows(&scope, "cursor_settlement"), [""; 0]);
    let outcomes = Check::of(&scope).removed(removed).given_up(2, 20..37).holds();
    assert_eq!(outcomes.given_up, 17);
}

#[test]
fn a_partition_that_stays_halted_is_logged_once_and_scanned_for_once() {
    // GIVEN a written partition whose group offset was moved over records that are not
    let scope = Scope::new(Servers::shared(), "told_once");
    scope.prepare(1, 1);
    let mut load = Load::new(21);
    scope.spread(load.take(20), &[0]);
    member().catch_up(&scope);
    scope.spread(load.take(20), &[0]);
    scope.move_group_offset(0, 33, "");
    let mut daemon = member().start(&scope);
    let halted = |daemon: &crate::support::Daemon| daemon.metric("payment_writer_partitions_halted", "");
    wait_until_within(PATIENCE, "the partition is halted", || halted(&daemon) == 1.0);

    // WHEN it is checked again, at least twice, and then twice with another row
    let looks = || {
        let query = "SELECT query_start::text FROM pg_stat_activity
             WHERE datname = current_database() AND query LIKE '%FROM payment_writer.source_cursor c%LEFT JOIN%'
                AND pid <> pg_backend_pid() ORDER BY backend_start LIMIT 1";
        scope.sql(query, &[]).iter().map(|row| row.get::<_, String>(0)).next()
    };
    let mut seen = std::collections::BTreeSet::new();
    wait_until_within(PATIENCE, "it was checked again", || {
        assert_eq!(halted(&daemon), 1.0);
        seen.extend(looks());
        seen.len() >= 4
    });
    let told = |text: &str| daemon.log().matches(text).count();
    assert_eq!(told("searched the outputs for what was sent"), 1, "{}", daemon.log());
    for published in [19, 18] {
        let sql = format!("UPDATE payment_writer.source_cursor SET published = {published}");
        scope.execute(&sql);
        wait_until_within(PATIENCE, "the other row was seen", || {
            assert_eq!(halted(&daemon), 1.0);
            daemon.status()["partitions"]["0"]["unpublished_from"] == published
        });
    }
    wait_until_within(PATIENCE, "the other rows were searched for", || {
        assert_eq!(halted(&daemon), 1.0);
        told("searched the outputs for what was sent") == 3
    });

    // THEN it is logged once, and stays halted
    assert_eq!(told("partition halted"), 1, "{}", daemon.log());
    let doubt = daemon.status()["partitions"]["0"]["halted"]["doubt"].clone();
    assert_eq!(doubt, "moved_forward");

    // AND continues as soon as it is resolved
    let accept = ["cursors", "accept", "--partition", "0", "--published", "20"];
    scope.command(&[&accept[..], &["--apply", "--reason", "a test"]].concat()).succeeds();
    scope.wait_until_caught_up();
    wait_until_within(PATIENCE, "no partition is halted", || halted(&daemon) == 0.0);
    daemon.drains();
    scope.assert_exactly_once();
}

#[test]
fn the_output_scan_proves_what_was_sent_when_the_groups_offsets_are_lost() {
    // GIVEN partitions with a history, and a process that crashes at a step of a batch
    let scope = Scope::new(Servers::shared(), "proved");
    scope.prepare(4, 3);
    let mut load = Load::new(18);
    let partitions = [0, 1, 2, 3];
    let member = member().with("LANES", "2").with("BATCH__MAX_PAYMENTS", "20");
    scope.spread(load.take(80), &partitions);
    member.catch_up(&scope);
    let steps = [
        // Rows without events; events without a copy of the group's offset; a transaction left open.
        ("after_postgres_commit:2", None),
        ("after_kafka_commit:2", None),
        ("before_kafka_commit:2", None),
        ("after_kafka_commit:3", Some("by hand")),
    ];
    for (step, moved) in steps {
        scope.spread(load.take(160), &partitions);
        member.die_at(&scope, step);

        // WHEN the group's offsets are deleted, or moved back by hand
        match moved {
            None => scope.delete_group_when_empty(),
            Some(text) => {
                for (partition, (offset, _)) in scope.committed_all() {
                    scope.move_group_offset(partition, offset / 2, text);
                }
            }
        }
        let daemon = member.catch_up(&scope);

        // THEN the output scan finds what was sent, and nothing is lost or sent twice
        assert!(daemon.log().contains("searched the outputs for what was sent"), "{}", daemon.log());
        eprintln!("{step}: {:?}", scope.assert_exactly_once());
    }
}

#[test]
fn an_older_database_and_lost_group_offsets_together_send_nothing_twice() {
    // GIVEN a copy of a drained group's database, after which more was written and sent
    let scope = Scope::new(Servers::shared(), "older_and_lost");
    scope.prepare(3, 2);
    let mut load = Load::new(19);
    scope.produce(&scope.input_topic, load.take(60));
    member().catch_up(&scope);
    scope.back_up_database();
    scope.produce(&scope.input_topic, load.take(90));
    member().catch_up(&scope);

    // WHEN the copy replaces it, and the group's offsets are deleted as well
    scope.restore_database();
    scope.delete_group_when_empty();
    scope.produce(&scope.input_topic, load.take(30));
    member().catch_up(&scope);

    // THEN rows are written again, and events are not sent again
    scope.assert_exactly_once();
}

#[test]
fn an_older_or_empty_database_and_older_group_offsets_together_send_nothing_twice() {
    // GIVEN copies of a drained group's database and of its offsets, after which more was written and sent
    let scope = Scope::new(Servers::shared(), "both_older");
    scope.prepare(3, 2);
    let mut load = Load::new(23);
    scope.produce(&scope.input_topic, load.take(60));
    let restore_group = |copy: &BTreeMap<i32, (i64, String)>| {
        for (partition, (offset, metadata)) in copy {
            scope.move_group_offset(*partition, *offset, metadata);
        }
    };
    member().catch_up(&scope);
    scope.back_up_database();
    scope.produce(&scope.input_topic, load.take(60));
    member().catch_up(&scope);
    let older = scope.committed_all();
    scope.produce(&scope.input_topic, load.take(90));
    member().catch_up(&scope);

    // WHEN a copy of the database replaces it, and the copy of the offsets, which is younger, replaces those
    scope.restore_database();
    restore_group(&older);
    scope.produce(&scope.input_topic, load.take(30));
    member().catch_up(&scope);

    // THEN rows are written again, and events are not sent again
    scope.assert_exactly_once();

    // AND neither with an empty database
    restore_group(&older);
    scope.recreate_database();
    scope.command(&["migrate"]).succeeds();
    scope.produce(&scope.input_topic, load.take(30));
    let mut adopting = member().run(&scope, &["run", "--until-caught-up", "--adopt-database"]);
    assert_eq!(adopting.wait().code(), Some(0), "{}", adopting.log());
    scope.assert_exactly_once();
}

#[test]
fn events_of_records_stamped_ahead_are_found_where_brokers_let_them_be() {
    // GIVEN a topic that accepts every timestamp, as before Kafka 4, and payments two days ahead, whose events were sent
    // yesterday
    let scope = Scope::new(Servers::shared(), "stamped_ahead");
    let any_time = ("message.timestamp.after.max.ms", "9223372036854775807");
    scope.create_topics_with(1, 1, &[any_time]);
    scope.command(&["migrate"]).succeeds();
    let ahead = |message: Message| message.partition(0).timestamp_ms(now_ms() + 2 * DAY_MS);
    let mut load = Load::new(31);
    scope.produce(&scope.input_topic, load.take(40).into_iter().map(ahead));
    let others = [&scope.read_topic, &scope.email_topic].map(|topic| format!("{topic}_others"));
    for topic in &others {
        scope.create_topic(topic, 1);
    }
    scope.drain_with(&[
        ("PAYMENT_WRITER__KAFKA__READ_TOPIC", &others[0]),
        ("PAYMENT_WRITER__KAFKA__EMAIL_TOPIC", &others[1]),
    ]);
    for (from, to) in others.iter().zip([&scope.read_topic, &scope.email_topic]) {
        let sent = scope.read_all(from).into_iter().map(|event| Message {
            key: event.key,
            value: event.value,
            headers: event.headers,
            timestamp_ms: Some(now_ms() - DAY_MS),
            partition: Some(0),
        });
        scope.produce(to, sent);
    }

    // WHEN the group's offsets are lost, and the copy in the database is older
    scope.delete_group_when_empty();
    scope.execute("UPDATE payment_writer.source_cursor SET published = 0");
    scope.produce(&scope.input_topic, load.take(10).into_iter().map(ahead));
    let log = member().catch_up(&scope).log();

    // THEN they are not sent again, and the setting is named
    scope.assert_exactly_once();
    assert!(log.contains("has message.timestamp.after.max.ms=9223372036854775807"), "{log}");
}

#[test]
fn until_caught_up_waits_until_the_group_has_assigned_the_partitions() {
    // GIVEN an older copy of a drained group's database, and a member that stopped and is not forgotten yet
    let scope = Scope::new(Servers::shared(), "not_assigned");
    scope.prepare(3, 2);
    let mut load = Load::new(29);
    let stopped = Member::new("b").with_session("8000", "1000");
    scope.produce(&scope.input_topic, load.take(60));
    stopped.catch_up(&scope);
    scope.back_up_database();
    scope.produce(&scope.input_topic, load.take(60));
    stopped.catch_up(&scope);
    scope.restore_database();

    // WHEN another one runs until all is caught up, which has to wait for the group
    member().catch_up(&scope);

    // THEN it has written what the copy did not have
    scope.assert_exactly_once();
}

#[test]
fn unproved_events_halt_their_partition_until_an_operator_states_which_were_sent() {
    // GIVEN a process that crashed between its two commits, a group whose offsets were deleted, and outputs
    // from which retention removed the events that would prove what was sent
    let scope = Scope::new(Servers::shared(), "unproved");
    scope.prepare(3, 2);
    let mut load = Load::new(13);
    scope.spread(load.take(30), &[0, 1, 2]);
    let member = member().with("LANES", "1").with("BATCH__MAX_PAYMENTS", "20");
    member.catch_up(&scope);
    scope.spread(load.take(90), &[0, 1]);
    member.die_at(&scope, "after_postgres_commit:2");
    let sent = scope.committed_all();
    let in_doubt: Vec<i32> =
        scope.cursors().iter().filter(|(_, c)| c.1 != Some(c.0)).map(|(partition, _)| *partition).collect();
    assert!(!in_doubt.is_empty() && !in_doubt.contains(&2), "{:?}", scope.cursors());
    scope.delete_group_when_empty();
    let topics = [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic];
    let mut removed = topics.map(|topic| scope.read_all(topic));
    for (topic, records) in topics.iter().zip(&mut removed) {
        for partition in [0, 1] {
            let end = records.iter().filter(|r| r.partition == partition).map(|r| r.offset + 1).max();
            scope.delete_records_of(topic, partition, end.unwrap_or_default());
        }
    }

    // WHEN the daemon starts
    scope.spread(load.take(10), &[2]);

    // THEN it continues where the state is certain, and halts the other partitions
    member.refuses(&scope, &["run", "--until-caught-up"], "halted partition");
    let mut daemon = member.start(&scope);
    wait_until_within(PATIENCE, "the partitions are halted", || {
        let status = daemon.status();
        in_doubt.iter().all(|p| status["partitions"][p.to_string()]["halted"]["doubt"] == "unproved_events")
    });

    // WHEN the operator states what was sent
    for partition in &in_doubt {
        let (partition, published) = (partition.to_string(), sent[partition].0.to_string());
        let accept = ["cursors", "accept", "--partition", &partition, "--published", &published];
        scope.command(&[&accept[..], &["--apply", "--reason", "seen in the outputs"]].concat()).succeeds();
    }

    // THEN each event was sent once
    scope.wait_until_caught_up();
    daemon.drains();
    Check::of(&scope).outputs_removed(removed).holds();
}

#[test]
fn a_recreated_topic_stops_the_daemon_and_keeps_it_stopped() {
    let scope = Scope::new(Servers::shared(), "made_again");
    scope.prepare(2, 2);
    let mut load = Load::new(14);
    scope.produce(&scope.input_topic, load.take(50));
    let mut daemon = member().start(&scope);
    scope.wait_until_caught_up();
    let (before, sent) = (payments(&scope), outputs(&scope));

    // WHEN the topic is deleted and created again, with fewer records than were read from the old one
    scope.delete_topic(&scope.input_topic);
    wait_until_within(PATIENCE, "the topic is created again", || {
        std::panic::catch_unwind(|| scope.create_topic(&scope.input_topic, 2)).is_ok()
    });
    scope.produce(&scope.input_topic, load.take(15));

    // THEN the running daemon stops, and none can be started
    daemon.ends_for_a_person("deleted and recreated");
    member().refuses(&scope, &["run"], "another cluster, or a topic that was deleted and recreated");
    // AND nothing of the new topic was written or published
    assert!(payments(&scope) == before, "rows of the new topic were written");
    assert_eq!(outputs(&scope), sent);
}

#[test]
fn a_group_and_a_database_that_do_not_belong_together_stop_the_daemon() {
    // GIVEN a group and its database
    let scope = Scope::new(Servers::shared(), "strangers");
    scope.prepare(3, 2);
    let mut load = Load::new(15);
    scope.produce(&scope.input_topic, load.take(150));
    member().catch_up(&scope);
    let before = payments(&scope);

    // THEN another group cannot write to that database
    let other_group = format!("{}_other", scope.group_id);
    member().with("KAFKA__GROUP_ID", &other_group).refuses(&scope, &["run"], "bound to group");
    let accept =
        ["cursors", "accept", "--partition", "0", "--published", "0", "--apply", "--reason", "a test"];
    says(
        &scope.command_with(&accept, &[("PAYMENT_WRITER__KAFKA__GROUP_ID", &*other_group)]),
        3,
        "bound to group",
    );
    // AND a mode without events needs another group, too
    member().with("KAFKA__PUBLISH", "false").refuses(&scope, &["run"], "bound to group");

    // WHEN the database is replaced by an empty one
    scope.recreate_database();
    scope.command(&["migrate"]).succeeds();
    // THEN the daemon does not accept it as the group's database on its own
    member().refuses(&scope, &["run"], "--adopt-database");
    assert_eq!((scope.count("payment_core"), scope.count("idempotency")), (0, 0));

    // WHEN the operator confirms it, and the process crashes on the way
    let sent = outputs(&scope);
    let mut dying = member().run_at(&scope, &["run", "--adopt-database"], "after_postgres_commit");
    assert_eq!(dying.wait().code(), None, "{}", dying.log());
    let mut adopting = member().run(&scope, &["run", "--until-caught-up", "--adopt-database"]);
    assert_eq!(adopting.wait().code(), Some(0), "{}", adopting.log());

    // THEN the rows are the same as before, and no event was sent again
    same(&payments(&scope), &before);
    assert_eq!(outputs(&scope), sent);
    // AND from then on it is the group's database
    scope.produce(&scope.input_topic, load.take(50));
    member().catch_up(&scope);
    scope.assert_exactly_once();
}

#[test]
fn rows_can_be_written_without_events_by_a_group_of_their_own() {
    let scope = Scope::new(Servers::shared(), "rows_only");
    // The output topics need not exist.
    scope.create_topic(&scope.input_topic, 3);
    scope.command(&["migrate"]).succeeds();
    let mut load = Load::new(16);
    let member =
        member().with("KAFKA__PUBLISH", "false").with("LANES", "1").with("BATCH__MAX_PAYMENTS", "20");
    scope.produce(&scope.input_topic, load.take(100));

    // WHEN the daemon crashes between rows and offsets, has its offsets deleted, and continues
    member.catch_up(&scope);
    scope.produce(&scope.input_topic, load.take(100));
    member.die_at(&scope, "after_postgres_commit:2");
    member.catch_up(&scope);
    scope.delete_group_when_empty();
    scope.produce(&scope.input_topic, load.take(20));
    member.catch_up(&scope);

    // THEN every row was written once, nothing was published, and the database records the mode
    for topic in [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic] {
        scope.create_topic(topic, 1);
    }
    Check::of(&scope).rows_only().holds();
    // AND it cannot be changed to a mode that publishes: what was sent would be unknown
    self::member().refuses(&scope, &["run"], "bound to group");
    assert_eq!(outputs(&scope), 0);
}

#[test]
fn of_two_daemons_with_one_instance_id_the_first_is_fenced_and_stops() {
    let scope = Scope::new(Servers::shared(), "one_name");
    scope.prepare(4, 2);
    let flow = Flow::start(&scope, Load::new(17), 8);
    let mut first = member().start(&scope);
    first.wait_for_partitions("the first has all partitions", |partitions| partitions == 4);
    let mut second = member().start(&scope);
    first.ends_for_a_person("kafka.instance_id");
    second.wait_for_partitions("the second has all partitions", |partitions| partitions == 4);
    drop(flow.end());
    scope.drains_exactly_once([&mut second]);
}

#[test]
fn a_database_restored_to_an_older_state_gets_its_rows_again_and_no_event_twice() {
    // GIVEN a backup from the middle of the history
    let scope = Scope::new(Servers::shared(), "restored");
    scope.prepare(3, 2);
    let mut load = Load::new(18);
    let member = member().with("LANES", "1").with("BATCH__MAX_PAYMENTS", "30");
    scope.produce(&scope.input_topic, load.take(150));
    member.catch_up(&scope);
    scope.back_up_database();
    scope.produce(&scope.input_topic, load.take(150));
    member.catch_up(&scope);
    let (before, sent) = (payments(&scope), outputs(&scope));

    // WHEN it is restored, the process crashes while it writes the rows again, and then, at the worst moment,
    // the group's offsets are deleted
    scope.restore_database();
    assert!(payments(&scope) != before);
    let shown: Value =
        serde_json::from_str(&scope.command(&["cursors", "show", "--json"]).succeeds().stdout).unwrap();
    let lag = shown.as_array().unwrap().iter().map(|partition| partition["lag_records"].as_i64().unwrap());
    assert_eq!(lag.sum::<i64>(), 150, "what the backup lacks: {shown}");
    member.die_at(&scope, "after_postgres_commit:2");
    scope.delete_group_when_empty();
    member.catch_up(&scope);

    // THEN the rows are as before, and no event was sent again
    same(&payments(&scope), &before);
    assert_eq!(outputs(&scope), sent);
    scope.produce(&scope.input_topic, load.take(60));
    member.catch_up(&scope);
    scope.assert_exactly_once();

    // AND a running daemon also detects that its database was restored
    scope.back_up_database();
    let mut daemon = member.start(&scope);
    scope.produce(&scope.input_topic, load.take(90));
    scope.wait_until_caught_up();
    scope.restore_database();
    scope.produce(&scope.input_topic, load.take(60));
    scope.drains_exactly_once([&mut daemon]);
}

#[test]
fn a_schema_that_is_newer_than_known_is_refused_before_anything_is_written() {
    let scope = Scope::new(Servers::shared(), "too_new");
    scope.prepare(1, 1);
    scope.produce(&scope.input_topic, Load::new(19).take(5));
    // WHEN a later release has migrated the database in a way that requires that release
    scope.execute(
        "UPDATE payment_writer.schema_compatibility SET oldest_known_version = 999;
         INSERT INTO payment_writer.schema_history (version, name, applied_on, checksum)
         VALUES (999, 'later', now()::text, '0')",
    );
    let mut daemon = member().start(&scope);
    assert_eq!(daemon.wait().code(), Some(1), "{}", daemon.log());
    assert!(daemon.log().contains("version 999"), "{}", daemon.log());
    assert_eq!(scope.count("payment_core"), 0);
    assert!(scope.committed_all().is_empty());
}
