//! What a load balancer is told that asks a Service's healthCheckNodePort: how many endpoints this node has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::objects::{EndpointSlice, Family, Service, ServiceType};
use super::topology::Topology;

/// The health check of a Service on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// healthCheckNodePort, machine order.
    pub port: u16,
    /// Ready endpoints on this node, of each family that the Service has: a server on an IPv6 address speaks for the
    /// endpoints that IPv6 clients would reach.
    pub endpoints: BTreeMap<Family, usize>,
    /// The Service's metadata.uid.
    pub uid: Option<String>,
}

/// `None` for a Service that load balancers don't check: only those under externalTrafficPolicy Local care on which
/// node the endpoints are.
pub(super) fn of_service<'a, I: Iterator<Item = &'a EndpointSlice>>(
    service: &Service,
    slices: impl Fn() -> I,
    topology: &Topology,
) -> Option<HealthCheck> {
    let port = service.health_check_node_port?;
    if !service.is_balanced() || service.service_type != ServiceType::LoadBalancer || !service.external_local {
        return None;
    }
    let families = [Family::V4, Family::V6].into_iter().filter(|family| service.has_family(*family));
    let endpoints = families.map(|family| (family, ready(service, slices(), family, topology))).collect();
    Some(HealthCheck { port, endpoints, uid: service.uid.clone() })
}

/// Distinct addresses of local endpoints that are ready and don't terminate (publishNotReadyAddresses says ready for
/// those that do), whichever of the Service's ports they serve.
fn ready<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    family: Family,
    topology: &Topology,
) -> usize {
    let serves = |slice: &EndpointSlice| {
        let is = |port: &super::objects::Port| {
            slice.ports.iter().any(|own| own.name == port.name && own.protocol == port.protocol)
        };
        !slice.ignored && slice.family == Some(family) && service.ports.iter().any(is)
    };
    let endpoints = slices.filter(|slice| serves(slice)).flat_map(|slice| &*slice.endpoints);
    let ready = endpoints.filter(|one| one.ready && !one.terminating && topology.is_local(one));
    ready.map(|endpoint| endpoint.address).collect::<BTreeSet<IpAddr>>().len()
}
