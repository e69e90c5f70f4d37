//! `migrate`: the database schema.

use clap::{Args, Subcommand};

use super::Failure;
use crate::config::Settings;
use crate::schema;

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
        /// Also when there are payments, which are destroyed with their tables
        #[arg(long)]
        force: bool,
    },
}

/// Moves the schema, or tells where it is.
pub fn migrate(settings: &Settings, args: &MigrateArgs) -> Result<(), Failure> {
    super::small_runtime()?.block_on(async {
        let endpoint = settings.postgres.housekeeping_url.endpoint();
        let (mut client, _driver) =
            endpoint.connect().await.map_err(|error| Failure::failed(error.to_string()))?;
        let out = &mut std::io::stdout();
        let failed = |error: schema::SchemaError| Failure::failed(error.to_string());
        let printed = match &args.command {
            None => schema::print_migrate(&schema::migrate(&mut client).await.map_err(failed)?, out),
            Some(MigrateCommand::Status) => {
                schema::print_status(&schema::status(&client).await.map_err(failed)?, out)
            }
            Some(MigrateCommand::Undo { count, force }) => {
                schema::print_undo(&schema::undo(&mut client, *count, *force).await.map_err(failed)?, out)
            }
        };
        printed.map_err(|error| Failure::failed(format!("writing to stdout: {error}")))
    })
}
