use super::*;
use crate::domain::batch::Progress;
use crate::domain::outcome::Outcome;
use crate::domain::record::{NextOffset, Offset, SourceBatch, TimestampMs};
use crate::domain::wire::{Reason, Rules};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SpanData};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn settings() -> Settings {
    Settings::load_from(None, std::path::Path::new("nowhere.toml"), []).unwrap().settings
}

fn tracer(exporter: &InMemorySpanExporter) -> Arc<BatchTracer> {
    Arc::new(BatchTracer::new(exporter.clone(), &settings(), "1"))
}

fn batch(headers: &[(&[u8], Option<&[u8]>)], count: i64) -> Batch {
    let rules = Rules {
        payment_types: vec!["BWI".to_owned()],
        payment_bytes_max: 1_000,
        idempotency_window: Duration::from_secs(60),
        email_statuses: vec![],
    };
    let mut source = SourceBatch::new();
    for offset in 0..count {
        let at = Some(TimestampMs(1));
        source.push(Partition(3), Offset(offset), at, None, Some(b"secret"), headers.iter().copied());
    }
    let progress = Progress {
        partition: Partition(3),
        seen: NextOffset(0),
        reached: NextOffset(count),
        timestamp: None,
    };
    Batch::assemble(source, vec![progress], &rules)
}

fn spans(exporter: &InMemorySpanExporter, tracer: &BatchTracer) -> Vec<SpanData> {
    tracer.provider.force_flush().unwrap();
    exporter.get_finished_spans().unwrap()
}

#[test]
fn a_batch_is_a_span_with_its_phases_below_it_and_links_to_the_payments_traces() {
    let exporter = InMemorySpanExporter::default();
    let tracer = tracer(&exporter);
    let headers: [(&[u8], Option<&[u8]>); 3] = [
        (b"other", None),
        (b"traceparent", Some(PARENT.as_bytes())),
        (b"tracestate", Some(b"vendor=secret")),
    ];
    let batch = batch(&headers, 100);

    let mut trace = tracer.begin(1, &batch, Duration::from_millis(5), SystemTime::now());
    let ms = Duration::from_millis;
    let stats = WriteStats { claim: ms(10), copy: ms(20), commit: ms(5), ..WriteStats::default() };
    trace.database_ended();
    trace.written(&stats);
    trace.failed("kafka", "passing");
    trace.published(&PublishTimes { produce: ms(1), offsets: ms(2), deliver: ms(3), commit: ms(4) });
    let id = trace.id();
    let outcomes = vec![Outcome::Written, Outcome::Duplicate, Outcome::DeadLetter(Reason::EmptyValue)];
    trace.settled(&OutcomeCounts::of(&outcomes));

    let spans = spans(&exporter, &tracer);
    let find = |name: &str| spans.iter().filter(|s| s.name == *name).collect::<Vec<_>>();
    let root = find("process payment_writer_topic")[0];
    assert_eq!(root.span_kind, SpanKind::Consumer);
    assert_eq!(root.links.len(), LINKS_MAX);
    assert_eq!(root.links[0].span_context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(root.links[0].span_context.trace_state().header(), "", "free text of the producer's");
    assert_eq!(root.events.len(), 1);
    let attribute =
        |key: &str| root.attributes.iter().find(|a| a.key.as_str() == key).map(|a| a.value.to_string());
    for (key, value) in [
        ("messaging.system", "kafka"),
        ("messaging.batch.message_count", "100"),
        ("messaging.destination.name", "payment_writer_topic"),
        ("messaging.consumer.group.name", "payment-writer"),
        ("payment_writer.lane", "1"),
        ("payment_writer.written", "1"),
        ("payment_writer.dead_letters", "1"),
    ] {
        assert_eq!(attribute(key).as_deref(), Some(value), "{key}");
    }
    for (phase, steps) in [
        ("assemble", &[][..]),
        ("database", &["claim", "copy", "commit"]),
        ("kafka", &["produce", "offsets", "deliver", "commit"]),
    ] {
        let span = find(phase)[0];
        assert_eq!(span.parent_span_id, root.span_context.span_id(), "{phase}");
        let below: Vec<_> =
            spans.iter().filter(|s| s.parent_span_id == span.span_context.span_id()).collect();
        assert_eq!(below.iter().map(|s| s.name.as_ref()).collect::<Vec<_>>(), steps, "{phase}");
        assert!(below.iter().all(|s| s.start_time >= span.start_time && s.end_time <= span.end_time));
    }
    assert!(spans.iter().all(|s| s.span_context.trace_id().to_string() == id));
    assert!(!format!("{spans:?}").contains("secret"), "nothing of a payment");
}

#[test]
fn what_is_no_trace_context_is_no_link_and_a_dropped_batch_says_so() {
    let exporter = InMemorySpanExporter::default();
    let tracer = tracer(&exporter);
    let long = [PARENT.as_bytes(), &[b' '; 128]].concat();
    for odd in [
        &b""[..],
        &long[..],
        b"00-ab",
        b"\xff\xfe",
        b"00-00000000000000000000000000000000-00f067aa0ba902b7-01",
    ] {
        assert!(links(&batch(&[(b"traceparent", Some(odd))], 1)).is_empty(), "{odd:?}");
    }
    tracer.begin(0, &batch(&[], 1), Duration::ZERO, SystemTime::now()).dropped("a reason");
    let spans = spans(&exporter, &tracer);
    assert!(spans.iter().any(|s| s.status == Status::error("a reason")));
}

#[test]
fn as_many_batches_are_sampled_as_the_settings_say() {
    let mut settings = settings();
    let sampled = |ratio: f64, settings: &mut Settings| {
        settings.tracing.sample_ratio = ratio;
        let tracer = BatchTracer::new(InMemorySpanExporter::default(), settings, "1");
        (0..10_000).filter(|_| tracer.samples()).count()
    };
    assert_eq!(sampled(0.0, &mut settings), 0);
    assert_eq!(sampled(1.0, &mut settings), 10_000);
    assert!((200..2_000).contains(&sampled(0.1, &mut settings)));
}
