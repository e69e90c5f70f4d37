//! The command line: commands, options and exit codes.

mod check_messages;
mod config;
mod cursors;
mod dlq;
mod doctor;
mod generate;
mod healthcheck;
mod migrate;
mod output;
mod produce;
mod prune;
mod rebuild;
mod reconcile;
mod run;
mod service_manager;
mod status;
mod top;
mod topics;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use clap::{CommandFactory, Parser, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

pub use check_messages::CheckMessagesArgs;
pub use config::{ConfigCommand, ShowConfigArgs};
pub use cursors::{AcceptArgs, ApplyArgs, CursorsCommand, ResolveArgs, SkipArgs};
pub use dlq::{DlqCommand, FilterArgs, ListArgs, ReplayArgs, ShowArgs};
pub use doctor::DoctorArgs;
pub use generate::GenerateArgs;
pub use healthcheck::HealthcheckArgs;
pub use migrate::{MigrateArgs, MigrateCommand};
pub use produce::ProduceArgs;
pub use prune::PruneArgs;
pub use rebuild::RebuildArgs;
pub use reconcile::ReconcileArgs;
pub use run::RunArgs;
pub use status::StatusArgs;
pub use top::TopArgs;
pub use topics::CreateTopicsArgs;

use crate::config::Settings;
use crate::dlq::letter;
use crate::domain::wire::Reason;
use crate::error::{CommandError, ErrorKind, OrFailed};
use crate::telemetry::logging;

const EXAMPLES: &str = "\
Examples:
  payment-writer check-config                     are all settings valid?
  payment-writer topics create                    create the four topics where absent
  payment-writer migrate                          create or update the tables
  payment-writer prune --dry-run                  which old message ids would be dropped, and why others stay
  payment-writer doctor                           is all there that the daemon depends on?
  payment-writer run                              write payments until stopped
  payment-writer top                              watch the daemon
  payment-writer dlq list --since 1d              which dead letters were written in the last day, and why
  payment-writer reconcile                        is every record in the tables and the outputs exactly once?
  payment-writer produce --count 200000           send test payments
  payment-writer check-messages --file new.jsonl  which of these messages would be dead-lettered, and why

Settings come from the file; environment variables such as PAYMENT_WRITER__KAFKA__GROUP_ID=payments
override them. `payment-writer config show` lists all settings.

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 stopped because a person must decide.";

/// Writes payments from Kafka to Postgres exactly once, and publishes their events to Kafka.
#[derive(Debug, Parser)]
#[command(name = "payment-writer", version = version(), after_help = EXAMPLES)]
pub struct Cli {
    /// Settings file; otherwise PAYMENT_WRITER_CONFIG, otherwise config/payment-writer.toml or
    /// /etc/payment-writer/payment-writer.toml, the first that exists
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon: write payments and publish their events until SIGTERM or SIGINT
    Run(RunArgs),
    /// Migrate the database schema to the newest version; can run concurrently
    Migrate(MigrateArgs),
    /// Create the Kafka topics
    #[command(subcommand)]
    Topics(TopicsCommand),
    /// Show the cursors of each partition, and resolve a halted partition
    #[command(subcommand)]
    Cursors(CursorsCommand),
    /// Show dead letters, and replay selected ones to the input topic, each once
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// Run one housekeeping pass: rotate and prune the idempotency table, create months
    Prune(PruneArgs),
    /// Compare the log with rows and events: does every record have exactly one outcome?
    Reconcile(ReconcileArgs),
    /// Write the rows of the whole log to a second database, and compare it with the first
    Rebuild(RebuildArgs),
    /// Show what is known of a message id: whether it was written and published, and by which record
    Status(StatusArgs),
    /// Watch daemons in a terminal: throughput, lag by partition, time by phase, what is missing
    Top(TopArgs),
    /// Ask the daemon on this machine whether it answers or is ready, for container engines
    Healthcheck(HealthcheckArgs),
    /// Check the settings without connecting to anything
    CheckConfig,
    /// Check what the daemon depends on: rights, topics, schema, servers; writes nothing
    Doctor(DoctorArgs),
    /// Check messages of a file or topic against the contract: what would be dead-lettered, and why
    CheckMessages(CheckMessagesArgs),
    /// Show the settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Load generator: send payments to the input topic, with duplicates, conflicts and bad records
    Produce(ProduceArgs),
    /// Write man pages, and completions of bash, zsh and fish, to a directory
    Generate(GenerateArgs),
}

/// `topics`
#[derive(Debug, Subcommand)]
pub enum TopicsCommand {
    /// Create the four topics where absent; can be repeated and can run concurrently
    Create(CreateTopicsArgs),
}

/// Exit code of a failed command.
fn exit_code(kind: ErrorKind) -> ExitCode {
    ExitCode::from(match kind {
        ErrorKind::Failed => 1,
        ErrorKind::Usage => 2,
        ErrorKind::PersonMustDecide => 3,
    })
}

/// Runs the command and reports failures on stderr.
pub fn execute(cli: Cli) -> ExitCode {
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::warn(format_args!("error: {failure}"));
            exit_code(failure.kind)
        }
    }
}

fn dispatch(cli: Cli) -> Result<(), CommandError> {
    // Needs no settings.
    if let Command::Generate(args) = &cli.command {
        return generate::generate(args, Cli::command());
    }
    if matches!(cli.command, Command::Run(_)) {
        // Until the daemon handles it, it must not end the process: a reload may come soon after a start.
        flag::register(SIGHUP, Arc::default()).or_failed_to("cannot ignore SIGHUP")?;
    }
    let loaded = Settings::load(cli.config.as_deref())?;
    match cli.command {
        Command::CheckConfig => return config::check(&loaded),
        Command::Config(ConfigCommand::Show(args)) => return config::show(&loaded, &args),
        Command::Healthcheck(args) => return healthcheck::healthcheck(&loaded.settings, &args),
        _ => {}
    }
    let settings = loaded.settings.clone();
    let log = logging::init(&settings.log).or_failed()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8))
        .enable_all()
        .build()
        .or_failed_to("cannot start the runtime")?;
    let handle = runtime.handle();
    let outcome = match cli.command {
        Command::Run(args) => {
            let load = move || Settings::load(cli.config.as_deref());
            handle.block_on(run::run(loaded, load, &args, log))
        }
        Command::Migrate(args) => handle.block_on(migrate::migrate(&settings, &args)),
        Command::Topics(TopicsCommand::Create(args)) => handle.block_on(topics::create(&settings, &args)),
        Command::Cursors(command) => handle.block_on(cursors::cursors(&settings, &command)),
        Command::Doctor(args) => handle.block_on(doctor::doctor(&settings, &args)),
        Command::Dlq(command) => dlq::dlq(&settings, &command, handle),
        Command::Prune(args) => handle.block_on(prune::prune(&settings, &args)),
        Command::Reconcile(args) => reconcile::reconcile(&settings, &args, handle),
        Command::Rebuild(args) => rebuild::rebuild(&settings, &args, handle),
        Command::Status(args) => handle.block_on(status::status(&settings, &args)),
        Command::CheckMessages(args) => check_messages::check_messages(&settings, &args),
        Command::Produce(args) => produce::produce(&settings, &args),
        Command::Top(args) => top::top(&settings, &args),
        // Handled above, before logging starts.
        Command::CheckConfig | Command::Config(_) | Command::Generate(_) | Command::Healthcheck(_) => Ok(()),
    };
    // Not waited for: a request to an unavailable broker may still block one of its threads.
    runtime.shutdown_background();
    outcome
}

/// Version, with the commit if it is known.
pub fn version() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(|| {
        let version = env!("CARGO_PKG_VERSION");
        commit().map_or_else(|| version.to_owned(), |commit| format!("{version} ({commit})"))
    })
}

/// Commit of this build: `PAYMENT_WRITER_COMMIT` in the build environment.
pub fn commit() -> Option<&'static str> {
    option_env!("PAYMENT_WRITER_COMMIT").filter(|commit| !commit.is_empty())
}

/// Parses a share, 0 to 1.
fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a share from 0 to 1, such as 0.05".to_owned()),
    }
}

/// Parses the name of a dead-letter reason.
fn reason(text: &str) -> Result<Reason, String> {
    letter::reason(text).ok_or_else(|| {
        let known: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        format!("one of {}", known.join(", "))
    })
}

/// Set by the first SIGINT or SIGTERM; the second one ends the process.
fn stop_signal() -> Result<Arc<AtomicBool>, CommandError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag still unset.
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))
            .and_then(|_| flag::register(signal, Arc::clone(&stop)))
            .or_failed_to("cannot listen for signals")?;
    }
    Ok(stop)
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    humantime::parse_duration(text.trim()).map_err(|_| "a duration such as 500ms, 30s or 2m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// Splits a command line into words and removes quotes, as far as the documentation needs it.
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
            include_str!("../docs/how-to/check-messages.md"),
            include_str!("../docs/how-to/deploy.md"),
            include_str!("../docs/how-to/halted-partitions.md"),
            include_str!("../docs/how-to/housekeeping.md"),
            include_str!("../docs/how-to/install-deb.md"),
            include_str!("../docs/how-to/observe.md"),
            include_str!("../docs/how-to/recover.md"),
            include_str!("../docs/how-to/replay.md"),
            include_str!("../docs/how-to/scale.md"),
            include_str!("../docs/how-to/upgrade.md"),
            include_str!("../docs/runbooks/payment-writer.md"),
        ] {
            // Every other part is a code block.
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
