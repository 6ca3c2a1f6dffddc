//! Pure: desired service ports × what the kernel holds → an ordered list of map writes.
//!
//! [`Planner`] mirrors the kernel's maps. It is built from their dump, is told which service ports changed, and yields a
//! [`Batch`]; each write that succeeds moves the mirror. So a restart without changes writes nothing, a crash after
//! any write is repaired by the next plan, and a change costs O(changed service).
//!
//! The order of a batch: raised ids, names, backends, table runs, source ranges, frontends, backends that leave every set,
//! marks; then deletions of source ranges that guarded frontends have lost, of marks and of frontends. Backends, names,
//! runs and the ranges of frontends that are no longer guarded go after a grace period, in a batch of their own
//! ([`Planner::reclaim`]), because a packet in flight may still hold the old frontend.
//!
//! Versions of map elements, system calls and Kubernetes' rules are left to others.

mod actual;
mod audit;
mod backends;
mod claims;
mod diff;
mod execute;
mod identity;
mod maglev;
mod reclaim;
mod runs;
mod spread;
mod table;
#[cfg(test)]
mod tests;
mod wanted;
mod write;

pub use actual::{Counts, Dump};
pub use audit::{Drift, Mirrored};
pub use diff::{PlanError, Planner};
pub use execute::Sink;
pub use identity::Identity;
pub use reclaim::Grace;
pub use spread::spread;
pub use table::Table;
pub use write::{Backend, Batch, Failure, Frontend, FrontendAddress, Operation, Outcome, Owner, Write};
