//! Logical replication of the database: publications of all tables, as other programs create them, and
//! subscribers of the payment tables.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::support::{Act, Member, Message, Payment, Scope, Servers, uuid_v7, wait_until};

const DAY_MS: i64 = 24 * 3_600_000;

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn payment(number: u64, at_ms: i64) -> Message {
    Payment::new(uuid_v7(at_ms, number), 7).message().timestamp_ms(at_ms)
}

fn months(scope: &Scope<'_>, table: &str) -> i64 {
    let query = "SELECT count(*) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                 WHERE i.inhparent = ('payment_writer.' || $1)::regclass AND c.relname <> $1 || '_default'";
    scope.sql(query, &[&table])[0].get(0)
}

/// Makes the current generation old enough for a rotation.
fn age_current(scope: &Scope<'_>) {
    scope.execute(
        "UPDATE payment_writer.idempotency_generation SET made_current_at = made_current_at - interval '8 days'
         WHERE state = 'current'",
    );
}

#[test]
fn months_are_made_beside_a_publication_of_all_tables() {
    // GIVEN a publication of all tables, as Debezium and blue/green deployments create it
    let scope = Scope::ready("publication", 1, 1);
    scope.execute_as_admin("CREATE PUBLICATION everything FOR ALL TABLES");
    let long_ago = now_ms() - 100 * DAY_MS;
    scope.produce(&scope.input_topic, (1..=10).map(|n| payment(n, long_ago)).chain([payment(11, now_ms())]));

    // WHEN a daemon writes payments of this month and of one that has no partition
    let daemon = scope.drain();

    // THEN it creates the months, and the next pass moves the rows
    let log = daemon.log();
    assert!(!log.contains("making months of the payment tables failed"), "{log}");
    assert_eq!(months(&scope, "payment_core"), 4, "{log}");
    assert_eq!((scope.count("payment_core_default"), scope.count("payment_core")), (10, 11));
    let pass = scope.command(&["prune"]).succeeds();
    assert!(pass.stdout.contains("rows moved from the default partitions: 20"), "{pass:?}");
    assert_eq!((scope.count("payment_core_default"), scope.count("payment_core")), (0, 11));

    // Rotating, pruning and archiving go on as well.
    age_current(&scope);
    let kept = [("PAYMENT_WRITER__RETENTION__PAYMENT_MONTHS", "2")];
    let pass = scope.command_with(&["prune"], &kept).succeeds();
    assert!(pass.stdout.contains("rotated: generation 2"), "{pass:?}");
    assert!(
        pass.stdout.contains("detached for archiving: payment_writer.archived_payment_core_"),
        "{pass:?}"
    );
}

#[test]
fn every_table_from_which_rows_are_deleted_has_a_replica_identity() {
    let scope = Scope::ready("identities", 1, 1);
    scope.execute("SELECT payment_writer.make_generation_v1(2)");
    let without = "
        SELECT c.relname::text FROM pg_class c
        WHERE c.relnamespace = 'payment_writer'::regnamespace AND c.relkind IN ('r', 'p')
            AND c.relreplident = 'd' AND c.relname !~ '^payment_[a-z]+_[0-9]{4}_[0-9]{2}$'
            AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)
        ORDER BY 1";
    let names: Vec<String> = scope.sql(without, &[]).iter().map(|row| row.get(0)).collect();
    // Holds no rows itself; rows of a month's table are not deleted.
    assert_eq!(names, ["idempotency"]);
}

#[test]
fn an_older_schema_makes_months_beside_a_publication_while_the_default_partitions_are_empty() {
    let scope = Scope::ready("publication_v6", 1, 1);
    scope.execute(
        "ALTER TABLE payment_writer.payment_core_default REPLICA IDENTITY DEFAULT;
         ALTER TABLE payment_writer.payment_metadata_default REPLICA IDENTITY DEFAULT;
         ALTER TABLE payment_writer.payment_notes_default REPLICA IDENTITY DEFAULT",
    );
    scope.execute_as_admin("CREATE PUBLICATION everything FOR ALL TABLES");
    scope.command(&["prune"]).succeeds();
    assert_eq!(months(&scope, "payment_core"), 4);
}

#[test]
fn a_subscriber_follows_the_payment_tables_through_months_rotation_and_archiving() {
    // GIVEN a server with logical replication, and a second database that subscribes to the payment tables
    let servers = Servers::own();
    let (scope, copy) = (Scope::new(&servers, "published"), Scope::new(&servers, "subscriber"));
    scope.on_server(&["ALTER SYSTEM SET wal_level = logical".to_owned()]);
    servers.postgres(Act::Stop);
    servers.postgres(Act::Start);
    scope.create_topics(1, 1);
    scope.command(&["migrate"]).succeeds();
    copy.command(&["migrate"]).succeeds();
    scope.execute_as_admin(
        "CREATE PUBLICATION everything FOR ALL TABLES;
         CREATE PUBLICATION payments FOR TABLE payment_writer.payment_core, payment_writer.payment_metadata,
             payment_writer.payment_notes WITH (publish_via_partition_root = true, publish = 'insert')",
    );
    // A subscription creates its slot only on another server.
    scope.execute_as_admin("SELECT pg_create_logical_replication_slot('payments', 'pgoutput')");
    copy.execute_as_admin(&format!(
        "CREATE SUBSCRIPTION payments CONNECTION '{}' PUBLICATION payments
         WITH (create_slot = false, slot_name = 'payments')",
        servers.postgres_admin_url(&scope.database)
    ));

    // WHEN payments are written to the default partition and to months, and are moved
    let long_ago = now_ms() - 100 * DAY_MS;
    scope.produce(&scope.input_topic, (1..=10).map(|n| payment(n, long_ago)));
    scope.drain();
    wait_until("the rows arrive", || copy.count("payment_core") == 10);
    let pass = scope.command(&["prune"]).succeeds();
    assert!(pass.stdout.contains("rows moved from the default partitions: 20"), "{pass:?}");
    scope.produce(&scope.input_topic, (11..=20).map(|n| payment(n, now_ms())));
    scope.drain();

    // THEN each arrives once
    let rows = |scope: &Scope<'_>| {
        let ids = "SELECT payment_id::text FROM payment_writer.payment_core ORDER BY 1";
        scope.sql(ids, &[]).iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>()
    };
    wait_until("the later rows arrive", || copy.count("payment_core") >= 20);
    assert_eq!(rows(&copy), rows(&scope));

    // WHEN a generation is rotated and dropped, and a month is archived and dropped THEN the copy keeps its rows
    age_current(&scope);
    let kept = [("PAYMENT_WRITER__RETENTION__PAYMENT_MONTHS", "2")];
    let pass = scope.command_with(&["prune"], &kept).succeeds();
    assert!(pass.stdout.contains("rotated: generation 2"), "{pass:?}");
    let archived = "SELECT tablename::text FROM pg_tables WHERE tablename LIKE 'archived_payment_core_%'";
    let archived: String = scope.sql(archived, &[])[0].get(0);
    scope.execute(&format!("DROP TABLE payment_writer.{archived}"));
    scope.produce(&scope.input_topic, [payment(21, now_ms())]);
    let daemon = Member::new("later").catch_up(&scope);
    assert!(!daemon.log().contains(" ERROR "), "{}", daemon.log());
    wait_until("the last row arrives", || copy.count("payment_core") == 21);
    assert_eq!(scope.count("payment_core"), 11);
    copy.execute_as_admin("DROP SUBSCRIPTION payments");
}
