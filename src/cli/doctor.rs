//! `doctor`: checks everything that the daemon depends on.

use clap::Args;

use super::output::{print, table};
use crate::config::Settings;
use crate::doctor::{self, Finding, Severity};
use crate::error::{CommandError, OrFailed};

const AFTER_HELP: &str = "\
Connects to everything with the settings at hand and checks what docs/reference/dependencies.md lists: rights on
topics, group, transactional ids and tables; settings of topics, brokers and the database server; the schema;
whether topic, group and database belong together; connections, clocks, retention, replication; what others added to
the tables. It can run before the first start, and beside a running daemon, whose /readyz it asks at admin.listen. Takes seconds, and up to three minutes if servers do not answer.

Nothing is written, except that the brokers remember the transactional id
<kafka.group_id>-<kafka.instance_id>-doctor-<hash>, which no daemon uses. The brokers' clocks, and whether
transactions use KIP-890, cannot be asked with the Kafka client.

Each line is one finding, the worst last: ok; warn, also for a check that could not be made; error for what would
stop or harm the daemon. Exits with 0 without errors, 1 with any.

Examples:
  payment-writer doctor
  payment-writer doctor --problems                only what is not ok
  payment-writer doctor --json";

/// `doctor`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct DoctorArgs {
    /// Leave out what is ok
    #[arg(long)]
    pub problems: bool,
    /// As a JSON array of findings
    #[arg(long)]
    pub json: bool,
}

/// Prints the findings; fails if one is an error.
pub async fn doctor(settings: &Settings, args: &DoctorArgs) -> Result<(), CommandError> {
    let all = doctor::examine(settings).await;
    let count = |severity| all.iter().filter(|finding| finding.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warn));
    let summary = format!("{errors} errors, {warnings} warnings, {} ok", count(Severity::Ok));
    let shown = all.into_iter().filter(|finding| !args.problems || finding.severity > Severity::Ok);
    if args.json {
        print(serde_json::to_string(&shown.collect::<Vec<_>>()).or_failed()?)?;
    } else {
        print(table(["is", "what", "where", "found"], shown.map(row)))?;
        print(&summary)?;
    }
    if errors == 0 { Ok(()) } else { Err(CommandError::failed(summary)) }
}

fn row(finding: Finding) -> [String; 4] {
    let Finding { severity, what, place, says, remedy } = finding;
    let is: &str = severity.into();
    let answer = if remedy.is_empty() { remedy } else { format!("; answer: {remedy}") };
    // An error of a server may have several lines.
    let found = format!("{says}{answer}").split_whitespace().collect::<Vec<_>>().join(" ");
    [is.to_owned(), what.to_owned(), place, found]
}
