//! A separate database, topics and consumer group, and the program's commands with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use payment_writer::config::{Endpoint, Settings};
use payment_writer::kafka::client::base_client_config;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use serde::Deserialize;
use tokio::runtime::Runtime;
use tokio_postgres::Client;

use crate::processes::Guarded;
use crate::{Outcome, ServersArguments};

/// A command that takes longer is stuck.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// Records in one transaction of the input.
const TRANSACTION_RECORDS_MAX: u64 = 500;
/// Larger than the distance between the seeds of one run.
const OTHER_SEED: u64 = 1 << 32;

/// The servers, and a folder for files.
pub struct Servers {
    pub runtime: Runtime,
    pub broker: Vec<u32>,
    pub postgres: Vec<u32>,
    admin_url: String,
    writer_url: String,
    /// The program beside this one: it writes the input of all sites.
    pub program: PathBuf,
    folder: PathBuf,
    sites: AtomicU32,
    logs: AtomicU32,
}

fn variable(name: &str) -> Outcome<String> {
    std::env::var(name).map_err(|_| format!("{name} is not set; run eval \"$(dev/servers env --dir DIR)\""))
}

/// Process ids recorded by `dev/servers`, each followed by its start time.
fn recorded(folder: &Path, name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(folder.join(format!("{name}.pid"))).ok()?;
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// The URL of another database with the same server and role.
fn with_database(url: &str, database: &str) -> Option<String> {
    let (server, _) = url.rsplit_once('/')?;
    Some(format!("{server}/{database}"))
}

pub fn failed<E: std::fmt::Display>(doing: &str) -> impl Fn(E) -> String {
    move |error| format!("{doing}: {error}")
}

impl Servers {
    pub fn find(arguments: &ServersArguments) -> Outcome<Self> {
        let folder = &arguments.servers;
        let broker: Vec<u32> = (1..=9).filter_map(|n| recorded(folder, &format!("kafka-{n}"))).collect();
        let postgres: Vec<u32> = recorded(folder, "postgres").into_iter().collect();
        if broker.is_empty() || postgres.is_empty() {
            return Err(format!(
                "no servers are running in {}; start them with dev/servers up --dir",
                folder.display()
            ));
        }
        let own = std::env::current_exe().map_err(failed("locating this program"))?;
        let program = own.with_file_name("payment-writer");
        if !program.exists() {
            return Err(format!("{} is not built", program.display()));
        }
        let logs = folder.join("bench");
        std::fs::create_dir_all(&logs).map_err(failed("creating a folder"))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(failed("creating a runtime"))?;
        Ok(Self {
            runtime,
            broker,
            postgres,
            admin_url: variable("DEV_POSTGRES_ADMIN_URL")?,
            writer_url: variable("PAYMENT_WRITER__POSTGRES__URL")?,
            program,
            folder: logs.canonicalize().map_err(failed("resolving a folder"))?,
            sites: AtomicU32::new(0),
            logs: AtomicU32::new(0),
        })
    }

    /// Runs work on a connection to `url`.
    pub fn connected<T>(
        &self,
        url: &str,
        work: impl AsyncFnOnce(&mut Client) -> Result<T, String>,
    ) -> Outcome<T> {
        self.runtime.block_on(async {
            let endpoint = Endpoint::parse(url).map_err(failed("connecting to Postgres"))?;
            let (mut client, _driver) = endpoint.connect().await.map_err(failed("connecting to Postgres"))?;
            work(&mut client).await
        })
    }

    /// The URL of a database for the superuser.
    pub fn admin_url(&self, database: &str) -> Outcome<String> {
        with_database(&self.admin_url, database)
            .ok_or_else(|| "DEV_POSTGRES_ADMIN_URL has no database".to_owned())
    }

    /// Runs statements as the superuser.
    pub fn administer(&self, statements: &[&str]) -> Outcome<()> {
        self.connected(&self.admin_url, async |client| {
            for statement in statements {
                client.batch_execute(statement).await.map_err(|error| {
                    format!("{statement}: {}", payment_writer::postgres::connection::describe(&error))
                })?;
            }
            Ok(())
        })
    }

    /// A session that reads a database's transaction count, connected to another database so as not to count
    /// itself.
    pub fn counter(&self, database: &str) -> Outcome<Counter<'_>> {
        let endpoint = Endpoint::parse(&self.admin_url).map_err(failed("connecting to Postgres"))?;
        let connected = self.runtime.block_on(endpoint.connect());
        let (client, _driver) = connected.map_err(failed("connecting to Postgres"))?;
        Ok(Counter { runtime: &self.runtime, client, database: database.to_owned() })
    }
}

/// Queries the transactions of one database.
pub struct Counter<'a> {
    runtime: &'a Runtime,
    client: Client,
    database: String,
}

impl Counter<'_> {
    /// Transactions committed, according to the server's statistics: sessions report once a second, and when
    /// they end.
    pub fn transactions(&self) -> Outcome<i64> {
        let statement = "SELECT xact_commit FROM pg_stat_database WHERE datname = $1";
        let row = self.runtime.block_on(self.client.query_one(statement, &[&self.database]));
        Ok(row.map_err(failed("querying transactions"))?.get(0))
    }
}

/// How the input is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Input {
    /// By several producers in parallel that compress with lz4: half of the records in transactions, a tenth
    /// of which is aborted and sent again
    Mixed,
    /// By one producer without transactions or compression
    Plain,
}

/// How many records to send.
#[derive(Clone, Copy, Debug)]
pub enum Amount {
    Count(u64),
    Rate { per_second: u64, seconds: u64 },
}

impl Amount {
    /// The amount for each of `producers` in transactions, half of the total, and the rest.
    fn split(self, producers: u64) -> (Amount, Amount) {
        let each = |all: u64| all / 2 / producers;
        let rest = |all: u64| all - each(all) * producers;
        match self {
            Amount::Count(count) => (Amount::Count(each(count)), Amount::Count(rest(count))),
            Amount::Rate { per_second, seconds } => (
                Amount::Rate { per_second: each(per_second), seconds },
                Amount::Rate { per_second: rest(per_second), seconds },
            ),
        }
    }

    /// Arguments of `payment-writer produce`.
    fn words(self) -> Vec<String> {
        match self {
            Amount::Count(count) => vec!["--count".to_owned(), count.to_string()],
            Amount::Rate { per_second, seconds } => {
                ["--rate", &per_second.to_string(), "--duration", &format!("{seconds}s")]
                    .map(str::to_owned)
                    .into()
            }
        }
    }

    /// Parallel producers with transactions: several to fill a topic quickly, one for an even rate.
    fn transactional_producers(self) -> u64 {
        if matches!(self, Amount::Count(_)) { 4 } else { 1 }
    }

    /// Records of one transaction: 500, or as many as are sent in 20 ms.
    fn transaction_size(self) -> u64 {
        match self {
            Amount::Count(_) => TRANSACTION_RECORDS_MAX,
            Amount::Rate { per_second, .. } => (per_second / 50).clamp(1, TRANSACTION_RECORDS_MAX),
        }
    }
}

/// The report of `produce`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Sent {
    pub records: u64,
    pub records_per_second: f64,
    pub expected: Expected,
}

/// The outcomes that the records must have.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Expected {
    pub written: u64,
    pub duplicates: u64,
    pub dead_letters: u64,
}

/// A separate place to run the daemon. Removed when dropped.
pub struct Site<'a> {
    pub servers: &'a Servers,
    /// Name of the database and the group, and prefix of the topics.
    pub name: String,
    pub url: String,
    /// The build of payment-writer that runs here, with its schema.
    program: PathBuf,
}

impl<'a> Site<'a> {
    /// Creates the database with its schema, and the topics.
    pub fn create(servers: &'a Servers) -> Outcome<Self> {
        Self::create_for(servers, &servers.program)
    }

    /// The same for another build of the program.
    pub fn create_for(servers: &'a Servers, program: &Path) -> Outcome<Self> {
        let name = format!("bench_{}", servers.sites.fetch_add(1, Ordering::Relaxed) + 1);
        let url = with_database(&servers.writer_url, &name)
            .ok_or("PAYMENT_WRITER__POSTGRES__URL has no database")?;
        servers.administer(&[&format!("CREATE DATABASE {name} OWNER payment_writer")])?;
        let site = Self { servers, name, url, program: program.to_owned() };
        site.run(&["migrate"])?;
        site.run(&["topics", "create"])?;
        Ok(site)
    }

    /// Whether this runs another build than the one beside this program.
    pub fn is_baseline(&self) -> bool {
        self.program != self.servers.program
    }

    fn topic(&self, what: &str) -> String {
        format!("{}_{what}", self.name)
    }

    /// The settings of this site as environment variables. All others have their defaults.
    fn variables(&self) -> BTreeMap<String, String> {
        [
            ("KAFKA__GROUP_ID", self.name.clone()),
            ("KAFKA__INSTANCE_ID", "bench-0".to_owned()),
            ("KAFKA__INPUT_TOPIC", self.topic("input")),
            ("KAFKA__READ_TOPIC", self.topic("read")),
            ("KAFKA__EMAIL_TOPIC", self.topic("email")),
            ("KAFKA__DEAD_LETTER_TOPIC", self.topic("dlq")),
            ("POSTGRES__URL", self.url.clone()),
            ("ADMIN__LISTEN", "127.0.0.1:0".to_owned()),
            ("LOG__LEVEL", "warn".to_owned()),
        ]
        .into_iter()
        .map(|(name, value)| (format!("PAYMENT_WRITER__{name}"), value))
        .collect()
    }

    /// The same settings for this process.
    pub fn settings(&self) -> Outcome<Settings> {
        let mut variables: BTreeMap<String, String> =
            std::env::vars().filter(|(name, _)| name.starts_with("PAYMENT_WRITER__")).collect();
        variables.extend(self.variables());
        let variables = variables.into_iter().map(|(name, value)| (name.into(), value.into()));
        Settings::load_from(None, Path::new(payment_writer::config::DEFAULT_PATH), variables)
            .map(|loaded| loaded.settings)
            .map_err(failed("settings"))
    }

    /// Starts one of the program's commands; `more` are further settings as environment variables.
    pub fn start(&self, arguments: &[&str], more: &[(&str, &str)]) -> Outcome<Guarded> {
        self.start_of(&self.program, arguments, more)
    }

    fn start_of(&self, program: &Path, arguments: &[&str], more: &[(&str, &str)]) -> Outcome<Guarded> {
        let log = self.file("log");
        let mut command = Command::new(program);
        // An existing settings file may be for another build; the defaults are built in.
        command.current_dir(&self.servers.folder);
        command.args(arguments).envs(self.variables());
        command.envs(more.iter().map(|(name, value)| (format!("PAYMENT_WRITER__{name}"), value)));
        Guarded::spawn(&format!("payment-writer {}", arguments.join(" ")), &mut command, &log)
    }

    fn run(&self, arguments: &[&str]) -> Outcome<()> {
        self.run_with(arguments, &[])
    }

    /// Runs one of the program's commands to its end; `more` as for [`start`](Self::start).
    pub fn run_with(&self, arguments: &[&str], more: &[(&str, &str)]) -> Outcome<()> {
        let mut command = self.start(arguments, more)?;
        command.succeed(COMMAND_LIMIT)?;
        let _ = std::fs::remove_file(&command.log);
        Ok(())
    }

    /// A unique file name.
    fn file(&self, extension: &str) -> PathBuf {
        let number = self.servers.logs.fetch_add(1, Ordering::Relaxed);
        self.servers.folder.join(format!("{number}.{extension}"))
    }

    /// Starts sending records; [`Sending::finish`] returns what was sent.
    pub fn produce(&self, arguments: &[&str]) -> Outcome<Sending> {
        let report = self.file("json");
        let path = report.to_string_lossy().into_owned();
        let mut words = vec!["produce", "--yes", "--report", &path];
        words.extend_from_slice(arguments);
        Ok(Sending(vec![(self.start_of(&self.servers.program, &words, &[])?, report)]))
    }

    /// Starts sending this many records in one of the ways of writing input; `arguments` as for
    /// [`produce`](Self::produce), without their number and the seed.
    pub fn write(&self, input: Input, arguments: &[&str], amount: Amount, seed: u64) -> Outcome<Sending> {
        let start = |more: &[&str], amount: Amount, seed: u64| {
            let (seed, amount) = (seed.to_string(), amount.words());
            let amount: Vec<&str> = amount.iter().map(String::as_str).collect();
            self.produce(&[arguments, more, &amount, &["--seed", &seed]].concat())
        };
        if input == Input::Plain {
            return start(&[], amount, seed);
        }
        let producers = amount.transactional_producers();
        let (each, rest) = amount.split(producers);
        let size = each.transaction_size().to_string();
        let transactions = ["--transaction-size", &size, "--aborted-share", "0.1", "--compression", "lz4"];
        let mut sending = start(&["--compression", "lz4"], rest, seed)?;
        for producer in 1..=producers {
            sending.0.extend(start(&transactions, each, seed + producer * OTHER_SEED)?.0);
        }
        Ok(sending)
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        let warn = |outcome: Outcome<()>| {
            if let Err(message) = outcome {
                eprintln!("bench: warning: removing {}: {message}", self.name);
            }
        };
        warn(self.servers.administer(&[&format!("DROP DATABASE {} WITH (FORCE)", self.name)]));
        warn(self.settings().and_then(|settings| {
            let kafka = &settings.kafka;
            let admin: AdminClient<DefaultClientContext> =
                base_client_config(kafka).create().map_err(failed("creating a Kafka client"))?;
            let topics =
                [&kafka.input_topic, &kafka.read_topic, &kafka.email_topic, &kafka.dead_letter_topic];
            let topics = topics.map(String::as_str);
            let options = AdminOptions::new().request_timeout(Some(REQUEST_LIMIT));
            let deleted = self.servers.runtime.block_on(admin.delete_topics(&topics, &options));
            deleted.map(drop).map_err(failed("deleting topics"))
        }));
    }
}

/// Records being sent to the input topic: producers, each with its report.
pub struct Sending(Vec<(Guarded, PathBuf)>);

impl Sending {
    /// Waits until all are sent.
    pub fn finish(self, limit: Duration) -> Outcome<Sent> {
        let mut all = Sent::default();
        for (mut process, report) in self.0 {
            process.succeed(limit)?;
            let text = std::fs::read_to_string(&report).map_err(failed("reading produce's report"))?;
            let sent: Sent = serde_json::from_str(&text).map_err(failed("reading produce's report"))?;
            let _ = std::fs::remove_file(&report);
            let _ = std::fs::remove_file(&process.log);
            all.records += sent.records;
            all.records_per_second += sent.records_per_second;
            all.expected.written += sent.expected.written;
            all.expected.duplicates += sent.expected.duplicates;
            all.expected.dead_letters += sent.expected.dead_letters;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_database_of_the_same_server() {
        assert_eq!(
            with_database("postgres://a:b@127.0.0.1:5/payment_writer", "bench_1").as_deref(),
            Some("postgres://a:b@127.0.0.1:5/bench_1")
        );
        assert_eq!(with_database("nonsense", "bench_1"), None);
    }

    #[test]
    fn half_of_the_records_are_in_transactions() {
        let (each, rest) = Amount::Count(1_007).split(4);
        assert_eq!((each.words(), rest.words()), (words("--count 125"), words("--count 507")));
        let (each, rest) = Amount::Rate { per_second: 101, seconds: 3 }.split(1);
        assert_eq!(each.words(), words("--rate 50 --duration 3s"));
        assert_eq!(rest.words(), words("--rate 51 --duration 3s"));
    }

    #[test]
    fn a_transaction_at_a_rate_is_over_soon() {
        let size = |per_second| Amount::Rate { per_second, seconds: 1 }.transaction_size();
        assert_eq!([1, 500, 100_000].map(size), [1, 10, 500]);
    }

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_recorded_process_is_the_first_word() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("kafka-1.pid"), "4711 999\n").unwrap();
        assert_eq!(recorded(folder.path(), "kafka-1"), Some(4711));
        assert_eq!(recorded(folder.path(), "kafka-2"), None);
    }
}
