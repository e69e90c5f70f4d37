//! docs/reference/commands.md contains the `--help` text of each command.

use std::fmt::Write;

use clap::{Command, CommandFactory};
use payment_writer::cli::Cli;

use super::generated;

/// What `--help` prints for this command.
fn help(words: &[String]) -> String {
    let line = words.iter().cloned().chain(["--help".to_owned()]);
    let error = Cli::command().try_get_matches_from(line).unwrap_err();
    assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp, "{words:?}");
    error.to_string().lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn add(command: &Command, above: &[String], summary: &mut String, sections: &mut String) {
    let words: Vec<String> = above.iter().cloned().chain([command.get_name().to_owned()]).collect();
    let subcommands = || command.get_subcommands().filter(|c| c.get_name() != "help");
    // A command that only groups others has no description of its own.
    if !command.is_subcommand_required_set() || above.is_empty() {
        let name = if above.is_empty() { words.join(" ") } else { words[1..].join(" ") };
        let about = command.get_about().unwrap().to_string().replace('|', "\\|");
        let anchor = name.replace(' ', "-");
        if !above.is_empty() {
            writeln!(summary, "| [`{name}`](#{anchor}) | {about} |").unwrap();
        }
        writeln!(sections, "## {name}\n\n```text\n{}```\n", help(&words)).unwrap();
    }
    subcommands().for_each(|subcommand| add(subcommand, &words, summary, sections));
}

#[test]
fn the_commands_page_matches_the_help_texts() {
    let (mut summary, mut sections) = (String::from("| command | does |\n| - | - |\n"), String::new());
    add(&Cli::command(), &[], &mut summary, &mut sections);
    generated::check("docs/reference/commands.md", &format!("{summary}\n{sections}"));
}
