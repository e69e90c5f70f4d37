//! Logical replication of the database: subscribers, and publications of all tables, as other programs create them.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::support::{
    Act, Flow, Load, Member, Message, PATIENCE, Payment, Postgres, Scope, Servers, uuid_v7, wait_until,
    wait_until_within,
};

pub const DAY_MS: i64 = 24 * 3_600_000;

pub fn now_ms() -> i64 {
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
pub fn age_current(scope: &Scope<'_>) {
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

/// The tables of a subscriber; their keys refuse a payment that comes twice.
pub const SUBSCRIBER: &str = "
    CREATE SCHEMA payment_writer;
    CREATE TABLE payment_writer.payment_core (
        payment_id uuid PRIMARY KEY, created_at timestamptz NOT NULL, cust_id bigint NOT NULL,
        amount numeric(20, 6) NOT NULL, currency text NOT NULL, status smallint NOT NULL, type text NOT NULL);
    CREATE TABLE payment_writer.payment_metadata (
        payment_id uuid PRIMARY KEY, created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL,
        version integer NOT NULL, message_id uuid NOT NULL, source_partition integer NOT NULL,
        source_offset bigint NOT NULL);
    CREATE TABLE payment_writer.payment_notes (
        payment_id uuid PRIMARY KEY, created_at timestamptz NOT NULL, external_ref_id text, comment text)";

/// Publishes inserts by the names of the partitioned tables.
pub const PUBLICATION: &str = "
    CREATE PUBLICATION payments
    FOR TABLE payment_writer.payment_core, payment_writer.payment_metadata, payment_writer.payment_notes
    WITH (publish_via_partition_root = true, publish = 'insert')";

pub const PAYMENTS: [&str; 3] = ["payment_core", "payment_metadata", "payment_notes"];

/// Number and digest of the rows of tables of the schema `payment_writer`.
pub fn digest(server: &Postgres, database: &str, tables: &[&str]) -> (i64, Option<String>) {
    let rows = tables.iter().map(|table| format!("SELECT t::text FROM payment_writer.{table} AS t"));
    let rows = rows.collect::<Vec<_>>().join(" UNION ALL ");
    let query = format!("SELECT count(*), md5(string_agg(r, chr(10) ORDER BY r)) FROM ({rows}) AS t (r)");
    let row = &server.sql(database, &query)[0];
    (row.get(0), row.get(1))
}

/// A subscriber of the payments as docs/how-to/replication.md recommends it, beside a daemon under load.
fn a_subscriber_has_each_payment_once(publisher: &Postgres, subscriber: &Postgres) {
    // GIVEN a daemon that writes under load, and a publication of inserts by the names of the partitioned tables
    let scope = Scope::new_on(publisher, Servers::shared(), "subscriber");
    scope.prepare(4, 2);
    let member = Member::new("a").with("BATCH__MAX_PAYMENTS", "100").soon_forgotten();
    let mut daemon = member.start(&scope);
    let flow = Flow::start(&scope, Load::new(91), 10);
    let publish = |count: i64| {
        let before = scope.count("payment_core");
        wait_until_within(PATIENCE, "payments flow", || scope.count("payment_core") >= before + count);
    };
    publish(200);
    scope.execute(PUBLICATION);

    // WHEN a server subscribes while the daemon writes, and both daemon and subscriber are killed
    let copy = "copy";
    subscriber.execute("postgres", "CREATE DATABASE copy");
    subscriber.execute(copy, SUBSCRIBER);
    subscriber.subscribe(copy, "payments", publisher, &scope.database);
    publish(200);
    daemon.kill();
    subscriber.act(Act::Kill);
    let mut daemon = member.start(&scope);
    publish(200);
    subscriber.act(Act::Start);

    // AND a month is made for rows that wait in the default partitions, and ids are rotated
    let long_ago = now_ms() - 100 * DAY_MS;
    scope.produce(&scope.input_topic, (1..=50).map(|n| payment(n, long_ago)));
    wait_until("the payments of an old month are written", || scope.count("payment_core_default") == 50);
    publish(100);
    age_current(&scope);
    let pass = scope.command(&["prune"]).succeeds();
    assert!(pass.stdout.contains("rotated: generation 2"), "{pass:?}");
    assert!(pass.stdout.contains("rows moved from the default partitions: 100"), "{pass:?}");
    publish(200);
    drop(flow.end());
    scope.wait_until_caught_up();

    // THEN the subscriber has each payment once
    scope.assert_exactly_once();
    let same = |archived: &[String]| {
        publisher.wait_until_confirmed("payments");
        for table in PAYMENTS {
            let mut tables = vec![table];
            tables.extend(archived.iter().map(String::as_str).filter(|name| name.contains(table)));
            let found = digest(subscriber, copy, &[table]);
            assert!(found.0 > 100, "{table}: {found:?}");
            assert_eq!(found, digest(publisher, &scope.database, &tables), "{table}");
        }
    };
    same(&[]);

    // WHEN months are archived, and written again by late payments
    let kept = [("PAYMENT_WRITER__RETENTION__PAYMENT_MONTHS", "2")];
    let pass = scope.command_with(&["prune"], &kept).succeeds();
    assert!(pass.stdout.contains("detached for archiving"), "{pass:?}");
    let tables = "SELECT relname::text FROM pg_class WHERE relname ~ '^archived_' ORDER BY 1";
    let archived: Vec<String> = publisher.sql(&scope.database, tables).iter().map(|row| row.get(0)).collect();
    assert_eq!(archived.len(), 3, "{archived:?}");
    scope.produce(&scope.input_topic, (51..=60).map(|n| payment(n, long_ago)));
    scope.wait_until_caught_up();
    // THEN the subscriber keeps them
    same(&archived);
    // AND also when they are dropped
    let before = digest(subscriber, copy, &PAYMENTS[..1]);
    archived.iter().for_each(|name| scope.execute(&format!("DROP TABLE payment_writer.{name}")));
    publisher.wait_until_confirmed("payments");
    assert_eq!(digest(subscriber, copy, &PAYMENTS[..1]), before);
    daemon.drains();
    subscriber.execute(copy, "DROP SUBSCRIPTION payments");
}

#[test]
fn a_subscriber_has_each_payment_once_whatever_happens_to_months() {
    a_subscriber_has_each_payment_once(&Postgres::default_version(), &Postgres::default_version());
}

#[test]
#[ignore = "other versions of Postgres: make trials"]
fn trials_a_subscriber_of_another_version_has_each_payment_once() {
    let older = Postgres::of("15");
    a_subscriber_has_each_payment_once(&older, &Postgres::of("15"));
    a_subscriber_has_each_payment_once(&older, &Postgres::of("18"));
}

#[test]
fn identity_columns_go_on_after_rows_that_came_by_replication() {
    // GIVEN a database with the rows of another one, and sequences that were never used
    let scope = Scope::ready("sequences", 1, 1);
    scope.command(&["prune"]).succeeds();
    scope.command(&["prune"]).succeeds();
    let start_anew = || {
        scope.execute(
            "ALTER SEQUENCE payment_writer.housekeeping_pass_id_seq RESTART;
             ALTER SEQUENCE payment_writer.cursor_audit_id_seq RESTART",
        );
    };
    scope.execute(
        "INSERT INTO payment_writer.cursor_audit (command) SELECT 'test' FROM generate_series(1, 3)",
    );
    start_anew();
    // WHEN a pass is made, THEN it can be recorded
    scope.command(&["prune"]).succeeds();
    assert_eq!(scope.count("housekeeping_pass"), 3);
    // AND what operators do, after `migrate` or the start of a daemon
    let audit = || scope.execute("INSERT INTO payment_writer.cursor_audit (command) VALUES ('test')");
    audit();
    start_anew();
    scope.command(&["migrate"]).succeeds();
    audit();
    start_anew();
    let _daemon = scope.daemon(&["run"]);
    let next = "SELECT last_value + is_called::int FROM payment_writer.cursor_audit_id_seq";
    wait_until("the sequence is set", || scope.sql(next, &[])[0].get::<_, i64>(0) == 6);
    audit();
}

#[test]
fn message_ids_are_guarded_again_after_a_change_over_and_a_lost_function() {
    // GIVEN a generation as replication brings it: its table made by hand, its row without a trigger
    let scope = Scope::ready("guards", 1, 1);
    scope.command(&["prune"]).succeeds();
    let guard = || {
        let finished = scope.command(&["doctor", "--json"]);
        let found: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
        let one = found.as_array().unwrap().iter().find(|one| one["what"] == "generation_guard").unwrap();
        (one["severity"] == "ok").then_some(()).ok_or(one["says"].as_str().unwrap().to_owned())
    };
    assert_eq!(guard(), Ok(()));
    let replicated = |number: i64| {
        scope.execute(&format!(
            "CREATE TABLE payment_writer.idempotency_g{number} (PRIMARY KEY (message_id))
             INHERITS (payment_writer.idempotency)"
        ));
        scope.execute_unguarded(&format!(
            "INSERT INTO payment_writer.idempotency_generation (generation, leaf, state)
             VALUES ({number}, 'idempotency_g{number}', 'ready')"
        ));
    };
    let refuses = |number: i64| {
        let removal = format!("TRUNCATE payment_writer.idempotency_g{number}");
        scope.execute_as(&scope.postgres_url(), &removal).as_deref() == Some("55000")
    };
    replicated(11);
    assert!(guard().unwrap_err().starts_with("missing: trigger on idempotency_g11: "), "{:?}", guard());
    assert!(!refuses(11));

    // WHEN `migrate` runs THEN it is guarded; AND so by a pass, and by the start of a daemon
    scope.command(&["migrate"]).succeeds();
    assert!(refuses(11));
    replicated(12);
    scope.command(&["prune"]);
    assert!(refuses(12));
    replicated(13);
    let mut daemon = scope.daemon(&["run"]);
    wait_until("the daemon guards it", || refuses(13));
    daemon.kill();
    assert_eq!(guard(), Ok(()));

    // WHEN a function is emptied or lost, or a trigger disabled THEN doctor names it, and `migrate` restores it
    for (loss, named) in [
        (
            "CREATE OR REPLACE FUNCTION payment_writer.refuse_removal_v1() RETURNS trigger LANGUAGE plpgsql
             SET search_path = pg_catalog AS $$ BEGIN RETURN NULL; END $$",
            "missing: function refuse_removal_v1()",
        ),
        (
            "DROP FUNCTION payment_writer.refuse_removal_v1() CASCADE",
            "missing: function refuse_removal_v1(), trigger on",
        ),
        (
            "DROP FUNCTION payment_writer.guard_generation_v1() CASCADE",
            "missing: function guard_generation_v1(), trigger on idempotency_generation",
        ),
        (
            "ALTER TABLE payment_writer.idempotency_generation DISABLE TRIGGER guard_generation",
            "missing: trigger on idempotency_generation",
        ),
        (
            "CREATE OR REPLACE TRIGGER message_ids_stay BEFORE DELETE ON payment_writer.idempotency_g12
             EXECUTE FUNCTION payment_writer.refuse_removal_v1()",
            "missing: trigger on idempotency_g12",
        ),
    ] {
        scope.execute(loss);
        let found = guard().unwrap_err();
        assert!(found.starts_with(named), "{loss}: {found}");
        scope.command(&["migrate"]).succeeds();
        assert_eq!(guard(), Ok(()), "{loss}");
        assert!(refuses(1) && refuses(12), "{loss}");
    }

    // AND without step 8 nothing is missing, and nothing restored
    scope.command(&["migrate", "undo", "--count", "2", "--force"]).succeeds();
    assert_eq!(guard(), Ok(()));
    scope.command(&["prune"]);
    assert!(!refuses(1));
}
