//! Keys, columns and session settings that the program depends on: what was lost is named and waited for, and
//! defaults of roles and databases change nothing.

use std::time::Duration;

use tokio_postgres::NoTls;

use payment_writer::postgres::schema::shape;

use crate::support::{
    Daemon, Load, Member, Message, PATIENCE, Scope, Servers, block_on, uuid_v4, wait_until_within,
};

fn member() -> Member {
    Member::new("a").soon_forgotten().with("LANES", "1")
}

/// Waits until readiness names `words` for the database.
#[track_caller]
fn names(daemon: &Daemon, words: &str) {
    wait_until_within(PATIENCE, &format!("/readyz names {words}"), || {
        daemon.get("/readyz").is_some_and(|reply| reply.body.contains(words))
    });
}

#[test]
fn a_generation_that_loses_its_key_while_the_daemon_runs_receives_no_payment_twice() {
    for (rows, name) in [(600, "key_copy"), (150, "key_insert")] {
        // GIVEN a daemon that has written payments
        let scope = Scope::new(Servers::shared(), name);
        scope.prepare(2, 1);
        let mut daemon = member().with("LANES", "2").with("BATCH__LINGER", "500ms").start(&scope);
        let mut load = Load::without_bad_records(71);
        let records = load.take(rows);
        scope.spread(records.clone(), &[0]);
        scope.wait_until_caught_up();
        let written = scope.count("payment_core");

        // WHEN the generation loses its key, and the same payments come again in a lane that has not seen them
        scope.execute("ALTER TABLE payment_writer.idempotency_g1 DROP CONSTRAINT idempotency_g1_pkey");
        scope.spread(records, &[1]);

        // THEN nothing is written, and table and remedy are named
        names(&daemon, "idempotency_g1");
        assert!(daemon.log().contains("blocked until this is fixed"), "{}", daemon.log());
        assert!(
            daemon.log().contains("ALTER TABLE payment_writer.idempotency_g1 ADD PRIMARY KEY (message_id)")
                || daemon.log().contains("unique key idempotency_g1 (message_id)"),
            "{}",
            daemon.log()
        );
        assert_eq!(scope.count("payment_core"), written);

        // WHEN the key is back THEN it continues by itself
        scope.execute("ALTER TABLE payment_writer.idempotency_g1 ADD PRIMARY KEY (message_id)");
        daemon.wait_until_ready();
        scope.drains_exactly_once([&mut daemon]);
        assert_eq!(scope.count("payment_core"), written);
    }
}

#[test]
fn a_deferrable_or_partial_key_is_no_key() {
    for (definition, name) in [
        ("ALTER TABLE payment_writer.idempotency_g1 ADD UNIQUE (message_id) DEFERRABLE", "key_deferrable"),
        (
            "CREATE UNIQUE INDEX ON payment_writer.idempotency_g1 (message_id) WHERE source_offset < 0",
            "key_partial",
        ),
        ("CREATE UNIQUE INDEX ON payment_writer.idempotency_g1 (message_id, source_offset)", "key_wide"),
    ] {
        let scope = Scope::new(Servers::shared(), name);
        scope.prepare(2, 1);
        let daemon = member().with("LANES", "2").with("BATCH__LINGER", "500ms").start(&scope);
        scope.spread(Load::without_bad_records(72).take(300), &[0]);
        scope.wait_until_caught_up();
        let written = scope.count("payment_core");
        scope.execute(&format!(
            "ALTER TABLE payment_writer.idempotency_g1 DROP CONSTRAINT idempotency_g1_pkey; {definition}"
        ));
        scope.spread(Load::without_bad_records(72).take(300), &[1]);
        names(&daemon, "idempotency_g1");
        assert_eq!(scope.count("payment_core"), written, "{definition}");
    }
}

#[test]
fn what_a_restore_lost_is_named_at_the_start_and_waited_for() {
    // GIVEN a schema without a key, a NOT NULL and a default partition, with another scale and a table that a crash empties
    let scope = Scope::new(Servers::shared(), "lost");
    scope.prepare(1, 1);
    let missing = || block_on(shape::missing(&scope.connect())).unwrap();
    assert_eq!(missing(), [] as [&str; 0]);
    scope.execute(
        "ALTER TABLE payment_writer.source_cursor DROP CONSTRAINT source_cursor_pkey;
         ALTER TABLE payment_writer.payment_core ALTER COLUMN status DROP NOT NULL;
         ALTER TABLE payment_writer.payment_core ALTER COLUMN amount TYPE numeric(20, 2);
         ALTER TABLE payment_writer.idempotency_g1 SET UNLOGGED;
         ALTER TABLE payment_writer.payment_notes DETACH PARTITION payment_writer.payment_notes_default;",
    );
    scope.produce(&scope.input_topic, Load::without_bad_records(73).take(100));

    // WHEN the daemon starts THEN it waits and names them
    let mut daemon = member().start(&scope);
    let lost = [
        "column payment_core.amount numeric(20,6)",
        "logged table idempotency_g1",
        "default partition of payment_notes",
        "not null payment_core.status",
        "unique key source_cursor (topic_id, partition)",
    ];
    for fact in lost {
        names(&daemon, fact);
        assert!(daemon.log().contains(fact), "{}", daemon.log());
    }
    assert_eq!(scope.count("payment_core"), 0);

    // WHEN they are restored THEN it continues by itself
    scope.execute(
        "ALTER TABLE payment_writer.source_cursor ADD PRIMARY KEY (topic_id, partition);
         ALTER TABLE payment_writer.payment_core ALTER COLUMN status SET NOT NULL;
         ALTER TABLE payment_writer.payment_core ALTER COLUMN amount TYPE numeric(20, 6);
         ALTER TABLE payment_writer.idempotency_g1 SET LOGGED;
         ALTER TABLE payment_writer.payment_notes ATTACH PARTITION payment_writer.payment_notes_default DEFAULT;",
    );
    daemon.wait_until_ready();
    scope.drains_exactly_once([&mut daemon]);
}

#[test]
fn the_expected_shape_is_that_of_a_migrated_database() {
    let scope = Scope::new(Servers::shared(), "shape");
    scope.command(&["migrate"]).succeeds();
    let expected = include_str!("../../src/postgres/schema/shape.txt");
    assert_eq!(block_on(shape::missing(&scope.connect())).unwrap(), [] as [&str; 0]);
    // `replaces` is not needed: the program runs on the schema before it.
    let columns = scope.sql(
        "SELECT format('column %s.%s %s', table_name, column_name, format_type(a.atttypid, a.atttypmod))
         FROM information_schema.columns
         JOIN pg_attribute a ON a.attname = column_name
             AND a.attrelid = to_regclass('payment_writer.' || table_name)
         WHERE table_schema = 'payment_writer' AND table_name !~ '_([0-9]{4}_[0-9]{2}|default|g[0-9]+)$'
             AND table_name !~ '^(dead_letter_|schema_)'
             AND NOT (table_name = 'cursor_settlement' AND column_name = 'replaces')",
        &[],
    );
    for row in columns {
        let fact: String = row.get(0);
        assert!(expected.lines().any(|line| line == fact), "{fact} is missing from shape.txt");
    }
}

#[test]
fn a_row_that_only_a_deferred_constraint_refuses_is_dead_lettered_also_as_the_first_of_its_batch() {
    let scope = Scope::new(Servers::shared(), "deferred_first");
    scope.prepare(1, 1);
    scope.execute(
        "CREATE FUNCTION payment_writer.refuses() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'closed'; END $$;
         CREATE CONSTRAINT TRIGGER closed_later AFTER INSERT ON payment_writer.payment_core
             DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW WHEN (NEW.cust_id = 1015) EXECUTE FUNCTION payment_writer.refuses();",
    );
    // The lowest id: it is in every part that is tried before any other is accepted.
    let id = uuid_v4(0).to_string();
    let lowest = format!("00000000{}", &id[8..]);
    let mut records = Load::without_bad_records(74).take(300);
    records.push(Message::new(
        "1015",
        format!(
            r#"{{"messageId":"{lowest}","amount":1.00,"status":2,"currency":"EUR","custId":1015,"type":"BWI","comment":"c"}}"#
        ),
    ));
    scope.produce(&scope.input_topic, records);

    let mut daemon = member().with("BATCH__LINGER", "2s").start(&scope);
    scope.wait_until_caught_up();
    daemon.drains();
    let outcomes = scope.assert_exactly_once();
    assert_eq!(outcomes.dead_letters, 1, "{outcomes:?}");
}

/// Defaults of the owner's role in this database, each of which broke something when sessions did not set it.
const HOSTILE: &[&str] = &[
    "statement_timeout = '300ms'",
    "lock_timeout = '300ms'",
    "idle_session_timeout = '1s'",
    "idle_in_transaction_session_timeout = '1s'",
    "row_security = off",
    "default_transaction_deferrable = on",
    "default_transaction_isolation = 'serializable'",
    "search_path = 'payment_writer'",
    "client_min_messages = 'error'",
    "\"DateStyle\" = 'SQL, DMY'",
    "\"IntervalStyle\" = 'sql_standard'",
    "\"TimeZone\" = 'Asia/Kathmandu'",
    "extra_float_digits = -15",
    "quote_all_identifiers = on",
];

#[test]
fn defaults_of_a_role_change_neither_the_daemon_nor_the_commands() {
    // GIVEN a role with such defaults in this database
    let scope = Scope::new(Servers::shared(), "hostile");
    scope.prepare(1, 1);
    for setting in HOSTILE {
        let database = &scope.database;
        scope
            .execute_as_admin(&format!("ALTER ROLE payment_writer IN DATABASE \"{database}\" SET {setting}"));
    }
    scope.execute_as_admin(&format!(
        "DO $$ BEGIN
             IF EXISTS (SELECT FROM pg_settings WHERE name = 'transaction_timeout') THEN
                 ALTER ROLE payment_writer IN DATABASE \"{}\" SET transaction_timeout = '300ms';
             END IF;
         END $$",
        scope.database
    ));

    // WHEN the daemon writes, idles for longer than the role's limit, and writes again
    let mut daemon = member().start(&scope);
    let mut load = Load::without_bad_records(75);
    let id = uuid_v4(7500);
    scope.produce(&scope.input_topic, load.take(300));
    scope.produce(
        &scope.input_topic,
        [Message::new(
            "5",
            format!(
                r#"{{"messageId":"{id}","amount":1,"status":2,"currency":"EUR","custId":5,"type":"BWI"}}"#
            ),
        )],
    );
    scope.wait_until_caught_up();
    let sessions = || {
        scope.sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                     AND state = 'idle' AND state_change < clock_timestamp() - interval '1500 ms'",
            &[],
        )[0]
        .get::<_, i64>(0)
    };
    // THEN no session is ended
    wait_until_within(Duration::from_secs(10), "a session is idle for longer than the role's limit", || {
        sessions() > 0
    });
    scope.produce(&scope.input_topic, load.take(300));
    scope.wait_until_caught_up();
    assert!(!daemon.log().contains("57P05"), "{}", daemon.log());
    daemon.drains();

    // AND the commands wait for a lock for longer than the role's limits, and succeed
    let admin = scope.servers.postgres_admin_url(&scope.database);
    let id = id.to_string();
    let commands: [&[&str]; 5] = [
        &["cursors", "show"],
        &["reconcile"],
        &["status", &id],
        &["status", &id, "--search"],
        &["migrate", "status"],
    ];
    for arguments in commands {
        let blocker = block_on(async {
            let (client, connection) = tokio_postgres::connect(&admin, NoTls).await.unwrap();
            tokio::spawn(connection);
            let lock = "BEGIN; LOCK TABLE payment_writer.payment_metadata, payment_writer.source_cursor,
                 payment_writer.schema_history, payment_writer.database_identity IN ACCESS EXCLUSIVE MODE";
            client.batch_execute(lock).await.unwrap();
            client
        });
        std::thread::scope(|threads| {
            let command = threads.spawn(|| scope.command(arguments));
            let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND wait_event_type = 'Lock' AND query_start < clock_timestamp() - interval '400 ms'";
            // Either it waits for longer than the limits, or it has ended.
            wait_until_within(PATIENCE, "the command waits", || {
                command.is_finished() || scope_count(&admin, waiting) > 0
            });
            drop(blocker);
            let finished = command.join().unwrap();
            assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:?}");
        });
    }
    scope.command(&["prune"]).succeeds();
    let into = format!("{}_second", scope.database);
    scope.on_server(&[format!("CREATE DATABASE \"{into}\" OWNER payment_writer")]);
    let url = scope.servers.postgres_url(&into);
    scope.command_with(&["rebuild"], &[("PAYMENT_WRITER_REBUILD_INTO", &url)]).succeeds();
    scope.assert_exactly_once();
}

fn scope_count(url: &str, query: &str) -> i64 {
    block_on(async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
        tokio::spawn(connection);
        client.query_one(query, &[]).await.unwrap().get(0)
    })
}

#[test]
fn a_read_only_default_and_row_level_security_are_named() {
    let scope = Scope::new(Servers::shared(), "read_only");
    scope.prepare(1, 1);
    let database = scope.database.clone();
    scope.execute_as_admin(&format!("ALTER DATABASE \"{database}\" SET default_transaction_read_only = on"));
    let daemon = member().start(&scope);
    scope.produce(&scope.input_topic, Load::without_bad_records(76).take(10));
    names(&daemon, "default_transaction_read_only is on");
    // The commands that only read do not mind, and the others name it.
    for (arguments, code) in [
        (&["reconcile"][..], 0),
        (&["status", "00000000-0000-4000-8000-000000000000", "--search"], 0),
        (&["migrate", "status"], 0),
        (&["prune"], 1),
        (&["migrate"], 0),
    ] {
        let finished = scope.command(arguments);
        assert_eq!(finished.code, Some(code), "{arguments:?}: {finished:?}");
        let is_named = finished.stderr.contains("default_transaction_read_only is on");
        assert_eq!(is_named, code == 1, "{arguments:?}: {finished:?}");
    }
    let second = format!("{database}_second");
    scope.on_server(&[
        format!("CREATE DATABASE \"{second}\" OWNER payment_writer"),
        format!("ALTER DATABASE \"{second}\" SET default_transaction_read_only = on"),
    ]);
    let url = scope.servers.postgres_url(&second);
    for (arguments, variable) in [
        (["rebuild"], "PAYMENT_WRITER_REBUILD_INTO"),
        (["migrate"], "PAYMENT_WRITER__POSTGRES__HOUSEKEEPING_URL"),
    ] {
        let refused = scope.command_with(&arguments, &[(variable, &url)]);
        assert_eq!(refused.code, Some(1), "{arguments:?}: {refused:?}");
        let is_named = refused.stderr.contains("default_transaction_read_only is on");
        assert!(is_named, "{arguments:?}: {refused:?}");
    }
    // From another database, because this one is read-only.
    scope.on_server(&[format!("ALTER DATABASE \"{database}\" RESET default_transaction_read_only")]);
    daemon.wait_until_ready();
    scope.wait_until_caught_up();

    scope.execute(
        "ALTER TABLE payment_writer.source_cursor ENABLE ROW LEVEL SECURITY;
         ALTER TABLE payment_writer.source_cursor FORCE ROW LEVEL SECURITY;",
    );
    scope.produce(&scope.input_topic, Load::without_bad_records(77).take(10));
    names(&daemon, "row-level security");
    scope.execute("ALTER TABLE payment_writer.source_cursor DISABLE ROW LEVEL SECURITY");
    daemon.wait_until_ready();
    scope.wait_until_caught_up();
    scope.assert_exactly_once();
}

#[test]
fn the_writers_role_is_enough_where_public_may_execute_nothing() {
    let scope = Scope::new(Servers::shared(), "no_public");
    scope.create_topics(1, 1);
    scope.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC");
    scope.command(&["migrate"]).succeeds();
    let grants = std::env::var("TESTED_ROLES").unwrap_or_else(|_| "sql/roles.sql".into());
    scope.execute_as_admin(&std::fs::read_to_string(grants).unwrap());
    let user = format!("{}_user", scope.database);
    scope.execute_as_admin(&format!("CREATE ROLE \"{user}\" LOGIN PASSWORD 'u' IN ROLE payment_writer_app"));
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{user}:u@"));
    scope.produce(&scope.input_topic, Load::without_bad_records(78).take(50));
    let own = [("POSTGRES__URL", url), ("POSTGRES__HOUSEKEEPING_URL", scope.postgres_url())];
    own.iter().fold(member(), |member, (name, value)| member.with(name, value)).catch_up(&scope);
    scope.assert_exactly_once();
    scope.execute_as_admin(&format!("DROP ROLE \"{user}\"; DROP OWNED BY payment_writer_app"));
}

#[test]
fn a_column_of_others_that_refuses_every_row_is_named_and_waited_for() {
    // GIVEN a daemon that has written payments
    let scope = Scope::new(Servers::shared(), "foreign_column");
    scope.prepare(2, 1);
    let mut daemon = member().start(&scope);
    let mut load = Load::without_bad_records(78);
    scope.feed(load.take(50));
    scope.wait_until_caught_up();

    // WHEN somebody adds a column that needs a value
    scope.execute(
        "ALTER TABLE payment_writer.payment_core ADD COLUMN tax integer NOT NULL DEFAULT 0;
         ALTER TABLE payment_writer.payment_core ALTER COLUMN tax DROP DEFAULT",
    );
    scope.feed(load.take(50));

    // THEN column, table and remedy are named, and no payment is dead-lettered
    names(&daemon, "column tax of payment_core");
    names(&daemon, "DROP NOT NULL");
    let has_line =
        || daemon.log().lines().any(|l| l.contains("blocked") && l.contains("column tax of payment_core"));
    wait_until_within(PATIENCE, "the log names it", has_line);
    assert_eq!(scope.read_all(&scope.dead_letter_topic).len(), 0);

    // WHEN it needs none any more, THEN the daemon continues
    scope.execute("ALTER TABLE payment_writer.payment_core ALTER COLUMN tax DROP NOT NULL");
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
}

#[test]
fn rows_that_a_trigger_drops_are_missed() {
    // GIVEN a trigger that drops rows
    let scope = Scope::new(Servers::shared(), "dropping");
    scope.prepare(1, 1);
    scope.execute(
        "CREATE FUNCTION payment_writer.none() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER none BEFORE INSERT ON payment_writer.payment_core
             FOR EACH ROW EXECUTE FUNCTION payment_writer.none()",
    );
    scope.feed(Load::without_bad_records(79).take(50));

    // WHEN the daemon writes THEN it names the table, and waits
    let mut daemon = member().start(&scope);
    names(&daemon, "payment_core took 0 of");

    // WHEN the trigger is gone THEN it continues by itself
    scope.execute("DROP TRIGGER none ON payment_writer.payment_core");
    scope.wait_until_caught_up();
    daemon.drains();
    scope.assert_exactly_once();
}
