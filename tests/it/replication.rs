//! Logical replication of the database: publications of all tables, as other programs create them.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::support::{Message, Payment, Scope, uuid_v7};

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
