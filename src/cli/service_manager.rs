//! Tells systemd how the daemon is (`Type=notify`, `WatchdogSec=`). Without `NOTIFY_SOCKET` nothing is sent.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

use crate::telemetry::status::StatusRegistry;

/// How often the status is sent, at least.
const TICK: Duration = Duration::from_secs(5);
const STATUS_CHARS_MAX: usize = 300;

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}

/// The daemon stops.
pub fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("draining")]);
}

fn line(status: &StatusRegistry) -> String {
    let missing: Vec<String> =
        status.missing().iter().map(|(what, reason)| format!("{what}: {reason}")).collect();
    let line = if missing.is_empty() {
        format!("writing {} partitions, {} records wait", status.partition_lags().len(), status.lag())
    } else {
        format!("waiting for {}", missing.join("; "))
    };
    line.chars().take(STATUS_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Sends that the process is up, which waits for no dependency: without one it is no use to start it again. Then sends how
/// it is, and that its runtime works, until the process ends.
pub async fn run(status: Arc<StatusRegistry>) {
    send(&[NotifyState::Ready, NotifyState::Status("starting")]);
    let watchdog = sd_notify::watchdog_enabled();
    let mut tick =
        interval(watchdog.map_or(TICK, |limit| TICK.min(limit / 3)).max(Duration::from_millis(100)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let line = line(&status);
        match watchdog {
            Some(_) => send(&[NotifyState::Watchdog, NotifyState::Status(&line)]),
            None => send(&[NotifyState::Status(&line)]),
        }
    }
}
