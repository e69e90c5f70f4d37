//! What happens to the daemon during the soak: load, bursts, records of earlier months, another instance,
//! snapshots, consumers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use payment_writer::config::Settings;
use payment_writer::postgres::schema::months::PARTITIONED_TABLES;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use uuid::Builder;

use super::{Clock, SETTINGS};
use crate::Outcome;
use crate::daemon::Daemon;
use crate::site::{Amount, Expected, Input, Site, failed};

/// Producers are started anew, so that a repeat is never older than `idempotency.window`.
const SEGMENT_SECONDS: u64 = 120;
const SEGMENT_LIMIT: Duration = Duration::from_secs(900);
const BURST_SECONDS: u64 = 20;
const MIXED: [&str; 6] = ["--duplicates", "0.01", "--conflicts", "0.001", "--bad", "0.002"];
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// Records of an earlier month that are sent at once.
const EARLIER_RECORDS: u64 = 20;
/// The first of these months is older than those that stay (`SETTINGS`).
const FIRST_MONTHS: i64 = 5;
const MONTH_MS: i64 = 30 * 24 * 3_600 * 1_000;
/// Segments this small are deleted soon after the bound is reached.
const SEGMENT_BYTES: u64 = 16 << 20;

/// What was sent, and how many of these are new payments.
#[derive(Default)]
pub struct Sent {
    pub records: u64,
    pub written: u64,
}

/// Bounds the topics, but that of dead letters, to equal shares of three fifths of the disk space.
pub fn bound_topics(site: &Site<'_>, disk_gb: u64) -> Outcome<()> {
    let settings = site.settings()?;
    let kafka = &settings.kafka;
    let admin: AdminClient<DefaultClientContext> =
        client(&settings).create().map_err(failed("creating a Kafka client"))?;
    let topics = [&kafka.input_topic, &kafka.read_topic, &kafka.email_topic];
    let share = disk_gb * 600_000_000 / topics.len() as u64;
    let metadata = admin.inner().fetch_metadata(None, REQUEST_LIMIT).map_err(failed("fetching metadata"))?;
    let segment = SEGMENT_BYTES.to_string();
    for topic in topics {
        let found = metadata.topics().iter().find(|found| found.name() == topic);
        let partitions = found.map_or(0, |found| found.partitions().len()).max(1) as u64;
        let bytes = (share / partitions).to_string();
        let config = AlterConfig::new(ResourceSpecifier::Topic(topic))
            .set("cleanup.policy", "delete")
            .set("retention.bytes", &bytes)
            .set("segment.bytes", &segment);
        let options = AdminOptions::new().request_timeout(Some(REQUEST_LIMIT));
        let answers = site.servers.runtime.block_on(admin.alter_configs(&[config], &options));
        for answer in answers.map_err(failed("bounding a topic"))? {
            answer.map_err(|(topic, code)| format!("bounding {topic:?}: {code}"))?;
        }
    }
    Ok(())
}

fn client(settings: &Settings) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &settings.kafka.bootstrap_servers);
    config
}

/// Threads that end when the load is over.
pub struct Loads<'scope>(Vec<ScopedJoinHandle<'scope, ()>>, &'scope Counters);

#[derive(Default)]
pub struct Counters {
    records: AtomicU64,
    written: AtomicU64,
}

impl Counters {
    fn add(&self, records: u64, expected: &Expected) {
        self.records.fetch_add(records, Ordering::Relaxed);
        self.written.fetch_add(expected.written, Ordering::Relaxed);
    }
}

impl Loads<'_> {
    /// Waits for all threads; what they sent.
    pub fn join(self) -> Outcome<Sent> {
        for thread in self.0 {
            thread.join().map_err(|_| "a thread of the load panicked".to_owned())?;
        }
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(Sent { records: count(&self.1.records), written: count(&self.1.written) })
    }
}

/// Starts everything.
pub fn start<'scope, 'env: 'scope>(
    scope: &'scope Scope<'scope, 'env>,
    clock: &'env Clock,
    site: &'env Site<'env>,
    counters: &'env Counters,
    (rate, burst): (u64, u64),
) -> Loads<'scope> {
    type Work<'a> = Box<dyn FnOnce() + Send + 'a>;
    let work: Vec<Work<'env>> = vec![
        Box::new(move || steady(clock, site, counters, rate)),
        Box::new(move || clock.every(60, 600, || self::burst(clock, site, counters, burst))),
        Box::new(move || clock.note(earlier_months(clock, site, counters))),
        // Beside the pass that the daemon makes every five minutes.
        Box::new(move || clock.every(200, 600, || site.run_with(&["prune"], SETTINGS))),
        Box::new(move || clock.every(90, 300, || guest(clock, site))),
        Box::new(move || clock.every(30, 600, || snapshot(clock, site))),
        Box::new(move || clock.every(10, 120, || consume(clock, site))),
    ];
    Loads(work.into_iter().map(|work| scope.spawn(work)).collect(), counters)
}

/// The load, until the end.
fn steady(clock: &Clock, site: &Site<'_>, counters: &Counters, rate: u64) {
    while !clock.is_over() {
        let left = clock.length.saturating_sub(clock.began.elapsed()).as_secs();
        let sent = send(site, counters, rate, left.clamp(1, SEGMENT_SECONDS));
        if sent.is_err() {
            // What it has sent is not known.
            clock.end();
        }
        clock.note(sent);
    }
}

fn send(site: &Site<'_>, counters: &Counters, per_second: u64, seconds: u64) -> Outcome<()> {
    let amount = Amount::Rate { per_second, seconds };
    let sent =
        site.write(Input::Mixed, &MIXED, amount, rand::random::<u32>().into())?.finish(SEGMENT_LIMIT)?;
    counters.add(sent.records, &sent.expected);
    Ok(())
}

fn burst(clock: &Clock, site: &Site<'_>, counters: &Counters, rate: u64) -> Outcome<()> {
    if rate == 0 {
        return Ok(());
    }
    clock.burst_is_on.store(true, Ordering::Release);
    let sent = send(site, counters, rate, BURST_SECONDS);
    clock.burst_is_on.store(false, Ordering::Release);
    sent
}

/// Sends a few payments of an ever earlier month, so that there are months to create and to detach.
fn earlier_months(clock: &Clock, site: &Site<'_>, counters: &Counters) -> Outcome<()> {
    let settings = site.settings()?;
    let producer: BaseProducer<DefaultProducerContext> = client(&settings)
        .set("enable.idempotence", "true")
        .create()
        .map_err(failed("creating a producer"))?;
    let mut months = FIRST_MONTHS - 1;
    clock.every(20, 300, || {
        // The daemon creates months up to two years back.
        months = months % 23 + 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64);
        for account in 1..=EARLIER_RECORDS {
            let id = Builder::from_random_bytes(rand::random()).into_uuid();
            // Few accounts: an old timestamp ends a segment of its partition.
            let account = account % 3;
            let value = format!(
                r#"{{"messageId":"{id}","amount":7.25,"status":2,"currency":"EUR","custId":{account},"type":"BWI","comment":"late"}}"#
            );
            let key = account.to_string();
            let record = BaseRecord::to(&settings.kafka.input_topic).key(&key).payload(&value);
            producer.send(record.timestamp(now - months * MONTH_MS)).map_err(|(error, _)| error.to_string())?;
        }
        producer.flush(REQUEST_LIMIT).map_err(failed("sending payments of earlier months"))?;
        counters.add(EARLIER_RECORDS, &Expected { written: EARLIER_RECORDS, ..Expected::default() });
        Ok(())
    });
    Ok(())
}

/// Another instance joins, and leaves after three minutes.
fn guest(clock: &Clock, site: &Site<'_>) -> Outcome<()> {
    let mut guest = Daemon::start(site, 1, SETTINGS)?;
    clock.pause(Duration::from_secs(180));
    guest.check_alive()?;
    guest.stop()
}

/// Holds a snapshot for three minutes: no row that was deleted meanwhile can be vacuumed.
fn snapshot(clock: &Clock, site: &Site<'_>) -> Outcome<()> {
    site.servers.connected(&site.url, async |client| {
        for statement in [
            "SET idle_in_transaction_session_timeout = 0",
            "BEGIN ISOLATION LEVEL REPEATABLE READ",
            "SELECT 1",
        ] {
            client.batch_execute(statement).await.map_err(failed("holding a snapshot"))?;
        }
        clock.pause(Duration::from_secs(180));
        client.batch_execute("COMMIT").await.map_err(failed("ending a snapshot"))
    })
}

/// A consumer of both events with a group of its own, for a minute.
fn consume(clock: &Clock, site: &Site<'_>) -> Outcome<()> {
    let settings = site.settings()?;
    let consumer: BaseConsumer = client(&settings)
        .set("group.id", format!("{}-console", site.name))
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "latest")
        .create()
        .map_err(failed("creating a consumer"))?;
    let topics = [settings.kafka.read_topic.as_str(), settings.kafka.email_topic.as_str()];
    consumer.subscribe(&topics).map_err(failed("subscribing"))?;
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while std::time::Instant::now() < until && !clock.is_over() {
        if let Some(Err(error)) = consumer.poll(super::TICK) {
            eprintln!("bench: a consumer: {error}");
        }
    }
    Ok(())
}

/// Puts rows of detached months back, where the auditor finds them; the number of all payments.
pub fn put_back_archived(site: &Site<'_>) -> Outcome<u64> {
    site.servers.connected(&site.url, async |client| {
        for table in PARTITIONED_TABLES {
            let detached = client
                .query(
                    "SELECT relname::text FROM pg_class
                     WHERE relnamespace = 'payment_writer'::regnamespace AND relkind = 'r' AND relname LIKE $1",
                    &[&format!("archived_{table}_%")],
                )
                .await
                .map_err(failed("finding detached months"))?;
            for name in detached.iter().map(|row| row.get::<_, &str>(0)) {
                let put_back = format!(
                    "INSERT INTO payment_writer.{table} SELECT * FROM payment_writer.{name};
                     DROP TABLE payment_writer.{name}"
                );
                client.batch_execute(&put_back).await.map_err(failed("putting detached months back"))?;
            }
        }
        let counted = client.query_one("SELECT count(*) FROM payment_writer.payment_core", &[]).await;
        Ok(counted.map_err(failed("counting payments"))?.get::<_, i64>(0).unsigned_abs())
    })
}
