//! Sending a translated packet on without the stack: by route (SNAT to another node, and its replies), or back into the
//! veth that it came from (hairpin).
//!
//! Every packet that leaves here has had its TTL decremented, except a hairpin, which leaves by the only interface that
//! it can and whose rewritten tuple matches no flow there; so no packet can circle.

use aya_ebpf::bindings::bpf_redir_neigh;
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_neigh};
use sheave_common::DropReason;
use sheave_common::flow::{Flow, Tuple};
use sheave_common::interface::flags as interface_flags;

use crate::context::Context;
use crate::maps::INTERFACES_MAP;
use crate::packet::network::{Answer, Network};
use crate::packet::{Packet, Part, ethernet};
use crate::route::{self, NoRoute, Route};
use crate::verdict::Verdict;
use crate::{bypass, observe, reject};

/// Translates a TCP or UDP packet and sends it on by route.
#[inline(always)]
pub fn by_route<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, flow: &Flow<A>) -> Verdict {
    Verdict::from_bits(by_route_bits(ctx, packet, flow))
}

/// A function of its own in the kernel too, so that its stack is not that of the path to the stack.
#[inline(never)]
fn by_route_bits<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, flow: &Flow<A>) -> u64 {
    translate_and_send(ctx, packet, flow).to_bits()
}

#[inline(always)]
fn translate_and_send<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, flow: &Flow<A>) -> Verdict {
    let route = match checked_route(ctx, packet, &flow.rewrite) {
        Ok(route) => route,
        Err(verdict) => return verdict,
    };
    if C::XDP && !xdp_can_send(ctx, route) {
        return Verdict::Pass;
    }
    if A::rewrite(ctx, packet, &flow.rewrite, true).is_none() {
        return Verdict::Drop(DropReason::RewriteFailed);
    }
    // What is answered instead has returned above: it is counted as that, not as traffic of the service.
    observe::packet(flow.service_id, packet.length);
    send(ctx, route)
}

/// The route of a packet after its rewrite; TTL and MTU are checked, and answered where they don't allow it.
#[inline(always)]
fn checked_route<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    rewrite: &Tuple<A>,
) -> Result<&'static Route<A>, Verdict> {
    if packet.ttl <= 1 {
        return Err(match packet.part {
            _ if C::XDP => Verdict::Pass,
            // Only a first fragment is answered (RFC 1122, 3.2.2).
            Part::Later => Verdict::Drop(DropReason::TtlExceeded),
            _ => reject::error(ctx, packet, Answer::TimeExceeded, 0, DropReason::TtlExceeded),
        });
    }
    let length = segment_length(ctx, packet);
    match route::find(ctx, rewrite, packet.key.protocol, length) {
        Ok(route) => Ok(route),
        Err(_) if C::XDP => Err(Verdict::Pass),
        Err(NoRoute::TooBig(_)) if packet.part == Part::Later => Err(Verdict::Drop(DropReason::TooBig)),
        Err(NoRoute::TooBig(mtu)) => Err(reject::error(ctx, packet, Answer::TooBig, mtu, DropReason::TooBig)),
        Err(NoRoute::Unreachable) => Err(Verdict::Drop(DropReason::NoRoute)),
    }
}

/// Says in place of a segment's length that segments differ (the kernel's GSO_BY_FRAGS): SCTP, whose chunks are never cut.
const SEGMENTS_DIFFER: u32 = 0xffff;

/// Bytes of the packet from the network header on, or of one of its segments if it is a GSO packet; 0 where segments have
/// no length in common.
#[inline(always)]
fn segment_length<C: Context, A: Network>(ctx: &C, packet: &Packet<A>) -> u32 {
    let payload = ctx.segment_payload();
    if payload == 0 {
        return packet.length;
    }
    if payload == SEGMENTS_DIFFER {
        return 0;
    }
    let transport = match ctx.load::<crate::packet::transport::Tcp>(packet.transport::<C>()) {
        Some(tcp) if packet.key.protocol == sheave_common::PROTOCOL_TCP => u32::from(tcp.data_offset >> 4) * 4,
        _ => crate::packet::transport::UDP_LENGTH,
    };
    packet.transport::<C>() - C::NETWORK + transport + payload
}

/// Sends a rewritten packet.
#[inline(always)]
pub fn send<C: Context, A: Network>(ctx: &C, route: &Route<A>) -> Verdict {
    if C::XDP {
        let header = ethernet::Header {
            destination: route.destination_mac,
            source: route.source_mac,
            ether_type_be: A::ETHER_TYPE_BE,
        };
        if ctx.store(0, &header).is_none() {
            return Verdict::Drop(DropReason::RewriteFailed);
        }
        if route.ifindex == ctx.ifindex() {
            return Verdict::Transmit;
        }
        // SAFETY: the helper takes scalars only.
        return Verdict::Action(unsafe { bpf_redirect(route.ifindex, 0) } as i32);
    }
    if let Some(action) = bypass::send(ctx, route) {
        return Verdict::Action(action);
    }
    let mut next_hop = route.next_hop.neighbour();
    // SAFETY: the struct is as long as is said.
    let action =
        unsafe { bpf_redirect_neigh(route.ifindex, &raw mut next_hop, size_of::<bpf_redir_neigh>() as i32, 0) };
    Verdict::Action(action as i32)
}

/// XDP sends only to neighbours that are known, and to another interface only if that runs its program too and the frame is in
/// one piece, since kernels and drivers differ in what they redirect; tc does the rest.
#[inline(always)]
fn xdp_can_send<C: Context, A: Network>(ctx: &C, route: &Route<A>) -> bool {
    if !route.resolved {
        return false;
    }
    if route.ifindex == ctx.ifindex() {
        return true;
    }
    if !ctx.is_linear() {
        return false;
    }
    // SAFETY: a map value stays readable while the program runs.
    unsafe { INTERFACES_MAP.get(route.ifindex) }.is_some_and(|interface| interface.flags & interface_flags::XDP != 0)
}

/// Swaps the MAC addresses and sends the packet out of the interface that it came in by.
#[inline(always)]
pub fn back<C: Context>(ctx: &C) -> Verdict {
    if C::NETWORK != ethernet::LENGTH {
        return Verdict::Drop(DropReason::HairpinUnsupported);
    }
    let Some(header) = ctx.load::<ethernet::Header>(0) else { return Verdict::Drop(DropReason::RewriteFailed) };
    let swapped = [header.source, header.destination];
    if ctx.store(0, &swapped).is_none() {
        return Verdict::Drop(DropReason::RewriteFailed);
    }
    // SAFETY: the helper takes scalars only.
    Verdict::Action(unsafe { bpf_redirect(ctx.ifindex(), 0) } as i32)
}
