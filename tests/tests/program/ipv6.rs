//! What IPv6 has and IPv4 does not: extension headers, neighbour discovery, checksums that are never absent.

use std::net::Ipv6Addr;

use sheave_common::flow::state;
use sheave_common::{DropReason, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::packet::{
    ACK, DESTINATION_OPTIONS, HOP_BY_HOP, NO_NEXT_HEADER, PSH, Packet, ROUTING, RST, SYN, View,
};
use sheave_tests::program::{DROP, NEXT, Programs, REDIRECT};

use crate::{cluster_ip, pod};

const CLIENT: &str = "[fd00:1::1]:40000";
const VIP: &str = "[fd00:96::10]:80";
const BACKEND: &str = "[fd00:1::2]:8080";
const DNS: &str = "[fd00:96::10]:53";
const DNS_BACKEND: &str = "[fd00:1::2]:5353";
/// A pod that is no frontend.
const OTHER: &str = "[fd00:1::9]:80";
const ROUTER: &str = "fd00:1::fe";
/// Options that say nothing: one PadN.
const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];

/// TCP and UDP behind one ClusterIP, one endpoint each.
fn two_services() -> Programs {
    let mut programs = Programs::load().expect("programs load");
    for (id, protocol, frontend, endpoint) in [(1, PROTOCOL_TCP, VIP, BACKEND), (2, PROTOCOL_UDP, DNS, DNS_BACKEND)] {
        programs.service(&cluster_ip(id, protocol, frontend, &[endpoint])).expect("service");
    }
    programs
}

/// The packet comes out as it went in, with this verdict.
fn assert_untouched(programs: &mut Programs, program: &str, packet: &[u8], action: i32, what: &str) {
    let out = pod(programs, program, packet);
    assert_eq!(out.action, action, "{program}: {what}");
    assert_eq!(out.packet, packet, "{program}: {what}");
}

fn no_flows(programs: &mut Programs) {
    for map in [names::HALF_OPEN6, names::CONNTRACK6] {
        assert!(programs.flows6(map).unwrap().is_empty(), "{map} has flows");
    }
}

#[test]
fn a_connection_reaches_its_backend_and_the_client_sees_only_the_service() {
    let mut programs = two_services();
    for (there, back) in [
        (Packet::tcp(CLIENT, VIP, SYN), Packet::tcp(BACKEND, CLIENT, SYN | ACK)),
        (Packet::tcp(CLIENT, VIP, ACK), Packet::tcp(BACKEND, CLIENT, PSH | ACK).payload(b"hello")),
        (Packet::udp(CLIENT, DNS), Packet::udp(DNS_BACKEND, CLIENT)),
        (Packet::udp(CLIENT, DNS), Packet::udp(DNS_BACKEND, CLIENT)),
    ] {
        let (frontend, backend) = match View(&there.build()).protocol() {
            PROTOCOL_TCP => (VIP, BACKEND),
            _ => (DNS, DNS_BACKEND),
        };
        let there = pod(&mut programs, "pod_ingress", &there.build());
        assert_eq!(there.action, NEXT);
        let view = View(&there.packet);
        assert_eq!((view.tuple(), view.ttl()), (format!("{CLIENT} → {backend}"), 64));
        view.assert_checksums();
        let back = pod(&mut programs, "pod_egress", &back.build());
        assert_eq!(back.action, NEXT);
        assert_eq!(View(&back.packet).tuple(), format!("{frontend} → {CLIENT}"));
        View(&back.packet).assert_checksums();
    }
    let flows = programs.flows6(names::CONNTRACK6).unwrap();
    assert_eq!(flows.len(), 4);
    for (key, flow) in &flows {
        assert_eq!(flow.state, state::ESTABLISHED);
        assert_eq!(flows[&flow.sibling_key(key)], flow.sibling(key), "each half names the other");
    }
    assert!(programs.flows(names::CONNTRACK4).unwrap().is_empty());
}

#[test]
fn a_pod_that_is_its_own_backend_gets_its_packets_back() {
    let mut programs = Programs::load().unwrap();
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &["[fd00:1::1]:8080"])).unwrap();
    let there = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    assert_eq!(there.action, REDIRECT);
    let view = View(&there.packet);
    assert_eq!(view.tuple(), "[fd53:6865:6176:6500::1]:40000 → [fd00:1::1]:8080");
    view.assert_checksums();
    let reply = Packet::tcp("[fd00:1::1]:8080", "[fd53:6865:6176:6500::1]:40000", SYN | ACK).build();
    let back = pod(&mut programs, "pod_ingress", &reply);
    assert_eq!((back.action, View(&back.packet).tuple()), (REDIRECT, format!("{VIP} → {CLIENT}")));
    View(&back.packet).assert_checksums();
}

/// A datagram whose checksum happens to come out as 0 would be thrown away: over IPv6, 0 means that there is none.
#[test]
fn a_checksum_that_comes_out_as_zero_is_sent_as_all_ones() {
    let mut programs = two_services();
    // Two bytes of payload make up whatever is missing.
    let translated = |payload: &[u8]| Packet::udp(CLIENT, DNS_BACKEND).payload(payload).build();
    let missing = View(&translated(&[0, 0])).udp_checksum();
    let payload = missing.to_be_bytes();
    assert_eq!(View(&translated(&payload)).udp_checksum(), 0xffff);
    let out = pod(&mut programs, "pod_ingress", &Packet::udp(CLIENT, DNS).payload(&payload).build());
    assert_eq!(View(&out.packet).tuple(), format!("{CLIENT} → {DNS_BACKEND}"));
    assert_eq!(View(&out.packet).udp_checksum(), 0xffff);
    let reply = |payload: &[u8]| Packet::udp(DNS, CLIENT).payload(payload).build();
    let payload = View(&reply(&[0, 0])).udp_checksum().to_be_bytes();
    let back = pod(&mut programs, "pod_egress", &Packet::udp(DNS_BACKEND, CLIENT).payload(&payload).build());
    assert_eq!(View(&back.packet).tuple(), format!("{DNS} → {CLIENT}"));
    assert_eq!(View(&back.packet).udp_checksum(), 0xffff);
}

#[test]
fn extension_headers_are_walked_and_left_as_they_are() {
    // A routing header that has been all the way: type 2, no segments left, the home address.
    let routed: [u8; 22] = [2, 0, 0, 0, 0, 0, 0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
    let extended = |packet: Packet, kinds: &[u8]| {
        kinds.iter().fold(packet, |packet, kind| match *kind {
            ROUTING => packet.extension(ROUTING, &routed),
            kind => packet.extension(kind, &PADDING),
        })
    };
    let mut programs = two_services();
    for kinds in [
        &[HOP_BY_HOP][..],
        &[DESTINATION_OPTIONS],
        &[ROUTING],
        &[HOP_BY_HOP, DESTINATION_OPTIONS, ROUTING, DESTINATION_OPTIONS],
    ] {
        for (packet, backend) in [
            (Packet::tcp(CLIENT, VIP, SYN), BACKEND),
            (Packet::udp(CLIENT, DNS), DNS_BACKEND),
            (Packet::udp(CLIENT, DNS).payload(&[b'x'; 1_200]), DNS_BACKEND),
        ] {
            let packet = extended(packet, kinds).build();
            let out = pod(&mut programs, "pod_ingress", &packet);
            assert_eq!((out.action, View(&out.packet).tuple()), (NEXT, format!("{CLIENT} → {backend}")), "{kinds:?}");
            View(&out.packet).assert_checksums();
            let headers = 14 + 40..out.packet.len() - View(&packet).transport_length();
            assert_eq!(out.packet[headers.clone()], packet[headers], "{kinds:?}: the headers changed");
        }
        let reply = extended(Packet::udp(DNS_BACKEND, CLIENT), kinds).build();
        let back = pod(&mut programs, "pod_egress", &reply);
        assert_eq!(View(&back.packet).tuple(), format!("{DNS} → {CLIENT}"), "{kinds:?}");
        View(&back.packet).assert_checksums();
    }
}

/// Packets of headers without end would cost every packet's time, and pass to a Service's address untranslated.
#[test]
fn a_packet_with_too_many_headers_is_no_services() {
    let mut programs = two_services();
    for (to, action) in [(VIP, DROP), (OTHER, NEXT)] {
        let packet =
            (0..20).fold(Packet::tcp(CLIENT, to, SYN), |packet, _| packet.extension(DESTINATION_OPTIONS, &PADDING));
        assert_untouched(&mut programs, "pod_ingress", &packet.build(), action, to);
        // Nothing behind the headers at all.
        let bare = Packet::icmp_message("fd00:1::1", to.trim_matches(['[']).split(']').next().unwrap(), 1, 0, &[]);
        let mut bare = bare.extension(DESTINATION_OPTIONS, &PADDING).build().to_vec();
        bare[14 + 40] = NO_NEXT_HEADER;
        assert_untouched(&mut programs, "pod_ingress", &bare, action, "no next header");
    }
    no_flows(&mut programs);
}

/// Damaged packets would be "translated" at the wrong place, or leave for a ClusterIP by the default route.
#[test]
fn lengths_that_contradict_the_packet_are_counted_and_never_translated() {
    let mut programs = two_services();
    let mut malformed = 0;
    for (to, action) in [(VIP, DROP), (OTHER, NEXT)] {
        let whole = Packet::tcp(CLIENT, to, SYN);
        let cut = |packet: &Packet, length: usize| {
            let mut frame = packet.clone().claiming_length(u16::try_from(length).unwrap()).build().to_vec();
            frame.truncate(14 + 40 + length);
            frame
        };
        let options = whole.clone().extension(DESTINATION_OPTIONS, &PADDING);
        // The stack itself drops what says that it is longer than its frame.
        let long = whole.clone().claiming_length(1_000).build();
        assert_untouched(&mut programs, "pod_ingress", &long, NEXT, "longer than the frame");
        malformed += 1;
        for (what, packet) in [
            ("half a TCP header", cut(&whole, 12)),
            ("half an extension header", cut(&options, 4)),
            ("an extension header alone", cut(&options, 8)),
            (
                "an extension header longer than the packet",
                whole.clone().extension_claiming(DESTINATION_OPTIONS, 200, &PADDING).build().to_vec(),
            ),
        ] {
            assert_untouched(&mut programs, "pod_ingress", &packet, action, &format!("{what}, to {to}"));
            malformed += 1;
            assert_eq!(programs.dropped(DropReason::Malformed).unwrap(), malformed, "{what}, to {to}");
        }
    }
    no_flows(&mut programs);
}

/// Links would go dead.
#[test]
fn neighbour_discovery_is_not_touched() {
    let mut programs = two_services();
    let (client, vip) = ("fd00:1::1", "fd00:96::10");
    let target = |address: &str| -> Vec<u8> {
        let address: Ipv6Addr = address.parse().unwrap();
        [&[0; 4][..], &address.octets(), &[1, 1, 2, 0, 0, 0, 0, 1]].concat()
    };
    // Solicitations and advertisements of routers and neighbours, listener reports; to one host or to a group, about a
    // Service's address or another one.
    for kind in [130, 131, 132, 133, 134, 135, 136, 143] {
        for (from, to) in [(client, ROUTER), (ROUTER, client), (client, vip), ("fe80::1", "ff02::1:ff00:10")] {
            for about in [vip, client] {
                let packet = Packet::icmp_message(from, to, kind, 0, &target(about)).ttl(255).build();
                for program in ["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress"] {
                    let what = format!("type {kind} from {from} to {to} about {about}");
                    assert_untouched(&mut programs, program, &packet, NEXT, &what);
                }
            }
        }
    }
    no_flows(&mut programs);
}

#[test]
fn path_mtu_discovery_works_through_a_service() {
    let mut programs = two_services();
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    pod(&mut programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, SYN | ACK).build());
    // A router on the way to the backend quotes what it saw: the translated packet, as much of it as fits.
    let quoted = Packet::tcp(CLIENT, BACKEND, ACK).payload(&[b'x'; 1_400]).build();
    let sent = Packet::tcp(CLIENT, VIP, ACK).payload(&[b'x'; 1_400]).build();
    let out = pod(&mut programs, "pod_egress", &Packet::icmp(ROUTER, "fd00:1::1", 2, 0, &quoted).build());
    assert_eq!(out.action, NEXT);
    let view = View(&out.packet);
    assert_eq!((view.protocol(), view.icmp(), view.icmp_mtu()), (PROTOCOL_ICMPV6, (2, 0), 1_400));
    assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {VIP}"), "the client finds its own connection in it");
    view.assert_checksums();
    let quoted = view.quoted();
    assert_eq!(quoted[14..], sent[14..quoted.len()], "the quoted packet is the one that was sent");
}

#[test]
fn errors_of_either_end_name_the_service() {
    let mut programs = two_services();
    pod(&mut programs, "pod_ingress", &Packet::udp(CLIENT, DNS).build());
    for kind in [1, 3, 4] {
        let quoted = Packet::udp(CLIENT, DNS_BACKEND).build();
        let out = pod(&mut programs, "pod_egress", &Packet::icmp("fd00:1::2", "fd00:1::1", kind, 0, &quoted).build());
        let view = View(&out.packet);
        assert_eq!(view.addresses(), ("fd00:96::10".parse().unwrap(), "fd00:1::1".parse().unwrap()), "type {kind}");
        assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {DNS}"));
        view.assert_checksums();
        assert_eq!(view.quoted()[14..], Packet::udp(CLIENT, DNS).build()[14..]);

        let quoted = Packet::udp(DNS, CLIENT).build();
        let out =
            pod(&mut programs, "pod_ingress", &Packet::icmp("fd00:1::1", "fd00:96::10", kind, 0, &quoted).build());
        let view = View(&out.packet);
        assert_eq!(out.action, NEXT, "type {kind}");
        assert_eq!(view.addresses(), ("fd00:1::1".parse().unwrap(), "fd00:1::2".parse().unwrap()));
        assert_eq!(view.quoted_tuple(), format!("{DNS_BACKEND} → {CLIENT}"));
        view.assert_checksums();
    }
}

#[test]
fn errors_about_other_peoples_packets_pass_untouched() {
    let mut programs = two_services();
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    let quoted = Packet::tcp("[fd00:1::1]:40001", BACKEND, ACK).build();
    for kind in [1, 2, 3, 4, 137] {
        let error = Packet::icmp(ROUTER, "fd00:1::1", kind, 0, &quoted).build();
        assert_untouched(&mut programs, "pod_egress", &error, NEXT, &format!("type {kind}"));
    }
}

#[test]
fn a_service_without_endpoints_refuses_at_once_in_its_own_name() {
    let mut programs = Programs::load().unwrap();
    for (id, protocol, frontend) in [(1, PROTOCOL_TCP, VIP), (2, PROTOCOL_UDP, DNS)] {
        programs.service(&cluster_ip(id, protocol, frontend, &[])).unwrap();
    }
    // TCP: a local socket that is busy ignores ICMPv6 errors, so a reset; for a port that isn't there as well.
    for to in [VIP, "[fd00:96::10]:81"] {
        let out = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, to, SYN).numbers(77, 0).build());
        assert_eq!(out.action, REDIRECT);
        let view = View(&out.packet);
        assert_eq!((view.tuple(), view.tcp_flags()), (format!("{to} → {CLIENT}"), RST | ACK));
        assert_eq!(view.numbers(), (0, 78));
        assert!(view.ttl() > 1);
        view.assert_checksums();
    }
    for to in [DNS, "[fd00:96::10]:54"] {
        let sent = Packet::udp(CLIENT, to).payload(&[b'x'; 300]).build();
        let out = pod(&mut programs, "pod_ingress", &sent);
        assert_eq!(out.action, REDIRECT);
        let view = View(&out.packet);
        assert_eq!((view.protocol(), view.icmp()), (PROTOCOL_ICMPV6, (1, 4)));
        assert_eq!(view.addresses(), ("fd00:96::10".parse().unwrap(), "fd00:1::1".parse().unwrap()));
        assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {to}"));
        let quoted = view.quoted();
        assert!(quoted.len() >= 14 + 48, "a header and the ports at least");
        assert_eq!(quoted[14..], sent[14..quoted.len()], "the quoted packet is the one that was sent");
        view.assert_checksums();
        assert_eq!(view.macs(), (View(&sent).macs().1, View(&sent).macs().0));
    }
    no_flows(&mut programs);
}

#[test]
fn packets_from_nobody_or_everybody_are_not_answered() {
    let mut programs = two_services();
    let sources = ["::", "::1", "ff02::1", "ff0e::5"];
    for from in sources {
        let from = format!("[{from}]:40000");
        for packet in [Packet::tcp(&from, VIP, SYN), Packet::tcp(&from, VIP, ACK), Packet::udp(&from, DNS)] {
            assert_eq!(pod(&mut programs, "pod_ingress", &packet.build()).action, DROP, "{packet:?}");
        }
    }
    assert_eq!(programs.dropped(DropReason::MartianSource).unwrap(), 3 * sources.len() as u64);
    no_flows(&mut programs);
}

/// Whatever arrives, what isn't a Service's leaves as it came.
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
    for _ in 0..10_000 {
        let word = random();
        let from = format!("[fd00:1::{:x}]:{}", word & 0xffff, 1 + (word >> 16 & 0x7fff));
        let to = format!("[fd00:2::{:x}]:{}", word >> 32 & 0xff, word >> 40 & 0xffff);
        let mut packet = match word >> 60 & 3 {
            0 => Packet::udp(&from, &to),
            1 => Packet::sctp(&from, &to),
            _ => Packet::tcp(&from, &to, (word >> 56 & 0x3f) as u8),
        };
        for _ in 0..random() % 4 {
            let kind = [HOP_BY_HOP, DESTINATION_OPTIONS, ROUTING][random() as usize % 3];
            packet = packet.extension_claiming(kind, if random() & 7 == 0 { random() as u8 } else { 0 }, &PADDING);
        }
        if random() & 7 == 0 {
            packet = packet.fragment(random() as u16);
        }
        let mut packet = packet.build().to_vec();
        if random() & 1 == 0 {
            // Damage one byte behind the Ethernet header, but leave the destination alone.
            let at = 14 + [random() as usize % 24, 40 + random() as usize % 8][random() as usize & 1];
            packet[at] = random() as u8;
        }
        for program in ["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress"] {
            let out = pod(&mut programs, program, &packet);
            assert_eq!((out.action, &out.packet), (NEXT, &packet), "{program}: {packet:02x?}");
        }
    }
    no_flows(&mut programs);
}
