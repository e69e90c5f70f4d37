//! A proxy in front of a broker that can drop one request or its response, or refuse one.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::produce_response::{PartitionProduceResponse, TopicProduceResponse};
use kafka_protocol::messages::{
    ApiKey, FindCoordinatorResponse, MetadataResponse, ProduceRequest, ProduceResponse, RequestHeader,
    ResponseHeader,
};
use kafka_protocol::protocol::{Decodable, Encodable, StrBytes};

/// What is dropped; the connection is closed, too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lost {
    /// The broker never receives the request.
    Request,
    /// The broker processes the request, and the response is dropped.
    Answer,
    /// The broker never receives the request, and for this long nobody reaches it.
    Everything(Duration),
    /// The connection stays open, and the broker never receives this request to produce: the response is
    /// NOT_LEADER_OR_FOLLOWER. It is sent once the next request has arrived, which the broker does receive. So it
    /// is when a broker learns between the two that it leads the partition.
    Refused,
}

type Trap = Arc<Mutex<Option<(ApiKey, Lost)>>>;

/// Until when nobody reaches the broker, and the connections to be closed then.
#[derive(Default)]
struct Outage {
    until: Option<Instant>,
    open: Vec<TcpStream>,
}

impl Outage {
    fn is_on(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }

    fn begin(&mut self, length: Duration) {
        self.until = Some(Instant::now() + length);
        for connection in self.open.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

/// Proxy for the only broker of a cluster: responses that name the broker name the proxy instead.
pub struct KafkaProxy {
    port: u16,
    trap: Trap,
}

impl KafkaProxy {
    /// A proxy to `broker`, host and port. It runs until the process exits.
    pub fn to(broker: &str) -> KafkaProxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (trap, broker) = (Trap::default(), broker.to_owned());
        let set = Arc::clone(&trap);
        thread::spawn(move || {
            let outage = Arc::new(Mutex::new(Outage::default()));
            for client in listener.incoming().flatten() {
                let (broker, trap, outage) = (broker.clone(), Arc::clone(&set), Arc::clone(&outage));
                {
                    let mut outage = outage.lock().unwrap();
                    if outage.is_on() {
                        continue;
                    }
                    outage.open.extend(client.try_clone());
                }
                // Any error closes this connection, as on a network.
                thread::spawn(move || {
                    TcpStream::connect(&broker).and_then(|b| serve(client, b, port, &trap, &outage))
                });
            }
        });
        KafkaProxy { port, trap }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Applies this loss to the next request of this kind.
    pub fn lose(&self, api: ApiKey, lost: Lost) {
        *self.trap.lock().unwrap() = Some((api, lost));
    }

    /// Whether the loss has happened.
    pub fn has_lost(&self) -> bool {
        self.trap.lock().unwrap().is_none()
    }
}

fn serve(
    mut client: TcpStream,
    mut broker: TcpStream,
    port: u16,
    trap: &Trap,
    outage: &Mutex<Outage>,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    broker.set_nodelay(true)?;
    loop {
        let request = read_frame(&mut client)?;
        let mut head = request.clone();
        let (api, version) = (head.get_i16(), head.get_i16());
        let api = ApiKey::try_from(api).map_err(|()| io::Error::other("an unknown request"))?;
        let lost = trap.lock().unwrap().take_if(|(wanted, _)| *wanted == api).map(|(_, lost)| lost);
        if lost == Some(Lost::Request) {
            return Ok(());
        }
        if let Some(Lost::Everything(length)) = lost {
            outage.lock().unwrap().begin(length);
            return Ok(());
        }
        if lost == Some(Lost::Refused) {
            let next = read_frame(&mut client)?;
            write_frame(&mut client, &refused(request)?)?;
            write_frame(&mut broker, &next)?;
            write_frame(&mut client, &read_frame(&mut broker)?)?;
            continue;
        }
        write_frame(&mut broker, &request)?;
        let answer = read_frame(&mut broker)?;
        if lost == Some(Lost::Answer) {
            return Ok(());
        }
        write_frame(&mut client, &named(answer, api, version, port)?)?;
    }
}

fn read_frame(from: &mut TcpStream) -> io::Result<Bytes> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    from.read_exact(&mut frame)?;
    Ok(frame.into())
}

fn write_frame(to: &mut TcpStream, frame: &[u8]) -> io::Result<()> {
    to.write_all(&(frame.len() as u32).to_be_bytes())?;
    to.write_all(frame)
}

/// The response to a request to produce that no partition takes.
fn refused(mut request: Bytes) -> io::Result<Bytes> {
    const NOT_LEADER_OR_FOLLOWER: i16 = 6;
    let (version, mut out) = (request.slice(2..4).get_i16(), BytesMut::new());
    let encoded = (|| {
        let head = RequestHeader::decode(&mut request, ApiKey::Produce.request_header_version(version))?;
        let request = ProduceRequest::decode(&mut request, version)?;
        let topic = |topic: TopicProduceData| {
            let partition = |data: &PartitionProduceData| {
                PartitionProduceResponse::default()
                    .with_index(data.index)
                    .with_error_code(NOT_LEADER_OR_FOLLOWER)
                    .with_base_offset(-1)
            };
            TopicProduceResponse::default()
                .with_partition_responses(topic.partition_data.iter().map(partition).collect())
                .with_name(topic.name)
        };
        let answer =
            ProduceResponse::default().with_responses(request.topic_data.into_iter().map(topic).collect());
        ResponseHeader::default()
            .with_correlation_id(head.correlation_id)
            .encode(&mut out, ApiKey::Produce.response_header_version(version))?;
        answer.encode(&mut out, version)
    })();
    encoded.map_err(|error| io::Error::other(error.to_string()))?;
    Ok(out.freeze())
}

/// The response, with the broker's port replaced by the proxy's.
fn named(answer: Bytes, api: ApiKey, version: i16, port: u16) -> io::Result<Bytes> {
    let (mut rest, mut out) = (answer.clone(), BytesMut::new());
    let header_version = api.response_header_version(version);
    let renamed = (|| {
        let header = ResponseHeader::decode(&mut rest, header_version)?;
        header.encode(&mut out, header_version)?;
        match api {
            ApiKey::Metadata => {
                let mut answer = MetadataResponse::decode(&mut rest, version)?;
                answer.brokers.iter_mut().for_each(|broker| broker.port = i32::from(port));
                answer.encode(&mut out, version)
            }
            ApiKey::FindCoordinator => {
                let mut answer = FindCoordinatorResponse::decode(&mut rest, version)?;
                answer.port = i32::from(port);
                answer.host = StrBytes::from_static_str("127.0.0.1");
                answer.coordinators.iter_mut().for_each(|found| found.port = i32::from(port));
                answer.encode(&mut out, version)
            }
            _ => {
                out = BytesMut::from(&answer[..]);
                Ok(())
            }
        }
    })();
    renamed.map_err(|error| io::Error::other(error.to_string()))?;
    Ok(out.freeze())
}
