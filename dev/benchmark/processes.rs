//! CPU time and memory of processes from /proc, and child processes that end with this one.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use crate::Outcome;

/// CPU ticks of one process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ticks {
    /// User and system, of all its threads.
    own: u64,
    /// Of children that exited and were waited for, and of their children.
    reaped: u64,
}

/// Reads `/proc/PID/stat`. The name, in parentheses, may contain anything, including parentheses.
fn parse_stat(text: &str) -> Option<Ticks> {
    let (_, fields) = text.rsplit_once(") ")?;
    let mut numbers = fields.split_ascii_whitespace().skip(11).map(str::parse::<u64>);
    let mut next = || numbers.next()?.ok();
    Some(Ticks { own: next()? + next()?, reaped: next()? + next()? })
}

/// A line such as `VmHWM:   1234 kB` of `/proc/PID/status`, in bytes.
fn parse_status(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1_024)
}

/// The first line of `/proc/stat`: ticks in which the cores were busy, stolen or idle.
fn parse_machine(text: &str) -> Option<(u64, u64)> {
    let fields: Vec<u64> = text
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let [user, nice, system, idle, wait, irq, softirq, steal, ..] = fields[..] else { return None };
    Some((user + nice + system + irq + softirq + steal, idle + wait))
}

fn ticks_a_second() -> f64 {
    static TICKS: OnceLock<f64> = OnceLock::new();
    *TICKS.get_or_init(|| {
        let said = Command::new("getconf").arg("CLK_TCK").output().ok();
        said.and_then(|said| String::from_utf8_lossy(&said.stdout).trim().parse().ok()).unwrap_or(100.0)
    })
}

fn ticks(pid: u32) -> Option<Ticks> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn family_ticks(pid: u32) -> u64 {
    let Some(Ticks { own, reaped }) = ticks(pid) else { return 0 };
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let living: u64 =
        children.split_ascii_whitespace().filter_map(|c| c.parse().ok()).map(family_ticks).sum();
    own + reaped + living
}

/// CPU seconds of these processes, of their running children, and of children that they have waited for.
pub fn cpu_seconds(pids: &[u32]) -> f64 {
    pids.iter().map(|pid| family_ticks(*pid)).sum::<u64>() as f64 / ticks_a_second()
}

/// CPU seconds of this process alone.
pub fn own_cpu_seconds() -> f64 {
    ticks(std::process::id()).map_or(0.0, |ticks| ticks.own as f64 / ticks_a_second())
}

/// CPU seconds of this process's children that have exited.
pub fn reaped_cpu_seconds() -> f64 {
    ticks(std::process::id()).map_or(0.0, |ticks| ticks.reaped as f64 / ticks_a_second())
}

/// Memory of a process in bytes: a field of one of its files, such as `VmRSS` of `status`.
pub fn memory(pid: u32, file: &str, field: &str) -> Option<u64> {
    parse_status(&std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?, field)
}

/// Peak resident memory of a process, in bytes.
pub fn resident_max(pid: u32) -> Option<u64> {
    memory(pid, "status", "VmHWM")
}

/// Busy (or stolen) and idle core seconds of the whole machine.
pub fn machine_seconds() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let (busy, idle) = parse_machine(&text).unwrap_or_default();
    (busy as f64 / ticks_a_second(), idle as f64 / ticks_a_second())
}

/// CPU time used by the servers, a daemon and everything else since the start.
pub struct Meter<'a> {
    groups: Vec<&'a [u32]>,
    before: Vec<f64>,
    machine: (f64, f64),
}

impl<'a> Meter<'a> {
    /// Starts counting, separately for each group of processes.
    pub fn start(groups: Vec<&'a [u32]>) -> Self {
        let before = groups.iter().map(|pids| cpu_seconds(pids)).collect();
        Self { groups, before, machine: machine_seconds() }
    }

    /// CPU seconds of each group since the start.
    pub fn read(&self) -> Vec<f64> {
        self.groups.iter().zip(&self.before).map(|(pids, before)| cpu_seconds(pids) - before).collect()
    }

    /// Share of all cores' time since the start that other processes used; `ours` is in CPU seconds.
    pub fn share_of_others(&self, ours: f64) -> f64 {
        let (busy, idle) = machine_seconds();
        let (busy, idle) = (busy - self.machine.0, idle - self.machine.1);
        ((busy - ours) / (busy + idle).max(0.001)).clamp(0.0, 1.0)
    }
}

static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Sends a signal. Every machine has the shell's built-in `kill`, not every machine has the program.
fn kill(pid: u32, name: &str) {
    let _ = Command::new("sh").args(["-c", &format!("kill -s {name} {pid}")]).stderr(Stdio::null()).status();
}

/// Ends the children, too, when this process receives a signal.
pub fn end_children_on_signals() -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot create a runtime: {error}"))?;
    let listen = move || {
        runtime.block_on(async {
            let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
            let (Ok(mut terminate), Ok(mut interrupt)) = signals else { return };
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            for pid in CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                kill(*pid, "KILL");
            }
            std::process::exit(130);
        });
    };
    std::thread::Builder::new().spawn(listen).map_err(|error| format!("cannot start a thread: {error}"))?;
    Ok(())
}

/// A child process with its output in a file. It is killed when dropped.
pub struct Guarded {
    child: Child,
    pub log: PathBuf,
    what: String,
}

impl Guarded {
    /// Starts `command`; errors name it `what`.
    pub fn spawn(what: &str, command: &mut Command, log: &Path) -> Outcome<Self> {
        let output = File::create(log).map_err(|error| format!("cannot write {}: {error}", log.display()))?;
        let errors = output.try_clone().map_err(|error| format!("cannot write: {error}"))?;
        let mut held = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command
            // Ctrl-C reaches only this process, which ends its children itself.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|error| format!("cannot start {what}: {error}"))?;
        held.insert(child.id());
        Ok(Self { child, log: log.to_owned(), what: what.to_owned() })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its whole output.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// `message`, followed by the child's last lines of output.
    pub fn complain(&self, message: &str) -> String {
        let said = self.said();
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(15)..].join("\n  ");
        format!("{message}; its last output:\n  {last}")
    }

    /// Returns an error if the child has exited.
    pub fn check_alive(&mut self) -> Outcome<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.complain(&format!("{} ended: {status}", self.what))),
            Err(error) => Err(format!("waiting for {}: {error}", self.what)),
        }
    }

    pub fn terminate(&self) {
        kill(self.child.id(), "TERM");
    }

    /// Waits until it exits by itself, up to a time limit.
    pub fn wait(&mut self, limit: Duration) -> Outcome<ExitStatus> {
        let began = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if began.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => {
                    let message = format!("{} has not ended within {} s", self.what, limit.as_secs());
                    return Err(self.complain(&message));
                }
                Err(error) => return Err(format!("waiting for {}: {error}", self.what)),
            }
        }
    }

    /// As [`wait`](Self::wait); returns an error unless it succeeded.
    pub fn succeed(&mut self, limit: Duration) -> Outcome<()> {
        let status = self.wait(limit)?;
        match status.success() {
            true => Ok(()),
            false => Err(self.complain(&format!("{} failed: {status}", self.what))),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut held = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        held.remove(&self.child.id());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_is_read_behind_the_name_whatever_it_is() {
        let text = "42 (a ) b) c) S 1 42 42 0 -1 4194304 101 202 3 4 50 60 7 8 20 0 9 0 12345 1000 10";
        assert_eq!(parse_stat(text), Some(Ticks { own: 110, reaped: 15 }));
        assert_eq!(parse_stat("42 (cut short) S 1 42"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "Name:\tx\nVmPeak:\t  999 kB\nVmHWM:\t    12 kB\nVmRSS:\t 8 kB\n";
        assert_eq!(parse_status(text, "VmHWM"), Some(12_288));
        assert_eq!(parse_status(text, "VmH"), None);
    }

    #[test]
    fn time_that_was_taken_away_counts_as_busy() {
        let text = "cpu  10 1 5 100 20 2 3 4 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert_eq!(parse_machine(text), Some((25, 120)));
        assert_eq!(parse_machine("intr 1"), None);
    }

    #[test]
    fn this_very_process_can_be_read() {
        assert!(resident_max(std::process::id()).unwrap() > 0);
        assert!(ticks(std::process::id()).is_some());
        assert!(machine_seconds().1 > 0.0);
    }
}
