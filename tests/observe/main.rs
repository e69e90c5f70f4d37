//! Dashboard, alert rules, runbooks and compose file: that they are valid, and what they show for live
//! daemons under load, with the programs that Debian packages.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod checks;
mod faults;
mod site;
#[path = "../it/support/mod.rs"]
mod support;
