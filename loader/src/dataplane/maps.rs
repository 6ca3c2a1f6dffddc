//! The maps that the controller reads and writes, opened from their pins.

use std::path::Path;

use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{Backend, IDS_PER_ELEMENT, TableElement};
use sheave_common::config::Config;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::interface::Interface;
use sheave_common::load::Load;
use sheave_common::prefix::{Prefix, SourceRange};
use sheave_common::service_name::ServiceName;
use sheave_common::{Address, Ipv4Address, Ipv6Address, names};

use super::error::MapError;
use super::map::Map;

/// The maps of one address family.
#[derive(Debug)]
pub(super) struct FamilyMaps<A: Address> {
    pub(super) frontends: Map<FrontendKey<A>, Frontend>,
    pub(super) backends: Map<u32, Backend<A>>,
    pub(super) conntrack: Map<FlowKey<A>, Flow<A>>,
    pub(super) half_open: Map<FlowKey<A>, Flow<A>>,
    pub(super) affinity: Map<AffinityKey<A>, Affinity>,
    pub(super) new_affinity: Map<AffinityKey<A>, Affinity>,
    pub(super) source_ranges: Map<Prefix<SourceRange<A>>, u32>,
    pub(super) service_cidrs: Map<Prefix<A>, u32>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) config: Map<u32, Config>,
    pub(super) v4: FamilyMaps<Ipv4Address>,
    pub(super) v6: FamilyMaps<Ipv6Address>,
    pub(super) backend_table: Map<u32, TableElement>,
    pub(super) backend_loads: Map<u32, Load>,
    pub(super) destinations: Map<u32, u32>,
    pub(super) interfaces: Map<u32, Interface>,
    pub(super) service_names: Map<u32, ServiceName>,
}

impl Maps {
    /// The element of the pinned config map, if there is such a map yet.
    pub(super) fn config(directory: &Path) -> Result<Option<Config>, MapError> {
        match directory.join(names::CONFIG).exists() {
            true => Map::open(directory, names::CONFIG, true)?.get(&0),
            false => Ok(None),
        }
    }

    /// Backend ids that `backend_table` has room for.
    pub(super) const fn table_size(&self) -> u32 {
        self.backend_table.max_entries() * IDS_PER_ELEMENT
    }

    /// Opens the maps pinned in a directory.
    pub(super) fn open(directory: &Path, read_only: bool) -> Result<Self, MapError> {
        Ok(Self {
            config: Map::open(directory, names::CONFIG, read_only)?,
            v4: FamilyMaps {
                frontends: Map::open(directory, names::FRONTENDS4, read_only)?,
                backends: Map::open(directory, names::BACKENDS4, read_only)?,
                conntrack: Map::open(directory, names::CONNTRACK4, read_only)?,
                half_open: Map::open(directory, names::HALF_OPEN4, read_only)?,
                affinity: Map::open(directory, names::AFFINITY4, read_only)?,
                new_affinity: Map::open(directory, names::NEW_AFFINITY4, read_only)?,
                source_ranges: Map::open(directory, names::SOURCE_RANGES4, read_only)?,
                service_cidrs: Map::open(directory, names::SERVICE_CIDRS4, read_only)?,
            },
            v6: FamilyMaps {
                frontends: Map::open(directory, names::FRONTENDS6, read_only)?,
                backends: Map::open(directory, names::BACKENDS6, read_only)?,
                conntrack: Map::open(directory, names::CONNTRACK6, read_only)?,
                half_open: Map::open(directory, names::HALF_OPEN6, read_only)?,
                affinity: Map::open(directory, names::AFFINITY6, read_only)?,
                new_affinity: Map::open(directory, names::NEW_AFFINITY6, read_only)?,
                source_ranges: Map::open(directory, names::SOURCE_RANGES6, read_only)?,
                service_cidrs: Map::open(directory, names::SERVICE_CIDRS6, read_only)?,
            },
            backend_table: Map::open(directory, names::BACKEND_TABLE, read_only)?,
            backend_loads: Map::open(directory, names::BACKEND_LOADS, read_only)?,
            destinations: Map::open(directory, names::DESTINATIONS, read_only)?,
            interfaces: Map::open(directory, names::INTERFACES, read_only)?,
            service_names: Map::open(directory, names::SERVICE_NAMES, read_only)?,
        })
    }
}
