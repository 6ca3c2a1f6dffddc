//! The real programs on hand-made packets: packet in, then verdict, packet out and map contents.
//!
//! Needs root and a kernel with BPF; nothing is attached or pinned.

mod affinity;
mod algorithms;
mod clusterip;
mod collisions;
mod echo;
mod failover;
mod fragments;
mod full;
mod hostile;
mod icmp;
mod ipv6;
mod lifetimes;
mod networks;
mod node;
mod nodeport;
mod refusals;
mod sctp_associations;
mod versions;
mod vlan;

use std::net::SocketAddr;

use aya::Pod;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::frontend::flags;
use sheave_common::{Address, Ipv4Address, PROTOCOL_TCP, PROTOCOL_UDP};
use sheave_tests::packet::{ACK, Packet, SYN};
use sheave_tests::program::{NEXT, Outcome, Programs, Service, SkbContext};

/// Interface that pods' packets are on in these tests: loopback, the only one that a new namespace has.
const POD_EDGE: u32 = 1;

/// A pod, the TCP frontend of [`two_services`], and its endpoint.
const CLIENT: &str = "10.1.0.1:40000";
const VIP: &str = "10.96.0.10:80";
const BACKEND: &str = "10.1.0.2:8080";

/// Completes a handshake from [`CLIENT`] to [`VIP`].
fn handshake(programs: &mut Programs) {
    for (program, packet) in [
        ("pod_ingress", Packet::tcp(CLIENT, VIP, SYN)),
        ("pod_egress", Packet::tcp(BACKEND, CLIENT, SYN | ACK)),
        ("pod_ingress", Packet::tcp(CLIENT, VIP, ACK)),
    ] {
        assert_eq!(pod(programs, program, &packet.build()).action, NEXT);
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("address:port")
}

/// A service with a ClusterIP.
fn cluster_ip(id: u32, protocol: u8, frontend: &str, endpoints: &[&str]) -> Service {
    Service {
        id,
        frontends: vec![(address(frontend), flags::CLUSTER_IP)],
        protocol,
        endpoints: endpoints.iter().map(|endpoint| (address(endpoint), true)).collect(),
        affinity: 0,
    }
}

/// Programs with the two services that most tests use: TCP and UDP behind one ClusterIP, one endpoint each.
fn two_services() -> Programs {
    let mut programs = Programs::load().expect("programs load");
    for (id, protocol, endpoint) in [(1, PROTOCOL_TCP, "10.1.0.2:8080"), (2, PROTOCOL_UDP, "10.1.0.2:5353")] {
        let port = if protocol == PROTOCOL_TCP { 80 } else { 53 };
        let service = cluster_ip(id, protocol, &format!("10.96.0.10:{port}"), &[endpoint]);
        programs.service(&service).expect("service");
    }
    programs
}

/// Rewrites every flow of a map.
fn edit(programs: &mut Programs, map: &str, change: impl Fn(&mut Flow<Ipv4Address>)) {
    edit_of(programs, map, change);
}

/// The same for either family.
fn edit_of<A: Address>(programs: &mut Programs, map: &str, change: impl Fn(&mut Flow<A>))
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut map = programs.hash::<FlowKey<A>, Flow<A>>(map).unwrap();
    let flows: Vec<_> = map.iter().map(Result::unwrap).collect();
    for (key, mut flow) in flows {
        change(&mut flow);
        map.insert(key, flow, 0).unwrap();
    }
}

/// Runs a tc program on a packet at the pod edge.
fn pod(programs: &mut Programs, program: &str, packet: &[u8]) -> Outcome {
    programs.tc(program, packet, SkbContext { ifindex: POD_EDGE, ..SkbContext::default() }).expect("test run")
}
