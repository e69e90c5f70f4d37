//! Callbacks of Kafka clients, which librdkafka runs while a client is polled.

use std::error::Error;
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::client::OAuthToken;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

use super::token;
use crate::telemetry::logging::RateLimited;

/// Facility of librdkafka's lines about the Kerberos ticket. Such an error is only logged, and matters once the
/// ticket has expired.
const TICKET_REFRESH: &str = "SASLREFRESH";
/// Each client renews its ticket every minute by default (`sasl.kerberos.min.time.before.relogin`).
const TICKET_REFRESH_LOGGED_PER: Duration = Duration::from_secs(3_600);

/// What one kind of client does besides what all of them do ([`Callbacks`]).
pub trait Listener: Send + Sync {
    /// The client reported an error.
    fn error(&self, _code: Option<RDKafkaErrorCode>, _reason: &str) {}

    /// The client produced statistics.
    fn statistics(&self, _statistics: &[u8]) {}
}

impl Listener for () {}

/// Callbacks of every client: provide tokens, and forward librdkafka's log lines and errors at level debug.
/// These name brokers and topics, never a message. While a broker is down most of them repeat; the daemon's
/// own lines report that once: of the lanes, of `JoinFailure`, and of what `/readyz` has missed for long.
#[derive(Default)]
pub struct Callbacks<L>(pub L);

/// Callbacks of a client that nothing else listens to.
pub type QuietLog = Callbacks<()>;

impl<L: Listener> ClientContext for Callbacks<L> {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        if facility == TICKET_REFRESH && matches!(level, RDKafkaLogLevel::Error) {
            static LIMIT: RateLimited = RateLimited::new(1, TICKET_REFRESH_LOGGED_PER);
            if let Some(suppressed) = LIMIT.pass() {
                // The text also has the command, which may contain a secret.
                let end = message.rsplit(": ").next();
                let reason =
                    end.filter(|end| end.starts_with("exited ") || end.starts_with("received signal"));
                tracing::warn!(
                    reason,
                    suppressed,
                    "sasl.kerberos.kinit.cmd failed to renew the Kerberos ticket"
                );
            }
        }
        tracing::debug!(target: "librdkafka", facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.error(error.rdkafka_error_code(), reason);
        tracing::debug!(target: "librdkafka", %error, reason);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.0.statistics(statistics);
    }
}

impl ConsumerContext for QuietLog {}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_kerberos_ticket_that_cannot_be_renewed_is_a_warning_without_the_command() {
        let kept = Kept::default();
        let writer = kept.clone();
        let log = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::INFO)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(log, || {
            let client = QuietLog::default();
            let failed =
                "[thrd:main]: Kerberos ticket refresh failed: echo secret | kinit x: exited with code 1";
            client.log(RDKafkaLogLevel::Warning, TICKET_REFRESH, "[thrd:main]: Slow: secret");
            client.log(RDKafkaLogLevel::Error, "FAIL", "[thrd:b]: Connect failed");
            client.log(RDKafkaLogLevel::Error, TICKET_REFRESH, failed);
            client.log(RDKafkaLogLevel::Error, TICKET_REFRESH, failed);
        });
        let log = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        assert_eq!((log.lines().count(), log.matches("WARN").count()), (1, 1), "{log}");
        assert!(log.contains("exited with code 1") && !log.contains("secret"), "{log}");
    }
}
