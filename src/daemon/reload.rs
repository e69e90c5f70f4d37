//! SIGHUP, and files of secrets that change: the daemon drains its lanes and makes all its clients and sessions anew, the
//! group's member last. A static member that joins again within `session.timeout.ms` keeps its partitions.
//!
//! Before that, a client and a session are made beside those in use. If these do not work, or lead elsewhere, everything
//! stays as it is, and they are tried again at each check.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};

use super::REQUEST_TIMEOUT;
use crate::config::{ConfigError, Effective, Loaded, Settings};
use crate::domain::cursor::Identity;
use crate::kafka::group::{Group, member_config};
use crate::kafka::librdkafka::topic_id;
use crate::kafka::token;
use crate::postgres::binding::database_id;
use crate::postgres::connection::describe;
use crate::secrets::fingerprint;
use crate::telemetry::logging::{LogHandle, RateLimited};
use crate::telemetry::metrics;
use crate::telemetry::status::StatusRegistry;

/// Interval between looks at the files that Kafka clients read when they are created.
const CHECK: Duration = Duration::from_secs(10);

/// The settings that SIGHUP applies. The others need a restart.
const APPLIED: [&str; 8] = [
    "kafka.bootstrap_servers",
    "kafka.password_file",
    "kafka.token_command",
    "kafka.properties",
    "postgres.url",
    "postgres.housekeeping_url",
    "postgres.password_command",
    "log.level",
];

fn is_applied(key: &str) -> bool {
    APPLIED
        .iter()
        .any(|name| key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// What SIGHUP does.
pub struct OnHangup {
    /// Where SIGHUP arrives.
    pub hangup: Signal,
    /// Reads the settings again.
    pub load: Box<dyn Fn() -> Result<Loaded, ConfigError> + Send>,
    /// Takes the level.
    pub log: Arc<LogHandle>,
}

/// What the daemon runs with, and what it is to run with.
pub struct Reload {
    on_hangup: Option<OnHangup>,
    running: Loaded,
    /// Contents of the files when the clients in use were made.
    files: u64,
    /// What SIGHUP has read and what does not work yet.
    wanted: Option<Loaded>,
    checks: Interval,
    /// Why what was tried last does not work.
    failure: Option<String>,
}

impl Reload {
    /// Begins with these settings. `None`: SIGHUP is not handled.
    pub fn new(running: Loaded, on_hangup: Option<OnHangup>) -> Self {
        let mut checks = interval_at(Instant::now() + CHECK, CHECK);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        metrics::reloaded(true);
        Self { on_hangup, running, files: 0, wanted: None, checks, failure: None }
    }

    /// The settings for clients and sessions that are made now.
    pub(super) fn begin(&mut self) -> Settings {
        self.files = self.read_files();
        self.running.settings.clone()
    }

    fn read_files(&self) -> u64 {
        fingerprint(self.running.settings.kafka.files())
    }

    /// Returns once all clients and sessions are to be made anew. With an `identity`, only if others work beside those in
    /// use.
    pub(super) async fn due(&mut self, identity: Option<&Identity>) {
        loop {
            let hung_up = async {
                match &mut self.on_hangup {
                    Some(on) => on.hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(()) = hung_up => self.read(),
                _ = self.checks.tick() => {}
            }
            // Settings that do not work must not keep new files from being taken.
            let of_files =
                (self.read_files() != self.files).then(|| (self.running.clone(), "a file has changed"));
            let of_hangup = self.wanted.clone().map(|wanted| (wanted, "SIGHUP"));
            let mut failed = None;
            for (next, reason) in of_hangup.into_iter().chain(of_files) {
                let tried = match identity {
                    Some(identity) => try_out(&next.settings, identity).await,
                    None => Ok(()),
                };
                match tried {
                    Ok(()) => return self.apply(next, reason),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            let Some(error) = failed else {
                // Files that were wrong are again those in use.
                if self.failure.take().is_some() {
                    metrics::reloaded(true);
                }
                continue;
            };
            metrics::reloaded(false);
            static LIMIT: RateLimited = RateLimited::new(3, Duration::from_secs(60));
            if self.failure.as_ref() != Some(&error)
                && let Some(suppressed) = LIMIT.pass()
            {
                tracing::warn!(
                    %error,
                    suppressed,
                    "the new secrets, certificates and settings do not work; those in use stay, and the new ones \
                     are tried every few seconds"
                );
                self.failure = Some(error);
            }
        }
    }

    /// Reads the settings again.
    fn read(&mut self) {
        let Some(on) = &self.on_hangup else { return };
        self.failure = None;
        // What an earlier SIGHUP has read is in the file no more.
        self.wanted = None;
        let mut read = match (on.load)() {
            Ok(read) => read,
            Err(error) => {
                metrics::reloaded(false);
                tracing::error!(%error, "SIGHUP: the settings cannot be used; those in use stay");
                return;
            }
        };
        let (new, mut settings) = (read.settings, self.running.settings.clone());
        settings.kafka.bootstrap_servers = new.kafka.bootstrap_servers;
        settings.kafka.password_file = new.kafka.password_file;
        settings.kafka.token_command = new.kafka.token_command;
        settings.kafka.properties = new.kafka.properties;
        settings.postgres = new.postgres;
        settings.log.level = new.log.level;
        if on.log.level() != settings.log.level
            && let Err(error) = on.log.set_level(&settings.log.level)
        {
            tracing::error!(error, "log.level cannot be changed");
        }
        let left = changed(&self.running.effective, &read.effective, |key| !is_applied(key));
        if !left.is_empty() {
            tracing::warn!(settings = left, "SIGHUP: these settings have changed and need a restart");
        }
        read.settings = settings;
        self.wanted = Some(read);
    }

    fn apply(&mut self, next: Loaded, reason: &'static str) {
        let settings = changed(&self.running.effective, &next.effective, is_applied);
        if reason == "SIGHUP" {
            self.wanted = None;
            // The next clients wait for a new token.
            token::forget();
        }
        tracing::info!(
            reason,
            settings,
            "reloaded; all connections are made anew, with secrets and certificates as they are now"
        );
        let new = next.effective.into_iter().filter(|setting| is_applied(&setting.key));
        self.running.effective.retain(|setting| !is_applied(&setting.key));
        self.running.effective.extend(new);
        self.running.settings = next.settings;
        self.failure = None;
        metrics::reloaded(true);
    }
}

/// Names of the settings that differ.
fn changed(old: &[Effective], new: &[Effective], is_wanted: fn(&str) -> bool) -> String {
    let differ = |one: &Effective, others: &[Effective]| {
        is_wanted(&one.key) && !others.iter().any(|other| other.key == one.key && other.value == one.value)
    };
    let mut names: Vec<&str> =
        new.iter().filter(|setting| differ(setting, old)).map(|s| s.key.as_str()).collect();
    names.extend(old.iter().filter(|setting| differ(setting, new)).map(|s| s.key.as_str()));
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

/// Makes a session and a client with these settings, and checks where they lead.
async fn try_out(settings: &Settings, identity: &Identity) -> Result<(), String> {
    let (client, _driver) = settings.postgres.url.connect().await.map_err(|error| error.to_string())?;
    let answer = timeout(REQUEST_TIMEOUT, database_id(&client)).await;
    let found =
        answer.map_err(|_| "no answer from the database in time")?.map_err(|error| describe(&error))?;
    if found != identity.database_id {
        return Err(format!("postgres.url leads to another database, with id {found}"));
    }
    let kafka = settings.kafka.clone();
    kafka.password()?;
    token::first_token(&member_config(&kafka)).await;
    let ask = move || {
        let status = Arc::<StatusRegistry>::default();
        let (group, _end) = Group::new(&kafka, Vec::new(), Arc::clone(&status))
            .map_err(|error| format!("creating a Kafka client: {error}"))?;
        topic_id(group.consumer(), group.topic(), REQUEST_TIMEOUT).map_err(|error| {
            group.listen();
            let reason = status.broker_refusal().unwrap_or_else(|| error.to_string());
            format!("asking for the input topic: {reason}")
        })
    };
    let (found, _) = tokio::task::spawn_blocking(ask).await.map_err(|error| error.to_string())??;
    if found != identity.topic_id {
        return Err(format!("kafka.bootstrap_servers leads to another input topic, with id {found}"));
    }
    Ok(())
}
