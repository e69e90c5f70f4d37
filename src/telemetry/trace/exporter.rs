//! Span exporter: OTLP, protobuf over HTTP.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{ExporterBuildError, Protocol, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

use crate::telemetry::logging::RateLimited;

/// Maximum size of an answer that is read; collectors answer with a few bytes.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// Limit of log lines about a collector that fails intermittently.
const LINES_MAX: u32 = 5;
const LINES_PER: Duration = Duration::from_secs(60);

/// Creates an exporter for the collector with base address `endpoint`.
pub(super) fn otlp(
    endpoint: &str,
    timeout: Duration,
) -> Result<LoggedExporter<opentelemetry_otlp::SpanExporter>, ExporterBuildError> {
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .new_agent();
    let cause = Arc::default();
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(Client { agent, cause: Arc::clone(&cause) })
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .with_timeout(timeout)
        .build()?;
    Ok(LoggedExporter {
        exporter,
        cause,
        limit: RateLimited::new(LINES_MAX, LINES_PER),
        failing: Mutex::default(),
    })
}

/// Why the last request failed; the SDK's error only says that it failed.
type Cause = Arc<Mutex<Option<String>>>;

/// Blocking client; runs on the SDK's exporter thread.
#[derive(Debug)]
struct Client {
    agent: ureq::Agent,
    cause: Cause,
}

impl Client {
    fn ask(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let (parts, body) = request.into_parts();
        let answer = self.agent.run(Request::from_parts(parts, &*body))?;
        let (parts, mut body) = answer.into_parts();
        let body = body.with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
        Ok(Response::from_parts(parts, body.into()))
    }
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = self.ask(request);
        let cause = match &answer {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("the collector answers {}", answer.status())),
            // The only error that contains the address.
            Err(ureq::Error::BadUri(_)) => Some("the collector's address cannot be used".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        *self.cause.lock().unwrap_or_else(PoisonError::into_inner) = cause;
        Ok(answer?)
    }
}

/// Logs when exporting starts to fail, and why, and when it works again; rate-limited.
#[derive(Debug)]
pub(super) struct LoggedExporter<E> {
    exporter: E,
    cause: Cause,
    limit: RateLimited,
    /// `None`: exporting works. `Some`: it fails, and whether that was logged.
    failing: Mutex<Option<bool>>,
}

impl<E> LoggedExporter<E> {
    fn log(&self, outcome: &OTelSdkResult) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let Err(error) = outcome else {
            if failing.take() == Some(true) {
                tracing::info!("spans are exported again");
            }
            return;
        };
        let suppressed = match *failing {
            Some(true) => return,
            Some(false) => self.limit.pass_late(),
            None => self.limit.pass(),
        };
        *failing = Some(suppressed.is_some());
        if let Some(suppressed) = suppressed {
            let cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner).take();
            let cause = cause.unwrap_or_else(|| error.to_string());
            tracing::warn!(
                error = cause,
                suppressed,
                "spans cannot be exported and are dropped; nothing waits for them"
            );
        }
    }
}

impl<E: SpanExporter> SpanExporter for LoggedExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let outcome = self.exporter.export(batch).await;
        self.log(&outcome);
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
