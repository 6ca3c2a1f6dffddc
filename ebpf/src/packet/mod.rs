//! Bounded parsing of a packet into what the rest needs to know of it.

pub mod ethernet;
pub mod ipv4;
pub mod ipv6;
pub mod network;
pub mod transport;

use sheave_common::flow::FlowKey;

use crate::context::Context;
use network::Network;

/// A parsed packet.
pub struct Packet<A> {
    /// Its tuple, protocol and edge. Ports are 0 unless the packet is [`Kind::Transport`].
    pub key: FlowKey<A>,
    /// Offset of the transport header; read it with [`Packet::transport`].
    transport: u32,
    /// Bytes from the network header on, as its header says.
    pub length: u32,
    /// Identification of a fragmented packet, as it is sent.
    pub identification: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Flags of a TCP segment, see [`transport::flags`], and what SCTP's first chunk comes to in them; 0 for UDP.
    pub tcp_flags: u8,
    /// Which part of a packet it is.
    pub part: Part,
}

/// Which part of a packet a packet is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// All of it.
    Whole,
    /// The fragment with the transport header.
    First,
    /// Another fragment.
    Later,
}

impl<A: Network> Packet<A> {
    /// Fills everything but the addresses, field by field: a value on the way would take as much again of the stack.
    ///
    /// # Safety
    ///
    /// `place` is memory of a packet.
    #[inline(always)]
    unsafe fn fill<C: Context>(place: *mut Self, edge: u32, protocol: u8, length: u32, ttl: u8) {
        // SAFETY: by the caller's promise.
        unsafe {
            let tuple = &raw mut (*place).key.tuple;
            (&raw mut (*tuple).source_port_be).write(0);
            (&raw mut (*tuple).destination_port_be).write(0);
            (&raw mut (*place).key.edge).write(edge);
            // Protocol and zeroes in one word: three zeroes alone become a call of memset, which the verifier refuses
            // ("Global function memset() doesn't return scalar", kernel 6.18).
            (&raw mut (*place).key.protocol).cast::<u32>().write(u32::from_ne_bytes([protocol, 0, 0, 0]));
            (&raw mut (*place).transport).write(C::NETWORK + A::LENGTH);
            (&raw mut (*place).length).write(length);
            (&raw mut (*place).identification).write(0);
            (&raw mut (*place).ttl).write(ttl);
            (&raw mut (*place).tcp_flags).write(0);
            (&raw mut (*place).part).write(Part::Whole);
        }
    }

    /// Offset of the transport header. A constant under XDP, where options and extension headers are not parsed: a packet
    /// pointer plus an offset that the verifier has lost track of is refused ("R4 offset is outside of the packet", kernel
    /// 6.18).
    #[inline(always)]
    pub fn transport<C: Context>(&self) -> u32 {
        if C::XDP { Self::plain_transport::<C>() } else { self.transport }
    }

    /// Offset of the transport header of packets without options and extension headers.
    #[inline(always)]
    pub fn plain_transport<C: Context>() -> u32 {
        C::NETWORK + A::LENGTH
    }

    /// Whether the packet has neither options nor extension headers.
    #[inline(always)]
    pub fn is_plain<C: Context>(&self) -> bool {
        C::XDP || self.transport == Self::plain_transport::<C>()
    }

    /// Reads the transport header.
    #[inline(always)]
    fn transport_header<C: Context, T: Copy>(&self, ctx: &C) -> Option<T> {
        if self.is_plain::<C>() {
            // SAFETY: `at` found it in the packet.
            ctx.at::<T>(Self::plain_transport::<C>()).map(|header| unsafe { header.read() })
        } else {
            ctx.load(self.transport)
        }
    }
}

/// What kind of packet it is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// TCP, UDP or SCTP with its header: a whole packet or a first fragment.
    Transport,
    /// Another fragment of TCP, UDP or SCTP.
    Later,
    /// An ICMP error, or a redirect.
    IcmpError,
    /// A whole ICMP echo request.
    Echo,
    /// Any other protocol, or more extension headers than are walked.
    Other,
    /// Not of this family, too short to be anything, or never to be touched (neighbour discovery).
    NotOurs,
    /// The IP header's lengths contradict the packet: the stack drops it by itself.
    BadLength,
    /// A transport or extension header is cut short: the stack would forward it.
    Malformed,
}

impl Kind {
    /// From the number that crossed a call between programs' functions.
    #[inline(always)]
    pub fn from_bits(bits: u32) -> Self {
        debug_assert!(bits <= Self::Malformed as u32);
        // SAFETY: callers pass what `as u32` gave.
        unsafe { core::mem::transmute::<u32, Self>(bits) }
    }
}

/// Reads the transport header at `packet.transport()`: ports and flags. `remaining` are the bytes from there to the packet's end.
#[inline(always)]
pub fn parse_transport<C: Context, A: Network>(ctx: &C, packet: &mut Packet<A>, remaining: u32) -> Kind {
    use sheave_common::{PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};
    match packet.key.protocol {
        PROTOCOL_TCP => {
            let Some(tcp) = packet.transport_header::<C, transport::Tcp>(ctx) else { return Kind::Malformed };
            if remaining < transport::TCP_LENGTH {
                return Kind::Malformed;
            }
            packet.tcp_flags = tcp.flags;
            packet.key.tuple.source_port_be = tcp.source_be;
            packet.key.tuple.destination_port_be = tcp.destination_be;
        }
        PROTOCOL_UDP => {
            let Some(udp) = packet.transport_header::<C, transport::Udp>(ctx) else { return Kind::Malformed };
            if remaining < transport::UDP_LENGTH {
                return Kind::Malformed;
            }
            packet.key.tuple.source_port_be = udp.source_be;
            packet.key.tuple.destination_port_be = udp.destination_be;
        }
        PROTOCOL_SCTP => {
            let Some(sctp) = packet.transport_header::<C, transport::Sctp>(ctx) else { return Kind::Malformed };
            if remaining < transport::SCTP_LENGTH {
                return Kind::Malformed;
            }
            packet.tcp_flags = transport::sctp_flags(sctp.chunk);
            packet.key.tuple.source_port_be = sctp.source_be;
            packet.key.tuple.destination_port_be = sctp.destination_be;
        }
        _ => return Kind::Other,
    }
    Kind::Transport
}
