//! Making a flow for the first packet of a connection: choosing a backend, deciding on SNAT, and claiming a reply tuple.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::bpf_get_prandom_u32;
use sheave_common::backend::flags as backend_flags;
use sheave_common::flow::{Flow, Tuple, flags, state};
use sheave_common::frontend::FrontendKey;
use sheave_common::{DropReason, Ipv4Address};

use crate::balance::{self, Origin};
use crate::context::Context;
use crate::maps::{self, Family};
use crate::packet::Packet;
use crate::{conntrack, observe, route};

/// How many source ports are tried before the connection is refused. Later tries also take ports whose last connection is
/// closed but may be remembered by the backend.
const PORT_ATTEMPTS: u32 = 24;
const POLITE_ATTEMPTS: u32 = 16;

/// Makes the flow of a packet to a frontend and inserts both halves.
/// `result` is filled if it succeeds. A function of its own in the kernel too, so that its stack is not the fast path's.
#[inline(never)]
pub fn flow<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    origin: Origin,
    now: u32,
    result: &mut MaybeUninit<Flow<Ipv4Address>>,
) -> Result<(), DropReason> {
    let config = maps::config().ok_or(DropReason::RewriteFailed)?;
    let key = &packet.key;
    let client = &key.tuple.source;
    let frontend = FrontendKey::new(key.tuple.destination, key.tuple.destination_port_be, key.protocol);
    let choice = balance::choose(&frontend, origin, client, now)?;
    let backend = &choice.backend;
    let mut rewrite = Tuple {
        source: *client,
        destination: backend.address,
        source_port_be: key.tuple.source_port_be,
        destination_port_be: backend.port_be,
    };
    let mut flow_flags = 0;
    if origin == Origin::Inside && backend.address == *client {
        rewrite.source = Ipv4Address::hairpin(config);
        flow_flags = flags::HAIRPIN;
    } else if origin == Origin::Outside && backend.flags & backend_flags::LOCAL == 0 {
        rewrite.source = route::source(ctx, &rewrite, key.protocol)?;
        flow_flags = flags::REDIRECT;
    }
    let mut flow = Flow {
        rewrite,
        service_id: backend.service_id,
        backend_id: choice.id,
        last_seen: now,
        state: state::NEW,
        flags: flow_flags,
        closing: 0,
        reserved: 0,
    };
    // SNAT to an address of this node must not use a client's port number, which may be a local socket's; elsewhere the
    // port moves only if another flow has the tuple.
    let first = u32::from(config.snat_port_first);
    let range = u32::from(config.snat_port_last).wrapping_sub(first).wrapping_add(1);
    if range == 0 || range > 65_536 {
        return Err(DropReason::SnatPortsExhausted);
    }
    // SAFETY: the helper takes no arguments.
    let start = unsafe { bpf_get_prandom_u32() };
    for attempt in 0..PORT_ATTEMPTS {
        let moved = attempt > 0 || flow.flags & flags::REDIRECT != 0;
        if moved {
            let port = first + start.wrapping_add(attempt) % range;
            flow.rewrite.source_port_be = (port as u16).to_be();
        }
        let keep_closed = moved && attempt < POLITE_ATTEMPTS;
        if conntrack::claim(key, &flow, keep_closed, now) && conntrack::insert(key, &flow) {
            observe::connection(flow.service_id);
            result.write(flow);
            return Ok(());
        }
    }
    Err(DropReason::SnatPortsExhausted)
}
