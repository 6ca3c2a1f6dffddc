//! Connections from outside to a nodePort, on a node with real routes: local backends keep the client's address, remote
//! ones are SNATed and redirected both ways, by tc and by XDP.

use std::net::{IpAddr, Ipv4Addr};

use sheave::dataplane::Features;
use sheave_common::frontend::flags;
use sheave_common::interface::{Interface, flags as interface_flags};
use sheave_common::{Address as _, DropReason, Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::netns::Namespace;
use sheave_tests::packet::{ACK, PSH, Packet, SYN, View};
use sheave_tests::program::{DROP, NEXT, Programs, REDIRECT, Service, SkbContext, XDP_PASS, XDP_TX};

use crate::address;

const CLIENT: &str = "198.51.100.7:40000";
const NODE: &str = "192.0.2.1:30080";
const LOCAL: &str = "10.1.0.2:8080";
const REMOTE: &str = "10.1.1.2:8080";

/// MAC address of the uplink's only neighbour: the router to everything.
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Runs a test in a node's namespace: an uplink with a route to the client and to the other node's pods, whose next hop is
/// known, and the programs with one TCP and one UDP service on nodePort 30080.
pub(crate) fn on_a_node(endpoint: &str, local: bool, test: impl FnOnce(&mut Programs, u32) + Send) {
    let node = Namespace::new("node").expect("namespace");
    node.ip(&[
        "link add up0 address 02:00:00:00:00:02 type veth peer name peer0",
        "link set up0 up",
        "link set peer0 up",
        "address add 192.0.2.1/24 dev up0",
        "neighbour add 192.0.2.254 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
        "route add default via 192.0.2.254",
    ])
    .expect("uplink");
    node.sysctl("ipv4/ip_forward", "1").expect("forwarding");
    node.run(|| {
        let uplink = index("up0");
        let mut programs = Programs::load().expect("programs load");
        for (id, protocol) in [(1, PROTOCOL_TCP), (2, PROTOCOL_UDP)] {
            programs
                .service(&Service {
                    id,
                    frontends: vec![(address(NODE), flags::NODE_PORT)],
                    protocol,
                    endpoints: vec![(address(endpoint), local)],
                    affinity: 0,
                })
                .expect("service");
        }
        let interface = Interface {
            source4: Ipv4Address::from(Ipv4Addr::new(192, 0, 2, 1)),
            source6: Ipv6Address::UNSPECIFIED,
            flags: interface_flags::UPLINK | interface_flags::XDP,
        };
        programs.hash::<u32, Interface>(names::INTERFACES).unwrap().insert(uplink, interface, 0).unwrap();
        test(&mut programs, uplink);
    });
}

fn index(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: the name is a C string.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

pub(crate) fn uplink(
    programs: &mut Programs,
    program: &str,
    packet: &[u8],
    ifindex: u32,
) -> sheave_tests::program::Outcome {
    programs.tc(program, packet, SkbContext { ifindex, ..SkbContext::default() }).expect("test run")
}

#[test]
fn a_local_backend_sees_the_clients_address() {
    on_a_node(LOCAL, true, |programs, ifindex| {
        let there = uplink(programs, "uplink_ingress", &Packet::tcp(CLIENT, NODE, SYN).build(), ifindex);
        assert_eq!(there.action, NEXT);
        assert_eq!(View(&there.packet).tuple(), format!("{CLIENT} → {LOCAL}"));
        let back = uplink(programs, "uplink_egress", &Packet::tcp(LOCAL, CLIENT, SYN | ACK).build(), ifindex);
        assert_eq!(back.action, NEXT);
        assert_eq!(View(&back.packet).tuple(), format!("{NODE} → {CLIENT}"));
        View(&back.packet).assert_checksums();
    });
}

#[test]
fn a_remote_backend_is_reached_through_this_node_and_back() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        for (first, reply, data) in [
            (
                Packet::tcp(CLIENT, NODE, SYN),
                (|to| Packet::tcp(REMOTE, to, SYN | ACK)) as fn(&str) -> Packet,
                Packet::tcp(CLIENT, NODE, PSH | ACK).payload(b"hello"),
            ),
            (Packet::udp(CLIENT, NODE), |to| Packet::udp(REMOTE, to), Packet::udp(CLIENT, NODE).payload(b"again")),
        ] {
            let there = uplink(programs, "uplink_ingress", &first.build(), ifindex);
            assert_eq!(there.action, REDIRECT);
            let view = View(&there.packet);
            assert_eq!(view.destination(), address(REMOTE));
            assert_eq!(view.source().ip(), IpAddr::from([192, 0, 2, 1]), "the egress interface's");
            assert!((10_000..=29_999).contains(&view.source().port()));
            assert_eq!(view.ttl(), 63);
            view.assert_checksums();
            let snat = view.source().to_string();
            let back = uplink(programs, "uplink_ingress", &reply(&snat).build(), ifindex);
            assert_eq!(back.action, REDIRECT);
            assert_eq!(View(&back.packet).tuple(), format!("{NODE} → {CLIENT}"));
            assert_eq!(View(&back.packet).ttl(), 63);
            View(&back.packet).assert_checksums();
            let more = uplink(programs, "uplink_ingress", &data.build(), ifindex);
            assert_eq!(View(&more.packet).tuple(), format!("{snat} → {REMOTE}"), "the flow keeps its port");
            // What was redirected meets the egress hook, which must not turn it again.
            for packet in [&there.packet, &back.packet] {
                let out = uplink(programs, "uplink_egress", packet, ifindex);
                assert_eq!((out.action, &out.packet), (NEXT, packet));
            }
        }
    });
}

#[test]
fn xdp_answers_flows_to_remote_backends_by_itself() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        let there = programs.xdp(&Packet::tcp(CLIENT, NODE, SYN).build(), ifindex).unwrap();
        assert_eq!(there.action, XDP_TX);
        let view = View(&there.packet);
        assert_eq!((view.destination(), view.ttl()), (address(REMOTE), 63));
        assert_eq!(view.macs(), (ROUTER_MAC, sheave_tests::packet::NODE_MAC));
        view.assert_checksums();
        let snat = view.source().to_string();
        let back = programs.xdp(&Packet::tcp(REMOTE, &snat, SYN | ACK).build(), ifindex).unwrap();
        assert_eq!(back.action, XDP_TX);
        assert_eq!(View(&back.packet).tuple(), format!("{NODE} → {CLIENT}"));
        View(&back.packet).assert_checksums();
        // tc finds the same flow: the two never disagree.
        let data = uplink(programs, "uplink_ingress", &Packet::tcp(CLIENT, NODE, ACK).build(), ifindex);
        assert_eq!(View(&data.packet).tuple(), format!("{snat} → {REMOTE}"));
    });
}

/// On a jumbo-frame uplink only small packets would get through.
#[test]
fn xdp_answers_a_jumbo_frame_in_several_buffers() {
    if !Features::detect().xdp_frags {
        println!("left out: this kernel's XDP frames are one buffer (before 5.18)");
        return;
    }
    on_a_node(REMOTE, false, |programs, ifindex| {
        let status = std::process::Command::new("ip").args(["link", "set", "up0", "mtu", "9000"]).status().unwrap();
        assert!(status.success());
        programs.xdp(&Packet::tcp(CLIENT, NODE, SYN).build(), ifindex).unwrap();
        let jumbo = Packet::tcp(CLIENT, NODE, PSH | ACK).payload(&[7; 8_900]).build();
        let out = programs.xdp(&jumbo, ifindex).unwrap();
        assert_eq!((out.action, out.packet.len()), (XDP_TX, jumbo.len()));
        let view = View(&out.packet);
        assert_eq!((view.destination(), view.ttl()), (address(REMOTE), 63));
        view.assert_checksums();
        // Too big for the road is still too big.
        let bigger = Packet::tcp(CLIENT, NODE, PSH | ACK).payload(&[7; 9_000]).build();
        let up = programs.xdp(&bigger, ifindex).unwrap();
        assert_eq!((up.action, up.packet == bigger.to_vec()), (XDP_PASS, true));
    });
}

#[test]
fn xdp_leaves_everything_else_to_tc_untouched() {
    on_a_node(LOCAL, true, |programs, ifindex| {
        let syn = Packet::tcp(CLIENT, NODE, SYN).build();
        let frames = [
            syn.clone(),
            Packet::tcp(CLIENT, NODE, SYN).options(&[1, 1, 1, 0]).build(),
            Packet::tcp(CLIENT, NODE, ACK).numbers(1, 2).build(),
            Packet::udp(CLIENT, NODE).fragment(0x2000).build(),
            Packet::udp(CLIENT, "192.0.2.1:53").build(),
            Packet::icmp("198.51.100.1", "192.0.2.1", 3, 4, &syn).build(),
        ];
        for frame in frames {
            let out = programs.xdp(&frame, ifindex).unwrap();
            assert_eq!((out.action, out.packet), (XDP_PASS, frame.to_vec()));
        }
        // The SYN's flow was decided there, and tc carries it out.
        assert_eq!(programs.flows(names::HALF_OPEN4).unwrap().len(), 2);
        assert_eq!(programs.counter(1).unwrap().connections, 1);
        let there = uplink(programs, "uplink_ingress", &syn, ifindex);
        assert_eq!(View(&there.packet).tuple(), format!("{CLIENT} → {LOCAL}"));
        assert_eq!(programs.counter(1).unwrap().connections, 1);
    });
}

/// On a node whose uplink listens to everything (tcpdump), other nodes' connections to a shared address would be doubled.
#[test]
fn frames_for_another_host_are_left_alone() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        let packets = [Packet::tcp(CLIENT, NODE, SYN), Packet::tcp(CLIENT, NODE, ACK), Packet::udp(CLIENT, NODE)];
        for packet in packets.map(|packet| packet.to_mac([2, 0, 0, 0, 0, 0x77]).build()) {
            let out = uplink(programs, "uplink_ingress", &packet, ifindex);
            assert_eq!((out.action, out.packet), (NEXT, packet.to_vec()));
        }
        for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
            let packet = Packet::udp(CLIENT, NODE).to_mac(mac).build();
            let out = programs.xdp(&packet, ifindex).unwrap();
            assert_eq!((out.action, out.packet), (XDP_PASS, packet.to_vec()));
            let out = uplink(programs, "uplink_ingress", &packet, ifindex);
            assert_eq!((out.action, out.packet), (NEXT, packet.to_vec()));
        }
        assert!(programs.flows(names::CONNTRACK4).unwrap().is_empty());
        assert!(programs.flows(names::HALF_OPEN4).unwrap().is_empty());
    });
}

/// With gso_ipv4_max_size above 64 KiB, bulk transfers through a nodePort would stop.
#[test]
fn a_gso_packet_that_is_too_long_for_its_length_field_is_translated() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        uplink(programs, "uplink_ingress", &Packet::tcp(CLIENT, NODE, SYN).build(), ifindex);
        let mut big = Packet::tcp(CLIENT, NODE, PSH | ACK).payload(&[7; 1_400]).build().to_vec();
        big[16..18].fill(0);
        let out = programs.tc("uplink_ingress", &big, SkbContext { ifindex, gso_size: 1_000, gso_segs: 2 }).unwrap();
        assert_eq!(out.action, REDIRECT);
        assert_eq!(out.packet[30..34], [10, 1, 1, 2], "sent to the backend");
        assert_eq!(programs.dropped(DropReason::Malformed).unwrap(), 0);
        let plain = uplink(programs, "uplink_ingress", &big, ifindex);
        assert_eq!((plain.action, plain.packet), (NEXT, big), "without GSO it is nonsense");
    });
}

#[test]
fn a_packet_whose_ttl_runs_out_here_is_answered() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        let packet = Packet::tcp(CLIENT, NODE, SYN).ttl(1).build();
        let up = programs.xdp(&packet, ifindex).unwrap();
        assert_eq!((up.action, up.packet), (XDP_PASS, packet.to_vec()));
        let answer = uplink(programs, "uplink_ingress", &packet, ifindex);
        assert_eq!(answer.action, REDIRECT);
        let view = View(&answer.packet);
        assert_eq!(view.icmp(), (11, 0));
        assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {NODE}"));
        view.assert_checksums();
        assert_eq!(programs.dropped(DropReason::TtlExceeded).unwrap(), 1);
        assert_eq!(programs.counter(1).unwrap().packets, 0, "it is no traffic of the service");
    });
}

#[test]
fn a_packet_too_big_for_its_route_is_answered_with_the_mtu_and_a_gso_packet_is_judged_by_its_segments() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        let status = std::process::Command::new("ip").args(["link", "set", "up0", "mtu", "1400"]).status().unwrap();
        assert!(status.success());
        uplink(programs, "uplink_ingress", &Packet::tcp(CLIENT, NODE, SYN).build(), ifindex);
        let big = Packet::tcp(CLIENT, NODE, PSH | ACK).payload(&[7; 1_400]).build();
        let answer = uplink(programs, "uplink_ingress", &big, ifindex);
        assert_eq!(answer.action, REDIRECT);
        let view = View(&answer.packet);
        assert_eq!((view.icmp(), view.icmp_mtu()), ((3, 4), 1_400));
        assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {NODE}"));
        view.assert_checksums();
        let gso = |gso_size| SkbContext { ifindex, gso_size, gso_segs: 2 };
        let fits = programs.tc("uplink_ingress", &big, gso(1_000)).unwrap();
        assert_eq!(View(&fits.packet).destination(), address(REMOTE));
        let too_big = programs.tc("uplink_ingress", &big, gso(1_390)).unwrap();
        assert_eq!(View(&too_big.packet).icmp(), (3, 4));
        assert_eq!(programs.dropped(DropReason::TooBig).unwrap(), 2);
    });
}

#[test]
fn errors_about_redirected_flows_find_their_way_both_ways() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        let there = uplink(programs, "uplink_ingress", &Packet::udp(CLIENT, NODE).build(), ifindex);
        let snat = View(&there.packet).source().to_string();
        let from_backend = Packet::icmp("10.1.1.2", "192.0.2.1", 3, 3, &Packet::udp(&snat, REMOTE).build()).build();
        let out = uplink(programs, "uplink_ingress", &from_backend, ifindex);
        assert_eq!(out.action, REDIRECT);
        let view = View(&out.packet);
        assert_eq!(view.addresses(), ("192.0.2.1".parse().unwrap(), "198.51.100.7".parse().unwrap()));
        assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {NODE}"));
        assert_eq!(view.ttl(), 63);
        view.assert_checksums();
        let from_client = Packet::icmp("198.51.100.7", "192.0.2.1", 3, 3, &Packet::udp(NODE, CLIENT).build()).build();
        let out = uplink(programs, "uplink_ingress", &from_client, ifindex);
        assert_eq!(out.action, REDIRECT);
        let view = View(&out.packet);
        assert_eq!(view.addresses(), ("192.0.2.1".parse().unwrap(), "10.1.1.2".parse().unwrap()));
        assert_eq!(view.quoted_tuple(), format!("{REMOTE} → {snat}"));
        view.assert_checksums();
    });
}

#[test]
fn without_a_route_the_packet_is_dropped_with_a_reason() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        let status = std::process::Command::new("ip").args(["route", "delete", "default"]).status().unwrap();
        assert!(status.success());
        let out = uplink(programs, "uplink_ingress", &Packet::tcp(CLIENT, NODE, SYN).build(), ifindex);
        assert_eq!(out.action, DROP);
        assert_eq!(programs.dropped(DropReason::NoRoute).unwrap(), 1);
    });
}

#[test]
fn different_clients_with_one_port_never_share_a_snat_port() {
    on_a_node(REMOTE, false, |programs, ifindex| {
        let mut sources = std::collections::HashSet::new();
        for client in 0..1_000_u32 {
            let from = format!("198.51.{}.{}:40000", 100 + client / 250, 1 + client % 250);
            let there = uplink(programs, "uplink_ingress", &Packet::tcp(&from, NODE, SYN).build(), ifindex);
            assert_eq!(there.action, REDIRECT, "client {client}");
            assert!(sources.insert(View(&there.packet).source()), "client {client}");
        }
    });
}
