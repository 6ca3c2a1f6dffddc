//! The mirror of what the kernel holds: built from a dump of the maps, moved by every write that succeeded.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use sheave_common::frontend::{BackendSet, flags};

use super::backends::{Backends, family};
use super::runs::Runs;
use super::write::{Backend, Frontend, FrontendAddress, Write};
use crate::model::desired::ServicePortName;
use crate::model::network::Network;

/// The maps' contents, as read from the kernel.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    /// `frontends4` and `frontends6`.
    pub frontends: Vec<(FrontendAddress, Frontend)>,
    /// `backends4` and `backends6`.
    pub backends: Vec<(u32, Backend)>,
    /// `service_names`; `None` for a name that this program did not write.
    pub names: Vec<(u32, Option<ServicePortName>)>,
    /// `source_ranges4` and `source_ranges6`, with their service ids.
    pub source_ranges: Vec<(u32, Network)>,
    /// `backend_table`'s backend ids, at least as far as frontends name them.
    pub table: Vec<u32>,
    /// How many it has room for.
    pub table_size: u32,
    /// From `config`; 0 if it was never written.
    pub next_backend_id: u32,
    /// From `config`; 0 if it was never written.
    pub next_service_id: u32,
    /// Size of the maps that are indexed by service id: ids are smaller.
    pub service_limit: u32,
}

/// The mirror.
#[derive(Clone, Debug)]
pub(super) struct Actual {
    pub(super) frontends: BTreeMap<FrontendAddress, Frontend>,
    pub(super) backends: Backends,
    pub(super) names: BTreeMap<u32, ServicePortName>,
    /// (service id, clients).
    pub(super) source_ranges: BTreeSet<(u32, Network)>,
    pub(super) runs: Runs,
    /// The table was full, and runs that can't be ours were given up.
    looked_for_broken: bool,
    /// Names that identify nothing: unreadable, or a second id for one service port.
    pub(super) stray_names: BTreeSet<u32>,
    frontends_of: BTreeSet<(u32, FrontendAddress)>,
    /// Frontends of IPv4 and of IPv6.
    frontend_counts: [usize; 2],
    /// Source ranges of IPv4 and of IPv6.
    source_range_counts: [usize; 2],
}

/// Elements in the kernel's maps; of IPv4 and of IPv6 where each has its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// `frontends4`, `frontends6`.
    pub frontends: [usize; 2],
    /// `backends4`, `backends6`.
    pub backends: [usize; 2],
    /// `service_names`.
    pub names: usize,
    /// `backend_table`: backend ids that runs take.
    pub table: usize,
    /// `source_ranges4`, `source_ranges6`.
    pub source_ranges: [usize; 2],
}

impl Actual {
    pub(super) fn restore(dump: Dump) -> Self {
        let mut actual = Self {
            frontends: BTreeMap::new(),
            backends: Backends::restore(dump.backends),
            names: BTreeMap::new(),
            source_ranges: dump.source_ranges.into_iter().collect(),
            runs: Runs::new(dump.table_size),
            looked_for_broken: false,
            stray_names: BTreeSet::new(),
            frontends_of: BTreeSet::new(),
            frontend_counts: [0; 2],
            source_range_counts: [0; 2],
        };
        for (_, network) in &actual.source_ranges {
            actual.source_range_counts[family(network.address())] += 1;
        }
        let mut known = HashSet::new();
        let mut names = dump.names;
        names.sort_unstable_by_key(|(id, _)| *id);
        for (id, name) in names {
            match name {
                // No service port has the id 0, by which marks are known.
                Some(name) if id != 0 && known.insert(name.clone()) => drop(actual.names.insert(id, name)),
                _ => drop(actual.stray_names.insert(id)),
            }
        }
        for (_, frontend) in &dump.frontends {
            for set in [frontend.cluster, frontend.local] {
                if let Some(ids) = run_of(&dump.table, set) {
                    actual.runs.restore(frontend.service_id, set, ids.into());
                }
            }
        }
        for (address, frontend) in dump.frontends {
            actual.put_frontend(address, frontend);
        }
        actual
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            frontends: self.frontend_counts,
            backends: self.backends.counts(),
            names: self.names.len() + self.stray_names.len(),
            table: self.runs.used() as usize,
            source_ranges: self.source_range_counts,
        }
    }

    /// Every service id that something in the kernel carries.
    pub(super) fn service_ids(&self) -> BTreeSet<u32> {
        let named = self.names.keys().chain(&self.stray_names).copied();
        let ids = named.chain(self.backends.services());
        let ids = ids.chain(self.source_ranges.iter().map(|(id, _)| *id));
        ids.chain(self.frontends.values().map(|frontend| frontend.service_id)).collect()
    }

    /// Keys of the frontends in the kernel that carry a service id.
    pub(super) fn frontends_of(&self, service_id: u32) -> impl Iterator<Item = FrontendAddress> + '_ {
        let first = (service_id, FrontendAddress::mark(IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
        self.frontends_of.range(first..).take_while(move |(id, _)| *id == service_id).map(|(_, address)| *address)
    }

    /// Whether a frontend in the kernel carries a service id.
    pub(super) fn has_frontend(&self, service_id: u32) -> bool {
        self.frontends_of(service_id).next().is_some()
    }

    /// Clients that the kernel lets use a service port's guarded frontends.
    pub(super) fn source_ranges_of(&self, service_id: u32) -> impl Iterator<Item = Network> + '_ {
        let range = self.source_ranges.range((service_id, Network::FIRST)..);
        range.take_while(move |(id, _)| *id == service_id).map(|(_, network)| *network)
    }

    /// Whether a frontend in the kernel looks at a service port's source ranges.
    pub(super) fn is_guarded(&self, service_id: u32) -> bool {
        let mut frontends = self.frontends_of(service_id).filter_map(|address| self.frontends.get(&address));
        frontends.any(|frontend| frontend.flags & flags::SOURCE_RANGES != 0)
    }

    /// A new run for these ids; `None` if the table is full.
    pub(super) fn allocate_run(&mut self, service_id: u32, ids: &[u32]) -> Option<BackendSet> {
        let mut allocated = self.runs.allocate(service_id, ids.into());
        // Only what was read back can be broken.
        if allocated.is_none() && !std::mem::replace(&mut self.looked_for_broken, true) {
            // Ids that nobody gave out, of a backend or a service, say nothing.
            let named = |(service_id, id): &(u32, u32)| *id != 0 && self.names.contains_key(service_id);
            let held = self.backends.iter().map(|(service_id, held)| (service_id, held.id));
            let known: HashSet<_> = held.filter(named).collect();
            self.runs.give_up_broken(|service_id, id| known.contains(&(service_id, id)));
            allocated = self.runs.allocate(service_id, ids.into());
        }
        if let Some(set) = allocated.filter(|_| self.looked_for_broken) {
            // It may lie where one was given up that frontends still name.
            let frontends = self.frontends_of(service_id).filter_map(|address| self.frontends.get(&address));
            let sets = frontends.flat_map(|frontend| [frontend.cluster, frontend.local]);
            for _ in 0..sets.filter(|named| *named == set).count() {
                self.runs.name(service_id, set);
            }
        }
        allocated
    }

    /// Moves the mirror. Returns the runs that no frontend names any more: service id and first index.
    pub(super) fn apply(&mut self, write: &Write) -> Vec<(u32, u32)> {
        match write {
            Write::Reserve { .. } | Write::WriteRun { .. } => Vec::new(),
            Write::PutName { service_id, name } => {
                self.stray_names.remove(service_id);
                self.names.insert(*service_id, name.clone());
                Vec::new()
            }
            Write::DeleteName { service_id } => {
                self.stray_names.remove(service_id);
                self.names.remove(service_id);
                Vec::new()
            }
            Write::PutSourceRange { service_id, network } => {
                let is_new = self.source_ranges.insert((*service_id, *network));
                self.source_range_counts[family(network.address())] += usize::from(is_new);
                Vec::new()
            }
            Write::DeleteSourceRange { service_id, network } => {
                let was_there = self.source_ranges.remove(&(*service_id, *network));
                self.source_range_counts[family(network.address())] -= usize::from(was_there);
                Vec::new()
            }
            Write::PutBackend { id, backend } => {
                self.backends.put(*id, backend);
                Vec::new()
            }
            Write::DeleteBackend { id, service_id, endpoint } => {
                self.backends.delete(*service_id, *endpoint, *id);
                Vec::new()
            }
            Write::PutFrontend { address, frontend } => self.put_frontend(*address, *frontend),
            Write::DeleteFrontend { address } => {
                let old = self.frontends.remove(address);
                self.frontend_counts[family(address.address)] -= usize::from(old.is_some());
                self.forget(*address, old)
            }
        }
    }

    fn put_frontend(&mut self, address: FrontendAddress, frontend: Frontend) -> Vec<(u32, u32)> {
        self.runs.name(frontend.service_id, frontend.cluster);
        self.runs.name(frontend.service_id, frontend.local);
        let old = self.frontends.insert(address, frontend);
        self.frontend_counts[family(address.address)] += usize::from(old.is_none());
        let unnamed = self.forget(address, old);
        // A mark is no service port's.
        if !address.is_mark() {
            self.frontends_of.insert((frontend.service_id, address));
        }
        unnamed
    }

    fn forget(&mut self, address: FrontendAddress, old: Option<Frontend>) -> Vec<(u32, u32)> {
        let Some(old) = old else { return Vec::new() };
        let id = old.service_id;
        self.frontends_of.remove(&(id, address));
        let sets = [old.cluster, old.local];
        sets.into_iter().filter(|set| self.runs.unname(id, *set)).map(|set| (id, set.first)).collect()
    }
}

fn run_of(table: &[u32], set: BackendSet) -> Option<&[u32]> {
    let first = usize::try_from(set.first).ok()?;
    let length = usize::try_from(set.length).ok().filter(|length| *length > 0)?;
    table.get(first..first.checked_add(length)?)
}
