//! The admin server: the console at `/`, `/metrics`, `/livez`, `/readyz`, `/status`, `/status/history`, `/log-level`.

mod access;
mod connections;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router, middleware};
use metrics::gauge;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use self::access::Access;
use self::access::FromHere;
use crate::config::{Settings, read_token};
use crate::console::{self, Console, history};
use crate::domain::record::{Partition, TimestampMs};
use crate::error::{CommandError, OrFailed};
use crate::telemetry::logging::LogHandle;
use crate::telemetry::metrics::{
    BYTES_BUCKETS, RECORDS_BUCKETS, SECONDS_BUCKETS, describe, now, open_transaction, scraped,
};
use crate::telemetry::status::StatusRegistry;

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
    console: Arc<Console>,
    log: Arc<LogHandle>,
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

/// Starts the admin server, and the one for metrics if it has an address of its own; both run until the process
/// ends. Returns the address of the admin server. `settings`: those in use.
///
/// # Errors
/// If an address cannot be used, or the token file has no token.
pub async fn serve(
    settings: watch::Receiver<Settings>,
    status: Arc<StatusRegistry>,
    metrics: PrometheusHandle,
    log: Arc<LogHandle>,
    version: &'static str,
) -> Result<SocketAddr, CommandError> {
    let admin = settings.borrow().admin.clone();
    let console = Arc::new(Console::new(settings, Arc::clone(&status), Arc::clone(&log), version));
    let settings = &admin;
    let access = Access { token_file: settings.token_file.clone(), hosts: settings.hosts.clone() };
    if let Some(file) = &access.token_file {
        read_token(file).map_err(CommandError::usage)?;
    }
    let (listener, bound) = listen("admin.listen", settings.listen).await?;
    let metrics_listener = match settings.metrics_listen {
        Some(address) => Some(listen("admin.metrics_listen", address).await?.0),
        None => None,
    };
    let upkeep = metrics.clone();
    tokio::spawn(async move {
        // Histograms buffer samples until upkeep, even without scrapes.
        let mut tick = tokio::time::interval(std::time::Duration::from_secs(5));
        loop {
            tick.tick().await;
            upkeep.run_upkeep();
        }
    });
    let history = Arc::clone(&console);
    tokio::spawn(async move { history.run().await });
    let process = metrics_process::Collector::default();
    let shared =
        Shared { status, lagging: Arc::default(), metrics, scraping: Arc::default(), process, console, log };
    if let Some(listener) = metrics_listener {
        tokio::spawn(connections::serve(listener, metrics_router(shared.clone())));
    }
    tokio::spawn(connections::serve(listener, router(shared, access)));
    Ok(bound)
}

async fn listen(setting: &str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), CommandError> {
    let bound = async {
        let listener = TcpListener::bind(address).await?;
        let bound = listener.local_addr()?;
        Ok::<_, std::io::Error>((listener, bound))
    };
    bound.await.or_failed_to(format_args!("{setting}: cannot listen on {address}"))
}

fn router(shared: Shared, access: Access) -> Router {
    routes_for_metrics()
        .route("/status", get(status))
        .route("/status/history", get(status_history))
        .route("/", get(page))
        .route("/console/state", get(console_state))
        .route("/console/runbooks", get(|| async { of_console(console::runbooks()) }))
        .route("/console/{*name}", get(console_file))
        .route("/log-level", get(log_level).put(set_log_level))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(access, access::check))
        .with_state(shared)
}

fn metrics_router(shared: Shared) -> Router {
    routes_for_metrics()
        .layer(middleware::from_fn_with_state(Access::default(), access::check))
        .with_state(shared)
}

fn routes_for_metrics() -> Router<Shared> {
    Router::new()
        .route("/metrics", get(render_metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
}

async fn render_metrics(State(shared): State<Shared>) -> Response {
    match from_scrape(shared, |_, text| text.to_owned()).await {
        Ok(text) => ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(refused) => refused,
    }
}

/// Answers from a scrape, on a thread for blocking work.
async fn from_scrape<T: Send + 'static>(
    shared: Shared,
    answer: impl FnOnce(&Shared, &str) -> T + Send + 'static,
) -> Result<T, Response> {
    // Concurrent scrapes wait here without occupying a thread.
    let turn = Arc::clone(&shared.scraping).lock_owned().await;
    // The page asks in the background, for which it needs this runtime.
    let runtime = tokio::runtime::Handle::current();
    // Process metrics are read from files, which would block the async runtime.
    let answered = tokio::task::spawn_blocking(move || {
        let _entered = runtime.enter();
        let text = scrape(&shared);
        // Held until the scrape is done, even if the client has disconnected.
        drop(turn);
        answer(&shared, &text)
    });
    answered.await.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response())
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
    match from_scrape(shared, answer_status).await {
        Ok(status) => Json(status).into_response(),
        Err(refused) => refused,
    }
}

fn answer_status(shared: &Shared, metrics: &str) -> Value {
    let (own, about) = (shared.console.own(metrics), &shared.console.about);
    // As in `/readyz`, with the failure's class.
    let missing = shared.status.missing();
    let partitions: BTreeMap<String, _> =
        own.partitions.iter().map(|row| (row.partition.to_string(), row)).collect();
    let totals = shared.status.totals();
    json!({
        "build": { "version": about.version },
        "group": about.group,
        "instance": about.instance,
        "started_ms": shared.console.started_ms(),
        "summary": own.summary,
        "breaker": if missing.is_empty() { "closed" } else { "open" },
        "missing": missing,
        "totals": {
            "written": totals.written,
            "duplicates": totals.duplicates,
            "dead_letters": totals.dead_letters,
            "redelivered": totals.redelivered,
        },
        "partitions": partitions,
        "recent_problems": shared.console.last_problems(),
    })
}

/// Only what this server serves may be loaded by what it answers with.
fn of_console((kind, text): (&'static str, impl IntoResponse)) -> Response {
    let headers = [("content-type", kind), ("content-security-policy", console::POLICY)];
    (headers, text).into_response()
}

async fn page(State(shared): State<Shared>) -> Response {
    shared.console.peers_asked().await;
    match from_scrape(shared, |shared, metrics| shared.console.page(metrics)).await {
        Ok(page) => of_console(page),
        Err(refused) => refused,
    }
}

async fn console_state(State(shared): State<Shared>) -> Response {
    let turn = Arc::clone(&shared.scraping).lock_owned().await;
    let (console, metrics) = (Arc::clone(&shared.console), shared);
    let scrape = move || {
        let _turn = turn;
        scrape(&metrics)
    };
    match console.state(scrape).await {
        Ok(state) => ([("content-type", "application/json")], state).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn console_file(Path(name): Path<String>) -> Response {
    match console::file(&name) {
        // A page loads a dozen; they change with the version alone.
        Some(file) => ([("cache-control", "private, max-age=60")], of_console(file)).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn status_history(State(shared): State<Shared>, uri: Uri) -> Response {
    let after = match uri.query() {
        None => Some(i64::MIN),
        Some(query) => query.strip_prefix("after=").and_then(|after| after.parse().ok()),
    };
    match after {
        Some(after) => Json(json!({
            "interval_seconds": history::INTERVAL.as_secs(),
            "points": shared.console.history.after(TimestampMs(after)),
        }))
        .into_response(),
        None => (StatusCode::BAD_REQUEST, "the only parameter is after=milliseconds\n").into_response(),
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
            let log = Arc::new(log);
            let settings =
                Settings::load_from(None, std::path::Path::new("nowhere.toml"), []).unwrap().settings;
            let shared = Shared {
                status: Arc::default(),
                lagging: Arc::default(),
                metrics: PrometheusBuilder::new().build_recorder().handle(),
                scraping: Arc::default(),
                process: metrics_process::Collector::default(),
                console: Arc::new(Console::new(
                    watch::channel(settings).1,
                    Arc::default(),
                    Arc::clone(&log),
                    "1",
                )),
                log,
            };
            let log = Arc::clone(&shared.log);
            let caller: SocketAddr = caller.parse().unwrap();
            let router = router(shared, Access::default()).layer(MockConnectInfo(caller));
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
