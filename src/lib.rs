//! payment-writer writes payments from Kafka to Postgres exactly once, and publishes their events to Kafka
//! exactly once.
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

// Ordered from the bottom layer to the top: a module may use only those before it in this list
// (tests/layers).

pub mod failpoint;

/// Payments, records and their outcomes, without I/O.
pub mod domain;

pub mod config;
pub mod error;

pub mod ports;

pub mod telemetry;

pub mod kafka;
pub mod postgres;

pub mod lane;

pub mod dlq;
pub mod resolution;

pub mod housekeeping;
pub mod reconcile;

pub mod audit;

pub mod admin;
pub mod daemon;
pub mod generator;
pub mod rebuild;
pub mod top;

pub mod cli;
