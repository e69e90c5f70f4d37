//! Produce, with or without transactions, without an allocation per message.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::TopicPartitionList;
use rdkafka::client::{Client, ClientContext};
use rdkafka_sys as sys;
use sys::rd_kafka_vtype_t as kind;
use sys::rd_kafka_vu_s__bindgen_ty_1 as Argument;

use super::group_metadata::GroupMetadata;
use super::{NativeError, ProducerClient, c_string, millis};
use crate::domain::record::TimestampMs;

/// How long the thread that polls reports during an abort waits in one poll.
const REPORTS_SLICE: Duration = Duration::from_millis(5);

/// A producer that produces without an allocation per message, and commits no transaction with a message that no broker
/// confirmed.
pub struct TxnProducer<C: ClientContext + 'static> {
    producer: ProducerClient<C>,
    /// [`ProducerClient::unconfirmed`] when the transaction began.
    unconfirmed_before: AtomicU64,
    topics: Vec<*mut sys::rd_kafka_topic_t>,
}

// SAFETY: topic handles belong to the client, which is thread safe; they are released in `drop`.
unsafe impl<C: ClientContext> Send for TxnProducer<C> {}
// SAFETY: as above; all its calls may be made from any thread.
unsafe impl<C: ClientContext> Sync for TxnProducer<C> {}

impl<C: ClientContext + 'static> TxnProducer<C> {
    /// Wraps a producer; [`produce_at`](Self::produce_at) refers to `topics` by index.
    pub fn new(producer: ProducerClient<C>, topics: &[&str]) -> Self {
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
        Self { producer, unconfirmed_before: AtomicU64::new(0), topics }
    }

    /// The wrapped producer.
    pub fn inner(&self) -> &ProducerClient<C> {
        &self.producer
    }

    /// The underlying client of rdkafka.
    pub fn client(&self) -> &Client<C> {
        self.producer.client()
    }

    fn native(&self) -> *mut sys::rd_kafka_t {
        self.producer.client().native_ptr()
    }

    /// Copies one message into the producer's queue; timestamp 0 stands for the present time. May be repeated
    /// after `_QUEUE_FULL`.
    pub fn produce_at<'h>(
        &self,
        topic: usize,
        timestamp: TimestampMs,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl ExactSizeIterator<Item = (&'h [u8], Option<&'h [u8]>)>,
    ) -> Result<(), NativeError> {
        let Some(topic) = self.topics.get(topic).copied().filter(|t| !t.is_null()) else {
            return Err(NativeError::plain(
                sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC,
                "there is no handle for this output topic",
            ));
        };
        let argument = |vtype, u| sys::rd_kafka_vu_t { vtype, u };
        // An empty slice has a pointer that is not null, so it does not become a null value.
        let bytes = |bytes: Option<&[u8]>| Argument {
            mem: sys::rd_kafka_vu_s__bindgen_ty_1__bindgen_ty_1 {
                ptr: bytes.map_or(ptr::null_mut(), |b| b.as_ptr() as *mut c_void),
                size: bytes.map_or(0, <[u8]>::len),
            },
        };
        // SAFETY: all pointers live until the call returns; `MSG_F_COPY` makes librdkafka copy key and
        // value; the header list becomes librdkafka's on success and is destroyed here on failure.
        unsafe {
            let list = sys::rd_kafka_headers_new(headers.len());
            for (name, value) in headers {
                let (value, value_len) = value.map_or((ptr::null(), 0), |v| (v.as_ptr(), v.len() as isize));
                let (name, name_len) = (name.as_ptr().cast(), name.len() as isize);
                sys::rd_kafka_header_add(list, name, name_len, value.cast(), value_len);
            }
            let arguments = [
                argument(kind::RD_KAFKA_VTYPE_RKT, Argument { rkt: topic }),
                argument(kind::RD_KAFKA_VTYPE_MSGFLAGS, Argument { i: sys::RD_KAFKA_MSG_F_COPY }),
                argument(kind::RD_KAFKA_VTYPE_TIMESTAMP, Argument { i64_: timestamp.0 }),
                argument(kind::RD_KAFKA_VTYPE_KEY, bytes(key)),
                argument(kind::RD_KAFKA_VTYPE_VALUE, bytes(value)),
                argument(kind::RD_KAFKA_VTYPE_HEADERS, Argument { headers: list }),
            ];
            let produced = sys::rd_kafka_produceva(self.native(), arguments.as_ptr(), arguments.len());
            let outcome = NativeError::check(produced);
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
        self.producer.serve();
        left == sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR
    }

    /// Passes all pending errors, statistics and reports to the context.
    pub fn take_events(&self) {
        self.producer.serve();
    }

    /// `init_transactions`: fences older producers of this id and ends transactions that they left open.
    pub fn init(&self, timeout: Duration) -> Result<(), NativeError> {
        // SAFETY: the client is live.
        NativeError::check(unsafe { sys::rd_kafka_init_transactions(self.native(), millis(timeout)) })
    }

    /// `begin_transaction`.
    pub fn begin(&self) -> Result<(), NativeError> {
        self.unconfirmed_before.store(self.producer.unconfirmed(), Ordering::Relaxed);
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
            sys::rd_kafka_send_offsets_to_transaction(
                self.native(),
                offsets.ptr(),
                group.0.as_ptr(),
                millis(timeout),
            )
        })
    }

    /// `commit_transaction`; a retriable error means that the same call continues it.
    pub fn commit(&self, timeout: Duration) -> Result<(), NativeError> {
        use sys::rd_kafka_resp_err_t::{RD_KAFKA_RESP_ERR__RETRY, RD_KAFKA_RESP_ERR__TIMED_OUT};
        // `commit_transaction` would wait for what is in flight, too, and then commit at once.
        if self.producer.in_flight_count() > 0 && !self.flush(timeout) {
            let waits = NativeError::plain(RD_KAFKA_RESP_ERR__TIMED_OUT, "messages are still in flight");
            return Err(NativeError { is_retriable: true, ..waits });
        }
        let unconfirmed = self.producer.unconfirmed() - self.unconfirmed_before.load(Ordering::Relaxed);
        if unconfirmed > 0 {
            let message =
                format!("no broker confirmed {unconfirmed} messages that the client took for delivered");
            let lost = NativeError::plain(RD_KAFKA_RESP_ERR__RETRY, &message);
            return Err(NativeError { requires_abort: true, ..lost });
        }
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
