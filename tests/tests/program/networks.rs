//! Who may use a load-balancer IP, and service addresses that nobody has.

use sheave_common::frontend::flags;
use sheave_common::{DropReason, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{ACK, Packet, SYN, View};
use sheave_tests::program::{DROP, NEXT, Programs, REDIRECT, Service, SkbContext, XDP_PASS};

use crate::{address, pod};

/// What the tests need of a family.
struct Place {
    family: Family,
    load_balancer: &'static str,
    node_port: &'static str,
    cluster_ip: &'static str,
    backend: &'static str,
    /// A client that may, and the network that says so.
    friend: &'static str,
    friends: (&'static str, u32),
    stranger: &'static str,
    service_cidr: (&'static str, u32),
    unallocated: &'static str,
    beyond: &'static str,
}

const PLACES: [Place; 2] = [
    Place {
        family: Family::V4,
        load_balancer: "203.0.113.5:80",
        node_port: "192.0.2.1:30080",
        cluster_ip: "10.96.0.10:80",
        backend: "10.1.0.2:8080",
        friend: "198.51.100.127:40000",
        friends: ("198.51.100.0", 25),
        stranger: "198.51.100.128:40000",
        service_cidr: ("10.96.0.0", 16),
        unallocated: "10.96.255.255:80",
        beyond: "10.97.0.0:80",
    },
    Place {
        family: Family::V6,
        load_balancer: "[2001:db8:203::5]:80",
        node_port: "[fd00:192::1]:30080",
        cluster_ip: "[fd00:96::10]:80",
        backend: "[fd00:1::2]:8080",
        friend: "[2001:db8:1:7fff::1]:40000",
        friends: ("2001:db8:1::", 49),
        stranger: "[2001:db8:1:8000::1]:40000",
        service_cidr: ("fd00:96::", 112),
        unallocated: "[fd00:96::ffff]:80",
        beyond: "[fd00:96::1:0]:80",
    },
];

/// A TCP and a UDP service port whose load-balancer IP only friends may use; another service's list names everybody.
fn guarded(place: &Place) -> Programs {
    let mut programs = Programs::load().expect("programs load");
    for (id, protocol) in [(1, PROTOCOL_TCP), (2, PROTOCOL_UDP)] {
        let guard = flags::LOAD_BALANCER | flags::SOURCE_RANGES;
        let service = Service {
            id,
            frontends: vec![
                (address(place.load_balancer), guard),
                (address(place.node_port), flags::NODE_PORT),
                (address(place.cluster_ip), flags::CLUSTER_IP),
            ],
            protocol,
            endpoints: vec![(address(place.backend), true)],
            affinity: 0,
        };
        programs.service(&service).expect("service");
        let (network, length) = place.friends;
        programs.source_range(id, network.parse().expect("an address"), length).expect("a range");
    }
    for everybody in ["0.0.0.0", "::"] {
        programs.source_range(3, everybody.parse().expect("an address"), 0).expect("a range");
    }
    programs
}

fn first_packets(from: &str, to: &str) -> [Packet; 2] {
    [Packet::tcp(from, to, SYN), Packet::udp(from, to)]
}

#[test]
fn a_guarded_load_balancer_ip_serves_the_clients_on_its_list_and_drops_the_others() {
    for place in &PLACES {
        for program in ["pod_ingress", "uplink_ingress"] {
            let mut programs = guarded(place);
            for packet in first_packets(place.friend, place.load_balancer) {
                let out =
                    programs.tc(program, &packet.to_mac([0; 6]).build(), SkbContext::default()).expect("test run");
                assert_eq!(out.action, NEXT, "{program}, {}", place.family);
                assert_eq!(View(&out.packet).tuple(), format!("{} → {}", place.friend, place.backend));
            }
            assert_eq!(programs.dropped(DropReason::SourceRange).expect("a counter"), 0);
            for packet in first_packets(place.stranger, place.load_balancer) {
                let out =
                    programs.tc(program, &packet.to_mac([0; 6]).build(), SkbContext::default()).expect("test run");
                assert_eq!(out.action, DROP, "{program}, {}", place.family);
            }
            assert_eq!(programs.dropped(DropReason::SourceRange).expect("a counter"), 2);
        }
    }
}

#[test]
fn node_ports_and_cluster_ips_of_a_guarded_service_serve_everybody() {
    for place in &PLACES {
        for to in [place.node_port, place.cluster_ip] {
            let mut programs = guarded(place);
            for packet in first_packets(place.stranger, to) {
                let out = pod(&mut programs, "pod_ingress", &packet.build());
                assert_eq!(out.action, NEXT, "{to}");
                assert_eq!(View(&out.packet).tuple(), format!("{} → {}", place.stranger, place.backend));
            }
        }
    }
}

#[test]
fn a_list_with_nobody_on_it_for_a_family_serves_nobody_of_that_family() {
    let [v4, v6] = &PLACES;
    for (place, other) in [(v4, v6), (v6, v4)] {
        let mut programs = Programs::load().expect("programs load");
        let service = Service {
            id: 1,
            frontends: vec![(address(place.load_balancer), flags::LOAD_BALANCER | flags::SOURCE_RANGES)],
            protocol: PROTOCOL_TCP,
            endpoints: vec![(address(place.backend), true)],
            affinity: 0,
        };
        programs.service(&service).expect("service");
        let (network, length) = other.friends;
        programs.source_range(1, network.parse().expect("an address"), length).expect("a range");
        let out = pod(&mut programs, "pod_ingress", &Packet::tcp(place.friend, place.load_balancer, SYN).build());
        assert_eq!(out.action, DROP, "{}", place.family);
    }
}

#[test]
fn a_connection_that_was_let_in_goes_on_when_its_client_is_taken_off_the_list() {
    let place = &PLACES[0];
    let mut programs = guarded(place);
    let packet = |flags| Packet::tcp(place.friend, place.load_balancer, flags).build();
    assert_eq!(pod(&mut programs, "pod_ingress", &packet(SYN)).action, NEXT);
    let reply = Packet::tcp(place.backend, place.friend, SYN | ACK).build();
    assert_eq!(pod(&mut programs, "pod_egress", &reply).action, NEXT);
    assert_eq!(pod(&mut programs, "pod_ingress", &packet(ACK)).action, NEXT);
    programs.clear_source_ranges().expect("cleared");
    let out = pod(&mut programs, "pod_ingress", &packet(ACK));
    assert_eq!((out.action, View(&out.packet).tuple()), (NEXT, format!("{} → {}", place.friend, place.backend)));
    let again = Packet::tcp(&place.friend.replace("40000", "40001"), place.load_balancer, SYN).build();
    assert_eq!(pod(&mut programs, "pod_ingress", &again).action, DROP);
}

/// XDP has no verdict of its own here: what it sends up meets tc.
#[test]
fn xdp_leaves_strangers_and_unallocated_addresses_to_tc() {
    for place in &PLACES {
        let mut programs = guarded(place);
        let (network, length) = place.service_cidr;
        programs.service_cidr(network.parse().expect("an address"), length).expect("a ServiceCIDR");
        for to in [place.load_balancer, place.unallocated] {
            for packet in first_packets(place.stranger, to) {
                let packet = packet.to_mac([0; 6]).build();
                let out = programs.xdp(&packet, 1).expect("test run");
                assert_eq!((out.action, out.packet), (XDP_PASS, packet.to_vec()), "{to}");
                let out = programs.tc("uplink_ingress", &packet, SkbContext::default()).expect("test run");
                assert_eq!(out.action, DROP, "{to}");
            }
        }
        assert_eq!(programs.dropped(DropReason::SourceRange).expect("a counter"), 2);
        assert_eq!(programs.dropped(DropReason::Unallocated).expect("a counter"), 2);
    }
}

#[test]
fn an_unallocated_service_address_is_dropped_and_a_port_that_a_cluster_ip_lacks_is_still_refused() {
    for place in &PLACES {
        let mut programs = guarded(place);
        for packet in first_packets(place.stranger, place.unallocated) {
            assert_eq!(pod(&mut programs, "pod_ingress", &packet.build()).action, NEXT, "nobody says where they lie");
        }
        let (network, length) = place.service_cidr;
        programs.service_cidr(network.parse().expect("an address"), length).expect("a ServiceCIDR");
        for program in ["pod_ingress", "uplink_ingress"] {
            for packet in first_packets(place.stranger, place.unallocated) {
                let out =
                    programs.tc(program, &packet.to_mac([0; 6]).build(), SkbContext::default()).expect("test run");
                assert_eq!(out.action, DROP, "{program}, {}", place.family);
            }
        }
        assert_eq!(programs.dropped(DropReason::Unallocated).expect("a counter"), 4);
        for packet in first_packets(place.stranger, place.beyond) {
            assert_eq!(pod(&mut programs, "pod_ingress", &packet.build()).action, NEXT, "beyond the ServiceCIDR");
        }
        let other_port = place.cluster_ip.replace(":80", ":81");
        for packet in first_packets(place.stranger, &other_port) {
            assert_eq!(pod(&mut programs, "pod_ingress", &packet.build()).action, REDIRECT, "{other_port}");
        }
        assert_eq!(programs.dropped(DropReason::UnknownPort).expect("a counter"), 2);
        assert!(programs.flows(names::HALF_OPEN4).expect("a dump").is_empty());
        assert!(programs.flows6(names::HALF_OPEN6).expect("a dump").is_empty());
    }
}
