//! Packets that are answered, dropped or left alone.

use sheave_common::frontend::flags;
use sheave_common::{DropReason, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::packet::{ACK, CLIENT_MAC, NODE_MAC, PSH, Packet, RST, SYN, View};
use sheave_tests::program::{DROP, NEXT, Programs, REDIRECT, Service, SkbContext};

use crate::{address, cluster_ip, pod, two_services};

const CLIENT: &str = "10.1.0.1:40000";
const VIP: &str = "10.96.0.10:80";

#[test]
fn a_service_without_endpoints_refuses_at_once_in_its_own_name() {
    let mut programs = Programs::load().unwrap();
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &[])).unwrap();
    programs.service(&cluster_ip(2, PROTOCOL_UDP, "10.96.0.10:53", &[])).unwrap();
    for packet in [Packet::tcp(CLIENT, VIP, SYN), Packet::udp(CLIENT, "10.96.0.10:53")] {
        let sent = packet.build();
        let answer = pod(&mut programs, "pod_ingress", &sent);
        assert_eq!(answer.action, REDIRECT);
        let view = View(&answer.packet);
        assert_eq!(view.protocol(), PROTOCOL_ICMP);
        assert_eq!(view.icmp(), (3, 3));
        assert_eq!(view.addresses(), ("10.96.0.10".parse().unwrap(), "10.1.0.1".parse().unwrap()));
        assert_eq!(view.macs(), (CLIENT_MAC, NODE_MAC));
        assert_eq!(view.quoted()[14..], sent[14..42], "the quoted packet is the one that was sent");
        view.assert_checksums();
    }
    assert_eq!(programs.dropped(DropReason::NoEndpoint).unwrap(), 2);
    assert!(programs.flows(names::HALF_OPEN4).unwrap().is_empty());
}

#[test]
fn rejects_are_rate_limited() {
    let mut programs = Programs::load_with(|config| config.rejects_per_second = 5).unwrap();
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &[])).unwrap();
    let packet = Packet::tcp(CLIENT, VIP, SYN).build();
    for _ in 0..200 {
        pod(&mut programs, "pod_ingress", &packet);
    }
    let sent = programs.dropped(DropReason::NoEndpoint).unwrap();
    let limited = programs.dropped(DropReason::RejectLimited).unwrap();
    assert_eq!(sent + limited, 200);
    // Two CPUs and, at the most, a change of the second in between.
    assert!((5..=40).contains(&sent), "{sent} sent");
}

#[test]
fn a_port_that_a_cluster_ip_does_not_have_is_refused() {
    let mut programs = two_services();
    let answer = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, "10.96.0.10:81", SYN).build());
    assert_eq!((answer.action, View(&answer.packet).icmp()), (REDIRECT, (3, 3)));
    assert_eq!(programs.dropped(DropReason::UnknownPort).unwrap(), 1);
}

#[test]
fn mid_flow_tcp_that_no_flow_knows_is_reset_and_never_forwarded() {
    let mut programs = two_services();
    let segment = Packet::tcp(CLIENT, VIP, PSH | ACK).numbers(1_000, 2_000).payload(b"late").build();
    let answer = pod(&mut programs, "pod_ingress", &segment);
    assert_eq!(answer.action, REDIRECT);
    let view = View(&answer.packet);
    assert_eq!(view.tuple(), format!("{VIP} → {CLIENT}"));
    assert_eq!((view.tcp_flags(), view.numbers()), (RST, (2_000, 0)));
    view.assert_checksums();
    // Without an ACK the reset acknowledges what was sent (RFC 9293, 3.10.7.1).
    let segment = Packet::tcp(CLIENT, VIP, PSH).numbers(1_000, 0).payload(b"late").build();
    let answer = pod(&mut programs, "pod_ingress", &segment);
    let view = View(&answer.packet);
    assert_eq!((view.tcp_flags(), view.numbers()), (RST | ACK, (0, 1_004)));
    view.assert_checksums();
    // A reset is never answered with a reset.
    let reset = Packet::tcp(CLIENT, VIP, RST).build();
    assert_eq!(pod(&mut programs, "pod_ingress", &reset).action, DROP);
    assert_eq!(programs.dropped(DropReason::NoFlow).unwrap(), 3);
}

#[test]
fn connections_of_another_proxy_drain_in_peace_when_asked_to() {
    let mut programs =
        Programs::load_with(|config| config.flags |= sheave_common::config::flags::DRAIN_FOREIGN).unwrap();
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &["10.1.0.2:8080"])).unwrap();
    let segment = Packet::tcp(CLIENT, VIP, PSH | ACK).payload(b"x").build();
    let out = pod(&mut programs, "pod_ingress", &segment);
    assert_eq!((out.action, out.packet), (NEXT, segment.to_vec()));
}

#[test]
fn who_leaves_keeps_the_flows_that_are_known_and_passes_everything_else() {
    let mut programs = Programs::load().unwrap();
    for (id, protocol) in [(1, PROTOCOL_TCP), (2, PROTOCOL_UDP)] {
        programs.service(&cluster_ip(id, protocol, VIP, &["10.1.0.2:8080"])).unwrap();
    }
    let known = Packet::udp(CLIENT, VIP).payload(b"x").build();
    let translated = pod(&mut programs, "pod_ingress", &known).packet;
    assert_ne!(translated, known.to_vec());
    programs.configure(|config| config.flags |= sheave_common::config::flags::LEAVING).unwrap();
    assert_eq!(pod(&mut programs, "pod_ingress", &known).packet, translated, "a flow that is known");
    let (syn, segment) = (Packet::tcp(CLIENT, VIP, SYN), Packet::tcp(CLIENT, VIP, PSH | ACK).payload(b"x"));
    // The address has no such port, and neither has the other proxy to be asked here.
    let (datagram, unknown) = (Packet::udp("10.1.0.1:9", VIP), Packet::tcp(CLIENT, "10.96.0.1:9", SYN));
    for packet in [syn, segment, datagram, unknown] {
        let packet = packet.build();
        let out = pod(&mut programs, "pod_ingress", &packet);
        assert_eq!((out.action, out.packet), (NEXT, packet.to_vec()));
    }
}

#[test]
fn traffic_that_is_not_ours_is_never_touched() {
    let mut programs = two_services();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..20_000 {
        let word = random();
        let from = format!("10.1.{}.{}:{}", word & 0xff, word >> 8 & 0xff, 1 + (word >> 16 & 0x7fff));
        let to = format!("192.0.2.{}:{}", word >> 32 & 0xff, word >> 40 & 0xffff);
        let packet = if word >> 60 & 1 == 0 {
            Packet::tcp(&from, &to, (word >> 56 & 0x3f) as u8)
        } else {
            Packet::udp(&from, &to)
        };
        let mut packet = packet.build().to_vec();
        if word >> 61 & 1 == 0 {
            // Damage one byte of the headers, but leave the destination alone.
            let at = 14 + (random() as usize) % 16;
            packet[at] = random() as u8;
        }
        for program in ["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress"] {
            let out = pod(&mut programs, program, &packet);
            assert_eq!((out.action, &out.packet), (NEXT, &packet), "{program}: {packet:02x?}");
        }
    }
    assert!(programs.flows(names::HALF_OPEN4).unwrap().is_empty());
    assert!(programs.flows(names::CONNTRACK4).unwrap().is_empty());
}

#[test]
fn lengths_that_contradict_the_packet_are_left_alone_and_counted() {
    let mut programs = two_services();
    let mut packet = Packet::tcp(CLIENT, VIP, SYN).build().to_vec();
    packet[16..18].copy_from_slice(&1_000_u16.to_be_bytes());
    let out = pod(&mut programs, "pod_ingress", &packet);
    assert_eq!((out.action, out.packet), (NEXT, packet));
    assert_eq!(programs.dropped(DropReason::Malformed).unwrap(), 1);
}

#[test]
fn what_cannot_be_translated_never_leaves_for_a_cluster_ip() {
    let mut programs = two_services();
    for fragment in [0x2000 | 185, 185] {
        let packet = Packet::udp(CLIENT, "10.96.0.10:53").fragment(fragment).build();
        assert_eq!(pod(&mut programs, "pod_ingress", &packet).action, DROP);
    }
    assert_eq!(programs.dropped(DropReason::Fragment).unwrap(), 2);
    let mut gre = Packet::udp(CLIENT, "10.96.0.10:53").build().to_vec();
    gre[23] = 47;
    assert_eq!(pod(&mut programs, "pod_ingress", &gre).action, DROP);
    assert_eq!(programs.dropped(DropReason::UnsupportedProtocol).unwrap(), 1);
}

/// A segment with half a header would leave by the default route, to an address that is only a Service's.
#[test]
fn a_segment_cut_short_never_leaves_for_a_cluster_ip() {
    let mut programs = two_services();
    for (to, action) in [(VIP, DROP), ("10.1.0.9:80", NEXT)] {
        let mut packet = Packet::tcp(CLIENT, to, SYN).build().to_vec();
        packet[16..18].copy_from_slice(&32_u16.to_be_bytes());
        packet.truncate(14 + 32);
        let out = pod(&mut programs, "pod_ingress", &packet);
        assert_eq!((out.action, out.packet), (action, packet));
    }
    assert_eq!(programs.dropped(DropReason::Malformed).unwrap(), 2);
}

/// Errors would be sent to everybody, and flows made that nobody can answer.
#[test]
fn packets_from_nobody_or_everybody_are_not_answered() {
    let mut programs = two_services();
    for from in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "239.255.255.250", "255.255.255.255"] {
        let from = format!("{from}:40000");
        for packet in [
            Packet::tcp(&from, VIP, SYN),
            Packet::tcp(&from, VIP, ACK),
            Packet::udp(&from, "10.96.0.10:53"),
            Packet::udp(&from, "10.96.0.10:54"),
        ] {
            assert_eq!(pod(&mut programs, "pod_ingress", &packet.build()).action, DROP, "{packet:?}");
        }
    }
    assert_eq!(programs.dropped(DropReason::MartianSource).unwrap(), 20);
    assert!(programs.flows(names::HALF_OPEN4).unwrap().is_empty());
    assert!(programs.flows(names::CONNTRACK4).unwrap().is_empty());
}

/// A frame that is sent to all hosts of a link would be answered, or sent on, by every node of it.
#[test]
fn frames_to_a_group_are_left_alone() {
    let mut programs = two_services();
    for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        for packet in [
            Packet::tcp(CLIENT, VIP, SYN).to_mac(mac).build(),
            Packet::udp(CLIENT, "10.96.0.10:54").to_mac(mac).build(),
        ] {
            let out = pod(&mut programs, "pod_ingress", &packet);
            assert_eq!((out.action, out.packet), (NEXT, packet.to_vec()));
        }
    }
}

#[test]
fn a_fragment_without_ports_is_not_forwarded_to_an_external_ip_and_other_traffic_to_it_is_left_alone() {
    let mut programs = Programs::load().unwrap();
    let service = Service {
        frontends: vec![(address("203.0.113.5:53"), flags::EXTERNAL_IP)],
        ..cluster_ip(1, PROTOCOL_UDP, "10.96.0.10:53", &["10.1.0.2:5353"])
    };
    programs.service(&service).unwrap();
    for fragment in [0x2000 | 185, 185] {
        let packet = Packet::udp(CLIENT, "203.0.113.5:53").fragment(fragment).build();
        assert_eq!(pod(&mut programs, "pod_ingress", &packet).action, DROP, "{fragment:#x}");
    }
    assert_eq!(programs.dropped(DropReason::Fragment).unwrap(), 2);
    let mut gre = Packet::udp(CLIENT, "203.0.113.5:53").build().to_vec();
    gre[23] = 47;
    for packet in [Packet::tcp(CLIENT, "203.0.113.5:22", SYN).build().to_vec(), gre] {
        let out = pod(&mut programs, "pod_ingress", &packet);
        assert_eq!((out.action, out.packet), (NEXT, packet));
    }
}

#[test]
fn a_frontend_for_the_host_alone_is_invisible_to_packets() {
    let mut programs = Programs::load().unwrap();
    let service = Service {
        frontends: vec![(address("127.0.0.1:30080"), flags::NODE_PORT | flags::HOST_ONLY)],
        ..cluster_ip(1, PROTOCOL_TCP, VIP, &["10.1.0.2:8080"])
    };
    programs.service(&service).unwrap();
    let packet = Packet::tcp(CLIENT, "127.0.0.1:30080", SYN).build();
    let out = pod(&mut programs, "pod_ingress", &packet);
    assert_eq!((out.action, out.packet), (NEXT, packet.to_vec()));
}

#[test]
fn policy_local_drops_outside_traffic_without_a_local_endpoint_and_the_short_circuit_does_not() {
    let mut programs = Programs::load().unwrap();
    let service = Service {
        id: 1,
        frontends: vec![(address("192.0.2.1:30080"), flags::NODE_PORT | flags::EXTERNAL_LOCAL)],
        protocol: PROTOCOL_TCP,
        endpoints: vec![(address("10.1.1.2:8080"), false)],
        affinity: 0,
    };
    programs.service(&service).unwrap();
    let outside = Packet::tcp("198.51.100.7:40000", "192.0.2.1:30080", SYN).to_mac([0; 6]).build();
    let out = programs.tc("uplink_ingress", &outside, SkbContext::default()).unwrap();
    assert_eq!(out.action, DROP);
    assert_eq!(programs.dropped(DropReason::NoLocalEndpoint).unwrap(), 1);
    let inside = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, "192.0.2.1:30080", SYN).build());
    assert_eq!(View(&inside.packet).tuple(), format!("{CLIENT} → 10.1.1.2:8080"));
}
