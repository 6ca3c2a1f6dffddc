//! What all clients together have said.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};

use super::serve::Findings;
use super::talk::{Job, Report};

/// The sum, shared with the threads that read the clients' reports.
#[derive(Clone)]
pub(super) struct Totals {
    report: Arc<Mutex<Report>>,
    /// When the run began, by the clock of the reports: milliseconds since 1970.
    epoch: u64,
}

/// Failures that are kept to be shown.
const SHOWN: usize = 20;

impl Totals {
    pub(super) fn new(started: Instant) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let epoch = since.saturating_sub(started.elapsed()).as_millis();
        Self { report: Arc::default(), epoch: u64::try_from(epoch).unwrap_or(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, more: Report) {
        let mut sum = self.lock();
        sum.bytes += more.bytes;
        sum.connections += more.connections;
        sum.failed += more.failed;
        sum.datagrams += more.datagrams;
        sum.lost += more.lost;
        sum.orphaned += more.orphaned;
        sum.failures.extend(more.failures);
        sum.failures.truncate(SHOWN);
        sum.wrong.extend(more.wrong);
    }

    /// What must never happen and has, with the second of the run.
    pub(super) fn wrong(&self, findings: &Findings) -> Vec<String> {
        let sum = self.lock();
        let mut wrong: Vec<String> = sum.wrong.iter().take(SHOWN).map(|said| self.line(said)).collect();
        wrong.extend(findings.lock().unwrap_or_else(PoisonError::into_inner).iter().take(SHOWN).cloned());
        wrong
    }

    fn line(&self, (at, what): &(u64, String)) -> String {
        format!("{:>7.1} s  {what}", at.saturating_sub(self.epoch) as f64 / 1_000.0)
    }

    /// Fails if more of a thousand new connections failed, or datagrams were lost, than these.
    pub(super) fn within(&self, failed: u64, lost: u64) -> Result<()> {
        let sum = self.lock();
        let shown: Vec<String> = sum.failures.iter().map(|said| self.line(said)).collect();
        let (all, datagrams) = (sum.connections + sum.failed, sum.datagrams + sum.lost);
        ensure!(
            sum.failed * 1_000 <= all * failed,
            "{} of {all} new connections failed:\n{}",
            sum.failed,
            shown.join("\n")
        );
        ensure!(sum.lost * 1_000 <= datagrams * lost, "{} of {datagrams} datagrams were not answered", sum.lost);
        ensure!(sum.connections > 0 && sum.datagrams > 0, "no connections, or no datagrams");
        Ok(())
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = self.lock();
        write!(
            formatter,
            "{} MB checked, {} connections ({} failed, {} went with their pod), {} datagrams ({} lost)",
            sum.bytes / 1_000_000,
            sum.connections,
            sum.failed,
            sum.orphaned,
            sum.datagrams,
            sum.lost
        )
    }
}

/// The client processes; killed on drop.
pub(super) struct Clients {
    children: Vec<Child>,
    readers: Vec<JoinHandle<Result<()>>>,
}

impl Clients {
    pub(super) fn new() -> Self {
        Self { children: Vec::new(), readers: Vec::new() }
    }

    /// Starts a client process, by a command that runs `soak` in the right place.
    pub(super) fn start(&mut self, mut command: Command, job: &Job, totals: &Totals) -> Result<()> {
        command.arg("talk").arg(serde_json::to_string(job)?).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a client")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        self.children.push(child);
        let totals = totals.clone();
        self.readers.push(std::thread::spawn(move || {
            for line in output.lines() {
                let line = line?;
                totals.add(serde_json::from_str(&line).with_context(|| format!("a client said {line:?}"))?);
            }
            Ok(())
        }));
        Ok(())
    }

    /// Ends them, and waits for their last reports.
    pub(super) fn finish(mut self) -> Result<()> {
        for child in &mut self.children {
            drop(child.stdin.take());
        }
        for reader in self.readers.drain(..) {
            reader.join().map_err(|_| anyhow::anyhow!("a client's reader panicked"))??;
        }
        for child in &mut self.children {
            let status = child.wait()?;
            ensure!(status.success(), "a client ended: {status}");
        }
        Ok(())
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
