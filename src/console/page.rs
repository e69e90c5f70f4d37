//! The page at `/`, its files, and the runbooks: all from the binary.

use std::fmt::Write;
use std::sync::LazyLock;

use pulldown_cmark::{CowStr, Event, HeadingLevel, Options, Parser, Tag, TagEnd, html};

use super::conditions::{Answered, CONDITIONS};
use super::status::{PartitionRow, Summary};

/// Only what this server serves.
pub const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src \
                          'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

const TEMPLATE: &str = include_str!("../../console/index.html");
const RUNBOOKS: &str = include_str!("../../docs/runbooks/payment-writer.md");

macro_rules! files {
    ($($name:literal: $kind:expr),* $(,)?) => {
        [$(($name, $kind, include_str!(concat!("../../console/", $name)))),*]
    };
}

/// Name, content type and text of each file.
const FILES: [(&str, &str, &str); 11] = files![
    "console.css": CSS,
    "charts.js": SCRIPT,
    "dom.js": SCRIPT,
    "format.js": SCRIPT,
    "main.js": SCRIPT,
    "partitions.js": SCRIPT,
    "poll.js": SCRIPT,
    "sections.js": SCRIPT,
    "vendor/uPlot.iife.min.js": SCRIPT,
    "vendor/uPlot.min.css": CSS,
    "vendor/LICENSE": TEXT,
];

/// Content type and text of a file of the page.
pub fn file(name: &str) -> Option<(&'static str, &'static str)> {
    FILES.iter().find(|(known, ..)| *known == name).map(|(_, kind, text)| (*kind, *text))
}

/// What the page shows without JavaScript.
pub struct Shown<'s> {
    /// The sentence.
    pub summary: &'s Summary,
    /// Version, group, instance and start.
    pub about: String,
    /// The conditions that hold.
    pub conditions: Vec<&'s Answered>,
    /// All partitions.
    pub partitions: &'s [PartitionRow],
    /// The time.
    pub rendered_at: String,
}

/// The page.
pub fn render(shown: &Shown<'_>) -> (&'static str, String) {
    let mut conditions = String::new();
    for Answered { title, detail, runbook, .. } in &shown.conditions {
        let (title, detail, runbook) = (escape(title), escape(detail), escape(runbook));
        let link = format!("<a href=\"{runbook}\">Runbook, and whom to call</a>");
        let _ = write!(conditions, "<li><strong>{title}</strong> {detail} {link}</li>");
    }
    let none = if conditions.is_empty() {
        format!("✓ None of {}, as far as this daemon can tell.", CONDITIONS.len())
    } else {
        String::new()
    };
    let rows: String = shown.partitions.iter().map(row).collect();
    let values = [
        ("{{level}}", <&str>::from(shown.summary.level).to_owned()),
        ("{{sentence}}", escape(&shown.summary.text)),
        ("{{about}}", escape(&shown.about)),
        ("{{conditions}}", conditions),
        ("{{none}}", none),
        ("{{partitions}}", rows),
        ("{{rendered_at}}", escape(&shown.rendered_at)),
    ];
    (HTML, filled(TEMPLATE, &values))
}

/// Replaces each placeholder once over; values are not looked into.
fn filled(template: &str, values: &[(&str, String)]) -> String {
    let (mut text, mut rest) = (String::with_capacity(template.len() * 2), template);
    while let Some(at) = rest.find("{{") {
        let (before, from) = rest.split_at(at);
        text.push_str(before);
        let found = values.iter().find(|(name, _)| from.starts_with(name));
        let length = match found {
            Some((name, value)) => {
                text.push_str(value);
                name.len()
            }
            None => {
                text.push_str("{{");
                2
            }
        };
        rest = from.get(length..).unwrap_or_default();
    }
    text + rest
}

fn row(row: &PartitionRow) -> String {
    let number = |value: Option<i64>| value.map_or("?".to_owned(), |value| value.to_string());
    let halted = row.halted.as_ref().map(|halted| format!("{}: {}", halted.reason, halted.advice));
    let mut text = format!("<tr><th scope=\"row\">{}</th><td>{}</td>", row.partition, escape(&row.state));
    let age = row.lag_seconds.map_or("?".to_owned(), |seconds| format!("{seconds:.1}"));
    for cell in [number(row.lag_records), age, number(row.applied), number(row.published), number(row.end)] {
        let _ = write!(text, "<td class=\"n\">{cell}</td>");
    }
    let halted = halted.unwrap_or_default();
    let _ = write!(text, "<td>{}</td><td>{}</td></tr>", escape(&row.instance), escape(&halted));
    text
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    // In memory, it cannot fail.
    let _ = pulldown_cmark_escape::escape_html(&mut escaped, text);
    escaped
}

/// The runbooks as HTML: one heading for each alert, with an id that the conditions link to. Links to other pages are
/// left out, because these are not in the binary.
pub fn runbooks() -> (&'static str, &'static str) {
    static PAGE: LazyLock<String> = LazyLock::new(rendered_runbooks);
    (HTML, PAGE.as_str())
}

fn rendered_runbooks() -> String {
    let mut options = Options::empty();
    options.insert(Options::ENABLE_TABLES);
    let events: Vec<Event<'_>> = Parser::new_ext(RUNBOOKS, options).collect();
    let heading = |at: usize| {
        let texts =
            events.iter().skip(at + 1).take_while(|event| !matches!(event, Event::End(TagEnd::Heading(_))));
        texts.filter_map(
            |event| if let Event::Text(text) = event { Some(text.to_ascii_lowercase()) } else { None },
        )
    };
    let mut links = Vec::new();
    let page = events.iter().enumerate().filter_map(|(at, event)| match event {
        Event::Start(Tag::Heading { level: level @ HeadingLevel::H2, classes, attrs, .. }) => {
            let id = Some(CowStr::from(heading(at).collect::<Vec<_>>().join("-").replace(' ', "-")));
            let (classes, attrs) = (classes.clone(), attrs.clone());
            Some(Event::Start(Tag::Heading { level: *level, id, classes, attrs }))
        }
        Event::Start(Tag::Link { dest_url, .. }) => {
            links.push(dest_url.starts_with('#'));
            dest_url.starts_with('#').then(|| event.clone())
        }
        Event::End(TagEnd::Link) => links.pop().filter(|is_here| *is_here).map(|_| event.clone()),
        event => Some(event.clone()),
    });
    let page: Vec<Event<'_>> = page.collect();
    let mut text = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
                    content=\"width=device-width, initial-scale=1\"><title>Runbooks of payment-writer</title><link \
                    rel=\"icon\" href=\"data:,\"><link rel=\"stylesheet\" href=\"/console/console.css\"></head><body \
                    class=\"runbooks\"><main><p><a href=\"/\">Back to the console</a></p>\n"
        .to_owned();
    html::push_html(&mut text, page.into_iter());
    text + "</main></body></html>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_placeholder_is_filled_and_values_are_not_looked_into() {
        let values = [("{{a}}", "{{b}}".to_owned()), ("{{b}}", "2".to_owned())];
        assert_eq!(filled("x {{a}} {{b}} {{c}} y", &values), "x {{b}} 2 {{c}} y");
    }

    #[test]
    fn text_of_others_is_no_markup() {
        let hostile = PartitionRow { instance: "<script>\"'&".to_owned(), ..PartitionRow::default() };
        let summary = Summary { text: "<b>".to_owned(), ..Summary::default() };
        let shown = Shown {
            summary: &summary,
            about: String::new(),
            conditions: Vec::new(),
            partitions: &[hostile],
            rendered_at: String::new(),
        };
        let page = render(&shown).1;
        assert!(page.contains("&lt;script&gt;&quot;"), "{page}");
        assert!(
            page.contains(&format!("✓ None of {}, as far as this daemon can tell.", CONDITIONS.len())),
            "{page}"
        );
        for tag in ["<b>", "<script>", "{{"] {
            assert!(!page.contains(tag), "{tag}");
        }
    }

    #[test]
    fn the_page_has_all_its_files_and_is_small() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/console");
        let mut bytes = TEMPLATE.len();
        let mut known = vec!["index.html".to_owned()];
        for (name, _, text) in FILES {
            bytes += text.len();
            known.push(name.to_owned());
        }
        assert!(bytes < 150_000, "{bytes}");
        for of in ["", "vendor/"] {
            for entry in std::fs::read_dir(format!("{folder}/{of}")).unwrap() {
                let entry = entry.unwrap();
                let name = format!("{of}{}", entry.file_name().into_string().unwrap());
                let is_served = entry.path().is_file() && !name.ends_with(".md");
                assert!(!is_served || known.contains(&name), "{name} is not served");
            }
        }
    }

    #[test]
    fn each_condition_has_its_runbook() {
        let page = runbooks().1;
        for condition in super::super::conditions::CONDITIONS {
            let id = format!("id=\"{}\"", condition.alert.to_ascii_lowercase());
            assert!(page.contains(&id), "{id}");
        }
        assert!(!page.contains(".md\""));
    }
}
