//! The payment-writer program: parses the command line, runs the command, exits.

mod allocator;

use std::process::ExitCode;

use clap::Parser;
use payment_writer::cli;

fn main() -> ExitCode {
    cli::execute(cli::Cli::parse())
}
