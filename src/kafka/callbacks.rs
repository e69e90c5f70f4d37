//! Callbacks of Kafka clients, which librdkafka runs while a client is polled.

use std::error::Error;

use rdkafka::ClientContext;
use rdkafka::client::OAuthToken;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;
use rdkafka::message::DeliveryResult;
use rdkafka::producer::ProducerContext;
use rdkafka::types::RDKafkaErrorCode;

use super::token;

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
/// own lines report that once.
#[derive(Default)]
pub struct Callbacks<L>(pub L);

/// Callbacks of a client that nothing else listens to.
pub type QuietLog = Callbacks<()>;

impl<L: Listener> ClientContext for Callbacks<L> {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        token::generate(property)
    }

    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
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

/// Ignores delivery reports, because a transaction that lost a message fails as a whole.
impl<L: Listener> ProducerContext for Callbacks<L> {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}
