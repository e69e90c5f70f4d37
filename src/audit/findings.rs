//! Log messages about records that nothing accounts for.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::domain::record::{Offset, Partition};
use crate::telemetry::logging::RateLimited;

/// Maximum number of offset ranges in a line.
const RUNS_MAX: usize = 20;
/// One line per partition; a loss can affect all partitions.
static LIMIT: RateLimited = RateLimited::new(100, Duration::from_secs(60));

/// Offsets of records by partition and by what is wrong with them.
pub type Findings = BTreeMap<(Partition, String), Vec<Offset>>;

/// Logs one line per partition and finding.
pub fn tell(topic: &str, mut findings: Findings) {
    for ((partition, detail), offsets) in &mut findings {
        offsets.sort_unstable();
        let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else { continue };
        if let Some(suppressed) = LIMIT.pass() {
            let advice = format!(
                "payment-writer reconcile --partition {partition} --from-offset {first} --to-offset {}",
                last.next()
            );
            tracing::error!(
                topic,
                partition = partition.0,
                offset = first.0,
                offsets = runs(offsets),
                records = offsets.len(),
                detail,
                advice,
                suppressed,
                "payments that the cursor has passed are not accounted for"
            );
        }
    }
}

/// Formats sorted offsets as ranges: `7, 10-12`. A transaction marker between two offsets splits a range.
fn runs(offsets: &[Offset]) -> String {
    let mut runs: Vec<(Offset, Offset)> = Vec::new();
    for offset in offsets {
        match runs.last_mut() {
            Some((_, last)) if last.next().0 == offset.0 => *last = *offset,
            _ => runs.push((*offset, *offset)),
        }
    }
    let text = |(first, last): &(Offset, Offset)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let mut texts = runs.iter().take(RUNS_MAX).map(text).collect::<Vec<_>>().join(", ");
    if runs.len() > RUNS_MAX {
        texts.push_str(&format!(" and {} more", runs.len() - RUNS_MAX));
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_named_as_runs_and_no_more_than_some() {
        let text = |offsets: &[i64]| runs(&offsets.iter().map(|o| Offset(*o)).collect::<Vec<_>>());
        assert_eq!(text(&[7]), "7");
        assert_eq!(text(&[7, 8, 9, 11, 13, 14]), "7-9, 11, 13-14");
        let odd: Vec<i64> = (0..50).map(|n| n * 2).collect();
        assert!(text(&odd).ends_with(", 38 and 30 more"), "{}", text(&odd));
    }
}
