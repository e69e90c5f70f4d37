//! `migrate`: migrates the database schema.

use clap::{Args, Subcommand};

use crate::config::Settings;
use crate::error::{CommandError, OrFailed};
use crate::postgres::connection::{backend_pid, describe};
use crate::postgres::schema;
use crate::postgres::waits::Waits;

const AFTER_HELP: &str = "\
Uses postgres.housekeeping_url. An advisory lock serializes concurrent runs; the later ones find
nothing to do.

Examples:
  payment-writer migrate                          migrate to the newest version
  payment-writer migrate status                   which steps ran, and when
  payment-writer migrate undo --count 1           undo the newest step";

/// `migrate`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct MigrateArgs {
    /// Without a subcommand: migrate to the newest version.
    #[command(subcommand)]
    pub command: Option<MigrateCommand>,
}

/// Subcommands other than migrating forward.
#[derive(Clone, Debug, Subcommand)]
pub enum MigrateCommand {
    /// Show which steps ran, and when
    Status,
    /// Undo the newest steps; their data is lost
    Undo {
        /// Number of steps
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: u32,
        /// Also if there are payments, which are deleted with their tables
        #[arg(long)]
        force: bool,
    },
}

/// Migrates the schema or shows its state.
pub async fn migrate(settings: &Settings, args: &MigrateArgs) -> Result<(), CommandError> {
    let endpoint = &settings.postgres.housekeeping_url;
    let (mut client, _) = endpoint.connect().await.or_failed()?;
    let pid = backend_pid(&client).await.map_err(|error| describe(&error)).or_failed()?;
    let waits = Waits::on_stderr(endpoint).or_failed()?;
    let out = &mut std::io::stdout();
    let printed = match &args.command {
        None => {
            let migrated = waits.explain(pid, "migrating", schema::migrate(&mut client)).await.0;
            schema::print_migrate(&migrated.or_failed()?, out)
        }
        Some(MigrateCommand::Status) => {
            schema::print_status(&schema::status(&client).await.or_failed()?, out)
        }
        Some(MigrateCommand::Undo { count, force }) => {
            let undone = schema::undo(&mut client, *count, *force);
            schema::print_undo(&waits.explain(pid, "undoing", undone).await.0.or_failed()?, out)
        }
    };
    printed.or_failed_to("writing to stdout")
}
