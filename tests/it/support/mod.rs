//! Harness of the integration tests: servers, separate names for each test, the daemon as a child process.
//!
//! Everything here blocks: tests are plain `#[test]` functions, as the daemon under test is another process.
//!
//! ```ignore
//! let scope = Scope::new(Servers::shared(), "duplicates");
//! scope.create_topics(4, 2);
//! scope.command(&["migrate"]).succeeds();
//! scope.produce(&scope.input_topic, [Message::new("57", r#"{"messageId":...}"#)]);
//! let daemon = scope.daemon(&["run"]);
//! wait_until("the row is there", || scope.count("payment_core") == 1);
//! let events = scope.read_all(&scope.read_topic);
//! ```
// Shared by several test binaries, none of which uses every helper.
#![allow(dead_code, unused_imports)]
// The tests use their own clients, besides those of the program.
#![allow(clippy::disallowed_methods)]

#[path = "../../../dev/audit/checker/mod.rs"]
mod checker;
mod daemon;
mod exactly_once;
mod flow;
mod kafka;
mod kafka_proxy;
mod load;
mod member;
mod pages;
mod payments;
mod ports;
mod postgres;
mod servers;
mod writer;

use std::time::{Duration, Instant};

pub use daemon::{Daemon, Finished, Reply, TESTED_PROGRAM, ask};
pub use exactly_once::{Check, Outcomes, PATIENCE, Remade};
pub use flow::{Flow, Source, TransactionWriter, Written};
pub use kafka::{Marker, Message, Received, StoredBatch};
pub use kafka_proxy::{KafkaProxy, Lost};
pub use load::Load;
pub use member::Member;
pub use pages::{MetricEntry, metrics_page, rows};
pub use payments::{AT_ISO, AT_MS, Payment, payment_id, ulid, uuid_v4, uuid_v7};
pub use ports::{free_address, listen};
pub use postgres::{Postgres, postgres_program, succeeds};
pub use servers::{Act, Scope, Servers, block_on, coordinator_partition};
pub use writer::{ABORTED_ONE_IN, COMPRESSIONS, TRANSACTION_MAX, Transactional, transaction_size};

/// Time limit for anything that is expected to happen. Generous: only a failing test waits for all of it.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds, and fails the test if it does not within [`DEADLINE`].
#[track_caller]
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_until_within(DEADLINE, what, condition);
}

/// As [`wait_until`], with a custom deadline.
#[track_caller]
pub fn wait_until_within(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < deadline, "not within {deadline:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
