//! One episode: its own topics and database, several instances, adversarial load. Faults are injected one
//! after the other, and in between every record is checked for exactly one outcome.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use payment_writer::postgres::schema::{NEWEST_KNOWN, OLDEST_SUPPORTED};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::fault::Fault;
use crate::java::JavaWriter;
use crate::load::Adversary;
use crate::proxy::Proxy;
use crate::report::Checked;
use crate::support::{Check, Daemon, Flow, Member, Scope, Servers, TRANSACTION_MAX, wait_until_within};
use crate::watch::{Offsets, Watch, has_reached};

pub const SESSION_TIMEOUT: Duration = Duration::from_secs(5);
/// After this time of recovery, the test checks whether recovery is possible at all.
const SPOILT_ASKED_AFTER: Duration = Duration::from_secs(20);
/// After this time an instance is stuck: longer than every timeout in the system.
const STUCK_AFTER: Duration = Duration::from_secs(150);
/// This many consecutive seeds share an episode, so that a seed determines its episode.
const CYCLES_AN_EPISODE: u64 = 20;
pub const INPUT_PARTITIONS: i32 = 6;
pub const OUTPUT_PARTITIONS: i32 = 2;
const MARKERS_DROPPED: &str = "these partitions are likely deleted already and hence can be skipped";
/// A fault is over when this many new records have arrived and are written and published.
const RECORDS_SINCE: i64 = 20;
const LOG_LINES_TOLD: usize = 30;
/// About 80 a second: a shared machine with two cores can process that.
const RECORDS_A_TICK: usize = 2;

/// Additional faults that an episode allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// One id may occur on several partitions.
    Twins,
    /// The database may be restored. No id is on several partitions, as another of its records could win
    /// then.
    Rewinding,
    /// The database is on a disk that can be filled.
    SmallDisk,
}

/// Servers and the network proxy, for all episodes of a run.
pub struct Lab {
    pub servers: Servers,
    pub proxy: Proxy,
    pub has_small_disk: bool,
}

impl Lab {
    pub fn open(brokers: usize) -> Lab {
        let servers = Servers::with_brokers(brokers);
        let proxy = Proxy::to(servers.postgres_port());
        let has_small_disk = servers.small_disk().is_some();
        Lab { servers, proxy, has_small_disk }
    }

    /// How often brokers logged that they dropped transaction markers.
    pub fn markers_dropped(&self) -> usize {
        let log = |node| self.servers.dir().join(format!("data/logs/kafka-{node}.log"));
        let count = |node| std::fs::read_to_string(log(node)).unwrap().matches(MARKERS_DROPPED).count();
        (1..=self.servers.brokers()).map(count).sum()
    }

    /// Copies the server logs to a folder that is kept.
    pub fn keep_logs(&self, number: u64) -> PathBuf {
        let kept =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&kept).unwrap();
        for file in std::fs::read_dir(self.servers.dir().join("data/logs")).unwrap() {
            let path = file.unwrap().path();
            std::fs::copy(&path, kept.join(path.file_name().unwrap())).unwrap();
        }
        kept
    }
}

/// Properties of an episode, derived from its seeds.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub number: u64,
    pub stage: Stage,
    pub instances: usize,
    lanes: usize,
    batch_payments_max: usize,
}

impl Setup {
    /// `instances` and `faults` come from the command line.
    pub fn of_seed(seed: u64, instances: Option<usize>, faults: &[Fault], lab: &Lab) -> Setup {
        let number = seed / CYCLES_AN_EPISODE;
        let mut random = ChaCha8Rng::seed_from_u64(number ^ 0xE915_0DE5);
        let stage = match random.random_range(0..100) {
            0..50 => Stage::Twins,
            50..85 => Stage::Rewinding,
            _ => Stage::SmallDisk,
        };
        let brokers = lab.servers.brokers();
        let fits = |stage: &Stage| {
            (*stage != Stage::SmallDisk || lab.has_small_disk)
                && (faults.is_empty() || faults.iter().any(|fault| fault.is_possible(*stage, brokers)))
        };
        let stages = [stage, Stage::Twins, Stage::Rewinding, Stage::SmallDisk];
        let random_instances = random.random_range(1..=3);
        Setup {
            number,
            stage: stages.into_iter().find(fits).unwrap_or(stage),
            instances: instances.unwrap_or(random_instances),
            lanes: random.random_range(1..=2),
            batch_payments_max: [40, 100, 300, 1000][random.random_range(0..4)],
        }
    }
}

impl Setup {
    /// The first seed that belongs to the next episode.
    pub fn end_seed(&self) -> u64 {
        (self.number + 1) * CYCLES_AN_EPISODE
    }
}

/// One of the daemons, across restarts.
pub struct Instance {
    pub name: String,
    pub member: Member,
    pub daemon: Daemon,
}

/// See the module.
pub struct Episode<'l> {
    pub lab: &'l Lab,
    pub scope: Scope<'l>,
    pub setup: Setup,
    pub instances: Vec<Instance>,
    pub flow: Flow<Adversary>,
    pub watch: Watch,
    /// Injected faults, for the message of a failure.
    pub history: Vec<String>,
    /// Random additional faults during a cycle's main fault.
    pub asides: Vec<String>,
    schemas_ahead: i32,
}

impl<'l> Episode<'l> {
    pub fn begin(lab: &'l Lab, setup: Setup, first: Fault) -> Episode<'l> {
        let scope = Scope::new(&lab.servers, &format!("episode_{}", setup.number));
        if setup.stage == Stage::SmallDisk {
            move_to_small_disk(lab, &scope);
        }
        scope.prepare(INPUT_PARTITIONS, OUTPUT_PARTITIONS);
        let behind = NEWEST_KNOWN.0 - OLDEST_SUPPORTED.0;
        if first == Fault::RollingUpgrade && behind > 0 {
            scope.command(&["migrate", "undo", "--count", &behind.to_string()]).succeeds();
        }
        let has_twins = setup.stage == Stage::Twins;
        let adversary = Adversary::new(setup.number, INPUT_PARTITIONS, has_twins);
        let compression = ["lz4", "zstd"][usize::try_from(setup.number % 2).unwrap()];
        let java = Box::new(JavaWriter::new(&scope, compression));
        let flow = Flow::start_beside(&scope, adversary, RECORDS_A_TICK, TRANSACTION_MAX, java);
        let watch = Watch::over(&scope, INPUT_PARTITIONS);
        let mut episode = Episode {
            lab,
            setup,
            instances: Vec::new(),
            flow,
            watch,
            history: Vec::new(),
            asides: Vec::new(),
            schemas_ahead: 0,
            scope,
        };
        for name in ["a", "b", "c"].iter().take(setup.instances) {
            let member = episode.member(name);
            let daemon = member.start(&episode.scope);
            episode.instances.push(Instance { name: (*name).to_owned(), member, daemon });
        }
        episode.recover(Instant::now());
        episode
    }

    /// The settings of an instance: it connects to the database through the proxy.
    pub fn member(&self, name: &str) -> Member {
        let url = format!(
            "postgres://payment_writer:payment_writer@127.0.0.1:{}/{}",
            self.lab.proxy.port(),
            self.scope.database
        );
        Member::new(name)
            .with("POSTGRES__URL", &url)
            .with("LANES", &self.setup.lanes.to_string())
            .with("BATCH__MAX_PAYMENTS", &self.setup.batch_payments_max.to_string())
            .with("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", &SESSION_TIMEOUT.as_millis().to_string())
            .with("KAFKA__PROPERTIES__HEARTBEAT_INTERVAL_MS", "1000")
    }

    /// Starts an instance, optionally with a failpoint at which it exits or stops.
    pub fn restart_at(&mut self, index: usize, failpoint: &str) {
        let instance = &mut self.instances[index];
        instance.daemon = instance.member.start_at(&self.scope, failpoint);
    }

    /// Sends SIGKILL and starts it again.
    pub fn kill_and_restart(&mut self, index: usize) {
        self.instances[index].daemon.kill();
        self.restart_at(index, "");
    }

    /// Keeps a fault active for some time, and sometimes kills an instance meanwhile.
    pub fn hold(&mut self, random: &mut ChaCha8Rng, from_ms: u64, to_ms: u64) {
        let whole = Duration::from_millis(random.random_range(from_ms..to_ms));
        if random.random_bool(0.2) {
            let first = whole.mul_f64(random.random_range(0.0..1.0));
            std::thread::sleep(first);
            let index = random.random_range(0..self.instances.len());
            self.kill_and_restart(index);
            self.asides.push(format!("{} was killed meanwhile", self.instances[index].name));
            std::thread::sleep(whole.saturating_sub(first));
        } else {
            std::thread::sleep(whole);
        }
    }

    /// Waits until records flow again: everything that was there when the fault ended, and the first records
    /// after it, are written and published. Returns how long it took.
    pub fn recover(&mut self, ended_at: Instant) -> Duration {
        self.recover_unless(ended_at, || false).expect("`is_spoilt` is always false")
    }

    /// As [`recover`](Self::recover); `None` if `is_spoilt` becomes true during a long recovery.
    pub fn recover_unless(&mut self, ended_at: Instant, is_spoilt: impl Fn() -> bool) -> Option<Duration> {
        let mut ask_at = SPOILT_ASKED_AFTER;
        let mut is_given_up = |episode: &mut Self, state: &str| {
            let waited = ended_at.elapsed();
            if waited >= ask_at {
                ask_at = waited + SPOILT_ASKED_AFTER;
                if is_spoilt() {
                    return true;
                }
            }
            assert!(waited < STUCK_AFTER, "STUCK: after {waited:?} {state}");
            episode.assert_alive();
            std::thread::sleep(Duration::from_millis(40));
            false
        };
        let sum = |ends: &Offsets| ends.values().sum::<i64>();
        let mut first = None;
        // Later records are required, too: a component that stalled may have no other work left.
        let ends = loop {
            let state = match self.watch.ends() {
                Some(ends) if sum(&ends) >= *first.get_or_insert(sum(&ends)) + RECORDS_SINCE => break ends,
                Some(_) => "no records come",
                None => "the brokers do not return the end offsets",
            };
            if is_given_up(self, state) {
                return None;
            }
        };
        loop {
            let committed = self.watch.committed().unwrap_or_default();
            let state = if has_reached(&committed, &ends) {
                // The second check does not move the time at which the first one succeeded.
                let seen_at = ended_at.elapsed();
                let applied = self.watch.applied(&self.scope).unwrap_or_default();
                if has_reached(&applied, &ends) {
                    return Some(seen_at);
                }
                format!("applied is {applied:?}, the ends were {ends:?}")
            } else {
                format!("the group is at {committed:?}, the ends were {ends:?}")
            };
            if is_given_up(self, &state) {
                return None;
            }
        }
    }

    /// The daemons' latest log lines, to explain a slow recovery.
    pub fn tell_logs(&self) {
        for instance in &self.instances {
            let log = instance.daemon.log();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LOG_LINES_TOLD)..];
            eprintln!("--- last lines of {} ---\n{}", instance.name, last.join("\n"));
        }
    }

    /// Asserts that no instance has exited.
    pub fn assert_alive(&mut self) {
        for instance in &mut self.instances {
            assert!(
                instance.daemon.is_running(),
                "instance {} ended by itself with {:?}",
                instance.name,
                instance.daemon.wait().code()
            );
        }
    }

    /// Checks for exactly one outcome, with the independent auditor, the tests' own check, and `reconcile`.
    pub fn check(&mut self) -> Checked {
        self.flow.pause();
        self.assert_alive();
        self.wait_until_settled();
        let mut checked = audit(&self.scope);
        let outcomes = Check::of(&self.scope).holds();
        checked.written = outcomes.written;
        checked.duplicates = outcomes.duplicates;
        checked.is_reconciled = reconcile(&self.scope);
        self.flow.resume();
        checked
    }

    /// Waits until everything is written and published, and both cursors agree.
    pub fn wait_until_settled(&mut self) {
        self.scope.await_input_markers();
        wait_until_within(STUCK_AFTER, "STUCK: everything is written and published", || {
            // Repeated: the broker may take time to abort a transaction that a client of the load left open.
            let ends = self.scope.ends();
            let (committed, cursors) = (self.watch.committed().unwrap_or_default(), self.scope.cursors());
            let is_there = |partition: &i32, end: i64| {
                let copied = cursors.get(partition).is_some_and(|c| c.0 >= end && c.1 >= Some(end));
                end == 0 || copied && committed.get(partition) == Some(&end)
            };
            ends.iter().all(|(partition, end)| is_there(partition, *end))
        });
    }

    /// Drains all instances; each must exit with code 0.
    pub fn drain(&mut self) {
        for instance in &self.instances {
            instance.daemon.terminate();
        }
        for instance in &mut self.instances {
            let status = instance.daemon.wait();
            assert_eq!(status.code(), Some(0), "draining {}: {}", instance.name, instance.daemon.log());
        }
    }

    /// The episode's last check, after a drain.
    pub fn end(mut self) -> Checked {
        let checked = self.check();
        self.flow.pause();
        self.drain();
        self.tell_load();
        checked
    }

    /// Prints how the records were written, and asserts that each kind of writer took part.
    fn tell_load(&self) {
        let [plain, own, java] = self.flow.written()[..] else { panic!("three writers") };
        println!(
            "the load: {} records without transactions; {} by librdkafka in {} transactions, {} more aborted; {} by Java in \
             {} transactions, {} more aborted",
            plain.records,
            own.records,
            own.committed,
            own.aborted,
            java.records,
            java.committed,
            java.aborted
        );
        assert!(own.committed > 0 && java.committed > 0, "one kind of writer has written nothing");
    }

    /// Upgrades the schema in a compatible way, as rolling upgrades do.
    pub fn raise_schema(&mut self) {
        self.scope.command(&["migrate"]).succeeds();
        self.schemas_ahead += 1;
        let version = NEWEST_KNOWN.0 + self.schemas_ahead;
        self.scope.execute(&format!(
            "CREATE TABLE payment_writer.of_version_{version} (id bigint PRIMARY KEY);
             ALTER TABLE payment_writer.source_cursor ADD COLUMN of_version_{version} text;
             INSERT INTO payment_writer.schema_history (version, name, applied_on, checksum)
             VALUES ({version}, 'later', now()::text, '0')"
        ));
    }
}

impl Drop for Episode<'_> {
    fn drop(&mut self) {
        self.lab.proxy.set_open(true);
        if std::thread::panicking() {
            eprintln!("--- faults of this episode ---\n{}", self.history.join("\n"));
        }
        if self.setup.stage == Stage::SmallDisk {
            self.instances.clear();
            let scope = &self.scope;
            let leave = || {
                scope.on_server(&[
                    format!("DROP DATABASE IF EXISTS \"{}\" WITH (FORCE)", scope.database),
                    "DROP TABLESPACE small".to_owned(),
                ]);
            };
            // On a separate thread: a second panic in this one would abort the process.
            let _ = std::thread::scope(|threads| threads.spawn(leave).join());
        }
    }
}

fn move_to_small_disk(lab: &Lab, scope: &Scope<'_>) {
    let disk = lab.servers.small_disk().expect("a small disk");
    let database = &scope.database;
    // A failed episode may have left its database behind.
    let _ = std::fs::remove_file(disk.join("ballast"));
    scope.on_server(&[
        format!("DROP DATABASE \"{database}\" WITH (FORCE)"),
        "DROP TABLESPACE IF EXISTS small".to_owned(),
        format!("CREATE TABLESPACE small OWNER payment_writer LOCATION '{}'", disk.display()),
        format!("CREATE DATABASE \"{database}\" OWNER payment_writer TABLESPACE small"),
    ]);
}

/// Runs the auditor and reads its counts.
fn audit(scope: &Scope<'_>) -> Checked {
    let output = Command::new(env!("CARGO_BIN_EXE_audit"))
        .args(["--quiet", "--kafka", scope.servers.bootstrap_servers()])
        .args(["--postgres-url", &scope.postgres_url()])
        .args(["--input-topic", &scope.input_topic, "--read-topic", &scope.read_topic])
        .args(["--email-topic", &scope.email_topic, "--dead-letter-topic", &scope.dead_letter_topic])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the auditor found:\n{said}\n{errors}");
    let number = |name: &str| {
        let line = said.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    };
    Checked {
        records: number("records in"),
        events: number("read events") + number("e-mail events"),
        dead_letters: number("dead letters"),
        ..Checked::default()
    }
}

/// Runs `reconcile` if this build has it; returns whether it did.
fn reconcile(scope: &Scope<'_>) -> bool {
    if scope.command(&["reconcile", "--help"]).code != Some(0) {
        return false;
    }
    scope.command(&["reconcile", "--json"]).succeeds();
    true
}
