//! Renders the page on a terminal or as plain text.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};

use super::page::{Page, Row};
use crate::console::source::{FetchError, Instance, Source};
use crate::console::status::{PartitionRow, Problem};

/// Interval of checks for keys.
const KEYS_TICK: Duration = Duration::from_millis(100);
/// Maximum number of listed partitions.
const WORST_MAX: usize = 5;
const PROBLEMS_MAX: usize = 8;
const BAR_CHARS: usize = 20;

struct Section {
    title: String,
    lines: Vec<Line<'static>>,
}

/// All output passes through here, so that text from a daemon cannot control the terminal.
fn section(title: impl Into<String>, mut lines: Vec<Line<'static>>) -> Section {
    for span in lines.iter_mut().flat_map(|line| &mut line.spans) {
        if span.content.contains(char::is_control) {
            span.content = span.content.replace(char::is_control, "\u{fffd}").into();
        }
    }
    Section { title: title.into(), lines }
}

fn daemons(page: &Page) -> Section {
    section("payment-writer top, q to quit", page.rows.iter().flat_map(daemon).collect())
}

/// Formats a number: 12, 1.2k, 3.4M.
fn short(number: f64) -> String {
    match number.abs() {
        n if n >= 1e9 => format!("{:.1}G", number / 1e9),
        n if n >= 1e6 => format!("{:.1}M", number / 1e6),
        n if n >= 1e4 => format!("{:.1}k", number / 1e3),
        n if n >= 10.0 || n == n.trunc() => format!("{number:.0}"),
        _ => format!("{number:.1}"),
    }
}

/// Formats a duration: 12ms, 3.4s, 5m, 2h, 3d.
fn age(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0}ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1}s"),
        s if s < 3_600.0 => format!("{:.0}m", s / 60.0),
        s if s < 172_800.0 => format!("{:.0}h", s / 3_600.0),
        s => format!("{:.0}d", s / 86_400.0),
    }
}

fn daemon(row: &Row) -> Vec<Line<'static>> {
    let state = if row.trouble.is_empty() { "ready".green() } else { "not ready".red() };
    let mut first = vec![row.url.clone().bold(), "  ".into(), state];
    if !row.what.is_empty() {
        first.push(format!("  {}  breaker ", row.what).into());
        let open: Vec<&str> = row.breakers.iter().map(String::as_str).collect();
        first.push(if open.is_empty() { "closed".green() } else { open.join(", ").red() });
    }
    let trouble = (!row.trouble.is_empty()).then(|| format!("  {}", row.trouble).red().into());
    [Line::from(first)].into_iter().chain(trouble).collect()
}

fn throughput(page: &Page) -> Section {
    let outcomes = page
        .outcomes
        .iter()
        .map(|(name, rate, total)| format!("{name:<14} {:>8}/s {:>10}", short(*rate), short(*total)).into());
    let transactions = page.transactions.iter().map(|(name, rate, errors)| {
        let name = format!("{name} tx");
        let text = format!("{name:<14} {:>8}/s  errors {}/s", short(*rate), short(*errors));
        if *errors > 0.0 { text.red().into() } else { text.into() }
    });
    section("records a second, since the start", outcomes.chain(transactions).collect())
}

fn time(page: &Page) -> Section {
    let mut lines: Vec<Line<'static>> = page
        .phases
        .iter()
        .map(|(name, share)| {
            let filled = (share.clamp(0.0, 1.0) * BAR_CHARS as f64).round() as usize;
            Line::from(vec![
                format!("{name:<11} {:>4.0}% ", share * 100.0).into(),
                "█".repeat(filled).cyan(),
                "·".repeat(BAR_CHARS.saturating_sub(filled)).dark_gray(),
            ])
        })
        .collect();
    lines.push(Line::from(format!("batch       {:>5} records", short(page.batch_records))));
    let [half, most] = page.latency.map(|seconds| match seconds {
        None => "-".to_owned(),
        Some(seconds) if seconds.is_finite() => format!("≤{}", age(seconds)),
        Some(_) => ">5m".to_owned(),
    });
    lines.push(Line::from(format!("to event    half {half}, 99% {most}")));
    section("share of the lanes' time", lines)
}

/// Symbol of a partition; the higher, the more lag.
fn heat(lag: &PartitionRow) -> Span<'static> {
    match lag.lag_records {
        _ if lag.state == "halted" => "X".magenta(),
        None => "?".yellow(),
        Some(0) => "·".green(),
        Some(records) => {
            // One level per power of ten.
            let level = (records.max(1) as f64).log10().floor() as usize;
            let sign = ["▁", "▂", "▃", "▄", "▅", "▆", "▇"].get(level).copied().unwrap_or("█");
            sign.fg(if level < 3 { Color::Yellow } else { Color::Red })
        }
    }
}

fn lag(page: &Page) -> Section {
    let total: i64 = page.lags.iter().filter_map(|(_, lag)| lag.lag_records).sum();
    let symbols = |part: &[(i64, PartitionRow)]| part.iter().map(|(_, lag)| heat(lag)).collect();
    let mut lines: Vec<Line<'static>> = page.lags.chunks(100).map(symbols).collect();
    for (partition, lag) in page.worst(WORST_MAX) {
        let records = lag.lag_records.map_or("?".to_owned(), |records| short(records as f64));
        let (seconds, state) = (lag.lag_seconds.map_or("?".to_owned(), age), &lag.state);
        let text = format!("partition {partition:<4} {records:>8} records  {seconds:>6}  {state}");
        lines.push(text.into());
    }
    let open: i64 = page.lags.iter().map(|(_, lag)| lag.open_transaction_records).sum();
    if open > 0 {
        let oldest = page.lags.iter().map(|(_, lag)| lag.open_transaction_seconds).fold(0.0, f64::max);
        let text = format!("{} records behind open transactions, for {}", short(open as f64), age(oldest));
        lines.push(text.yellow().into());
    }
    let title = format!("lag: {} records, the oldest {} old", short(total as f64), age(page.oldest_seconds));
    section(title, lines)
}

fn problems(page: &Page) -> Section {
    let from = page.problems.len().saturating_sub(PROBLEMS_MAX);
    let last = page.problems.get(from..).unwrap_or_default();
    let line = |problem: &Problem| {
        let colour = if problem.level == "ERROR" { Color::Red } else { Color::Yellow };
        // The time without date and fraction.
        let at = problem.at.get(11..19).unwrap_or(&problem.at);
        let level = format!("{:<5} ", problem.level).fg(colour);
        Line::from(vec![format!("{at} ").into(), level, problem.message.clone().into()])
    };
    let lines = if last.is_empty() { vec![Line::from("none")] } else { last.iter().map(line).collect() };
    section("last warnings and errors", lines)
}

/// The page as text, for pipes.
pub fn plain(page: &Page) -> String {
    let mut text = String::new();
    let mut add = |lines: &[Line<'static>], indent: &str| {
        for line in lines {
            let line: String = line.spans.iter().map(|span| span.content.as_ref()).collect();
            text.push_str(format!("{indent}{line}").trim_end());
            text.push('\n');
        }
    };
    add(&daemons(page).lines, "");
    for section in [throughput(page), time(page), lag(page), problems(page)] {
        add(&[Line::from(section.title)], "");
        add(&section.lines, "  ");
    }
    text.truncate(text.trim_end().len());
    text
}

fn height(section: &Section) -> Constraint {
    Constraint::Length(u16::try_from(section.lines.len() + 2).unwrap_or(u16::MAX))
}

fn draw(frame: &mut Frame<'_>, page: &Page) {
    let daemons = daemons(page);
    let (throughput, time, lag, problems) = (throughput(page), time(page), lag(page), problems(page));
    let areas = Layout::vertical([height(&daemons), height(&throughput), height(&lag), Constraint::Min(3)]);
    let [top, middle, lags, rest] = areas.areas(frame.area());
    let [left, right] =
        Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(middle);
    for (section, area) in [(daemons, top), (throughput, left), (time, right), (lag, lags), (problems, rest)]
    {
        let block = Block::bordered().title(section.title);
        frame.render_widget(Paragraph::new(section.lines).block(block), area);
    }
}

type Look = Result<Instance, FetchError>;

/// Shows the page until the user quits, and restores the terminal then, also on a panic.
///
/// # Errors
/// If the terminal cannot be used.
pub fn run(sources: Vec<Source>, mut last: Vec<Look>, interval: Duration) -> io::Result<()> {
    let (looks, news) = mpsc::sync_channel::<Vec<Look>>(1);
    let asked = sources.clone();
    // Ends with the process, or at the next sample after the receiver is gone.
    std::thread::Builder::new().name("top".to_owned()).spawn(move || {
        loop {
            std::thread::sleep(interval);
            if looks.send(asked.iter().map(Source::fetch).collect()).is_err() {
                return;
            }
        }
    })?;
    let mut terminal = ratatui::try_init()?;
    let mut before: Vec<Option<Instance>> = vec![None; sources.len()];
    let outcome = loop {
        let rows = sources.iter().zip(&before).zip(&last);
        let page = Page::of(rows.map(|((source, before), now)| (source.url.as_str(), before.as_ref(), now)));
        if let Err(error) = terminal.draw(|frame| draw(frame, &page)) {
            break Err(error);
        }
        match wait_for(&news) {
            Ok(Some(looks)) => {
                before = last.into_iter().map(Result::ok).collect();
                last = looks;
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    outcome
}

/// Waits for the next samples; `None`: the user quits. A changed terminal size takes effect with the next
/// samples.
fn wait_for(news: &mpsc::Receiver<Vec<Look>>) -> io::Result<Option<Vec<Look>>> {
    loop {
        match news.try_recv() {
            Ok(looks) => return Ok(Some(looks)),
            Err(mpsc::TryRecvError::Disconnected) => return Ok(None),
            Err(mpsc::TryRecvError::Empty) => {}
        }
        if !event::poll(KEYS_TICK)? {
            continue;
        }
        if let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
        {
            let is_interrupt =
                key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use std::time::Instant;

    const STATUS: &str = r#"{"build":{"version":"1.2.3"},"missing":{"database":"connection refused"},
        "partitions":{
            "0":{"state":"live","lag_records":0,"lag_seconds":0.0},
            "1":{"state":"live","lag_records":25000,"lag_seconds":90.0},
            "2":{"state":"halted","lag_records":7,"lag_seconds":null},
            "10":{"state":"opening","lag_records":null,"lag_seconds":null}},
        "recent_problems":[{"at":"2026-01-02T03:04:05.678Z","level":"WARN","message":"a request failed dependency=database"}]}"#;

    fn metrics(written: u32, database_seconds: u32) -> String {
        format!(
            "payment_writer_records_total{{outcome=\"written\"}} {written}\n\
             payment_writer_records_total{{outcome=\"duplicate\"}} 7\n\
             payment_writer_phase_seconds_sum{{phase=\"database\"}} {database_seconds}\n\
             payment_writer_database_step_seconds_count{{step=\"commit\"}} {database_seconds}\n\
             payment_writer_database_up{{lane=\"0\"}} 1\npayment_writer_database_up{{lane=\"1\"}} 0\n\
             payment_writer_breaker_open{{dependency=\"database\",lane=\"1\"}} 1\n\
             payment_writer_breaker_open{{dependency=\"broker\",lane=\"1\"}} 0\n\
             payment_writer_oldest_pending_seconds 90\n\
             payment_writer_build_info{{version=\"1.2.3\",group=\"payments\"}} 1\n\
             process_resident_memory_bytes 104857600\npayment_writer_memory_limit_bytes 1073741824\n"
        )
    }

    fn page() -> Page {
        let begin = Instant::now();
        let before = Instance::of(begin, &metrics(1_000, 10), STATUS);
        let now = Ok(Instance::of(begin + Duration::from_secs(2), &metrics(41_000, 13), STATUS));
        let gone = Source::new("127.0.0.1:1", None).fetch();
        let rows = [("http://one:1", Some(&before), &now), ("http://two:2", None, &gone)];
        Page::of(rows.into_iter())
    }

    #[test]
    fn the_page_tells_rates_lag_time_and_what_is_missing() {
        let text = plain(&page());
        for expected in [
            "http://one:1  not ready  1.2.3 group payments  partitions 4  memory 100 MiB of 1024 MiB",
            "breaker database",
            "database is missing: connection refused",
            "http://two:2  not ready",
            "does not answer: /metrics: ",
            "written           20.0k/s      41.0k",
            "database tx         1.5/s  errors 0/s",
            "database      75% ███████████████·····",
            "lag: 25.0k records, the oldest 2m old",
            "·▅X?",
            "partition 2           7 records       ?  halted",
            "partition 1       25.0k records      2m  live",
            "03:04:05 WARN  a request failed dependency=database",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
    }

    #[test]
    fn what_a_daemon_says_does_not_steer_the_terminal() {
        let status = STATUS
            .replace("connection refused", r"re\u001b[31mfused\r\n")
            .replace("does not answer", r"does\u001b[2Jnot\u0007")
            .replace("opening", r"open\u009bing");
        let metrics = metrics(1, 1).replace("group=\"payments\"", "group=\"pay\u{1b}ments\"");
        let now = Ok(Instance::of(Instant::now(), &metrics, &status));
        let page = Page::of([("http://one:1", None, &now)].into_iter());
        let text = plain(&page);
        assert!(text.contains("group pay\u{fffd}ments") && text.contains("re\u{fffd}[31mfused"), "{text}");
        let mut terminal = Terminal::new(TestBackend::new(120, 40)).unwrap();
        terminal.draw(|frame| draw(frame, &page)).unwrap();
        for shown in [text, terminal.backend().to_string()] {
            assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
        }
    }

    #[test]
    fn the_page_fits_a_terminal_of_any_size() {
        let page = page();
        for (width, height) in [(120, 40), (80, 24), (20, 5), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &page)).unwrap();
            let shown = terminal.backend().to_string();
            for expected in ["25.0k records", "written  ", "database   ", "·▅X?", "last warnings"] {
                assert!(width < 80 || shown.contains(expected), "{expected} in {width}x{height}\n{shown}");
            }
        }
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [0.0, 0.25, 7.0, 12.4, 9_999.0, 10_000.0, 2_500_000.0, 3e9];
        assert_eq!(numbers.map(short), ["0", "0.2", "7", "12", "9999", "10.0k", "2.5M", "3.0G"]);
        let times = [0.0, 0.25, 3.44, 90.0, 7_200.0, 86_400.0 * 3.0];
        assert_eq!(times.map(age), ["0ms", "250ms", "3.4s", "2m", "2h", "3d"]);
    }
}
