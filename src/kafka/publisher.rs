//! The transactional producer of one lane, on a thread of its own.
//!
//! Transactions block, and one of librdkafka's calls is known to hang past its own time limit (librdkafka #5456): the
//! lane waits for an answer with a limit, and abandons the thread if none comes.

use std::sync::Arc;
use std::sync::mpsc as jobs;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use tokio::sync::oneshot;

use super::direct::{DirectSettings, DirectTransactions};
use super::librdkafka::GroupMetadata;
use super::native::{NativeTransactions, Slot, transactional_config};
use super::reminder::Reminder;
use crate::config::{KafkaSettings, ProducerChoice};
use crate::cursor::Identity;
use crate::lane::ports::{LogFailure, PublishFailure, PublishTimes};
use crate::publication::{OutputCounts, Publication, Published};

/// All of one transaction has to fit in here; the broker's own limit, `transaction.timeout.ms`, ends it too.
pub(super) const TRANSACTION_DEADLINE: Duration = Duration::from_secs(20);
/// Taking up a transactional id, and aborting a transaction.
pub(super) const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// The lane waits this long for an answer before it abandons the thread.
const WATCHDOG: Duration = Duration::from_secs(25);
/// How often it looks around meanwhile.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// What became of a transaction.
pub type PublishReply = Result<(Published, OutputCounts, PublishTimes), PublishFailure>;

/// The transactions of one transactional id, one at a time. Calls block, each within its time limit.
pub trait Transactions {
    /// Takes up the transactional id: fences older producers of it and settles what they left open, after the
    /// output topics are known to exist.
    fn init(&mut self) -> Result<(), LogFailure>;

    /// Runs one transaction.
    fn publish(&mut self, publication: &Publication, group: &GroupMetadata) -> PublishReply;
}

enum Job {
    Init(oneshot::Sender<Result<(), LogFailure>>),
    Publish(Arc<Publication>, GroupMetadata, oneshot::Sender<PublishReply>),
}

/// Who speaks with the brokers.
#[derive(Clone)]
pub enum PublisherClient {
    /// We ourselves.
    Direct(DirectSettings),
    /// librdkafka, with the producer's configuration.
    Librdkafka(ClientConfig),
}

/// What the thread needs to know.
#[derive(Clone)]
pub struct PublisherSettings {
    /// The client, with its `transactional.id`.
    pub client: PublisherClient,
    /// Input topic, for marks and dead letters.
    pub input_topic: String,
    /// Output topics in the order of `OutputTopic::ALL`.
    pub outputs: [String; 3],
    /// Topic and database, for marks and `source` headers.
    pub identity: Identity,
    /// False: the output topics are not even asked for.
    pub publishes: bool,
}

/// `transactional.id` of a lane: one for each, the same after a restart.
pub fn transactional_id(kafka: &KafkaSettings, lane: usize) -> String {
    format!("{}-{}-{lane}", kafka.group_id, kafka.instance_id)
}

/// The settings of the daemon's own producer, or why librdkafka's has to publish.
fn direct(kafka: &KafkaSettings, lane: usize) -> Result<DirectSettings, String> {
    match kafka.producer {
        ProducerChoice::Librdkafka => Err("as kafka.producer says".to_owned()),
        ProducerChoice::Auto => DirectSettings::of(kafka, lane)
            .map_err(|unsupported| format!("for {} in kafka.properties", unsupported.property)),
    }
}

/// Who publishes by these settings, and if that is not the daemon itself, why: for the log.
pub fn described(kafka: &KafkaSettings) -> String {
    direct(kafka, 0).map_or_else(|why| format!("librdkafka, {why}"), |_| "direct".to_owned())
}

impl PublisherClient {
    /// The client of a lane, as the settings have it.
    pub fn of(kafka: &KafkaSettings, lane: usize) -> Self {
        direct(kafka, lane).map_or_else(|_| Self::Librdkafka(transactional_config(kafka, lane)), Self::Direct)
    }
}

impl PublisherSettings {
    /// Those of a lane, as the settings have them.
    pub fn of(kafka: &KafkaSettings, identity: &Identity, lane: usize) -> Self {
        Self {
            client: PublisherClient::of(kafka, lane),
            input_topic: kafka.input_topic.clone(),
            outputs: [kafka.read_topic.clone(), kafka.email_topic.clone(), kafka.dead_letter_topic.clone()],
            identity: identity.clone(),
            publishes: kafka.publish,
        }
    }
}

/// librdkafka's producer, if it is that, which may have to be told of its brokers.
struct Reminded {
    slot: Slot,
    bootstrap_servers: String,
}

/// Handle of the thread. Dropped, the thread ends as soon as its present call returns.
pub struct Publisher {
    jobs: jobs::SyncSender<Job>,
    reminded: Option<Reminded>,
}

impl Publisher {
    /// Starts the thread; nothing is asked of the broker yet.
    pub fn spawn(settings: PublisherSettings) -> std::io::Result<Self> {
        let (sender, receiver) = jobs::sync_channel(1);
        let thread = std::thread::Builder::new().name("publisher".to_owned());
        let reminded = match settings.client.clone() {
            PublisherClient::Direct(direct) => {
                thread.spawn(move || serve(DirectTransactions::new(direct, settings), &receiver))?;
                None
            }
            PublisherClient::Librdkafka(config) => {
                let slot = Slot::default();
                let bootstrap_servers = config.get("bootstrap.servers").unwrap_or_default().to_owned();
                let held = slot.clone();
                thread.spawn(move || serve(NativeTransactions::new(config, settings, slot), &receiver))?;
                Some(Reminded { slot: held, bootstrap_servers })
            }
        };
        Ok(Self { jobs: sender, reminded })
    }

    /// Waits for what the thread answers, no longer than the watchdog; None if it does not. Meanwhile librdkafka is
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
            if let Some(reminded) = &self.reminded
                && reminder.is_due(now, true)
            {
                reminded.slot.remind(&reminded.bootstrap_servers);
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

fn serve(mut transactions: impl Transactions, receiver: &jobs::Receiver<Job>) {
    while let Ok(job) = receiver.recv() {
        match job {
            Job::Init(reply) => {
                let outcome = transactions.init();
                let _ = reply.send(outcome);
            }
            Job::Publish(publication, group, reply) => {
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
    use std::path::Path;

    use super::*;
    use crate::config::Settings;

    fn kafka(variables: &[(&str, &str)]) -> KafkaSettings {
        let variables = variables
            .iter()
            .map(|(name, value)| (format!("PAYMENT_WRITER__KAFKA__{name}").into(), (*value).into()));
        Settings::load_from(None, Path::new("nowhere.toml"), variables).unwrap().settings.kafka
    }

    #[test]
    fn the_daemon_publishes_itself_unless_only_librdkafka_knows_how_or_it_was_chosen() {
        for (variables, expected) in [
            (&[][..], "direct"),
            (&[("PROPERTIES__LINGER_MS", "5")], "direct"),
            (
                &[("PROPERTIES__COMPRESSION_TYPE", "lz4")],
                "librdkafka, for compression.type in kafka.properties",
            ),
            (&[("PRODUCER", "librdkafka")], "librdkafka, as kafka.producer says"),
        ] {
            let kafka = kafka(variables);
            assert_eq!(described(&kafka), expected);
            let is_direct = matches!(PublisherClient::of(&kafka, 0), PublisherClient::Direct(_));
            assert_eq!(is_direct, expected == "direct", "{expected}");
        }
    }

    #[test]
    fn smaller_batches_and_other_time_limits_are_kept() {
        let defaults = direct(&kafka(&[]), 1).unwrap();
        assert_eq!(defaults.transactional_id, format!("payment-writer-{}-1", defaults.instance_id));
        assert_eq!(
            (defaults.batch_bytes_max, defaults.transaction_timeout),
            (900_000, Duration::from_secs(15))
        );
        let variables = [
            ("PROPERTIES__BATCH_SIZE", "2000000"),
            ("PROPERTIES__MESSAGE_MAX_BYTES", "200000"),
            ("PROPERTIES__TRANSACTION_TIMEOUT_MS", "30000"),
        ];
        let set = direct(&kafka(&variables), 1).unwrap();
        assert_eq!((set.batch_bytes_max, set.transaction_timeout), (200_000, Duration::from_secs(30)));
    }
}
