//! The Kafka side: group membership and fetching, and the transactions that publish.

pub mod fetcher;
mod gaps;
pub mod group;
pub mod librdkafka;
pub mod log;
pub mod orphans;
pub mod peek;
pub mod probe;
pub mod publisher;
mod reminder;
pub mod scan;
pub mod stable;
pub mod tails;
mod throttle;
pub mod token;
pub mod transactions;
