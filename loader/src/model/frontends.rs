//! From a Service and this node's addresses to the frontends that each of its ports asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sheave_common::frontend::flags;

use super::desired::Protocol;
use super::objects::{Family, Port, Service, ServiceType};
use crate::config::{ExternalIps, NodePortAddresses};

/// Frontends of one port: address, port and bits of [`flags`]. Sorted, each address and port once.
pub(super) type Frontends = Box<[(SocketAddr, u32)]>;

/// What a Service asks for, port by port in the order of spec.ports. Empty if it isn't balanced. Of two ports of one
/// Service that ask for the same frontend, the first has it.
pub(super) fn of_service(service: &Service, external_ips: &ExternalIps, node: &BTreeSet<IpAddr>) -> Box<[Frontends]> {
    if !service.is_balanced() {
        return Box::default();
    }
    let mut taken: BTreeSet<(SocketAddr, Protocol)> = BTreeSet::new();
    let mut ports = Vec::with_capacity(service.ports.len());
    for port in &service.ports {
        let mut frontends = of_port(service, port, external_ips, node);
        frontends.retain(|frontend, _| taken.insert((*frontend, port.protocol)));
        ports.push(frontends.into_iter().collect());
    }
    ports.into()
}

fn of_port(
    service: &Service,
    port: &Port,
    external_ips: &ExternalIps,
    node: &BTreeSet<IpAddr>,
) -> BTreeMap<SocketAddr, u32> {
    let internal = if service.internal_local { flags::INTERNAL_LOCAL | flags::EXTERNAL_LOCAL } else { 0 };
    let external = if service.external_local { flags::EXTERNAL_LOCAL } else { 0 };
    let guard = if service.source_ranges.is_some() { flags::SOURCE_RANGES } else { 0 };
    let mut frontends: BTreeMap<SocketAddr, u32> = BTreeMap::new();
    let mut add = |address: IpAddr, port: u16, bits: u32| {
        if service.has_family(Family::of(address)) {
            *frontends.entry(SocketAddr::new(address, port)).or_default() |= bits;
        }
    };

    for address in &service.cluster_ips {
        add(*address, port.port, flags::CLUSTER_IP | internal);
    }
    for address in service.external_ips.iter().filter(|address| may_serve(external_ips, **address)) {
        add(*address, port.port, flags::EXTERNAL_IP | external);
    }
    // The ranges guard an address and port once it is a load-balancer IP's, also where it is an external IP's or a node's
    // as well: kube-proxy's check knows the destination alone.
    if service.service_type == ServiceType::LoadBalancer {
        for address in &service.load_balancer_ips {
            add(*address, port.port, flags::LOAD_BALANCER | guard | external);
        }
    }
    if matches!(service.service_type, ServiceType::NodePort | ServiceType::LoadBalancer)
        && let Some(node_port) = port.node_port
    {
        for address in node {
            add(*address, node_port, flags::NODE_PORT | external);
        }
        for loopback in LOOPBACK {
            add(loopback, node_port, flags::NODE_PORT | flags::HOST_ONLY | external);
        }
    }
    frontends
}

/// Whether the operator lets Services have this external IP.
fn may_serve(rule: &ExternalIps, address: IpAddr) -> bool {
    match rule {
        ExternalIps::All => true,
        ExternalIps::None => false,
        ExternalIps::Networks(networks) => networks.iter().any(|network| contains(*network, address)),
    }
}

/// Where processes of this host reach every nodePort, whatever the nodePort addresses are.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// The addresses that serve nodePorts to packets: `internal_ips` is what the Node says, `local` what the interfaces
/// carry. Never loopback addresses (those are for processes of this host), never IPv6 link-local ones (they mean
/// nothing without an interface).
pub(super) fn node_addresses(
    rule: &NodePortAddresses,
    internal_ips: &[IpAddr],
    local: &BTreeSet<IpAddr>,
) -> BTreeSet<IpAddr> {
    match rule {
        NodePortAddresses::Primary => [Family::V4, Family::V6]
            .iter()
            .filter_map(|family| internal_ips.iter().find(|address| Family::of(**address) == *family))
            .copied()
            .filter(|address| is_servable(*address))
            .collect(),
        NodePortAddresses::Networks(networks) => local
            .iter()
            .copied()
            .filter(|address| is_servable(*address) && networks.iter().any(|network| contains(*network, *address)))
            .collect(),
        NodePortAddresses::All => local.iter().copied().filter(|address| is_servable(*address)).collect(),
    }
}

fn is_servable(address: IpAddr) -> bool {
    let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    !address.is_loopback() && !address.is_unspecified() && !address.is_multicast() && !link_local
}

fn contains((network, length): (IpAddr, u8), address: IpAddr) -> bool {
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let differing = network.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= u32::from(length.min(32))
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let differing = network.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= u32::from(length.min(128))
        }
        _ => false,
    }
}
