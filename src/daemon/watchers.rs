//! Checks that run beside the lanes.

use std::time::Duration;

use rdkafka::consumer::Consumer;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::Client;
use uuid::Uuid;

use super::{REQUEST_TIMEOUT, ask, ticks};
use crate::config::Endpoint;
use crate::domain::cursor::IdentityMismatch;
use crate::domain::record::Partition;
use crate::kafka::group::Group;
use crate::kafka::librdkafka::{topic_id, topic_setting};
use crate::kafka::offsets::last_stable_offsets;
use crate::postgres::connection::describe;
use crate::telemetry::metrics;
use crate::telemetry::status::{Dependency, StatusRegistry};

/// Interval between checks of the topic's id: librdkafka does not notice that a topic was recreated
/// (librdkafka #3255).
const TOPIC_CHECK: Duration = Duration::from_secs(5);
/// Interval between reads of the input topic's retention.
const RETENTION_CHECK: Duration = Duration::from_secs(60);
/// Interval between reads of the log ends, for lag.
const ENDS_TICK: Duration = Duration::from_secs(2);
/// Interval between database checks, for readiness.
const DATABASE_PROBE: Duration = Duration::from_secs(2);

/// Checks the topic's id periodically; returns when it has changed.
pub(super) async fn topic(
    group: &Group,
    expected: Uuid,
    suspicion: &Notify,
    status: &StatusRegistry,
) -> IdentityMismatch {
    loop {
        // Errors trigger an early check, but at most one per second.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let _ = timeout(TOPIC_CHECK, suspicion.notified()).await;
        match ask(group, |group| topic_id(group.consumer(), group.topic(), REQUEST_TIMEOUT)).await {
            Ok(Ok((found, _))) if found != expected => {
                return IdentityMismatch::OtherTopic { expected, found };
            }
            Ok(Ok((_, partitions))) => {
                status.probed(None, Some(Dependency::Up));
                metrics::input_partitions(partitions);
            }
            Ok(Err(error)) => {
                let why = status.broker_refusal().unwrap_or_else(|| error.to_string());
                status.probed(None, Some(Dependency::Down(format!("asking for the input topic: {why}"))));
            }
            Err(_) => {}
        }
    }
}

/// Keeps the log ends in the status registry up to date, for lag. Never returns.
pub(super) async fn ends(group: &Group, status: &StatusRegistry) {
    let mut ticks = ticks(ENDS_TICK);
    loop {
        ticks.tick().await;
        let partitions: Vec<Partition> = status.partitions().into_keys().collect();
        if partitions.is_empty() {
            continue;
        }
        // Taken before the request: records that arrive during it are not in the answer.
        let asked_at = metrics::now();
        let wanted = partitions.clone();
        match ask(group, move |group| last_stable_offsets(group, &wanted)).await {
            Ok(Ok(ends)) => {
                status.ends(asked_at, partitions.into_iter().zip(ends));
                status.probed(None, Some(Dependency::Up));
            }
            Ok(Err(error)) => {
                let why = status.broker_refusal().unwrap_or_else(|| error.to_string());
                status.probed(None, Some(Dependency::Down(why)));
            }
            Err(_) => {}
        }
    }
}

/// Exports the input topic's retention, for alerts on records that are about to be deleted. The metric is
/// absent without the permission to read it. Never returns.
pub(super) async fn retention(group: &Group) {
    let mut ticks = ticks(RETENTION_CHECK);
    loop {
        ticks.tick().await;
        let answer = ask(group, |group| {
            topic_setting(group.consumer().client(), group.topic(), "retention.ms", REQUEST_TIMEOUT)
        });
        match answer.await {
            // -1 means unlimited.
            Ok(Ok(ms)) => metrics::input_retention(ms.parse().ok().map(Duration::from_millis)),
            Ok(Err(error)) => tracing::debug!(%error, "cannot read the retention of the input topic"),
            Err(_) => {}
        }
    }
}

/// Keeps the database's availability in the status registry up to date, also when no lane uses it. Never
/// returns.
pub(super) async fn database(endpoint: &Endpoint, status: &StatusRegistry) {
    let mut ticks = ticks(DATABASE_PROBE);
    let mut session = None;
    loop {
        ticks.tick().await;
        let database = match probe(endpoint, &mut session).await {
            Ok(()) => Dependency::Up,
            Err(message) => Dependency::Down(message),
        };
        status.probed(Some(database), None);
    }
}

async fn probe(endpoint: &Endpoint, session: &mut Option<Client>) -> Result<(), String> {
    let client = match session.take() {
        Some(client) => client,
        None => endpoint.connect().await.map_err(|error| error.to_string())?.0,
    };
    let answer = timeout(REQUEST_TIMEOUT, client.batch_execute("SELECT 1")).await;
    answer.map_err(|_| "no answer in time".to_owned())?.map_err(|error| describe(&error))?;
    *session = Some(client);
    Ok(())
}
