//! ICMP errors about translated flows: the packet that an error quotes is turned back into what its sender sent, and the
//! error goes where that sender is. So path-MTU discovery works through a Service.
//!
//! The outer addresses follow the same rule as netfilter's: the destination is always the quoted packet's sender, the
//! source changes only where the flow rewrites the source of packets in the error's own direction.

use core::mem::MaybeUninit;

use sheave_common::checksum::{self, difference};
use sheave_common::flow::{EDGE_BYPASS, Flow, FlowKey, Tuple, flags};
use sheave_common::{DropReason, PROTOCOL_SCTP, PROTOCOL_UDP};

use crate::context::Context;
use crate::edge::Direction;
use crate::maps::{self, Family, Table};
use crate::packet::network::{Network, Quote};
use crate::packet::{Packet, transport};
use crate::scratch::scratch;
use crate::verdict::{FOREIGN, Verdict};
use crate::{features, forward, observe, route, translate};

/// Translates an ICMP error if it is about a flow of this edge; `None` if it isn't. `flow` is room for that flow.
#[inline(always)]
pub fn error<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    direction: Direction,
    flow: &mut MaybeUninit<Flow<A>>,
) -> Option<Verdict> {
    match error_bits(ctx, packet, direction, flow) {
        FOREIGN => None,
        bits => Some(Verdict::from_bits(bits)),
    }
}

/// A function of its own in the kernel too, so that its stack is not that of ordinary packets.
#[inline(never)]
fn error_bits<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    direction: Direction,
    flow: &mut MaybeUninit<Flow<A>>,
) -> u64 {
    translate_error(ctx, packet, direction, flow).map_or(FOREIGN, Verdict::to_bits)
}

#[inline(always)]
fn translate_error<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    direction: Direction,
    flow: &mut MaybeUninit<Flow<A>>,
) -> Option<Verdict> {
    let scratch = scratch::<A>()?;
    // SAFETY: the scratch is this run's alone, and what is borrowed of it here is used by nothing else on this path.
    let (quote, key, outer) = unsafe { (&mut (*scratch).quote, &mut (*scratch).sibling_key, &mut (*scratch).outer) };
    if !A::quote(ctx, packet, quote) {
        return None;
    }
    // SAFETY: `quote` fills it whenever it says so.
    let quote = unsafe { quote.assume_init_ref() };
    // The error travels against the quoted packet, so it belongs to the flow of packets in its own direction.
    quote.tuple.write_reversed(&mut key.tuple);
    key.edge = packet.key.edge;
    key.protocol = quote.protocol;
    key.reserved = packet.key.reserved;
    if !transport::translated(key.protocol) {
        return None;
    }
    let element = match direction {
        Direction::Ingress if features::has(features::BYPASSED) => find_bypassed(key).or_else(|| find(key)),
        _ => find(key),
    };
    // SAFETY: a map value stays readable while the program runs.
    let flow = flow.write(unsafe { maps::copy(element?) });
    if !direction.applies(flow.flags) {
        return None;
    }
    if A::is_redirect(ctx.load::<u8>(packet.transport::<C>())?) {
        return Some(Verdict::Drop(DropReason::IcmpRedirect));
    }
    let redirected = flow.flags & flags::REDIRECT != 0;
    // An ICMP error is never answered with another (RFC 1122, 3.2.2).
    if redirected && packet.ttl <= 1 {
        return Some(Verdict::Drop(DropReason::TtlExceeded));
    }
    let kept = flow.rewrite.source == key.tuple.source && !redirected;
    outer.source = if kept { packet.key.tuple.source } else { flow.rewrite.source };
    outer.destination = flow.rewrite.destination;
    outer.source_port_be = 0;
    outer.destination_port_be = 0;
    let changed = translate::address_difference(&packet.key.tuple, outer);
    let pseudo = if A::ICMP_PSEUDO { changed } else { 0 };
    if !rewrite_quoted(ctx, packet, quote, &flow.rewrite, pseudo)
        || A::rewrite_header(ctx, packet, outer, redirected, changed).is_none()
    {
        return Some(Verdict::Drop(DropReason::RewriteFailed));
    }
    observe::packet(flow.service_id, packet.length);
    Some(if redirected {
        // Errors are short: one that exceeds an MTU is lost.
        match route::find(ctx, outer, packet.key.protocol, packet.length) {
            Ok(route) => forward::send(ctx, route),
            Err(_) => Verdict::Drop(DropReason::NoRoute),
        }
    } else if flow.flags & flags::HAIRPIN != 0 {
        forward::back(ctx)
    } else {
        Verdict::Pass
    })
}

/// The flow that an error is about, whatever its state.
#[inline(always)]
fn find<A: Family>(key: &FlowKey<A>) -> Option<*mut Flow<A>> {
    A::flow(Table::Established, key).or_else(|| A::flow(Table::HalfOpen, key))
}

/// [`find`] among the flows that bypass netfilter.
#[inline(always)]
fn find_bypassed<A: Family>(key: &mut FlowKey<A>) -> Option<*mut Flow<A>> {
    let edge = key.edge;
    key.edge = EDGE_BYPASS;
    let element = find(key);
    key.edge = edge;
    element
}

/// Rewrites the quoted packet into what its sender sent, `rewrite` reversed, with its header checksum and, where it is
/// quoted, its transport checksum; the ICMP checksum follows, for `pseudo` too. A function of its own in the kernel too, for
/// its stack.
#[inline(never)]
fn rewrite_quoted<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    quote: &Quote<A>,
    rewrite: &Tuple<A>,
    pseudo: u64,
) -> bool {
    quoted(ctx, packet, quote, rewrite, pseudo).is_some()
}

#[inline(always)]
fn quoted<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    quote: &Quote<A>,
    rewrite: &Tuple<A>,
    pseudo: u64,
) -> Option<()> {
    let addresses = translate::crossed_difference(&quote.tuple, rewrite);
    let (old_ports, new_ports) = (translate::ports_word(&quote.tuple), translate::ports_word(rewrite).rotate_left(16));
    let ports = difference(old_ports, new_ports);
    let mut total = addresses + ports + A::rewrite_quoted(ctx, quote.network, rewrite, addresses)?;
    ctx.store(quote.transport, &new_ports)?;
    // SCTP's checksum needs the length of the whole packet; who reads the quote looks at ports and tag.
    let offset = quote.transport + transport::checksum_offset(quote.protocol);
    // Behind the message there may be a frame's padding.
    if quote.protocol != PROTOCOL_SCTP
        && offset + 2 <= C::NETWORK + packet.length
        && let Some(before) = ctx.load::<u16>(offset)
    {
        let after = if quote.protocol == PROTOCOL_UDP {
            checksum::update_udp(before, addresses + ports)
        } else {
            checksum::update(before, addresses + ports)
        };
        ctx.store(offset, &after)?;
        total += difference(u32::from(before), u32::from(after));
    }
    let checksum = packet.transport::<C>() + transport::ICMP_CHECKSUM;
    ctx.adjust_checksum(checksum, total, false, false)?;
    if A::ICMP_PSEUDO { ctx.adjust_checksum(checksum, pseudo, true, false) } else { Some(()) }
}
