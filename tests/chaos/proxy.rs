//! A TCP proxy between the daemons and Postgres that simulates network failures.
//!
//! It recognises a `COMMIT` in the protocol, so that one can be dropped, delayed, or have its reply dropped.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// A simple query `COMMIT`, as the driver sends it.
const COMMIT: &[u8] = b"Q\x00\x00\x00\x0bCOMMIT\x00";
const CHUNK_BYTES: usize = 64 * 1024;
/// Time in which a server must answer a delayed COMMIT.
const LATE_REPLY_MAX: Duration = Duration::from_secs(10);

/// What happens to the next COMMIT.
#[derive(Clone, Copy, Debug)]
pub enum OnCommit {
    /// The server receives it; its reply and the connection are lost.
    SwallowReply,
    /// The server never receives it.
    Lose,
    /// The daemon loses its connection; the server receives the COMMIT after that.
    Delay(Duration),
}

/// How current connections are ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Cut,
    /// The daemon's side stays open, and nothing answers any more.
    Silent,
}

struct State {
    server_port: AtomicU16,
    /// Whether anything is forwarded.
    is_open: watch::Sender<bool>,
    ending: watch::Sender<Ending>,
    trap: Mutex<Option<OnCommit>>,
    sprung: AtomicU64,
}

/// See the module.
pub struct Proxy {
    state: Arc<State>,
    port: u16,
    _runtime: Runtime,
}

impl Proxy {
    pub fn to(server_port: u16) -> Proxy {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Arc::new(State {
            server_port: AtomicU16::new(server_port),
            is_open: watch::Sender::new(true),
            ending: watch::Sender::new(Ending::Cut),
            trap: Mutex::new(None),
            sprung: AtomicU64::new(0),
        });
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::clone(&state);
        runtime.spawn(async move {
            loop {
                if let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(serve(Arc::clone(&shared), client));
                }
            }
        });
        Proxy { state, port, _runtime: runtime }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// New connections use this address.
    pub fn point_at(&self, server_port: u16) {
        self.state.server_port.store(server_port, Ordering::Relaxed);
    }

    /// Ends all connections.
    pub fn cut(&self) {
        self.state.ending.send_replace(Ending::Cut);
    }

    /// Ends all connections without closing the daemons' side.
    pub fn forget(&self) {
        self.state.ending.send_replace(Ending::Silent);
    }

    /// Turns forwarding on or off. While it is off, data waits.
    pub fn set_open(&self, is_open: bool) {
        self.state.is_open.send_replace(is_open);
    }

    /// Waits until this has happened to the next COMMIT. False if none arrived in time.
    pub fn at_next_commit(&self, trap: OnCommit, timeout: Duration) -> bool {
        let before = self.state.sprung.load(Ordering::Acquire);
        *self.state.trap.lock().unwrap() = Some(trap);
        let began = Instant::now();
        while self.state.sprung.load(Ordering::Acquire) == before {
            if began.elapsed() > timeout {
                return self.state.trap.lock().unwrap().take().is_none();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

/// How a connection ended.
enum End {
    Closed,
    Silent,
    /// What the server should still receive, and when.
    Late(Vec<u8>, Duration),
}

async fn serve(state: Arc<State>, mut client: TcpStream) {
    let mut ending = state.ending.subscribe();
    let mut is_open = state.is_open.subscribe();
    let port = state.server_port.load(Ordering::Relaxed);
    let opened = async {
        // While nothing is forwarded, connections are accepted and stay silent.
        is_open.wait_for(|open| *open).await.ok()?;
        TcpStream::connect(("127.0.0.1", port)).await.ok()
    };
    let server = tokio::select! {
        server = opened => server,
        _ = ending.changed() => None,
    };
    let Some(mut server) = server else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let end = {
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let is_muted = AtomicU64::new(0);
        tokio::select! {
            end = upward(&state, &mut from_client, &mut to_server, &is_muted) => end,
            end = downward(&state, &mut from_server, &mut to_client, &is_muted) => end,
            _ = ending.changed() => match *ending.borrow() {
                Ending::Cut => End::Closed,
                Ending::Silent => End::Silent,
            },
        }
    };
    match end {
        End::Closed => {}
        End::Silent => {
            drop(server);
            // Until the next fault. Data from the daemon is read and never answered.
            let _ = tokio::time::timeout(Duration::from_secs(300), swallow(&mut client)).await;
        }
        End::Late(message, delay) => {
            drop(client);
            tokio::time::sleep(delay).await;
            let _ = server.write_all(&message).await;
            let _ = tokio::time::timeout(LATE_REPLY_MAX, server.read(&mut [0; 64])).await;
            state.sprung.fetch_add(1, Ordering::Release);
        }
    }
}

async fn swallow(client: &mut TcpStream) {
    let mut buffer = vec![0; CHUNK_BYTES];
    while client.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}

/// From the daemon to the server.
async fn upward(state: &State, from: &mut ReadHalf<'_>, to: &mut WriteHalf<'_>, is_muted: &AtomicU64) -> End {
    let mut is_open = state.is_open.subscribe();
    let mut buffer = vec![0; CHUNK_BYTES];
    // The end of the previous chunk: a message may arrive in two pieces.
    let mut recent: Vec<u8> = Vec::new();
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return End::Closed };
        if is_open.wait_for(|open| *open).await.is_err() {
            return End::Closed;
        }
        let chunk = &buffer[..count];
        recent.extend_from_slice(chunk);
        let has_commit = recent.windows(COMMIT.len()).any(|window| window == COMMIT);
        recent.drain(..recent.len().saturating_sub(COMMIT.len() - 1));
        let trap = if has_commit { state.trap.lock().unwrap().take() } else { None };
        match trap {
            None => {}
            Some(OnCommit::Lose) => {
                state.sprung.fetch_add(1, Ordering::Release);
                return End::Closed;
            }
            Some(OnCommit::Delay(delay)) => return End::Late(chunk.to_vec(), delay),
            Some(OnCommit::SwallowReply) => is_muted.store(1, Ordering::Release),
        }
        if to.write_all(chunk).await.is_err() {
            return End::Closed;
        }
    }
}

/// From the server to the daemon.
async fn downward(
    state: &State,
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    is_muted: &AtomicU64,
) -> End {
    let mut is_open = state.is_open.subscribe();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return End::Closed };
        if is_muted.load(Ordering::Acquire) == 1 {
            state.sprung.fetch_add(1, Ordering::Release);
            return End::Closed;
        }
        if is_open.wait_for(|open| *open).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return End::Closed;
        }
    }
}
