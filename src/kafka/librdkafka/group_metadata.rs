//! Generation and member id in the consumer's group metadata.

use std::ffi::CStr;
use std::ptr::NonNull;

use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka_sys as sys;

/// The consumer's group metadata at one moment, which a transaction needs (KIP-447).
pub struct GroupMetadata(pub(super) NonNull<sys::rd_kafka_consumer_group_metadata_t>);

// SAFETY: the object is an immutable copy without ties to a thread.
unsafe impl Send for GroupMetadata {}
// SAFETY: as above.
unsafe impl Sync for GroupMetadata {}

impl GroupMetadata {
    /// The present group metadata; `None` if the consumer has no group.
    pub fn of<C: ConsumerContext>(consumer: &BaseConsumer<C>) -> Option<Self> {
        // SAFETY: the client is live; the copy is ours.
        let pointer = unsafe { sys::rd_kafka_consumer_group_metadata(consumer.client().native_ptr()) };
        NonNull::new(pointer).map(Self)
    }

    /// The generation; negative if the consumer is not a member. The broker does not fence a commit with a
    /// negative generation.
    pub fn generation(&self) -> i32 {
        // SAFETY: the object is live.
        unsafe { sys::rd_kafka_consumer_group_metadata_generation_id(self.0.as_ptr()) }
    }

    /// The id that the coordinator gave this member; empty between two memberships.
    pub fn member_id(&self) -> &CStr {
        // SAFETY: the object is live, and has a text that ends with zero.
        unsafe { CStr::from_ptr(sys::rd_kafka_consumer_group_metadata_member_id(self.0.as_ptr())) }
    }
}

#[cfg(test)]
impl GroupMetadata {
    /// As of a member with this id.
    pub fn with_member_id(id: &CStr) -> Self {
        // SAFETY: the texts are copied; the object is ours.
        let pointer = unsafe {
            sys::rd_kafka_consumer_group_metadata_new_with_genid(
                c"group".as_ptr(),
                1,
                id.as_ptr(),
                std::ptr::null(),
            )
        };
        Self(NonNull::new(pointer).unwrap())
    }
}

impl Drop for GroupMetadata {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe { sys::rd_kafka_consumer_group_metadata_destroy(self.0.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;

    use super::*;
    use crate::kafka::callbacks::QuietLog;
    use crate::kafka::client::make_client;

    #[test]
    fn a_consumer_without_a_group_has_none_as_one_that_ends() {
        let consumer: BaseConsumer<QuietLog> =
            make_client(ClientConfig::new().set("bootstrap.servers", "127.0.0.1:1"), QuietLog::default())
                .unwrap();
        assert!(GroupMetadata::of(&consumer).is_none());
    }
}
