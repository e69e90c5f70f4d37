//! What commands print. A closed pipe is tolerated (`payment-writer config show | head`).

use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use crate::error::{CommandError, OrFailed};

/// Prints a line of the result to stdout.
pub(super) fn print(text: impl Display) -> Result<(), CommandError> {
    print_bytes(format!("{text}\n").as_bytes())
}

/// Prints bytes to stdout as they are.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), CommandError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.or_failed_to("cannot write to stdout"),
    }
}

/// Prints a progress or warning line to stderr. That stderr is gone cannot be reported anywhere.
pub(super) fn warn(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Asks on a terminal whether to go on.
///
/// # Errors
/// Without a terminal; or when the answer is no, with the text `otherwise`.
pub(super) fn confirm(what: &str, question: &str, otherwise: &str) -> Result<(), CommandError> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(CommandError::usage(format!("{what}. {question} Without a terminal, add --yes")));
    }
    warn(format_args!("{what}. {question} [y/N]"));
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).or_failed()?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(CommandError::failed(otherwise)),
    }
}

/// Formats rows under a header as aligned columns.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    aligned([header.map(str::to_owned)].into_iter().chain(rows))
}

/// Formats rows as aligned columns; the last column is not padded.
pub(super) fn aligned<const N: usize>(rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = rows.into_iter().collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; N]| {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A value in a table.
pub(super) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Progress bar on a terminal, nothing elsewhere.
pub(super) fn progress_bar(length: Option<u64>, template: &str) -> ProgressBar {
    let target = match io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(length, target);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
