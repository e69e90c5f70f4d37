//! Secrets from outside: what a command prints, and whether files have changed.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::sync::Semaphore;

/// How long to wait for the output after the command has ended; a process that it left behind may hold the
/// pipe open.
const OUTPUT_WAIT: Duration = Duration::from_secs(2);
/// A token has a few hundred bytes, with many claims a few thousand; brokers refuse larger ones.
const OUTPUT_MAX: u64 = 256 * 1024;
/// Bytes of a file that are compared. Bundles of certificates have a few hundred KiB.
const FILE_MAX: u64 = 4 * 1024 * 1024;
const LOOK_AROUND: Duration = Duration::from_millis(20);
/// How often to look for the end of processes that commands left behind.
const REAP_EVERY: Duration = Duration::from_secs(1);
/// Timeout of reading a few files.
pub const READ_MAX: Duration = Duration::from_secs(5);
/// Calls of one [`Blocking`] that may run at the same time.
const CALLS_MAX: usize = 4;

/// Runs calls that read files or start programs on threads for blocking work, because these may be on a network drive that
/// hangs. A call that hangs keeps its thread, so their number has a limit.
#[derive(Clone, Debug)]
pub struct Blocking(Arc<Semaphore>);

impl Default for Blocking {
    fn default() -> Self {
        Self::new()
    }
}

impl Blocking {
    /// One for each purpose, so that files that hang do not hold up others.
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(CALLS_MAX)))
    }

    /// Waits for the call within this time limit, which includes the wait for a thread.
    ///
    /// # Errors
    /// When it does not return in time.
    pub async fn within<T: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let called = async {
            let permit = Arc::clone(&self.0).acquire_owned().await.map_err(|error| error.to_string())?;
            let call = move || {
                let _permit = permit;
                call()
            };
            tokio::task::spawn_blocking(call).await.map_err(|error| error.to_string())
        };
        let called = tokio::time::timeout(limit, called).await;
        called.unwrap_or_else(|_| Err(format!("not done within {} s", limit.as_secs())))
    }
}

/// A running command with all processes that it started (a process group). Dropping it kills the group, so
/// that no processes pile up.
struct RunningCommand(Child, Counted);

static COMMANDS: Mutex<Commands> = Mutex::new(Commands { running: 0, is_reaping: false });

struct Commands {
    running: usize,
    /// Whether a thread runs that reaps.
    is_reaping: bool,
}

impl Commands {
    fn lock() -> MutexGuard<'static, Self> {
        COMMANDS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps children that have ended. Whether others are left, and no command runs, whose end it would take.
    fn reap(&mut self) -> bool {
        self.is_reaping = self.running == 0
            && loop {
                match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                    Ok(Some(_)) => {}
                    Ok(None) => break true,
                    // There is no child.
                    Err(_) => break false,
                }
            };
        self.is_reaping
    }
}

/// A running command among [`Commands`].
struct Counted;

impl Drop for Counted {
    fn drop(&mut self) {
        let mut commands = Commands::lock();
        commands.running -= 1;
        // Process 1, as in a container, is made the parent of what commands leave behind, and has to reap it.
        if commands.running == 0 && std::process::id() == 1 && !commands.is_reaping {
            let reap = || {
                while Commands::lock().reap() {
                    std::thread::sleep(REAP_EVERY);
                }
            };
            commands.is_reaping = std::thread::Builder::new().name("reaper".to_owned()).spawn(reap).is_ok();
        }
    }
}

impl RunningCommand {
    fn start(command: &[String], variables: &[(&str, String)]) -> Result<Self, String> {
        let (program, arguments) = command.split_first().ok_or("the command is empty")?;
        let mut commands = Commands::lock();
        let started = Command::new(program)
            .args(arguments)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        let child = started.map_err(|error| format!("it cannot be started: {error}"))?;
        commands.running += 1;
        Ok(Self(child, Counted))
    }

    /// Whether it has ended. Does not reap it, so that its process id cannot be reused before
    /// [`end`](Self::end).
    fn has_ended(&self) -> bool {
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        !matches!(waitid(WaitId::Pid(Pid::from_child(&self.0)), look), Ok(None))
    }

    /// Kills what is left of the group, and returns the command's exit status.
    fn end(&mut self) -> Result<ExitStatus, String> {
        // It fails if no process is left.
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        self.0.wait().map_err(|error| format!("it cannot be waited for: {error}"))
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        // Not if it was reaped before: its process id may belong to another process by now.
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.end();
        }
    }
}

/// Runs the command to its end, with these environment variables, within `limit`. Its stderr is not shown, because it
/// may contain a secret.
///
/// # Errors
/// Why there is no output, without any of it.
pub fn output_of(
    command: &[String],
    variables: &[(&str, String)],
    limit: Duration,
) -> Result<String, String> {
    let mut process = RunningCommand::start(command, variables)?;
    let (sender, receiver) = mpsc::channel();
    if let Some(stdout) = process.0.stdout.take() {
        // The thread ends when the pipe closes, at the latest when the group is killed.
        let read = move || {
            let mut output = String::new();
            let _ = stdout.take(OUTPUT_MAX).read_to_string(&mut output);
            let _ = sender.send(output);
        };
        let _ = std::thread::Builder::new().name("command-output".to_owned()).spawn(read);
    }
    let deadline = Instant::now() + limit;
    while !process.has_ended() {
        if Instant::now() > deadline {
            return Err(format!("it did not end within {} s", limit.as_secs()));
        }
        std::thread::sleep(LOOK_AROUND);
    }
    let output = receiver.recv_timeout(OUTPUT_WAIT);
    let status = process.end()?;
    if !status.success() {
        return Err(format!("it failed ({status}); run it by hand to see its error"));
    }
    output.map_err(|_| "a child process still runs, and its output does not end".to_owned())
}

/// A hash of the contents of files, and of the files in folders. It changes with any of them, also when one is
/// replaced at an unchanged time, as by links.
pub fn fingerprint<'p>(paths: impl IntoIterator<Item = &'p str>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for path in paths {
        let path = Path::new(path);
        let mut files = match fs::read_dir(path) {
            Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
            Err(_) => vec![path.to_owned()],
        };
        files.sort();
        for file in files {
            file.hash(&mut hasher);
            let mut contents = Vec::new();
            let read = fs::File::open(&file).and_then(|file| file.take(FILE_MAX).read_to_end(&mut contents));
            (read.map_err(|error| error.kind()), contents).hash(&mut hasher);
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_that_hang_keep_few_threads_and_nobody_waits_for_them() {
        let reads = Blocking::new();
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        // Opening a pipe to read waits until somebody writes.
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let read = async |limit| {
            let path = pipe.to_str().unwrap().to_owned();
            reads.within(limit, move || fingerprint([path.as_str()])).await
        };
        let soon = Duration::from_millis(50);
        for _ in 0..3 * CALLS_MAX {
            assert!(read(soon).await.is_err_and(|error| error.contains("not done within")));
        }
        assert_eq!(reads.0.available_permits(), 0);

        // WHEN the drive answers again, THEN files are read again
        let written = pipe.clone();
        std::thread::spawn(move || {
            loop {
                // Each reader reads up to a moment without a writer.
                drop(fs::write(&written, "now"));
                std::thread::sleep(LOOK_AROUND);
            }
        });
        assert!(read(Duration::from_secs(60)).await.is_ok());
    }

    #[test]
    fn a_changed_file_is_noticed_whatever_its_time_and_size() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.crt");
        let now = |path: &Path| fingerprint([path.to_str().unwrap()]);
        let without = now(&file);
        fs::write(&file, "one").unwrap();
        let time = fs::metadata(&file).unwrap().modified().unwrap();
        let (first, first_in_folder) = (now(&file), now(folder.path()));
        assert!(without != first && now(&file) == first);
        fs::write(&file, "two").unwrap();
        fs::File::options().append(true).open(&file).unwrap().set_modified(time).unwrap();
        assert!(now(&file) != first && now(folder.path()) != first_in_folder);
        let of_folder = now(folder.path());
        fs::rename(&file, folder.path().join("former.crt")).unwrap();
        assert!(now(folder.path()) != of_folder);
    }

    #[test]
    fn a_command_has_a_limit_of_time_and_one_of_output_and_leaves_nothing_behind() {
        let run = |script: &str, limit| {
            let command = ["sh", "-c", script].map(str::to_owned);
            output_of(&command, &[], Duration::from_millis(limit))
        };
        // GIVEN a command that hangs with a child of its own
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! >{}; wait", file.display());
        // THEN it is ended, and its child, too
        assert!(run(&script, 2_000).unwrap_err().contains("did not end within"));
        let child = fs::read_to_string(&file).unwrap();
        let stat = Path::new("/proc").join(child.trim()).join("stat");
        let until = Instant::now() + Duration::from_secs(60);
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < until, "the child still runs");
            std::thread::sleep(LOOK_AROUND);
        }
        // AND output without an end is not kept
        let long = run("head -c 1000000 /dev/zero | tr '\\0' x", 60_000);
        assert!(long.is_err_and(|error| error.contains("it failed")));
    }
}
