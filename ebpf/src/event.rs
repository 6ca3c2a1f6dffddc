//! Events for `sheave monitor`: flows that begin and end, and packets that don't get through. They are written only while
//! somebody listens, and counted as lost where nobody reads them in time. Of a flow's packets only the first and the last
//! come by here, so the others pay nothing.
//!
//! Each of these is a function of its own in the kernel too, with nothing below it, for its callers' stack.

use sheave_common::DropReason;
use sheave_common::event::{EDGE_SOCKET, Event, LOST, UNTIL, kind};
use sheave_common::flow::{Flow, FlowKey, Tuple};
use sheave_common::socket::SocketPeer;

use crate::maps::{EVENTS, Family, LISTENER};
use crate::{atomic, features};

/// A packet is dropped, or answered in its receiver's place.
#[inline(never)]
pub fn dropped<A: Family>(key: &FlowKey<A>, reason: DropReason) {
    if !listened() {
        return;
    }
    send::<A>(kind::DROP, reason as u8, key.protocol, key.edge, |event| {
        // SAFETY: `send` gives room for an event.
        unsafe { put_tuple(event, &key.tuple) };
    });
}

/// A flow begins or ends (`what` is one of [`kind`]); `key` is that of the half that `flow` is.
#[inline(never)]
pub fn flow<A: Family>(key: &FlowKey<A>, flow: &Flow<A>, what: u8) {
    if !listened() {
        return;
    }
    send::<A>(what, 0, key.protocol, key.edge, |event| {
        // SAFETY: as above.
        unsafe {
            put_tuple(event, &key.tuple);
            (&raw mut (*event).rewritten_source).write(flow.rewrite.source.words());
            (&raw mut (*event).rewritten_destination).write(flow.rewrite.destination.words());
            (&raw mut (*event).rewritten_source_port_be).write(flow.rewrite.source_port_be);
            (&raw mut (*event).rewritten_destination_port_be).write(flow.rewrite.destination_port_be);
            (&raw mut (*event).service_id).write(flow.service_id);
            (&raw mut (*event).backend_id).write(flow.backend_id);
            (&raw mut (*event).flags).write(flow.flags);
        }
    });
}

/// A process's call is pointed at a backend.
#[inline(never)]
pub fn connected<A: Family>(address: &A, port_be: u16, protocol: u8, peer: &SocketPeer<A>) {
    if !listened() {
        return;
    }
    send::<A>(kind::NEW, 0, protocol, EDGE_SOCKET, |event| {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*event).destination).write(address.words());
            (&raw mut (*event).destination_port_be).write(port_be);
            (&raw mut (*event).rewritten_destination).write(peer.address.words());
            (&raw mut (*event).rewritten_destination_port_be).write(peer.port_be);
            (&raw mut (*event).service_id).write(peer.service_id);
            (&raw mut (*event).backend_id).write(peer.backend_id);
        }
    });
}

/// A process's call is refused.
#[inline(never)]
pub fn refused<A: Family>(address: &A, port_be: u16, protocol: u8, reason: DropReason) {
    if !listened() {
        return;
    }
    send::<A>(kind::DROP, reason as u8, protocol, EDGE_SOCKET, |event| {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*event).destination).write(address.words());
            (&raw mut (*event).destination_port_be).write(port_be);
        }
    });
}

/// Whether somebody wants to know.
#[inline(always)]
fn listened() -> bool {
    // SAFETY: an aligned word of an array element.
    let until = LISTENER.get_ptr(UNTIL).map_or(0, |until| unsafe { until.read_volatile() });
    until != 0 && u64::from(features::now()) <= until
}

/// Sends an event of which `fill` writes what is not zero.
#[inline(always)]
fn send<A: Family>(what: u8, reason: u8, protocol: u8, edge: u32, fill: impl FnOnce(*mut Event)) {
    let Some(mut room) = EVENTS.reserve(0) else { return lose() };
    let event = room.as_mut_ptr();
    // Word by word: zeroing all of it at once would be a call of memset.
    for word in 0..size_of::<Event>() / 4 {
        // SAFETY: the room is an event's, whose alignment and size are multiples of a word's.
        unsafe { event.cast::<u32>().add(word).write_volatile(0) };
    }
    // SAFETY: as above.
    unsafe {
        (&raw mut (*event).kind).write(what);
        (&raw mut (*event).family).write(if size_of::<A>() == 4 { 4 } else { 6 });
        (&raw mut (*event).protocol).write(protocol);
        (&raw mut (*event).reason).write(reason);
        (&raw mut (*event).edge).write(edge);
    }
    fill(event);
    room.submit(0);
}

/// # Safety
///
/// `event` is room for an event.
#[inline(always)]
unsafe fn put_tuple<A: Family>(event: *mut Event, tuple: &Tuple<A>) {
    // SAFETY: by the caller's promise.
    unsafe {
        (&raw mut (*event).source).write(tuple.source.words());
        (&raw mut (*event).destination).write(tuple.destination.words());
        (&raw mut (*event).source_port_be).write(tuple.source_port_be);
        (&raw mut (*event).destination_port_be).write(tuple.destination_port_be);
    }
}

/// Nobody has read for too long: there is no room.
#[inline(always)]
fn lose() {
    if let Some(lost) = LISTENER.get_ptr_mut(LOST) {
        // SAFETY: as in `load`: a map value, aligned to 8 octets.
        unsafe { atomic::add(lost.cast(), 1) };
    }
}
