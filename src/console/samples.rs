//! Samples of a scrape, as far as `top` and the console need them.
//!
//! Parses the Prometheus text format 0.0.4 as written by this program's exporter, with only the label escapes
//! that it uses, and ignores everything else.

use std::collections::BTreeMap;

/// A line of a scrape.
#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// All samples of a scrape.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<Sample>);

impl Samples {
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    fn of<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Sample> {
        let has = |sample: &Sample, (key, value): &(&str, &str)| {
            sample.labels.get(*key).is_some_and(|found| found == value)
        };
        self.0.iter().filter(move |s| s.name == name && labels.iter().all(|label| has(s, label)))
    }

    /// Sum of all samples with this name and these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.of(name, labels).map(|sample| sample.value).sum()
    }

    /// Maximum of all samples with this name.
    pub fn max(&self, name: &str) -> Option<f64> {
        self.of(name, &[]).map(|sample| sample.value).reduce(f64::max)
    }

    /// Number of samples with this name.
    pub fn count(&self, name: &str) -> usize {
        self.of(name, &[]).count()
    }

    /// Value of a label and of the sample, for each sample with this name.
    pub fn by_label(&self, name: &str, label: &str) -> Vec<(String, f64)> {
        let pair = |sample: &Sample| Some((sample.labels.get(label)?.clone(), sample.value));
        self.of(name, &[]).filter_map(pair).collect()
    }

    /// Values of a label, of the samples with this name and these labels that are above 0.
    pub fn labels_above(&self, name: &str, labels: &[(&str, &str)], label: &str) -> Vec<String> {
        let above = self.of(name, labels).filter(|sample| sample.value > 0.0);
        above.filter_map(|sample| sample.labels.get(label).cloned()).collect()
    }

    /// Cumulative counts of a histogram by upper bound, ascending.
    pub fn buckets(&self, name: &str) -> Vec<(f64, f64)> {
        let name = format!("{name}_bucket");
        let mut buckets: Vec<(f64, f64)> = self
            .by_label(&name, "le")
            .into_iter()
            .filter_map(|(bound, count)| Some((bound.parse().ok()?, count)))
            .collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        buckets
    }
}

fn sample(line: &str) -> Option<Sample> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}')?),
        None => (series, ""),
    };
    let mut found = BTreeMap::new();
    let mut rest = labels;
    while let Some((key, more)) = rest.split_once("=\"") {
        let mut value = String::new();
        let mut chars = more.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        found.insert(key.trim_start_matches(',').to_owned(), value);
        rest = more.get(end + 1..)?;
    }
    Some(Sample { name: name.to_owned(), labels: found, value: value.parse().ok()? })
}

/// Quantile of the values observed between two scrapes; the result is a bucket bound.
pub fn quantile(before: &[(f64, f64)], after: &[(f64, f64)], share: f64) -> Option<f64> {
    let count_before = |bound: f64| before.iter().find(|(b, _)| *b == bound).map_or(0.0, |(_, count)| *count);
    let all = after.last().map(|(bound, count)| count - count_before(*bound)).filter(|all| *all > 0.0)?;
    after.iter().find(|(bound, count)| count - count_before(*bound) >= share * all).map(|(bound, _)| *bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_exporter_writes_is_read() {
        let samples = Samples::parse(
            "# TYPE a_total counter\na_total{outcome=\"written\"} 3\na_total{outcome=\"du\\\"p,l\",lane=\"1\"} 4\n\n\
             gauge +Inf\nh_bucket{le=\"0.5\"} 1\nh_bucket{le=\"+Inf\"} 4\nh_bucket{le=\"0.1\"} 1\nbroken{x\n",
        );
        assert_eq!(samples.sum("a_total", &[]), 7.0);
        assert_eq!(samples.sum("a_total", &[("lane", "1")]), 4.0);
        assert_eq!(samples.by_label("a_total", "outcome")[1].0, "du\"p,l");
        assert_eq!(samples.max("gauge"), Some(f64::INFINITY));
        assert_eq!(samples.max("none"), None);
        assert_eq!(samples.buckets("h"), [(0.1, 1.0), (0.5, 1.0), (f64::INFINITY, 4.0)]);
    }

    #[test]
    fn quantiles_are_of_what_came_since() {
        let before = [(0.1, 100.0), (1.0, 100.0), (f64::INFINITY, 100.0)];
        let after = [(0.1, 150.0), (1.0, 199.0), (f64::INFINITY, 200.0)];
        assert_eq!(quantile(&before, &after, 0.5), Some(0.1));
        assert_eq!(quantile(&before, &after, 0.99), Some(1.0));
        assert_eq!(quantile(&after, &after, 0.5), None);
        assert_eq!(quantile(&[], &after, 1.0), Some(f64::INFINITY));
    }
}
