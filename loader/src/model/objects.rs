//! Kubernetes objects, trimmed to the fields that decide something here, with addresses and ports already parsed.
//!
//! A field that could not be read is left out and named in `problems`; the rest of the object counts.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use super::desired::{Algorithm, Protocol, ServiceKey};
use super::network::Network;
use super::text::Text;

/// A field of an object that had to be skipped.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// Path of the field, such as `spec.ports[1].nodePort`.
    pub field: String,
    /// What is wrong with it, value included.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// spec.type of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceType {
    /// A ClusterIP only.
    #[default]
    ClusterIp,
    /// And nodePorts.
    NodePort,
    /// And load-balancer addresses.
    LoadBalancer,
    /// A DNS alias: never balanced.
    ExternalName,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub key: ServiceKey,
    /// metadata.creationTimestamp in seconds since the epoch. Who is older keeps a contested frontend.
    pub created: Option<i64>,
    /// spec.type
    pub service_type: ServiceType,
    /// Carries the label `service.kubernetes.io/service-proxy-name`: another proxy's.
    pub foreign: bool,
    /// spec.clusterIPs; empty for a headless Service.
    pub cluster_ips: Vec<IpAddr>,
    /// spec.externalIPs
    pub external_ips: Vec<IpAddr>,
    /// status.loadBalancer.ingress[].ip of those whose ipMode is absent or VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// spec.loadBalancerSourceRanges, those that could be read: who may use the load-balancer IPs. `None` if the list is
    /// empty and everybody may.
    pub source_ranges: Option<BTreeSet<Network>>,
    /// spec.ports
    pub ports: Vec<Port>,
    /// spec.internalTrafficPolicy is Local.
    pub internal_local: bool,
    /// spec.externalTrafficPolicy is Local.
    pub external_local: bool,
    /// Session affinity time-out in seconds, 0 for none.
    pub affinity_seconds: u32,
    /// How backends are chosen, if the Service's annotation says.
    pub algorithm: Option<Algorithm>,
    /// spec.healthCheckNodePort, machine order.
    pub health_check_node_port: Option<u16>,
    /// metadata.uid, of those that have a healthCheckNodePort: an Event about it names it.
    pub uid: Option<String>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Service {
    /// Whether this is a Service that Sheave balances; the others are skipped without a complaint.
    #[must_use]
    pub fn is_balanced(&self) -> bool {
        !self.foreign && self.service_type != ServiceType::ExternalName && !self.cluster_ips.is_empty()
    }

    /// Whether it has a ClusterIP of a family. Without one it has no frontends and no endpoints of that family.
    #[must_use]
    pub fn has_family(&self, family: Family) -> bool {
        self.cluster_ips.iter().any(|address| Family::of(*address) == family)
    }
}

/// One of spec.ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name, empty if it has none.
    pub name: Text,
    /// Its protocol.
    pub protocol: Protocol,
    /// Port of the ClusterIP, machine order.
    pub port: u16,
    /// nodePort, machine order.
    pub node_port: Option<u16>,
}

/// Identity of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SliceKey {
    /// metadata.namespace
    pub namespace: Text,
    /// metadata.name
    pub name: Text,
}

impl fmt::Display for SliceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub key: SliceKey,
    /// The Service it belongs to, by the label `kubernetes.io/service-name`.
    pub service: Option<ServiceKey>,
    /// Carries the label `service.kubernetes.io/headless` or `service.kubernetes.io/service-proxy-name`.
    pub ignored: bool,
    /// addressType; `None` for FQDN, which is never balanced.
    pub family: Option<Family>,
    /// Ports that have a name (which may be empty) and a number.
    pub ports: Arc<[SlicePort]>,
    /// Endpoints of which the first address is one of the slice's family. Copies share them.
    pub endpoints: Arc<[SliceEndpoint]>,
    /// The annotation `endpoints.kubernetes.io/last-change-trigger-time`: when the pod or Service changed for which the
    /// slice was last written.
    pub triggered: Option<SystemTime>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// One of an EndpointSlice's ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the Service's port that it stands for.
    pub name: Text,
    /// Its protocol.
    pub protocol: Protocol,
    /// Port of the endpoints, machine order.
    pub port: u16,
}

/// One of an EndpointSlice's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// addresses[0]
    pub address: IpAddr,
    /// Name of the node that it runs on.
    pub node_name: Option<Text>,
    /// conditions.ready, absent ⇒ true.
    pub ready: bool,
    /// conditions.serving, absent ⇒ ready.
    pub serving: bool,
    /// conditions.terminating, absent ⇒ false.
    pub terminating: bool,
    /// Share of new connections relative to the others, by the slice's annotation; absent ⇒ 1.
    pub weight: u16,
    /// hints, if there are any.
    pub hints: Option<Box<Hints>>,
}

/// Who should use an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// hints.forNodes
    pub for_nodes: Vec<Text>,
    /// hints.forZones
    pub for_zones: Vec<Text>,
}

/// A Node. Only this node's is ever used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// metadata.name
    pub name: String,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// status.addresses of type InternalIP, in their order.
    pub internal_ips: Vec<IpAddr>,
    /// Is being deleted, or carries the taint `ToBeDeletedByClusterAutoscaler`: load balancers should turn elsewhere.
    pub leaving: bool,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// A ServiceCIDR: where ClusterIPs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// metadata.name
    pub name: String,
    /// spec.cidrs
    pub networks: Vec<Network>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}
