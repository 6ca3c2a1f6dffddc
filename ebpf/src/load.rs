//! How many connections backends have, for services that choose by it: `backend_loads`.
//!
//! A connection is counted when its flow is made, so that the next one of a burst sees it, or when a process's socket is
//! pointed at its backend. It is taken away when it is seen to end. What isn't seen (idle datagram flows, flows that an LRU map
//! evicts, sockets that are closed, two CPUs that see an end at once) is set right by the loader, which counts again.

use sheave_common::flow::{Flow, closing, flags};
use sheave_common::load::Load;

use crate::atomic;
use crate::maps::{BACKEND_LOADS, Family, NOEXIST};

/// Counts a connection that a backend gets. A function of its own in the kernel too, for its stack.
#[inline(never)]
pub fn open(id: u32) {
    if add(id, 1) {
        return;
    }
    // Another CPU may have been faster. If there is no room, the backend counts as idle.
    if BACKEND_LOADS.insert(id, Load { connections: 1 }, NOEXIST).is_err() {
        add(id, 1);
    }
}

/// Takes a flow's connection away once it is over, and marks the flow, so that it is taken away only once.
#[inline(always)]
pub fn close<A>(flow: &mut Flow<A>) {
    if flow.flags & flags::COUNTED != 0 && closing::is_over(flow.closing) && flow.closing & closing::UNCOUNTED == 0 {
        flow.closing |= closing::UNCOUNTED;
        add(flow.backend_id, -1);
    }
}

/// Takes back the connection of a flow that was never answered and is forgotten.
#[inline(always)]
pub fn take_back<A>(flow: &Flow<A>) {
    if flow.flags & flags::COUNTED != 0 {
        add(flow.backend_id, -1);
    }
}

/// Connections that a backend has.
#[inline(always)]
fn connections(id: u32) -> u64 {
    // SAFETY: a map value stays readable while the program runs, and this is one aligned word.
    let connections = BACKEND_LOADS.get_ptr(id).map(|load| unsafe { (&raw const (*load).connections).read_volatile() });
    connections.map_or(0, |connections| connections.max(0) as u64)
}

/// Of two backends, the one that would have fewer connections for its weight with one more.
#[inline(always)]
pub fn lighter<A: Family>(first: u32, second: u32) -> u32 {
    let weight = |id| {
        // SAFETY: as in `connections`. An element that is being recycled makes this choice a worse one, and no more.
        let weight = A::backend(id).map(|backend| unsafe { (&raw const (*backend).weight).read_volatile() });
        u64::from(weight.unwrap_or(1).max(1))
    };
    let (after_first, after_second) = (connections(first) + 1, connections(second) + 1);
    if after_first * weight(second) <= after_second * weight(first) { first } else { second }
}

/// False if there is no element.
#[inline(always)]
fn add(id: u32, change: i64) -> bool {
    let Some(load) = BACKEND_LOADS.get_ptr_mut(id) else { return false };
    // SAFETY: a map value stays writable while the program runs, and is aligned to 8 octets.
    unsafe { atomic::add(&raw mut (*load).connections, change) };
    true
}
