//! The schema on a real Postgres: steps forward and back, the cursor guard, months, roles.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use payment_writer::config::Endpoint;
use payment_writer::domain::outcome::SQLSTATE_CURSOR_MOVED;
use payment_writer::postgres::connection::ConnectError;
use payment_writer::postgres::schema::months::{Month, MonthsReport, Obstacle, make_months};
use payment_writer::postgres::schema::{
    self, NEWEST_KNOWN, OLDEST_SUPPORTED, SchemaError, SchemaVersion, StepState, check, migrate, status, undo,
};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::{DEADLINE, Scope, Servers, block_on};

/// More steps than there are.
const ALL: u32 = 1_000;
const TOPIC_ID: Uuid = Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888);

/// A scope with an empty database, and a session of its owner.
fn empty(name: &str) -> (Scope<'static>, Client) {
    let scope = Scope::new(Servers::shared(), name);
    let client = session(&scope);
    (scope, client)
}

fn migrated(name: &str) -> (Scope<'static>, Client) {
    let (scope, mut client) = empty(name);
    block_on(migrate(&mut client)).unwrap();
    (scope, client)
}

fn connect(url: &str) -> Result<Client, ConnectError> {
    block_on(Endpoint::parse(url).unwrap().connect()).map(|(client, _)| client)
}

fn session(scope: &Scope<'_>) -> Client {
    connect(&scope.postgres_url()).unwrap()
}

/// This month and the next two.
async fn make_months_ahead(client: &mut Client) -> Result<MonthsReport, SchemaError> {
    let current = Month::current(client).await?;
    make_months(client, current, 3).await
}

fn text_column(scope: &Scope<'_>, query: &str) -> Vec<String> {
    scope.sql(query, &[]).iter().map(|row| row.get(0)).collect()
}

/// All facts of the schema in the catalogs, one a line; no oids, times or ids.
fn catalog(scope: &Scope<'_>) -> BTreeSet<String> {
    const FACTS: &str = "
        WITH ours AS (SELECT c.* FROM pg_class c WHERE c.relnamespace = to_regnamespace('payment_writer'))
        SELECT format('relation %s %s %s %s %s %s', relname, relkind, relpersistence, reloptions, relacl,
                      pg_get_expr(relpartbound, oid)) FROM ours
        UNION ALL
        SELECT format('column %s %s %s %s %s %s %s %s %s', c.relname,
                      -- A column that was dropped leaves a gap in the numbers, and is none.
                      (SELECT count(*) FROM pg_attribute b WHERE b.attrelid = a.attrelid
                       AND b.attnum BETWEEN 1 AND a.attnum AND NOT b.attisdropped), a.attname,
                      format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attislocal,
                      pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum))
        FROM ours c JOIN pg_attribute a ON a.attrelid = c.oid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind <> 'i'
        UNION ALL
        SELECT format('constraint %s %s %s %s', c.relname, k.conname, pg_get_constraintdef(k.oid), k.connoinherit)
        FROM ours c JOIN pg_constraint k ON k.conrelid = c.oid
        UNION ALL
        SELECT format('index %s', pg_get_indexdef(c.oid)) FROM ours c WHERE c.relkind = 'i'
        UNION ALL
        SELECT format('parent %s %s', i.inhrelid::regclass, i.inhparent::regclass)
        FROM pg_inherits i JOIN ours c ON c.oid = i.inhrelid
        UNION ALL
        SELECT format('function %s %s %s', p.oid::regprocedure, p.proacl, pg_get_functiondef(p.oid))
        FROM pg_proc p WHERE p.pronamespace = to_regnamespace('payment_writer')
        UNION ALL
        SELECT format('trigger %s', pg_get_triggerdef(t.oid)) FROM pg_trigger t JOIN ours c ON c.oid = t.tgrelid
        UNION ALL
        SELECT format('type %s', t.typname) FROM pg_type t WHERE t.typnamespace = to_regnamespace('payment_writer')
        UNION ALL
        SELECT format('schema %s %s', nspname, nspacl) FROM pg_namespace WHERE nspname = 'payment_writer'";
    text_column(scope, FACTS).into_iter().collect()
}

#[test]
fn eight_migrations_at_once_make_one_schema() {
    let scope = Scope::new(Servers::shared(), "migrate_race");
    let mut sessions: Vec<Client> = (0..8).map(|_| session(&scope)).collect();

    let reports = block_on(join_all(sessions.iter_mut().map(migrate)));

    let mut applied = Vec::new();
    for report in reports {
        let report = report.unwrap();
        assert_eq!(report.version, NEWEST_KNOWN);
        applied.extend(report.applied);
    }
    assert_eq!(applied.len(), usize::try_from(NEWEST_KNOWN.0).unwrap(), "each step ran once: {applied:?}");
    assert_eq!(block_on(check(&sessions[0])).unwrap(), NEWEST_KNOWN);
    let locks = "SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                 WHERE l.locktype = 'advisory' AND d.datname = current_database()";
    assert!(scope.sql(locks, &[]).is_empty(), "the migration lock is released");
}

#[test]
fn up_down_up_ends_where_it_began() {
    let (scope, mut client) = migrated("up_down_up");
    let first = catalog(&scope);
    assert!(first.len() > 100, "{first:#?}");

    let report = block_on(undo(&mut client, 1, false)).unwrap();
    assert_eq!(report.version, Some(SchemaVersion(NEWEST_KNOWN.0 - 1)));
    let report = block_on(undo(&mut client, ALL, false)).unwrap();
    assert_eq!(report.version, None);
    assert_eq!(catalog(&scope), BTreeSet::new());
    assert_eq!(
        text_column(&scope, "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"),
        [""; 0]
    );
    assert!(block_on(undo(&mut client, 1, false)).unwrap().undone.is_empty());

    block_on(migrate(&mut client)).unwrap();
    let second = catalog(&scope);
    assert_eq!(first.symmetric_difference(&second).collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn each_step_down_and_up_again_changes_nothing() {
    let (scope, mut client) = migrated("each_step");
    let whole = catalog(&scope);
    for count in 1..=NEWEST_KNOWN.0.unsigned_abs() {
        assert_eq!(block_on(undo(&mut client, count, false)).unwrap().undone.len(), count as usize);
        block_on(migrate(&mut client)).unwrap();
        assert_eq!(catalog(&scope), whole, "after {count} down and up");
    }
}

#[test]
fn undo_destroys_payments_only_when_told_to() {
    let (scope, mut client) = migrated("undo_force");
    scope.execute(
        "INSERT INTO payment_writer.payment_core
         VALUES (gen_random_uuid(), now(), 1, 1.5, 'EUR', 2, 'BWI')",
    );
    let error = block_on(undo(&mut client, ALL, false)).unwrap_err();
    assert!(matches!(&error, SchemaError::NotEmpty(tables) if tables == &["payment_core"]), "{error}");
    assert!(error.to_string().contains("--force"));
    assert_eq!(block_on(check(&client)).unwrap(), NEWEST_KNOWN, "nothing was undone");
    assert_eq!(scope.count("payment_core"), 1);

    assert_eq!(block_on(undo(&mut client, ALL, true)).unwrap().version, None);
    assert!(catalog(&scope).is_empty());
}

#[test]
fn undo_drops_months_and_generations_that_came_after_the_migration() {
    let (scope, mut client) = migrated("undo_later_tables");
    block_on(make_months_ahead(&mut client)).unwrap();
    scope.execute("SELECT payment_writer.make_generation_v1(2)");
    block_on(undo(&mut client, ALL, false)).unwrap();
    assert!(catalog(&scope).is_empty());
}

#[test]
fn status_prints_which_steps_ran_when_and_which_did_not() {
    let (_scope, mut client) = empty("status");
    let before = block_on(status(&client)).unwrap();
    assert_eq!(before.version(), None);
    assert!(before.steps.iter().all(|s| s.state == StepState::Pending));

    block_on(migrate(&mut client)).unwrap();
    block_on(undo(&mut client, 1, false)).unwrap();

    let after = block_on(status(&client)).unwrap();
    assert_eq!(after.version(), Some(SchemaVersion(NEWEST_KNOWN.0 - 1)));
    let (last, earlier) = after.steps.split_last().unwrap();
    assert_eq!(last.state, StepState::Pending);
    for step in earlier {
        let StepState::Applied(when) = &step.state else { panic!("{step:?}") };
        let when: std::time::SystemTime = humantime::parse_rfc3339_weak(&when[..19]).unwrap();
        assert!(when.elapsed().unwrap() < Duration::from_secs(3600));
    }
}

#[test]
fn a_step_with_another_checksum_is_reported_and_rejected() {
    let (scope, mut client) = migrated("divergent");
    scope.execute("UPDATE payment_writer.schema_history SET checksum = '1' WHERE version = 2");
    let found = block_on(status(&client)).unwrap();
    assert!(matches!(found.steps[1].state, StepState::Divergent(_)));
    for error in [
        block_on(check(&client)).unwrap_err(),
        block_on(migrate(&mut client)).unwrap_err(),
        block_on(undo(&mut client, ALL, true)).unwrap_err(),
    ] {
        assert!(matches!(error, SchemaError::Divergent { version: SchemaVersion(2), .. }), "{error}");
    }
}

#[test]
fn run_refuses_a_schema_that_it_does_not_know() {
    let (scope, mut client) = empty("check");
    let absent = block_on(check(&client)).unwrap_err();
    assert!(matches!(absent, SchemaError::Absent), "{absent}");
    assert!(absent.to_string().contains("payment-writer migrate"));

    block_on(migrate(&mut client)).unwrap();
    assert_eq!(block_on(check(&client)).unwrap(), NEWEST_KNOWN);

    scope.execute("DROP TABLE payment_writer.source_cursor");
    let incomplete = block_on(check(&client)).unwrap_err();
    assert!(
        matches!(&incomplete, SchemaError::Incomplete(names) if names == &["source_cursor"]),
        "{incomplete}"
    );

    let (_scope, mut client) = migrated("check_old");
    let too_many = u32::try_from(NEWEST_KNOWN.0 - OLDEST_SUPPORTED.0 + 1).unwrap();
    block_on(undo(&mut client, too_many, false)).unwrap();
    let old = block_on(check(&client)).unwrap_err();
    assert!(matches!(old, SchemaError::TooOld { .. }), "{old}");
    assert!(old.to_string().contains("payment-writer migrate"));
}

#[test]
fn during_a_rolling_upgrade_the_older_daemon_goes_on_if_the_schema_lets_it() {
    let (scope, mut client) = migrated("newer");
    let newer = SchemaVersion(NEWEST_KNOWN.0 + 1);
    scope.execute(&format!(
        "INSERT INTO payment_writer.schema_history VALUES ({newer}, 'of_the_future', '2030-01-01T00:00:00Z', '1')"
    ));
    assert_eq!(block_on(check(&client)).unwrap(), newer);
    let report = block_on(migrate(&mut client)).unwrap();
    assert_eq!((report.version, report.applied.len()), (newer, 0), "an older program's migrate does no harm");
    let error = block_on(undo(&mut client, 1, true)).unwrap_err();
    assert!(matches!(error, SchemaError::NotOurs(v) if v == newer), "{error}");

    scope.execute(&format!("UPDATE payment_writer.schema_compatibility SET oldest_known_version = {newer}"));
    for error in [block_on(check(&client)).unwrap_err(), block_on(migrate(&mut client)).unwrap_err()] {
        assert!(matches!(error, SchemaError::TooNew { .. }), "{error}");
    }
}

/// Sessions of this database that wait for a lock.
async fn waiting(watcher: &Client) -> i64 {
    const SELECT: &str = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                          WHERE NOT l.granted AND a.datname = current_database()";
    watcher.query_one(SELECT, &[]).await.unwrap().get(0)
}

async fn until(condition: impl AsyncFn() -> bool) {
    let condition = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, condition).await.unwrap();
}

#[test]
fn migrate_retries_until_a_long_statement_ends() {
    let (scope, mut client) = migrated("migrate_locked");
    block_on(undo(&mut client, 1, false)).unwrap();
    let (holder, watcher) = (scope.connect(), scope.connect());
    block_on(holder.batch_execute("BEGIN; LOCK TABLE payment_writer.schema_history IN SHARE MODE")).unwrap();
    let report = block_on(async {
        let release = async {
            until(async || waiting(&watcher).await > 0).await;
            until(async || waiting(&watcher).await == 0).await;
            holder.batch_execute("COMMIT").await.unwrap();
        };
        tokio::join!(migrate(&mut client), release).0.unwrap()
    });
    assert_eq!(report.applied.len(), 1);
}

#[test]
fn undo_gives_up_behind_a_long_statement_and_can_be_repeated() {
    let (scope, mut client) = migrated("undo_locked");
    let holder = scope.connect();
    block_on(holder.batch_execute("BEGIN; LOCK TABLE payment_writer.payment_core IN ACCESS SHARE MODE"))
        .unwrap();
    let error = block_on(undo(&mut client, 1, false)).unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "55P03", "{error}");
    block_on(holder.batch_execute("COMMIT")).unwrap();
    block_on(undo(&mut client, 1, false)).unwrap();
}

#[test]
fn tables_have_the_columns_of_the_contract() {
    let (scope, _client) = migrated("columns");
    let expected = [
        (
            "payment_core",
            "payment_id uuid!, created_at timestamp with time zone!, cust_id bigint!, \
          amount numeric(20,6)!, currency text!, status smallint!, type text!",
        ),
        (
            "payment_metadata",
            "payment_id uuid!, created_at timestamp with time zone!, \
          updated_at timestamp with time zone!, version integer!, message_id uuid!, \
          source_partition integer!, source_offset bigint!",
        ),
        (
            "payment_notes",
            "payment_id uuid!, created_at timestamp with time zone!, external_ref_id text, comment text",
        ),
        (
            "idempotency",
            "message_id uuid!, source_offset bigint!, payload_hash bigint!, \
          created_at timestamp with time zone!, source_partition integer!, date date!",
        ),
        (
            "source_cursor",
            "topic text!, topic_id uuid!, partition integer!, applied bigint!, published bigint, \
          applied_timestamp timestamp with time zone",
        ),
    ];
    for (table, columns) in expected {
        let found = scope.sql(
            "SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod) ||
                               CASE WHEN attnotnull THEN '!' ELSE '' END, ', ' ORDER BY attnum)
             FROM pg_attribute WHERE attrelid = ('payment_writer.' || $1)::regclass AND attnum > 0 AND NOT attisdropped",
            &[&table],
        );
        assert_eq!(found[0].get::<_, &str>(0), columns, "{table}");
    }
    // No foreign keys at all, and no index on payments.
    assert!(scope.sql("SELECT FROM pg_constraint WHERE contype = 'f'", &[]).is_empty());
    let indexes = "SELECT FROM pg_indexes WHERE schemaname = 'payment_writer' AND tablename LIKE 'payment%'";
    assert!(scope.sql(indexes, &[]).is_empty());
}

#[test]
fn a_message_id_is_claimed_once_and_read_from_one_view() {
    let (scope, client) = migrated("claims");
    let current = scope.sql(
        "SELECT g.leaf, cardinality(c.older_generations)
         FROM payment_writer.idempotency_current c
         JOIN payment_writer.idempotency_generation g ON g.generation = c.current_generation AND g.state = 'current'",
        &[],
    );
    assert_eq!((current[0].get::<_, &str>(0), current[0].get::<_, i32>(1)), ("idempotency_g1", 0));
    let claim = "INSERT INTO payment_writer.idempotency_g1
                 (message_id, source_offset, payload_hash, created_at, source_partition)
                 VALUES ('0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e8f', 1, 2, now(), 3)";
    block_on(client.batch_execute(claim)).unwrap();
    let twice = block_on(client.batch_execute(claim)).unwrap_err();
    assert_eq!(twice.code().unwrap().code(), "23505");
    let direct = block_on(client.batch_execute(&claim.replace("idempotency_g1", "idempotency"))).unwrap_err();
    assert_eq!(direct.code().unwrap().code(), "23514", "the parent holds no row");
    let read = scope.sql(
        "SELECT date = (now() AT TIME ZONE 'UTC')::date FROM payment_writer.idempotency WHERE source_partition = 3",
        &[],
    );
    assert_eq!(read.iter().map(|row| row.get(0)).collect::<Vec<bool>>(), [true]);
}

#[test]
fn only_one_generation_is_current() {
    let (_scope, client) = migrated("one_current");
    block_on(client.batch_execute("SELECT payment_writer.make_generation_v1(2)")).unwrap();
    let error = block_on(client.batch_execute(
        "UPDATE payment_writer.idempotency_generation SET state = 'current' WHERE generation = 2",
    ))
    .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "23505");
    for broken in [
        "UPDATE payment_writer.idempotency_current SET older_generations = '{2}'",
        "UPDATE payment_writer.idempotency_current SET older_generations = '{1}', older_youngest = '{null}'",
        "INSERT INTO payment_writer.idempotency_current VALUES (false, 2)",
    ] {
        assert_eq!(
            block_on(client.batch_execute(broken)).unwrap_err().code().unwrap().code(),
            "23514",
            "{broken}"
        );
    }
}

#[test]
fn a_later_generation_has_the_structure_of_the_first() {
    let (scope, _client) = migrated("same_shape");
    scope.execute("SELECT payment_writer.make_generation_v1(2)");
    let of = |leaf: &str| -> Vec<String> {
        catalog(&scope).into_iter().filter(|l| l.contains(leaf)).map(|l| l.replace(leaf, "LEAF")).collect()
    };
    assert_eq!(of("idempotency_g1"), of("idempotency_g2"));
}

/// Cursors of partitions 0 to 9 at offset 100.
fn with_cursors(name: &str) -> (Scope<'static>, Client) {
    let (scope, client) = migrated(name);
    scope.execute(&format!(
        "INSERT INTO payment_writer.source_cursor (topic, topic_id, partition, applied, published, applied_timestamp)
         SELECT 't', '{TOPIC_ID}', p, 100, 90, '2026-01-01' FROM generate_series(0, 9) AS p"
    ));
    (scope, client)
}

/// The lowest partition whose guard failed, as the error's detail says.
#[derive(serde::Deserialize, PartialEq, Debug)]
struct LostGuard {
    partition: i32,
    /// `applied` as the lane last read or wrote it.
    seen: Option<i64>,
    /// `applied` in the database; `None` without a row.
    applied: Option<i64>,
}

impl LostGuard {
    /// `None` if it is another error.
    fn from_error(error: &tokio_postgres::Error) -> Option<Self> {
        let db = error.as_db_error().filter(|db| db.code().code() == SQLSTATE_CURSOR_MOVED)?;
        serde_json::from_str(db.detail()?).ok()
    }
}

/// Partition, seen, applied, published; without the timestamps.
type Move = (i32, i64, i64, Option<i64>);

async fn move_cursors(client: &Client, moves: &[Move]) -> Result<(), tokio_postgres::Error> {
    let none: Vec<Option<std::time::SystemTime>> = vec![None; moves.len()];
    client
        .execute(
            "SELECT payment_writer.move_cursors_v1($1, $2, $3, $4, $5, $6)",
            &[
                &TOPIC_ID,
                &moves.iter().map(|m| m.0).collect::<Vec<_>>(),
                &moves.iter().map(|m| m.1).collect::<Vec<_>>(),
                &moves.iter().map(|m| m.2).collect::<Vec<_>>(),
                &moves.iter().map(|m| m.3).collect::<Vec<_>>(),
                &none,
            ],
        )
        .await
        .map(|_| ())
}

fn cursor(scope: &Scope<'_>, partition: i32) -> (i64, Option<i64>, Option<String>) {
    let rows = scope.sql(
        "SELECT applied, published, (applied_timestamp AT TIME ZONE 'UTC')::date::text
         FROM payment_writer.source_cursor WHERE partition = $1",
        &[&partition],
    );
    (rows[0].get(0), rows[0].get(1), rows[0].get(2))
}

#[test]
fn cursors_move_forward_and_only_forward() {
    let (scope, client) = with_cursors("cursors");
    let day = || Some("2026-01-01".to_owned());
    // Not in order of partitions, one with nothing published, one that moves back.
    block_on(move_cursors(&client, &[(7, 100, 150, Some(120)), (3, 100, 101, None), (5, 100, 40, Some(40))]))
        .unwrap();
    assert_eq!(cursor(&scope, 7), (150, Some(120), day()));
    assert_eq!(cursor(&scope, 3), (101, Some(90), day()));
    assert_eq!(cursor(&scope, 5), (100, Some(90), day()));
    assert_eq!(cursor(&scope, 0), (100, Some(90), day()));

    // After a restore, `published` is ahead of `applied`.
    block_on(move_cursors(&client, &[(7, 150, 150, Some(1_000))])).unwrap();
    assert_eq!(cursor(&scope, 7), (150, Some(1_000), day()));
    block_on(move_cursors(&client, &[])).unwrap();
}

#[test]
fn the_timestamp_is_that_of_the_last_record_before_the_cursor() {
    let (scope, client) = with_cursors("cursor_time");
    let call = |seen: i64, applied: i64, timestamp: &str| {
        let sql = format!(
            "SELECT payment_writer.move_cursors_v1('{TOPIC_ID}', '{{1}}', '{{{seen}}}', '{{{applied}}}', '{{null}}', '{{{timestamp}}}')"
        );
        block_on(client.batch_execute(&sql)).unwrap();
        cursor(&scope, 1).2
    };
    assert_eq!(call(100, 110, "2026-02-02"), Some("2026-02-02".into()));
    assert_eq!(call(110, 110, "2026-03-03"), Some("2026-02-02".into()), "no record was passed");
    assert_eq!(call(110, 111, "null"), Some("2026-02-02".into()), "only control records were passed");
    assert_eq!(call(111, 112, "-infinity"), None, "the last record has no timestamp");
}

#[test]
fn a_cursor_moved_by_another_session_prevents_the_commit() {
    let (scope, client) = with_cursors("guard");
    let error =
        block_on(move_cursors(&client, &[(2, 100, 130, None), (9, 99, 130, None), (4, 70, 130, None)]))
            .unwrap_err();
    assert_eq!(error.code().unwrap().code(), SQLSTATE_CURSOR_MOVED);
    assert_eq!(
        LostGuard::from_error(&error),
        Some(LostGuard { partition: 4, seen: Some(70), applied: Some(100) })
    );
    for partition in [2, 4, 9] {
        assert_eq!(cursor(&scope, partition).0, 100);
    }

    let error = block_on(move_cursors(&client, &[(2, 100, 130, None), (77, 0, 130, None)])).unwrap_err();
    assert_eq!(
        LostGuard::from_error(&error),
        Some(LostGuard { partition: 77, seen: Some(0), applied: None })
    );
    assert_eq!(cursor(&scope, 2).0, 100);
}

#[test]
fn a_lost_guard_rolls_back_a_simple_query_of_several_statements() {
    let (scope, client) = with_cursors("guard_simple");
    let error = block_on(client.batch_execute(&format!(
        "INSERT INTO payment_writer.payment_core VALUES (gen_random_uuid(), now(), 1, 1.5, 'EUR', 2, 'BWI');
         SELECT payment_writer.move_cursors_v1('{TOPIC_ID}', '{{1}}', '{{99}}', '{{130}}', '{{null}}', '{{null}}')"
    )))
    .unwrap_err();
    assert!(LostGuard::from_error(&error).is_some());
    assert_eq!(scope.count("payment_core"), 0);
}

#[test]
fn arrays_of_different_lengths_or_with_repeated_partitions_are_rejected() {
    let (_scope, client) = with_cursors("guard_arguments");
    let twice = block_on(move_cursors(&client, &[(2, 100, 130, None), (2, 100, 130, None)])).unwrap_err();
    assert_eq!(twice.code().unwrap().code(), "PW002");
    let short = block_on(client.batch_execute(&format!(
        "SELECT payment_writer.move_cursors_v1('{TOPIC_ID}', '{{1,2}}', '{{100}}', '{{130,130}}', '{{1,1}}', '{{null,null}}')"
    )))
    .unwrap_err();
    assert_eq!(short.code().unwrap().code(), "PW002");
}

#[test]
fn a_zombie_that_waited_for_the_lock_loses_the_guard() {
    let (scope, owner) = with_cursors("zombie");
    let (zombie, watcher) = (session(&scope), scope.connect());
    block_on(async {
        owner.batch_execute("BEGIN").await.unwrap();
        move_cursors(&owner, &[(1, 100, 110, None), (2, 100, 110, None)]).await.unwrap();
        let late = async {
            zombie.batch_execute("BEGIN").await.unwrap();
            move_cursors(&zombie, &[(2, 100, 120, None), (3, 100, 120, None)]).await
        };
        let commit = async {
            until(async || waiting(&watcher).await > 0).await;
            owner.batch_execute("COMMIT").await.unwrap();
        };
        let (lost, ()) = tokio::join!(late, commit);
        let lost = LostGuard::from_error(&lost.unwrap_err()).unwrap();
        assert_eq!((lost.partition, lost.applied), (2, Some(110)));
    });
    assert_eq!(cursor(&scope, 3).0, 100);
}

#[test]
fn lanes_that_name_partitions_in_opposite_order_do_not_deadlock() {
    let (scope, one) = with_cursors("opposite");
    let other = session(&scope);
    let run = async |client: &Client, partitions: Vec<i32>| {
        let mut won = 0;
        for _ in 0..200 {
            let rows = client
                .query("SELECT partition, applied FROM payment_writer.source_cursor ORDER BY partition", &[])
                .await
                .unwrap();
            let moves: Vec<Move> = partitions
                .iter()
                .map(|p| {
                    let applied: i64 = rows[*p as usize].get(1);
                    (*p, applied, applied + 1, None)
                })
                .collect();
            match move_cursors(client, &moves).await {
                Ok(()) => won += 1,
                Err(e) => assert_eq!(e.code().unwrap().code(), SQLSTATE_CURSOR_MOVED, "{e:?}"),
            }
        }
        won
    };
    let (a, b) =
        block_on(async { tokio::join!(run(&one, (0..10).collect()), run(&other, (0..10).rev().collect())) });
    assert_eq!(cursor(&scope, 4).0, 100 + a + b, "each win moved each cursor once");
}

fn partitions(scope: &Scope<'_>) -> Vec<String> {
    const SELECT: &str = "SELECT c.relname || ' ' || pg_get_expr(c.relpartbound, c.oid) FROM pg_class c
                          WHERE c.relispartition AND c.relname LIKE 'payment_core_2%' ORDER BY 1";
    // A session with a known time zone, in which bounds are displayed.
    block_on(session(scope).query(SELECT, &[])).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn concurrent_sessions_create_months_ahead_exactly_once() {
    let (scope, _client) = migrated("months");
    let mut sessions: Vec<Client> = (0..8).map(|_| session(&scope)).collect();
    let reports = block_on(join_all(sessions.iter_mut().map(make_months_ahead)));
    let mut made: Vec<String> = reports
        .into_iter()
        .flat_map(|report| {
            let report = report.unwrap();
            assert!(report.waiting.is_empty(), "{report:?}");
            report.made
        })
        .collect();
    made.sort();
    assert_eq!(made.len(), 9, "three tables, this month and two more: {made:?}");
    made.dedup();
    assert_eq!(made.len(), 9);
    assert_eq!(partitions(&scope).len(), 3);

    scope.execute(
        "INSERT INTO payment_writer.payment_core VALUES (gen_random_uuid(), now(), 1, 1.5, 'EUR', 2, 'BWI')",
    );
    assert_eq!(scope.count("payment_core_default"), 0);
}

#[test]
fn a_month_starts_and_ends_at_midnight_in_utc() {
    let (scope, mut client) = migrated("month_bounds");
    block_on(client.batch_execute("SET TimeZone = 'Pacific/Kiritimati'")).unwrap();
    block_on(make_months(&mut client, Month::new(2026, 12).unwrap(), 2)).unwrap();
    assert_eq!(
        partitions(&scope),
        [
            "payment_core_2026_12 FOR VALUES FROM ('2026-12-01 00:00:00+00') TO ('2027-01-01 00:00:00+00')",
            "payment_core_2027_01 FOR VALUES FROM ('2027-01-01 00:00:00+00') TO ('2027-02-01 00:00:00+00')",
        ]
    );
}

#[test]
fn rows_in_the_default_partition_are_moved_when_their_month_is_created() {
    let (scope, mut client) = migrated("month_rows");
    scope.execute(
        "INSERT INTO payment_writer.payment_core VALUES (gen_random_uuid(), '2026-05-31 23:59:59+00', 1, 1.5, 'EUR', 2, 'BWI')",
    );
    let report = block_on(make_months(&mut client, Month::new(2026, 5).unwrap(), 2)).unwrap();
    assert_eq!((report.moved, report.made.len()), (1, 6));
    assert!(report.waiting.is_empty(), "{report:?}");
    assert_eq!((scope.count("payment_core_default"), scope.count("payment_core_2026_05")), (0, 1));
}

#[test]
fn creating_a_month_does_not_block_writers() {
    let (scope, mut client) = migrated("month_writers");
    block_on(make_months(&mut client, Month::new(2026, 5).unwrap(), 1)).unwrap();
    let row = "INSERT INTO payment_writer.payment_core VALUES (gen_random_uuid(), '2026-05-05', 1, 1.5, 'EUR', 2, 'BWI')";
    let writer = scope.connect();
    block_on(writer.batch_execute(&format!("BEGIN; {row}"))).unwrap();

    // A writer's open transaction does not block the creation of the next month …
    let report = block_on(make_months(&mut client, Month::new(2026, 6).unwrap(), 1)).unwrap();
    assert_eq!(report.made.len(), 3, "{report:?}");

    // … and the creation of a month does not block the writer.
    let maker = scope.connect();
    block_on(maker.batch_execute(
        "BEGIN; CREATE TABLE payment_writer.x (LIKE payment_writer.payment_core INCLUDING ALL);
         ALTER TABLE payment_writer.payment_core ATTACH PARTITION payment_writer.x
         FOR VALUES FROM ('2026-08-01+00') TO ('2026-09-01+00')",
    ))
    .unwrap();
    block_on(writer.batch_execute(&format!("SET lock_timeout = 100; {row}; COMMIT"))).unwrap();
    block_on(maker.batch_execute("ROLLBACK")).unwrap();
}

#[test]
fn a_long_reader_delays_the_month_and_nobody_else() {
    let (scope, mut client) = migrated("month_reader");
    let reader = scope.connect();
    block_on(reader.batch_execute("BEGIN; SELECT FROM payment_writer.payment_core")).unwrap();
    let writer = scope.connect();
    let (report, longest_wait) = block_on(async {
        let month = Month::new(2026, 5).unwrap();
        let make = make_months(&mut client, month, 1);
        tokio::pin!(make);
        let mut longest_wait = Duration::ZERO;
        loop {
            // The worst case for a row: it needs the partition whose lock the creation of a month waits for.
            let begin = Instant::now();
            let write = writer.batch_execute(
                "INSERT INTO payment_writer.payment_core VALUES (gen_random_uuid(), '2031-05-05', 1, 1.5, 'EUR', 2, 'BWI')",
            );
            tokio::select! {
                report = &mut make => break (report.unwrap(), longest_wait),
                done = write => done.unwrap(),
            }
            longest_wait = longest_wait.max(begin.elapsed());
        }
    });
    assert_eq!(report.waiting[0], ("payment_core_2026_05".to_owned(), Obstacle::Locked));
    assert_eq!(report.made, ["payment_metadata_2026_05", "payment_notes_2026_05"]);
    println!("longest wait of a writer to the default partition: {longest_wait:?}");
    assert!(longest_wait < Duration::from_secs(2), "{longest_wait:?}");

    block_on(reader.batch_execute("COMMIT")).unwrap();
    let report = block_on(make_months(&mut client, Month::new(2026, 5).unwrap(), 1)).unwrap();
    assert_eq!(report.made, ["payment_core_2026_05"]);
}

#[test]
fn a_detached_month_is_not_created_again() {
    let (scope, mut client) = migrated("month_detached");
    let may = Month::new(2026, 5).unwrap();
    block_on(make_months(&mut client, may, 1)).unwrap();
    scope.execute(
        "ALTER TABLE payment_writer.payment_core DETACH PARTITION payment_writer.payment_core_2026_05",
    );
    let report = block_on(make_months(&mut client, may, 1)).unwrap();
    assert_eq!(report.waiting, [("payment_core_2026_05".to_owned(), Obstacle::NameTaken)]);
    assert!(report.made.is_empty());
}

#[test]
fn a_writer_needs_no_ddl_not_even_for_later_generations() {
    let (scope, client) = with_cursors("writer_role");
    let role = format!("{}_writer", scope.database);
    scope.execute_as_admin(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'w'"));
    scope.execute(&format!(
        "GRANT USAGE ON SCHEMA payment_writer TO \"{role}\";
         GRANT SELECT, INSERT ON payment_writer.payment_core, payment_writer.payment_metadata,
             payment_writer.payment_notes, payment_writer.idempotency, payment_writer.cursor_audit TO \"{role}\";
         GRANT SELECT, INSERT, UPDATE ON payment_writer.source_cursor, payment_writer.bound_group TO \"{role}\";
         GRANT SELECT ON payment_writer.idempotency_current, payment_writer.idempotency_generation,
             payment_writer.database_identity, payment_writer.schema_history,
             payment_writer.schema_compatibility TO \"{role}\";
         GRANT INSERT ON payment_writer.idempotency_g1 TO \"{role}\";
         SELECT payment_writer.make_generation_v1(2)"
    ));
    let url = scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{role}:w@"));
    let writer = connect(&url).unwrap();

    assert_eq!(block_on(check(&writer)).unwrap(), NEWEST_KNOWN);
    block_on(move_cursors(&writer, &[(1, 100, 110, None)])).unwrap();
    for leaf in ["idempotency_g1", "idempotency_g2"] {
        block_on(writer.batch_execute(&format!(
            "INSERT INTO payment_writer.{leaf} (message_id, source_offset, payload_hash, created_at, source_partition)
             VALUES (gen_random_uuid(), 1, 2, now(), 3)"
        )))
        .unwrap();
    }
    block_on(writer.batch_execute(
        "INSERT INTO payment_writer.payment_core VALUES (gen_random_uuid(), now(), 1, 1.5, 'EUR', 2, 'BWI');
         INSERT INTO payment_writer.cursor_audit (command) VALUES ('skip');
         SELECT pg_advisory_xact_lock_shared(1, 1)",
    ))
    .unwrap();
    let ddl = block_on(writer.batch_execute("CREATE TABLE payment_writer.mine ()")).unwrap_err();
    assert_eq!(ddl.code().unwrap().code(), "42501");
    // It is up to date for any role.
    let mut writer = writer;
    assert!(block_on(migrate(&mut writer)).unwrap().applied.is_empty());
    drop(client);
}

#[test]
fn the_error_for_a_wrong_password_does_not_contain_it() {
    let scope = Scope::new(Servers::shared(), "password");
    let url = scope.postgres_url().replace(":payment_writer@", ":s3cret-and-wrong@");
    let error = connect(&url).err().unwrap();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("SQLSTATE 28P01"), "{error}");
    assert!(!error.to_string().contains("s3cret"), "{error}");
}

#[test]
fn sessions_have_the_same_settings_with_and_without_a_pool() {
    let scope = Scope::new(Servers::shared(), "session");
    scope.execute_as_admin(&format!("ALTER DATABASE \"{}\" SET synchronous_commit = off", scope.database));
    let settings =
        "SELECT string_agg(name || '=' || setting, ' ' ORDER BY name COLLATE \"C\") FROM pg_settings WHERE name IN
        ('application_name', 'jit', 'synchronous_commit', 'TimeZone', 'idle_in_transaction_session_timeout')";
    let expected = "TimeZone=UTC application_name=payment-writer idle_in_transaction_session_timeout=30000 jit=off \
         synchronous_commit=on";
    let alone = session(&scope);
    assert_eq!(block_on(alone.query_one(settings, &[])).unwrap().get::<_, &str>(0), expected);
    block_on(async {
        let pool = Endpoint::parse(&scope.postgres_url()).unwrap().pool(2).unwrap();
        let pooled = pool.get().await.unwrap();
        assert_eq!(pooled.query_one(settings, &[]).await.unwrap().get::<_, &str>(0), expected);
    });

    scope.execute_as_admin(&format!(
        "ALTER DATABASE \"{}\" SET synchronous_commit = remote_apply",
        scope.database
    ));
    let strong = session(&scope);
    let row = block_on(strong.query_one("SHOW synchronous_commit", &[])).unwrap();
    assert_eq!(row.get::<_, &str>(0), "remote_apply", "never weakened");
}

#[test]
fn the_commands_print_what_they_did() {
    let (_scope, mut client) = empty("printed");
    let mut out = Vec::new();
    let report = block_on(migrate(&mut client)).unwrap();
    schema::print_migrate(&report, &mut out).unwrap();
    schema::print_status(&block_on(status(&client)).unwrap(), &mut out).unwrap();
    schema::print_undo(&block_on(undo(&mut client, ALL, false)).unwrap(), &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    assert!(text.starts_with("applied V1__payment_tables\napplied V2__idempotency_generations\n"), "{text}");
    assert!(text.contains("3  cursors_and_identity     applied 20"), "{text}");
    assert!(text.ends_with("undone V1__payment_tables\nthe schema is removed\n"), "{text}");
}
