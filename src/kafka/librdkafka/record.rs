//! Records in the client's memory.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use rdkafka_sys as sys;

use crate::domain::record::{Offset, Partition, SourceBatch, TimestampMs};

/// A record in the client's memory, valid during the callback that receives it.
#[derive(Debug)]
pub struct NativeRecord<'a> {
    pub(super) message: &'a sys::rd_kafka_message_t,
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
