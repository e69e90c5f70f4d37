//! Client of a daemon's admin port.

use std::time::{Duration, Instant};

use super::samples::Samples;
use super::status::StatusAnswer;

const TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum size of an answer; with 1,000 partitions `/metrics` is below 1 MB.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// Maximum size of the answer to a probe.
const PROBE_BYTES_MAX: u64 = 64 << 10;

/// A request to an admin port failed.
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
    /// `http://host:port` for display, without user and password.
    pub url: String,
    address: String,
    token: Option<String>,
    agent: ureq::Agent,
}

/// Removes user and password from an address.
fn without_user(address: &str) -> String {
    let Some((scheme, rest)) = address.split_once("://") else { return address.to_owned() };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

/// Answers of one daemon at one time.
#[derive(Clone, Debug)]
pub struct Instance {
    pub at: Instant,
    pub samples: Samples,
    pub status: StatusAnswer,
}

impl Source {
    /// Creates a client for `url`, such as `http://127.0.0.1:9464`; `http://` is optional. The token is that of
    /// `admin.token_file`.
    pub fn new(url: &str, token: Option<String>) -> Self {
        let address = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let address = address.trim_end_matches('/').to_owned();
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .proxy(None)
            .max_redirects(0)
            .build()
            .new_agent();
        Self { url: without_user(&address), address, token, agent }
    }

    /// Requests metrics and status.
    ///
    /// # Errors
    /// If there is no answer, or it is not a daemon's.
    pub fn fetch(&self) -> Result<Instance, FetchError> {
        let metrics = self.get("/metrics", ANSWER_BYTES_MAX)?;
        let status = self.status(ANSWER_BYTES_MAX)?;
        Ok(Instance { at: Instant::now(), samples: Samples::parse(&metrics), status })
    }

    /// Requests the status, of at most `bytes_max`.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch).
    pub fn status(&self, bytes_max: u64) -> Result<StatusAnswer, FetchError> {
        let status = self.get("/status", bytes_max)?;
        serde_json::from_str(&status).map_err(|error| self.failed(&format!("/status: {error}")))
    }

    /// Requests a probe: status code and text, whatever they say.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn probe(&self, path: &str) -> Result<(u16, String), FetchError> {
        let request = self.agent.get(format!("{}{path}", self.address));
        let request = request.config().http_status_as_error(false).build();
        let answered = request.call().and_then(|mut answer| {
            let text = answer.body_mut().with_config().limit(PROBE_BYTES_MAX).read_to_string()?;
            Ok((answer.status().as_u16(), text))
        });
        answered.map_err(|error| self.failed(&format!("{path}: {error}")))
    }

    fn get(&self, path: &str, bytes_max: u64) -> Result<String, FetchError> {
        let text = |mut answer: ureq::http::Response<ureq::Body>| {
            // A redirection that is not followed is no error to the client.
            if !answer.status().is_success() {
                return Err(ureq::Error::StatusCode(answer.status().as_u16()));
            }
            answer.body_mut().with_config().limit(bytes_max).read_to_string()
        };
        let mut request = self.agent.get(format!("{}{path}", self.address));
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let answer = request.call();
        answer.and_then(text).map_err(|error| self.failed(&format!("{path}: {error}")))
    }

    fn failed(&self, reason: &str) -> FetchError {
        let reason = reason.replace(&self.address, &self.url).replace(char::is_control, "\u{fffd}");
        FetchError { url: self.url.clone(), reason }
    }
}

#[cfg(test)]
impl Instance {
    pub fn of(at: Instant, metrics: &str, status: &str) -> Self {
        let status = serde_json::from_str(status).unwrap();
        Self { at, samples: Samples::parse(metrics), status }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_password_of_an_address_are_not_shown() {
        for (given, shown) in [
            ("http://me:pass@127.0.0.1:1/", "http://127.0.0.1:1"),
            ("me:pass@host:1", "http://host:1"),
            ("https://a@b@host/x@y", "https://host/x@y"),
            ("127.0.0.1:9464", "http://127.0.0.1:9464"),
        ] {
            assert_eq!(Source::new(given, None).url, shown);
        }
        let failed = Source::new("http://me:pass@127.0.0.1:1", None).fetch().unwrap_err().to_string();
        assert!(!failed.contains("pass@"), "{failed}");
    }
}
