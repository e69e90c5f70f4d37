//! Drains of preloaded payments, in several cases that alternate.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Parser;
use payment_writer::housekeeping::generations::{self, State};
use serde_json::{Map, Value, json};

use crate::ceilings::{self, Ceiling};
use crate::daemon::{Daemon, Metrics, Progress};
use crate::processes::{Meter, resident_max};
use crate::report::{self, Lines};
use crate::row;
use crate::site::{Amount, Counter, Input, Sent, Servers, Site, failed};
use crate::stats::Spread;
use crate::{BaselineArguments, Outcome, ServersArguments};

/// Time limit for sending the records of one run.
pub const PRODUCE_LIMIT: Duration = Duration::from_secs(1_200);
/// A daemon without progress for this long is stuck.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Time limit for filling the idempotency table.
const FILL_LIMIT: Duration = Duration::from_secs(3_600);
/// Interval between polls of the daemon; shorter towards the end.
const LOOK_MAX: Duration = Duration::from_millis(250);
const LOOK_MIN: Duration = Duration::from_millis(5);
/// Interval before it has started to fetch.
const LOOK_FIRST: Duration = Duration::from_millis(10);

const AFTER_HELP: &str = "\
Cases: v7, v4, v7-plain; lanes-1 to lanes-4; instances-2; audit-off; duplicates-0.1, duplicates-1, duplicates-1-v4,
duplicates-10 (percent); dead-letters-1 (percent); table-0m-v7, table-0m-v4, table-10m-v7,
table-10m-v4, table-30m-v7, table-30m-v4; value-1k, value-4k; accounts-100, accounts-1000, accounts-1000000. The beginning of
names, up to a dash, stands for all of them (table, lanes, table-10m) where no case has that name; all for all. Ids are v7
where nothing is said.

The input is written by five producers side by side, all with lz4: half of the records in transactions of 500, a tenth
of which is aborted and sent again, by four of them; half without transactions. Of v7-plain it is written by one producer without
transactions and compression, as in figures from before 2026-11-29.";

/// `bench throughput`
#[derive(Parser)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    #[command(flatten)]
    servers: ServersArguments,
    #[command(flatten)]
    baseline: BaselineArguments,
    /// What to measure
    #[arg(long, value_delimiter = ',', default_values_t = ["v7".to_owned(), "v4".to_owned()])]
    cases: Vec<String>,
    /// Runs of each case
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    repeat: u64,
    /// Payments of a run
    #[arg(long, default_value_t = 3_000_000, value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    count: u64,
    /// Warm-up runs of the first case, not measured: a broker that has just started compiles its code
    #[arg(long, default_value_t = 8)]
    warm_up: u64,
    /// Do not measure the servers' maximum
    #[arg(long)]
    no_ceilings: bool,
}

/// A case to measure.
#[derive(Clone, Debug, PartialEq)]
struct Case {
    name: String,
    /// Arguments of `payment-writer produce`.
    words: Vec<&'static str>,
    input: Input,
    /// Settings of the daemon, as environment variables.
    settings: Vec<(&'static str, &'static str)>,
    instances: usize,
    /// Millions of ids already in the idempotency table, if one database is used for all runs.
    table_millions: Option<u64>,
    /// The case to compare it with.
    base: Option<String>,
    /// A different build of the daemon than the one beside this program.
    program: Option<PathBuf>,
}

impl Case {
    fn new(name: &str, words: &[&'static str]) -> Self {
        let words = words.to_vec();
        Self {
            name: name.to_owned(),
            words,
            input: Input::Mixed,
            settings: Vec::new(),
            instances: 1,
            table_millions: None,
            base: None,
            program: None,
        }
    }

    fn against(mut self, base: &'static str) -> Self {
        self.base = Some(base.to_owned());
        self
    }
}

/// All cases, in the order of the output.
fn all_cases() -> Vec<Case> {
    const V7: [&str; 2] = ["--ids", "v7"];
    const V4: [&str; 2] = ["--ids", "v4"];
    let with = |words: &[&'static str]| [&V7[..], words].concat();
    let plain = Case { input: Input::Plain, ..Case::new("v7-plain", &V7) };
    let mut cases = vec![Case::new("v7", &V7), Case::new("v4", &V4), plain];
    for (name, lanes) in [("lanes-1", "1"), ("lanes-2", "2"), ("lanes-3", "3"), ("lanes-4", "4")] {
        cases.push(Case { settings: vec![("LANES", lanes)], ..Case::new(name, &V7) });
    }
    cases.push(Case { instances: 2, ..Case::new("instances-2", &V7) });
    cases.push(Case { settings: vec![("AUDIT__SHARE", "0")], ..Case::new("audit-off", &V7).against("v7") });
    for (name, share) in [("duplicates-0.1", "0.001"), ("duplicates-1", "0.01"), ("duplicates-10", "0.1")] {
        cases.push(Case::new(name, &with(&["--duplicates", share])).against("v7"));
    }
    cases.push(Case::new("duplicates-1-v4", &[&V4[..], &["--duplicates", "0.01"]].concat()).against("v4"));
    cases.push(Case::new("dead-letters-1", &with(&["--bad", "0.01"])).against("v7"));
    // Compared with a table that is as old and nearly empty: a new database, new topics and a new group for
    // each run cost more in the daemon and the broker than the table does.
    for millions in [0, 10, 30] {
        for (kind, words, base) in [("v7", &V7, "table-0m-v7"), ("v4", &V4, "table-0m-v4")] {
            let name = format!("table-{millions}m-{kind}");
            let base = (millions > 0).then(|| base.to_owned());
            cases.push(Case { table_millions: Some(millions), base, ..Case::new(&name, words) });
        }
    }
    cases.push(Case::new("value-1k", &with(&["--value-bytes", "1024"])));
    cases.push(Case::new("value-4k", &with(&["--value-bytes", "4096"])));
    cases.push(Case::new("accounts-100", &with(&["--accounts", "100"])));
    cases.push(Case::new("accounts-1000", &with(&["--accounts", "1000"])));
    cases.push(Case::new("accounts-1000000", &with(&["--accounts", "1000000"])));
    cases
}

/// The cases with these names, and those they are compared with.
fn chosen(names: &[String]) -> Outcome<Vec<Case>> {
    let all = all_cases();
    let mut wanted: Vec<bool> = vec![false; all.len()];
    for name in names {
        let is_a_case = all.iter().any(|case| case.name == *name);
        let mut is_known = false;
        for (case, wanted) in all.iter().zip(&mut wanted) {
            let is_beginning = !is_a_case && case.name.starts_with(&format!("{name}-"));
            if name == "all" || *name == case.name || is_beginning {
                (*wanted, is_known) = (true, true);
            }
        }
        if !is_known {
            let known: Vec<&str> = all.iter().map(|case| case.name.as_str()).collect();
            return Err(format!("there is no case {name:?}; the cases are all, {}", known.join(", ")));
        }
    }
    let bases: Vec<&String> = all
        .iter()
        .zip(&wanted)
        .filter(|(_, wanted)| **wanted)
        .filter_map(|(case, _)| case.base.as_ref())
        .collect();
    Ok(all
        .iter()
        .zip(wanted)
        .filter(|(c, w)| *w || bases.contains(&&c.name))
        .map(|(c, _)| c.clone())
        .collect())
}

/// Each case with this build and with another one, for comparison.
fn with_baseline(cases: Vec<Case>, program: &Path) -> Vec<Case> {
    let twin = |mut case: Case| {
        let mut baseline = case.clone();
        baseline.name = format!("{} baseline", case.name);
        (baseline.program, baseline.base) = (Some(program.to_owned()), None);
        case.base = Some(baseline.name.clone());
        [case, baseline]
    };
    cases.into_iter().flat_map(twin).collect()
}

/// One run of a case.
#[derive(Clone, Debug)]
struct Run {
    records: u64,
    /// Records with an outcome in the measured time, and that time.
    timed: u64,
    seconds: f64,
    /// CPU seconds of the daemons, the broker and Postgres, for all records.
    cpu: [f64; 3],
    others: f64,
    resident_max: u64,
    postgres_transactions: i64,
    metrics: Metrics,
}

const PHASES: [&str; 4] = ["waiting", "assembling", "database", "kafka"];
const DATABASE_STEPS: [&str; 3] = ["claim", "copy", "commit"];
const KAFKA_STEPS: [&str; 4] = ["produce", "offsets", "deliver", "commit"];

impl Run {
    fn rate(&self) -> f64 {
        self.timed as f64 / self.seconds
    }

    fn micros(&self, part: usize) -> f64 {
        self.cpu[part] * 1e6 / self.records as f64
    }

    fn micros_of_all(&self) -> f64 {
        (0..3).map(|part| self.micros(part)).sum()
    }

    fn batches(&self) -> f64 {
        self.metrics.get("payment_writer_batch_records_count")
    }

    fn batch_records(&self) -> f64 {
        self.metrics.get("payment_writer_batch_records_sum") / self.batches().max(1.0)
    }

    fn kafka_transactions(&self) -> f64 {
        self.metrics.get("payment_writer_phase_seconds_count{phase=\"kafka\"}")
    }

    /// Milliseconds of this step in a batch.
    fn step_ms(&self, metric: &str, label: &str, step: &str) -> f64 {
        let sum = self.metrics.get(&format!("payment_writer_{metric}_sum{{{label}=\"{step}\"}}"));
        sum * 1_000.0 / self.batches().max(1.0)
    }

    fn phase_ms(&self, phase: &str) -> f64 {
        self.step_ms("phase_seconds", "phase", phase)
    }

    fn json(&self, case: &Case, round: u64) -> Value {
        let steps = |metric: &str, steps: &[&str]| -> Map<String, Value> {
            let ms = |step: &&str| rounded(self.step_ms(metric, "step", step), 3);
            steps.iter().map(|step| ((*step).to_owned(), ms(step))).collect()
        };
        let phases: Map<String, Value> =
            PHASES.iter().map(|phase| ((*phase).to_owned(), rounded(self.phase_ms(phase), 3))).collect();
        json!({
            "benchmark": "throughput", "case": case.name, "run": round, "instances": case.instances,
            "records": self.records, "records_timed": self.timed, "seconds": rounded(self.seconds, 3),
            "records_per_s": rounded(self.rate(), 0),
            "cpu_us_per_record": {
                "daemon": rounded(self.micros(0), 3), "broker": rounded(self.micros(1), 3),
                "postgres": rounded(self.micros(2), 3), "all": rounded(self.micros_of_all(), 3),
            },
            "cpu_share_of_others": rounded(self.others, 3),
            "resident_max_bytes": self.resident_max,
            "postgres_transactions_per_s": rounded(self.postgres_transactions as f64 / self.seconds, 1),
            "kafka_transactions_per_s": rounded(self.kafka_transactions() / self.seconds, 1),
            "batch_records_mean": rounded(self.batch_records(), 1),
            "ms_per_batch": {
                "phases": phases,
                "database_steps": steps("database_step_seconds", &DATABASE_STEPS),
                "kafka_steps": steps("kafka_step_seconds", &KAFKA_STEPS),
            },
        })
    }
}

/// A number with this many decimals.
fn rounded(value: f64, decimals: i32) -> Value {
    let factor = 10f64.powi(decimals);
    json!((value * factor).round() / factor)
}

/// Waits until earlier work has finished, and starts each run just after a checkpoint.
pub fn settle(servers: &Servers) -> Outcome<()> {
    servers.administer(&["CHECKPOINT"])?;
    std::thread::sleep(Duration::from_secs(2));
    Ok(())
}

fn sent(site: &Site<'_>, case: &Case, count: u64, seed: u64) -> Outcome<Sent> {
    let sending = site.write(case.input, &case.words, Amount::Count(count), seed)?;
    let sent = sending.finish(PRODUCE_LIMIT)?;
    match sent.records == count {
        true => Ok(sent),
        false => Err(format!("{} records were sent instead of {count}", sent.records)),
    }
}

fn progress(daemons: &mut [Daemon]) -> Outcome<Progress> {
    let none = Progress { is_fetching: true, ..Progress::default() };
    daemons.iter_mut().try_fold(none, |sum, daemon| Ok(sum.plus(daemon.progress()?)))
}

fn metrics(daemons: &mut [Daemon]) -> Outcome<Metrics> {
    daemons.iter_mut().try_fold(Metrics::default(), |sum, daemon| Ok(sum.plus(&daemon.metrics()?)))
}

/// Interval until the next poll, with this many records left.
fn pause(left: u64, per_second: f64) -> Duration {
    let rest = Duration::try_from_secs_f64(left as f64 / per_second / 3.0).unwrap_or(LOOK_MAX);
    rest.clamp(LOOK_MIN, LOOK_MAX)
}

/// The result of a drain.
struct Drained {
    /// Records that got their outcome in this time.
    records: u64,
    seconds: f64,
    /// Records by outcome at the end.
    reached: Progress,
    /// Metrics of the daemons and the database at the start.
    metrics: Metrics,
    transactions: i64,
}

/// From the time when every instance fetches a partition until every record has its outcome.
fn drained(daemons: &mut [Daemon], counter: &Counter<'_>, records: u64) -> Outcome<Drained> {
    let began = Instant::now();
    let before = loop {
        let now = progress(daemons)?;
        if now.settled() >= records {
            return Err(format!(
                "all {records} records had their outcome before every instance had partitions"
            ));
        }
        if now.is_fetching {
            break now.settled();
        }
        if began.elapsed() > STALL_LIMIT {
            return Err(daemons[0].complain("the daemon does not start fetching"));
        }
        std::thread::sleep(LOOK_FIRST);
    };
    let began = Instant::now();
    let (transactions, metrics) = (counter.transactions()?, metrics(daemons)?);
    let (mut settled, mut settled_at) = (0, began);
    loop {
        let now = progress(daemons)?;
        if now.settled() >= records {
            let seconds = began.elapsed().as_secs_f64();
            return Ok(Drained { records: records - before, seconds, reached: now, metrics, transactions });
        }
        if now.settled() > settled {
            (settled, settled_at) = (now.settled(), Instant::now());
        } else if settled_at.elapsed() > STALL_LIMIT {
            let message = format!("the daemon is stuck at {settled} of {records} records");
            return Err(daemons[0].complain(&message));
        }
        let per_second = now.settled().saturating_sub(before) as f64 / began.elapsed().as_secs_f64();
        std::thread::sleep(pause(records - now.settled(), per_second));
    }
}

/// Preloads and drains one run.
fn measure(site: &Site<'_>, case: &Case, count: u64, seed: u64) -> Outcome<Run> {
    let servers = site.servers;
    let sent = sent(site, case, count, seed)?;
    settle(servers)?;
    let counter = servers.counter(&site.name)?;
    let servers_meter = Meter::start(vec![&servers.broker, &servers.postgres]);
    let mut daemons =
        (0..case.instances).map(|n| Daemon::start(site, n, &case.settings)).collect::<Outcome<Vec<_>>>()?;
    let drained = drained(&mut daemons, &counter, sent.records)?;
    let pids: Vec<u32> = daemons.iter().map(Daemon::id).collect();
    let daemon_cpu = crate::processes::cpu_seconds(&pids);
    let servers_cpu = servers_meter.read();
    let cpu = [daemon_cpu, servers_cpu[0], servers_cpu[1]];
    let others = servers_meter.share_of_others(cpu.iter().sum());
    let resident_max = pids.iter().filter_map(|pid| resident_max(*pid)).sum();
    let metrics = metrics(&mut daemons)?.since(&drained.metrics);
    daemons.into_iter().try_for_each(Daemon::stop)?;
    // Sessions that have ended have reported all their statistics to the server.
    let postgres_transactions = counter.transactions()? - drained.transactions;
    let reached = drained.reached;
    let expected = &sent.expected;
    let found = (reached.written + reached.redelivered, reached.duplicates, reached.dead_letters);
    if found != (expected.written, expected.duplicates, expected.dead_letters) {
        return Err(format!("written, duplicates, dead letters: {found:?} instead of {expected:?}"));
    }
    let (records, timed, seconds) = (sent.records, drained.records, drained.seconds);
    Ok(Run { records, timed, seconds, cpu, others, resident_max, postgres_transactions, metrics })
}

/// Fills the current generation with random ids, on the server. The index is built afterwards: that is
/// several times faster and gives the same pages.
fn fill(site: &Site<'_>, millions: u64) -> Outcome<()> {
    let ids = millions * 1_000_000;
    site.servers.connected(&site.url, async |client| {
        let all = generations::list(client).await.map_err(failed("reading generations"))?;
        let current = all.into_iter().find(|generation| generation.state == State::Current);
        let leaf = current.ok_or("there is no current generation")?.leaf;
        let statements = [
            "SET maintenance_work_mem = '1GB'".to_owned(),
            format!("ALTER TABLE payment_writer.{leaf} DROP CONSTRAINT {leaf}_pkey"),
            format!(
                "INSERT INTO payment_writer.{leaf} (message_id, source_offset, payload_hash, created_at, source_partition)
                 SELECT gen_random_uuid(), n, n, now(), 1000 FROM generate_series(1, {ids}) AS n"
            ),
            format!("ALTER TABLE payment_writer.{leaf} ADD PRIMARY KEY (message_id)"),
            format!("VACUUM ANALYZE payment_writer.{leaf}"),
        ];
        let work = async {
            for statement in &statements {
                client.batch_execute(statement).await.map_err(|e| payment_writer::postgres::connection::describe(&e))?;
            }
            Ok::<(), String>(())
        };
        tokio::time::timeout(FILL_LIMIT, work)
            .await
            .map_err(|_| "filling the idempotency table took too long".to_owned())?
            .map_err(failed("filling the idempotency table"))
    })
}

fn rate_line(run: &Run) -> String {
    format!(
        "{:>7.0}/s  CPU µs a record: daemon {:5.2}  broker {:5.2}  postgres {:5.2}  all {:5.2}  (others used {:2.0} %)",
        run.rate(),
        run.micros(0),
        run.micros(1),
        run.micros(2),
        run.micros_of_all(),
        run.others * 100.0
    )
}

/// `bench throughput`
pub fn run(arguments: &Arguments) -> Outcome<()> {
    let mut cases = chosen(&arguments.cases)?;
    if let Some(program) = &arguments.baseline.baseline {
        cases = with_baseline(cases, program);
    }
    let mut lines = Lines::new(arguments.servers.json.as_deref())?;
    let servers = Servers::find(&arguments.servers)?;
    let count = arguments.count;

    eprintln!("bench: warming up");
    for _ in 0..arguments.warm_up {
        measure(&Site::create(&servers)?, &cases[0], count, 1)?;
    }
    // Databases with a big table are shared by all cases of their size, and all their runs.
    let mut tables: Vec<(u64, Site<'_>)> = Vec::new();
    for case in &cases {
        let Some(millions) = case.table_millions else { continue };
        if tables.iter().all(|(filled, _)| *filled != millions) {
            eprintln!("bench: filling a table with {millions} million ids");
            let site = Site::create(&servers)?;
            fill(&site, millions)?;
            // The first run on a new table is slower than later ones.
            measure(&site, case, (count / 4).max(1_000), 2)?;
            tables.push((millions, site));
        }
    }

    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); cases.len()];
    let mut ceilings: Vec<Ceiling> = Vec::new();
    for round in 1..=arguments.repeat {
        if !arguments.no_ceilings {
            for ceiling in ceilings::measure(&servers, count, round * 100)? {
                eprintln!("bench: run {round}  {:<17} {:>7.0}/s", ceiling.name, rate_of(&ceiling));
                lines.add(ceiling_json(&ceiling, round))?;
                ceilings.push(ceiling);
            }
        }
        // Every second round runs backwards: a steady drift affects all alike.
        let mut order: Vec<usize> = (0..cases.len()).collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for index in order {
            let case = &cases[index];
            // The same seed for a case and its baseline.
            let seed =
                round * 100 + 1 + index as u64 / if arguments.baseline.baseline.is_some() { 2 } else { 1 };
            let run = match tables.iter().find(|(millions, _)| Some(*millions) == case.table_millions) {
                Some((_, site)) => measure(site, case, count, seed),
                None => {
                    let program = case.program.as_ref().unwrap_or(&servers.program);
                    measure(&Site::create_for(&servers, program)?, case, count, seed)
                }
            }
            .map_err(|message| format!("case {}, run {round}: {message}", case.name))?;
            eprintln!("bench: run {round}  {:<17} {}", case.name, rate_line(&run));
            lines.add(run.json(case, round))?;
            runs[index].push(run);
        }
    }
    print_all(&cases, &runs, &ceilings);
    lines.finish();
    Ok(())
}

fn rate_of(ceiling: &Ceiling) -> f64 {
    ceiling.payments as f64 / ceiling.seconds
}

fn ceiling_json(ceiling: &Ceiling, round: u64) -> Value {
    let micros = |part: usize| rounded(ceiling.cpu[part] * 1e6 / ceiling.payments as f64, 3);
    json!({
        "benchmark": "ceiling", "case": ceiling.name, "run": round, "records": ceiling.payments,
        "seconds": rounded(ceiling.seconds, 3), "records_per_s": rounded(rate_of(ceiling), 0),
        "cpu_us_per_record": {"broker": micros(0), "postgres": micros(1), "client": micros(2)},
    })
}

/// Median, minimum and maximum of one figure over all runs.
fn spread(runs: &[Run], decimals: usize, figure: impl Fn(&Run) -> f64) -> String {
    Spread::of(runs.iter().map(figure)).map_or(String::new(), |spread| format!("{spread:.decimals$}"))
}

fn print_all(cases: &[Case], runs: &[Vec<Run>], ceilings: &[Ceiling]) {
    let each = || cases.iter().zip(runs);
    let mut rows = vec![row![
        "case",
        "run",
        "records/s",
        "daemon",
        "broker",
        "postgres",
        "all",
        "others %",
        "resident MB"
    ]];
    for (case, runs) in each() {
        for (number, run) in runs.iter().enumerate() {
            let micros = |part| format!("{:.2}", run.micros(part));
            rows.push(row![
                case.name,
                number + 1,
                format!("{:.0}", run.rate()),
                micros(0),
                micros(1),
                micros(2),
                format!("{:.2}", run.micros_of_all()),
                format!("{:.0}", run.others * 100.0),
                run.resident_max / 1_000_000,
            ]);
        }
    }
    report::print("All runs; CPU in µs a record", &rows);

    let mut rows = vec![row!["case", "records/s", "daemon", "broker", "postgres", "all", "resident MB"]];
    for (case, runs) in each() {
        let micros = |part: usize| spread(runs, 2, |run| run.micros(part));
        rows.push(row![
            case.name,
            spread(runs, 0, Run::rate),
            micros(0),
            micros(1),
            micros(2),
            spread(runs, 2, Run::micros_of_all),
            spread(runs, 0, |run| run.resident_max as f64 / 1e6),
        ]);
    }
    report::print("Median (min..max); CPU in µs a record", &rows);

    let mut rows = vec![row!["case", "Postgres tx/s", "Kafka tx/s", "batch records"]];
    rows[0].extend(PHASES.iter().map(|phase| format!("{phase} ms")));
    for (case, runs) in each() {
        let mut row = row![
            case.name,
            spread(runs, 1, |run| run.postgres_transactions as f64 / run.seconds),
            spread(runs, 1, |run| run.kafka_transactions() / run.seconds),
            spread(runs, 0, Run::batch_records),
        ];
        row.extend(PHASES.iter().map(|phase| spread(runs, 1, |run| run.phase_ms(phase))));
        rows.push(row);
    }
    report::print("Transactions, and time of a lane per batch; median (min..max)", &rows);

    let mut rows = vec![vec!["case".to_owned()]];
    rows[0].extend(DATABASE_STEPS.iter().map(|step| format!("database: {step}")));
    rows[0].extend(KAFKA_STEPS.iter().map(|step| format!("kafka: {step}")));
    for (case, runs) in each() {
        let mut row = row![case.name];
        for (metric, steps) in
            [("database_step_seconds", &DATABASE_STEPS[..]), ("kafka_step_seconds", &KAFKA_STEPS[..])]
        {
            row.extend(steps.iter().map(|step| spread(runs, 1, |run| run.step_ms(metric, "step", step))));
        }
        rows.push(row);
    }
    report::print("The steps of both transactions, ms a batch; median (min..max)", &rows);

    let mut rows =
        vec![row!["case", "compared with", "CPU of the daemon", "of the broker", "of all", "records/s"]];
    for (case, own) in each() {
        let Some(base) = cases.iter().position(|other| case.base.as_ref() == Some(&other.name)) else {
            continue;
        };
        // Compared run by run, so that what slows a whole round down cancels out.
        let ratio = |figure: fn(&Run) -> f64| {
            let pairs = own.iter().zip(&runs[base]).map(|(run, base)| figure(run) / figure(base));
            Spread::of(pairs).map_or(String::new(), |spread| format!("{spread:.2}"))
        };
        rows.push(row![
            case.name,
            cases[base].name,
            ratio(|run| run.micros(0)),
            ratio(|run| run.micros(1)),
            ratio(Run::micros_of_all),
            ratio(Run::rate)
        ]);
    }
    if rows.len() > 1 {
        report::print("Ratios to the base case, within each round; median (min..max)", &rows);
    }
    print_ceilings(&cases[0], &runs[0], ceilings);
}

fn print_ceilings(case: &Case, runs: &[Run], ceilings: &[Ceiling]) {
    let mut rows = vec![row!["", "payments/s", "broker", "postgres", "client"]];
    let mut lowest: Option<(f64, &str)> = None;
    for name in ceilings::NAMES {
        let own: Vec<&Ceiling> = ceilings.iter().filter(|ceiling| ceiling.name == name).collect();
        let Some(rate) = Spread::of(own.iter().map(|ceiling| rate_of(ceiling))) else { continue };
        if lowest.is_none_or(|(least, _)| rate.median < least) {
            lowest = Some((rate.median, name));
        }
        let micros = |part: usize| {
            let of = |ceiling: &&Ceiling| ceiling.cpu[part] * 1e6 / ceiling.payments as f64;
            Spread::of(own.iter().map(of)).map_or(String::new(), |spread| format!("{spread:.2}"))
        };
        rows.push(row![name, format!("{rate:.0}"), micros(0), micros(1), micros(2)]);
    }
    let (Some((least, name)), Some(rate)) = (lowest, Spread::of(runs.iter().map(Run::rate))) else { return };
    report::print("Maximum of the servers; median (min..max); CPU in µs a payment", &rows);
    let share = rate.median / least;
    println!(
        "The daemon ({}, {:.0}/s) reaches {share:.2} of the lowest ceiling ({name}).",
        case.name, rate.median
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(chosen_by: &[&str]) -> Vec<String> {
        let words: Vec<String> = chosen_by.iter().map(|word| (*word).to_owned()).collect();
        chosen(&words).unwrap().into_iter().map(|case| case.name).collect()
    }

    #[test]
    fn a_name_or_its_beginning_chooses_cases() {
        assert_eq!(names(&["v4", "v7"]), ["v7", "v4"]);
        assert_eq!(names(&["lanes"]), ["lanes-1", "lanes-2", "lanes-3", "lanes-4"]);
        assert_eq!(names(&["accounts-100"]), ["accounts-100"]);
        assert_eq!(names(&["all"]).len(), all_cases().len());
        assert!(chosen(&["v8".to_owned()]).unwrap_err().contains("dead-letters-1"));
    }

    #[test]
    fn what_a_case_is_compared_with_comes_along() {
        assert_eq!(names(&["duplicates-10"]), ["v7", "duplicates-10"]);
        assert_eq!(names(&["duplicates-1"]), ["v7", "duplicates-1"]);
        assert_eq!(names(&["duplicates-1-v4"]), ["v4", "duplicates-1-v4"]);
        assert_eq!(names(&["table-10m"]), ["table-0m-v7", "table-0m-v4", "table-10m-v7", "table-10m-v4"]);
    }

    #[test]
    fn a_baseline_doubles_each_case() {
        let cases =
            with_baseline(chosen(&["lanes-1".to_owned(), "v4".to_owned()]).unwrap(), Path::new("old"));
        let named: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(named, ["v4", "v4 baseline", "lanes-1", "lanes-1 baseline"]);
        assert_eq!(cases[2].base.as_deref(), Some("lanes-1 baseline"));
        assert_eq!((&cases[2].program, cases[3].program.as_deref()), (&None, Some(Path::new("old"))));
        assert_eq!(cases[3].settings, cases[2].settings);
    }

    #[test]
    fn looks_come_closer_towards_the_end() {
        assert_eq!(pause(1_000_000, 50_000.0), LOOK_MAX);
        assert_eq!(pause(1_000, 50_000.0).as_millis(), 6);
        assert_eq!(pause(1, 50_000.0), LOOK_MIN);
        assert_eq!(pause(1_000, 0.0), LOOK_MAX);
    }
}
