//! Connections of the admin server. Each is limited in size and time, so that a slow or hostile client cannot occupy
//! the daemon.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tower::ServiceExt;

/// Maximum number of connections. Others wait in the listener's queue.
const CONNECTIONS_MAX: usize = 256;
/// Maximum number of connections of one address, so that one client cannot keep probes and scrapers out. Further ones
/// are closed at once.
const CONNECTIONS_OF_ONE_MAX: usize = 32;
const HEADER_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// Time in which the head of a request must arrive, also after the request before.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// After this time, a connection ends with the request that it serves. Clients connect anew.
const CONNECTION_MAX: Duration = Duration::from_secs(60);
/// A client that has not taken its answer by then is cut off.
const LAST_ANSWER_MAX: Duration = Duration::from_secs(10);
/// Pause after a connection could not be accepted, as without file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// Open connections by address.
type Peers = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// One connection of an address, until it is dropped.
struct Place(Peers, IpAddr);

impl Place {
    fn take(peers: &Peers, address: IpAddr) -> Option<Self> {
        let mut open = peers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(address).or_default();
        (*count < CONNECTIONS_OF_ONE_MAX).then(|| {
            *count += 1;
            Self(Arc::clone(peers), address)
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.1);
            }
        }
    }
}

/// Serves connections until the process ends.
pub(super) async fn serve(listener: TcpListener, router: Router) {
    let (connections, peers) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), Peers::default());
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, caller)) => {
                let Some(place) = Place::take(&peers, caller.ip()) else { continue };
                let router = router.clone();
                tokio::spawn(async move {
                    serve_one(stream, caller, router).await;
                    drop((place, permit));
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the admin server cannot accept a connection");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn serve_one(stream: TcpStream, caller: SocketAddr, router: Router) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(caller));
        router.clone().oneshot(request)
    });
    let mut connection = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_MAX)
            .max_headers(HEADERS_MAX)
            .max_header_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
    );
    // Errors are the client's: it left, was slow, or sent something else than HTTP.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = sleep(CONNECTION_MAX) => connection.as_mut().graceful_shutdown(),
    }
    let _ = timeout(LAST_ANSWER_MAX, connection).await;
}
