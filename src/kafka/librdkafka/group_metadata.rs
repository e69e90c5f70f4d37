//! The generation in the consumer's group metadata.

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka_sys as sys;

/// The consumer's group metadata at one moment, which a transaction needs (KIP-447).
pub struct GroupMetadata(pub(super) *mut sys::rd_kafka_consumer_group_metadata_t);

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
}

impl Drop for GroupMetadata {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe { sys::rd_kafka_consumer_group_metadata_destroy(self.0) }
    }
}
