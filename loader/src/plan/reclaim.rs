//! What goes after a grace period: table runs that no frontend names any more, backends and names that are not desired
//! any more, source ranges that no frontend asks for any more.
//!
//! Something may be wanted again while it waits (an endpoint that flaps): then it is still there and simply stays.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::diff::Planner;
use super::write::{Batch, Operation, Owner, Write};
use crate::model::desired::ServicePortName;
use crate::model::network::Network;

/// Everything that was given up until [`Planner::begin_grace`]. A grace period later it may be reclaimed.
#[derive(Clone, Copy, Debug)]
#[must_use = "nothing is freed before it is reclaimed"]
pub struct Grace(u64);

/// What waits, with the generation in which it was given up.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    generation: u64,
    runs: BTreeMap<(u32, u32), u64>,
    /// (service id, endpoint, backend id).
    backends: BTreeMap<(u32, SocketAddr, u32), u64>,
    source_ranges: BTreeMap<(u32, Network), u64>,
    services: BTreeMap<ServicePortName, u64>,
    stray_names: BTreeMap<u32, u64>,
}

impl Queue {
    pub(super) fn runs(&mut self, runs: impl IntoIterator<Item = (u32, u32)>) {
        self.runs.extend(runs.into_iter().map(|run| (run, self.generation)));
    }

    pub(super) fn backends(&mut self, service_id: u32, backends: impl IntoIterator<Item = (SocketAddr, u32)>) {
        let key = |(endpoint, id)| ((service_id, endpoint, id), self.generation);
        self.backends.extend(backends.into_iter().map(key));
    }

    pub(super) fn source_ranges(&mut self, ranges: impl IntoIterator<Item = (u32, Network)>) {
        self.source_ranges.extend(ranges.into_iter().map(|range| (range, self.generation)));
    }

    pub(super) fn service(&mut self, name: ServicePortName) {
        self.services.insert(name, self.generation);
    }

    pub(super) fn stray_names(&mut self, ids: impl IntoIterator<Item = u32>) {
        self.stray_names.extend(ids.into_iter().map(|id| (id, self.generation)));
    }

    fn is_empty(&self) -> bool {
        let (runs, backends, ranges) = (self.runs.is_empty(), self.backends.is_empty(), self.source_ranges.is_empty());
        runs && backends && ranges && self.services.is_empty() && self.stray_names.is_empty()
    }
}

/// Takes out of a queue what was given up in `generation` or before.
fn ripe<K: Ord + Clone>(queue: &mut BTreeMap<K, u64>, generation: u64) -> Vec<K> {
    queue.extract_if(.., |_, given_up| *given_up <= generation).map(|(key, _)| key).collect()
}

impl Planner {
    /// Marks what waits now; `None` if nothing does. The caller lets a grace period pass, in which it may plan and execute
    /// other batches, and then reclaims.
    pub fn begin_grace(&mut self) -> Option<Grace> {
        if self.queue.is_empty() {
            return None;
        }
        let grace = Grace(self.queue.generation);
        self.queue.generation += 1;
        Some(grace)
    }

    /// Frees runs, and plans the deletions of backends, source ranges and names.
    pub fn reclaim(&mut self, Grace(generation): Grace) -> Batch {
        for (service_id, first) in ripe(&mut self.queue.runs, generation) {
            self.actual.runs.free_unnamed(service_id, first);
        }
        let mut deleted = BTreeSet::new();
        let mut operations = Vec::new();
        for (service_id, endpoint, id) in ripe(&mut self.queue.backends, generation) {
            if !self.actual.backends.contains(service_id, endpoint, id) {
                continue;
            }
            let name = self.actual.names.get(&service_id);
            let desired = name.and_then(|name| self.services.get(name)).and_then(|service| service.desired.as_ref());
            let is_the_endpoints = self.actual.backends.get(service_id, endpoint).is_some_and(|held| held.id == id);
            let is_wanted = is_the_endpoints && desired.is_some_and(|desired| desired.has(endpoint));
            if is_wanted || self.actual.runs.reaches(service_id, id) {
                continue;
            }
            deleted.insert(id);
            let owner = name.map_or(Owner::Nobody, |name| Owner::Service(name.clone()));
            operations.push(Operation { owner, write: Write::DeleteBackend { id, service_id, endpoint } });
        }
        let mut deleted_ranges = BTreeSet::new();
        for (service_id, network) in ripe(&mut self.queue.source_ranges, generation) {
            let range = (service_id, network);
            let name = self.actual.names.get(&service_id);
            let desired = name.and_then(|name| self.services.get(name)).and_then(|service| service.desired.as_ref());
            let is_wanted = desired.is_some_and(|desired| desired.admits(&network));
            if !self.actual.source_ranges.contains(&range) || is_wanted || self.actual.is_guarded(service_id) {
                continue;
            }
            deleted_ranges.insert(range);
            let owner = name.map_or(Owner::Nobody, |name| Owner::Service(name.clone()));
            operations.push(Operation { owner, write: Write::DeleteSourceRange { service_id, network } });
        }
        for name in ripe(&mut self.queue.services, generation) {
            let Some(service) = self.services.get(&name).filter(|service| service.desired.is_none()) else { continue };
            let Some(service_id) = service.id else {
                self.services.remove(&name);
                continue;
            };
            let in_use = self.actual.has_frontend(service_id)
                || self.actual.backends.of(service_id).iter().any(|held| !deleted.contains(&held.id))
                || self.actual.source_ranges_of(service_id).any(|range| !deleted_ranges.contains(&(service_id, range)));
            if in_use {
                continue;
            }
            if self.actual.names.get(&service_id) == Some(&name) {
                operations.push(Operation { owner: Owner::Service(name), write: Write::DeleteName { service_id } });
            } else {
                self.services.remove(&name);
                self.identity.retire_service(service_id);
            }
        }
        for service_id in ripe(&mut self.queue.stray_names, generation) {
            // While a frontend carries the id, it can't be given to another.
            if self.actual.stray_names.contains(&service_id) && !self.actual.has_frontend(service_id) {
                operations.push(Operation { owner: Owner::Nobody, write: Write::DeleteName { service_id } });
            }
        }
        Batch { operations, refused: BTreeMap::new() }
    }

    /// Queues what is left of a service port that is gone, once no frontend is its. When it was given up, one may have stayed
    /// because the service port that takes it over could not be planned.
    pub(super) fn queue_rest(&mut self, service_id: u32) {
        let name = self.actual.names.get(&service_id);
        let service = name.and_then(|name| self.services.get(name));
        let is_wanted = service.is_some_and(|service| service.desired.is_some());
        if is_wanted || self.actual.has_frontend(service_id) {
            return;
        }
        let backends = self.actual.backends.of(service_id).iter().map(|held| (held.endpoint(), held.id));
        self.queue.backends(service_id, backends);
        self.queue.source_ranges(self.actual.source_ranges_of(service_id).map(|network| (service_id, network)));
        if let Some(name) = name {
            self.queue.service(name.clone());
        }
        self.queue.stray_names(self.actual.stray_names.get(&service_id).copied());
    }

    /// Queues whatever the kernel holds that belongs to no service port.
    pub(super) fn queue_strays(&mut self) {
        let backends = &self.actual.backends;
        let strays = backends.iter().filter(|(service_id, held)| {
            let first = backends.get(*service_id, held.endpoint());
            !self.actual.names.contains_key(service_id) || first.is_none_or(|first| first.id != held.id)
        });
        for (service_id, held) in strays {
            self.queue.backends(service_id, [(held.endpoint(), held.id)]);
        }
        let ranges = self.actual.source_ranges.iter().filter(|(id, _)| !self.actual.names.contains_key(id));
        self.queue.source_ranges(ranges.copied());
        self.queue.stray_names(self.actual.stray_names.iter().copied());
    }

    /// Service ids whose flows and affinity entries should be swept now, before the ids are used again; empty most of
    /// the time.
    #[must_use]
    pub fn service_ids_to_sweep(&self) -> BTreeSet<u32> {
        self.identity.to_sweep()
    }

    /// Whether a new service port would find no id.
    #[must_use]
    pub fn is_short_of_service_ids(&self) -> bool {
        self.identity.is_short_of_services()
    }

    /// No flow and no affinity entry carries these service ids any more; open connections carry those that are `in_use`.
    pub fn swept(&mut self, service_ids: &BTreeSet<u32>, in_use: BTreeSet<u32>) {
        self.identity.swept(service_ids, in_use);
    }
}
