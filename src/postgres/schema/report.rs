//! Output of the `migrate` commands.

use std::io::{self, Write};

use super::{MigrateReport, NEWEST_KNOWN, Status, StepState, UndoReport};

/// Prints the result of `migrate`.
pub fn print_migrate(report: &MigrateReport, out: &mut dyn Write) -> io::Result<()> {
    for step in &report.applied {
        writeln!(out, "applied {step}")?;
    }
    if report.version > NEWEST_KNOWN {
        writeln!(
            out,
            "schema is at version {}, newer than the {NEWEST_KNOWN} known here, and usable: nothing to do",
            report.version
        )
    } else if report.applied.is_empty() {
        writeln!(out, "schema is at version {}: nothing to do", report.version)
    } else {
        writeln!(out, "schema is at version {}", report.version)
    }
}

/// Prints `migrate status`: one line per step.
pub fn print_status(status: &Status, out: &mut dyn Write) -> io::Result<()> {
    let width = status.steps.iter().map(|s| s.name.len()).max().unwrap_or(0);
    for step in &status.steps {
        let state = match &step.state {
            StepState::Applied(when) => format!("applied {}", to_the_second(when)),
            StepState::Divergent(when) => {
                format!("applied {}, DIFFERENT from this program's", to_the_second(when))
            }
            StepState::Unknown(when) => {
                format!("applied {}, newer than this program", to_the_second(when))
            }
            StepState::Pending => "pending".to_owned(),
        };
        writeln!(out, "{:>4}  {:width$}  {state}", step.version, step.name)?;
    }
    match status.version() {
        Some(version) => writeln!(out, "schema is at version {version}, this program knows {NEWEST_KNOWN}"),
        None => writeln!(out, "there is no schema yet; `payment-writer migrate` creates it"),
    }
}

/// Prints the result of `migrate undo`.
pub fn print_undo(report: &UndoReport, out: &mut dyn Write) -> io::Result<()> {
    for step in &report.undone {
        writeln!(out, "undone {step}")?;
    }
    match report.version {
        _ if report.undone.is_empty() => writeln!(out, "nothing to undo"),
        Some(version) => writeln!(out, "schema is at version {version}"),
        None => writeln!(out, "the schema is removed"),
    }
}

/// Rounds a time of the history, which has nanoseconds, to seconds.
fn to_the_second(rfc3339: &str) -> String {
    match rfc3339.parse::<jiff::Timestamp>() {
        Ok(t) => t.round(jiff::Unit::Second).unwrap_or(t).to_string(),
        Err(_) => rfc3339.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SchemaVersion, StepStatus};
    use super::*;

    fn text(print: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn status_shows_what_ran_when_and_what_did_not_run() {
        let step = |version, name: &str, state| StepStatus {
            version: SchemaVersion(version),
            name: name.into(),
            state,
        };
        let status = Status {
            steps: vec![
                step(1, "tables", StepState::Applied("2026-03-01T12:00:00.123456789Z".into())),
                step(2, "more", StepState::Divergent("2026-03-02T12:00:00Z".into())),
                step(3, "cursors", StepState::Pending),
            ],
        };
        assert_eq!(
            text(|out| print_status(&status, out)),
            format!(
                "   1  tables   applied 2026-03-01T12:00:00Z\n   \
                    2  more     applied 2026-03-02T12:00:00Z, DIFFERENT from this program's\n   \
                    3  cursors  pending\n\
                 schema is at version 2, this program knows {NEWEST_KNOWN}\n"
            )
        );
    }

    #[test]
    fn migrate_says_when_there_was_nothing_to_do() {
        let report = MigrateReport { applied: vec![], version: NEWEST_KNOWN };
        assert!(text(|out| print_migrate(&report, out)).contains("nothing to do"));
    }
}
