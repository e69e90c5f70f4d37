//! Drives one history: the group coordinator, operators and faults around a few processes.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use payment_writer::domain::cursor::{
    CommitMetadata, CursorRow, GroupOffset, HaltReason, Identity, Mode, Settlement,
};
use payment_writer::domain::record::{NextOffset, Partition};
use payment_writer::domain::wire::Rules;
use payment_writer::lane::{Lane, LaneSettings};
use payment_writer::ports::{LaneEvent, RevokeDone};
use payment_writer::telemetry::status::{Phase, StatusRegistry};
use rand::RngExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{Instant, sleep, sleep_until};

use crate::oracle;
use crate::ports::{ModelLedger, ModelLog};
use crate::records::{Generator, PAYMENT_BYTES_MAX};
use crate::world::{Database, Handle, Item, LaneHandle, Plan, STEPS_AT_ONCE_MAX, Shared, Who, World};

/// Time that the group waits for a lane to give up revoked partitions.
const REVOKE_WAIT: Duration = Duration::from_secs(10);
/// Session timeout: a process that is gone keeps its partitions for this long.
const SESSION_TIMEOUT: Duration = Duration::from_secs(10);
/// After faults have stopped, the world must come to rest within this time.
const REST_WITHIN: Duration = Duration::from_secs(240);

/// Parameters of a history.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub partitions: usize,
    pub members: usize,
    pub lanes: usize,
    pub publishes: bool,
    pub batch_payments_max: usize,
    pub linger: Duration,
    pub alphabet: u128,
    pub plan: Plan,
}

/// State of the world at its end.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub points: u64,
    pub faults: u64,
    pub taken_ahead: u64,
    pub passed_over: u64,
    pub redelivered: u64,
    pub outputs: usize,
    pub rows: usize,
    pub halts: usize,
    pub settled: usize,
    pub breach: Option<String>,
    pub trace: Vec<String>,
}

struct Process {
    lanes: Vec<JoinHandle<()>>,
    down_since: Option<Instant>,
    restart_at: Option<Instant>,
}

pub struct Driver {
    pub shared: Shared,
    setup: Setup,
    generator: Generator,
    processes: Vec<Process>,
    owners: Vec<Option<usize>>,
    adopts_database: bool,
    /// Time between the end of a revocation and the next generation, in histories without random delays.
    pub joining: Duration,
    pub stats: Stats,
}

const WAITING: u8 = 0;
const DONE: u8 = 1;
const OVERTAKEN: u8 = 2;

struct Ticket {
    state: Arc<AtomicU8>,
    unhandled_revocations: Arc<AtomicI64>,
    finished: oneshot::Receiver<()>,
}

impl Driver {
    pub fn new(setup: Setup, is_traced: bool) -> Self {
        let mut world = World::new(setup.seed, setup.partitions, setup.members, setup.publishes, setup.plan);
        world.trace = is_traced.then(Vec::new);
        world.note(|| format!("{setup:?}"));
        let processes = (0..setup.members)
            .map(|_| Process { lanes: Vec::new(), down_since: None, restart_at: None })
            .collect();
        Self {
            shared: Handle::new(world),
            generator: Generator::new(setup.alphabet),
            processes,
            owners: vec![None; setup.partitions],
            adopts_database: false,
            joining: Duration::ZERO,
            stats: Stats::default(),
            setup,
        }
    }

    pub fn world(&self) -> std::cell::RefMut<'_, World> {
        self.shared.world.borrow_mut()
    }

    fn random(&self, below: usize) -> usize {
        self.world().rng.random_range(0..below)
    }

    pub fn note(&self, text: &str) {
        self.world().note(|| text.to_owned());
    }

    pub fn partitions(&self) -> usize {
        self.setup.partitions
    }

    pub fn is_broken(&self) -> bool {
        self.world().failure.is_some()
    }

    // ---- the log -----------------------------------------------------------------------------

    /// Records of producers with and without transactions: some are followed by control records or aborted
    /// ones.
    pub fn append(&mut self, count: usize) {
        for _ in 0..count {
            let p = self.random(self.setup.partitions);
            let mut world = self.shared.world.borrow_mut();
            if world.rng.random_ratio(1, 6) {
                let aborted = world.rng.random_range(1..6);
                world.logs[p].items.extend((0..aborted).map(|_| Item::Hidden));
            }
            let record = self.generator.draw(&mut world.rng);
            let offset = world.logs[p].end();
            world.note(|| format!("  append {p}/{offset} {:?}", record.expect));
            world.logs[p].items.push(Item::Record(Box::new(record)));
            if world.rng.random_bool(0.5) {
                world.logs[p].items.push(Item::Hidden);
            }
        }
        self.shared.changed.notify_waiters();
    }

    /// A record with this id, payload and flaw.
    pub fn append_to(&mut self, partition: usize, id: u128, variant: u32, flaw: u32) {
        let mut world = self.shared.world.borrow_mut();
        let record = self.generator.record(&mut world.rng, id, variant, flaw);
        world.logs[partition].items.push(Item::Record(Box::new(record)));
        drop(world);
        self.shared.changed.notify_waiters();
    }

    // ---- processes ---------------------------------------------------------------------------

    fn is_up(&self, m: usize) -> bool {
        self.world().members[m].is_up
    }

    fn known_up(&self) -> Vec<usize> {
        let world = self.world();
        (0..self.setup.members).filter(|m| world.members[*m].is_up && world.members[*m].is_known).collect()
    }

    /// Starts a new generation, which the current members learn of.
    fn new_generation(&self) {
        let mut world = self.world();
        world.generation += 1;
        let generation = world.generation;
        for member in world.members.iter_mut().filter(|m| m.is_up && m.is_known) {
            member.generation = generation;
        }
    }

    pub fn start(&mut self, m: usize) {
        let settings = {
            let mut world = self.world();
            world.members[m].incarnation += 1;
            let incarnation = world.members[m].incarnation;
            world.note(|| format!("process {m} starts, number {incarnation}"));
            world.members[m].is_up = true;
            world.members[m].is_known = true;
            world.members[m].is_frozen = false;
            world.members[m].held.clear();
            world.members[m].threads.clear();
            world.members[m].status = Arc::new(StatusRegistry::default());
            LaneSettings {
                index: 0,
                rules: Arc::new(Rules { payment_bytes_max: PAYMENT_BYTES_MAX, ..Rules::default() }),
                input_topic: "payment_writer_topic".to_owned(),
                identity: Identity { topic_id: world.topic_id, database_id: world.db.id },
                mode: Mode { publishes: self.setup.publishes, adopts_database: self.adopts_database },
                batch_payments_max: self.setup.batch_payments_max,
                batch_bytes_max: 1_000_000,
                linger: self.setup.linger,
                publication_max: Duration::from_secs(12),
                tracer: None,
            }
        };
        self.new_generation();
        let (mut lanes, mut handles) = (Vec::new(), Vec::new());
        let (incarnation, status) = {
            let world = self.world();
            (world.members[m].incarnation, Arc::clone(&world.members[m].status))
        };
        for lane in 0..self.setup.lanes {
            let (events, receiver) = mpsc::channel(1_000);
            let unhandled_revocations = Arc::new(AtomicI64::new(0));
            handles.push(LaneHandle { events, unhandled_revocations: Arc::clone(&unhandled_revocations) });
            let who = Who { member: m, incarnation, lane };
            let settings = LaneSettings { index: lane, ..settings.clone() };
            let identity = settings.identity.clone();
            let log = ModelLog::new(Rc::clone(&self.shared), who, identity.clone(), unhandled_revocations);
            let store = ModelLedger::new(Rc::clone(&self.shared), who, identity.clone());
            let jitter = self.setup.seed ^ (m as u64) << 8 ^ (lane as u64) << 16 ^ incarnation << 24;
            let lane = Lane::new(settings, log, store, receiver, Arc::clone(&status)).with_jitter(jitter);
            let shared = Rc::clone(&self.shared);
            lanes.push(spawn_local(async move {
                let mut running = pin!(AssertUnwindSafe(lane.run()).catch_unwind());
                let ended = poll_fn(|context| {
                    let may_run = shared.world.borrow_mut().step(|| format!("a poll of {who:?}"));
                    if may_run { running.as_mut().poll(context) } else { Poll::Pending }
                })
                .await;
                let mut world = shared.world.borrow_mut();
                match ended {
                    Ok(Ok(())) => world.note(|| format!("{who:?} drained")),
                    // A process from before the database was replaced is right to stop.
                    Ok(Err(_)) if identity.database_id != world.db.id => {
                        world.note(|| format!("{who:?} stops: another database"));
                        world.crashes.push((m, incarnation));
                        drop(world);
                        shared.changed.notify_waiters();
                    }
                    Ok(Err(doubt)) => world.fail(format!("{who:?} stops: {doubt}")),
                    Err(_) => world.fail(format!("{who:?} panicked")),
                }
            }));
        }
        self.world().members[m].lanes = handles;
        self.processes[m] = Process { lanes, down_since: None, restart_at: None };
        let known = self.known_up();
        for p in 0..self.setup.partitions {
            if self.owners[p].is_none() {
                self.owners[p] = Some(known[self.random(known.len())]);
                if self.owners[p] != Some(m) {
                    self.assign(self.owners[p].unwrap(), &[p as i32]);
                }
            }
        }
        let mine: Vec<i32> =
            (0..self.setup.partitions).filter(|p| self.owners[*p] == Some(m)).map(|p| p as i32).collect();
        self.assign(m, &mine);
    }

    /// Crashes processes.
    pub fn kill(&mut self, m: usize) {
        if !self.is_up(m) {
            return;
        }
        {
            let mut world = self.world();
            world.note(|| format!("process {m} dies"));
            let member = &mut world.members[m];
            member.is_up = false;
            member.is_frozen = false;
            for thread in member.threads.drain(..) {
                thread.abort();
            }
            member.lanes.clear();
            member.held.clear();
        }
        for lane in self.processes[m].lanes.drain(..) {
            lane.abort();
        }
        let restart_ms = {
            let mut world = self.world();
            let longest = if world.rng.random_bool(0.6) { 3_000 } else { 25_000 };
            world.rng.random_range(50..longest)
        };
        self.processes[m].down_since = Some(Instant::now());
        self.processes[m].restart_at = Some(Instant::now() + Duration::from_millis(restart_ms));
        self.shared.changed.notify_waiters();
    }

    /// Shuts processes down.
    pub async fn drain(&mut self, m: usize) {
        if !self.is_up(m) {
            return;
        }
        self.note(&format!("process {m} starts to drain"));
        let lanes = self.world().members[m].lanes.clone();
        for lane in &lanes {
            let _ = lane.events.try_send(LaneEvent::Drain);
        }
        drop(lanes);
        let deadline = Instant::now() + Duration::from_secs(40);
        while !self.processes[m].lanes.iter().all(JoinHandle::is_finished) {
            if Instant::now() > deadline || !self.is_up(m) || self.is_broken() {
                break;
            }
            self.pause(Duration::from_millis(20)).await;
        }
        self.kill(m);
    }

    fn handle_crashes(&mut self) {
        let crashes = std::mem::take(&mut self.world().crashes);
        for (m, incarnation) in crashes {
            if self.world().members[m].incarnation == incarnation {
                self.kill(m);
            }
        }
    }

    /// Restarts the processes that are due, and takes partitions from those that are gone for too long.
    fn tick(&mut self) {
        self.handle_crashes();
        let now = Instant::now();
        for m in 0..self.setup.members {
            if self.is_up(m) {
                continue;
            }
            if self.processes[m].restart_at.is_some_and(|at| at <= now) {
                self.start(m);
            } else if self.processes[m].down_since.is_some_and(|at| now - at > SESSION_TIMEOUT)
                && self.world().members[m].is_known
            {
                self.note(&format!("the group removes process {m}"));
                self.world().members[m].is_known = false;
                self.new_generation();
                self.deal_out(m);
            }
        }
    }

    /// Assigns the partitions of a removed member to others.
    fn deal_out(&mut self, from: usize) {
        let known = self.known_up();
        for p in 0..self.setup.partitions {
            if self.owners[p] == Some(from) {
                self.owners[p] = (!known.is_empty()).then(|| known[self.random(known.len())]);
                if let Some(to) = self.owners[p] {
                    self.assign(to, &[p as i32]);
                }
            }
        }
    }

    /// Advances virtual time, and maintains processes meanwhile.
    pub async fn pause(&mut self, duration: Duration) {
        let until = Instant::now() + duration;
        loop {
            {
                let mut world = self.world();
                world.step(|| format!("a pause of {duration:?}"));
                // After a failure a pause takes no time, so a test that waits for something would never end.
                let is_endless = world.failure.is_some() && world.steps_at_once > 2 * STEPS_AT_ONCE_MAX;
                assert!(!is_endless, "the test goes on after a failure: {:?}", world.failure);
            }
            self.tick();
            if Instant::now() >= until || self.is_broken() {
                return;
            }
            let due = self.processes.iter().flat_map(|p| {
                [p.restart_at, p.down_since.map(|at| at + SESSION_TIMEOUT + Duration::from_millis(1))]
            });
            let now = Instant::now();
            let wake = due.flatten().filter(|at| *at > now).fold(until, Instant::min);
            let shared = Rc::clone(&self.shared);
            let changed = shared.changed.notified();
            if !self.world().crashes.is_empty() {
                continue;
            }
            tokio::select! {
                biased;
                () = changed => {}
                () = sleep_until(wake) => {}
            }
        }
    }

    // ---- the group ---------------------------------------------------------------------------

    fn lane_of(&self, partition: i32) -> usize {
        partition as usize % self.setup.lanes
    }

    /// Assigns unowned partitions to a process.
    pub fn give(&mut self, m: usize, partitions: &[i32]) {
        for p in partitions {
            self.owners[*p as usize] = Some(m);
        }
        self.new_generation();
        self.assign(m, partitions);
    }

    fn assign(&mut self, m: usize, partitions: &[i32]) {
        if partitions.is_empty() {
            return;
        }
        self.note(&format!("process {m} is assigned {partitions:?}"));
        let lanes = {
            let mut world = self.world();
            world.members[m].held.extend(partitions);
            world.members[m].lanes.clone()
        };
        for (index, lane) in lanes.iter().enumerate() {
            let share: Vec<_> =
                partitions.iter().filter(|p| self.lane_of(**p) == index).map(|p| Partition(*p)).collect();
            if !share.is_empty() {
                let _ = lane.events.try_send(LaneEvent::Assigned(share));
            }
        }
    }

    async fn revoke(&mut self, m: usize, partitions: &[i32], is_lost: bool) {
        self.note(&format!("process {m} has to give up {partitions:?}, lost: {is_lost}"));
        let lanes = self.world().members[m].lanes.clone();
        let mut tickets = Vec::new();
        for (index, lane) in lanes.iter().enumerate() {
            let share: Vec<_> =
                partitions.iter().filter(|p| self.lane_of(**p) == index).map(|p| Partition(*p)).collect();
            if share.is_empty() {
                continue;
            }
            let state = Arc::new(AtomicU8::new(WAITING));
            let (finish, finished) = oneshot::channel();
            let (its_state, unhandled_revocations) =
                (Arc::clone(&state), Arc::clone(&lane.unhandled_revocations));
            let done = RevokeDone::new(move || {
                if its_state.compare_exchange(WAITING, DONE, Ordering::AcqRel, Ordering::Acquire).is_err() {
                    unhandled_revocations.fetch_sub(1, Ordering::AcqRel);
                }
                let _ = finish.send(());
            });
            if lane.events.try_send(LaneEvent::Revoked { partitions: share, is_lost, done }).is_ok() {
                tickets.push(Ticket {
                    state,
                    unhandled_revocations: Arc::clone(&lane.unhandled_revocations),
                    finished,
                });
            }
        }
        drop(lanes);
        let deadline = Instant::now() + REVOKE_WAIT;
        while Instant::now() < deadline && !self.is_broken() {
            tickets.retain_mut(|t| t.finished.try_recv() == Err(oneshot::error::TryRecvError::Empty));
            if tickets.is_empty() {
                break;
            }
            self.pause(Duration::from_millis(10)).await;
        }
        for ticket in tickets {
            ticket.unhandled_revocations.fetch_add(1, Ordering::AcqRel);
            let was = ticket.state.compare_exchange(WAITING, OVERTAKEN, Ordering::AcqRel, Ordering::Acquire);
            if was.is_err() {
                ticket.unhandled_revocations.fetch_sub(1, Ordering::AcqRel);
            } else {
                self.note(&format!("the group no longer waits for process {m}"));
            }
        }
        for p in partitions {
            self.world().members[m].held.remove(p);
        }
    }

    /// A cooperative rebalance that moves some partitions.
    pub async fn rebalance(&mut self) {
        let known = self.known_up();
        if known.len() < 2 {
            return;
        }
        let from = known[self.random(known.len())];
        let to = known[self.random(known.len())];
        let mut moved = Vec::new();
        for p in 0..self.setup.partitions {
            if self.owners[p] == Some(from) && self.world().rng.random_bool(0.7) {
                moved.push(p as i32);
            }
        }
        self.hand(from, to, &moved).await;
    }

    /// Moves all partitions of one process to another.
    pub async fn hand_over(&mut self, from: usize, to: usize) {
        let moved: Vec<i32> =
            (0..self.setup.partitions).filter(|p| self.owners[*p] == Some(from)).map(|p| p as i32).collect();
        self.hand(from, to, &moved).await;
    }

    /// The next generation begins when all members have joined. Until then the current one is valid.
    async fn await_members(&mut self) {
        let joining = {
            let mut world = self.world();
            let is_long = world.plan.has_delays && world.rng.random_ratio(1, 4);
            is_long.then(|| Duration::from_millis(world.rng.random_range(0..5_000)))
        };
        self.pause(joining.unwrap_or(self.joining)).await;
    }

    pub async fn hand(&mut self, from: usize, to: usize, moved: &[i32]) {
        if moved.is_empty() {
            return;
        }
        let incarnation = self.world().members[from].incarnation;
        self.new_generation();
        self.revoke(from, moved, false).await;
        self.await_members().await;
        if self.world().members[from].incarnation != incarnation || !self.is_up(from) {
            // It crashed meanwhile: its partitions are reassigned when the group notices.
            return;
        }
        self.new_generation();
        // `to` may be gone as well; then `from` can take them.
        let to = if self.known_up().contains(&to) { to } else { from };
        for p in moved {
            self.owners[*p as usize] = Some(to);
        }
        self.assign(to, moved);
    }

    /// The group removes a member that is still running.
    pub fn make_zombie(&mut self, m: usize, is_frozen: bool) {
        if !self.known_up().contains(&m) {
            return;
        }
        self.note(&format!("process {m} becomes a zombie, frozen: {is_frozen}"));
        {
            let mut world = self.world();
            world.members[m].is_known = false;
            world.members[m].is_frozen = is_frozen;
        }
        self.new_generation();
        self.deal_out(m);
    }

    /// A removed member learns of it and joins again.
    pub async fn wake(&mut self, m: usize) {
        {
            let mut world = self.world();
            world.members[m].is_frozen = false;
            if !world.members[m].is_up || world.members[m].is_known {
                drop(world);
                self.shared.changed.notify_waiters();
                return;
            }
            world.members[m].generation = -1;
        }
        self.shared.changed.notify_waiters();
        let incarnation = self.world().members[m].incarnation;
        let held: Vec<i32> = self.world().members[m].held.iter().copied().collect();
        self.revoke(m, &held, true).await;
        if self.world().members[m].incarnation != incarnation || !self.is_up(m) {
            return;
        }
        self.world().members[m].is_known = true;
        self.new_generation();
        let orphans: Vec<i32> =
            (0..self.setup.partitions).filter(|p| self.owners[*p].is_none()).map(|p| p as i32).collect();
        for p in &orphans {
            self.owners[*p as usize] = Some(m);
        }
        self.assign(m, &orphans);
    }

    // ---- operators and accidents -------------------------------------------------------------

    pub async fn stop_all(&mut self, is_graceful: bool) {
        for m in 0..self.setup.members {
            if is_graceful {
                self.drain(m).await;
            } else {
                self.kill(m);
            }
        }
        for process in &mut self.processes {
            process.restart_at = None;
        }
        for owner in &mut self.owners {
            *owner = None;
        }
        for member in &mut self.world().members {
            member.is_known = false;
        }
    }

    pub fn start_all(&mut self) {
        for m in 0..self.setup.members {
            if !self.is_up(m) {
                self.start(m);
            }
        }
    }

    /// Changes a group offset while the group has no members.
    pub fn tamper(&mut self, p: usize) {
        let mut world = self.shared.world.borrow_mut();
        if world.untaken.contains(&(p as i32)) && world.is_tail_removed {
            // This would remove the last proof of what was sent, and that case has no guarantee.
            return;
        }
        let (start, end) = (world.logs[p].start, world.logs[p].end());
        let Some(found) = world.offsets[p].clone() else { return };
        let k = found.position.0;
        let position = match world.rng.random_range(0..4) {
            0 => None,
            1 if k < end => Some(world.rng.random_range(k + 1..=end)),
            _ if k > start => Some(world.rng.random_range(start..k)),
            _ => None,
        };
        let keeps_text = world.rng.random_bool(0.3);
        let copied = world.db.cursors.get(&(p as i32)).and_then(|row| row.published).map(|k| k.0);
        if let Some(position) = position.filter(|k| copied.is_some_and(|copied| *k < copied))
            && world.rng.random_bool(0.3)
        {
            drop(world);
            self.roll_back(p, position);
            return;
        }
        let metadata = if keeps_text { found.metadata } else { String::new() };
        world.note(|| format!("group offset of {p} set by hand: {k} to {position:?} {metadata:?}"));
        world.offsets[p] = position.map(|k| GroupOffset { position: NextOffset(k), metadata });
        world.tamper(p as i32);
    }

    /// The group's state is partly lost: an older offset commit of ours takes effect again.
    pub fn roll_back(&mut self, p: usize, position: i64) {
        let mut world = self.world();
        let identity = Identity { topic_id: world.topic_id, database_id: world.db.id };
        let position = NextOffset(position);
        world.note(|| format!("group offset of {p} rolled back to {position}"));
        let metadata = CommitMetadata::new(&identity, position).to_string();
        world.offsets[p] = Some(GroupOffset { position, metadata });
        world.tamper(p as i32);
    }

    /// The log loses its last records, as after an unclean leader election.
    pub fn truncate(&mut self, p: usize, end: usize) {
        let mut world = self.world();
        world.note(|| format!("the log of {p} ends at {end} again"));
        world.logs[p].items.truncate(end);
    }

    /// An operator who knows what was published resolves the partitions that halted for lack of proof.
    pub fn settle(&mut self, halted: &[(i32, HaltReason)]) -> bool {
        let mut is_settled = false;
        for (p, doubt) in halted {
            if !matches!(doubt, HaltReason::Unproved { .. } | HaltReason::MovedForward { .. }) {
                continue;
            }
            let mut world = self.shared.world.borrow_mut();
            let truth = world.truly_published[*p as usize];
            world.note(|| format!("partition {p} resolved at {truth}"));
            // The resolution creates the cursor if there is none yet.
            let start = NextOffset(world.logs[*p as usize].start);
            let replaces = Settlement::replaced(world.offsets[*p as usize].as_ref());
            let row = world.db.cursors.entry(*p).or_insert(CursorRow {
                applied: start,
                published: None,
                applied_timestamp: None,
                settled: None,
            });
            row.settled =
                Some(Settlement { committed: NextOffset(truth.max(start.0)), replaces: Some(replaces) });
            is_settled = true;
            self.stats.settled += 1;
            world.snapshot();
        }
        is_settled
    }

    /// Resolves a halt once what was published can no longer change.
    pub async fn settle_later(&mut self) {
        self.pause(Duration::from_secs(20)).await;
        let is_pending = {
            let mut world = self.world();
            (0..world.logs.len() as i32).any(|p| world.has_pending_offset(p))
        };
        if !is_pending {
            let halted = self.halted();
            self.settle(&halted);
        }
    }

    /// The group's offsets are deleted.
    pub fn delete_offsets(&mut self) {
        let mut world = self.world();
        world.note(|| "group offsets deleted".to_owned());
        for p in 0..world.offsets.len() {
            world.offsets[p] = None;
            world.tamper(p as i32);
        }
    }

    pub fn retain(&mut self, p: usize, is_careless: bool) {
        let mut world = self.shared.world.borrow_mut();
        let applied = world.db.cursors.get(&(p as i32)).map_or(0, |row| row.applied.0);
        // An offset deleted before the first start is nobody's.
        let Some(k) = world.offsets[p].as_ref().map(|o| o.position.0) else { return };
        let (start, end) = (world.logs[p].start, world.logs[p].end());
        let furthest = if is_careless { end } else { applied.min(k) };
        if furthest > start {
            let to = world.rng.random_range(start..=furthest);
            world.note(|| format!("retention: log of {p} starts at {to}"));
            world.logs[p].start = to;
        }
    }

    // ---- the end -----------------------------------------------------------------------------

    pub fn calm(&mut self) {
        let mut world = self.world();
        world.note(|| "faults stop".to_owned());
        world.is_calm = true;
        world.plan.rate = 0;
        world.plan.has_delays = false;
        world.db_down_until = None;
        world.broker_down_until = None;
        world.end_lag = 0;
    }

    pub fn halted(&self) -> Vec<(i32, HaltReason)> {
        let world = self.world();
        let mut halted = Vec::new();
        for (m, member) in world.members.iter().enumerate().filter(|(_, m)| m.is_up) {
            for (partition, status) in member.status.partitions() {
                if let Phase::Halted(doubt) = status.phase
                    && self.owners[partition.0 as usize] == Some(m)
                {
                    halted.push((partition.0, doubt));
                }
            }
        }
        halted
    }

    /// Waits until every partition is published to its end or halted; `None` if it takes too long.
    pub async fn rest(&mut self) -> Option<Vec<(i32, HaltReason)>> {
        self.rest_unless(|doubt| matches!(doubt, HaltReason::BeyondEnd { .. }) || doubt.is_about_reading())
            .await
    }

    /// Like the above, but some halt reasons do not count as rest.
    async fn rest_unless(
        &mut self,
        is_transient: impl Fn(&HaltReason) -> bool,
    ) -> Option<Vec<(i32, HaltReason)>> {
        let deadline = Instant::now() + REST_WITHIN;
        loop {
            self.pause(Duration::from_secs(1)).await;
            if self.is_broken() {
                return None;
            }
            let halted = self.halted();
            let is_at_rest = {
                let world = self.world();
                (0..self.setup.partitions).all(|p| {
                    let end = world.logs[p].end();
                    let row = world.db.cursors.get(&(p as i32));
                    let k = world.offsets[p].as_ref().map(|o| o.position.0);
                    let is_done = k == Some(end)
                        && row.is_some_and(|r| {
                            r.applied.0 == end && (!world.publishes || r.published.map(|k| k.0) == Some(end))
                        });
                    // One that is done may be halted still, until it is examined again.
                    let doubt = halted.iter().find(|(h, _)| *h == p as i32).map(|(_, doubt)| doubt);
                    doubt.map_or(is_done, |doubt| !is_transient(doubt))
                })
            };
            if is_at_rest {
                return Some(halted);
            }
            if Instant::now() > deadline {
                let mut world = self.world();
                let state: Vec<_> = (0..self.setup.partitions)
                    .map(|p| {
                        let row = world.db.cursors.get(&(p as i32));
                        (
                            p,
                            world.logs[p].end(),
                            world.offsets[p].as_ref().map(|o| o.position.0),
                            row.cloned(),
                        )
                    })
                    .collect();
                world.fail(format!("stuck: not at rest after {REST_WITHIN:?}: {state:?}, halted {halted:?}"));
                return None;
            }
        }
    }

    /// Halts that the contract does not allow.
    fn check_halts(&self, halted: &[(i32, HaltReason)]) {
        let mut world = self.world();
        for (p, doubt) in halted {
            let log_start = world.logs[*p as usize].start;
            let k = world.offsets[*p as usize].as_ref().map_or(0, |o| o.position.0);
            let applied = world.db.cursors.get(p).map(|row| row.applied.0);
            let is_right = match doubt {
                HaltReason::LogGap { .. } => applied.unwrap_or(k).min(k) < log_start,
                HaltReason::Unproved { .. } => world.tampered.contains(p) && world.is_tail_removed,
                HaltReason::MovedForward { .. } => world.tampered.contains(p),
                HaltReason::BeyondEnd { .. }
                | HaltReason::Unreadable { .. }
                | HaltReason::FetchGap { .. } => false,
            };
            if !is_right {
                world.fail(format!("partition {p} halted unnecessarily: {doubt:?}"));
            }
        }
    }

    /// Stops faults, waits until the world is at rest, and checks it with the oracle.
    pub async fn finish(mut self) -> Stats {
        self.calm();
        for m in 0..self.setup.members {
            self.wake(m).await;
        }
        self.start_all();
        let mut halted = self.rest().await;
        if let Some(found) = halted.clone() {
            self.check_halts(&found);
            if self.settle(&found) {
                halted = self.rest_unless(|doubt| !matches!(doubt, HaltReason::LogGap { .. })).await;
            }
        }
        if let Some(halted) = halted {
            self.stats.halts = halted.len();
            for m in 0..self.setup.members {
                self.drain(m).await;
            }
            let halted: BTreeSet<i32> = halted.into_iter().map(|(p, _)| p).collect();
            let breaches = oracle::check(&self.world(), &halted);
            for breach in breaches {
                self.world().fail(breach);
            }
        }
        for m in 0..self.setup.members {
            self.kill(m);
        }
        let mut stats = std::mem::take(&mut self.stats);
        let mut world = self.world();
        stats.points = world.points;
        stats.faults = world.faults;
        stats.taken_ahead = world.taken_ahead;
        stats.passed_over = world.passed_over;
        stats.redelivered = world.redelivered;
        stats.outputs = world.outputs.len();
        stats.rows = world.db.rows.len();
        stats.breach = world.failure.take();
        stats.trace = world.trace.take().unwrap_or_default();
        stats
    }

    pub async fn sleep_some(&mut self) {
        let ms = {
            let mut world = self.world();
            match world.rng.random_range(0..10) {
                0..5 => world.rng.random_range(0..200),
                5..9 => world.rng.random_range(100..2_000),
                _ => world.rng.random_range(2_000..15_000),
            }
        };
        self.pause(Duration::from_millis(ms)).await;
    }

    /// Schedules an action in the near future, during whatever else happens.
    pub fn soon(&self, act: impl FnOnce(&mut World) + 'static) {
        let ms = self.world().rng.random_range(0..3_000);
        let shared = Rc::clone(&self.shared);
        spawn_local(async move {
            sleep(Duration::from_millis(ms)).await;
            if !shared.world.borrow().is_calm {
                act(&mut shared.world.borrow_mut());
            }
            shared.changed.notify_waiters();
        });
    }

    /// Replaces the database by an empty one.
    pub async fn replace_database(&mut self) {
        if self.world().has_no_proof() {
            return;
        }
        let is_graceful = self.world().rng.random_bool(0.5);
        self.stop_all(is_graceful).await;
        {
            let mut world = self.world();
            world.note(|| "the database is replaced by an empty one".to_owned());
            let id = world.db.id.as_u128() + 1;
            world.restore(Database::empty(id));
            world.snapshots.clear();
        }
        self.adopts_database = true;
        self.start_all();
    }
}
