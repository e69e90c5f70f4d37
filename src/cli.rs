//! The command line: what can be typed, and what each exit code means.

mod check_config;
mod cursors;
mod dlq;
mod migrate;
mod output;
mod produce;
mod prune;
mod rebuild;
mod reconcile;
mod run;
mod show_config;
mod status;
mod stop;
mod top;
mod topics;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;

use clap::{Parser, Subcommand};

pub use cursors::{AcceptArgs, CursorsCommand, SettleArgs, SkipArgs};
pub use dlq::{ChoiceArgs, DlqCommand, ListArgs, ReplayArgs, ShowArgs};
pub use migrate::{MigrateArgs, MigrateCommand};
pub use produce::ProduceArgs;
pub use prune::PruneArgs;
pub use rebuild::RebuildArgs;
pub use reconcile::ReconcileArgs;
pub use run::RunArgs;
pub use show_config::ShowConfigArgs;
pub use status::StatusArgs;
pub use top::TopArgs;
pub use topics::CreateTopicsArgs;

use crate::config::{ConfigError, Settings};
use crate::logging;

const EXAMPLES: &str = "\
Examples:
  payment-writer check-config                     is everything that is set allowed?
  payment-writer topics create                    make the four topics where absent
  payment-writer migrate                          make or update the tables
  payment-writer prune --dry-run                  which old message ids would go, and why others stay
  payment-writer run                              write payments until told to stop
  payment-writer top                              watch it at work
  payment-writer dlq list --since 1d              which dead letters came in the last day, and why
  payment-writer reconcile                        is all that was received in the tables and the outputs, once?
  payment-writer produce --count 200000           send payments to try it out

Settings come from the file, and above it from environment variables such as
PAYMENT_WRITER__KAFKA__GROUP_ID=payments; `payment-writer config show` lists them all.

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 stopped because a person must decide.";

/// Writes payments from Kafka to Postgres, each exactly once, and publishes their events to Kafka.
#[derive(Debug, Parser)]
#[command(name = "payment-writer", version = version(), after_help = EXAMPLES)]
pub struct Cli {
    /// Settings file; otherwise PAYMENT_WRITER_CONFIG, then config/payment-writer.toml if it is there
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The daemon: write payments and publish their events until SIGTERM or SIGINT
    Run(RunArgs),
    /// Bring the database schema up to date; safe to start from many places at once
    Migrate(MigrateArgs),
    /// Make the Kafka topics
    #[command(subcommand)]
    Topics(TopicsCommand),
    /// Look at how far each partition is, and settle a halted one
    #[command(subcommand)]
    Cursors(CursorsCommand),
    /// Look at dead letters, and send chosen ones to the input topic again, each once
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// One pass of housekeeping: rotate and prune the idempotency table, make months
    Prune(PruneArgs),
    /// Compare the log with rows and events: is every record's one outcome there, exactly once?
    Reconcile(ReconcileArgs),
    /// Write the rows of the whole log into a second database, and compare it with the first
    Rebuild(RebuildArgs),
    /// What is known of a message id: whether it was written, by which record, and published
    Status(StatusArgs),
    /// Watch daemons on a terminal: throughput, lag by partition, time by phase, what is missing
    Top(TopArgs),
    /// Check the settings without connecting to anything
    CheckConfig,
    /// Look at the settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Load generator: send payments to the input topic, with duplicates, conflicts and bad records
    Produce(ProduceArgs),
}

/// `topics`
#[derive(Debug, Subcommand)]
pub enum TopicsCommand {
    /// Create the four topics where absent; safe to repeat, and from many places at once
    Create(CreateTopicsArgs),
}

/// `config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show every setting with its effective value and where that came from; secrets are hidden
    Show(ShowConfigArgs),
}

/// How a command ended when it was not simply done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It did not work; trying again may.
    Failed = 1,
    /// The command line or the settings are wrong.
    Usage = 2,
    /// Going on by itself would risk a payment: a person must look.
    PersonMustDecide = 3,
}

/// Why a command did not do what it was asked, in words for the person who asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Which exit code the process ends with.
    pub exit: Exit,
    /// What went wrong, and what to do about it.
    pub message: String,
}

impl Failure {
    /// Exit code 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, message: message.into() }
    }

    /// Exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: message.into() }
    }

    /// Exit code 3.
    pub fn person_must_decide(message: impl Into<String>) -> Self {
        Self { exit: Exit::PersonMustDecide, message: message.into() }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error.to_string())
    }
}

/// Does what the command line says, and tells on stderr what went wrong.
pub fn execute(cli: Cli) -> ExitCode {
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Nobody is left to tell if stderr is gone too.
            let _ = output::to_stderr(&format!("error: {failure}"));
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn dispatch(cli: Cli) -> Result<(), Failure> {
    let loaded = Settings::load(cli.config.as_deref())?;
    let settings = match cli.command {
        Command::CheckConfig => return check_config::check_config(&loaded),
        Command::Config(ConfigCommand::Show(args)) => return show_config::show_config(&loaded, &args),
        _ => loaded.settings,
    };
    let log = logging::init(&settings.log).map_err(|error| Failure::failed(error.to_string()))?;
    match cli.command {
        Command::Run(args) => run::run(settings, &args, log),
        Command::Migrate(args) => migrate::migrate(&settings, &args),
        Command::Topics(TopicsCommand::Create(args)) => topics::create(&settings, &args),
        Command::Cursors(command) => cursors::cursors(&settings, &command),
        Command::Dlq(command) => dlq::dlq(&settings, &command),
        Command::Prune(args) => prune::prune(&settings, &args),
        Command::Reconcile(args) => reconcile::reconcile(&settings, &args),
        Command::Rebuild(args) => rebuild::rebuild(&settings, &args),
        Command::Status(args) => status::status(&settings, &args),
        Command::Produce(args) => produce::produce(&settings, &args),
        Command::Top(args) => top::top(&settings, &args),
        // Done above, before logging began.
        Command::CheckConfig | Command::Config(_) => Ok(()),
    }
}

/// A runtime for the commands that do one thing and end; the daemon makes its own.
fn small_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start the runtime: {error}")))
}

/// The version, with the commit if the build was told it.
pub fn version() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(|| {
        let version = env!("CARGO_PKG_VERSION");
        commit().map_or_else(|| version.to_owned(), |commit| format!("{version} ({commit})"))
    })
}

/// The commit that this was built from: `PAYMENT_WRITER_COMMIT` of the build's environment.
pub fn commit() -> Option<&'static str> {
    option_env!("PAYMENT_WRITER_COMMIT").filter(|commit| !commit.is_empty())
}

/// A share, 0 to 1.
fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a share from 0 to 1, such as 0.05".to_owned()),
    }
}

/// A runtime for the commands that do their own work in a thread that may block, and for the daemon.
fn large_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8))
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start the runtime: {error}")))
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    crate::config::duration::parse(text).ok_or_else(|| "a duration such as 500ms, 30s or 2m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_a_help_text() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    /// The words of a command line, quotes taken away, as far as the documentation uses them.
    fn words(line: &str) -> Vec<String> {
        let parts = line.split('"').enumerate();
        parts
            .flat_map(|(index, part)| match index % 2 {
                0 => part.split_whitespace().map(str::to_owned).collect(),
                _ => vec![part.to_owned()],
            })
            .collect()
    }

    #[test]
    fn every_command_in_the_documentation_exists() {
        let mut count = 0;
        for page in [
            include_str!("../README.md"),
            include_str!("../docs/tutorial.md"),
            include_str!("../docs/how-to/deploy.md"),
            include_str!("../docs/how-to/halted-partitions.md"),
            include_str!("../docs/how-to/housekeeping.md"),
            include_str!("../docs/how-to/observe.md"),
            include_str!("../docs/how-to/recover.md"),
            include_str!("../docs/how-to/replay.md"),
            include_str!("../docs/how-to/scale.md"),
            include_str!("../docs/how-to/upgrade.md"),
            include_str!("../docs/runbooks/payment-writer.md"),
        ] {
            // Every other part is a block of code.
            for block in page.split("```").skip(1).step_by(2) {
                for line in block.lines().map(str::trim).filter(|l| l.starts_with("payment-writer ")) {
                    let line = line.split(" #").next().unwrap_or_default();
                    if let Err(error) = Cli::try_parse_from(words(line)) {
                        panic!("{line}: {error}");
                    }
                    count += 1;
                }
            }
        }
        assert!(count > 20, "{count}");
    }

    #[test]
    fn the_settings_file_can_be_named_before_and_after_the_command() {
        for line in [["--config", "x.toml", "check-config"], ["check-config", "--config", "x.toml"]] {
            let cli = Cli::try_parse_from(["payment-writer"].into_iter().chain(line)).unwrap();
            assert_eq!(cli.config, Some(PathBuf::from("x.toml")));
        }
    }
}
