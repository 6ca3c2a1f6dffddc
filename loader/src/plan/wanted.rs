//! What is desired of one service port, as compact as it can be kept: there is one of these for each as long as it lives.

use std::net::SocketAddr;

use sheave_common::backend::flags::{COUNTED, IN_CLUSTER_SET, IN_LOCAL_SET, LOCAL, SERVING, TERMINATING};
use sheave_common::frontend::flags;

use super::write::Backend;
use crate::model::desired::{Algorithm, Endpoint, EndpointSets, ServicePort};
use crate::model::network::Network;

/// As [`ServicePort`], with sorted slices for its maps and sets.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) frontends: Box<[(SocketAddr, u32)]>,
    source_ranges: Box<[Network]>,
    pub(super) affinity_seconds: u32,
    pub(super) algorithm: Algorithm,
    pub(super) endpoints4: EndpointSets,
    pub(super) endpoints6: EndpointSets,
}

impl From<ServicePort> for Wanted {
    fn from(port: ServicePort) -> Self {
        Self {
            frontends: port.frontends.into_iter().collect(),
            source_ranges: port.source_ranges.into_iter().collect(),
            affinity_seconds: port.affinity_seconds,
            algorithm: port.algorithm,
            endpoints4: port.endpoints4,
            endpoints6: port.endpoints6,
        }
    }
}

impl Wanted {
    /// A frontend's bits.
    pub(super) fn flags(&self, frontend: SocketAddr) -> Option<u32> {
        let found = self.frontends.binary_search_by_key(&frontend, |(address, _)| *address);
        found.ok().map(|index| self.frontends[index].1)
    }

    /// Whether some frontend looks at the source ranges.
    pub(super) fn is_guarded(&self) -> bool {
        self.frontends.iter().any(|(_, bits)| bits & flags::SOURCE_RANGES != 0)
    }

    pub(super) const fn source_ranges(&self) -> &[Network] {
        &self.source_ranges
    }

    pub(super) fn admits(&self, network: &Network) -> bool {
        self.source_ranges.binary_search(network).is_ok()
    }

    /// Whether an endpoint is in a set, or kept.
    pub(super) fn has(&self, endpoint: SocketAddr) -> bool {
        let sets = if endpoint.is_ipv4() { &self.endpoints4 } else { &self.endpoints6 };
        let is_in = |set: &[Endpoint]| set.iter().any(|one| socket(one) == endpoint);
        is_in(&sets.cluster) || is_in(&sets.local) || is_in(&sets.kept)
    }

    /// A backend for each endpoint, by address and port.
    pub(super) fn backends(&self, service_id: u32) -> Vec<(SocketAddr, Backend)> {
        let families = [&self.endpoints4, &self.endpoints6];
        let number = |sets: &EndpointSets| sets.cluster.len() + sets.local.len() + sets.kept.len();
        let counted = if self.algorithm == Algorithm::LeastConnections { COUNTED } else { 0 };
        let mut backends = Vec::with_capacity(families.into_iter().map(number).sum());
        for sets in families {
            for (set, flag) in [(&sets.cluster, IN_CLUSTER_SET), (&sets.local, IN_LOCAL_SET), (&sets.kept, 0)] {
                backends.extend(
                    set.iter().map(|endpoint| (socket(endpoint), backend(service_id, endpoint, flag | counted))),
                );
            }
        }
        // Stable: of an endpoint in several sets, the first says what it is like.
        backends.sort_by_key(|(endpoint, _)| *endpoint);
        backends.dedup_by(|(next, backend), (endpoint, first)| {
            let same = next == endpoint;
            if same {
                first.flags |= backend.flags & (IN_CLUSTER_SET | IN_LOCAL_SET);
            }
            same
        });
        backends
    }
}

pub(super) const fn socket(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address, endpoint.port)
}

fn backend(service_id: u32, endpoint: &Endpoint, sets: u32) -> Backend {
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let flags = SERVING | flag(endpoint.local, LOCAL) | flag(endpoint.terminating, TERMINATING) | sets;
    Backend { service_id, address: endpoint.address, port: endpoint.port, weight: endpoint.weight, flags }
}
