//! Reads Kubernetes' own types into the model's objects: absent fields get the meaning that the API gives them, and
//! a field that can't be used becomes a [`Problem`] instead of an error.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::SystemTime;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::model::desired::{Algorithm, Protocol, ServiceKey};
use crate::model::network::Network;
use crate::model::objects::{
    EndpointSlice, Family, Hints, Node, Port, Problem, Service, ServiceCidr, ServiceType, SliceEndpoint, SliceKey,
    SlicePort,
};
use crate::model::text::{Text, intern};

/// Label of Services and EndpointSlices that another proxy serves.
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of a headless Service's EndpointSlices.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Label that names an EndpointSlice's Service.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label that names a Node's zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

/// Annotation of EndpointSlices: when that happened for which the slice was last written.
pub const ANNOTATION_TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Annotation of Services: how backends are chosen, by the name of an [`Algorithm`].
pub const ANNOTATION_ALGORITHM: &str = "sheave.dev/algorithm";
/// Annotation of EndpointSlices: the weight of all its endpoints (`3`), or of some (`10.244.1.2=3, 10.244.1.3=0`).
pub const ANNOTATION_WEIGHTS: &str = "sheave.dev/weights";
/// Taint of a Node that the cluster autoscaler is about to remove.
pub const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// sessionAffinityConfig.clientIP.timeoutSeconds, where it is absent.
const AFFINITY_DEFAULT_SECONDS: u32 = 10_800;
const AFFINITY_MAX_SECONDS: u32 = 86_400;

/// Collects what could not be read.
#[derive(Default)]
struct Reader(Vec<Problem>);

impl Reader {
    fn problem(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem { field: field.into(), message: message.into() });
    }

    fn address(&mut self, field: impl Display, text: &str) -> Option<IpAddr> {
        let address = parse_address(text);
        if address.is_none() {
            self.problem(field.to_string(), format!("{text:?} is not an IP address"));
        }
        address
    }

    fn addresses(&mut self, field: &str, texts: Option<&[String]>) -> Vec<IpAddr> {
        let texts = texts.unwrap_or_default().iter().enumerate();
        texts.filter_map(|(i, text)| self.address(format_args!("{field}[{i}]"), text)).collect()
    }

    /// A port number. 0 is out of range here; who means "none" by it asks before.
    fn port(&mut self, field: impl Display, number: i32) -> Option<u16> {
        let port = u16::try_from(number).ok().filter(|port| *port != 0);
        if port.is_none() {
            self.problem(field.to_string(), format!("{number} is not a port number (1 to 65535)"));
        }
        port
    }

    fn protocol(&mut self, field: impl Display, text: Option<&str>) -> Option<Protocol> {
        match text {
            None | Some("" | "TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(other) => {
                self.problem(field.to_string(), format!("{other:?} is not TCP, UDP or SCTP"));
                None
            }
        }
    }

    /// Whether a traffic policy is Local; Cluster where it is absent.
    fn is_local(&mut self, field: &str, text: Option<&str>) -> bool {
        match text {
            None | Some("" | "Cluster") => false,
            Some("Local") => true,
            Some(other) => {
                self.problem(field, format!("{other:?} is not Cluster or Local"));
                false
            }
        }
    }
}

/// An address as Kubernetes reads it: parts of an old IPv4 address may have leading zeros (always decimal), and an
/// IPv4-mapped IPv6 address is IPv4.
fn parse_address(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical());
    }
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next().filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()))?;
        *octet = part.parse().ok()?;
    }
    parts.next().is_none().then_some(IpAddr::V4(Ipv4Addr::from(octets)))
}

/// A network as Kubernetes reads it: an address as [`parse_address`] does, and a length. The address may have bits beyond
/// that length.
fn parse_network(text: &str) -> Option<Network> {
    let (address, length) = text.split_once('/')?;
    let length: u8 = Some(length).filter(|length| length.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()?;
    let mapped = address.parse::<Ipv6Addr>().ok().filter(|address| address.to_ipv4_mapped().is_some());
    match mapped {
        Some(mapped) if length < MAPPED_LENGTH => Network::new(mapped.into(), length),
        Some(mapped) => Network::new(IpAddr::V6(mapped).to_canonical(), length - MAPPED_LENGTH),
        None => Network::new(parse_address(address)?, length),
    }
}

/// Bits of an IPv4-mapped IPv6 address before the IPv4 address.
const MAPPED_LENGTH: u8 = 96;

/// metadata.namespace, `default` if it is absent, as with kubectl.
fn namespace(metadata: &ObjectMeta) -> Text {
    intern(metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default"))
}

fn has_label(metadata: &ObjectMeta, label: &str) -> bool {
    metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

fn label<'a>(metadata: &'a ObjectMeta, label: &str) -> Option<&'a str> {
    let labels: Option<&BTreeMap<String, String>> = metadata.labels.as_ref();
    labels?.get(label).map(String::as_str).filter(|value| !value.is_empty())
}

/// Identity of a Service.
#[must_use]
pub fn service_key(object: &core::Service) -> ServiceKey {
    ServiceKey {
        namespace: namespace(&object.metadata),
        name: intern(object.metadata.name.as_deref().unwrap_or_default()),
    }
}

/// Identity of an EndpointSlice.
#[must_use]
pub fn slice_key(object: &discovery::EndpointSlice) -> SliceKey {
    SliceKey {
        namespace: namespace(&object.metadata),
        name: intern(object.metadata.name.as_deref().unwrap_or_default()),
    }
}

impl From<&core::Service> for Service {
    fn from(object: &core::Service) -> Self {
        let mut reader = Reader::default();
        let default = core::ServiceSpec::default();
        let spec = object.spec.as_ref().unwrap_or(&default);
        let service_type = match spec.type_.as_deref() {
            None | Some("" | "ClusterIP") => ServiceType::ClusterIp,
            Some("NodePort") => ServiceType::NodePort,
            Some("LoadBalancer") => ServiceType::LoadBalancer,
            Some("ExternalName") => ServiceType::ExternalName,
            Some(other) => {
                reader.problem("spec.type", format!("{other:?} is not a type of Service; taken as ClusterIP"));
                ServiceType::ClusterIp
            }
        };
        // 0 is how a Service without one is often written.
        let health_check = spec.health_check_node_port.filter(|port| *port != 0);
        let health_check_node_port = health_check.and_then(|port| reader.port("spec.healthCheckNodePort", port));
        Self {
            key: service_key(object),
            created: object.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
            service_type,
            foreign: has_label(&object.metadata, LABEL_PROXY_NAME),
            cluster_ips: cluster_ips(&mut reader, spec),
            external_ips: reader.addresses("spec.externalIPs", spec.external_ips.as_deref()),
            load_balancer_ips: load_balancer_ips(&mut reader, object.status.as_ref()),
            source_ranges: source_ranges(&mut reader, spec),
            ports: ports(&mut reader, spec),
            internal_local: reader.is_local("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref()),
            external_local: reader.is_local("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref()),
            affinity_seconds: affinity_seconds(&mut reader, spec),
            algorithm: algorithm(&mut reader, &object.metadata),
            health_check_node_port,
            uid: health_check_node_port.and(object.metadata.uid.clone()),
            problems: reader.0,
        }
    }
}

/// spec.clusterIPs, or spec.clusterIP where those are absent; `None` and the empty string are no address.
fn cluster_ips(reader: &mut Reader, spec: &core::ServiceSpec) -> Vec<IpAddr> {
    let none = |text: &str| text.is_empty() || text == "None";
    match spec.cluster_ips.as_deref() {
        Some(texts) if !texts.is_empty() => {
            let texts = texts.iter().enumerate().filter(|(_, text)| !none(text));
            let mut addresses: Vec<_> =
                texts.filter_map(|(i, text)| reader.address(format_args!("spec.clusterIPs[{i}]"), text)).collect();
            addresses.shrink_to_fit();
            addresses
        }
        _ => {
            let text = spec.cluster_ip.as_deref().filter(|text| !none(text));
            text.and_then(|text| reader.address("spec.clusterIP", text)).into_iter().collect()
        }
    }
}

fn load_balancer_ips(reader: &mut Reader, status: Option<&core::ServiceStatus>) -> Vec<IpAddr> {
    let ingress = status.and_then(|status| status.load_balancer.as_ref()?.ingress.as_deref()).unwrap_or_default();
    let mut addresses = Vec::new();
    for (i, ingress) in ingress.iter().enumerate() {
        let Some(ip) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        match ingress.ip_mode.as_deref() {
            None | Some("" | "VIP") => {
                addresses.extend(reader.address(format_args!("status.loadBalancer.ingress[{i}].ip"), ip));
            }
            Some("Proxy") => {}
            Some(other) => reader.problem(
                format!("status.loadBalancer.ingress[{i}].ipMode"),
                format!("{other:?} is not VIP or Proxy; this address is not served"),
            ),
        }
    }
    addresses
}

/// An entry that can't be read lets nobody in, rather than everybody.
fn source_ranges(reader: &mut Reader, spec: &core::ServiceSpec) -> Option<BTreeSet<Network>> {
    let texts = spec.load_balancer_source_ranges.as_deref().filter(|texts| !texts.is_empty())?;
    let mut ranges = BTreeSet::new();
    for (i, text) in texts.iter().enumerate() {
        match parse_network(text.trim()) {
            Some(range) => drop(ranges.insert(range)),
            None => reader.problem(
                format!("spec.loadBalancerSourceRanges[{i}]"),
                format!("{text:?} is not a network like 192.0.2.0/24; it admits nobody"),
            ),
        }
    }
    Some(ranges)
}

fn ports(reader: &mut Reader, spec: &core::ServiceSpec) -> Vec<Port> {
    let mut ports: Vec<Port> = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        let name = intern(port.name.as_deref().unwrap_or_default());
        let number = reader.port(format_args!("spec.ports[{i}].port"), port.port);
        let protocol = reader.protocol(format_args!("spec.ports[{i}].protocol"), port.protocol.as_deref());
        let (Some(number), Some(protocol)) = (number, protocol) else { continue };
        if ports.iter().any(|port| port.name == name && port.protocol == protocol) {
            reader.problem(format!("spec.ports[{i}].name"), format!("{name:?} is used twice; the first counts"));
            continue;
        }
        let node_port = port.node_port.filter(|port| *port != 0);
        let node_port = node_port.and_then(|port| reader.port(format_args!("spec.ports[{i}].nodePort"), port));
        ports.push(Port { name, protocol, port: number, node_port });
    }
    ports.shrink_to_fit();
    ports
}

fn affinity_seconds(reader: &mut Reader, spec: &core::ServiceSpec) -> u32 {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return 0,
        Some("ClientIP") => {}
        Some(other) => {
            reader.problem("spec.sessionAffinity", format!("{other:?} is not None or ClientIP"));
            return 0;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(seconds) = config.and_then(|config| config.timeout_seconds) else { return AFFINITY_DEFAULT_SECONDS };
    match u32::try_from(seconds) {
        Ok(seconds @ 1..=AFFINITY_MAX_SECONDS) => seconds,
        _ => {
            reader.problem(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!("{seconds} is not in 1 to {AFFINITY_MAX_SECONDS}; taken as {AFFINITY_DEFAULT_SECONDS}"),
            );
            AFFINITY_DEFAULT_SECONDS
        }
    }
}

impl From<&discovery::EndpointSlice> for EndpointSlice {
    fn from(object: &discovery::EndpointSlice) -> Self {
        let mut reader = Reader::default();
        let key = slice_key(object);
        let service = label(&object.metadata, LABEL_SERVICE_NAME)
            .map(|name| ServiceKey { namespace: key.namespace.clone(), name: intern(name) });
        let family = match object.address_type.as_str() {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            "FQDN" => None,
            other => {
                reader.problem("addressType", format!("{other:?} is not IPv4, IPv6 or FQDN"));
                None
            }
        };
        let ports = slice_ports(&mut reader, object.ports.as_deref().unwrap_or_default());
        let mut endpoints = family.map_or_else(Vec::new, |family| endpoints(&mut reader, family, &object.endpoints));
        weigh(&mut reader, &object.metadata, &mut endpoints);
        Self {
            key,
            service,
            ignored: has_label(&object.metadata, LABEL_HEADLESS) || has_label(&object.metadata, LABEL_PROXY_NAME),
            family,
            ports: ports.into(),
            endpoints: endpoints.into(),
            triggered: triggered(&mut reader, &object.metadata),
            problems: reader.0,
        }
    }
}

fn annotation<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

fn algorithm(reader: &mut Reader, metadata: &ObjectMeta) -> Option<Algorithm> {
    let name = annotation(metadata, ANNOTATION_ALGORITHM)?;
    let algorithm = Algorithm::from_name(name.trim());
    if algorithm.is_none() {
        let known = Algorithm::ALL.map(Algorithm::name).join(", ");
        let message = format!("{name:?} is none of {known}; the cluster's default is used");
        reader.problem(format!("metadata.annotations[{ANNOTATION_ALGORITHM}]"), message);
    }
    algorithm
}

/// Gives endpoints the weights that the slice's annotation says. An entry that can't be read leaves its endpoint at 1.
fn weigh(reader: &mut Reader, metadata: &ObjectMeta, endpoints: &mut [SliceEndpoint]) {
    let Some(text) = annotation(metadata, ANNOTATION_WEIGHTS) else { return };
    for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
        let (address, weight) = match entry.split_once('=') {
            Some((address, weight)) => (parse_address(address.trim()), weight.trim().parse::<u16>().ok()),
            None => (None, entry.parse().ok()),
        };
        match (address, weight) {
            (Some(address), Some(weight)) => {
                for endpoint in endpoints.iter_mut().filter(|endpoint| endpoint.address == address) {
                    endpoint.weight = weight;
                }
            }
            (None, Some(weight)) if !entry.contains('=') => {
                endpoints.iter_mut().for_each(|endpoint| endpoint.weight = weight);
            }
            _ => reader.problem(
                format!("metadata.annotations[{ANNOTATION_WEIGHTS}]"),
                format!("{entry:?} is neither a weight from 0 to 65535 nor address=weight; it is left out"),
            ),
        }
    }
}

fn triggered(reader: &mut Reader, metadata: &ObjectMeta) -> Option<SystemTime> {
    let text = annotation(metadata, ANNOTATION_TRIGGERED)?;
    let time = text.parse::<jiff::Timestamp>();
    if time.is_err() {
        reader.problem(format!("metadata.annotations[{ANNOTATION_TRIGGERED}]"), format!("{text:?} is not a time"));
    }
    time.ok().map(SystemTime::from)
}

/// A port without a name is not the port whose name is empty: it belongs to no port of the Service.
fn slice_ports(reader: &mut Reader, ports: &[discovery::EndpointPort]) -> Vec<SlicePort> {
    let mut named = Vec::with_capacity(ports.len());
    for (i, port) in ports.iter().enumerate() {
        let Some(number) = port.port.filter(|number| *number != 0) else { continue };
        let Some(name) = port.name.as_deref().map(intern) else {
            reader.problem(format!("ports[{i}].name"), "absent; a Service's port without a name has the name \"\"");
            continue;
        };
        let number = reader.port(format_args!("ports[{i}].port"), number);
        let protocol = reader.protocol(format_args!("ports[{i}].protocol"), port.protocol.as_deref());
        if let (Some(number), Some(protocol)) = (number, protocol) {
            named.push(SlicePort { name, protocol, port: number });
        }
    }
    named
}

fn endpoints(reader: &mut Reader, family: Family, endpoints: &[discovery::Endpoint]) -> Vec<SliceEndpoint> {
    let mut read = Vec::with_capacity(endpoints.len());
    for (i, endpoint) in endpoints.iter().enumerate() {
        let Some(text) = endpoint.addresses.first() else {
            reader.problem(format!("endpoints[{i}].addresses"), "empty");
            continue;
        };
        let Some(address) = reader.address(format_args!("endpoints[{i}].addresses[0]"), text) else { continue };
        if Family::of(address) != family {
            reader.problem(format!("endpoints[{i}].addresses[0]"), format!("{text:?} is not of the slice's family"));
            continue;
        }
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
        read.push(SliceEndpoint {
            address,
            node_name: endpoint.node_name.as_deref().filter(|name| !name.is_empty()).map(intern),
            ready,
            serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(ready),
            terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
            weight: 1,
            hints: endpoint.hints.as_ref().map(|given| Box::new(hints(given))),
        });
    }
    read
}

fn hints(given: &discovery::EndpointHints) -> Hints {
    Hints {
        for_nodes: given.for_nodes.iter().flatten().map(|node| intern(&node.name)).collect(),
        for_zones: given.for_zones.iter().flatten().map(|zone| intern(&zone.name)).collect(),
    }
}

impl From<&core::Node> for Node {
    fn from(object: &core::Node) -> Self {
        let mut reader = Reader::default();
        let addresses = object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
        let mut internal_ips = Vec::new();
        for (i, address) in addresses.iter().enumerate().filter(|(_, address)| address.type_ == "InternalIP") {
            internal_ips.extend(reader.address(format_args!("status.addresses[{i}].address"), &address.address));
        }
        let taints = object.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        let leaving =
            object.metadata.deletion_timestamp.is_some() || taints.iter().any(|taint| taint.key == TAINT_TO_BE_DELETED);
        Self {
            name: object.metadata.name.clone().unwrap_or_default(),
            zone: label(&object.metadata, LABEL_ZONE).map(str::to_owned),
            internal_ips,
            leaving,
            problems: reader.0,
        }
    }
}

impl From<&networking::ServiceCIDR> for ServiceCidr {
    fn from(object: &networking::ServiceCIDR) -> Self {
        let mut reader = Reader::default();
        let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        let mut networks = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            match parse_network(text) {
                Some(network) => networks.push(network),
                None => {
                    reader.problem(format!("spec.cidrs[{i}]"), format!("{text:?} is not a network like 10.96.0.0/12"));
                }
            }
        }
        Self { name: object.metadata.name.clone().unwrap_or_default(), networks, problems: reader.0 }
    }
}
