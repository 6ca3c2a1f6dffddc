//! Making a flow for the first packet of a connection: choosing a backend, deciding on SNAT, and claiming a reply tuple.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::bpf_get_prandom_u32;
use sheave_common::DropReason;
use sheave_common::backend::flags as backend_flags;
use sheave_common::event::kind;
use sheave_common::flow::{Flow, flags, state};

use crate::balance::{self, From, Origin};
use crate::conntrack::yields;
use crate::context::Context;
use crate::packet::Packet;
use crate::packet::network::Network;
use crate::scratch::scratch;
use crate::{bypass, event, failover, features, load, maps, observe, route};

/// How many source ports are tried, from a random one on, before a half-open flow has to give up its own. Later tries also take
/// ports whose last connection is closed but may be remembered by the backend.
const PORT_ATTEMPTS: u32 = 24;
const POLITE_ATTEMPTS: u32 = 16;
/// How many ports are then looked at for a half-open flow before the connection is refused.
const TAKEOVER_ATTEMPTS: u32 = 8;

/// Where in the range the next half-open flow is looked for. They are taken in turn, and each new flow comes right behind: in a
/// flood those have their turn first that have waited longest, and an honest handshake has the time of a whole round.
pub static mut NEXT_TAKEOVER: u32 = 0;

/// Makes the flow of a packet to a frontend and inserts both halves. The flow of a SYN that has not been answered
/// ([`From::is_again`]) is in `result` already, and stays where there is no other backend.
/// `result` is filled if it succeeds.
#[inline(always)]
pub fn flow<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    from: From,
    now: u32,
    result: &mut MaybeUninit<Flow<A>>,
) -> Result<(), DropReason> {
    if choose(packet, from, now, result)? { make(ctx, packet, from.origin(), now, result) } else { Ok(()) }
}

/// Chooses a backend for a new flow, and forgets the flow that has not been answered; false if that one stays. A function of its
/// own in the kernel too, so that its stack is not that of making the flow.
#[inline(never)]
fn choose<A: Network>(
    packet: &Packet<A>,
    from: From,
    now: u32,
    unanswered: &MaybeUninit<Flow<A>>,
) -> Result<bool, DropReason> {
    let scratch = scratch::<A>().ok_or(DropReason::RewriteFailed)?;
    // SAFETY: the scratch is this run's alone, and this field is used here, by `make`, `choose_for_packet` and `claim_and_insert` only.
    let forward = unsafe { &mut (*scratch).forward };
    maps::copy_words(&packet.key, forward);
    let from = from.by(packet.key.tuple.source_port_be);
    if !from.is_again() {
        balance::choose_for_packet::<A>(from, now)?;
        return Ok(true);
    }
    // SAFETY: whoever says that it is not the first attempt has filled it.
    let flow = unsafe { unanswered.assume_init_ref() };
    let from = from.unanswered_by(flow.backend_id, failover::lives(flow));
    if balance::choose_for_packet::<A>(from, now).is_err() {
        return Ok(false);
    }
    // SAFETY: `choose_for_packet` has filled this whenever it succeeds.
    let id = unsafe { (*scratch).choice.assume_init_ref() }.id;
    Ok(id != flow.backend_id && failover::forget(forward, flow))
}

/// Makes the flow to the backend that [`choose`] has left in this CPU's scratch. A function of its own in the kernel too, so
/// that its stack is not the fast path's.
#[inline(never)]
fn make<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    origin: Origin,
    now: u32,
    result: &mut MaybeUninit<Flow<A>>,
) -> Result<(), DropReason> {
    let scratch = scratch::<A>().ok_or(DropReason::RewriteFailed)?;
    // SAFETY: the scratch is this run's alone, and these two fields are used here, by `choose` and by `claim_and_insert` only.
    let (forward, new_flow) = unsafe { (&mut (*scratch).forward, &mut (*scratch).new_flow) };
    let flow = toward_backend(packet, origin, now, new_flow)?;
    if flow.flags & flags::BYPASS != 0 {
        bypass::settle(ctx, forward, flow);
    } else if flow.flags & flags::REDIRECT != 0 {
        route::source(ctx, &mut flow.rewrite, forward.protocol)?;
    }
    claim_port::<A>(flow, now)?;
    event::flow(&*forward, &*flow, kind::NEW);
    if flow.flags & flags::COUNTED != 0 {
        load::open(flow.backend_id);
    }
    maps::copy_words(&*flow, result.as_mut_ptr());
    Ok(())
}

/// A flow to the backend that was chosen, with the client's own port, and with its own address unless it is a hairpin.
#[inline(always)]
fn toward_backend<'a, A: Network>(
    packet: &Packet<A>,
    origin: Origin,
    now: u32,
    result: &'a mut MaybeUninit<Flow<A>>,
) -> Result<&'a mut Flow<A>, DropReason> {
    let config = maps::config().ok_or(DropReason::RewriteFailed)?;
    let key = &packet.key;
    let client = &key.tuple.source;
    let scratch = scratch::<A>().ok_or(DropReason::RewriteFailed)?;
    // SAFETY: the scratch is this run's alone, and `choose` has filled this.
    let choice = unsafe { (*scratch).choice.assume_init_ref() };
    let backend = &choice.backend;
    let hairpin = origin == Origin::Inside && backend.address == *client;
    let flow_flags = if hairpin {
        flags::HAIRPIN
    } else if features::has(features::BYPASS) && backend.flags & backend_flags::LOCAL != 0 {
        flags::REDIRECT | flags::BYPASS
    } else if origin == Origin::Outside && backend.flags & backend_flags::LOCAL == 0 {
        flags::REDIRECT
    } else {
        0
    };
    let counted = if backend.flags & backend_flags::COUNTED != 0 { flags::COUNTED } else { 0 };
    let flow = result.as_mut_ptr();
    // Field by field: a value on the way would take as much again of the stack.
    // SAFETY: the place is a flow's, and every field is written before it is read.
    unsafe {
        let rewrite = &raw mut (*flow).rewrite;
        (&raw mut (*rewrite).source).write(if hairpin { A::hairpin(config) } else { *client });
        (&raw mut (*rewrite).destination).write(backend.address);
        (&raw mut (*rewrite).source_port_be).write(key.tuple.source_port_be);
        (&raw mut (*rewrite).destination_port_be).write(backend.port_be);
        (&raw mut (*flow).service_id).write(backend.service_id);
        (&raw mut (*flow).backend_id).write(choice.id);
        (&raw mut (*flow).last_seen).write(now);
        (&raw mut (*flow).state).write(state::NEW);
        (&raw mut (*flow).flags).write(flow_flags | counted);
        (&raw mut (*flow).closing).write(0);
        (&raw mut (*flow).tried).write(features::stamp() as u8);
        Ok(result.assume_init_mut())
    }
}

/// Claims a reply tuple and inserts both halves.
///
/// SNAT to an address of this node must not use a client's port number, which may be a local socket's; elsewhere the port
/// moves only if another flow has the tuple.
/// A function of its own in the kernel too, for its stack.
#[inline(never)]
fn claim_port<A: Network>(flow: &mut Flow<A>, now: u32) -> Result<(), DropReason> {
    let config = maps::config().ok_or(DropReason::RewriteFailed)?;
    let first = u32::from(config.snat_port_first);
    let range = u32::from(config.snat_port_last).wrapping_sub(first).wrapping_add(1);
    if range == 0 || range > 65_536 {
        return Err(DropReason::SnatPortsExhausted);
    }
    // SAFETY: the helper takes no arguments.
    let start = unsafe { bpf_get_prandom_u32() };
    for attempt in 0..PORT_ATTEMPTS + TAKEOVER_ATTEMPTS {
        let moved = attempt > 0 || flow.flags & (flags::REDIRECT | flags::BYPASS) == flags::REDIRECT;
        let takes_over = attempt >= PORT_ATTEMPTS;
        if moved {
            let offset = if takes_over { next_takeover() } else { start.wrapping_add(attempt) };
            flow.rewrite.source_port_be = ((first + offset % range) as u16).to_be();
        }
        let yields = if takes_over {
            yields::HALF_OPEN
        } else if moved && attempt < POLITE_ATTEMPTS {
            yields::NOTHING
        } else {
            yields::CLOSED
        };
        if A::claim_and_insert(yields, now) {
            observe::connection(flow.service_id);
            return Ok(());
        }
    }
    Err(DropReason::SnatPortsExhausted)
}

/// Moves [`NEXT_TAKEOVER`] on.
#[inline(always)]
fn next_takeover() -> u32 {
    // SAFETY: an aligned word, which CPUs read and write whole. Two that read the same look for another port in their next tries.
    unsafe {
        let next = (&raw const NEXT_TAKEOVER).read_volatile();
        (&raw mut NEXT_TAKEOVER).write_volatile(next.wrapping_add(1));
        next
    }
}
