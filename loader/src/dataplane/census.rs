//! Counting what is in the pinned maps: flows by state, and how full every map is whose size matters. With or without a
//! daemon; it reads all elements, a few tens of milliseconds for each hundred thousand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use aya::Pod;
use serde::Serialize;
use sheave_common::backend::IDS_PER_ELEMENT;
use sheave_common::config::{Config, Timeouts};
use sheave_common::flow::{Flow, FlowKey, flags, phase};
use sheave_common::fragment::{FragmentKey, FragmentPorts};
use sheave_common::frontend::Frontend;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Address, Ipv4Address, Ipv6Address, names};

use super::error::MapError;
use super::map::Map;
use super::maps::{FamilyMaps, Maps};
use super::syscall::monotonic_seconds;

/// What was counted.
#[derive(Clone, Debug, Default)]
pub struct Census {
    /// IP protocol number and [`phase`], or "expired" → flows, each of which has two elements.
    pub flows: BTreeMap<(u8, &'static str), u64>,
    /// Maps that services fill.
    pub services: Vec<Fullness>,
    /// Maps that traffic fills; they forget what was unused for longest.
    pub traffic: Vec<Fullness>,
}

/// The phase of a flow that was idle for too long, and will be forgotten.
const EXPIRED: &str = "expired";

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fullness {
    /// Its name.
    pub map: &'static str,
    /// Elements in use.
    pub entries: usize,
    /// Elements that it has room for.
    pub capacity: u32,
}

impl Census {
    /// Counts what is pinned in a directory.
    ///
    /// # Errors
    ///
    /// If a map can't be opened or read.
    pub fn take(directory: &Path) -> Result<Self, MapError> {
        let maps = Maps::open(directory, true)?;
        let mut census = Self::default();
        census.count_services(&maps)?;
        census.count_traffic(&maps, directory)?;
        Ok(census)
    }

    /// Only what traffic fills.
    ///
    /// # Errors
    ///
    /// If a map can't be opened or read.
    pub fn take_traffic(directory: &Path) -> Result<Self, MapError> {
        let maps = Maps::open(directory, true)?;
        let mut census = Self::default();
        census.count_traffic(&maps, directory)?;
        Ok(census)
    }

    fn count_services(&mut self, maps: &Maps) -> Result<(), MapError> {
        let (v4, v6) = (&maps.v4, &maps.v6);
        let mut runs = BTreeSet::new();
        let sets = |frontend: &Frontend| [frontend.cluster, frontend.local];
        runs.extend(v4.frontends.dump_as(|_, frontend| sets(frontend))?);
        runs.extend(v6.frontends.dump_as(|_, frontend| sets(frontend))?);
        let table = runs.iter().map(|run| run.length.next_multiple_of(IDS_PER_ELEMENT) as usize).sum();
        self.services = vec![
            fullness(names::FRONTENDS4, &v4.frontends)?,
            fullness(names::FRONTENDS6, &v6.frontends)?,
            fullness(names::BACKENDS4, &v4.backends)?,
            fullness(names::BACKENDS6, &v6.backends)?,
            Fullness { map: names::BACKEND_TABLE, entries: table, capacity: maps.table_size() },
            fullness(names::SERVICE_NAMES, &maps.service_names)?,
            fullness(names::SOURCE_RANGES4, &v4.source_ranges)?,
            fullness(names::SOURCE_RANGES6, &v6.source_ranges)?,
        ];
        Ok(())
    }

    fn count_traffic(&mut self, maps: &Maps, directory: &Path) -> Result<(), MapError> {
        let config = maps.config.get(&0)?;
        self.count_flows(&maps.v4, config, [names::CONNTRACK4, names::HALF_OPEN4])?;
        self.count_flows(&maps.v6, config, [names::CONNTRACK6, names::HALF_OPEN6])?;
        self.traffic.push(fullness(names::AFFINITY4, &maps.v4.affinity)?);
        self.traffic.push(fullness(names::AFFINITY6, &maps.v6.affinity)?);
        self.traffic.push(fullness(names::NEW_AFFINITY4, &maps.v4.new_affinity)?);
        self.traffic.push(fullness(names::NEW_AFFINITY6, &maps.v6.new_affinity)?);
        for (map4, map6) in [(names::SOCK_FORWARD4, names::SOCK_FORWARD6), (names::SOCK_REVERSE4, names::SOCK_REVERSE6)]
        {
            self.traffic.push(fullness(map4, &sockets::<Ipv4Address>(directory, map4)?)?);
            self.traffic.push(fullness(map6, &sockets::<Ipv6Address>(directory, map6)?)?);
        }
        let fragments4: Map<FragmentKey<Ipv4Address>, FragmentPorts> = Map::open(directory, names::FRAGMENTS4, true)?;
        let fragments6: Map<FragmentKey<Ipv6Address>, FragmentPorts> = Map::open(directory, names::FRAGMENTS6, true)?;
        self.traffic.push(fullness(names::FRAGMENTS4, &fragments4)?);
        self.traffic.push(fullness(names::FRAGMENTS6, &fragments6)?);
        Ok(())
    }

    fn count_flows<A: Address>(
        &mut self,
        maps: &FamilyMaps<A>,
        config: Option<Config>,
        names: [&'static str; 2],
    ) -> Result<(), MapError>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let timeouts = config.map_or(Timeouts::DEFAULT, |config| config.timeouts);
        for (name, map) in names.into_iter().zip([&maps.conntrack, &maps.half_open]) {
            let now = monotonic_seconds();
            let flows = map.dump_as(|key, flow| {
                let idle = now.saturating_sub(flow.last_seen);
                let expired = idle > timeouts.of(key.protocol, flow.state, flow.closing);
                let phase = if expired { EXPIRED } else { phase(flow.state, flow.closing) };
                [(flow.flags & flags::REPLY == 0).then_some((key.protocol, phase))]
            })?;
            self.traffic.push(Fullness { map: name, entries: flows.len(), capacity: map.max_entries() });
            for flow in flows.into_iter().flatten() {
                *self.flows.entry(flow).or_default() += 1;
            }
        }
        Ok(())
    }
}

fn sockets<A: Address>(directory: &Path, name: &'static str) -> Result<Map<SocketKey<A>, SocketPeer<A>>, MapError>
where
    SocketKey<A>: Pod,
    SocketPeer<A>: Pod,
{
    Map::open(directory, name, true)
}

fn fullness<K: Pod, V: Pod>(map: &'static str, elements: &Map<K, V>) -> Result<Fullness, MapError> {
    Ok(Fullness { map, entries: elements.dump_as(|_, _| [()])?.len(), capacity: elements.max_entries() })
}
