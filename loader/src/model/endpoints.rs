//! From EndpointSlices to the two sets of a service port.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::desired::{Endpoint, EndpointSets, Protocol};
use super::objects::{EndpointSlice, Family, SliceEndpoint};
use super::topology::Topology;

/// One endpoint of a service port, while it is being chosen.
struct Candidate<'a> {
    endpoint: &'a SliceEndpoint,
    port: u16,
    local: bool,
}

impl Candidate<'_> {
    /// Which of two that claim the same address and port says more. Locality first; then the one that keeps an
    /// endpoint in use while it moves between slices.
    fn rank(&self) -> (bool, bool, bool, bool) {
        (self.local, self.endpoint.ready, self.endpoint.serving, !self.endpoint.terminating)
    }

    fn is_last_resort(&self) -> bool {
        self.endpoint.serving && self.endpoint.terminating
    }

    fn to_endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.endpoint.address,
            port: self.port,
            local: self.local,
            terminating: self.endpoint.terminating,
            weight: self.endpoint.weight,
        }
    }
}

/// The sets of the service port with this name and protocol, for frontends of one family, from all slices of its
/// Service.
pub(super) fn choose<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    family: Family,
    name: &str,
    protocol: Protocol,
    topology: &Topology,
) -> EndpointSets {
    let mut candidates: BTreeMap<(IpAddr, u16), Candidate<'a>> = BTreeMap::new();
    for slice in slices.filter(|slice| !slice.ignored && slice.family == Some(family)) {
        for port in slice.ports.iter().filter(|port| *port.name == *name && port.protocol == protocol) {
            for endpoint in &*slice.endpoints {
                let candidate = Candidate { endpoint, port: port.port, local: topology.is_local(endpoint) };
                let key = (endpoint.address, port.port);
                if candidates.get(&key).is_none_or(|known| known.rank() < candidate.rank()) {
                    candidates.insert(key, candidate);
                }
            }
        }
    }
    let all = || candidates.values();

    let mut cluster: Vec<&Candidate<'_>> = all().filter(|c| c.endpoint.ready).collect();
    topology.prefer(&mut cluster, |c| c.endpoint);
    if cluster.is_empty() {
        cluster = all().filter(|c| c.is_last_resort()).collect();
    }

    let mut local: Vec<&Candidate<'_>> = all().filter(|c| c.local && c.endpoint.ready).collect();
    if local.is_empty() {
        local = all().filter(|c| c.local && c.is_last_resort()).collect();
    }

    let endpoints =
        |chosen: Vec<&Candidate<'_>>| -> Box<[Endpoint]> { chosen.into_iter().map(Candidate::to_endpoint).collect() };
    let (cluster, local) = (endpoints(cluster), endpoints(local));
    let serving = all().filter(|c| c.endpoint.serving).map(Candidate::to_endpoint);
    // Sets are sorted.
    let in_none =
        |endpoint: &Endpoint| cluster.binary_search(endpoint).is_err() && local.binary_search(endpoint).is_err();
    let kept = serving.filter(in_none).collect();
    EndpointSets { cluster, local, kept }
}
