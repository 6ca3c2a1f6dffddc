//! Packets that no honest sender sends: each is left alone or dropped and counted, and none makes a flow or is translated
//! where it should not be.

use sheave_common::flow::state;
use sheave_common::frontend::flags;
use sheave_common::{DropReason, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{
    ACK, AUTHENTICATION, DESTINATION_OPTIONS, HOP_BY_HOP, NO_NEXT_HEADER, Packet, ROUTING, RST, SYN, View,
};
use sheave_tests::program::{DROP, NEXT, Programs, REDIRECT, Service, XDP_PASS};

use crate::node::{Addresses, at, on_a_node, service, uplink};

/// A Service of every protocol on an external IP, with a pod of another node behind it.
fn services(of: &Addresses) -> Vec<Service> {
    let (frontend, backend) = (at(of.external, 80), at(of.remote, 8_080));
    let one = |(id, protocol)| service(id, protocol, (&frontend, flags::EXTERNAL_IP), &[(&backend, false)]);
    (1..).zip([PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP]).map(one).collect()
}

/// The first packet of a connection, with nothing behind its transport header.
fn first_packets(from: &str, to: &str) -> [Packet; 3] {
    [Packet::tcp(from, to, SYN), Packet::udp(from, to).payload(b""), Packet::sctp(from, to).payload(&[1, 0, 0, 4])]
}

fn flows(programs: &mut Programs) -> usize {
    [names::CONNTRACK4, names::HALF_OPEN4].map(|map| programs.flows(map).unwrap().len()).into_iter().sum::<usize>()
        + [names::CONNTRACK6, names::HALF_OPEN6]
            .map(|map| programs.flows6(map).unwrap().len())
            .into_iter()
            .sum::<usize>()
}

/// Hooks where packets enter and leave, and what XDP says.
fn assert_untouched(programs: &mut Programs, ifindex: u32, packet: &[u8]) {
    for program in ["uplink_ingress", "pod_ingress", "uplink_egress", "pod_egress"] {
        let out = uplink(programs, program, packet, ifindex);
        assert_eq!((out.action, &out.packet[..]), (NEXT, packet), "{program}: {packet:x?}");
    }
    assert_passed_up(programs, ifindex, packet);
}

fn assert_passed_up(programs: &mut Programs, ifindex: u32, packet: &[u8]) {
    let out = programs.xdp(packet, ifindex).expect("test run");
    assert_eq!((out.action, &out.packet[..]), (XDP_PASS, packet), "XDP: {packet:x?}");
}

/// Dropped where it enters, for this reason.
fn assert_dropped(programs: &mut Programs, ifindex: u32, packet: &[u8], reason: DropReason) {
    let before = programs.dropped(reason).unwrap();
    for program in ["uplink_ingress", "pod_ingress"] {
        let out = uplink(programs, program, packet, ifindex);
        assert_eq!(out.action, DROP, "{program}: {packet:x?}");
    }
    assert_eq!(programs.dropped(reason).unwrap(), before + 2, "{reason:?}: {packet:x?}");
    assert_passed_up(programs, ifindex, packet);
}

/// The length field of a frame's IP header says that it ends here.
fn claim(frame: &mut [u8], family: Family) {
    let length = u16::try_from(frame.len() - 14).unwrap();
    match family {
        Family::V4 => frame[16..18].copy_from_slice(&length.to_be_bytes()),
        Family::V6 => frame[18..20].copy_from_slice(&length.saturating_sub(40).to_be_bytes()),
    }
}

#[test]
fn a_header_cut_anywhere_makes_no_flow() {
    for of in &Addresses::BOTH {
        let network = if of.family == Family::V4 { 34 } else { 54 };
        on_a_node(&services(of), |programs, ifindex| {
            let (client, frontend) = (at(of.client, 40_000), at(of.external, 80));
            for packet in first_packets(&client, &frontend) {
                let frame = packet.build();
                // The kernel runs no program on less than a network header by request; those are cut on the host (fuzz::packets).
                for length in network..frame.len() {
                    // Its header says that there was more: the stack drops it by itself.
                    assert_untouched(programs, ifindex, &frame[..length]);
                    let mut honest = frame[..length].to_vec();
                    claim(&mut honest, of.family);
                    assert_dropped(programs, ifindex, &honest, DropReason::Malformed);
                }
            }
            assert_eq!(flows(programs), 0);
        });
    }
}

#[test]
fn lengths_that_lie_about_the_packet_make_no_flow() {
    for of in &Addresses::BOTH {
        on_a_node(&services(of), |programs, ifindex| {
            let (client, frontend) = (at(of.client, 40_000), at(of.external, 80));
            let frame = Packet::tcp(&client, &frontend, SYN).build();
            let more = u16::try_from(frame.len()).unwrap();
            for claimed in [more, u16::MAX] {
                let packet = Packet::tcp(&client, &frontend, SYN).claiming_length(claimed).build();
                assert_untouched(programs, ifindex, &packet);
            }
            if of.family == Family::V4 {
                for (claimed, words) in [(0, 5), (19, 5), (40, 0), (40, 4), (40, 15)] {
                    let mut packet = Packet::tcp(&client, &frontend, SYN).claiming_length(claimed).build().to_vec();
                    packet[14] = 0x40 | words;
                    assert_untouched(programs, ifindex, &packet);
                }
                let cut = Packet::tcp(&client, &frontend, SYN).claiming_length(39).build();
                assert_dropped(programs, ifindex, &cut, DropReason::Malformed);
            } else {
                for claimed in [0, 1, 19] {
                    let cut = Packet::tcp(&client, &frontend, SYN).claiming_length(claimed).build();
                    assert_dropped(programs, ifindex, &cut, DropReason::Malformed);
                }
            }
            assert_eq!(flows(programs), 0);
            // What only the receiver reads is carried to it as it is: TCP's data offset, UDP's length.
            let transport = if of.family == Family::V4 { 34 } else { 54 };
            for (packet, field) in [(Packet::tcp(&client, &frontend, SYN), 12), (Packet::udp(&client, &frontend), 4)] {
                for value in [0, 0x0f, 0xff] {
                    let mut packet = packet.build().to_vec();
                    packet[transport + field] = value;
                    let out = uplink(programs, "uplink_ingress", &packet, ifindex);
                    assert_eq!((out.action, View(&out.packet).addresses()), (REDIRECT, (of.node, of.remote)));
                    assert_eq!(out.packet[transport + field], value);
                }
            }
        });
    }
}

#[test]
fn chains_of_extension_headers_end_somewhere() {
    let of = &Addresses::BOTH[1];
    on_a_node(&services(of), |programs, ifindex| {
        let (client, frontend) = (at(of.client, 40_000), at(of.external, 80));
        let syn = || Packet::tcp(&client, &frontend, SYN);
        let chain = |number| (0..number).fold(syn(), |packet, _| packet.extension(DESTINATION_OPTIONS, &[0; 6]));
        for (packet, reason) in [
            (chain(7), DropReason::UnsupportedProtocol),
            (chain(40), DropReason::UnsupportedProtocol),
            (syn().extension(AUTHENTICATION, &[0; 14]), DropReason::UnsupportedProtocol),
            (syn().extension(NO_NEXT_HEADER, &[0; 6]), DropReason::UnsupportedProtocol),
            (syn().extension(139, &[0; 6]), DropReason::UnsupportedProtocol),
            (syn().extension_claiming(ROUTING, 255, &[0; 6]), DropReason::Malformed),
            (syn().extension_claiming(HOP_BY_HOP, 4, &[0; 6]), DropReason::Malformed),
            // A jumbogram (RFC 2675) says its length in an option, and 0 in the header.
            (syn().extension(HOP_BY_HOP, &[0xc2, 4, 0, 1, 0, 0]).claiming_length(0), DropReason::Malformed),
        ] {
            // An external IP's other protocols are not the Service's.
            let packet = packet.build();
            if reason == DropReason::Malformed {
                assert_dropped(programs, ifindex, &packet, reason);
            } else {
                assert_untouched(programs, ifindex, &packet);
            }
        }
        assert_eq!(flows(programs), 0);
        let out = uplink(programs, "uplink_ingress", &chain(6).build(), ifindex);
        assert_eq!(View(&out.packet).destination(), crate::address(&at(of.remote, 8_080)));
    });
}

#[test]
fn fragments_can_not_smuggle_ports() {
    for of in &Addresses::BOTH {
        on_a_node(&services(of), |programs, ifindex| {
            let (client, frontend) = (at(of.client, 40_000), at(of.external, 80));
            // The first without all of the header (RFC 1858, 3.1), and one that would overwrite it (3.2).
            for length in [4, 8, 16, 19] {
                let tiny = Packet::tcp(&client, &frontend, SYN).segment(&[0x9c; 20][..length]).fragment(0x2000).build();
                assert_dropped(programs, ifindex, &tiny, DropReason::Malformed);
            }
            let over = Packet::tcp(&client, &frontend, SYN).segment(&[0x11; 64]).fragment(0x0001).build();
            assert_dropped(programs, ifindex, &over, DropReason::Fragment);
            assert_eq!(flows(programs), 0);
            // Behind a first fragment it goes where that went; what it has in the ports' place is data.
            let first = Packet::udp(&client, &frontend).fragment(0x2000).build();
            assert_eq!(uplink(programs, "uplink_ingress", &first, ifindex).action, REDIRECT);
            let over = Packet::udp(&client, &frontend).segment(&[0x11; 64]).fragment(0x0001).build();
            let out = uplink(programs, "uplink_ingress", &over, ifindex);
            assert_eq!((out.action, View(&out.packet).addresses()), (REDIRECT, (of.node, of.remote)));
            assert_eq!(View(&out.packet).transport(), View(&over).transport());
        });
    }
}

#[test]
fn nobody_answers_a_source_that_can_not_be_one() {
    for of in &Addresses::BOTH {
        let martians: &[&str] = match of.family {
            Family::V4 => &["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "239.255.255.255", "255.255.255.255"],
            Family::V6 => &["::", "::1", "ff02::1", "ff0e::5", "fe80::1"],
        };
        on_a_node(&services(of), |programs, ifindex| {
            let frontend = at(of.external, 80);
            for source in martians {
                for packet in first_packets(&at(source.parse().unwrap(), 40_000), &frontend) {
                    assert_dropped(programs, ifindex, &packet.build(), DropReason::MartianSource);
                }
            }
            assert_eq!(flows(programs), 0);
            // LAND: from itself. It goes to the backend like any other, with a hop less to live, and not in circles.
            let land = Packet::tcp(&frontend, &frontend, SYN).build();
            let out = uplink(programs, "uplink_ingress", &land, ifindex);
            assert_eq!((out.action, View(&out.packet).ttl()), (REDIRECT, 63));
            assert_eq!(View(&out.packet).addresses(), (of.node, of.remote));
            assert_eq!(flows(programs), 2);
        });
    }
}

#[test]
fn only_the_peer_of_a_connection_reaches_its_snat_port() {
    for of in &Addresses::BOTH {
        on_a_node(&services(of), |programs, ifindex| {
            let (client, frontend, backend) = (at(of.client, 40_000), at(of.external, 80), at(of.remote, 8_080));
            let out = uplink(programs, "uplink_ingress", &Packet::tcp(&client, &frontend, SYN).build(), ifindex);
            let snat = View(&out.packet).source().to_string();
            let port = View(&out.packet).source().port();
            for (from, to) in [
                (at(of.remote, 8_081), snat.clone()),
                (at(of.local, 8_080), snat.clone()),
                (client.clone(), snat.clone()),
                (backend.clone(), at(of.node, port ^ 1)),
            ] {
                for flags in [SYN | ACK, ACK, RST] {
                    assert_untouched(programs, ifindex, &Packet::tcp(&from, &to, flags).build());
                }
            }
            assert_untouched(programs, ifindex, &Packet::udp(&backend, &snat).build());
            // The peer itself, but out of turn: the client gets it and judges it. The handshake is no further for it.
            let out = uplink(programs, "uplink_ingress", &Packet::tcp(&backend, &snat, ACK).build(), ifindex);
            assert_eq!(View(&out.packet).tuple(), format!("{frontend} → {client}"));
            let states: Vec<u8> = match of.family {
                Family::V4 => programs.flows(names::HALF_OPEN4).unwrap().values().map(|flow| flow.state).collect(),
                Family::V6 => programs.flows6(names::HALF_OPEN6).unwrap().values().map(|flow| flow.state).collect(),
            };
            assert_eq!(states, [state::NEW; 2]);
            // A refusal is an end, in the handshake too.
            let reset = Packet::tcp(&backend, &snat, RST | ACK).build();
            let out = uplink(programs, "uplink_ingress", &reset, ifindex);
            assert_eq!(View(&out.packet).tuple(), format!("{frontend} → {client}"));
            View(&out.packet).assert_checksums();
        });
    }
}
