//! `topics create`.

use clap::Args;

use super::Failure;
use crate::config::Settings;

/// `topics create`
#[derive(Clone, Debug, Args)]
pub struct CreateTopicsArgs {
    /// Partitions of the input topic
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub partitions: i32,
    /// Partitions of each output topic; best if the input's number is a multiple of it
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub output_partitions: i32,
    /// Copies of each partition; default: the brokers' default.replication.factor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=32))]
    pub replication_factor: Option<i32>,
}

/// Makes the topics.
pub fn create(_settings: &Settings, _args: &CreateTopicsArgs) -> Result<(), Failure> {
    Err(Failure::failed("topics create is not wired yet"))
}
