//! Checks that run beside the lanes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rdkafka::consumer::Consumer;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::Client;
use uuid::Uuid;

use super::{REQUEST_TIMEOUT, ask, ticks};
use crate::config::Endpoint;
use crate::domain::cursor::IdentityMismatch;
use crate::domain::record::{NextOffset, Partition, TimestampMs};
use crate::kafka::group::Group;
use crate::kafka::librdkafka::{describe_topic, topic_id, topic_setting};
use crate::kafka::offsets::{high_watermarks, last_stable_offsets};
use crate::kafka::topic_rules::{self, Action, Checked, Role};
use crate::kafka::transactions::recreated_output;
use crate::postgres::connection::describe;
use crate::telemetry::logging::{Lasting, RateLimited, Repeated};
use crate::telemetry::metrics;
use crate::telemetry::status::{Dependency, StatusRegistry};

/// Interval between checks of the topic's id: librdkafka does not notice that a topic was recreated
/// (librdkafka #3255).
const TOPIC_CHECK: Duration = Duration::from_secs(5);
/// Interval between checks of the outputs' ids.
const OUTPUTS_CHECK: Duration = Duration::from_secs(10);
/// Interval between reads of the topics' settings.
const SETTINGS_CHECK: Duration = Duration::from_secs(60);
/// Interval between reads of the log ends, for lag.
const ENDS_TICK: Duration = Duration::from_secs(2);
/// A transaction of this age is reported. Java's producer ends its own after a minute by default
/// (`transaction.timeout.ms`).
const TRANSACTION_LONG_MS: i64 = 60_000;
/// Interval between database checks, for readiness.
const DATABASE_PROBE: Duration = Duration::from_secs(2);
/// Interval between looks at what keeps the daemon from being ready.
const READINESS_TICK: Duration = Duration::from_secs(2);

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

/// Logs when an output topic was deleted and created again. Never returns.
pub(super) async fn outputs(group: &Group) {
    let mut ticks = ticks(OUTPUTS_CHECK);
    let mut known: BTreeMap<Role, Uuid> = BTreeMap::new();
    loop {
        ticks.tick().await;
        let answer = ask(group, |group| {
            let client = group.consumer().client();
            let found = |role: Role| {
                let topic = role.topic(group.settings());
                // A missing topic is reported by the lane that sends to it.
                Some((role, describe_topic(client, topic, false, REQUEST_TIMEOUT).ok()?.id))
            };
            let publishes = group.settings().publish;
            Role::OUTPUTS.into_iter().filter(|_| publishes).filter_map(found).collect::<Vec<_>>()
        });
        for (role, id) in answer.await.unwrap_or_default() {
            if let Some(before) = known.insert(role, id).filter(|before| *before != id) {
                let detail = recreated_output(role.topic(group.settings()));
                tracing::warn!(%before, now = %id, detail, "an output topic has another id");
            }
        }
    }
}

/// Logs what has been missing for long and when it is there again. The lanes log only what they try themselves,
/// and librdkafka does not report what a join waits for. Never returns.
pub(super) async fn readiness(group: &Group, status: &StatusRegistry) {
    /// The reasons may alternate.
    static LIMIT: RateLimited = RateLimited::new(5, Duration::from_secs(60));
    let mut ticks = ticks(READINESS_TICK);
    let mut lines: BTreeMap<&'static str, Lasting> = BTreeMap::new();
    loop {
        ticks.tick().await;
        if lines.get("group").is_some_and(Lasting::is_long)
            && let Ok(reason) = ask(group, Group::join_wait).await
        {
            status.join_waits(reason);
        }
        let missing = status.missing();
        for (what, line) in lines.iter_mut().filter(|(what, _)| !missing.contains_key(*what)) {
            if let Some(lasted) = line.ends() {
                tracing::info!(dependency = what, after_seconds = lasted.as_secs_f64(), "no longer missing");
            }
        }
        for (what, reason) in missing {
            // The lanes log how the reason changes for database and broker.
            let text = if what == "group" { reason.as_str() } else { "" };
            if lines.entry(what).or_default().holds(text)
                && let Some(suppressed) = LIMIT.pass()
            {
                tracing::warn!(
                    dependency = what,
                    reason,
                    suppressed,
                    "not ready: this has been missing for long"
                );
            }
        }
    }
}

/// Keeps the log ends in the status registry up to date, for lag. Never returns.
pub(super) async fn ends(group: &Group, status: &StatusRegistry) {
    let mut ticks = ticks(ENDS_TICK);
    let mut reported = BTreeSet::new();
    let mut unread = Lasting::default();
    loop {
        ticks.tick().await;
        let partitions: Vec<Partition> = status.partitions().into_keys().collect();
        if partitions.is_empty() {
            continue;
        }
        // Taken before the request: records that arrive during it are not in the answer.
        let asked_at = metrics::now();
        let wanted = partitions.clone();
        let answer = ask(group, move |group| {
            let highs = high_watermarks(group, &wanted);
            last_stable_offsets(group, &wanted).map(|ends| (highs, ends))
        });
        match answer.await {
            Ok(Ok((highs, ends))) => {
                status.ends(asked_at, partitions.into_iter().zip(ends));
                match highs {
                    Ok(highs) => {
                        status.high_watermarks(asked_at, highs);
                        unread.ends();
                    }
                    Err(error) if unread.holds("") => tracing::warn!(
                        %error,
                        "cannot read the high watermarks, so open transactions of producers are not seen"
                    ),
                    Err(_) => {}
                }
                report_open_transactions(asked_at, status, &mut reported);
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

/// Logs the open transactions that have become long, once each.
fn report_open_transactions(
    now: TimestampMs,
    status: &StatusRegistry,
    reported: &mut BTreeSet<(Partition, NextOffset)>,
) {
    let mut records = 0;
    let mut long = BTreeSet::new();
    for (partition, status) in status.partitions() {
        if let Some(open) = status.open_transaction()
            && open.age_ms(now) >= TRANSACTION_LONG_MS
        {
            records += open.records;
            long.insert((partition, open.at));
        }
    }
    if let Some((partition, offset)) = long.difference(reported).next() {
        tracing::warn!(
            records,
            partitions = long.len(),
            %partition,
            %offset,
            "a producer's open transaction holds records back for more than a minute; kafka-transactions.sh \
             describe-producers names the producer"
        );
    }
    *reported = long;
}

/// Exports the input topic's retention, for alerts on records that are about to be deleted, and checks the
/// topics' settings. The metrics are absent without the permission to read these. Never returns.
pub(super) async fn topic_settings(group: &Group) {
    let mut ticks = ticks(SETTINGS_CHECK);
    let mut violated = BTreeSet::new();
    let mut unreadable = Repeated::default();
    loop {
        ticks.tick().await;
        let answer = ask(group, |group| {
            let client = group.consumer().client();
            let retention = topic_setting(client, group.topic(), "retention.ms", REQUEST_TIMEOUT);
            (retention, topic_rules::check(client, group.settings()))
        });
        let Ok((retention, checked)) = answer.await else { continue };
        let mut unread = Vec::new();
        match retention {
            // -1 means unlimited.
            Ok(ms) => metrics::input_retention(ms.parse().ok().map(Duration::from_millis)),
            Err(error) => unread.push(format!("{} retention.ms: {error}", group.topic())),
        }
        for Checked { role, rule, violation } in checked {
            match violation {
                Err(error) => unread.push(error),
                Ok(None) => {
                    violated.remove(&(role, rule.setting));
                }
                Ok(Some(detail)) if violated.insert((role, rule.setting)) => match rule.action {
                    Action::Refuse => tracing::error!(detail, "a topic's setting loses payments or events"),
                    Action::Warn => tracing::warn!(detail, "a topic's setting is not as it should be"),
                },
                Ok(Some(_)) => {}
            }
        }
        let error = unread.join("; ");
        if unread.is_empty() {
            unreadable.end();
        } else if unreadable.is_due(&error) {
            tracing::warn!(
                error,
                "settings of topics cannot be read, so they are not checked; if this is refused, the right \
                 DescribeConfigs is missing"
            );
            unreadable.written(error);
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
