//! Everything that talks to Kafka.
//!
//! The daemon has three kinds of clients, so that a rebalance never disturbs what is being fetched:
//!
//! - one member of the consumer group per process ([`group`]). It handles rebalances and never fetches.
//!   Partitions are dealt to lanes by number. On an assignment the callback only notifies the lanes; on a
//!   revocation it waits, within a limit, until each lane concerned has published or dropped what it holds.
//! - one reader per lane ([`fetcher`]), in no group. It fetches the lane's partitions from positions that the
//!   lane names.
//! - one transactional producer per lane ([`publisher`], [`transactions`]), on a thread of its own. A
//!   transaction carries a batch's events and dead letters and the group's offsets, with the member's
//!   generation (KIP-447): the broker refuses an outdated generation, as after a revocation.
//!
//! [`lane_client`] joins the three to what a lane sees, the [`KafkaPort`](crate::ports::KafkaPort). `client`
//! has the settings of all clients, `callbacks` what they do while they are polled, and `librdkafka` the calls
//! that need `unsafe`. The other modules answer single questions: offsets, the content of a gap, what the
//! outputs show, whether partitions are readable or unassigned.

pub mod callbacks;
pub mod client;
pub mod fetcher;
mod gaps;
pub mod group;
pub mod join_failure;
pub mod lane_client;
pub mod last_stable;
pub mod librdkafka;
pub mod offsets;
pub mod output_scan;
pub mod probe;
pub mod publisher;
pub mod publisher_settings;
mod rebootstrap;
pub mod scan;
pub mod throttle;
pub mod timestamp_lookup;
pub mod token;
pub mod topic_rules;
pub mod transactions;
pub mod unassigned;
