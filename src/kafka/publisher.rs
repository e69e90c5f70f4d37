//! The thread that runs one lane's transactions, since librdkafka's transactional calls block.
//!
//! One of these calls is known to hang past its own timeout (librdkafka #5456): the lane waits for an answer
//! within a limit, and abandons the thread if none comes.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::publisher_settings::PublisherSettings;
use super::rebootstrap::Rebootstrap;
use super::transactions::{ProducerSlot, Transactions};

/// The lane waits this long for an answer before it abandons the thread.
const WATCHDOG: Duration = Duration::from_secs(25);
/// How often the waiting lane checks for a bootstrap, and the idle thread polls its client.
const LOOK_AROUND: Duration = Duration::from_secs(1);

type Job = Box<dyn FnOnce(&mut Transactions) + Send>;

/// Handle of the thread. When it is dropped, the thread ends after its present call.
pub struct Publisher {
    jobs: mpsc::SyncSender<Job>,
    slot: ProducerSlot,
    bootstrap_servers: String,
}

impl Publisher {
    /// Starts the thread, without a request to the brokers.
    pub fn spawn(settings: PublisherSettings) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let slot = ProducerSlot::default();
        let bootstrap_servers = settings.kafka.bootstrap_servers.clone();
        let held = slot.clone();
        std::thread::Builder::new()
            .name("publisher".to_owned())
            .spawn(move || serve(Transactions::new(settings, slot), &receiver))?;
        Ok(Self { jobs: sender, slot: held, bootstrap_servers })
    }

    /// Runs `work` on the thread. Meanwhile it bootstraps the client again in case it has lost its brokers,
    /// which the blocked thread cannot do.
    ///
    /// # Errors
    /// Why there is no answer: the thread has ended, or [`WATCHDOG`] has passed.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Transactions) -> T + Send + 'static,
    ) -> Result<T, &'static str> {
        let (reply, mut answer) = oneshot::channel();
        // `work` is dropped before the answer, so that the lane can reuse the memory of a batch in it.
        let job: Job = Box::new(|transactions| drop(reply.send(work(transactions))));
        // A full or closed channel drops the reply sender, which the receiver reports.
        let _ = self.jobs.try_send(job);
        let deadline = Instant::now() + WATCHDOG;
        let mut rebootstrap = Rebootstrap::default();
        loop {
            let now = Instant::now();
            if now >= deadline {
                return Err("the producer hangs and was abandoned");
            }
            if rebootstrap.is_due(now, true) {
                self.slot.rebootstrap(&self.bootstrap_servers);
            }
            let slice = LOOK_AROUND.min(deadline - now);
            if let Ok(answered) = tokio::time::timeout(slice, &mut answer).await {
                return answered.map_err(|_| "the publisher thread has ended");
            }
        }
    }
}

fn serve(mut transactions: Transactions, jobs: &mpsc::Receiver<Job>) {
    loop {
        match jobs.recv_timeout(LOOK_AROUND) {
            Ok(job) => job(&mut transactions),
            Err(mpsc::RecvTimeoutError::Timeout) => transactions.rest(),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::{Publisher, PublisherSettings, Transactions};
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
        assert!(publisher.run(Transactions::init).await.unwrap().is_err(), "there is no broker");

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
