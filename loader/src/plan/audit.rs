//! What an audit asks the mirror, and what becomes of the elements that the kernel turns out to hold otherwise.
//!
//! An audit reads the kernel's elements between two batches, when mirror and kernel must agree. Where they don't, the mirror
//! is moved to what the kernel holds, and the service ports concerned are planned again, as they would be after a restart.
//! So a run that somebody wrote to gets a successor rather than another write, as some frontend names it.

use std::ops::{Bound, Range};

use sheave_common::frontend::BackendSet;

use super::claims::Touched;
use super::diff::Planner;
use super::write::{Backend, Batch, Frontend, FrontendAddress, Write};
use crate::model::desired::ServicePortName;
use crate::model::network::Network;

/// What the kernel should hold under a service id, but for its frontends.
#[derive(Clone, Debug)]
pub struct Mirrored<'a> {
    /// Which service port it is.
    pub name: Option<&'a ServicePortName>,
    /// Its backends with their ids.
    pub backends: Vec<(u32, Backend)>,
    /// Its runs of the backend table: where they are, and the ids in them.
    pub runs: Vec<(BackendSet, &'a [u32])>,
    /// Who may use its guarded frontends.
    pub source_ranges: Vec<Network>,
}

/// Something that the kernel does not hold as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drift {
    /// A frontend, or the mark on an address, is missing or says something else.
    Frontend(FrontendAddress),
    /// A backend is missing, or is something else.
    Backend {
        /// Its id.
        id: u32,
        /// What was written.
        written: Backend,
        /// What is there.
        found: Option<Backend>,
    },
    /// A run of the backend table holds other ids.
    Run {
        /// Whose it is.
        service_id: u32,
        /// Where it is.
        set: BackendSet,
        /// What it holds.
        found: Vec<u32>,
    },
    /// Clients of a service port are missing.
    SourceRange {
        /// Whose.
        service_id: u32,
        /// Which.
        network: Network,
    },
    /// The name of a service id is missing, or another one.
    Name {
        /// The id.
        service_id: u32,
    },
}

impl Planner {
    /// Service ids under which the kernel may hold something.
    #[must_use]
    pub const fn service_ids(&self) -> Range<u32> {
        self.identity.service_ids()
    }

    /// What the kernel should hold under a service id.
    #[must_use]
    pub fn mirrored(&self, service_id: u32) -> Mirrored<'_> {
        let backends = self.actual.backends.of(service_id).iter();
        Mirrored {
            name: self.actual.names.get(&service_id),
            backends: backends.map(|held| (held.id, held.backend(service_id))).collect(),
            runs: self.actual.runs.of(service_id).collect(),
            source_ranges: self.actual.source_ranges_of(service_id).collect(),
        }
    }

    /// Frontends and marks that the kernel should hold, in order, those behind this one.
    pub fn frontends_behind(
        &self,
        last: Option<FrontendAddress>,
    ) -> impl Iterator<Item = (&FrontendAddress, &Frontend)> {
        let from = last.map_or(Bound::Unbounded, Bound::Excluded);
        self.actual.frontends.range((from, Bound::Unbounded))
    }

    /// Whether the kernel should hold a frontend or a mark there.
    #[must_use]
    pub fn has_frontend(&self, address: &FrontendAddress) -> bool {
        self.actual.frontends.contains_key(address)
    }

    /// Whether the kernel should hold a backend of this id, service port and endpoint.
    #[must_use]
    pub fn has_backend(&self, id: u32, backend: &Backend) -> bool {
        self.actual.backends.contains(backend.service_id, backend.endpoint(), id)
    }

    /// Whether the kernel should hold a name for a service id.
    #[must_use]
    pub fn has_name(&self, service_id: u32) -> bool {
        self.actual.names.contains_key(&service_id) || self.actual.stray_names.contains(&service_id)
    }

    /// Whether the kernel should let these clients use a service port.
    #[must_use]
    pub fn has_source_range(&self, service_id: u32, network: Network) -> bool {
        self.actual.source_ranges.contains(&(service_id, network))
    }

    /// Takes in what the kernel holds, and plans the service ports concerned again.
    pub fn repair(&mut self, drifts: &[Drift]) -> Batch {
        let mut touched = Touched::default();
        for drift in drifts {
            match drift {
                Drift::Frontend(address) => {
                    let unnamed = self.actual.apply(&Write::DeleteFrontend { address: *address });
                    self.queue.runs(unnamed);
                    if address.is_mark() {
                        touched.addresses.push(address.address);
                    } else {
                        touched.frontends.push(*address);
                    }
                }
                Drift::Backend { id, written, found } => {
                    self.plan_again(written.service_id);
                    let (service_id, endpoint) = (written.service_id, written.endpoint());
                    let same = |found: &&Backend| (found.service_id, found.endpoint()) == (service_id, endpoint);
                    // Another endpoint's element is no backend of this id any more: it gets a new one.
                    let write = match found.as_ref().filter(same) {
                        Some(found) => Write::PutBackend { id: *id, backend: *found },
                        None => Write::DeleteBackend { id: *id, service_id, endpoint },
                    };
                    self.actual.apply(&write);
                }
                Drift::Run { service_id, set, found } => {
                    self.plan_again(*service_id);
                    self.actual.runs.learn(*service_id, *set, found);
                }
                Drift::SourceRange { service_id, network } => {
                    self.plan_again(*service_id);
                    self.actual.apply(&Write::DeleteSourceRange { service_id: *service_id, network: *network });
                }
                Drift::Name { service_id } => {
                    self.plan_again(*service_id);
                    self.actual.apply(&Write::DeleteName { service_id: *service_id });
                }
            }
        }
        self.draft([], touched)
    }

    fn plan_again(&mut self, service_id: u32) {
        self.unfinished.extend(self.actual.names.get(&service_id).cloned());
    }
}
