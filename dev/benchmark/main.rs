//! What the daemon costs and how late its events are, measured beside servers of the measurement's own.
//! `make bench` and `make bench-latency` start them; docs/reference/benchmarks.md says how each figure is taken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr)]
#![allow(clippy::indexing_slicing)]
// Clients of the measurement's own.
#![allow(clippy::disallowed_methods)]

mod ceilings;
mod daemon;
mod latency;
mod processes;
mod reader;
mod report;
mod site;
mod size;
mod stats;
mod throughput;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// What stopped the measurement, in words for the person who started it.
pub type Outcome<T> = Result<T, String>;

/// Throughput, CPU time and latency of payment-writer
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drains preloaded payments: rate, CPU time, memory, transactions; beside what the servers alone can do
    Throughput(throughput::Arguments),
    /// From a record's timestamp to its read event in a read_committed consumer, at steady rates
    Latency(latency::Arguments),
    /// How many bytes payments take in each table and topic
    Size(size::Arguments),
}

/// Where the servers are. Their addresses come from the environment, as `dev/servers env` prints them.
#[derive(Args)]
pub struct ServersArguments {
    /// Folder that `dev/servers up --dir` was given
    #[arg(long)]
    pub servers: PathBuf,
    /// Write one JSON line a run to this file, at once; otherwise they are printed at the end
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Another build of the daemon beside this one.
#[derive(Args)]
pub struct BaselineArguments {
    /// Another build of payment-writer that is measured too, in turn with the one beside this program
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = processes::end_children_on_signals().and_then(|()| match &arguments.command {
        Command::Throughput(arguments) => throughput::run(arguments),
        Command::Latency(arguments) => latency::run(arguments),
        Command::Size(arguments) => size::run(arguments),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}
