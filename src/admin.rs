//! The admin server: `/metrics`, `/livez`, `/readyz`, `/status`, `/log-level`.

use std::collections::BTreeSet;
use std::net::SocketAddr;
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

use crate::logging::Log;
use crate::metrics::{BYTES_BUCKETS, RECORDS_BUCKETS, SECONDS_BUCKETS, describe, now, scraped};
use crate::record::Partition;
use crate::status::{Board, Phase};

/// A filter of the log is a line.
const BODY_BYTES_MAX: usize = 1_024;

#[derive(Clone)]
struct Shared {
    board: Arc<Board>,
    /// Partitions whose lag was once shown: after a revocation it is shown as 0, not as it last was.
    lagging: Arc<Mutex<BTreeSet<Partition>>>,
    metrics: PrometheusHandle,
    /// One scrape at a time.
    scraping: Arc<tokio::sync::Mutex<()>>,
    process: metrics_process::Collector,
    log: Arc<Log>,
    version: &'static str,
}

/// Installs the recorder of this process's metrics.
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

/// Listens on `address`; the server runs until the process ends.
pub async fn serve(
    address: SocketAddr,
    board: Arc<Board>,
    metrics: PrometheusHandle,
    log: Arc<Log>,
    version: &'static str,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let upkeep = metrics.clone();
    tokio::spawn(async move {
        // Histograms keep samples until they are taken in, also when nobody scrapes.
        let mut tick = tokio::time::interval(std::time::Duration::from_secs(5));
        loop {
            tick.tick().await;
            upkeep.run_upkeep();
        }
    });
    let process = metrics_process::Collector::default();
    let router = router(Shared {
        board,
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
    // Who asks faster than it is answered waits here, and takes no further thread.
    let turn = Arc::clone(&shared.scraping).lock_owned().await;
    // What the kernel tells of the process stands in files: not for a thread that others wait for.
    let scraped = tokio::task::spawn_blocking(move || {
        // Not over for one who has hung up.
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
    let partitions = shared.board.partitions();
    {
        let mut lagging = shared.lagging.lock().unwrap_or_else(PoisonError::into_inner);
        lagging.retain(|partition| {
            let is_ours = partitions.contains_key(partition);
            if !is_ours {
                let partition = partition.to_string();
                gauge!("payment_writer_lag_records", "partition" => partition.clone()).set(0.0);
                gauge!("payment_writer_lag_seconds", "partition" => partition).set(0.0);
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
        gauge!("payment_writer_lag_seconds", "partition" => partition).set(seconds);
    }
    scraped(&shared.board.missing(), shared.board.oldest_pending_ms(now));
    shared.process.collect();
    shared.metrics.render()
}

async fn ready(State(shared): State<Shared>) -> Response {
    let missing = shared.board.missing();
    let code = if missing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": missing.is_empty(), "missing": missing }))).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    let now = now();
    let missing = shared.board.missing();
    let mut partitions = Map::new();
    for (partition, status) in shared.board.partitions() {
        let (state, doubt) = match &status.phase {
            Phase::Opening => ("opening", Value::Null),
            Phase::Live => ("live", Value::Null),
            Phase::Halted(doubt) => {
                ("halted", json!({ "doubt": doubt.label(), "advice": doubt.advice(partition) }))
            }
        };
        partitions.insert(
            partition.to_string(),
            json!({
                "state": state,
                "halted": doubt,
                "applied": status.applied.map(|o| o.0),
                "published": status.published.map(|o| o.0),
                "unpublished_from": status.unpublished_from.map(|o| o.0),
                "end": status.end.map(|o| o.0),
                "lag_records": status.lag(),
                "lag_seconds": status.lag_ms(now) as f64 / 1_000.0,
            }),
        );
    }
    let totals = shared.board.totals();
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

/// The port may be open to whoever scrapes; what changes the process is for those who are on its machine.
fn is_from_here(caller: SocketAddr) -> bool {
    caller.ip().to_canonical().is_loopback()
}

/// The caller is on this machine. Stands before what reads the body: a stranger's is not read.
struct FromHere;

impl<S: Send + Sync> FromRequestParts<S> for FromHere {
    type Rejection = (StatusCode, &'static str);

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        match ConnectInfo::<SocketAddr>::from_request_parts(parts, state).await {
            Ok(ConnectInfo(caller)) if is_from_here(caller) => Ok(Self),
            _ => Err((
                StatusCode::FORBIDDEN,
                "the log's level is told to and changed by loopback callers only\n",
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
            ("127.8.0.1:5", true),
            ("[::1]:5", true),
            ("[::ffff:127.0.0.1]:5", true),
            ("10.0.0.1:5", false),
            ("[::ffff:10.0.0.1]:5", false),
            ("[fe80::1]:5", false),
        ] {
            assert_eq!(is_from_here(caller.parse().unwrap()), expected, "{caller}");
        }
    }

    /// The first line of the answer.
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
            let (log, _filter) = Log::new("info").unwrap();
            let shared = Shared {
                board: Arc::default(),
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
            // Who is refused is so without a word of the body.
            let body = if expected.contains("403") { "" } else { "debug" };
            assert_eq!(ask(address, "PUT /log-level", body).await, expected, "{caller}");
            assert_eq!(log.level(), level, "{caller}");
            server.abort();
        }
    }
}
