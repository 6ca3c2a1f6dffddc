//! The runs of the backend table in use: what they hold, whose they are, and how many frontends name them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sheave_common::frontend::BackendSet;

use super::table::Table;

#[derive(Clone, Debug)]
struct Run {
    ids: Box<[u32]>,
    service_id: u32,
    /// Frontend sets in the kernel that name it.
    names: u32,
}

/// All runs.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    table: Table,
    runs: BTreeMap<u32, Run>,
    by_service: BTreeMap<u32, BTreeSet<u32>>,
    /// Backend id → number of runs that hold it and are named by a frontend.
    named_backends: HashMap<u32, u32>,
    /// Runs that were allocated and may never have been named.
    fresh: BTreeSet<u32>,
}

impl Runs {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            table: Table::new(capacity),
            runs: BTreeMap::new(),
            by_service: BTreeMap::new(),
            named_backends: HashMap::new(),
            fresh: BTreeSet::new(),
        }
    }

    pub(super) const fn capacity(&self) -> u32 {
        self.table.capacity()
    }

    /// Elements of the table in use.
    pub(super) const fn used(&self) -> u32 {
        self.table.used()
    }

    /// Takes up a run that a frontend in the kernel names. One that overlaps another is left out: its elements are
    /// not reused before the next restart, and the service gets a new run.
    pub(super) fn restore(&mut self, service_id: u32, set: BackendSet, ids: Box<[u32]>) {
        if set.length == 0 || self.runs.get(&set.first).is_some_and(|run| length(&run.ids) == set.length) {
            return;
        }
        if self.table.reserve(set.first, set.length) {
            self.insert(set.first, Run { ids, service_id, names: 0 });
        } else {
            for element in set.first..set.first.saturating_add(set.length) {
                self.table.reserve(element, 1);
            }
        }
    }

    /// A run of this service that holds exactly these ids; the one most frontends name if there are several.
    pub(super) fn find(&self, service_id: u32, ids: &[u32]) -> Option<BackendSet> {
        let candidates = self.by_service.get(&service_id)?.iter();
        candidates
            .filter_map(|first| self.runs.get(first).map(|run| (first, run)))
            .filter(|(_, run)| *run.ids == *ids)
            .max_by_key(|(first, run)| (run.names, std::cmp::Reverse(**first)))
            .map(|(first, run)| BackendSet { first: *first, length: length(&run.ids) })
    }

    /// A new run for these ids, of which there is at least one; `None` if the table is full.
    pub(super) fn allocate(&mut self, service_id: u32, ids: Box<[u32]>) -> Option<BackendSet> {
        let set = BackendSet { first: self.table.allocate(length(&ids))?, length: length(&ids) };
        self.fresh.insert(set.first);
        self.insert(set.first, Run { ids, service_id, names: 0 });
        Some(set)
    }

    fn insert(&mut self, first: u32, run: Run) {
        self.by_service.entry(run.service_id).or_default().insert(first);
        self.runs.insert(first, run);
    }

    /// A frontend in the kernel names this set now.
    pub(super) fn name(&mut self, set: BackendSet) {
        let Some(run) = self.runs.get_mut(&set.first).filter(|run| length(&run.ids) == set.length) else { return };
        run.names += 1;
        if run.names == 1 {
            for id in &run.ids {
                *self.named_backends.entry(*id).or_default() += 1;
            }
        }
    }

    /// A frontend in the kernel names this set no more. True if it was the last one.
    pub(super) fn unname(&mut self, set: BackendSet) -> bool {
        let Some(run) = self.runs.get_mut(&set.first).filter(|run| length(&run.ids) == set.length) else {
            return false;
        };
        run.names -= 1;
        if run.names > 0 {
            return false;
        }
        for id in &run.ids {
            if let Some(count) = self.named_backends.get_mut(id) {
                *count -= 1;
                if *count == 0 {
                    self.named_backends.remove(id);
                }
            }
        }
        true
    }

    /// Whether a frontend in the kernel can lead to this backend.
    pub(super) fn reaches(&self, backend_id: u32) -> bool {
        self.named_backends.contains_key(&backend_id)
    }

    /// Frees a run unless a frontend names it.
    pub(super) fn free_unnamed(&mut self, first: u32) {
        if self.runs.get(&first).is_none_or(|run| run.names > 0) {
            return;
        }
        let Some(run) = self.runs.remove(&first) else { return };
        self.table.free(first, length(&run.ids));
        if let Some(of_service) = self.by_service.get_mut(&run.service_id) {
            of_service.remove(&first);
            if of_service.is_empty() {
                self.by_service.remove(&run.service_id);
            }
        }
    }

    /// At the end of a batch: runs that it allocated and nothing names were never seen by a packet.
    pub(super) fn free_fresh(&mut self) {
        for first in std::mem::take(&mut self.fresh) {
            self.free_unnamed(first);
        }
    }
}

/// Number of elements of a run; a set has no more than the table, whose size is a u32.
fn length(ids: &[u32]) -> u32 {
    u32::try_from(ids.len()).unwrap_or(u32::MAX)
}
