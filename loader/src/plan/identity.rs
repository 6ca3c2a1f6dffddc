//! Ids: of service ports (dense, reused only after their flows and affinity entries are swept) and of backends (never
//! reused).
//!
//! The next ids live in the pinned config map and are raised, some at a time, before the first of them is used.

use std::collections::BTreeSet;
use std::ops::Range;

/// How many ids are reserved at once.
const CHUNK: u32 = 64;

/// Unswept service ids that make a sweep worth its walk over all flows.
const SWEEP_WORTHWHILE: usize = 256;

/// Allocator of ids.
#[derive(Clone, Debug)]
pub struct Identity {
    next_backend: u32,
    reserved_backend: u32,
    next_service: u32,
    reserved_service: u32,
    service_limit: u32,
    /// Service ids free for use.
    clean: BTreeSet<u32>,
    /// Free service ids that flows or affinity entries may still carry.
    unswept: BTreeSet<u32>,
    /// Those of them that open connections carried at the last sweep.
    in_use: BTreeSet<u32>,
}

impl Identity {
    /// From the config map's next ids (0 in a map that was never written), the ids in use, and the number of service ids
    /// that the maps have room for.
    #[must_use]
    pub fn restore(
        next_backend_id: u32,
        next_service_id: u32,
        backends: impl IntoIterator<Item = u32>,
        services: &BTreeSet<u32>,
        service_limit: u32,
    ) -> Self {
        let beyond = |highest: Option<u32>| highest.map_or(1, |id| id.saturating_add(1));
        let next_backend = next_backend_id.max(beyond(backends.into_iter().max()));
        let next_service = next_service_id.max(beyond(services.last().copied()));
        let unswept = (1..next_service.min(service_limit)).filter(|id| !services.contains(id)).collect();
        Self {
            next_backend,
            reserved_backend: next_backend_id,
            next_service,
            reserved_service: next_service_id,
            service_limit,
            clean: BTreeSet::new(),
            unswept,
            in_use: BTreeSet::new(),
        }
    }

    /// Service ids are smaller than this.
    #[must_use]
    pub const fn service_limit(&self) -> u32 {
        self.service_limit
    }

    /// Service ids that are in use, or were.
    #[must_use]
    pub const fn service_ids(&self) -> Range<u32> {
        1..self.next_service
    }

    /// A backend id that was never used; `None` when all are.
    pub fn allocate_backend(&mut self) -> Option<u32> {
        let id = self.next_backend;
        self.next_backend = id.checked_add(1)?;
        Some(id)
    }

    /// The id that [`Self::allocate_backend`] gives next.
    #[must_use]
    pub const fn next_backend(&self) -> u32 {
        self.next_backend
    }

    /// Gives back the backend ids from `first` on, which were allocated last and will not be written.
    pub fn return_backends(&mut self, first: u32) {
        self.next_backend = self.next_backend.min(first);
    }

    /// The smallest free service id; `None` when none is left, or the free ones are not swept yet.
    pub fn allocate_service(&mut self) -> Option<u32> {
        if let Some(id) = self.clean.pop_first() {
            return Some(id);
        }
        (self.next_service < self.service_limit).then(|| {
            let id = self.next_service;
            self.next_service += 1;
            id
        })
    }

    /// Gives a service id back. It is not used again before [`Self::swept`]; never, if this program would not have given it out
    /// and only found it in the maps.
    pub fn retire_service(&mut self, id: u32) {
        if (1..self.service_limit).contains(&id) {
            self.unswept.insert(id);
        }
    }

    /// The next ids to write to the config map before ids allocated so far are used; `None` if what is there will do.
    #[must_use]
    pub fn reservation(&self) -> Option<(u32, u32)> {
        let raise = |next: u32, reserved: u32| if next > reserved { next.saturating_add(CHUNK) } else { reserved };
        let raised = (raise(self.next_backend, self.reserved_backend), raise(self.next_service, self.reserved_service));
        (raised != (self.reserved_backend, self.reserved_service)).then_some(raised)
    }

    /// The config map says so now.
    pub fn reserved(&mut self, next_backend_id: u32, next_service_id: u32) {
        self.reserved_backend = next_backend_id;
        self.reserved_service = next_service_id;
    }

    /// Free service ids whose flows and affinity entries should be swept now: empty unless there are many of them or
    /// no other id is left.
    #[must_use]
    pub fn to_sweep(&self) -> BTreeSet<u32> {
        let worthwhile = self.unswept.len() >= self.in_use.len() + SWEEP_WORTHWHILE;
        if worthwhile || self.is_short_of_services() { self.unswept.clone() } else { BTreeSet::new() }
    }

    /// Whether [`Self::allocate_service`] has none to give.
    #[must_use]
    pub fn is_short_of_services(&self) -> bool {
        self.clean.is_empty() && self.next_service >= self.service_limit
    }

    /// No flow and no affinity entry carries these ids any more; open connections carry those that are `in_use`.
    pub fn swept(&mut self, ids: &BTreeSet<u32>, in_use: BTreeSet<u32>) {
        self.in_use = in_use;
        for id in ids {
            if self.unswept.remove(id) {
                self.clean.insert(*id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_start_at_one_and_are_reserved_before_use() {
        let mut identity = Identity::restore(0, 0, [], &BTreeSet::new(), 100);
        assert_eq!(identity.allocate_backend(), Some(1));
        assert_eq!(identity.allocate_service(), Some(1));
        let (backend, service) = identity.reservation().expect("nothing is reserved yet");
        assert!(backend > 1 && service > 1);
        identity.reserved(backend, service);
        assert_eq!(identity.allocate_backend(), Some(2));
        assert_eq!(identity.reservation(), None, "a chunk is reserved at a time");
    }

    #[test]
    fn a_restart_never_hands_out_a_backend_id_again_and_keeps_service_ids_dense() {
        let mut identity = Identity::restore(65, 65, [3, 70], &BTreeSet::from([1, 2]), 1_000);
        assert_eq!(identity.allocate_backend(), Some(71), "an id in use beats a config that says less");
        assert_eq!(identity.allocate_service(), Some(65), "3 to 64 may still be carried by flows");
        identity.swept(&BTreeSet::from([3, 4]), BTreeSet::new());
        assert_eq!(identity.allocate_service(), Some(3));
    }

    #[test]
    fn ids_that_no_service_can_have_are_not_used_though_the_maps_had_them() {
        let mut identity = Identity::restore(0, 0, [], &BTreeSet::from([0, 7]), 3);
        for id in [0, 7] {
            identity.retire_service(id);
        }
        identity.swept(&BTreeSet::from_iter(0..8), BTreeSet::new());
        let ids: Vec<u32> = std::iter::from_fn(|| identity.allocate_service()).collect();
        assert_eq!(ids, [1, 2]);
    }

    #[test]
    fn a_retired_service_id_comes_back_only_after_its_sweep() {
        let mut identity = Identity::restore(0, 0, [], &BTreeSet::new(), 3);
        assert_eq!((identity.allocate_service(), identity.allocate_service()), (Some(1), Some(2)));
        assert_eq!(identity.allocate_service(), None);
        identity.retire_service(1);
        assert_eq!(identity.allocate_service(), None);
        let sweep = identity.to_sweep();
        assert_eq!(sweep, BTreeSet::from([1]));
        identity.swept(&sweep, BTreeSet::new());
        assert_eq!(identity.allocate_service(), Some(1));
    }
}
