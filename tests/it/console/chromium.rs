//! A headless Chromium, which chromedriver drives for a test. Both end with the test, and keep nothing.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use ureq::Agent;

use crate::support::wait_until;

const AXE: &str = include_str!("axe/axe.min.js");
/// Time limit of a single command.
const LIMIT: Duration = Duration::from_secs(60);
const ARGUMENTS: [&str; 8] = [
    "--headless",
    "--disable-gpu",
    // A container may give little to /dev/shm.
    "--disable-dev-shm-usage",
    // It ends when chromedriver does, whatever ends that.
    "--remote-debugging-pipe",
    // It asks nobody but the daemon.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1280,1000",
];

/// A page of a daemon in a browser of its own. If the test is failing, what it shows is printed at the end.
pub struct Browser {
    agent: Agent,
    /// Address of its commands.
    session: String,
    driver: Child,
    dir: TempDir,
}

impl Browser {
    /// Starts a browser.
    pub fn start() -> Browser {
        Browser::with_preferences(&json!({}))
    }

    /// Starts a browser that runs no script of a page.
    pub fn without_scripts() -> Browser {
        Browser::with_preferences(&json!({ "profile.managed_default_content_settings.javascript": 2 }))
    }

    fn with_preferences(preferences: &Value) -> Browser {
        let dir = TempDir::with_prefix("browser-").unwrap();
        let output = dir.path().join("chromedriver.log");
        // It is killed if the thread of this test ends without it.
        let driver = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "chromedriver", "--port=0"])
            .envs(["HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"].map(|name| (name, dir.path())))
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&output).unwrap())
            .stderr(Stdio::null())
            .spawn();
        let driver = driver.expect("setpriv starts chromedriver; `dev/install --browser` brings both");
        let config =
            Agent::config_builder().timeout_global(Some(LIMIT)).proxy(None).http_status_as_error(false);
        let agent = Agent::new_with_config(config.build());
        let mut browser = Browser { agent, session: String::new(), driver, dir };
        let port = || {
            let text = std::fs::read_to_string(&output).unwrap_or_default();
            let (_, rest) = text.split_once("successfully on port ")?;
            Some(rest.split_once('.')?.0.to_owned())
        };
        wait_until("chromedriver listens; `dev/install --browser` brings it", || port().is_some());
        let mut arguments = ARGUMENTS.map(str::to_owned).to_vec();
        arguments.push(format!("--user-data-dir={}", browser.dir.path().join("profile").display()));
        if !may_isolate() {
            arguments.push("--no-sandbox".to_owned());
        }
        let capabilities = json!({
            "goog:chromeOptions": { "args": arguments, "prefs": preferences },
            "goog:loggingPrefs": { "browser": "ALL" },
        });
        let sessions = format!("http://127.0.0.1:{}/session", port().unwrap());
        browser.session = sessions.clone();
        let new = browser.post("", &json!({ "capabilities": { "alwaysMatch": capabilities } })).unwrap();
        browser.session = format!("{sessions}/{}", new["sessionId"].as_str().unwrap());
        browser
    }

    /// Sends a command of the W3C's WebDriver protocol, or of Chromium's own.
    fn post(&self, path: &str, body: &Value) -> Result<Value, String> {
        let request = self.agent.post(format!("{}{path}", self.session));
        let mut answer = request
            .content_type("application/json")
            .send(body.to_string())
            .map_err(|error| format!("{path}: {error}"))?;
        let text = answer.body_mut().read_to_string().map_err(|error| format!("{path}: {error}"))?;
        let mut value: Value = serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))?;
        if answer.status() == 200 { Ok(value["value"].take()) } else { Err(format!("{path}: {text}")) }
    }

    /// Sends a command of the Chrome DevTools Protocol.
    #[track_caller]
    pub fn devtools(&self, command: &str, parameters: &Value) {
        self.post("/goog/cdp/execute", &json!({ "cmd": command, "params": parameters })).unwrap();
    }

    /// Opens a page of this daemon.
    #[track_caller]
    pub fn open(&self, admin: SocketAddr, path: &str) {
        self.post("/url", &json!({ "url": format!("http://{admin}{path}") })).unwrap();
    }

    /// What a script returns; it waits for a promise.
    #[track_caller]
    pub fn run(&self, script: &str, arguments: &[Value]) -> Value {
        self.post("/execute/sync", &json!({ "script": script, "args": arguments })).unwrap()
    }

    /// The text of the first element; empty if there is none, or it is not shown.
    #[track_caller]
    pub fn text(&self, selector: &str) -> String {
        let script = "const node = document.querySelector(arguments[0]);
                      return node?.checkVisibility() ? node.innerText : '';";
        self.run(script, &[selector.into()]).as_str().unwrap().to_owned()
    }

    /// The number of elements that are shown.
    #[track_caller]
    pub fn count(&self, selector: &str) -> usize {
        let script = "return [...document.querySelectorAll(arguments[0])].filter((node) => node.checkVisibility()).length";
        self.run(script, &[selector.into()]).as_u64().unwrap() as usize
    }

    #[track_caller]
    pub fn click(&self, selector: &str) {
        self.run("document.querySelector(arguments[0]).click()", &[selector.into()]);
    }

    /// Fails unless axe-core finds nothing, in light and in dark.
    #[track_caller]
    pub fn is_accessible(&self, state: &str) {
        // In the dark only colours differ.
        for (scheme, rules) in [("dark", json!(["color-contrast"])), ("light", Value::Null)] {
            let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
            self.devtools("Emulation.setEmulatedMedia", &json!({ "features": features }));
            if self.run("return window.axe === undefined", &[]) == true {
                self.run(AXE, &[]);
            }
            let script = "const options = { resultTypes: ['violations'], runOnly: arguments[0] ?? undefined };
                          return axe.run(document, options).then(({ violations, passes }) => ({
                              passed: passes.length,
                              found: violations.flatMap(({ id, nodes }) => nodes.map(({ target, failureSummary }) =>
                                  `${id} ${target}: ${failureSummary}`)),
                          }))";
            let result = self.run(script, &[rules]);
            assert_eq!(result["found"], json!([]), "{state}, {scheme}: {result:#}");
            assert_ne!(result["passed"], 0, "{state}, {scheme}: nothing was checked");
        }
    }

    /// Fails if the page is wider than its window, a telephone's of 360 pixels.
    #[track_caller]
    pub fn fits_a_telephone(&self, state: &str) {
        let telephone = json!({ "width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": true });
        self.devtools("Emulation.setDeviceMetricsOverride", &telephone);
        let script = "const isCut = (node) => node.closest('.scroll, .vh, pre');
                      return [document.documentElement.scrollWidth,
                          ...[...document.body.querySelectorAll('*')]
                              .filter((node) => node.getBoundingClientRect().right > 360.5 && !isCut(node))
                              .map((node) => node.outerHTML.slice(0, 100))]";
        let wide = self.run(script, &[]);
        self.devtools("Emulation.clearDeviceMetricsOverride", &json!({}));
        assert_eq!(wide, json!([360]), "{state}: the width, and what is cut off");
    }

    /// The console's errors since the last call. Chromium itself says what it could not load; the page does
    /// not.
    #[track_caller]
    pub fn errors(&self, is_network_expected: bool) -> Vec<String> {
        let entries = self.post("/se/log", &json!({ "type": "browser" })).unwrap();
        let entries = entries.as_array().unwrap().iter().filter(|entry| {
            entry["level"] == "SEVERE" && !(is_network_expected && entry["source"] == "network")
        });
        entries.map(|entry| entry.to_string()).collect()
    }

    /// Fails if the console has an error, or anything was asked of another origin.
    #[track_caller]
    pub fn is_clean(&self, is_network_expected: bool) {
        assert_eq!(self.errors(is_network_expected), Vec::<String>::new());
        let script = "return performance.getEntriesByType('resource').map((entry) => entry.name)
                          .filter((name) => !name.startsWith(location.origin + '/') && !name.startsWith('data:'))";
        assert_eq!(self.run(script, &[]), json!([]));
    }
}

/// Chromium isolates its parts from each other in user namespaces, which root does not need and some
/// containers do not have.
fn may_isolate() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    let may_unshare = || Command::new("unshare").args(["--user", "true"]).stderr(Stdio::null()).status();
    id.stdout != b"0\n" && may_unshare().is_ok_and(|status| status.success())
}

impl Drop for Browser {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let script = "return location + '\\n' + document.body.innerText.slice(0, 3000)";
            let shown = self.post("/execute/sync", &json!({ "script": script, "args": [] }));
            let shown =
                shown.as_ref().map_or_else(String::as_str, |shown| shown.as_str().unwrap_or_default());
            eprintln!("--- the page ---\n{shown}");
        }
        // Returns when Chromium has ended.
        let _ = self.agent.delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
