//! Fetches partitions from explicit positions, without a consumer group: librdkafka's "simple consumer".
//!
//! Of librdkafka's calls that read a queue, only `rd_kafka_consume_batch_queue` drops entries from before a
//! stop without evaluating them. `rd_kafka_consume_callback_queue` lets an outdated transaction marker move
//! the client's position.

use std::collections::BTreeSet;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka_sys as sys;
use tokio::sync::Notify;

use super::record::NativeRecord;
use super::{NativeError, c_string, millis};
use crate::domain::record::{NextOffset, Partition};

/// Items taken from the client in one call.
const CHUNK_MAX: usize = 1_000;

/// An item that a [`FetchQueue`] delivers.
#[derive(Debug)]
pub enum FetchItem<'a> {
    /// A record.
    Record(NativeRecord<'a>),
    /// The partition was read up to its last stable offset.
    End {
        /// The partition.
        partition: Partition,
        /// The position after everything readable, control records included.
        position: NextOffset,
    },
    /// Fetching failed, for one partition or for the client as a whole.
    Failed {
        /// The partition, if the error names one.
        partition: Option<Partition>,
        /// librdkafka's error code.
        code: RDKafkaErrorCode,
        /// The first offset of the record batch that cannot be read, if that is the error; else the position,
        /// or a negative number.
        offset: i64,
    },
}

impl FetchItem<'_> {
    /// The partition; `None` if the client as a whole failed.
    pub fn partition(&self) -> Option<Partition> {
        match self {
            Self::Record(record) => Some(record.partition()),
            Self::End { partition, .. } => Some(*partition),
            Self::Failed { partition, .. } => *partition,
        }
    }
}

/// Fetches partitions of one topic into one queue, each from a position that the caller names.
///
/// While the queue is not drained, the client stops fetching (back-pressure).
pub struct FetchQueue<C: ConsumerContext + 'static> {
    queue: *mut sys::rd_kafka_queue_t,
    topic: *mut sys::rd_kafka_topic_t,
    /// Partitions that are being fetched. librdkafka requires that each is stopped before the client is
    /// destroyed.
    started: Mutex<BTreeSet<Partition>>,
    /// The opaque of the queue's callback.
    filled: Arc<Notify>,
    consumer: BaseConsumer<C>,
}

// SAFETY: librdkafka's clients, topics and queues may be used from any thread; `FetchQueue` hands out no
// pointer.
unsafe impl<C: ConsumerContext> Send for FetchQueue<C> {}
// SAFETY: as above; `started` has a lock of its own.
unsafe impl<C: ConsumerContext> Sync for FetchQueue<C> {}

unsafe extern "C" fn wake(_: *mut sys::rd_kafka_t, opaque: *mut c_void) {
    // SAFETY: the opaque is the `Notify` that `FetchQueue` keeps alive until the callback is off.
    unsafe { (*opaque.cast::<Notify>()).notify_one() }
}

/// The error of this thread's last simple-consumer call.
fn last_error(doing: &str) -> NativeError {
    // SAFETY: reads a value of this thread.
    NativeError::plain(unsafe { sys::rd_kafka_last_error() }, doing)
}

impl<C: ConsumerContext> FetchQueue<C> {
    /// Creates a queue of `consumer`, which has no `group.id`.
    pub fn new(consumer: BaseConsumer<C>, topic: &str) -> Result<Self, NativeError> {
        let filled = Arc::new(Notify::new());
        let client = consumer.client().native_ptr();
        let name = c_string(topic);
        // SAFETY: the client is live; a null configuration means the client's defaults.
        let topic = unsafe { sys::rd_kafka_topic_new(client, name.as_ptr(), ptr::null_mut()) };
        if topic.is_null() {
            return Err(last_error("no handle for the topic"));
        }
        let opaque = Arc::as_ptr(&filled);
        // SAFETY: the client is live; `drop` switches the callback off before its opaque is released.
        let queue = unsafe {
            let queue = sys::rd_kafka_queue_new(client);
            sys::rd_kafka_queue_cb_event_enable(queue, Some(wake), opaque as *mut c_void);
            queue
        };
        Ok(Self { queue, topic, started: Mutex::default(), filled, consumer })
    }

    /// The underlying consumer, for requests to the brokers and for polling callbacks.
    pub fn consumer(&self) -> &BaseConsumer<C> {
        &self.consumer
    }

    /// Starts to fetch `partition` at `position`; nothing fetched before is delivered.
    ///
    /// # Errors
    /// An error of librdkafka; the partition is not fetched then.
    pub fn start(&self, partition: Partition, position: NextOffset) -> Result<(), NativeError> {
        self.stop(partition)?;
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: topic and queue are live.
        let outcome =
            unsafe { sys::rd_kafka_consume_start_queue(self.topic, partition.0, position.0, self.queue) };
        if outcome != 0 {
            return Err(last_error("consume_start_queue"));
        }
        started.insert(partition);
        Ok(())
    }

    /// Stops fetching `partition`. When this returns, its entries in the queue are outdated and will be
    /// dropped.
    ///
    /// # Errors
    /// An error of librdkafka.
    pub fn stop(&self, partition: Partition) -> Result<(), NativeError> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if !started.remove(&partition) {
            return Ok(());
        }
        // SAFETY: the topic is live.
        let outcome = unsafe { sys::rd_kafka_consume_stop(self.topic, partition.0) };
        if outcome != 0 { Err(last_error("consume_stop")) } else { Ok(()) }
    }

    /// Completes when the queue has become non-empty since the last wait.
    pub async fn wait_filled(&self) {
        self.filled.notified().await;
    }

    /// Passes at most `max` items to `take`, waiting at most `wait` for the first one; returns their number.
    pub fn drain(&self, max: usize, wait: Duration, mut take: impl FnMut(FetchItem<'_>)) -> usize {
        let max = max.min(CHUNK_MAX);
        if max == 0 {
            return 0;
        }
        let mut messages: Vec<*mut sys::rd_kafka_message_t> = Vec::with_capacity(max);
        // The call waits until it has the requested number of items, so the first one is requested alone.
        let mut count = if wait.is_zero() { 0 } else { self.take(&mut messages, 1, millis(wait)) };
        if wait.is_zero() || count > 0 {
            count += self.take(&mut messages, max - count, 0);
        }
        for message in messages {
            // SAFETY: each message is ours, live until it is destroyed, once, here.
            unsafe {
                take(item(&*message));
                sys::rd_kafka_message_destroy(message);
            }
        }
        count
    }

    fn take(&self, into: &mut Vec<*mut sys::rd_kafka_message_t>, max: usize, wait_ms: c_int) -> usize {
        let room = into.spare_capacity_mut();
        let max = max.min(room.len());
        if max == 0 {
            return 0;
        }
        // SAFETY: the queue is live, and `room` has space for `max` pointers, of which as many are written as
        // the call returns.
        unsafe {
            let taken = sys::rd_kafka_consume_batch_queue(self.queue, wait_ms, room.as_mut_ptr().cast(), max);
            let taken = usize::try_from(taken).unwrap_or(0);
            into.set_len(into.len() + taken);
            taken
        }
    }
}

fn item(message: &sys::rd_kafka_message_t) -> FetchItem<'_> {
    let partition = Partition(message.partition);
    match message.err {
        sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR => FetchItem::Record(NativeRecord { message }),
        sys::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__PARTITION_EOF => {
            FetchItem::End { partition, position: NextOffset(message.offset) }
        }
        code => FetchItem::Failed {
            partition: (!message.rkt.is_null() && message.partition >= 0).then_some(partition),
            code: code.into(),
            offset: message.offset,
        },
    }
}

impl<C: ConsumerContext> Drop for FetchQueue<C> {
    fn drop(&mut self) {
        let started = std::mem::take(&mut *self.started.lock().unwrap_or_else(PoisonError::into_inner));
        for partition in started {
            // SAFETY: the topic is live.
            unsafe { sys::rd_kafka_consume_stop(self.topic, partition.0) };
        }
        // SAFETY: the callback, which runs under the queue's lock, is off before its opaque is released; topic
        // and queue are released once, before the client.
        unsafe {
            sys::rd_kafka_queue_cb_event_enable(self.queue, None, ptr::null_mut());
            sys::rd_kafka_queue_destroy(self.queue);
            sys::rd_kafka_topic_destroy(self.topic);
        }
    }
}
