//! Every path of one family, on flows of its own.

use anyhow::Result;
use sheave_common::flow::{EDGE_UPLINK, flags};
use sheave_common::{Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{ACK, Packet};
use sheave_tests::program::{NEXT, Programs, XDP_PASS};

use super::node::{TCP_SERVICE, UDP_SERVICE};
use super::raw::Raw;
use super::subject::{self, Chain, FIRST_CHAIN_ID, Hook, Path, Subject};
use super::walk::Circle;

/// Interface of the pods' packets: loopback.
const POD: u32 = 1;

/// What one family's rounds are made of.
pub(crate) struct Cases {
    family: Family,
    /// Paths of the real programs.
    pub(crate) subjects: Vec<Subject>,
    /// A tc program that does nothing.
    pub(crate) empty_tc: Raw,
    /// An XDP program that does nothing.
    pub(crate) empty_xdp: Raw,
    /// One lookup.
    pub(crate) lookup: Raw,
    /// The same without it.
    pub(crate) moves: Raw,
    /// The inserts of one new flow: name, program, and the map that they go to.
    pub(crate) inserts: [(&'static str, Raw, &'static str); 2],
}

impl Cases {
    /// Writes the flows.
    pub(crate) fn new(family: Family, uplink: u32, backends: [u32; 2], programs: &mut Programs) -> Result<Self> {
        let [tcp_backend, udp_backend] = backends;
        let tcp = Circle {
            family,
            protocol: PROTOCOL_TCP,
            edge: POD,
            flags: 0,
            number: 20,
            length: 2,
            service_id: TCP_SERVICE,
            backend_id: tcp_backend,
        };
        let udp =
            Circle { protocol: PROTOCOL_UDP, number: 21, service_id: UDP_SERVICE, backend_id: udp_backend, ..tcp };
        let snat = Circle { edge: EDGE_UPLINK, flags: flags::REDIRECT, number: 22, ..tcp };
        let snat_udp = Circle { edge: EDGE_UPLINK, flags: flags::REDIRECT, number: 23, ..udp };
        let (conntrack, half_open) = match family {
            Family::V4 => (names::CONNTRACK4, names::HALF_OPEN4),
            Family::V6 => (names::CONNTRACK6, names::HALF_OPEN6),
        };
        for circle in [tcp, udp, snat, snat_udp] {
            match family {
                Family::V4 => circle.insert::<Ipv4Address>(programs, conntrack)?,
                Family::V6 => circle.insert::<Ipv6Address>(programs, conntrack)?,
            }
        }
        let new = Circle { number: 24, service_id: FIRST_CHAIN_ID, ..tcp };
        let mut raw = |map, circle: &Circle, what: What| match family {
            Family::V4 => what.load::<Ipv4Address>(programs, map, circle),
            Family::V6 => what.load::<Ipv6Address>(programs, map, circle),
        };
        let lookup = raw(conntrack, &tcp, What::Lookup(true))?;
        let moves = raw(conntrack, &tcp, What::Lookup(false))?;
        let new_udp = Circle { protocol: PROTOCOL_UDP, ..new };
        let inserts = [
            ("inserts tcp", raw(half_open, &new, What::Inserts)?, half_open),
            ("inserts udp", raw(half_open, &new_udp, What::Inserts)?, half_open),
        ];
        let [empty_tc, empty_xdp] = super::empty()?;
        let subjects = subjects(family, uplink, [tcp, udp, snat, snat_udp]);
        Ok(Self { family, subjects, empty_tc, empty_xdp, lookup, moves, inserts })
    }

    /// One sample of a subject.
    pub(crate) fn sample(&self, programs: &mut Programs, subject: &Subject, runs: u32) -> Result<f64> {
        match self.family {
            Family::V4 => subject.sample::<Ipv4Address>(programs, runs),
            Family::V6 => subject.sample::<Ipv6Address>(programs, runs),
        }
    }

    /// Removes what the inserts have made.
    pub(crate) fn forget(&self, programs: &mut Programs, map: &str) -> Result<u32> {
        match self.family {
            Family::V4 => subject::forget::<Ipv4Address>(programs, map),
            Family::V6 => subject::forget::<Ipv6Address>(programs, map),
        }
    }
}

enum What {
    Lookup(bool),
    Inserts,
}

impl What {
    fn load<A: super::walk::KeyAddress>(&self, programs: &mut Programs, map: &str, circle: &Circle) -> Result<Raw>
    where
        sheave_common::flow::FlowKey<A>: aya::Pod,
        sheave_common::flow::Flow<A>: aya::Pod,
    {
        match self {
            Self::Lookup(lookup) => Raw::lookup::<A>(programs, map, circle, *lookup),
            Self::Inserts => Raw::inserts::<A>(programs, map, circle),
        }
    }
}

fn subjects(family: Family, uplink: u32, [tcp, udp, snat, snat_udp]: [Circle; 4]) -> Vec<Subject> {
    let hook = |program| Hook { program, ifindex: POD };
    let on_uplink = |program| Hook { program, ifindex: uplink };
    let (client, server) = match family {
        Family::V4 => ("18.0.0.1:40000", "18.0.0.2:443"),
        Family::V6 => ("[2001:db8:1::1]:40000", "[2001:db8:2::1]:443"),
    };
    let foreign = Packet::tcp(client, server, ACK).payload(&[0x5a; 64]).build().to_vec();
    let pass = |action| Path::Pass { packet: foreign.clone(), action };
    let walk = |circle, reply| Path::Walk { circle, reply, redirected: false };
    let redirected = |circle, reply| Path::Walk { circle, reply, redirected: true };
    let new = |protocol, remote| Path::New { chain: Chain { family, protocol, remote } };
    let subject = |name, hook, path| Subject { name, hook, path };
    vec![
        subject("pass ingress", hook("pod_ingress"), pass(NEXT)),
        subject("pass egress", hook("pod_egress"), pass(NEXT)),
        subject("pass uplink ingress", on_uplink("uplink_ingress"), pass(NEXT)),
        subject("pass xdp", on_uplink("uplink_xdp"), pass(XDP_PASS)),
        subject("established tcp", hook("pod_ingress"), walk(tcp, false)),
        subject("established udp", hook("pod_ingress"), walk(udp, false)),
        subject("reply tcp", hook("pod_egress"), walk(tcp, true)),
        subject("reply udp", hook("pod_egress"), walk(udp, true)),
        subject("snat tcp", on_uplink("uplink_ingress"), redirected(snat, false)),
        subject("snat reply tcp", on_uplink("uplink_ingress"), redirected(snat, true)),
        subject("snat udp", on_uplink("uplink_ingress"), redirected(snat_udp, false)),
        subject("xdp tcp", on_uplink("uplink_xdp"), redirected(snat, false)),
        subject("xdp reply tcp", on_uplink("uplink_xdp"), redirected(snat, true)),
        subject("xdp udp", on_uplink("uplink_xdp"), redirected(snat_udp, false)),
        subject("new tcp", hook("pod_ingress"), new(PROTOCOL_TCP, false)),
        subject("new udp", hook("pod_ingress"), new(PROTOCOL_UDP, false)),
        subject("new snat tcp", on_uplink("uplink_ingress"), new(PROTOCOL_TCP, true)),
        subject("new snat udp", on_uplink("uplink_ingress"), new(PROTOCOL_UDP, true)),
        subject("new xdp tcp", on_uplink("uplink_xdp"), new(PROTOCOL_TCP, true)),
    ]
}
