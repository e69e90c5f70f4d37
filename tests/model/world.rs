//! The simulated Kafka and Postgres. The state in here is the ground truth.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use payment_writer::domain::batch::{Answer, Batch, Outcomes, Owner, Refused};
use payment_writer::domain::cursor::{CommitMetadata, CursorRow, GroupOffset};
use payment_writer::domain::outcome::SqlState;
use payment_writer::domain::record::{NextOffset, Offset, Partition};
use payment_writer::ports::{CursorMove, LaneEvent};
use payment_writer::telemetry::status::StatusRegistry;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::records::Record;

/// Transaction timeout: the coordinator aborts a transaction that stays open for longer.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(15);
/// More steps than this in one history mean an endless loop. The longest take 16,000.
const STEPS_MAX: u64 = 100_000;
/// The same while no virtual time passes: none does while a task is always ready. The longest take 500.
pub const STEPS_AT_ONCE_MAX: u64 = 5_000;

/// One offset of a partition's log.
#[derive(Clone, Debug)]
pub enum Item {
    Record(Box<Record>),
    /// A control record, or a record of an aborted transaction: an offset without a visible record.
    Hidden,
}

/// One input partition.
#[derive(Default, Debug)]
pub struct PartitionLog {
    pub start: i64,
    pub items: Vec<Item>,
}

impl PartitionLog {
    pub fn end(&self) -> i64 {
        self.items.len() as i64
    }
}

/// One message of an output topic, as a read_committed consumer reads it.
#[derive(Clone, Debug)]
pub struct Message {
    /// Name of the output topic's role.
    pub topic: &'static str,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, String)>,
}

/// A transaction with produced messages.
#[derive(Debug)]
pub struct OpenTxn {
    pub number: u64,
    pub began: Instant,
    pub outputs: Vec<Message>,
    pub offsets: Option<Vec<(i32, i64, String)>>,
}

/// The coordinator's view of one transactional id.
#[derive(Default, Debug)]
pub struct TxnState {
    pub epoch: u64,
    pub open: Option<OpenTxn>,
}

/// Rows of `payment_metadata` with the columns of other tables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    pub payment_id: Uuid,
    pub message_id: Uuid,
    pub partition: i32,
    pub offset: i64,
    pub cust_id: i64,
}

/// Everything that is durable in Postgres.
#[derive(Clone, Debug)]
pub struct Database {
    pub id: Uuid,
    pub owners: BTreeMap<[u8; 16], Owner>,
    pub rows: Vec<Row>,
    pub cursors: BTreeMap<i32, CursorRow>,
}

impl Database {
    pub fn empty(id: u128) -> Self {
        Self { id: Uuid::from_u128(id), owners: BTreeMap::new(), rows: Vec::new(), cursors: BTreeMap::new() }
    }

    pub fn guarded(&mut self, moves: &[CursorMove]) -> Result<(), String> {
        for m in moves {
            let found = self.cursors.get(&m.partition.0).map(|row| row.applied);
            if found != Some(m.seen) {
                return Err(format!("partition {}: {found:?}, expected {}", m.partition, m.seen));
            }
        }
        for m in moves {
            if let Some(row) = self.cursors.get_mut(&m.partition.0) {
                if m.applied > row.applied
                    && let Some(timestamp) = m.timestamp
                {
                    row.applied_timestamp = timestamp;
                }
                row.applied = row.applied.max(m.applied);
                // As `greatest` in SQL: nulls are ignored.
                row.published = row.published.max(m.published);
            }
        }
        Ok(())
    }

    /// A batch's transaction, applied at its COMMIT.
    pub fn write(&mut self, batch: &Batch, moves: &[CursorMove]) -> Result<(Outcomes, Answer), String> {
        self.guarded(moves)?;
        let mut answer = Answer::default();
        for id in batch.lookups() {
            if let Some(owner) = self.owners.get(&id) {
                answer.owners.insert(id, *owner);
            }
        }
        // What the real store finds by bisecting is known here.
        let mut refused = Refused::default();
        loop {
            let before = refused.len();
            let claims: Vec<_> =
                batch.claims(&refused).filter(|c| !self.owners.contains_key(&c.message_id)).collect();
            for claim in claims {
                let core = decode(&batch.rows_at(&[claim.index]).core.bytes);
                let cust_id = i64::from_be_bytes(core[0][2].as_slice().try_into().unwrap());
                if refuses(Uuid::from_bytes(claim.message_id), cust_id) {
                    refused.insert(claim.index, SqlState::new("23514").unwrap());
                }
            }
            if refused.len() == before {
                break;
            }
        }
        for claim in batch.claims(&refused) {
            match self.owners.get(&claim.message_id) {
                Some(owner) => {
                    answer.owners.insert(claim.message_id, *owner);
                }
                None => {
                    let owner = Owner {
                        partition: claim.partition,
                        offset: claim.offset,
                        payload_hash: claim.payload_hash,
                    };
                    self.owners.insert(claim.message_id, owner);
                }
            }
        }
        let outcomes = batch.decide(&answer, &refused);
        let rows = batch.rows(&outcomes);
        let core = decode(&rows.core.bytes);
        let metadata = decode(&rows.metadata.bytes);
        assert_eq!(core.len(), rows.core.count, "the number of rows of payment_core is wrong");
        assert_eq!(metadata.len(), rows.metadata.count, "the number of rows of payment_metadata is wrong");
        for (core, metadata) in core.iter().zip(&metadata) {
            assert_eq!(core[0], metadata[0], "payment ids of one payment differ");
            self.rows.push(Row {
                payment_id: Uuid::from_slice(&metadata[0]).unwrap(),
                message_id: Uuid::from_slice(&metadata[4]).unwrap(),
                partition: i32::from_be_bytes(metadata[5].as_slice().try_into().unwrap()),
                offset: i64::from_be_bytes(metadata[6].as_slice().try_into().unwrap()),
                cust_id: i64::from_be_bytes(core[2].as_slice().try_into().unwrap()),
            });
        }
        Ok((outcomes, answer))
    }
}

/// A constraint of the simulated database: it never accepts some payments, whatever else has their id.
pub fn refuses(message_id: Uuid, cust_id: i64) -> bool {
    message_id.as_u128().is_multiple_of(3) && cust_id == 2
}

/// Rows of a binary COPY; a null is an empty field.
fn decode(bytes: &[u8]) -> Vec<Vec<Vec<u8>>> {
    let (mut rows, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let columns = i16::from_be_bytes(bytes[at..at + 2].try_into().unwrap());
        at += 2;
        let mut row = Vec::new();
        for _ in 0..columns {
            let len = i32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
            at += 4;
            let len = usize::try_from(len).unwrap_or(0);
            row.push(bytes[at..at + len].to_vec());
            at += len;
        }
        rows.push(row);
    }
    rows
}

/// One lane's registration, as the group sees it.
#[derive(Clone)]
pub struct LaneHandle {
    pub events: mpsc::Sender<LaneEvent>,
    pub unhandled_revocations: Arc<AtomicI64>,
}

/// One process, a member of the group.
#[derive(Default)]
pub struct Member {
    /// Incremented by each start; requests of an earlier start are fenced.
    pub incarnation: u64,
    pub is_up: bool,
    /// Whether the coordinator knows it. False for a zombie.
    pub is_known: bool,
    /// The generation that it knows; -1 between two.
    pub generation: i64,
    /// The whole process is paused.
    pub is_frozen: bool,
    /// Partitions that it assumes to own.
    pub held: BTreeSet<i32>,
    pub lanes: Vec<LaneHandle>,
    pub status: Arc<StatusRegistry>,
    pub threads: Vec<tokio::task::AbortHandle>,
}

/// The fault at one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    None,
    /// Fails without an effect.
    Before,
    /// Takes effect, but the caller gets an error.
    After,
    /// No response; the effect comes late or never.
    Hang,
    /// The process dies here.
    Crash,
}

/// When faults happen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// Faults per thousand calls.
    pub rate: u32,
    /// One in this many faults is a crash.
    pub crash_of: u32,
    /// A single fault at the call with this number.
    pub at: Option<(u64, Option<Fault>)>,
    /// Calls take random time.
    pub has_delays: bool,
}

/// The caller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Who {
    pub member: usize,
    pub incarnation: u64,
    pub lane: usize,
}

pub struct World {
    pub rng: ChaCha8Rng,
    pub began: Instant,
    pub plan: Plan,
    /// Number of calls at which a fault may happen.
    pub points: u64,
    /// Calls, polls of lanes, and pauses of the driver.
    pub steps: u64,
    /// Those since virtual time last passed.
    pub steps_at_once: u64,
    last_step_at: Instant,
    pub faults: u64,
    /// Lanes with a database transaction in progress.
    pub writing: BTreeSet<Who>,
    /// Records that a lane fetched during its database transaction.
    pub taken_ahead: u64,
    /// While set, the database refuses all payments: how many batches so far.
    pub refused_writes: Option<u32>,
    /// How often a client started at another position.
    pub passed_over: u64,
    /// How often a client delivered records again.
    pub redelivered: u64,
    /// Faults scheduled for the next call of this process and name.
    pub ordered: Vec<(usize, &'static str, Fault)>,
    /// Delays of the next call of this process and name.
    pub delays: Vec<(usize, &'static str, Duration)>,
    /// No more faults.
    pub is_calm: bool,
    pub trace: Option<Vec<String>>,
    pub failure: Option<String>,
    pub crashes: Vec<(usize, u64)>,

    pub topic_id: Uuid,
    pub publishes: bool,
    pub logs: Vec<PartitionLog>,
    pub offsets: Vec<Option<GroupOffset>>,
    /// The highest offset that a transaction committed: what was really published.
    pub truly_published: Vec<i64>,
    pub generation: i64,
    pub members: Vec<Member>,
    pub txns: BTreeMap<(usize, usize), TxnState>,
    pub txn_count: u64,
    pub outputs: Vec<Message>,
    pub emitted: BTreeSet<(&'static str, String)>,
    /// Retention removed the ends of the outputs: nothing can be proved from them.
    pub is_tail_removed: bool,
    pub broker_down_until: Option<Instant>,
    /// `bounds` returns an end that is too low by this much.
    pub end_lag: i64,

    pub db: Database,
    /// Sessions of an older epoch are broken.
    pub db_epoch: u64,
    pub db_down_until: Option<Instant>,
    pub snapshots: Vec<Database>,

    /// The database lost a commit.
    pub has_rewound: bool,
    /// No lane has recovered these partitions since the database lost data. Until one has, the old cursors do
    /// not have what was sent; only the group's offset does.
    pub untaken: BTreeSet<i32>,
    /// The epoch of the database when a lane last read cursors.
    pub read_in: BTreeMap<Who, u64>,
    /// Group offsets of these partitions were changed by hand.
    pub tampered: BTreeSet<i32>,
    /// Those of them that no lane has committed since: only the database shows that they are wrong.
    pub uncorrected: BTreeSet<i32>,
}

pub struct Handle {
    pub world: RefCell<World>,
    /// Wakes tasks that wait for a change.
    pub changed: Notify,
}

pub type Shared = Rc<Handle>;

impl World {
    pub fn new(seed: u64, partitions: usize, members: usize, publishes: bool, plan: Plan) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            began: Instant::now(),
            plan,
            points: 0,
            steps: 0,
            steps_at_once: 0,
            last_step_at: Instant::now(),
            faults: 0,
            writing: BTreeSet::new(),
            taken_ahead: 0,
            refused_writes: None,
            passed_over: 0,
            redelivered: 0,
            ordered: Vec::new(),
            delays: Vec::new(),
            is_calm: false,
            trace: None,
            failure: None,
            crashes: Vec::new(),
            topic_id: Uuid::from_u128(0x7091c),
            publishes,
            logs: (0..partitions).map(|_| PartitionLog::default()).collect(),
            offsets: vec![None; partitions],
            truly_published: vec![0; partitions],
            generation: 1,
            members: (0..members).map(|_| Member::default()).collect(),
            txns: BTreeMap::new(),
            txn_count: 0,
            outputs: Vec::new(),
            emitted: BTreeSet::new(),
            is_tail_removed: seed.is_multiple_of(3),
            broker_down_until: None,
            end_lag: 0,
            db: Database::empty(0xdb),
            db_epoch: 1,
            db_down_until: None,
            snapshots: Vec::new(),
            has_rewound: false,
            untaken: BTreeSet::new(),
            read_in: BTreeMap::new(),
            tampered: BTreeSet::new(),
            uncorrected: BTreeSet::new(),
        }
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        let at = self.began.elapsed().as_millis();
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{at:>8} ms  {}", text()));
        }
    }

    /// Records a violation of the contract; the first one counts.
    pub fn fail(&mut self, text: String) {
        self.note(|| format!("BREACH: {text}"));
        self.failure.get_or_insert(text);
    }

    /// Counts a step. Returns whether there may be more: too many fail the history, as something repeats without
    /// end.
    pub fn step(&mut self, name: impl FnOnce() -> String) -> bool {
        let now = Instant::now();
        if now != self.last_step_at {
            self.steps_at_once = 0;
            self.last_step_at = now;
        }
        self.steps_at_once += 1;
        self.steps += 1;
        let max = if self.steps > STEPS_MAX {
            format!("{STEPS_MAX} steps")
        } else if self.steps_at_once > STEPS_AT_ONCE_MAX {
            format!("{STEPS_AT_ONCE_MAX} steps in no time")
        } else {
            return true;
        };
        self.fail(format!("stuck: more than {max}, the last one {}", name()));
        false
    }

    pub fn is_alive(&self, who: Who) -> bool {
        let member = &self.members[who.member];
        member.is_up && member.incarnation == who.incarnation
    }

    /// Counts one call, and draws its fault.
    fn draw(&mut self, who: Who, name: &str) -> Fault {
        self.points += 1;
        if !self.step(|| format!("{name} by {who:?}")) {
            return Fault::Crash;
        }
        let mut fault = match self.plan.at {
            Some((at, fault)) if at == self.points => match fault {
                Some(fault) => fault,
                None => [Fault::Before, Fault::After, Fault::Hang][self.rng.random_range(0..3)],
            },
            _ if self.plan.rate > 0 && self.rng.random_ratio(self.plan.rate, 1_000) => {
                if self.rng.random_ratio(1, self.plan.crash_of.max(1)) {
                    Fault::Crash
                } else if self.rng.random_bool(0.12) {
                    Fault::Hang
                } else if self.rng.random_bool(0.5) {
                    Fault::Before
                } else {
                    Fault::After
                }
            }
            _ => Fault::None,
        };
        if let Some(place) = self.ordered.iter().position(|(m, n, _)| (*m, *n) == (who.member, name)) {
            fault = self.ordered.remove(place).2;
        }
        if fault == Fault::Crash && !self.is_alive(who) {
            fault = Fault::None;
        }
        if fault != Fault::None {
            self.faults += 1;
        }
        let points = self.points;
        self.note(|| format!("#{points} {who:?} {name} {fault:?}"));
        fault
    }

    // ---- the transaction coordinator -------------------------------------------------------------

    pub fn expire(&mut self) {
        for state in self.txns.values_mut() {
            if state.open.as_ref().is_some_and(|t| t.began.elapsed() > TRANSACTION_TIMEOUT) {
                state.open = None;
                state.epoch += 1;
            }
        }
    }

    /// The open transaction, if the caller's epoch is not fenced.
    pub fn open_txn(&mut self, id: (usize, usize), epoch: u64, number: u64) -> Option<&mut OpenTxn> {
        self.expire();
        let state = self.txns.get_mut(&id)?;
        if state.epoch != epoch {
            return None;
        }
        state.open.as_mut().filter(|t| t.number == number)
    }

    pub fn abort_txn(&mut self, id: (usize, usize), epoch: u64, number: u64) -> bool {
        if self.open_txn(id, epoch, number).is_none() {
            return false;
        }
        self.note(|| format!("       transaction {number} aborted"));
        if let Some(state) = self.txns.get_mut(&id) {
            state.open = None;
        }
        true
    }

    /// Makes the transaction visible, and checks the invariants.
    pub fn commit_txn(&mut self, id: (usize, usize), epoch: u64, number: u64) -> bool {
        if self.open_txn(id, epoch, number).is_none() {
            return false;
        }
        let Some(txn) = self.txns.get_mut(&id).and_then(|s| s.open.take()) else { return false };
        let offsets = txn.offsets.unwrap_or_default();
        self.note(|| format!("       transaction {number} committed: {offsets:?}"));
        for (partition, position, metadata) in offsets {
            let p = partition as usize;
            // An offset that was set by hand may be overwritten.
            let known =
                self.offsets[p].as_ref().filter(|o| o.commit_metadata().is_some()).map(|o| o.position.0);
            if known.is_some_and(|k| k > position) && self.publishes {
                let text = format!("group offset of {partition} moves back from {known:?} to {position}");
                self.fail(text);
            }
            let applied = self.db.cursors.get(&partition).map(|row| row.applied.0);
            if applied.is_some_and(|a| a < position) && !self.has_rewound {
                self.fail(format!("group offset {position} of {partition} ahead of the rows at {applied:?}"));
            }
            let mark = CommitMetadata::parse(&metadata);
            if mark.is_none_or(|m| m.position.0 != position) {
                self.fail(format!(
                    "group offset {position} of {partition} without our commit metadata: {metadata:?}"
                ));
            }
            self.offsets[p] = Some(GroupOffset { position: NextOffset(position), metadata });
            self.uncorrected.remove(&partition);
            self.truly_published[p] = self.truly_published[p].max(position);
        }
        for message in txn.outputs {
            let source = message.header("source").unwrap_or_default().to_owned();
            if !self.emitted.insert((message.topic, source.clone())) {
                self.fail(format!("emitted twice to {}: {source}", message.topic));
            }
            self.note(|| format!("         {} {source}", message.topic));
            self.outputs.push(message);
        }
        true
    }

    /// Whether a transaction with produced messages is open.
    pub fn has_open_outputs(&mut self) -> bool {
        self.expire();
        self.txns.values().any(|state| state.open.as_ref().is_some_and(|txn| !txn.outputs.is_empty()))
    }

    pub fn has_pending_offset(&mut self, partition: i32) -> bool {
        self.expire();
        self.txns.values().any(|state| {
            let offsets = state.open.as_ref().and_then(|t| t.offsets.as_ref());
            offsets.is_some_and(|o| o.iter().any(|(p, ..)| *p == partition))
        })
    }

    /// Whether the group accepts offsets from this member.
    pub fn is_member(&self, who: Who, generation: i64) -> bool {
        let member = &self.members[who.member];
        self.is_alive(who) && member.is_known && generation == self.generation
    }

    // ---- the database ----------------------------------------------------------------------------

    pub fn is_db_down(&self) -> bool {
        self.db_down_until.is_some_and(|until| Instant::now() < until)
    }

    pub fn is_broker_down(&self) -> bool {
        self.broker_down_until.is_some_and(|until| Instant::now() < until)
    }

    /// Whether a loss of the database would take the last proof of what was sent; that case has no guarantee.
    pub fn has_no_proof(&self) -> bool {
        !self.uncorrected.is_empty() && self.is_tail_removed
    }

    /// Notes that a group offset was changed by hand.
    pub fn tamper(&mut self, partition: i32) {
        self.tampered.insert(partition);
        self.uncorrected.insert(partition);
    }

    pub fn snapshot(&mut self) {
        self.note(|| "snapshot of the database".to_owned());
        self.snapshots.push(self.db.clone());
    }

    pub fn restore(&mut self, snapshot: Database) {
        let cursors: Vec<_> = snapshot.cursors.iter().map(|(p, r)| (*p, r.applied.0)).collect();
        self.note(|| format!("database restored, applied: {cursors:?}"));
        self.db = snapshot;
        self.db_epoch += 1;
        self.has_rewound = true;
        self.untaken = (0..self.logs.len() as i32).collect();
    }

    pub fn log_bounds(&self, partition: Partition) -> (i64, i64) {
        let log = &self.logs[partition.0 as usize];
        (log.start, (log.end() - self.end_lag).max(log.start))
    }

    pub fn item(&self, partition: i32, offset: Offset) -> &Item {
        &self.logs[partition as usize].items[offset.0 as usize]
    }
}

impl Message {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

impl Handle {
    pub fn new(world: World) -> Shared {
        Rc::new(Self { world: RefCell::new(world), changed: Notify::new() })
    }

    /// A point at which a fault may happen. Returns the fault; does not return if the process crashes here.
    pub async fn point(&self, who: Who, name: &'static str) -> Fault {
        let (fault, delay) = {
            let mut world = self.world.borrow_mut();
            let fault = world.draw(who, name);
            let ordered = world.delays.iter().position(|(m, n, _)| (*m, *n) == (who.member, name));
            let ordered = ordered.map_or(Duration::ZERO, |place| world.delays.remove(place).2);
            let delay_ms = if !world.plan.has_delays {
                0
            } else if world.rng.random_ratio(1, 60) {
                world.rng.random_range(500..9_000)
            } else if world.rng.random_bool(0.3) {
                world.rng.random_range(1..60)
            } else {
                0
            };
            (fault, ordered + Duration::from_millis(delay_ms))
        };
        if fault == Fault::Crash {
            self.world.borrow_mut().crashes.push((who.member, who.incarnation));
            self.changed.notify_waiters();
            std::future::pending::<()>().await;
        }
        if !delay.is_zero() {
            sleep(delay).await;
        }
        self.thaw(who).await;
        fault
    }

    /// Waits while the process is paused.
    pub async fn thaw(&self, who: Who) {
        loop {
            let changed = self.changed.notified();
            {
                let world = self.world.borrow();
                if !world.members[who.member].is_frozen || !world.is_alive(who) {
                    return;
                }
            }
            changed.await;
        }
    }
}
