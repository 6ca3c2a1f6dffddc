//! Counting: one function for packets that are dropped or rejected, one for traffic of a service port. And telling what became
//! of a packet: who listens ([`event`]), of those that are dropped; and the log of development builds (feature
//! `packet-trace`), of all.

use sheave_common::DropReason;
use sheave_common::drop_reason::SYN_FAILOVERS;

use crate::context::Context;
use crate::event;
use crate::maps::{DROP_COUNTERS, SERVICE_COUNTERS};
use crate::packet::Packet;
use crate::packet::network::Network;
use crate::verdict::Verdict;

/// Counts a packet that is not simply passed.
#[inline(always)]
pub fn count(reason: DropReason) {
    if let Some(counter) = DROP_COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the element is this CPU's own, and the program is not preempted by itself.
        unsafe { *counter += 1 };
    }
}

/// Counts a SYN that goes to another backend than the one that did not answer.
#[inline(always)]
pub fn failover() {
    if let Some(counter) = DROP_COUNTERS.get_ptr_mut(SYN_FAILOVERS) {
        // SAFETY: as in `count`.
        unsafe { *counter += 1 };
    }
}

/// Counts a new connection of a service port.
#[inline(always)]
pub fn connection(service_id: u32) {
    if let Some(counter) = SERVICE_COUNTERS.get_ptr_mut(service_id) {
        // SAFETY: as in `count`.
        unsafe { (*counter).connections += 1 };
    }
}

/// New connections of a service port that this CPU has counted so far.
#[inline(always)]
pub fn connections(service_id: u32) -> u32 {
    // SAFETY: as in `count`.
    SERVICE_COUNTERS.get_ptr_mut(service_id).map_or(0, |counter| unsafe { (*counter).connections as u32 })
}

/// Counts a translated packet of a service port.
#[inline(always)]
pub fn packet(service_id: u32, bytes: u32) {
    if let Some(counter) = SERVICE_COUNTERS.get_ptr_mut(service_id) {
        // SAFETY: as in `count`.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}

/// Tells what became of a packet; it is as it came.
#[inline(always)]
pub fn decision<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, verdict: Verdict) {
    if let Verdict::Drop(reason) = verdict {
        event::dropped(&packet.key, reason);
    }
    log(ctx, packet, verdict);
}

/// Nothing, unless built with `packet-trace`.
#[cfg(not(feature = "packet-trace"))]
#[inline(always)]
fn log<C: Context, A: Network>(_ctx: &C, _packet: &Packet<A>, _verdict: Verdict) {}

/// Logs a packet.
#[cfg(feature = "packet-trace")]
#[inline(always)]
fn log<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, verdict: Verdict) {
    log_bits(ctx, packet, verdict.to_bits());
}

/// A function of its own in the kernel too, so that its stack is not that of the packet's own path.
#[cfg(feature = "packet-trace")]
#[inline(never)]
fn log_bits<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, verdict: u64) {
    let tuple = &packet.key.tuple;
    let (name, detail) = match Verdict::from_bits(verdict) {
        Verdict::Pass => ("pass", 0),
        Verdict::Transmit => ("transmit", 0),
        Verdict::Action(action) => ("action", action as u32),
        Verdict::Drop(reason) => ("drop", reason as u32),
    };
    aya_log_ebpf::info!(
        ctx,
        "if {} xdp {} protocol {} {:i}:{} > {:i}:{} flags {:x}: {} {}",
        ctx.ifindex(),
        C::XDP as u8,
        packet.key.protocol,
        tuple.source.to_ip(),
        u16::from_be(tuple.source_port_be),
        tuple.destination.to_ip(),
        u16::from_be(tuple.destination_port_be),
        packet.tcp_flags,
        name,
        detail
    );
}
