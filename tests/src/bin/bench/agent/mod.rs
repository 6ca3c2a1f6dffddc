//! A running agent with many services, told of every change by an API server, while clients ask.

mod churn;
mod handover;
mod memory;
mod restart;
mod running;

use anyhow::Result;

use crate::controller::LOAD;
use crate::effort::Effort;
use crate::findings::Findings;
use crate::progress::Progress;
use running::Running;

pub(crate) use memory::measure as memory;

/// One change after another, a thousand a second, and restarts, all with the same agent.
pub(crate) fn measure(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    progress.step(&format!("starts with {LOAD}"));
    let mut running = Running::start(LOAD, &[])?;
    running.check()?;
    handover::measure(&running, effort, findings, progress)?;
    churn::measure(&mut running, effort, findings, progress)?;
    restart::measure(&mut running, effort, findings, progress)
}
