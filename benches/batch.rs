//! Cost of a batch between the log and the database, and between the database and the outputs, without
//! parsing and encoding (`wire`) and without the servers. Throughput is in payments.
#![allow(missing_docs)]

#[path = "../src/allocator.rs"]
mod allocator;
mod support;

use std::convert::Infallible;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use payment_writer::domain::batch::{
    Answer, Batch, Progress, Refused, write_core_row, write_metadata_row, write_notes_row,
};
use payment_writer::domain::cursor::{
    CommitMetadata, CursorRow, GroupOffset, Identity, Known, LogBounds, Mode, OutputScan, Settlement, decide,
};
use payment_writer::domain::publication::{OffsetCommit, Publication};
use payment_writer::domain::record::NextOffset;
use payment_writer::domain::wire::{Rules, parse};
use support::{batch_of, duplicates, lanes_partitions};
use uuid::Uuid;

const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];
const TOPIC_ID: Uuid = Uuid::from_u128(0x1234_5678_9abc_def0_1234_5678_9abc_def0);
const DATABASE_ID: Uuid = Uuid::from_u128(0x0fed_cba9_8765_4321_0fed_cba9_8765_4321);

fn assembled(count: usize) -> Batch {
    let (source, progress) = batch_of(count);
    Batch::assemble(source, progress, &Rules::default())
}

/// The rows of one payment, as they go into COPY.
fn columns(c: &mut Criterion) {
    let (source, _) = batch_of(1);
    let rules = Rules::default();
    let Some(record) = source.get(0) else { return };
    let Ok(payment) = parse(&record, &rules) else { return };
    let id = payment.payment_id();
    let mut out = Vec::with_capacity(4_096);
    let mut group = c.benchmark_group("columns");
    group.throughput(Throughput::Elements(1));
    group.bench_function("core", |b| {
        b.iter(|| {
            out.clear();
            let payment = black_box(&payment);
            write_core_row(payment, id, &mut out);
            out.len()
        });
    });
    group.bench_function("metadata", |b| {
        b.iter(|| {
            out.clear();
            let payment = black_box(&payment);
            write_metadata_row(payment, id, &record, &mut out);
            out.len()
        });
    });
    group.bench_function("notes", |b| {
        b.iter(|| {
            out.clear();
            let payment = black_box(&payment);
            write_notes_row(payment, id, &mut out);
            out.len()
        });
    });
    group.finish();
}

fn batches(c: &mut Criterion) {
    let rules = Rules::default();
    let none = Refused::default();
    let mut group = c.benchmark_group("batch");
    for size in SIZES {
        group.throughput(Throughput::Elements(size as u64));
        let (source, progress) = batch_of(size);
        group.bench_function(BenchmarkId::new("assemble", size), |b| {
            b.iter_batched(
                || (source.clone(), progress.clone()),
                |(source, progress)| Batch::assemble(source, progress, &rules),
                BatchSize::LargeInput,
            );
        });
        let batch = assembled(size);
        group.bench_function(BenchmarkId::new("claims", size), |b| {
            b.iter(|| batch.claims(&none).fold(0_u8, |sum, claim| sum ^ black_box(&claim).message_id[15]));
        });
        for (name, answer) in [("no", Answer::default()), ("1 %", duplicates(&batch))] {
            group.bench_function(BenchmarkId::new(format!("decide, {name} duplicates"), size), |b| {
                b.iter(|| batch.decide(black_box(&answer), &none));
            });
            let outcomes = batch.decide(&answer, &none);
            group.bench_function(BenchmarkId::new(format!("rows, {name} duplicates"), size), |b| {
                b.iter(|| batch.rows(black_box(&outcomes)));
            });
        }
        let outcomes = batch.decide(&Answer::default(), &none);
        let span =
            |p: &Progress| OffsetCommit { partition: p.partition, publish_from: p.seen, commit: p.reached };
        let spans = batch.progress().iter().map(span).collect();
        let publication = Publication::of_batch(batch, outcomes, spans, true);
        group.bench_function(BenchmarkId::new("publication", size), |b| {
            b.iter(|| {
                publication.for_each_output::<Infallible>("payment_writer_topic", TOPIC_ID, |output| {
                    black_box(output);
                    Ok(())
                })
            });
        });
    }
    group.finish();
}

/// Start offsets of a lane's partitions.
fn cursors(c: &mut Criterion) {
    let identity = Identity { topic_id: TOPIC_ID, database_id: DATABASE_ID };
    let mode = Mode { publishes: true, adopts_database: false };
    let row = CursorRow {
        applied: NextOffset(1_000),
        published: Some(NextOffset(900)),
        applied_timestamp: Some(support::AT),
        settled: None,
    };
    let marked = |offset| {
        let position = NextOffset(offset);
        GroupOffset { position, metadata: CommitMetadata::new(&identity, position).to_string() }
    };
    let by_others = GroupOffset { position: NextOffset(5_000), metadata: String::new() };
    let settled =
        CursorRow { settled: Some(Settlement { committed: NextOffset(950), replaces: None }), ..row.clone() };
    let kinds = [
        ("as left", Some(marked(1_000)), Some(row.clone()), OutputScan::NotScanned),
        ("events missing", Some(marked(950)), Some(row.clone()), OutputScan::NotScanned),
        ("new", None, None, OutputScan::Sent(NextOffset(0))),
        ("outputs to be asked", None, Some(row.clone()), OutputScan::NotScanned),
        ("outputs asked", None, Some(row.clone()), OutputScan::Sent(NextOffset(1_000))),
        ("moved by hand", Some(by_others.clone()), Some(row), OutputScan::Sent(NextOffset(1_000))),
        ("settled", Some(by_others), Some(settled), OutputScan::NotScanned),
    ];
    let mut group = c.benchmark_group("cursor");
    for (name, offset, row, scan) in kinds {
        let bounds = LogBounds { start: NextOffset(0), end: NextOffset(10_000) };
        let known: Vec<Known> = lanes_partitions()
            .map(|partition| Known { partition, group: offset.clone(), row: row.clone(), bounds, scan })
            .collect();
        group.throughput(Throughput::Elements(known.len() as u64));
        group.bench_function(BenchmarkId::new("decide", name), |b| {
            b.iter(|| {
                for known in &known {
                    black_box(decide(black_box(known), &identity, &mode));
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(50)
        .nresamples(10_000);
    targets = columns, batches, cursors
}
criterion_main!(benches);
