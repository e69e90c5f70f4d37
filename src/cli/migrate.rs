//! `migrate`: the database schema.

use clap::{Args, Subcommand};

use super::Failure;
use crate::config::Settings;

const AFTER_HELP: &str = "\
Uses postgres.housekeeping_url. An advisory lock makes it safe to start from many places at once;
whoever comes second finds nothing left to do.

Examples:
  payment-writer migrate                          up to the newest step
  payment-writer migrate status                   what ran when
  payment-writer migrate undo --count 1           take the newest step back";

/// `migrate`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct MigrateArgs {
    /// Without one: up to the newest step.
    #[command(subcommand)]
    pub command: Option<MigrateCommand>,
}

/// What to do other than going up.
#[derive(Clone, Debug, Subcommand)]
pub enum MigrateCommand {
    /// Show which steps ran, and when
    Status,
    /// Take the newest steps back; their data goes with them
    Undo {
        /// How many steps
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: u32,
    },
}

/// Moves the schema, or tells where it is.
pub fn migrate(_settings: Settings, _args: &MigrateArgs) -> Result<(), Failure> {
    Err(Failure::failed("migrate is not wired yet"))
}
