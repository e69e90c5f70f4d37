//! Admin requests about one topic.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::client::Client;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::{Offset, TopicPartitionList};
use rdkafka_sys as sys;
use sys::rd_kafka_admin_op_t as operation;
use sys::rd_kafka_resp_err_t as code;

use super::{NativeError, c_string, millis};

/// What the brokers say of a topic.
pub struct TopicDescription {
    /// Its id; nil if the brokers give none.
    pub id: uuid::Uuid,
    /// Number of partitions.
    pub partitions: usize,
    /// The smallest number of replicas of a partition.
    pub replicas: usize,
    /// Rights of this principal, by their names in Kafka; empty unless asked for.
    pub operations: Vec<String>,
}

/// Returns a topic's id and its number of partitions (`DescribeTopics`).
///
/// # Errors
/// An error of the broker or the client.
pub fn topic_id<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    timeout: Duration,
) -> Result<(uuid::Uuid, usize), NativeError> {
    let found = describe_topic(consumer.client(), topic, false, timeout)?;
    Ok((known_id(found.id)?, found.partitions))
}

/// Describes a topic (`DescribeTopics`), with the rights of this principal if asked for (KIP-430).
///
/// # Errors
/// An error of the broker or the client.
pub fn describe_topic<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    asks_rights: bool,
    timeout: Duration,
) -> Result<TopicDescription, NativeError> {
    let request = Request {
        name: "DescribeTopics",
        operation: operation::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS,
        asks_rights,
    };
    let name = c_string(topic);
    let mut names = [name.as_ptr()];
    // SAFETY: client and names are live, and the collection is until it is destroyed, once, here; what is
    // read lives inside the event.
    unsafe {
        let collection = sys::rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), names.len());
        let answer = request.ask(
            client,
            topic,
            timeout,
            |options, queue| sys::rd_kafka_DescribeTopics(client.native_ptr(), collection, options, queue),
            |event| {
                let result = sys::rd_kafka_event_DescribeTopics_result(event);
                let topics = array(result, sys::rd_kafka_DescribeTopics_result_topics);
                let topic = *topics.first().ok_or_else(|| request.lacks("topic"))?;
                checked_of(sys::rd_kafka_TopicDescription_error(topic), "the topic cannot be described")?;
                let partitions = array(topic, sys::rd_kafka_TopicDescription_partitions);
                let replicas =
                    partitions.iter().map(|p| array(*p, sys::rd_kafka_TopicPartitionInfo_replicas).len());
                let id = sys::rd_kafka_TopicDescription_topic_id(topic);
                let high = sys::rd_kafka_Uuid_most_significant_bits(id) as u64;
                let low = sys::rd_kafka_Uuid_least_significant_bits(id) as u64;
                Ok(TopicDescription {
                    id: uuid::Uuid::from_u64_pair(high, low),
                    partitions: partitions.len(),
                    replicas: replicas.min().unwrap_or(0),
                    operations: operations(topic, sys::rd_kafka_TopicDescription_authorized_operations),
                })
            },
        );
        sys::rd_kafka_TopicCollection_destroy(collection);
        answer
    }
}

/// What the brokers say of a consumer group.
pub struct GroupDescription {
    /// Number of members.
    pub members: usize,
    /// The assignor that they use; empty without members.
    pub assignor: String,
    /// Rights of this principal, by their names in Kafka.
    pub operations: Vec<String>,
}

/// Describes a consumer group, with the rights of this principal (`DescribeGroups`, KIP-430). A group that does not
/// exist has no members. `topic` is one that exists.
///
/// # Errors
/// An error of the broker or the client.
pub fn describe_group<C: ClientContext>(
    client: &Client<C>,
    group: &str,
    topic: &str,
    timeout: Duration,
) -> Result<GroupDescription, NativeError> {
    let request = Request {
        name: "DescribeGroups",
        operation: operation::RD_KAFKA_ADMIN_OP_DESCRIBECONSUMERGROUPS,
        asks_rights: true,
    };
    let name = c_string(group);
    let mut names = [name.as_ptr()];
    let native = client.native_ptr();
    // SAFETY: client and names are live; the client copies the names; what is read lives inside the event.
    unsafe {
        request.ask(
            client,
            topic,
            timeout,
            |options, queue| {
                sys::rd_kafka_DescribeConsumerGroups(native, names.as_mut_ptr(), 1, options, queue)
            },
            |event| {
                let result = sys::rd_kafka_event_DescribeConsumerGroups_result(event);
                let groups = array(result, sys::rd_kafka_DescribeConsumerGroups_result_groups);
                let group = *groups.first().ok_or_else(|| request.lacks("group"))?;
                checked_of(
                    sys::rd_kafka_ConsumerGroupDescription_error(group),
                    "the group cannot be described",
                )?;
                let assignor = text(sys::rd_kafka_ConsumerGroupDescription_partition_assignor(group));
                Ok(GroupDescription {
                    members: sys::rd_kafka_ConsumerGroupDescription_member_count(group),
                    assignor: assignor.unwrap_or_default().to_owned(),
                    operations: operations(
                        group,
                        sys::rd_kafka_ConsumerGroupDescription_authorized_operations,
                    ),
                })
            },
        )
    }
}

/// Why a topic without an id is refused.
pub const NO_TOPIC_IDS: &str =
    "the brokers give topics no ids, which need Kafka 2.8 with metadata version 2.8 (KIP-516)";

/// Refuses the nil id, which stands for none: with it, a topic that is created again could not be told apart.
fn known_id(id: uuid::Uuid) -> Result<uuid::Uuid, NativeError> {
    let refused = || NativeError::plain(code::RD_KAFKA_RESP_ERR__UNSUPPORTED_FEATURE, NO_TOPIC_IDS);
    (!id.is_nil()).then_some(id).ok_or_else(refused)
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
    let mut settings = settings_of(client, topic, None, timeout)?;
    settings.remove(setting).ok_or_else(|| DESCRIBE_CONFIGS.lacks(setting))
}

const DESCRIBE_CONFIGS: Request = Request {
    name: "DescribeConfigs",
    operation: operation::RD_KAFKA_ADMIN_OP_DESCRIBECONFIGS,
    asks_rights: false,
};

/// Returns all settings of a topic, or of the broker with this id (`DescribeConfigs`); without secrets. Needs the right
/// `DescribeConfigs` on the topic, or on the cluster.
///
/// # Errors
/// An error of the broker or the client, also when that right is missing.
pub fn settings_of<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    broker: Option<i32>,
    timeout: Duration,
) -> Result<BTreeMap<String, String>, NativeError> {
    let request = DESCRIBE_CONFIGS;
    let (kind, name) = match broker {
        Some(id) => (sys::rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_BROKER, c_string(&id.to_string())),
        None => (sys::rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_TOPIC, c_string(topic)),
    };
    // SAFETY: client and name are live, and the resource is until it is destroyed, once, here; what is read
    // lives inside the event.
    unsafe {
        let resource = sys::rd_kafka_ConfigResource_new(kind, name.as_ptr());
        if resource.is_null() {
            return Err(NativeError::plain(code::RD_KAFKA_RESP_ERR__INVALID_ARG, "this is not a topic name"));
        }
        let native = client.native_ptr();
        let answer = request.ask(
            client,
            topic,
            timeout,
            |options, queue| {
                sys::rd_kafka_DescribeConfigs(native, [resource].as_mut_ptr(), 1, options, queue)
            },
            |event| {
                let result = sys::rd_kafka_event_DescribeConfigs_result(event);
                let resources = array(result, sys::rd_kafka_DescribeConfigs_result_resources);
                let resource = *resources.first().ok_or_else(|| request.lacks("settings"))?;
                let error = sys::rd_kafka_ConfigResource_error(resource);
                checked(error, "the settings cannot be described")?;
                let entries = array(resource, sys::rd_kafka_ConfigResource_configs).iter();
                let entry = |entry: &*const _| {
                    let name = text(sys::rd_kafka_ConfigEntry_name(*entry))?;
                    Some((name.to_owned(), text(sys::rd_kafka_ConfigEntry_value(*entry))?.to_owned()))
                };
                Ok(entries.filter_map(entry).collect())
            },
        );
        sys::rd_kafka_ConfigResource_destroy(resource);
        answer
    }
}

/// Returns the high watermark of each partition for which the brokers answered (`ListOffsets`).
///
/// # Errors
/// An error of the client.
pub fn high_watermarks<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: &[i32],
    timeout: Duration,
) -> Result<BTreeMap<i32, i64>, NativeError> {
    let request = Request {
        name: "ListOffsets",
        operation: operation::RD_KAFKA_ADMIN_OP_LISTOFFSETS,
        asks_rights: false,
    };
    let client = consumer.client();
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        // `OFFSET_SPEC_LATEST`; the isolation level of an admin request is read_uncommitted by default.
        let added = list.add_partition_offset(topic, *partition, Offset::End);
        added.map_err(|e| NativeError::plain(code::RD_KAFKA_RESP_ERR__INVALID_ARG, &e.to_string()))?;
    }
    let send = |options: *mut _, queue| {
        // SAFETY: client and list are live; the client copies the list.
        unsafe { sys::rd_kafka_ListOffsets(client.native_ptr(), list.ptr(), options, queue) }
    };
    request.ask(client, topic, timeout, send, |event| {
        // SAFETY: what is read lives inside the event, which the caller keeps.
        unsafe {
            let result = sys::rd_kafka_event_ListOffsets_result(event);
            let infos = array(result, sys::rd_kafka_ListOffsets_result_infos);
            let found = infos.iter().filter_map(|info| {
                let found = sys::rd_kafka_ListOffsetsResultInfo_topic_partition(*info).as_ref()?;
                (found.err == code::RD_KAFKA_RESP_ERR_NO_ERROR).then_some((found.partition, found.offset))
            });
            Ok(found.collect())
        }
    })
}

/// One kind of admin request.
struct Request {
    name: &'static str,
    operation: sys::rd_kafka_admin_op_t,
    /// Whether the answer is to contain this principal's rights.
    asks_rights: bool,
}

impl Request {
    /// Sends a request, and reads the event that answers it.
    fn ask<C: ClientContext, T>(
        &self,
        client: &Client<C>,
        topic: &str,
        timeout: Duration,
        send: impl FnOnce(*mut sys::rd_kafka_AdminOptions_t, *mut sys::rd_kafka_queue_t),
        read: impl FnOnce(*mut sys::rd_kafka_event_t) -> Result<T, NativeError>,
    ) -> Result<T, NativeError> {
        // While no broker can be reached, an admin request retries at every change of a connection's state,
        // and causes such changes itself: two of the client's threads then keep a core busy. A metadata
        // request first avoids that.
        client.fetch_metadata(Some(topic), timeout).map_err(|error| {
            NativeError::plain(code::RD_KAFKA_RESP_ERR__TRANSPORT, &format!("no broker answers: {error}"))
        })?;
        let native = client.native_ptr();
        let mut reason: [c_char; 256] = [0; 256];
        // SAFETY: the client is live, and every object made here is destroyed here, once; `read` copies what
        // it takes from the event.
        unsafe {
            let queue = sys::rd_kafka_queue_new(native);
            let options = sys::rd_kafka_AdminOptions_new(native, self.operation);
            let (buffer, len) = (reason.as_mut_ptr(), reason.len());
            sys::rd_kafka_AdminOptions_set_request_timeout(options, millis(timeout), buffer, len);
            if self.asks_rights {
                // It only refuses requests that have no such option.
                let refused = sys::rd_kafka_AdminOptions_set_include_authorized_operations(options, 1);
                let _ = NativeError::check(refused);
            }
            send(options, queue);
            // The admin request has its own timeout; the extra second lets its answer arrive first.
            let event = sys::rd_kafka_queue_poll(queue, millis(timeout + Duration::from_secs(1)));
            let answer = if event.is_null() {
                let message = format!("no answer to {}", self.name);
                Err(NativeError::plain(code::RD_KAFKA_RESP_ERR__TIMED_OUT, &message))
            } else {
                let error = sys::rd_kafka_event_error(event);
                let answer = checked(error, &format!("{} failed", self.name)).and_then(|()| read(event));
                sys::rd_kafka_event_destroy(event);
                answer
            };
            sys::rd_kafka_AdminOptions_destroy(options);
            sys::rd_kafka_queue_destroy(queue);
            answer
        }
    }

    fn lacks(&self, what: &str) -> NativeError {
        let message = format!("{} returned no {what}", self.name);
        NativeError::plain(code::RD_KAFKA_RESP_ERR__BAD_MSG, &message)
    }
}

fn checked(error: sys::rd_kafka_resp_err_t, message: &str) -> Result<(), NativeError> {
    match error {
        code::RD_KAFKA_RESP_ERR_NO_ERROR => Ok(()),
        error => Err(NativeError::plain(error, message)),
    }
}

/// As [`checked`], for an error object that belongs to an answer; null means success.
unsafe fn checked_of(error: *const sys::rd_kafka_error_t, message: &str) -> Result<(), NativeError> {
    // SAFETY: the caller passes null or an error that lives as long as its answer.
    if error.is_null() { Ok(()) } else { checked(unsafe { sys::rd_kafka_error_code(error) }, message) }
}

/// The names of the operations that `get` finds in an answer.
unsafe fn operations<R>(
    of: *const R,
    get: unsafe extern "C" fn(*const R, *mut usize) -> *const sys::rd_kafka_AclOperation_t,
) -> Vec<String> {
    let mut count = 0;
    // SAFETY: the caller keeps the answer alive, which owns the array, and `get` writes its length; the names are
    // constants.
    unsafe {
        let first = get(of, &mut count);
        let found = if first.is_null() { &[] } else { std::slice::from_raw_parts(first, count) };
        found.iter().filter_map(|o| text(sys::rd_kafka_AclOperation_name(*o))).map(str::to_owned).collect()
    }
}

/// The array that `get` finds in an object; empty if either is null.
unsafe fn array<'a, R, T>(
    of: *const R,
    get: unsafe extern "C" fn(*const R, *mut usize) -> *mut *const T,
) -> &'a [*const T] {
    if of.is_null() {
        return &[];
    }
    let mut count = 0;
    // SAFETY: the caller keeps the object alive, which owns the array, and `get` writes its length.
    unsafe {
        let first = get(of, &mut count);
        if first.is_null() { &[] } else { std::slice::from_raw_parts(first, count) }
    }
}

/// A text of librdkafka; `None` if it is null or not UTF-8.
unsafe fn text<'a>(pointer: *const c_char) -> Option<&'a str> {
    // SAFETY: the caller passes null or a text that lives as long as its object.
    (!pointer.is_null()).then(|| unsafe { CStr::from_ptr(pointer) })?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_without_an_id_is_refused() {
        let refused = known_id(uuid::Uuid::nil()).unwrap_err();
        assert!(refused.to_string().contains("KIP-516"), "{refused}");
        assert!(known_id(uuid::Uuid::from_u128(7)).is_ok());
    }
}
