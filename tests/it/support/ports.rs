//! Ports that stay free until their server listens on them.  The kernel may assign a port that it hands out
//! (by binding to port 0) to any outgoing connection as soon as it is released. These ports are below the
//! ephemeral range.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the ports that `dev/servers` uses, see `free_port` in `dev/processes`, and above 10080, which browsers refuse.
const FIRST: u16 = 10_081;
const COUNT: u16 = 4_919;

static NEXT: AtomicU16 = AtomicU16::new(0);

/// Listens on a local address outside the ephemeral range.
pub fn listen() -> TcpListener {
    // Another process starts elsewhere in the range; within a process, a port repeats only after all have
    // been used.
    let start = (std::process::id() % u32::from(COUNT)) as u16;
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed) % COUNT;
        let port = FIRST + (start + step) % COUNT;
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            return listener;
        }
    }
    panic!("no port of {FIRST} to {} is free", FIRST + COUNT - 1);
}

/// An address without a listener, which no outgoing connection takes by chance.
pub fn free_address() -> SocketAddr {
    listen().local_addr().unwrap()
}
