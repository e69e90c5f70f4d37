//! `cursors`: how far each partition is, and settling a halted one.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Failure;
use super::output::{print, table};
use crate::config::Settings;
use crate::cursor::{Decision, Doubt, GroupOffset, Mode};
use crate::record::{NextOffset, Partition};
use crate::settlement::{self, Settlement, View};

const SETTLE_HELP: &str = "\
Without --apply nothing changes: it only says what would. With it, the decision, who made it and
why are written to the audit table, and the daemon goes on with the partition by itself within
seconds; it need not be stopped.";

/// `cursors`
#[derive(Clone, Debug, Subcommand)]
pub enum CursorsCommand {
    /// Show per partition what is written (applied), published and committed in the group
    Show {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Settle a halted partition: say which events were sent, the others are sent
    #[command(after_help = SETTLE_HELP)]
    Accept(AcceptArgs),
    /// Settle a halted partition: go on at another offset, giving up the records before it
    #[command(after_help = SETTLE_HELP)]
    Skip(SkipArgs),
}

/// What both ways of settling take.
#[derive(Clone, Debug, Args)]
pub struct SettleArgs {
    /// The partition of the input topic
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub partition: i32,
    /// Do it, instead of telling what would be done
    #[arg(long, requires = "reason")]
    pub apply: bool,
    /// Why, for the audit table
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// `cursors accept`
#[derive(Clone, Debug, Args)]
pub struct AcceptArgs {
    /// Which, whether, why.
    #[command(flatten)]
    pub settle: SettleArgs,
    /// Events of records before this offset were sent; those from it on are sent now
    #[arg(long, value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    pub published: i64,
}

/// `cursors skip`
#[derive(Clone, Debug, Args)]
pub struct SkipArgs {
    /// Which, whether, why.
    #[command(flatten)]
    pub settle: SettleArgs,
    /// The next offset to read; records before it that were not written or published never will be
    #[arg(long, value_name = "OFFSET", value_parser = clap::value_parser!(i64).range(0..))]
    pub to: i64,
}

/// Shows or settles cursors.
pub fn cursors(settings: &Settings, command: &CursorsCommand) -> Result<(), Failure> {
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

fn state(view: &View, partition: usize, mode: &Mode) -> (&'static str, Option<Doubt>, Option<String>) {
    match view.decision(partition, mode) {
        None => ("unknown", None, None),
        Some(Decision::Go(_)) if view.is_settled(partition) => ("settled", None, None),
        Some(Decision::Go(_) | Decision::Prove { .. }) => match partition_of(view, partition) {
            Some(of) if view.is_silent(of) => ("no answer", None, None),
            of => match of.and_then(|of| view.unreadable(of)) {
                Some(doubt) => ("unreadable", Some(doubt), None),
                None => ("fine", None, None),
            },
        },
        Some(Decision::Halt(doubt)) => ("halted", Some(doubt), None),
        Some(Decision::Stop(doubt)) => ("identity in doubt", None, Some(doubt.to_string())),
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
        Some(offset) if offset.mark().is_some() => "ours",
        Some(_) => "set by others",
    }
}

async fn show(settings: &Settings, as_json: bool) -> Result<(), Failure> {
    let mut view = settlement::view(settings).await?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    view.probe(settings, &mode, None).await?;
    let mut rows = vec![
        ["partition", "applied", "published", "committed", "mark", "log start", "log end", "lag", "state"]
            .map(str::to_owned),
    ];
    let (mut objects, mut advices) = (Vec::new(), Vec::new());
    for (index, known) in view.known.iter().enumerate() {
        let (state, doubt, identity) = state(&view, index, &mode);
        let committed = known.group.as_ref().map(|g| g.position);
        let applied = known.row.as_ref().map(|r| r.applied);
        let published = known.row.as_ref().and_then(|r| r.published);
        let lag = known.bounds.end.0 - committed.unwrap_or(known.bounds.start).0.max(known.bounds.start.0);
        let advice = doubt.as_ref().map(|d| d.advice(known.partition)).or(identity);
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
                "doubt": doubt.as_ref().map(Doubt::label),
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

async fn settle(settings: &Settings, args: &SettleArgs, settlement: Settlement) -> Result<(), Failure> {
    let partition = Partition(args.partition);
    let plan = settlement::plan(settings, partition, settlement).await?;
    print(&plan.to_string())?;
    let Some(reason) = args.reason.as_deref().filter(|_| args.apply) else {
        return print("nothing was changed; add --apply --reason TEXT to do it");
    };
    settlement::apply(settings, &plan, reason).await?;
    print("done; the daemon takes the partition up again within seconds")
}
