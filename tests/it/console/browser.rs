//! The console in a real browser: what it says while payments flow and while something is wrong, to all readers.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::chromium::Browser;
use super::readers;
use crate::support::{Act, Flow, Load, Member, PATIENCE, Scope, Servers, free_address, wait_until_within};

const PARTITIONS: usize = 8;

pub fn waits(what: &str, condition: impl FnMut() -> bool) {
    wait_until_within(PATIENCE, what, condition);
}

/// Waits until the head of the page has a level (a selector), and its sentence contains all of these; returns it.
#[track_caller]
fn says(browser: &Browser, level: &str, texts: &[&str]) -> String {
    let head = format!("#head{level} #sentence");
    wait_until_within(PATIENCE, &format!("the page says {texts:?}, {level}"), || {
        let sentence = browser.text(&head);
        !sentence.is_empty() && texts.iter().all(|text| sentence.contains(text))
    });
    browser.text("#sentence")
}

/// Not `ok` alone: housekeeping of a daemon that has just started may have something to say.
const FLOWS: &str = ":is([data-level=ok], [data-level=warn])";

/// A cell's kind in the grid; null if there is no such cell.
fn cell(browser: &Browser, partition: usize) -> Value {
    let script =
        "return document.querySelector(`#grid .cell[data-key='${arguments[0]}']`)?.dataset.kind ?? null";
    browser.run(script, &[partition.into()])
}

/// The number of records with this outcome.
fn counter(browser: &Browser, outcome: &str) -> u64 {
    let text = browser.text(&format!("#tiles [data-key={outcome}] .muted"));
    text.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap_or_default()
}

/// Charts that have their newest value as text, and something drawn.
fn drawn(browser: &Browser) -> Value {
    let script = "return [...document.querySelectorAll('figure.chart')].filter((chart) => {
                      const canvas = chart.querySelector('canvas');
                      const pixels = canvas?.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
                      return pixels?.some((value) => value > 0) && /[0-9]/.test(chart.querySelector('.entry b').textContent);
                  }).map((chart) => chart.id)";
    browser.run(script, &[])
}

#[test]
fn a_page_in_a_browser_shows_what_flows_and_which_daemon_does_not_answer() {
    // GIVEN two daemons that know each other, and a flow of payments
    let scope = Scope::ready("browser", PARTITIONS as i32, 2);
    let addresses: [SocketAddr; 2] = std::array::from_fn(|_| free_address());
    let peers = serde_json::to_string(&addresses.map(|address| address.to_string())).unwrap();
    let start = |index: usize| {
        let instance = format!("browser-{index}");
        let settings = [
            ("PAYMENT_WRITER__CONSOLE__PEERS", peers.as_str()),
            ("PAYMENT_WRITER__KAFKA__INSTANCE_ID", &instance),
        ];
        scope.daemon_at(addresses[index], &["run"], &settings)
    };
    let (mut first, mut second) = (start(0), start(1));
    first.wait_until_ready();
    second.wait_until_ready();
    let flow = Flow::start(&scope, Load::without_bad_records(41), 6);

    // WHEN the page of one is opened
    let browser = Browser::start();
    browser.open(addresses[0], "/");

    // THEN it says that payments are written, counts them, draws them, and has the partitions of both
    says(&browser, FLOWS, &["Writing ", " payments/s"]);
    waits("all charts are drawn", || {
        drawn(&browser)
            == json!([
                "chart-rate",
                "chart-latency",
                "chart-lag",
                "chart-oldest",
                "chart-process",
                "chart-phases"
            ])
    });
    let before = counter(&browser, "written");
    waits("the counter rises", || counter(&browser, "written") > before.max(1));
    waits("each partition has a cell", || {
        browser.count("#grid .cell") == PARTITIONS && (0..PARTITIONS).all(|at| cell(&browser, at) == "live")
    });
    waits("the other daemon has a row", || browser.text("#peer-rows tr").contains("browser-1"));
    browser.is_accessible("flowing");
    browser.fits_a_telephone("flowing");
    browser.is_clean(false);
    let asked = browser.run(
        "return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).pathname)",
        &[],
    );
    for path in ["/console/console.css", "/console/main.js", "/console/state", "/status/history"] {
        assert!(asked.as_array().unwrap().contains(&path.into()), "{path}: {asked}");
    }

    let about = browser.text("#about");
    let version = env!("CARGO_PKG_VERSION");
    for fact in [
        &format!("payment-writer {version}"),
        &format!("group {}", scope.group_id),
        "instance browser-0",
        "ago",
    ] {
        assert!(about.contains(fact), "{fact}: {about}");
    }
    readers::shows_database_and_audit(&browser);

    // AND it can be paused, which its head says
    browser.click("#pause");
    says(&browser, "[data-level=paused]", &["This page is paused. As of ", "Writing "]);
    assert!(browser.run("return document.title", &[]).as_str().unwrap().starts_with("Paused"));
    browser.is_accessible("paused");
    browser.click("#pause");
    says(&browser, FLOWS, &["Writing "]);

    // AND without JavaScript it has the sentence and the table of the partitions
    let plain = Browser::without_scripts();
    waits("the page has all without JavaScript", || {
        plain.open(addresses[0], "/");
        plain.text("#sentence").contains("Writing ") && plain.count("#partition-table tbody tr") == PARTITIONS
    });
    assert!(plain.text(".without-js").contains("Without JavaScript"), "{}", plain.text("body"));
    assert_eq!(plain.count(".needs-js"), 0, "what needs JavaScript is not shown");
    let none = plain.text("#conditions-none").starts_with("✓ None of ");
    assert_eq!(none, plain.count("#conditions-holding li") == 0, "{}", plain.text("#conditions"));
    plain.fits_a_telephone("no JavaScript");
    plain.is_clean(false);
    drop(plain);
    // AND is accessible then: the tool itself needs JavaScript, so only the page's own is kept away
    browser.devtools("Network.enable", &json!({}));
    browser.devtools("Network.setBlockedURLs", &json!({ "urls": ["*.js"] }));
    browser.open(addresses[0], "/");
    assert_eq!((browser.count("#grid"), browser.count("#partition-table")), (0, 1));
    assert!(browser.text(".without-js").contains("does not renew itself"));
    browser.is_accessible("no JavaScript");
    browser.is_clean(true);
    browser.devtools("Network.setBlockedURLs", &json!({ "urls": [] }));
    browser.open(addresses[0], "/");
    let last = says(&browser, FLOWS, &["Writing "]);
    // Until then the sentence is the one that the page came with.
    waits("the page has asked", || browser.count("#chart-rate canvas") == 1);

    // WHEN its daemon is killed under the open page
    first.kill();

    // THEN the page says so, since when, and that the rest is of then
    let gone = says(&browser, "[data-level=gone]", &["The daemon has not answered since ", "no connection"]);
    let (_, since) = gone.split_once("since ").unwrap();
    assert!(since.starts_with(|first: char| first.is_ascii_digit()), "{gone}");
    let then = browser.text("#of-then");
    assert!(
        then.starts_with("What is shown is of then: ") && then.contains("Writing "),
        "{then}; before: {last}"
    );
    assert!(browser.run("return document.title", &[]).as_str().unwrap().starts_with("No answer"));
    browser.is_accessible("gone");
    browser.fits_a_telephone("gone");

    // WHEN it is started again at the same address, the page goes on by itself
    drop(first);
    let first = start(0);
    says(&browser, FLOWS, &["Writing "]);
    waits("the counter rises again", || counter(&browser, "written") > 0);
    assert_eq!((browser.text("#of-then"), browser.text("#reload")), (String::new(), String::new()));
    browser.is_clean(true);

    // WHEN the other daemon is gone, the page names it
    second.kill();
    says(&browser, ":is([data-level=warn], [data-level=bad])", &["1 other daemon does not answer"]);
    let row = browser.text("#peer-rows tr");
    assert!(row.contains(&addresses[1].to_string()) && row.contains("no answer"), "{row}");
    let note = browser.text("#partitions-note");
    assert!(note.contains(&addresses[1].to_string()) && note.contains("missing here"), "{note}");
    browser.is_accessible("peer away");
    browser.fits_a_telephone("peer away");
    browser.is_clean(false);
    flow.end();
    drop(first);
}

#[test]
fn a_page_in_a_browser_names_the_database_that_is_away_until_it_is_back() {
    // GIVEN the page of a daemon that writes, with servers of its own
    let servers = Servers::own();
    let scope = Scope::new(&servers, "browser_database");
    scope.prepare(3, 2);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    let flow = Flow::start(&scope, Load::without_bad_records(42), 6);
    let browser = Browser::start();
    browser.open(daemon.admin, "/");
    says(&browser, FLOWS, &["Writing "]);

    // WHEN Postgres stops
    servers.postgres(Act::Immediate);

    // THEN the sentence says what it waits for, why, and that nothing is lost
    let texts = ["Waiting for Postgres for ", "onnection refused", "nothing is lost, no action in Kafka"];
    says(&browser, "[data-level=bad]", &texts);
    waits("the lanes say so", || browser.text("#lane-rows tr[data-level=warn]").contains("database: "));
    let count = browser.text("#problems-count");
    assert!(count.contains(" warning") && !count.starts_with('0'), "{count}");
    waits("the log says so", || browser.text("#problem-rows").contains("a request failed"));
    browser.is_accessible("database away");
    browser.fits_a_telephone("database away");

    // WHEN it is back, the page says that payments are written
    servers.postgres(Act::Start);
    says(&browser, FLOWS, &["Writing "]);
    waits("no lane waits for it", || browser.count("#lane-rows tr[data-level]") == 0);
    browser.is_clean(false);
    flow.end();
}

#[test]
fn a_page_in_a_browser_shows_a_halted_partition_with_the_command_that_settles_it() {
    // GIVEN a partition whose group offset was moved over records that are not written
    let scope = Scope::new(Servers::shared(), "browser_halted");
    scope.prepare(3, 2);
    let member = Member::new("a").soon_forgotten();
    let mut load = Load::without_bad_records(43);
    scope.spread(load.take(60), &[0, 1, 2]);
    member.catch_up(&scope);
    scope.spread(load.take(60), &[0, 1, 2]);
    scope.move_group_offset(1, 33, "");
    let daemon = member.start(&scope);
    daemon.wait_until_ready();

    // WHEN the page is opened
    let browser = Browser::start();
    browser.open(daemon.admin, "/");

    // THEN the sentence and the cell say so
    says(
        &browser,
        "[data-level=bad]",
        &["Partition 1 is halted for ", "until a person decides", "moved_forward"],
    );
    waits("the cells show it", || {
        [0, 1, 2].map(|at| cell(&browser, at)) == [json!("live"), json!("halted"), json!("live")]
    });
    assert_eq!(browser.count("#panel"), 0);
    // AND the partition has a link, under which the reason and the command are
    browser.click("#legend a[href='#partition-1']");
    waits("the panel is shown", || browser.text("#panel-title") == "Partition 1");
    browser.devtools("Page.reload", &json!({}));
    waits("the panel is shown again", || browser.text("#panel-title") == "Partition 1");
    waits("the reader is there", || browser.count("#panel-title:focus") == 1);
    let reason = browser.text("#panel-reason");
    assert!(reason.contains("moved_forward"), "{reason}");
    let command = browser.text("#panel-command");
    assert!(command.contains("cursors accept --partition 1 --published 20"), "{command}");
    let facts = browser.text("#panel-facts").replace('\n', " ");
    for fact in ["Lag 20 records", "Applied, next to write 20", "End of the log 40", "Lane "] {
        assert!(facts.contains(fact), "{fact}: {facts}");
    }
    browser.is_accessible("halted");
    browser.fits_a_telephone("halted");
    readers::follows_a_runbook(&browser, "PaymentWriterPartitionsHalted");
    browser.open(daemon.admin, "/#partition-1");
    waits("the panel is shown again", || browser.text("#panel-title") == "Partition 1");
    readers::does_not_move(&browser);
    browser.run("document.getElementById('panel-title').focus()", &[]);
    readers::is_used_by_keys(&browser, daemon.admin, &command);

    // WHEN the command is run that the page shows, with a reason
    let mut words: Vec<&str> = command.split_whitespace().take_while(|word| *word != "--reason").collect();
    assert_eq!(words.remove(0), "payment-writer", "{command}");
    words.retain(|word| *word != "--apply");
    words.extend(["--apply", "--reason", "a test"]);
    scope.command(&words).succeeds();

    // THEN the page shows that it goes on
    waits("the cell is live", || cell(&browser, 1) == "live");
    waits("the sentence is of something else", || !browser.text("#sentence").contains("halted"));
    assert_eq!(browser.count("#head[data-level=bad]"), 0, "{}", browser.text("#sentence"));
    assert_eq!((browser.text("#panel-title").as_str(), browser.count("#panel-command")), ("Partition 1", 0));
    readers::is_read_elsewhere_and_printed(&browser, daemon.admin);
    browser.is_clean(false);
}
