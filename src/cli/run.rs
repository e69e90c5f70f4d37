//! `run`: the daemon.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Failure;
use crate::admin;
use crate::config::Settings;
use crate::daemon::{self, RunError, RunOptions};
use crate::logging::Log;
use crate::status::{Board, PartitionStatus};
use crate::trace::BatchTracer;

const AFTER_HELP: &str = "\
SIGTERM and SIGINT drain: what is in flight is finished within shutdown.timeout, published and
committed, and the exit code is 0. Several instances with the same kafka.group_id share the
partitions; each needs a kafka.instance_id of its own.

Examples:
  payment-writer run
  payment-writer run --until-caught-up            write what is there now, then stop
  PAYMENT_WRITER__LANES=4 payment-writer run";

/// `run`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// Stop by itself at the end offsets seen at the start
    #[arg(long)]
    pub until_caught_up: bool,
    /// Go on with this database although the group wrote to another one before: recovery after a loss.
    /// Rows are written again from the log; events that were sent are not sent again
    #[arg(long)]
    pub adopt_database: bool,
    /// Show a line with totals, lag and rate while running
    #[arg(long)]
    pub progress: bool,
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Failed(message) => Self::failed(message),
            RunError::Identity(doubt) => Self::person_must_decide(doubt.to_string()),
            RunError::Halted(message) => Self::person_must_decide(message),
        }
    }
}

/// Runs until a signal, until caught up, or until a person must decide.
pub fn run(settings: Settings, args: &RunArgs, log: Log) -> Result<(), Failure> {
    let runtime = super::large_runtime()?;
    let outcome = runtime.block_on(serve(&settings, args, Arc::new(log)));
    // Not waited for: a request to a broker that is away may still block its thread.
    runtime.shutdown_background();
    outcome
}

async fn serve(settings: &Settings, args: &RunArgs, log: Arc<Log>) -> Result<(), Failure> {
    let options = RunOptions { until_caught_up: args.until_caught_up, adopt_database: args.adopt_database };
    let version = super::version();
    let metrics = admin::install_metrics(version, &settings.kafka.group_id)
        .map_err(|error| Failure::failed(format!("cannot set up the metrics: {error}")))?;
    let tracer =
        BatchTracer::from_settings(settings, version).map_err(|error| Failure::usage(error.to_string()))?;
    let board = Arc::new(Board::default());
    let address = admin::serve(settings.admin.listen, Arc::clone(&board), metrics, log, version)
        .await
        .map_err(|error| {
            Failure::failed(format!("admin.listen: cannot listen on {}: {error}", settings.admin.listen))
        })?;
    tracing::info!(%address, "the admin server listens");

    let (stop, stopped) = watch::channel(false);
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
        return Err(Failure::failed("cannot listen for SIGTERM and SIGINT"));
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.send_replace(true);
    });
    let began = Instant::now();
    let progress = args.progress.then(|| tokio::spawn(show_progress(Arc::clone(&board))));
    let outcome = daemon::run(settings, options, Arc::clone(&board), tracer.as_ref(), stopped).await;
    if let Some(tracer) = tracer {
        // Its time is bounded; a collector that is away is no reason not to end.
        let _ = tokio::task::spawn_blocking(move || tracer.shutdown()).await;
    }
    if let Some(progress) = progress {
        progress.abort();
        let line = summary(&board, began.elapsed());
        // Nobody is left to tell if stderr is gone.
        let _ = super::output::to_stderr(&line);
    }
    Ok(outcome?)
}

fn summary(board: &Board, took: Duration) -> String {
    let totals = board.totals();
    let settled = totals.written + totals.duplicates + totals.dead_letters + totals.redelivered;
    format!(
        "written {}, duplicates {}, dead letters {}, redelivered {}; {} records in {:.1} s, {:.0}/s",
        totals.written,
        totals.duplicates,
        totals.dead_letters,
        totals.redelivered,
        settled,
        took.as_secs_f64(),
        settled as f64 / took.as_secs_f64().max(0.001),
    )
}

/// One line that is rewritten on a terminal, and written every few seconds elsewhere.
async fn show_progress(board: Arc<Board>) {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    let is_terminal = std::io::stderr().is_terminal();
    let pause = if is_terminal { Duration::from_millis(200) } else { Duration::from_secs(1) };
    let (mut last, mut last_at) = (0, Instant::now());
    loop {
        tokio::time::sleep(pause).await;
        let totals = board.totals();
        let settled = totals.written + totals.duplicates + totals.dead_letters + totals.redelivered;
        let rate = settled.saturating_sub(last) as f64 / last_at.elapsed().as_secs_f64();
        (last, last_at) = (settled, Instant::now());
        let lag: i64 = board.partitions().values().filter_map(PartitionStatus::lag).sum();
        let line = format!(
            "written {}  duplicates {}  dead letters {}  lag {lag}  {rate:.0}/s",
            totals.written, totals.duplicates, totals.dead_letters
        );
        if is_terminal {
            bar.set_message(line);
            bar.tick();
        } else {
            let _ = super::output::to_stderr(&line);
        }
    }
}
