//! The results of a run: a JSON line for each cycle, and a table by kind of fault.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::fault::Fault;

const SPOILT: &str = "the broker itself dropped transaction markers";

/// Counts of what a check looked at.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Checked {
    pub records: usize,
    pub written: usize,
    pub duplicates: usize,
    pub dead_letters: usize,
    pub events: usize,
    pub is_reconciled: bool,
}

/// One cycle: a fault and its result.
#[derive(Clone, Debug, Serialize)]
pub struct Cycle {
    pub seed: u64,
    pub episode: usize,
    #[serde(serialize_with = "name")]
    pub fault: Fault,
    pub brokers: usize,
    pub instances: usize,
    pub detail: String,
    pub fault_ms: u128,
    /// From the end of the fault until all records sent by then were written and published.
    pub recovery_ms: u128,
    /// `None`: not checked after this cycle, but after a later one of its episode.
    pub checked: Option<Checked>,
    /// The broker, alone and killed, dropped markers of transactions that it had decided to commit or abort,
    /// because it took their partitions for deleted. Nothing can be checked after that.
    pub is_spoilt: bool,
    /// The first lines of the failure.
    pub failure: Option<String>,
}

fn name<S: serde::Serializer>(fault: &Fault, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&fault.name())
}

impl Cycle {
    pub fn print(&self) {
        if let Some(failure) = &self.failure {
            println!("FAILED {}\n{failure}", self.command());
            return;
        }
        let seconds = |ms: u128| Duration::from_millis(u64::try_from(ms).unwrap()).as_secs_f64();
        if self.is_spoilt {
            println!("seed {:<7} {:<28} abandoned: {SPOILT}", self.seed, self.fault.name());
            return;
        }
        let checked = self.checked.map_or(String::new(), |c| {
            format!("  [{} records, {} events: each with one outcome]", c.records, c.events)
        });
        println!(
            "seed {:<7} {:<28} {:>6.1} s, flows again after {:>5.1} s  {}{checked}",
            self.seed,
            self.fault.name(),
            seconds(self.fault_ms),
            seconds(self.recovery_ms),
            self.detail
        );
    }

    /// How to reproduce it.
    pub fn command(&self) -> String {
        format!(
            "make chaos SEED={} CYCLES=1 BROKERS={} FAULTS={} INSTANCES={}",
            self.seed,
            self.brokers,
            self.fault.name(),
            self.instances
        )
    }

    pub fn append_to(&self, path: &Path) {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "{}", serde_json::to_string(self).unwrap()).unwrap();
    }
}

/// Prints the table; returns whether every cycle passed.
pub fn conclude(cycles: &[Cycle], skipped: &[String]) -> bool {
    let mut by_fault: BTreeMap<Fault, Vec<&Cycle>> = BTreeMap::new();
    for cycle in cycles {
        by_fault.entry(cycle.fault).or_default().push(cycle);
    }
    println!(
        "\n{:<30}{:>7}{:>8}{:>12}{:>12}{:>9}",
        "fault", "cycles", "failed", "median", "longest", "limit"
    );
    let mut late = 0;
    for (fault, cycles) in &by_fault {
        let mut recoveries: Vec<u128> =
            cycles.iter().filter(|c| c.failure.is_none() && !c.is_spoilt).map(|c| c.recovery_ms).collect();
        recoveries.sort_unstable();
        let (limit, setting) = fault.recovery_max();
        let median = recoveries.get(recoveries.len() / 2).copied().unwrap_or_default();
        let longest = recoveries.last().copied().unwrap_or_default();
        let over = recoveries.iter().filter(|ms| **ms > limit.as_millis()).count();
        late += over;
        println!(
            "{:<30}{:>7}{:>8}{:>10.1} s{:>10.1} s{:>7} s  {setting}{}",
            fault.name(),
            cycles.len(),
            cycles.iter().filter(|c| c.failure.is_some()).count(),
            median as f64 / 1000.0,
            longest as f64 / 1000.0,
            limit.as_secs(),
            if over > 0 { format!("  {over} LATE") } else { String::new() },
        );
    }
    let spoilt = cycles.iter().filter(|c| c.is_spoilt).count();
    if spoilt > 0 {
        println!("abandoned: {spoilt} episodes, at a cycle where {SPOILT}");
    }
    for line in skipped {
        println!("not tried: {line}");
    }
    // An episode's last check covers all of its records.
    let mut last: BTreeMap<usize, Checked> = BTreeMap::new();
    for cycle in cycles {
        last.extend(cycle.checked.map(|checked| (cycle.episode, checked)));
    }
    let sum = |count: fn(&Checked) -> usize| last.values().map(count).sum::<usize>();
    let failures: Vec<&Cycle> = cycles.iter().filter(|c| c.failure.is_some()).collect();
    println!(
        "\n{} cycles in {} episodes, {} failures, {late} late. Looked at {} times: {} records were {} payments, {} \
         duplicates and {} dead letters, with {} events; each by the auditor, by the tests' own check{}.",
        cycles.len(),
        cycles.last().map_or(0, |c| c.episode),
        failures.len(),
        cycles.iter().filter(|c| c.checked.is_some()).count(),
        sum(|c| c.records),
        sum(|c| c.written),
        sum(|c| c.duplicates),
        sum(|c| c.dead_letters),
        sum(|c| c.events),
        if last.values().any(|c| c.is_reconciled) { " and by reconcile" } else { "" },
    );
    for cycle in &failures {
        println!("FAILED {}\n  {}", cycle.command(), cycle.failure.as_deref().unwrap_or_default());
    }
    failures.is_empty()
}
