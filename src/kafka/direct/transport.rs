//! How brokers are reached: sockets, TLS, and who one says one is, all of it from `kafka.properties`.
//!
//! The properties mean what they mean to librdkafka, which reads the same ones for the consumer. One that is not
//! known here, or not with its value, leaves the whole work to librdkafka: none is passed over in silence but those
//! of [`IGNORED`].

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use openssl::pkey::PKey;
use openssl::ssl::{
    ErrorCode, HandshakeError, SslConnector, SslMethod, SslOptions, SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::store::X509StoreBuilder;
use socket2::SockRef;

use super::sasl::{Exchange, Login, Mechanism};
use crate::config::Secret;

/// The default of `socket.connection.setup.timeout.ms`.
const SETUP_TIMEOUT: Duration = Duration::from_secs(30);
/// A socket cannot be given less; zero would mean no limit.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// Properties that change nothing about a producer without queues and threads of its own.
const IGNORED: [&str; 71] = [
    // For consumers only.
    "check.crcs",
    "consume.callback.max.messages",
    "coordinator.query.interval.ms",
    "fetch.error.backoff.ms",
    "fetch.max.bytes",
    "fetch.message.max.bytes",
    "fetch.min.bytes",
    "fetch.queue.backoff.ms",
    "fetch.wait.max.ms",
    "heartbeat.interval.ms",
    "max.partition.fetch.bytes",
    "max.poll.interval.ms",
    "offset.store.sync.interval.ms",
    "queued.max.messages.kbytes",
    "queued.min.messages",
    "session.timeout.ms",
    // A transaction is sent as soon as it is whole: nothing waits in a queue for more, or is held back there.
    "batch.num.messages",
    "batch.size",
    "delivery.report.only.error",
    "linger.ms",
    "message.copy.max.bytes",
    "produce.offset.report",
    "queue.buffering.backpressure.threshold",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "queue.buffering.max.ms",
    "sticky.partitioning.linger.ms",
    // Nothing is compressed.
    "compression.level",
    // How long to try and how often is the publisher's to say, and the lane's.
    "connections.max.idle.ms",
    "delivery.timeout.ms",
    "message.send.max.retries",
    "message.timeout.ms",
    "reconnect.backoff.jitter.ms",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "request.timeout.ms",
    "retries",
    "retry.backoff.max.ms",
    "retry.backoff.ms",
    "socket.blocking.max.ms",
    "socket.max.fails",
    "socket.timeout.ms",
    // Sizes that the records and their batches bound already.
    "message.max.bytes",
    "receive.message.max.bytes",
    // Leaders and addresses are asked for anew when something fails, not kept fresh meanwhile.
    "broker.address.ttl",
    "metadata.max.age.ms",
    "metadata.recovery.rebootstrap.trigger.ms",
    "metadata.recovery.strategy",
    "topic.metadata.propagation.max.ms",
    "topic.metadata.refresh.fast.cnt",
    "topic.metadata.refresh.fast.interval.ms",
    "topic.metadata.refresh.interval.ms",
    "topic.metadata.refresh.sparse",
    // For brokers older than any that has the transactions which the daemon needs.
    "api.version.fallback.ms",
    "api.version.request",
    "api.version.request.timeout.ms",
    "broker.version.fallback",
    // Nagle's algorithm is always off: every request is waited for.
    "socket.nagle.disable",
    // Where a consumer fetches from.
    "client.rack",
    // Read by others.
    "client.id",
    "transaction.timeout.ms",
    // What librdkafka tells of itself, and how it runs.
    "debug",
    "enable.metrics.push",
    "enable.random.seed",
    "enabled_events",
    "internal.termination.signal",
    "log.connection.close",
    "log.queue",
    "log.thread.name",
    "log_level",
    "statistics.interval.ms",
];

/// A property, or its value, is not known here: librdkafka's producer has to serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kafka.properties has a {property} that only librdkafka can serve")]
pub struct Unsupported {
    /// Its name. Never its value, which may be secret.
    pub property: String,
}

/// Which of a host's addresses may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    Any,
    V4,
    V6,
}

/// How brokers are reached: encryption and authentication, from `kafka.properties`.
#[derive(Clone)]
pub struct Transport {
    family: Family,
    keeps_alive: bool,
    setup_timeout: Duration,
    tls: Option<Arc<Tls>>,
    login: Option<Arc<Login>>,
}

impl Transport {
    /// Reads what the properties say. Touches no file and no network.
    pub fn of<'p>(properties: impl Iterator<Item = (&'p str, &'p str)>) -> Result<Self, Unsupported> {
        let mut transport = Self {
            family: Family::Any,
            keeps_alive: true,
            setup_timeout: SETUP_TIMEOUT,
            tls: None,
            login: None,
        };
        let mut tls = Tls::default();
        let (mut has_tls, mut has_sasl) = (false, false);
        let (mut mechanism, mut username, mut password) = (None, None, None);
        // Set to nothing, a property has its default.
        for (name, value) in properties.filter(|(_, value)| !value.is_empty()) {
            let unsupported = || Unsupported { property: name.to_owned() };
            match name {
                "security.protocol" => {
                    (has_tls, has_sasl) = match word(value).as_str() {
                        "plaintext" => (false, false),
                        "ssl" => (true, false),
                        "sasl_plaintext" => (false, true),
                        "sasl_ssl" => (true, true),
                        _ => return Err(unsupported()),
                    }
                }
                // librdkafka looks for the system's certificates in places of its own.
                "ssl.ca.location" if text(value) == "probe" => return Err(unsupported()),
                "ssl.ca.location" => tls.ca = Some(text(value).to_owned()),
                "ssl.certificate.location" => tls.certificate = Some(text(value).to_owned()),
                "ssl.key.location" => tls.key = Some(text(value).to_owned()),
                "ssl.key.password" => tls.key_password = Some(Secret::new(text(value))),
                "ssl.endpoint.identification.algorithm" => {
                    tls.any_host = match word(value).as_str() {
                        "https" => false,
                        "none" => true,
                        _ => return Err(unsupported()),
                    }
                }
                "enable.ssl.certificate.verification" => {
                    tls.any_certificate = !switch(value).ok_or_else(unsupported)?;
                }
                "sasl.mechanism" | "sasl.mechanisms" => mechanism = Mechanism::named(text(value)),
                "sasl.username" => username = Some(text(value).to_owned()),
                "sasl.password" => password = Some(Secret::new(text(value))),
                "socket.keepalive.enable" => transport.keeps_alive = switch(value).ok_or_else(unsupported)?,
                "socket.connection.setup.timeout.ms" => {
                    let millis = value.trim().parse().map_err(|_| unsupported())?;
                    transport.setup_timeout = Duration::from_millis(millis);
                }
                "broker.address.family" => {
                    transport.family = match word(value).as_str() {
                        "any" => Family::Any,
                        "v4" => Family::V4,
                        "v6" => Family::V6,
                        _ => return Err(unsupported()),
                    }
                }
                "compression.codec" | "compression.type" if word(value) == "none" => {}
                "client.dns.lookup" if word(value) == "use_all_dns_ips" => {}
                _ if IGNORED.contains(&name) => {}
                _ => return Err(unsupported()),
            }
        }
        transport.tls = has_tls.then(|| Arc::new(tls));
        if has_sasl {
            // Without a mechanism librdkafka means Kerberos; without a name it says itself what is missing.
            let missing = |property: &str| Unsupported { property: property.to_owned() };
            transport.login = Some(Arc::new(Login {
                mechanism: mechanism.ok_or_else(|| missing("sasl.mechanism"))?,
                username: username.ok_or_else(|| missing("sasl.username"))?,
                password: password.ok_or_else(|| missing("sasl.password"))?,
            }));
        }
        Ok(transport)
    }

    /// Connects to one broker, with TLS if that is wanted: to all its addresses in turn, each with its share of the
    /// time. `host` is a name or an address without brackets.
    ///
    /// The error is of the kind `TimedOut` if there was no time left, and `InvalidData` if TLS was refused by
    /// either side, or if a file that it needs cannot be used: neither passes by itself.
    pub fn connect(&self, host: &str, port: u16, deadline: Instant) -> io::Result<Stream> {
        let deadline = deadline.min(Instant::now() + self.setup_timeout);
        let tls = match &self.tls {
            Some(tls) => Some((tls, tls.connector()?)),
            None => None,
        };
        let addresses: Vec<_> = resolved(host, port, deadline)?
            .into_iter()
            .filter(|address| match self.family {
                Family::Any => true,
                Family::V4 => address.is_ipv4(),
                Family::V6 => address.is_ipv6(),
            })
            .collect();
        let mut failures = Vec::new();
        let mut kind = io::ErrorKind::NotFound;
        for (index, address) in addresses.iter().enumerate() {
            let untried = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
            let share = Instant::now() + left_until(deadline) / untried;
            let connected = self.open(address, share).and_then(|stream| match tls {
                Some((tls, connector)) => tls.secure(connector, host, stream),
                None => Ok(Stream::Plain(stream)),
            });
            match connected {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    // That somebody has to mend something is not hidden by an address that is merely not there.
                    if kind != io::ErrorKind::InvalidData {
                        kind = error.kind();
                    }
                    failures.push(format!("{address}: {error}"));
                }
            }
        }
        if failures.is_empty() {
            failures.push(format!("{host}: no address of the wanted family"));
        }
        Err(io::Error::new(kind, failures.join("; ")))
    }

    fn open(&self, address: &SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(address, left_until(deadline))?;
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_keepalive(self.keeps_alive)?;
        limit(&stream, deadline)?;
        Ok(stream)
    }

    /// The SASL exchange that a new connection begins with; None without SASL.
    pub fn authenticator(&self) -> Option<Exchange> {
        self.login.as_ref().map(|login| Exchange::new(Arc::clone(login)))
    }
}

/// Certificates, and how far they are looked at.
#[derive(Default)]
struct Tls {
    ca: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
    key_password: Option<Secret>,
    any_certificate: bool,
    any_host: bool,
    /// Made once; as long as a file cannot be used, each connection tries again.
    connector: OnceLock<SslConnector>,
}

impl Tls {
    fn connector(&self) -> io::Result<&SslConnector> {
        if let Some(connector) = self.connector.get() {
            return Ok(connector);
        }
        let connector = self.load()?;
        Ok(self.connector.get_or_init(|| connector))
    }

    fn load(&self) -> io::Result<SslConnector> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        // A broker that goes away in the middle of something is no matter of TLS: that passes.
        builder.set_options(SslOptions::IGNORE_UNEXPECTED_EOF);
        builder.set_verify(if self.any_certificate { SslVerifyMode::NONE } else { SslVerifyMode::PEER });
        if let Some(path) = self.ca.as_deref() {
            // In place of the system's certificates, not beside them: only who is named is trusted.
            builder.set_cert_store(X509StoreBuilder::new()?.build());
            let place = Path::new(path);
            let (file, folder) = if place.is_dir() { (None, Some(place)) } else { (Some(place), None) };
            builder.load_verify_locations(file, folder).map_err(|e| unusable("ssl.ca.location", path, &e))?;
        }
        if let Some(path) = self.certificate.as_deref() {
            builder
                .set_certificate_chain_file(path)
                .map_err(|e| unusable("ssl.certificate.location", path, &e))?;
        }
        if let Some(path) = self.key.as_deref() {
            let pem = std::fs::read(path).map_err(|e| unusable("ssl.key.location", path, &e))?;
            // Without any password OpenSSL would ask for one on the terminal.
            let password = self.key_password.as_ref().map_or("", Secret::expose);
            PKey::private_key_from_pem_passphrase(&pem, password.as_bytes())
                .and_then(|key| builder.set_private_key(&key))
                .and_then(|()| builder.check_private_key())
                .map_err(|e| unusable("ssl.key.location", path, &e))?;
        }
        Ok(builder.build())
    }

    fn secure(&self, connector: &SslConnector, host: &str, stream: TcpStream) -> io::Result<Stream> {
        let session = connector.configure()?.verify_hostname(!self.any_host);
        match session.connect(host, stream) {
            Ok(stream) => Ok(Stream::Tls(stream)),
            Err(HandshakeError::WouldBlock(_)) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))
            }
            Err(error) => {
                let kind = match &error {
                    HandshakeError::Failure(failed) => match failed.error().io_error() {
                        Some(cause) => cause.kind(),
                        None if failed.error().code() == ErrorCode::SSL => io::ErrorKind::InvalidData,
                        None => io::ErrorKind::UnexpectedEof,
                    },
                    _ => io::ErrorKind::Other,
                };
                Err(io::Error::new(kind, error.to_string()))
            }
        }
    }
}

fn unusable(property: &str, path: &str, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{property}, {path}: {error}"))
}

/// A connection to a broker. Blocks, each read and each write no longer than until the deadline that was set last.
pub enum Stream {
    /// Without encryption.
    Plain(TcpStream),
    /// With it.
    Tls(SslStream<TcpStream>),
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref(),
        }
    }

    /// Until when each of the reads and writes that follow may take. One that takes longer fails as `TimedOut`, and
    /// the connection must not be used any more.
    pub fn set_deadline(&self, deadline: Instant) -> io::Result<()> {
        limit(self.socket(), deadline)
    }

    /// Whether there is something to read, or the broker has hung up, while nothing is expected: then the connection
    /// must not be used any more.
    ///
    /// To be asked after the first answer at the earliest: with TLS 1.3 tickets for a resumption come before it.
    pub fn is_stale(&self) -> bool {
        if let Self::Tls(stream) = self
            && stream.ssl().pending() > 0
        {
            return true;
        }
        let socket = self.socket();
        let peeked = socket.set_nonblocking(true).and_then(|()| socket.peek(&mut [0]));
        let is_silent = peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        !is_silent || socket.set_nonblocking(false).is_err()
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
        .map_err(named)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
        .map_err(named)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write_vectored(pieces),
            Self::Tls(stream) => stream.write_vectored(pieces),
        }
        .map_err(named)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
        .map_err(named)
    }
}

/// A socket's time limit looks like a socket that does not block, and OpenSSL's errors like any other.
fn named(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "no answer in time"),
        // With TLS 1.3 the broker refuses a client's certificate only after the handshake.
        io::ErrorKind::Other => io::Error::new(io::ErrorKind::InvalidData, error),
        _ => error,
    }
}

fn limit(stream: &TcpStream, deadline: Instant) -> io::Result<()> {
    let left = Some(left_until(deadline));
    stream.set_read_timeout(left)?;
    stream.set_write_timeout(left)
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(TIMEOUT_MIN)
}

/// The addresses of a host. The system's resolver knows no deadline: if it takes too long, it is left alone, and its
/// thread ends with it.
fn resolved(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (sender, receiver) = mpsc::sync_channel(1);
    let name = host.to_owned();
    std::thread::Builder::new().name("resolver".to_owned()).spawn(move || {
        let addresses = (name.as_str(), port).to_socket_addrs().map(Iterator::collect);
        let _ = sender.send(addresses);
    })?;
    match receiver.recv_timeout(left_until(deadline)) {
        Ok(addresses) => addresses.map_err(|e| io::Error::new(e.kind(), format!("{host}: {e}"))),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{host}: no address in time"))),
    }
}

/// A text as librdkafka takes it: without what is blank at its beginning.
fn text(value: &str) -> &str {
    value.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b')
}

/// One of a few words, in whatever case.
fn word(value: &str) -> String {
    value.trim().to_ascii_lowercase()
}

fn switch(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "t" | "1" => Some(true),
        "false" | "f" | "0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::path::PathBuf;

    use openssl::asn1::Asn1Time;
    use openssl::bn::BigNum;
    use openssl::ec::{EcGroup, EcKey};
    use openssl::hash::MessageDigest;
    use openssl::nid::Nid;
    use openssl::pkey::Private;
    use openssl::ssl::{SslAcceptor, SslAcceptorBuilder};
    use openssl::symm::Cipher;
    use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
    use openssl::x509::{X509, X509NameBuilder};
    use rdkafka::ClientConfig;
    use rdkafka::error::KafkaError;
    use rdkafka::types::RDKafkaConfRes;
    use tempfile::TempDir;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn soon() -> Instant {
        Instant::now() + PATIENCE
    }

    fn of(properties: &[(&str, &str)]) -> Transport {
        Transport::of(properties.iter().copied()).unwrap_or_else(|e| panic!("{e}"))
    }

    fn unsupported(properties: &[(&str, &str)]) -> Option<String> {
        Transport::of(properties.iter().copied()).err().map(|e| e.property)
    }

    fn failure(connected: io::Result<Stream>) -> (io::ErrorKind, String) {
        let error = connected.err().unwrap();
        (error.kind(), error.to_string())
    }

    /// Sends a byte, which the servers here return.
    fn asks(stream: &mut Stream) -> io::Result<()> {
        stream.set_deadline(soon())?;
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])
    }

    /// Properties with a value that is served, whether it decides something or not.
    const SERVED: [(&str, &str); 22] = [
        ("broker.address.family", "V4"),
        ("client.dns.lookup", "use_all_dns_ips"),
        ("compression.codec", "none"),
        ("compression.type", "None"),
        ("enable.ssl.certificate.verification", "TRUE"),
        ("enable.ssl.certificate.verification", "f"),
        ("sasl.mechanism", "PLAIN"),
        ("sasl.mechanisms", "SCRAM-SHA-512"),
        // Of no use without SASL, whatever it is.
        ("sasl.mechanism", "OAUTHBEARER"),
        ("sasl.password", "sesame"),
        ("sasl.username", "writer"),
        ("security.protocol", "plaintext"),
        ("security.protocol", "SSL"),
        ("socket.connection.setup.timeout.ms", "1000"),
        ("socket.keepalive.enable", "0"),
        ("ssl.ca.location", "/nowhere"),
        ("ssl.certificate.location", "/nowhere"),
        ("ssl.endpoint.identification.algorithm", "HTTPS"),
        ("ssl.endpoint.identification.algorithm", "none"),
        ("ssl.key.location", "/nowhere"),
        ("ssl.key.password", "sesame"),
        // As if it was not there.
        ("sasl.oauthbearer.scope", ""),
    ];

    #[test]
    fn properties_are_served_or_named() {
        for property in SERVED {
            assert_eq!(unsupported(&[property]), None, "{property:?}");
        }
        for name in IGNORED {
            assert_eq!(unsupported(&[(name, "1")]), None, "{name}");
        }
        for property in [
            ("broker.address.family", "v5"),
            ("client.dns.lookup", "resolve_canonical_bootstrap_servers_only"),
            ("compression.codec", "zstd"),
            ("compression.type", "lz4"),
            ("enable.ssl.certificate.verification", "no"),
            ("interceptors", "x"),
            ("plugin.library.paths", "x"),
            ("sasl.oauthbearer.config", "x"),
            ("security.protocol", "tls"),
            ("socket.connection.setup.timeout.ms", "0x400"),
            ("socket.keepalive.enable", "yes"),
            ("socket.send.buffer.bytes", "1"),
            ("ssl.ca.location", "probe"),
            ("ssl.ca.pem", "x"),
            ("ssl.cipher.suites", "x"),
            ("ssl.endpoint.identification.algorithm", "http"),
            ("ssl.keystore.location", "x"),
            ("no.such.property", "x"),
        ] {
            assert_eq!(unsupported(&[("linger.ms", "1"), property]).as_deref(), Some(property.0));
        }
    }

    #[test]
    fn properties_are_ones_that_librdkafka_knows() {
        for name in SERVED.map(|(name, _)| name).into_iter().chain(IGNORED) {
            let set = ClientConfig::new().set(name, "no such value").create_native_config();
            let unknown =
                matches!(set, Err(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)));
            assert!(!unknown, "{name}");
        }
    }

    #[test]
    fn sasl_needs_a_mechanism_that_is_known_a_name_and_a_password() {
        let whole = [
            ("security.protocol", "sasl_Plaintext"),
            ("sasl.mechanisms", "SCRAM-SHA-256"),
            ("sasl.username", "writer"),
            ("sasl.password", " \tsesame "),
        ];
        let transport = of(&whole);
        assert!(transport.tls.is_none());
        let login = transport.login.as_deref().unwrap();
        assert_eq!((login.username.as_str(), login.password.expose()), ("writer", "sesame "));
        assert_eq!(transport.authenticator().unwrap().mechanism(), "SCRAM-SHA-256");
        for (missing, named) in [(1, "sasl.mechanism"), (2, "sasl.username"), (3, "sasl.password")] {
            let mut properties = whole.to_vec();
            properties.remove(missing);
            assert_eq!(unsupported(&properties).as_deref(), Some(named));
        }
        for mechanism in ["GSSAPI", "OAUTHBEARER", "SCRAM-SHA-1", "plain"] {
            let mut properties = whole.to_vec();
            properties.push(("sasl.mechanisms", mechanism));
            assert_eq!(unsupported(&properties).as_deref(), Some("sasl.mechanism"), "{mechanism}");
        }
        assert!(of(&whole[1..]).authenticator().is_none());
    }

    /// Signs certificates; its own, and what it signed, are files in a folder.
    struct Authority {
        folder: TempDir,
        certificate: X509,
        key: PKey<Private>,
    }

    impl Authority {
        fn new() -> Self {
            let (certificate, key) = made(None, "authority", None);
            let authority = Self { folder: TempDir::new().unwrap(), certificate, key };
            std::fs::write(authority.path("ca"), authority.certificate.to_pem().unwrap()).unwrap();
            authority
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn text(&self, name: &str) -> String {
            self.path(name).to_str().unwrap().to_owned()
        }

        /// A server's settings, with a certificate of that name.
        fn acceptor(&self, name: &str) -> SslAcceptorBuilder {
            let (certificate, key) = made(Some(self), name, Some(name));
            let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
            builder.set_certificate(&certificate).unwrap();
            builder.set_private_key(&key).unwrap();
            builder
        }
    }

    fn made(by: Option<&Authority>, name: &str, host: Option<&str>) -> (X509, PKey<Private>) {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let mut subject = X509NameBuilder::new().unwrap();
        subject.append_entry_by_nid(Nid::COMMONNAME, name).unwrap();
        let subject = subject.build();
        let mut builder = X509::builder().unwrap();
        builder.set_version(2).unwrap();
        let serial = BigNum::from_u32(if by.is_some() { 2 } else { 1 }).unwrap();
        builder.set_serial_number(&serial.to_asn1_integer().unwrap()).unwrap();
        builder.set_subject_name(&subject).unwrap();
        builder.set_issuer_name(by.map_or(&subject, |by| by.certificate.subject_name())).unwrap();
        builder.set_pubkey(&key).unwrap();
        builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
        match host {
            None => builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()),
            Some(host) => {
                let mut names = SubjectAlternativeName::new();
                if host.parse::<std::net::IpAddr>().is_ok() {
                    names.ip(host)
                } else {
                    names.dns(host)
                };
                let names = names.build(&builder.x509v3_context(None, None)).unwrap();
                builder.append_extension(names)
            }
        }
        .unwrap();
        builder.sign(by.map_or(&key, |by| &by.key), MessageDigest::sha256()).unwrap();
        (builder.build(), key)
    }

    /// Serves each connection in turn; returns the port.
    fn serve(mut one: impl FnMut(TcpStream) + Send + 'static) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || listener.incoming().for_each(|stream| one(stream.unwrap())));
        port
    }

    /// Returns each byte until there is no more; an `x` twice, and after a `q` it hangs up.
    fn echo(mut stream: impl Read + Write) {
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && byte != *b"q" {
            let _ = stream.write_all(if byte == *b"x" { b"xx" } else { &byte });
        }
    }

    fn serve_tls(settings: SslAcceptorBuilder) -> u16 {
        let acceptor = settings.build();
        serve(move |stream| {
            if let Ok(stream) = acceptor.accept(stream) {
                echo(stream);
            }
        })
    }

    #[test]
    fn a_broker_is_trusted_by_its_authority_and_name() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        let (ca, other) = (ours.text("ca"), theirs.text("ca"));
        let (by_address, by_name) =
            (serve_tls(ours.acceptor("127.0.0.1")), serve_tls(ours.acceptor("localhost")));
        let over_tls = |ca: &str, more: &[(&str, &str)]| {
            of(&[&[("security.protocol", "ssl"), ("ssl.ca.location", ca)], more].concat())
        };

        for (host, port) in [("127.0.0.1", by_address), ("localhost", by_name)] {
            asks(&mut over_tls(&ca, &[]).connect(host, port, soon()).unwrap()).unwrap();
            let (kind, words) = failure(over_tls(&other, &[]).connect(host, port, soon()));
            assert_eq!(kind, io::ErrorKind::InvalidData, "{words}");
            assert!(words.contains("certificate verify failed"), "{words}");
            let careless = [("enable.ssl.certificate.verification", "false")];
            asks(&mut over_tls(&other, &careless).connect(host, port, soon()).unwrap()).unwrap();
        }
        for (host, port, why) in
            [("127.0.0.1", by_name, "IP address mismatch"), ("localhost", by_address, "hostname mismatch")]
        {
            let (kind, words) = failure(over_tls(&ca, &[]).connect(host, port, soon()));
            assert_eq!(kind, io::ErrorKind::InvalidData, "{words}");
            assert!(words.contains("certificate verify failed") && words.contains(why), "{words}");
            let any_host = [("ssl.endpoint.identification.algorithm", "none")];
            asks(&mut over_tls(&ca, &any_host).connect(host, port, soon()).unwrap()).unwrap();
            let words = failure(over_tls(&other, &any_host).connect(host, port, soon())).1;
            assert!(words.contains("certificate verify failed"), "{words}");
        }
        // The system trusts neither.
        let words = failure(of(&[("security.protocol", "ssl")]).connect("127.0.0.1", by_address, soon())).1;
        assert!(words.contains("certificate verify failed"), "{words}");
    }

    #[test]
    fn authorities_may_be_a_folder_and_files_may_come_later() {
        let ours = Authority::new();
        let port = serve_tls(ours.acceptor("127.0.0.1"));
        let later = ours.text("later");
        let transport = of(&[("security.protocol", "ssl"), ("ssl.ca.location", &later)]);
        let (kind, words) = failure(transport.connect("127.0.0.1", port, soon()));
        assert_eq!(kind, io::ErrorKind::InvalidData);
        assert!(words.contains("ssl.ca.location") && words.contains("o such file"), "{words}");
        assert!(words.contains(&later), "{words}");

        std::fs::create_dir(&later).unwrap();
        let hashed = format!("{:08x}.0", ours.certificate.subject_name_hash());
        std::fs::copy(ours.path("ca"), ours.path("later").join(hashed)).unwrap();
        asks(&mut transport.connect("127.0.0.1", port, soon()).unwrap()).unwrap();
    }

    #[test]
    fn a_broker_may_ask_for_our_certificate() {
        let ours = Authority::new();
        let (certificate, key) = made(Some(&ours), "writer", Some("writer"));
        std::fs::write(ours.path("certificate"), certificate.to_pem().unwrap()).unwrap();
        let pem = key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_256_cbc(), b"sesame").unwrap();
        std::fs::write(ours.path("key"), pem).unwrap();
        let mut settings = ours.acceptor("127.0.0.1");
        settings.set_ca_file(ours.path("ca")).unwrap();
        settings.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        let port = serve_tls(settings);
        let (ca, certificate, key) = (ours.text("ca"), ours.text("certificate"), ours.text("key"));
        let base = [("security.protocol", "ssl"), ("ssl.ca.location", ca.as_str())];
        let files = [("ssl.certificate.location", certificate.as_str()), ("ssl.key.location", key.as_str())];

        let whole = [&base[..], &files, &[("ssl.key.password", "sesame")]].concat();
        asks(&mut of(&whole).connect("127.0.0.1", port, soon()).unwrap()).unwrap();
        // With TLS 1.3 the refusal comes only with the first answer; a question might meet a closed socket first.
        let refused =
            of(&base).connect("127.0.0.1", port, soon()).and_then(|mut stream| stream.read(&mut [0]));
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{refused}");
        assert!(refused.to_string().contains("certificate required"), "{refused}");
        for password in [&[][..], &[("ssl.key.password", "a secret")]] {
            let properties = [&base[..], &files, password].concat();
            let (kind, words) = failure(of(&properties).connect("127.0.0.1", port, soon()));
            assert_eq!(kind, io::ErrorKind::InvalidData);
            assert!(words.contains("ssl.key.location") && !words.contains("a secret"), "{words}");
        }
    }

    #[test]
    fn what_passes_by_itself_is_told_from_what_does_not() {
        let tls = of(&[("security.protocol", "ssl")]);
        let short = || Instant::now() + Duration::from_millis(200);

        let silent = serve(|stream| {
            let _ = (&stream).read_to_end(&mut Vec::new());
        });
        let begun = Instant::now();
        let (kind, words) = failure(tls.connect("127.0.0.1", silent, short()));
        assert_eq!(kind, io::ErrorKind::TimedOut, "{words}");
        assert!(begun.elapsed() < PATIENCE, "{words}");

        let hanging_up = serve(|mut stream| {
            let _ = stream.read(&mut [0; 4096]);
        });
        let (kind, words) = failure(tls.connect("127.0.0.1", hanging_up, soon()));
        assert!(
            [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset].contains(&kind),
            "{kind}: {words}"
        );

        let plain = serve(|mut stream| {
            let _ = stream.write_all(b"this is not TLS");
            echo(stream);
        });
        let (kind, words) = failure(tls.connect("127.0.0.1", plain, soon()));
        assert_eq!(kind, io::ErrorKind::InvalidData, "{words}");

        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (kind, words) = failure(of(&[]).connect("localhost", port, soon()));
        assert_eq!(kind, io::ErrorKind::ConnectionRefused, "{words}");
        assert!(words.contains(&format!("127.0.0.1:{port}")), "{words}");

        let version_6 = of(&[("broker.address.family", "v6")]);
        let words = failure(version_6.connect("127.0.0.1", port, soon())).1;
        assert!(words.contains("no address of the wanted family"), "{words}");
    }

    #[test]
    fn a_connection_is_stale_once_the_broker_said_something_unasked_or_hung_up() {
        let ours = Authority::new();
        let (plain, tls) = (serve(echo), serve_tls(ours.acceptor("127.0.0.1")));
        let ca = ours.text("ca");
        let over_tls = [("security.protocol", "ssl"), ("ssl.ca.location", ca.as_str())];
        for (properties, port) in [(&[][..], plain), (&over_tls, tls)] {
            for last in [b"x", b"q"] {
                let mut stream = of(properties).connect("127.0.0.1", port, soon()).unwrap();
                asks(&mut stream).unwrap();
                assert!(!stream.is_stale());
                // It still blocks, and no longer than it should.
                stream.set_deadline(Instant::now() + Duration::from_millis(50)).unwrap();
                let begun = Instant::now();
                assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
                assert!(begun.elapsed() >= Duration::from_millis(45));

                asks(&mut stream).unwrap();
                stream.write_all(last).unwrap();
                if last == b"x" {
                    stream.set_deadline(soon()).unwrap();
                    stream.read_exact(&mut [0]).unwrap();
                }
                let deadline = soon();
                while !stream.is_stale() {
                    assert!(Instant::now() < deadline);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
}
