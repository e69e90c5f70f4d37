//! One history: topics and a database of its own, instances, adversarial load; faults happen to it one
//! after the other, and in between it is asked whether every record has its one outcome.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use payment_writer::schema::{NEWEST_KNOWN, OLDEST_SUPPORTED};
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
/// A recovery that takes so long is asked whether it can come to an end at all.
const SPOILT_ASKED_AFTER: Duration = Duration::from_secs(20);
/// Whoever is not over it by now is stuck: longer than every time limit there is.
const STUCK_AFTER: Duration = Duration::from_secs(150);
/// This many seeds in a row share an episode, so that a seed alone says in which one it belongs.
const CYCLES_AN_EPISODE: u64 = 20;
pub const INPUT_PARTITIONS: i32 = 6;
pub const OUTPUT_PARTITIONS: i32 = 2;
const MARKERS_DROPPED: &str = "these partitions are likely deleted already and hence can be skipped";
/// So many new records have to arrive, and to be written and published, before a fault is over.
const RECORDS_SINCE: i64 = 20;
const LOG_LINES_TOLD: usize = 30;
/// About 80 a second: a machine with two cores that others use, too, has to keep up with it.
const RECORDS_A_TICK: usize = 2;

/// What may happen in an episode, besides what may happen in each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// One id may stand on several partitions.
    Twins,
    /// The database may go back. Of several partitions with one id, another could win then: there are none.
    Rewinding,
    /// The database is on a disk that can be filled.
    SmallDisk,
}

/// Servers and the network to them, for all episodes of a run.
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

    /// How often brokers said that they dropped markers of a transaction.
    pub fn markers_dropped(&self) -> usize {
        let log = |node| self.servers.dir().join(format!("data/logs/kafka-{node}.log"));
        let count = |node| std::fs::read_to_string(log(node)).unwrap().matches(MARKERS_DROPPED).count();
        (1..=self.servers.brokers()).map(count).sum()
    }

    /// Copies what the servers said to a place where it stays.
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

/// What an episode is like, by the seeds that belong to it.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub number: u64,
    pub stage: Stage,
    pub instances: usize,
    lanes: usize,
    batch_payments_max: usize,
}

impl Setup {
    /// `instances` and `faults` as the command line wants them.
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

/// One of the daemons, over its restarts.
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
    /// What has been done to it, for the message of a failure.
    pub history: Vec<String>,
    /// Accidents beside the one that a cycle is about.
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

    /// The settings of an instance: its database is behind the proxy.
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

    /// Starts an instance anew, with a place at which it dies or stops, or without.
    pub fn restart_at(&mut self, index: usize, failpoint: &str) {
        let instance = &mut self.instances[index];
        instance.daemon = instance.member.start_at(&self.scope, failpoint);
    }

    /// SIGKILL and a new start.
    pub fn kill_and_restart(&mut self, index: usize) {
        self.instances[index].daemon.kill();
        self.restart_at(index, "");
    }

    /// Lets a state last, and at times an instance die meanwhile.
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

    /// Waits until records flow again: all that was there at the fault's end, and the first that came after
    /// it, is written and published. Says how long it took.
    pub fn recover(&mut self, ended_at: Instant) -> Duration {
        self.recover_unless(ended_at, || false).expect("nothing spoils it")
    }

    /// As [`recover`](Self::recover); none if `is_spoilt` turns true while it takes long.
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
        // Records that came after the fault's end belong to it: what stood still has nothing left to do.
        let ends = loop {
            let state = match self.watch.ends() {
                Some(ends) if sum(&ends) >= *first.get_or_insert(sum(&ends)) + RECORDS_SINCE => break ends,
                Some(_) => "no records come",
                None => "the brokers do not tell the log's ends",
            };
            if is_given_up(self, state) {
                return None;
            }
        };
        loop {
            let committed = self.watch.committed().unwrap_or_default();
            let state = if has_reached(&committed, &ends) {
                // The first moment at which it was seen is not made later by the second question.
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

    /// What the daemons said lately, for a look at what took them so long.
    pub fn tell_logs(&self) {
        for instance in &self.instances {
            let log = instance.daemon.log();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LOG_LINES_TOLD)..];
            eprintln!("--- last lines of {} ---\n{}", instance.name, last.join("\n"));
        }
    }

    /// Each instance is expected to outlive what happens around it.
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

    /// The strict question, by an auditor that shares no code with the daemon, by the tests' own check, and
    /// by `reconcile`.
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

    /// Waits until everything is written and published, and both cursors say so.
    pub fn wait_until_settled(&mut self) {
        self.scope.await_input_markers();
        wait_until_within(STUCK_AFTER, "STUCK: everything is written and published", || {
            // Asked again: the broker ends in its own time what a client of the load left open.
            let ends = self.scope.ends();
            let (committed, cursors) = (self.watch.committed().unwrap_or_default(), self.scope.cursors());
            let is_there = |partition: &i32, end: i64| {
                let copied = cursors.get(partition).is_some_and(|c| c.0 >= end && c.1 >= Some(end));
                end == 0 || copied && committed.get(partition) == Some(&end)
            };
            ends.iter().all(|(partition, end)| is_there(partition, *end))
        });
    }

    /// Drains all instances; each must say that all went well.
    pub fn drain(&mut self) {
        for instance in &self.instances {
            instance.daemon.terminate();
        }
        for instance in &mut self.instances {
            let status = instance.daemon.wait();
            assert_eq!(status.code(), Some(0), "draining {}: {}", instance.name, instance.daemon.log());
        }
    }

    /// The episode's last question, after a drain.
    pub fn end(mut self) -> Checked {
        let checked = self.check();
        self.flow.pause();
        self.drain();
        self.tell_load();
        checked
    }

    /// Says how the records were written, and that each writer had its part in it.
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
        assert!(own.committed > 0 && java.committed > 0, "a writer of the load has written nothing");
    }

    /// The schema becomes newer, in a way that this version need not know: what upgrades promise.
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
            eprintln!("--- what was done in this episode ---\n{}", self.history.join("\n"));
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
            // On a thread of its own: a second panic in this one would end the process.
            let _ = std::thread::scope(|threads| threads.spawn(leave).join());
        }
    }
}

fn move_to_small_disk(lab: &Lab, scope: &Scope<'_>) {
    let disk = lab.servers.small_disk().expect("a small disk");
    let database = &scope.database;
    // A failed episode may have left its own behind.
    let _ = std::fs::remove_file(disk.join("ballast"));
    scope.on_server(&[
        format!("DROP DATABASE \"{database}\" WITH (FORCE)"),
        "DROP TABLESPACE IF EXISTS small".to_owned(),
        format!("CREATE TABLESPACE small OWNER payment_writer LOCATION '{}'", disk.display()),
        format!("CREATE DATABASE \"{database}\" OWNER payment_writer TABLESPACE small"),
    ]);
}

/// Runs the auditor and takes its counts.
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
    assert!(output.status.success(), "the auditor objects:\n{said}\n{errors}");
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

/// Runs `reconcile` where this version has it; whether it did.
fn reconcile(scope: &Scope<'_>) -> bool {
    if scope.command(&["reconcile", "--help"]).code != Some(0) {
        return false;
    }
    scope.command(&["reconcile", "--json"]).succeeds();
    true
}
