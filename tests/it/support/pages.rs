//! Reads tables from pages of the documentation.

use std::collections::BTreeMap;

/// A metric in docs/reference/metrics.md.
#[derive(Clone, Debug)]
pub struct MetricEntry {
    pub kind: String,
    pub unit: String,
    /// Labels with their values as text.
    pub labels: String,
    pub meaning: String,
}

/// The cells of a table's rows; each row starts with a name in backticks.
pub fn rows(page: &str) -> impl Iterator<Item = Vec<String>> {
    page.lines().filter(|line| line.starts_with("| `")).map(|line| {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    })
}

/// The metrics in docs/reference/metrics.md, by name.
pub fn metrics_page() -> BTreeMap<String, MetricEntry> {
    let mut page = BTreeMap::new();
    for row in rows(include_str!("../../../docs/reference/metrics.md")) {
        let [name, kind, unit, labels, meaning, _] = &row[..] else { panic!("{row:?}") };
        let entry = MetricEntry {
            kind: kind.clone(),
            unit: unit.clone(),
            labels: labels.clone(),
            meaning: meaning.clone(),
        };
        let name = name.trim_matches('`').to_owned();
        assert!(page.insert(name.clone(), entry).is_none(), "{name} is there twice");
    }
    assert!(page.len() > 40, "{}", page.len());
    page
}
