//! Payments a second by batch size and number of lanes, on a real Postgres and a real Kafka. `make
//! bench-sizing` runs it; it prints a table and, with `BENCH_SIZING_PICTURE=FILE.svg`, draws a chart.
//!
//! Each lane does what a lane of the daemon does during a backlog: it builds a batch of new payments, writes
//! it with its `PgStore`, and at the same time publishes the batch before, with group offsets, with its
//! `LaneClient`. Only fetching is left out: records of the lane's own partitions are made in memory
//! beforehand. One iteration is one batch of every lane.
//!
//! Servers: those of `PAYMENT_WRITER__POSTGRES__URL` and `PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS` if both
//! are set, with a separate database and topics that it removes at the end (the role must be allowed to
//! create databases, or `DEV_POSTGRES_ADMIN_URL` must name one that is); otherwise it starts servers with
//! `dev/servers`. `BENCH_SIZING_SIZES` and `BENCH_SIZING_LANES` select sizes and lanes (numbers separated by
//! commas).
// The benchmark uses its own clients.
#![allow(clippy::disallowed_methods)]
#![allow(missing_docs)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing
)]

#[path = "../src/allocator.rs"]
mod allocator;
mod support;

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use futures_util::future::{join, join_all};
use payment_writer::config::{Endpoint, Settings};
use payment_writer::domain::batch::{Batch, Progress};
use payment_writer::domain::cursor::{CursorRow, Identity};
use payment_writer::domain::publication::{OffsetCommit, OutputTopic, Publication};
use payment_writer::domain::record::{NextOffset, Partition, SourceBatch, TimestampMs};
use payment_writer::domain::wire::Rules;
use payment_writer::kafka::client::{base_client_config, partition_counts};
use payment_writer::kafka::group::{Group, LaneHandle, lane_of};
use payment_writer::kafka::lane_client::LaneClient;
use payment_writer::kafka::librdkafka::topic_id;
use payment_writer::kafka::publisher_settings::PublisherSettings;
use payment_writer::ports::{CursorMove, KafkaPort, LaneEvent, Store};
use payment_writer::postgres::binding;
use payment_writer::postgres::schema::{self, months};
use payment_writer::postgres::store::PgStore;
use payment_writer::telemetry::status::StatusRegistry;
use plotters::prelude::*;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use support::{PARTITIONS, Share};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc};
use uuid::Uuid;

const SIZES: [usize; 10] = [1, 10, 20, 50, 100, 500, 1_000, 5_000, 10_000, 20_000];
const LANES: [usize; 4] = [1, 2, 3, 4];
const SAMPLES: usize = 10;
/// One colour for each number of lanes: the Okabe-Ito palette, which is safe for colour blindness.
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];
const OUTPUT_PARTITIONS: i32 = 20;
/// Payments made in memory before each measurement, for all lanes together.
const PREPARED_MAX: usize = 200_000;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for the group's first assignment, and for the creation of topics.
const PATIENCE: Duration = Duration::from_secs(60);
const BATCH_PATIENCE: Duration = Duration::from_secs(60);

const POSTGRES_URL: &str = "PAYMENT_WRITER__POSTGRES__URL";
const BOOTSTRAP_SERVERS: &str = "PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS";
const ADMIN_URL: &str = "DEV_POSTGRES_ADMIN_URL";

// ---- Servers -------------------------------------------------------------------------------------------------

fn dev_servers(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/servers"))
        .args(arguments)
        .arg("--dir")
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "dev/servers {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The URL of another database on the same server.
fn with_database(url: &str, database: &str) -> String {
    let (address, parameters) = url.split_once('?').map_or((url, ""), |(a, p)| (a, p));
    let (server, _) = address.rsplit_once('/').unwrap();
    let separator = if parameters.is_empty() { "" } else { "?" };
    format!("{server}/{database}{separator}{parameters}")
}

/// Resources of this run, removed when dropped.
#[derive(Clone)]
struct Traces {
    /// Servers started here; otherwise the database and the topics.
    own_servers: Option<PathBuf>,
    admin_url: String,
    database: String,
    settings: Settings,
}

impl Traces {
    fn topics(&self) -> [&str; 4] {
        let kafka = &self.settings.kafka;
        [&kafka.input_topic, &kafka.read_topic, &kafka.email_topic, &kafka.dead_letter_topic]
    }

    async fn remove(&self) {
        if let Some(dir) = &self.own_servers {
            dev_servers(dir, &["destroy"]);
            return;
        }
        let removed = async {
            let (client, _driver) = Endpoint::parse(&self.admin_url).unwrap().connect().await?;
            client.batch_execute(&format!("DROP DATABASE \"{}\" WITH (FORCE)", self.database)).await?;
            let admin: AdminClient<DefaultClientContext> =
                base_client_config(&self.settings.kafka).create()?;
            admin.delete_topics(&self.topics(), &admin_options()).await?;
            Ok::<_, Box<dyn Error>>(())
        };
        if let Err(error) = removed.await {
            println!("database {} and its topics could not be removed: {error}", self.database);
        }
    }
}

fn admin_options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT)).operation_timeout(Some(REQUEST_TIMEOUT))
}

/// Servers with an empty database and empty topics.
struct World {
    runtime: Runtime,
    traces: Traces,
    identity: Identity,
    url: String,
    seed: u64,
}

impl World {
    fn start() -> Self {
        let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build().unwrap();
        let given = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let name = format!("sizing_{}", std::process::id());
        let mut variables: HashMap<OsString, OsString> = std::env::vars_os()
            .filter(|(name, _)| name.to_str().is_some_and(|name| name.starts_with("PAYMENT_WRITER__")))
            .collect();
        let (servers_url, admin_url, own_servers) = match (given(POSTGRES_URL), given(BOOTSTRAP_SERVERS)) {
            (Some(url), Some(_)) => (url.clone(), given(ADMIN_URL).unwrap_or(url), None),
            _ => {
                let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
                let owner = std::process::id().to_string();
                let text = dev_servers(&dir, &["up", "--owner-pid", &owner]);
                let pair = |line: &str| {
                    let (name, value) = line.strip_prefix("export ")?.split_once('=')?;
                    Some((name.to_owned(), value.to_owned()))
                };
                let found: HashMap<String, String> = text.lines().filter_map(pair).collect();
                variables.insert(BOOTSTRAP_SERVERS.into(), found[BOOTSTRAP_SERVERS].clone().into());
                (found[POSTGRES_URL].clone(), found[ADMIN_URL].clone(), Some(dir))
            }
        };
        let url = with_database(&servers_url, &name);
        for (setting, value) in [
            ("POSTGRES__URL", url.clone()),
            ("POSTGRES__HOUSEKEEPING_URL", url.clone()),
            ("KAFKA__INSTANCE_ID", "sizing".to_owned()),
            ("KAFKA__INPUT_TOPIC", format!("{name}_input")),
            ("KAFKA__READ_TOPIC", format!("{name}_read")),
            ("KAFKA__EMAIL_TOPIC", format!("{name}_email")),
            ("KAFKA__DEAD_LETTER_TOPIC", format!("{name}_dlq")),
        ] {
            variables.insert(format!("PAYMENT_WRITER__{setting}").into(), value.into());
        }
        let settings = Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap().settings;
        let traces = Traces { own_servers, admin_url, database: name, settings };
        let at_signal = traces.clone();
        runtime.spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                at_signal.remove().await;
                std::process::exit(130);
            }
        });
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let identity = Identity { topic_id: Uuid::nil(), database_id: Uuid::nil() };
        // Complete enough to be removed if anything fails from here on.
        let mut world = Self { runtime, traces, identity, url, seed };
        world.identity = world.runtime.block_on(make(&world.traces, &world.url));
        world
    }

    /// Each measurement starts with empty tables, just after a checkpoint if the role may run one, so that it
    /// does not depend on the one before.
    async fn empty_tables(&self) {
        let (client, _driver) = Endpoint::parse(&self.url).unwrap().connect().await.unwrap();
        client
            .batch_execute(
                "TRUNCATE payment_writer.payment_core, payment_writer.payment_metadata,
                     payment_writer.payment_notes, payment_writer.idempotency",
            )
            .await
            .unwrap();
        if let Ok((admin, _driver)) = Endpoint::parse(&self.traces.admin_url).unwrap().connect().await {
            let _ = admin.batch_execute("CHECKPOINT").await;
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.runtime.block_on(self.traces.remove());
    }
}

/// The parts of a URL; its parameters are used by the client.
fn config(url: &str) -> tokio_postgres::Config {
    url.split('?').next().unwrap_or(url).parse().unwrap()
}

/// Creates the database with its schema, and the topics; returns their names.
async fn make(traces: &Traces, url: &str) -> Identity {
    let (admin, _driver) = Endpoint::parse(&traces.admin_url).unwrap().connect().await.unwrap();
    let (admin_config, owner_config) = (config(&traces.admin_url), config(url));
    // A database created by an administrator is given to the role that uses it.
    let owner = match (admin_config.get_user(), owner_config.get_user()) {
        (Some(admin), Some(owner)) if admin != owner => format!(" OWNER \"{owner}\""),
        _ => String::new(),
    };
    admin.batch_execute(&format!("CREATE DATABASE \"{}\"{owner}", traces.database)).await.unwrap();
    let (mut client, _driver) = Endpoint::parse(url).unwrap().connect().await.unwrap();
    schema::migrate(&mut client).await.unwrap();
    months::keep(&mut client, None).await.unwrap();
    let database_id = binding::database_id(&client).await.unwrap();

    let kafka = &traces.settings.kafka;
    let admin: AdminClient<DefaultClientContext> = base_client_config(kafka).create().unwrap();
    let names = traces.topics();
    let topics = names.iter().enumerate().map(|(index, name)| {
        let partitions = if index == 0 { PARTITIONS as i32 } else { OUTPUT_PARTITIONS };
        NewTopic::new(name, partitions, TopicReplication::Fixed(-1))
    });
    for result in admin.create_topics(&topics.collect::<Vec<_>>(), &admin_options()).await.unwrap() {
        result.unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    while !partition_counts(admin.inner()).is_ok_and(|c| names.iter().all(|name| c.contains_key(*name))) {
        assert!(Instant::now() < deadline, "the topics cannot be used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let group = Group::observer(&traces.settings.kafka).unwrap();
    let (topic_id, _) = topic_id(group.consumer(), group.topic(), REQUEST_TIMEOUT).unwrap();
    Identity { topic_id, database_id }
}

// ---- Lanes ---------------------------------------------------------------------------------------------------

/// Positions of a partition, as a lane keeps them.
struct Positions {
    applied: NextOffset,
    committed: NextOffset,
    /// `published` as last written to the database.
    stored: NextOffset,
}

type Prepared = Vec<(SourceBatch, Vec<Progress>)>;

/// A lane of the daemon during a backlog.
struct Lane {
    log: LaneClient,
    store: PgStore,
    share: Share,
    rules: Arc<Rules>,
    positions: BTreeMap<Partition, Positions>,
    pending: Option<Arc<Publication>>,
}

impl Lane {
    /// Cursor moves written with a batch: its own, and what was published since the last ones.
    fn moves(&self, progress: &[Progress]) -> Vec<CursorMove> {
        let by_partition: HashMap<Partition, &Progress> = progress.iter().map(|p| (p.partition, p)).collect();
        let moved = self.positions.iter().filter_map(|(partition, at)| {
            let own = by_partition.get(partition);
            let published = (at.stored != at.committed).then_some(at.committed);
            (own.is_some() || published.is_some()).then(|| CursorMove {
                partition: *partition,
                seen: at.applied,
                applied: own.map_or(at.applied, |p| p.applied()),
                published,
                timestamp: own.and_then(|p| p.timestamp),
            })
        });
        moved.collect()
    }

    /// Writes the batch, and publishes the one before it at the same time.
    async fn step(&mut self, batch: Option<(SourceBatch, Vec<Progress>)>) {
        let batch = batch.map(|(source, progress)| Batch::assemble(source, progress, &self.rules));
        let moves = batch.as_ref().map(|batch| self.moves(batch.progress())).unwrap_or_default();
        let Self { log, store, pending, .. } = self;
        let write = async {
            match &batch {
                Some(batch) => Some(store.write(batch, &moves).await.unwrap().0),
                None => None,
            }
        };
        let publish = async {
            match pending.as_ref() {
                Some(publication) => {
                    let (published, counts, _) = log.publish(publication).await.unwrap();
                    // Every payment is new: one that was not written would have no read event.
                    assert_eq!(
                        counts.by_topic[OutputTopic::Read.index()],
                        publication.outcomes().len() as u64
                    );
                    Some(published)
                }
                None => None,
            }
        };
        let (outcomes, published) = join(write, publish).await;
        for moved in &moves {
            if let Some(at) = self.positions.get_mut(&moved.partition) {
                at.applied = moved.applied;
                at.stored = moved.published.unwrap_or(at.stored);
            }
        }
        for (partition, committed) in published.iter().flat_map(|published| published.positions()) {
            if let Some(at) = self.positions.get_mut(partition) {
                at.committed = *committed;
            }
        }
        self.pending = batch.zip(outcomes).map(|(batch, outcomes)| {
            let span = |p: &Progress| OffsetCommit {
                partition: p.partition,
                publish_from: p.seen,
                commit: p.reached,
            };
            let spans = batch.progress().iter().map(span).collect();
            Arc::new(Publication::of_batch(batch, outcomes, spans, true))
        });
    }

    async fn run(mut self, batches: Prepared) -> Self {
        for batch in batches {
            tokio::time::timeout(BATCH_PATIENCE, self.step(Some(batch)))
                .await
                .expect("a batch took too long");
        }
        self
    }
}

/// Lanes of a single member of a group, which has all partitions.
struct Stand {
    lanes: Vec<Lane>,
    group: Group,
}

impl Stand {
    async fn open(world: &World, lanes: usize) -> Self {
        let mut settings = world.traces.settings.clone();
        // A separate group each time, without waiting until the one before is removed.
        settings.kafka.group_id = format!("{}_{lanes}", world.traces.database);
        let kafka = settings.kafka.clone();
        let (mut handles, mut receivers) = (Vec::new(), Vec::new());
        for _ in 0..lanes {
            let (events, receiver) = mpsc::channel(64);
            handles.push(LaneHandle { events, unhandled_revocations: Arc::new(AtomicI64::new(0)) });
            receivers.push(receiver);
        }
        let status = Arc::new(StatusRegistry::default());
        let (group, _end) = Group::new(&kafka, handles.clone(), status).unwrap();
        group.join().unwrap();
        let assigned = join_all(receivers.into_iter().map(all_assigned));
        let counts = tokio::time::timeout(PATIENCE, assigned).await.expect("no partitions were assigned");
        assert_eq!(counts.iter().sum::<usize>(), PARTITIONS);

        let (client, _driver) = Endpoint::parse(&world.url).unwrap().connect().await.unwrap();
        client.batch_execute("DELETE FROM payment_writer.source_cursor").await.unwrap();
        let pool = Endpoint::parse(&world.url).unwrap().pool(lanes * 2).unwrap();
        let rules = Arc::new(settings.rules());
        let mut stand = Self { lanes: Vec::new(), group };
        for (index, handle) in handles.into_iter().enumerate() {
            let publisher = PublisherSettings::of(&kafka, &world.identity, index);
            let suspicion = Arc::new(Notify::new());
            let mut log = LaneClient::new(stand.group.clone(), publisher, &handle, suspicion);
            log.renew().await.unwrap();
            let mut store = PgStore::new(pool.clone(), kafka.input_topic.clone(), world.identity.clone());
            let zero = NextOffset(0);
            let row =
                CursorRow { applied: zero, published: Some(zero), applied_timestamp: None, settled: None };
            let partitions = (0..PARTITIONS as i32).map(Partition).filter(|p| lane_of(*p, lanes) == index);
            let rows: Vec<_> = partitions.map(|partition| (partition, None, row.clone())).collect();
            store.store_cursors(&rows).await.unwrap();
            let at = || Positions { applied: zero, committed: zero, stored: zero };
            stand.lanes.push(Lane {
                log,
                store,
                share: Share::new(world.seed ^ (lanes * 8 + index) as u64, index, lanes),
                rules: Arc::clone(&rules),
                positions: rows.iter().map(|(partition, ..)| (*partition, at())).collect(),
                pending: None,
            });
        }
        stand
    }

    /// The time that this many batches of every lane take.
    async fn run(&mut self, size: usize, iterations: u64) -> Duration {
        let at_once = (PREPARED_MAX / (size * self.lanes.len())).max(1);
        let mut left = usize::try_from(iterations).unwrap();
        let mut taken = Duration::ZERO;
        while left > 0 {
            let count = left.min(at_once);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
            let now = TimestampMs(i64::try_from(now).unwrap());
            let prepared: Vec<Prepared> = self
                .lanes
                .iter_mut()
                .map(|lane| (0..count).map(|_| lane.share.take(size, now)).collect())
                .collect();
            let lanes = std::mem::take(&mut self.lanes);
            let began = Instant::now();
            let running: Vec<_> = lanes
                .into_iter()
                .zip(prepared)
                .map(|(lane, batches)| tokio::spawn(lane.run(batches)))
                .collect();
            for lane in join_all(running).await {
                self.lanes.push(lane.unwrap());
            }
            taken += began.elapsed();
            left -= count;
        }
        taken
    }

    /// Publishes the last batches.
    async fn finish(&mut self) {
        for lane in &mut self.lanes {
            lane.step(None).await;
        }
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.group.close();
    }
}

/// Waits for a lane's first partitions; later events are ignored, as after a drain.
async fn all_assigned(mut events: mpsc::Receiver<LaneEvent>) -> usize {
    match events.recv().await {
        Some(LaneEvent::Assigned(partitions)) => partitions.len(),
        _ => panic!("expected an assignment"),
    }
}

// ---- Results -------------------------------------------------------------------------------------------------

/// Payments a second by number of lanes and batch size.
type Rates = BTreeMap<usize, BTreeMap<usize, f64>>;

fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn print_table(rates: &Rates) {
    let sizes: Vec<usize> = rates.values().flat_map(|line| line.keys().copied()).collect();
    let sizes = std::collections::BTreeSet::from_iter(sizes);
    let names = rates.keys().map(|lanes| format!(" {lanes} lane{} |", if *lanes == 1 { "" } else { "s" }));
    println!(
        "\nPayments a second, and in brackets µs a payment:\n\n| payments a batch |{}",
        names.collect::<String>()
    );
    println!("| - |{}", " - |".repeat(rates.len()));
    for size in sizes {
        let cells = rates.values().map(|line| match line.get(&size) {
            Some(rate) => format!(" {} ({:.1}) |", thousands(*rate), 1e6 / rate),
            None => " |".to_owned(),
        });
        println!("| {} |{}", thousands(size as f64), cells.collect::<String>());
    }
}

fn draw(rates: &Rates, file: &str) -> Result<(), Box<dyn Error>> {
    let points = || rates.values().flatten();
    let smallest = points().map(|(size, _)| *size).min().unwrap_or(1) as f64;
    let largest = points().map(|(size, _)| *size).max().unwrap_or(1) as f64;
    let most = points().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let root = SVGBackend::new(file, (900, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Payments a second against the size of a batch", ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(80)
        .build_cartesian_2d((smallest..largest * 1.2).log_scale(), 0.0..most * 1.1)?;
    chart
        .configure_mesh()
        .x_desc("payments a batch (logarithmic)")
        .y_desc("payments a second")
        .x_label_formatter(&|x| thousands(*x))
        .y_label_formatter(&|y| thousands(*y))
        .label_style(("sans-serif", 15))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    for ((lanes, line), colour) in rates.iter().zip(COLOURS.iter().cycle()) {
        let line: Vec<(f64, f64)> = line.iter().map(|(size, rate)| (*size as f64, *rate)).collect();
        let name = format!("{lanes} lane{}", if *lanes == 1 { "" } else { "s" });
        chart
            .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)))?
            .label(name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], colour.stroke_width(2)));
        chart.draw_series(line.into_iter().map(|point| Circle::new(point, 4, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.4))
        .label_font(("sans-serif", 15))
        .draw()?;
    root.present()?;
    Ok(())
}

// ---- Measuring -----------------------------------------------------------------------------------------------

fn chosen(variable: &str, otherwise: &[usize]) -> Vec<usize> {
    match std::env::var(variable) {
        Ok(text) => text.split(',').map(|n| n.trim().parse().expect("numbers separated by commas")).collect(),
        Err(_) => otherwise.to_vec(),
    }
}

/// The median of the last calls, which are criterion's samples; earlier calls are its warm-up.
fn median_rate(calls: &[f64]) -> Option<f64> {
    let mut samples = calls[calls.len().saturating_sub(SAMPLES)..].to_vec();
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied()
}

fn sizing(criterion: &mut Criterion, world: &mut Option<World>) -> Rates {
    let mut rates = Rates::new();
    let mut group = criterion.benchmark_group("sizing");
    group.sampling_mode(SamplingMode::Flat);
    for lanes in chosen("BENCH_SIZING_LANES", &LANES) {
        let mut stand: Option<Stand> = None;
        for size in chosen("BENCH_SIZING_SIZES", &SIZES) {
            let payments = size * lanes;
            let mut calls = Vec::new();
            group.throughput(Throughput::Elements(payments as u64));
            group.bench_function(BenchmarkId::new(format!("{lanes} lanes"), size), |b| {
                // Only if something is measured: with a list or a filter there may be nothing.
                let world = world.get_or_insert_with(World::start);
                if stand.is_none() {
                    stand = Some(world.runtime.block_on(Stand::open(world, lanes)));
                }
                let Some(stand) = &mut stand else { return };
                if calls.is_empty() {
                    world.runtime.block_on(async {
                        world.empty_tables().await;
                        // Opens sessions, prepares statements, and leaves a batch to publish.
                        stand.run(size, 2).await;
                    });
                }
                b.iter_custom(|iterations| {
                    let taken = world.runtime.block_on(stand.run(size, iterations));
                    calls.push((payments as u64 * iterations) as f64 / taken.as_secs_f64());
                    taken
                });
            });
            if let (Some(world), Some(stand)) = (&world, &mut stand) {
                world.runtime.block_on(stand.finish());
            }
            if let Some(rate) = median_rate(&calls) {
                rates.entry(lanes).or_default().insert(size, rate);
            }
        }
    }
    group.finish();
    rates
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .nresamples(10_000)
        .configure_from_args();
    let mut world = None;
    let rates = sizing(&mut criterion, &mut world);
    drop(world);
    if rates.is_empty() {
        return;
    }
    print_table(&rates);
    if let Ok(file) = std::env::var("BENCH_SIZING_PICTURE") {
        draw(&rates, &file).expect("the chart could not be written");
        println!("\n{file}");
    }
    criterion.final_summary();
}
