//! Random objects, from small pools of addresses, ports and names, so that they meet often.
//!
//! [`settle`] takes out again what must not be.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fastrand::Rng;
use k8s_openapi::api::core::v1::{
    ClientIPConfig, LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeStatus, Service, ServicePort,
    ServiceSpec, ServiceStatus, SessionAffinityConfig,
};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::api::networking::v1::{ServiceCIDR, ServiceCIDRSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::answer::Protocol;
use super::cluster::{Cluster, NodePorts, Options, key};
use super::frontends::cluster_ips;
use super::settle::settle;

/// Ports of Services.
pub(super) const PORTS: &[i32] = &[53, 80, 443, 8080, 9153];
/// Ports of endpoints.
pub(super) const TARGETS: &[i32] = &[53, 80, 5353, 8080, 9090];
/// nodePorts.
pub(super) const NODE_PORTS: std::ops::Range<i32> = 30_000..30_016;

const SERVICES: usize = 10;
const ZONES: &[&str] = &["zone-a", "zone-b"];

fn one_in(rng: &mut Rng, number: u32) -> bool {
    rng.u32(0..number) == 0
}

fn any<'a, T>(rng: &mut Rng, of: &'a [T]) -> &'a T {
    &of[rng.usize(0..of.len())]
}

/// A number of a pool of addresses as an address: 10.96.0.n or fd00:96::n for pool (10, 96, 0).
fn address(ipv6: bool, pool: [u8; 3], host: u8) -> IpAddr {
    if ipv6 {
        Ipv6Addr::new(0xfd00, pool[0].into(), pool[1].into(), pool[2].into(), 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(pool[0], pool[1], pool[2], host).into()
    }
}

/// A ClusterIP.
pub(super) fn cluster_ip(rng: &mut Rng, ipv6: bool) -> IpAddr {
    address(ipv6, [10, 96, 0], rng.u8(1..32))
}

/// A load-balancer or external IP: a few of their own, and addresses of nodes.
pub(super) fn public_ip(rng: &mut Rng, ipv6: bool) -> IpAddr {
    if one_in(rng, 4) { node_ip(ipv6, rng.u8(1..4)) } else { address(ipv6, [203, 0, 113], rng.u8(1..6)) }
}

/// A node's address; numbers above 10 are further addresses of this node.
pub(super) fn node_ip(ipv6: bool, number: u8) -> IpAddr {
    address(ipv6, [192, 0, 2], number)
}

/// A pod's address.
pub(super) fn pod_ip(ipv6: bool, node: u8, number: u8) -> IpAddr {
    address(ipv6, [10, 244, node], number)
}

/// A pod of this node that endpoints may be.
pub(super) fn local_pod(rng: &mut Rng, ipv6: bool) -> IpAddr {
    pod_ip(ipv6, 1, rng.u8(2..9))
}

/// An address of a client: outside, or a pod of this node that is no endpoint. There are few, so that they come again.
pub(super) fn client(rng: &mut Rng, ipv6: bool, outside: bool) -> IpAddr {
    address(ipv6, if outside { [198, 51, 0] } else { [10, 245, 0] }, rng.u8(1..64))
}

/// The same, but there are many.
pub(super) fn stranger(rng: &mut Rng, ipv6: bool, outside: bool) -> IpAddr {
    let pool = if outside { [198, 51, rng.u8(1..=255)] } else { [10, 245, rng.u8(1..=255)] };
    address(ipv6, pool, rng.u8(1..=254))
}

/// This node's addresses: those of its interfaces.
pub(super) fn this_node() -> BTreeSet<IpAddr> {
    [false, true].into_iter().flat_map(|ipv6| [node_ip(ipv6, 1), node_ip(ipv6, 11)]).collect()
}

/// What an operator might choose.
pub(super) fn options(rng: &mut Rng) -> Options {
    let node_ports = match rng.u8(0..5) {
        0 => NodePorts::All,
        1 => NodePorts::Network(node_ip(false, 0), 29),
        2 => NodePorts::Network(node_ip(true, 0), 64),
        _ => NodePorts::Primary,
    };
    Options { external_ips: !one_in(rng, 5), node_ports, addresses: this_node() }
}

/// A cluster out of nothing.
pub(super) fn cluster(rng: &mut Rng) -> Cluster {
    let mut cluster = Cluster::default();
    for number in 1..=3 {
        let node = node(rng, number);
        cluster.nodes.insert(format!("node-{number}"), node);
    }
    service_cidr(rng, &mut cluster);
    for _ in 0..rng.usize(3..=SERVICES) {
        add_service(rng, &mut cluster);
    }
    settle(&mut cluster);
    cluster
}

/// A Node, with its InternalIPs and other addresses that don't count.
pub(super) fn node(rng: &mut Rng, number: u8) -> Node {
    let mut addresses = Vec::new();
    let mut add = |type_: &str, address: String| {
        addresses.push(NodeAddress { type_: type_.to_owned(), address });
    };
    add("Hostname", format!("node-{number}"));
    let second = number == 1 && one_in(rng, 4);
    for ipv6 in [false, true] {
        if !one_in(rng, 10) {
            add("InternalIP", node_ip(ipv6, if second { 11 } else { number }).to_string());
        }
        if one_in(rng, 3) {
            add("ExternalIP", address(ipv6, [203, 0, 113], 7).to_string());
        }
    }
    let zone = (!one_in(rng, 5)).then(|| (*any(rng, ZONES)).to_owned());
    let labels = zone.map(|zone| BTreeMap::from([("topology.kubernetes.io/zone".to_owned(), zone)]));
    Node {
        metadata: ObjectMeta { name: Some(format!("node-{number}")), labels, ..ObjectMeta::default() },
        status: Some(NodeStatus { addresses: Some(addresses), ..NodeStatus::default() }),
        ..Node::default()
    }
}

/// Changes where ClusterIPs come from: a part of where the generator takes them, and some more.
pub(super) fn service_cidr(rng: &mut Rng, cluster: &mut Cluster) {
    let name = *any(rng, &["kubernetes", "more"]);
    if one_in(rng, 3) {
        cluster.service_cidrs.remove(name);
        return;
    }
    let cidrs: &[&[&str]] = &[
        &["10.96.0.0/24"],
        &["10.96.0.0/28"],
        &["10.96.0.16/30"],
        &["fd00:a:60::/64"],
        &["10.96.0.0/27", "fd00:a:60::/124"],
    ];
    let cidrs = any(rng, cidrs).iter().map(|cidr| (*cidr).to_owned()).collect();
    let cidr = ServiceCIDR {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        spec: Some(ServiceCIDRSpec { cidrs: Some(cidrs) }),
        status: None,
    };
    cluster.service_cidrs.insert(name.to_owned(), cidr);
}

/// Adds a Service with slices under a name that may be taken: then it replaces that one.
pub(super) fn add_service(rng: &mut Rng, cluster: &mut Cluster) {
    let namespace = *any(rng, &["default", "other"]);
    let name = format!("s{}", rng.usize(0..SERVICES));
    let service = service(rng, namespace, &name);
    cluster.services.remove(&key(&service.metadata));
    let mut seen: Vec<(String, Endpoint)> = Vec::new();
    for number in 0..*any(rng, &[0, 1, 2, 2, 3, 3]) {
        let mut slice = slice(rng, &service, number);
        // An endpoint of another slice, which may say something else of it.
        if let Some((_, known)) = seen.iter().find(|(family, _)| *family == slice.address_type)
            && rng.bool()
        {
            let mut endpoint = known.clone();
            elsewhere(rng, &mut endpoint);
            slice.endpoints.push(endpoint);
        }
        seen.extend(slice.endpoints.iter().map(|endpoint| (slice.address_type.clone(), endpoint.clone())));
        cluster.put_slice(slice);
    }
    cluster.put_service(service);
}

/// A Service.
pub(super) fn service(rng: &mut Rng, namespace: &str, name: &str) -> Service {
    let mut spec = ServiceSpec { ports: Some(service_ports(rng)), ..ServiceSpec::default() };
    let families = match rng.u8(0..5) {
        0 | 1 => vec![false],
        2 => vec![true],
        3 => vec![false, true],
        _ => vec![true, false],
    };
    let ips: Vec<String> = families.iter().map(|ipv6| cluster_ip(rng, *ipv6).to_string()).collect();
    spec.cluster_ip = ips.first().cloned();
    spec.cluster_ips = (ips.len() > 1 || rng.bool()).then_some(ips);
    let mut service = Service {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: None,
    };
    retype(rng, &mut service);
    policies(rng, &mut service);
    affinity(rng, &mut service);
    external_ips(rng, &mut service);
    source_ranges(rng, &mut service);
    if one_in(rng, 15) {
        set_label(&mut service.metadata, "service.kubernetes.io/service-proxy-name", Some("somebody"));
    }
    service
}

fn service_ports(rng: &mut Rng) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for number in 0..rng.usize(1..4) {
        let protocol = *any(rng, &[None, Some("TCP"), Some("UDP"), Some("UDP"), Some("SCTP")]);
        let port = *any(rng, PORTS);
        let taken =
            |old: &ServicePort| old.port == port && Protocol::read(old.protocol.as_deref()) == Protocol::read(protocol);
        if ports.iter().any(taken) {
            continue;
        }
        // A port alone needs no name.
        let name = (number > 0 || rng.bool()).then(|| format!("port-{number}"));
        ports.push(ServicePort { name, port, protocol: protocol.map(str::to_owned), ..ServicePort::default() });
    }
    if ports.len() > 1 {
        ports[0].name.get_or_insert_with(|| "port-0".to_owned());
    }
    ports
}

/// Gives a Service another type, with what belongs to that.
pub(super) fn retype(rng: &mut Rng, service: &mut Service) {
    let spec = service.spec.get_or_insert_default();
    service.status = None;
    spec.allocate_load_balancer_node_ports = None;
    let (type_, node_ports) = match rng.u8(0..12) {
        0..4 => (*any(rng, &[None, Some("ClusterIP")]), false),
        4..7 => (Some("NodePort"), true),
        7..10 => (Some("LoadBalancer"), true),
        10 => (Some("ExternalName"), false),
        _ => {
            // Headless.
            spec.cluster_ip = Some("None".to_owned());
            spec.cluster_ips = rng.bool().then(|| vec!["None".to_owned()]);
            (Some("ClusterIP"), false)
        }
    };
    spec.type_ = type_.map(str::to_owned);
    if type_ == Some("ExternalName") {
        spec.external_name = Some("elsewhere.example".to_owned());
    }
    if type_ == Some("LoadBalancer") {
        let ingress = (0..rng.usize(0..3)).map(|_| ingress(rng)).collect();
        let load_balancer = Some(LoadBalancerStatus { ingress: Some(ingress) });
        service.status = Some(ServiceStatus { load_balancer, ..ServiceStatus::default() });
        spec.allocate_load_balancer_node_ports = *any(rng, &[None, Some(true), Some(false)]);
    }
    let node_ports = node_ports && spec.allocate_load_balancer_node_ports != Some(false);
    for port in spec.ports.iter_mut().flatten() {
        port.node_port = node_ports.then(|| rng.i32(NODE_PORTS));
    }
}

fn ingress(rng: &mut Rng) -> LoadBalancerIngress {
    if one_in(rng, 5) {
        return LoadBalancerIngress { hostname: Some("lb.example".to_owned()), ..LoadBalancerIngress::default() };
    }
    let ipv6 = one_in(rng, 3);
    LoadBalancerIngress {
        ip: Some(public_ip(rng, ipv6).to_string()),
        ip_mode: any(rng, &[None, Some("VIP"), Some("Proxy")]).map(str::to_owned),
        ..LoadBalancerIngress::default()
    }
}

/// Gives a Service other traffic policies.
pub(super) fn policies(rng: &mut Rng, service: &mut Service) {
    let spec = service.spec.get_or_insert_default();
    let policies = [None, Some("Cluster"), Some("Local")];
    spec.internal_traffic_policy = any(rng, &policies).map(str::to_owned);
    spec.external_traffic_policy = any(rng, &policies).map(str::to_owned);
}

/// Switches a Service's affinity, or changes its time-out; none is so short that a test could outlast it.
pub(super) fn affinity(rng: &mut Rng, service: &mut Service) {
    let spec = service.spec.get_or_insert_default();
    spec.session_affinity = any(rng, &[None, Some("None"), Some("ClientIP")]).map(str::to_owned);
    let timeout = *any(rng, &[None, Some(3_600), Some(86_400)]);
    let client_ip = timeout.map(|timeout| ClientIPConfig { timeout_seconds: Some(timeout) });
    let config = client_ip.map(|client_ip| SessionAffinityConfig { client_ip: Some(client_ip) });
    spec.session_affinity_config = config.filter(|_| spec.session_affinity.as_deref() == Some("ClientIP"));
}

/// Gives a Service other external IPs.
pub(super) fn external_ips(rng: &mut Rng, service: &mut Service) {
    let number = [0, 0, 0, 1, 2][rng.usize(0..5)];
    let ips: Vec<String> = (0..number).map(|_| public_ip(rng, false).to_string()).collect();
    let ips = ips.into_iter().chain(one_in(rng, 4).then(|| public_ip(rng, true).to_string())).collect();
    service.spec.get_or_insert_default().external_ips = Some(ips);
}

/// Gives a Service other source ranges, of which only its load-balancer IPs take notice.
pub(super) fn source_ranges(rng: &mut Rng, service: &mut Service) {
    const RANGES: &[&str] = &[
        "198.51.0.0/24",
        "198.51.0.32/27",
        " 198.51.0.5/32\t",
        "10.244.1.0/24",
        "10.245.0.0/17 ",
        "192.0.2.2/31",
        "0.0.0.0/0",
        "fd00:c6:33::/64",
        "fd00:a:f4::/47",
        "::/0",
        "somewhere",
        "",
    ];
    let number = [0, 0, 1, 2, 3][rng.usize(0..5)];
    let ranges: Vec<String> = (0..number).map(|_| (*any(rng, RANGES)).to_owned()).collect();
    let spec = service.spec.get_or_insert_default();
    spec.load_balancer_source_ranges = (number > 0 || rng.bool()).then_some(ranges);
}

/// Sets or removes a label.
pub(super) fn set_label(metadata: &mut ObjectMeta, label: &str, value: Option<&str>) {
    let labels = metadata.labels.get_or_insert_default();
    match value {
        Some(value) => drop(labels.insert(label.to_owned(), value.to_owned())),
        None => drop(labels.remove(label)),
    }
}

/// An EndpointSlice of a Service.
pub(super) fn slice(rng: &mut Rng, service: &Service, number: usize) -> EndpointSlice {
    let service_name = service.metadata.name.clone().unwrap_or_default();
    let mut metadata = ObjectMeta {
        name: Some(format!("{service_name}-{number}")),
        namespace: service.metadata.namespace.clone(),
        ..ObjectMeta::default()
    };
    set_label(&mut metadata, "kubernetes.io/service-name", Some(&service_name));
    if one_in(rng, 30) {
        set_label(&mut metadata, "service.kubernetes.io/headless", Some(""));
    }
    // Mostly of a family that the Service has.
    let ips = service.spec.as_ref().map(cluster_ips).unwrap_or_default();
    let ips: Vec<IpAddr> = ips.into_iter().collect();
    let address_type = match rng.u8(0..10) {
        0 => "FQDN",
        1 | 2 => *any(rng, &["IPv4", "IPv6"]),
        _ if ips.is_empty() || any(rng, &ips).is_ipv4() => "IPv4",
        _ => "IPv6",
    };
    let mood = Mood::new(rng);
    let endpoints = (0..rng.usize(0..6)).map(|_| endpoint(rng, address_type, mood)).collect();
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
    EndpointSlice { metadata, address_type: address_type.to_owned(), endpoints, ports: Some(slice_ports(rng, ports)) }
}

/// The Service's ports as a slice resolves them, with the oddities that slices may have.
fn slice_ports(rng: &mut Rng, ports: &[ServicePort]) -> Vec<EndpointPort> {
    let mut resolved = Vec::new();
    for port in ports {
        let mut slice_port = EndpointPort {
            // A Service's port without a name has the name "" in slices.
            name: Some(port.name.clone().unwrap_or_default()),
            // Often the same in all slices, so that an endpoint can be in two of them.
            port: Some(if rng.bool() { 8080 } else { *any(rng, TARGETS) }),
            protocol: port.protocol.clone(),
            ..EndpointPort::default()
        };
        match rng.u8(0..30) {
            0 => slice_port.name = None,
            1 => slice_port.port = None,
            2 => slice_port.port = Some(0),
            3 => slice_port.name = Some("another".to_owned()),
            4 => slice_port.protocol = any(rng, &[None, Some("UDP")]).map(str::to_owned),
            5 => continue,
            _ => {}
        }
        resolved.push(slice_port);
    }
    resolved
}

/// What the endpoints of one slice tend to be: chance alone would hardly ever make all of them hinted, or none ready.
#[derive(Clone, Copy)]
pub(super) struct Mood {
    /// One in so many has conditions at odds with "ready".
    odd: u32,
    /// None is ready.
    leaving: bool,
    nodes: bool,
    zones: bool,
    /// One in so many lacks its hints.
    unhinted: u32,
}

impl Mood {
    /// A random one.
    pub(super) fn new(rng: &mut Rng) -> Self {
        Self {
            odd: *any(rng, &[1, 2, 10, 100]),
            leaving: one_in(rng, 5),
            nodes: one_in(rng, 3),
            zones: rng.bool(),
            unhinted: *any(rng, &[1_000, 1_000, 4]),
        }
    }
}

/// An endpoint.
pub(super) fn endpoint(rng: &mut Rng, address_type: &str, mood: Mood) -> Endpoint {
    let ipv6 = (address_type == "IPv6") != one_in(rng, 25);
    let node = rng.u8(1..4);
    let (address, node_name) = match rng.u8(0..12) {
        0 => (node_ip(ipv6, node), Some(format!("node-{node}"))),
        1 => (address(ipv6, [203, 0, 113], rng.u8(100..104)), None),
        _ => (pod_ip(ipv6, node, rng.u8(2..9)), Some(format!("node-{node}"))),
    };
    let mut addresses = vec![if address_type == "FQDN" { "a.example".to_owned() } else { address.to_string() }];
    if one_in(rng, 10) {
        addresses.push(pod_ip(ipv6, 1, 99).to_string());
    }
    let (conditions, hints) = (conditions(rng, mood), hints(rng, mood));
    let mut endpoint = Endpoint { addresses, node_name, conditions, hints, ..Endpoint::default() };
    if one_in(rng, 10) {
        elsewhere(rng, &mut endpoint);
    }
    endpoint
}

/// Says that an endpoint is on another node, with other conditions and hints.
pub(super) fn elsewhere(rng: &mut Rng, endpoint: &mut Endpoint) {
    // This node's own addresses are never elsewhere: there would be no way to them.
    if this_node().iter().any(|address| address.to_string() == endpoint.addresses[0]) {
        return;
    }
    endpoint.node_name = any(rng, &[None, Some("node-1"), Some("node-1"), Some("node-2")]).map(str::to_owned);
    let mood = Mood::new(rng);
    (endpoint.conditions, endpoint.hints) = (conditions(rng, mood), hints(rng, mood));
}

/// Conditions of an endpoint.
pub(super) fn conditions(rng: &mut Rng, mood: Mood) -> Option<EndpointConditions> {
    let new = |ready, serving, terminating| Some(EndpointConditions { ready, serving, terminating });
    if mood.leaving || one_in(rng, mood.odd) {
        let ready = if mood.leaving { Some(false) } else { *any(rng, &[None, Some(false), Some(true)]) };
        return match rng.u8(0..8) {
            0..3 => new(Some(false), Some(true), Some(true)),
            3 => new(Some(false), Some(false), *any(rng, &[None, Some(false), Some(true)])),
            _ => {
                let any = |rng: &mut Rng| *any(rng, &[None, Some(false), Some(true)]);
                new(ready, any(rng), any(rng))
            }
        };
    }
    let ready = EndpointConditions { ready: Some(true), serving: Some(true), terminating: Some(false) };
    any(rng, &[None, Some(EndpointConditions::default()), Some(ready)]).clone()
}

/// Hints of an endpoint.
pub(super) fn hints(rng: &mut Rng, mood: Mood) -> Option<EndpointHints> {
    let mut hints = EndpointHints::default();
    if one_in(rng, mood.unhinted) {
        return rng.bool().then_some(hints);
    }
    if mood.nodes {
        let nodes = (0..rng.usize(1..3)).map(|_| ForNode { name: format!("node-{}", rng.u8(1..4)) });
        hints.for_nodes = Some(nodes.collect());
    }
    if mood.zones {
        let zones = (0..rng.usize(1..3)).map(|_| ForZone { name: (*any(rng, ZONES)).to_owned() });
        hints.for_zones = Some(zones.collect());
    }
    Some(hints)
}
