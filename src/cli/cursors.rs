//! `cursors`: shows cursors and resolves halted partitions.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::output::{cell, confirm, print, table};
use crate::config::Settings;
use crate::domain::cursor::{Decision, GroupOffset, HaltReason, Known, Mode, decide};
use crate::domain::record::{NextOffset, Partition};
use crate::error::CommandError;
use crate::resolution::{self, HaltResolution, PlanFile, PlanLine, Unread};

const RESOLVE_HELP: &str = "\
Without --apply nothing is changed; the command shows what it would do. With --apply the decision, the
user and the reason are written to the audit table, and the daemon continues with the partition within
seconds. The daemon keeps running meanwhile.";

const PLAN_HELP: &str = "\
The plan says of each partition what was found, the decision, and why. If any of these partitions is not
as in the plan any more, or the plan is of another group, topic or database, nothing is changed; all
decisions are written in one transaction of the database. Each is written to the audit table with the
user and the reason, and the daemon continues with the partitions within seconds.

Examples:
  payment-writer cursors show --plan > plan.txt
  payment-writer cursors apply plan.txt";

/// `cursors`
#[derive(Clone, Debug, Subcommand)]
pub enum CursorsCommand {
    /// Show for each partition what is written (applied), published and committed in the group
    Show {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Print a plan for `cursors apply`: for each halted partition the decision that loses no payment and
        /// sends no event twice, if there is one
        #[arg(long)]
        plan: bool,
    },
    /// Resolve all halted partitions that a plan of `cursors show --plan` decides: all of them, or none
    #[command(after_help = PLAN_HELP)]
    Apply(ApplyArgs),
    /// Resolve a halted partition: state which events were sent; the others are sent
    #[command(after_help = RESOLVE_HELP)]
    Accept(AcceptArgs),
    /// Resolve a halted partition: continue at another offset and skip the records before it
    #[command(after_help = RESOLVE_HELP)]
    Skip(SkipArgs),
}

/// Arguments of both resolutions.
#[derive(Clone, Debug, Args)]
pub struct ResolveArgs {
    /// Partition of the input topic
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: i32,
    /// Apply the change instead of only showing it
    #[arg(long, requires = "reason")]
    pub apply: bool,
    /// Reason, for the audit table
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// `cursors accept`
#[derive(Clone, Debug, Args)]
pub struct AcceptArgs {
    /// Partition, --apply and --reason.
    #[command(flatten)]
    pub resolve: ResolveArgs,
    /// Events of records before this offset were sent; events from it on are sent now
    #[arg(long, value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    pub published: i64,
}

/// `cursors skip`
#[derive(Clone, Debug, Args)]
pub struct SkipArgs {
    /// Partition, --apply and --reason.
    #[command(flatten)]
    pub resolve: ResolveArgs,
    /// Next offset to read; records before it that are not written or published never will be
    #[arg(long, value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    pub to: i64,
}

/// `cursors apply`
#[derive(Clone, Debug, Args)]
pub struct ApplyArgs {
    /// File with the plan; `-` for standard input
    #[arg(value_name = "PLAN")]
    pub plan: PathBuf,
    /// Do not ask for confirmation
    #[arg(long)]
    pub yes: bool,
    /// Reason, for the audit table; default: the reason in each line of the plan
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Shows or resolves cursors.
pub async fn cursors(settings: &Settings, command: &CursorsCommand) -> Result<(), CommandError> {
    match command {
        CursorsCommand::Show { json, plan: false } => show(settings, *json).await,
        CursorsCommand::Show { json, plan: true } => show_plan(settings, *json).await,
        CursorsCommand::Apply(args) => apply(settings, args).await,
        CursorsCommand::Accept(AcceptArgs { resolve: args, published }) => {
            resolve(settings, args, HaltResolution::Accept { published: NextOffset(*published) }).await
        }
        CursorsCommand::Skip(SkipArgs { resolve: args, to }) => {
            resolve(settings, args, HaltResolution::Skip { to: NextOffset(*to) }).await
        }
    }
}

/// State of a partition, with the reason and the advice if it needs one.
fn state(
    known: &Known,
    decision: Decision,
    unread: Option<&Unread>,
) -> (&'static str, Option<HaltReason>, Option<String>) {
    let because = |state, reason: HaltReason| {
        let advice = reason.advice(known.partition);
        (state, Some(reason), Some(advice))
    };
    match (decision, unread) {
        (Decision::Halt(reason), _) => because("halted", reason),
        (Decision::Stop(mismatch), _) => ("identity in doubt", None, Some(mismatch.to_string())),
        (Decision::Go(_), _) if known.settlement().is_some() => ("settled", None, None),
        (_, Some(Unread::NoAnswer)) => ("no answer", None, None),
        (_, Some(Unread::Unreadable(reason))) => because("unreadable", reason.clone()),
        (_, None) => ("fine", None, None),
    }
}

fn mark(offset: Option<&GroupOffset>) -> &'static str {
    match offset {
        None => "-",
        Some(offset) if offset.commit_metadata().is_some() => "ours",
        Some(_) => "set by others",
    }
}

/// Columns of the table, with their names in JSON.
const COLUMNS: [(&str, &str); 9] = [
    ("partition", "partition"),
    ("applied", "applied"),
    ("published", "published"),
    ("committed", "committed"),
    ("mark", "mark"),
    ("log start", "log_start"),
    ("log end", "log_end"),
    ("lag", "lag_records"),
    ("state", "state"),
];

async fn show(settings: &Settings, as_json: bool) -> Result<(), CommandError> {
    let view = resolution::view(settings).await?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    let unread = view.probe(settings, &mode, None).await?;
    let (mut partitions, mut advices) = (Vec::new(), Vec::new());
    for known in &view.known {
        let decision = decide(known, &view.identity, &mode);
        let (state, reason, advice) = state(known, decision, unread.get(&known.partition));
        let committed = known.group.as_ref().map(|g| g.position);
        let reason = reason.as_ref().map(HaltReason::label);
        partitions.push(json!({
            "partition": known.partition.0,
            "applied": known.row.as_ref().map(|r| r.applied.0),
            "published": known.row.as_ref().and_then(|r| r.published).map(|o| o.0),
            "committed": committed.map(|o| o.0),
            "mark": mark(known.group.as_ref()),
            "log_start": known.bounds.start.0,
            "log_end": known.bounds.end.0,
            "lag_records": known.bounds.end.0 - known.unpublished_from().max(known.bounds.start).0,
            "state": state,
            "halt_reason": reason,
            // The former name, kept until 1.0.
            "doubt": reason,
            "advice": advice,
        }));
        advices.extend(advice);
    }
    if as_json {
        return print(Value::Array(partitions));
    }
    let rows = partitions
        .iter()
        .map(|partition| COLUMNS.map(|(_, name)| partition.get(name).map_or_else(String::new, cell)));
    print(table(COLUMNS.map(|(title, _)| title), rows))?;
    advices.dedup();
    advices.into_iter().try_for_each(|advice| print(format_args!("\n{advice}")))
}

async fn resolve(
    settings: &Settings,
    args: &ResolveArgs,
    resolution: HaltResolution,
) -> Result<(), CommandError> {
    let plan = resolution::plan(settings, Partition(args.partition), resolution).await?;
    print(&plan)?;
    let Some(reason) = args.reason.as_deref().filter(|_| args.apply) else {
        return print("nothing was changed; add --apply --reason TEXT to apply it");
    };
    resolution::apply(settings, &[(plan, reason)]).await?;
    print("done; the daemon continues with the partition within seconds")
}

async fn show_plan(settings: &Settings, as_json: bool) -> Result<(), CommandError> {
    let plan = resolution::propose(settings).await?;
    if !as_json {
        return print(plan);
    }
    let mut json: Map<String, Value> =
        plan.header.fields().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    let partition = |line: &PlanLine| {
        let PlanLine { partition, found, decision, why } = line;
        json!({
            "partition": partition,
            "applied": found.applied,
            "published": found.published,
            "committed": found.group,
            "halt_reason": found.halt_reason,
            "decision": decision.as_ref().map(ToString::to_string),
            "why": why,
        })
    };
    json.insert("time".to_owned(), plan.time.to_string().into());
    json.insert("partitions".to_owned(), plan.lines.iter().map(partition).collect());
    print(Value::Object(json))
}

async fn apply(settings: &Settings, args: &ApplyArgs) -> Result<(), CommandError> {
    let shown = args.plan.display();
    let text = match args.plan == Path::new("-") {
        true => io::read_to_string(io::stdin()),
        false => std::fs::read_to_string(&args.plan),
    };
    let text = text.map_err(|error| CommandError::usage(format!("cannot read {shown}: {error}")))?;
    let plan: PlanFile =
        text.parse().map_err(|wrong: String| CommandError::usage(format!("{shown}: {wrong}")))?;
    let count = plan.lines.len();
    if count == 0 {
        return Err(CommandError::failed(format!(
            "{shown}: no partition has a decision; nothing was changed"
        )));
    }
    if !args.yes {
        let what = format!("the plan resolves {count} partitions of {}", plan.header.topic);
        confirm(&what, "Apply it?", "nothing was changed")?;
    }
    let mut decisions = resolution::check(settings, &plan).await?;
    if let Some(reason) = &args.reason {
        decisions.iter_mut().for_each(|(_, why)| *why = reason);
    }
    resolution::apply(settings, &decisions).await?;
    for line in &plan.lines {
        let decision = line.decision.as_ref().map(ToString::to_string).unwrap_or_default();
        print(format_args!("partition {}: {decision}", line.partition))?;
    }
    print("done; the daemon continues with the partitions within seconds")
}
