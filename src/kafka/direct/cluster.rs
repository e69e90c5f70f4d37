//! Where things are in the cluster: brokers, leaders of output partitions, coordinators; and connections to them.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{FindCoordinatorRequest, MetadataRequest, MetadataResponse, TopicName};
use kafka_protocol::protocol::StrBytes;

use super::connection::{CallError, Connection, checked};
use super::transport::Transport;
use crate::disposition::FailureClass;

/// Kafka's usual port, for a server that is named without one.
const PORT: u16 = 9092;
/// One broker that does not answer must not use up the time in which another would have.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A broker's number within the cluster.
pub type BrokerId = i32;

/// What has a coordinator.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Coordinated {
    /// The consumer group.
    Group,
    /// The transactional id.
    Transaction,
}

/// Whom to ask for what.
pub struct Cluster {
    transport: Transport,
    client_id: StrBytes,
    bootstrap: VecDeque<(String, u16)>,
    brokers: HashMap<BrokerId, (String, u16)>,
    connections: HashMap<BrokerId, Connection>,
    coordinators: HashMap<Coordinated, BrokerId>,
}

/// Reads `host:port,host:port` as librdkafka does: a protocol in front is passed over, a port may be left out.
fn servers(list: &str) -> VecDeque<(String, u16)> {
    let server = |text: &str| {
        let text = text.trim();
        let text = text.split_once("://").map_or(text, |(_, rest)| rest);
        let (host, port) = match text.rsplit_once(':') {
            // An IPv6 address in brackets, or without a port.
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().ok()?),
            _ => (text, PORT),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        (!host.is_empty()).then(|| (host.to_owned(), port))
    };
    list.split(',').filter_map(server).collect()
}

impl Cluster {
    /// A cluster that is reached by these servers; nothing is asked yet.
    pub fn new(transport: Transport, client_id: &str, bootstrap_servers: &str) -> Self {
        Self {
            transport,
            client_id: StrBytes::from_string(client_id.to_owned()),
            bootstrap: servers(bootstrap_servers),
            brokers: HashMap::new(),
            connections: HashMap::new(),
            coordinators: HashMap::new(),
        }
    }

    fn open(&self, host: &str, port: u16, deadline: Instant) -> Result<Connection, CallError> {
        let deadline = deadline.min(Instant::now() + CONNECT_TIMEOUT);
        Connection::open(&self.transport, host, port, &self.client_id, deadline)
    }

    /// The connection to a broker, made if there is none that can be used.
    pub fn connection(&mut self, broker: BrokerId, deadline: Instant) -> Result<&mut Connection, CallError> {
        if self.connections.get(&broker).is_none_or(Connection::is_stale) {
            self.connections.remove(&broker);
            let (host, port) = self.brokers.get(&broker).ok_or(CallError::Refused {
                doing: "looking for a broker",
                code: ResponseError::BrokerNotAvailable,
            })?;
            let connection = self.open(host, *port, deadline)?;
            self.connections.insert(broker, connection);
        }
        self.connections.get_mut(&broker).ok_or_else(|| CallError::late("connecting to a broker"))
    }

    /// The connection on which a request was just sent.
    pub fn connection_in_use(&mut self, broker: BrokerId) -> Result<&mut Connection, CallError> {
        self.connections.get_mut(&broker).ok_or_else(|| CallError::late("waiting for an answer"))
    }

    /// Connections on which an answer may still come, or which broke, are of no more use.
    pub fn drop_connection(&mut self, broker: BrokerId) {
        self.connections.remove(&broker);
    }

    /// Leaders of the partitions of these topics, in their order. Asks whichever broker answers, those that are
    /// known first: they may be reachable where the first ones are gone.
    pub fn leaders(
        &mut self,
        topics: &[StrBytes],
        deadline: Instant,
    ) -> Result<Vec<Vec<BrokerId>>, CallError> {
        const DOING: &str = "asking for the output topics";
        const VERSION_MAX: i16 = 12;
        let topic =
            |name: &StrBytes| MetadataRequestTopic::default().with_name(Some(TopicName::from(name.clone())));
        let request = MetadataRequest::default()
            .with_topics(Some(topics.iter().map(topic).collect()))
            .with_allow_auto_topic_creation(false);
        let answer = self.ask_anyone(deadline, |connection, until| {
            let version = connection.version_of::<MetadataRequest>(4, VERSION_MAX)?;
            connection.call(&request, version, until, DOING)
        })?;
        self.take_brokers(&answer);
        topics
            .iter()
            .map(|name| {
                let found = answer.topics.iter().find(|t| t.name.as_ref().is_some_and(|n| n.0 == *name));
                let missing = |code| CallError::Topic { topic: name.to_string(), code };
                let Some(found) = found else { return Err(missing(ResponseError::UnknownTopicOrPartition)) };
                if let Some(code) = ResponseError::try_from_code(found.error_code) {
                    return Err(missing(code));
                }
                let mut leaders: Vec<_> =
                    found.partitions.iter().map(|p| (p.partition_index, p.leader_id.0)).collect();
                leaders.sort_unstable();
                if leaders.is_empty() {
                    return Err(missing(ResponseError::UnknownTopicOrPartition));
                }
                Ok(leaders.into_iter().map(|(_, leader)| leader).collect())
            })
            .collect()
    }

    fn take_brokers(&mut self, answer: &MetadataResponse) {
        let known: HashMap<_, _> = answer
            .brokers
            .iter()
            .filter_map(|b| Some((b.node_id.0, (b.host.to_string(), u16::try_from(b.port).ok()?))))
            .collect();
        // A broker that was fenced for a moment answers that there are none: what was known serves on.
        if known.is_empty() {
            return;
        }
        // A broker may have moved.
        self.connections.retain(|id, _| known.get(id) == self.brokers.get(id));
        self.brokers = known;
    }

    /// Asks one broker after the other, each for its share of the time: one that hangs, or a host that swallows
    /// everything, must not keep us from those behind it.
    fn ask_anyone<T>(
        &mut self,
        deadline: Instant,
        mut ask: impl FnMut(&mut Connection, Instant) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        let mut known: Vec<_> = self.brokers.keys().copied().collect();
        // Those that are connected answer soonest.
        known.sort_unstable_by_key(|id| !self.connections.contains_key(id));
        let mut untried = known.len() + self.bootstrap.len();
        let mut share = || {
            let now = Instant::now();
            let left =
                deadline.saturating_duration_since(now) / u32::try_from(untried.max(1)).unwrap_or(u32::MAX);
            untried = untried.saturating_sub(1);
            now + left.min(CONNECT_TIMEOUT)
        };
        let mut failed: Option<CallError> = None;
        let mut note = |error: CallError| {
            // What a person has to mend is told, whatever else went wrong.
            let keeps = failed.as_ref().is_some_and(|f| f.class() == FailureClass::Systemic);
            if !keeps {
                failed = Some(error);
            }
        };
        for broker in known {
            let until = share();
            match self.connection(broker, until).and_then(|connection| ask(connection, until)) {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    self.drop_connection(broker);
                    note(error);
                }
            }
        }
        for _ in 0..self.bootstrap.len() {
            let until = share();
            let Some((host, port)) = self.bootstrap.front() else { break };
            match self.open(host, *port, until).and_then(|mut connection| ask(&mut connection, until)) {
                Ok(answer) => return Ok(answer),
                Err(error) => note(error),
            }
            // The next one to begin with, also the next time.
            self.bootstrap.rotate_left(1);
        }
        Err(failed.unwrap_or_else(|| CallError::late("looking for a broker")))
    }

    /// The coordinator of `what`, which is called `key`.
    pub fn coordinator(
        &mut self,
        what: Coordinated,
        key: &StrBytes,
        deadline: Instant,
    ) -> Result<BrokerId, CallError> {
        const DOING: &str = "looking for a coordinator";
        // The last one that asks for one key; brokers know it still.
        const VERSION_MAX: i16 = 3;
        if let Some(broker) = self.coordinators.get(&what) {
            return Ok(*broker);
        }
        let key_type = match what {
            Coordinated::Group => 0,
            Coordinated::Transaction => 1,
        };
        let request = FindCoordinatorRequest::default().with_key(key.clone()).with_key_type(key_type);
        let answer = self.ask_anyone(deadline, |connection, until| {
            let version = connection.version_of::<FindCoordinatorRequest>(1, VERSION_MAX)?;
            connection.call(&request, version, until, DOING)
        })?;
        checked(DOING, answer.error_code)?;
        let broker = answer.node_id.0;
        let port = u16::try_from(answer.port).map_err(|e| CallError::Foreign(format!("{DOING}: {e}")))?;
        let address = (answer.host.to_string(), port);
        if self.brokers.get(&broker) != Some(&address) {
            self.connections.remove(&broker);
            self.brokers.insert(broker, address);
        }
        self.coordinators.insert(what, broker);
        Ok(broker)
    }

    /// The coordinator has moved: the next request looks for it anew.
    pub fn forget_coordinator(&mut self, what: Coordinated) {
        self.coordinators.remove(&what);
    }

    /// The coordinator is away, or answers no more: so is its connection.
    pub fn drop_coordinator(&mut self, what: Coordinated) {
        if let Some(broker) = self.coordinators.remove(&what) {
            self.drop_connection(broker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_as_librdkafka_reads_them() {
        let found = servers("a:1, b ,SSL://c:3,[::1]:4,[::2],::3,,PLAINTEXT://d");
        let expected =
            [("a", 1), ("b", PORT), ("c", 3), ("::1", 4), ("::2", PORT), ("::3", PORT), ("d", PORT)];
        assert_eq!(found, expected.map(|(host, port)| (host.to_owned(), port)));
    }
}
