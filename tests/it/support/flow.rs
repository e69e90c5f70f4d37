//! Records sent in the background of a test, written as real producers write them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, Producer};

use super::writer::{COMPRESSIONS, LibrdkafkaWriter, record_of, transaction_size};
use super::{ABORTED_ONE_IN, Message, Scope, TRANSACTION_MAX};

const TICK: Duration = Duration::from_millis(20);
const FLUSH_MAX: Duration = Duration::from_secs(60);
/// A client that delivers nothing for this long has not recovered from an outage of its broker.
const DELIVERY_MAX: Duration = Duration::from_secs(40);
/// Attempts to write records that a broker did not accept.
const TRIES_MAX: u32 = 3;
/// Default size of the largest transaction, in ticks of the flow.
const TRANSACTION_TICKS_MAX: usize = 40;

/// An endless supply of records.
pub trait Source: Send + 'static {
    fn next_record(&mut self) -> Message;
}

/// Writes whole transactions, even during broker outages.
pub trait TransactionWriter: Send + 'static {
    /// Writes records in one transaction and ends it. After an error it is aborted, or its end is unknown;
    /// either way the next call begins a new one.
    fn write(&mut self, records: &[Message], is_committed: bool) -> Result<(), String>;
}

/// What was written so far, by kind of writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Written {
    pub records: usize,
    pub committed: usize,
    pub aborted: usize,
}

/// Records, committed and aborted transactions, and transactions that failed or whose end is unknown.
#[derive(Default)]
struct Tally {
    records: AtomicUsize,
    committed: AtomicUsize,
    aborted: AtomicUsize,
    is_busy: AtomicBool,
}

impl Tally {
    fn written(&self) -> Written {
        let get = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        Written { records: get(&self.records), committed: get(&self.committed), aborted: get(&self.aborted) }
    }
}

struct Job {
    records: Vec<Message>,
    is_aborted_first: bool,
}

/// A writer of transactions on its own thread.
struct Worker {
    jobs: SyncSender<Job>,
    tally: Arc<Tally>,
    /// Records that may be written by now, and the number it waits for.
    credit: f64,
    wanted: usize,
}

impl Worker {
    fn start(writer: Box<dyn TransactionWriter>) -> Worker {
        let (jobs, todo) = sync_channel(1);
        let tally = Arc::new(Tally::default());
        let shared = Arc::clone(&tally);
        std::thread::spawn(move || work(writer, &todo, &shared));
        Worker { jobs, tally, credit: 0.0, wanted: 1 }
    }

    fn is_busy(&self) -> bool {
        self.tally.is_busy.load(Ordering::Acquire)
    }

    /// Hands over the next transaction if there are enough records for it, or if it is the last one.
    fn drive(&mut self, source: &mut impl Source, random: &mut ChaCha8Rng, max: usize, is_last: bool) {
        let saved = self.credit as usize;
        if self.is_busy() || saved == 0 || (saved < self.wanted && !is_last) {
            return;
        }
        // Many records may have accumulated during a broker outage.
        let count = if is_last { saved } else { self.wanted.max(saved / 2) }.min(TRANSACTION_MAX);
        let records = (0..count).map(|_| source.next_record()).collect();
        // One abort for nine commits is one in ten transactions.
        let is_aborted_first = random.random_ratio(1, ABORTED_ONE_IN - 1);
        self.tally.is_busy.store(true, Ordering::Release);
        self.jobs.send(Job { records, is_aborted_first }).expect("the writer's thread has ended");
        self.credit -= count as f64;
        self.wanted = transaction_size(random, max);
    }
}

fn work(mut writer: Box<dyn TransactionWriter>, todo: &Receiver<Job>, tally: &Tally) {
    for job in todo {
        if job.is_aborted_first {
            match writer.write(&job.records, false) {
                Ok(()) => drop(tally.aborted.fetch_add(1, Ordering::Relaxed)),
                Err(error) => eprintln!("the load: aborting a transaction: {error}"),
            }
        }
        // Checks read the log: an aborted transaction has no records, and one that was committed without a
        // response and is written again has duplicates.
        for _ in 0..TRIES_MAX {
            match writer.write(&job.records, true) {
                Ok(()) => {
                    tally.records.fetch_add(job.records.len(), Ordering::Relaxed);
                    tally.committed.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(error) => eprintln!("the load: committing a transaction: {error}"),
            }
        }
        tally.is_busy.store(false, Ordering::Release);
    }
}

/// A producer without transactions. Broker outages only delay its records.
struct Plain {
    config: ClientConfig,
    topic: String,
    producer: BaseProducer,
    delivered_at: Instant,
    waiting: i32,
    tally: Arc<Tally>,
}

impl Plain {
    fn new(scope: &Scope<'_>, compression: &str) -> Plain {
        let mut config = scope.client_config();
        config.set("enable.idempotence", "true").set("compression.type", compression);
        let (topic, producer) = (scope.input_topic.clone(), config.create().unwrap());
        let tally = Arc::new(Tally::default());
        Plain { config, topic, producer, delivered_at: Instant::now(), waiting: 0, tally }
    }

    fn write(&mut self, records: impl Iterator<Item = Message>) {
        let mut added = 0;
        for record in records {
            // Rejected, as by a full queue: it was never sent.
            added += i32::from(self.producer.send(record_of(&self.topic, &record)).is_ok());
        }
        self.tally.records.fetch_add(usize::try_from(added).unwrap(), Ordering::Relaxed);
        self.producer.poll(Duration::ZERO);
        let now = self.producer.in_flight_count();
        if now < self.waiting + added || now == 0 {
            self.delivered_at = Instant::now();
        }
        self.waiting = now;
        // A client may not recover from losing its broker under load. Every check reads the log, so records
        // that never arrived do not count.
        if self.producer.client().fatal_error().is_some() || self.delivered_at.elapsed() > DELIVERY_MAX {
            self.renew();
        }
    }

    fn renew(&mut self) {
        self.producer = self.config.create().unwrap();
        (self.delivered_at, self.waiting) = (Instant::now(), 0);
    }

    fn flush(&mut self) {
        if let Err(error) = self.producer.flush(FLUSH_MAX) {
            eprintln!("the load's client did not deliver the rest, using a new one: {error}");
            self.renew();
        }
    }
}

const RUNS: u8 = 0;
const PAUSES: u8 = 1;
const STOPS: u8 = 2;

#[derive(Default)]
struct Orders {
    wanted: AtomicU8,
    /// Requested pauses, and the last one that has taken effect.
    pauses: AtomicUsize,
    paused: AtomicUsize,
    holds_transactions: AtomicBool,
    are_transactions_held: AtomicBool,
}

/// A flow of records, a third of them without transactions, that continues during broker outages.
pub struct Flow<S> {
    orders: Arc<Orders>,
    tallies: Vec<Arc<Tally>>,
    thread: Option<JoinHandle<S>>,
}

impl<S: Source> Flow<S> {
    /// Sends `per_tick` records every 40 ms on average, two thirds of them in transactions, by librdkafka.
    pub fn start(scope: &Scope<'_>, source: S, per_tick: usize) -> Flow<S> {
        // A slow flow does not accumulate records for many seconds.
        let transaction_max = (per_tick * TRANSACTION_TICKS_MAX).min(TRANSACTION_MAX);
        Flow::run(scope, source, per_tick as f64 / 2.0, transaction_max, None)
    }

    /// As [`Flow::start`], every 20 ms, with transactions of up to `transaction_max` records; the other
    /// writer sends half of the records in transactions, a third of all.
    pub fn start_beside(
        scope: &Scope<'_>,
        source: S,
        per_tick: usize,
        transaction_max: usize,
        other: Box<dyn TransactionWriter>,
    ) -> Flow<S> {
        Flow::run(scope, source, per_tick as f64, transaction_max, Some(other))
    }

    fn run(
        scope: &Scope<'_>,
        mut source: S,
        per_tick: f64,
        transaction_max: usize,
        other: Option<Box<dyn TransactionWriter>>,
    ) -> Flow<S> {
        let orders = Arc::new(Orders::default());
        let shared = Arc::clone(&orders);
        // The order in the log depends on threads and brokers; only the records themselves depend on the
        // seed.
        let mut random = ChaCha8Rng::seed_from_u64(xxhash_rust::xxh3::xxh3_64(scope.input_topic.as_bytes()));
        let mut codec = |from| COMPRESSIONS[random.random_range(from..COMPRESSIONS.len())];
        let mut plain = Plain::new(scope, codec(0));
        let own: Box<dyn TransactionWriter> = Box::new(LibrdkafkaWriter::new(scope, codec(1)));
        let mut workers: Vec<Worker> = [Some(own), other].into_iter().flatten().map(Worker::start).collect();
        let tallies =
            [&plain.tally].into_iter().chain(workers.iter().map(|w| &w.tally)).map(Arc::clone).collect();
        let thread = std::thread::spawn(move || {
            let mut plain_credit = 0.0;
            let mut is_flushed = false;
            loop {
                // In this order: a request for a pause is visible before the pause is counted.
                let pauses = shared.pauses.load(Ordering::Acquire);
                let wanted = shared.wanted.load(Ordering::Acquire);
                let runs = wanted == RUNS;
                if runs {
                    plain_credit += per_tick / 3.0;
                    let share = per_tick * 2.0 / 3.0 / workers.len() as f64;
                    workers.iter_mut().for_each(|worker| worker.credit += share);
                }
                let count = plain_credit as usize;
                plain_credit -= count as f64;
                plain.write((0..count).map(|_| source.next_record()));
                if !runs && !is_flushed {
                    // These first: partitions should end with control records.
                    plain.flush();
                }
                is_flushed = !runs;
                let holds = runs && shared.holds_transactions.load(Ordering::Acquire);
                for worker in workers.iter_mut().filter(|_| !holds) {
                    worker.drive(&mut source, &mut random, transaction_max, !runs);
                }
                let is_any_busy = workers.iter().any(Worker::is_busy);
                shared.are_transactions_held.store(holds && !is_any_busy, Ordering::Release);
                let is_over = !is_any_busy && workers.iter().all(|worker| worker.credit < 1.0);
                if !runs && is_over {
                    shared.paused.store(pauses, Ordering::Release);
                    if wanted == STOPS {
                        return source;
                    }
                }
                std::thread::sleep(TICK);
            }
        });
        Flow { orders, tallies, thread: Some(thread) }
    }

    /// What was written: without transactions, by librdkafka in transactions, by the other writer.
    pub fn written(&self) -> Vec<Written> {
        self.tallies.iter().map(|tally| tally.written()).collect()
    }

    /// Returns when everything sent has arrived and no transaction is open.
    pub fn pause(&self) {
        self.orders.wanted.store(PAUSES, Ordering::Release);
        let this = self.orders.pauses.fetch_add(1, Ordering::AcqRel) + 1;
        while self.orders.paused.load(Ordering::Acquire) < this {
            assert!(!self.thread.as_ref().unwrap().is_finished(), "the load's thread has ended");
            std::thread::sleep(TICK);
        }
    }

    pub fn resume(&self) {
        self.orders.wanted.store(RUNS, Ordering::Release);
    }

    /// Begins no transaction until [`release_transactions`](Self::release_transactions), and returns when
    /// none is open. Other records are still sent.
    pub fn hold_transactions(&self) {
        self.orders.holds_transactions.store(true, Ordering::Release);
        while !self.orders.are_transactions_held.load(Ordering::Acquire) {
            assert!(!self.thread.as_ref().unwrap().is_finished(), "the load's thread has ended");
            std::thread::sleep(TICK);
        }
    }

    pub fn release_transactions(&self) {
        self.orders.holds_transactions.store(false, Ordering::Release);
        self.orders.are_transactions_held.store(false, Ordering::Release);
    }

    /// Stops, and waits until everything sent has arrived and no transaction is open.
    pub fn end(mut self) -> S {
        self.orders.wanted.store(STOPS, Ordering::Release);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl<S> Drop for Flow<S> {
    fn drop(&mut self) {
        self.orders.wanted.store(STOPS, Ordering::Release);
        if let Some(thread) = self.thread.take().filter(|_| !std::thread::panicking()) {
            let _ = thread.join();
        }
    }
}
