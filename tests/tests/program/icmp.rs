//! ICMP errors about translated flows.

use sheave_common::{DropReason, PROTOCOL_TCP};
use sheave_tests::packet::{ACK, Packet, SYN, View};
use sheave_tests::program::{DROP, NEXT, Programs, REDIRECT};

use crate::{cluster_ip, pod, two_services};

const CLIENT: &str = "10.1.0.1:40000";
const VIP: &str = "10.96.0.10:80";
const BACKEND: &str = "10.1.0.2:8080";
const ROUTER: &str = "10.1.0.254";

fn connect(programs: &mut Programs) {
    pod(programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    pod(programs, "pod_egress", &Packet::tcp(BACKEND, CLIENT, SYN | ACK).build());
}

#[test]
fn path_mtu_discovery_works_through_a_service() {
    let mut programs = two_services();
    connect(&mut programs);
    // A router on the way to the backend quotes what it saw: the translated packet.
    let quoted = Packet::tcp(CLIENT, BACKEND, ACK).build();
    let error = Packet::icmp(ROUTER, "10.1.0.1", 3, 4, &quoted).build();
    let out = pod(&mut programs, "pod_egress", &error);
    assert_eq!(out.action, NEXT);
    let view = View(&out.packet);
    assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {VIP}"), "the client finds its own connection in it");
    assert_eq!(view.icmp_mtu(), 1_400);
    view.assert_checksums();
    assert_quoted_header(&view.quoted());
}

#[test]
fn a_backends_own_error_comes_from_the_service() {
    let mut programs = two_services();
    let client = "10.1.0.1:5000";
    pod(&mut programs, "pod_ingress", &Packet::udp(client, "10.96.0.10:53").build());
    let quoted = Packet::udp(client, "10.1.0.2:5353").build();
    let out = pod(&mut programs, "pod_egress", &Packet::icmp("10.1.0.2", "10.1.0.1", 3, 3, &quoted).build());
    let view = View(&out.packet);
    assert_eq!(view.addresses(), ("10.96.0.10".parse().unwrap(), "10.1.0.1".parse().unwrap()));
    assert_eq!(view.quoted_tuple(), format!("{client} → 10.96.0.10:53"));
    view.assert_checksums();
    // The quoted datagram's own checksum is right again as well.
    let sent = Packet::udp(client, "10.96.0.10:53").build();
    assert_eq!(view.quoted()[14..42], sent[14..42]);
}

#[test]
fn a_clients_error_about_a_reply_reaches_the_backend() {
    let mut programs = two_services();
    let client = "10.1.0.1:5000";
    pod(&mut programs, "pod_ingress", &Packet::udp(client, "10.96.0.10:53").build());
    let quoted = Packet::udp("10.96.0.10:53", client).build();
    let out = pod(&mut programs, "pod_ingress", &Packet::icmp("10.1.0.1", "10.96.0.10", 3, 3, &quoted).build());
    assert_eq!(out.action, NEXT);
    let view = View(&out.packet);
    assert_eq!(view.addresses(), ("10.1.0.1".parse().unwrap(), "10.1.0.2".parse().unwrap()));
    assert_eq!(view.quoted_tuple(), format!("10.1.0.2:5353 → {client}"));
    view.assert_checksums();
}

#[test]
fn an_error_about_a_hairpin_comes_back_to_its_pod() {
    let mut programs = Programs::load().unwrap();
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &["10.1.0.1:8080"])).unwrap();
    pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, SYN).build());
    let quoted = Packet::tcp("169.254.42.1:40000", "10.1.0.1:8080", SYN).build();
    let error = Packet::icmp("10.1.0.1", "169.254.42.1", 3, 3, &quoted).build();
    let out = pod(&mut programs, "pod_ingress", &error);
    assert_eq!(out.action, REDIRECT);
    let view = View(&out.packet);
    assert_eq!(view.addresses(), ("10.96.0.10".parse().unwrap(), "10.1.0.1".parse().unwrap()));
    assert_eq!(view.quoted_tuple(), format!("{CLIENT} → {VIP}"));
    view.assert_checksums();
}

#[test]
fn a_redirect_about_a_translated_flow_is_dropped() {
    let mut programs = two_services();
    connect(&mut programs);
    let quoted = Packet::tcp(CLIENT, BACKEND, ACK).build();
    let out = pod(&mut programs, "pod_egress", &Packet::icmp(ROUTER, "10.1.0.1", 5, 1, &quoted).build());
    assert_eq!(out.action, DROP);
    assert_eq!(programs.dropped(DropReason::IcmpRedirect).unwrap(), 1);
}

/// An error in a padded frame would arrive with a wrong checksum, and path-MTU discovery fail.
#[test]
fn a_frames_padding_is_no_part_of_an_error() {
    let mut programs = two_services();
    connect(&mut programs);
    let quoted = Packet::tcp(CLIENT, BACKEND, ACK).build();
    let mut frame = Packet::icmp(ROUTER, "10.1.0.1", 3, 4, &quoted).build().to_vec();
    frame.extend_from_slice(&[0xa5; 32]);
    let out = pod(&mut programs, "pod_egress", &frame);
    View(&out.packet).assert_checksums();
    assert_eq!(out.packet[out.packet.len() - 32..], [0xa5; 32]);
}

#[test]
fn errors_about_other_peoples_packets_pass_untouched() {
    let mut programs = two_services();
    connect(&mut programs);
    let quoted = Packet::tcp("10.1.0.1:40001", BACKEND, ACK).build();
    for kind in [3, 5, 11, 12] {
        let error = Packet::icmp(ROUTER, "10.1.0.1", kind, 0, &quoted).build();
        let out = pod(&mut programs, "pod_egress", &error);
        assert_eq!((out.action, out.packet), (NEXT, error.to_vec()));
    }
}

/// The quoted packet's header checksum is right.
fn assert_quoted_header(quoted: &[u8]) {
    let header = &quoted[14..34];
    let mut sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    assert_eq!(sum, 0xffff);
}
