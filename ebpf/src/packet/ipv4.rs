//! IPv4 (RFC 791).

use sheave_common::flow::{FlowKey, Tuple};
use sheave_common::{Ipv4Address, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP};

use super::{Kind, Packet, transport};
use crate::context::Context;

/// Bytes of a header without options.
pub const LENGTH: u32 = 20;
/// Offset of the header checksum.
pub const CHECKSUM: u32 = 10;
/// Offset of TTL and protocol.
pub const TTL: u32 = 8;
/// Offset of the source address; the destination follows.
pub const ADDRESSES: u32 = 12;

/// Flag "more fragments" and the fragment offset, network order.
const FRAGMENT_MASK_BE: u16 = 0x3fff_u16.to_be();
/// The fragment offset, network order.
const OFFSET_MASK_BE: u16 = 0x1fff_u16.to_be();

/// A header without options.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Header {
    /// Version (4) and header length in words.
    pub version_and_length: u8,
    /// Type of service.
    pub tos: u8,
    /// Bytes of header and payload.
    pub total_length_be: u16,
    /// Identification.
    pub id_be: u16,
    /// Flags and fragment offset.
    pub fragment_be: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol number.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: u16,
    /// Source.
    pub source: Ipv4Address,
    /// Destination.
    pub destination: Ipv4Address,
}

impl Header {
    /// Bytes of the header, options included.
    #[inline(always)]
    pub fn header_length(&self) -> u32 {
        u32::from(self.version_and_length & 0x0f) * 4
    }
}

/// Parses the packet whose network header is at `network`. `packet` is filled as far as the returned kind says.
#[inline(always)]
pub fn parse<C: Context>(ctx: &C, network: u32, edge: u32, packet: &mut Packet<Ipv4Address>) -> Kind {
    let Some(header) = ctx.load::<Header>(network) else { return Kind::NotOurs };
    if header.version_and_length >> 4 != 4 {
        return Kind::NotOurs;
    }
    let header_length = header.header_length();
    let total = match u32::from(u16::from_be(header.total_length_be)) {
        // A GSO packet of more than 64 KiB says 0 (gso_ipv4_max_size, since kernel 6.3).
        0 if ctx.segment_payload() != 0 => ctx.length() - network,
        total => total,
    };
    if header_length < LENGTH || total < header_length || total > ctx.length() - network {
        return Kind::Malformed;
    }
    if C::XDP && header_length != LENGTH {
        // tc handles options; a fixed offset keeps XDP's bounds checks simple.
        return Kind::NotOurs;
    }
    packet.set_offsets(network, network + header_length);
    let transport_offset = packet.transport::<C>();
    packet.length = total;
    packet.ttl = header.ttl;
    packet.tcp_flags = 0;
    packet.key = FlowKey::new(
        Tuple { source: header.source, destination: header.destination, source_port_be: 0, destination_port_be: 0 },
        header.protocol,
        edge,
    );
    let fragment = header.fragment_be & FRAGMENT_MASK_BE != 0;
    if header.fragment_be & OFFSET_MASK_BE != 0 {
        return Kind::Fragment;
    }
    match header.protocol {
        PROTOCOL_TCP => {
            let Some(tcp) = ctx.load::<transport::Tcp>(transport_offset) else { return Kind::Malformed };
            if total < header_length + transport::TCP_LENGTH {
                return Kind::Malformed;
            }
            packet.tcp_flags = tcp.flags;
            packet.key.tuple.source_port_be = tcp.source_be;
            packet.key.tuple.destination_port_be = tcp.destination_be;
        }
        PROTOCOL_UDP => {
            let Some(udp) = ctx.load::<transport::Udp>(transport_offset) else { return Kind::Malformed };
            if total < header_length + transport::UDP_LENGTH {
                return Kind::Malformed;
            }
            packet.key.tuple.source_port_be = udp.source_be;
            packet.key.tuple.destination_port_be = udp.destination_be;
        }
        PROTOCOL_ICMP => {
            let Some(kind) = ctx.load::<u8>(transport_offset) else { return Kind::Malformed };
            // Unreachable, redirect, time exceeded, parameter problem (RFC 792).
            return if matches!(kind, 3 | 5 | 11 | 12) && !fragment { Kind::IcmpError } else { Kind::Other };
        }
        _ => return Kind::Other,
    }
    if fragment { Kind::Fragment } else { Kind::Transport }
}
