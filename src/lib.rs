//! payment-writer: payments from Kafka to Postgres, exactly once, and their events back to Kafka.
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::unreachable
    )
)]

pub mod cli;
pub mod config;
pub mod generator;
pub mod kafka_client;
pub mod logging;
pub mod record;
