//! Instances join and leave while a backlog of transactions is drained: no record may be skipped.  At every
//! rebalance the client's queue is full of records and control records. The tests here have a size that fits
//! CI; `make joins` runs [`full_size`] with the release build.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::audit::audit;
use crate::support::{
    ABORTED_ONE_IN, Daemon, Member, PATIENCE, Payment, Scope, Servers, Transactional, uuid_v4,
    wait_until_within,
};

const INPUT_PARTITIONS: i32 = 100;
const OUTPUT_PARTITIONS: i32 = 4;
const ACCOUNTS: u64 = 10_000;
/// Producers that fill the backlog in parallel.
const PRODUCERS: usize = 4;
/// Minimum time that a joined instance stays.
const STAY: Duration = Duration::from_millis(2_500);
/// Share of the backlog that must be written before an instance joins, and again before the next one does.
const WRITTEN_FIRST: f64 = 0.03;
const WRITTEN_BETWEEN: f64 = 0.005;
/// The slow database takes this long for a batch; all batches together take two lanes at least four minutes.
const DATABASE_PAUSE: Duration = Duration::from_millis(20);
const BATCHES: usize = 25_000;
/// With less of the backlog unread, a join shows nothing.
const UNREAD_MIN: f64 = 0.5;

/// A backlog, and what happens while it is drained.
struct Drill {
    payments: usize,
    /// Payments of one transaction.
    transaction: usize,
    joins: usize,
    /// Time after the joins during which the first instance's own audit may report a loss.
    listens: Option<Duration>,
}

/// An instance that joins and leaves.
struct Join {
    /// Share of the backlog that was unread when its partitions were assigned.
    unread: f64,
    partitions: usize,
    is_killed: bool,
}

/// Result of a drill.
struct Report {
    joins: Vec<Join>,
    /// Records reported missing by the first instance's own audit, if that was waited for.
    told: Option<f64>,
    /// The auditor's output, and whether it found nothing.
    audit: String,
    is_right: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unread at each join:")?;
        for join in &self.joins {
            let end = if join.is_killed { "SIGKILL" } else { "SIGTERM" };
            write!(f, " {:.0} % ({} partitions, {end})", join.unread * 100.0, join.partitions)?;
        }
        let number = |name: &str| {
            let line = self.audit.lines().find(|line| line.trim_start().starts_with(name));
            line.and_then(|line| line.split_whitespace().last()).unwrap_or("?")
        };
        let verdict = if self.is_right { "every outcome is right" } else { "OUTCOMES ARE WRONG" };
        write!(
            f,
            "; records {}, written {}, lost {}",
            number("records in"),
            number("written"),
            number("lost ")
        )?;
        if let Some(told) = self.told {
            write!(f, "; the daemon's own audit reported {told} records as unaccounted for")?;
        }
        write!(f, "; {verdict}")
    }
}

impl Report {
    /// Whether enough was unread at every join.
    fn is_telling(&self) -> bool {
        self.joins.iter().all(|join| join.unread >= UNREAD_MIN)
    }

    #[track_caller]
    fn holds(&self) {
        println!("{self}");
        assert!(self.is_right, "{self}\n{}", self.audit);
        assert!(self.is_telling(), "too little of the backlog was unread: {self}");
    }
}

impl Drill {
    fn run(&self, name: &str) -> Report {
        // GIVEN a backlog of transactions, some of them aborted and sent again
        let scope = Scope::new(Servers::shared(), name);
        scope.prepare(INPUT_PARTITIONS, OUTPUT_PARTITIONS);
        self.fill(&scope);
        let ends: i64 = scope.ends().values().sum();
        let unread = || {
            let applied: i64 = scope.cursors().values().map(|cursor| cursor.0).sum();
            (ends - applied) as f64 / ends as f64
        };

        // AND one instance that drains it in small batches into a slow database, so that its client's queue
        // is always full, and the backlog outlasts the last join on any machine
        slow_down(&scope);
        let batch = (self.payments / BATCHES).max(1).to_string();
        let member = |name: &str| Member::new(name).soon_forgotten().with("BATCH__MAX_PAYMENTS", &batch);
        let mut first = member("first").start(&scope);
        let mut written_by = 1.0 - WRITTEN_FIRST;

        // WHEN others, each with a new instance id, join and leave
        let mut joins = Vec::new();
        for number in 0..self.joins {
            wait_until_within(PATIENCE, "enough is written before the next instance joins", || {
                unread() <= written_by
            });
            let began = Instant::now();
            let mut second = member(&format!("second-{number}")).start(&scope);
            let assigned =
                || second.status()["partitions"].as_object().map_or(0, |partitions| partitions.len());
            wait_until_within(PATIENCE, "the second one has partitions", || assigned() > 0);
            let (partitions, unread_now) = (assigned(), unread());
            std::thread::sleep(STAY.saturating_sub(began.elapsed()));
            let is_killed = number % 2 == 1;
            if is_killed {
                second.kill();
            } else {
                second.drains();
            }
            written_by = unread() - WRITTEN_BETWEEN;
            joins.push(Join { unread: unread_now, partitions, is_killed });
        }

        // AND the own audit of a daemon that is known to lose records has had time to report them
        let told = self.listens.map(|limit| listen(&first, limit));

        // AND the rest is drained at full speed
        first.drains();
        speed_up(&scope);
        let mut last = Member::new("first").soon_forgotten().start(&scope);
        scope.wait_until_caught_up();
        last.drains();

        // THEN every offset has its outcome, according to the auditor
        let audit = audit(&scope);
        let is_right = audit.code == Some(0);
        Report { joins, told, audit: audit.stdout + &audit.stderr, is_right }
    }

    fn fill(&self, scope: &Scope<'_>) {
        std::thread::scope(|threads| {
            for producer in 0..PRODUCERS {
                threads.spawn(move || {
                    let id = format!("{}_{producer}", scope.input_topic);
                    let transactional = Transactional::new(scope, &id, "lz4");
                    let own: Vec<usize> = (producer..self.payments).step_by(PRODUCERS).collect();
                    for (number, chunk) in own.chunks(self.transaction).enumerate() {
                        let payment = |seed: &usize| {
                            let seed = *seed as u64;
                            let account = i64::try_from(1 + seed % ACCOUNTS).unwrap();
                            Payment::new(uuid_v4(seed), account).message()
                        };
                        let payments: Vec<_> = chunk.iter().map(payment).collect();
                        if number % (ABORTED_ONE_IN as usize - 1) == 0 {
                            transactional.abort(&payments);
                        }
                        transactional.commit(&payments);
                    }
                });
            }
        });
    }
}

/// Waits until a daemon's own audit reports records that are unaccounted for, prints the line, and returns
/// how many there were.
fn listen(daemon: &Daemon, limit: Duration) -> f64 {
    let told = || daemon.metric("payment_writer_audit_records_total", "result=\"unaccounted\"");
    let began = Instant::now();
    while told() == 0.0 && began.elapsed() < limit {
        std::thread::sleep(Duration::from_secs(1));
    }
    let log = daemon.log();
    log.lines().filter(|line| line.contains("not accounted for")).take(3).for_each(|line| println!("{line}"));
    told()
}

/// From now on the database takes [`DATABASE_PAUSE`] for a batch of any size.
fn slow_down(scope: &Scope<'_>) {
    let seconds = DATABASE_PAUSE.as_secs_f64();
    scope.execute(&format!(
        "CREATE FUNCTION payment_writer.pause() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;
         CREATE TRIGGER pause AFTER INSERT ON payment_writer.payment_metadata
         FOR EACH STATEMENT EXECUTE FUNCTION payment_writer.pause()"
    ));
}

fn speed_up(scope: &Scope<'_>) {
    scope
        .execute("DROP TRIGGER pause ON payment_writer.payment_metadata; DROP FUNCTION payment_writer.pause");
}

#[test]
fn instances_that_join_and_leave_while_large_transactions_are_drained_skip_nothing() {
    Drill { payments: 50_000, transaction: 500, joins: 6, listens: None }.run("joins_500").holds();
}

#[test]
fn instances_that_join_and_leave_while_small_transactions_are_drained_skip_nothing() {
    Drill { payments: 50_000, transaction: 50, joins: 6, listens: None }.run("joins_50").holds();
}

fn number(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) if !text.is_empty() => {
            text.parse().unwrap_or_else(|_| panic!("{variable}={text}: not a number"))
        }
        _ => default,
    }
}

/// With the size that `make joins` describes; prints a line for each run, and fails after the last one.
#[test]
#[ignore = "takes half an hour: make joins"]
fn full_size() {
    let transactions = match number("JOINS_TRANSACTION", 0) {
        0 => vec![50, 500],
        one => vec![one],
    };
    let (payments, joins, runs) =
        (number("JOINS_COUNT", 600_000), number("JOINS_JOINS", 6), number("JOINS_RUNS", 5));
    // For a build that is known to lose payments.
    let listens = match number("JOINS_LISTENS", 0) {
        0 => None,
        seconds => Some(Duration::from_secs(seconds as u64)),
    };
    if let Some(program) = std::env::var_os("PAYMENT_WRITER_TESTED_PROGRAM") {
        println!("testing {}", Path::new(&program).display());
    }
    let mut failed = 0;
    for transaction in transactions {
        for run in 1..=runs {
            let report = Drill { payments, transaction, joins, listens }.run(&format!("joins_{transaction}"));
            println!("{payments} payments, {transaction} a transaction, run {run} of {runs}: {report}");
            if !report.is_right {
                println!("{}", report.audit);
            }
            failed += usize::from(!(report.is_right && report.is_telling()));
        }
    }
    assert_eq!(failed, 0, "runs with losses or duplicates, or without a valid test");
}
