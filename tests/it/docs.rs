//! Compares the documentation with the program and its tests.

mod asyncapi;
mod commands;
mod dependencies;
mod generated;
mod links;
mod settings;
mod topics;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

use crate::support::metrics_page;

fn sources(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn every_test_that_guarantees_and_trials_name_exists() {
    assert!(named_tests("guarantees.md", include_str!("../../docs/guarantees.md")) > 30);
    assert!(named_tests("evidence/trials.md", include_str!("../../docs/evidence/trials.md")) > 30);
}

/// How many tests a page names. Each of them exists.
#[track_caller]
fn named_tests(name_of_page: &str, page: &str) -> usize {
    let mut named = 0;
    for name in page.split('`').skip(1).step_by(2) {
        let Some((file, test)) = name.split_once("::") else { continue };
        if file == "file" {
            continue;
        }
        named += 1;
        let mut files = match file {
            "model" => sources("model"),
            _ => [sources("it"), sources("it/security")].concat(),
        };
        let file_name = if file == "model" { "main.rs" } else { &format!("{file}.rs") };
        files.retain(|path| path.ends_with(file_name));
        let text = fs::read_to_string(files.first().unwrap());
        let has = |text: &str| test == "*" || text.contains(&format!("fn {test}()"));
        assert!(has(&text.unwrap()), "docs/{name_of_page} names {name}, which does not exist");
    }
    named
}

/// Records the described metrics, and nothing else.
#[derive(Default)]
struct Describing(Mutex<BTreeMap<String, (&'static str, Option<Unit>)>>);

impl Describing {
    fn note(&self, key: &KeyName, kind: &'static str, unit: Option<Unit>, text: &SharedString) {
        assert!(!text.is_empty(), "{}", key.as_str());
        let before = self.0.lock().unwrap().insert(key.as_str().to_owned(), (kind, unit));
        assert!(before.is_none(), "{} is described twice", key.as_str());
    }
}

impl Recorder for Describing {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, text: SharedString) {
        self.note(&key, "counter", unit, &text);
    }
    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, text: SharedString) {
        self.note(&key, "gauge", unit, &text);
    }
    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, text: SharedString) {
        self.note(&key, "histogram", unit, &text);
    }
    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }
    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

#[test]
fn the_metrics_page_matches_the_program() {
    let described = Describing::default();
    metrics::with_local_recorder(&described, payment_writer::telemetry::metrics::describe);
    let described = described.0.into_inner().unwrap();
    let page = metrics_page();
    let names = |known: Vec<&String>| known.into_iter().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(page.keys().collect()), names(described.keys().collect()));
    for (name, entry) in &page {
        let (kind, unit) = &described[name];
        assert_eq!(entry.kind, *kind, "{name}");
        // The last word of a name is its unit, except for totals.
        let in_name = name.trim_end_matches("_total").rsplit('_').next().unwrap();
        if matches!(in_name, "seconds" | "bytes") {
            assert!(entry.unit.starts_with(in_name), "{name} is in {}", entry.unit);
            let expected = if in_name == "seconds" { Unit::Seconds } else { Unit::Bytes };
            assert_eq!(*unit, Some(expected), "{name}");
        }
        assert_eq!(name.ends_with("_total"), *kind == "counter", "{name}");
        assert!(!entry.meaning.is_empty(), "{name}");
    }
    // The library defines the names of the process metrics.
    assert!(
        page.keys().filter(|name| !name.starts_with("payment_writer_")).all(|n| n.starts_with("process_"))
    );
}
