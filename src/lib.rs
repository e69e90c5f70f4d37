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

pub mod admin;
pub mod audit;
pub mod batch;
pub mod binding;
pub mod cli;
pub mod columns;
pub mod config;
pub mod cursor;
pub mod daemon;
pub mod disposition;
pub mod dlq;
pub mod failpoint;
pub mod generator;
pub mod housekeeping;
pub mod intake;
pub mod kafka;
pub mod kafka_client;
pub mod lane;
pub mod ledger;
pub mod logging;
pub mod metrics;
pub mod payment;
pub mod postgres;
pub mod publication;
pub mod rebuild;
pub mod reconcile;
pub mod record;
pub mod schema;
pub mod settlement;
pub mod status;
pub mod top;
pub mod trace;
pub mod wire;
