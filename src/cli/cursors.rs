//! `cursors`: shows cursors and resolves halted partitions.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::output::{print, table};
use crate::config::Settings;
use crate::domain::cursor::{Decision, GroupOffset, HaltReason, Mode};
use crate::domain::record::{NextOffset, Partition};
use crate::error::CommandError;
use crate::resolution::{self, Settlement, View};

const SETTLE_HELP: &str = "\
Without --apply nothing is changed; the command shows what it would do. With --apply the decision, the
user and the reason are written to the audit table, and the daemon continues with the partition within
seconds. The daemon keeps running meanwhile.";

/// `cursors`
#[derive(Clone, Debug, Subcommand)]
pub enum CursorsCommand {
    /// Show for each partition what is written (applied), published and committed in the group
    Show {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Resolve a halted partition: state which events were sent; the others are sent
    #[command(after_help = SETTLE_HELP)]
    Accept(AcceptArgs),
    /// Resolve a halted partition: continue at another offset and skip the records before it
    #[command(after_help = SETTLE_HELP)]
    Skip(SkipArgs),
}

/// Arguments of both resolutions.
#[derive(Clone, Debug, Args)]
pub struct SettleArgs {
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
    pub settle: SettleArgs,
    /// Events of records before this offset were sent; events from it on are sent now
    #[arg(long, value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    pub published: i64,
}

/// `cursors skip`
#[derive(Clone, Debug, Args)]
pub struct SkipArgs {
    /// Partition, --apply and --reason.
    #[command(flatten)]
    pub settle: SettleArgs,
    /// Next offset to read; records before it that are not written or published never will be
    #[arg(long, value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    pub to: i64,
}

/// Shows or resolves cursors.
pub fn cursors(settings: &Settings, command: &CursorsCommand) -> Result<(), CommandError> {
    super::small_runtime()?.block_on(async {
        match command {
            CursorsCommand::Show { json } => show(settings, *json).await,
            CursorsCommand::Accept(args) => {
                let settlement = Settlement::Accept { published: NextOffset(args.published) };
                settle(settings, &args.settle, settlement).await
            }
            CursorsCommand::Skip(args) => {
                settle(settings, &args.settle, Settlement::Skip { to: NextOffset(args.to) }).await
            }
        }
    })
}

fn state(view: &View, partition: usize, mode: &Mode) -> (&'static str, Option<HaltReason>, Option<String>) {
    match view.decision(partition, mode) {
        None => ("unknown", None, None),
        Some(Decision::Go(_)) if view.is_settled(partition) => ("settled", None, None),
        Some(Decision::Go(_) | Decision::Prove { .. }) => match partition_of(view, partition) {
            Some(of) if view.is_silent(of) => ("no answer", None, None),
            of => match of.and_then(|of| view.unreadable(of)) {
                Some(reason) => ("unreadable", Some(reason), None),
                None => ("fine", None, None),
            },
        },
        Some(Decision::Halt(reason)) => ("halted", Some(reason), None),
        Some(Decision::Stop(mismatch)) => ("identity in doubt", None, Some(mismatch.to_string())),
    }
}

fn partition_of(view: &View, index: usize) -> Option<Partition> {
    view.known.get(index).map(|known| known.partition)
}

fn number(offset: Option<NextOffset>) -> String {
    offset.map_or_else(|| "-".to_owned(), |o| o.to_string())
}

fn mark(offset: Option<&GroupOffset>) -> &'static str {
    match offset {
        None => "-",
        Some(offset) if offset.commit_metadata().is_some() => "ours",
        Some(_) => "set by others",
    }
}

async fn show(settings: &Settings, as_json: bool) -> Result<(), CommandError> {
    let mut view = resolution::view(settings).await?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    view.probe(settings, &mode, None).await?;
    let mut rows = vec![
        ["partition", "applied", "published", "committed", "mark", "log start", "log end", "lag", "state"]
            .map(str::to_owned),
    ];
    let (mut objects, mut advices) = (Vec::new(), Vec::new());
    for (index, known) in view.known.iter().enumerate() {
        let (state, reason, identity) = state(&view, index, &mode);
        let committed = known.group.as_ref().map(|g| g.position);
        let applied = known.row.as_ref().map(|r| r.applied);
        let published = known.row.as_ref().and_then(|r| r.published);
        let lag = known.bounds.end.0 - committed.unwrap_or(known.bounds.start).0.max(known.bounds.start.0);
        let advice = reason.as_ref().map(|d| d.advice(known.partition)).or(identity);
        if as_json {
            objects.push(json!({
                "partition": known.partition.0,
                "applied": applied.map(|o| o.0),
                "published": published.map(|o| o.0),
                "committed": committed.map(|o| o.0),
                "mark": mark(known.group.as_ref()),
                "log_start": known.bounds.start.0,
                "log_end": known.bounds.end.0,
                "lag_records": lag,
                "state": state,
                "halt_reason": reason.as_ref().map(HaltReason::label),
                // The former name, kept until 1.0.
                "doubt": reason.as_ref().map(HaltReason::label),
                "advice": advice,
            }));
        } else {
            rows.push([
                known.partition.to_string(),
                number(applied),
                number(published),
                number(committed),
                mark(known.group.as_ref()).to_owned(),
                known.bounds.start.to_string(),
                known.bounds.end.to_string(),
                lag.to_string(),
                state.to_owned(),
            ]);
        }
        advices.extend(advice);
    }
    if as_json {
        return print(&Value::Array(objects).to_string());
    }
    print(&table(&rows))?;
    advices.dedup();
    for advice in advices {
        print(&format!("\n{advice}"))?;
    }
    Ok(())
}

async fn settle(settings: &Settings, args: &SettleArgs, settlement: Settlement) -> Result<(), CommandError> {
    let partition = Partition(args.partition);
    let plan = resolution::plan(settings, partition, settlement).await?;
    print(&plan.to_string())?;
    let Some(reason) = args.reason.as_deref().filter(|_| args.apply) else {
        return print("nothing was changed; add --apply --reason TEXT to apply it");
    };
    resolution::apply(settings, &plan, reason).await?;
    print("done; the daemon continues with the partition within seconds")
}
