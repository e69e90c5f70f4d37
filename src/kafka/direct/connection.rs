//! One connection to a broker: requests out, answers in, each within a deadline.
//!
//! Blocking, like the thread that uses it. Any error ends the connection: the next request opens another.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::{
    ApiKey, ApiVersionsRequest, ProduceRequest, RequestHeader, ResponseHeader, SaslAuthenticateRequest,
    SaslHandshakeRequest,
};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes, VersionRange};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};

use super::produce;
use super::sasl::Step;
use super::transport::{Stream, Transport};
use crate::disposition::{FailureClass, class_of_kafka};

/// A longer answer is none of ours: they name partitions and hold codes.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Whatever lies between us and the broker may forget a connection that is not used, without a word to either.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// Rounds of a SASL exchange; the longest that we know takes three.
const SASL_ROUNDS_MAX: usize = 8;
/// The feature that decides how partitions join a transaction (KIP-890).
const TRANSACTION_VERSION: &str = "transaction.version";

/// Why a broker did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection broke, or no answer came in time: it may have been done.
    #[error("{doing}: {error}")]
    Broken {
        /// What was asked.
        doing: &'static str,
        /// What happened.
        error: io::Error,
    },
    /// The broker says no.
    #[error("{doing}: {code}")]
    Refused {
        /// What was asked.
        doing: &'static str,
        /// Its error code.
        code: ResponseError,
    },
    /// An output topic is not there, or not for us.
    #[error(
        "output topic {topic} does not exist or cannot be used ({code}); payment-writer topics create makes it"
    )]
    Topic {
        /// Its name.
        topic: String,
        /// The broker's error code.
        code: ResponseError,
    },
    /// A batch of records was refused.
    #[error("producing to output topic {topic}, partition {partition}: {code}")]
    Output {
        /// Its topic.
        topic: String,
        /// Its partition.
        partition: usize,
        /// The broker's error code.
        code: ResponseError,
    },
    /// The broker does not know us, for the reason that is given.
    #[error("authentication failed: {0}")]
    Stranger(String),
    /// The broker speaks otherwise.
    #[error("{0}")]
    Foreign(String),
}

impl CallError {
    /// Nothing but time has passed.
    pub fn late(doing: &'static str) -> Self {
        Self::Broken { doing, error: io::Error::new(io::ErrorKind::TimedOut, "no answer in time") }
    }

    /// The broker's code, if it gave one.
    pub fn code(&self) -> Option<ResponseError> {
        match self {
            Self::Refused { code, .. } | Self::Topic { code, .. } | Self::Output { code, .. } => Some(*code),
            Self::Broken { .. } | Self::Stranger(_) | Self::Foreign(_) => None,
        }
    }

    /// What to do about it.
    pub fn class(&self) -> FailureClass {
        match self {
            // A certificate that is refused does not get better by itself.
            Self::Broken { error, .. } if error.kind() == io::ErrorKind::InvalidData => {
                FailureClass::Systemic
            }
            Self::Broken { .. } => FailureClass::Passing,
            Self::Refused { code, .. } | Self::Topic { code, .. } | Self::Output { code, .. } => match code {
                // librdkafka has no name for it.
                ResponseError::TransactionAbortable => FailureClass::Passing,
                code => class_of_kafka(native(*code)),
            },
            Self::Stranger(_) | Self::Foreign(_) => FailureClass::Systemic,
        }
    }
}

/// The same code as the client library has it.
fn native(code: ResponseError) -> RDKafkaErrorCode {
    RDKafkaRespErr::try_from(i32::from(code.code())).map_or(RDKafkaErrorCode::Unknown, RDKafkaErrorCode::from)
}

/// An answer's error code as a result.
pub fn checked(doing: &'static str, code: i16) -> Result<(), CallError> {
    match ResponseError::try_from_code(code) {
        None => Ok(()),
        Some(code) => Err(CallError::Refused { doing, code }),
    }
}

fn foreign(doing: &str, error: impl std::fmt::Display) -> CallError {
    CallError::Foreign(format!("{doing}: {error}"))
}

/// A request that was sent, and whose answer is yet to come.
#[must_use]
pub struct Sent<R> {
    correlation_id: i32,
    version: i16,
    request: std::marker::PhantomData<R>,
}

/// A connection that can be used.
pub struct Connection {
    stream: Stream,
    client_id: StrBytes,
    correlation_id: i32,
    versions: Vec<(i16, VersionRange)>,
    transaction_version: i16,
    /// The broker ends the session some time after this.
    expires: Option<Instant>,
    out: BytesMut,
    used_at: Instant,
}

impl Connection {
    /// Connects, asks what the broker can do, and authenticates.
    pub fn open(
        transport: &Transport,
        host: &str,
        port: u16,
        client_id: &StrBytes,
        deadline: Instant,
    ) -> Result<Self, CallError> {
        let stream = transport
            .connect(host, port, deadline)
            .map_err(|error| CallError::Broken { doing: "connecting to a broker", error })?;
        let mut connection = Self {
            stream,
            client_id: client_id.clone(),
            correlation_id: 0,
            versions: Vec::new(),
            transaction_version: 0,
            expires: None,
            out: BytesMut::new(),
            used_at: Instant::now(),
        };
        connection.ask_versions(deadline)?;
        connection.authenticate(transport, deadline)?;
        Ok(connection)
    }

    fn ask_versions(&mut self, deadline: Instant) -> Result<(), CallError> {
        const DOING: &str = "asking for the broker's versions";
        // Of 2019 and later, like all that transactions with a group's generation need (KIP-447: Kafka 2.5).
        const VERSION: i16 = 3;
        let request = ApiVersionsRequest::default()
            .with_client_software_name(StrBytes::from_static_str(env!("CARGO_PKG_NAME")))
            .with_client_software_version(StrBytes::from_static_str(env!("CARGO_PKG_VERSION")));
        let sent = self.send(&request, VERSION, deadline, DOING)?;
        let answer = self.receive(sent, deadline, DOING)?;
        checked(DOING, answer.error_code)?;
        self.versions = answer
            .api_keys
            .iter()
            .map(|api| (api.api_key, VersionRange { min: api.min_version, max: api.max_version }))
            .collect();
        self.transaction_version = answer
            .finalized_features
            .iter()
            .find(|feature| feature.name.as_str() == TRANSACTION_VERSION)
            .map_or(0, |feature| feature.max_version_level);
        Ok(())
    }

    fn authenticate(&mut self, transport: &Transport, deadline: Instant) -> Result<(), CallError> {
        const DOING: &str = "authenticating";
        let Some(mut exchange) = transport.authenticator() else { return Ok(()) };
        let stranger = |error: &dyn std::fmt::Display| CallError::Stranger(error.to_string());
        let mechanism = StrBytes::from_static_str(exchange.mechanism());
        let answer =
            self.call(&SaslHandshakeRequest::default().with_mechanism(mechanism), 1, deadline, DOING)?;
        if let Some(code) = ResponseError::try_from_code(answer.error_code) {
            return Err(stranger(&code));
        }
        let mut message = exchange.first().map_err(|e| stranger(&e))?;
        for _ in 0..SASL_ROUNDS_MAX {
            let request = SaslAuthenticateRequest::default().with_auth_bytes(Bytes::from(message));
            let answer = self.call(&request, 1, deadline, DOING)?;
            if let Some(code) = ResponseError::try_from_code(answer.error_code) {
                let said = answer.error_message.as_ref().map_or("", StrBytes::as_str);
                return Err(CallError::Stranger(format!("{code} {said}")));
            }
            if answer.session_lifetime_ms > 0 {
                // The broker closes connections that are not authenticated again in time (KIP-368); another
                // connection is made well before that.
                let lifetime = Duration::from_millis(answer.session_lifetime_ms.unsigned_abs());
                self.expires = Some(Instant::now() + lifetime / 2);
            }
            match exchange.next(&answer.auth_bytes).map_err(|e| stranger(&e))? {
                Step::Send(next) => message = next,
                Step::Done => return Ok(()),
            }
        }
        Err(CallError::Stranger("the exchange does not end".to_owned()))
    }

    /// Not to be used any more: closed by the broker, or soon to be.
    pub fn is_stale(&self) -> bool {
        self.expires.is_some_and(|at| at <= Instant::now())
            || self.used_at.elapsed() > IDLE_MAX
            || self.stream.is_stale()
    }

    /// The cluster's way of transactions, as this broker knows it: from 2 on partitions join by themselves.
    pub fn transaction_version(&self) -> i16 {
        self.transaction_version
    }

    /// The newest version of a request that the broker knows, from `min` to `max`.
    pub fn version_of<R: Request>(&self, min: i16, max: i16) -> Result<i16, CallError> {
        let known = self.versions.iter().find(|(key, _)| *key == R::KEY).map(|(_, range)| *range);
        let version = known.map_or(-1, |range| range.max.min(max));
        if known.is_some_and(|range| range.min.max(min) <= version) {
            return Ok(version);
        }
        let name = ApiKey::try_from(R::KEY).map_or_else(|()| R::KEY.to_string(), |key| format!("{key:?}"));
        Err(CallError::Foreign(match known {
            Some(range) => format!("the broker knows {name} in the versions {range}, not in {min}..{max}"),
            None => format!("the broker does not know {name}"),
        }))
    }

    /// One request and its answer.
    pub fn call<R>(
        &mut self,
        request: &R,
        version: i16,
        deadline: Instant,
        doing: &'static str,
    ) -> Result<R::Response, CallError>
    where
        R: Request,
    {
        let sent = self.send(request, version, deadline, doing)?;
        self.receive(sent, deadline, doing)
    }

    /// Sends a request. Answers come in the order of the requests.
    pub fn send<R: Request>(
        &mut self,
        request: &R,
        version: i16,
        deadline: Instant,
        doing: &'static str,
    ) -> Result<Sent<R>, CallError> {
        self.begin::<R>(version, doing)?;
        request.encode(&mut self.out, version).map_err(|e| foreign(doing, e))?;
        self.finish(&[], version, deadline, doing)
    }

    /// Sends records, straight from where they are.
    pub fn send_records(
        &mut self,
        request: &ProduceRequest,
        version: i16,
        deadline: Instant,
        doing: &'static str,
    ) -> Result<Sent<ProduceRequest>, CallError> {
        self.begin::<ProduceRequest>(version, doing)?;
        self.finish(&produce::pieces(request, version), version, deadline, doing)
    }

    fn begin<R: Request>(&mut self, version: i16, doing: &str) -> Result<(), CallError> {
        self.correlation_id = self.correlation_id.wrapping_add(1);
        let header = RequestHeader::default()
            .with_request_api_key(R::KEY)
            .with_request_api_version(version)
            .with_correlation_id(self.correlation_id)
            .with_client_id(Some(self.client_id.clone()));
        self.out.clear();
        self.out.extend_from_slice(&[0; 4]);
        header.encode(&mut self.out, R::header_version(version)).map_err(|e| foreign(doing, e))
    }

    /// `pieces` are what follows on what is written.
    fn finish<R: Request>(
        &mut self,
        pieces: &[Bytes],
        version: i16,
        deadline: Instant,
        doing: &'static str,
    ) -> Result<Sent<R>, CallError> {
        let length = self.out.len() - 4 + pieces.iter().map(Bytes::len).sum::<usize>();
        let length = i32::try_from(length).map_err(|e| foreign(doing, e))?;
        if let Some(place) = self.out.get_mut(..4) {
            place.copy_from_slice(&length.to_be_bytes());
        }
        self.write(pieces, deadline).map_err(|error| CallError::Broken { doing, error })?;
        self.used_at = Instant::now();
        Ok(Sent { correlation_id: self.correlation_id, version, request: std::marker::PhantomData })
    }

    /// Waits for the answer to the oldest request that has none yet.
    #[allow(clippy::needless_pass_by_value)] // There is one answer.
    pub fn receive<R: Request>(
        &mut self,
        sent: Sent<R>,
        deadline: Instant,
        doing: &'static str,
    ) -> Result<R::Response, CallError> {
        let broken = |error| CallError::Broken { doing, error };
        let mut length = [0; 4];
        self.read(&mut length, deadline).map_err(broken)?;
        let length = usize::try_from(i32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > ANSWER_BYTES_MAX {
            return Err(foreign(doing, "an answer is too long"));
        }
        let mut answer = vec![0; length];
        self.read(&mut answer, deadline).map_err(broken)?;
        let mut answer = Bytes::from(answer);
        let header = ResponseHeader::decode(&mut answer, R::Response::header_version(sent.version))
            .map_err(|e| foreign(doing, e))?;
        if header.correlation_id != sent.correlation_id {
            return Err(foreign(doing, "an answer to another request came"));
        }
        R::Response::decode(&mut answer, sent.version).map_err(|e| foreign(doing, e))
    }

    /// Time limits of a socket begin anew with each write; the deadline does not.
    fn write(&mut self, pieces: &[Bytes], deadline: Instant) -> io::Result<()> {
        let all = std::iter::once(self.out.as_ref()).chain(pieces.iter().map(AsRef::as_ref));
        let mut all: Vec<IoSlice<'_>> = all.filter(|piece| !piece.is_empty()).map(IoSlice::new).collect();
        let mut rest = all.as_mut_slice();
        while !rest.is_empty() {
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "a request could not be sent in time"));
            }
            self.stream.set_deadline(deadline)?;
            match self.stream.write_vectored(rest) {
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::WriteZero, "the broker takes nothing more"));
                }
                Ok(count) => IoSlice::advance_slices(&mut rest, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.stream.flush()
    }

    /// As [`write`](Self::write).
    fn read(&mut self, into: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut filled = 0;
        while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
            }
            self.stream.set_deadline(deadline)?;
            match self.stream.read(rest) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the broker hung up")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
