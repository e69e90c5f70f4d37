//! A headless Chromium, which chromedriver drives for a test. Both end with the test, and keep nothing.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fantoccini::error::CmdError;
use fantoccini::wd::WebDriverCompatibleCommand;
use fantoccini::{Client, ClientBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use url::{ParseError, Url};

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
    runtime: Runtime,
    /// Until the browser is started, and after its end, there is none.
    client: Option<Client>,
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
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let mut browser = Browser { runtime, client: None, driver, dir };
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
        let mut builder = ClientBuilder::new(HttpConnector::new());
        builder.capabilities(capabilities.as_object().unwrap().clone());
        let driver = format!("http://127.0.0.1:{}", port().unwrap());
        let client =
            browser.limited(builder.connect(&driver)).expect("chromedriver answers in time").unwrap();
        browser.client = Some(client);
        browser
    }

    /// Nothing if it takes too long.
    fn limited<T>(&self, command: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async { tokio::time::timeout(LIMIT, command).await.ok() })
    }

    #[track_caller]
    fn command<T>(&self, command: impl AsyncFnOnce(&Client) -> Result<T, CmdError>) -> T {
        let client = self.client.as_ref().expect("it is there until the end");
        self.limited(command(client)).expect("the browser answers in time").unwrap()
    }

    /// Sends a command of the Chrome DevTools Protocol.
    #[track_caller]
    pub fn devtools(&self, command: &str, parameters: &Value) -> Value {
        let body = json!({ "cmd": command, "params": parameters });
        self.command(async |client| client.issue_cmd(Extension("goog/cdp/execute", body)).await)
    }

    /// Presses a key as a person does, and releases it.
    #[track_caller]
    pub fn press(&self, key: &str) {
        let codes = ["Tab", "Enter", "Escape", "End", "Home", "ArrowLeft", "ArrowRight"].iter();
        let code = codes.zip([9, 13, 27, 35, 36, 37, 39]).find(|(name, _)| **name == key).unwrap().1;
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let event =
                json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.devtools("Input.dispatchKeyEvent", &event);
        }
    }

    /// The number of pages that the page needs in print.
    #[track_caller]
    pub fn printed_pages(&self) -> usize {
        let pdf =
            self.devtools("Page.printToPDF", &json!({ "preferCSSPageSize": true, "printBackground": true }));
        let pdf = openssl::base64::decode_block(pdf["data"].as_str().unwrap()).unwrap();
        let pdf = String::from_utf8_lossy(&pdf);
        pdf.matches("/Type /Page").count() - pdf.matches("/Type /Pages").count()
    }

    /// Opens a page of this daemon.
    #[track_caller]
    pub fn open(&self, admin: SocketAddr, path: &str) {
        self.command(async |client| client.goto(&format!("http://{admin}{path}")).await);
    }

    /// What a script returns; it waits for a promise.
    #[track_caller]
    pub fn run(&self, script: &str, arguments: &[Value]) -> Value {
        self.command(async |client| client.execute(script, arguments.to_vec()).await)
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
        let entries = self.command(async |client| {
            client.issue_cmd(Extension("se/log", json!({ "type": "browser" }))).await
        });
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

/// A command that is not of the W3C's protocol: its path below the session, and its body.
#[derive(Debug)]
struct Extension(&'static str, Value);

impl WebDriverCompatibleCommand for Extension {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.0))
    }

    fn method_and_body(&self, _: &Url) -> (http::Method, Option<String>) {
        (http::Method::POST, Some(self.1.to_string()))
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
            let shown = self.client.as_ref().map(|client| self.limited(client.execute(script, Vec::new())));
            if let Some(Some(Ok(Value::String(shown)))) = shown {
                eprintln!("--- the page ---\n{shown}");
            }
        }
        if let Some(client) = self.client.take() {
            // Returns when Chromium has ended.
            let _ = self.limited(client.close());
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
