//! The Postgres side: connections, the schema, and the store that lanes write to.

pub mod binding;
pub mod connection;
pub mod schema;
pub mod store;
pub mod waits;
