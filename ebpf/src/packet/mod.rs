//! Bounded parsing of a packet into what the rest needs to know of it.

pub mod ethernet;
pub mod ipv4;
pub mod transport;

use sheave_common::Address;
use sheave_common::flow::{FlowKey, Tuple};

use crate::context::Context;

/// A parsed packet.
pub struct Packet<A> {
    /// Its tuple, protocol and edge. Ports are 0 unless the packet is [`Kind::Transport`] or a first fragment.
    pub key: FlowKey<A>,
    /// Offset of the network header; read it with [`Packet::network`].
    network: u32,
    /// Offset of the transport header; read it with [`Packet::transport`].
    transport: u32,
    /// Bytes from the network header on, as its header says.
    pub length: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP flags, see [`transport::flags`]; 0 for other protocols.
    pub tcp_flags: u8,
}

impl<A: Address> Packet<A> {
    /// A packet of which nothing is known yet.
    #[inline(always)]
    pub fn blank() -> Self {
        let none = A::UNSPECIFIED;
        let tuple = Tuple { source: none, destination: none, source_port_be: 0, destination_port_be: 0 };
        Self { key: FlowKey::new(tuple, 0, 0), network: 0, transport: 0, length: 0, ttl: 0, tcp_flags: 0 }
    }

    /// Offset of the network header. A constant under XDP: a packet pointer plus an offset that the verifier has lost
    /// track of is refused there ("R4 offset is outside of the packet", kernel 6.18).
    #[inline(always)]
    pub fn network<C: Context>(&self) -> u32 {
        if C::XDP { ethernet::LENGTH } else { self.network }
    }

    /// Offset of the transport header; a constant under XDP, where headers with options are not parsed.
    #[inline(always)]
    pub fn transport<C: Context>(&self) -> u32 {
        if C::XDP { ethernet::LENGTH + ipv4::LENGTH } else { self.transport }
    }

    /// Sets where the headers are.
    #[inline(always)]
    pub fn set_offsets(&mut self, network: u32, transport: u32) {
        self.network = network;
        self.transport = transport;
    }
}

/// What kind of packet it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A whole TCP or UDP packet.
    Transport,
    /// An ICMP error, or a redirect.
    IcmpError,
    /// A fragment; ports are known if it is the first.
    Fragment,
    /// Any other protocol.
    Other,
    /// Not of this family, or too short to be anything.
    NotOurs,
    /// Its lengths contradict each other.
    Malformed,
}
