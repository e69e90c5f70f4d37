//! SIGHUP, and files of secrets that change: the daemon drains its lanes and makes all its clients and sessions anew, the
//! group's member last. A static member that joins again within `session.timeout.ms` keeps its partitions.
//!
//! Before that, a client and a session are made beside those in use. If these do not work, or lead elsewhere, everything
//! stays as it is, and they are tried again at each check.
//!
//! Each reload interrupts the lanes for about a second. So SIGHUP that is sent in a loop, and files that change all the
//! time, lead to few of them.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until, timeout};

use super::REQUEST_TIMEOUT;
use crate::config::{ConfigError, Effective, Loaded, Settings};
use crate::domain::cursor::Identity;
use crate::kafka::client::CLIENT_MAX;
use crate::kafka::group::Group;
use crate::kafka::librdkafka::topic_id;
use crate::kafka::token;
use crate::postgres::binding::database_id;
use crate::postgres::connection::describe;
use crate::secrets::{Blocking, READ_MAX, fingerprint};
use crate::telemetry::logging::{LogHandle, RateLimited};
use crate::telemetry::metrics;
use crate::telemetry::status::StatusRegistry;

/// Interval between looks at the files that Kafka clients read when they are created.
const CHECK: Duration = Duration::from_secs(10);
/// Least time between two reloads because of files that have changed.
const FILES_PAUSE: Duration = Duration::from_secs(60);
/// Least time between two SIGHUPs that are served; several within it count as one.
const HANGUP_PAUSE: Duration = Duration::from_secs(5);

/// Why clients are made anew.
const OF_FILES: &str = "a file has changed";

/// Reads the files that clients read.
static FILES: LazyLock<Blocking> = LazyLock::new(Blocking::new);
/// Reads settings: also while the files in use hang.
static SETTINGS: LazyLock<Blocking> = LazyLock::new(Blocking::new);
/// Makes clients that are tried out: their files may hang, and those in use must go on.
static TRIED: LazyLock<Blocking> = LazyLock::new(Blocking::new);

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
    pub load: Arc<dyn Fn() -> Result<Loaded, ConfigError> + Send + Sync>,
    /// Takes the level.
    pub log: Arc<LogHandle>,
}

/// What the daemon runs with, and what it is to run with.
pub struct Reload {
    on_hangup: Option<OnHangup>,
    running: Loaded,
    /// Contents of the files when the clients in use were made; `None` if they could not be read in time.
    files: Option<u64>,
    /// No reload because of the files before this time.
    files_at: Instant,
    /// SIGHUP has come and the settings have not been read yet.
    has_hung_up: bool,
    /// No SIGHUP is served before this time.
    hangup_at: Instant,
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
        Self {
            on_hangup,
            running,
            files: None,
            files_at: Instant::now(),
            has_hung_up: false,
            hangup_at: Instant::now(),
            wanted: None,
            checks,
            failure: None,
        }
    }

    /// The settings for clients and sessions that are made now.
    pub(super) async fn begin(&mut self) -> Settings {
        self.files = self.read_files().await.ok();
        self.running.settings.clone()
    }

    async fn read_files(&self) -> Result<u64, String> {
        let files: Vec<String> = self.running.settings.kafka.files().map(str::to_owned).collect();
        let doing = format!("reading {}", files.join(", "));
        let read = FILES.within(READ_MAX, move || fingerprint(files.iter().map(String::as_str))).await;
        read.map_err(|error| format!("{doing}: {error}"))
    }

    /// Returns once all clients and sessions are to be made anew. With an `identity`, only if others work beside those in
    /// use.
    pub(super) async fn due(&mut self, identity: Option<&Identity>) {
        loop {
            let hung_up = async {
                sleep_until(self.hangup_at).await;
                match &mut self.on_hangup {
                    Some(on) => on.hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The last call of this method ended before the settings were read.
                () = std::future::ready(()), if self.has_hung_up => {}
                Some(()) = hung_up => {
                    self.has_hung_up = true;
                    self.hangup_at = Instant::now() + HANGUP_PAUSE;
                }
                _ = self.checks.tick() => {}
            }
            if self.has_hung_up {
                self.read().await;
                self.has_hung_up = false;
            }
            // Settings that do not work must not keep new files from being taken.
            let mut failed = None;
            let of_files = match self.read_files().await {
                Ok(files) => self.files != Some(files),
                Err(error) => {
                    failed = Some(error);
                    false
                }
            };
            let of_files = of_files.then(|| (self.running.clone(), OF_FILES));
            let of_hangup = self.wanted.clone().map(|wanted| (wanted, "SIGHUP"));
            for (next, reason) in of_hangup.into_iter().chain(of_files) {
                let tried = match identity {
                    Some(identity) => try_out(&next.settings, identity).await,
                    None => Ok(()),
                };
                match tried {
                    // A failure is told at once; the reload waits.
                    Ok(()) if reason == OF_FILES && Instant::now() < self.files_at => {}
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
    async fn read(&mut self) {
        let Some(on) = &self.on_hangup else { return };
        self.failure = None;
        // What an earlier SIGHUP has read is in the file no more.
        self.wanted = None;
        let load = Arc::clone(&on.load);
        let read = SETTINGS.within(READ_MAX, move || load().map_err(|error| error.to_string())).await;
        let mut read = match read.flatten() {
            Ok(read) => read,
            Err(error) => {
                metrics::reloaded(false);
                tracing::error!(error, "SIGHUP: the settings cannot be used; those in use stay");
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
        } else {
            self.files_at = Instant::now() + FILES_PAUSE;
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
    let ask = move || {
        kafka.password()?;
        // Beside the one in use, which stays until the reload.
        token::try_command(&kafka)?;
        let status = Arc::<StatusRegistry>::default();
        let (group, _end) = Group::new(&kafka, Vec::new(), Arc::clone(&status))
            .map_err(|error| format!("creating a Kafka client: {error}"))?;
        topic_id(group.consumer(), group.topic(), REQUEST_TIMEOUT).map_err(|error| {
            group.listen();
            let reason = status.broker_refusal().unwrap_or_else(|| error.to_string());
            format!("asking for the input topic: {reason}")
        })
    };
    let found = TRIED.within(CLIENT_MAX, ask).await;
    let (found, _) = found.map_err(|error| format!("creating a Kafka client: {error}"))??;
    if found != identity.topic_id {
        return Err(format!("kafka.bootstrap_servers leads to another input topic, with id {found}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_file_that_changes_all_the_time_leads_to_one_reload_a_minute() {
        // GIVEN a password file
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let write = |text: &str| fs::write(path, text).unwrap();
        write("0");
        let variables = [
            ("PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1"),
            ("PAYMENT_WRITER__KAFKA__PASSWORD_FILE", path),
        ];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        let loaded = Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap();
        let mut reload = Reload::new(loaded, None);
        drop(reload.begin().await);

        // WHEN it changes, THEN that is noticed at the next check
        write("1");
        let began = Instant::now();
        reload.due(None).await;
        assert!(began.elapsed() <= CHECK, "{:?}", began.elapsed());
        drop(reload.begin().await);

        // WHEN it changes again at once, THEN it is taken a minute after the last time
        for text in 2..6 {
            write(&text.to_string());
            let began = Instant::now();
            reload.due(None).await;
            let elapsed = began.elapsed();
            assert!(elapsed > FILES_PAUSE - CHECK && elapsed <= FILES_PAUSE + CHECK, "{elapsed:?}");
            drop(reload.begin().await);
        }
    }

    #[tokio::test]
    async fn sighup_reads_every_setting_that_it_applies_and_forgets_what_the_last_one_read() {
        // GIVEN settings of which each is another one at SIGHUP
        let [former, new] = ["1", "2"].map(|text| {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), text).unwrap();
            file
        });
        let settings = |file: &tempfile::NamedTempFile, number: &str| {
            let text = |text: &str| text.replace('#', number);
            let variables = [
                ("KAFKA__BOOTSTRAP_SERVERS", text("127.0.0.1:#")),
                ("KAFKA__PASSWORD_FILE", file.path().to_str().unwrap().to_owned()),
                ("KAFKA__TOKEN_COMMAND", text("token#")),
                ("KAFKA__PROPERTIES__SECURITY_PROTOCOL", "SASL_SSL".to_owned()),
                ("KAFKA__PROPERTIES__SASL_MECHANISM", "OAUTHBEARER".to_owned()),
                ("KAFKA__PROPERTIES__SASL_USERNAME", text("user#")),
                ("POSTGRES__URL", text("postgres://u@127.0.0.1:1/url#")),
                ("POSTGRES__HOUSEKEEPING_URL", text("postgres://u@127.0.0.1:1/housekeeping#")),
                ("POSTGRES__PASSWORD_COMMAND", text("command#")),
                ("LOG__LEVEL", text("payment_writer=info,other#=warn")),
                ("LANES", number.to_owned()),
            ];
            let variables =
                variables.map(|(name, value)| (format!("PAYMENT_WRITER__{name}").into(), value.into()));
            Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap()
        };
        let running = settings(&former, "1");
        let wanted = settings(&new, "2");
        for name in APPLIED {
            let differ = changed(&running.effective, &wanted.effective, is_applied);
            assert!(differ.split(", ").any(|key| key.starts_with(name)), "{name}: {differ}");
        }
        let (log, _filter) = LogHandle::new(&running.settings.log.level).unwrap();
        let hangup = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).unwrap();
        let read = wanted.clone();
        let load = Arc::new(move || Ok(read.clone()));
        let on_hangup = OnHangup { hangup, load, log: Arc::new(log) };
        let mut reload = Reload::new(running.clone(), Some(on_hangup));

        // WHEN it has read them, THEN those that it applies are the new ones, and the others those in use
        reload.failure = Some("of settings before".to_owned());
        reload.read().await;
        let mut expected = wanted.settings.clone();
        expected.lanes = running.settings.lanes;
        let read = reload.wanted.clone().unwrap();
        assert_eq!(format!("{:?}", read.settings), format!("{expected:?}"));
        // AND a failure of the new ones is told, also if it is the same
        assert_eq!(reload.failure, None);

        // WHEN the next SIGHUP finds settings that cannot be used, THEN the last ones are not tried any more
        if let Some(on_hangup) = &mut reload.on_hangup {
            on_hangup.load = Arc::new(|| Err(ConfigError { problems: vec!["gone".to_owned()] }));
        }
        reload.read().await;
        assert!(reload.wanted.is_none());
    }
}
