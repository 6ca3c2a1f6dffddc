//! IPv6 (RFC 8200), its extension headers, and what ICMPv6 (RFC 4443) does otherwise than ICMP.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{bpf_fib_lookup as RouteParameters, bpf_redir_neigh};
use sheave_common::checksum::difference;
use sheave_common::flow::{Flow, Tuple};
use sheave_common::{Address as _, Ipv6Address, PROTOCOL_ICMPV6};

use super::network::{Answer, Network, Quote};
use super::{Kind, Packet, Part, ethernet, parse_transport, transport};
use crate::context::Context;
use crate::scratch::scratch;
use crate::{balance, conntrack, maps, translate};

/// Bytes of a header without extension headers.
const LENGTH: u32 = 40;
/// Offset of the source address; the destination follows.
const ADDRESSES: u32 = 8;
/// AF_INET6
const AF_INET6: u8 = 10;
/// Hop limit of answers.
const ANSWER_HOP_LIMIT: u8 = 64;
/// Extension headers that are walked. A packet needs at most hop-by-hop, two destination options, routing and fragment
/// (RFC 8200, 4.1).
const EXTENSION_HEADERS: u32 = 6;

/// Next header values.
mod next {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing.
    pub const ROUTING: u8 = 43;
    /// Fragment.
    pub const FRAGMENT: u8 = 44;
    /// Destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
}

/// ICMPv6 types.
mod kind {
    pub const DESTINATION_UNREACHABLE: u8 = 1;
    pub const PACKET_TOO_BIG: u8 = 2;
    pub const TIME_EXCEEDED: u8 = 3;
    pub const PARAMETER_PROBLEM: u8 = 4;
    pub const ECHO_REQUEST: u8 = 128;
    pub const ECHO_REPLY: u8 = 129;
    /// First of multicast listener and neighbour discovery (RFC 2710, RFC 4861).
    pub const FIRST_LINK: u8 = 130;
    pub const REDIRECT: u8 = 137;
    /// Multicast listener reports, version 2 (RFC 3810).
    pub const LISTENER_REPORT: u8 = 143;
}

/// A header.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Header {
    start: Start,
    source: Ipv6Address,
    destination: Ipv6Address,
}

/// A header as far as the addresses.
#[derive(Clone, Copy)]
#[repr(C)]
struct Start {
    /// Version (6), traffic class and flow label.
    version_and_label: [u8; 4],
    /// Bytes behind the header.
    payload_length_be: u16,
    next_header: u8,
    hop_limit: u8,
}

/// A fragment header, or the first octets of another extension header.
#[derive(Clone, Copy)]
#[repr(C)]
struct Fragment {
    next_header: u8,
    /// Of other extension headers: octets beyond the first eight, in units of eight.
    length: u8,
    /// Offset in the upper 13 bits, "more fragments" in the lowest.
    offset_be: u16,
    identification: u32,
}

/// The redirected header option's type (RFC 4861, 4.6.3).
const REDIRECTED_HEADER: u8 = 4;
/// Offset of a redirect's options: header, target and destination.
const REDIRECT_OPTIONS: u32 = 40;

const _: () = assert!(core::mem::offset_of!(Tuple<Ipv6Address>, source) == 0);
const _: () = assert!(core::mem::offset_of!(Tuple<Ipv6Address>, destination) == size_of::<Ipv6Address>());

/// The addresses of a tuple as they lie in a packet, to be read into.
#[inline(always)]
fn addresses_mut(tuple: &mut Tuple<Ipv6Address>) -> &mut [Ipv6Address; 2] {
    // SAFETY: a tuple begins with its two addresses, as asserted.
    unsafe { &mut *core::ptr::from_mut(tuple).cast() }
}

/// A function of its own in the kernel too, for its stack. Returns a [`Kind`].
#[inline(never)]
fn parse<C: Context>(ctx: &C, edge: u32, packet: &mut MaybeUninit<Packet<Ipv6Address>>) -> u32 {
    parse_kind(ctx, edge, packet) as u32
}

#[inline(always)]
fn parse_kind<C: Context>(ctx: &C, edge: u32, room: &mut MaybeUninit<Packet<Ipv6Address>>) -> Kind {
    let Some(header) = ctx.at::<Header>(C::NETWORK) else { return Kind::NotOurs };
    // SAFETY: `at` found it in the packet.
    let start = unsafe { (&raw const (*header).start).read() };
    if start.version_and_label[0] >> 4 != 6 {
        return Kind::NotOurs;
    }
    let length = match LENGTH + u32::from(u16::from_be(start.payload_length_be)) {
        // A GSO packet of more than 64 KiB says 0 (BIG TCP, since kernel 5.19).
        LENGTH if ctx.segment_payload() != 0 => ctx.length() - C::NETWORK,
        total => total,
    };
    let place = room.as_mut_ptr();
    // SAFETY: the place is a packet's, and every field is written.
    let packet = unsafe {
        maps::copy_words(&raw const (*header).source, &raw mut (*place).key.tuple.source);
        maps::copy_words(&raw const (*header).destination, &raw mut (*place).key.tuple.destination);
        Packet::fill::<C>(place, edge, start.next_header, length, start.hop_limit);
        room.assume_init_mut()
    };
    if packet.length > ctx.length() - C::NETWORK {
        return Kind::BadLength;
    }
    let kind = if C::XDP { None } else { walk(ctx, packet) };
    if let Some(kind) = kind {
        return kind;
    }
    let header_length = packet.transport::<C>() - C::NETWORK;
    if packet.length < header_length {
        return Kind::Malformed;
    }
    if packet.part == Part::Later {
        return if transport::translated(packet.key.protocol) { Kind::Later } else { Kind::Other };
    }
    if packet.key.protocol == PROTOCOL_ICMPV6 {
        let Some(kind) = ctx.load::<u8>(packet.transport::<C>()) else { return Kind::Malformed };
        return match (kind, packet.part) {
            (kind::DESTINATION_UNREACHABLE..=kind::PARAMETER_PROBLEM | kind::REDIRECT, Part::Whole) => Kind::IcmpError,
            (kind::FIRST_LINK..=kind::REDIRECT | kind::LISTENER_REPORT, _) => Kind::NotOurs,
            (kind::ECHO_REQUEST, Part::Whole) => Kind::Echo,
            _ => Kind::Other,
        };
    }
    let remaining = packet.length - header_length;
    match parse_transport(ctx, packet, remaining) {
        // XDP leaves extension headers to tc.
        Kind::Other if C::XDP => Kind::NotOurs,
        kind => kind,
    }
}

/// Walks the extension headers to the transport header. Says what the packet is if it can't be told from there.
///
/// What changes from header to header lies in `packet` and is read afresh, so that the kernel's verifier sees the same
/// unknown numbers in every round and not one more range for each way to get there.
#[inline(always)]
fn walk<C: Context>(ctx: &C, packet: &mut Packet<Ipv6Address>) -> Option<Kind> {
    let end = C::NETWORK + packet.length;
    for _ in 0..EXTENSION_HEADERS {
        // SAFETY: reads fields of the packet.
        let (offset, protocol) = unsafe {
            ((&raw const packet.transport).read_volatile(), (&raw const packet.key.protocol).read_volatile())
        };
        if !matches!(protocol, next::HOP_BY_HOP | next::ROUTING | next::DESTINATION_OPTIONS | next::FRAGMENT) {
            break;
        }
        // All four begin with the next header and are at least eight octets long.
        let header = ctx.load::<Fragment>(offset).filter(|_| offset + 8 <= end);
        let Some(header) = header else { return Some(Kind::Malformed) };
        packet.key.protocol = header.next_header;
        if protocol != next::FRAGMENT {
            packet.transport = offset + (u32::from(header.length) + 1) * 8;
            continue;
        }
        packet.transport = offset + 8;
        packet.identification = header.identification;
        if header.offset_be & 0xfff8_u16.to_be() != 0 {
            packet.part = Part::Later;
            // What follows is the middle of the packet, not a header.
            break;
        }
        // "Atomic" fragments are whole packets (RFC 6946).
        if header.offset_be & 1_u16.to_be() != 0 {
            packet.part = Part::First;
        }
    }
    None
}

impl Network for Ipv6Address {
    const ETHER_TYPE_BE: u16 = ethernet::TYPE_IPV6_BE;
    const LENGTH: u32 = LENGTH;
    const ICMP: u8 = PROTOCOL_ICMPV6;
    const ICMP_PSEUDO: bool = true;
    const ECHO_REPLY: u8 = kind::ECHO_REPLY;
    type Header = Header;
    type Quoted = [u8; 48];

    #[inline(always)]
    fn with_room<R>(run: impl FnOnce(&mut MaybeUninit<Packet<Self>>, &mut MaybeUninit<Flow<Self>>) -> R) -> Option<R> {
        let scratch = scratch::<Self>()?;
        // SAFETY: the scratch is this run's alone, and these two fields are used by nothing else.
        unsafe { Some(run(&mut (*scratch).packet, &mut (*scratch).flow)) }
    }

    #[inline(always)]
    fn parse<C: Context>(ctx: &C, edge: u32, packet: &mut MaybeUninit<Packet<Self>>) -> Kind {
        // XDP parses no extension headers, and a frame's bounds don't cross a call.
        if C::XDP { parse_kind(ctx, edge, packet) } else { Kind::from_bits(parse(ctx, edge, packet)) }
    }

    #[inline(always)]
    fn is_one_host(self) -> bool {
        self.is_one_host()
    }

    #[inline(always)]
    fn rewrite<C: Context>(ctx: &C, packet: &Packet<Self>, new: &Tuple<Self>, redirected: bool) -> Option<()> {
        rewrite(ctx, packet, new, redirected).then_some(())
    }

    #[inline(always)]
    fn rewrite_header<C: Context>(
        ctx: &C,
        packet: &Packet<Self>,
        new: &Tuple<Self>,
        redirected: bool,
        mut changed: u64,
    ) -> Option<()> {
        let header = ctx.at::<Header>(C::NETWORK)?;
        // SAFETY: `at` found it in the packet.
        unsafe {
            if redirected {
                let hop_limit = packet.ttl - 1;
                let words = [packet.ttl, hop_limit].map(|limit| u32::from(u16::from_ne_bytes([0, limit])));
                changed += difference(words[0], words[1]);
                (&raw mut (*header).start.hop_limit).write(hop_limit);
            }
            maps::copy_words(&raw const new.source, &raw mut (*header).source);
            maps::copy_words(&raw const new.destination, &raw mut (*header).destination);
        }
        ctx.follow(changed);
        Some(())
    }

    #[inline(always)]
    fn quote<C: Context>(ctx: &C, packet: &Packet<Self>, quote: &mut MaybeUninit<Quote<Self>>) -> bool {
        read_quote(ctx, packet, quote).is_some()
    }

    #[inline(always)]
    fn is_redirect(kind: u8) -> bool {
        kind == kind::REDIRECT
    }

    #[inline(always)]
    fn rewrite_quoted<C: Context>(ctx: &C, network: u32, rewrite: &Tuple<Self>, _changed: u64) -> Option<u64> {
        ctx.store(network + ADDRESSES, &rewrite.destination)?;
        ctx.store(network + ADDRESSES + size_of::<Self>() as u32, &rewrite.source)?;
        Some(0)
    }

    #[inline(always)]
    fn answer_header(packet: &Packet<Self>, protocol: u8, payload: u16) -> Header {
        Header {
            start: Start {
                version_and_label: [0x60, 0, 0, 0],
                payload_length_be: payload.to_be(),
                next_header: protocol,
                hop_limit: ANSWER_HOP_LIMIT,
            },
            source: packet.key.tuple.destination,
            destination: packet.key.tuple.source,
        }
    }

    #[inline(always)]
    fn icmp_kind(answer: Answer) -> [u8; 2] {
        match answer {
            Answer::PortUnreachable => [kind::DESTINATION_UNREACHABLE, 4],
            Answer::TimeExceeded => [kind::TIME_EXCEEDED, 0],
            Answer::TooBig => [kind::PACKET_TOO_BIG, 0],
        }
    }

    #[inline(always)]
    fn attempt(from: u64, now: u32) -> u32 {
        balance::attempt6(from, now)
    }

    #[inline(always)]
    fn claim_and_insert(yields: u32, now: u32) -> bool {
        conntrack::claim_and_insert6(yields, now) != 0
    }

    #[inline(always)]
    fn set_route(parameters: &mut RouteParameters, tuple: &Tuple<Self>) {
        parameters.family = AF_INET6;
        parameters.__bindgen_anon_3.ipv6_src = tuple.source.words();
        parameters.__bindgen_anon_4.ipv6_dst = tuple.destination.words();
    }

    #[inline(always)]
    fn route_source(parameters: &RouteParameters) -> Self {
        // SAFETY: the union member that every IPv6 lookup uses.
        Self::from_words(unsafe { parameters.__bindgen_anon_3.ipv6_src })
    }

    #[inline(always)]
    fn route_next_hop(parameters: &RouteParameters) -> Self {
        // SAFETY: the kernel wrote the next hop to the destination's member of the union.
        Self::from_words(unsafe { parameters.__bindgen_anon_4.ipv6_dst })
    }

    #[inline(always)]
    fn neighbour(self) -> bpf_redir_neigh {
        // SAFETY: all-zero bytes are a valid value of this plain C struct.
        let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
        neighbour.nh_family = u32::from(AF_INET6);
        neighbour.__bindgen_anon_1.ipv6_nh = self.words();
        neighbour
    }

    #[cfg(feature = "packet-trace")]
    #[inline(always)]
    fn to_ip(self) -> core::net::IpAddr {
        core::net::IpAddr::V6(self.into())
    }
}

/// [`Network::quote`].
#[inline(always)]
fn read_quote<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv6Address>,
    quote: &mut MaybeUninit<Quote<Ipv6Address>>,
) -> Option<()> {
    let message = packet.transport::<C>();
    let network = if Ipv6Address::is_redirect(ctx.load::<u8>(message)?) {
        redirected_header(ctx, message)?
    } else {
        message + transport::ICMP_LENGTH
    };
    let start = ctx.load::<Start>(network)?;
    if start.version_and_label[0] >> 4 != 6 {
        return None;
    }
    let (mut offset, mut protocol) = (network + LENGTH, start.next_header);
    // A first fragment: what a router finds too big is often one, since only senders fragment.
    if protocol == next::FRAGMENT {
        let header = ctx.load::<Fragment>(offset).filter(|header| header.offset_be & 0xfff8_u16.to_be() == 0)?;
        (offset, protocol) = (offset + 8, header.next_header);
    }
    let ports = ctx.load::<transport::Ports>(offset)?;
    let quote = quote.as_mut_ptr();
    // Field by field: a value on the way would take as much again of the stack.
    // SAFETY: the place is a quote's; its addresses are overwritten as a whole before they are read.
    unsafe {
        let tuple = &raw mut (*quote).tuple;
        ctx.load_into(network + ADDRESSES, addresses_mut(&mut *tuple))?;
        (&raw mut (*tuple).source_port_be).write(ports.source_be);
        (&raw mut (*tuple).destination_port_be).write(ports.destination_be);
        (&raw mut (*quote).protocol).write(protocol);
        (&raw mut (*quote).network).write(network);
        (&raw mut (*quote).transport).write(offset);
    }
    Some(())
}

/// [`translate::rewrite`]; false if it failed.
#[inline(never)]
fn rewrite<C: Context>(ctx: &C, packet: &Packet<Ipv6Address>, new: &Tuple<Ipv6Address>, redirected: bool) -> bool {
    translate::rewrite(ctx, packet, new, redirected).is_some()
}

/// Offset of the packet that a redirect (RFC 4861, 4.5) quotes.
#[inline(always)]
fn redirected_header<C: Context>(ctx: &C, message: u32) -> Option<u32> {
    let mut offset = message + REDIRECT_OPTIONS;
    for _ in 0..3 {
        let [option, length] = ctx.load::<[u8; 2]>(offset)?;
        if option == REDIRECTED_HEADER {
            return Some(offset + 8);
        }
        offset += u32::from(length) * 8;
    }
    None
}
