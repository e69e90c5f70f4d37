//! The admin server: `/metrics`, `/livez`, `/readyz`, `/status`, `/log-level`.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics::gauge;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

use crate::domain::record::Partition;
use crate::telemetry::logging::LogHandle;
use crate::telemetry::metrics::{
    BYTES_BUCKETS, RECORDS_BUCKETS, SECONDS_BUCKETS, describe, now, open_transaction, scraped,
};
use crate::telemetry::status::{Phase, StatusRegistry};

/// Maximum size of a request body; a log filter is one line.
const BODY_BYTES_MAX: usize = 1_024;

#[derive(Clone)]
struct Shared {
    status: Arc<StatusRegistry>,
    /// Partitions whose lag was exported: after a revocation it is exported as 0 instead of the last value.
    lagging: Arc<Mutex<BTreeSet<Partition>>>,
    metrics: PrometheusHandle,
    /// Serializes scrapes.
    scraping: Arc<tokio::sync::Mutex<()>>,
    process: metrics_process::Collector,
    log: Arc<LogHandle>,
    version: &'static str,
}

/// Installs the metrics recorder of the process.
pub fn install_metrics(version: &'static str, group: &str) -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_records".to_owned()), &RECORDS_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES_BUCKETS)?
        .install_recorder()?;
    describe();
    gauge!("payment_writer_build_info", "version" => version, "group" => group.to_owned()).set(1.0);
    Ok(handle)
}

/// Starts the admin server on `address`; it runs until the process ends.
pub async fn serve(
    address: SocketAddr,
    status: Arc<StatusRegistry>,
    metrics: PrometheusHandle,
    log: Arc<LogHandle>,
    version: &'static str,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let upkeep = metrics.clone();
    tokio::spawn(async move {
        // Histograms buffer samples until upkeep, even without scrapes.
        let mut tick = tokio::time::interval(std::time::Duration::from_secs(5));
        loop {
            tick.tick().await;
            upkeep.run_upkeep();
        }
    });
    let process = metrics_process::Collector::default();
    let router = router(Shared {
        status,
        lagging: Arc::default(),
        metrics,
        scraping: Arc::default(),
        process,
        log,
        version,
    });
    tokio::spawn(async move {
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        if let Err(error) = axum::serve(listener, service).await {
            tracing::error!(%error, "the admin server ended");
        }
    });
    Ok(bound)
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/metrics", get(render_metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .route("/log-level", get(log_level).put(set_log_level))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(shared)
}

async fn render_metrics(State(shared): State<Shared>) -> Response {
    // Concurrent scrapes wait here without occupying a thread.
    let turn = Arc::clone(&shared.scraping).lock_owned().await;
    // Process metrics are read from files, which would block the async runtime.
    let scraped = tokio::task::spawn_blocking(move || {
        // Held until the scrape is done, even if the client has disconnected.
        let _turn = turn;
        scrape(&shared)
    });
    match scraped.await {
        Ok(text) => ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn scrape(shared: &Shared) -> String {
    let now = now();
    let partitions = shared.status.partitions();
    {
        let mut lagging = shared.lagging.lock().unwrap_or_else(PoisonError::into_inner);
        lagging.retain(|partition| {
            let is_ours = partitions.contains_key(partition);
            if !is_ours {
                let partition = partition.to_string();
                gauge!("payment_writer_lag_records", "partition" => partition.clone()).set(0.0);
                gauge!("payment_writer_lag_seconds", "partition" => partition.clone()).set(0.0);
                open_transaction(partition, 0, 0);
            }
            is_ours
        });
        lagging.extend(partitions.keys());
    }
    for (partition, status) in partitions {
        let partition = partition.to_string();
        if let Some(lag) = status.lag() {
            gauge!("payment_writer_lag_records", "partition" => partition.clone()).set(lag as f64);
        }
        let seconds = status.lag_ms(now) as f64 / 1_000.0;
        gauge!("payment_writer_lag_seconds", "partition" => partition.clone()).set(seconds);
        let (records, age_ms) = status.open_transaction().map_or((0, 0), |o| (o.records, o.age_ms(now)));
        open_transaction(partition, records, age_ms);
    }
    scraped(&shared.status.missing(), shared.status.oldest_pending_ms(now));
    shared.process.collect();
    shared.metrics.render()
}

async fn ready(State(shared): State<Shared>) -> Response {
    let missing = shared.status.missing();
    let code = if missing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": missing.is_empty(), "missing": missing }))).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    let now = now();
    let missing = shared.status.missing();
    let mut partitions = Map::new();
    for (partition, status) in shared.status.partitions() {
        let halted = match &status.phase {
            Phase::Halted(reason) => {
                // `doubt` is the former name of `reason`, kept until 1.0.
                let label = reason.label();
                json!({ "reason": label, "doubt": label, "advice": reason.advice(partition) })
            }
            Phase::Opening | Phase::Live => Value::Null,
        };
        let open = status.open_transaction();
        partitions.insert(
            partition.to_string(),
            json!({
                "state": <&str>::from(&status.phase),
                "halted": halted,
                "applied": status.applied.map(|o| o.0),
                "published": status.published.map(|o| o.0),
                "unpublished_from": status.unpublished_from.map(|o| o.0),
                "end": status.end.map(|o| o.0),
                "lag_records": status.lag(),
                "lag_seconds": status.lag_ms(now) as f64 / 1_000.0,
                "open_transaction_records": open.map_or(0, |open| open.records),
                "open_transaction_seconds": open.map_or(0, |open| open.age_ms(now)) as f64 / 1_000.0,
            }),
        );
    }
    let totals = shared.status.totals();
    let problems: Vec<Value> = shared
        .log
        .problems()
        .all()
        .into_iter()
        .map(|p| json!({ "at": p.at.to_string(), "level": p.level, "message": p.message }))
        .collect();
    Json(json!({
        "build": { "version": shared.version },
        "breaker": if missing.is_empty() { "closed" } else { "open" },
        "missing": missing,
        "totals": {
            "written": totals.written,
            "duplicates": totals.duplicates,
            "dead_letters": totals.dead_letters,
            "redelivered": totals.redelivered,
        },
        "partitions": partitions,
        "recent_problems": problems,
    }))
    .into_response()
}

/// The port may be open to a scraper in the network; only callers on this machine may change the process. Other
/// addresses of 127.0.0.0/8 may stand for the network: a service mesh's sidecar connects from 127.0.0.6.
fn is_from_here(caller: SocketAddr) -> bool {
    let ip = caller.ip().to_canonical();
    ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST
}

/// Extractor that accepts only local callers; runs before the extractor that reads the body.
struct FromHere;

impl<S: Send + Sync> FromRequestParts<S> for FromHere {
    type Rejection = (StatusCode, &'static str);

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        match ConnectInfo::<SocketAddr>::from_request_parts(parts, state).await {
            Ok(ConnectInfo(caller)) if is_from_here(caller) => Ok(Self),
            _ => Err((
                StatusCode::FORBIDDEN,
                "the log level can be read and changed from 127.0.0.1 and ::1 only\n",
            )),
        }
    }
}

async fn log_level(_: FromHere, State(shared): State<Shared>) -> String {
    format!("{}\n", shared.log.level())
}

async fn set_log_level(_: FromHere, State(shared): State<Shared>, level: String) -> Response {
    match shared.log.set_level(&level) {
        Ok(()) => format!("{}\n", shared.log.level()).into_response(),
        Err(reason) => (StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::connect_info::MockConnectInfo;
    use std::time::Duration;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpStream;

    #[test]
    fn only_the_machine_itself_may_ask_for_the_logs_level() {
        for (caller, expected) in [
            ("127.0.0.1:5", true),
            ("127.0.0.6:5", false),
            ("[::ffff:127.0.0.6]:5", false),
            ("[::1]:5", true),
            ("[::ffff:127.0.0.1]:5", true),
            ("10.0.0.1:5", false),
            ("[::ffff:10.0.0.1]:5", false),
            ("[fe80::1]:5", false),
        ] {
            assert_eq!(is_from_here(caller.parse().unwrap()), expected, "{caller}");
        }
    }

    /// Returns the first line of the answer.
    async fn ask(address: SocketAddr, head: &str, body: &str) -> String {
        let mut stream = BufReader::new(TcpStream::connect(address).await.unwrap());
        let request = format!("{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        stream.write_all(format!("{request}Content-Length: 5\r\n\r\n{body}").as_bytes()).await.unwrap();
        let mut line = String::new();
        let answer = tokio::time::timeout(Duration::from_secs(30), stream.read_line(&mut line));
        answer.await.unwrap().unwrap();
        line.trim_end().to_owned()
    }

    #[tokio::test]
    async fn whoever_is_not_on_this_machine_is_refused_before_a_body_is_read() {
        for (caller, expected, level) in
            [("10.0.0.1:5", "HTTP/1.1 403 Forbidden", "info"), ("127.0.0.1:5", "HTTP/1.1 200 OK", "debug")]
        {
            let (log, _filter) = LogHandle::new("info").unwrap();
            let shared = Shared {
                status: Arc::default(),
                lagging: Arc::default(),
                metrics: PrometheusBuilder::new().build_recorder().handle(),
                scraping: Arc::default(),
                process: metrics_process::Collector::default(),
                log: Arc::new(log),
                version: "1",
            };
            let log = Arc::clone(&shared.log);
            let caller: SocketAddr = caller.parse().unwrap();
            let router = router(shared).layer(MockConnectInfo(caller));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tokio::spawn(async move { axum::serve(listener, router).await });

            assert_eq!(ask(address, "GET /log-level", "     ").await, expected, "{caller}");
            // A refused caller is answered before the body is read.
            let body = if expected.contains("403") { "" } else { "debug" };
            assert_eq!(ask(address, "PUT /log-level", body).await, expected, "{caller}");
            assert_eq!(log.level(), level, "{caller}");
            server.abort();
        }
    }
}
