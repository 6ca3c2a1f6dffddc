//! Which endpoints a service port has, and which of them traffic may reach.

use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointPort, EndpointSlice};

use super::answer::Protocol;
use super::cluster::{Cluster, THIS_NODE, label};

/// An endpoint of a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) address: SocketAddr,
    /// nodeName is this node.
    pub(super) local: bool,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    for_nodes: Vec<String>,
    for_zones: Vec<String>,
}

/// The endpoints of one family of a service port, each address and port once.
pub(super) fn endpoints(
    cluster: &Cluster,
    service: &Service,
    port_name: &str,
    protocol: Protocol,
    ipv6: bool,
) -> Vec<Endpoint> {
    let mut endpoints: Vec<Endpoint> = Vec::new();
    for slice in cluster.slices.values() {
        let family = if ipv6 { "IPv6" } else { "IPv4" };
        if !belongs(slice, service) || slice.address_type != family {
            continue;
        }
        for port in slice.ports.iter().flatten() {
            let Some(number) = number_of(port, port_name, protocol) else { continue };
            for endpoint in &slice.endpoints {
                // Only the first address counts.
                let Some(Ok(address)) = endpoint.addresses.first().map(|text| text.parse::<IpAddr>()) else { continue };
                if address.is_ipv6() != ipv6 {
                    continue;
                }
                let new = read(endpoint, SocketAddr::new(address, number));
                match endpoints.iter_mut().find(|old| old.address == new.address) {
                    None => endpoints.push(new),
                    // Twice the same: the one that says it is local.
                    Some(old) if new.local && !old.local => *old = new,
                    Some(_) => {}
                }
            }
        }
    }
    endpoints
}

fn belongs(slice: &EndpointSlice, service: &Service) -> bool {
    let ignored = ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"];
    slice.metadata.namespace == service.metadata.namespace
        && label(&slice.metadata, "kubernetes.io/service-name") == service.metadata.name.as_deref()
        && !ignored.iter().any(|ignored| label(&slice.metadata, ignored).is_some())
}

/// The port's number if it is that service port's.
fn number_of(port: &EndpointPort, name: &str, protocol: Protocol) -> Option<u16> {
    let same = port.name.as_deref() == Some(name) && Protocol::read(port.protocol.as_deref()) == protocol;
    let number = u16::try_from(port.port?).ok()?;
    (same && number != 0).then_some(number)
}

fn read(endpoint: &SliceEndpoint, address: SocketAddr) -> Endpoint {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let hints = endpoint.hints.clone().unwrap_or_default();
    Endpoint {
        address,
        local: endpoint.node_name.as_deref() == Some(THIS_NODE),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        for_nodes: hints.for_nodes.unwrap_or_default().into_iter().map(|hint| hint.name).collect(),
        for_zones: hints.for_zones.unwrap_or_default().into_iter().map(|hint| hint.name).collect(),
    }
}

/// Where traffic may go under policy Cluster.
pub(super) fn cluster_set(cluster: &Cluster, endpoints: &[Endpoint]) -> Vec<Endpoint> {
    let ready: Vec<Endpoint> = endpoints.iter().filter(|endpoint| endpoint.ready).cloned().collect();
    if ready.is_empty() {
        return terminating(endpoints);
    }
    let names = |hints: &[String], name: &str| hints.iter().any(|hint| hint == name);
    let all_have_nodes = ready.iter().all(|endpoint| !endpoint.for_nodes.is_empty());
    if all_have_nodes && ready.iter().any(|endpoint| names(&endpoint.for_nodes, THIS_NODE)) {
        return ready.into_iter().filter(|endpoint| names(&endpoint.for_nodes, THIS_NODE)).collect();
    }
    let all_have_zones = ready.iter().all(|endpoint| !endpoint.for_zones.is_empty());
    if let Some(zone) = zone(cluster)
        && all_have_zones
        && ready.iter().any(|endpoint| names(&endpoint.for_zones, zone))
    {
        return ready.iter().filter(|endpoint| names(&endpoint.for_zones, zone)).cloned().collect();
    }
    ready
}

/// Where traffic may go under policy Local.
pub(super) fn local_set(endpoints: &[Endpoint]) -> Vec<Endpoint> {
    let local: Vec<Endpoint> = endpoints.iter().filter(|endpoint| endpoint.local).cloned().collect();
    let ready: Vec<Endpoint> = local.iter().filter(|endpoint| endpoint.ready).cloned().collect();
    if ready.is_empty() { terminating(&local) } else { ready }
}

/// Those that finish their work: the last resort.
fn terminating(endpoints: &[Endpoint]) -> Vec<Endpoint> {
    endpoints.iter().filter(|endpoint| endpoint.serving && endpoint.terminating).cloned().collect()
}

fn zone(cluster: &Cluster) -> Option<&str> {
    label(&cluster.nodes.get(THIS_NODE)?.metadata, "topology.kubernetes.io/zone")
}
