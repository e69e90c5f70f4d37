//! Payments, records, batches and their outcomes. Pure: no I/O and no clock; of the client libraries only
//! error codes.

pub mod batch;
pub mod columns;
pub mod cursor;
pub mod outcome;
pub mod partitioner;
pub mod payment;
pub mod publication;
pub mod record;
pub mod wire;
