//! Memory limit of this process.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Mount points of control groups: version 2, or version 1's memory controller.
const V2: &str = "/sys/fs/cgroup";
const V1: &str = "/sys/fs/cgroup/memory";

/// The limit seldom changes, and reading it takes many files.
const READ_EVERY: Duration = Duration::from_secs(60);

/// Like [`limit_bytes`], but cached for up to a minute.
pub fn recent_limit_bytes() -> Option<u64> {
    static READ: Mutex<Option<(Instant, Option<u64>)>> = Mutex::new(None);
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    match *read {
        Some((at, bytes)) if at.elapsed() < READ_EVERY => bytes,
        _ => {
            let bytes = limit_bytes();
            *read = Some((Instant::now(), bytes));
            bytes
        }
    }
}

/// Lowest limit of the process's control groups, or the machine's memory if that is less; in bytes.
pub fn limit_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let read = |path: &Path| fs::read_to_string(path).ok();
    let machine = machine(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    of_groups(&groups, read).into_iter().chain(machine).min()
}

fn machine(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1_024)
}

/// Lowest limit of the groups in `/proc/self/cgroup` and their ancestors. In a container the path may be the
/// host's while the container's own group is mounted as the root, so missing paths are skipped.
fn of_groups(groups: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut lowest: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mount, file) = match controllers {
            "" => (V2, "memory.max"),
            names if names.split(',').any(|name| name == "memory") => (V1, "memory.limit_in_bytes"),
            _ => continue,
        };
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            // "max" does not parse: no limit. Version 1 reports a number beyond any memory instead.
            let limit = read(&Path::new(mount).join(group).join(file)).and_then(|t| t.trim().parse().ok());
            lowest = lowest.into_iter().chain(limit).min();
        }
    }
    lowest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(groups: &str, files: &[(&str, &str)]) -> Option<u64> {
        let read = |path: &Path| {
            files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).to_owned())
        };
        of_groups(groups, read)
    }

    #[test]
    fn the_lowest_limit_on_the_way_to_the_root_counts() {
        let files = [
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/memory.max", "2048\n"),
            ("/sys/fs/cgroup/memory.max", "4096\n"),
        ];
        assert_eq!(limit("0::/a/b\n", &files), Some(2_048));
        assert_eq!(limit("0::/elsewhere/of/the/host\n", &files), Some(4_096));
        assert_eq!(limit("0::/a/b\n", &files[..1]), None);
        let files = [("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1024\n")];
        assert_eq!(limit("5:cpu,memory:/x\n4:cpu:/y\n", &files), Some(1_024));
        assert_eq!(limit("", &files), None);
    }

    #[test]
    fn the_machines_memory_is_in_kib() {
        assert_eq!(machine("MemFree: 1 kB\nMemTotal:       24 kB\n"), Some(24_576));
        assert!(limit_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
