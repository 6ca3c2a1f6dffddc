//! IPv4 (RFC 791).

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{bpf_fib_lookup as RouteParameters, bpf_redir_neigh};
use sheave_common::checksum::{self, difference, fold};
use sheave_common::flow::{Flow, Tuple};
use sheave_common::{Ipv4Address, PROTOCOL_ICMP};

use super::network::{Answer, Network, Quote};
use super::{Kind, Packet, Part, ethernet, parse_transport, transport};
use crate::context::Context;
use crate::{balance, conntrack, translate};

/// Bytes of a header without options.
const LENGTH: u32 = 20;
/// Offset of the header checksum.
const CHECKSUM: u32 = 10;
/// Offset of the source address; the destination follows.
const ADDRESSES: u32 = 12;
/// AF_INET
const AF_INET: u8 = 2;
/// TTL of answers.
const ANSWER_TTL: u8 = 64;

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

impl Network for Ipv4Address {
    const ETHER_TYPE_BE: u16 = ethernet::TYPE_IPV4_BE;
    const LENGTH: u32 = LENGTH;
    const ICMP: u8 = PROTOCOL_ICMP;
    const ICMP_PSEUDO: bool = false;
    const ECHO_REPLY: u8 = 0;
    type Header = Header;
    type Quoted = [u8; 28];

    #[inline(always)]
    fn with_room<R>(run: impl FnOnce(&mut MaybeUninit<Packet<Self>>, &mut MaybeUninit<Flow<Self>>) -> R) -> Option<R> {
        Some(run(&mut MaybeUninit::uninit(), &mut MaybeUninit::uninit()))
    }

    #[inline(always)]
    fn parse<C: Context>(ctx: &C, edge: u32, room: &mut MaybeUninit<Packet<Self>>) -> Kind {
        let Some(header) = ctx.at::<Header>(C::NETWORK) else { return Kind::NotOurs };
        // SAFETY: `at` found it in the packet.
        let header = unsafe { header.read() };
        if header.version_and_length >> 4 != 4 {
            return Kind::NotOurs;
        }
        let header_length = header.header_length();
        let total = match u32::from(u16::from_be(header.total_length_be)) {
            // A GSO packet of more than 64 KiB says 0 (gso_ipv4_max_size, since kernel 6.3).
            0 if ctx.segment_payload() != 0 => ctx.length() - C::NETWORK,
            total => total,
        };
        let place = room.as_mut_ptr();
        // SAFETY: the place is a packet's, and every field is written.
        let packet = unsafe {
            (&raw mut (*place).key.tuple.source).write(header.source);
            (&raw mut (*place).key.tuple.destination).write(header.destination);
            Packet::fill::<C>(place, edge, header.protocol, total, header.ttl);
            room.assume_init_mut()
        };
        packet.transport = C::NETWORK + header_length;
        packet.identification = u32::from(header.id_be);
        if header.fragment_be & OFFSET_MASK_BE != 0 {
            packet.part = Part::Later;
        } else if header.fragment_be & FRAGMENT_MASK_BE != 0 {
            packet.part = Part::First;
        }
        if header_length < LENGTH || total < header_length || total > ctx.length() - C::NETWORK {
            return Kind::BadLength;
        }
        if C::XDP && header_length != LENGTH {
            // tc handles options; a fixed offset keeps XDP's bounds checks simple.
            return Kind::NotOurs;
        }
        if packet.part == Part::Later {
            return if transport::translated(header.protocol) { Kind::Later } else { Kind::Other };
        }
        if header.protocol == PROTOCOL_ICMP {
            let Some(kind) = ctx.load::<u8>(packet.transport::<C>()) else { return Kind::Malformed };
            // Echo request; unreachable, redirect, time exceeded, parameter problem (RFC 792).
            return match (kind, packet.part) {
                (8, Part::Whole) => Kind::Echo,
                (3 | 5 | 11 | 12, Part::Whole) => Kind::IcmpError,
                _ => Kind::Other,
            };
        }
        parse_transport(ctx, packet, total - header_length)
    }

    #[inline(always)]
    fn is_one_host(self) -> bool {
        self.is_one_host()
    }

    #[inline(always)]
    fn rewrite<C: Context>(ctx: &C, packet: &Packet<Self>, new: &Tuple<Self>, redirected: bool) -> Option<()> {
        translate::rewrite(ctx, packet, new, redirected)
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
                let ttl = packet.ttl - 1;
                let words = [packet.ttl, ttl].map(|ttl| u32::from(u16::from_ne_bytes([ttl, packet.key.protocol])));
                changed += difference(words[0], words[1]);
                (*header).ttl = ttl;
            }
            (*header).checksum = checksum::update((*header).checksum, changed);
            (*header).source = new.source;
            (*header).destination = new.destination;
        }
        Some(())
    }

    #[inline(always)]
    fn quote<C: Context>(ctx: &C, packet: &Packet<Self>, quote: &mut MaybeUninit<Quote<Self>>) -> bool {
        let network = packet.transport::<C>() + transport::ICMP_LENGTH;
        let Some(header) = ctx.load::<Header>(network) else { return false };
        let Some(ports) = ctx.load::<transport::Ports>(network + LENGTH) else { return false };
        if header.version_and_length != 0x45 || header.fragment_be & OFFSET_MASK_BE != 0 {
            return false;
        }
        quote.write(Quote {
            tuple: Tuple {
                source: header.source,
                destination: header.destination,
                source_port_be: ports.source_be,
                destination_port_be: ports.destination_be,
            },
            protocol: header.protocol,
            network,
            transport: network + LENGTH,
        });
        true
    }

    #[inline(always)]
    fn is_redirect(kind: u8) -> bool {
        kind == 5
    }

    #[inline(always)]
    fn rewrite_quoted<C: Context>(ctx: &C, network: u32, rewrite: &Tuple<Self>, changed: u64) -> Option<u64> {
        let before = ctx.load::<u16>(network + CHECKSUM)?;
        let after = checksum::update(before, changed);
        ctx.store(network + ADDRESSES, &[rewrite.destination, rewrite.source])?;
        ctx.store(network + CHECKSUM, &after)?;
        Some(difference(u32::from(before), u32::from(after)))
    }

    #[inline(always)]
    fn answer_header(packet: &Packet<Self>, protocol: u8, payload: u16) -> Header {
        let mut header = Header {
            version_and_length: 0x45,
            tos: 0,
            total_length_be: (LENGTH as u16 + payload).to_be(),
            id_be: 0,
            fragment_be: 0,
            ttl: ANSWER_TTL,
            protocol,
            checksum: 0,
            source: packet.key.tuple.destination,
            destination: packet.key.tuple.source,
        };
        // Summed from its words: the header is on its way into a larger struct, and a helper would need it in memory twice.
        let words = [u16::from_ne_bytes([header.version_and_length, header.tos]), header.total_length_be];
        let last = u16::from_ne_bytes([header.ttl, header.protocol]);
        let addresses = u64::from(header.source.be_word()) + u64::from(header.destination.be_word());
        header.checksum = !fold(u64::from(words[0]) + u64::from(words[1]) + u64::from(last) + addresses);
        header
    }

    #[inline(always)]
    fn icmp_kind(answer: Answer) -> [u8; 2] {
        match answer {
            Answer::PortUnreachable => [3, 3],
            Answer::TimeExceeded => [11, 0],
            Answer::TooBig => [3, 4],
        }
    }

    #[inline(always)]
    fn attempt(from: u64, now: u32) -> u32 {
        balance::attempt4(from, now)
    }

    #[inline(always)]
    fn claim_and_insert(yields: u32, now: u32) -> bool {
        conntrack::claim_and_insert4(yields, now) != 0
    }

    #[inline(always)]
    fn set_route(parameters: &mut RouteParameters, tuple: &Tuple<Self>) {
        parameters.family = AF_INET;
        parameters.__bindgen_anon_3.ipv4_src = tuple.source.be_word();
        parameters.__bindgen_anon_4.ipv4_dst = tuple.destination.be_word();
    }

    #[inline(always)]
    fn route_source(parameters: &RouteParameters) -> Self {
        // SAFETY: the union member that every IPv4 lookup uses.
        Self::from_be_word(unsafe { parameters.__bindgen_anon_3.ipv4_src })
    }

    #[inline(always)]
    fn route_next_hop(parameters: &RouteParameters) -> Self {
        // SAFETY: the kernel wrote the next hop to the destination's member of the union.
        Self::from_be_word(unsafe { parameters.__bindgen_anon_4.ipv4_dst })
    }

    #[inline(always)]
    fn neighbour(self) -> bpf_redir_neigh {
        // SAFETY: all-zero bytes are a valid value of this plain C struct.
        let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
        neighbour.nh_family = u32::from(AF_INET);
        neighbour.__bindgen_anon_1.ipv4_nh = self.be_word();
        neighbour
    }

    #[cfg(feature = "packet-trace")]
    #[inline(always)]
    fn to_ip(self) -> core::net::IpAddr {
        core::net::IpAddr::V4(self.into())
    }
}
