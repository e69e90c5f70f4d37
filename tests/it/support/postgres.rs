//! A Postgres beside the pair of [`Servers`](super::Servers): of a chosen version, without a Kafka; and the client
//! programs of Debian's Postgres 15.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tokio_postgres::Row;

use super::servers::{block_on, connect, dev_servers, next_number, owner_url};
use super::{Act, wait_until};

/// Folder of the client programs; `POSTGRES=15 dev/servers install` provides them.
const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

/// One server, removed when dropped or when this process ends.
pub struct Postgres {
    dir: PathBuf,
    settings: Vec<(&'static str, &'static str)>,
    port: String,
    watch: Child,
}

impl Postgres {
    /// Starts an empty server of the version of the variable `POSTGRES`, 18 by default.
    pub fn default_version() -> Postgres {
        Postgres::with(&[])
    }

    /// Starts an empty server of this version.
    pub fn of(version: &'static str) -> Postgres {
        Postgres::with(&[("POSTGRES", version)])
    }

    fn with(version: &[(&'static str, &'static str)]) -> Postgres {
        let name = format!("postgres-{}-{}", std::process::id(), next_number());
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let settings = [version, &[("POSTGRES_SHARED_BUFFERS", "64MB")]].concat();
        dev_servers(&dir, &["postgres", "start"], &settings);
        let watch = Command::new("setsid")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/servers"))
            .args(["watch", "--owner-pid", &std::process::id().to_string(), "--dir"])
            .arg(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let port = std::fs::read_to_string(dir.join("postgres.port")).unwrap().trim().to_owned();
        let server = Postgres { dir, settings, port, watch };
        // Replication slots, and the archive of a server whose data is backed up.
        server.execute("postgres", "ALTER SYSTEM SET wal_level = logical");
        server.act(Act::Stop);
        server.act(Act::Start);
        server
    }

    /// Returns when the action is complete: started means ready, stopped means gone.
    pub fn act(&self, act: Act) {
        dev_servers(&self.dir, &["postgres", act.word()], &self.settings);
    }

    /// The superuser's connection URL of `database`.
    pub fn admin_url(&self, database: &str) -> String {
        format!("postgres://postgres:postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The superuser's connection as a subscription takes it.
    pub fn conninfo(&self, database: &str) -> String {
        format!("host=127.0.0.1 port={} user=postgres password=postgres dbname={database}", self.port)
    }

    /// Folder of its data.
    pub fn data(&self) -> PathBuf {
        std::fs::canonicalize(self.dir.join("data")).unwrap().join("postgres")
    }

    /// Connection URL of the role that owns `database`.
    pub fn url(&self, database: &str) -> String {
        owner_url(&self.admin_url(database))
    }

    /// Runs statements as superuser.
    #[track_caller]
    pub fn execute(&self, database: &str, statements: &str) {
        let url = self.admin_url(database);
        let done = block_on(async { connect(&url).await.batch_execute(statements).await });
        done.unwrap_or_else(|error| panic!("{statements}: {error:?}"));
    }

    /// Rows of a query as superuser.
    pub fn sql(&self, database: &str, query: &str) -> Vec<Row> {
        block_on(async { connect(&self.admin_url(database)).await.query(query, &[]).await }).unwrap()
    }

    /// Subscribes to a publication on another server, and waits until the tables are copied.
    pub fn subscribe(&self, database: &str, publication: &str, publisher: &Postgres, source: &str) {
        let connection = publisher.conninfo(source);
        self.execute(
            database,
            &format!("CREATE SUBSCRIPTION {publication} CONNECTION '{connection}' PUBLICATION {publication}"),
        );
        self.wait_until_copied(database);
    }

    /// Waits until the subscriptions have copied every table.
    pub fn wait_until_copied(&self, database: &str) {
        let copied = "SELECT count(*) > 0 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel";
        wait_until("the tables are copied", || self.sql(database, copied)[0].get(0));
    }

    /// Waits until the subscriber has confirmed everything that is committed here now.
    pub fn wait_until_confirmed(&self, slot: &str) {
        let now: String = self.sql("postgres", "SELECT pg_current_wal_flush_lsn()::text")[0].get(0);
        let confirmed = format!(
            "SELECT confirmed_flush_lsn >= '{now}' FROM pg_replication_slots WHERE slot_name = '{slot}'"
        );
        wait_until("the subscriber has everything", || self.sql("postgres", &confirmed)[0].get(0));
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        dev_servers(&self.dir, &["destroy"], &self.settings);
        let _ = self.watch.wait();
    }
}

/// A client program of Postgres 15, such as `pg_dump`.
pub fn postgres_program(name: &str) -> Command {
    let mut command = Command::new(Path::new(PROGRAMS).join(name));
    command.stdin(Stdio::null());
    command
}

/// Runs it to its end, which must be exit code 0.
#[track_caller]
pub fn succeeds(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
