//! What IPv4 and IPv6 differ in, behind one trait: everything above it is written once.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{bpf_fib_lookup as RouteParameters, bpf_redir_neigh};
use sheave_common::flow::{Flow, Tuple};

use super::{Kind, Packet};
use crate::context::Context;
use crate::maps::Family;

/// An ICMP error that a packet is answered with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Nobody listens there.
    PortUnreachable,
    /// TTL or hop limit exceeded in transit.
    TimeExceeded,
    /// Larger than the next link's MTU.
    TooBig,
}

/// A packet that an ICMP error quotes.
pub struct Quote<A> {
    /// Its tuple.
    pub tuple: Tuple<A>,
    /// Its protocol.
    pub protocol: u8,
    /// Offset of its network header.
    pub network: u32,
    /// Offset of its transport header.
    pub transport: u32,
}

/// An address family's headers.
pub trait Network: Family {
    /// EtherType, network order.
    const ETHER_TYPE_BE: u16;
    /// Bytes of a header without options or extension headers.
    const LENGTH: u32;
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    /// Whether ICMP checksums cover a pseudo-header.
    const ICMP_PSEUDO: bool;
    /// ICMP type of an echo reply.
    const ECHO_REPLY: u8;
    /// The network header of an answer.
    type Header: Copy;
    /// What an ICMP error quotes of a packet: its header and eight more octets, the least that RFC 792 asks for and all that
    /// is needed to find a socket.
    type Quoted: Copy;

    /// Runs something with room for a packet and its flow.
    fn with_room<R>(run: impl FnOnce(&mut MaybeUninit<Packet<Self>>, &mut MaybeUninit<Flow<Self>>) -> R) -> Option<R>;
    /// Parses a packet. `packet` is filled unless it is [`Kind::NotOurs`].
    fn parse<C: Context>(ctx: &C, edge: u32, packet: &mut MaybeUninit<Packet<Self>>) -> Kind;
    /// Whether a packet from this address can be answered: a single host has it.
    fn is_one_host(self) -> bool;
    /// [`crate::translate::rewrite`]; a function of its own in the kernel too where its stack would be too much.
    fn rewrite<C: Context>(ctx: &C, packet: &Packet<Self>, new: &Tuple<Self>, redirected: bool) -> Option<()>;
    /// Writes a rewritten tuple's addresses into the network header; with `redirected`, the TTL or hop limit is decremented
    /// too. `changed` is what the addresses change in a checksum.
    fn rewrite_header<C: Context>(
        ctx: &C,
        packet: &Packet<Self>,
        new: &Tuple<Self>,
        redirected: bool,
        changed: u64,
    ) -> Option<()>;

    /// Reads the packet that an ICMP error or redirect is about; false if it can't be told.
    fn quote<C: Context>(ctx: &C, packet: &Packet<Self>, quote: &mut MaybeUninit<Quote<Self>>) -> bool;
    /// Whether the ICMP message of this type is a redirect.
    fn is_redirect(kind: u8) -> bool;
    /// Writes a quoted packet's addresses, which are those of `rewrite` the other way round; returns what the quoted header's own checksum changes in the ICMP checksum.
    fn rewrite_quoted<C: Context>(ctx: &C, network: u32, rewrite: &Tuple<Self>, changed: u64) -> Option<u64>;

    /// The header of an answer to this packet, from its destination to its source, with `payload` octets behind it.
    fn answer_header(packet: &Packet<Self>, protocol: u8, payload: u16) -> Self::Header;
    /// Type and code of an ICMP error.
    fn icmp_kind(answer: Answer) -> [u8; 2];

    /// Chooses a backend for the new flow whose key is in this CPU's scratch, see [`crate::balance`]: 0, or the reason for a drop.
    fn attempt(from: u64, now: u32) -> u32;
    /// Claims a reply tuple for the new flow in this CPU's scratch and inserts it, see [`crate::conntrack`]; false if it is taken.
    fn claim_and_insert(yields: u32, now: u32) -> bool;

    /// Puts family and addresses into a route lookup.
    fn set_route(parameters: &mut RouteParameters, tuple: &Tuple<Self>);
    /// The source address that a route lookup answered.
    fn route_source(parameters: &RouteParameters) -> Self;
    /// The next hop that a route lookup answered.
    fn route_next_hop(parameters: &RouteParameters) -> Self;
    /// The next hop for `bpf_redirect_neigh`.
    fn neighbour(self) -> bpf_redir_neigh;

    /// An address for a log line.
    #[cfg(feature = "packet-trace")]
    fn to_ip(self) -> core::net::IpAddr;
}
