//! The diff: what must be written so that the changed service ports are in the kernel as desired.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use sheave_common::backend::flags::IN_USE;
use sheave_common::frontend::BackendSet;
use sheave_common::service_name::TEXT_LENGTH;

use super::actual::{Actual, Counts, Dump};
use super::claims::{Claims, Touched, mark_of};
use super::identity::Identity;
use super::reclaim::Queue;
use super::spread::spread;
use super::wanted::{Wanted, socket};
use super::write::{Backend, Batch, Frontend, FrontendAddress, Operation, Owner, Write};
use crate::model::desired::{Algorithm, Endpoint, EndpointSets, ServicePort, ServicePortName};

/// Why a service port can't be put into the kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// As many service ports as the maps have room for.
    #[error("the maps have room for {limit} service ports only; raise --max-services")]
    ServiceIdsExhausted {
        /// Size of the maps.
        limit: u32,
    },
    /// 2³² backends were used.
    #[error("every backend id was used; start afresh with `sheave cleanup`")]
    BackendIdsExhausted,
    /// The backend table is full.
    #[error("map backend_table (room for {capacity}) has no free run of {needed}; raise --max-table")]
    TableFull {
        /// Backend ids of the run.
        needed: usize,
        /// Backend ids that the table has room for.
        capacity: u32,
    },
    /// The name does not fit the map `service_names`.
    #[error("the name is longer than {TEXT_LENGTH} octets")]
    NameTooLong,
    /// Written down, the name could be another's.
    #[error("a `/` in the namespace or a `:` in the Service's name can't be told from what separates them; rename it")]
    NameAmbiguous,
}

/// What is known of one service port.
#[derive(Clone, Debug, Default)]
pub(super) struct Service {
    pub(super) id: Option<u32>,
    /// `None`: it should not be there.
    pub(super) desired: Option<Box<Wanted>>,
    /// Its sets per family; `None` if they are not in the kernel.
    pub(super) sets: Option<[Sets; 2]>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sets {
    cluster: BackendSet,
    local: BackendSet,
}

/// The planner: desired and actual state, and the allocators between them.
#[derive(Clone, Debug)]
pub struct Planner {
    pub(super) services: HashMap<ServicePortName, Service>,
    pub(super) actual: Actual,
    pub(super) identity: Identity,
    pub(super) queue: Queue,
    claims: Claims,
    /// Service ports that are not in the kernel as desired because something failed.
    pub(super) unfinished: BTreeSet<ServicePortName>,
}

/// Writes of a plan by their place in the order.
#[derive(Default)]
struct Draft {
    names: Vec<Operation>,
    backends: Vec<Operation>,
    runs: Vec<Operation>,
    source_ranges: Vec<Operation>,
    frontends: Vec<Operation>,
    leaving: Vec<Operation>,
    marks: Vec<Operation>,
    source_range_deletions: Vec<Operation>,
    mark_deletions: Vec<Operation>,
    frontend_deletions: Vec<Operation>,
}

impl Draft {
    fn in_order(self) -> impl Iterator<Item = Operation> {
        let writes =
            [self.names, self.backends, self.runs, self.source_ranges, self.frontends, self.leaving, self.marks];
        let deletions = [self.source_range_deletions, self.mark_deletions, self.frontend_deletions];
        writes.into_iter().chain(deletions).flatten()
    }
}

impl Planner {
    /// From what the kernel holds.
    #[must_use]
    pub fn restore(dump: Dump) -> Self {
        let (next_backend_id, next_service_id) = (dump.next_backend_id, dump.next_service_id);
        let service_limit = dump.service_limit;
        let actual = Actual::restore(dump);
        let backends = actual.backends.iter().map(|(_, held)| held.id);
        let identity =
            Identity::restore(next_backend_id, next_service_id, backends, &actual.service_ids(), service_limit);
        let restored =
            |(id, name): (&u32, &ServicePortName)| (name.clone(), Service { id: Some(*id), ..Service::default() });
        Self {
            services: actual.names.iter().map(restored).collect(),
            actual,
            identity,
            queue: Queue::default(),
            claims: Claims::default(),
            unfinished: BTreeSet::new(),
        }
    }

    /// Writes for the service ports that changed; `None` means that it should not be there. Those that failed before
    /// are included.
    pub fn plan(&mut self, changed: BTreeMap<ServicePortName, Option<ServicePort>>) -> Batch {
        self.draft(changed, Touched::default())
    }

    /// Writes that make everything as desired: service ports that are not listed are removed, and so is whatever
    /// belongs to none.
    pub fn plan_all(&mut self, desired: BTreeMap<ServicePortName, ServicePort>) -> Batch {
        let gone = self.services.keys().filter(|name| !desired.contains_key(*name)).cloned();
        let gone: Vec<_> = gone.map(|name| (name, None)).collect();
        let changed = gone.into_iter().chain(desired.into_iter().map(|(name, port)| (name, Some(port))));
        let mut touched = Touched::default();
        for (address, frontend) in &self.actual.frontends {
            if address.is_mark() {
                touched.addresses.push(address.address);
            } else if !self.actual.names.contains_key(&frontend.service_id) {
                touched.frontends.push(*address);
            }
        }
        self.queue_strays();
        self.draft(changed, touched)
    }

    /// Takes over what is desired. Returns the service ports to plan.
    fn take_over(
        &mut self,
        changed: impl IntoIterator<Item = (ServicePortName, Option<ServicePort>)>,
        touched: &mut Touched,
    ) -> Vec<ServicePortName> {
        let mut services: Vec<_> = std::mem::take(&mut self.unfinished).into_iter().collect();
        for (name, desired) in changed {
            if desired.is_none() && !self.services.contains_key(&name) {
                continue;
            }
            let service = self.services.entry(name.clone()).or_default();
            if let Some(old) = &service.desired {
                self.claims.release(&name, old, touched);
            }
            service.desired = desired.map(|port| Box::new(Wanted::from(port)));
            if let Some(new) = &service.desired {
                self.claims.claim(&name, new, touched);
            }
            services.push(name);
        }
        // Those that had failed, and those that changed, which are most often all of them.
        services.sort();
        services.dedup();
        services
    }

    pub(super) fn draft(
        &mut self,
        changed: impl IntoIterator<Item = (ServicePortName, Option<ServicePort>)>,
        mut touched: Touched,
    ) -> Batch {
        let mut services = self.take_over(changed, &mut touched);
        // Who takes a frontend over is planned as well: its runs may have been freed while it had none.
        let known: HashSet<&ServicePortName> = services.iter().collect();
        let owners = touched.frontends.iter().filter_map(|key| self.claims.owner(key));
        let heirs: BTreeSet<_> = owners.filter(|owner| !known.contains(owner)).cloned().collect();
        services.extend(heirs);
        let mut batch = Batch::default();
        let mut draft = Draft::default();
        for name in services {
            let Some(service) = self.services.get(&name) else { continue };
            if let Some(desired) = &service.desired {
                let keys = desired.frontends.iter();
                let keys = keys.map(|(key, _)| FrontendAddress::new(*key, name.protocol.number()));
                touched.frontends.extend(keys);
                let marked = desired.frontends.iter().filter(|(_, flags)| mark_of(*flags).is_some());
                touched.addresses.extend(marked.map(|(key, _)| key.ip()));
            }
            if let Some(id) = service.id {
                touched.frontends.extend(self.actual.frontends_of(id));
            }
            let ids = self.identity.next_backend();
            if let Err(error) = self.plan_service(&name, &mut draft) {
                self.identity.return_backends(ids);
                if let Some(service) = self.services.get_mut(&name) {
                    service.sets = None;
                }
                self.unfinished.insert(name.clone());
                batch.refused.insert(name, error);
            }
        }
        touched.sort();
        self.plan_frontends(&touched, &batch.refused, &mut draft);
        if let Some((next_backend_id, next_service_id)) = self.identity.reservation() {
            let write = Write::Reserve { next_backend_id, next_service_id };
            batch.operations.push(Operation { owner: Owner::Batch, write });
        }
        batch.operations.extend(draft.in_order());
        batch
    }

    /// Name, backends and runs of one service port.
    fn plan_service(&mut self, name: &ServicePortName, draft: &mut Draft) -> Result<(), PlanError> {
        let Some(service) = self.services.get_mut(name) else { return Ok(()) };
        if let Some(wanted) = service.desired.take() {
            let planned = self.plan_wanted(name, &wanted, draft);
            if let Some(service) = self.services.get_mut(name) {
                service.desired = Some(wanted);
            }
            return planned;
        }
        service.sets = None;
        self.queue.service(name.clone());
        if let Some(id) = service.id {
            let backends = self.actual.backends.of(id).iter().map(|held| (held.endpoint(), held.id));
            self.queue.backends(id, backends);
            self.queue.source_ranges(self.actual.source_ranges_of(id).map(|network| (id, network)));
        }
        Ok(())
    }

    /// Of one that should be there.
    fn plan_wanted(&mut self, name: &ServicePortName, wanted: &Wanted, draft: &mut Draft) -> Result<(), PlanError> {
        if name.length() > TEXT_LENGTH {
            return Err(PlanError::NameTooLong);
        }
        if name.is_ambiguous() {
            return Err(PlanError::NameAmbiguous);
        }
        let Some(service) = self.services.get_mut(name) else { return Ok(()) };
        let service_id = match service.id {
            Some(id) => id,
            None => {
                let limit = self.identity.service_limit();
                let id = self.identity.allocate_service().ok_or(PlanError::ServiceIdsExhausted { limit })?;
                *service.id.insert(id)
            }
        };
        let owned = |write| Operation { owner: Owner::Service(name.clone()), write };
        let endpoints = wanted.backends(service_id);
        let mut ids = Vec::with_capacity(endpoints.len());
        let mut backends = Vec::new();
        let mut unknown = 0;
        for (endpoint, backend) in &endpoints {
            let held = self.actual.backends.get(service_id, *endpoint);
            let id = match held {
                Some(held) => held.id,
                None => self.identity.allocate_backend().ok_or(PlanError::BackendIdsExhausted)?,
            };
            unknown += usize::from(held.is_none());
            ids.push((*endpoint, id));
            if held.is_none_or(|held| held.backend(service_id) != *backend) {
                backends.push(owned(Write::PutBackend { id, backend: *backend }));
            }
        }
        self.actual.backends.expect(service_id, unknown);
        let mut runs = Vec::new();
        let owns = |ipv4: bool| {
            wanted.frontends.iter().any(|(key, _)| {
                let address = FrontendAddress::new(*key, name.protocol.number());
                key.is_ipv4() == ipv4 && self.claims.owner(&address) == Some(name)
            })
        };
        let owned_families = [owns(true), owns(false)];
        let algorithm = wanted.algorithm;
        let mut sets_of = |endpoints: &EndpointSets, owned: bool| -> Result<Sets, PlanError> {
            // A run that no frontend would name is not written.
            if !owned {
                return Ok(Sets::default());
            }
            Ok(Sets {
                cluster: self.run(service_id, algorithm, &endpoints.cluster, &ids, &mut runs)?,
                local: self.run(service_id, algorithm, &endpoints.local, &ids, &mut runs)?,
            })
        };
        let sets = [sets_of(&wanted.endpoints4, owned_families[0])?, sets_of(&wanted.endpoints6, owned_families[1])?];
        let is_wanted = |endpoint| endpoints.binary_search_by_key(&endpoint, |(endpoint, _)| *endpoint).is_ok();
        let unwanted = self.actual.backends.of(service_id).iter().filter(|held| !is_wanted(held.endpoint()));
        for held in unwanted.clone() {
            // It stays for packets in flight, but what a client or a datagram's flow remembers is no way to it any more.
            let backend = held.backend(service_id);
            if backend.flags & IN_USE != 0 {
                let backend = Backend { flags: backend.flags & !IN_USE, ..backend };
                draft.leaving.push(owned(Write::PutBackend { id: held.id, backend }));
            }
        }
        self.queue.backends(service_id, unwanted.map(|held| (held.endpoint(), held.id)));
        if let Some(service) = self.services.get_mut(name) {
            service.sets = Some(sets);
        }
        if self.actual.names.get(&service_id) != Some(name) {
            draft.names.push(owned(Write::PutName { service_id, name: name.clone() }));
        }
        draft.backends.extend(backends);
        draft.runs.extend(runs.into_iter().map(owned));
        self.plan_source_ranges(name, service_id, wanted, draft);
        Ok(())
    }

    /// Who may use a service port's guarded frontends. New clients are let in before old ones are shut out, so a client of
    /// both lists is never refused. Where nothing is guarded any more, a packet in flight may still ask.
    fn plan_source_ranges(&mut self, name: &ServicePortName, service_id: u32, wanted: &Wanted, draft: &mut Draft) {
        let owned = |write| Operation { owner: Owner::Service(name.clone()), write };
        let missing = wanted
            .source_ranges()
            .iter()
            .filter(|network| !self.actual.source_ranges.contains(&(service_id, **network)));
        let puts = missing.map(|network| owned(Write::PutSourceRange { service_id, network: *network }));
        draft.source_ranges.extend(puts);
        let extra = self.actual.source_ranges_of(service_id).filter(|network| !wanted.admits(network));
        if wanted.is_guarded() {
            let deletions = extra.map(|network| owned(Write::DeleteSourceRange { service_id, network }));
            draft.source_range_deletions.extend(deletions);
        } else {
            self.queue.source_ranges(extra.map(|network| (service_id, network)));
        }
    }

    /// The run that holds a set: one that is there already, or a new one.
    fn run(
        &mut self,
        service_id: u32,
        algorithm: Algorithm,
        endpoints: &[Endpoint],
        ids: &[(SocketAddr, u32)],
        writes: &mut Vec<Write>,
    ) -> Result<BackendSet, PlanError> {
        let backend = |endpoint: &Endpoint| {
            let address = socket(endpoint);
            let found = ids.binary_search_by_key(&address, |(endpoint, _)| *endpoint);
            found.ok().map(|index| (address, endpoint.weight, ids[index].1))
        };
        let run = spread(algorithm, &endpoints.iter().filter_map(backend).collect::<Vec<_>>());
        if run.is_empty() {
            return Ok(BackendSet::default());
        }
        if let Some(set) = self.actual.runs.find(service_id, &run) {
            return Ok(set);
        }
        let (needed, capacity) = (run.len(), self.actual.runs.capacity());
        let set = self.actual.allocate_run(service_id, &run).ok_or(PlanError::TableFull { needed, capacity })?;
        writes.push(Write::WriteRun { first: set.first, ids: run });
        Ok(set)
    }

    fn plan_frontends(&self, touched: &Touched, refused: &BTreeMap<ServicePortName, PlanError>, draft: &mut Draft) {
        for key in touched.frontends.iter().filter(|key| !key.is_mark()) {
            let old = self.actual.frontends.get(key);
            let Some(name) = self.claims.owner(key) else {
                if let Some(old) = old {
                    let owner = self.owner(old.service_id);
                    let write = Write::DeleteFrontend { address: *key };
                    draft.frontend_deletions.push(Operation { owner, write });
                }
                continue;
            };
            // A service port without sets failed: what the kernel holds stays.
            let Some(frontend) = self.frontend(name, key) else { continue };
            if old != Some(&frontend) {
                let write = Write::PutFrontend { address: *key, frontend };
                draft.frontends.push(Operation { owner: Owner::Service(name.clone()), write });
            }
        }
        for ip in &touched.addresses {
            let address = FrontendAddress::mark(*ip);
            let old = self.actual.frontends.get(&address);
            match self.claims.mark(ip).map(Frontend::mark) {
                None => {
                    if old.is_some() {
                        let write = Write::DeleteFrontend { address };
                        draft.mark_deletions.push(Operation { owner: Owner::Nobody, write });
                    }
                }
                Some(frontend) if old != Some(&frontend) => {
                    let write = Write::PutFrontend { address, frontend };
                    draft.marks.push(Operation { owner: self.mark_owner(*ip, refused), write });
                }
                Some(_) => {}
            }
        }
    }

    fn frontend(&self, name: &ServicePortName, key: &FrontendAddress) -> Option<Frontend> {
        let service = self.services.get(name)?;
        let desired = service.desired.as_ref()?;
        let [sets4, sets6] = service.sets?;
        let sets = if key.address.is_ipv4() { sets4 } else { sets6 };
        Some(Frontend {
            service_id: service.id?,
            flags: desired.flags(key.socket())?,
            cluster: sets.cluster,
            local: sets.local,
            affinity_seconds: desired.affinity_seconds,
            algorithm: desired.algorithm as u32,
        })
    }

    fn owner(&self, service_id: u32) -> Owner {
        self.actual.names.get(&service_id).map_or(Owner::Nobody, |name| Owner::Service(name.clone()))
    }

    /// A service port on the address: it is planned again if the mark can't be written. One that is refused gets nothing
    /// written, so the mark is another's if there is one.
    fn mark_owner(&self, ip: IpAddr, refused: &BTreeMap<ServicePortName, PlanError>) -> Owner {
        let planned = self.claims.on_address(ip).find(|name| !refused.contains_key(*name));
        let owner = planned.or_else(|| self.claims.on_address(ip).next());
        owner.map_or(Owner::Nobody, |name| Owner::Service(name.clone()))
    }

    /// How many elements the maps have.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.actual.counts()
    }

    /// Whether some service port is not in the kernel as desired because something failed; the next plan includes it.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        !self.unfinished.is_empty()
    }
}
