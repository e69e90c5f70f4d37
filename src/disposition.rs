//! What becomes of a record, and what becomes of a failure: each an enum, sorted once, at the edge.

use crate::wire::Reason;

/// The one outcome of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Its id was claimed by this very transaction: rows are written, events are due.
    Written,
    /// It was written in an earlier try, maybe of another process: no rows, its events may be missing.
    WrittenBefore,
    /// Another record owns the id with the same payload: nothing to do.
    Duplicate,
    /// It goes to the dead letters.
    DeadLetter(Reason),
}

/// Why a step failed, by what is to be done about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureClass {
    /// Goes away by itself: keep the batch, back off, try again.
    Passing,
    /// Somebody has to mend something, records are not at fault: as passing, but loud.
    Systemic,
    /// Another owner was there: drop the lane's state and read everything again.
    Fenced,
}

impl FailureClass {
    /// The label used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passing => "passing",
            Self::Systemic => "systemic",
            Self::Fenced => "fenced",
        }
    }
}

/// The SQLSTATE that `move_cursors` raises when a cursor is not where the lane last saw it.
pub const SQLSTATE_CURSOR_MOVED: &str = "PW001";

/// Sorts a SQLSTATE (PostgreSQL manual, appendix A). What no line names is systemic: never is a good
/// record diverted because of a code that nobody thought of.
pub fn class_of_sqlstate(code: &str) -> FailureClass {
    match code {
        SQLSTATE_CURSOR_MOVED => FailureClass::Fenced,
        // serialization_failure, deadlock_detected, lock_not_available, read_only_sql_transaction
        // (a server that is a standby for the moment), query_canceled (our own time limits)
        "40001" | "40P01" | "55P03" | "25006" | "57014" => FailureClass::Passing,
        // idle_in_transaction_session_timeout, transaction_timeout
        "25P03" | "25P04" => FailureClass::Passing,
        _ => match code.get(..2) {
            // connection exceptions; insufficient resources; operator intervention
            Some("08" | "53" | "57") => FailureClass::Passing,
            _ => FailureClass::Systemic,
        },
    }
}

/// The classes of SQLSTATE that metrics tell apart.
pub const SQLSTATE_CLASSES: [&str; 14] =
    ["08", "0A", "22", "23", "25", "28", "3D", "40", "42", "53", "54", "55", "57", "58"];

/// How a class of SQLSTATE is called in metrics: its first two characters, from a bounded set.
pub fn sqlstate_label(code: &str) -> &'static str {
    let class = code.get(..2).unwrap_or_default();
    SQLSTATE_CLASSES.into_iter().find(|k| *k == class).unwrap_or(if code == SQLSTATE_CURSOR_MOVED {
        "cursor"
    } else {
        "other"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_that_no_line_names_never_passes_by_itself() {
        for code in ["42P01", "42501", "28P01", "XX000", "22001", "23514", "3D000", "", "zz"] {
            assert_eq!(class_of_sqlstate(code), FailureClass::Systemic, "{code}");
        }
    }

    #[test]
    fn what_goes_away_by_itself_is_waited_for() {
        for code in ["08006", "40001", "40P01", "53100", "53300", "57P01", "57P03", "25006", "55P03"] {
            assert_eq!(class_of_sqlstate(code), FailureClass::Passing, "{code}");
        }
        assert_eq!(class_of_sqlstate(SQLSTATE_CURSOR_MOVED), FailureClass::Fenced);
    }
}
