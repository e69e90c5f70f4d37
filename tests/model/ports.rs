//! `KafkaPort` and `Store` on top of the world, with every possible fault at each call.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use payment_writer::domain::batch::{Answer, Batch, Outcomes};
use payment_writer::domain::cursor::{
    CursorRow, GroupOffset, Identity, IdentityMismatch, LogBounds, OutputScan,
};
use payment_writer::domain::outcome::FailureClass;
use payment_writer::domain::publication::{Committed, OutputCounts, Publication, Source};
use payment_writer::domain::record::{NextOffset, Offset, Partition};
use payment_writer::ports::fetch_buffer::{FetchBuffer, FetchFault};
use payment_writer::ports::{
    CursorMove, Gap, GapAnswer, KafkaPort, KafkaPortError, LaneEvent, Positions, PublishError, PublishTimes,
    Question, ScannedOutputs, Store, StoreError, WriteStats,
};
use rand::RngExt;
use rdkafka::types::RDKafkaErrorCode;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout};

use crate::world::{Fault, Item, Message, OpenTxn, Shared, Who};

/// After this time the lane gives up a hanging publisher.
const WATCHDOG: Duration = Duration::from_secs(25);
/// Time that the client waits for offsets that a pending transaction holds.
const STABLE_WAIT: Duration = Duration::from_secs(10);
/// Timeout of a hanging broker request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of a hanging database transaction.
const LEDGER_TIMEOUT: Duration = Duration::from_secs(60);

/// An abort with a transient cause.
fn aborted(message: &str) -> PublishError {
    PublishError::Aborted { class: FailureClass::Transient, message: message.to_owned() }
}

type Sent = Result<(Committed, OutputCounts, PublishTimes), PublishError>;

/// The client's state of a fetched partition.
#[derive(Clone, Copy, Debug)]
struct Fetch {
    position: i64,
    is_end_told: bool,
    /// Nothing was delivered since fetching started.
    is_fresh: bool,
}

/// The cluster as one lane sees it.
pub struct ModelLog {
    shared: Shared,
    who: Who,
    identity: Identity,
    unhandled_revocations: Arc<AtomicI64>,
    fetches: BTreeMap<i32, Fetch>,
    /// Producer epoch, once it is initialised.
    producer: Option<u64>,
    is_in_doubt: bool,
}

impl ModelLog {
    pub fn new(shared: Shared, who: Who, identity: Identity, unhandled_revocations: Arc<AtomicI64>) -> Self {
        Self {
            shared,
            who,
            identity,
            unhandled_revocations,
            fetches: BTreeMap::new(),
            producer: None,
            is_in_doubt: false,
        }
    }

    fn caller(&self) -> Caller {
        Caller { shared: Rc::clone(&self.shared), who: self.who }
    }

    /// Sends one request to the broker.
    async fn request(&self, name: &'static str) -> Result<bool, KafkaPortError> {
        self.caller().request(name).await
    }

    /// Returns the response.
    async fn reply(&self, name: &'static str, is_lost: bool) -> Result<(), KafkaPortError> {
        self.caller().reply(name, is_lost).await
    }

    fn deliver(&mut self, buffer: &mut FetchBuffer) -> bool {
        let mut world = self.shared.world.borrow_mut();
        let mut is_delivered = false;
        if world.is_broker_down() {
            return false;
        }
        let mut partitions: Vec<i32> = self.fetches.keys().copied().collect();
        if partitions.len() > 1 {
            let turn = world.rng.random_range(0..partitions.len());
            partitions.rotate_left(turn);
        }
        for p in partitions {
            let Some(Fetch { mut position, mut is_end_told, is_fresh }) = self.fetches.get(&p).copied()
            else {
                continue;
            };
            let end = world.logs[p as usize].end();
            if !(world.logs[p as usize].start..=end).contains(&position) {
                // auto.offset.reset=error
                buffer.fail(Partition(p), FetchFault::new(RDKafkaErrorCode::AutoOffsetReset, -1));
                self.fetches.remove(&p);
                is_delivered = true;
                continue;
            }
            if is_fresh && world.plan.has_delays && position < end && world.rng.random_ratio(1, 6) {
                // Simulates a bug of librdkafka: it starts at another position.
                position = world.rng.random_range(position + 1..=end);
                world.passed_over += 1;
                world.note(|| format!("       the client starts {p} at {position} instead"));
            } else if world.plan.has_delays && world.rng.random_ratio(1, 25) {
                // The client returns to an earlier position, as when the partition's leader changes.
                let back = world.rng.random_range(1..5);
                position = (position - back).max(world.logs[p as usize].start);
                world.redelivered += 1;
            }
            let chunk = if world.plan.has_delays { world.rng.random_range(1..6) } else { 100 };
            let mut taken = 0;
            while position < end && buffer.room() > 0 && taken < chunk {
                if let Item::Record(record) = world.item(p, Offset(position)) {
                    let headers = record.headers.iter().map(|(n, v)| (n.as_slice(), v.as_deref()));
                    buffer.record(
                        Partition(p),
                        Offset(position),
                        record.timestamp,
                        record.key.as_deref(),
                        record.value.as_deref(),
                        headers,
                    );
                    taken += 1;
                    world.taken_ahead += u64::from(world.writing.contains(&self.who));
                }
                is_end_told = false;
                position += 1;
            }
            if position == end && !is_end_told {
                buffer.end(Partition(p), NextOffset(end));
                is_end_told = true;
                taken += 1;
            }
            is_delivered |= taken > 0;
            is_end_told &= position == end;
            let is_fresh = is_fresh && taken == 0;
            self.fetches.insert(p, Fetch { position, is_end_told, is_fresh });
        }
        is_delivered
    }

    /// A partition fails, and the client continues behind the error, at a wrong offset.
    fn fail_one(&mut self, buffer: &mut FetchBuffer) {
        let Some(p) = self.fetches.keys().next().copied() else { return };
        buffer.fail(Partition(p), FetchFault::new(RDKafkaErrorCode::BadMessage, 0));
        let mut world = self.shared.world.borrow_mut();
        let end = world.logs[p as usize].end();
        if let Some(fetch) = self.fetches.get_mut(&p)
            && fetch.position < end
        {
            fetch.position = world.rng.random_range(fetch.position + 1..=end);
            fetch.is_fresh = false;
        }
    }

    /// Spawns a task of this process that sends the lane an event.
    fn spawn(&self, work: impl Future<Output = LaneEvent> + 'static) {
        let (shared, who) = (Rc::clone(&self.shared), self.who);
        let task = spawn_local(async move {
            let event = work.await;
            shared.thaw(who).await;
            let lane = {
                let world = shared.world.borrow();
                world.is_alive(who).then(|| world.members[who.member].lanes.get(who.lane).cloned()).flatten()
            };
            if let Some(lane) = lane {
                let _ = lane.events.send(event).await;
                shared.changed.notify_waiters();
            }
        });
        self.shared.world.borrow_mut().members[self.who.member].threads.push(task.abort_handle());
    }

    /// Counts a step that is no call.
    fn step(&self, name: &str) -> bool {
        self.shared.world.borrow_mut().step(|| format!("{name} by {:?}", self.who))
    }

    fn has_news(&self) -> bool {
        let world = self.shared.world.borrow();
        !world.is_broker_down()
            && self
                .fetches
                .iter()
                .any(|(p, fetch)| fetch.position != world.logs[*p as usize].end() || !fetch.is_end_told)
    }
}

/// Sends requests to the broker, in the background or not.
struct Caller {
    shared: Shared,
    who: Who,
}

impl Caller {
    /// Sends one request to the broker.
    async fn request(&self, name: &'static str) -> Result<bool, KafkaPortError> {
        let transient = |text: &str| Err(KafkaPortError::transient(format!("{name}: {text}")));
        match self.shared.point(self.who, name).await {
            Fault::Before => transient("no answer"),
            Fault::Hang => {
                sleep(REQUEST_TIMEOUT).await;
                transient("no answer in time")
            }
            _ if self.shared.world.borrow().is_broker_down() => transient("broker unavailable"),
            fault => Ok(fault == Fault::After),
        }
    }

    /// Returns the response.
    async fn reply(&self, name: &'static str, is_lost: bool) -> Result<(), KafkaPortError> {
        match self.shared.point(self.who, name).await {
            _ if is_lost => Err(KafkaPortError::transient(format!("{name}: answer lost"))),
            Fault::None => Ok(()),
            _ => Err(KafkaPortError::transient(format!("{name}: answer lost"))),
        }
    }

    /// The cluster's answer about partitions, possibly outdated.
    async fn positions(&self, partitions: &[Partition]) -> Result<Vec<Positions>, KafkaPortError> {
        let is_lost = self.request("group_offsets").await?;
        let deadline = Instant::now() + STABLE_WAIT;
        let offsets: Vec<Option<GroupOffset>> = loop {
            let found = {
                let mut world = self.shared.world.borrow_mut();
                let is_pending = partitions.iter().any(|p| world.has_pending_offset(p.0));
                (!is_pending)
                    .then(|| partitions.iter().map(|p| world.offsets[p.0 as usize].clone()).collect())
            };
            if let Some(found) = found {
                break found;
            }
            if Instant::now() > deadline {
                return Err(KafkaPortError::transient("offsets are held by a transaction".to_owned()));
            }
            sleep(Duration::from_millis(200)).await;
        };
        self.reply("group_offsets reply", is_lost).await?;
        let is_lost = self.request("bounds").await?;
        let found = {
            let world = self.shared.world.borrow();
            let of = |(partition, group): (&Partition, Option<GroupOffset>)| {
                let (start, end) = world.log_bounds(*partition);
                let bounds = LogBounds { start: NextOffset(start), end: NextOffset(end) };
                Positions { partition: *partition, group, bounds }
            };
            partitions.iter().zip(offsets).map(of).collect()
        };
        self.reply("bounds reply", is_lost).await?;
        let late_ms = {
            let mut world = self.shared.world.borrow_mut();
            let is_late = world.plan.has_delays && world.rng.random_ratio(1, 10);
            if is_late { world.rng.random_range(0..20_000) } else { 0 }
        };
        sleep(Duration::from_millis(late_ms)).await;
        Ok(found)
    }

    async fn look_into(&self, gap: &Gap) -> GapAnswer {
        match self.request("gaps").await {
            Ok(false) => {}
            Ok(true) => return GapAnswer::Failed("answer lost".to_owned()),
            Err(error) => return GapAnswer::Failed(error.to_string()),
        }
        let world = self.shared.world.borrow();
        let p = gap.partition.0;
        if world.logs[p as usize].start > gap.from.0 {
            return GapAnswer::Removed;
        }
        let end = gap.to.0.min(world.logs[p as usize].end());
        let record = (gap.from.0..end).find(|at| matches!(world.item(p, Offset(*at)), Item::Record(_)));
        record.map_or(GapAnswer::Empty, |at| GapAnswer::Record(NextOffset(at)))
    }
}

impl KafkaPort for ModelLog {
    fn ask(&mut self, question: Question) {
        let caller = self.caller();
        self.spawn(async move {
            let found = caller.positions(&question.partitions).await;
            LaneEvent::Answered { id: question.id, found }
        });
    }

    fn check_gaps(&mut self, id: u64, gaps: Vec<Gap>) {
        let caller = self.caller();
        self.spawn(async move {
            let mut answers = Vec::new();
            for gap in gaps {
                answers.push((gap, caller.look_into(&gap).await));
            }
            LaneEvent::GapsChecked { id, answers }
        });
    }

    async fn scan_outputs(
        &mut self,
        wanted: &[(Partition, NextOffset)],
    ) -> Result<Option<Vec<ScannedOutputs>>, KafkaPortError> {
        let is_lost = self.request("scan outputs").await?;
        let found = {
            let mut world = self.shared.world.borrow_mut();
            if world.has_open_outputs() {
                // This waits for its end.
                None
            } else if world.is_tail_removed {
                let impossible = |(partition, from): &(Partition, NextOffset)| ScannedOutputs {
                    partition: *partition,
                    from: *from,
                    scan: OutputScan::Unclear(*from),
                    is_refused: false,
                };
                Some(wanted.iter().map(impossible).collect())
            } else {
                let scanned = |(partition, from): &(Partition, NextOffset)| {
                    let offsets = world.outputs.iter().filter_map(|message| {
                        let source = Source::parse(message.header("source")?.as_bytes())?;
                        (source.partition == *partition).then(|| source.offset.next())
                    });
                    let sent = offsets.max().unwrap_or(*from).max(*from);
                    ScannedOutputs {
                        partition: *partition,
                        from: *from,
                        scan: OutputScan::Sent(sent),
                        is_refused: false,
                    }
                };
                Some(wanted.iter().map(scanned).collect())
            }
        };
        self.reply("scan outputs reply", is_lost).await?;
        Ok(found)
    }

    async fn start(&mut self, positions: &[(Partition, NextOffset)]) -> Result<(), KafkaPortError> {
        let is_lost = self.request("start").await?;
        {
            let mut world = self.shared.world.borrow_mut();
            let is_taken_up = world.read_in.get(&self.who) == Some(&world.db_epoch);
            for (partition, position) in positions {
                if is_taken_up {
                    world.untaken.remove(&partition.0);
                }
                let fetch = Fetch { position: position.0, is_end_told: false, is_fresh: true };
                self.fetches.insert(partition.0, fetch);
            }
        }
        self.reply("start reply", is_lost).await
    }

    async fn stop(&mut self, partitions: &[Partition]) -> Result<(), KafkaPortError> {
        let is_lost = self.request("stop").await?;
        for partition in partitions {
            self.fetches.remove(&partition.0);
        }
        self.reply("stop reply", is_lost).await
    }

    fn listen(&self) {
        self.step("listen");
    }

    fn abandon_fetcher(&mut self) {
        self.fetches.clear();
    }

    async fn fetch(&mut self, buffer: &mut FetchBuffer, wait: Duration) {
        if !self.step("fetch") {
            std::future::pending::<()>().await;
        }
        self.shared.thaw(self.who).await;
        let deadline = Instant::now() + wait;
        while !self.has_news() {
            let changed = self.shared.changed.notified();
            if timeout(deadline.saturating_duration_since(Instant::now()), changed).await.is_err() {
                return;
            }
            self.shared.thaw(self.who).await;
        }
        match self.shared.point(self.who, "fetch").await {
            Fault::None | Fault::Crash => {}
            Fault::Hang => sleep(Duration::from_secs(2)).await,
            Fault::Before | Fault::After => {
                self.fail_one(buffer);
            }
        }
        self.deliver(buffer);
    }

    async fn publish(&mut self, publication: &Arc<Publication>) -> Sent {
        if std::mem::replace(&mut self.is_in_doubt, true) {
            return Err(PublishError::ReplaceProducer(
                "the outcome of an earlier transaction is unknown".to_owned(),
            ));
        }
        let fault = self.shared.point(self.who, "publish").await;
        self.is_in_doubt = false;
        match fault {
            Fault::Before => return Err(PublishError::StaleGeneration("rebalance in progress".to_owned())),
            Fault::After => return Err(aborted("coordinator is moving")),
            _ => {}
        }
        let Some(epoch) = self.producer else {
            return Err(PublishError::ReplaceProducer("there is no producer yet".to_owned()));
        };
        let generation = self.shared.world.borrow().members[self.who.member].generation;
        if generation < 0 {
            return Err(PublishError::StaleGeneration("between two generations".to_owned()));
        }
        if self.unhandled_revocations.load(Ordering::Acquire) != 0 {
            return Err(PublishError::StaleGeneration("a revocation is not handled yet".to_owned()));
        }
        self.is_in_doubt = true;
        let (reply, answer) = oneshot::channel();
        let thread = Thread {
            shared: Rc::clone(&self.shared),
            who: self.who,
            identity: self.identity.clone(),
            epoch,
            generation,
        };
        let publication = Arc::clone(publication);
        let task = spawn_local(async move {
            let outcome = thread.publish(&publication).await;
            let _ = reply.send(outcome);
        });
        self.shared.world.borrow_mut().members[self.who.member].threads.push(task.abort_handle());
        let outcome = match timeout(WATCHDOG, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(PublishError::ReplaceProducer("the thread is gone".to_owned())),
            Err(_) => Err(PublishError::ReplaceProducer("the producer hangs".to_owned())),
        };
        self.shared.thaw(self.who).await;
        self.is_in_doubt = matches!(outcome, Err(PublishError::ReplaceProducer(_)));
        outcome
    }

    async fn renew(&mut self) -> Result<(), KafkaPortError> {
        if self.producer.is_some() && !self.is_in_doubt {
            // librdkafka's `init_transactions` fails on a producer that is ready.
            let who = self.who;
            self.shared.world.borrow_mut().fail(format!("{who:?} renews a producer that is ready"));
        }
        let is_lost = self.request("renew").await?;
        self.is_in_doubt = false;
        let epoch = {
            let mut world = self.shared.world.borrow_mut();
            let state = world.txns.entry((self.who.member, self.who.lane)).or_default();
            state.epoch += 1;
            state.open = None;
            state.epoch
        };
        self.producer = None;
        self.reply("renew reply", is_lost).await?;
        self.producer = Some(epoch);
        Ok(())
    }
}

/// The publisher's thread: continues whether or not the lane waits for it.
struct Thread {
    shared: Shared,
    who: Who,
    identity: Identity,
    epoch: u64,
    generation: i64,
}

impl Thread {
    fn id(&self) -> (usize, usize) {
        (self.who.member, self.who.lane)
    }

    /// Aborts, and returns what is known by then.
    async fn abort(&self, number: u64, failure: PublishError) -> PublishError {
        let fault = self.shared.point(self.who, "abort").await;
        if matches!(fault, Fault::Before | Fault::Hang) {
            return PublishError::ReplaceProducer("abort: no answer".to_owned());
        }
        let is_aborted = self.shared.world.borrow_mut().abort_txn(self.id(), self.epoch, number);
        if is_aborted && fault == Fault::None {
            failure
        } else {
            PublishError::ReplaceProducer("abort: fenced, or the answer was lost".to_owned())
        }
    }

    /// The commit request arrives some time later, unless the transaction has ended before.
    fn commit_later(&self, number: u64, reply: Option<oneshot::Sender<bool>>) {
        let (shared, id, epoch) = (Rc::clone(&self.shared), self.id(), self.epoch);
        let delay = shared.world.borrow_mut().rng.random_range(0..12_000);
        spawn_local(async move {
            sleep(Duration::from_millis(delay)).await;
            let is_committed = shared.world.borrow_mut().commit_txn(id, epoch, number);
            if let Some(reply) = reply {
                let _ = reply.send(is_committed);
            }
        });
    }

    async fn publish(&self, publication: &Publication) -> Sent {
        let replace = |text: &str| Err(PublishError::ReplaceProducer(text.to_owned()));
        if self.shared.point(self.who, "begin").await != Fault::None {
            return replace("begin: invalid state");
        }
        let topic_id = self.identity.topic_id;
        let mut outputs = Vec::new();
        let counts = publication.for_each_output("payment_writer_topic", topic_id, |output| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            outputs.push(Message {
                topic: output.topic.label(),
                key: output.key.map(<[u8]>::to_vec),
                value: output.value.map(<[u8]>::to_vec),
                headers: output
                    .headers
                    .iter()
                    .map(|(n, v)| (text(n), v.map(text).unwrap_or_default()))
                    .collect(),
            });
            Ok::<(), ()>(())
        });
        let Ok(counts) = counts else { return replace("cannot be") };
        let number = {
            let mut world = self.shared.world.borrow_mut();
            world.expire();
            world.txn_count += 1;
            let number = world.txn_count;
            let (id, epoch) = (self.id(), self.epoch);
            world.note(|| format!("       transaction {number} of {id:?} begins"));
            match world.txns.get_mut(&id) {
                Some(state) if state.epoch == epoch && state.open.is_none() => {
                    let began = Instant::now();
                    state.open = Some(OpenTxn { number, began, outputs: Vec::new(), offsets: None });
                }
                _ => return replace("producer fenced"),
            }
            number
        };
        let fault = self.shared.point(self.who, "send_offsets").await;
        if fault == Fault::Before {
            return Err(self.abort(number, aborted("send_offsets")).await);
        }
        let offsets: Vec<_> = publication.offsets(&self.identity).map(|(p, o, m)| (p.0, o.0, m)).collect();
        let is_taken = {
            let mut world = self.shared.world.borrow_mut();
            if world.open_txn(self.id(), self.epoch, number).is_none() {
                return replace("producer fenced");
            }
            let is_member = world.is_member(self.who, self.generation) && !world.is_broker_down();
            if is_member && let Some(txn) = world.open_txn(self.id(), self.epoch, number) {
                txn.offsets = Some(offsets);
            }
            is_member
        };
        if !is_taken {
            return Err(self
                .abort(number, PublishError::StaleGeneration("illegal generation".to_owned()))
                .await);
        }
        match fault {
            Fault::After => return Err(self.abort(number, aborted("send_offsets")).await),
            Fault::Hang => std::future::pending().await,
            _ => {}
        }
        match self.shared.world.borrow_mut().open_txn(self.id(), self.epoch, number) {
            Some(txn) => txn.outputs = outputs,
            None => return replace("producer fenced"),
        }
        match self.shared.point(self.who, "produce").await {
            Fault::None | Fault::Crash => {}
            Fault::Before | Fault::After => {
                return Err(self.abort(number, aborted("an output topic is away")).await);
            }
            Fault::Hang => std::future::pending().await,
        }
        let is_late = {
            let mut world = self.shared.world.borrow_mut();
            world.plan.has_delays && world.rng.random_ratio(1, 20)
        };
        if is_late {
            // The request is on its way, even if this process crashes.
            let (reply, answer) = oneshot::channel();
            self.commit_later(number, Some(reply));
            let is_committed = answer.await.unwrap_or(false);
            let fault = self.shared.point(self.who, "commit reply").await;
            return match (is_committed, fault) {
                (true, Fault::None) => Ok((publication.committed(), counts, PublishTimes::default())),
                _ => replace("commit: no answer"),
            };
        }
        let fault = self.shared.point(self.who, "commit").await;
        if matches!(fault, Fault::Before | Fault::Hang) {
            if self.shared.world.borrow_mut().rng.random_bool(0.5) {
                self.commit_later(number, None);
            }
            if fault == Fault::Hang {
                std::future::pending::<()>().await;
            }
            return replace("commit: no answer");
        }
        let is_committed = self.shared.world.borrow_mut().commit_txn(self.id(), self.epoch, number);
        let reply = self.shared.point(self.who, "commit reply").await;
        if !is_committed || fault != Fault::None || reply != Fault::None {
            return replace("commit: fenced, or the answer was lost");
        }
        Ok((publication.committed(), counts, PublishTimes::default()))
    }
}

/// The database as one lane sees it.
pub struct ModelLedger {
    shared: Shared,
    who: Who,
    identity: Identity,
    session: Option<u64>,
    /// Batches that failed.
    refused: u32,
}

fn failed(class: FailureClass, message: impl Into<String>) -> StoreError {
    StoreError { class, sqlstate: None, message: message.into(), identity: None }
}

impl ModelLedger {
    pub fn new(shared: Shared, who: Who, identity: Identity) -> Self {
        Self { shared, who, identity, session: None, refused: 0 }
    }

    /// The session, or a new one; it is put back only after a success.
    async fn take_session(&mut self) -> Result<u64, StoreError> {
        if let Some(epoch) = self.session.take() {
            return Ok(epoch);
        }
        let fault = self.shared.point(self.who, "connect").await;
        let world = self.shared.world.borrow();
        if fault != Fault::None || world.is_db_down() {
            return Err(failed(FailureClass::Transient, "connecting: no answer"));
        }
        if world.db.id != self.identity.database_id {
            let doubt =
                IdentityMismatch::OtherDatabase { expected: self.identity.database_id, found: world.db.id };
            return Err(StoreError {
                class: FailureClass::Persistent,
                sqlstate: None,
                message: doubt.to_string(),
                identity: Some(doubt),
            });
        }
        Ok(world.db_epoch)
    }

    /// Runs one short statement on the session; true means that it takes effect, but the response is lost.
    async fn statement(&self, name: &'static str, session: u64) -> Result<bool, StoreError> {
        let fault = self.shared.point(self.who, name).await;
        if fault == Fault::Hang {
            sleep(LEDGER_TIMEOUT).await;
        }
        if matches!(fault, Fault::Hang | Fault::Before) {
            return Err(failed(FailureClass::Transient, format!("{name}: connection lost")));
        }
        self.is_open(session)?;
        Ok(fault == Fault::After)
    }

    fn is_open(&self, session: u64) -> Result<(), StoreError> {
        let world = self.shared.world.borrow();
        if world.db_epoch != session || world.is_db_down() {
            return Err(failed(FailureClass::Transient, "connection closed"));
        }
        Ok(())
    }

    async fn reply(&mut self, name: &'static str, session: u64, is_lost: bool) -> Result<(), StoreError> {
        let fault = self.shared.point(self.who, name).await;
        if is_lost || fault != Fault::None {
            return Err(failed(FailureClass::Transient, format!("{name}: connection lost")));
        }
        self.session = Some(session);
        Ok(())
    }
}

/// A lane's database transaction, while the lane waits for it.
struct UnderWay {
    shared: Shared,
    who: Who,
}

impl UnderWay {
    fn new(shared: &Shared, who: Who) -> Self {
        shared.world.borrow_mut().writing.insert(who);
        Self { shared: Rc::clone(shared), who }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.shared.world.borrow_mut().writing.remove(&self.who);
    }
}

impl Store for ModelLedger {
    async fn cursors(
        &mut self,
        partitions: &[Partition],
    ) -> Result<Vec<(Partition, Option<CursorRow>)>, StoreError> {
        let session = self.take_session().await?;
        let is_lost = self.statement("cursors", session).await?;
        let rows = {
            let mut world = self.shared.world.borrow_mut();
            world.read_in.insert(self.who, session);
            partitions.iter().map(|p| (*p, world.db.cursors.get(&p.0).cloned())).collect()
        };
        self.reply("cursors reply", session, is_lost).await?;
        Ok(rows)
    }

    async fn store_cursors(
        &mut self,
        rows: &[(Partition, Option<NextOffset>, CursorRow)],
    ) -> Result<(), StoreError> {
        let session = self.take_session().await?;
        let is_lost = self.statement("store_cursors", session).await?;
        {
            let mut world = self.shared.world.borrow_mut();
            let fits = rows.iter().all(|(partition, seen, _)| {
                world.db.cursors.get(&partition.0).map(|row| row.applied) == *seen
            });
            if !fits {
                return Err(failed(FailureClass::Fenced, "a cursor changed while it was taken up"));
            }
            for (partition, _, row) in rows {
                world.note(|| format!("       cursor of {partition} stored: {row:?}"));
                let timestamp = world.db.cursors.get(&partition.0).and_then(|r| r.applied_timestamp);
                let stored = CursorRow { applied_timestamp: timestamp, settled: None, ..row.clone() };
                world.db.cursors.insert(partition.0, stored);
            }
        }
        self.reply("store_cursors reply", session, is_lost).await
    }

    async fn write(
        &mut self,
        batch: &Batch,
        moves: &[CursorMove],
    ) -> Result<(Outcomes, Answer, WriteStats), StoreError> {
        let _under_way = UnderWay::new(&self.shared, self.who);
        let session = self.take_session().await?;
        // If it is dropped before this point, the server rolls back.
        let is_lost = match self.statement("write", session).await {
            Ok(is_lost) => is_lost,
            Err(failure) => {
                self.refused += 1;
                // Every second time the database rejects rows, the cause is ambiguous.
                return Err(match self.refused % 2 {
                    0 => failed(FailureClass::Undecided, "refused"),
                    _ => failure,
                });
            }
        };
        if let Some(refused) = &mut self.shared.world.borrow_mut().refused_writes {
            *refused += 1;
            self.session = Some(session);
            return Err(failed(FailureClass::Undecided, "refused"));
        }
        let (reply, answer) = oneshot::channel();
        let (shared, batch, moves, who) = (Rc::clone(&self.shared), batch.clone(), moves.to_vec(), self.who);
        let delay_ms = {
            let mut world = self.shared.world.borrow_mut();
            if world.plan.has_delays && world.rng.random_ratio(1, 15) {
                world.rng.random_range(0..12_000)
            } else {
                0
            }
        };
        // From here on COMMIT is on its way, even if the lane gives up.
        let server = async move {
            if delay_ms > 0 {
                sleep(Duration::from_millis(delay_ms)).await;
            }
            let mut world = shared.world.borrow_mut();
            if world.db_epoch != session {
                return;
            }
            let written = world.db.write(&batch, &moves);
            world.note(|| {
                let moved: Vec<_> =
                    moves.iter().map(|m| (m.partition.0, m.seen.0, m.applied.0, m.published)).collect();
                match &written {
                    Ok((outcomes, _)) => format!("       COMMIT of {who:?} {moved:?} {:?}", outcomes),
                    Err(error) => format!("       cursor guard against {who:?}: {error}"),
                }
            });
            let _ = reply.send(written);
        };
        if delay_ms > 0 {
            spawn_local(server);
        } else {
            server.await;
        }
        let written = match timeout(LEDGER_TIMEOUT, answer).await {
            Ok(Ok(Ok(written))) => written,
            Ok(Ok(Err(message))) => return Err(failed(FailureClass::Fenced, message)),
            Ok(Err(_)) | Err(_) => return Err(failed(FailureClass::Transient, "COMMIT: no answer")),
        };
        self.reply("write reply", session, is_lost).await?;
        Ok((written.0, written.1, WriteStats::default()))
    }

    async fn move_cursors(&mut self, moves: &[CursorMove]) -> Result<(), StoreError> {
        let session = self.take_session().await?;
        let is_lost = self.statement("move_cursors", session).await?;
        let moved = self.shared.world.borrow_mut().db.guarded(moves);
        if let Err(message) = moved {
            return Err(failed(FailureClass::Fenced, message));
        }
        self.reply("move_cursors reply", session, is_lost).await
    }
}
