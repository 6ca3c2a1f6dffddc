//! What a service port should look like in the kernel. The border between `model`, which makes these values, and
//! `plan`, which turns them into map writes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use sheave_common::frontend::algorithm;

use super::network::Network;
use super::text::Text;

/// Transport protocol of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = sheave_common::PROTOCOL_TCP,
    /// UDP.
    Udp = sheave_common::PROTOCOL_UDP,
    /// SCTP.
    Sctp = sheave_common::PROTOCOL_SCTP,
}

impl Protocol {
    /// From an IP protocol number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            sheave_common::PROTOCOL_TCP => Some(Self::Tcp),
            sheave_common::PROTOCOL_UDP => Some(Self::Udp),
            sheave_common::PROTOCOL_SCTP => Some(Self::Sctp),
            _ => None,
        }
    }

    /// The IP protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Identity of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// metadata.namespace
    pub namespace: Text,
    /// metadata.name
    pub name: Text,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Identity of a service port, the unit that is balanced.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    /// The Service.
    pub service: ServiceKey,
    /// Name of the port in the Service; empty if it has none.
    pub port: Text,
    /// Its protocol.
    pub protocol: Protocol,
}

impl ServicePortName {
    /// Whether its text is another's as well, or is read as another's: the parts hold what separates them. No API server takes
    /// such names, but a folder of manifests may have them.
    #[must_use]
    pub fn is_ambiguous(&self) -> bool {
        self.service.namespace.contains('/') || self.service.name.contains(':')
    }

    /// Octets of its text.
    #[must_use]
    pub fn length(&self) -> usize {
        let port = if self.port.is_empty() { 0 } else { 1 + self.port.len() };
        self.service.namespace.len() + 1 + self.service.name.len() + port
    }
}

impl fmt::Display for ServicePortName {
    /// `namespace/name:port`, or `namespace/name` for a port without a name: the text in the `service_names` map.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.port.is_empty() { self.service.fmt(f) } else { write!(f, "{}:{}", self.service, self.port) }
    }
}

/// How a backend is chosen for a new connection. Weights count with each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Algorithm {
    /// At random.
    #[default]
    Random = algorithm::RANDOM,
    /// In turn.
    RoundRobin = algorithm::ROUND_ROBIN,
    /// By a hash of the client: all nodes choose the same one, and hardly any client moves when another backend comes or
    /// goes.
    Maglev = algorithm::MAGLEV,
    /// Of two at random, the one with fewer connections for its weight, as far as this node knows.
    LeastConnections = algorithm::LEAST_CONNECTIONS,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Random, Self::RoundRobin, Self::Maglev, Self::LeastConnections];

    /// Its name in flags, annotations and output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::Maglev => "maglev",
            Self::LeastConnections => "least-connections",
        }
    }

    /// By its name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }
}

/// A service port as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// Frontends: address and port (machine order) → bits of [`sheave_common::frontend::flags`], of both families.
    /// One that carries `CLUSTER_IP` implies the mark on the whole address.
    pub frontends: BTreeMap<SocketAddr, u32>,
    /// Who may use the frontends that carry `SOURCE_RANGES`; empty if none does.
    pub source_ranges: BTreeSet<Network>,
    /// Session affinity time-out in seconds, 0 for none.
    pub affinity_seconds: u32,
    /// How backends are chosen.
    pub algorithm: Algorithm,
    /// Endpoints for IPv4 frontends.
    pub endpoints4: EndpointSets,
    /// Endpoints for IPv6 frontends.
    pub endpoints6: EndpointSets,
}

/// The two sets that traffic may be balanced over. Each is sorted and free of duplicates, so that equal sets are
/// equal values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSets {
    /// For policy Cluster, after readiness and topology.
    pub cluster: Box<[Endpoint]>,
    /// For policy Local. Filled whether or not a policy uses it.
    pub local: Box<[Endpoint]>,
    /// In neither, but still serving: what they have stays with them.
    pub kept: Box<[Endpoint]>,
}

/// One endpoint. Address and port identify it within a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Address.
    pub address: IpAddr,
    /// Port, machine order.
    pub port: u16,
    /// On this node.
    pub local: bool,
    /// Terminating and still serving.
    pub terminating: bool,
    /// Share of new connections relative to the others; 1 unless weighted.
    pub weight: u16,
}
