//! `run`: the daemon.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use super::output::{progress_bar, warn};
use super::service_manager;
use crate::admin;
use crate::config::{ConfigError, Loaded};
use crate::daemon::{self, OnHangup, Reload, RunOptions};
use crate::domain::batch::OutcomeCounts;
use crate::error::{CommandError, OrFailed};
use crate::telemetry::logging::LogHandle;
use crate::telemetry::status::{PartitionStatus, StatusRegistry};
use crate::telemetry::trace::BatchTracer;

const AFTER_HELP: &str = "\
SIGTERM and SIGINT drain: batches in flight are completed within shutdown.timeout, published and
committed, and the exit code is 0. SIGHUP reads secrets, certificates and some settings again.
Several instances with the same kafka.group_id share the partitions; each needs its own
kafka.instance_id.

Examples:
  payment-writer run
  payment-writer run --until-caught-up            write the current records, then stop
  PAYMENT_WRITER__LANES=4 payment-writer run";

/// `run`
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// Stop after reaching the end offsets seen at the start
    #[arg(long)]
    pub until_caught_up: bool,
    /// Continue with this database although the group wrote to another one before, to recover from a loss.
    /// Rows are written again from the log; events that were sent are not sent again
    #[arg(long)]
    pub adopt_database: bool,
    /// Show a line with totals, lag and rate while running
    #[arg(long)]
    pub progress: bool,
}

/// Runs until a signal, until caught up, or until a person must decide. `load` reads the settings again.
pub async fn run(
    loaded: Loaded,
    load: impl Fn() -> Result<Loaded, ConfigError> + Send + Sync + 'static,
    args: &RunArgs,
    log: LogHandle,
) -> Result<(), CommandError> {
    // First, because without a handler it ends the process.
    let hangup = signal(SignalKind::hangup()).or_failed_to("cannot listen for SIGHUP")?;
    let (settings, log) = (loaded.settings.clone(), Arc::new(log));
    let options = RunOptions { until_caught_up: args.until_caught_up, adopt_database: args.adopt_database };
    let version = super::version();
    let metrics = admin::install_metrics(version, &settings.kafka.group_id)
        .or_failed_to("cannot set up the metrics")?;
    let tracer = BatchTracer::from_settings(&settings, version)
        .map_err(|error| CommandError::usage(error.to_string()))?;
    let status = Arc::new(StatusRegistry::default());
    let (in_use, used) = watch::channel(settings.clone());
    let address = admin::serve(used, Arc::clone(&status), metrics, Arc::clone(&log), version).await?;
    tracing::info!(%address, "the admin server listens");
    tokio::spawn(service_manager::run(Arc::clone(&status)));

    let (stop, stopped) = watch::channel(false);
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
        return Err(CommandError::failed("cannot listen for SIGTERM and SIGINT"));
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        service_manager::stopping();
        stop.send_replace(true);
    });
    let began = Instant::now();
    let progress = args.progress.then(|| tokio::spawn(show_progress(Arc::clone(&status))));
    let reload = Reload::new(loaded, Some(OnHangup { hangup, load: Arc::new(load), log }));
    let outcome = daemon::run(options, Arc::clone(&status), tracer.as_ref(), stopped, reload, &in_use).await;
    if let Some(tracer) = tracer {
        // Has a time limit; an unavailable collector does not keep the process from ending.
        let _ = tokio::task::spawn_blocking(move || tracer.shutdown()).await;
    }
    if let Some(progress) = progress {
        progress.abort();
        warn(summary(&status.totals(), began.elapsed()));
    }
    Ok(outcome?)
}

fn records(totals: &OutcomeCounts) -> u64 {
    totals.written + totals.duplicates + totals.dead_letters + totals.redelivered
}

fn summary(totals: &OutcomeCounts, took: Duration) -> String {
    let (records, seconds) = (records(totals), took.as_secs_f64());
    format!(
        "written {}, duplicates {}, dead letters {}, redelivered {}; {records} records in {seconds:.1} s, {:.0}/s",
        totals.written,
        totals.duplicates,
        totals.dead_letters,
        totals.redelivered,
        records as f64 / seconds.max(0.001),
    )
}

/// Shows one line: rewritten on a terminal, repeated every few seconds elsewhere.
async fn show_progress(status: Arc<StatusRegistry>) {
    let bar = progress_bar(None, "{spinner} {msg}");
    let is_terminal = std::io::stderr().is_terminal();
    let pause = if is_terminal { Duration::from_millis(200) } else { Duration::from_secs(1) };
    let (mut last, mut last_at) = (0, Instant::now());
    loop {
        tokio::time::sleep(pause).await;
        let totals = status.totals();
        let records = records(&totals);
        let rate = records.saturating_sub(last) as f64 / last_at.elapsed().as_secs_f64();
        (last, last_at) = (records, Instant::now());
        let lag: i64 = status.partitions().values().filter_map(PartitionStatus::lag).sum();
        let line = format!(
            "written {}  duplicates {}  dead letters {}  lag {lag}  {rate:.0}/s",
            totals.written, totals.duplicates, totals.dead_letters
        );
        if is_terminal {
            bar.set_message(line);
            bar.tick();
        } else {
            warn(line);
        }
    }
}
