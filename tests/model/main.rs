//! A model of the whole system: lanes with an in-memory log and database, where every call may fail, hang,
//! lose its response, or crash its process.
//!
//! The lane is the real one, and so is all pure code below it: batches, cursors, publications, buffer, wire.
//! The two traits at its edges ([`ports`]) are implemented over one [`world`]: the log with its control
//! records and retention, a client that sometimes starts at another position or continues behind an error,
//! the group with generations, revocations and static members, the transaction coordinator with epochs,
//! pending offsets and timeouts, the outputs as a read_committed consumer reads them, and the database with
//! sessions, late COMMITs and backups. The [`driver`] is coordinator, operator and source of faults; the
//! [`oracle`] implements the contract independently of the code.
//!
//! Time is virtual and randomness is seeded: a seed reproduces its history. `MODEL_SEED=42 cargo test --test
//! model whatever -- --nocapture` replays one and prints all its steps; `MODEL_SEEDS=100000` runs more of
//! them, `MODEL_FROM=2000` starts at that seed.
//!
//! Every history ends: by a limit on its steps, on its steps while no virtual time passes, on its virtual time, and
//! on its real time. A history that reaches one of them has failed.
//!
//! `make mutants` applies each mutation in `tests/model/mutants/` to a copy of the sources, and checks that the
//! model notices it.
//!
//! Not detected, because another mechanism still protects: a session that is not compared, or a lost COMMIT
//! reply taken for a failure, fails at the cursor guard; a first cursor stored without its guard fails at the
//! owners of the ids; a lane that gives up what is in flight and keeps its state is reset by the revocation
//! that caused it; a lane that keeps its producer after an unknown outcome while revoking is told to replace it
//! by the port, at its next publication. Claims below the cursor need a row that the database itself rejected;
//! the tests of `batch` cover that.
//!
//! Not modelled: generations of ids and their pruning, rows that the database rejects, months, topics that
//! are created again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod driver;
mod oracle;
mod ports;
mod records;
mod world;

use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use payment_writer::domain::cursor::HaltReason;
use payment_writer::domain::record::NextOffset;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::{Instant, timeout};

use crate::driver::{Driver, Setup, Stats};
use crate::world::{Fault, Plan};

/// Actions of operators, and faults, in a history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Plain,
    Tamper,
    Restore,
    Replace,
    Retention,
    /// Those that lose at most one of the two cursors each.
    Mixed,
}

/// After this many failed histories the rest is not run; `MODEL_BROKEN_MAX` is another number.
const BROKEN_MAX: u64 = 20;

/// Virtual time of a history. It passes at once when everything waits for something that never comes.
const VIRTUAL_TIME_MAX: Duration = Duration::from_secs(24 * 3_600);

/// Real time of a history, which usually takes milliseconds. Ends a loop that makes no step and never yields.
const REAL_TIME_MAX: Duration = Duration::from_secs(600);

fn in_world<F: Future>(work: F) -> F::Output {
    in_world_named("", work)
}

fn in_world_named<F: Future>(name: &str, work: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let its_name = format!("{} {name}", std::thread::current().name().unwrap_or_default());
    let (_ended, end) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        if end.recv_timeout(REAL_TIME_MAX) == Err(mpsc::RecvTimeoutError::Timeout) {
            // Such a thread can only be ended with its process. `eprintln!` would be captured and lost.
            let _ = writeln!(std::io::stderr(), "panicked at {its_name}: no end after {REAL_TIME_MAX:?}");
            std::process::exit(101);
        }
    });
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let ended = timeout(VIRTUAL_TIME_MAX, work).await;
        ended.unwrap_or_else(|_| panic!("{name}: no end after {VIRTUAL_TIME_MAX:?} of virtual time"))
    })
}

fn setup_of(seed: u64) -> (Setup, Kind) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5EED);
    const KINDS: [Kind; 6] =
        [Kind::Plain, Kind::Tamper, Kind::Restore, Kind::Replace, Kind::Retention, Kind::Mixed];
    let kind = KINDS[rng.random_range(0..KINDS.len())];
    let setup = Setup {
        seed,
        partitions: rng.random_range(1..5),
        members: rng.random_range(1..4),
        lanes: rng.random_range(1..3),
        publishes: rng.random_bool(0.9),
        batch_payments_max: [1, 3, 10, 100][rng.random_range(0..4)],
        linger: Duration::from_millis([0, 5, 40][rng.random_range(0..3)]),
        alphabet: rng.random_range(1..8),
        plan: Plan {
            rate: [0, 20, 60, 150][rng.random_range(0..4)],
            crash_of: [4, 12, 40][rng.random_range(0..3)],
            at: None,
            has_delays: true,
        },
    };
    (setup, kind)
}

async fn history(seed: u64, is_traced: bool) -> Stats {
    let (setup, kind) = setup_of(seed);
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xAC75);
    let members = setup.members;
    let mut driver = Driver::new(setup, is_traced);
    driver.note(&format!("{kind:?}"));
    driver.append(rng.random_range(0..10));
    driver.start_all();
    for _ in 0..rng.random_range(4..16) {
        if driver.is_broken() {
            break;
        }
        driver.sleep_some().await;
        let m = rng.random_range(0..members);
        match rng.random_range(0..18) {
            0..6 => driver.append(rng.random_range(1..8)),
            6..8 => driver.rebalance().await,
            8 => driver.make_zombie(m, rng.random_bool(0.5)),
            9 => driver.wake(m).await,
            10 => driver.kill(m),
            11 => driver.drain(m).await,
            12 => driver.soon(|world| {
                let until = Instant::now() + Duration::from_millis(world.rng.random_range(100..8_000));
                world.note(|| "database unavailable".to_owned());
                world.db_down_until = Some(until);
                world.db_epoch += 1;
            }),
            13 => driver.soon(|world| {
                let until = Instant::now() + Duration::from_millis(world.rng.random_range(100..8_000));
                world.note(|| "broker unavailable".to_owned());
                world.broker_down_until = Some(until);
            }),
            14 => driver.soon(|world| world.end_lag = if world.end_lag > 0 { 0 } else { 3 }),
            _ => operate(&mut driver, kind, &mut rng).await,
        }
    }
    driver.finish().await
}

async fn operate(driver: &mut Driver, kind: Kind, rng: &mut ChaCha8Rng) {
    const MIXED: [Kind; 5] = [Kind::Tamper, Kind::Tamper, Kind::Restore, Kind::Restore, Kind::Replace];
    let kind = if kind == Kind::Mixed { MIXED[rng.random_range(0..MIXED.len())] } else { kind };
    let p = rng.random_range(0..driver.partitions());
    match kind {
        Kind::Plain | Kind::Mixed => driver.append(1),
        Kind::Tamper => {
            driver.stop_all(rng.random_bool(0.5)).await;
            driver.pause(Duration::from_millis(rng.random_range(0..20_000))).await;
            driver.tamper(p);
            driver.start_all();
            if rng.random_bool(0.4) {
                driver.settle_later().await;
            }
        }
        Kind::Restore => {
            driver.soon(|world| world.snapshot());
            driver.soon(|world| {
                if !world.snapshots.is_empty() && !world.has_no_proof() {
                    let place = world.rng.random_range(0..world.snapshots.len());
                    let snapshot = world.snapshots[place].clone();
                    world.restore(snapshot);
                }
            });
        }
        Kind::Replace => driver.replace_database().await,
        Kind::Retention => driver.retain(p, rng.random_bool(0.2)),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn whatever_happens_each_record_has_one_outcome_once() {
    let seeds = match number("MODEL_SEED") {
        Some(seed) => seed..seed + 1,
        None => number("MODEL_FROM").unwrap_or(0)..number("MODEL_SEEDS").unwrap_or(2_000),
    };
    let is_replay = number("MODEL_SEED").is_some();
    let broken_max = number("MODEL_BROKEN_MAX").unwrap_or(BROKEN_MAX);
    let mut totals = Stats::default();
    let mut broken = Vec::new();
    for seed in seeds {
        let stats = in_world_named(&format!("seed {seed}"), history(seed, is_replay));
        if is_replay {
            println!("{}", stats.trace.join("\n"));
        }
        totals.points += stats.points;
        totals.faults += stats.faults;
        totals.taken_ahead += stats.taken_ahead;
        totals.passed_over += stats.passed_over;
        totals.redelivered += stats.redelivered;
        totals.outputs += stats.outputs;
        totals.rows += stats.rows;
        totals.halts += stats.halts;
        totals.settled += stats.settled;
        if let Some(breach) = stats.breach {
            broken.push((seed, breach));
            // A history that does not come to rest takes far longer than others, and more of them show no more.
            if broken.len() as u64 == broken_max {
                break;
            }
        }
    }
    println!("{totals:?}");
    if let Some((seed, breach)) = broken.first() {
        let traced = in_world(history(*seed, true));
        for (seed, breach) in &broken {
            println!("seed {seed}: {breach}");
        }
        println!("{}", traced.trace.join("\n"));
        panic!("{} histories failed; the first is MODEL_SEED={seed}: {breach}", broken.len());
    }
    assert!(is_replay || totals.taken_ahead > 0, "no lane built its next batch while one was being written");
    assert!(is_replay || totals.passed_over > 0, "no client ever started at a wrong position");
    assert!(is_replay || totals.redelivered > 0, "no client ever delivered records again");
}

/// A small history without randomness; `at` chooses the call and its fault.
async fn small_history(at: Option<(u64, Option<Fault>)>, is_traced: bool) -> Stats {
    let plan = Plan { rate: 0, crash_of: 1, at, has_delays: false };
    let setup = Setup {
        seed: 7,
        partitions: 2,
        members: 2,
        lanes: 1,
        publishes: true,
        batch_payments_max: 3,
        linger: Duration::from_millis(5),
        alphabet: 3,
        plan,
    };
    let mut driver = Driver::new(setup, is_traced);
    driver.append(6);
    driver.start_all();
    driver.pause(Duration::from_millis(700)).await;
    driver.append(6);
    driver.pause(Duration::from_millis(3)).await;
    driver.rebalance().await;
    driver.append(6);
    driver.pause(Duration::from_secs(3)).await;
    driver.finish().await
}

/// Two processes with a lane each, without random faults.
fn quiet_setup(linger_ms: u64) -> Setup {
    Setup {
        seed: 1,
        partitions: 2,
        members: 2,
        lanes: 1,
        publishes: true,
        batch_payments_max: 10,
        linger: Duration::from_millis(linger_ms),
        alphabet: 3,
        plan: Plan::default(),
    }
}

async fn at_rest(mut driver: Driver) -> Driver {
    driver.start_all();
    driver.rest().await;
    driver
}

async fn one_process_has_all() -> Driver {
    let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
    driver.hand_over(0, 1).await;
    driver.hand_over(1, 0).await;
    driver.rest().await;
    driver
}

/// Appends a record, and waits until the first transaction of its batch is aborted.
async fn abort_a_transaction(driver: &mut Driver) {
    driver.world().ordered.push((0, "publish", Fault::After));
    driver.append_to(0, 1, 0, 0);
    while !driver.world().ordered.is_empty() {
        driver.pause(Duration::from_millis(1)).await;
    }
}

fn expect_kept(stats: &Stats) {
    if let Some(breach) = &stats.breach {
        panic!("{}\n{breach}", stats.trace.join("\n"));
    }
}

#[test]
fn a_lane_that_gave_up_all_its_fetched_records_does_not_spin() {
    let stats = in_world(async {
        // GIVEN records that wait for a batch to fill
        let mut driver = at_rest(Driver::new(quiet_setup(500), true)).await;
        driver.append_to(0, 1, 0, 0);
        driver.append_to(1, 2, 0, 0);
        driver.pause(Duration::from_millis(100)).await;
        // WHEN their partitions are moved to another process, and no more records arrive
        driver.hand_over(0, 1).await;
        // THEN the first process waits for events without spinning
        driver.pause(Duration::from_secs(20)).await;
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!(stats.rows, 2);
}

#[test]
fn a_quiet_lane_writes_again_what_a_restored_database_lost() {
    let stats = in_world(async {
        // GIVEN payments written and published, and a backup from before
        let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
        driver.world().snapshot();
        driver.append_to(0, 1, 0, 0);
        driver.append_to(1, 2, 0, 0);
        driver.rest().await;
        // WHEN the backup is restored, and no record arrives
        let backup = driver.world().snapshots[0].clone();
        driver.world().restore(backup);
        // THEN the rows are written again, without events
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!(stats.rows, 2);
    assert_eq!(stats.outputs, 4, "two read events and two e-mails");
}

#[test]
fn a_database_that_answers_reads_and_refuses_writes_is_tried_ever_less_often() {
    let mut refused = None;
    let stats = in_world(async {
        // GIVEN a database that refuses all payments
        let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
        driver.world().refused_writes = Some(0);
        // WHEN one record arrives, and the lane takes its batch again to write it with others
        driver.append_to(0, 1, 0, 0);
        driver.pause(Duration::from_secs(60)).await;
        refused = driver.world().refused_writes.take();
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!(stats.rows, 1);
    // THEN the pause between two tries grows to ten seconds, although reads succeed in between
    let refused = refused.unwrap();
    assert!((8..25).contains(&refused), "{refused} tries in a minute");
}

#[test]
fn published_offsets_stored_on_assignment_outlive_the_group() {
    for is_tail_removed in [false, true] {
        let stats = in_world(async {
            // GIVEN payments written and published, and an earlier backup, restored while no process ran
            let mut driver = at_rest(Driver::new(quiet_setup(500), true)).await;
            driver.world().is_tail_removed = is_tail_removed;
            driver.world().snapshot();
            driver.append_to(0, 1, 0, 0);
            driver.append_to(1, 2, 0, 0);
            driver.rest().await;
            driver.stop_all(true).await;
            let backup = driver.world().snapshots[0].clone();
            driver.world().restore(backup);
            // WHEN the lanes recover the partitions and crash before their first batch, and the group is deleted
            driver.start_all();
            driver.pause(Duration::from_millis(100)).await;
            driver.stop_all(false).await;
            driver.delete_offsets();
            driver.start_all();
            // THEN rows are written again, events are not sent again, also where the outputs prove nothing
            driver.finish().await
        });
        expect_kept(&stats);
        assert_eq!((stats.rows, stats.outputs, stats.settled), (2, 4, 0));
    }
}

#[test]
fn group_offsets_deleted_after_a_drain_are_recovered_from_the_database() {
    let stats = in_world(async {
        // GIVEN a drain right after the last batch
        let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
        driver.append_to(0, 1, 0, 0);
        driver.append_to(1, 2, 0, 0);
        driver.pause(Duration::from_millis(200)).await;
        driver.stop_all(true).await;
        // THEN both cursors already agree
        for row in driver.world().db.cursors.values() {
            assert_eq!((row.applied, row.published), (NextOffset(1), Some(NextOffset(1))));
        }
        // WHEN the group's offsets are deleted, THEN nothing is sent again, and nothing halts
        driver.delete_offsets();
        driver.start_all();
        driver.append_to(0, 3, 0, 0);
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!((stats.rows, stats.outputs, stats.settled), (3, 6, 0));
}

#[test]
fn a_log_that_lost_its_end_halts_the_partition_and_not_the_others() {
    in_world(async {
        // GIVEN records written and published
        let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
        for id in 1..4 {
            driver.append_to(0, id, 0, 0);
        }
        driver.rest().await;
        for is_restarted in [false, true] {
            // WHEN the log loses them, and continues from there, but with fewer records
            driver.truncate(0, 1);
            if is_restarted {
                driver.stop_all(true).await;
                driver.start_all();
            }
            driver.append_to(0, 10, 0, 0);
            driver.append_to(1, 20, 0, 0);
            // THEN the lane waits for a while, and then the partition halts
            driver.pause(Duration::from_secs(20)).await;
            assert_eq!(driver.halted(), []);
            driver.pause(Duration::from_secs(30)).await;
            let doubt = HaltReason::BeyondEnd { position: NextOffset(3), end: NextOffset(2) };
            assert_eq!(driver.halted(), [(0, doubt)]);
            assert!(driver.world().emitted.contains(&("read", "00000000/1/0".to_owned())));
        }
    });
}

#[test]
fn a_group_offset_rolled_back_with_its_metadata_sends_nothing_twice() {
    for is_tail_removed in [false, true] {
        let stats = in_world(async {
            // GIVEN two batches published, the second of which is not yet copied to the database
            let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
            driver.world().is_tail_removed = is_tail_removed;
            driver.append_to(0, 1, 0, 0);
            driver.rest().await;
            driver.append_to(0, 2, 0, 0);
            driver.pause(Duration::from_millis(200)).await;
            driver.stop_all(false).await;
            assert_eq!(driver.world().db.cursors[&0].published, Some(NextOffset(1)));
            // WHEN an old state of the group takes effect again
            driver.roll_back(0, 0);
            driver.start_all();
            // THEN the output scan finds what was sent, or the partition halts until an operator resolves it
            driver.finish().await
        });
        expect_kept(&stats);
        assert_eq!((stats.rows, stats.outputs, stats.settled), (2, 4, usize::from(is_tail_removed)));
    }
}

#[test]
fn a_decision_restored_after_it_was_taken_up_sends_nothing_twice() {
    let stats = in_world(async {
        // GIVEN a partition that is halted for lack of proof of what was sent
        let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
        driver.world().is_tail_removed = true;
        for id in [1, 2] {
            driver.append_to(0, id, 0, 0);
            driver.rest().await;
        }
        driver.stop_all(true).await;
        driver.world().db.cursors.get_mut(&0).unwrap().published = Some(NextOffset(1));
        driver.roll_back(0, 0);
        driver.start_all();
        driver.pause(Duration::from_secs(20)).await;
        // WHEN an operator decides, a lane takes it up and sends more, and the database is restored to the moment of
        // the decision
        let halted = driver.halted();
        assert!(driver.settle(&halted), "{halted:?}");
        driver.rest().await;
        driver.append_to(0, 3, 0, 0);
        driver.rest().await;
        {
            let mut world = driver.world();
            world.is_tail_removed = false;
            let backup = world.snapshots.pop().unwrap();
            assert!(backup.cursors[&0].settled.is_some());
            world.restore(backup);
        }
        // THEN the decision no longer holds
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!((stats.rows, stats.outputs, stats.settled), (3, 6, 1));
}

#[test]
fn a_group_offset_rolled_back_beside_an_empty_database_sends_nothing_twice() {
    let stats = in_world(async {
        // GIVEN two batches published
        let mut driver = at_rest(Driver::new(quiet_setup(5), true)).await;
        driver.append_to(0, 1, 0, 0);
        driver.rest().await;
        driver.append_to(0, 2, 0, 0);
        driver.rest().await;
        driver.stop_all(true).await;
        // WHEN an old state of the group takes effect again, and the database is lost
        driver.roll_back(0, 1);
        driver.replace_database().await;
        // THEN the output scan finds what was sent
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!((stats.rows, stats.outputs, stats.settled), (2, 4, 0));
}

#[test]
fn a_lane_that_learns_too_late_that_it_lost_a_partition_publishes_nothing_of_it() {
    let stats = in_world(async {
        // GIVEN one process with a written batch whose transaction was aborted
        let mut driver = one_process_has_all().await;
        abort_a_transaction(&mut driver).await;
        // WHEN it hangs in the recovery of another partition for longer than the group waits for it, while
        // the batch's partition goes to another process
        driver.world().ordered.push((0, "cursors", Fault::Hang));
        driver.give(0, &[1]);
        driver.pause(Duration::from_millis(300)).await;
        assert!(driver.world().ordered.is_empty(), "it hangs");
        driver.hand(0, 1, &[0]).await;
        driver.append_to(0, 2, 0, 0);
        driver.pause(Duration::from_secs(5)).await;
        assert_eq!(driver.world().truly_published[0], 2, "the other one has published the batch");
        // THEN it publishes nothing with the generation that it has received meanwhile
        driver.pause(Duration::from_secs(60)).await;
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!((stats.rows, stats.outputs), (2, 4));
}

#[test]
fn a_transaction_that_stalls_until_its_partition_has_moved_publishes_nothing() {
    let stats = in_world(async {
        // GIVEN a transaction that stalls before its offsets arrive
        let mut driver = one_process_has_all().await;
        driver.world().delays.push((0, "send_offsets", Duration::from_secs(12)));
        driver.append_to(0, 1, 0, 0);
        while !driver.world().delays.is_empty() {
            driver.pause(Duration::from_millis(1)).await;
        }
        // WHEN its partition goes to another process, which publishes the batch, and init_transactions, which
        // would end the transaction, hangs
        driver.world().ordered.push((0, "renew", Fault::Hang));
        driver.hand(0, 1, &[0]).await;
        driver.pause(Duration::from_secs(1)).await;
        assert!(driver.world().ordered.is_empty(), "it hangs");
        assert_eq!(driver.world().truly_published[0], 1, "the other one has published the batch");
        // THEN its offsets are refused when they arrive
        driver.pause(Duration::from_secs(20)).await;
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!((stats.rows, stats.outputs), (1, 2));
}

#[test]
fn a_transaction_that_outlasts_a_revocation_is_ended_before_the_other_partitions_go_on() {
    let stats = in_world(async {
        // GIVEN one process with a written batch whose transaction was aborted
        let mut driver = one_process_has_all().await;
        abort_a_transaction(&mut driver).await;
        // WHEN another partition is revoked, the batch is published meanwhile, and its transaction stalls for
        // longer than the lane waits, but arrives before the next generation and the lane's next transaction
        driver.world().delays.push((0, "send_offsets", Duration::from_secs(9)));
        driver.world().delays.push((0, "write", Duration::from_secs(3)));
        driver.joining = Duration::from_secs(4);
        driver.hand(0, 1, &[1]).await;
        assert_eq!(driver.world().delays, [], "both are late");
        // THEN the events are sent once
        driver.finish().await
    });
    expect_kept(&stats);
    assert_eq!((stats.rows, stats.outputs), (1, 2));
}

fn at_every_call(fault: Fault) {
    for k in 1.. {
        let at = Some((k, Some(fault)));
        let stats = in_world_named(&format!("{fault:?} at call {k}"), small_history(at, false));
        if let Some(breach) = stats.breach {
            println!("{}", in_world(small_history(at, true)).trace.join("\n"));
            panic!("{fault:?} at call {k}: {breach}");
        }
        if stats.faults == 0 {
            assert!(k > 60, "the history is too short: {k} calls");
            println!("{fault:?} at each of {} calls", k - 1);
            return;
        }
    }
}

#[test]
fn a_crash_at_any_call_loses_and_duplicates_nothing() {
    at_every_call(Fault::Crash);
}

#[test]
fn a_failure_at_any_call_loses_and_duplicates_nothing() {
    at_every_call(Fault::Before);
}

#[test]
fn a_lost_answer_at_any_call_loses_and_duplicates_nothing() {
    at_every_call(Fault::After);
}

#[test]
fn a_hang_at_any_call_loses_and_duplicates_nothing() {
    at_every_call(Fault::Hang);
}
