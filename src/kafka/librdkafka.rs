//! FFI to librdkafka for calls that the `rdkafka` crate does not offer: the one module with `unsafe`.
//!
//! Fetching into a queue ([`fetch`]), transactional produce without an allocation per message, topic ids
//! (`DescribeTopics`), topic settings (`DescribeConfigs`), and the generation in the consumer's group
//! metadata. The public functions are safe to call; each `unsafe` block says why it is sound.
#![allow(unsafe_code)]

pub mod fetch;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::client::{Client, OAuthToken};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{ClientContext, TopicPartitionList};
use rdkafka_sys as sys;

use crate::domain::record::{Offset, Partition, SourceBatch, TimestampMs};

/// An error of librdkafka, with its flags for retry and abort.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message} ({code})")]
pub struct NativeError {
    /// librdkafka's error code.
    pub code: RDKafkaErrorCode,
    /// librdkafka's text; it names brokers, topics and states, never a message's contents.
    pub message: String,
    /// The same call may be repeated.
    pub is_retriable: bool,
    /// The client has to be replaced.
    pub is_fatal: bool,
    /// The open transaction has to be aborted.
    pub requires_abort: bool,
}

impl NativeError {
    fn plain(code: sys::rd_kafka_resp_err_t, message: &str) -> Self {
        Self {
            code: code.into(),
            message: message.to_owned(),
            is_retriable: false,
            is_fatal: false,
            requires_abort: false,
        }
    }

    /// Takes ownership of an error object; null means success.
    fn check(error: *mut sys::rd_kafka_error_t) -> Result<(), Self> {
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: `error` is a live error object returned to us; it is destroyed once, here.
        unsafe {
            let read = Self {
                code: sys::rd_kafka_error_code(error).into(),
                message: CStr::from_ptr(sys::rd_kafka_error_string(error)).to_string_lossy().into_owned(),
                is_retriable: sys::rd_kafka_error_is_retriable(error) != 0,
                is_fatal: sys::rd_kafka_error_is_fatal(error) != 0,
                requires_abort: sys::rd_kafka_error_txn_requires_abort(error) != 0,
            };
            sys::rd_kafka_error_destroy(error);
            Err(read)
        }
    }
}

fn millis(timeout: Duration) -> c_int {
    c_int::try_from(timeout.as_millis()).unwrap_or(c_int::MAX)
}

fn c_string(text: &str) -> CString {
    // The settings validate topic names, so there is no NUL in them; an empty name fails without harm.
    CString::new(text).unwrap_or_default()
}

/// A record in the client's memory, valid during the callback that receives it.
#[derive(Debug)]
pub struct NativeRecord<'a> {
    message: &'a sys::rd_kafka_message_t,
}

unsafe fn bytes<'a>(pointer: *const c_void, len: usize) -> Option<&'a [u8]> {
    if pointer.is_null() {
        None
    } else {
        // SAFETY: the caller passes a buffer of librdkafka that lives as long as its message.
        Some(unsafe { std::slice::from_raw_parts(pointer.cast(), len) })
    }
}

impl<'a> NativeRecord<'a> {
    /// Partition of the record.
    pub fn partition(&self) -> Partition {
        Partition(self.message.partition)
    }

    /// Offset of the record.
    pub fn offset(&self) -> Offset {
        Offset(self.message.offset)
    }

    /// Key bytes; `None` if null.
    pub fn key(&self) -> Option<&'a [u8]> {
        // SAFETY: `key` and `key_len` describe one buffer owned by the message.
        unsafe { bytes(self.message.key, self.message.key_len) }
    }

    /// Value bytes; `None` if null.
    pub fn value(&self) -> Option<&'a [u8]> {
        // SAFETY: `payload` and `len` describe one buffer owned by the message.
        unsafe { bytes(self.message.payload, self.message.len) }
    }

    /// The record's timestamp, if it carries one.
    pub fn timestamp(&self) -> Option<TimestampMs> {
        let mut kind = sys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        // SAFETY: the message is live; `kind` is written.
        let at = unsafe { sys::rd_kafka_message_timestamp(self.message, &mut kind) };
        match kind {
            sys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE => None,
            _ => Some(TimestampMs(at)),
        }
    }

    /// Copies the record into a batch.
    pub fn copy_into(&self, batch: &mut SourceBatch) {
        let (partition, offset, timestamp) = (self.partition(), self.offset(), self.timestamp());
        batch.push(partition, offset, timestamp, self.key(), self.value(), self.headers());
    }

    /// Headers in order: name, value.
    pub fn headers(&self) -> impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)> + use<'a> {
        let mut headers: *mut sys::rd_kafka_headers_t = ptr::null_mut();
        // SAFETY: the message is live; the headers it hands out belong to it and live as long.
        let has = unsafe { sys::rd_kafka_message_headers(self.message, &mut headers) }
            == sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR;
        let mut index = 0;
        std::iter::from_fn(move || {
            if !has {
                return None;
            }
            let mut name: *const c_char = ptr::null();
            let mut value: *const c_void = ptr::null();
            let mut len = 0;
            // SAFETY: as above; out-pointers are written only on success.
            let found =
                unsafe { sys::rd_kafka_header_get_all(headers, index, &mut name, &mut value, &mut len) }
                    == sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR;
            index += 1;
            // SAFETY: name is a C string, value a buffer of `len`, both owned by the message.
            found.then(|| unsafe { (CStr::from_ptr(name).to_bytes(), bytes(value, len)) })
        })
    }
}

/// The consumer's group metadata at one moment, which a transaction needs (KIP-447).
pub struct GroupMetadata(*mut sys::rd_kafka_consumer_group_metadata_t);

// SAFETY: the object is an immutable copy without ties to a thread.
unsafe impl Send for GroupMetadata {}
// SAFETY: as above.
unsafe impl Sync for GroupMetadata {}

impl GroupMetadata {
    /// The present group metadata; `None` if the consumer has no group.
    pub fn of<C: ConsumerContext>(consumer: &BaseConsumer<C>) -> Option<Self> {
        // SAFETY: the client is live; the copy is ours.
        let pointer = unsafe { sys::rd_kafka_consumer_group_metadata(consumer.client().native_ptr()) };
        (!pointer.is_null()).then_some(Self(pointer))
    }

    /// The generation; negative if the consumer is not a member. The broker does not fence a commit with a
    /// negative generation.
    pub fn generation(&self) -> i32 {
        // SAFETY: the object is live.
        unsafe { sys::rd_kafka_consumer_group_metadata_generation_id(self.0) }
    }

    /// The member id; empty if the consumer is not a member.
    pub fn member_id(&self) -> String {
        // SAFETY: the object is live, and its text with it.
        unsafe {
            let member_id = sys::rd_kafka_consumer_group_metadata_member_id(self.0);
            if member_id.is_null() {
                return String::new();
            }
            CStr::from_ptr(member_id).to_string_lossy().into_owned()
        }
    }
}

impl Drop for GroupMetadata {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe { sys::rd_kafka_consumer_group_metadata_destroy(self.0) }
    }
}

/// How long the thread that polls reports during an abort waits in one poll.
const REPORTS_SLICE: Duration = Duration::from_millis(5);

/// A transactional producer that produces without an allocation per message.
pub struct TxnProducer<C: ClientContext + 'static> {
    producer: BaseProducer<QuietContext<C>>,
    topics: Vec<*mut sys::rd_kafka_topic_t>,
}

/// Ignores delivery reports, because a transaction that lost a message fails as a whole.
pub struct QuietContext<C>(pub C);

impl<C: ClientContext> ClientContext for QuietContext<C> {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = C::ENABLE_REFRESH_OAUTH_TOKEN;

    fn generate_oauth_token(&self, property: Option<&str>) -> Result<OAuthToken, Box<dyn std::error::Error>> {
        self.0.generate_oauth_token(property)
    }

    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, fac: &str, message: &str) {
        self.0.log(level, fac, message);
    }

    fn error(&self, error: rdkafka::error::KafkaError, reason: &str) {
        self.0.error(error, reason);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.0.stats_raw(statistics);
    }
}

impl<C: ClientContext + 'static> rdkafka::producer::ProducerContext for QuietContext<C> {
    type DeliveryOpaque = ();
    fn delivery(&self, _: &rdkafka::message::DeliveryResult<'_>, (): ()) {}
}

// SAFETY: topic handles belong to the client, which is thread safe; they are released in `drop`.
unsafe impl<C: ClientContext> Send for TxnProducer<C> {}
// SAFETY: as above; all its calls may be made from any thread.
unsafe impl<C: ClientContext> Sync for TxnProducer<C> {}

/// One header of an output: name with a closing NUL, value.
pub type OutputHeader<'a> = (&'a CStr, Option<&'a [u8]>);

impl<C: ClientContext + 'static> TxnProducer<C> {
    /// Wraps a producer; [`produce`](Self::produce) refers to `topics` by index.
    pub fn new(producer: BaseProducer<QuietContext<C>>, topics: &[&str]) -> Self {
        let topics = topics
            .iter()
            .map(|name| {
                let name = c_string(name);
                // SAFETY: the client is live; a null configuration means the client's defaults.
                unsafe {
                    sys::rd_kafka_topic_new(producer.client().native_ptr(), name.as_ptr(), ptr::null_mut())
                }
            })
            .collect();
        Self { producer, topics }
    }

    /// The wrapped producer.
    pub fn inner(&self) -> &BaseProducer<QuietContext<C>> {
        &self.producer
    }

    fn native(&self) -> *mut sys::rd_kafka_t {
        self.producer.client().native_ptr()
    }

    /// Copies one message into the producer's queue, with the present time as its timestamp. May be repeated
    /// after `_QUEUE_FULL`.
    pub fn produce<'h>(
        &self,
        topic: usize,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl ExactSizeIterator<Item = (&'h [u8], Option<&'h [u8]>)>,
    ) -> Result<(), NativeError> {
        // 0 means "now" to librdkafka.
        self.produce_at(topic, TimestampMs(0), key, value, headers)
    }

    /// As [`produce`](Self::produce), with a timestamp above 0.
    pub fn produce_at<'h>(
        &self,
        topic: usize,
        timestamp: TimestampMs,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl ExactSizeIterator<Item = (&'h [u8], Option<&'h [u8]>)>,
    ) -> Result<(), NativeError> {
        use sys::rd_kafka_vtype_t as kind;
        let Some(topic) = self.topics.get(topic).copied().filter(|t| !t.is_null()) else {
            return Err(NativeError::plain(
                sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC,
                "there is no handle for this output topic",
            ));
        };
        let mem = |kind, bytes: Option<&[u8]>| sys::rd_kafka_vu_t {
            vtype: kind,
            u: sys::rd_kafka_vu_s__bindgen_ty_1 {
                mem: sys::rd_kafka_vu_s__bindgen_ty_1__bindgen_ty_1 {
                    ptr: bytes.map_or(ptr::null_mut(), |b| {
                        // An empty slice must not become a null value.
                        b.as_ptr() as *mut c_void
                    }),
                    size: bytes.map_or(0, <[u8]>::len),
                },
            },
        };
        // SAFETY: all pointers live until the call returns; `MSG_F_COPY` makes librdkafka copy key and
        // value; the header list becomes librdkafka's on success and is destroyed here on failure.
        unsafe {
            let list = sys::rd_kafka_headers_new(headers.len());
            for (name, value) in headers {
                let (value_pointer, value_len) =
                    value.map_or((ptr::null(), 0), |v| (v.as_ptr().cast::<c_void>(), v.len() as isize));
                sys::rd_kafka_header_add(
                    list,
                    name.as_ptr().cast(),
                    name.len() as isize,
                    value_pointer,
                    value_len,
                );
            }
            let arguments = [
                sys::rd_kafka_vu_t {
                    vtype: kind::RD_KAFKA_VTYPE_RKT,
                    u: sys::rd_kafka_vu_s__bindgen_ty_1 { rkt: topic },
                },
                sys::rd_kafka_vu_t {
                    vtype: kind::RD_KAFKA_VTYPE_MSGFLAGS,
                    u: sys::rd_kafka_vu_s__bindgen_ty_1 { i: sys::RD_KAFKA_MSG_F_COPY },
                },
                sys::rd_kafka_vu_t {
                    vtype: kind::RD_KAFKA_VTYPE_TIMESTAMP,
                    u: sys::rd_kafka_vu_s__bindgen_ty_1 { i64_: timestamp.0 },
                },
                mem(kind::RD_KAFKA_VTYPE_KEY, key),
                mem(kind::RD_KAFKA_VTYPE_VALUE, value),
                sys::rd_kafka_vu_t {
                    vtype: kind::RD_KAFKA_VTYPE_HEADERS,
                    u: sys::rd_kafka_vu_s__bindgen_ty_1 { headers: list },
                },
            ];
            let outcome = NativeError::check(sys::rd_kafka_produceva(
                self.native(),
                arguments.as_ptr(),
                arguments.len(),
            ));
            if outcome.is_err() {
                sys::rd_kafka_headers_destroy(list);
            }
            outcome
        }
    }

    /// Waits until every message was delivered or failed; true if none is left. A failed message puts the
    /// transaction into its error state, which the commit reports.
    pub fn flush(&self, timeout: Duration) -> bool {
        // SAFETY: the client is live.
        let left = unsafe { sys::rd_kafka_flush(self.native(), millis(timeout)) };
        // Reports of failed deliveries count as outstanding until they are polled.
        self.producer.poll(Duration::ZERO);
        left == sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR
    }

    /// Passes all pending errors, statistics and reports to the context.
    pub fn take_events(&self) {
        // A poll handles one event. The count includes messages in flight.
        for _ in 0..self.producer.in_flight_count() {
            self.producer.poll(Duration::ZERO);
        }
    }

    /// `init_transactions`: fences older producers of this id and ends transactions that they left open.
    pub fn init(&self, timeout: Duration) -> Result<(), NativeError> {
        // SAFETY: the client is live.
        NativeError::check(unsafe { sys::rd_kafka_init_transactions(self.native(), millis(timeout)) })
    }

    /// `begin_transaction`.
    pub fn begin(&self) -> Result<(), NativeError> {
        // SAFETY: the client is live.
        NativeError::check(unsafe { sys::rd_kafka_begin_transaction(self.native()) })
    }

    /// `send_offsets_to_transaction` with the consumer's generation.
    pub fn send_offsets(
        &self,
        offsets: &TopicPartitionList,
        group: &GroupMetadata,
        timeout: Duration,
    ) -> Result<(), NativeError> {
        // SAFETY: client, list and metadata are live; librdkafka copies both.
        NativeError::check(unsafe {
            sys::rd_kafka_send_offsets_to_transaction(self.native(), offsets.ptr(), group.0, millis(timeout))
        })
    }

    /// `commit_transaction`; a retriable error means that the same call continues it.
    pub fn commit(&self, timeout: Duration) -> Result<(), NativeError> {
        // SAFETY: the client is live.
        NativeError::check(unsafe { sys::rd_kafka_commit_transaction(self.native(), millis(timeout)) })
    }

    /// `abort_transaction`; a retriable error means that the same call continues it.
    ///
    /// librdkafka purges unsent messages and waits until their delivery reports are polled. It does not poll
    /// them itself, so without another thread that does, the abort would time out.
    pub fn abort(&self, timeout: Duration) -> Result<(), NativeError> {
        let (producer, is_done) = (&self.producer, AtomicBool::new(false));
        let take_reports = || {
            while !is_done.load(Ordering::Acquire) {
                producer.poll(REPORTS_SLICE);
            }
        };
        std::thread::scope(|scope| {
            // If the thread cannot be started, the abort times out and is repeated.
            let _ = std::thread::Builder::new().name("reports".to_owned()).spawn_scoped(scope, take_reports);
            // SAFETY: the client is live.
            let aborted = unsafe { sys::rd_kafka_abort_transaction(self.native(), millis(timeout)) };
            is_done.store(true, Ordering::Release);
            NativeError::check(aborted)
        })
    }
}

impl<C: ClientContext> Drop for TxnProducer<C> {
    fn drop(&mut self) {
        for topic in self.topics.drain(..).filter(|t| !t.is_null()) {
            // SAFETY: each handle is released once, before the client.
            unsafe { sys::rd_kafka_topic_destroy(topic) }
        }
    }
}

/// Adds brokers (as in `bootstrap.servers`) to a client that may have lost them all; brokers that it knows
/// are not affected. The client keeps the list in memory for its lifetime.
pub fn add_brokers<C: ClientContext>(client: &Client<C>, servers: &str) {
    // SAFETY: the client is live, and lets any thread call this; it copies the list, which is read up to its
    // NUL.
    unsafe { sys::rd_kafka_brokers_add(client.native_ptr(), c_string(servers).as_ptr()) };
}

/// Sets a client's token for SASL OAUTHBEARER.
///
/// # Errors
/// If the client does not use tokens, or rejects this one. Only librdkafka's code is returned, because its
/// text may contain the token.
pub fn set_token<C: ClientContext>(
    client: &Client<C>,
    token: &str,
    principal: &str,
    expires_at_ms: i64,
) -> Result<(), RDKafkaErrorCode> {
    let (token, principal) = (c_string(token), c_string(principal));
    let mut reason: [c_char; 256] = [0; 256];
    // SAFETY: the client is live; it copies both texts, which are read up to their NUL; there are no
    // extensions; and it writes no more of the reason than the array holds.
    let code = unsafe {
        sys::rd_kafka_oauthbearer_set_token(
            client.native_ptr(),
            token.as_ptr(),
            expires_at_ms,
            principal.as_ptr(),
            ptr::null_mut(),
            0,
            reason.as_mut_ptr(),
            reason.len(),
        )
    };
    if code == sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR { Ok(()) } else { Err(code.into()) }
}

/// Returns a topic's id and its number of partitions (`DescribeTopics`).
pub fn topic_id<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    timeout: Duration,
) -> Result<(uuid::Uuid, usize), NativeError> {
    // While no broker can be reached, an admin request retries at every change of a connection's state, and
    // causes such changes itself: two of the client's threads then keep a core busy. A metadata request first
    // avoids that.
    consumer.fetch_metadata(Some(topic), timeout).map_err(|error| {
        let code = sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__TRANSPORT;
        NativeError::plain(code, &format!("no broker answers: {error}"))
    })?;
    let name = c_string(topic);
    let mut names = [name.as_ptr()];
    let client = consumer.client().native_ptr();
    // SAFETY: every object made here is destroyed here, and what is read lives inside the event until
    // the event is destroyed at the end.
    unsafe {
        let queue = sys::rd_kafka_queue_new(client);
        let collection = sys::rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), names.len());
        let options = sys::rd_kafka_AdminOptions_new(
            client,
            sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS,
        );
        let mut reason: [c_char; 256] = [0; 256];
        sys::rd_kafka_AdminOptions_set_request_timeout(
            options,
            millis(timeout),
            reason.as_mut_ptr(),
            reason.len(),
        );
        sys::rd_kafka_DescribeTopics(client, collection, options, queue);
        // The admin request has its own timeout; the extra second lets its answer arrive first.
        let event = sys::rd_kafka_queue_poll(queue, millis(timeout + Duration::from_secs(1)));
        let outcome = described(event);
        if !event.is_null() {
            sys::rd_kafka_event_destroy(event);
        }
        sys::rd_kafka_AdminOptions_destroy(options);
        sys::rd_kafka_TopicCollection_destroy(collection);
        sys::rd_kafka_queue_destroy(queue);
        outcome
    }
}

unsafe fn described(event: *mut sys::rd_kafka_event_t) -> Result<(uuid::Uuid, usize), NativeError> {
    use sys::rd_kafka_resp_err_t as code;
    if event.is_null() {
        return Err(NativeError::plain(code::RD_KAFKA_RESP_ERR__TIMED_OUT, "no answer to DescribeTopics"));
    }
    // SAFETY: the event is live; null results are checked.
    unsafe {
        let error = sys::rd_kafka_event_error(event);
        if error != code::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(NativeError::plain(error, "DescribeTopics failed"));
        }
        let result = sys::rd_kafka_event_DescribeTopics_result(event);
        let mut count = 0;
        let topics = if result.is_null() {
            ptr::null_mut()
        } else {
            sys::rd_kafka_DescribeTopics_result_topics(result, &mut count)
        };
        if topics.is_null() || count == 0 {
            return Err(NativeError::plain(
                code::RD_KAFKA_RESP_ERR__BAD_MSG,
                "DescribeTopics returned no topic",
            ));
        }
        let topic = *topics;
        let error = sys::rd_kafka_TopicDescription_error(topic);
        if !error.is_null() && sys::rd_kafka_error_code(error) != code::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(NativeError::plain(sys::rd_kafka_error_code(error), "the topic cannot be described"));
        }
        let mut partitions = 0;
        sys::rd_kafka_TopicDescription_partitions(topic, &mut partitions);
        let id = sys::rd_kafka_TopicDescription_topic_id(topic);
        let high = sys::rd_kafka_Uuid_most_significant_bits(id) as u64;
        let low = sys::rd_kafka_Uuid_least_significant_bits(id) as u64;
        Ok((uuid::Uuid::from_u64_pair(high, low), partitions))
    }
}

/// Returns one setting of a topic as text (`DescribeConfigs`). Needs the right `DescribeConfigs` on the
/// topic.
///
/// # Errors
/// An error of the broker or the client, also when that right is missing or the topic has no such setting.
pub fn topic_setting<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    setting: &str,
    timeout: Duration,
) -> Result<String, NativeError> {
    // A metadata request first, as in `topic_id`.
    client.fetch_metadata(Some(topic), timeout).map_err(|error| {
        let code = sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__TRANSPORT;
        NativeError::plain(code, &format!("no broker answers: {error}"))
    })?;
    let name = c_string(topic);
    let client = client.native_ptr();
    // SAFETY: every object made here is destroyed here, and what is read lives inside the event until
    // the event is destroyed at the end.
    unsafe {
        let queue = sys::rd_kafka_queue_new(client);
        let resource = sys::rd_kafka_ConfigResource_new(
            sys::rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_TOPIC,
            name.as_ptr(),
        );
        if resource.is_null() {
            sys::rd_kafka_queue_destroy(queue);
            let code = sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__INVALID_ARG;
            return Err(NativeError::plain(code, "this is not a topic name"));
        }
        let mut resources = [resource];
        let options = sys::rd_kafka_AdminOptions_new(
            client,
            sys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBECONFIGS,
        );
        let mut reason: [c_char; 256] = [0; 256];
        sys::rd_kafka_AdminOptions_set_request_timeout(
            options,
            millis(timeout),
            reason.as_mut_ptr(),
            reason.len(),
        );
        sys::rd_kafka_DescribeConfigs(client, resources.as_mut_ptr(), resources.len(), options, queue);
        let event = sys::rd_kafka_queue_poll(queue, millis(timeout + Duration::from_secs(1)));
        let outcome = described_setting(event, setting);
        if !event.is_null() {
            sys::rd_kafka_event_destroy(event);
        }
        sys::rd_kafka_AdminOptions_destroy(options);
        sys::rd_kafka_ConfigResource_destroy(resource);
        sys::rd_kafka_queue_destroy(queue);
        outcome
    }
}

unsafe fn described_setting(event: *mut sys::rd_kafka_event_t, setting: &str) -> Result<String, NativeError> {
    use sys::rd_kafka_resp_err_t as code;
    if event.is_null() {
        return Err(NativeError::plain(code::RD_KAFKA_RESP_ERR__TIMED_OUT, "no answer to DescribeConfigs"));
    }
    let told_nothing = || {
        NativeError::plain(
            code::RD_KAFKA_RESP_ERR__BAD_MSG,
            &format!("DescribeConfigs returned no {setting}"),
        )
    };
    // SAFETY: the event is live; null results are checked, and arrays are read within their counts.
    unsafe {
        let error = sys::rd_kafka_event_error(event);
        if error != code::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(NativeError::plain(error, "DescribeConfigs failed"));
        }
        let result = sys::rd_kafka_event_DescribeConfigs_result(event);
        let mut count = 0;
        let resources = if result.is_null() {
            ptr::null_mut()
        } else {
            sys::rd_kafka_DescribeConfigs_result_resources(result, &mut count)
        };
        if resources.is_null() || count == 0 {
            return Err(told_nothing());
        }
        let error = sys::rd_kafka_ConfigResource_error(*resources);
        if error != code::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(NativeError::plain(error, "the topic's settings cannot be described"));
        }
        let mut count = 0;
        let entries = sys::rd_kafka_ConfigResource_configs(*resources, &mut count);
        if entries.is_null() {
            return Err(told_nothing());
        }
        for index in 0..count {
            let entry = *entries.add(index);
            let (name, value) =
                (sys::rd_kafka_ConfigEntry_name(entry), sys::rd_kafka_ConfigEntry_value(entry));
            if name.is_null() || value.is_null() || CStr::from_ptr(name).to_bytes() != setting.as_bytes() {
                continue;
            }
            return CStr::from_ptr(value).to_str().map(str::to_owned).map_err(|_| told_nothing());
        }
        Err(told_nothing())
    }
}
