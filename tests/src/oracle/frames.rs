//! Packets as frames, and what a program made of one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sheave_common::{PROTOCOL_ICMP, PROTOCOL_ICMPV6};

use super::answer::{Packet, Protocol, Refusal, Source};
use super::generate::node_ip;
use super::real::{Passage, Seen};
use crate::packet::{self, ACK, NODE_MAC, RST, SYN, View};
use crate::program::{DROP, NEXT, Outcome, REDIRECT};

/// Source ports of SNAT.
pub(super) const SNAT_PORTS: (u16, u16) = (10_000, 19_999);

/// The frame of a packet.
pub(super) fn frame_of(protocol: Protocol, source: SocketAddr, destination: SocketAddr, flags: u8) -> Vec<u8> {
    let (source, destination) = (source.to_string(), destination.to_string());
    let built = match protocol {
        Protocol::Tcp => packet::Packet::tcp(&source, &destination, flags),
        Protocol::Udp => packet::Packet::udp(&source, &destination),
        Protocol::Sctp => {
            // The first chunk: INIT, its acknowledgment, or data.
            let chunk = match flags {
                SYN => 1,
                ACK => 0,
                _ => 2,
            };
            packet::Packet::sctp(&source, &destination).payload(&[&[chunk, 0, 0, 20][..], &[1; 16]].concat())
        }
    };
    built.to_mac(NODE_MAC).build().to_vec()
}

/// What a program made of it.
pub(super) fn interpret(packet: &Packet, frame: &[u8], outcome: &Outcome) -> Seen {
    match outcome.action {
        NEXT if outcome.packet == frame => return Seen::Untouched,
        DROP => return Seen::Dropped,
        NEXT | REDIRECT => {}
        _ => return Seen::Odd(format!("{outcome:?}")),
    }
    let view = View(&outcome.packet);
    view.assert_checksums();
    let redirected = outcome.action == REDIRECT;
    if matches!(view.protocol(), PROTOCOL_ICMP | PROTOCOL_ICMPV6) {
        let port_unreachable = if packet.destination.is_ipv6() { (1, 4) } else { (3, 3) };
        let ours = redirected
            && view.addresses() == (packet.destination.ip(), packet.source.ip())
            && view.icmp() == port_unreachable
            && view.quoted_tuple() == format!("{} → {}", packet.source, packet.destination);
        return if ours { Seen::Refused(Refusal::PortUnreachable) } else { Seen::Odd(format!("{outcome:?}")) };
    }
    let (source, to) = (view.source(), view.destination());
    if packet.protocol == Protocol::Tcp && view.tcp_flags() & RST != 0 {
        let ours = redirected && (source, to) == (packet.destination, packet.source);
        return if ours { Seen::Refused(Refusal::Reset) } else { Seen::Odd(format!("{outcome:?}")) };
    }
    let node = node_ip(source.is_ipv6(), 1);
    let hairpin = if source.is_ipv6() { HAIRPIN6.into() } else { IpAddr::from(HAIRPIN4) };
    let kind = match redirected {
        // Another connection of this client may own the port.
        false if source.ip() == packet.source.ip() => Source::Kept,
        true if source.ip() == node && (SNAT_PORTS.0..=SNAT_PORTS.1).contains(&source.port()) => Source::Snat,
        true if source.ip() == hairpin => Source::Hairpin,
        _ => return Seen::Odd(format!("{source} → {to}, redirected: {redirected}")),
    };
    Seen::Translated(Passage { to, from: source, source: kind })
}

/// What stands for a client that is its own backend, by default.
const HAIRPIN4: Ipv4Addr = Ipv4Addr::new(169, 254, 42, 1);
const HAIRPIN6: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x6865, 0x6176, 0x6500, 0, 0, 0, 1);
