//! Printing that survives a reader who has seen enough (`payment-writer config show | head`).

use std::io::{self, ErrorKind, Write};

use super::Failure;

/// A line to stdout: the result that was asked for.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// A line to stderr: what goes on meanwhile.
pub(super) fn to_stderr(text: &str) -> io::Result<()> {
    writeln!(io::stderr().lock(), "{text}")
}

/// Rows with their columns aligned; the last column is not padded.
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
