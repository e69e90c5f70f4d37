//! Ports that stay free until who they are for listens on them.
//!
//! A port that the system hands out (by binding to port 0) may be the near end of anybody's connection the
//! moment it is let go. These lie below the range that it hands out from.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below those that `dev/servers` takes, see `free_port` in `dev/processes`.
const FIRST: u16 = 10_000;
const COUNT: u16 = 5_000;

static NEXT: AtomicU16 = AtomicU16::new(0);

/// Listens on an address of this machine that keeps out of others' way when it is let go.
pub fn listen() -> TcpListener {
    // Another process begins elsewhere in the range; within this one, no port comes twice before all have come.
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

/// An address that nobody listens on, and that no connection takes by chance.
pub fn free_address() -> SocketAddr {
    listen().local_addr().unwrap()
}
