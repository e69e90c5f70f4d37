//! The harness itself: if these fail, no other result means anything.

use std::process::Command;

use crate::support::{Act, Message, Scope, Servers, wait_until};

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

    // The owner is not reaped yet: a process that only waits for that is gone, too.
    wait_until("the servers and their data are gone", || !dir.exists());
    owner.wait().unwrap();
}
