//! What the pinned maps say, as plain data without families and byte orders.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;
use sheave_common::config::Timeouts;
use sheave_common::flow::{EDGE_BYPASS, EDGE_UPLINK};

use crate::model::desired::Protocol;
use crate::model::network::Network;

/// The contents of the maps that a view asked for.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    /// Service id → name and protocol number.
    pub(super) names: BTreeMap<u32, (String, u8)>,
    /// Frontends, marks on whole addresses included.
    pub(super) frontends: Vec<Frontend>,
    /// Backend id → backend.
    pub(super) backends: BTreeMap<u32, Backend>,
    /// Service id → clients that its guarded frontends let in.
    pub(super) source_ranges: BTreeMap<u32, BTreeSet<Network>>,
    /// Service id → traffic, if asked for.
    pub(super) counters: Option<BTreeMap<u32, Traffic>>,
    /// Entries of conntrack and half_open.
    pub(super) flows: Vec<Flow>,
    /// Affinity entries.
    pub(super) affinities: Vec<Affinity>,
    /// ifindex → name, for the edges of `flows` and `affinities`.
    pub(super) interfaces: BTreeMap<u32, String>,
    /// When flows expire.
    pub(super) timeouts: Timeouts,
    /// Seconds of CLOCK_MONOTONIC.
    pub(super) now: u32,
}

/// A frontend.
#[derive(Clone, Debug)]
pub(super) struct Frontend {
    pub(super) address: SocketAddr,
    pub(super) protocol: u8,
    pub(super) service_id: u32,
    /// Bits of [`sheave_common::frontend::flags`].
    pub(super) flags: u32,
    pub(super) affinity_seconds: u32,
    /// One of [`sheave_common::frontend::algorithm`].
    pub(super) algorithm: u32,
    /// Backend ids of the cluster set.
    pub(super) cluster: Vec<u32>,
    /// Backend ids of the local set.
    pub(super) local: Vec<u32>,
}

/// A backend.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backend {
    pub(super) service_id: u32,
    pub(super) address: SocketAddr,
    /// Bits of [`sheave_common::backend::flags`].
    pub(super) flags: u32,
    pub(super) weight: u16,
    /// Connections, if the service chooses by them.
    pub(super) connections: Option<i64>,
}

/// Counters of a service port, of all CPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Traffic {
    pub(super) connections: u64,
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

/// A conntrack entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    pub(super) protocol: u8,
    pub(super) edge: u32,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) rewritten_source: SocketAddr,
    pub(super) rewritten_destination: SocketAddr,
    pub(super) service_id: u32,
    pub(super) backend_id: u32,
    pub(super) last_seen: u32,
    /// One of [`sheave_common::flow::state`].
    pub(super) state: u8,
    /// Bits of [`sheave_common::flow::flags`].
    pub(super) flags: u8,
    /// Bits of [`sheave_common::flow::closing`].
    pub(super) closing: u8,
}

/// A client's affinity.
#[derive(Clone, Copy, Debug)]
pub(super) struct Affinity {
    pub(super) service_id: u32,
    pub(super) client: IpAddr,
    pub(super) edge: u32,
    pub(super) backend_id: u32,
    pub(super) last_new_connection: u32,
}

impl Snapshot {
    /// A service port's name; its id if it has none (it is being written or removed just now).
    pub(super) fn service(&self, id: u32) -> String {
        self.names.get(&id).map_or_else(|| format!("(service {id})"), |(name, _)| name.clone())
    }

    /// What people call an edge, as in the keys of flows and affinities.
    pub(super) fn edge(&self, edge: u32) -> String {
        match edge {
            EDGE_UPLINK => "uplink".to_owned(),
            EDGE_BYPASS => "bypass".to_owned(),
            index => self.interfaces.get(&index).cloned().unwrap_or_else(|| format!("interface {index} (gone)")),
        }
    }

    /// A service port's protocol, for those that have a name.
    pub(super) fn protocol(&self, id: u32) -> Option<u8> {
        self.names.get(&id).map(|(_, protocol)| *protocol)
    }
}

/// `TCP`, or the number of a protocol that has no name here.
pub(in crate::cli) fn protocol_name(number: u8) -> String {
    Protocol::from_number(number).map_or_else(|| number.to_string(), |protocol| protocol.to_string())
}
