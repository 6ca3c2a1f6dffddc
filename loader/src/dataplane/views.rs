//! Read-only access to the pinned maps: what the command line shows, with or without a daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{Backend, IDS_PER_ELEMENT};
use sheave_common::config::Config;
use sheave_common::counter::ServiceCounter;
use sheave_common::drop_reason::SYN_FAILOVERS;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::interface::Interface;
use sheave_common::load::Load;
use sheave_common::service_name::ServiceName;
use sheave_common::{DropReason, Ipv4Address, Ipv6Address, names};

use super::elements::Ip as _;
use super::error::MapError;
use super::map::Map;
use super::maps::Maps;
use super::networks;
use crate::model::network::Network;

/// The maps pinned in a directory, opened for reading. Every dump is a list of elements in no particular order.
#[derive(Debug)]
pub struct PinnedMaps {
    maps: Maps,
    service_counters: Map<u32, ServiceCounter>,
    drop_counters: Map<u32, u64>,
}

macro_rules! dumps {
    ($($(#[doc = $doc:literal])+ $name:ident => $($path:ident).+ : ($key:ty, $value:ty);)+) => {
        impl PinnedMaps {
            $(
                $(#[doc = $doc])+
                ///
                /// # Errors
                ///
                /// If the kernel refuses.
                pub fn $name(&self) -> Result<Vec<($key, $value)>, MapError> {
                    self.maps.$($path).+.dump()
                }
            )+
        }
    };
}

dumps! {
    /// `frontends4`.
    frontends4 => v4.frontends: (FrontendKey<Ipv4Address>, Frontend);
    /// `frontends6`.
    frontends6 => v6.frontends: (FrontendKey<Ipv6Address>, Frontend);
    /// `backends4`: backend id → backend.
    backends4 => v4.backends: (u32, Backend<Ipv4Address>);
    /// `backends6`: backend id → backend.
    backends6 => v6.backends: (u32, Backend<Ipv6Address>);
    /// `backend_loads`: backend id → its connections, for services that choose by them.
    backend_loads => backend_loads: (u32, Load);
    /// `conntrack4`.
    conntrack4 => v4.conntrack: (FlowKey<Ipv4Address>, Flow<Ipv4Address>);
    /// `conntrack6`.
    conntrack6 => v6.conntrack: (FlowKey<Ipv6Address>, Flow<Ipv6Address>);
    /// `half_open4`.
    half_open4 => v4.half_open: (FlowKey<Ipv4Address>, Flow<Ipv4Address>);
    /// `half_open6`.
    half_open6 => v6.half_open: (FlowKey<Ipv6Address>, Flow<Ipv6Address>);
    /// `affinity4`.
    affinity4 => v4.affinity: (AffinityKey<Ipv4Address>, Affinity);
    /// `affinity6`.
    affinity6 => v6.affinity: (AffinityKey<Ipv6Address>, Affinity);
    /// `new_affinity4`.
    new_affinity4 => v4.new_affinity: (AffinityKey<Ipv4Address>, Affinity);
    /// `new_affinity6`.
    new_affinity6 => v6.new_affinity: (AffinityKey<Ipv6Address>, Affinity);
    /// `service_names`: service id → name.
    service_names => service_names: (u32, ServiceName);
    /// `interfaces`: ifindex → interface.
    interfaces => interfaces: (u32, Interface);
}

impl PinnedMaps {
    /// Opens the maps pinned in a directory.
    ///
    /// # Errors
    ///
    /// If a pin is missing, may not be read, or was made by another version.
    pub fn open(directory: &Path) -> Result<Self, MapError> {
        let cpus = possible_cpus();
        Ok(Self {
            maps: Maps::open(directory, true)?,
            service_counters: Map::open_per_cpu(directory, names::SERVICE_COUNTERS, true, cpus)?,
            drop_counters: Map::open_per_cpu(directory, names::DROP_COUNTERS, true, cpus)?,
        })
    }

    /// `config`'s one element.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn config(&self) -> Result<Option<Config>, MapError> {
        self.maps.config.get(&0)
    }

    /// `backend_table`: the backend id at each index of a run.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn backend_table(&self) -> Result<Vec<u32>, MapError> {
        table(&self.maps, self.maps.table_size())
    }

    /// `source_ranges4` and `source_ranges6`: service id → clients that its guarded frontends let in.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn source_ranges(&self) -> Result<BTreeMap<u32, BTreeSet<Network>>, MapError> {
        let mut ranges: BTreeMap<u32, BTreeSet<Network>> = BTreeMap::new();
        for (service_id, network) in networks::source_ranges(&self.maps)? {
            ranges.entry(service_id).or_default().insert(network);
        }
        Ok(ranges)
    }

    /// `service_cidrs4` and `service_cidrs6`.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn service_cidrs(&self) -> Result<BTreeSet<Network>, MapError> {
        networks::service_cidrs(&self.maps)
    }

    /// Addresses and ports of the backends of a service port, by its name in `service_names`; none if there is no such.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn endpoints(&self, service_port: &str) -> Result<BTreeSet<SocketAddr>, MapError> {
        let names = self.service_names()?.into_iter();
        let ids: BTreeSet<u32> =
            names.filter(|(_, name)| name.as_str() == Some(service_port)).map(|(id, _)| id).collect();
        let mut endpoints = BTreeSet::new();
        let mut add = |service_id: u32, address: IpAddr, port_be: u16| {
            if ids.contains(&service_id) {
                endpoints.insert(SocketAddr::new(address, u16::from_be(port_be)));
            }
        };
        for (_, backend) in self.backends4()? {
            add(backend.service_id, backend.address.ip(), backend.port_be);
        }
        for (_, backend) in self.backends6()? {
            add(backend.service_id, backend.address.ip(), backend.port_be);
        }
        Ok(endpoints)
    }

    /// `service_counters`, summed over the CPUs; without those that are zero.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn service_counters(&self) -> Result<BTreeMap<u32, ServiceCounter>, MapError> {
        let sum = |a: ServiceCounter, b: &ServiceCounter| ServiceCounter {
            connections: a.connections.wrapping_add(b.connections),
            packets: a.packets.wrapping_add(b.packets),
            bytes: a.bytes.wrapping_add(b.bytes),
        };
        let elements = self.service_counters.dump_wide()?.into_iter();
        let sums = elements.map(|(id, values)| (id, values.iter().fold(ServiceCounter::default(), sum)));
        Ok(sums.filter(|(_, counter)| *counter != ServiceCounter::default()).collect())
    }

    /// `drop_counters`, summed over the CPUs: every reason that this version knows, also those that are zero.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn drop_counters(&self) -> Result<Vec<(DropReason, u64)>, MapError> {
        let elements: BTreeMap<u32, Vec<u64>> = self.drop_counters.dump_wide()?.into_iter().collect();
        let packets = |reason: DropReason| elements.get(&(reason as u32)).map_or(0, |values| values.iter().sum());
        Ok(DropReason::ALL.iter().map(|reason| (*reason, packets(*reason))).collect())
    }

    /// How many SYNs went to another backend than the one that had not answered, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn syn_failovers(&self) -> Result<u64, MapError> {
        let elements = self.drop_counters.dump_wide()?.into_iter();
        Ok(elements.filter(|(index, _)| *index == SYN_FAILOVERS).flat_map(|(_, values)| values).sum())
    }
}

/// The first backend ids of `backend_table`: `end` of them or one more, if there are so many.
pub(super) fn table(maps: &Maps, end: u32) -> Result<Vec<u32>, MapError> {
    let end = end.div_ceil(IDS_PER_ELEMENT);
    // The kernel reads an array in the order of its indexes.
    let elements = maps.backend_table.dump_while(|index| *index < end)?;
    Ok(elements.into_iter().flat_map(|(_, ids)| ids).collect())
}

/// How many values an element of a per-CPU map has.
pub(super) fn possible_cpus() -> usize {
    aya::util::nr_cpus().unwrap_or(1)
}
