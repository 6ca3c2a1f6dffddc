//! What a flow lives through: both directions on different CPUs, ports used again, floods.

use std::sync::Barrier;

use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::Backend;
use sheave_common::flow::{closing, flags, state};
use sheave_common::{Ipv4Address, PROTOCOL_TCP, names};
use sheave_tests::packet::{ACK, FIN, PSH, Packet, RST, SYN, View};
use sheave_tests::program::{NEXT, Programs};
use sheave_tests::raw_bpf;

use crate::{BACKEND, CLIENT, VIP, cluster_ip, edit, handshake, pod, two_services};

/// Replaces the TCP service's only backend, as if its pod had been replaced.
fn replace_backend(programs: &mut Programs, endpoint: &str) {
    let old: Vec<u32> = programs.flows(names::CONNTRACK4).unwrap().values().map(|flow| flow.backend_id).collect();
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &[endpoint])).unwrap();
    programs.hash::<u32, Backend<Ipv4Address>>(names::BACKENDS4).unwrap().remove(&old[0]).unwrap();
}

/// Now and then a busy connection would be reset when a second begins.
#[test]
fn a_flow_that_another_cpu_saw_a_moment_later_is_not_expired() {
    let mut programs = two_services();
    handshake(&mut programs);
    // The other CPU read the clock after the second began, this one before.
    edit(&mut programs, names::CONNTRACK4, |flow| flow.last_seen += 2);
    let data = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, PSH | ACK).payload(b"x").build());
    assert_eq!(data.action, NEXT);
    assert_eq!(View(&data.packet).tuple(), format!("{CLIENT} → {BACKEND}"));
}

/// Now and then a client with affinity would change its backend when a second begins.
#[test]
fn affinity_that_another_cpu_renewed_a_moment_later_is_not_expired() {
    let mut programs = Programs::load().unwrap();
    let endpoints: Vec<String> = (2..=250).map(|n| format!("10.1.0.{n}:80")).collect();
    let mut service = cluster_ip(1, PROTOCOL_TCP, VIP, &endpoints.iter().map(String::as_str).collect::<Vec<_>>());
    service.affinity = 10_800;
    programs.service(&service).unwrap();
    let mut backends = std::collections::HashSet::new();
    for port in 0..3 {
        let from = format!("10.2.0.1:{}", 40_000 + port);
        let there = pod(&mut programs, "pod_ingress", &Packet::tcp(&from, VIP, SYN).build());
        backends.insert(View(&there.packet).destination());
        let mut map = programs.hash::<AffinityKey<Ipv4Address>, Affinity>(names::NEW_AFFINITY4).unwrap();
        let (key, mut affinity) = map.iter().next().unwrap().unwrap();
        affinity.last_new_connection += 2;
        map.insert(key, affinity, 0).unwrap();
    }
    assert_eq!(backends.len(), 1);
}

/// A client that uses a port again would have its new connection sent to the old one's backend, and reset.
#[test]
fn a_late_packet_of_an_old_connection_does_not_take_over_the_new_one() {
    for late in [PSH | ACK, FIN | ACK] {
        let mut programs = two_services();
        handshake(&mut programs);
        pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, RST).build());
        replace_backend(&mut programs, "10.1.0.3:8080");
        let new = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
        assert_eq!(View(&new.packet).tuple(), format!("{CLIENT} → 10.1.0.3:8080"));
        edit(&mut programs, names::CONNTRACK4, |flow| flow.last_seen -= 2);
        pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, late).build());
        pod(&mut programs, "pod_egress", &Packet::tcp("10.1.0.3:8080", CLIENT, SYN | ACK).build());
        let ack = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, ACK).build());
        assert_eq!(View(&ack.packet).tuple(), format!("{CLIENT} → 10.1.0.3:8080"));
        let data = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, PSH | ACK).build());
        assert_eq!(View(&data.packet).tuple(), format!("{CLIENT} → 10.1.0.3:8080"));
    }
}

/// A connection whose SYN was repeated just when the SYN-ACK came would be reset after a minute of silence.
#[test]
fn a_syn_repeated_while_it_is_answered_does_not_keep_the_flow_half_open() {
    let mut programs = two_services();
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    // What two CPUs leave: one half knows of the SYN-ACK, the other was written by the repeated SYN.
    edit(&mut programs, names::HALF_OPEN4, |flow| {
        flow.last_seen -= 2;
        if flow.flags & flags::REPLY != 0 {
            flow.state = state::ANSWERED;
        }
    });
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, ACK).build());
    assert_eq!(programs.flows(names::CONNTRACK4).unwrap().len(), 2);
}

/// A connection that both sides close at once would count as open on one side, and keep its port.
#[test]
fn both_fins_are_remembered_when_they_cross() {
    let mut programs = two_services();
    handshake(&mut programs);
    edit(&mut programs, names::CONNTRACK4, |flow| {
        if flow.flags & flags::REPLY == 0 {
            flow.closing = closing::CLIENT_FIN;
        }
    });
    pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, FIN | ACK).build());
    for flow in programs.flows(names::CONNTRACK4).unwrap().values() {
        assert_eq!(flow.closing, closing::CLIENT_FIN | closing::BACKEND_FIN);
    }
    // Nor does an ordinary packet of the other direction make the connection open again.
    edit(&mut programs, names::CONNTRACK4, |flow| {
        flow.last_seen -= 2;
        flow.closing = if flow.flags & flags::REPLY == 0 { closing::RESET } else { 0 };
    });
    pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, ACK).build());
    for flow in programs.flows(names::CONNTRACK4).unwrap().values() {
        assert_eq!(flow.closing, closing::RESET);
    }
}

/// A port scan would fill the map of established connections.
#[test]
fn a_reset_does_not_complete_a_handshake() {
    let mut programs = two_services();
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, SYN | ACK).build());
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, RST | ACK).build());
    assert_eq!(programs.flows(names::CONNTRACK4).unwrap().len(), 0);
    assert!(programs.flows(names::HALF_OPEN4).unwrap().values().all(|flow| flow.closing == closing::RESET));
}

/// A sender at the wrong side of the node would close other people's connections.
#[test]
fn a_packet_that_travels_the_other_way_changes_no_flow() {
    let mut programs = two_services();
    handshake(&mut programs);
    let before = programs.flows(names::CONNTRACK4).unwrap();
    for (program, packet) in [
        ("pod_ingress", Packet::tcp(BACKEND, CLIENT, RST)),
        ("pod_egress", Packet::tcp(CLIENT, VIP, RST)),
        ("pod_egress", Packet::tcp(CLIENT, VIP, FIN | ACK)),
    ] {
        let packet = packet.build();
        let out = pod(&mut programs, program, &packet);
        assert_eq!((out.action, out.packet), (NEXT, packet.to_vec()));
    }
    for (key, flow) in programs.flows(names::CONNTRACK4).unwrap() {
        assert_eq!((flow.state, flow.closing), (before[&key].state, before[&key].closing));
    }
}

/// A flood of SYNs, some of them answered, would break the connections that are open.
#[test]
fn a_syn_flood_evicts_no_established_flow() {
    let sizes = [(names::HALF_OPEN4, 8_192), (names::CONNTRACK4, 4_096)];
    let mut programs = Programs::load_sized(&sizes, |_| {}).unwrap();
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &[BACKEND])).unwrap();
    handshake(&mut programs);
    for n in 0..300_000_u32 {
        let from = format!("10.{}.{}.{}:{}", 100 + (n >> 16), n >> 8 & 0xff, n & 0xff, 1_024 + n % 60_000);
        pod(&mut programs, "pod_ingress", &Packet::tcp(&from, VIP, SYN).build());
        if n % 8 == 0 {
            pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, &from, SYN | ACK).build());
        }
    }
    assert_eq!(programs.flows(names::CONNTRACK4).unwrap().len(), 2);
    assert!(programs.flows(names::HALF_OPEN4).unwrap().len() <= 8_192);
    let there = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, PSH | ACK).payload(b"x").build());
    assert_eq!(View(&there.packet).tuple(), format!("{CLIENT} → {BACKEND}"));
    let back = pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, PSH | ACK).payload(b"y").build());
    assert_eq!(View(&back.packet).tuple(), format!("{VIP} → {CLIENT}"));
}

/// Now and then a new connection would be reset: a handshake's last ACK and the request right after it are often two CPUs' work, and
/// one of them moves the flow from one map to the other while the other one looks for it.
#[test]
fn a_flow_is_found_while_another_cpu_moves_it_to_the_established_map() {
    const CONNECTIONS: u32 = 30_000;
    const AT_ONCE: usize = 100;
    let mut programs = two_services();
    let ingress = [programs.detach("pod_ingress").unwrap(), programs.detach("pod_ingress").unwrap()];
    let egress = programs.detach("pod_egress").unwrap();
    let clients: Vec<String> =
        (0..CONNECTIONS).map(|n| format!("10.2.{}.{}:{}", n >> 8 & 0xff, n & 0xff, 40_000 + (n >> 16))).collect();
    let (opened, asked) = (Barrier::new(2), Barrier::new(2));
    let request = |program: &raw_bpf::Program, client: &String| {
        let out = program.run(&Packet::tcp(client, VIP, PSH | ACK).payload(b"x").build(), 1).unwrap();
        out.action == NEXT && View(&out.packet).tuple() == format!("{client} → {BACKEND}")
    };
    let ask = |program: &raw_bpf::Program, clients: &[String]| {
        opened.wait();
        let refused = clients.iter().filter(|client| !request(program, client)).count();
        asked.wait();
        refused
    };
    let refused: usize = std::thread::scope(|scope| {
        let other_cpu = scope.spawn(|| clients.chunks(AT_ONCE).map(|clients| ask(&ingress[1], clients)).sum::<usize>());
        let this_cpu = clients.chunks(AT_ONCE).map(|clients| {
            for client in clients {
                ingress[0].run(&Packet::tcp(client, VIP, SYN).build(), 1).unwrap();
                egress.run(&Packet::tcp(BACKEND, client, SYN | ACK).build(), 1).unwrap();
            }
            ask(&ingress[0], clients)
        });
        this_cpu.sum::<usize>() + other_cpu.join().unwrap()
    });
    assert_eq!(refused, 0, "requests of {CONNECTIONS} connections were not translated");
}
