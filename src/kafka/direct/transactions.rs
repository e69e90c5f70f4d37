//! Transactions of one transactional id, one at a time.
//!
//! Sources: KIP-98 (transactions), KIP-360 (a new epoch after an abort), KIP-447 (offsets are fenced by the group's
//! generation), KIP-890 (from `transaction.version` 2 on partitions join by being written to, and each transaction has
//! an epoch of its own).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::add_partitions_to_txn_request::AddPartitionsToTxnTopic;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::txn_offset_commit_request::{
    TxnOffsetCommitRequestPartition, TxnOffsetCommitRequestTopic,
};
use kafka_protocol::messages::{
    AddOffsetsToTxnRequest, AddPartitionsToTxnRequest, EndTxnRequest, GroupId, InitProducerIdRequest,
    ProduceRequest, ProduceResponse, ProducerId, TopicName, TransactionalId, TxnOffsetCommitRequest,
};
use kafka_protocol::protocol::{Request, StrBytes};

use super::cluster::{BrokerId, Cluster, Coordinated};
use super::connection::{CallError, Sent, checked};
use super::records::{RecordBatch, Stamp, partition_of_key, sequence_after};
use super::transport::{Transport, Unsupported};
use crate::config::KafkaSettings;
use crate::disposition::FailureClass;
use crate::failpoint;
use crate::kafka::librdkafka::GroupMetadata;
use crate::kafka::publisher::{
    INIT_TIMEOUT, PublishReply, PublisherSettings, TRANSACTION_DEADLINE, Transactions, transactional_id,
};
use crate::lane::ports::{LogFailure, PublishFailure, PublishTimes};
use crate::metrics::{self, KafkaSteps, timed};
use crate::publication::{Output, OutputCounts, OutputTopic, Publication};

/// Unless `transaction.timeout.ms` says otherwise.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(15);
/// A batch of records, at most; one record alone may be longer. Topics take 1 MiB by default.
const BATCH_BYTES_MAX: usize = 900_000;
/// Records in one request to one broker, at most, but for a single batch. Brokers take 100 MiB by default.
const REQUEST_BYTES_MAX: usize = 16 << 20;
/// Leaders and numbers of partitions are asked for again after this time, as librdkafka does.
const LEADERS_MAX_AGE: Duration = Duration::from_secs(300);
/// Memory of batches that is kept for the next transaction.
const SPARE_BYTES_MAX: usize = 32 << 20;
/// Between two tries of the same request.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// For a second look at topics of which one seems to be missing.
const MISSING_TIMEOUT: Duration = Duration::from_secs(2);
/// An abort after a transaction that used up its time.
const ABORT_TIMEOUT_MIN: Duration = Duration::from_secs(4);
/// A coordinator that does not answer within this time is looked for anew: another may have taken its place.
const TRY_TIMEOUT: Duration = Duration::from_secs(6);
/// From this `transaction.version` on partitions join by themselves (KIP-890).
const JOINING_BY_ITSELF: i16 = 2;

/// The oldest and the newest versions that are used; two pairs: in transactions of the older and of the newer kind.
const INIT_VERSIONS: [i16; 2] = [3, 5];
const ADD_PARTITIONS_VERSIONS: [i16; 2] = [0, 3];
const ADD_OFFSETS_VERSIONS: [i16; 2] = [0, 4];
const PRODUCE_VERSIONS: [[i16; 2]; 2] = [[3, 11], [12, 12]];
const OFFSETS_VERSIONS: [[i16; 2]; 2] = [[3, 4], [5, 5]];
const END_VERSIONS: [[i16; 2]; 2] = [[0, 4], [5, 5]];

/// What the producer is told once.
#[derive(Clone)]
pub struct DirectSettings {
    /// How brokers are reached.
    pub transport: Transport,
    /// `client.id`
    pub client_id: String,
    /// `host:port,host:port`
    pub bootstrap_servers: String,
    /// `transactional.id`
    pub transactional_id: String,
    /// After this time the broker ends a transaction by itself.
    pub transaction_timeout: Duration,
    /// `group.id`
    pub group_id: String,
    /// `group.instance.id`
    pub instance_id: String,
    /// Bytes of a batch of records, at most; one record alone may be longer.
    pub batch_bytes_max: usize,
}

impl DirectSettings {
    /// The settings of a lane's producer.
    ///
    /// # Errors
    /// If `kafka.properties` has something that only librdkafka knows.
    pub fn of(kafka: &KafkaSettings, lane: usize) -> Result<Self, Unsupported> {
        let number = |name| kafka.properties.get(name).and_then(|text| text.trim().parse::<u64>().ok());
        let timeout = number("transaction.timeout.ms");
        // Whoever set them smaller has topics that take no more.
        let sizes = ["batch.size", "message.max.bytes"].map(|name| number(name).unwrap_or(u64::MAX));
        let batch_bytes_max = sizes.into_iter().min().and_then(|bytes| usize::try_from(bytes).ok());
        Ok(Self {
            transport: Transport::of(kafka.properties.iter())?,
            client_id: kafka.properties.get("client.id").unwrap_or(env!("CARGO_PKG_NAME")).to_owned(),
            bootstrap_servers: kafka.bootstrap_servers.clone(),
            transactional_id: transactional_id(kafka, lane),
            transaction_timeout: timeout.map_or(TRANSACTION_TIMEOUT, Duration::from_millis),
            group_id: kafka.group_id.clone(),
            instance_id: kafka.instance_id.clone(),
            batch_bytes_max: batch_bytes_max.unwrap_or(usize::MAX).min(BATCH_BYTES_MAX),
        })
    }
}

/// The names in the form that requests take.
struct Names {
    transactional_id: StrBytes,
    group_id: StrBytes,
    instance_id: StrBytes,
    input_topic: StrBytes,
    outputs: Vec<StrBytes>,
}

impl Names {
    fn of(direct: &DirectSettings, settings: &PublisherSettings) -> Self {
        let name = |text: &str| StrBytes::from_string(text.to_owned());
        Self {
            transactional_id: name(&direct.transactional_id),
            group_id: name(&direct.group_id),
            instance_id: name(&direct.instance_id),
            input_topic: name(&settings.input_topic),
            outputs: settings.outputs.iter().map(|topic| name(topic)).collect(),
        }
    }
}

/// One partition of an output topic.
#[derive(Default)]
struct OutputPartition {
    leader: BrokerId,
    /// Sequence number of the next record to be sent.
    sequence: i32,
    /// The same, once everything that is written here was sent.
    drafted: i32,
    /// What is being written to it.
    batch: RecordBatch,
}

/// A batch that is ready to go.
struct Sealed {
    topic: usize,
    partition: usize,
    leader: BrokerId,
    bytes: Bytes,
}

/// Producer id and epoch, as the coordinator gave them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Producer {
    id: i64,
    epoch: i16,
}

/// Runs the transactions of one transactional id.
pub struct DirectTransactions {
    settings: PublisherSettings,
    transaction_timeout: Duration,
    batch_bytes_max: usize,
    names: Names,
    cluster: Cluster,
    outputs: Vec<Vec<OutputPartition>>,
    leaders_at: Option<Instant>,
    producer: Option<Producer>,
    /// KIP-890's way of transactions.
    joins_by_itself: bool,
    /// The coordinator may know of the transaction that is under way.
    has_begun: bool,
    /// It has said that it does.
    has_joined: bool,
    /// It was asked to commit it.
    has_asked_to_commit: bool,
    /// A request with outputs may still be on its way to a broker.
    has_unanswered: bool,
    /// An answer of a coordinator was lost: what was asked may have been done twice, or be done later.
    was_broken: bool,
    sealed: VecDeque<Sealed>,
    spare: Vec<Vec<u8>>,
    keyless: usize,
    steps: KafkaSteps,
}

/// What goes away if the very same is asked again, where the coordinator is another one, or is busy.
fn is_passing(code: ResponseError) -> bool {
    moved(code)
        || matches!(code, ResponseError::CoordinatorLoadInProgress | ResponseError::ConcurrentTransactions)
}

fn moved(code: ResponseError) -> bool {
    matches!(code, ResponseError::CoordinatorNotAvailable | ResponseError::NotCoordinator)
}

/// Somebody else has the transactional id, or the coordinator does not know ours any more: a new producer finds out.
fn is_fenced(code: ResponseError) -> bool {
    matches!(
        code,
        ResponseError::ProducerFenced
            | ResponseError::InvalidProducerEpoch
            | ResponseError::InvalidProducerIdMapping
            | ResponseError::TransactionCoordinatorFenced
    )
}

fn failure(doing: &str, error: &CallError) -> LogFailure {
    LogFailure::Failed { class: error.class(), message: format!("{doing}: {error}") }
}

struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Self(PAUSE_MIN)
    }

    fn wait(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

impl Transactions for DirectTransactions {
    fn init(&mut self) -> Result<(), LogFailure> {
        let deadline = Instant::now() + INIT_TIMEOUT;
        self.producer = None;
        self.leaders_at = None;
        self.ask_leaders(deadline).map_err(|e| failure("preparing the producer", &e))?;
        self.take_id(None, deadline).map_err(|e| failure("init_transactions", &e))
    }

    fn publish(&mut self, publication: &Publication, group: &GroupMetadata) -> PublishReply {
        self.run(publication, Some(group))
    }
}

impl DirectTransactions {
    /// Sends the outputs and commits them, without any offsets: for measurements.
    ///
    /// # Errors
    /// As [`publish`](Transactions::publish).
    pub fn send_alone(&mut self, publication: &Publication) -> Result<(), PublishFailure> {
        self.run(publication, None).map(|_| ())
    }

    fn run(&mut self, publication: &Publication, group: Option<&GroupMetadata>) -> PublishReply {
        let deadline = Instant::now() + TRANSACTION_DEADLINE;
        let Some(producer) = self.producer else {
            return Err(PublishFailure::Unknown("the producer is not initialised".to_owned()));
        };
        failpoint::hit("before_kafka_begin");
        (self.has_begun, self.has_joined, self.has_asked_to_commit) = (false, false, false);
        self.has_unanswered = false;
        let mut times = PublishTimes::default();
        match self.fill(producer, &mut times, publication, group, deadline) {
            Ok(counts) => {
                failpoint::hit("before_kafka_commit");
                self.has_asked_to_commit = true;
                let began = Instant::now();
                let ended = self.end(producer, true, deadline);
                times.commit = began.elapsed();
                self.steps.commit.record(times.commit.as_secs_f64());
                ended.map_err(|error| self.not_committed(producer, &error, deadline))?;
                failpoint::hit("after_kafka_commit");
                Ok((publication.committed(), counts, times))
            }
            Err(error) => Err(self.abort(producer, &error, deadline)),
        }
    }

    /// A producer that asks nothing yet.
    pub fn new(direct: DirectSettings, settings: PublisherSettings) -> Self {
        Self {
            names: Names::of(&direct, &settings),
            settings,
            transaction_timeout: direct.transaction_timeout,
            batch_bytes_max: direct.batch_bytes_max,
            cluster: Cluster::new(direct.transport, &direct.client_id, &direct.bootstrap_servers),
            outputs: OutputTopic::ALL.iter().map(|_| Vec::new()).collect(),
            leaders_at: None,
            producer: None,
            joins_by_itself: false,
            has_begun: false,
            has_joined: false,
            has_asked_to_commit: false,
            has_unanswered: false,
            was_broken: false,
            sealed: VecDeque::new(),
            spare: Vec::new(),
            keyless: 0,
            steps: KafkaSteps::default(),
        }
    }

    /// Whether the cluster's transactions are those of KIP-890, as far as it was asked.
    pub fn joins_by_itself(&self) -> bool {
        self.joins_by_itself
    }

    /// Of the two kinds of transactions, the versions that go with this one.
    fn versions(&self, versions: [[i16; 2]; 2]) -> [i16; 2] {
        let [older, newer] = versions;
        if self.joins_by_itself { newer } else { older }
    }

    // ---- what is known of the cluster --------------------------------------------------------

    fn ask_leaders(&mut self, deadline: Instant) -> Result<(), CallError> {
        if !self.settings.publishes || self.leaders_at.is_some_and(|at| at.elapsed() < LEADERS_MAX_AGE) {
            return Ok(());
        }
        let leaders = self.cluster.leaders(&self.names.outputs, deadline)?;
        if self.outputs.iter().zip(&leaders).any(|(partitions, leaders)| leaders.len() < partitions.len()) {
            // Numbers that are forgotten would begin anew in the same epoch, should the partitions come back, and
            // brokers take records with numbers that they know for repeated ones.
            self.producer = None;
        }
        for (partitions, leaders) in self.outputs.iter_mut().zip(leaders) {
            partitions.resize_with(leaders.len(), OutputPartition::default);
            for (partition, leader) in partitions.iter_mut().zip(leaders) {
                partition.leader = leader;
            }
        }
        self.leaders_at = Some(Instant::now());
        Ok(())
    }

    /// `InitProducerId`: fences older producers of this id and settles what they left open. With the present id
    /// and epoch it asks for the next epoch, and is refused if another producer has taken over.
    fn take_id(&mut self, present: Option<Producer>, deadline: Instant) -> Result<(), CallError> {
        let none = Producer { id: -1, epoch: -1 };
        let Producer { id, epoch } = present.unwrap_or(none);
        let timeout = i32::try_from(self.transaction_timeout.as_millis()).unwrap_or(i32::MAX);
        let request = InitProducerIdRequest::default()
            .with_transactional_id(Some(TransactionalId::from(self.names.transactional_id.clone())))
            .with_transaction_timeout_ms(timeout)
            .with_producer_id(ProducerId(id))
            .with_producer_epoch(epoch);
        let what = Coordinated::Transaction;
        let answer =
            self.ask(what, &request, INIT_VERSIONS, deadline, "taking a producer id", |a| a.error_code)?;
        let coordinator = self.cluster.coordinator(what, &self.names.transactional_id, deadline)?;
        let connection = self.cluster.connection(coordinator, deadline)?;
        self.joins_by_itself = connection.transaction_version() >= JOINING_BY_ITSELF;
        self.take_up(Producer { id: answer.producer_id.0, epoch: answer.producer_epoch });
        Ok(())
    }

    /// With a new epoch, numbers begin at 0.
    fn take_up(&mut self, producer: Producer) {
        if self.producer != Some(producer) {
            for partition in self.outputs.iter_mut().flatten() {
                partition.sequence = 0;
            }
        }
        self.producer = Some(producer);
    }

    /// Asks a coordinator until it has an answer that does not pass by itself. What is asked may be asked twice.
    fn ask<R: Request>(
        &mut self,
        what: Coordinated,
        request: &R,
        versions: [i16; 2],
        deadline: Instant,
        doing: &'static str,
        code: impl Fn(&R::Response) -> i16,
    ) -> Result<R::Response, CallError> {
        let mut pause = Pause::new();
        loop {
            let until = deadline.min(Instant::now() + TRY_TIMEOUT);
            let error = match self.ask_once(what, request, versions, until, doing) {
                Ok(answer) => match checked(doing, code(&answer)) {
                    Ok(()) => return Ok(answer),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let is_broken = matches!(error, CallError::Broken { .. });
            self.was_broken |= is_broken;
            match error.code() {
                Some(code) if !moved(code) => {}
                Some(_) => self.cluster.forget_coordinator(what),
                None => self.cluster.drop_coordinator(what),
            }
            let is_passing = match error.code() {
                Some(code) => is_passing(code),
                None => is_broken && error.class() == FailureClass::Passing,
            };
            if !is_passing || Instant::now() >= deadline {
                return Err(error);
            }
            pause.wait();
        }
    }

    fn ask_once<R: Request>(
        &mut self,
        what: Coordinated,
        request: &R,
        [version_min, version_max]: [i16; 2],
        deadline: Instant,
        doing: &'static str,
    ) -> Result<R::Response, CallError> {
        let key = match what {
            Coordinated::Group => &self.names.group_id,
            Coordinated::Transaction => &self.names.transactional_id,
        };
        let coordinator = self.cluster.coordinator(what, key, deadline)?;
        let connection = self.cluster.connection(coordinator, deadline)?;
        let version = connection.version_of::<R>(version_min, version_max)?;
        self.has_begun = true;
        connection.call(request, version, deadline, doing)
    }

    // ---- the transaction ---------------------------------------------------------------------

    fn fill(
        &mut self,
        producer: Producer,
        times: &mut PublishTimes,
        publication: &Publication,
        group: Option<&GroupMetadata>,
        deadline: Instant,
    ) -> Result<OutputCounts, CallError> {
        self.ask_leaders(deadline)?;
        if self.producer.is_none() {
            return Err(CallError::Foreign("an output topic has fewer partitions than before".to_owned()));
        }
        let steps = self.steps.clone();
        let counts = timed(&steps.produce, &mut times.produce, || self.write(producer, publication))?;
        timed(&steps.deliver, &mut times.deliver, || {
            if !self.joins_by_itself {
                self.join(producer, deadline)?;
            }
            self.deliver(deadline)
        })?;
        failpoint::hit("after_produce");
        if let Some(group) = group {
            timed(&steps.offsets, &mut times.offsets, || {
                self.commit_offsets(producer, publication, group, deadline)
            })?;
        }
        failpoint::hit("after_send_offsets");
        Ok(counts)
    }

    /// Writes all outputs into batches.
    fn write(&mut self, producer: Producer, publication: &Publication) -> Result<OutputCounts, CallError> {
        let stamp =
            Stamp { producer_id: producer.id, epoch: producer.epoch, sequence: 0, at: metrics::now() };
        // Of a transaction that came to nothing.
        self.sealed.clear();
        for partition in self.outputs.iter_mut().flatten() {
            partition.batch = RecordBatch::default();
            partition.drafted = partition.sequence;
        }
        let (settings, topic_id) = (&self.settings, self.settings.identity.topic_id);
        let (outputs, sealed, spare) = (&mut self.outputs, &mut self.sealed, &mut self.spare);
        let (keyless, batch_bytes_max) = (&mut self.keyless, self.batch_bytes_max);
        let counts = publication.for_each_output(&settings.input_topic, topic_id, |output| {
            place(outputs, sealed, spare, keyless, batch_bytes_max, &stamp, output)
        })?;
        for (topic, partitions) in self.outputs.iter_mut().enumerate() {
            for (index, partition) in partitions.iter_mut().enumerate() {
                if !partition.batch.is_empty() {
                    self.sealed.push_back(seal(partition, topic, index, &stamp));
                }
            }
        }
        Ok(counts)
    }

    /// Before KIP-890 the coordinator was told which partitions take part.
    fn join(&mut self, producer: Producer, deadline: Instant) -> Result<(), CallError> {
        const DOING: &str = "adding output partitions to the transaction";
        let mut partitions: BTreeMap<usize, BTreeSet<i32>> = BTreeMap::new();
        for batch in &self.sealed {
            partitions.entry(batch.topic).or_default().insert(batch.partition as i32);
        }
        if partitions.is_empty() {
            return Ok(());
        }
        let topics = partitions.into_iter().map(|(topic, partitions)| {
            AddPartitionsToTxnTopic::default()
                .with_name(self.output_name(topic))
                .with_partitions(partitions.into_iter().collect())
        });
        let request = AddPartitionsToTxnRequest::default()
            .with_v3_and_below_transactional_id(TransactionalId::from(self.names.transactional_id.clone()))
            .with_v3_and_below_producer_id(ProducerId(producer.id))
            .with_v3_and_below_producer_epoch(producer.epoch)
            .with_v3_and_below_topics(topics.collect());
        let what = Coordinated::Transaction;
        // Where one partition is refused, the others were not attempted: the refusal counts.
        let not_attempted = ResponseError::OperationNotAttempted.code();
        self.ask(what, &request, ADD_PARTITIONS_VERSIONS, deadline, DOING, |answer| {
            let codes = answer.results_by_topic_v3_and_below.iter().flat_map(|t| &t.results_by_partition);
            let codes = codes.map(|p| p.partition_error_code).filter(|code| *code != 0);
            codes.min_by_key(|code| *code == not_attempted).unwrap_or(0)
        })?;
        self.has_joined = true;
        Ok(())
    }

    fn output_name(&self, topic: usize) -> TopicName {
        TopicName::from(self.names.outputs.get(topic).cloned().unwrap_or_default())
    }

    /// Sends all batches. Each request holds at most one batch of a partition; the next of the same partition goes
    /// when the answer is there, for their order is what their numbers tell the broker.
    fn deliver(&mut self, deadline: Instant) -> Result<(), CallError> {
        let mut pause = Pause::new();
        while !self.sealed.is_empty() {
            let requests = next_requests(&mut self.sealed);
            let refused = self.exchange(&requests, deadline)?;
            let mut again = Vec::new();
            for batch in requests.into_values().flatten() {
                match refused.get(&(batch.topic, batch.partition)) {
                    None => self.reuse(batch.bytes),
                    // The coordinator still has to do with the transaction before.
                    Some(ResponseError::ConcurrentTransactions) if Instant::now() < deadline => {
                        again.push(batch);
                    }
                    Some(code) => return Err(self.refusal(&batch, *code)),
                }
            }
            if !again.is_empty() {
                again.into_iter().for_each(|batch| self.sealed.push_front(batch));
                pause.wait();
            }
        }
        // Not before: whatever fails until here leads to another epoch, or was never sent.
        for partition in self.outputs.iter_mut().flatten() {
            partition.sequence = partition.drafted;
        }
        Ok(())
    }

    fn refusal(&self, batch: &Sealed, code: ResponseError) -> CallError {
        let topic = self.names.outputs.get(batch.topic).map_or_else(String::new, StrBytes::to_string);
        CallError::Output { topic, partition: batch.partition, code }
    }

    /// All requests out, then all answers in; the codes of what was refused.
    fn exchange(
        &mut self,
        requests: &BTreeMap<BrokerId, Vec<Sealed>>,
        deadline: Instant,
    ) -> Result<BTreeMap<(usize, usize), ResponseError>, CallError> {
        const DOING: &str = "producing";
        let mut failed = None;
        let mut sent: Vec<(BrokerId, Sent<ProduceRequest>)> = Vec::with_capacity(requests.len());
        for (leader, batches) in requests {
            match self.send_to(*leader, batches, deadline) {
                Ok(request) => sent.push((*leader, request)),
                Err(error) => {
                    self.cluster.drop_connection(*leader);
                    failed = Some(error);
                    break;
                }
            }
        }
        // Of the others the answers are waited for also where one broker failed: an abort must not overtake what is
        // still on its way to them.
        let mut refused = BTreeMap::new();
        for (leader, request) in sent {
            let answer =
                self.cluster.connection_in_use(leader).and_then(|c| c.receive(request, deadline, DOING));
            let expected = requests.get(&leader).map_or(0, Vec::len);
            let taken = answer.and_then(|answer| match self.take_codes(&answer, &mut refused) == expected {
                true => Ok(()),
                false => Err(CallError::Foreign(format!("{DOING}: the answer is not about all partitions"))),
            });
            if let Err(error) = taken {
                self.has_unanswered = true;
                self.cluster.drop_connection(leader);
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(refused), Err)
    }

    fn send_to(
        &mut self,
        leader: BrokerId,
        batches: &[Sealed],
        deadline: Instant,
    ) -> Result<Sent<ProduceRequest>, CallError> {
        let request = self.request_of(batches, deadline);
        let [version_min, version_max] = self.versions(PRODUCE_VERSIONS);
        let connection = self.cluster.connection(leader, deadline)?;
        let version = connection.version_of::<ProduceRequest>(version_min, version_max)?;
        self.has_begun = true;
        let sent = connection.send_records(&request, version, deadline, "producing");
        self.has_unanswered |= sent.is_err();
        sent
    }

    fn request_of(&self, batches: &[Sealed], deadline: Instant) -> ProduceRequest {
        let mut topics: BTreeMap<usize, Vec<PartitionProduceData>> = BTreeMap::new();
        for batch in batches {
            let data = PartitionProduceData::default()
                .with_index(batch.partition as i32)
                .with_records(Some(batch.bytes.clone()));
            topics.entry(batch.topic).or_default().push(data);
        }
        let topics = topics.into_iter().map(|(topic, data)| {
            TopicProduceData::default().with_name(self.output_name(topic)).with_partition_data(data)
        });
        let left = deadline.saturating_duration_since(Instant::now());
        ProduceRequest::default()
            .with_transactional_id(Some(TransactionalId::from(self.names.transactional_id.clone())))
            .with_acks(-1)
            .with_timeout_ms(i32::try_from(left.as_millis()).unwrap_or(i32::MAX))
            .with_topic_data(topics.collect())
    }

    /// Notes what was refused; how many partitions the answer is about.
    fn take_codes(
        &self,
        answer: &ProduceResponse,
        refused: &mut BTreeMap<(usize, usize), ResponseError>,
    ) -> usize {
        let mut count = 0;
        for topic in &answer.responses {
            let Some(index) = self.names.outputs.iter().position(|name| *name == topic.name.0) else {
                continue;
            };
            for partition in &topic.partition_responses {
                count += 1;
                if let Some(code) = ResponseError::try_from_code(partition.error_code) {
                    refused.insert((index, usize::try_from(partition.index).unwrap_or(usize::MAX)), code);
                }
            }
        }
        count
    }

    fn reuse(&mut self, bytes: Bytes) {
        let held: usize = self.spare.iter().map(Vec::capacity).sum();
        if held + bytes.len() <= SPARE_BYTES_MAX
            && let Ok(mut memory) = bytes.try_into_mut()
        {
            memory.clear();
            self.spare.push(memory.into());
        }
    }

    fn commit_offsets(
        &mut self,
        producer: Producer,
        publication: &Publication,
        group: &GroupMetadata,
        deadline: Instant,
    ) -> Result<(), CallError> {
        const DOING: &str = "adding the group's offsets to the transaction";
        if !self.joins_by_itself {
            let request = AddOffsetsToTxnRequest::default()
                .with_transactional_id(TransactionalId::from(self.names.transactional_id.clone()))
                .with_producer_id(ProducerId(producer.id))
                .with_producer_epoch(producer.epoch)
                .with_group_id(GroupId::from(self.names.group_id.clone()));
            let what = Coordinated::Transaction;
            self.ask(what, &request, ADD_OFFSETS_VERSIONS, deadline, DOING, |a| a.error_code)?;
            self.has_joined = true;
        }
        let partitions = publication.offsets(&self.settings.identity).map(|(partition, position, mark)| {
            TxnOffsetCommitRequestPartition::default()
                .with_partition_index(partition.0)
                .with_committed_offset(position.0)
                .with_committed_metadata(Some(StrBytes::from_string(mark)))
        });
        let topic = TxnOffsetCommitRequestTopic::default()
            .with_name(TopicName::from(self.names.input_topic.clone()))
            .with_partitions(partitions.collect());
        let request = TxnOffsetCommitRequest::default()
            .with_transactional_id(TransactionalId::from(self.names.transactional_id.clone()))
            .with_group_id(GroupId::from(self.names.group_id.clone()))
            .with_producer_id(ProducerId(producer.id))
            .with_producer_epoch(producer.epoch)
            .with_generation_id(group.generation())
            .with_member_id(StrBytes::from_string(group.member_id()))
            .with_group_instance_id(Some(self.names.instance_id.clone()))
            .with_topics(vec![topic]);
        let versions = self.versions(OFFSETS_VERSIONS);
        self.ask(Coordinated::Group, &request, versions, deadline, DOING, |answer| {
            let codes = answer.topics.iter().flat_map(|t| &t.partitions).map(|p| p.error_code);
            codes.into_iter().find(|code| *code != 0).unwrap_or(0)
        })?;
        Ok(())
    }

    /// `EndTxn`. Answered once the coordinator has decided; the markers follow.
    fn end(&mut self, producer: Producer, is_commit: bool, deadline: Instant) -> Result<(), CallError> {
        let doing = if is_commit { "commit_transaction" } else { "abort_transaction" };
        let request = EndTxnRequest::default()
            .with_transactional_id(TransactionalId::from(self.names.transactional_id.clone()))
            .with_producer_id(ProducerId(producer.id))
            .with_producer_epoch(producer.epoch)
            .with_committed(is_commit);
        let versions = self.versions(END_VERSIONS);
        self.was_broken = false;
        let answer =
            self.ask(Coordinated::Transaction, &request, versions, deadline, doing, |a| a.error_code)?;
        if self.joins_by_itself && answer.producer_id.0 >= 0 {
            self.take_up(Producer { id: answer.producer_id.0, epoch: answer.producer_epoch });
        } else if self.joins_by_itself
            // A request whose answer was lost may still lie somewhere, and would end the next transaction, too: it has
            // the same epoch.
            || (self.was_broken && is_commit && self.take_id(Some(producer), deadline).is_err())
        {
            self.producer = None;
        }
        Ok(())
    }

    /// The commit failed: only where the coordinator asks for it, it is certain that it did not take place.
    fn not_committed(&mut self, producer: Producer, error: &CallError, deadline: Instant) -> PublishFailure {
        if error.code() == Some(ResponseError::TransactionAbortable) {
            return self.abort(producer, error, deadline);
        }
        self.unknown(error.to_string())
    }

    /// A broker that has not yet heard of a partition says the same as all of them do of one that is gone.
    fn missing(&mut self, error: &CallError) -> PublishFailure {
        let (class, message) = match self.ask_leaders(Instant::now() + MISSING_TIMEOUT) {
            Err(topic @ CallError::Topic { .. }) => (topic.class(), topic.to_string()),
            Ok(()) | Err(_) => (FailureClass::Passing, error.to_string()),
        };
        self.leaders_at = None;
        PublishFailure::Aborted { class, message }
    }

    /// Otherwise somebody has ended it, and perhaps by a commit.
    fn was_never_there(&self) -> bool {
        !self.joins_by_itself && !self.has_joined && !self.has_asked_to_commit
    }

    fn unknown(&mut self, message: String) -> PublishFailure {
        self.producer = None;
        PublishFailure::Unknown(message)
    }

    /// Aborts the open transaction; only when that succeeded is it certain that nothing is visible.
    fn abort(&mut self, producer: Producer, error: &CallError, deadline: Instant) -> PublishFailure {
        self.leaders_at = None;
        // In older transactions an abort does not change the epoch, and a broker would take what comes late for a part of
        // the next one; a new producer's markers fence it.
        let may_come_late = self.has_unanswered && !self.joins_by_itself;
        if self.producer.is_none() || may_come_late || error.code().is_some_and(is_fenced) {
            return self.unknown(error.to_string());
        }
        if self.has_begun {
            // The lane does not wait much longer.
            let deadline = (Instant::now() + INIT_TIMEOUT).min(deadline + ABORT_TIMEOUT_MIN);
            let aborted = match self.end(producer, false, deadline) {
                Ok(()) if self.joins_by_itself => Ok(()),
                // Of some batches it is not known whether the broker has them, and so what number is next.
                Ok(()) => self.take_id(Some(producer), deadline),
                // Nothing had joined it yet, so there was none.
                Err(error)
                    if error.code() == Some(ResponseError::InvalidTxnState) && self.was_never_there() =>
                {
                    self.take_id(Some(producer), deadline)
                }
                Err(error) => Err(error),
            };
            if let Err(failed) = aborted {
                return self.unknown(format!("{error}; {failed}"));
            }
        }
        let missing = ResponseError::UnknownTopicOrPartition;
        if matches!(error, CallError::Output { code, .. } | CallError::Refused { code, .. } if *code == missing)
        {
            return self.missing(error);
        }
        let message = error.to_string();
        match error.class() {
            FailureClass::Fenced => PublishFailure::Fenced(message),
            class => PublishFailure::Aborted { class, message },
        }
    }
}

/// Takes of each partition the first batch that is left, as far as a request to its leader holds them.
fn next_requests(sealed: &mut VecDeque<Sealed>) -> BTreeMap<BrokerId, Vec<Sealed>> {
    let mut requests: BTreeMap<BrokerId, Vec<Sealed>> = BTreeMap::new();
    let mut sizes: BTreeMap<BrokerId, usize> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut later = VecDeque::new();
    for batch in sealed.drain(..) {
        let size = sizes.entry(batch.leader).or_default();
        let fits = *size == 0 || *size + batch.bytes.len() <= REQUEST_BYTES_MAX;
        // What does not fit holds up its successors, or they would overtake it.
        if seen.insert((batch.topic, batch.partition)) && fits {
            *size += batch.bytes.len();
            requests.entry(batch.leader).or_default().push(batch);
        } else {
            later.push_back(batch);
        }
    }
    *sealed = later;
    requests
}

/// Writes an output into the batch of its partition, after that was sealed if it is full.
fn place(
    outputs: &mut [Vec<OutputPartition>],
    sealed: &mut VecDeque<Sealed>,
    spare: &mut Vec<Vec<u8>>,
    keyless: &mut usize,
    batch_bytes_max: usize,
    stamp: &Stamp,
    output: &Output<'_>,
) -> Result<(), CallError> {
    let topic = output.topic.index();
    let partitions = outputs.get_mut(topic).map(Vec::as_mut_slice).unwrap_or_default();
    let index = match output.key {
        Some(key) => partition_of_key(key, partitions.len()),
        None => {
            *keyless = keyless.wrapping_add(1);
            *keyless % partitions.len().max(1)
        }
    };
    let unknown =
        CallError::Refused { doing: "writing an output", code: ResponseError::UnknownTopicOrPartition };
    let Some(partition) = partitions.get_mut(index) else { return Err(unknown) };
    let bytes_max = RecordBatch::record_bytes_max(output.key, output.value, output.headers);
    if !partition.batch.is_empty() && partition.batch.len() + bytes_max > batch_bytes_max {
        sealed.push_back(seal(partition, topic, index, stamp));
    }
    if partition.batch.is_empty() {
        partition.batch = RecordBatch::in_memory(spare.pop().unwrap_or_default());
    }
    partition.batch.push(output.key, output.value, output.headers);
    Ok(())
}

fn seal(partition: &mut OutputPartition, topic: usize, index: usize, stamp: &Stamp) -> Sealed {
    let batch = std::mem::take(&mut partition.batch);
    let stamp = Stamp { sequence: partition.drafted, ..*stamp };
    partition.drafted = sequence_after(partition.drafted, batch.count());
    Sealed { topic, partition: index, leader: partition.leader, bytes: batch.seal(&stamp) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn batches_of_a_partition_go_one_by_one_in_their_order(
            batches in proptest::collection::vec((0_usize..4, 0_usize..3, 1_usize..9), 1..60),
        ) {
            // GIVEN batches of partitions on three brokers, each with its place among them; the largest ones
            // come to more than a request of a broker takes
            let mut sealed: VecDeque<Sealed> = batches
                .iter()
                .map(|(partition, topic, size)| Sealed {
                    topic: *topic,
                    partition: *partition,
                    leader: *partition as BrokerId % 3,
                    bytes: Bytes::from(vec![0; size * (REQUEST_BYTES_MAX / 16)]),
                })
                .collect();
            let mut expected: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
            for (partition, topic, size) in &batches {
                expected.entry((*topic, *partition)).or_default().push(size * (REQUEST_BYTES_MAX / 16));
            }
            // WHEN they are sent
            let mut found: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
            while !sealed.is_empty() {
                let requests = next_requests(&mut sealed);
                prop_assert!(!requests.is_empty(), "it goes on");
                for (leader, batches) in requests {
                    let bytes: usize = batches.iter().map(|batch| batch.bytes.len()).sum();
                    prop_assert!(batches.len() == 1 || bytes <= REQUEST_BYTES_MAX);
                    let mut seen = BTreeSet::new();
                    for batch in batches {
                        prop_assert_eq!(batch.leader, leader);
                        prop_assert!(seen.insert((batch.topic, batch.partition)), "two in one request");
                        found.entry((batch.topic, batch.partition)).or_default().push(batch.bytes.len());
                    }
                }
            }
            // THEN each of them has gone, in the order of its partition
            prop_assert_eq!(found, expected);
        }
    }
}
