//! ICMP errors about translated flows: the packet that an error quotes is turned back into what its sender sent, and the
//! error goes where that sender is. So path-MTU discovery works through a Service.
//!
//! The outer addresses follow the same rule as netfilter's: the destination is always the quoted packet's sender, the
//! source changes only where the flow rewrites the source of packets in the error's own direction.

use sheave_common::checksum::{self, difference};
use sheave_common::flow::{Flow, FlowKey, Tuple, flags};
use sheave_common::{DropReason, Ipv4Address, PROTOCOL_TCP, PROTOCOL_UDP};

use crate::context::Context;
use crate::edge::{Direction, Verdict};
use crate::maps::{self, Family, Table};
use crate::packet::{Packet, ipv4, transport};
use crate::{forward, observe, route, translate};

/// Bytes of an ICMP error's header.
const LENGTH: u32 = 8;
/// Offset of the checksum in it.
const CHECKSUM: u32 = 2;
/// Type of a redirect.
const REDIRECT: u8 = 5;

/// The first eight bytes of a quoted TCP or UDP packet.
#[derive(Clone, Copy)]
#[repr(C)]
struct Ports {
    source_be: u16,
    destination_be: u16,
    rest: [u8; 4],
}

/// Translates an ICMP error if it is about a flow of this edge; `None` if it isn't.
#[inline(always)]
pub fn error<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, direction: Direction) -> Option<Verdict> {
    match error_bits(ctx, packet, direction) {
        FOREIGN => None,
        bits => Some(Verdict::from_bits(bits)),
    }
}

/// Not a verdict: the error is about no flow of this edge.
const FOREIGN: u64 = u64::MAX;

/// A function of its own in the kernel too, so that its stack is not that of ordinary packets.
#[inline(never)]
fn error_bits<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, direction: Direction) -> u64 {
    translate_error(ctx, packet, direction).map_or(FOREIGN, Verdict::to_bits)
}

#[inline(always)]
fn translate_error<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, direction: Direction) -> Option<Verdict> {
    let inner = packet.transport::<C>() + LENGTH;
    let kind = ctx.load::<u8>(packet.transport::<C>())?;
    let quoted = ctx.load::<ipv4::Header>(inner)?;
    if quoted.version_and_length != 0x45 || quoted.fragment_be & 0x1fff_u16.to_be() != 0 {
        return None;
    }
    if !translate::translated(quoted.protocol) {
        return None;
    }
    let inner_transport = inner + ipv4::LENGTH;
    let ports = ctx.load::<Ports>(inner_transport)?;
    let old = Tuple {
        source: quoted.source,
        destination: quoted.destination,
        source_port_be: ports.source_be,
        destination_port_be: ports.destination_be,
    };
    // The error travels against the quoted packet, so it belongs to the flow of packets in its own direction.
    let key = FlowKey::new(old.reversed(), quoted.protocol, packet.key.edge);
    let flow = find(&key)?;
    if !direction.applies(flow.flags) {
        return None;
    }
    if kind == REDIRECT {
        return Some(Verdict::Drop(DropReason::IcmpRedirect));
    }
    let outer = Tuple {
        source: if flow.rewrite.source == key.tuple.source && flow.flags & flags::REDIRECT == 0 {
            packet.key.tuple.source
        } else {
            flow.rewrite.source
        },
        destination: flow.rewrite.destination,
        ..packet.key.tuple
    };
    let redirected = flow.flags & flags::REDIRECT != 0;
    let route = if redirected {
        // An ICMP error is never answered with another (RFC 1122, 3.2.2).
        if packet.ttl <= 1 {
            return Some(Verdict::Drop(DropReason::TtlExceeded));
        }
        match route::find(ctx, &outer, packet.key.protocol, packet.length) {
            Ok(route) => Some(route),
            Err(_) => return Some(Verdict::Drop(DropReason::NoRoute)),
        }
    } else {
        None
    };
    let changed = translate::address_difference(&packet.key.tuple, &outer);
    if !rewrite_quoted(ctx, packet, quoted.protocol, &old, &flow.rewrite.reversed())
        || translate::rewrite_addresses(ctx, packet, &outer, redirected, changed).is_none()
    {
        return Some(Verdict::Drop(DropReason::RewriteFailed));
    }
    observe::packet(flow.service_id, packet.length);
    Some(match route {
        Some(route) => forward::send(ctx, &route),
        None if flow.flags & flags::HAIRPIN != 0 => forward::back(ctx, packet),
        None => Verdict::Pass,
    })
}

/// The flow that an error is about, whatever its state.
#[inline(always)]
fn find<A: Family>(key: &FlowKey<A>) -> Option<Flow<A>> {
    let element = match A::flow(Table::Established, key) {
        Some(element) => element,
        None if key.protocol == PROTOCOL_TCP => A::flow(Table::HalfOpen, key)?,
        None => return None,
    };
    // SAFETY: a map value stays readable while the program runs.
    Some(unsafe { maps::copy(element) })
}

/// Rewrites the quoted packet from tuple `old` to `new`, with its header checksum and, where it is quoted, its transport
/// checksum; the ICMP checksum follows. A function of its own in the kernel too, for its stack.
#[inline(never)]
fn rewrite_quoted<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    protocol: u8,
    old: &Tuple<Ipv4Address>,
    new: &Tuple<Ipv4Address>,
) -> bool {
    let end = packet.network::<C>() + packet.length;
    quoted(ctx, packet.transport::<C>(), end, protocol, old, new).is_some()
}

#[inline(always)]
fn quoted<C: Context>(
    ctx: &C,
    icmp: u32,
    end: u32,
    protocol: u8,
    old: &Tuple<Ipv4Address>,
    new: &Tuple<Ipv4Address>,
) -> Option<()> {
    let inner = icmp + LENGTH;
    let addresses = translate::address_difference(old, new);
    let (old_ports, new_ports) = (translate::ports_word(old), translate::ports_word(new));
    let ports = difference(old_ports, new_ports);
    let before = ctx.load::<u16>(inner + ipv4::CHECKSUM)?;
    let after = checksum::update(before, addresses);
    ctx.store(inner + ipv4::ADDRESSES, &[new.source, new.destination])?;
    ctx.store(inner + ipv4::CHECKSUM, &after)?;
    ctx.store(inner + ipv4::LENGTH, &new_ports)?;
    let mut total = addresses + difference(u32::from(before), u32::from(after)) + ports;
    let udp = protocol == PROTOCOL_UDP;
    let offset = inner + ipv4::LENGTH + if udp { transport::UDP_CHECKSUM } else { transport::TCP_CHECKSUM };
    // Behind the message there may be a frame's padding.
    if offset + 2 <= end
        && let Some(before) = ctx.load::<u16>(offset)
    {
        let after = if udp {
            checksum::update_udp(before, addresses + ports)
        } else {
            checksum::update(before, addresses + ports)
        };
        ctx.store(offset, &after)?;
        total += difference(u32::from(before), u32::from(after));
    }
    ctx.adjust_checksum(icmp + CHECKSUM, total, false, false)
}
