//! Integration tests against a real Kafka and a real Postgres, which this one binary starts for itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod audit;
mod commands;
mod crash;
mod dlq;
mod fuzz;
mod generator;
mod housekeeping;
mod http;
mod java;
mod outages;
mod outcomes;
mod poison;
mod protocol;
mod rebalance;
mod schema;
mod security;
mod servers;
mod support;
