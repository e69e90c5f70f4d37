//! Kafka and Postgres, started by `dev/servers`, with separate names for each test.

use std::collections::HashMap;
use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, OnceLock};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use tokio::runtime::Runtime;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row};

use super::Postgres;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
});

static SEQUENCE: AtomicU32 = AtomicU32::new(0);

/// A number that is unique in this process.
pub(super) fn next_number() -> u32 {
    SEQUENCE.fetch_add(1, Ordering::Relaxed)
}

/// Blocks on a future; for the harness's asynchronous clients.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    RUNTIME.block_on(future)
}

/// An action on a server.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    Start,
    /// Clean stop.
    Stop,
    /// Postgres only: stop without a checkpoint, so that the next start recovers.
    Immediate,
    /// SIGKILL, for all processes of the server.
    Kill,
    /// The server keeps its connections and does not answer, until resumed.
    Pause,
    Resume,
}

impl Act {
    pub(super) fn word(self) -> &'static str {
        match self {
            Act::Start => "start",
            Act::Stop => "stop",
            Act::Immediate => "immediate",
            Act::Kill => "kill",
            Act::Pause => "pause",
            Act::Resume => "resume",
        }
    }
}

/// One Kafka and one Postgres. They end with this process, however it exits: `dev/servers` watches it.
pub struct Servers {
    dir: PathBuf,
    kafka: String,
    kafka_secure: Option<String>,
    brokers: usize,
    /// Changes after a failover.
    postgres_admin: Mutex<String>,
}

/// Partitions of each internal topic, as set by `dev/servers`.
const COORDINATORS: u32 = 10;

/// The leader of this partition of `__consumer_offsets` or `__transaction_state` coordinates the group or
/// transactional id of that name: Java's `String.hashCode`.
pub fn coordinator_partition(name: &str) -> i32 {
    let hash = name.bytes().fold(0_i32, |hash, byte| hash.wrapping_mul(31).wrapping_add(i32::from(byte)));
    (hash.unsigned_abs() % COORDINATORS) as i32
}

impl Servers {
    /// The pair that all tests of this binary share. Never stop or pause it; see [`Servers::own`].
    pub fn shared() -> &'static Servers {
        static SHARED: OnceLock<Servers> = OnceLock::new();
        SHARED.get_or_init(Servers::own)
    }

    /// A pair for one test alone. Takes some seconds to start; removed when dropped.
    pub fn own() -> Servers {
        Servers::with_brokers(1)
    }

    /// As [`Servers::own`], with a cluster of several brokers; with three, everything is replicated.
    pub fn with_brokers(brokers: usize) -> Servers {
        Servers::up(brokers, &[])
    }

    /// As [`Servers::own`], with further settings of the broker.
    pub fn with_kafka_settings(settings: &str) -> Servers {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(settings.as_bytes()).unwrap();
        Servers::up(1, &["--kafka-settings", file.path().to_str().unwrap()])
    }

    /// As [`Servers::own`]; both also accept TLS, with the certificate in this folder, and Kafka has a
    /// listener with authentication and ACLs. It accepts Kerberos instead of passwords if the folder has
    /// `kafka.keytab`.
    pub fn with_tls(folder: &Path) -> Servers {
        Servers::up(1, &["--tls", folder.to_str().unwrap()])
    }

    /// As [`Servers::with_tls`], with further settings of the broker.
    pub fn with_tls_and(folder: &Path, settings: &str) -> Servers {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(settings.as_bytes()).unwrap();
        let (folder, file) = (folder.to_str().unwrap(), file.path().to_str().unwrap());
        Servers::up(1, &["--tls", folder, "--kafka-settings", file])
    }

    fn up(brokers: usize, more: &[&str]) -> Servers {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
            "it-{}-{}",
            std::process::id(),
            next_number()
        ));
        let owner = std::process::id().to_string();
        let brokers_text = brokers.to_string();
        let up = ["up", "--owner-pid", &owner, "--brokers", &brokers_text];
        let settings = exports(&dev_servers(&dir, &[&up[..], more].concat(), &[]));
        Servers {
            kafka_secure: settings.get("DEV_KAFKA_SECURE").cloned(),
            kafka: settings["PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS"].clone(),
            brokers,
            postgres_admin: Mutex::new(settings["DEV_POSTGRES_ADMIN_URL"].clone()),
            dir,
        }
    }

    /// Kafka's listener with TLS, authentication and ACLs.
    pub fn kafka_secure(&self) -> &str {
        self.kafka_secure.as_deref().unwrap()
    }

    /// Runs one of Kafka's own tools, as administrator.
    pub fn kafka_tool(&self, arguments: &[&str]) -> String {
        let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/servers"))
            .arg("--dir")
            .arg(&self.dir)
            .args(["kafka", "tool"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kafka tool {arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns when the action is complete: started means ready, stopped means gone.
    pub fn kafka(&self, act: Act) {
        dev_servers(&self.dir, &["kafka", act.word()], &[]);
    }

    /// As [`Servers::kafka`], for only the broker with this number, from 1.
    pub fn broker(&self, number: i32, act: Act) {
        dev_servers(&self.dir, &["kafka", act.word(), "--node", &number.to_string()], &[]);
    }

    /// Kills a broker for good, and starts another one at another address; returns the new broker's number.
    pub fn replace_broker(&self, number: i32) -> i32 {
        dev_servers(&self.dir, &["kafka", "replace", "--node", &number.to_string()], &[])
            .trim()
            .parse()
            .unwrap()
    }

    pub fn brokers(&self) -> usize {
        self.brokers
    }

    /// Creates a standby that replicates Postgres, which is stopped for a moment. It replaces an earlier
    /// standby.
    /// Returns the superuser's connection to it.
    pub fn make_standby(&self) -> String {
        dev_servers(&self.dir, &["postgres", "standby"], &[]);
        let port = std::fs::read_to_string(self.dir.join("standby.port")).unwrap();
        format!("postgres://postgres:postgres@127.0.0.1:{}/postgres", port.trim())
    }

    /// Kills Postgres and promotes its standby, which has another address.
    pub fn promote_standby(&self) {
        dev_servers(&self.dir, &["postgres", "promote"], &[]);
        let settings = exports(&dev_servers(&self.dir, &["env"], &[]));
        *self.postgres_admin.lock().unwrap() = settings["DEV_POSTGRES_ADMIN_URL"].clone();
    }

    /// A disk of 96 MB in a folder that Postgres owns; `None` where this machine does not allow a mount.
    pub fn small_disk(&self) -> Option<PathBuf> {
        let path = try_dev_servers(&self.dir, &["postgres", "disk"], &[]).ok()?;
        Some(PathBuf::from(path.trim()))
    }

    /// Returns when the action is complete: started means ready, stopped means gone.
    pub fn postgres(&self, act: Act) {
        dev_servers(&self.dir, &["postgres", act.word()], &[]);
    }

    pub fn bootstrap_servers(&self) -> &str {
        &self.kafka
    }

    /// The superuser's connection URL of `database`.
    pub fn postgres_admin_url(&self, database: &str) -> String {
        let admin = self.postgres_admin.lock().unwrap();
        let (server, _) = admin.rsplit_once('/').unwrap();
        format!("{server}/{database}")
    }

    /// Local address of Postgres.
    pub fn postgres_port(&self) -> u16 {
        let url = self.postgres_admin_url("");
        url.trim_end_matches('/').rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// Connection URL of the role that may read statistics of `database`.
    pub fn postgres_monitor_url(&self, database: &str) -> String {
        let url = self.postgres_admin_url(database).replace("//postgres:postgres@", "//monitor:monitor@");
        // The exporter's client uses TLS unless it is turned off.
        format!("{url}?sslmode=disable")
    }

    /// Connection URL of the role that owns `database`.
    pub fn postgres_url(&self, database: &str) -> String {
        owner_url(&self.postgres_admin_url(database))
    }

    /// Folder of the server logs, for debugging a failure.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        dev_servers(&self.dir, &["destroy"], &[]);
    }
}

/// The owner's URL of the superuser's.
pub(super) fn owner_url(admin_url: &str) -> String {
    admin_url.replace("//postgres:postgres@", "//payment_writer:payment_writer@")
}

fn exports(text: &str) -> HashMap<String, String> {
    let pair = |line: &str| {
        let (name, value) = line.strip_prefix("export ")?.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    text.lines().filter_map(pair).collect()
}

/// Runs `dev/servers` with these environment variables.
pub(super) fn dev_servers(dir: &Path, arguments: &[&str], settings: &[(&str, &str)]) -> String {
    let output = try_dev_servers(dir, arguments, settings);
    output.unwrap_or_else(|errors| panic!("dev/servers {arguments:?}: {errors}"))
}

fn try_dev_servers(dir: &Path, arguments: &[&str], settings: &[(&str, &str)]) -> Result<String, String> {
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/servers"))
        .args(arguments)
        .arg("--dir")
        .arg(dir)
        // A broker that lives for minutes would spend more CPU time on JIT compilation than on its work.
        .env("KAFKA_JVM", "light")
        .envs(settings.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// A test's own database, topics and group, so that tests can share servers.
pub struct Scope<'s> {
    pub servers: &'s Servers,
    /// Another Postgres than that of the servers.
    postgres: Option<&'s Postgres>,
    pub database: String,
    pub group_id: String,
    pub input_topic: String,
    pub read_topic: String,
    pub email_topic: String,
    pub dead_letter_topic: String,
    pub(super) dir: PathBuf,
}

impl<'s> Scope<'s> {
    /// Creates an empty database; topics are created by [`Scope::create_topics`] or the command under test.
    pub fn new(servers: &'s Servers, name: &str) -> Scope<'s> {
        Scope::on(servers, None, name)
    }

    /// As [`Scope::new`], with its database on another Postgres than that of the servers.
    pub fn new_on(postgres: &'s Postgres, servers: &'s Servers, name: &str) -> Scope<'s> {
        Scope::on(servers, Some(postgres), name)
    }

    fn on(servers: &'s Servers, postgres: Option<&'s Postgres>, name: &str) -> Scope<'s> {
        let name = format!("{name}_{}", next_number());
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("it-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let scope = Scope {
            servers,
            postgres,
            group_id: format!("{name}_group"),
            input_topic: format!("{name}_input"),
            read_topic: format!("{name}_read"),
            email_topic: format!("{name}_email"),
            dead_letter_topic: format!("{name}_dlq"),
            database: name,
            dir,
        };
        scope.recreate_database();
        scope
    }

    /// Uses the database of the same name on another Postgres.
    pub fn move_to(&mut self, postgres: &'s Postgres) {
        self.postgres = Some(postgres);
    }

    fn admin_url(&self, database: &str) -> String {
        match self.postgres {
            Some(postgres) => postgres.admin_url(database),
            None => self.servers.postgres_admin_url(database),
        }
    }

    /// Replaces the database by an empty one; open connections to it are terminated.
    pub fn recreate_database(&self) {
        let name = &self.database;
        block_on(async {
            let postgres = connect(&self.admin_url("postgres")).await;
            // Two separate statements: neither may run inside a transaction.
            for statement in [
                format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)"),
                format!("CREATE DATABASE \"{name}\" OWNER payment_writer"),
            ] {
                postgres.batch_execute(&statement).await.unwrap();
            }
        });
    }

    /// Runs statements one by one as superuser, outside this scope's database.
    pub fn on_server(&self, statements: &[String]) {
        block_on(async {
            let postgres = connect(&self.admin_url("postgres")).await;
            for statement in statements {
                postgres.batch_execute(statement).await.unwrap();
            }
        });
    }

    /// Makes a copy of the current database. There must be no connections to it.
    pub fn back_up_database(&self) {
        let name = &self.database;
        self.on_server(&[format!(
            "CREATE DATABASE \"{name}_copy\" TEMPLATE \"{name}\" OWNER payment_writer"
        )]);
    }

    /// Replaces the database by the copy; open connections to it are terminated.
    pub fn restore_database(&self) {
        let name = &self.database;
        self.on_server(&[
            format!("DROP DATABASE \"{name}\" WITH (FORCE)"),
            format!("ALTER DATABASE \"{name}_copy\" RENAME TO \"{name}\""),
        ]);
    }

    /// Creates the four topics, the three outputs with the same number of partitions.
    pub fn create_topics(&self, input_partitions: i32, output_partitions: i32) {
        self.create_topics_with(input_partitions, output_partitions, &[]);
    }

    /// The same, with these settings of the input.
    pub fn create_topics_with(
        &self,
        input_partitions: i32,
        output_partitions: i32,
        settings: &[(&str, &str)],
    ) {
        self.create_topic_with(&self.input_topic, input_partitions, settings);
        for topic in [&self.read_topic, &self.email_topic, &self.dead_letter_topic] {
            self.create_topic(topic, output_partitions);
        }
    }

    pub fn create_topic(&self, name: &str, partitions: i32) {
        self.create_topic_with(name, partitions, &[]);
    }

    /// As [`Scope::create_topic`], with topic settings.
    pub fn create_topic_with(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        let replicas = if self.servers.brokers() < 3 { 1 } else { 3 };
        let new = NewTopic::new(name, partitions, TopicReplication::Fixed(replicas));
        let topic = settings.iter().fold(new, |topic, (key, value)| topic.set(key, value));
        let results = block_on(self.admin().create_topics([&topic], &AdminOptions::new())).unwrap();
        for result in results {
            result.unwrap();
        }
        self.wait_for_topic(name, partitions);
    }

    pub fn delete_topic(&self, name: &str) {
        for result in block_on(self.admin().delete_topics(&[name], &AdminOptions::new())).unwrap() {
            result.unwrap();
        }
    }

    /// Deletes the group's offsets, as an operator might. The group must have no members.
    pub fn delete_group(&self) {
        for result in block_on(self.admin().delete_groups(&[&self.group_id], &AdminOptions::new())).unwrap() {
            result.unwrap();
        }
    }

    pub fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client_config().create().unwrap()
    }

    /// The settings with which the daemon and its commands use this scope.
    pub fn settings(&self) -> Vec<(String, String)> {
        [
            ("KAFKA__BOOTSTRAP_SERVERS", self.servers.bootstrap_servers().to_owned()),
            ("KAFKA__GROUP_ID", self.group_id.clone()),
            ("KAFKA__INPUT_TOPIC", self.input_topic.clone()),
            ("KAFKA__READ_TOPIC", self.read_topic.clone()),
            ("KAFKA__EMAIL_TOPIC", self.email_topic.clone()),
            ("KAFKA__DEAD_LETTER_TOPIC", self.dead_letter_topic.clone()),
            ("POSTGRES__URL", self.postgres_url()),
        ]
        .map(|(key, value)| (format!("PAYMENT_WRITER__{key}"), value))
        .into()
    }

    pub fn postgres_url(&self) -> String {
        owner_url(&self.admin_url(&self.database))
    }

    /// Rows of a query in this scope's database, on a separate connection.
    pub fn sql(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Vec<Row> {
        block_on(async { connect(&self.postgres_url()).await.query(statement, parameters).await }).unwrap()
    }

    /// Runs statements in this scope's database as its owner.
    pub fn execute(&self, statements: &str) {
        block_on(async { connect(&self.postgres_url()).await.batch_execute(statements).await }).unwrap();
    }

    /// Runs statements in this scope's database as superuser, for what the owner may not do.
    pub fn execute_as_admin(&self, statements: &str) {
        let url = self.admin_url(&self.database);
        block_on(async { connect(&url).await.batch_execute(statements).await }).unwrap();
    }

    /// Runs statements that the triggers of the tables refuse, as superuser.
    pub fn execute_unguarded(&self, statements: &str) {
        self.execute_as_admin(&format!(
            "SET session_replication_role = replica; SET search_path = payment_writer; {statements}"
        ));
    }

    /// Runs a statement as another role; returns the SQLSTATE if it fails.
    pub fn execute_as(&self, url: &str, statement: &str) -> Option<String> {
        let outcome = block_on(async { connect(url).await.batch_execute(statement).await });
        outcome.err().map(|error| error.code().unwrap().code().to_owned())
    }

    /// Number of rows in a table of the schema `payment_writer`.
    pub fn count(&self, table: &str) -> i64 {
        self.sql(&format!("SELECT count(*) FROM payment_writer.{table}"), &[])[0].get(0)
    }

    /// A connection that stays open, to hold locks or transactions; see [`block_on`].
    pub fn connect(&self) -> Client {
        block_on(connect(&self.postgres_url()))
    }

    /// As [`Scope::connect`], with another URL.
    pub fn connect_to(&self, url: &str) -> Client {
        block_on(connect(url))
    }

    /// Terminates every connection to this scope's database.
    pub fn cut_connections(&self) {
        let url = self.admin_url("postgres");
        let statement = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
        block_on(async { connect(&url).await.query(statement, &[&self.database]).await }).unwrap();
    }
}

impl Drop for Scope<'_> {
    /// When the test fails, the daemons' logs are kept.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

pub(super) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}
