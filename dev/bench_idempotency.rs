//! Cost of a claim as the idempotency table grows, and cost of a rotation and a prune for concurrent writers.
//! Fills the table on the server, then writes real batches with the daemon's own store. Prints a table and
//! one JSON line. `make bench-idempotency` starts the servers for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::indexing_slicing)]

#[path = "../src/allocator.rs"]
mod allocator;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use payment_writer::config::Endpoint;
use payment_writer::domain::batch::{Batch, Progress};
use payment_writer::domain::cursor::Identity;
use payment_writer::domain::record::{NextOffset, Offset, Partition, SourceBatch, TimestampMs};
use payment_writer::domain::wire::Rules;
use payment_writer::housekeeping::generations::{self, State};
use payment_writer::ports::{CursorMove, Store, WriteStats};
use payment_writer::postgres::store::PgStore;
use serde_json::json;
use tokio_postgres::Client;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

/// Claims per second against the size of the idempotency table
#[derive(Parser)]
struct Arguments {
    /// The database, with the schema; its contents are replaced
    #[arg(long)]
    database: String,
    /// Millions of ids in the table, ascending
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 10, 30, 100])]
    sizes: Vec<i64>,
    /// Claims in a batch
    #[arg(long, default_value_t = 10_000)]
    batch: usize,
    /// Batches in a measurement
    #[arg(long, default_value_t = 20)]
    batches: usize,
    /// Measurements of each kind; the median is reported, and all are in the JSON line
    #[arg(long, default_value_t = 3)]
    repeat: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Ids {
    V4,
    V7,
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// One lane: a partition of its own, and new ids.
struct Writer {
    store: PgStore,
    partition: Partition,
    seen: NextOffset,
    seed: u64,
}

impl Writer {
    async fn new(arguments: &Arguments, client: &Client, partition: i32) -> Self {
        let database_id = client
            .query_one("SELECT database_id FROM payment_writer.database_identity", &[])
            .await
            .unwrap()
            .get(0);
        let topic_id = Uuid::from_u128(1);
        client
            .execute(
                "INSERT INTO payment_writer.source_cursor (topic, topic_id, partition, applied) VALUES ('bench', $1, $2, 0)
                 ON CONFLICT (topic_id, partition) DO UPDATE SET applied = 0",
                &[&topic_id, &partition],
            )
            .await
            .unwrap();
        let endpoint = Endpoint::parse(&arguments.database).unwrap();
        let pool = endpoint.pool(1).unwrap();
        let store = PgStore::new(pool, "bench".to_owned(), Identity { topic_id, database_id });
        let seed = now_ms().unsigned_abs() << 20;
        Self { store, partition: Partition(partition), seen: NextOffset(0), seed }
    }

    fn id(&mut self, ids: Ids) -> Uuid {
        self.seed += 1;
        let random = xxh3_128(&(self.seed, self.partition.0 as u64).0.to_le_bytes())
            ^ u128::from(self.partition.0 as u64) << 64;
        match ids {
            Ids::V4 => uuid::Builder::from_random_bytes(random.to_be_bytes()).into_uuid(),
            Ids::V7 => {
                let bytes = random.to_be_bytes();
                let mut ten = [0; 10];
                ten.copy_from_slice(&bytes[..10]);
                uuid::Builder::from_unix_timestamp_millis(now_ms().unsigned_abs(), &ten).into_uuid()
            }
        }
    }

    async fn write(&mut self, count: usize, ids: Ids) -> WriteStats {
        let mut source = SourceBatch::new();
        let at = TimestampMs(now_ms());
        for n in 0..count {
            let value = format!(
                r#"{{"messageId":"{}","amount":10.5,"status":2,"currency":"EUR","custId":7,"type":"BWI","comment":"bench"}}"#,
                self.id(ids)
            );
            let offset = Offset(self.seen.0 + n as i64);
            source.push(self.partition, offset, Some(at), Some(b"7"), Some(value.as_bytes()), []);
        }
        let reached = NextOffset(self.seen.0 + count as i64);
        let (partition, seen) = (self.partition, self.seen);
        let progress = Progress { partition, seen, reached, timestamp: None };
        let batch = Batch::assemble(source, vec![progress], &Rules::default());
        let moved = CursorMove { partition, seen, applied: reached, published: None, timestamp: None };
        let (_, _, stats) = self.store.write(&batch, &[moved]).await.unwrap();
        self.seen = reached;
        stats
    }

    /// Claims per second of time spent claiming, over some batches.
    async fn rate(&mut self, arguments: &Arguments, ids: Ids) -> f64 {
        let mut spent = Duration::ZERO;
        for _ in 0..arguments.batches {
            spent += self.write(arguments.batch, ids).await.claim;
        }
        (arguments.batch * arguments.batches) as f64 / spent.as_secs_f64()
    }
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Fills the current generation with random ids, on the server; the index is built afterwards, as that is
/// several times faster and gives the same pages.
async fn fill(client: &Client, leaf: &str, from: i64, to: i64) {
    if from >= to {
        return;
    }
    let fill = format!(
        "SET maintenance_work_mem = '1GB';
         ALTER TABLE payment_writer.{leaf} DROP CONSTRAINT {leaf}_pkey;
         INSERT INTO payment_writer.{leaf} (message_id, source_offset, payload_hash, created_at, source_partition)
             SELECT gen_random_uuid(), n, n, now(), 1000 FROM generate_series({from} + 1, {to}) AS n;
         ALTER TABLE payment_writer.{leaf} ADD PRIMARY KEY (message_id);"
    );
    client.batch_execute(&fill).await.unwrap();
    client.batch_execute(&format!("VACUUM ANALYZE payment_writer.{leaf}")).await.unwrap();
}

async fn measured(
    arguments: &Arguments,
    writer: &mut Writer,
    label: &str,
    results: &mut Vec<serde_json::Value>,
) {
    writer.write(arguments.batch, Ids::V7).await;
    let (mut v4, mut v7) = (Vec::new(), Vec::new());
    for _ in 0..arguments.repeat {
        v7.push(writer.rate(arguments, Ids::V7).await);
        v4.push(writer.rate(arguments, Ids::V4).await);
    }
    println!("{label:<44} {:>10.0} {:>10.0}", median(v4.clone()), median(v7.clone()));
    results.push(json!({"case": label, "v4_claims_per_s": v4.iter().map(|r| r.round()).collect::<Vec<_>>(),
        "v7_claims_per_s": v7.iter().map(|r| r.round()).collect::<Vec<_>>()}));
}

async fn current(client: &Client) -> generations::Generation {
    let all = generations::list(client).await.unwrap();
    all.into_iter().find(|g| g.state == State::Current).unwrap()
}

/// Writes batches until stopped; returns their durations in milliseconds, with the time when each ended.
async fn keep_writing(mut writer: Writer, is_over: Arc<AtomicBool>) -> Vec<(Instant, f64)> {
    let mut taken = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let began = Instant::now();
        writer.write(1_000, Ids::V7).await;
        taken.push((Instant::now(), began.elapsed().as_secs_f64() * 1_000.0));
    }
    taken
}

fn worst(batches: &[(Instant, f64)], from: Instant, to: Instant) -> (f64, f64) {
    let within: Vec<f64> =
        batches.iter().filter(|(at, _)| (from..=to).contains(at)).map(|(_, ms)| *ms).collect();
    let max = within.iter().copied().fold(0.0, f64::max);
    (if within.is_empty() { 0.0 } else { median(within) }, max)
}

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse();
    let (mut client, _driver) = Endpoint::parse(&arguments.database).unwrap().connect().await.unwrap();
    let mut results = Vec::new();
    println!("{:<44} {:>10} {:>10}", "claims a second, median", "v4", "v7");
    let mut filled = 0;
    for size in &arguments.sizes {
        let generation = current(&client).await;
        let wanted = size * 1_000_000;
        fill(&client, &generation.leaf, filled, wanted).await;
        filled = wanted;
        let mut writer = Writer::new(&arguments, &client, i32::try_from(results.len()).unwrap()).await;
        measured(&arguments, &mut writer, &format!("{size} million ids"), &mut results).await;
    }

    // A rotation, and a prune of the big generation, while a lane writes.
    let is_over = Arc::new(AtomicBool::new(false));
    let lane = tokio::spawn(keep_writing(Writer::new(&arguments, &client, 900).await, Arc::clone(&is_over)));
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let big = current(&client).await;
    let next = big.number + 1;
    generations::make(&client, next).await.unwrap();
    let rotated = Instant::now();
    generations::rotate(&client, big.number, next).await.unwrap();
    let closed =
        generations::list(&client).await.unwrap().into_iter().find(|g| g.number == big.number).unwrap();
    let measuring = Instant::now();
    generations::measure(&mut client, &closed).await.unwrap();
    let removing = Instant::now();
    is_over.store(true, Ordering::Relaxed);
    let batches = lane.await.unwrap();
    let (quiet, quiet_max) = worst(&batches, began, rotated);
    let (rotation, rotation_max) = worst(&batches, rotated, measuring + Duration::from_millis(100));
    let (beside, beside_max) = worst(&batches, measuring, removing);

    let label = format!("with {} million ids in an older generation", filled / 1_000_000);
    let mut writer = Writer::new(&arguments, &client, 901).await;
    measured(&arguments, &mut writer, &label, &mut results).await;

    is_over.store(false, Ordering::Relaxed);
    let lane = tokio::spawn(keep_writing(Writer::new(&arguments, &client, 902).await, Arc::clone(&is_over)));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let dropping = Instant::now();
    generations::retire(&client, closed.number).await.unwrap();
    generations::detach(&client, &closed).await.unwrap();
    generations::drop_table(&client, &closed).await.unwrap();
    let dropped = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    is_over.store(true, Ordering::Relaxed);
    let batches = lane.await.unwrap();
    let (prune, prune_max) = worst(&batches, dropping, dropped + Duration::from_secs(1));

    println!("\nbatches of 1,000 during housekeeping, ms:  {:>19} {:>10}", "median", "longest");
    let mut beside_results = Vec::new();
    for (what, median, longest, took) in [
        ("nothing", quiet, quiet_max, rotated - began),
        ("the rotation", rotation, rotation_max, measuring - rotated),
        ("measuring the closed generation", beside, beside_max, removing - measuring),
        ("retire, detach and drop", prune, prune_max, dropped - dropping),
    ] {
        println!("  {what:<34} (took {:>8.3} s) {median:>10.1} {longest:>10.1}", took.as_secs_f64());
        beside_results.push(
            json!({"beside": what, "took_s": took.as_secs_f64(), "median_ms": median, "longest_ms": longest}),
        );
    }
    println!(
        "{}",
        json!({"benchmark": "idempotency", "batch": arguments.batch, "sizes": results, "housekeeping": beside_results})
    );
}
