//! `run`: the daemon.

use clap::Args;

use super::Failure;
use crate::config::Settings;

const AFTER_HELP: &str = "\
SIGTERM and SIGINT drain: what is in flight is finished within shutdown.timeout, published and
committed, and the exit code is 0. Several instances with the same kafka.group_id share the
partitions; each needs a kafka.instance_id of its own.

Examples:
  payment-writer run
  payment-writer run --until-caught-up            write what is there now, then stop
  PAYMENT_WRITER__LANES=4 payment-writer run";

/// `run`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// Stop by itself at the end offsets seen at the start
    #[arg(long)]
    pub until_caught_up: bool,
    /// Go on with this database although the group wrote to another one before: recovery after a loss.
    /// Rows are written again from the log; events that were sent are not sent again
    #[arg(long)]
    pub adopt_database: bool,
}

/// Runs until a signal, until caught up, or until a person must decide.
pub fn run(_settings: Settings, _args: &RunArgs) -> Result<(), Failure> {
    Err(Failure::failed("run is not wired yet"))
}
