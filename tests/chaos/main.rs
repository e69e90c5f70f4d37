//! Faults of every kind, one after the other, under load, against a real Kafka and a real Postgres; then a
//! check that every record had exactly one outcome.
//!
//! Without arguments, as `cargo test` runs it, this is a bounded selection with a fixed seed. `make chaos
//! CYCLES=n SEED=s BROKERS=3` runs any number of cycles. The seed of a cycle, which is printed, determines
//! the fault, its time and its target. How daemons and servers react depends on their threads, so a seed
//! repeats the faults and not necessarily the result.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// The tests use their own clients, besides those of the program.
#![allow(clippy::disallowed_methods)]

mod episode;
mod fault;
mod inject;
mod java;
mod load;
mod proxy;
mod report;
#[path = "../it/support/mod.rs"]
mod support;
mod watch;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::episode::{Episode, Lab, Setup};
use crate::fault::Fault;
use crate::report::Cycle;

/// The faults without arguments: the quick kinds, each at a different failpoint. They include a restored
/// database and deleted records, so the episode must allow these.
const SHARE: [Fault; 14] = [
    Fault::KillAtStep,
    Fault::SwallowedCommit,
    Fault::KillAtStep,
    Fault::BackendsTerminated,
    Fault::PostgresImmediate,
    Fault::LateCommit,
    Fault::PartialRevoke,
    Fault::ConnectionsCut,
    Fault::KillAnywhere,
    Fault::DatabaseRestored,
    Fault::SameInstanceId,
    Fault::OffsetsMovedBack,
    Fault::ZombieAtStep,
    Fault::StandbyPromoted,
];
const SHARE_SEED: u64 = 7;
/// The whole episode is checked after this many cycles.
const CHECK_EVERY: u64 = 5;

/// Injects faults under load, and checks that every record had exactly one outcome
#[derive(Parser)]
struct Arguments {
    /// How many cycles; without it, a bounded selection with a fixed seed
    #[arg(long)]
    cycles: Option<u64>,
    /// The first cycle's seed; later cycles count up from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only these kinds
    #[arg(long, value_delimiter = ',')]
    faults: Vec<Fault>,
    /// One broker, or three with replication
    #[arg(long, default_value_t = 1)]
    brokers: usize,
    /// How many daemons; by default one to three, depending on the seed
    #[arg(long)]
    instances: Option<usize>,
    /// Append a JSON line for each cycle to this file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Continue with a new episode after a failure
    #[arg(long)]
    keep_going: bool,
    /// After a failure, keep the servers running for this many seconds
    #[arg(long, value_name = "SECONDS")]
    linger: Option<u64>,
    /// Arguments that `cargo test` passes to every test binary
    #[arg(hide = true)]
    filter: Vec<String>,
    #[arg(long, hide = true)]
    list: bool,
    #[arg(long, hide = true)]
    nocapture: bool,
    #[arg(long, hide = true)]
    exact: bool,
    #[arg(long, hide = true)]
    ignored: bool,
    #[arg(long, short, hide = true)]
    quiet: bool,
    #[arg(long, hide = true)]
    skip: Vec<String>,
    #[arg(long, hide = true)]
    test_threads: Option<usize>,
    #[arg(long, hide = true)]
    format: Option<String>,
}

impl Arguments {
    /// Whether the filter selects other tests than this one.
    fn is_for_others(&self) -> bool {
        let is_named = self.filter.iter().any(|name| "chaos".contains(name.as_str()));
        self.list || self.ignored || (!self.filter.is_empty() && !is_named)
    }
}

/// Progress of a run.
struct Progress {
    next_seed: u64,
    episodes: usize,
    fault: Fault,
    done: Vec<Cycle>,
    report: Option<PathBuf>,
}

impl Progress {
    fn record(&mut self, cycle: Cycle) {
        cycle.print();
        if let Some(path) = &self.report {
            cycle.append_to(path);
        }
        self.done.push(cycle);
        self.next_seed += 1;
    }

    fn record_failure(&mut self, setup: Setup, brokers: usize, panic: &(dyn Any + Send)) {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a text");
        self.record(Cycle {
            seed: self.next_seed,
            episode: self.episodes,
            fault: self.fault,
            brokers,
            instances: setup.instances,
            detail: String::new(),
            fault_ms: 0,
            recovery_ms: 0,
            checked: None,
            is_spoilt: false,
            failure: Some(text.lines().take(40).collect::<Vec<_>>().join("\n")),
        });
    }
}

/// Runs all cycles from the next seed on that belong to one episode; with a plan, all of them.
fn run_episode(lab: &Lab, faults: &[Fault], setup: Setup, plan: &[Fault], end: u64, run: &mut Progress) {
    let first_seed = run.next_seed;
    let mut episode: Option<Episode<'_>> = None;
    loop {
        let seed = run.next_seed;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let planned = plan.get(usize::try_from(seed - first_seed).unwrap()).copied();
        let chosen = Fault::choose(&mut random, faults, setup.stage, lab.servers.brokers());
        run.fault = planned.or(chosen).expect("none of these faults is possible in this episode");
        let present = episode.get_or_insert_with(|| Episode::begin(lab, setup, run.fault));
        let (mut cycle, is_over) = run_cycle(present, seed, run, &mut random);
        let is_last = is_over || seed + 1 == end;
        if is_last && !is_over {
            cycle.checked = episode.take().map(Episode::end);
        } else if !is_over && (seed + 1).is_multiple_of(CHECK_EVERY) {
            cycle.checked = Some(present.check());
        }
        run.record(cycle);
        if is_last {
            return;
        }
    }
}

/// Injects one fault and waits for recovery; returns whether the episode ends with it.
fn run_cycle(episode: &mut Episode<'_>, seed: u64, run: &Progress, random: &mut ChaCha8Rng) -> (Cycle, bool) {
    let fault = run.fault;
    episode.history.push(format!("seed {seed}: {}", fault.name()));
    let began_at = Instant::now();
    let markers_dropped = episode.lab.markers_dropped();
    let done = inject::inject(fault, episode, random);
    let fault_ms = done.ended_at.saturating_duration_since(began_at).as_millis();
    let lab = episode.lab;
    let is_spoilt = || fault.may_spoil(lab) && lab.markers_dropped() > markers_dropped;
    let (recovery, checked, is_spoilt) = match done.verdict {
        Some((recovery, checked)) => (recovery, Some(checked), is_spoilt()),
        None if is_spoilt() => (Duration::ZERO, None, true),
        // A broker paused for longer than its session drops markers a moment after it resumes.
        None => match episode.recover_unless(done.ended_at, is_spoilt) {
            Some(recovery) => (recovery, None, false),
            None => (Duration::ZERO, None, true),
        },
    };
    if recovery > fault.recovery_max().0 {
        episode.tell_logs();
    }
    if let Some(broker) = done.dead_broker {
        inject::mend(episode, broker);
    }
    let asides = std::mem::take(&mut episode.asides);
    let detail = std::iter::once(done.detail).chain(asides).filter(|part| !part.is_empty());
    let cycle = Cycle {
        seed,
        episode: run.episodes,
        fault,
        brokers: episode.lab.servers.brokers(),
        instances: episode.setup.instances,
        detail: detail.collect::<Vec<_>>().join("; "),
        fault_ms,
        recovery_ms: recovery.as_millis(),
        checked,
        is_spoilt,
        failure: None,
    };
    (cycle, checked.is_some() || is_spoilt)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.is_for_others() {
        return ExitCode::SUCCESS;
    }
    // The message of a failed check names the location; the checker's backtrace adds nothing.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let lab = Lab::open(arguments.brokers);
    let mut skipped = Vec::new();
    if !lab.has_small_disk {
        skipped.push("disk-full: this machine does not allow a small disk to be mounted".to_owned());
    }
    let (seed, end, plan) = match arguments.cycles {
        Some(cycles) => (arguments.seed, arguments.seed + cycles, &[][..]),
        None => (SHARE_SEED, SHARE_SEED + SHARE.len() as u64, &SHARE[..]),
    };
    let report = arguments.report;
    let mut run =
        Progress { next_seed: seed, episodes: 0, fault: Fault::KillAtStep, done: Vec::new(), report };
    while run.next_seed < end {
        let rest = plan.get(run.done.len()..).unwrap_or_default();
        let setup = match rest {
            [] => Setup::of_seed(run.next_seed, arguments.instances, &arguments.faults, &lab),
            _ => Setup::of_seed(seed, arguments.instances.or(Some(2)), &[Fault::DatabaseRestored], &lab),
        };
        let episode_end = if rest.is_empty() { end.min(setup.end_seed()) } else { end };
        run.episodes += 1;
        println!("\nepisode {}: {setup:?}", run.episodes);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            run_episode(&lab, &arguments.faults, setup, rest, episode_end, &mut run);
        }));
        if let Err(panic) = outcome {
            run.record_failure(setup, arguments.brokers, &*panic);
            let kept = lab.keep_logs(run.next_seed);
            eprintln!(
                "the servers' logs are in {}; the servers in {}",
                kept.display(),
                lab.servers.dir().display()
            );
            if let Some(seconds) = arguments.linger {
                std::thread::sleep(Duration::from_secs(seconds));
            }
            if !arguments.keep_going {
                break;
            }
        }
    }
    if report::conclude(&run.done, &skipped) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
