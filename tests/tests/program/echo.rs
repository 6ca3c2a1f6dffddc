//! Pings of Services' addresses.

use std::net::IpAddr;

use sheave_common::frontend::flags;
use sheave_common::{DropReason, PROTOCOL_TCP};
use sheave_tests::family::Family;
use sheave_tests::netns::Namespace;
use sheave_tests::packet::{ACK, CLIENT_MAC, DESTINATION_OPTIONS, NODE_MAC, Packet, SYN, View};
use sheave_tests::program::{DROP, NEXT, Programs, REDIRECT, SkbContext, XDP_PASS};

use crate::node::{Addresses, at, on_a_node, service, uplink};
use crate::pod;

/// Identifier, sequence number and data of a request, of odd length.
const BODY: &[u8] = b"\x12\x34\x00\x01abcdefghi";

/// A ClusterIP with an endpoint, and an external IP; both are marked as the controller does.
fn programs(of: &Addresses, endpoints: bool) -> Programs {
    let mut programs = Programs::load().expect("programs load");
    let backend = at(of.local, 8_080);
    let endpoints: &[(&str, bool)] = if endpoints { &[(&backend, true)] } else { &[] };
    let mark = if endpoints.is_empty() { 0 } else { flags::HAS_ENDPOINT };
    for (id, address, flag, kind) in [
        (1, of.vip, flags::CLUSTER_IP, flags::WHOLE_ADDRESS),
        (2, of.external, flags::EXTERNAL_IP, flags::SERVICE_ADDRESS),
    ] {
        programs.service(&service(id, PROTOCOL_TCP, (&at(address, 80), flag), endpoints)).expect("service");
        programs.mark(address, kind | mark).expect("mark");
    }
    programs
}

fn request(from: IpAddr, to: IpAddr) -> Packet {
    let kind = if from.is_ipv4() { 8 } else { 128 };
    Packet::icmp_message(&from.to_string(), &to.to_string(), kind, 0, BODY)
}

/// The answer to a request.
fn assert_answer(of: &Addresses, answer: &[u8], from: IpAddr, to: IpAddr) {
    let view = View(answer);
    assert_eq!(view.icmp(), (if of.family == Family::V4 { 0 } else { 129 }, 0));
    assert_eq!(view.addresses(), (from, to));
    assert_eq!(view.icmp_body(), BODY);
    view.assert_checksums();
}

/// People would think that a Service which works is not there.
#[test]
fn a_service_address_with_an_endpoint_answers_pings() {
    for of in &Addresses::BOTH {
        let mut programs = programs(of, true);
        for address in [of.vip, of.external] {
            let out = pod(&mut programs, "pod_ingress", &request(of.pod, address).ttl(1).build());
            assert_eq!(out.action, REDIRECT);
            assert_answer(of, &out.packet, address, of.pod);
            assert_eq!(View(&out.packet).macs(), (CLIENT_MAC, NODE_MAC), "sent back");
            assert_eq!(View(&out.packet).ttl(), 64);
            let outside = request(of.client, address).to_mac([0; 6]).build();
            let out = programs.tc("uplink_ingress", &outside, SkbContext::default()).unwrap();
            assert_eq!(out.action, REDIRECT);
            assert_answer(of, &out.packet, address, of.client);
        }
    }
}

/// All that is left of this answer is zeroes, and the sum that the request's becomes is the wrong one of the two zeroes: the
/// client would throw the answer away.
#[test]
fn an_answer_of_nothing_but_zeroes_has_a_right_checksum() {
    let [of, _] = &Addresses::BOTH;
    let (from, to) = (of.pod.to_string(), of.vip.to_string());
    let zeroes = Packet::icmp_message(&from, &to, 8, 0, &[0; 12]).build();
    let out = pod(&mut programs(of, true), "pod_ingress", &zeroes);
    assert_eq!(out.action, REDIRECT);
    View(&out.packet).assert_checksums();
}

#[test]
fn a_padded_frame_is_answered_with_what_the_request_held() {
    for of in &Addresses::BOTH {
        let mut programs = programs(of, true);
        let mut padded = request(of.pod, of.vip).build().to_vec();
        padded.extend([0xa5; 30]);
        let out = pod(&mut programs, "pod_ingress", &padded);
        assert_eq!(out.action, REDIRECT);
        assert_answer(of, &out.packet, of.vip, of.pod);
    }
}

#[test]
fn options_and_extension_headers_come_back_with_the_answer() {
    let [v4, v6] = &Addresses::BOTH;
    // No operation, three times, and the end.
    let options = |packet: Packet| packet.options(&[1, 1, 1, 0]);
    let extension = |packet: Packet| packet.extension(DESTINATION_OPTIONS, &[1, 4, 0, 0, 0, 0]);
    let requests = [(v4, options(request(v4.pod, v4.vip))), (v6, extension(request(v6.pod, v6.vip)))];
    for (of, sent) in requests {
        let sent = sent.build();
        let out = pod(&mut programs(of, true), "pod_ingress", &sent);
        assert_eq!((out.action, out.packet.len()), (REDIRECT, sent.len()));
        assert_answer(of, &out.packet, of.vip, of.pod);
    }
}

/// A ping through a tunnel without Ethernet headers would be answered with damage where those would be.
///
/// The kernel's test runs take the first fourteen octets for an Ethernet header, whatever the program: destination, source and
/// type. So the device has the address that an IP header begins with, and the client one in which the type stands.
#[test]
fn a_device_without_ethernet_headers_is_answered_as_well() {
    let [v4, v6] = &Addresses::BOTH;
    let requests = [
        // An odd first octet would be a group's address: options make the header's length even.
        (v4, request("8.0.0.1".parse().unwrap(), v4.vip).options(&[1, 1, 1, 0])),
        (v6, request("2001:db8:86dd::1".parse().unwrap(), v6.vip)),
    ];
    for (of, sent) in requests {
        let sent = sent.build();
        let packet = sent[14..].to_vec();
        let tunnel = Namespace::new("tunnel").expect("namespace");
        let [a, b, c, d, e, f] = packet[..6].try_into().expect("six octets");
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        tunnel
            .ip(&[format!("link add tun0 address {mac} type veth peer name peer0"), "link set up tun0".into()])
            .expect("device");
        tunnel.run(|| {
            // SAFETY: the name is a C string.
            let ifindex = unsafe { libc::if_nametoindex(c"tun0".as_ptr()) };
            let mut programs = programs(of, true);
            let out = uplink(&mut programs, "uplink_ingress_l3", &packet, ifindex);
            assert_eq!(out.action, REDIRECT);
            let framed = [&sent[..14], &out.packet].concat();
            assert_answer(of, &framed, of.vip, View(&sent).addresses().0);
        });
    }
}

/// A ping is how people find out that nobody is behind a Service.
#[test]
fn a_service_address_without_an_endpoint_does_not_answer() {
    for of in &Addresses::BOTH {
        let mut programs = programs(of, false);
        let ping = request(of.pod, of.vip).build();
        let out = pod(&mut programs, "pod_ingress", &ping);
        assert_eq!((out.action, &out.packet[..]), (DROP, &ping[..]));
        assert_eq!(programs.dropped(DropReason::UnsupportedProtocol).unwrap(), 1);
        // An external IP is a Service's only where it has ports.
        let ping = request(of.pod, of.external).build();
        let out = pod(&mut programs, "pod_ingress", &ping);
        assert_eq!((out.action, &out.packet[..]), (NEXT, &ping[..]));
    }
}

/// A node's own ICMP, with which everybody looks whether it is alive, must stay its own.
#[test]
fn pings_of_nodes_and_pods_are_left_to_them() {
    for of in &Addresses::BOTH {
        let mut programs = programs(of, true);
        programs
            .service(&service(3, PROTOCOL_TCP, (&at(of.node, 30_080), flags::NODE_PORT), &[(&at(of.local, 80), true)]))
            .unwrap();
        for to in [of.node, of.local] {
            let ping = request(of.pod, to).build();
            for program in ["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress"] {
                let out = pod(&mut programs, program, &ping);
                assert_eq!((out.action, &out.packet[..]), (NEXT, &ping[..]), "{program}");
            }
        }
    }
}

#[test]
fn only_single_hosts_are_answered_and_only_at_ingress() {
    for of in &Addresses::BOTH {
        let mut programs = programs(of, true);
        let nobody: [IpAddr; 3] = match of.family {
            Family::V4 => ["0.0.0.0", "127.0.0.1", "224.0.0.1"].map(|address| address.parse().unwrap()),
            Family::V6 => ["::", "::1", "ff02::1"].map(|address| address.parse().unwrap()),
        };
        for from in nobody {
            assert_eq!(pod(&mut programs, "pod_ingress", &request(from, of.vip).build()).action, DROP, "{from}");
        }
        let ping = request(of.pod, of.vip).build();
        for program in ["pod_egress", "uplink_egress"] {
            let out = pod(&mut programs, program, &ping);
            assert_eq!((out.action, &out.packet[..]), (NEXT, &ping[..]), "{program}");
        }
        // A frame to a group is every node's, and would be answered by all of them.
        let group = request(of.pod, of.vip).to_mac([0xff; 6]).build();
        let out = pod(&mut programs, "pod_ingress", &group);
        assert_eq!((out.action, &out.packet[..]), (NEXT, &group[..]));
    }
}

#[test]
fn xdp_leaves_pings_to_tc() {
    for of in &Addresses::BOTH {
        on_a_node(&[service(1, PROTOCOL_TCP, (&at(of.vip, 80), flags::CLUSTER_IP), &[])], |programs, ifindex| {
            programs.mark(of.vip, flags::WHOLE_ADDRESS | flags::HAS_ENDPOINT).unwrap();
            let ping = request(of.client, of.vip).build();
            let up = programs.xdp(&ping, ifindex).unwrap();
            assert_eq!((up.action, &up.packet[..]), (XDP_PASS, &ping[..]));
            let out = uplink(programs, "uplink_ingress", &ping, ifindex);
            assert_eq!(out.action, REDIRECT);
            assert_answer(of, &out.packet, of.vip, of.client);
        });
    }
}

/// Links would go dead: neighbours of an address that also is a Service's.
#[test]
fn neighbour_and_listener_discovery_is_left_alone_even_to_a_marked_address() {
    let of = &Addresses::BOTH[1];
    let mut programs = programs(of, true);
    for (kind, to) in (130..=136).chain([143]).flat_map(|kind| [(kind, of.vip), (kind, of.external)]) {
        let message = Packet::icmp_message(&of.pod.to_string(), &to.to_string(), kind, 0, &[0; 20]).ttl(255).build();
        for program in ["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress"] {
            let out = pod(&mut programs, program, &message);
            assert_eq!((out.action, &out.packet[..]), (NEXT, &message[..]), "{program}: type {kind} to {to}");
        }
    }
}

/// A router that sees translated packets would send clients to it for another host's address.
#[test]
fn a_redirect_about_a_translated_flow_is_dropped_and_any_other_left_alone() {
    for of in &Addresses::BOTH {
        let mut programs = programs(of, true);
        let (client, frontend, backend) = (at(of.pod, 40_000), at(of.vip, 80), at(of.local, 8_080));
        pod(&mut programs, "pod_ingress", &Packet::tcp(&client, &frontend, SYN).build());
        let about = |quoted: &Packet| {
            let quoted = quoted.build();
            let router = if of.family == Family::V4 { "10.1.0.254" } else { "fe80::1" };
            let to = of.pod.to_string();
            if of.family == Family::V4 {
                return Packet::icmp(router, &to, 5, 1, &quoted).build();
            }
            // Reserved, target and destination, the target's link-layer address, and the redirected header (RFC 4861, 4.5).
            let quoted = &quoted[14..];
            let units = u8::try_from((quoted.len() + 8).div_ceil(8)).expect("units");
            let mut body = vec![0; 36];
            body.extend([2, 1, 2, 0, 0, 0, 0, 9, 4, units, 0, 0, 0, 0, 0, 0]);
            body.extend(quoted);
            body.resize(body.len().next_multiple_of(8) + 4, 0);
            Packet::icmp_message(router, &to, 137, 0, &body).ttl(255).build()
        };
        let ours = about(&Packet::tcp(&client, &backend, ACK));
        assert_eq!(pod(&mut programs, "pod_egress", &ours).action, DROP);
        assert_eq!(programs.dropped(DropReason::IcmpRedirect).unwrap(), 1);
        let other = about(&Packet::tcp(&at(of.pod, 40_001), &backend, ACK));
        let out = pod(&mut programs, "pod_egress", &other);
        assert_eq!((out.action, &out.packet[..]), (NEXT, &other[..]));
    }
}
