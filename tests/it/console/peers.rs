//! Peers that are no daemons, and the page while it is closed.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use serde_json::Value;

use super::state;
use crate::support::{Scope, listen, wait_until};

/// Answers each connection with the same bytes, or never.
struct Peer {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    fn new(listener: TcpListener, answer: Option<String>) -> Peer {
        let address = listener.local_addr().unwrap();
        let (connections, is_over) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (counted, ended) = (Arc::clone(&connections), Arc::clone(&is_over));
        let thread = std::thread::spawn(move || {
            let mut silent = Vec::new();
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                counted.fetch_add(1, Ordering::SeqCst);
                let mut stream = stream.unwrap();
                match &answer {
                    // The other side may close before it has read all.
                    Some(answer) => {
                        let _ = stream.read(&mut [0; 4096]).and_then(|_| stream.write_all(answer.as_bytes()));
                    }
                    None => silent.push(stream),
                }
            }
        });
        Peer { address, connections, is_over, thread: Some(thread) }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

fn answer(head: &str, body: &str) -> Option<String> {
    Some(format!("HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
}

#[test]
fn nothing_is_asked_before_a_page_is_opened_and_peers_that_answer_no_status_are_named() {
    // GIVEN peers of which one is silent, one leads elsewhere, one answers more than 1 MiB, and one has a name
    let target = Peer::new(listen(), answer("200 OK", "{}"));
    let silent = Peer::new(listen(), None);
    let moved = format!("302 Found\r\nLocation: http://{}/status", target.address);
    let redirecting = Peer::new(listen(), answer(&moved, ""));
    let large = Peer::new(listen(), answer("200 OK", &format!("{{\"group\":\"{}\"}}", "x".repeat(2 << 20))));
    let named = Peer::new(listen(), answer("200 OK", "{}"));
    let port = named.address.port();
    let other = TcpListener::bind((Ipv6Addr::LOCALHOST, port)).ok();
    let other = other.map(|listener| Peer::new(listener, answer("200 OK", "{}")));
    let name = format!("localhost:{port}");
    let all = [&silent, &redirecting, &large, &named];
    let mut peers: Vec<String> = all[..3].iter().map(|peer| peer.address.to_string()).collect();
    peers.push(name.clone());
    let peers = serde_json::to_string(&peers).unwrap();

    // WHEN a daemon runs for some seconds, and no page is open
    let scope = Scope::ready("odd_peers", 1, 1);
    let daemon = scope.daemon_with(&["run"], &[("PAYMENT_WRITER__CONSOLE__PEERS", &peers)]);
    daemon.wait_until_ready();
    wait_until("five seconds are in its history", || {
        let history: Value = serde_json::from_str(&daemon.get("/status/history").unwrap().body).unwrap();
        history["points"]["at_ms"].as_array().unwrap().len() > 5
    });

    // THEN no peer was asked
    assert_eq!(all.map(Peer::connections), [0; 4]);
    assert_eq!(other.as_ref().map_or(0, Peer::connections), 0);

    // WHEN the page is opened, each is asked, and nothing is asked of where one of them leads to
    assert_eq!(daemon.get("/").unwrap().status, 200);
    assert_eq!(all.map(|peer| peer.connections().min(1)), [1; 4]);
    // AND the database was not asked before
    assert!(state(&daemon)["database"]["read_ms"].is_null(), "somebody asked the database");
    wait_until("the database has answered", || state(&daemon)["database"]["read_ms"].is_i64());

    // AND each address has one row that says what is wrong
    let mut expected: BTreeSet<String> =
        name.to_socket_addrs().unwrap().map(|address| address.to_string()).collect();
    expected.extend(all.map(|peer| peer.address.to_string()));
    let rows = || state(&daemon)["peers"].as_array().unwrap().clone();
    wait_until("each has a row", || rows().len() == expected.len());
    let rows = rows();
    let addresses: Vec<&str> = rows.iter().map(|row| row["address"].as_str().unwrap()).collect();
    assert_eq!(addresses, expected.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(target.connections(), 0, "it followed the redirection");
    for (peer, reason) in
        [(&silent, "timeout"), (&redirecting, "302"), (&large, "limit"), (&named, "another group")]
    {
        let row = rows.iter().find(|row| row["address"] == peer.address.to_string()).unwrap();
        assert!(row["error"].as_str().unwrap().contains(reason), "{reason}: {row}");
    }
    assert!(rows.iter().all(|row| row["error"].as_str().unwrap().len() < 1_000), "{rows:?}");
}
