//! Months of the payment tables in the daemon.

use std::time::Duration;

use crate::config::{Endpoint, Settings};
use crate::postgres::schema::months::{MonthsReport, Obstacle, keep};
use crate::telemetry::logging::Repeated;

const TICK: Duration = Duration::from_secs(24 * 60 * 60);
const RETRY: Duration = Duration::from_secs(60);
const FIRST_WAIT: Duration = Duration::from_secs(10);

/// Creates months of the payment tables ahead of time. Failures are not fatal: without its month, a row goes
/// to the default partition.
pub struct MonthsKeeper<'s> {
    endpoint: &'s Endpoint,
    kept: Option<u32>,
    /// The last logged obstacles or error.
    trouble: Repeated,
    pause: Duration,
}

impl<'s> MonthsKeeper<'s> {
    /// Makes a first attempt, with a time limit.
    pub async fn start(settings: &'s Settings) -> Self {
        let mut keeper = Self {
            endpoint: &settings.postgres.housekeeping_url,
            kept: settings.retention.payment_months,
            trouble: Repeated::default(),
            pause: RETRY,
        };
        // The pause stays as it is after a timeout.
        let _ = tokio::time::timeout(FIRST_WAIT, keeper.make_ahead()).await;
        keeper
    }

    /// Repeats it; never returns.
    pub async fn run(mut self) {
        loop {
            tokio::time::sleep(self.pause).await;
            self.make_ahead().await;
        }
    }

    async fn make_ahead(&mut self) {
        let outcome = match self.endpoint.connect().await {
            Ok((mut client, _driver)) => keep(&mut client, self.kept).await.map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let is_done = match outcome {
            Ok(report) => self.log_report(&report),
            Err(error) => {
                if self.trouble.is_due(&error) {
                    tracing::warn!(
                        error,
                        "making months of the payment tables failed, retrying every minute"
                    );
                    self.trouble.written(error);
                }
                false
            }
        };
        self.pause = if is_done { TICK } else { RETRY };
    }

    /// Logs what was done. Returns whether nothing is left that a retry could do.
    fn log_report(&mut self, report: &MonthsReport) -> bool {
        if !report.made.is_empty() {
            tracing::info!(months = report.made.join(", "), "made months of the payment tables");
        }
        if report.moved > 0 {
            tracing::warn!(rows = report.moved, "moved rows from the default partitions to their months");
        }
        if !report.archived.is_empty() {
            tracing::info!(
                tables = report.archived.join(", "),
                "detached months of the payment tables; they can be archived and dropped"
            );
        }
        let is_by_hand = |o: &Obstacle| matches!(o, Obstacle::TooLarge | Obstacle::NameTaken);
        let is_done = report.waiting.iter().all(|(_, obstacle)| is_by_hand(obstacle));
        let waiting = format!("{:?}", report.waiting);
        if report.waiting.is_empty() {
            self.trouble.end();
        } else if self.trouble.is_due(&waiting) {
            for (month, obstacle) in &report.waiting {
                if is_by_hand(obstacle) {
                    tracing::warn!(month, %obstacle, "a month of the payment tables cannot be made");
                } else {
                    tracing::warn!(month, %obstacle, "a month of the payment tables cannot be made yet");
                }
            }
            self.trouble.written(waiting);
        }
        is_done
    }
}
