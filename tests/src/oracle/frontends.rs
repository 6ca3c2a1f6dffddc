//! What clients can ask: the addresses and ports of Services on this node.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Service, ServiceSpec};

use super::answer::Protocol;
use super::cluster::{Cluster, NodePorts, Options, THIS_NODE, key, label};
use super::network::{contains, text_contains};

/// A service port: `namespace/name`, the port's name, and the protocol.
pub(super) type ServicePortKey = (String, String, Protocol);

/// Which of a Service's addresses a frontend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
}

/// An address that clients connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frontend {
    pub(super) address: SocketAddr,
    pub(super) kind: Kind,
    pub(super) service_port: ServicePortKey,
}

/// The specification of a Service that is balanced at all.
pub(super) fn balanced(service: &Service) -> Option<&ServiceSpec> {
    let spec = service.spec.as_ref()?;
    let cluster_ip = spec.cluster_ip.as_deref().unwrap_or_default();
    let headless = cluster_ip.is_empty() || cluster_ip == "None";
    let foreign = label(&service.metadata, "service.kubernetes.io/service-proxy-name").is_some();
    (!headless && !foreign && spec.type_.as_deref() != Some("ExternalName")).then_some(spec)
}

/// ClusterIPs of a balanced Service.
pub(super) fn cluster_ips(spec: &ServiceSpec) -> BTreeSet<IpAddr> {
    let first = spec.cluster_ip.iter();
    let all = first.chain(spec.cluster_ips.iter().flatten());
    all.filter_map(|text| text.parse().ok()).collect()
}

/// Every frontend of every Service.
pub(super) fn frontends(cluster: &Cluster, options: &Options) -> Vec<Frontend> {
    cluster.services.values().flat_map(|service| frontends_of(service, cluster, options)).collect()
}

/// Every frontend of a Service.
pub(super) fn frontends_of(service: &Service, cluster: &Cluster, options: &Options) -> Vec<Frontend> {
    let mut frontends = Vec::new();
    let Some(spec) = balanced(service) else { return frontends };
    // A Service has the families of its ClusterIPs; its other addresses count only in these.
    let families: BTreeSet<bool> = cluster_ips(spec).iter().map(IpAddr::is_ipv6).collect();
    for port in spec.ports.iter().flatten() {
        let protocol = Protocol::read(port.protocol.as_deref());
        let service_port = (key(&service.metadata), port.name.clone().unwrap_or_default(), protocol);
        let mut add = |address: IpAddr, number: i32, kind: Kind| {
            if !families.contains(&address.is_ipv6()) {
                return;
            }
            let number = u16::try_from(number).expect("generated ports are in range");
            let address = SocketAddr::new(address, number);
            frontends.push(Frontend { address, kind, service_port: service_port.clone() });
        };
        for address in cluster_ips(spec) {
            add(address, port.port, Kind::ClusterIp);
        }
        for address in load_balancer_ips(service) {
            add(address, port.port, Kind::LoadBalancer);
        }
        if options.external_ips {
            for address in spec.external_ips.iter().flatten().filter_map(|text| text.parse().ok()) {
                add(address, port.port, Kind::ExternalIp);
            }
        }
        let node_port = port.node_port.unwrap_or(0);
        if node_port != 0 {
            for address in node_port_addresses(cluster, options) {
                add(address, node_port, Kind::NodePort);
            }
        }
    }
    frontends
}

/// Load-balancer addresses whose packets arrive here unchanged.
fn load_balancer_ips(service: &Service) -> Vec<IpAddr> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
    let direct = ingress.iter().filter(|ingress| matches!(ingress.ip_mode.as_deref(), None | Some("VIP")));
    direct.filter_map(|ingress| ingress.ip.as_deref()?.parse().ok()).collect()
}

fn node_port_addresses(cluster: &Cluster, options: &Options) -> BTreeSet<IpAddr> {
    match options.node_ports {
        NodePorts::Primary => internal_ips(cluster),
        NodePorts::All => options.addresses.clone(),
        NodePorts::Network(network, length) => {
            options.addresses.iter().copied().filter(|address| contains(network, length, *address)).collect()
        }
    }
}

fn internal_ips(cluster: &Cluster) -> BTreeSet<IpAddr> {
    let status = cluster.nodes.get(THIS_NODE).and_then(|node| node.status.as_ref());
    let addresses = status.and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let internal = addresses.iter().filter(|address| address.type_ == "InternalIP");
    internal.filter_map(|address| address.address.parse().ok()).collect()
}

/// Whether a client may use a Service's load-balancer IPs.
pub(super) fn admits(service: &Service, client: IpAddr) -> bool {
    let ranges = service.spec.as_ref().and_then(|spec| spec.load_balancer_source_ranges.as_deref());
    let ranges = ranges.unwrap_or_default();
    ranges.is_empty() || ranges.iter().any(|range| text_contains(range, client))
}
