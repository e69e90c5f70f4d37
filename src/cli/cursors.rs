//! `cursors`: how far each partition is, and settling a halted one.

use clap::{Args, Subcommand};

use super::Failure;
use crate::config::Settings;

const SETTLE_HELP: &str = "\
Without --apply nothing changes: it only says what would. With it, the decision, who made it and
why are written to the audit table, and the daemon goes on with the partition by itself.";

/// `cursors`
#[derive(Clone, Debug, Subcommand)]
pub enum CursorsCommand {
    /// Show per partition what is written (applied), published and committed in the group
    Show {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Settle a halted partition: what is in doubt counts as sent, and is not sent again
    #[command(after_help = SETTLE_HELP)]
    Accept(AcceptArgs),
    /// Settle a halted partition: go on at a later offset, leaving out the records before it
    #[command(after_help = SETTLE_HELP)]
    Skip(SkipArgs),
}

/// `cursors accept`
#[derive(Clone, Debug, Args)]
pub struct AcceptArgs {
    /// The partition of the input topic
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: i32,
    /// Do it, instead of telling what would be done
    #[arg(long, requires = "reason")]
    pub apply: bool,
    /// Why, for the audit table
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// `cursors skip`
#[derive(Clone, Debug, Args)]
pub struct SkipArgs {
    /// The partition of the input topic
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: i32,
    /// The next offset to read
    #[arg(long, value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    pub to: i64,
    /// Do it, instead of telling what would be done
    #[arg(long, requires = "reason")]
    pub apply: bool,
    /// Why, for the audit table
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Shows or settles cursors.
pub fn cursors(_settings: Settings, _command: &CursorsCommand) -> Result<(), Failure> {
    Err(Failure::failed("cursors is not wired yet"))
}
