//! Drills of docs/how-to/backup.md: dump and restore, point-in-time recovery, and a change to another version of
//! Postgres, with its own client programs, beside a daemon under load.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::audit::audit;
use crate::reconcile::{is_fine, not_compared};
use crate::replication::{DAY_MS, PAYMENTS, PUBLICATION, SUBSCRIBER, age_current, digest, now_ms};
use crate::support::{
    Act, Daemon, Flow, Load, Member, Message, PATIENCE, Payment, Postgres, Scope, Servers, postgres_program,
    succeeds, uuid_v4, wait_until, wait_until_within,
};

/// A payment of a month that has no partition yet.
fn payment_of_an_old_month(seed: u64) -> Message {
    Payment::new(uuid_v4(seed), 7).message().timestamp_ms(now_ms() - 100 * DAY_MS)
}

fn member() -> Member {
    Member::new("a").with("BATCH__MAX_PAYMENTS", "100").soon_forgotten()
}

/// Waits until the daemon has written so many more payments.
fn writes(scope: &Scope<'_>, count: i64) {
    let before = scope.count("payment_core");
    wait_until_within(PATIENCE, "payments are written", || scope.count("payment_core") >= before + count);
}

/// Ends load and instances when everything is written. Every offset has its outcome: by the tests' check, the auditor and
/// reconcile.
pub fn ends_exactly_once(scope: &Scope<'_>, flow: Flow<Load>, daemons: &mut [Daemon]) {
    drop(flow.end());
    scope.wait_until_caught_up();
    daemons.iter_mut().for_each(Daemon::drains);
    scope.assert_exactly_once();
    let audit = audit(scope);
    assert_eq!(audit.code, Some(0), "{}{}", audit.stdout, audit.stderr);
    is_fine(scope, &[]);
}

/// Partitions whose rows have to be written again: their events were sent.
fn behind(scope: &Scope<'_>) -> usize {
    let cursors = scope.cursors();
    scope.committed_all().iter().filter(|(p, (at, _))| cursors.get(p).is_none_or(|c| c.0 < *at)).count()
}

/// Restores a dump in the custom format into the scope's empty database.
fn restore(scope: &Scope<'_>, dump: &Path) {
    let mut command = postgres_program("pg_restore");
    succeeds(command.args(["--exit-on-error", "--dbname", &scope.postgres_url()]).arg(dump));
    // A restored database has no statistics.
    scope.execute("ANALYZE");
}

#[test]
#[ignore = "needs the client programs of Postgres 15: make trials"]
fn trials_a_dump_made_under_load_is_restored_and_the_daemon_writes_what_it_lacks() {
    // GIVEN a daemon under load, a subscriber of the payments, and payments of a month that has no partition
    let [first, second, subscriber] = ["15", "15", "18"].map(Postgres::of);
    let mut scope = Scope::new_on(&first, Servers::shared(), "dump");
    scope.prepare(6, 2);
    scope.execute(PUBLICATION);
    subscriber.execute("postgres", "CREATE DATABASE copy");
    subscriber.execute("copy", SUBSCRIBER);
    subscriber.subscribe("copy", "payments", &first, &scope.database);
    let mut daemon = member().start(&scope);
    let flow = Flow::start(&scope, Load::new(92), 10);
    scope.produce(&scope.input_topic, (0..20).map(|n| payment_of_an_old_month(900 + n)));
    writes(&scope, 800);

    // WHEN it is dumped slowly, and housekeeping makes a pass meanwhile
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("payments.dump");
    let mut dumping = postgres_program("pg_dump")
        .args(["--format", "custom", "--compress", "0", &scope.postgres_url()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut reader = dumping.stdout.take().unwrap();
    let mut begin = vec![0; 8192];
    reader.read_exact(&mut begin).unwrap();
    let pass = scope.command(&["prune"]).succeeds();
    // THEN the daemon goes on, and months are left to a later pass
    assert!(pass.stdout.contains("month not created: payment_core_"), "{pass:?}");
    writes(&scope, 200);
    assert!(dumping.try_wait().unwrap().is_none(), "the dump has ended");
    let mut file = File::create(&dump).unwrap();
    file.write_all(&begin).unwrap();
    std::io::copy(&mut reader, &mut file).unwrap();
    assert!(dumping.wait().unwrap().success());
    let pass = scope.command(&["prune"]).succeeds();
    assert!(pass.stdout.contains("rows moved from the default partitions: 40"), "{pass:?}");
    writes(&scope, 200);

    // WHEN the server is lost with the daemon, and the dump is restored on another one
    daemon.kill();
    first.act(Act::Kill);
    scope.move_to(&second);
    scope.recreate_database();
    restore(&scope, &dump);
    // THEN it is older than the group's offsets
    assert!(behind(&scope) > 0);
    assert!(!not_compared(&is_fine(&scope, &[])).is_empty());
    // AND has lost the subscription, which somebody makes again without a copy
    subscriber.execute("copy", "ALTER SUBSCRIPTION payments DISABLE");
    subscriber.execute("copy", "ALTER SUBSCRIPTION payments SET (slot_name = NONE)");
    subscriber.execute("copy", "DROP SUBSCRIPTION payments");
    let again = format!(
        "CREATE SUBSCRIPTION payments CONNECTION '{}' PUBLICATION payments WITH (copy_data = false)",
        second.conninfo(&scope.database)
    );
    subscriber.execute("copy", &again);
    // AND the daemon writes what it lacks, sends no event twice, and goes on
    let daemon = member().start(&scope);
    writes(&scope, 500);
    ends_exactly_once(&scope, flow, &mut [daemon]);
    // AND the subscriber refuses what is written again, until it is filled anew
    let stopped = "SELECT apply_error_count > 0 FROM pg_stat_subscription_stats";
    wait_until("the subscription has stopped", || subscriber.sql("copy", stopped)[0].get(0));
    subscriber.execute("copy", "DROP SUBSCRIPTION payments");
    PAYMENTS.iter().for_each(|table| subscriber.execute("copy", &format!("TRUNCATE payment_writer.{table}")));
    subscriber.subscribe("copy", "payments", &second, &scope.database);
    for table in PAYMENTS {
        assert_eq!(digest(&subscriber, "copy", &[table]), digest(&second, &scope.database, &[table]));
    }
    subscriber.execute("copy", "DROP SUBSCRIPTION payments");
}

#[test]
#[ignore = "needs the client programs of Postgres 15: make trials"]
fn trials_a_base_backup_is_recovered_to_a_moment_and_the_daemon_writes_what_came_later() {
    // GIVEN a server that archives its log, and two instances under load
    let server = Postgres::of("15");
    let (data, archive) = (server.data(), server.data().with_file_name("archive"));
    fs::create_dir(&archive).unwrap();
    belongs_to_the_server(&archive);
    let archive_name = archive.display();
    let command = format!("test ! -f {archive_name}/%f && cp %p {archive_name}/%f");
    server.execute("postgres", &format!("ALTER SYSTEM SET archive_command = '{command}'"));
    server.execute("postgres", "ALTER SYSTEM SET archive_mode = on");
    server.act(Act::Stop);
    server.act(Act::Start);
    let scope = Scope::new_on(&server, Servers::shared(), "pitr");
    scope.prepare(6, 2);
    let [first, second] = ["a", "b"].map(|name| Member::new(name).with("BATCH__MAX_PAYMENTS", "100"));
    let mut daemons = [first.start(&scope), second.start(&scope)];
    daemons.iter().for_each(|daemon| daemon.wait_for_partitions("each has its half", |count| count == 3));
    let flow = Flow::start(&scope, Load::new(93), 10);
    writes(&scope, 300);

    // WHEN a base backup is made, and some time later the server is lost with one instance
    let backup = data.with_file_name("backup");
    let mut command = postgres_program("pg_basebackup");
    command.args(["--dbname", &server.admin_url("postgres"), "--checkpoint", "fast", "--wal-method", "none"]);
    succeeds(command.arg("--pgdata").arg(&backup));
    writes(&scope, 300);
    let moment: String = server.sql("postgres", "SELECT clock_timestamp()::text")[0].get(0);
    writes(&scope, 300);
    let lost = scope.count("payment_core");
    let switched: String = server.sql("postgres", "SELECT pg_walfile_name(pg_switch_wal())")[0].get(0);
    let archived = format!("SELECT coalesce(last_archived_wal >= '{switched}', false) FROM pg_stat_archiver");
    wait_until("the log is archived", || server.sql("postgres", &archived)[0].get(0));
    daemons[0].kill();
    server.act(Act::Kill);

    // AND it is recovered to a moment in between
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&backup, &data).unwrap();
    let mut settings = OpenOptions::new().append(true).open(data.join("postgresql.auto.conf")).unwrap();
    writeln!(
        settings,
        "restore_command = 'cp {archive_name}/%f %p'
         recovery_target_time = '{moment}'
         recovery_target_action = 'pause'"
    )
    .unwrap();
    File::create(data.join("recovery.signal")).unwrap();
    belongs_to_the_server(&data);
    server.act(Act::Start);
    let paused = "SELECT pg_get_wal_replay_pause_state() = 'paused'";
    wait_until("the recovery is over", || server.sql("postgres", paused)[0].get(0));

    // THEN it lacks payments whose events were sent
    let recovered = scope.count("payment_core");
    assert!(recovered < lost, "{recovered} of {lost}");
    assert!(behind(&scope) > 0);
    // AND after it is opened for writing, the instances write them, send no event twice, and go on
    server.execute("postgres", "SELECT pg_wal_replay_resume()");
    daemons[0] = first.start(&scope);
    writes(&scope, lost - recovered + 300);
    is_fine(&scope, &[]);
    ends_exactly_once(&scope, flow, &mut daemons);
    scope.command(&["prune"]).succeeds();
}

/// Gives the folder and its files to the user that runs the server, who owns the folder above.
fn belongs_to_the_server(folder: &Path) {
    succeeds(Command::new("chown").args(["-R", "--reference"]).arg(folder.parent().unwrap()).arg(folder));
}

#[test]
#[ignore = "needs the client programs of Postgres 15: make trials"]
fn trials_a_database_is_dumped_and_restored_into_a_newer_version() {
    // GIVEN a daemon of Postgres 15 under load, with the roles of sql/roles.sql
    let [older, newer] = [Postgres::of("15"), Postgres::of("18")];
    let mut scope = Scope::new_on(&older, Servers::shared(), "newer");
    scope.prepare(6, 2);
    older.execute(&scope.database, ROLES);
    let mut daemon = member().start(&scope);
    let flow = Flow::start(&scope, Load::new(94), 10);
    writes(&scope, 300);
    scope.command(&["prune"]).succeeds();

    // WHEN the daemon is stopped, and roles and database are copied by the programs of the older version
    daemon.drains();
    let source = scope.postgres_url();
    copy_roles(&older, &newer);
    scope.move_to(&newer);
    scope.recreate_database();
    let dump = succeeds(postgres_program("pg_dump").arg(&source)).stdout;
    psql(&scope.postgres_url(), &["--single-transaction", "--set", "ON_ERROR_STOP=1"], &dump);
    scope.execute("ANALYZE");

    // THEN nothing is to be written again
    assert_eq!(behind(&scope), 0);
    may_write(&newer, &scope);
    // AND the daemon goes on where it was
    scope.command(&["migrate"]).succeeds();
    let daemon = member().start(&scope);
    writes(&scope, 300);
    ends_exactly_once(&scope, flow, &mut [daemon]);
    scope.command(&["prune"]).succeeds();
}

const ROLES: &str = include_str!("../../sql/roles.sql");

/// Copies the roles of one server to another. Those that are there already are refused, which does not matter.
fn copy_roles(from: &Postgres, to: &Postgres) {
    let mut command = postgres_program("pg_dumpall");
    let roles = succeeds(command.args(["--roles-only", "--dbname", &from.admin_url("postgres")])).stdout;
    psql(&to.admin_url("postgres"), &[], &roles);
}

/// Runs a script, which must succeed.
#[track_caller]
fn psql(url: &str, options: &[&str], script: &[u8]) {
    let mut command = postgres_program("psql");
    command.arg("--quiet").args(options).arg(url).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut psql = command.stdout(Stdio::null()).spawn().unwrap();
    psql.stdin.take().unwrap().write_all(script).unwrap();
    let output = psql.wait_with_output().unwrap();
    assert!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
}

/// The grants of sql/roles.sql are there.
fn may_write(server: &Postgres, scope: &Scope<'_>) {
    let granted = "SELECT has_table_privilege('payment_writer_app', 'payment_writer.payment_core', 'INSERT')";
    assert!(server.sql(&scope.database, granted)[0].get::<_, bool>(0));
}

#[test]
#[ignore = "needs the client programs of Postgres 15: make trials"]
fn trials_a_newer_version_takes_over_by_logical_replication() {
    // GIVEN a daemon of Postgres 15 under load that makes no passes, and some passes in the past
    let [older, newer] = [Postgres::of("15"), Postgres::of("18")];
    let mut scope = Scope::new_on(&older, Servers::shared(), "followed");
    scope.prepare(6, 2);
    older.execute(&scope.database, ROLES);
    for _ in 0..3 {
        scope.command(&["prune"]).succeeds();
    }
    let member = member().with("IDEMPOTENCY__PRUNE_SCHEDULE", "");
    let mut daemon = member.start(&scope);
    let flow = Flow::start(&scope, Load::new(95), 10);
    writes(&scope, 300);

    // WHEN the newer one gets roles and tables, without rows, and subscribes to all tables
    copy_roles(&older, &newer);
    let dump = succeeds(postgres_program("pg_dump").args(["--schema-only", &scope.postgres_url()])).stdout;
    let database = scope.database.clone();
    newer.execute("postgres", &format!("CREATE DATABASE {database} OWNER payment_writer"));
    psql(&newer.url(&database), &["--single-transaction", "--set", "ON_ERROR_STOP=1"], &dump);
    older.execute(&database, "CREATE PUBLICATION upgrade FOR ALL TABLES");
    newer.subscribe(&database, "upgrade", &older, &database);
    writes(&scope, 300);

    // AND a pass is made all the same, which makes a month for rows of the default partitions, and a generation
    scope.produce(&scope.input_topic, (0..20).map(|n| payment_of_an_old_month(950 + n)));
    wait_until("they are written", || scope.count("payment_core_default") == 20);
    age_current(&scope);
    let pass = scope.command(&["prune"]).succeeds();
    assert!(pass.stdout.contains("rotated: generation 2"), "{pass:?}");
    // THEN the subscription stops
    let stopped = "SELECT apply_error_count > 0 FROM pg_stat_subscription_stats";
    wait_until("the subscription has stopped", || newer.sql(&database, stopped)[0].get(0));
    // AND it goes on after the new tables are there and the publication is refreshed
    let months = older.sql(
        &database,
        "SELECT p.relname::text, c.relname::text, pg_get_expr(c.relpartbound, c.oid)
         FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent
         WHERE p.relname ~ '^payment_' AND p.relkind = 'p'",
    );
    let is_new = |table: &str| {
        let found = format!("SELECT to_regclass('payment_writer.{table}') IS NULL");
        newer.sql(&database, &found)[0].get::<_, bool>(0)
    };
    let months: Vec<[String; 3]> = months.iter().map(|row| [row.get(0), row.get(1), row.get(2)]).collect();
    let new: Vec<_> = months.into_iter().filter(|[_, month, _]| is_new(month)).collect();
    assert_eq!(new.len(), 3, "{new:?}");
    scope.move_to(&newer);
    for [parent, month, _] in &new {
        scope.execute(&format!("CREATE TABLE payment_writer.{month} (LIKE payment_writer.{parent})"));
    }
    scope.execute(
        "CREATE TABLE payment_writer.idempotency_g3 (PRIMARY KEY (message_id)) INHERITS (payment_writer.idempotency)",
    );
    newer.execute(&database, "ALTER SUBSCRIPTION upgrade REFRESH PUBLICATION");
    newer.wait_until_copied(&database);
    older.wait_until_confirmed("upgrade");
    for [parent, month, bounds] in &new {
        let attach = format!("ATTACH PARTITION payment_writer.{month} {bounds}");
        scope.execute(&format!("ALTER TABLE payment_writer.{parent} {attach}"));
    }
    scope.move_to(&older);
    writes(&scope, 300);

    // WHEN the daemon is stopped, and the subscriber has everything
    daemon.drains();
    older.wait_until_confirmed("upgrade");
    newer.execute(&database, "DROP SUBSCRIPTION upgrade");
    scope.move_to(&newer);
    scope.execute("ANALYZE");
    newer.execute(&database, ROLES);
    // THEN nothing is to be written again
    assert_eq!(behind(&scope), 0);
    may_write(&newer, &scope);
    // AND sequences, which are not replicated, are set by `migrate`
    let next = "SELECT last_value + is_called::int > (SELECT max(id) FROM payment_writer.housekeeping_pass)
                FROM payment_writer.housekeeping_pass_id_seq";
    let is_ahead = || scope.sql(next, &[])[0].get::<_, bool>(0);
    assert!(!is_ahead());
    scope.command(&["migrate"]).succeeds();
    assert!(is_ahead());
    // AND the daemon goes on where it was
    let daemon = member.start(&scope);
    writes(&scope, 300);
    ends_exactly_once(&scope, flow, &mut [daemon]);
    scope.command(&["prune"]).succeeds();
}
