//! What open pages of the console cost an idle daemon: rounds with and without pages, in turn, by the process's CPU clock.

use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::processes::cpu_seconds;
use crate::report::{self, Lines};
use crate::row;
use crate::site::{Servers, Site, failed};
use crate::{Outcome, ServersArguments};

/// How often a page asks.
const PERIOD: Duration = Duration::from_secs(2);
const FETCHING_LIMIT: Duration = Duration::from_secs(120);

/// `bench console`
#[derive(Parser)]
pub struct Arguments {
    #[command(flatten)]
    servers: ServersArguments,
    /// Pages that are open at the same time
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=16))]
    pages: u32,
    /// Seconds of a round
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(10..=3_600))]
    seconds: u64,
    /// Rounds of each kind
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    repeat: u32,
}

/// What an open page asks for: the state, and the points since the last ones.
struct Page {
    after: i64,
    bytes: usize,
}

impl Page {
    fn ask(&mut self, daemon: &mut Daemon) -> Outcome<()> {
        let state = daemon.asked("/console/state")?;
        let history = daemon.asked(&format!("/status/history?after={}", self.after))?;
        self.bytes += state.len() + history.len();
        let history: Value = serde_json::from_str(&history).map_err(failed("reading the history"))?;
        let last = history["points"]["at_ms"].as_array().and_then(|points| points.last()?.as_i64());
        self.after = last.unwrap_or(self.after);
        Ok(())
    }
}

/// CPU seconds a second, and bytes of the answers of each page.
fn round(daemon: &mut Daemon, pages: u32, length: Duration) -> Outcome<(f64, usize)> {
    let mut open: Vec<Page> = (0..pages).map(|_| Page { after: i64::MIN, bytes: 0 }).collect();
    // The first answer has all points.
    open.iter_mut().try_for_each(|page| page.ask(daemon))?;
    open.iter_mut().for_each(|page| page.bytes = 0);
    let (began, before) = (Instant::now(), cpu_seconds(&[daemon.id()]));
    let mut next = began;
    while began.elapsed() < length {
        let pause = PERIOD / pages.max(1);
        next += pause;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        // One page after the other, evenly.
        if !open.is_empty() {
            open.rotate_left(1);
            open[0].ask(daemon)?;
        }
    }
    let cores = (cpu_seconds(&[daemon.id()]) - before) / began.elapsed().as_secs_f64();
    Ok((cores, open.iter().map(|page| page.bytes).sum::<usize>() / open.len().max(1)))
}

/// `bench console`
pub fn run(arguments: &Arguments) -> Outcome<()> {
    let mut lines = Lines::new(arguments.servers.json.as_deref())?;
    let servers = Servers::find(&arguments.servers)?;
    let site = Site::create(&servers)?;
    let mut daemon = Daemon::start(&site, 1, &[])?;
    let began = Instant::now();
    while !daemon.progress()?.is_fetching {
        if began.elapsed() > FETCHING_LIMIT {
            return Err(daemon.complain("it does not fetch"));
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    let length = Duration::from_secs(arguments.seconds);
    let mut rows = vec![row!["round", "pages", "% of a core", "KB/s a page"]];
    let mut more = Vec::new();
    for number in 1..=arguments.repeat {
        let mut of_pages = [0.0; 2];
        for (of, pages) in of_pages.iter_mut().zip([0, arguments.pages]) {
            let (cores, bytes) = round(&mut daemon, pages, length)?;
            *of = cores * 100.0;
            let a_second = bytes as f64 / 1_000.0 / arguments.seconds as f64;
            lines.add(json!({
                "benchmark": "console", "round": number, "pages": pages, "cores": cores, "bytes_a_page": bytes,
            }))?;
            rows.push(row![number, pages, format!("{of:.2}"), format!("{a_second:.1}")]);
        }
        more.push(of_pages[1] - of_pages[0]);
    }
    daemon.stop()?;
    more.sort_by(f64::total_cmp);
    report::print("CPU of an idle daemon with open pages", &rows);
    println!("median of what {} pages add: {:.2} % of a core", arguments.pages, more[more.len() / 2]);
    lines.finish();
    Ok(())
}
