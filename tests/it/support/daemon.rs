//! The program under test: commands, and the daemon as a child process.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::panic;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use super::{DEADLINE, Scope, free_address, wait_until};

/// Environment variable with the path of another build of the program, for all tests or for one process.
pub const TESTED_PROGRAM: &str = "PAYMENT_WRITER_TESTED_PROGRAM";
/// Value of a variable that a program does not get.
pub const LEFT_TO_FILE: &str = "left to the settings file";

/// Output and exit code of a finished command.
#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Fails the test unless the command ended with code 0.
    #[track_caller]
    pub fn succeeds(self) -> Finished {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// Status line and headers, in lower case.
    pub head: String,
    pub body: String,
}

impl Scope<'_> {
    /// Runs one of the program's commands until it exits.
    pub fn command(&self, arguments: &[&str]) -> Finished {
        self.command_with(arguments, &[])
    }

    /// As [`Scope::command`], with further settings as environment variables.
    pub fn command_with(&self, arguments: &[&str], settings: &[(&str, &str)]) -> Finished {
        let output = self.program(arguments, settings).stdin(Stdio::null()).output().unwrap();
        Finished {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts the program with its output in a file and a free admin port.
    pub fn daemon(&self, arguments: &[&str]) -> Daemon {
        self.daemon_with(arguments, &[])
    }

    /// As [`Scope::daemon`], with further settings as environment variables.
    pub fn daemon_with(&self, arguments: &[&str], settings: &[(&str, &str)]) -> Daemon {
        self.daemon_at(free_address(), arguments, settings)
    }

    /// As [`Scope::daemon_with`], with this admin port.
    pub fn daemon_at(&self, admin: SocketAddr, arguments: &[&str], settings: &[(&str, &str)]) -> Daemon {
        remember_failures();
        let log = self.dir.join(format!("daemon-{}.log", admin.port()));
        let output = File::options().create(true).append(true).open(&log).unwrap();
        // Two daemons on one machine are two members of the group, unless a test says otherwise.
        let (instance, listen) = (format!("instance-{}", admin.port()), admin.to_string());
        let own = [
            ("PAYMENT_WRITER__KAFKA__INSTANCE_ID", instance.as_str()),
            ("PAYMENT_WRITER__ADMIN__LISTEN", &listen),
        ];
        let child = self
            .program(arguments, &[&own[..], settings].concat())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Daemon { child, admin, log }
    }

    fn program(&self, arguments: &[&str], settings: &[(&str, &str)]) -> Command {
        let other = settings.iter().find(|(name, _)| *name == TESTED_PROGRAM).map(|(_, path)| path.into());
        let mut command = match other {
            // Another build may not know the keys of this repository's settings file.
            Some(other) => {
                let mut command = Command::new::<PathBuf>(other);
                command.current_dir(&self.dir);
                command
            }
            None => Command::new(tested_program()),
        };
        command.args(arguments).envs(self.settings()).envs(settings.iter().copied());
        for (name, _) in settings.iter().filter(|(_, value)| *value == LEFT_TO_FILE) {
            command.env_remove(name);
        }
        command
    }
}

/// The build made with the tests, or another build that the same tests should check.
fn tested_program() -> PathBuf {
    let other = std::env::var_os(TESTED_PROGRAM).map(PathBuf::from);
    other.unwrap_or_else(|| env!("CARGO_BIN_EXE_payment-writer").into())
}

/// Sends a request with these header lines to an admin port; `None` while it does not answer.
pub fn ask(admin: SocketAddr, method: &str, path: &str, headers: &[&str], body: &str) -> Option<Reply> {
    let mut stream = TcpStream::connect_timeout(&admin, Duration::from_secs(1)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    // HTTP/1.0: the response is not chunked and ends with the connection.
    let length = format!("Content-Length: {}", body.len());
    let headers = [headers, &[length.as_str()]].concat().join("\r\n");
    stream.write_all(format!("{method} {path} HTTP/1.0\r\n{headers}\r\n\r\n{body}").as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Reply { status, head: head.to_ascii_lowercase(), body: body.to_owned() })
}

thread_local! {
    /// The message with which this thread's test failed.
    static FAILURE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps each test's message for [`Daemon`]'s drop.
fn remember_failures() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            FAILURE.set(info.to_string());
            default(info);
        }));
    });
}

/// A running daemon. Dropping it kills it, and prints its log if the test is failing.
pub struct Daemon {
    child: Child,
    pub admin: SocketAddr,
    log: PathBuf,
}

impl Daemon {
    /// Sends SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM, which starts a drain.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal by name, e.g. `STOP`, `CONT`, `INT`.
    pub fn signal(&self, name: &str) {
        // Every machine has the shell's built-in `kill`, not every machine has the program.
        let kill = format!("kill -s {name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success(), "{kill}");
    }

    /// Waits until the process exits by itself.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < DEADLINE, "the daemon has not ended within {DEADLINE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process is stopped, as by SIGSTOP.
    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The name before the state may contain anything, including parentheses.
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its whole output so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    /// Sends a GET request to the admin port; `None` while it does not answer.
    pub fn get(&self, path: &str) -> Option<Reply> {
        self.ask("GET", path, "")
    }

    /// As [`Daemon::get`], with a body to set a value.
    pub fn put(&self, path: &str, body: &str) -> Option<Reply> {
        self.ask("PUT", path, body)
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Option<Reply> {
        ask(self.admin, method, path, &["Host: localhost"], body)
    }

    #[track_caller]
    pub fn wait_until_ready(&self) {
        wait_until("the daemon is ready", || self.get("/readyz").is_some_and(|reply| reply.status == 200));
    }

    /// The sum of a metric's samples whose labels contain `labels` (e.g. `outcome="written"`; empty: all).
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let Some(reply) = self.get("/metrics") else { return 0.0 };
        let samples = reply.body.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, found_labels) = series.split_once('{').unwrap_or((series, ""));
            (found == name && found_labels.contains(labels)).then(|| value.parse::<f64>().ok())?
        });
        samples.sum()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the daemon ---\n{}", self.log());
            // Once more, as logs are long, and some viewers cut the middle of a long output.
            eprintln!("--- the test failed ---\n{}", FAILURE.take());
        }
    }
}
