//! A producer's client, which counts what librdkafka takes for delivered without a broker's word.
//!
//! A request to produce may be refused while the next one to the same partition is already on its way. A broker that
//! has no sequence numbers of this producer accepts any first number (KIP-360, since Kafka 2.5; from 4.5 not in a partition
//! that never held a record, KAFKA-15591), so it accepts the second request. librdkafka then concludes that the broker
//! has the first one, too ("implicit ack" in `rd_kafka_handle_idempotent_Produce_success`), and reports messages as
//! delivered that are in no log. The messages of such a report have no offset.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaType};
use rdkafka_sys as sys;

use super::{millis, set_token};

/// Name of the interceptor, for librdkafka's log.
const INTERCEPTOR: &CStr = c"payment-writer";

/// An idempotent producer's client. `make_client` creates it.
pub struct ProducerClient<C: ClientContext + 'static> {
    client: Client<C>,
    queue: *mut sys::rd_kafka_queue_t,
    // Declared after the client, whose threads write to it until the client is destroyed.
    counts: Arc<Counts>,
}

/// Messages since the client was made.
#[derive(Default)]
struct Counts {
    unconfirmed: AtomicU64,
    failed: AtomicU64,
    /// Code of the first failure; 0: none.
    first_failure: AtomicI32,
}

// SAFETY: the queue belongs to the client, which is thread safe; it is released in `drop`.
unsafe impl<C: ClientContext> Send for ProducerClient<C> {}
// SAFETY: as above; all its calls may be made from any thread.
unsafe impl<C: ClientContext> Sync for ProducerClient<C> {}

impl<C: ClientContext + 'static> FromClientConfigAndContext<C> for ProducerClient<C> {
    #[expect(clippy::disallowed_methods, reason = "this is how `make_client` creates it")]
    fn from_config_and_context(config: &ClientConfig, context: C) -> KafkaResult<Self> {
        let native = config.create_native_config()?;
        let counts = Arc::<Counts>::default();
        let events = sys::RD_KAFKA_EVENT_DR
            | sys::RD_KAFKA_EVENT_STATS
            | sys::RD_KAFKA_EVENT_ERROR
            | sys::RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH;
        // SAFETY: the configuration is live; the counts outlive the client, see the order of its fields.
        unsafe {
            sys::rd_kafka_conf_set_events(native.ptr(), events);
            sys::rd_kafka_conf_interceptor_add_on_new(
                native.ptr(),
                INTERCEPTOR.as_ptr(),
                Some(on_new),
                Arc::as_ptr(&counts).cast_mut().cast(),
            );
        }
        let client = Client::new(config, native, RDKafkaType::RD_KAFKA_PRODUCER, context)?;
        // SAFETY: the client is live; the reference to its queue is released in `drop`.
        let queue = unsafe { sys::rd_kafka_queue_get_main(client.native_ptr()) };
        Ok(Self { client, queue, counts })
    }
}

/// Interceptors can be added only while a client is being created.
unsafe extern "C" fn on_new(
    client: *mut sys::rd_kafka_t,
    _: *const sys::rd_kafka_conf_t,
    counts: *mut c_void,
    _: *mut c_char,
    _: usize,
) -> sys::rd_kafka_resp_err_t {
    // SAFETY: librdkafka passes the client that it is creating, and the pointer that it was given.
    unsafe {
        sys::rd_kafka_interceptor_add_on_acknowledgement(
            client,
            INTERCEPTOR.as_ptr(),
            Some(on_acknowledgement),
            counts,
        )
    }
}

/// Runs for each message on the thread of a broker.
unsafe extern "C" fn on_acknowledgement(
    _: *mut sys::rd_kafka_t,
    message: *mut sys::rd_kafka_message_t,
    counts: *mut c_void,
) -> sys::rd_kafka_resp_err_t {
    // SAFETY: the message is live during the call, and the counts are as long as the client. The code is read as a
    // number, because a broker may send one that the bindings do not know.
    let (code, offset, counts) = unsafe {
        (ptr::addr_of!((*message).err).cast::<i32>().read(), (*message).offset, &*counts.cast::<Counts>())
    };
    if code != 0 {
        counts.failed.fetch_add(1, Ordering::Release);
        let _ = counts.first_failure.compare_exchange(0, code, Ordering::Release, Ordering::Relaxed);
    } else if offset < 0 {
        counts.unconfirmed.fetch_add(1, Ordering::Release);
    }
    sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR
}

impl<C: ClientContext> ProducerClient<C> {
    /// The underlying client of rdkafka.
    pub fn client(&self) -> &Client<C> {
        &self.client
    }

    /// Number of messages so far that librdkafka took for delivered although no broker gave them an offset.
    pub fn unconfirmed(&self) -> u64 {
        self.counts.unconfirmed.load(Ordering::Acquire)
    }

    /// Number of messages so far that could not be delivered.
    pub fn failed(&self) -> u64 {
        self.counts.failed.load(Ordering::Acquire)
    }

    /// Why the first of them could not be delivered.
    pub fn first_failure(&self) -> Option<RDKafkaErrorCode> {
        let code = self.counts.first_failure.load(Ordering::Acquire);
        sys::rd_kafka_resp_err_t::try_from(code).ok().filter(|_| code != 0).map(Into::into)
    }

    /// Number of messages, requests and events that wait.
    pub fn in_flight_count(&self) -> i32 {
        // SAFETY: the client is live.
        unsafe { sys::rd_kafka_outq_len(self.client.native_ptr()) }
    }

    /// Passes all events that wait to the context.
    pub fn serve(&self) {
        while self.poll(Duration::ZERO) {}
    }

    /// Passes one event to the context, waiting for it for at most `timeout`; false if there was none. Reports of
    /// failed messages are dropped: they are counted, and the transaction fails.
    pub fn poll(&self, timeout: Duration) -> bool {
        // SAFETY: the queue is live; the event is ours, and is destroyed after its last use.
        unsafe {
            let event = sys::rd_kafka_queue_poll(self.queue, millis(timeout));
            if event.is_null() {
                return false;
            }
            self.handle(event);
            sys::rd_kafka_event_destroy(event);
        }
        true
    }

    /// Handles an event that is live.
    unsafe fn handle(&self, event: *mut sys::rd_kafka_event_t) {
        let context = self.client.context();
        // SAFETY: the event is live, and so are texts in it until it is destroyed.
        unsafe {
            match sys::rd_kafka_event_type(event) {
                sys::RD_KAFKA_EVENT_LOG => {
                    let (mut facility, mut line, mut level) = (ptr::null(), ptr::null(), 0);
                    if sys::rd_kafka_event_log(event, &mut facility, &mut line, &mut level) == 0 {
                        context.log(level_of(level), &text(facility), &text(line));
                    }
                }
                sys::RD_KAFKA_EVENT_STATS => {
                    context.stats_raw(CStr::from_ptr(sys::rd_kafka_event_stats(event)).to_bytes());
                }
                sys::RD_KAFKA_EVENT_ERROR => {
                    let error = KafkaError::Global(sys::rd_kafka_event_error(event).into());
                    context.error(error, &text(sys::rd_kafka_event_error_string(event)));
                }
                sys::RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH => {
                    let config = sys::rd_kafka_event_config_string(event);
                    self.refresh_token((!config.is_null()).then(|| text(config)).as_deref());
                }
                _ => {}
            }
        }
    }

    fn refresh_token(&self, config: Option<&str>) {
        let set = self.client.context().generate_oauth_token(config).map_err(|error| error.to_string());
        let set = set.and_then(|token| {
            set_token(&self.client, &token.token, &token.principal_name, token.lifetime_ms)
                .map_err(|code| code.to_string())
        });
        if let Err(reason) = set {
            // SAFETY: the client is live, and copies the text. It asks again after ten seconds.
            unsafe {
                let reason = super::c_string(&reason);
                sys::rd_kafka_oauthbearer_set_token_failure(self.client.native_ptr(), reason.as_ptr());
            }
        }
    }
}

impl<C: ClientContext> Drop for ProducerClient<C> {
    fn drop(&mut self) {
        // SAFETY: released once, before the client.
        unsafe { sys::rd_kafka_queue_destroy(self.queue) }
    }
}

/// A text of librdkafka.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: the caller passes a live text.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Severity as in syslog.
fn level_of(level: i32) -> RDKafkaLogLevel {
    match level {
        ..=3 => RDKafkaLogLevel::Error,
        4 => RDKafkaLogLevel::Warning,
        5 | 6 => RDKafkaLogLevel::Info,
        _ => RDKafkaLogLevel::Debug,
    }
}
