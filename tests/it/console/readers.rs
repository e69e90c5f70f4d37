//! What a page in a browser is like for those who use a keyboard, are in another zone, want no motion, or print it.

use std::net::SocketAddr;

use serde_json::json;

use super::browser::waits;
use super::chromium::Browser;

/// Partitions of the page that is printed.
const PARTITIONS: usize = 100;

/// Puts much of everything into the answers of the daemon, with one time of which the day in India is another.
const MUCH: &str = "
    const at_ms = Date.parse('2026-01-15T20:00:00Z');
    const many = (count, make) => Array.from({ length: count }, (_, at) => make(at));
    const ask = window.fetch;
    window.fetch = async (path, options) => {
        const answer = await ask(path, options);
        if (path !== '/console/state') return answer;
        const state = await answer.json();
        const [partition, lane] = [state.partitions[0], state.lanes[0]];
        state.partitions = many(arguments[0], (at) => ({ ...partition, partition: at }));
        state.lanes = many(16, (at) => ({ ...lane, lane: at }));
        const message = 'partition 17: a record was refused, because its payload is longer than it may be';
        state.problems = { warnings: 50, errors: 0,
            last: many(50, () => ({ at: new Date(at_ms).toISOString(), level: 'WARN', message })) };
        state.dead_letters = { by_reason: many(4, (at) => ({ reason: `reason_${at}`, count: 5 })),
            last: many(50, (at) => ({ at_ms, partition: at, offset: at, reason: 'reason_1' })) };
        state.outcomes.find((outcome) => outcome.outcome === 'dead_lettered').total = 20;
        const ready = { name: 'ready', state: 'ready', began_ms: null, drops_ms: null, rows: 0, bytes: 8192, is_current: false };
        const closed = { ...ready, state: 'closed', began_ms: at_ms, drops_ms: at_ms };
        state.database.read_ms ??= at_ms;
        state.database.generations = [...many(5, (at) => ({ ...closed, name: `idempotency_00000${at}` })), ready];
        state.database.months = many(30, (at) => ({ month: `month-${at}`, bytes: 1 << 20 }));
        state.partitions[3] = { ...partition, partition: 3, state: 'live', halted: null, lag_records: null, lag_seconds: null };
        state.conditions.slice(0, 6).forEach((one) => Object.assign(one, { holds: true, since_ms: at_ms, detail: message }));
        state.peers = many(3, (at) => ({ address: `127.0.0.1:${at}`, error: null, instance: `other-${at}`, version: '1',
            ready: true, summary: 'Idle', level: at === 1 ? 'bad' : 'ok', partitions: 50, lag_records: 0, oldest_seconds: 0 }));
        state.database.housekeeping.tasks[0].is_failing = false;
        for (const task of state.database.housekeeping.tasks) task.last_ok_ms = at_ms;
        return new Response(JSON.stringify(state));
    }";

/// The page's key of the element that has the focus: a cell's number, or an id.
fn focused(browser: &Browser) -> String {
    let script = "const node = document.activeElement; return node.dataset.key ?? node.id";
    browser.run(script, &[]).as_str().unwrap().to_owned()
}

/// Opens partition 1 of three, which is halted, copies its command and closes it, by keys alone. Opens the page anew.
pub fn is_used_by_keys(browser: &Browser, admin: SocketAddr, command: &str) {
    // Where the page leads its reader, Escape leads back to the cell.
    browser.press("Escape");
    assert_eq!((focused(browser).as_str(), browser.count("#panel")), ("1", 0), "Escape");
    browser.open(admin, "/");
    waits("the cells are there", || browser.count("#grid .cell") == 3);

    let is_in_grid = || browser.count("#grid .cell:focus") == 1;
    for _ in 0..60 {
        if is_in_grid() {
            break;
        }
        browser.press("Tab");
    }
    assert!(is_in_grid(), "Tab does not reach the grid, but {}", focused(browser));
    for (key, expected) in
        [("ArrowRight", "1"), ("End", "2"), ("ArrowLeft", "1"), ("Home", "0"), ("ArrowRight", "1")]
    {
        browser.press(key);
        assert_eq!(focused(browser), expected, "{key}");
    }
    browser.press("Enter");
    waits("the panel is shown", || browser.text("#panel-title") == "Partition 1");
    browser.press("Escape");
    assert_eq!((focused(browser).as_str(), browser.count("#panel")), ("1", 0), "Escape in the grid");
    browser.press("Enter");
    waits("the panel is shown again", || browser.count("#panel-copy") == 1);
    // From the cell to what closes the panel, and to what copies the command.
    for id in ["panel-close", "panel-copy"] {
        browser.press("Tab");
        assert_eq!(focused(browser), id);
    }
    // With the clipboard's own interface, which a page needs localhost or TLS for, and without.
    for permissions in [&["clipboardReadWrite", "clipboardSanitizedWrite"][..], &["clipboardReadWrite"]] {
        let all = json!(["clipboardReadWrite", "clipboardSanitizedWrite"]);
        browser.devtools("Browser.grantPermissions", &json!({ "permissions": all }));
        browser.run("return navigator.clipboard.writeText('something else')", &[]);
        browser.devtools("Browser.grantPermissions", &json!({ "permissions": permissions }));
        browser.press("Enter");
        let copied = || browser.run("return navigator.clipboard.readText()", &[]);
        waits("the command was copied", || copied() == command);
    }
}

/// Follows the link of a condition that holds to its runbook, which says whom to call.
pub fn follows_a_runbook(browser: &Browser, alert: &str) {
    browser.click(&format!("#conditions-holding [data-key={alert}] a"));
    let id = alert.to_ascii_lowercase();
    waits("the runbook is shown", || browser.count(&format!("h2#{id}:target")) == 1);
    assert!(browser.text("main").contains("Escalate"));
    browser.is_accessible("runbooks");
    browser.fits_a_telephone("runbooks");
}

/// Fails if something moves although the reader wants no motion.
pub fn does_not_move(browser: &Browser) {
    let moving = |wish: &str| {
        let features = json!([{ "name": "prefers-reduced-motion", "value": wish }]);
        browser.devtools("Emulation.setEmulatedMedia", &json!({ "features": features }));
        let script = "return [...document.getAnimations().map(String), ...[...document.querySelectorAll('*')].filter((node) => {
                          const style = getComputedStyle(node);
                          return style.animationName !== 'none' || style.scrollBehavior === 'smooth'
                              || style.transitionDuration.split(',').some((time) => parseFloat(time) > 0);
                      }).map((node) => node.localName)]";
        browser.run(script, &[])
    };
    assert_eq!(moving("no-preference"), json!(["html"]));
    assert_eq!(moving("reduce"), json!([]));
    browser.devtools("Emulation.setEmulatedMedia", &json!({ "features": [] }));
}

/// Opens the page in India and with much of everything: times have UTC beside them, it fits a telephone, and it prints on
/// one page.
pub fn is_read_elsewhere_and_printed(browser: &Browser, admin: SocketAddr) {
    browser.devtools("Emulation.setTimezoneOverride", &json!({ "timezoneId": "Asia/Kolkata" }));
    browser.open(admin, "/");
    browser.run(MUCH, &[PARTITIONS.into()]);
    waits("much is shown", || {
        browser.count("#grid .cell") == PARTITIONS && browser.count("#chart-rate canvas") == 1
    });

    let script = "return document.querySelector(arguments[0]).textContent.replaceAll('\\u00a0', ' ').replaceAll('\\u2011', '-')";
    let text = |selector: &str| browser.run(script, &[selector.into()]).as_str().unwrap().to_owned();
    for cell in [
        "#problem-rows td",
        "#dead-letter-rows td",
        "#task-rows td:last-child",
        "#generation-rows [data-key=idempotency_000000] td:nth-child(3)",
    ] {
        let shown = text(cell);
        assert!(shown.starts_with("2026-01-16 01:30 (2026-01-15 20:00:00 UTC)"), "{cell}: {shown}");
    }
    // "As of 15:30:05 (10:00:05 UTC)": of two clocks that differ by five hours and a half.
    let clock = text("#updated");
    let minutes = |at: usize| -> Option<i64> {
        let digits: Vec<i64> =
            clock.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
        Some(digits.get(at)? * 60 + digits.get(at + 1)?)
    };
    // After the last hours of a day in UTC the date is there, too.
    let utc = if clock.matches('-').count() == 2 { 6 } else { 3 };
    let ahead = minutes(0).zip(minutes(utc)).map(|(here, there)| (here - there).rem_euclid(24 * 60));
    assert_eq!(ahead, Some(5 * 60 + 30), "{clock}");
    // Of what is not known nothing good is said, and of what is wrong elsewhere nothing less.
    let cell = "return document.querySelector('#grid .cell[data-key=\"3\"]').dataset.kind";
    assert_eq!(browser.run(cell, &[]), json!("unknown"));
    assert_eq!((text("#nav-peers"), text("#nav-conditions").is_empty()), ("✕ 1".to_owned(), false));
    assert!(text("#task-rows td").contains("overdue"), "{}", text("#task-rows"));
    for zone in ["#charts-note", "#zone"] {
        assert!(text(zone).contains("(UTC+5:30)"), "{zone}: {}", text(zone));
    }
    // A generation that was never current has no age.
    assert_eq!(text("#generation-rows [data-key=ready] td"), "–");
    browser.fits_a_telephone("much of everything");

    assert_eq!(browser.printed_pages(), 1);
    // A zone that shows UTC in winter alone.
    browser.devtools("Emulation.setTimezoneOverride", &json!({ "timezoneId": "Europe/London" }));
    let script = "const { isAlwaysUtc, isZoneUtc } = await import('/console/format.js');
                  return [isAlwaysUtc(), ...['2026-01-15T12:00Z', '2026-07-15T12:00Z'].map((at) => isZoneUtc(Date.parse(at)))]";
    assert_eq!(
        browser.run(&format!("return (async () => {{ {script} }})()"), &[]),
        json!([false, true, false])
    );
    browser.devtools("Emulation.setTimezoneOverride", &json!({ "timezoneId": "" }));
}

/// What the database holds and what the audit found is shown. For a daemon that writes.
pub fn shows_database_and_audit(browser: &Browser) {
    let texts = |selector: &str| -> Vec<String> {
        let script =
            "return [...document.querySelectorAll(arguments[0])].filter((node) => node.checkVisibility())
                          .map((node) => node.textContent)";
        let texts = browser.run(script, &[selector.into()]);
        texts.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    waits("the database is shown", || {
        texts("#generation-rows tr").iter().any(|row| row.contains("(current)"))
    });
    let has_sizes = |cells: &[String]| cells.iter().all(|cell| cell.ends_with('B'));
    let (generations, months) = (texts("#generation-rows td:last-child"), texts("#month-rows td"));
    assert!(!generations.is_empty() && has_sizes(&generations), "{generations:?}");
    assert!(months.len() >= 4 && has_sizes(&months), "{months:?}");
    assert_eq!(texts("#task-rows tr").len(), 4, "{:?}", texts("#task-rows tr"));
    assert_eq!(texts("#database-facts dd").len(), 5);
    // The first records after the start of a fetch are audited.
    waits("the audit is shown", || {
        texts("#audit-rows [data-key=owned] td")
            .iter()
            .any(|count| count.starts_with(|c: char| ('1'..='9').contains(&c)))
    });
    assert_eq!(texts("#audit-facts dd").len(), 5);
}
