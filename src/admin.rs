//! The admin server: `/metrics`, `/livez`, `/readyz`, `/status`, `/log-level`.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{ConnectInfo, State};
use axum::http::StatusCode;
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

#[derive(Clone)]
struct Shared {
    board: Arc<Board>,
    /// Partitions whose lag was once shown: after a revocation it is shown as 0, not as it last was.
    lagging: Arc<Mutex<BTreeSet<Partition>>>,
    metrics: PrometheusHandle,
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
    let router = Router::new()
        .route("/metrics", get(render_metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .route("/log-level", get(log_level).put(set_log_level))
        .with_state(Shared { board, lagging: Arc::default(), metrics, process, log, version });
    tokio::spawn(async move {
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        if let Err(error) = axum::serve(listener, service).await {
            tracing::error!(%error, "the admin server ended");
        }
    });
    Ok(bound)
}

async fn render_metrics(State(shared): State<Shared>) -> Response {
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
    let mut oldest_ms = 0;
    for (partition, status) in partitions {
        let partition = partition.to_string();
        if let Some(lag) = status.lag() {
            gauge!("payment_writer_lag_records", "partition" => partition.clone()).set(lag as f64);
        }
        if let Some(ms) = status.lag_ms(now) {
            oldest_ms = ms.max(oldest_ms);
            gauge!("payment_writer_lag_seconds", "partition" => partition).set(ms as f64 / 1_000.0);
        }
    }
    scraped(&shared.board.missing(), oldest_ms);
    shared.process.collect();
    let text = shared.metrics.render();
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
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
                "end": status.end.map(|o| o.0),
                "lag_records": status.lag(),
                "lag_seconds": status.lag_ms(now).map(|ms| ms as f64 / 1_000.0),
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

fn refused() -> Response {
    (StatusCode::FORBIDDEN, "the log's level is told to and changed by loopback callers only\n")
        .into_response()
}

async fn log_level(State(shared): State<Shared>, ConnectInfo(caller): ConnectInfo<SocketAddr>) -> Response {
    if !is_from_here(caller) {
        return refused();
    }
    format!("{}\n", shared.log.level()).into_response()
}

async fn set_log_level(
    State(shared): State<Shared>,
    ConnectInfo(caller): ConnectInfo<SocketAddr>,
    level: String,
) -> Response {
    if !is_from_here(caller) {
        return refused();
    }
    match shared.log.set_level(&level) {
        Ok(()) => format!("{}\n", shared.log.level()).into_response(),
        Err(reason) => (StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(refused().status(), StatusCode::FORBIDDEN);
    }
}
