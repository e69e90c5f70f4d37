//! The thread that runs one lane's transactions, since librdkafka's transactional calls block.
//!
//! One of these calls is known to hang past its own timeout (librdkafka #5456): the lane waits for an answer
//! within a limit, and abandons the thread if none comes.

use std::sync::Arc;
use std::sync::mpsc as jobs;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::librdkafka::GroupMetadata;
use super::publisher_settings::PublisherSettings;
use super::rebootstrap::Rebootstrap;
use super::transactions::{ProducerSlot, PublishReply, Transactions};
use crate::domain::publication::Publication;
use crate::ports::KafkaPortError;

/// The lane waits this long for an answer before it abandons the thread.
const WATCHDOG: Duration = Duration::from_secs(25);
/// How often the waiting lane checks for a bootstrap, and the idle thread polls its client.
const LOOK_AROUND: Duration = Duration::from_secs(1);

enum Job {
    Init(oneshot::Sender<Result<(), KafkaPortError>>),
    Publish(Arc<Publication>, GroupMetadata, oneshot::Sender<PublishReply>),
}

/// Handle of the thread. When it is dropped, the thread ends after its present call.
pub struct Publisher {
    jobs: jobs::SyncSender<Job>,
    slot: ProducerSlot,
    bootstrap_servers: String,
}

impl Publisher {
    /// Starts the thread, without a request to the brokers.
    pub fn spawn(settings: PublisherSettings) -> std::io::Result<Self> {
        let (sender, receiver) = jobs::sync_channel(1);
        let slot = ProducerSlot::default();
        let bootstrap_servers = settings.client.get("bootstrap.servers").unwrap_or_default().to_owned();
        let held = slot.clone();
        std::thread::Builder::new()
            .name("publisher".to_owned())
            .spawn(move || serve(Transactions::new(settings, slot), &receiver))?;
        Ok(Self { jobs: sender, slot: held, bootstrap_servers })
    }

    /// Waits for the thread's answer, at most [`WATCHDOG`]; `None`: no answer. Meanwhile it bootstraps the
    /// client again in case it has lost its brokers, which the blocked thread cannot do.
    pub async fn answer<T>(
        &self,
        mut answer: oneshot::Receiver<T>,
    ) -> Option<Result<T, oneshot::error::RecvError>> {
        let deadline = Instant::now() + WATCHDOG;
        let mut rebootstrap = Rebootstrap::default();
        loop {
            let now = Instant::now();
            if now >= deadline {
                return None;
            }
            if rebootstrap.is_due(now, true) {
                self.slot.rebootstrap(&self.bootstrap_servers);
            }
            let slice = LOOK_AROUND.min(deadline - now);
            if let Ok(answered) = tokio::time::timeout(slice, &mut answer).await {
                return Some(answered);
            }
        }
    }

    /// Runs `init_transactions`, after a check that the output topics exist.
    pub fn init(&self) -> oneshot::Receiver<Result<(), KafkaPortError>> {
        let (reply, answer) = oneshot::channel();
        // A full or closed channel drops the reply sender, and the receiver reports that as a failure.
        let _ = self.jobs.try_send(Job::Init(reply));
        answer
    }

    /// Runs one transaction.
    pub fn publish(
        &self,
        publication: Arc<Publication>,
        group: GroupMetadata,
    ) -> oneshot::Receiver<PublishReply> {
        let (reply, answer) = oneshot::channel();
        let _ = self.jobs.try_send(Job::Publish(publication, group, reply));
        answer
    }
}

fn serve(mut transactions: Transactions, receiver: &jobs::Receiver<Job>) {
    loop {
        match receiver.recv_timeout(LOOK_AROUND) {
            Err(jobs::RecvTimeoutError::Disconnected) => break,
            Err(jobs::RecvTimeoutError::Timeout) => transactions.rest(),
            Ok(Job::Init(reply)) => {
                let outcome = transactions.init();
                let _ = reply.send(outcome);
            }
            Ok(Job::Publish(publication, group, reply)) => {
                let outcome = transactions.publish(&publication, Some(&group));
                // Before the answer, so that the lane can reuse the batch's memory.
                drop(publication);
                let _ = reply.send(outcome);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use std::path::Path;
    use std::time::{Duration, Instant};

    use rdkafka::producer::Producer;

    use super::{Publisher, PublisherSettings};
    use crate::config::Settings;
    use crate::domain::cursor::Identity;
    use crate::kafka::publisher_settings::transactional_id as id;

    #[test]
    fn no_two_deployments_share_a_transactional_id() {
        let ids = [
            id("payments", "eu-0", 1),
            id("payments-eu", "0", 1),
            id("payments-eu-0", "1", 1),
            id("payments", "eu-0", 0),
        ];
        assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len(), "{ids:?}");
        for (id, beginning) in
            ids.iter().zip(["payments-eu-0-1-", "payments-eu-0-1-", "payments-eu-0-1-1-", "payments-eu-0-0-"])
        {
            assert!(id.starts_with(beginning) && id.len() == beginning.len() + 8, "{id}");
        }
        // The id is the same after a restart, and in every build.
        assert_eq!(ids[0], id("payments", "eu-0", 1));
    }

    /// The client keeps statistics and errors until they are polled, without a limit.
    #[tokio::test]
    async fn what_an_idle_client_has_to_tell_is_taken() {
        // GIVEN an idle client that produces statistics all the time
        let variables = [
            ("PAYMENT_WRITER__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1"),
            ("PAYMENT_WRITER__KAFKA__PUBLISH", "false"),
            ("PAYMENT_WRITER__KAFKA__PROPERTIES__STATISTICS_INTERVAL_MS", "10"),
        ];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        let loaded = Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap();
        let identity = Identity { topic_id: uuid::Uuid::nil(), database_id: uuid::Uuid::nil() };
        let settings = PublisherSettings::of(&loaded.settings.kafka, &identity, 0);
        let publisher = Publisher::spawn(settings).unwrap();
        assert!(publisher.answer(publisher.init()).await.unwrap().unwrap().is_err(), "there is no broker");

        // THEN the statistics that piled up are polled away
        let waiting = || publisher.slot.get().map(|producer| producer.inner().in_flight_count());
        let gathered = waiting().unwrap();
        assert!(gathered > 100, "{gathered}");
        let began = Instant::now();
        while waiting().unwrap() > 10 {
            assert!(began.elapsed() < Duration::from_secs(60), "{:?}, and there were {gathered}", waiting());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
