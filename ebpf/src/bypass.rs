//! Past netfilter (`--bypass-netfilter`): packets to a pod of this node go from the hook that they enter by straight into the
//! pod's network namespace, and the pod's answers as straight back. The host's stack sees neither.
//!
//! Both halves of such a flow live at [`EDGE_BYPASS`], because the answers enter at another interface than the client's packets.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::{bpf_redirect_peer, bpf_skb_change_type};
use sheave_common::flow::{EDGE_BYPASS, Flow, FlowKey, flags};
use sheave_common::interface::flags as interface_flags;

use crate::conntrack::{self, Found};
use crate::context::Context;
use crate::edge::Direction;
use crate::features;
use crate::maps::INTERFACES_MAP;
use crate::packet::network::Network;
use crate::packet::{Packet, ethernet};
use crate::route::{self, Route};

/// The kernel's PACKET_HOST (linux/if_packet.h)
const PACKET_HOST: u32 = 0;

/// Gives a new flow that may bypass netfilter its edge, or takes the bypass from it where its packets don't leave by a pod's
/// veth: a backend that is a process of this host has none, and bridged pods are behind a bridge. A function of its own in the
/// kernel too, for its stack.
#[inline(never)]
pub fn settle<C: Context, A: Network>(ctx: &C, forward: &mut FlowKey<A>, flow: &mut Flow<A>) {
    if route::find(ctx, &flow.rewrite, forward.protocol, 0).is_ok_and(|route| is_pod(route.ifindex)) {
        forward.edge = EDGE_BYPASS;
    } else {
        flow.flags &= flags::COUNTED;
    }
}

/// As [`conntrack::find`] at a hook where packets enter, for the flows that bypass netfilter.
#[inline(always)]
pub fn find<A: Network>(packet: &mut Packet<A>, now: u32, result: &mut MaybeUninit<Flow<A>>) -> Found {
    if !features::has(features::BYPASSED) {
        return Found::Miss;
    }
    let edge = packet.key.edge;
    packet.key.edge = EDGE_BYPASS;
    let found = conntrack::find(packet, Direction::Ingress, now, result);
    packet.key.edge = edge;
    found
}

/// Puts a rewritten packet into the network namespace of the pod that its route leads to; `None` if that is not a pod's veth,
/// its neighbour is unknown yet, or the packet has no link-layer header. What the kernel does then is a verdict.
#[inline(always)]
pub fn send<C: Context, A: Network>(ctx: &C, route: &Route<A>) -> Option<i32> {
    if C::XDP
        || !features::has(features::BYPASSED)
        || !route.resolved
        || C::NETWORK != ethernet::LENGTH
        || !is_pod(route.ifindex)
    {
        return None;
    }
    redirect(ctx, route)
}

/// A function of its own in the kernel too, for its stack.
#[inline(never)]
fn redirect<C: Context, A: Network>(ctx: &C, route: &Route<A>) -> Option<i32> {
    let header = ethernet::Header {
        destination: route.destination_mac,
        source: route.source_mac,
        ether_type_be: A::ETHER_TYPE_BE,
    };
    ctx.store(0, &header)?;
    // SAFETY: the context is the program's own, and the helpers take scalars besides. A bridged pod's frame is addressed to the
    // bridge, so that the kernel has marked it as another host's.
    unsafe {
        bpf_skb_change_type(ctx.as_ptr().cast(), PACKET_HOST);
        Some(bpf_redirect_peer(route.ifindex, 0) as i32)
    }
}

#[inline(always)]
fn is_pod(ifindex: u32) -> bool {
    // SAFETY: a map value stays readable while the program runs.
    unsafe { INTERFACES_MAP.get(ifindex) }.is_some_and(|interface| interface.flags & interface_flags::POD != 0)
}
