//! A produce request in pieces: what is said about the batches, and the batches themselves, which are not copied.
//!
//! `kafka-protocol` writes a request into one buffer. With megabytes of records that copies each of them once more,
//! into memory that is fresh every time.

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::messages::ProduceRequest;

/// From this version on lengths are numbers of variable size, and structures end with tagged fields (KIP-482).
const FLEXIBLE_FROM: i16 = 9;

/// Writes the same bytes as `kafka-protocol`.
struct Writer {
    is_flexible: bool,
    text: BytesMut,
    pieces: Vec<Bytes>,
}

impl Writer {
    /// A length of an array or of bytes.
    fn length(&mut self, length: usize) {
        if !self.is_flexible {
            return self.text.put_i32(length as i32);
        }
        // One more than it is, as 0 stands for null.
        let mut rest = length as u32 + 1;
        while rest >= 0x80 {
            self.text.put_u8(rest as u8 | 0x80);
            rest >>= 7;
        }
        self.text.put_u8(rest as u8);
    }

    fn string(&mut self, text: Option<&str>) {
        match text {
            None if self.is_flexible => self.text.put_u8(0),
            None => self.text.put_i16(-1),
            Some(text) => {
                if self.is_flexible {
                    self.length(text.len());
                } else {
                    self.text.put_i16(text.len() as i16);
                }
                self.text.put_slice(text.as_bytes());
            }
        }
    }

    fn records(&mut self, records: &Bytes) {
        self.length(records.len());
        self.pieces.push(self.text.split().freeze());
        self.pieces.push(records.clone());
    }

    /// The end of a structure: no tagged fields.
    fn end(&mut self) {
        if self.is_flexible {
            self.text.put_u8(0);
        }
    }
}

/// The request's body in this version (3 to 12), cut before and after each batch.
pub fn pieces(request: &ProduceRequest, version: i16) -> Vec<Bytes> {
    let is_flexible = version >= FLEXIBLE_FROM;
    let mut out = Writer { is_flexible, text: BytesMut::new(), pieces: Vec::new() };
    out.string(request.transactional_id.as_ref().map(|id| id.0.as_str()));
    out.text.put_i16(request.acks);
    out.text.put_i32(request.timeout_ms);
    out.length(request.topic_data.len());
    for topic in &request.topic_data {
        out.string(Some(topic.name.0.as_str()));
        out.length(topic.partition_data.len());
        for partition in &topic.partition_data {
            out.text.put_i32(partition.index);
            out.records(partition.records.as_ref().unwrap_or(&Bytes::new()));
            out.end();
        }
        out.end();
    }
    out.end();
    out.pieces.push(out.text.freeze());
    out.pieces
}

#[cfg(test)]
mod tests {
    use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
    use kafka_protocol::messages::{TopicName, TransactionalId};
    use kafka_protocol::protocol::{Encodable, StrBytes};
    use proptest::prelude::*;

    use super::*;

    type Topics = Vec<(String, Vec<(i32, Vec<u8>)>)>;

    fn request(transactional_id: Option<String>, topics: Topics) -> ProduceRequest {
        let partition = |(index, records): (i32, Vec<u8>)| {
            PartitionProduceData::default().with_index(index).with_records(Some(records.into()))
        };
        let topic = |(name, partitions): (String, Vec<_>)| {
            TopicProduceData::default()
                .with_name(TopicName::from(StrBytes::from_string(name)))
                .with_partition_data(partitions.into_iter().map(partition).collect())
        };
        ProduceRequest::default()
            .with_transactional_id(
                transactional_id.map(|id| TransactionalId::from(StrBytes::from_string(id))),
            )
            .with_acks(-1)
            .with_timeout_ms(15_000)
            .with_topic_data(topics.into_iter().map(topic).collect())
    }

    proptest! {
        #[test]
        fn the_pieces_together_are_the_request(
            transactional_id in proptest::option::of("[a-z]{1,200}"),
            topics in proptest::collection::vec(
                ("[a-z]{1,60}", proptest::collection::vec(
                    (any::<i32>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..5)), 0..4),
            version in 3_i16..=12,
        ) {
            let request = request(transactional_id, topics);
            let mut whole = BytesMut::new();
            request.encode(&mut whole, version).unwrap();
            prop_assert_eq!(pieces(&request, version).concat(), whole);
        }

        #[test]
        fn a_batch_is_passed_on_and_not_copied(records in proptest::collection::vec(any::<u8>(), 1..2_000)) {
            let request = request(None, vec![("events".to_owned(), vec![(0, records)])]);
            let batch = request.topic_data[0].partition_data[0].records.clone().unwrap();
            let pieces = pieces(&request, 12);
            prop_assert!(pieces.iter().any(|piece| piece.as_ptr() == batch.as_ptr()));
        }
    }
}
