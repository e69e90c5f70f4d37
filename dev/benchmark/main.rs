//! CPU time, throughput and latency of the daemon, measured with servers started for the measurement. `make
//! bench` and `make bench-latency` start them; docs/reference/benchmarks.md defines each figure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr)]
#![allow(clippy::indexing_slicing)]
// The measurement uses its own clients.
#![allow(clippy::disallowed_methods)]

mod ceilings;
mod console;
mod daemon;
mod latency;
mod processes;
mod reader;
mod report;
mod site;
mod size;
mod soak;
mod stats;
mod throughput;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// An error that ends the measurement, as a message for the user.
pub type Outcome<T> = Result<T, String>;

/// Throughput, CPU time and latency of payment-writer
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drain preloaded payments: rate, CPU time, memory, transactions; compared with the servers' maximum
    Throughput(throughput::Arguments),
    /// Measure from a record's timestamp to its read event in a read_committed consumer, at steady rates
    Latency(latency::Arguments),
    /// Measure how many bytes payments take in each table and topic
    Size(size::Arguments),
    /// Measure what open pages of the console cost an idle daemon
    Console(console::Arguments),
    /// Run for hours under load and housekeeping, and compare the use of resources early and late
    Soak(soak::Arguments),
}

/// Location of the servers. Their addresses come from the environment variables that `dev/servers env`
/// prints.
#[derive(Args)]
pub struct ServersArguments {
    /// The folder passed to `dev/servers up --dir`
    #[arg(long)]
    pub servers: PathBuf,
    /// Write one JSON line for each run to this file immediately; without it they are printed at the end
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Another build of the daemon, for comparison.
#[derive(Args)]
pub struct BaselineArguments {
    /// Also measure this other build of payment-writer, alternating with the one beside this program
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = processes::end_children_on_signals().and_then(|()| match &arguments.command {
        Command::Throughput(arguments) => throughput::run(arguments),
        Command::Latency(arguments) => latency::run(arguments),
        Command::Size(arguments) => size::run(arguments),
        Command::Console(arguments) => console::run(arguments),
        Command::Soak(arguments) => soak::run(arguments),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}
