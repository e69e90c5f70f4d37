//! Traces: one span per sampled batch, child spans for its phases, and links to the payments' own traces.
//!
//! A thread of the OpenTelemetry SDK sends spans to an OTLP collector over HTTP from a bounded queue: a slow
//! or unavailable collector delays nothing. Without a configured collector there is no [`BatchTracer`], and a
//! batch costs one check of an `Option`.

mod exporter;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Link, Span, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanExporter,
};

use crate::config::Settings;
use crate::domain::batch::{Batch, OutcomeCounts};
use crate::domain::record::{Partition, RecordView};
use crate::ports::{PublishTimes, WriteStats};

/// Maximum number of spans waiting for the exporter; further ones are dropped.
const QUEUE_MAX: usize = 2_048;
/// Maximum number of spans per request.
const EXPORT_MAX: usize = 512;
/// Maximum delay before spans are exported.
const EXPORT_DELAY: Duration = Duration::from_secs(2);
/// Timeout of a request to the collector.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the last spans at the end of the process.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of links of a span: the first payments of the batch with a trace context.
pub const LINKS_MAX: usize = 32;

/// Tracing could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("tracing.otlp_endpoint: {0}")]
pub struct TraceError(String);

/// Creates the spans of batches; one per process.
pub struct BatchTracer {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    sample_ratio: f64,
    group_id: String,
    input_topic: String,
}

impl BatchTracer {
    /// Creates a tracer from the settings; `None` if tracing is off.
    ///
    /// # Errors
    /// If the endpoint is invalid.
    pub fn from_settings(settings: &Settings, version: &str) -> Result<Option<Arc<Self>>, TraceError> {
        let Some(endpoint) = &settings.tracing.otlp_endpoint else { return Ok(None) };
        let exporter =
            exporter::otlp(endpoint, EXPORT_TIMEOUT).map_err(|error| TraceError(error.to_string()))?;
        Ok(Some(Arc::new(Self::new(exporter, settings, version))))
    }

    /// Creates a tracer that sends spans to `exporter`.
    fn new(exporter: impl SpanExporter + 'static, settings: &Settings, version: &str) -> Self {
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_MAX)
            .with_max_export_batch_size(EXPORT_MAX)
            .with_scheduled_delay(EXPORT_DELAY)
            .build();
        let kafka = &settings.kafka;
        let resource = Resource::builder_empty()
            .with_service_name("payment-writer")
            .with_attributes([
                KeyValue::new("service.version", version.to_owned()),
                KeyValue::new("service.instance.id", kafka.instance_id.clone()),
            ])
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(config).build())
            // Batches are sampled before any span is created.
            .with_sampler(Sampler::AlwaysOn)
            .with_max_links_per_span(LINKS_MAX as u32)
            .with_resource(resource)
            .build();
        Self {
            tracer: provider.tracer("payment-writer"),
            provider,
            sample_ratio: settings.tracing.sample_ratio,
            group_id: kafka.group_id.clone(),
            input_topic: kafka.input_topic.clone(),
        }
    }

    /// Whether to trace the next batch.
    pub fn samples(&self) -> bool {
        rand::random::<f64>() < self.sample_ratio
    }

    /// Starts the trace of a batch whose assembling took `assembling` and has just ended.
    pub fn begin(
        self: &Arc<Self>,
        lane: usize,
        batch: &Batch,
        assembling: Duration,
        ended: SystemTime,
    ) -> Box<BatchTrace> {
        let began = ended.checked_sub(assembling).unwrap_or(ended);
        let root = SpanBuilder::from_name(format!("process {}", self.input_topic))
            .with_kind(SpanKind::Consumer)
            .with_start_time(began)
            .with_links(links(batch))
            .with_attributes([
                // OpenTelemetry's semantic conventions for messaging, where they define a name.
                KeyValue::new("messaging.system", "kafka"),
                KeyValue::new("messaging.operation.name", "process"),
                KeyValue::new("messaging.operation.type", "process"),
                KeyValue::new("messaging.destination.name", self.input_topic.clone()),
                KeyValue::new("messaging.consumer.group.name", self.group_id.clone()),
                KeyValue::new("messaging.batch.message_count", batch.len() as i64),
                KeyValue::new("payment_writer.lane", lane as i64),
                KeyValue::new("payment_writer.bytes", batch.source_bytes() as i64),
                KeyValue::new("payment_writer.partitions", batch.progress().len() as i64),
            ]);
        let root = self.tracer.build_with_context(root, &Context::new());
        let trace = BatchTrace {
            tracer: Arc::clone(self),
            context: Context::new().with_span(root),
            database_ended: None,
            kafka_ended: None,
        };
        trace.step(&trace.context, "assemble", began, assembling);
        Box::new(trace)
    }

    /// Sends the remaining spans, within two seconds. Blocks.
    pub fn shutdown(&self) {
        // The exporter logs its own failures.
        let _ = self.provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT);
    }
}

/// Spans of a batch in flight. Dropping it ends the batch's span.
pub struct BatchTrace {
    tracer: Arc<BatchTracer>,
    context: Context,
    database_ended: Option<SystemTime>,
    kafka_ended: Option<SystemTime>,
}

impl BatchTrace {
    /// Trace id: 32 hex digits.
    pub fn id(&self) -> String {
        self.context.span().span_context().trace_id().to_string()
    }

    /// The Postgres transaction has just ended.
    pub fn database_ended(&mut self) {
        self.database_ended = Some(SystemTime::now());
    }

    /// The Kafka transaction has just ended.
    pub fn kafka_ended(&mut self) {
        self.kafka_ended = Some(SystemTime::now());
    }

    /// The rows are committed.
    pub fn written(&mut self, stats: &WriteStats) {
        let ended = self.database_ended.take().unwrap_or_else(SystemTime::now);
        let steps = [("claim", stats.claim), ("copy", stats.copy), ("commit", stats.commit)];
        self.phase("database", ended, &steps);
    }

    /// The events are committed.
    pub fn published(&mut self, times: &PublishTimes) {
        let ended = self.kafka_ended.take().unwrap_or_else(SystemTime::now);
        let steps = [
            ("produce", times.produce),
            ("offsets", times.offsets),
            ("deliver", times.deliver),
            ("commit", times.commit),
        ];
        self.phase("kafka", ended, &steps);
    }

    /// An attempt of a phase failed and will be retried.
    pub fn failed(&self, phase: &'static str, class: &'static str) {
        let attributes = [KeyValue::new("payment_writer.phase", phase), KeyValue::new("error.type", class)];
        self.context.span().add_event("failed, retrying", attributes.into());
    }

    /// Every record has its outcome: ends the batch's span.
    pub fn settled(self, outcomes: &OutcomeCounts) {
        let span = self.context.span();
        for (name, count) in [
            ("payment_writer.written", outcomes.written),
            ("payment_writer.redelivered", outcomes.redelivered),
            ("payment_writer.duplicates", outcomes.duplicates),
            ("payment_writer.dead_letters", outcomes.dead_letters),
        ] {
            span.set_attribute(KeyValue::new(name, i64::try_from(count).unwrap_or(i64::MAX)));
        }
        span.end();
    }

    /// The batch was dropped; its records will be read again.
    pub fn dropped(self, reason: &str) {
        self.context.span().set_status(Status::error(reason.to_owned()));
        self.context.span().end();
    }

    /// Adds a phase that ended at `ended`, and its consecutive steps.
    fn phase(&self, name: &'static str, ended: SystemTime, steps: &[(&'static str, Duration)]) {
        let took = steps.iter().map(|(_, took)| *took).sum();
        let began = ended.checked_sub(took).unwrap_or(ended);
        let span = SpanBuilder::from_name(name).with_start_time(began);
        let mut span = self.tracer.tracer.build_with_context(span, &self.context);
        let context = Context::new().with_remote_span_context(span.span_context().clone());
        let mut at = began;
        for (name, took) in steps {
            self.step(&context, name, at, *took);
            at += *took;
        }
        span.end_with_timestamp(ended);
    }

    fn step(&self, parent: &Context, name: &'static str, began: SystemTime, took: Duration) {
        let span = SpanBuilder::from_name(name).with_start_time(began);
        self.tracer.tracer.build_with_context(span, parent).end_with_timestamp(began + took);
    }
}

/// The only header that is read for links. `tracestate` is not copied: it is free text of the producer, and
/// the readers of these traces need not see it.
const PARENT_HEADER: &str = "traceparent";
/// Longer values are ignored; the current format has 55 bytes.
const PARENT_BYTES_MAX: usize = 128;

/// The W3C trace context of a record, if it has a valid one.
fn context_of(record: &RecordView<'_>, propagator: &TraceContextPropagator) -> Option<SpanContext> {
    let (_, value) = record.headers.iter().find(|(name, _)| *name == PARENT_HEADER.as_bytes())?;
    let value = std::str::from_utf8(value.filter(|value| value.len() <= PARENT_BYTES_MAX)?).ok()?;
    let carrier = HashMap::from([(PARENT_HEADER.to_owned(), value.to_owned())]);
    let context = propagator.extract_with_context(&Context::new(), &carrier);
    Some(context.span().span_context().clone()).filter(SpanContext::is_valid)
}

/// Links to the W3C trace contexts of the batch's first records that have one, with the positions of these
/// records.
fn links(batch: &Batch) -> Vec<Link> {
    let propagator = TraceContextPropagator::new();
    let linked = batch.source().iter().filter_map(|record| {
        let context = context_of(&record, &propagator)?;
        let Partition(partition) = record.partition;
        let place = vec![
            KeyValue::new("messaging.destination.partition.id", partition.to_string()),
            KeyValue::new("messaging.kafka.offset", record.offset.0),
        ];
        Some(Link::new(context, place, 0))
    });
    linked.take(LINKS_MAX).collect()
}

#[cfg(test)]
mod tests;
