//! Sends records in transactions, some of which are aborted and repeated.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::sender::Sender;
use crate::error::CommandError;
use crate::generator::Record;

/// Maximum time for which a transaction stays open. Until it ends, consumers see neither its records nor
/// later records of other producers; brokers abort it after a minute.
const OPEN_MAX: Duration = Duration::from_secs(5);

/// Counts of finished transactions.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct TransactionsReport {
    pub(super) committed: u64,
    pub(super) aborted: u64,
    /// Aborted records in the log; each was committed in a later transaction.
    pub(super) aborted_records: u64,
}

/// Selects the aborted transactions: evenly spread, with exactly the requested share.
#[derive(Clone, Copy, Debug)]
struct Aborts {
    /// Aborted transactions per committed one.
    for_each_commit: f64,
    due: f64,
}

impl Aborts {
    fn new(share: f64) -> Self {
        Self { for_each_commit: share / (1.0 - share), due: 0.0 }
    }

    /// Whether to abort the next transaction before committing it.
    fn next(&mut self) -> bool {
        self.due += self.for_each_commit;
        // Repeated additions accumulate a rounding error.
        let is_due = self.due > 1.0 - 1e-9;
        if is_due {
            self.due -= 1.0;
        }
        is_due
    }
}

/// The open transaction, if transactions are used.
pub(super) struct Transactions<'s> {
    sender: &'s Sender,
    /// Records per transaction; `None`: no transactions.
    size: Option<usize>,
    aborts: Aborts,
    is_open: bool,
    began: Instant,
    /// Records of the open transaction, kept to repeat them after an abort.
    records: Vec<Record>,
    pub(super) report: TransactionsReport,
}

impl<'s> Transactions<'s> {
    pub(super) fn new(sender: &'s Sender, size: Option<u32>, aborted_share: f64) -> Self {
        Self {
            sender,
            size: size.map(|size| size as usize),
            aborts: Aborts::new(aborted_share),
            is_open: false,
            began: Instant::now(),
            records: Vec::new(),
            report: TransactionsReport::default(),
        }
    }

    /// Sends a record and ends the transaction if it is full. False: the client's queue was full until a
    /// signal arrived.
    pub(super) fn send(&mut self, record: &Record, stop: &AtomicBool) -> Result<bool, CommandError> {
        let Some(size) = self.size else { return self.sender.send(record, Some(stop)) };
        if !self.is_open {
            self.sender.begin()?;
            (self.is_open, self.began) = (true, Instant::now());
        }
        if !self.sender.send(record, Some(stop))? {
            return Ok(false);
        }
        self.records.push(record.clone());
        if self.records.len() >= size {
            self.end()?;
        }
        Ok(true)
    }

    /// Ends a transaction that has been open for long.
    pub(super) fn commit_if_old(&mut self) -> Result<(), CommandError> {
        if self.is_open && self.began.elapsed() >= OPEN_MAX { self.end() } else { Ok(()) }
    }

    /// Commits the open transaction at the end of the run.
    pub(super) fn finish(&mut self) -> Result<(), CommandError> {
        if self.is_open { self.commit() } else { Ok(()) }
    }

    /// Number of records passed to the client that are not in the log, or not committed.
    pub(super) fn undelivered(&self) -> u64 {
        match self.size {
            None => self.sender.undelivered(),
            Some(_) => self.records.len() as u64,
        }
    }

    fn end(&mut self) -> Result<(), CommandError> {
        if self.aborts.next() {
            self.sender.abort()?;
            self.report.aborted += 1;
            self.report.aborted_records += self.records.len() as u64;
            self.sender.begin()?;
            for record in &self.records {
                // Whatever signals arrive: the records of an aborted transaction are always sent again.
                self.sender.send(record, None)?;
            }
        }
        self.commit()
    }

    fn commit(&mut self) -> Result<(), CommandError> {
        self.sender.commit()?;
        self.report.committed += 1;
        self.is_open = false;
        self.records.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_aborted_transactions_is_exact_and_evenly_spread() {
        for (share, commits, aborted) in [(0.0, 1_000, 0), (0.1, 900, 100), (0.5, 10, 10), (0.25, 3, 1)] {
            let mut aborts = Aborts::new(share);
            let drawn: Vec<bool> = (0..commits).map(|_| aborts.next()).collect();
            assert_eq!(drawn.iter().filter(|is_aborted| **is_aborted).count(), aborted, "{share}");
        }
        let mut aborts = Aborts::new(0.1);
        let places: Vec<usize> = (1..=27).filter(|_| aborts.next()).collect();
        assert_eq!(places, [9, 18, 27]);
    }
}
