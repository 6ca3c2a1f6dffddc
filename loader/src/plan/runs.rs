//! The runs of the backend table in use: what they hold, whose they are, and how many frontends name them.

use std::collections::{BTreeSet, HashMap};

use sheave_common::backend::IDS_PER_ELEMENT;
use sheave_common::frontend::BackendSet;

use super::table::Table;

#[derive(Clone, Debug)]
struct Run {
    /// Index of its first backend id.
    first: u32,
    /// Frontend sets in the kernel that name it.
    names: u32,
    /// A plan wrote it, or found in it what it would have written. Others were only read back.
    is_ours: bool,
    ids: Box<[u32]>,
}

impl Run {
    fn set(&self) -> BackendSet {
        BackendSet { first: self.first, length: length(&self.ids) }
    }
}

/// All runs.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    /// The table's elements, each of which is one run's.
    table: Table,
    /// Service id → its runs.
    of: HashMap<u32, Vec<Run>>,
    /// (service id, first index) of runs that were allocated and may never have been named.
    fresh: BTreeSet<(u32, u32)>,
    /// Elements of runs that were left out because they overlap another.
    overlapped: Vec<u32>,
}

impl Runs {
    /// In a table that has room for so many backend ids.
    pub(super) fn new(capacity: u32) -> Self {
        let table = Table::new(capacity / IDS_PER_ELEMENT);
        Self { table, of: HashMap::new(), fresh: BTreeSet::new(), overlapped: Vec::new() }
    }

    /// Backend ids that the table has room for.
    pub(super) const fn capacity(&self) -> u32 {
        self.table.capacity() * IDS_PER_ELEMENT
    }

    /// Those that runs take, unused halves of elements included.
    pub(super) const fn used(&self) -> u32 {
        self.table.used() * IDS_PER_ELEMENT
    }

    /// Takes up a run that a frontend in the kernel names. One that overlaps another is left out: its elements are
    /// not reused before the next restart unless there are no others, and the service gets a new run.
    pub(super) fn restore(&mut self, service_id: u32, set: BackendSet, ids: Box<[u32]>) {
        if set.length == 0 || self.get(service_id, set).is_some() {
            return;
        }
        let (first, number) = elements(set);
        if self.table.reserve(first, number) {
            self.insert(service_id, Run { first: set.first, names: 0, is_ours: false, ids });
        } else {
            let elements = first..first.saturating_add(number);
            self.overlapped.extend(elements.filter(|element| self.table.reserve(*element, 1)));
        }
    }

    /// A run of this service that holds exactly these ids; the one most frontends name if there are several.
    pub(super) fn find(&mut self, service_id: u32, ids: &[u32]) -> Option<BackendSet> {
        let alike = self.of.get_mut(&service_id)?.iter_mut().filter(|run| *run.ids == *ids);
        let run = alike.max_by_key(|run| (run.names, std::cmp::Reverse(run.first)))?;
        run.is_ours = true;
        Some(run.set())
    }

    /// A new run for these ids, of which there is at least one; `None` if the table is full.
    pub(super) fn allocate(&mut self, service_id: u32, ids: Box<[u32]>) -> Option<BackendSet> {
        let first = self.table.allocate(length(&ids).div_ceil(IDS_PER_ELEMENT))? * IDS_PER_ELEMENT;
        let run = Run { first, names: 0, is_ours: true, ids };
        let set = run.set();
        self.fresh.insert((service_id, first));
        self.insert(service_id, run);
        Some(set)
    }

    /// The table is full: gives up what was read back and can't be a run of ours, because it overlaps another, or names ids
    /// that `is_backend` denies its service. A frontend that names one leads nowhere there, and is about to be written anew.
    pub(super) fn give_up_broken(&mut self, is_backend: impl Fn(u32, u32) -> bool) {
        for element in std::mem::take(&mut self.overlapped) {
            self.table.free(element, 1);
        }
        for (service_id, runs) in &mut self.of {
            let is_broken = |run: &mut Run| !run.is_ours && !run.ids.iter().all(|id| is_backend(*service_id, *id));
            for run in runs.extract_if(.., is_broken) {
                let (first, number) = elements(run.set());
                self.table.free(first, number);
            }
        }
    }

    fn insert(&mut self, service_id: u32, run: Run) {
        self.of.entry(service_id).or_insert_with(|| Vec::with_capacity(1)).push(run);
    }

    fn get(&self, service_id: u32, set: BackendSet) -> Option<&Run> {
        self.of.get(&service_id)?.iter().find(|run| run.set() == set)
    }

    fn get_mut(&mut self, service_id: u32, set: BackendSet) -> Option<&mut Run> {
        self.of.get_mut(&service_id)?.iter_mut().find(|run| run.set() == set)
    }

    /// A frontend of this service in the kernel names this set now.
    pub(super) fn name(&mut self, service_id: u32, set: BackendSet) {
        if let Some(run) = self.get_mut(service_id, set) {
            run.names += 1;
        }
    }

    /// A frontend of this service in the kernel names this set no more. True if it was the last one.
    pub(super) fn unname(&mut self, service_id: u32, set: BackendSet) -> bool {
        let Some(run) = self.get_mut(service_id, set) else { return false };
        run.names -= 1;
        run.names == 0
    }

    /// A service's runs, and what the kernel's table holds there.
    pub(super) fn of(&self, service_id: u32) -> impl Iterator<Item = (BackendSet, &[u32])> {
        self.of.get(&service_id).into_iter().flatten().map(|run| (run.set(), &*run.ids))
    }

    /// The kernel's table holds other ids in a run, as many.
    pub(super) fn learn(&mut self, service_id: u32, set: BackendSet, ids: &[u32]) {
        if let Some(run) = self.get_mut(service_id, set) {
            run.ids = ids.into();
        }
    }

    /// Whether a frontend of this service in the kernel can lead to this backend.
    pub(super) fn reaches(&self, service_id: u32, backend_id: u32) -> bool {
        let mut named = self.of.get(&service_id).into_iter().flatten().filter(|run| run.names > 0);
        named.any(|run| run.ids.contains(&backend_id))
    }

    /// Frees a run unless a frontend names it.
    pub(super) fn free_unnamed(&mut self, service_id: u32, first: u32) {
        let Some(of) = self.of.get_mut(&service_id) else { return };
        let Some(index) = of.iter().position(|run| run.first == first && run.names == 0) else { return };
        let (first, number) = elements(of.swap_remove(index).set());
        self.table.free(first, number);
        if of.is_empty() {
            self.of.remove(&service_id);
        }
    }

    /// At the end of a batch: runs that it allocated and nothing names were never seen by a packet.
    pub(super) fn free_fresh(&mut self) {
        for (service_id, first) in std::mem::take(&mut self.fresh) {
            self.free_unnamed(service_id, first);
        }
    }
}

/// First element of the table that a set lies in, and how many there are. A set of ours begins with an element's first id.
const fn elements(set: BackendSet) -> (u32, u32) {
    let first = set.first / IDS_PER_ELEMENT;
    (first, set.first.saturating_add(set.length).div_ceil(IDS_PER_ELEMENT) - first)
}

/// Number of elements of a run; a set has no more than the table, whose size is a u32.
fn length(ids: &[u32]) -> u32 {
    u32::try_from(ids.len()).unwrap_or(u32::MAX)
}
