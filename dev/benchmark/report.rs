//! Tables and JSON lines.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::Value;

use crate::Outcome;
use crate::site::failed;

/// JSON lines: written to a file immediately, or collected for the end.
pub struct Lines {
    file: Option<File>,
    kept: Vec<Value>,
}

impl Lines {
    pub fn new(path: Option<&Path>) -> Outcome<Self> {
        let file = path.map(File::create).transpose().map_err(failed("cannot write the JSON lines"))?;
        Ok(Self { file, kept: Vec::new() })
    }

    pub fn add(&mut self, line: Value) -> Outcome<()> {
        match &mut self.file {
            Some(file) => writeln!(file, "{line}").map_err(failed("writing the JSON lines")),
            None => {
                self.kept.push(line);
                Ok(())
            }
        }
    }

    /// Prints the lines if they were not written to a file.
    pub fn finish(self) {
        for line in self.kept {
            println!("{line}");
        }
    }
}

/// Rows below a heading, the first column left-aligned, the others right-aligned.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(index, (cell, width))| match index {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Prints a heading and its table.
pub fn print(heading: &str, rows: &[Vec<String>]) {
    println!("\n{heading}\n\n{}", table(rows));
}

/// A row of texts.
#[macro_export]
macro_rules! row {
    ($($cell:expr),* $(,)?) => { vec![$($cell.to_string()),*] };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [row!["case", "µs"], row!["v7", 12], row!["longer", "3"]];
        assert_eq!(table(&rows), "case    µs\nv7      12\nlonger   3\n");
    }
}
