//! Asking a daemon's admin port.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::samples::Samples;

const TIMEOUT: Duration = Duration::from_secs(3);
/// With 1,000 partitions `/metrics` is below 1 MB.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// An admin port could not be asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{url} does not answer as a daemon's admin port: {reason}")]
pub struct FetchError {
    url: String,
    /// What went wrong.
    pub reason: String,
}

/// A daemon's admin port.
#[derive(Clone)]
pub struct Source {
    /// `http://host:port`
    pub url: String,
    agent: ureq::Agent,
}

/// `/status`, as far as it is shown.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Status {
    #[serde(default)]
    pub(super) missing: BTreeMap<String, String>,
    pub(super) build: Build,
    pub(super) partitions: BTreeMap<String, Partition>,
    #[serde(default)]
    pub(super) recent_problems: Vec<Problem>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Build {
    pub(super) version: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Partition {
    pub(super) state: String,
    pub(super) lag_records: Option<i64>,
    pub(super) lag_seconds: Option<f64>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Problem {
    pub(super) at: String,
    pub(super) level: String,
    pub(super) message: String,
}

/// What one daemon said at one moment.
#[derive(Clone, Debug)]
pub struct Instance {
    pub(super) at: Instant,
    pub(super) samples: Samples,
    pub(super) status: Status,
}

impl Source {
    /// The admin port at `url`, such as `http://127.0.0.1:9464`; `http://` may be left out.
    pub fn new(url: &str) -> Self {
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let agent =
            ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).proxy(None).build().new_agent();
        Self { url: url.trim_end_matches('/').to_owned(), agent }
    }

    /// Asks for everything.
    ///
    /// # Errors
    /// Nobody answers there, or not as a daemon would.
    pub fn fetch(&self) -> Result<Instance, FetchError> {
        let (metrics, status) = (self.get("/metrics")?, self.get("/status")?);
        let status =
            serde_json::from_str(&status).map_err(|error| self.failed(&format!("/status: {error}")))?;
        Ok(Instance { at: Instant::now(), samples: Samples::parse(&metrics), status })
    }

    fn get(&self, path: &str) -> Result<String, FetchError> {
        let text = |mut answer: ureq::http::Response<ureq::Body>| {
            answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string()
        };
        let answer = self.agent.get(format!("{}{path}", self.url)).call();
        answer.and_then(text).map_err(|error| self.failed(&format!("{path}: {error}")))
    }

    fn failed(&self, reason: &str) -> FetchError {
        FetchError { url: self.url.clone(), reason: reason.to_owned() }
    }
}

#[cfg(test)]
impl Instance {
    pub(super) fn of(at: Instant, metrics: &str, status: &str) -> Self {
        let status = serde_json::from_str(status).unwrap();
        Self { at, samples: Samples::parse(metrics), status }
    }
}
