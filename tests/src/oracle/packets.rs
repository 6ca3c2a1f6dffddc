//! What clients send: mostly to frontends, often just beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use fastrand::Rng;

use super::answer::{Edge, Oracle, Packet, Protocol};
use super::generate::{self, NODE_PORTS, PORTS, TARGETS};

/// Clients. None of them uses a source port twice for one destination: every packet is the first of its connection.
#[derive(Debug, Default)]
pub(super) struct Clients {
    next_port: BTreeMap<IpAddr, u16>,
    /// The last connection, if its port was used once.
    last: Option<Packet>,
}

impl Clients {
    /// A packet for a cluster; `before` is what the cluster was, and these Services have changed.
    pub(super) fn packet(
        &mut self,
        rng: &mut Rng,
        now: &Oracle,
        before: &Oracle,
        changed: &BTreeSet<String>,
    ) -> Packet {
        let (destination, protocol) = match rng.u8(0..12) {
            0..5 => self.frontend(rng, now, changed),
            5..8 => self.frontend(rng, now, &BTreeSet::new()),
            8 => self.frontend(rng, before, changed),
            9 => self.beside(rng, now),
            _ => None,
        }
        .unwrap_or_else(|| self.anywhere(rng));
        // The port of another connection, which may well have the same endpoint.
        if let Some(last) = self.last.take()
            && rng.u8(0..4) == 0
            && last.destination != destination
            && last.destination.is_ipv6() == destination.is_ipv6()
        {
            return Packet { destination, protocol, shares_port: true, ..last };
        }
        let packet = self.to(rng, destination, protocol);
        self.last = Some(packet.clone());
        packet
    }

    /// A packet to there.
    fn to(&mut self, rng: &mut Rng, destination: SocketAddr, protocol: Protocol) -> Packet {
        let edge = if rng.bool() { Edge::Pod } else { Edge::Uplink };
        let ipv6 = destination.is_ipv6();
        let source = match edge {
            Edge::Pod if rng.u8(0..3) == 0 => generate::local_pod(rng, ipv6),
            Edge::Pod => generate::client(rng, ipv6, false),
            Edge::Uplink if rng.u8(0..10) == 0 => generate::node_ip(ipv6, rng.u8(2..4)),
            Edge::Uplink => generate::client(rng, ipv6, true),
        };
        self.connection(edge, source, destination, protocol)
    }

    /// A packet to there from a client that is probably new.
    pub(super) fn stranger(
        &mut self,
        rng: &mut Rng,
        edge: Edge,
        destination: SocketAddr,
        protocol: Protocol,
    ) -> Packet {
        let source = generate::stranger(rng, destination.is_ipv6(), edge == Edge::Uplink);
        self.connection(edge, source, destination, protocol)
    }

    fn connection(&mut self, edge: Edge, source: IpAddr, destination: SocketAddr, protocol: Protocol) -> Packet {
        // Above the ports of endpoints, so that no connection looks like the answer of another.
        let port = self.next_port.entry(source).or_insert(20_000);
        *port = port.checked_add(1).expect("no client makes so many connections");
        Packet { edge, source: SocketAddr::new(source, *port), destination, protocol, shares_port: false }
    }

    /// Some frontend that clients may ask, of these Services if there are any.
    pub(super) fn frontend(
        &self,
        rng: &mut Rng,
        oracle: &Oracle,
        services: &BTreeSet<String>,
    ) -> Option<(SocketAddr, Protocol)> {
        let destinations = oracle.destinations(services);
        (!destinations.is_empty()).then(|| destinations[rng.usize(0..destinations.len())])
    }

    /// A frontend's address with another port or protocol.
    fn beside(&self, rng: &mut Rng, oracle: &Oracle) -> Option<(SocketAddr, Protocol)> {
        let (mut destination, mut protocol) = self.frontend(rng, oracle, &BTreeSet::new())?;
        if rng.bool() {
            destination.set_port(port(rng));
        } else {
            protocol = self::protocol(rng);
        }
        Some((destination, protocol))
    }

    fn anywhere(&self, rng: &mut Rng) -> (SocketAddr, Protocol) {
        let ipv6 = rng.bool();
        let address = match rng.u8(0..5) {
            0 => generate::cluster_ip(rng, ipv6),
            1 => generate::public_ip(rng, ipv6),
            2 => generate::node_ip(ipv6, rng.u8(1..12)),
            3 => generate::pod_ip(ipv6, rng.u8(1..4), rng.u8(2..9)),
            _ => generate::client(rng, ipv6, true),
        };
        (SocketAddr::new(address, port(rng)), protocol(rng))
    }
}

fn protocol(rng: &mut Rng) -> Protocol {
    [Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Udp, Protocol::Sctp][rng.usize(0..5)]
}

fn port(rng: &mut Rng) -> u16 {
    let port = match rng.u8(0..3) {
        0 => PORTS[rng.usize(0..PORTS.len())],
        1 => TARGETS[rng.usize(0..TARGETS.len())],
        _ => rng.i32(NODE_PORTS),
    };
    u16::try_from(port).expect("a port")
}
