//! Bounded parsing of a packet into what the rest needs to know of it.

pub mod ethernet;
pub mod ipv4;
pub mod transport;

use sheave_common::flow::FlowKey;

/// A parsed packet.
pub struct Packet<A> {
    /// Its tuple, protocol and edge. Ports are 0 unless the packet is [`Kind::Transport`] or a first fragment.
    pub key: FlowKey<A>,
    /// Offset of the network header.
    pub network: u32,
    /// Offset of the transport header.
    pub transport: u32,
    /// Bytes from the network header on, as its header says.
    pub length: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP flags, see [`transport::flags`]; 0 for other protocols.
    pub tcp_flags: u8,
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
