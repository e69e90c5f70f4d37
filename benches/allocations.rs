//! Allocations and requested bytes by step and batch size, in steady state: buffers that the daemon reuses
//! are reused here. A buffer that grows counts as a new allocation. Fails if a bound below is exceeded; so it
//! is also a test, which `cargo test` runs. `--json` prints one JSON line instead of a table.
#![allow(missing_docs, clippy::expect_used, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::alloc::{GlobalAlloc, Layout};
use std::convert::Infallible;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use payment_writer::domain::batch::{Answer, Batch, Outcomes, Progress, Refused};
use payment_writer::domain::columns::RowWriter;
use payment_writer::domain::cursor::Identity;
use payment_writer::domain::publication::{OffsetCommit, Publication};
use payment_writer::domain::record::SourceBatch;
use payment_writer::domain::wire::{EventTexts, Rules, encode_email_event, encode_read_event, parse};
use serde_json::json;
use support::{batch_of, duplicates};
use tikv_jemallocator::Jemalloc;
use uuid::Uuid;

const SIZES: [usize; 3] = [1, 100, 10_000];
const IDENTITY: Identity = Identity { topic_id: Uuid::from_u128(1), database_id: Uuid::from_u128(2) };

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// The daemon's allocator, with counters.
struct Counting;

#[global_allocator]
static GLOBAL: Counting = Counting;

fn count(bytes: usize) {
    ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
}

#[allow(unsafe_code)]
// SAFETY: every call is passed to jemalloc unchanged; counting only changes two atomic numbers.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller upholds jemalloc's contract.
        unsafe { Jemalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as above.
        unsafe { Jemalloc.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as above.
        unsafe { Jemalloc.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { Jemalloc.dealloc(pointer, layout) }
    }
}

/// Bounds: a constant for each batch, and an amount for each of its partitions and payments.
#[derive(Clone, Copy)]
struct Most {
    batch: f64,
    partition: f64,
    payment: f64,
}

impl Most {
    const NONE: Self = most(0.0, 0.0, 0.0);

    fn of(&self, partitions: usize, payments: usize) -> f64 {
        self.batch + self.partition * partitions as f64 + self.payment * payments as f64
    }
}

const fn most(batch: f64, partition: f64, payment: f64) -> Most {
    Most { batch, partition, payment }
}

/// Each step with its bounds: allocations, bytes.
///
/// Parsing unescapes texts, and so allocates for one in fifteen of these payments and for no other; steps
/// that parse inherit that. Building a batch allocates for the batch alone. Publishing allocates the commit
/// metadata of each partition, and a list of headers for the one payment in a hundred that has a trace.
const BOUNDS: [(&str, Most, Most); 9] = [
    ("gather", Most::NONE, Most::NONE),
    ("parse", most(2.0, 0.0, 0.07), most(100.0, 0.0, 3.0)),
    ("encode", most(2.0, 0.0, 0.07), most(100.0, 0.0, 3.0)),
    ("assemble", most(14.0, 0.0, 0.07), most(2_000.0, 0.0, 950.0)),
    ("claims", Most::NONE, Most::NONE),
    ("decide", most(1.0, 0.0, 0.0), most(0.0, 0.0, 6.0)),
    ("rows", Most::NONE, Most::NONE),
    // Three buffers that grow while they are filled.
    ("rows, 1 % duplicates", most(50.0, 0.0, 0.0), most(1_000.0, 0.0, 800.0)),
    ("publication", most(2.0, 4.0, 0.011), most(50.0, 130.0, 2.5)),
];

struct Measured {
    step: &'static str,
    size: Size,
    allocations: u64,
    bytes: u64,
}

/// The size of the batch that is measured.
#[derive(Clone, Copy)]
struct Size {
    partitions: usize,
    payments: usize,
}

/// Runs `work` with its input, and counts its allocations; the result is dropped afterwards.
fn measured<T>(step: &'static str, size: Size, into: &mut Vec<Measured>, work: impl FnOnce() -> T) -> T {
    let before = (ALLOCATIONS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
    let result = black_box(work());
    let after = (ALLOCATIONS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
    into.push(Measured { step, size, allocations: after.0 - before.0, bytes: after.1 - before.1 });
    result
}

fn copy_into(target: &mut SourceBatch, source: &SourceBatch) {
    target.clear();
    for r in source.iter() {
        target.push(r.partition, r.offset, r.timestamp, r.key, r.value, r.headers.iter());
    }
}

/// Encodes rows and events of every record into the same buffers.
fn encode(source: &SourceBatch, rules: &Rules, out: &mut Vec<u8>) -> i64 {
    let mut hashes = 0;
    for record in source.iter() {
        let Ok(payment) = parse(&record, rules) else { continue };
        let id = payment.payment_id();
        out.clear();
        RowWriter::start(out, 3)
            .uuid(id.as_bytes())
            .numeric_millionths(payment.amount.millionths())
            .text(payment.comment.as_deref());
        let texts = EventTexts::of(&payment, id);
        encode_read_event(&payment, &texts, out);
        encode_email_event(&payment, &texts, out);
        hashes ^= payment.payload_hash();
    }
    hashes
}

fn publish(publication: &Publication) -> usize {
    let mut bytes = 0;
    let sent =
        publication.for_each_output::<Infallible>("payment_writer_topic", IDENTITY.topic_id, |output| {
            bytes += output.value.map_or(0, <[u8]>::len);
            Ok(())
        });
    let events = sent.map_or(0, |counts| counts.by_topic.iter().sum::<u64>());
    publication.offsets(&IDENTITY).map(|(_, _, mark)| mark.len()).sum::<usize>() + bytes + events as usize
}

fn measure(payments: usize, into: &mut Vec<Measured>) {
    let rules = Rules::default();
    let none = Refused::default();
    let (source, progress) = batch_of(payments);
    let size = Size { partitions: progress.len(), payments };
    let mut gathered = source.clone();
    measured("gather", size, into, || copy_into(&mut gathered, &source));
    measured("parse", size, into, || source.iter().filter(|r| parse(r, &rules).is_ok()).count());
    let mut out = Vec::with_capacity(4_096);
    // Counts its own parsing as well.
    measured("encode", size, into, || encode(&source, &rules, &mut out));
    let batch = measured("assemble", size, into, || Batch::assemble(gathered, progress, &rules));
    assert_eq!(batch.claims_max(), payments, "every payment is valid");
    measured("claims", size, into, || {
        batch.claims(&none).map(|c| usize::from(c.message_id[0])).sum::<usize>()
    });
    let answer = Answer::default();
    let outcomes = measured("decide", size, into, || batch.decide(&answer, &none));
    drop(measured("rows", size, into, || batch.rows(&outcomes)));
    let some: Outcomes = batch.decide(&duplicates(&batch), &none);
    drop(measured("rows, 1 % duplicates", size, into, || batch.rows(&some)));
    let span =
        |p: &Progress| OffsetCommit { partition: p.partition, publish_from: p.seen, commit: p.reached };
    let spans = batch.progress().iter().map(span).collect();
    let publication = Publication::of_batch(batch, outcomes, spans, true);
    measured("publication", size, into, || publish(&publication));
}

fn main() -> ExitCode {
    // Cargo passes its own arguments, and filters for other benchmarks.
    let as_json = std::env::args().any(|argument| argument == "--json");
    // A first run without counting: one-time allocations are not part of the steady state.
    measure(100, &mut Vec::new());
    let mut results = Vec::with_capacity(BOUNDS.len() * SIZES.len());
    for payments in SIZES {
        measure(payments, &mut results);
    }
    let mut broken = 0;
    let mut lines = Vec::new();
    if !as_json {
        println!(
            "{:<22} {:>8} {:>12} {:>12} {:>12} {:>12} {:>12}",
            "step", "payments", "allocations", "at most", "a payment", "bytes a p.", "at most"
        );
    }
    for measured in &results {
        let Measured { step, size: Size { partitions, payments }, allocations, bytes } = measured;
        let (_, allocations_most, bytes_most) =
            BOUNDS.iter().find(|(name, ..)| name == step).expect("every step has a bound");
        let allocations_max = allocations_most.of(*partitions, *payments);
        let bytes_max = bytes_most.of(*partitions, *payments);
        let holds = *allocations as f64 <= allocations_max && *bytes as f64 <= bytes_max;
        broken += u32::from(!holds);
        let each = *payments as f64;
        if as_json {
            lines
                .push(json!({"step": step, "payments": payments, "partitions": partitions, "allocations": allocations, "bytes": bytes,
                "allocations_max": allocations_max, "bytes_max": bytes_max, "holds": holds}));
        } else {
            println!(
                "{step:<22} {payments:>8} {allocations:>12} {allocations_max:>12.0} {:>12.4} {:>12.1} {:>12.1}{}",
                *allocations as f64 / each,
                *bytes as f64 / each,
                bytes_max / each,
                if holds { "" } else { "  EXCEEDED" }
            );
        }
    }
    if as_json {
        println!("{}", json!({"benchmark": "allocations", "steps": lines}));
    }
    if broken > 0 {
        eprintln!("{broken} bounds of benches/allocations.rs are exceeded");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
