//! A transactional producer that speaks Kafka's protocol itself.
//!
//! librdkafka takes each message by itself, copies it twice, and sends every partition a request of its own. Here
//! the outputs of a batch are written straight into one record batch a partition, and one request takes those of
//! all partitions of a broker. Each transaction is settled before the next begins, so there are neither queues nor
//! retries in the background: what fails is aborted, and the lane, which still has the batch, tries again.
//!
//! Messages are encoded and decoded by `kafka-protocol`, but for the record batches themselves and the requests that hold
//! them.

mod cluster;
mod connection;
mod produce;
mod records;
mod sasl;
mod transactions;
mod transport;

pub use transactions::{DirectSettings, DirectTransactions};
pub use transport::{Transport, Unsupported};
