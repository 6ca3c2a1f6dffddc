//! From the pinned maps to a [`Snapshot`].

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::snapshot::{Affinity, Backend, Flow, Frontend, Snapshot, Traffic};
use crate::dataplane::{MapError, PinnedMaps, monotonic_seconds};
use sheave_common::affinity::{Affinity as AffinityValue, AffinityKey};
use sheave_common::backend::{Backend as BackendValue, flags::COUNTED};
use sheave_common::config::Timeouts;
use sheave_common::flow::{EDGE_UPLINK, Flow as FlowValue, FlowKey, Tuple};
use sheave_common::frontend::{BackendSet, Frontend as FrontendValue, FrontendKey};
use sheave_common::load::Load;
use sheave_common::{Address, Ipv4Address, Ipv6Address};

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Nothing is pinned there.
    #[error(
        "no maps of Sheave at {}: start `sheave run` on this node, or give its --pin-path",
        path.display()
    )]
    NoPins {
        /// --pin-path
        path: PathBuf,
    },
    /// EPERM, EACCES.
    #[error("not permitted to open {}: run as root, or with CAP_BPF and access to the directory", pin.display())]
    NotPermitted {
        /// The pin.
        pin: PathBuf,
    },
    /// Another failure, or pins of another version.
    #[error(transparent)]
    Map(MapError),
}

/// What a view needs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    pub(super) frontends: bool,
    pub(super) counters: bool,
    pub(super) flows: bool,
    pub(super) affinity: bool,
}

/// How often a listing of frontends is repeated that changed while it was read.
const ATTEMPTS: usize = 8;

/// Reads what is wanted.
pub(super) fn read(directory: &Path, wanted: Wanted) -> Result<Snapshot, ReadError> {
    snapshot(&open(directory)?, wanted).map_err(ReadError::Map)
}

/// Opens the pinned maps.
pub(in crate::cli) fn open(directory: &Path) -> Result<PinnedMaps, ReadError> {
    PinnedMaps::open(directory).map_err(|error| explain(directory, error))
}

fn explain(directory: &Path, error: MapError) -> ReadError {
    match &error {
        MapError::Open { pin, source } => match source.kind() {
            io::ErrorKind::NotFound => ReadError::NoPins { path: directory.to_owned() },
            io::ErrorKind::PermissionDenied => ReadError::NotPermitted { pin: pin.clone() },
            _ => ReadError::Map(error),
        },
        _ => ReadError::Map(error),
    }
}

fn snapshot(maps: &PinnedMaps, wanted: Wanted) -> Result<Snapshot, MapError> {
    let named = |maps: &PinnedMaps| -> Result<BTreeMap<u32, (String, u8)>, MapError> {
        let names = maps.service_names()?.into_iter();
        Ok(names.filter_map(|(id, name)| Some((id, (name.as_str()?.to_owned(), name.protocol)))).collect())
    };
    let (frontends, backends) = if wanted.frontends { services(maps)? } else { (Vec::new(), backends(maps)?) };
    let flows = if wanted.flows { flows(maps)? } else { Vec::new() };
    let affinities = if wanted.affinity { affinities(maps)? } else { Vec::new() };
    let edges = flows.iter().map(|flow| flow.edge).chain(affinities.iter().map(|affinity| affinity.edge));
    let edges: BTreeSet<u32> = edges.filter(|edge| *edge != EDGE_UPLINK).collect();
    Ok(Snapshot {
        frontends,
        backends,
        source_ranges: if wanted.frontends { maps.source_ranges()? } else { BTreeMap::new() },
        names: named(maps)?,
        counters: wanted.counters.then(|| counters(maps)).transpose()?,
        interfaces: edges.into_iter().filter_map(|index| Some((index, interface_name(index)?))).collect(),
        flows,
        affinities,
        timeouts: maps.config()?.map_or(Timeouts::DEFAULT, |config| config.timeouts),
        now: monotonic_seconds(),
    })
}

/// Frontends and backends of one moment: read again until no frontend changed meanwhile, so that no run of the table
/// is shown that was given to another service port. A daemon that writes all the time gets its last state shown.
fn services(maps: &PinnedMaps) -> Result<(Vec<Frontend>, BTreeMap<u32, Backend>), MapError> {
    let dump = || -> Result<_, MapError> {
        let mut frontends: Vec<_> = maps.frontends4()?.into_iter().map(keyed).collect();
        frontends.extend(maps.frontends6()?.into_iter().map(keyed));
        frontends.sort_by_key(|(address, protocol, _)| (*address, *protocol));
        Ok(frontends)
    };
    let mut frontends = dump()?;
    for _ in 1..ATTEMPTS {
        let (table, backends) = (maps.backend_table()?, backends(maps)?);
        let again = dump()?;
        if again == frontends {
            return Ok((resolve(&frontends, &table, &backends), backends));
        }
        frontends = again;
    }
    let (table, backends) = (maps.backend_table()?, backends(maps)?);
    Ok((resolve(&frontends, &table, &backends), backends))
}

fn keyed<A: Family>((key, value): (FrontendKey<A>, FrontendValue)) -> (SocketAddr, u8, FrontendValue) {
    (socket(key.address, key.port_be), key.protocol, value)
}

fn resolve(
    frontends: &[(SocketAddr, u8, FrontendValue)],
    table: &[u32],
    backends: &BTreeMap<u32, Backend>,
) -> Vec<Frontend> {
    let resolved = frontends.iter().map(|(address, protocol, value)| {
        let ids = |set: BackendSet| -> Vec<u32> {
            let run = table.iter().skip(set.first as usize).take(set.length as usize);
            run.copied()
                .filter(|id| backends.get(id).is_some_and(|backend| backend.service_id == value.service_id))
                .collect()
        };
        Frontend {
            address: *address,
            protocol: *protocol,
            service_id: value.service_id,
            flags: value.flags,
            affinity_seconds: value.affinity_seconds,
            algorithm: value.algorithm,
            cluster: ids(value.cluster),
            local: ids(value.local),
        }
    });
    resolved.collect()
}

fn backends(maps: &PinnedMaps) -> Result<BTreeMap<u32, Backend>, MapError> {
    fn plain<A: Family>((id, value): (u32, BackendValue<A>)) -> (u32, Backend) {
        let BackendValue { service_id, flags, weight, .. } = value;
        (id, Backend { service_id, address: socket(value.address, value.port_be), flags, weight, connections: None })
    }
    let mut backends: BTreeMap<u32, Backend> = maps.backends4()?.into_iter().map(plain).collect();
    backends.extend(maps.backends6()?.into_iter().map(plain));
    let loads: BTreeMap<u32, Load> = maps.backend_loads()?.into_iter().collect();
    for (id, backend) in backends.iter_mut().filter(|(_, backend)| backend.flags & COUNTED != 0) {
        backend.connections = Some(loads.get(id).map_or(0, |load| load.connections));
    }
    Ok(backends)
}

fn counters(maps: &PinnedMaps) -> Result<BTreeMap<u32, Traffic>, MapError> {
    let counters = maps.service_counters()?.into_iter();
    Ok(counters
        .map(|(id, counter)| {
            let (connections, packets, bytes) = (counter.connections, counter.packets, counter.bytes);
            (id, Traffic { connections, packets, bytes })
        })
        .collect())
}

fn flows(maps: &PinnedMaps) -> Result<Vec<Flow>, MapError> {
    fn plain<A: Family>((key, value): (FlowKey<A>, FlowValue<A>)) -> Flow {
        let ends = |tuple: &Tuple<A>| {
            (socket(tuple.source, tuple.source_port_be), socket(tuple.destination, tuple.destination_port_be))
        };
        let ((source, destination), (rewritten_source, rewritten_destination)) =
            (ends(&key.tuple), ends(&value.rewrite));
        let FlowValue { service_id, backend_id, last_seen, state, flags, closing, .. } = value;
        Flow {
            protocol: key.protocol,
            edge: key.edge,
            source,
            destination,
            rewritten_source,
            rewritten_destination,
            service_id,
            backend_id,
            last_seen,
            state,
            flags,
            closing,
        }
    }
    let mut flows: Vec<Flow> = maps.half_open4()?.into_iter().map(plain).collect();
    flows.extend(maps.half_open6()?.into_iter().map(plain));
    flows.extend(maps.conntrack4()?.into_iter().map(plain));
    flows.extend(maps.conntrack6()?.into_iter().map(plain));
    Ok(flows)
}

fn affinities(maps: &PinnedMaps) -> Result<Vec<Affinity>, MapError> {
    fn plain<A: Family>((key, value): (AffinityKey<A>, AffinityValue)) -> Affinity {
        let AffinityValue { backend_id, last_new_connection } = value;
        let AffinityKey { service_id, edge, client } = key;
        Affinity { service_id, client: client.ip(), edge, backend_id, last_new_connection }
    }
    fn of<A: Family + Ord>(
        newcomers: Vec<(AffinityKey<A>, AffinityValue)>,
        known: Vec<(AffinityKey<A>, AffinityValue)>,
    ) -> impl Iterator<Item = Affinity> {
        newcomers.into_iter().chain(known).collect::<BTreeMap<_, _>>().into_iter().map(plain)
    }
    // Newcomers are read first: one that is established meanwhile is in both then, and the other map's is what counts.
    let v4 = of(maps.new_affinity4()?, maps.affinity4()?);
    let v6 = of(maps.new_affinity6()?, maps.affinity6()?);
    Ok(v4.chain(v6).collect())
}

/// An address of either family.
pub(in crate::cli) trait Family: Address {
    fn ip(self) -> IpAddr;
}

impl Family for Ipv4Address {
    fn ip(self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from(self))
    }
}

impl Family for Ipv6Address {
    fn ip(self) -> IpAddr {
        IpAddr::V6(Ipv6Addr::from(self))
    }
}

pub(in crate::cli) fn socket(address: impl Family, port_be: u16) -> SocketAddr {
    SocketAddr::new(address.ip(), u16::from_be(port_be))
}

/// Name of an interface of this network namespace.
pub(in crate::cli) fn interface_name(index: u32) -> Option<String> {
    let mut buffer = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the IF_NAMESIZE octets that if_indextoname may write.
    let found = unsafe { libc::if_indextoname(index, buffer.as_mut_ptr()) };
    if found.is_null() {
        return None;
    }
    // SAFETY: on success the buffer holds a name that ends with a zero octet.
    Some(unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned())
}
