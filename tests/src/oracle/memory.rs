//! What clients have done before, as far as the rules care: whom affinity binds to which endpoint, and which datagrams
//! belong to a flow, and which connections are open.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::answer::{Answer, Edge, Oracle, Packet, Protocol, Source};
use super::frontends::ServicePortKey;
use super::real::Passage;

/// What is remembered.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// By client, where it is, and service port, whichever address and source port it used.
    affinity: BTreeMap<(Edge, IpAddr, ServicePortKey), SocketAddr>,
    datagrams: Vec<Flow>,
    open: Vec<Flow>,
}

/// A connection, or datagrams of one tuple.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    /// Its first packet.
    pub(super) packet: Packet,
    service_port: ServicePortKey,
    pub(super) passage: Passage,
}

/// What may become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// This.
    Exactly(Answer),
    /// It goes on to that endpoint as before (the source address may be either).
    Stays { endpoint: SocketAddr, sources: Vec<Source> },
}

impl Memory {
    /// What must become of the first packet of a connection, given what its client did before.
    pub(super) fn first(&self, oracle: &Oracle, packet: &Packet) -> Answer {
        let answer = oracle.answer(packet);
        let (Answer::Translated(choices), Some(service_port)) = (&answer, oracle.service_port(packet)) else {
            return answer;
        };
        if !oracle.has_affinity(service_port) {
            return answer;
        }
        let bound = self.affinity.get(&(packet.edge, packet.source.ip(), service_port.clone()));
        match bound.and_then(|endpoint| choices.get_key_value(endpoint)) {
            Some((endpoint, source)) => Answer::Translated(BTreeMap::from([(*endpoint, *source)])),
            // Not bound, or to an endpoint that this packet can't reach: a fresh choice.
            None => answer,
        }
    }

    /// What may become of a datagram that repeats one of before.
    pub(super) fn again(&self, oracle: &Oracle, datagrams: &Flow) -> Expected {
        let Flow { packet, service_port, passage: Passage { to: endpoint, source, .. } } = datagrams;
        let first = self.first(oracle, packet);
        if oracle.service_port(packet) != Some(service_port) || !oracle.is_serving(service_port, *endpoint) {
            return Expected::Exactly(first);
        }
        let mut sources = vec![*source];
        if let Answer::Translated(choices) = &first {
            sources.extend(choices.get(endpoint));
        }
        Expected::Stays { endpoint: *endpoint, sources }
    }

    /// A connection began.
    pub(super) fn began(&mut self, oracle: &Oracle, packet: &Packet, passage: &Passage) {
        let Some(service_port) = oracle.service_port(packet) else { return };
        if oracle.has_affinity(service_port) {
            self.affinity.insert((packet.edge, packet.source.ip(), service_port.clone()), passage.to);
        }
        if packet.protocol == Protocol::Udp {
            self.datagrams.push(flow(packet, service_port, passage));
        }
    }

    /// A connection was answered.
    pub(super) fn opened(&mut self, oracle: &Oracle, packet: &Packet, passage: &Passage) {
        if let Some(service_port) = oracle.service_port(packet) {
            self.open.push(flow(packet, service_port, passage));
        }
    }

    /// The cluster changed. What the rules no longer bind is forgotten: it may be remembered, but need not.
    pub(super) fn changed(&mut self, oracle: &Oracle) {
        // Flows of a Service that is gone are forgotten by and by.
        self.open.retain(|flow| oracle.service_port(&flow.packet) == Some(&flow.service_port));
        self.affinity.retain(|(_, _, service_port), endpoint| {
            oracle.has_affinity(service_port) && oracle.is_usable(service_port, *endpoint)
        });
    }

    /// Takes the datagrams of the time since the last call.
    pub(super) fn take_datagrams(&mut self) -> Vec<Flow> {
        std::mem::take(&mut self.datagrams)
    }

    /// The connections that are open.
    pub(super) fn open(&self) -> &[Flow] {
        &self.open
    }

    /// Every flow has timed out.
    pub(super) fn forget_flows(&mut self) {
        self.datagrams.clear();
        self.open.clear();
    }
}

fn flow(packet: &Packet, service_port: &ServicePortKey, passage: &Passage) -> Flow {
    Flow { packet: packet.clone(), service_port: service_port.clone(), passage: *passage }
}
