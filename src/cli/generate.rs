//! `generate`: man pages and shell completions, made from the command line's definition.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::{Generator, Shell};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::error::{CommandError, OrFailed};

const NAME: &str = "payment-writer";

/// `generate`
#[derive(Clone, Debug, Args)]
pub struct GenerateArgs {
    /// Directory for the files; it is created if it does not exist
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// Writes the page of a command and of each command below it.
fn write_pages(command: &Command, directory: &Path) -> io::Result<()> {
    command.get_subcommands().try_for_each(|subcommand| write_pages(subcommand, directory))?;
    // The library fills the lines of the text after the help; examples and tables need them as they are.
    let page = Man::new(command.clone().after_help(None))
        .source(format!("{NAME} {}", env!("CARGO_PKG_VERSION")))
        .manual(NAME);
    let mut file = File::create(directory.join(page.get_filename()))?;
    page.render(&mut file)?;
    if let Some(text) = command.get_after_help() {
        let text = text.to_string();
        let mut notes = Roff::new();
        notes.control("SH", ["NOTES"]).control("nf", []);
        text.lines().for_each(|line| {
            notes.text([roman(line)]);
        });
        notes.control("fi", []).to_writer(&mut file)?;
    }
    Ok(())
}

/// Writes `payment-writer.1`, a page for each subcommand, and completions for bash, zsh and fish.
pub fn generate(args: &GenerateArgs, mut command: Command) -> Result<(), CommandError> {
    let write = || {
        fs::create_dir_all(&args.directory)?;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command.clone(), NAME, &mut script);
            // The hyphen of the program's name is escaped in two ways in bash: clap-rs/clap#6421.
            let script =
                String::from_utf8_lossy(&script).replace("payment__subcmd__writer", "payment__writer");
            fs::write(args.directory.join(shell.file_name(NAME)), script)?;
        }
        command = command.disable_help_subcommand(true);
        command.build();
        write_pages(&command, &args.directory)
    };
    write().or_failed_to(format_args!("cannot write to {}", args.directory.display()))
}
