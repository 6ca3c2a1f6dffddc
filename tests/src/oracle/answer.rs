//! What must become of the first packet of a connection.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::Service;

use super::cluster::{Cluster, Options};
use super::endpoints::{Endpoint, cluster_set, endpoints, local_set};
use super::frontends::{Frontend, Kind, ServicePortKey, admits, balanced, cluster_ips, frontends};
use super::network::text_contains;

/// Where a packet meets this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Edge {
    /// A pod of this node sends it.
    Pod,
    /// It comes from outside.
    Uplink,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// Absent means this one.
    Tcp,
    /// Datagrams.
    Udp,
    /// Messages of an association.
    Sctp,
}

impl Protocol {
    /// As objects name it.
    pub(super) fn read(text: Option<&str>) -> Self {
        match text {
            None | Some("TCP") => Self::Tcp,
            Some("UDP") => Self::Udp,
            Some("SCTP") => Self::Sctp,
            Some(other) => panic!("no generated object has the protocol {other}"),
        }
    }
}

/// A SYN, a datagram, or an SCTP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Where it arrives.
    pub edge: Edge,
    /// Whose.
    pub source: SocketAddr,
    /// What it asks.
    pub destination: SocketAddr,
    /// How.
    pub protocol: Protocol,
    /// The client uses this source port for another connection, too; if both have one endpoint, one gets another port.
    pub shares_port: bool,
}

impl fmt::Display for Packet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} {} → {} at the {:?} edge", self.protocol, self.source, self.destination, self.edge)
    }
}

/// How a packet is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// RST.
    Reset,
    /// ICMP or ICMPv6 port unreachable.
    PortUnreachable,
}

/// Which source address the backend sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The client's.
    Kept,
    /// This node's: the answer has to come back here.
    Snat,
    /// The one that stands for the client itself.
    Hairpin,
}

/// What must become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No Service's: it passes as it is.
    NotOurs,
    /// Answered in the Service's name.
    Rejected(Refusal),
    /// Gone, without an answer.
    Dropped,
    /// Sent to one of these, and what each would see.
    Translated(BTreeMap<SocketAddr, Source>),
}

/// What the rules say of a service port.
#[derive(Clone, Debug)]
struct ServicePort {
    service: Service,
    internal_local: bool,
    external_local: bool,
    affinity: bool,
    /// IPv4, IPv6.
    families: [Endpoints; 2],
}

#[derive(Clone, Debug)]
struct Endpoints {
    all: Vec<Endpoint>,
    cluster: Vec<Endpoint>,
    local: Vec<Endpoint>,
}

/// A cluster, read as this node has to.
#[derive(Clone, Debug)]
pub struct Oracle {
    frontends: Vec<Frontend>,
    cluster_ips: BTreeSet<IpAddr>,
    service_cidrs: Vec<String>,
    service_ports: BTreeMap<ServicePortKey, ServicePort>,
}

impl Oracle {
    /// Reads every object.
    #[must_use]
    pub fn new(cluster: &Cluster, options: &Options) -> Self {
        let mut oracle = Self {
            frontends: frontends(cluster, options),
            cluster_ips: BTreeSet::new(),
            service_cidrs: Vec::new(),
            service_ports: BTreeMap::new(),
        };
        let specs = cluster.service_cidrs.values().filter_map(|cidr| cidr.spec.as_ref());
        oracle.service_cidrs = specs.flat_map(|spec| spec.cidrs.iter().flatten()).cloned().collect();
        for (key, service) in &cluster.services {
            let Some(spec) = balanced(service) else { continue };
            oracle.cluster_ips.extend(cluster_ips(spec));
            for port in spec.ports.iter().flatten() {
                let name = port.name.clone().unwrap_or_default();
                let protocol = Protocol::read(port.protocol.as_deref());
                let family = |ipv6| {
                    let all = endpoints(cluster, service, &name, protocol, ipv6);
                    Endpoints { cluster: cluster_set(cluster, &all), local: local_set(&all), all }
                };
                let service_port = ServicePort {
                    service: service.clone(),
                    internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
                    external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
                    affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
                    families: [family(false), family(true)],
                };
                oracle.service_ports.insert((key.clone(), name, protocol), service_port);
            }
        }
        oracle
    }

    /// What must become of the first packet of a connection, without regard to what its client did before.
    ///
    /// # Panics
    /// If two service ports claim the destination, about which the rules say nothing.
    #[must_use]
    pub fn answer(&self, packet: &Packet) -> Answer {
        let Some(frontend) = self.frontend(packet) else {
            let address = packet.destination.ip();
            // A port that a live ClusterIP does not have.
            if self.cluster_ips.contains(&address) {
                return Answer::Rejected(refusal(packet));
            }
            // Neither this proxy nor kube-proxy sees Services that another one serves: their addresses are nobody's, too.
            let inside = self.service_cidrs.iter().any(|cidr| text_contains(cidr, address));
            return if inside { Answer::Dropped } else { Answer::NotOurs };
        };
        let service_port = &self.service_ports[&frontend.service_port];
        if frontend.kind == Kind::LoadBalancer && !admits(&service_port.service, packet.source.ip()) {
            return Answer::Dropped;
        }
        let endpoints = &service_port.families[usize::from(packet.destination.is_ipv6())];
        let local_only = match frontend.kind {
            Kind::ClusterIp => service_port.internal_local,
            // Short circuit: a pod of this node reaches every endpoint.
            Kind::NodePort | Kind::LoadBalancer | Kind::ExternalIp => {
                service_port.external_local && packet.edge == Edge::Uplink
            }
        };
        if endpoints.cluster.is_empty() && endpoints.local.is_empty() {
            return Answer::Rejected(refusal(packet));
        }
        let set = if local_only { &endpoints.local } else { &endpoints.cluster };
        if set.is_empty() {
            return Answer::Dropped;
        }
        Answer::Translated(
            set.iter().map(|endpoint| (endpoint.address, source(packet, endpoint, local_only))).collect(),
        )
    }

    fn frontend(&self, packet: &Packet) -> Option<&Frontend> {
        let mut claims = self
            .frontends
            .iter()
            .filter(|frontend| frontend.address == packet.destination && frontend.service_port.2 == packet.protocol);
        let frontend = claims.next()?;
        if let Some(rival) = claims.next() {
            assert_eq!(rival.service_port, frontend.service_port, "{packet}: two service ports claim it");
        }
        Some(frontend)
    }

    /// The service port that a packet asks.
    pub(super) fn service_port(&self, packet: &Packet) -> Option<&ServicePortKey> {
        self.frontend(packet).map(|frontend| &frontend.service_port)
    }

    /// Whether a service port keeps its clients with their endpoints.
    pub(super) fn has_affinity(&self, service_port: &ServicePortKey) -> bool {
        self.service_ports.get(service_port).is_some_and(|port| port.affinity)
    }

    /// Whether new connections may reach an endpoint, by any of the service port's frontends.
    pub(super) fn is_usable(&self, service_port: &ServicePortKey, endpoint: SocketAddr) -> bool {
        self.service_ports.get(service_port).is_some_and(|port| {
            let endpoints = &port.families[usize::from(endpoint.is_ipv6())];
            endpoints.cluster.iter().chain(&endpoints.local).any(|usable| usable.address == endpoint)
        })
    }

    /// Whether an endpoint still answers, be it for those it has only.
    pub(super) fn is_serving(&self, service_port: &ServicePortKey, endpoint: SocketAddr) -> bool {
        self.service_ports.get(service_port).is_some_and(|port| {
            let all = &port.families[usize::from(endpoint.is_ipv6())].all;
            all.iter().any(|served| served.address == endpoint && (served.ready || served.serving))
        })
    }

    /// Every frontend's address and protocol; of these Services (`namespace/name`) only, if there are any.
    pub(super) fn destinations(&self, services: &BTreeSet<String>) -> Vec<(SocketAddr, Protocol)> {
        let chosen = |frontend: &&Frontend| services.is_empty() || services.contains(&frontend.service_port.0);
        let chosen = self.frontends.iter().filter(chosen);
        chosen.map(|frontend| (frontend.address, frontend.service_port.2)).collect()
    }
}

/// An ICMPv6 error would be dropped by a local pod's busy socket.
fn refusal(packet: &Packet) -> Refusal {
    if packet.edge == Edge::Pod && packet.protocol == Protocol::Tcp && packet.destination.is_ipv6() {
        Refusal::Reset
    } else {
        Refusal::PortUnreachable
    }
}

fn source(packet: &Packet, endpoint: &Endpoint, local_only: bool) -> Source {
    match packet.edge {
        Edge::Pod if endpoint.address.ip() == packet.source.ip() => Source::Hairpin,
        Edge::Uplink if !endpoint.local && !local_only => Source::Snat,
        Edge::Pod | Edge::Uplink => Source::Kept,
    }
}
