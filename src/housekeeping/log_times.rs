//! The horizon of the running system, from both cursors and the log.

use std::fmt::Display;
use std::time::Duration;

use tokio_postgres::Client;

use super::PassError;
use super::horizon::{Hold, Horizon, PartitionTime, horizon, log_time};
use crate::config::Settings;
use crate::domain::cursor::{Decision, Mode};
use crate::domain::record::Partition;
use crate::error::CommandError;
use crate::kafka::timestamp_lookup::{FirstTimestamp, first_timestamps};
use crate::postgres::{binding, schema};
use crate::resolution;
use crate::telemetry::metrics;

/// Time limit for reading one record of each lagging partition.
const PEEK_LIMIT: Duration = Duration::from_secs(15);

fn failed(error: impl Display) -> CommandError {
    CommandError::failed(error.to_string())
}

/// Log time of every partition, from both cursors and the log.
async fn partition_times(settings: &Settings) -> Result<Vec<(Partition, PartitionTime)>, CommandError> {
    let view = resolution::view(settings).await?;
    let (client, _driver) = settings.postgres.url.connect().await.map_err(failed)?;
    // The horizon of another cluster or group would be wrong for this database.
    binding::is_bound_to(&client, &settings.kafka.group_id, view.identity.topic_id, settings.kafka.publish)
        .await
        .map_err(|error| CommandError::person_must_decide(error.to_string()))?;
    let mode = Mode { publishes: settings.kafka.publish, adopts_database: false };
    let (mut times, mut positions) = (Vec::new(), Vec::new());
    for (index, known) in view.known.iter().enumerate() {
        let partition = known.partition;
        match view.decision(index, &mode) {
            Some(Decision::Go(start)) => {
                let row = known.row.as_ref().filter(|row| row.applied == start.from);
                positions.push((partition, start.from, row.and_then(|row| row.applied_timestamp)));
            }
            Some(Decision::ScanOutputs { from }) => positions.push((partition, from, None)),
            Some(Decision::Halt(reason)) => {
                times.push((partition, PartitionTime::Unknown(Hold::Halted(reason))))
            }
            Some(Decision::Stop(mismatch)) => {
                return Err(CommandError::person_must_decide(mismatch.to_string()));
            }
            None => {}
        }
    }
    let wanted: Vec<_> = positions.iter().map(|(partition, position, _)| (*partition, *position)).collect();
    let kafka = settings.kafka.clone();
    let timestamps = tokio::task::spawn_blocking(move || {
        first_timestamps(&kafka, &kafka.input_topic, &wanted, PEEK_LIMIT)
    })
    .await
    .map_err(failed)?
    .map_err(|error| failed(format_args!("reading records at the cursors: {error}")))?;
    for (partition, _, before) in positions {
        let time = match timestamps.get(&partition) {
            None => PartitionTime::Unknown(Hold::Unread),
            Some(FirstTimestamp::End) => PartitionTime::CaughtUp,
            Some(FirstTimestamp::Record(at)) => match log_time(before, *at) {
                Some(at) => PartitionTime::At(at),
                None => PartitionTime::Unknown(Hold::NoTimestamp),
            },
        };
        times.push((partition, time));
    }
    times.sort_by_key(|(partition, _)| *partition);
    Ok(times)
}

/// The current horizon.
///
/// # Errors
/// If the broker or the database cannot be queried, or if the topic, database or group is not the expected
/// one.
pub async fn current_horizon(client: &Client, settings: &Settings) -> Result<Horizon, PassError> {
    // The earlier of the database's and this machine's clocks: a clock that is ahead must not cause an early
    // drop.
    let now = schema::clock(client).await?.min(metrics::now());
    let times = partition_times(settings).await.map_err(PassError::Log)?;
    Ok(horizon(now, &times))
}
