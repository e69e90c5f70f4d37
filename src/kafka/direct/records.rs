//! Record batches as brokers keep them: message format 2 (KIP-98), written once, straight from an output.
//!
//! `kafka-protocol` has an encoder, too; it takes each record as a value of its own with a map of headers, and
//! writes it field by field. This is the part of the protocol that costs by the payment.

use bytes::{BufMut, Bytes};

use crate::publication::Header;
use crate::record::TimestampMs;

/// From the base offset to the number of records.
const HEADER_BYTES: usize = 61;
/// The checksum covers everything from here on.
const CHECKED_FROM: usize = 21;
const MAGIC: i8 = 2;
/// Attribute bit 4: the batch belongs to a transaction.
const TRANSACTIONAL: i16 = 1 << 4;
/// What a record has besides key, value and headers, at most: its length, attributes, deltas and lengths.
const RECORD_BYTES_MAX: usize = 40;

/// Who writes a batch, and what its first record's number is among all that were written to the partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Producer id.
    pub producer_id: i64,
    /// Producer epoch.
    pub epoch: i16,
    /// Sequence number of the first record.
    pub sequence: i32,
    /// Timestamp of all records.
    pub at: TimestampMs,
}

/// A batch that is being written.
#[derive(Debug, Default)]
pub struct RecordBatch {
    bytes: Vec<u8>,
    count: i32,
}

impl RecordBatch {
    /// An empty batch in the memory of an earlier one.
    pub fn in_memory(bytes: Vec<u8>) -> Self {
        Self { bytes, count: 0 }
    }

    /// Appends a record, stamped like all others of the batch.
    pub fn push(&mut self, key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header<'_>]) {
        if self.bytes.is_empty() {
            self.bytes.resize(HEADER_BYTES, 0);
        }
        // Attributes and the difference in time take one byte each.
        let body = 2
            + varint_len(self.count)
            + field_len(key)
            + field_len(value)
            + varint_len(headers.len() as i32)
            + headers.iter().map(|(name, value)| field_len(Some(name)) + field_len(*value)).sum::<usize>();
        self.bytes.reserve(body + RECORD_BYTES_MAX);
        put_varint(&mut self.bytes, body as i32);
        self.bytes.extend_from_slice(&[0, 0]);
        put_varint(&mut self.bytes, self.count);
        put_field(&mut self.bytes, key);
        put_field(&mut self.bytes, value);
        put_varint(&mut self.bytes, headers.len() as i32);
        for (name, value) in headers {
            put_field(&mut self.bytes, Some(name));
            put_field(&mut self.bytes, *value);
        }
        self.count += 1;
    }

    /// How large a record makes a batch, at most.
    pub fn record_bytes_max(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header<'_>]) -> usize {
        let len = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        let headers = headers.iter().map(|(name, value)| name.len() + len(*value) + 10).sum::<usize>();
        RECORD_BYTES_MAX + len(key) + len(value) + headers
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no record yet.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Number of records.
    pub fn count(&self) -> i32 {
        self.count
    }

    /// Writes the header; the batch is then as it goes to the broker.
    pub fn seal(mut self, stamp: &Stamp) -> Bytes {
        let (length, count) = (self.bytes.len(), self.count);
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.put_i64(0); // base offset: the broker's to give
        header.put_i32(length.saturating_sub(12) as i32);
        header.put_i32(-1); // leader epoch: the broker's to give
        header.put_i8(MAGIC);
        header.put_u32(0); // checksum
        header.put_i16(TRANSACTIONAL);
        header.put_i32(count.saturating_sub(1));
        header.put_i64(stamp.at.0);
        header.put_i64(stamp.at.0);
        header.put_i64(stamp.producer_id);
        header.put_i16(stamp.epoch);
        header.put_i32(stamp.sequence);
        header.put_i32(count);
        if let Some(place) = self.bytes.get_mut(..HEADER_BYTES) {
            place.copy_from_slice(&header);
        }
        let checksum = crc32c::crc32c(self.bytes.get(CHECKED_FROM..).unwrap_or_default());
        if let Some(place) = self.bytes.get_mut(CHECKED_FROM - 4..CHECKED_FROM) {
            place.copy_from_slice(&checksum.to_be_bytes());
        }
        self.bytes.into()
    }
}

fn zigzag(value: i32) -> u32 {
    ((value << 1) ^ (value >> 31)) as u32
}

fn varint_len(value: i32) -> usize {
    // Seven bits a byte, and one byte for 0.
    (38 - (zigzag(value) | 1).leading_zeros() as usize) / 7
}

fn put_varint(out: &mut Vec<u8>, value: i32) {
    let mut rest = zigzag(value);
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn field_len(bytes: Option<&[u8]>) -> usize {
    // Null is a length of -1.
    bytes.map_or(1, |bytes| varint_len(bytes.len() as i32) + bytes.len())
}

fn put_field(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        Some(bytes) => {
            put_varint(out, bytes.len() as i32);
            out.extend_from_slice(bytes);
        }
        None => put_varint(out, -1),
    }
}

/// The sequence number after `count` more records: it begins anew behind the largest.
pub fn sequence_after(sequence: i32, count: i32) -> i32 {
    sequence.wrapping_add(count) & i32::MAX
}

/// The partition in which Java's default partitioner puts a key: murmur2, without its sign, modulo partitions.
pub fn partition_of_key(key: &[u8], partitions: usize) -> usize {
    (murmur2(key) & 0x7fff_ffff) as usize % partitions.max(1)
}

/// `org.apache.kafka.common.utils.Utils.murmur2`.
fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    let mut hash = SEED ^ data.len() as u32;
    let (words, rest) = data.as_chunks::<4>();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k ^= k >> 24;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (place, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * place);
        }
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use kafka_protocol::records::{RecordBatchDecoder, TimestampType};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_land_where_java_puts_them() {
        // The values of Kafka's own UtilsTest.
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()) as i32, hash, "{key}");
        }
        assert_eq!(partition_of_key(b"21", 20), (-973_932_308_i32 & i32::MAX) as usize % 20);
    }

    #[test]
    fn sequence_numbers_begin_anew_behind_the_largest() {
        // As in Kafka's DefaultRecordBatch.incrementSequence.
        assert_eq!(sequence_after(5, 3), 8);
        assert_eq!(sequence_after(i32::MAX - 1, 1), i32::MAX);
        assert_eq!(sequence_after(i32::MAX, 1), 0);
        assert_eq!(sequence_after(i32::MAX - 1, 5), 3);
    }

    type Written = (Option<Vec<u8>>, Option<Vec<u8>>, Vec<(String, Option<Vec<u8>>)>);

    fn records() -> impl Strategy<Value = Vec<Written>> {
        let bytes = || proptest::option::of(proptest::collection::vec(any::<u8>(), 0..300));
        // Names that differ: the decoder of the test keeps headers in a map.
        let header = ("[a-z]{1,70}", bytes());
        let headers = proptest::collection::btree_map(header.0, header.1, 0..4);
        proptest::collection::vec((bytes(), bytes(), headers.prop_map(|h| h.into_iter().collect())), 1..200)
    }

    proptest! {
        #[test]
        fn another_decoder_reads_what_was_written(records in records()) {
            let stamp = Stamp { producer_id: 77, epoch: 3, sequence: 12, at: TimestampMs(1_700_000_000_123) };
            let mut batch = RecordBatch::default();
            let mut bytes_max = HEADER_BYTES;
            for (key, value, headers) in &records {
                let headers: Vec<Header<'_>> =
                    headers.iter().map(|(name, value)| (name.as_bytes(), value.as_deref())).collect();
                batch.push(key.as_deref(), value.as_deref(), &headers);
                bytes_max += RecordBatch::record_bytes_max(key.as_deref(), value.as_deref(), &headers);
                prop_assert!(batch.len() <= bytes_max);
            }
            prop_assert_eq!(batch.count() as usize, records.len());
            let mut bytes = batch.seal(&stamp);
            // It checks the checksum.
            let set = RecordBatchDecoder::decode(&mut bytes).unwrap();
            prop_assert_eq!(set.records.len(), records.len());
            for (index, (read, (key, value, headers))) in set.records.iter().zip(&records).enumerate() {
                prop_assert!(read.transactional && !read.control);
                prop_assert_eq!(read.timestamp_type, TimestampType::Creation);
                prop_assert_eq!(read.timestamp, stamp.at.0);
                prop_assert_eq!((read.producer_id, read.producer_epoch), (77, 3));
                prop_assert_eq!((read.offset, read.sequence), (index as i64, 12 + index as i32));
                prop_assert_eq!(read.key.as_deref(), key.as_deref());
                prop_assert_eq!(read.value.as_deref(), value.as_deref());
                let found: Vec<_> = read.headers.iter()
                    .map(|(name, value)| (name.to_string(), value.as_ref().map(|v| v.to_vec())))
                    .collect();
                prop_assert_eq!(&found, headers);
            }
        }

        #[test]
        fn the_length_of_a_number_is_what_it_takes(value in any::<i32>()) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert_eq!(out.len(), varint_len(value));
        }
    }
}
