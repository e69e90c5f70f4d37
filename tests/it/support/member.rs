//! One instance of the daemon across restarts: always the same member of the group.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use serde_json::Value;

use super::daemon::{LEFT_TO_FILE, TESTED_PROGRAM};
use super::{Daemon, PATIENCE, Scope, Servers, wait_until_within};

/// An instance's id and settings, as environment variables.
#[derive(Clone)]
pub struct Member {
    settings: Vec<(String, String)>,
}

impl Member {
    pub fn new(instance_id: &str) -> Member {
        Member { settings: Vec::new() }.with("KAFKA__INSTANCE_ID", instance_id)
    }

    /// Adds a setting by its environment variable without the prefix.
    pub fn with(mut self, name: &str, value: &str) -> Member {
        self.settings.push((format!("PAYMENT_WRITER__{name}"), value.to_owned()));
        self
    }

    /// Leaves this setting of the scope to the settings file.
    pub fn without(self, name: &str) -> Member {
        self.with(name, LEFT_TO_FILE)
    }

    /// Adds an environment variable that is not a setting.
    pub fn with_variable(mut self, name: &str, value: &str) -> Member {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs another build of the program.
    pub fn of_program(self, path: &str) -> Member {
        self.with_variable(TESTED_PROGRAM, path)
    }

    /// The group removes a stopped member after two seconds instead of ten.
    pub fn soon_forgotten(self) -> Member {
        self.with_session("2000", "500")
    }

    /// Session timeout and heartbeat interval in the group, in milliseconds.
    pub fn with_session(self, timeout_ms: &str, heartbeat_ms: &str) -> Member {
        self.with("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", timeout_ms)
            .with("KAFKA__PROPERTIES__HEARTBEAT_INTERVAL_MS", heartbeat_ms)
    }

    /// Uses the secure listener of [`Servers::with_tls`], by a SASL mechanism.
    pub fn with_sasl(self, servers: &Servers, certificates: &Path, mechanism: &str) -> Member {
        self.with("KAFKA__BOOTSTRAP_SERVERS", servers.kafka_secure())
            .with("KAFKA__PROPERTIES__SECURITY_PROTOCOL", "SASL_SSL")
            .with("KAFKA__PROPERTIES__SASL_MECHANISM", mechanism)
            .with("KAFKA__PROPERTIES__SSL_CA_LOCATION", certificates.join("ca.crt").to_str().unwrap())
    }

    pub fn run(&self, scope: &Scope<'_>, arguments: &[&str]) -> Daemon {
        self.run_at(scope, arguments, "")
    }

    pub fn start(&self, scope: &Scope<'_>) -> Daemon {
        self.run(scope, &["run"])
    }

    /// Starts it with a failpoint at which it exits or stops; see `src/failpoint.rs`.
    pub fn start_at(&self, scope: &Scope<'_>, failpoint: &str) -> Daemon {
        self.run_at(scope, &["run"], failpoint)
    }

    /// As [`Member::run`], with a failpoint at which it exits or stops.
    pub fn run_at(&self, scope: &Scope<'_>, arguments: &[&str], failpoint: &str) -> Daemon {
        assert!(
            failpoint.is_empty() || cfg!(feature = "failpoints"),
            "this test needs `cargo test --features failpoints`"
        );
        let own = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let settings: Vec<_> = own.chain([("PAYMENT_WRITER_FAILPOINT", failpoint)]).collect();
        scope.daemon_with(arguments, &settings)
    }

    /// Starts it with a failpoint at which it exits, and waits until it has.
    #[track_caller]
    pub fn die_at(&self, scope: &Scope<'_>, failpoint: &str) {
        let mut daemon = self.start_at(scope, failpoint);
        let status = daemon.wait();
        assert!(status.signal().is_some(), "{failpoint} was not reached: {status}\n{}", daemon.log());
    }

    /// Writes and publishes everything, and exits.
    #[track_caller]
    pub fn catch_up(&self, scope: &Scope<'_>) -> Daemon {
        let mut daemon = self.run(scope, &["run", "--until-caught-up"]);
        let status = daemon.wait();
        assert_eq!(status.code(), Some(0), "run --until-caught-up:\n{}", daemon.log());
        daemon
    }

    /// Starts it where it must fail: exit code 3 and `reason` in its output.
    #[track_caller]
    pub fn refuses(&self, scope: &Scope<'_>, arguments: &[&str], reason: &str) {
        let mut daemon = self.run(scope, arguments);
        daemon.ends_for_a_person(reason);
    }
}

impl Daemon {
    /// Waits for exit code 3 and for `reason` in its output.
    #[track_caller]
    pub fn ends_for_a_person(&mut self, reason: &str) {
        let status = self.wait();
        let log = self.log();
        assert_eq!(status.code(), Some(3), "{log}");
        assert!(log.contains(reason), "no {reason:?} in:\n{log}");
    }

    /// Drains it and expects exit code 0.
    #[track_caller]
    pub fn drains(&mut self) {
        self.terminate();
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{}", self.log());
    }

    /// `/status`; null while the admin port does not answer.
    pub fn status(&self) -> Value {
        let reply = self.get("/status").map(|reply| serde_json::from_str(&reply.body).unwrap());
        reply.unwrap_or_default()
    }

    /// Number of its partitions that are assigned and not in recovery.
    pub fn partitions(&self) -> usize {
        let status = self.status();
        let partitions = status["partitions"].as_object();
        partitions.map_or(0, |p| p.values().filter(|p| p["state"] != "opening").count())
    }

    #[track_caller]
    pub fn wait_for_partitions(&self, what: &str, condition: impl Fn(usize) -> bool) {
        wait_until_within(PATIENCE, what, || condition(self.partitions()));
    }
}
