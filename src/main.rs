//! The program: parse the command line, do it, exit.

mod allocator;

use std::process::ExitCode;

use clap::Parser;
use payment_writer::cli;

fn main() -> ExitCode {
    cli::execute(cli::Cli::parse())
}
