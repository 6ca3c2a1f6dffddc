//! How full the maps are that services fill, and what a full one refused.

use std::collections::BTreeMap;

use sheave_common::names;

use super::error::MapError;
use super::maps::Maps;
use crate::plan::{Counts, Failure, PlanError};

/// One map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub map: &'static str,
    /// Elements in use.
    pub entries: usize,
    /// Elements that it has room for.
    pub capacity: u32,
    /// Service ports that it had no room for, each time that it was tried.
    pub refused: u64,
}

pub(super) fn of(counts: &Counts, maps: &Maps, refused: &BTreeMap<&'static str, u64>) -> Vec<Usage> {
    let Counts { frontends, backends, names, table, source_ranges } = counts;
    let (v4, v6) = (&maps.v4, &maps.v6);
    [
        (names::FRONTENDS4, frontends[0], v4.frontends.max_entries()),
        (names::FRONTENDS6, frontends[1], v6.frontends.max_entries()),
        (names::BACKENDS4, backends[0], v4.backends.max_entries()),
        (names::BACKENDS6, backends[1], v6.backends.max_entries()),
        (names::BACKEND_TABLE, *table, maps.table_size()),
        // Id 0 is nobody's.
        (names::SERVICE_NAMES, *names, maps.service_names.max_entries() - 1),
        (names::SOURCE_RANGES4, source_ranges[0], v4.source_ranges.max_entries()),
        (names::SOURCE_RANGES6, source_ranges[1], v6.source_ranges.max_entries()),
    ]
    .map(|(map, entries, capacity)| Usage {
        map,
        entries,
        capacity,
        refused: refused.get(map).copied().unwrap_or_default(),
    })
    .into()
}

/// The map that had no room, if that is why.
pub(super) const fn full_map(failure: &Failure<MapError>) -> Option<&'static str> {
    match failure {
        Failure::Write(MapError::Full { map, .. } | MapError::NoMemory { map, .. }) => Some(map),
        Failure::Plan(PlanError::TableFull { .. }) => Some(names::BACKEND_TABLE),
        Failure::Plan(PlanError::ServiceIdsExhausted { .. }) => Some(names::SERVICE_NAMES),
        Failure::Write(_) | Failure::Plan(_) => None,
    }
}
