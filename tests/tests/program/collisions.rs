//! Two flows that want the same tuple after translation.

use std::collections::HashSet;
use std::net::SocketAddr;

use sheave_common::config::Config;
use sheave_common::{DropReason, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::packet::{ACK, Packet, RST, SYN, View};
use sheave_tests::program::{NEXT, Programs};

use crate::{address, cluster_ip, pod};

const CLIENT: &str = "10.1.0.1:40000";
const BACKEND: &str = "10.1.0.2:8080";

/// Two services with one backend address.
fn services(protocol: u8) -> Programs {
    let mut programs = Programs::load().unwrap();
    programs.service(&cluster_ip(1, protocol, "10.96.0.10:80", &[BACKEND])).unwrap();
    programs.service(&cluster_ip(2, protocol, "10.96.0.11:80", &[BACKEND])).unwrap();
    programs
}

#[test]
fn one_client_port_to_two_services_with_one_backend_works_for_both() {
    for protocol in [PROTOCOL_TCP, PROTOCOL_UDP] {
        let mut programs = services(protocol);
        let packet = |from: &str, to: &str, flags: u8| match protocol {
            PROTOCOL_TCP => Packet::tcp(from, to, flags).build(),
            _ => Packet::udp(from, to).build(),
        };
        let first = pod(&mut programs, "pod_ingress", &packet(CLIENT, "10.96.0.10:80", SYN));
        let second = pod(&mut programs, "pod_ingress", &packet(CLIENT, "10.96.0.11:80", SYN));
        assert_eq!(View(&first.packet).source(), address(CLIENT));
        let moved = View(&second.packet).source();
        assert_eq!(moved.ip(), address(CLIENT).ip(), "the client's address is kept");
        assert!((10_000..=29_999).contains(&moved.port()), "{moved}");
        View(&second.packet).assert_checksums();
        for (to, vip) in [(CLIENT.to_owned(), "10.96.0.10:80"), (moved.to_string(), "10.96.0.11:80")] {
            let back = pod(&mut programs, "pod_egress", &packet(BACKEND, &to, SYN | ACK));
            assert_eq!(back.action, NEXT);
            assert_eq!(View(&back.packet).tuple(), format!("{vip} → {CLIENT}"));
            View(&back.packet).assert_checksums();
        }
    }
}

#[test]
fn a_closed_flow_in_the_way_is_replaced_not_avoided() {
    let mut programs = services(PROTOCOL_TCP);
    for (program, packet) in [
        ("pod_ingress", Packet::tcp(CLIENT, "10.96.0.10:80", SYN)),
        ("pod_egress", Packet::tcp(BACKEND, CLIENT, SYN | ACK)),
        ("pod_ingress", Packet::tcp(CLIENT, "10.96.0.10:80", ACK)),
        ("pod_ingress", Packet::tcp(CLIENT, "10.96.0.10:80", RST)),
    ] {
        pod(&mut programs, program, &packet.build());
    }
    let second = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, "10.96.0.11:80", SYN).build());
    assert_eq!(View(&second.packet).tuple(), format!("{CLIENT} → {BACKEND}"));
    let back = pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, SYN | ACK).build());
    assert_eq!(View(&back.packet).tuple(), format!("10.96.0.11:80 → {CLIENT}"));
}

#[test]
fn an_expired_flow_in_the_way_is_replaced() {
    let mut programs = Programs::load_with(|config| config.timeouts.udp_new = 0).unwrap();
    programs.service(&cluster_ip(1, PROTOCOL_UDP, "10.96.0.10:80", &[BACKEND])).unwrap();
    programs.service(&cluster_ip(2, PROTOCOL_UDP, "10.96.0.11:80", &[BACKEND])).unwrap();
    pod(&mut programs, "pod_ingress", &Packet::udp(CLIENT, "10.96.0.10:80").build());
    std::thread::sleep(std::time::Duration::from_millis(1_100));
    let second = pod(&mut programs, "pod_ingress", &Packet::udp(CLIENT, "10.96.0.11:80").build());
    assert_eq!(View(&second.packet).source(), address(CLIENT));
}

#[test]
fn when_every_source_port_is_taken_the_connection_is_dropped_and_the_others_live() {
    let mut programs = Programs::load_with(|config| {
        config.snat_port_first = 61_000;
        config.snat_port_last = 61_001;
    })
    .unwrap();
    for id in 1..=4 {
        programs.service(&cluster_ip(id, PROTOCOL_UDP, &format!("10.96.0.{id}:80"), &[BACKEND])).unwrap();
    }
    let mut sources = HashSet::new();
    for id in 1..=3 {
        let packet = Packet::udp(CLIENT, &format!("10.96.0.{id}:80")).build();
        let source = View(&pod(&mut programs, "pod_ingress", &packet).packet).source();
        pod(&mut programs, "pod_egress", &Packet::udp(BACKEND, &source.to_string()).build());
        pod(&mut programs, "pod_ingress", &packet);
        sources.insert(source);
    }
    assert_eq!(sources.len(), 3);
    let last = pod(&mut programs, "pod_ingress", &Packet::udp(CLIENT, "10.96.0.4:80").build());
    assert_eq!(last.action, sheave_tests::program::DROP);
    assert_eq!(programs.dropped(DropReason::SnatPortsExhausted).unwrap(), 1);
    assert_eq!(programs.flows(names::CONNTRACK4).unwrap().len(), 6);
}

/// A flood of SYNs would take every source port, and nobody else could connect until it is forgotten.
#[test]
fn a_half_open_flow_gives_its_source_port_away_and_an_established_one_does_not() {
    let range = |config: &mut Config| (config.snat_port_first, config.snat_port_last) = (61_000, 61_001);
    let mut programs = Programs::load_with(range).unwrap();
    let vip = |id: u32| format!("10.96.0.{id}:80");
    for id in 1..=6 {
        programs.service(&cluster_ip(id, PROTOCOL_TCP, &vip(id), &[BACKEND])).unwrap();
    }
    let send = |programs: &mut Programs, id, flags| {
        let out = pod(programs, "pod_ingress", &Packet::tcp(CLIENT, &vip(id), flags).build());
        (out.action == NEXT).then(|| View(&out.packet).source())
    };
    let answer = |programs: &mut Programs, to: SocketAddr| {
        let back = pod(programs, "pod_egress", &Packet::tcp(BACKEND, &to.to_string(), SYN | ACK).build());
        View(&back.packet).source().to_string()
    };
    // The first keeps the client's port, the next two have one of the range, and all but the last one have been answered.
    let first: Vec<SocketAddr> = (1..=3).map(|id| send(&mut programs, id, SYN).unwrap()).collect();
    for (id, source) in [1, 2].into_iter().zip(&first) {
        assert_eq!(answer(&mut programs, *source), vip(id));
    }
    let mut taken = HashSet::new();
    for id in [4, 5] {
        let source = send(&mut programs, id, SYN).expect("a port of one that is half-open");
        assert!(first[1..].contains(&source), "{source} of {first:?}");
        assert_eq!(answer(&mut programs, source), vip(id), "the port is the new flow's");
        assert_eq!(send(&mut programs, id, ACK), Some(source));
        taken.insert(source);
    }
    assert_eq!(taken.len(), 2, "they are taken in turn");
    assert_eq!(programs.dropped(DropReason::HalfOpenReplaced).unwrap(), 2);
    assert_eq!(programs.flows(names::HALF_OPEN4).unwrap().len(), 2, "both halves of a flow go");
    assert_eq!(send(&mut programs, 2, ACK), None, "its connection is no longer known");
    // What is left is the first one's own port, which is not of the range, and two that are established.
    assert_eq!(send(&mut programs, 6, SYN), None);
    assert_eq!(programs.dropped(DropReason::SnatPortsExhausted).unwrap(), 1);
    // A port that becomes free is used at once.
    send(&mut programs, 4, RST);
    assert!(send(&mut programs, 6, SYN).is_some_and(|source| taken.contains(&source)));
}

#[test]
fn flows_of_two_pods_with_one_address_do_not_meet() {
    // The edge is part of the key: the same tuple at another veth is another flow.
    let mut programs = services(PROTOCOL_TCP);
    let packet = Packet::tcp(CLIENT, "10.96.0.10:80", SYN).build();
    pod(&mut programs, "pod_ingress", &packet);
    let packet = Packet::tcp(CLIENT, "10.96.0.10:80", SYN).to_mac([0; 6]).build();
    let outside = programs.tc("uplink_ingress", &packet, sheave_tests::program::SkbContext::default()).unwrap();
    assert_eq!(View(&outside.packet).tuple(), format!("{CLIENT} → {BACKEND}"), "no port was moved");
    assert_eq!(programs.flows(names::HALF_OPEN4).unwrap().len(), 4);
}
