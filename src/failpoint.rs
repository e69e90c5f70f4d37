//! Points in the code at which a test kills or stops the process. Without the feature `failpoints`, which no
//! release has, they compile to nothing.
//!
//! `PAYMENT_WRITER_FAILPOINT=name[:n[:stop]]` acts at the n-th hit (default: the first): the process dies at
//! once, as by SIGKILL; with `stop` it gets SIGSTOP and continues with SIGCONT.
//!
//! `PAYMENT_WRITER_WITHHOLD=items[:times[:partition]]` drops the first `items` records or ends that a lane's
//! reader delivers after each of the first `times` begins (default: 1) of every partition, or of this one, as
//! if the reader had begun at a wrong position.

/// Marks that the named step was reached.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn hit(_: &'static str) {}

/// Marks that the named step was reached.
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
        // Not every machine has the program `kill`; every shell has it built in.
        let stop = format!("kill -s STOP {}", std::process::id());
        let _ = std::process::Command::new("sh").args(["-c", &stop]).status();
    } else {
        // SIGABRT without a handler: no thread continues, and the process closes or flushes nothing.
        std::process::abort();
    }
}

/// Notes a begin of these partitions, which restarts the count of [`withholds`].
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn begun(_: impl Iterator<Item = i32>) {}

/// Whether to drop the next record or end of this partition.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn withholds(_: i32) -> bool {
    false
}

#[cfg(feature = "failpoints")]
mod withholding {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex, PoisonError};

    struct Withholding {
        items: u64,
        times: u64,
        partition: Option<i32>,
        /// Begins so far, and how many items are still to be dropped after the last one.
        counts: Mutex<HashMap<i32, (u64, u64)>>,
    }

    static WITHHOLDING: LazyLock<Option<Withholding>> = LazyLock::new(|| {
        let text = std::env::var("PAYMENT_WRITER_WITHHOLD").ok()?;
        let mut parts = text.split(':');
        let items = parts.next()?.parse().ok()?;
        let times = parts.next().and_then(|n| n.parse().ok()).unwrap_or(1);
        let partition = parts.next().and_then(|n| n.parse().ok());
        Some(Withholding { items, times, partition, counts: Mutex::default() })
    });

    /// Notes a begin of these partitions, which restarts the count of [`withholds`].
    pub fn begun(partitions: impl Iterator<Item = i32>) {
        let Some(point) = WITHHOLDING.as_ref() else { return };
        let mut counts = point.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for partition in partitions.filter(|p| point.partition.is_none_or(|wanted| wanted == *p)) {
            let (begins, left) = counts.entry(partition).or_default();
            *left = if *begins < point.times { point.items } else { 0 };
            *begins += 1;
        }
    }

    /// Whether to drop the next record or end of this partition.
    pub fn withholds(partition: i32) -> bool {
        let Some(point) = WITHHOLDING.as_ref() else { return false };
        let mut counts = point.counts.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&partition) {
            Some((_, left)) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

#[cfg(feature = "failpoints")]
pub use withholding::{begun, withholds};
