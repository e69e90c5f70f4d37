//! The daemon as a child process, and its metrics from the admin port.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::processes::Guarded;
use crate::site::{Site, failed};

const START_LIMIT: Duration = Duration::from_secs(20);
/// More than `shutdown.timeout`.
const STOP_LIMIT: Duration = Duration::from_secs(45);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// One instance.
pub struct Daemon {
    process: Guarded,
    admin: SocketAddr,
}

/// Records with an outcome: written and published, or needing neither.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Whether fetching has started.
    pub is_fetching: bool,
    pub written: u64,
    pub redelivered: u64,
    pub duplicates: u64,
    pub dead_letters: u64,
}

impl Progress {
    pub fn settled(&self) -> u64 {
        self.written + self.redelivered + self.duplicates + self.dead_letters
    }

    /// Combines several instances: whether all of them are fetching, and the sum of their records.
    pub fn plus(self, other: Self) -> Self {
        Self {
            is_fetching: self.is_fetching && other.is_fetching,
            written: self.written + other.written,
            redelivered: self.redelivered + other.redelivered,
            duplicates: self.duplicates + other.duplicates,
            dead_letters: self.dead_letters + other.dead_letters,
        }
    }
}

/// The admin server's address, from the daemon's log.
fn admin_address(log: &str) -> Option<SocketAddr> {
    let line = log.lines().find(|line| line.contains("the admin server listens"))?;
    let (_, address) = line.split_once("address=")?;
    address.split_ascii_whitespace().next()?.parse().ok()
}

fn parse_progress(status: &Value) -> Option<Progress> {
    let totals = status.get("totals")?;
    let total = |name| totals.get(name)?.as_u64();
    let partitions = status.get("partitions")?.as_object()?;
    Some(Progress {
        is_fetching: partitions.values().any(|p| p.get("state").and_then(Value::as_str) == Some("live")),
        written: total("written")?,
        redelivered: total("redelivered")?,
        duplicates: total("duplicates")?,
        dead_letters: total("dead_letters")?,
    })
}

/// Metrics by name and labels, as they are spelled: `name{label="value"}`.
#[derive(Clone, Debug, Default)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    /// Reads Prometheus's text format; lines that are no samples are skipped.
    pub fn parse(text: &str) -> Self {
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    /// 0 if the metric does not exist yet.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// The sum over all labels.
    pub fn sum(&self, name: &str) -> f64 {
        let is_of_name = |key: &&String| {
            key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        self.0.iter().filter(|(key, _)| is_of_name(key)).map(|(_, value)| value).sum()
    }

    /// The increase since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self(self.0.iter().map(|(name, value)| (name.clone(), value - before.get(name))).collect())
    }

    /// The sum over several processes.
    pub fn plus(mut self, other: &Self) -> Self {
        for (name, value) in &other.0 {
            *self.0.entry(name.clone()).or_default() += value;
        }
        self
    }
}

impl Daemon {
    /// Starts `payment-writer run` as this instance; `more` are settings as environment variables.
    pub fn start(site: &Site<'_>, instance: usize, more: &[(&str, &str)]) -> Outcome<Self> {
        let instance = format!("bench-{instance}");
        let mut settings = vec![
            ("KAFKA__INSTANCE_ID", instance.as_str()),
            // At this level only the line with the admin port is needed.
            ("LOG__LEVEL", "warn,payment_writer::cli::run=info"),
        ];
        settings.extend_from_slice(more);
        let mut process = site.start(&["run"], &settings)?;
        let began = Instant::now();
        let admin = loop {
            if let Some(address) = admin_address(&process.said()) {
                break address;
            }
            process.check_alive()?;
            if began.elapsed() > START_LIMIT {
                return Err(process.complain("the daemon does not log its admin port"));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Ok(Self { process, admin })
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    fn get(&self, path: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.admin, ANSWER_LIMIT)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        match reply.split_once("\r\n\r\n") {
            Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
            _ => Err(std::io::Error::other("unexpected response")),
        }
    }

    /// The body of an answer of the admin port.
    pub fn asked(&mut self, path: &str) -> Outcome<String> {
        self.get(path).map_err(|error| match self.process.check_alive() {
            Err(ended) => ended,
            Ok(()) => self.process.complain(&format!("requesting {path} from the daemon: {error}")),
        })
    }

    /// Reads its progress.
    pub fn progress(&mut self) -> Outcome<Progress> {
        let text = self.asked("/status")?;
        let status: Value = serde_json::from_str(&text).map_err(failed("reading /status"))?;
        parse_progress(&status).ok_or_else(|| "the response of /status has no totals".to_owned())
    }

    pub fn metrics(&mut self) -> Outcome<Metrics> {
        Ok(Metrics::parse(&self.asked("/metrics")?))
    }

    /// Returns an error if the daemon has exited.
    pub fn check_alive(&mut self) -> Outcome<()> {
        self.process.check_alive()
    }

    /// Its whole log.
    pub fn said(&self) -> String {
        self.process.said()
    }

    /// Adds the last lines of its log to an error.
    pub fn complain(&self, message: &str) -> String {
        self.process.complain(message)
    }

    /// Drains it and waits until it exits.
    pub fn stop(mut self) -> Outcome<()> {
        self.process.terminate();
        self.process.succeed(STOP_LIMIT)?;
        let _ = std::fs::remove_file(&self.process.log);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_admin_port_is_found_in_the_log() {
        let log = "a warning\n2026-01-01T00:00:00Z  INFO payment_writer::cli::run: the admin server listens \
                   address=127.0.0.1:4567\nmore";
        assert_eq!(admin_address(log).unwrap().port(), 4567);
        assert_eq!(admin_address("nothing yet"), None);
    }

    #[test]
    fn progress_is_read_from_the_status() {
        let status = serde_json::json!({
            "totals": {"written": 5, "duplicates": 2, "dead_letters": 1, "redelivered": 3},
            "partitions": {"0": {"state": "opening"}, "1": {"state": "live"}},
        });
        let progress = parse_progress(&status).unwrap();
        assert!(progress.is_fetching);
        assert_eq!((progress.settled(), progress.written), (11, 5));
        assert_eq!(parse_progress(&serde_json::json!({})), None);
    }

    #[test]
    fn metrics_are_read_and_subtracted() {
        let before = Metrics::parse("# HELP x y\na_total 3\nb_sum{phase=\"kafka\"} 0.5\n\n");
        let after = Metrics::parse("a_total 10\nb_sum{phase=\"kafka\"} 1.75\nnew 1\n");
        let since = after.since(&before).plus(&Metrics::parse("new 2"));
        assert_eq!(since.get("a_total"), 7.0);
        assert_eq!(since.get("b_sum{phase=\"kafka\"}"), 1.25);
        assert_eq!(since.get("new"), 3.0);
        assert_eq!(since.get("absent"), 0.0);
        let labelled = Metrics::parse("a{x=\"1\"} 2\na{x=\"2\"} 3\nab 7\n");
        assert_eq!((labelled.sum("a"), labelled.sum("ab"), labelled.sum("b")), (5.0, 7.0, 0.0));
    }
}
