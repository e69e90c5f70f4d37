//! What Kubernetes does to the instances of the chart's StatefulSet, done here without it: members with stable names, of
//! which the next is touched once the one before is ready, under load with transactions. Prints how long payments paused.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::drills::ends_exactly_once;
use crate::support::{Daemon, Flow, Load, Member, PATIENCE, Scope, Servers, block_on, wait_until_within};

const PARTITIONS: usize = 12;
/// Time between two looks at the cursors.
const LOOK: Duration = Duration::from_millis(100);
/// A pause that is longer is a fault, however slow the machine is; other tests do not look at times. A lost node's
/// partitions wait for the session timeout of ten seconds.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// What a partition of the flow rests without a reason: its transactions are as long.
const UNDISTURBED: Duration = Duration::from_secs(20);

/// With the settings' default session timeout of ten seconds.
fn start(scope: &Scope<'_>, ordinal: usize) -> Daemon {
    Member::new(&format!("payment-writer-{ordinal}")).with("BATCH__MAX_PAYMENTS", "100").start(scope)
}

/// Returns when each has the same share of the partitions, and is ready.
#[track_caller]
fn settles(pods: &[Daemon]) {
    for pod in pods {
        pod.wait_until_ready();
        pod.wait_for_partitions("each has its share", |partitions| partitions == PARTITIONS / pods.len());
    }
}

#[derive(Default)]
struct Seen {
    /// Of each partition the offset that is written next, and when it was seen to move.
    positions: BTreeMap<i32, (i64, Instant)>,
    moved: Option<Instant>,
    longest: BTreeMap<i32, Duration>,
    longest_of_all: Duration,
}

impl Seen {
    fn look(&mut self, positions: impl Iterator<Item = (i32, i64)>) {
        let now = Instant::now();
        for (partition, position) in positions {
            let (last, moved) = self.positions.entry(partition).or_insert((position, now));
            if *last != position {
                (*last, *moved) = (position, now);
                self.moved = Some(now);
            }
            let longest = self.longest.entry(partition).or_default();
            *longest = now.duration_since(*moved).max(*longest);
        }
        let rest = self.moved.map_or(Duration::ZERO, |moved| now.duration_since(moved));
        self.longest_of_all = rest.max(self.longest_of_all);
    }
}

/// Watches how far payments are written.
struct Pauses {
    seen: Arc<Mutex<Seen>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pauses {
    fn watch(scope: &Scope<'_>) -> Pauses {
        let client = scope.connect();
        let (seen, is_over) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let (shared, stop) = (Arc::clone(&seen), Arc::clone(&is_over));
        let thread = std::thread::spawn(move || {
            let query = "SELECT partition, applied FROM payment_writer.source_cursor";
            while !stop.load(Ordering::Relaxed) {
                let rows = block_on(client.query(query, &[])).unwrap();
                shared.lock().unwrap().look(rows.iter().map(|row| (row.get(0), row.get(1))));
                std::thread::sleep(LOOK);
            }
        });
        Pauses { seen, is_over, thread: Some(thread) }
    }

    /// Waits until payments of each partition are written again, and prints the longest pauses since the last call.
    #[track_caller]
    fn report(&self, what: &str) {
        let asked = Instant::now();
        wait_until_within(PAUSE_MAX, "payments of each partition are written again", || {
            let seen = self.seen.lock().unwrap();
            seen.positions.values().filter(|(_, moved)| *moved > asked).count() == PARTITIONS
        });
        let mut seen = self.seen.lock().unwrap();
        let (mut longest, all) =
            (std::mem::take(&mut seen.longest), std::mem::take(&mut seen.longest_of_all));
        assert_eq!(longest.len(), PARTITIONS, "{what}: partitions that payments were seen of");
        let mut longest: Vec<Duration> = std::mem::take(&mut longest).into_values().collect();
        longest.sort_unstable();
        println!(
            "{what:<58} {:>8.1} s {:>8.1} s {:>8.1} s",
            all.as_secs_f64(),
            longest[PARTITIONS / 2].as_secs_f64(),
            longest[PARTITIONS - 1].as_secs_f64()
        );
        assert!(longest[PARTITIONS - 1] < PAUSE_MAX, "{what}");
    }
}

impl Drop for Pauses {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[test]
#[ignore = "minutes; `make drill`"]
fn trials_what_kubernetes_does_to_a_statefulset_loses_and_duplicates_nothing() {
    // GIVEN three members, and a flow of records, two thirds of them in transactions
    let scope = Scope::new(Servers::shared(), "statefulset");
    scope.prepare(PARTITIONS as i32, 4);
    let mut pods: Vec<Daemon> = (0..3).map(|ordinal| start(&scope, ordinal)).collect();
    settles(&pods);
    let flow = Flow::start(&scope, Load::new(91), 12);
    wait_until_within(PATIENCE, "each partition is written", || scope.cursors().len() == PARTITIONS);
    let pauses = Pauses::watch(&scope);
    println!(
        "{:<58} {:>10} {:>10} {:>10}",
        "longest time without a payment of", "any", "the median", "the worst"
    );
    std::thread::sleep(UNDISTURBED);
    pauses.report("nothing happens");

    // WHEN they are updated one by one, the last one first
    for ordinal in [2, 1, 0] {
        pods[ordinal].drains();
        pods[ordinal] = start(&scope, ordinal);
        pods[ordinal].wait_until_ready();
    }
    settles(&pods);
    pauses.report("a rolling update of three");

    // AND scaled down, up and down; those that leave at the same time drain at the same time
    for (count, what) in [(2, "three are scaled to two"), (4, "two to four"), (2, "four to two")] {
        let leaving = pods.split_off(count.min(pods.len()));
        leaving.iter().for_each(Daemon::terminate);
        for mut pod in leaving {
            assert_eq!(pod.wait().code(), Some(0), "{}", pod.log());
        }
        pods.extend((pods.len()..count).map(|ordinal| start(&scope, ordinal)).collect::<Vec<_>>());
        settles(&pods);
        pauses.report(what);
    }

    // AND one is evicted: it drains, and starts five seconds later on another node
    pods[0].drains();
    std::thread::sleep(Duration::from_secs(5));
    pods[0] = start(&scope, 0);
    settles(&pods);
    pauses.report("one of two is evicted, and started anew after 5 s");

    // AND a node is lost: nothing comes back for a minute
    pods[1].kill();
    pods[0].wait_for_partitions("the other one has all", |partitions| partitions == PARTITIONS);
    pauses.report("the node of one of two is lost");
    std::thread::sleep(Duration::from_secs(60));
    pods[1] = start(&scope, 1);
    settles(&pods);
    pauses.report("it is back after a minute");

    // THEN every offset has its outcome
    drop(pauses);
    ends_exactly_once(&scope, flow, &mut pods);
}
