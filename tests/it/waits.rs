//! What the database makes the daemon wait for is named in the log, `/readyz` and `/status`.

use std::path::Path;
use std::process::{Child, Command};

use crate::outages::misses;
use crate::support::{Daemon, Load, Member, PATIENCE, Scope, Servers, free_address, wait_until_within};

fn member(name: &str) -> Member {
    Member::new(name).with("LANES", "1").soon_forgotten()
}

/// Creates a login with the writer's rights; returns its URL.
fn writer(scope: &Scope<'_>, role: &str) -> String {
    scope.execute_as_admin(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'u' IN ROLE payment_writer_app"));
    scope.postgres_url().replace("//payment_writer:payment_writer@", &format!("//{role}:u@"))
}

/// Waits until readiness fails for `reason`; then `/status` and the log name it, too.
#[track_caller]
fn tells(daemon: &Daemon, reason: &str) {
    misses(daemon, "database", reason);
    assert!(daemon.status()["missing"].to_string().replace('\\', "").contains(reason), "{}", daemon.status());
    let warned = |line: &str| (line.contains("WARN") || line.contains("ERROR")) && line.contains(reason);
    assert!(daemon.log().replace('\\', "").lines().any(warned), "{reason} in:\n{}", daemon.log());
}

/// A process that hangs in a COPY, and its heir with another login.
fn frozen(scope: &Scope<'_>, logins: &[String; 2]) -> (Daemon, Daemon, i32) {
    scope.prepare(2, 2);
    scope.execute_as_admin(include_str!("../../sql/roles.sql"));
    let urls = logins.clone().map(|role| writer(scope, &role));
    let member = |name: &str, url: &str| {
        member(name).with("POSTGRES__URL", url).with("POSTGRES__HOUSEKEEPING_URL", &scope.postgres_url())
    };
    scope.feed(Load::new(81).take(100));
    let frozen = member("a", &urls[0]).start_at(scope, "before_copy_ends:1:stop");
    wait_until_within(PATIENCE, "it hangs in a COPY", || frozen.is_stopped());
    let holder = "SELECT a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE l.relation = 'payment_writer.source_cursor'::regclass AND l.mode = 'RowExclusiveLock'
            AND a.usename = $1";
    // What the client sent before it was stopped may not have been executed yet.
    wait_until_within(PATIENCE, "it holds the cursors", || !scope.sql(holder, &[&logins[0]]).is_empty());
    let holder = scope.sql(holder, &[&logins[0]])[0].get(0);
    (frozen, member("b", &urls[1]).start(scope), holder)
}

fn end(scope: &Scope<'_>, logins: &[String; 2], mut frozen: Daemon, mut heir: Daemon) {
    scope.wait_until_caught_up();
    frozen.kill();
    heir.drains();
    scope.assert_exactly_once();
    let [old, new] = logins;
    scope.execute_as_admin(&format!("DROP ROLE \"{old}\", \"{new}\"; DROP OWNED BY payment_writer_app"));
}

fn logins(scope: &Scope<'_>) -> [String; 2] {
    ["old", "new"].map(|name| format!("{}_{name}", scope.database))
}

#[test]
fn a_lock_of_a_frozen_process_is_named_with_its_pid_and_role() {
    // GIVEN a process that hangs in a COPY, and an heir with another login
    let scope = Scope::new(Servers::shared(), "frozen");
    let logins = logins(&scope);
    let (frozen, heir, pid) = frozen(&scope, &logins);

    // THEN the heir names the session that holds the lock
    tells(&heir, &format!("pid {pid}, role \"{}\"", logins[0]));

    // WHEN an administrator ends it, THEN the heir continues
    scope.execute_as_admin(&format!("SELECT pg_terminate_backend({pid})"));
    end(&scope, &logins, frozen, heir);
}

#[test]
#[ignore = "minutes"]
fn trials_a_frozen_session_is_ended_by_an_heir_with_the_rights_of_its_role() {
    // GIVEN a process that hangs in a COPY, and an heir whose login has the rights of the other login
    let scope = Scope::new(Servers::shared(), "frozen_ended");
    let logins = logins(&scope);
    let (frozen, heir, _) = frozen(&scope, &logins);
    let [old, new] = &logins;
    scope.execute_as_admin(&format!("GRANT \"{old}\" TO \"{new}\""));

    // THEN the heir ends the session, and continues
    wait_until_within(PATIENCE, "the session is ended", || heir.log().contains("ended sessions"));
    end(&scope, &logins, frozen, heir);
}

#[test]
#[ignore = "a minute; `make trials`"]
fn trials_a_lane_that_waits_for_a_lock_does_not_blame_the_client() {
    // GIVEN a daemon with one lane, and a lock on a payment table that is held for longer than a silence may last
    let scope = Scope::new(Servers::shared(), "long_lock");
    scope.prepare(4, 2);
    let mut daemon = member("long-lock").start(&scope);
    let mut load = Load::new(83);
    scope.feed(load.take(200));
    scope.wait_until_caught_up();
    std::thread::scope(|threads| {
        let lock = threads.spawn(|| {
            scope.execute(
                "BEGIN; LOCK TABLE payment_writer.payment_core IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(45); COMMIT",
            );
        });
        // WHEN the lane waits with records of one partition, and others arrive for another one
        scope.spread(load.take(20), &[0]);
        tells(&daemon, "a lock is held by the session with pid");
        scope.spread(load.take(20), &[1]);
        lock.join().unwrap();
    });

    // THEN everything is written, and the client was not replaced
    scope.wait_until_caught_up();
    let renewed = daemon.metric("payment_writer_fetch_clients_renewed_total", "");
    assert_eq!((renewed, daemon.log().contains("replacing the client")), (0.0, false), "{}", daemon.log());
    daemon.drains();
    scope.assert_exactly_once();
}

/// Waits until this many sessions of the scope's database wait for a standby; returns their number.
fn waiting_for_standby(scope: &Scope<'_>) -> i64 {
    let query = "SELECT count(*) FROM pg_stat_activity
        WHERE wait_event = 'SyncRep' AND datname = current_database()";
    scope.sql(query, &[])[0].get(0)
}

#[test]
fn a_missing_standby_is_named_and_a_commit_whose_wait_was_cancelled_is_not_published() {
    // GIVEN a daemon that starts for the first time, and a server whose COMMITs wait for a standby that does
    // not exist
    let servers = Servers::own();
    let scope = Scope::new(&servers, "standby");
    scope.prepare(2, 2);
    let mut load = Load::without_bad_records(82);
    scope.feed(load.take(50));
    let standby = |setting: &str| {
        scope.on_server(&[format!("ALTER SYSTEM {setting}"), "SELECT pg_reload_conf()".to_owned()]);
    };
    let (appoint, dismiss) = ("SET synchronous_standby_names = 'nobody'", "RESET synchronous_standby_names");
    let empty = Scope::new(&servers, "standby_migrate");
    standby(appoint);
    let mut daemon = member("a").start(&scope);
    let mut commands = [scope.daemon(&["prune"]), empty.daemon(&["migrate"])];

    // THEN it names the cause, and continues when the cause is gone
    tells(&daemon, "synchronous_standby_names is \"nobody\"");
    for (command, doing) in commands.iter().zip(["housekeeping", "migrating"]) {
        let line = format!("waiting: {doing}: a COMMIT waits for a standby");
        wait_until_within(PATIENCE, &line, || command.log().contains(&line));
    }
    standby(dismiss);
    for command in &mut commands {
        assert_eq!(command.wait().code(), Some(0), "{}", command.log());
    }
    scope.wait_until_caught_up();
    let events = || scope.read_all(&scope.read_topic).len();
    let committed = || scope.cursors().values().map(|(applied, _)| applied).sum::<i64>();
    let (before, sent) = (committed(), events());

    // WHEN the standby is missing again
    standby(appoint);
    scope.feed(load.take(50));
    tells(&daemon, "synchronous_standby_names is \"nobody\"");
    assert_eq!(events(), sent);

    // AND somebody cancels the wait, so that the batch is committed here alone
    wait_until_within(PATIENCE, "the wait is cancelled", || {
        scope.execute_as_admin(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'",
        );
        committed() > before
    });

    // THEN it waits for the standby again, and publishes nothing
    wait_until_within(PATIENCE, "it waits for the standby again", || {
        daemon.log().contains("may not be on any standby") && waiting_for_standby(&scope) > 0
    });
    assert_eq!(events(), sent);
    assert_eq!(daemon.get("/readyz").map(|reply| reply.status), Some(503));

    // WHEN no standby is asked for any more, THEN it continues
    standby(dismiss);
    scope.drains_exactly_once([&mut daemon]);
}

#[test]
fn a_connection_limit_and_a_missing_right_are_named() {
    // GIVEN a login that may open no connection
    let scope = Scope::new(Servers::shared(), "refusals");
    scope.prepare(2, 2);
    scope.execute_as_admin(include_str!("../../sql/roles.sql"));
    let role = format!("{}_writer", scope.database);
    let url = writer(&scope, &role);
    scope.execute_as_admin(&format!("ALTER ROLE \"{role}\" CONNECTION LIMIT 0"));
    let mut daemon = member("a")
        .with("POSTGRES__URL", &url)
        .with("POSTGRES__HOUSEKEEPING_URL", &scope.postgres_url())
        .start(&scope);
    let mut load = Load::new(83);

    // THEN the limit is named
    tells(&daemon, "SQLSTATE 53300: too many connections for role");

    // AND then a password that has expired
    scope.execute_as_admin(&format!("ALTER ROLE \"{role}\" CONNECTION LIMIT -1 VALID UNTIL '2020-01-01'"));
    tells(&daemon, "VALID UNTIL");

    // AND then a right that is missing
    scope.execute_as_admin(&format!("ALTER ROLE \"{role}\" VALID UNTIL 'infinity'"));
    daemon.wait_until_ready();
    scope.execute("REVOKE INSERT ON payment_writer.payment_notes FROM payment_writer_app");
    scope.feed(load.take(50));
    tells(&daemon, "SQLSTATE 42501: permission denied for table payment_notes");

    // WHEN it is granted, THEN it continues
    scope.execute("GRANT INSERT ON payment_writer.payment_notes TO payment_writer_app");
    scope.drains_exactly_once([&mut daemon]);
    scope.execute_as_admin(&format!("DROP ROLE \"{role}\"; DROP OWNED BY payment_writer_app"));
}

#[test]
fn a_new_password_in_the_password_file_is_used_by_a_running_daemon() {
    // GIVEN a daemon that takes its password from a file
    let scope = Scope::new(Servers::shared(), "password_file");
    scope.prepare(2, 2);
    scope.execute_as_admin(include_str!("../../sql/roles.sql"));
    let role = format!("{}_writer", scope.database);
    let file = tempfile::NamedTempFile::new().unwrap();
    let url = writer(&scope, &role).replace(":u@", "@") + "?passfile=" + file.path().to_str().unwrap();
    let write = |password: &str| std::fs::write(file.path(), format!("*:*:*:{role}:{password}\n")).unwrap();
    write("u");
    let mut daemon = member("a")
        .with("POSTGRES__URL", &url)
        .with("POSTGRES__HOUSEKEEPING_URL", &scope.postgres_url())
        .start(&scope);
    let mut load = Load::new(85);
    scope.feed(load.take(20));
    scope.wait_until_caught_up();

    // WHEN the password is changed in the database, and its connections are lost
    scope.execute_as_admin(&format!("ALTER ROLE \"{role}\" PASSWORD 'new'"));
    scope.cut_connections();
    scope.feed(load.take(20));
    tells(&daemon, "28P01");

    // AND then in the file, THEN the daemon continues
    write("new");
    scope.drains_exactly_once([&mut daemon]);
    scope.execute_as_admin(&format!("DROP ROLE \"{role}\"; DROP OWNED BY payment_writer_app"));
}

/// A PgBouncer in front of a scope's database.
struct Pooler {
    process: Child,
    folder: tempfile::TempDir,
    url: String,
}

impl Pooler {
    fn start(scope: &Scope<'_>, settings: &str) -> Pooler {
        let folder = tempfile::tempdir().unwrap();
        let port = free_address().port();
        let file = folder.path().join("pgbouncer.ini");
        std::fs::write(folder.path().join("users"), "\"payment_writer\" \"payment_writer\"\n").unwrap();
        let server = scope.servers.postgres_port();
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = plain\nauth_file = {users}\n{settings}\n",
            users = folder.path().join("users").display(),
        );
        std::fs::write(&file, text).unwrap();
        // It refuses to run as root.
        let everybody = |path: &Path, mode: &str| {
            assert!(Command::new("chmod").arg(mode).arg(path).status().unwrap().success());
        };
        everybody(folder.path(), "755");
        // The PATH of an ordinary user may lack its folder.
        const DEBIANS: &str = "/usr/sbin/pgbouncer";
        let mut command = Command::new(if Path::new(DEBIANS).exists() { DEBIANS } else { "pgbouncer" });
        if std::fs::metadata("/proc/self").is_ok_and(|it| std::os::unix::fs::MetadataExt::uid(&it) == 0) {
            command.args(["-u", "nobody"]);
        }
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let process = command.arg(&file).stdin(std::process::Stdio::null()).stderr(log).spawn();
        let process = process.expect("pgbouncer, which dev/install brings");
        wait_until_within(PATIENCE, "the pooler listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        let url = format!("postgres://payment_writer:payment_writer@127.0.0.1:{port}/{}", scope.database);
        Pooler { process, folder, url }
    }

    /// Replaces a setting of the running pooler.
    fn set(&self, before: &str, now: &str) {
        let file = self.folder.path().join("pgbouncer.ini");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(before));
        std::fs::write(&file, text.replace(before, now)).unwrap();
        let reload = format!("kill -s HUP {}", self.process.id());
        assert!(Command::new("sh").args(["-c", &reload]).status().unwrap().success());
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const TRANSACTION_MODE: &str = "pool_mode = transaction";

#[test]
fn a_pooler_in_transaction_mode_is_refused_by_name_until_it_is_in_session_mode() {
    // GIVEN a database behind a pooler in transaction mode
    let scope = Scope::new(Servers::shared(), "pooler");
    scope.prepare(2, 2);
    let pooler = Pooler::start(&scope, TRANSACTION_MODE);
    let mut load = Load::new(84);
    scope.feed(load.take(50));
    let mut daemon = member("a").with("POSTGRES__URL", &pooler.url).start(&scope);

    // THEN the daemon waits and names it, and so do commands
    tells(&daemon, "a pooler in transaction mode");
    let refuses = |url: &str| {
        for command in [&["cursors", "show"][..], &["reconcile"]] {
            let finished = scope.command_with(command, &[("PAYMENT_WRITER__POSTGRES__URL", url)]);
            assert_eq!(finished.code, Some(1), "{finished:?}");
            assert!(finished.stderr.contains("a pooler in transaction mode"), "{finished:?}");
        }
    };
    refuses(&pooler.url);

    // AND whichever of its idle connections to the server the pooler takes
    let other = Pooler::start(&scope, &format!("{TRANSACTION_MODE}\nserver_round_robin = 1"));
    for connections in 1..=3 {
        let clients: Vec<_> = (0..connections).map(|_| scope.connect_to(&other.url)).collect();
        for client in &clients {
            crate::support::block_on(client.batch_execute("BEGIN; SELECT 1")).unwrap();
        }
        drop(clients);
        refuses(&other.url);
    }

    // WHEN the pooler is set to session mode, THEN the daemon continues
    pooler.set(TRANSACTION_MODE, "pool_mode = session");
    scope.drains_exactly_once([&mut daemon]);
    let lines = daemon.log().lines().filter(|line| line.contains("a pooler in transaction mode")).count();
    assert_eq!(lines, 1, "{}", daemon.log());
}
