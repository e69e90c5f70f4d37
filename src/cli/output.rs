//! Printing that tolerates a closed pipe (`payment-writer config show | head`).

use std::io::{self, ErrorKind, Write};

use crate::error::CommandError;

/// Prints a line of the result to stdout.
pub(super) fn print(text: &str) -> Result<(), CommandError> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(CommandError::failed(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// Prints a progress or warning line to stderr.
pub(super) fn to_stderr(text: &str) -> io::Result<()> {
    writeln!(io::stderr().lock(), "{text}")
}

/// Formats rows as aligned columns; the last column is not padded.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
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
