//! `doctor`: checks each [`Dependency`] with the settings at hand. Writes nothing, except that a transactional id of
//! its own is initialised.

mod broker;
mod database;

use std::fmt::Display;
use std::time::Duration;

use serde::Serialize;
use strum::VariantArray;
use tokio::time::timeout;
use tokio_postgres::Client;

use crate::config::Settings;
use crate::dependencies::{Dependency, Does, Told};
use crate::domain::cursor::{Decision, IdentityMismatch, Mode, decide};
use crate::postgres::binding::{self, BindingError};
use crate::resolution;

/// Longest time for each of Kafka, Postgres, and the cursors that need both.
const EACH_MAX: Duration = Duration::from_secs(60);
/// Time and size limit of an answer of `/readyz`.
const READY_MAX: Duration = Duration::from_secs(3);
const READY_BYTES_MAX: u64 = 64 << 10;
const NO_ANSWER: &str = "no answer in time";

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// The daemon runs, or the check could not be made.
    Warn,
    /// Would stop or harm the daemon.
    Error,
}

/// The result of one check at one place.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Name of the [`Dependency`], or `readiness` of the daemon that runs with these settings.
    pub what: &'static str,
    /// Topic, group, prefix of transactional ids, brokers or database.
    #[serde(rename = "where")]
    pub place: String,
    /// What was found.
    pub says: String,
    /// The command or setting that answers it; empty if nothing is to be done, or is known.
    pub remedy: String,
}

#[derive(Default)]
struct Report(Vec<Finding>);

impl Report {
    fn add(&mut self, severity: Severity, what: Dependency, place: &str, says: impl Display, remedy: String) {
        let (what, place, says) = (what.name(), place.to_owned(), says.to_string());
        self.0.push(Finding { severity, what, place, says, remedy });
    }

    /// Adds what was found, with the remedy if it is not fine.
    fn judge(&mut self, what: Dependency, place: &str, is_fine: bool, found: impl Display) {
        if is_fine {
            return self.add(Severity::Ok, what, place, found, String::new());
        }
        let fact = what.fact();
        let severity = if fact.does == Does::Warn { Severity::Warn } else { Severity::Error };
        let remedy = ["TOPIC", "GROUP", "PREFIX"].iter().fold(fact.remedy, |r, word| r.replace(word, place));
        // What the daemon is told of explains itself.
        match fact.told {
            Told::Nothing => self.add(severity, what, place, format!("{found}: {}", fact.says), remedy),
            _ => self.add(severity, what, place, found, remedy),
        }
    }

    /// A check could not be made.
    fn skip(&mut self, what: Dependency, place: &str, why: impl Display, remedy: String) {
        self.add(Severity::Warn, what, place, format!("not checked: {why}"), remedy);
    }
}

/// Goes through all checks. Those that one server cannot answer do not keep the others from being made.
pub async fn examine(settings: &Settings) -> Vec<Finding> {
    let mut report = Report::default();
    let owned = settings.clone();
    let brokers = timeout(2 * EACH_MAX, tokio::task::spawn_blocking(move || broker::examine(&owned)));
    let database = timeout(EACH_MAX, database::examine(settings, &mut report));
    let (brokers, database) = tokio::join!(brokers, database);
    let client = database.unwrap_or_else(|_| {
        report.judge(Dependency::DatabaseReachable, &settings.postgres.url.to_string(), false, NO_ANSWER);
        None
    });
    match brokers {
        Ok(Ok(found)) => report.0.splice(0..0, found.0).for_each(drop),
        _ => report.judge(Dependency::BrokersReachable, &settings.kafka.bootstrap_servers, false, NO_ANSWER),
    }
    if let Some(client) = client {
        // Without an answer, they are among those that were not checked.
        let _ = timeout(EACH_MAX, identities(settings, &client, &mut report)).await;
    }
    report.0.extend(running(&settings.admin.listen.to_string()).await);
    for what in Dependency::VARIANTS {
        if report.0.iter().all(|finding| finding.what != what.name()) {
            let place = if what.is_of_kafka() { "kafka" } else { "postgres" };
            report.skip(*what, place, "an error or a missing answer kept it from that", String::new());
        }
    }
    // The worst is next to the prompt.
    report.0.sort_by_key(|finding| finding.severity);
    report.0
}

/// What `/readyz` says, if a daemon runs with these settings here.
async fn running(address: &str) -> Option<Finding> {
    let url = format!("http://{address}/readyz");
    let asked = tokio::task::spawn_blocking({
        let url = url.clone();
        move || {
            let config =
                ureq::Agent::config_builder().timeout_global(Some(READY_MAX)).http_status_as_error(false);
            let mut answer = config.proxy(None).build().new_agent().get(url).call().ok()?;
            let says = answer.body_mut().with_config().limit(READY_BYTES_MAX).read_to_string().ok()?;
            Some((answer.status().is_success(), says))
        }
    });
    let (is_ready, says) = asked.await.ok()??;
    // Something else may listen there.
    serde_json::from_str::<serde_json::Value>(&says).ok()?.get("ready")?;
    let severity = if is_ready { Severity::Ok } else { Severity::Warn };
    Some(Finding { severity, what: "readiness", place: url, says, remedy: String::new() })
}

/// Compares topic, group and database with each other, as the daemon does before it resumes partitions.
async fn identities(settings: &Settings, client: &Client, report: &mut Report) {
    let (kafka, database) = (&settings.kafka, settings.postgres.url.to_string());
    let view = match resolution::view(settings).await {
        Ok(view) => view,
        Err(error) => return report.skip(Dependency::Cursors, &kafka.group_id, error, String::new()),
    };
    let bound = binding::is_bound_to(client, &kafka.group_id, view.identity.topic_id, kafka.publish).await;
    let mut mismatches = match bound {
        Ok(()) => Vec::new(),
        Err(BindingError::Identity(mismatch)) => vec![mismatch],
        Err(error) => return report.skip(Dependency::Binding, &kafka.group_id, error, String::new()),
    };
    let mode = Mode { publishes: kafka.publish, adopts_database: false };
    let mut halted = 0;
    for known in &view.known {
        match decide(known, &view.identity, &mode) {
            Decision::Stop(mismatch) => mismatches.push(mismatch),
            Decision::Halt(_) => halted += 1,
            Decision::Go(_) | Decision::ScanOutputs { .. } => {}
        }
    }
    report.judge(
        Dependency::Cursors,
        &kafka.group_id,
        halted == 0,
        format!("{halted} partitions are halted"),
    );
    for (what, place) in [
        (Dependency::TopicIdentity, &kafka.input_topic),
        (Dependency::DatabaseIdentity, &database),
        (Dependency::Binding, &kafka.group_id),
    ] {
        match mismatches.iter().find(|mismatch| dependency_of(mismatch) == what) {
            Some(mismatch) => report.judge(what, place, false, mismatch),
            None => report.judge(what, place, true, "the one of the last commit, if there was one"),
        }
    }
}

fn dependency_of(mismatch: &IdentityMismatch) -> Dependency {
    match mismatch {
        IdentityMismatch::OtherTopic { .. } | IdentityMismatch::OtherLog { .. } => Dependency::TopicIdentity,
        IdentityMismatch::OtherDatabase { .. } => Dependency::DatabaseIdentity,
        IdentityMismatch::OtherGroup { .. } | IdentityMismatch::InstanceTaken { .. } => Dependency::Binding,
    }
}
