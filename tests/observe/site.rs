//! Prometheus, Alertmanager and the exporters, started by `dev/observe`, and queries of them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Daemon, Scope};

/// Time limit for any wait, on a shared machine. Only a failing test waits for all of it.
const DEADLINE: Duration = Duration::from_secs(300);

/// The rules' durations are divided by this: an hour lasts a minute.
const FASTER: &str = "60";

/// Runs one of the repository's own programs; returns its output, also if it failed.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(program);
    let output = Command::new(path).args(arguments).stdin(Stdio::null()).output().unwrap();
    let [said, errors] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    if output.status.success() { Ok(said) } else { Err(format!("{program} {arguments:?}:\n{said}{errors}")) }
}

/// Installs promtool and the other programs if they are missing.
pub fn tools_are_here() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        run("dev/install", &["--observe"]).unwrap_or_else(|said| panic!("{said}"));
    });
}

/// An alert from Alertmanager's API.
#[derive(Debug)]
struct Told {
    name: String,
    is_page: bool,
    is_held_back: bool,
}

/// The monitoring programs beside some daemons. They end with this process, however it exits.
pub struct Site {
    dir: PathBuf,
    prometheus: String,
    alertmanager: String,
}

impl Site {
    pub fn start(scope: &Scope<'_>, daemons: &[&Daemon]) -> Site {
        tools_are_here();
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("observe-{}", std::process::id()));
        let addresses: Vec<String> = daemons.iter().map(|daemon| daemon.admin.to_string()).collect();
        let (owner, database) =
            (std::process::id().to_string(), scope.servers.postgres_monitor_url(&scope.database));
        let mut words = vec!["up", "--dir", dir.to_str().unwrap(), "--owner-pid", &owner];
        words.extend(["--faster", FASTER, "--postgres", &database]);
        words.extend(addresses.iter().flat_map(|address| ["--daemon", address]));
        let said = run("dev/observe", &words).unwrap_or_else(|said| panic!("{said}"));
        let setting = |name: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(&format!("export {name}=")));
            line.unwrap_or_else(|| panic!("no {name} in:\n{said}")).to_owned()
        };
        Site { prometheus: setting("OBSERVE_PROMETHEUS"), alertmanager: setting("OBSERVE_ALERTMANAGER"), dir }
    }

    /// Runs every dashboard query that has data here, optionally including those that have data only during a
    /// fault.
    pub fn dashboard_has_data(&self, in_fault: bool) {
        let fault = if in_fault { &["--fault"][..] } else { &[] };
        let words = [&["--prometheus", &self.prometheus], fault].concat();
        self.wait("every query of the dashboard has data", || run("ops/grafana/check", &words).map(drop));
    }

    /// Waits until a query returns this many series.
    pub fn wait_for_series(&self, query: &str, count: usize) {
        self.wait(&format!("{count} series of {query}"), || {
            let found = self.query(query);
            if found.len() == count { Ok(()) } else { Err(format!("{found:#?}")) }
        });
    }

    /// Waits until exactly these pages are sent, for each daemon if they have an instance, and until these
    /// other alerts fire and are inhibited.
    pub fn wait_for_pages(&self, pages: &[&str], held_back: &[&str]) {
        let expected: BTreeSet<&str> = pages.iter().copied().collect();
        self.wait(&format!("the pages {pages:?}, with {held_back:?} inhibited"), || {
            let (firing, told) = (self.firing()?, self.told()?);
            let reaching = told.iter().filter(|alert| alert.is_page && !alert.is_held_back);
            let reaching: BTreeSet<&str> = reaching.map(|alert| alert.name.as_str()).collect();
            let is_held_back = |name: &str| told.iter().any(|alert| alert.name == name && alert.is_held_back);
            let is_so = reaching == expected
                && expected.iter().all(|name| firing.contains(*name))
                && held_back.iter().all(|name| firing.contains(*name) && is_held_back(name));
            if is_so { Ok(()) } else { Err(format!("Prometheus: {firing:?}\nAlertmanager: {told:#?}")) }
        });
    }

    /// Waits until no alert fires in Prometheus or Alertmanager, except those with a window longer than this
    /// test.
    pub fn wait_until_clear(&self, but_for: &[&str]) {
        self.wait("all alerts are over", || {
            let mut left: BTreeSet<String> = self.firing()?;
            left.extend(self.told()?.into_iter().map(|alert| alert.name));
            left.retain(|name| !but_for.contains(&name.as_str()));
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        });
    }

    /// Fails if one of these alerts has fired since, even briefly.
    pub fn never_fired(&self, since: Instant, names: &[&str]) {
        let query = format!(
            "count by (alertname) (count_over_time(ALERTS{{alertstate=\"firing\",alertname=~\"{}\"}}[{}s]))",
            names.join("|"),
            since.elapsed().as_secs().max(1),
        );
        assert_eq!(self.query(&query), Vec::<Value>::new(), "{}", self.alerts());
    }

    fn wait(&self, what: &str, mut condition: impl FnMut() -> Result<(), String>) {
        let begin = Instant::now();
        while let Err(found) = condition() {
            assert!(
                begin.elapsed() < DEADLINE,
                "not within {DEADLINE:?}: {what}\n{found}\nwhat Prometheus says of alerts:\n{}",
                self.alerts()
            );
            std::thread::sleep(Duration::from_millis(250));
        }
        println!("{:6.1} s until {what}", begin.elapsed().as_secs_f64());
    }

    fn query(&self, query: &str) -> Vec<Value> {
        let url = format!("{}/api/v1/query", self.prometheus);
        let mut answer = ureq::get(url).query("query", query).call().unwrap();
        let answer = parse(&mut answer);
        answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{query}: {answer}")).clone()
    }

    /// Names of the firing alerts, from Prometheus.
    fn firing(&self) -> Result<BTreeSet<String>, String> {
        let answer = self.get(&format!("{}/api/v1/alerts", self.prometheus))?;
        let alerts = answer["data"]["alerts"].as_array().unwrap();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        Ok(firing.map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned()).collect())
    }

    fn told(&self) -> Result<Vec<Told>, String> {
        let answer = self.get(&format!("{}/api/v2/alerts", self.alertmanager))?;
        let told = |alert: &Value| Told {
            name: alert["labels"]["alertname"].as_str().unwrap().to_owned(),
            is_page: alert["labels"]["severity"] == "page",
            is_held_back: alert["status"]["inhibitedBy"].as_array().is_some_and(|by| !by.is_empty()),
        };
        Ok(answer.as_array().unwrap().iter().map(told).collect())
    }

    fn get(&self, url: &str) -> Result<Value, String> {
        let mut answer = ureq::get(url).call().map_err(|error| format!("{url}: {error}"))?;
        Ok(parse(&mut answer))
    }

    /// Everything that Prometheus reports about alerts, for the message of a failure.
    fn alerts(&self) -> String {
        let answer = self.get(&format!("{}/api/v1/alerts", self.prometheus));
        answer.map_or_else(|error| error, |answer| format!("{:#}", answer["data"]["alerts"]))
    }
}

fn parse(answer: &mut ureq::http::Response<ureq::Body>) -> Value {
    serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap()
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the programs' logs are in {}", self.dir.join("data/logs").display());
        }
        if let Err(said) = run("dev/observe", &["destroy", "--dir", self.dir.to_str().unwrap()]) {
            eprintln!("{said}");
        }
    }
}
