//! The maximum rate of the servers: reading, writing and publishing are measured separately, with the
//! daemon's own client settings, as many threads or sessions as it has lanes, and all data prepared
//! beforehand.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future;
use payment_writer::config::{Endpoint, Settings};
use payment_writer::domain::batch::{Batch, Claim, Outcomes, Progress, Refused};
use payment_writer::domain::columns::{COPY_HEADER, COPY_TRAILER};
use payment_writer::domain::cursor::Identity;
use payment_writer::domain::outcome::Outcome as RecordOutcome;
use payment_writer::domain::publication::{OffsetCommit, Publication};
use payment_writer::domain::record::{NextOffset, SourceBatch};
use payment_writer::domain::wire::Rules;
use payment_writer::housekeeping::generations::{self, State};
use payment_writer::kafka::lane_client::lane_reader_config;
use payment_writer::kafka::publisher_settings::PublisherSettings;
use payment_writer::kafka::transactions::{ProducerSlot, Transactions};
use payment_writer::postgres::schema::months;
use payment_writer::postgres::store;
use tokio_postgres::{Client, CopyInSink, Statement};
use uuid::Uuid;

use crate::Outcome;
use crate::processes::{Meter, own_cpu_seconds};
use crate::reader::Reader;
use crate::site::{Amount, Input, Servers, Site, failed};
use crate::throughput::{PRODUCE_LIMIT, settle};

/// Records in a batch: the default of `batch.max_payments`.
const BATCH: usize = 20_000;
/// All batches are prepared in memory, at about 1.5 KB a payment.
const PAYMENTS_MAX: u64 = 1_000_000;
const LIMIT: Duration = Duration::from_secs(300);

/// The ceilings by name, in the order of measurement.
pub const NAMES: [&str; 3] = ["consume alone", "copy alone", "produce alone"];

/// One ceiling, measured once.
#[derive(Clone, Debug)]
pub struct Ceiling {
    pub name: &'static str,
    pub payments: u64,
    pub seconds: f64,
    /// CPU seconds of the broker, of Postgres, and of this process, which acts as the daemon.
    pub cpu: [f64; 3],
}

/// Measures the time of `work`, and its CPU time.
fn metered<T>(
    servers: &Servers,
    name: &'static str,
    payments: u64,
    work: impl FnOnce() -> Outcome<(T, f64)>,
) -> Outcome<(T, Ceiling)> {
    let own = own_cpu_seconds();
    let meter = Meter::start(vec![&servers.broker, &servers.postgres]);
    let (made, seconds) = work()?;
    let used = meter.read();
    let cpu = [used[0], used[1], own_cpu_seconds() - own];
    Ok((made, Ceiling { name, payments, seconds, cpu }))
}

/// Measures each ceiling once.
pub fn measure(servers: &Servers, count: u64, seed: u64) -> Outcome<Vec<Ceiling>> {
    let site = Site::create(servers)?;
    let settings = site.settings()?;
    let count = count.min(PAYMENTS_MAX);
    site.write(Input::Mixed, &["--ids", "v7"], Amount::Count(count), seed)?.finish(PRODUCE_LIMIT)?;

    settle(servers)?;
    let read = metered(servers, NAMES[0], count, || consume(&settings, count, |(), _| {}));
    let (_, consumed) = read?;

    // This time the records are kept.
    let (kept, _) = consume(&settings, count, keep)?;
    let rules = settings.rules();
    let lanes: Vec<Vec<Batch>> =
        kept.into_iter().map(|lane: Lane| lane.batches(&rules)).collect::<Outcome<_>>()?;

    let rows: Vec<Vec<[Bytes; 4]>> = lanes.iter().map(|lane| lane.iter().map(copied).collect()).collect();
    let (sessions, statements) = sessions(&site, lanes.len())?;
    settle(servers)?;
    let (_, copied) = metered(servers, NAMES[1], count, || copy(servers, sessions, &statements, rows))?;

    let publications: Vec<Vec<Publication>> =
        lanes.into_iter().map(|lane| lane.into_iter().map(published).collect()).collect();
    settle(servers)?;
    let producers: Vec<Transactions> =
        (0..publications.len()).map(|lane| producer(&settings, lane)).collect::<Outcome<_>>()?;
    let (_, produced) = metered(servers, NAMES[2], count, || produce(producers, &publications))?;
    Ok(vec![consumed, copied, produced])
}

/// Reads the input topic from its start until `count` records were taken; returns the seconds it took.
fn consume<T: Send + Default>(
    settings: &Settings,
    count: u64,
    take: impl Fn(&mut T, &payment_writer::kafka::librdkafka::NativeRecord<'_>) + Sync,
) -> Outcome<(Vec<T>, f64)> {
    let kafka = &settings.kafka;
    let config = lane_reader_config(kafka);
    let reader = Reader::new(&config, &kafka.input_topic, NextOffset(0), settings.lanes)?;
    let (taken, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let states = (0..settings.lanes).map(|_| T::default()).collect();
    let ended = std::sync::OnceLock::new();
    let began = Instant::now();
    let states = reader.read(LIMIT, states, &is_over, |state, record| {
        take(state, &record);
        if taken.fetch_add(1, Ordering::Relaxed) + 1 == count {
            let _ = ended.set(began.elapsed());
            is_over.store(true, Ordering::Release);
        }
    })?;
    let took = ended.get().copied().unwrap_or_else(|| began.elapsed());
    Ok((states, took.as_secs_f64()))
}

/// Records of one lane, divided into batches.
#[derive(Default)]
struct Lane {
    full: Vec<SourceBatch>,
    filling: SourceBatch,
}

fn keep(lane: &mut Lane, record: &payment_writer::kafka::librdkafka::NativeRecord<'_>) {
    record.copy_into(&mut lane.filling);
    if lane.filling.len() == BATCH {
        lane.full.push(std::mem::take(&mut lane.filling));
    }
}

impl Lane {
    fn batches(self, rules: &Rules) -> Outcome<Vec<Batch>> {
        let Self { mut full, filling } = self;
        if !filling.is_empty() {
            full.push(filling);
        }
        full.into_iter()
            .map(|source| {
                let mut reached = std::collections::BTreeMap::new();
                for record in source.iter() {
                    reached.insert(record.partition, record.offset.next());
                }
                let progress = reached.into_iter().map(|(partition, reached)| Progress {
                    partition,
                    seen: NextOffset(0),
                    reached,
                    timestamp: None,
                });
                let batch = Batch::assemble(source, progress.collect(), rules);
                // The generator makes only valid payments: each of them is written.
                match batch.claims_max() == batch.len() {
                    true => Ok(batch),
                    false => Err("a generated payment is not valid".to_owned()),
                }
            })
            .collect()
    }
}

fn all_written(batch: &Batch) -> Outcomes {
    vec![RecordOutcome::Written; batch.len()]
}

/// Milliseconds in a day.
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;
/// Days from 1970-01-01 to 2000-01-01, the epoch of Postgres.
const POSTGRES_EPOCH_DAYS: i64 = 10_957;

/// A complete binary COPY for each of the four tables.
fn copied(batch: &Batch) -> [Bytes; 4] {
    let rows = batch.rows(&all_written(batch));
    let whole = |rows: &[u8]| Bytes::from([COPY_HEADER, rows, COPY_TRAILER].concat());
    let mut claims = Vec::with_capacity(batch.claims_max() * Claim::ROW_BYTES);
    for claim in batch.claims(&Refused::default()) {
        let day = claim.timestamp.0.div_euclid(DAY_MS) - POSTGRES_EPOCH_DAYS;
        claim.write_row(i32::try_from(day).unwrap_or_default(), &mut claims);
    }
    [whole(&claims), whole(&rows.core.bytes), whole(&rows.metadata.bytes), whole(&rows.notes.bytes)]
}

type Sessions = Vec<(Client, tokio::task::JoinHandle<()>)>;

/// Sessions, and the four COPY statements.
fn sessions(site: &Site<'_>, count: usize) -> Outcome<(Sessions, [String; 4])> {
    let leaf = site.servers.connected(&site.url, async |client| {
        // The daemon creates months before its first row; without them all rows go to the default partitions.
        months::keep(client, None).await.map_err(failed("creating months"))?;
        let all = generations::list(client).await.map_err(failed("reading generations"))?;
        let current = all.into_iter().find(|generation| generation.state == State::Current);
        current.map(|generation| generation.leaf).ok_or_else(|| "there is no current generation".to_owned())
    })?;
    let statement = |table: &str, columns: &str| {
        format!("COPY payment_writer.{table} ({columns}) FROM STDIN (FORMAT binary)")
    };
    let statements = [
        statement(&leaf, "message_id, source_offset, payload_hash, created_at, source_partition, date"),
        statement("payment_core", "payment_id, created_at, cust_id, amount, currency, status, type"),
        statement(
            "payment_metadata",
            "payment_id, created_at, updated_at, version, message_id, source_partition, source_offset",
        ),
        statement("payment_notes", "payment_id, created_at, external_ref_id, comment"),
    ];
    let endpoint = Endpoint::parse(&site.url).map_err(failed("connecting to Postgres"))?;
    let sessions =
        site.servers.runtime.block_on(future::try_join_all((0..count).map(|_| endpoint.connect())));
    Ok((sessions.map_err(failed("connecting to Postgres"))?, statements))
}

async fn copy_batch(
    client: &Client,
    statements: &[Statement],
    batch: [Bytes; 4],
) -> Result<(), tokio_postgres::Error> {
    client.batch_execute("BEGIN").await?;
    // In one round trip, as in the daemon.
    future::try_join_all(statements.iter().zip(batch).map(|(statement, rows)| async move {
        let sink: CopyInSink<Bytes> = client.copy_in(statement).await?;
        let mut sink = std::pin::pin!(sink);
        store::feed(sink.as_mut(), rows).await?;
        sink.finish().await
    }))
    .await?;
    client.batch_execute("COMMIT").await
}

fn copy(
    servers: &Servers,
    sessions: Sessions,
    statements: &[String; 4],
    lanes: Vec<Vec<[Bytes; 4]>>,
) -> Outcome<((), f64)> {
    servers.runtime.block_on(async {
        let mut ready = Vec::new();
        for (client, driver) in sessions {
            let prepared = future::try_join_all(statements.iter().map(|sql| client.prepare(sql)));
            ready.push((prepared.await.map_err(failed("preparing COPY"))?, client, driver));
        }
        let began = Instant::now();
        let work: Vec<_> = ready
            .into_iter()
            .zip(lanes)
            .map(|((statements, client, _driver), batches)| {
                tokio::spawn(async move {
                    for batch in batches {
                        copy_batch(&client, &statements, batch).await?;
                    }
                    Ok::<(), tokio_postgres::Error>(())
                })
            })
            .collect();
        let all = tokio::time::timeout(LIMIT, future::try_join_all(work));
        let all = all.await.map_err(|_| format!("copying took longer than {} s", LIMIT.as_secs()))?;
        let took = began.elapsed().as_secs_f64();
        for outcome in all.map_err(failed("copying"))? {
            outcome.map_err(|error| {
                format!("copying: {}", payment_writer::postgres::connection::describe(&error))
            })?;
        }
        Ok(((), took))
    })
}

fn published(batch: Batch) -> Publication {
    let outcomes = all_written(&batch);
    let span = |p: &Progress| OffsetCommit {
        partition: p.partition,
        publish_from: NextOffset(0),
        commit: p.reached,
    };
    let spans = batch.progress().iter().map(span).collect();
    Publication::of_batch(batch, outcomes, spans, true)
}

/// A producer like that of the daemon's lane, ready to begin a transaction.
fn producer(settings: &Settings, lane: usize) -> Outcome<Transactions> {
    let kafka = &settings.kafka;
    // Nothing reads the topic and the database that the events name.
    let identity = Identity { topic_id: Uuid::nil(), database_id: Uuid::nil() };
    let mut producer =
        Transactions::new(PublisherSettings::of(kafka, &identity, lane), ProducerSlot::default());
    producer.init().map_err(failed("init_transactions"))?;
    Ok(producer)
}

fn produce(producers: Vec<Transactions>, lanes: &[Vec<Publication>]) -> Outcome<((), f64)> {
    let start = Barrier::new(producers.len() + 1);
    std::thread::scope(|scope| {
        let start = &start;
        let work: Vec<_> = producers
            .into_iter()
            .zip(lanes)
            .map(|(mut producer, batches)| {
                scope.spawn(move || {
                    start.wait();
                    let outcome =
                        batches.iter().try_for_each(|batch| producer.publish(batch, None).map(|_| ()));
                    // Measured before the client is dropped, which takes time.
                    (outcome, Instant::now())
                })
            })
            .collect();
        start.wait();
        let began = Instant::now();
        let mut last = began;
        for lane in work {
            let (outcome, ended) = lane.join().map_err(|_| "a producing thread panicked".to_owned())?;
            outcome.map_err(failed("producing in a transaction"))?;
            last = last.max(ended);
        }
        Ok(((), (last - began).as_secs_f64()))
    })
}

#[cfg(test)]
mod tests {
    use payment_writer::domain::record::{Partition, TimestampMs};

    use super::*;

    #[test]
    fn a_batch_becomes_four_copies_of_as_many_rows() {
        let mut lane = Lane::default();
        for n in 0..3 {
            let value = format!(
                r#"{{"messageId":"0197b2a4-5f0e-7c3a-9d1e-2f4b8c6d7e{n:02x}","amount":1,"status":2,"currency":"EUR","custId":7,"type":"BWI"}}"#
            );
            lane.filling.push(
                Partition(4),
                payment_writer::domain::record::Offset(n),
                Some(TimestampMs(1_751_050_608_500)),
                Some(b"7"),
                Some(value.as_bytes()),
                [],
            );
        }
        let batches = lane.batches(&Rules::default()).unwrap();
        let [claims, core, _, notes] = copied(&batches[0]);
        // Header, trailer, and three rows of 2 + 6 * 4 + (16 + 8 + 8 + 8 + 4 + 4) bytes.
        assert_eq!(claims.len(), 21 + 3 * 74);
        assert!(core.len() > 21 && notes.len() == 21);
        let mut sent = 0;
        let publication = published(batches.into_iter().next().unwrap());
        let counts = publication.for_each_output::<()>("in", Uuid::nil(), |_| {
            sent += 1;
            Ok(())
        });
        assert_eq!((sent, counts.unwrap().by_topic), (6, [3, 3, 0]));
    }

    #[test]
    fn a_record_that_is_no_payment_is_told() {
        let mut lane = Lane::default();
        lane.filling.push(
            Partition(0),
            payment_writer::domain::record::Offset(0),
            None,
            None,
            Some(b"{}"),
            [],
        );
        assert!(lane.batches(&Rules::default()).is_err());
    }
}
