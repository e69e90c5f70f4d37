//! Places at which a test ends the process, or stops it like a machine that hangs. Compiled to nothing
//! without the feature `failpoints`, which no release has.
//!
//! `PAYMENT_WRITER_FAILPOINT=name[:n[:stop]]` acts at the n-th hit (default: the first): the process is
//! gone at once, as by SIGKILL; with `stop` it gets SIGSTOP and goes on with SIGCONT.

/// A step was reached.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn hit(_: &'static str) {}

/// A step was reached.
#[cfg(feature = "failpoints")]
pub fn hit(name: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Point {
        name: String,
        at: u64,
        stops: bool,
    }
    static POINT: LazyLock<Option<Point>> = LazyLock::new(|| {
        let text = std::env::var("PAYMENT_WRITER_FAILPOINT").ok()?;
        let mut parts = text.split(':');
        let name = parts.next()?.to_owned();
        let at = parts.next().and_then(|n| n.parse().ok()).unwrap_or(1);
        Some(Point { name, at, stops: parts.next() == Some("stop") })
    });
    static HITS: AtomicU64 = AtomicU64::new(0);

    let Some(point) = POINT.as_ref().filter(|point| point.name == name) else { return };
    if HITS.fetch_add(1, Ordering::Relaxed) + 1 != point.at {
        return;
    }
    if point.stops {
        // A shell's own `kill` is there on every machine, the program is not.
        let stop = format!("kill -s STOP {}", std::process::id());
        let _ = std::process::Command::new("sh").args(["-c", &stop]).status();
    } else {
        // SIGABRT without a handler: no thread runs on, nothing is closed or flushed by the process.
        std::process::abort();
    }
}
