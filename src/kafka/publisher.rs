//! The transactional producer of one lane, on a thread of its own.
//!
//! Transactions block, and one of librdkafka's calls is known to hang past its own time limit (librdkafka #5456): the
//! lane waits for an answer with a limit, and abandons the thread if none comes.

use std::sync::Arc;
use std::sync::mpsc as jobs;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use tokio::sync::oneshot;
use xxhash_rust::xxh3::xxh3_64;

use super::librdkafka::GroupMetadata;
use super::reminder::Reminder;
use super::transactions::{Slot, Transactions, transactional_config};
use crate::config::KafkaSettings;
use crate::cursor::Identity;
use crate::lane::ports::{LogFailure, PublishFailure, PublishTimes};
use crate::publication::{OutputCounts, Publication, Published};

/// All of one transaction has to fit in here, whatever `transaction.timeout.ms` is.
const DEADLINE_MAX: Duration = Duration::from_secs(12);
/// Taking up a transactional id, and aborting a transaction.
pub(super) const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// The lane waits this long for an answer before it abandons the thread.
const WATCHDOG: Duration = Duration::from_secs(25);
/// How often it looks around meanwhile, and the thread when it has nothing to do.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// What became of a transaction.
pub type PublishReply = Result<(Published, OutputCounts, PublishTimes), PublishFailure>;

enum Job {
    Init(oneshot::Sender<Result<(), LogFailure>>),
    Publish(Arc<Publication>, GroupMetadata, oneshot::Sender<PublishReply>),
}

/// What the thread needs to know.
#[derive(Clone)]
pub struct PublisherSettings {
    /// Configuration of the producer, with its `transactional.id`.
    pub client: ClientConfig,
    /// All of one transaction has to fit in here: it is aborted before the broker would do it, after
    /// `transaction.timeout.ms`, and fence the producer.
    pub deadline: Duration,
    /// Input topic, for marks and dead letters.
    pub input_topic: String,
    /// Output topics in the order of `OutputTopic::ALL`.
    pub outputs: [String; 3],
    /// Topic and database, for marks and `source` headers.
    pub identity: Identity,
    /// False: the output topics are not even asked for.
    pub publishes: bool,
}

/// `transactional.id` of a lane: one for each, the same after a restart. Group, instance and lane are its beginning,
/// by which rights are granted; as none of them is set apart from the next, a hash of group and instance tells
/// `payments` with `eu-0` from `payments-eu` with `0`.
pub fn transactional_id(group: &str, instance: &str, lane: usize) -> String {
    // No name has a NUL.
    let hash = xxh3_64(format!("{group}\0{instance}").as_bytes()) >> 32;
    format!("{group}-{instance}-{lane}-{hash:08x}")
}

impl PublisherSettings {
    /// Those of a lane, as the settings have them.
    pub fn of(kafka: &KafkaSettings, identity: &Identity, lane: usize) -> Self {
        let client = transactional_config(kafka, lane);
        let timeout = client.get("transaction.timeout.ms").and_then(|ms| ms.parse().ok());
        let deadline = timeout.map_or(DEADLINE_MAX, |ms| Duration::from_millis(ms) * 4 / 5).min(DEADLINE_MAX);
        Self {
            client,
            deadline,
            input_topic: kafka.input_topic.clone(),
            outputs: [kafka.read_topic.clone(), kafka.email_topic.clone(), kafka.dead_letter_topic.clone()],
            identity: identity.clone(),
            publishes: kafka.publish,
        }
    }
}

/// Handle of the thread. Dropped, the thread ends as soon as its present call returns.
pub struct Publisher {
    jobs: jobs::SyncSender<Job>,
    slot: Slot,
    bootstrap_servers: String,
}

impl Publisher {
    /// Starts the thread; nothing is asked of the broker yet.
    pub fn spawn(settings: PublisherSettings) -> std::io::Result<Self> {
        let (sender, receiver) = jobs::sync_channel(1);
        let slot = Slot::default();
        let bootstrap_servers = settings.client.get("bootstrap.servers").unwrap_or_default().to_owned();
        let held = slot.clone();
        std::thread::Builder::new()
            .name("publisher".to_owned())
            .spawn(move || serve(Transactions::new(settings, slot), &receiver))?;
        Ok(Self { jobs: sender, slot: held, bootstrap_servers })
    }

    /// Waits for what the thread answers, no longer than the watchdog; None if it does not. Meanwhile the client is
    /// told of its brokers, should it have forgotten them: its calls cannot be interrupted for that.
    pub async fn answer<T>(
        &self,
        mut answer: oneshot::Receiver<T>,
    ) -> Option<Result<T, oneshot::error::RecvError>> {
        let deadline = Instant::now() + WATCHDOG;
        let mut reminder = Reminder::default();
        loop {
            let now = Instant::now();
            if now >= deadline {
                return None;
            }
            if reminder.is_due(now, true) {
                self.slot.remind(&self.bootstrap_servers);
            }
            let slice = LOOK_AROUND.min(deadline - now);
            if let Ok(answered) = tokio::time::timeout(slice, &mut answer).await {
                return Some(answered);
            }
        }
    }

    /// `init_transactions`, after the output topics are known to exist.
    pub fn init(&self) -> oneshot::Receiver<Result<(), LogFailure>> {
        let (reply, answer) = oneshot::channel();
        // A full or closed channel drops the reply, which the waiting side reads as a failure.
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
                let outcome = transactions.publish(&publication, &group);
                // Before the answer: the lane uses the batch's memory again.
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

    use super::{Publisher, PublisherSettings, transactional_id as id};
    use crate::config::Settings;
    use crate::cursor::Identity;

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
        // The same after a restart, whatever the build.
        assert_eq!(ids[0], id("payments", "eu-0", 1));
    }

    /// The client keeps statistics, errors and the like until somebody takes them, without a limit.
    #[tokio::test]
    async fn what_an_idle_client_has_to_tell_is_taken() {
        // GIVEN a client that tells something all the time, and has nothing to do
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
        assert!(publisher.answer(publisher.init()).await.unwrap().unwrap().is_err(), "nobody is there");

        // THEN what gathered meanwhile goes away again
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
