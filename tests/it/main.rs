//! Integration tests against a real Kafka and a real Postgres, which this one binary starts for itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// The tests use their own clients, besides those of the program.
#![allow(clippy::disallowed_methods)]

mod admin;
mod audit;
mod check_messages;
mod commands;
mod compat;
mod console;
mod container;
mod crash;
mod dlq;
mod docs;
mod doctor;
mod drills;
mod expansion;
mod failover;
mod fetching;
mod fuzz;
mod generator;
mod housekeeping;
mod http;
mod illness;
mod input;
mod java;
mod joins;
mod limits;
mod logs;
mod outages;
mod outcomes;
mod plans;
mod poison;
mod producers;
mod protocol;
mod rebalance;
mod rebuild;
mod reconcile;
mod replication;
mod schema;
mod security;
mod self_audit;
mod servers;
mod service_manager;
mod shape;
mod statefulset;
mod support;
mod top;
mod traces;
mod transactions;
mod upgrade;
mod waits;
