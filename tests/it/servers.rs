//! Tests of the harness itself: if these fail, no other result means anything.

use std::process::Command;

use crate::support::{Act, Flow, Load, Marker, Message, Scope, Servers, StoredBatch, wait_until};

#[test]
fn records_come_back_as_they_were_sent() {
    let scope = Scope::new(Servers::shared(), "round_trip");
    scope.create_topics(3, 2);
    let sent = Message::new("57", "{}").header("correlation-id", "c-1").timestamp_ms(1_600_000_000_000);
    let places = scope
        .produce(&scope.input_topic, [sent.clone(), Message { partition: Some(2), ..Message::default() }]);

    let received = scope.read_all(&scope.input_topic);

    assert_eq!(received.len(), 2);
    let with_key = received.iter().find(|record| record.key.is_some()).unwrap();
    assert_eq!((with_key.partition, with_key.offset), places[0]);
    assert_eq!(with_key.key_text(), "57");
    assert_eq!(with_key.json(), serde_json::json!({}));
    assert_eq!(with_key.header("correlation-id"), "c-1");
    assert_eq!(with_key.timestamp_ms, Some(1_600_000_000_000));
    let without = received.iter().find(|record| record.key.is_none()).unwrap();
    assert_eq!((without.partition, &without.value), (2, &None));
}

#[test]
fn only_committed_transactions_are_read() {
    let scope = Scope::new(Servers::shared(), "transactions");
    scope.create_topic(&scope.input_topic, 1);
    scope.produce_in_transaction(&scope.input_topic, [Message::new("1", "aborted")], false);
    scope.produce_in_transaction(&scope.input_topic, [Message::new("1", "committed")], true);

    let received = scope.read_all(&scope.input_topic);

    assert_eq!(received.iter().map(|r| r.value.as_deref().unwrap()).collect::<Vec<_>>(), [b"committed"]);
}

/// At least half of the records in transactions, some of which are aborted; compressed.
fn assert_written_as_real_producers_do(batches: &[StoredBatch], committed: usize) {
    let records = |is: &dyn Fn(&StoredBatch) -> bool| -> usize {
        let data = batches.iter().filter(|batch| batch.marker.is_none());
        data.filter(|batch| is(batch)).map(|batch| batch.records).sum()
    };
    let (all, transactional) = (records(&|_| true), records(&|batch| batch.is_transactional));
    assert!(2 * transactional >= all && transactional < all, "{transactional} of {all} are in transactions");
    assert!(records(&|batch| batch.codec != "none") > 0, "nothing is compressed");
    assert!(all > committed, "no aborted record is in the log");
    let markers = |wanted| batches.iter().filter(|batch| batch.marker == Some(wanted)).count();
    assert!(markers(Marker::Abort) > 0 && markers(Marker::Commit) > markers(Marker::Abort), "{batches:?}");
    assert!(batches.last().unwrap().marker.is_some(), "the log does not end with a control record");
}

#[test]
fn fed_records_are_written_as_real_producers_write() {
    let scope = Scope::new(Servers::shared(), "feed");
    scope.create_topic(&scope.input_topic, 1);
    let mut load = Load::new(1);
    let mut places = Vec::new();
    // Sizes vary: the largest transaction has as many records as are fed.
    for count in [1, 60, 400, 2_500].into_iter().cycle().take(12) {
        places.extend(scope.feed(load.take(count)));
    }
    let received = scope.read_all(&scope.input_topic);
    assert_eq!(received.iter().map(|r| (r.partition, r.offset)).collect::<Vec<_>>(), places);
    assert_written_as_real_producers_do(&scope.batches(&scope.input_topic, 0), places.len());
}

#[test]
fn a_flow_is_written_as_real_producers_write() {
    let scope = Scope::new(Servers::shared(), "flow");
    scope.create_topic(&scope.input_topic, 1);
    let flow = Flow::start(&scope, Load::new(2), 20);
    wait_until("transactions were committed and aborted", || {
        flow.written().iter().any(|written| written.committed >= 30 && written.aborted > 0)
    });
    flow.pause();
    let written: usize = flow.written().iter().map(|written| written.records).sum();
    assert_eq!(scope.read_all(&scope.input_topic).len(), written);
    assert_written_as_real_producers_do(&scope.batches(&scope.input_topic, 0), written);
    // AND it continues
    flow.resume();
    wait_until("more comes", || flow.written().iter().map(|w| w.records).sum::<usize>() > written);
    drop(flow.end());
}

#[test]
fn each_scope_has_a_database_of_its_own() {
    let one = Scope::new(Servers::shared(), "database");
    let other = Scope::new(Servers::shared(), "database");
    one.execute("CREATE TABLE mine AS SELECT 1 AS x");
    assert_eq!(one.sql("SELECT x FROM mine", &[])[0].get::<_, i32>(0), 1);
    assert!(other.sql("SELECT 1 FROM pg_tables WHERE tablename = 'mine'", &[]).is_empty());
    one.recreate_database();
    assert!(one.sql("SELECT 1 FROM pg_tables WHERE tablename = 'mine'", &[]).is_empty());
}

#[test]
fn servers_keep_port_and_data_when_they_are_killed_and_started() {
    let servers = Servers::own();
    let scope = Scope::new(&servers, "restart");
    scope.create_topic(&scope.input_topic, 1);
    scope.produce(&scope.input_topic, [Message::new("1", "before")]);
    scope.execute("CREATE TABLE kept AS SELECT 7 AS x");

    for (postgres, kafka) in [(Act::Kill, Act::Kill), (Act::Immediate, Act::Stop)] {
        servers.postgres(postgres);
        servers.kafka(kafka);
        servers.postgres(Act::Start);
        servers.kafka(Act::Start);
        assert_eq!(scope.sql("SELECT x FROM kept", &[])[0].get::<_, i32>(0), 7);
        assert_eq!(scope.read_all(&scope.input_topic).len(), 1);
    }
}

#[test]
fn servers_end_with_the_process_that_owns_them() {
    let dir = Servers::shared().dir().join("orphan");
    let mut owner = Command::new("sleep").arg("600").spawn().unwrap();
    let up = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/servers"))
        .args(["up", "--owner-pid", &owner.id().to_string(), "--dir"])
        .arg(&dir)
        .output()
        .unwrap();
    assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));

    owner.kill().unwrap();

    // The owner may not be reaped yet: a zombie process has ended, too.
    wait_until("the servers and their data are gone", || !dir.exists());
    owner.wait().unwrap();
}
