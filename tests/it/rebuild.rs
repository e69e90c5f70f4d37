//! A second database rebuilt from the log equals the first and can replace it.

use std::time::Duration;

use rdkafka::producer::Producer;
use serde_json::{Value, json};

use crate::input::leave_open;
use crate::reconcile::{is_fine, not_compared, texts};
use crate::support::{
    Finished, Flow, Load, Member, Message, PATIENCE, Payment, Scope, Servers, uuid_v4, wait_until_within,
};

const LANES: (&str, &str) = ("PAYMENT_WRITER__LANES", "1");

fn member() -> Member {
    Member::new("a").soon_forgotten()
}

fn second_name(scope: &Scope<'_>) -> String {
    format!("{}_second", scope.database)
}

/// Creates an empty database beside the scope's, and returns its URL.
fn second_database(scope: &Scope<'_>) -> String {
    let name = second_name(scope);
    scope.on_server(&[format!("CREATE DATABASE \"{name}\" OWNER payment_writer")]);
    scope.servers.postgres_url(&name)
}

fn rebuild(scope: &Scope<'_>, into: &str, arguments: &[&str], settings: &[(&str, &str)]) -> Finished {
    let into = [("PAYMENT_WRITER_REBUILD_INTO", into)];
    scope.command_with(&[&["rebuild", "--json"], arguments].concat(), &[&into, settings].concat())
}

#[track_caller]
fn says(finished: &Finished, code: i32) -> Value {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    serde_json::from_str(&finished.stdout).unwrap_or_else(|_| panic!("no JSON: {finished:?}"))
}

fn outputs(scope: &Scope<'_>) -> usize {
    [&scope.read_topic, &scope.email_topic, &scope.dead_letter_topic]
        .map(|t| scope.read_all(t).len())
        .iter()
        .sum()
}

#[test]
fn a_database_rebuilt_beside_the_daemon_is_equal_and_takes_over_without_an_event_twice() {
    // GIVEN a running daemon
    let mut scope = Scope::new(Servers::shared(), "rebuild_walk");
    scope.prepare(4, 2);
    scope.feed(Load::new(81).take(300));
    let mut daemon = member().start(&scope);
    let flow = Flow::start(&scope, Load::new(82), 5);
    wait_until_within(PATIENCE, "payments are written", || scope.count("payment_core") > 100);

    // WHEN a second database is rebuilt beside it; the rebuild crashes once
    let into = second_database(&scope);
    let dying = [LANES, ("PAYMENT_WRITER_FAILPOINT", "after_postgres_commit:1")];
    assert_eq!(rebuild(&scope, &into, &[], &dying).code, None);
    let said = says(&rebuild(&scope, &into, &[], &[]), 0);

    // THEN the two are equal up to the offsets that both have written
    assert_eq!((&said["is_equal"], &said["allowed"]["count"]), (&json!(true), &json!(0)), "{said:#}");
    assert!(said["equal"].as_u64().unwrap() > 100, "{said:#}");
    drop(flow.end());
    scope.wait_until_caught_up();

    // WHEN everything is stopped, the rebuild is finished, and the settings name the second database
    daemon.drains();
    let first_rows = scope.count("payment_core");
    let said = says(&rebuild(&scope, &into, &[], &[]), 0);
    assert_eq!(said["equal"], first_rows, "{said:#}");
    let sent = outputs(&scope);
    scope.database = second_name(&scope);
    // THEN the daemon does not accept it as the group's database on its own
    member().refuses(&scope, &["run"], "--adopt-database");
    // AND after the operator confirms it, it does, and no event is sent again
    let mut adopting = member().run(&scope, &["run", "--until-caught-up", "--adopt-database"]);
    assert_eq!(adopting.wait().code(), Some(0), "{}", adopting.log());
    assert_eq!(outputs(&scope), sent);

    // WHEN new records arrive
    scope.feed(Load::new(83).take(60));
    member().catch_up(&scope);
    // THEN they are written and published exactly once
    scope.assert_exactly_once();
    assert!(outputs(&scope) > sent);
    is_fine(&scope, &[]);
}

#[test]
fn differences_caused_by_the_write_order_are_listed_and_are_no_findings() {
    // GIVEN ids that are on two partitions, and were written first from the one with the higher offsets
    let mut scope = Scope::new(Servers::shared(), "rebuild_twins");
    scope.prepare(2, 2);
    let ids = 500..510;
    let at = |message: Message, partition| message.partition(partition);
    let filler = (0..20).map(|seed| at(Payment::new(uuid_v4(600 + seed), 3).message(), 1));
    scope.produce(&scope.input_topic, filler);
    scope
        .produce(&scope.input_topic, ids.clone().map(|seed| at(Payment::new(uuid_v4(seed), 3).message(), 1)));
    member().catch_up(&scope);
    // One duplicate for each id, and a conflict for every second one.
    let twin = |seed: u64| {
        Payment::new(uuid_v4(seed), 3).amount(if seed.is_multiple_of(2) { "10.50" } else { "11" })
    };
    scope.produce(&scope.input_topic, ids.map(|seed| at(twin(seed).message(), 0)));
    member().catch_up(&scope);
    scope.assert_exactly_once();
    assert_eq!(is_fine(&scope, &[])["allowed"]["count"], 0);
    // AND a record that this database once rejected
    scope.execute_unguarded(
        "SET search_path = payment_writer;
         DELETE FROM payment_core WHERE payment_id IN (SELECT payment_id FROM payment_metadata WHERE source_offset = 15);
         DELETE FROM payment_metadata WHERE source_offset = 15;
         DELETE FROM idempotency WHERE source_offset = 15;",
    );
    let refused = Message::new("3", "").header("source", scope.source(1, 15));
    scope.produce(&scope.dead_letter_topic, [refused.header("dlq-reason", "rejected_by_database")]);

    // WHEN it is rebuilt by one lane that reads both partitions
    let into = second_database(&scope);
    let together = [LANES, ("PAYMENT_WRITER__BATCH__LINGER", "6s")];
    let said = says(&rebuild(&scope, &into, &[], &together), 0);

    // THEN the lower offsets win, and both records of each id are listed
    let allowed = texts(&said["allowed"]);
    assert_eq!(allowed.len(), 10 + 10 + 1, "{allowed:#?}");
    let in_second =
        "0/3: several records have its message id: in the first database partition 1, offset 23 has it";
    let in_first =
        "1/23: several records have its message id: in the second database partition 0, offset 3 has it";
    let once_refused = "1/15: rejected by the first database, and dead-lettered";
    for expected in [in_second, in_first, once_refused] {
        assert!(allowed.iter().any(|text| text == expected), "{expected} is not in {allowed:#?}");
    }

    // WHEN the second database has replaced the first
    scope.database = second_name(&scope);
    let mut adopting = member().run(&scope, &["run", "--until-caught-up", "--adopt-database"]);
    assert_eq!(adopting.wait().code(), Some(0), "{}", adopting.log());
    // THEN rows and events of these ids belong to different records; that is reported, and is not a finding
    let (_, said) = crate::reconcile::reconcile_with(&scope, &[], &[]);
    let allowed = texts(&said["allowed"]);
    assert_eq!(allowed.len(), 20, "{said:#}");
    let twin = "1/22: several records have its message id: the rows are those of partition 0, offset 2";
    assert!(allowed.iter().any(|text| text == twin), "{allowed:#?}");
    // Except for the dead letter that this test wrote: that record has events, too.
    assert_eq!(texts(&said["findings"]), ["1/15: a dead letter, though it should be written"]);
}

#[test]
fn what_was_not_compared_is_named_and_hides_no_difference() {
    // GIVEN a payment of the first moment of the oldest month that is kept, and its rebuilt copy
    let scope = Scope::new(Servers::shared(), "rebuild_edges");
    scope.prepare(2, 1);
    let month = "SELECT (extract(epoch FROM date_trunc('month', now() AT TIME ZONE 'UTC')
        - interval '1 month') * 1000)::bigint";
    let payment = |seed: u64| Payment::new(uuid_v4(seed), 4).message().partition((seed % 2) as i32);
    let oldest: i64 = scope.sql(month, &[])[0].get(0);
    scope.produce(&scope.input_topic, [payment(0).timestamp_ms(oldest)]);
    scope.produce(&scope.input_topic, (1..6).map(payment));
    member().catch_up(&scope);
    let into = second_database(&scope);
    let compare = |code| {
        let months = [("PAYMENT_WRITER__RETENTION__PAYMENT_MONTHS", "1")];
        says(&rebuild(&scope, &into, &["--compare-only"], &months), code)
    };
    assert_eq!(says(&rebuild(&scope, &into, &[], &[]), 0)["equal"], 6);

    // WHEN the first has lost it
    let lose = |offset: i64| {
        scope.execute_unguarded(&format!(
            "SET search_path = payment_writer;
             DELETE FROM payment_core USING payment_metadata m WHERE m.payment_id = payment_core.payment_id
                 AND source_partition = 0 AND source_offset = {offset};
             DELETE FROM payment_metadata WHERE source_partition = 0 AND source_offset = {offset};
             DELETE FROM idempotency WHERE source_partition = 0 AND source_offset = {offset}"
        ));
    };
    lose(0);
    // THEN that is a difference: its month was not detached
    assert_eq!(texts(&compare(1)["findings"]), ["0/0: its rows are in the second database only"]);

    // WHEN its dead letter is behind an open transaction, for a while
    let producer = leave_open(&scope, &scope.dead_letter_topic, 0);
    let letter = Message::new("4", "").header("source", scope.source(0, 0));
    let letter = letter.header("dlq-reason", "rejected_by_database");
    scope.produce(&scope.dead_letter_topic, [letter.partition(0)]);
    let said = std::thread::scope(|threads| {
        let comparing = threads.spawn(|| compare(0));
        std::thread::sleep(Duration::from_secs(4));
        producer.abort_transaction(PATIENCE).unwrap();
        comparing.join().unwrap()
    });
    // THEN it is read
    assert_eq!(texts(&said["allowed"]), ["0/0: rejected by the first database, and dead-lettered"]);

    // WHEN the first has written more
    scope.produce(&scope.input_topic, (6..8).map(payment));
    member().catch_up(&scope);
    // THEN that is named, and no difference
    let further = ["0/3-4: written by one database so far", "1/3-4: written by one database so far"];
    assert_eq!(not_compared(&compare(0)), further);
    // AND where the first has no cursor, nothing counts as equal
    scope.execute("DELETE FROM payment_writer.source_cursor WHERE partition = 1");
    let said = compare(1);
    assert_eq!(not_compared(&said), ["!1/0-3: one database has no cursor", further[0]]);
    assert_eq!((&said["is_equal"], &said["findings"]["count"]), (&json!(false), &json!(0)));
}

#[test]
fn a_difference_is_reported_and_the_wrong_database_is_rejected() {
    // GIVEN a database and its rebuilt copy
    let scope = Scope::new(Servers::shared(), "rebuild_harms");
    scope.prepare(3, 2);
    scope.produce(
        &scope.input_topic,
        (0..12).map(|seed| Payment::new(uuid_v4(seed), 4).message().partition(1)),
    );
    member().catch_up(&scope);
    let (cursors, sent) = (scope.cursors(), outputs(&scope));

    // WHEN the target is the source database itself, or one with other contents
    let own = scope.postgres_url();
    for arguments in [&[][..], &["--compare-only"]] {
        let refused = rebuild(&scope, &own, arguments, &[]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains("that the group writes to"), "{refused:?}");
    }
    let others = Scope::new(Servers::shared(), "rebuild_others");
    others.command(&["migrate"]).succeeds();
    others.execute(
        "INSERT INTO payment_writer.payment_metadata VALUES (gen_random_uuid(), now(), now(), 1, gen_random_uuid(), 0, 0)",
    );
    let refused = rebuild(&scope, &others.postgres_url(), &[], &[]);
    assert_eq!((refused.code, refused.stderr.contains("must be empty")), (Some(2), true), "{refused:?}");
    assert_eq!(scope.command(&["rebuild"]).code, Some(2));
    let into = second_database(&scope);
    assert_eq!(rebuild(&scope, &into, &["--compare-only"], &[]).code, Some(1));
    // An empty database with the schema is not equal.
    let empty = Scope::new(Servers::shared(), "rebuild_empty");
    empty.command(&["migrate"]).succeeds();
    let refused = rebuild(&scope, &empty.postgres_url(), &["--compare-only"], &[]);
    assert_eq!(
        (refused.code, refused.stderr.contains("no rebuild has reached them")),
        (Some(1), true),
        "{refused:?}"
    );

    // THEN nothing is written, and with the right target nothing is sent
    assert_eq!(others.count("source_cursor"), 0);
    assert_eq!(says(&rebuild(&scope, &into, &[], &[]), 0)["equal"], 12);
    assert_eq!((scope.cursors(), outputs(&scope)), (cursors, sent));

    // WHEN either database is altered
    let mut second = Scope::new(Servers::shared(), "rebuild_second");
    second.database = second_name(&scope);
    let of = |offset: i64| {
        format!("(SELECT payment_id FROM payment_writer.payment_metadata WHERE source_offset = {offset})")
    };
    second.execute_unguarded(&format!(
        "UPDATE payment_writer.payment_core SET amount = 1 WHERE payment_id IN {};
         DELETE FROM payment_writer.payment_core WHERE payment_id IN {};
         DELETE FROM payment_writer.idempotency WHERE source_offset IN (4, 5);
         DELETE FROM payment_writer.payment_metadata WHERE source_offset = 5;
         INSERT INTO payment_writer.payment_metadata SELECT * FROM payment_writer.payment_metadata WHERE source_offset = 6",
        of(2),
        of(3)
    ));
    scope.execute_unguarded(
        "DELETE FROM payment_writer.payment_metadata WHERE source_offset = 7;
         DELETE FROM payment_writer.idempotency WHERE source_offset = 7",
    );

    // THEN each difference is reported
    let said = says(&rebuild(&scope, &into, &["--compare-only"], &[]), 1);
    assert_eq!(
        texts(&said["findings"]),
        [
            "1/2: its rows are not the same in both databases",
            "1/3: its rows are not the same in both databases",
            "1/4: its claim is not the same in both databases",
            "1/5: its rows are missing in the second database",
            "1/6: its rows are in the second database only",
            "1/7: its rows are in the second database only",
        ]
    );
}
