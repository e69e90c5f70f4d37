//! FFI to librdkafka for calls that the `rdkafka` crate does not offer: the one module with `unsafe`.
//!
//! Fetching into a queue ([`fetch`]), transactional produce without an allocation per message, topic ids
//! (`DescribeTopics`), topic settings (`DescribeConfigs`), and the generation in the consumer's group
//! metadata. The public functions are safe to call; each `unsafe` block says why it is sound.
#![allow(unsafe_code)]

mod admin;
pub mod fetch;
mod group_metadata;
mod producer;
mod producer_client;
mod record;

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::client::Client;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka_sys as sys;

pub use admin::{
    NO_TOPIC_IDS, describe_group, describe_topic, high_watermarks, settings_of, topic_id, topic_setting,
};
pub use group_metadata::GroupMetadata;
pub use producer::TxnProducer;
pub use producer_client::ProducerClient;
pub use record::NativeRecord;

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
