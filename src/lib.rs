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

mod failpoint;
mod secrets;

/// Payments, records and their outcomes, without I/O.
pub mod domain;

pub mod config;
mod error;

pub mod ports;

pub mod telemetry;

pub mod kafka;
pub mod postgres;

pub mod lane;

pub mod dependencies;

mod dlq;
mod resolution;

pub mod housekeeping;
mod reconcile;

mod audit;

mod console;

mod admin;
mod daemon;
mod doctor;
pub mod generator;
mod rebuild;
mod top;

pub mod cli;
