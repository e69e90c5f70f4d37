//! `produce`: the load generator.

use clap::Args;

use super::Failure;
use crate::config::Settings;

/// `produce`
#[derive(Clone, Debug, Args)]
pub struct ProduceArgs {}

/// Sends payments.
pub fn produce(_settings: &Settings, _args: &ProduceArgs) -> Result<(), Failure> {
    Err(Failure::failed("produce is not wired yet"))
}
