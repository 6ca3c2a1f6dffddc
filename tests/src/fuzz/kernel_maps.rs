//! The maps that the controller writes, as the plan sees them.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use sheave::model::desired::{ServicePort, ServicePortName};
use sheave::model::network::Network;
use sheave::plan::{Backend, Batch, Dump, Failure, Frontend, FrontendAddress, PlanError, Planner, Write};
use sheave_common::backend::IDS_PER_ELEMENT;
use sheave_common::frontend::{BackendSet, flags};

/// What the maps have room for. A start reads all of it, so an input has no more than it needs.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Backend ids in the backend table.
    pub table: u32,
    /// Service ids.
    pub services: u32,
}

impl Room {
    /// For inputs of the targets.
    pub(super) fn new(services: u32, has_maglev: bool) -> Self {
        // Maglev's runs are long: one, and another that takes its place, have room.
        Self { table: if has_maglev { 8_192 } else { 1_024 }, services }
    }
}

/// What a frontend comes to.
#[derive(Debug, PartialEq)]
pub(super) struct Meaning {
    /// `None` if there is no name, and within if it can't be read.
    name: Option<Option<ServicePortName>>,
    /// Without ids.
    frontend: Frontend,
    cluster: Vec<Backend>,
    local: Vec<Backend>,
    /// Those that may use it, where not all may.
    clients: Option<Vec<Network>>,
}

/// How often a plan is made again for what could not be done at once: after a grace period, after a sweep.
const ROUNDS: usize = 4;

/// Elements by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Maps {
    pub(super) frontends: BTreeMap<FrontendAddress, Frontend>,
    pub(super) backends: BTreeMap<u32, Backend>,
    pub(super) names: BTreeMap<u32, Option<ServicePortName>>,
    pub(super) source_ranges: BTreeSet<(u32, Network)>,
    pub(super) table: Vec<u32>,
    pub(super) next_backend_id: u32,
    pub(super) next_service_id: u32,
    services: u32,
    /// Frontends as a controller wrote them. What a frontend names that somebody else wrote may overlap anything.
    pub(super) own: BTreeSet<FrontendAddress>,
}

impl Maps {
    pub(super) fn new(room: Room) -> Self {
        Self { table: vec![0; room.table as usize], services: room.services, ..Self::default() }
    }

    fn dump(&self) -> Dump {
        Dump {
            frontends: self.frontends.iter().map(|(key, value)| (*key, *value)).collect(),
            backends: self.backends.iter().map(|(key, value)| (*key, *value)).collect(),
            names: self.names.iter().map(|(key, value)| (*key, value.clone())).collect(),
            source_ranges: self.source_ranges.iter().copied().collect(),
            table: self.table.clone(),
            table_size: self.table.len() as u32,
            next_backend_id: self.next_backend_id,
            next_service_id: self.next_service_id,
            service_limit: self.services,
        }
    }

    fn write(&mut self, write: &Write) {
        match write {
            Write::Reserve { next_backend_id, next_service_id } => {
                assert!(*next_backend_id >= self.next_backend_id && *next_service_id >= self.next_service_id);
                (self.next_backend_id, self.next_service_id) = (*next_backend_id, *next_service_id);
            }
            Write::PutName { service_id, name } => drop(self.names.insert(*service_id, Some(name.clone()))),
            Write::DeleteName { service_id } => drop(self.names.remove(service_id)),
            Write::PutBackend { id, backend } => {
                assert!(*id != 0 || self.backends.contains_key(id), "a backend without an id");
                self.backends.insert(*id, *backend);
            }
            Write::DeleteBackend { id, .. } => drop(self.backends.remove(id)),
            Write::WriteRun { first, ids } => {
                assert_eq!(first % IDS_PER_ELEMENT, 0, "a run begins within an element");
                let run = *first..*first + ids.len() as u32;
                for frontend in self.own.iter().map(|address| &self.frontends[address]) {
                    for set in [frontend.cluster, frontend.local] {
                        // A set that leaves the table is nobody's, and its frontend is about to go.
                        let end = set.first.checked_add(set.length).filter(|end| *end as usize <= self.table.len());
                        let Some(end) = end else { continue };
                        let named = set.length > 0 && set.first < run.end && run.start < end;
                        assert!(!named, "a run is overwritten while a frontend names it: {set:?} and {run:?}");
                    }
                }
                self.table[run.start as usize..run.end as usize].copy_from_slice(ids);
            }
            Write::PutSourceRange { service_id, network } => drop(self.source_ranges.insert((*service_id, *network))),
            Write::DeleteSourceRange { service_id, network } => {
                self.source_ranges.remove(&(*service_id, *network));
            }
            Write::PutFrontend { address, frontend } => {
                self.frontends.insert(*address, *frontend);
                self.own.insert(*address);
            }
            Write::DeleteFrontend { address } => {
                self.frontends.remove(address);
                self.own.remove(address);
            }
        }
    }

    /// Makes a batch's writes; the service ports that could not be planned.
    fn execute(&mut self, planner: &mut Planner, batch: Batch) -> BTreeMap<ServicePortName, PlanError> {
        let outcome = planner.execute(batch, |write| {
            self.write(write);
            Ok::<(), Infallible>(())
        });
        assert!(outcome.other.is_none());
        let refused = outcome.failed.into_iter().map(|(name, failure)| match failure {
            Failure::Plan(error) => (name, error),
            Failure::Write(never) => match never {},
        });
        refused.collect()
    }

    /// Starts a controller on the maps and brings them to what is desired, as far as it can be; what is refused to the end.
    pub(super) fn reach(
        &mut self,
        desired: &BTreeMap<ServicePortName, ServicePort>,
    ) -> BTreeMap<ServicePortName, PlanError> {
        let mut planner = Planner::restore(self.dump());
        let batch = planner.plan_all(desired.clone());
        let mut refused = self.execute(&mut planner, batch);
        for _ in 0..ROUNDS {
            let grace = planner.begin_grace();
            let waited = grace.is_some();
            if let Some(grace) = grace {
                let batch = planner.reclaim(grace);
                self.execute(&mut planner, batch);
            }
            let sweep = planner.service_ids_to_sweep();
            if !waited && sweep.is_empty() {
                break;
            }
            planner.swept(&sweep, BTreeSet::new());
            let batch = planner.plan(BTreeMap::new());
            refused = self.execute(&mut planner, batch);
        }
        refused
    }

    /// Nothing is left to write, neither by the plan that runs nor by the next. What it refuses is refused again.
    pub(super) fn assert_settled(&self, desired: &BTreeMap<ServicePortName, ServicePort>) {
        let mut planner = Planner::restore(self.dump());
        let batch = planner.plan_all(desired.clone());
        let refuses = !batch.refused.is_empty();
        let outcome = planner.execute(batch, |write| {
            // A service port that finds no room has an id all the same.
            let reserves = refuses && matches!(write, Write::Reserve { .. });
            assert!(reserves, "a start with nothing changed writes {write:?}");
            Ok::<(), Infallible>(())
        });
        assert!(outcome.other.is_none());
    }

    /// What clients see: each frontend with its backends' values, without ids.
    pub(super) fn meaning(&self) -> BTreeMap<FrontendAddress, Meaning> {
        let set = |frontend: &Frontend, set: BackendSet| -> Vec<Backend> {
            let ids = (set.first..set.first + set.length).map(|index| self.table[index as usize]);
            let backend = |id| {
                assert!(id != 0, "a set names no backend");
                let backend = self.backends.get(&id).expect("a set names backends that are there");
                assert_eq!(backend.service_id, frontend.service_id, "a set leads to another service");
                Backend { service_id: 0, ..*backend }
            };
            ids.map(backend).collect()
        };
        let describe = |frontend: &Frontend| {
            let clients = (frontend.flags & flags::SOURCE_RANGES != 0).then(|| {
                let own = self.source_ranges.iter().filter(|(id, _)| *id == frontend.service_id);
                own.map(|(_, network)| *network).collect()
            });
            Meaning {
                name: self.names.get(&frontend.service_id).cloned(),
                frontend: Frontend {
                    service_id: 0,
                    cluster: BackendSet::default(),
                    local: BackendSet::default(),
                    ..*frontend
                },
                cluster: set(frontend, frontend.cluster),
                local: set(frontend, frontend.local),
                clients,
            }
        };
        self.frontends.iter().map(|(key, frontend)| (*key, describe(frontend))).collect()
    }

    /// From empty maps.
    pub(super) fn fresh(room: Room, desired: &BTreeMap<ServicePortName, ServicePort>) -> Self {
        let mut maps = Self::new(room);
        assert!(maps.reach(desired).is_empty(), "there is room for it");
        maps
    }
}
