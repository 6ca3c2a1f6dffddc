//! Flows: finding them, keeping their state, and making them.
//!
//! Every flow begins in the half-open map, and moves to the established one when both sides have shown that they are there, so
//! that nothing which only claims to come from somewhere can push those out. TCP and SCTP say so by their handshakes; SCTP's
//! chunks come as TCP's flags ([`crate::packet::transport::sctp_flags`]). With UDP, somebody speaks again after an answer.

use core::mem::MaybeUninit;

use sheave_common::config::Config;
use sheave_common::event::kind;
use sheave_common::flow::{Flow, FlowKey, Tuple, closing, flags, state};
use sheave_common::frontend::FrontendKey;
use sheave_common::{DropReason, Ipv4Address, Ipv6Address, PROTOCOL_UDP};

use crate::edge::Direction;
use crate::maps::{self, ANY, Family, NOEXIST, Table};
use crate::packet::Packet;
use crate::packet::transport::flags as tcp;
use crate::scratch::scratch;
use crate::versioned;
use crate::{event, failover, features, filter, load, observe};

/// What changes in a flow's life.
#[derive(Clone, Copy)]
struct Life {
    last_seen: u32,
    state: u8,
    closing: u8,
}

impl Life {
    /// Of a flow in its map.
    ///
    /// # Safety
    ///
    /// `element` is a map value of this program run.
    #[inline(always)]
    unsafe fn of<A>(element: *const Flow<A>) -> Self {
        // SAFETY: by the caller's promise the pointer is a map value; each field is a whole word or byte.
        unsafe {
            Self {
                last_seen: (&raw const (*element).last_seen).read_volatile(),
                state: (&raw const (*element).state).read_volatile(),
                closing: (&raw const (*element).closing).read_volatile(),
            }
        }
    }

    /// Whether the flow has been idle for longer than its state allows.
    #[inline(always)]
    fn expired(self, protocol: u8, now: u32, config: &Config) -> bool {
        let timeout = config.timeouts.of(protocol, self.state, self.closing);
        features::elapsed(self.last_seen, now) > timeout
    }

    /// Whether the flow's connection is over: reset, or closed by both sides.
    #[inline(always)]
    fn closed(self) -> bool {
        closing::is_over(self.closing)
    }
}

/// Whether a flow in its map rewrites to the reverse of a tuple, that is, belongs to packets of that tuple as their sibling.
///
/// # Safety
///
/// `element` is a map value of this program run.
#[inline(always)]
unsafe fn turns_back<A: Family>(element: *const Flow<A>, tuple: &Tuple<A>) -> bool {
    // SAFETY: by the caller's promise the pointer is a map value. A rewrite never changes; an element that is being
    // recycled is one that was just evicted, which any check may miss by a moment.
    unsafe { &(*element).rewrite }.is_reverse_of(tuple)
}

/// What is known of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Found {
    /// No flow.
    Miss = 0,
    /// Its flow.
    Flow = 1,
    /// Its flow, which another may replace: the packet is a SYN that was sent before, and has not been answered ([`failover`]).
    Unanswered = 2,
    /// Its flow, which has become established with this packet.
    Completed = 3,
}

/// Finds the flow of a packet and keeps its state up to date. A miss includes flows that no longer count:
/// expired ones; a SYN's or a datagram's flow whose backend no longer serves, or whose frontend is another service's by now;
/// a SYN's flow that is closing; and flows whose packets travel the other way, which a sender on the wrong side must not
/// change.
///
/// `result` is filled unless it is a miss. It is a copy: the element may be evicted and reused at any time.
#[inline(always)]
pub fn find<A: Family>(packet: &Packet<A>, direction: Direction, now: u32, result: &mut MaybeUninit<Flow<A>>) -> Found {
    let established = A::flow(Table::Established, &packet.key);
    if let Some(element) = established {
        // SAFETY: a map value stays readable while the program runs.
        let flow = result.write(unsafe { maps::copy(element) });
        if !direction.applies(flow.flags) {
            return Found::Miss;
        }
        if is_steady(flow, packet, now) {
            return Found::Flow;
        }
    }
    find_changing(packet, direction, now, established.unwrap_or(core::ptr::null_mut()), result)
}

/// Whether a flow counts and stays as it is, as far as can be told at a glance: it was seen in this second, and the packet
/// neither opens nor closes anything. So are most packets.
#[inline(always)]
fn is_steady<A: Family>(flow: &Flow<A>, packet: &Packet<A>, now: u32) -> bool {
    flow.last_seen == now
        && flow.state == state::ESTABLISHED
        && flow.closing == 0
        && packet.tcp_flags & (tcp::SYN | tcp::FIN | tcp::RST) == 0
        && (packet.key.protocol != PROTOCOL_UDP || flow.flags & flags::REPLY != 0)
}

/// [`find`], whatever the flow's state; `established` is its element in that map, or null. A function of its own in the kernel too:
/// what it needs of the stack is free again when the packet is translated.
#[inline(never)]
fn find_changing<A: Family>(
    packet: &Packet<A>,
    direction: Direction,
    now: u32,
    established: *mut Flow<A>,
    result: &mut MaybeUninit<Flow<A>>,
) -> Found {
    let Some(config) = maps::config() else { return Found::Miss };
    let (element, table) = if !established.is_null() {
        (established, Table::Established)
    } else if let Some(element) = A::flow(Table::HalfOpen, &packet.key) {
        (element, Table::HalfOpen)
    } else if packet.tcp_flags & tcp::SYN == 0
        && let Some(element) = A::flow(Table::Established, &packet.key)
    {
        // Another CPU moved it between the two looks.
        (element, Table::Established)
    } else {
        return Found::Miss;
    };
    // SAFETY: a map value stays readable while the program runs.
    let flow = result.write(unsafe { maps::copy(element) });
    if !direction.applies(flow.flags) || !counts(flow, packet, now, config) {
        return Found::Miss;
    }
    let unanswered = table == Table::HalfOpen && failover::is_due(flow, packet, now, config);
    if unanswered {
        // SAFETY: as above.
        unsafe { failover::try_again(element) };
    }
    let completed = keep(element, flow, packet, now, table);
    if unanswered {
        Found::Unanswered
    } else if completed {
        Found::Completed
    } else {
        Found::Flow
    }
}

/// Whether a flow still counts for this packet.
#[inline(always)]
fn counts<A: Family>(flow: &Flow<A>, packet: &Packet<A>, now: u32, config: &Config) -> bool {
    let life = Life { last_seen: flow.last_seen, state: flow.state, closing: flow.closing };
    if life.expired(packet.key.protocol, now, config) {
        return false;
    }
    let opens = packet.key.protocol == PROTOCOL_UDP || packet.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    if flow.flags & flags::REPLY != 0 || !opens {
        return true;
    }
    let tuple = &packet.key.tuple;
    let frontend = FrontendKey::new(tuple.destination, tuple.destination_port_be, packet.key.protocol);
    flow.closing == 0 && versioned::is_serving::<A>(flow.backend_id) && versioned::serves(&frontend, flow.service_id)
}

/// Writes what a packet changes in its flow. Most packets change nothing: `last_seen` moves once a second. True if the flow has become
/// established.
#[inline(always)]
fn keep<A: Family>(element: *mut Flow<A>, flow: &mut Flow<A>, packet: &Packet<A>, now: u32, table: Table) -> bool {
    let reply = flow.flags & flags::REPLY != 0;
    let mut state = flow.state;
    let mut closing = flow.closing;
    if packet.key.protocol == PROTOCOL_UDP {
        if reply && state == state::NEW {
            state = state::ANSWERED;
        } else if state == state::ANSWERED && (!reply || now != flow.last_seen) {
            // A client that asks on, or a backend that goes on telling: one answer alone may be a flood's.
            state = state::ESTABLISHED;
        }
    } else {
        if packet.tcp_flags & tcp::RST != 0 {
            closing |= closing::RESET;
        }
        if packet.tcp_flags & tcp::FIN != 0 {
            closing |= if reply { closing::BACKEND_FIN } else { closing::CLIENT_FIN };
        }
        if table == Table::HalfOpen {
            if reply && packet.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK && state == state::NEW {
                state = state::ANSWERED;
                failover::answered(flow.backend_id);
            } else if !reply
                && packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::ACK
                && state == state::ANSWERED
            {
                state = state::ESTABLISHED;
            }
        }
    }
    if state != flow.state || closing != flow.closing || now != flow.last_seen {
        flow.state = state;
        flow.closing = closing;
        flow.last_seen = now;
        return change(element, flow, &packet.key, table);
    }
    false
}

/// Writes a change to both halves, recreates a half that was evicted, and moves a flow that has become established to that map: then
/// it is true.
///
/// The two directions of a connection are often two CPUs' work, so either half may know what the other does not yet:
/// `state` only rises and bits of `closing` are only set, and here both halves come to know what one of them does.
#[inline(never)]
fn change<A: Family>(element: *mut Flow<A>, flow: &mut Flow<A>, key: &FlowKey<A>, table: Table) -> bool {
    filter::admit(key, flow, flow.last_seen);
    let Some(sibling_key) = sibling_key(flow, key) else { return false };
    let mirror = A::flow(table, sibling_key);
    // Only a true mirror is touched: after a port was reused the other half may belong to another flow.
    // SAFETY: a map value stays readable memory while the program runs.
    let names_this = mirror.is_some_and(|other| unsafe { turns_back(other, &key.tuple) });
    if let Some(other) = mirror
        && names_this
    {
        // SAFETY: as above.
        unsafe { unite(flow, other) };
    }
    // SAFETY: as above.
    if closing::is_over(flow.closing) && !unsafe { Life::of(element) }.closed() {
        event::flow(key, &*flow, kind::END);
    }
    load::close(flow);
    let Some(sibling) = sibling(flow, key) else { return false };
    if table == Table::HalfOpen && flow.state == state::ESTABLISHED {
        // The established map first: a packet that comes between the two steps finds one or the other.
        if A::insert_flow(Table::Established, key, flow, ANY).is_ok()
            && A::insert_flow(Table::Established, sibling_key, sibling, ANY).is_ok()
        {
            A::remove_flow(Table::HalfOpen, key);
            A::remove_flow(Table::HalfOpen, sibling_key);
            return true;
        }
    }
    // SAFETY: a map value stays writable memory while the program runs.
    unsafe { write(element, flow) };
    match mirror {
        // SAFETY: as above.
        Some(other) if names_this => unsafe { write(other, flow) },
        Some(_) => {}
        // The client's port already carries a new connection, which a half of this one would hide.
        None if table == Table::Established && A::flow(Table::HalfOpen, sibling_key).is_some() => {}
        None => {
            // The half was evicted. Losing this race, or having no room, only means that the next second tries again.
            let _ = A::insert_flow(table, sibling_key, sibling, NOEXIST);
        }
    }
    false
}

/// [`Flow::sibling_key`] in this CPU's scratch.
#[inline(always)]
fn sibling_key<A: Family>(flow: &Flow<A>, key: &FlowKey<A>) -> Option<&'static FlowKey<A>> {
    let scratch = scratch::<A>()?;
    // SAFETY: the scratch is this run's alone, and of its fields this one is written by each function before it reads it.
    unsafe {
        let place = &mut (*scratch).sibling_key;
        flow.write_sibling_key(key, place);
        Some(place)
    }
}

/// [`Flow::sibling`] in this CPU's scratch.
#[inline(always)]
fn sibling<A: Family>(flow: &Flow<A>, key: &FlowKey<A>) -> Option<&'static Flow<A>> {
    let scratch = scratch::<A>()?;
    // SAFETY: as in `sibling_key`.
    unsafe {
        let place = &mut (*scratch).sibling;
        flow.write_sibling(key, place);
        Some(place)
    }
}

/// Adds to a flow what its element knows by now.
///
/// # Safety
///
/// `element` is a map value of this program run.
#[inline(always)]
unsafe fn unite<A>(flow: &mut Flow<A>, element: *const Flow<A>) {
    // SAFETY: by the caller's promise the pointer is a map value; each field is a whole byte.
    unsafe {
        flow.state = flow.state.max((&raw const (*element).state).read_volatile());
        flow.closing |= (&raw const (*element).closing).read_volatile();
    }
}

/// Writes the fields that change in a flow's life, without taking back what another CPU has written meanwhile.
///
/// # Safety
///
/// `element` is a map value of this program run.
#[inline(always)]
unsafe fn write<A: Copy>(element: *mut Flow<A>, flow: &Flow<A>) {
    // SAFETY: by the caller's promise the pointer is a map value; each field is a whole word or byte.
    unsafe {
        (&raw mut (*element).last_seen).write_volatile(flow.last_seen);
        if (&raw const (*element).state).read_volatile() < flow.state {
            (&raw mut (*element).state).write_volatile(flow.state);
        }
        let closing = (&raw const (*element).closing).read_volatile();
        if closing | flow.closing != closing {
            (&raw mut (*element).closing).write_volatile(closing | flow.closing);
        }
    }
}

/// What a new flow may have a reply tuple from, besides its client's own earlier flow and flows that have expired.
pub mod yields {
    /// Nobody else.
    pub const NOTHING: u32 = 0;
    /// Connections that are over. Their backend may still remember them (TIME-WAIT), and not like a new one on the same tuple.
    pub const CLOSED: u32 = 1;
    /// Those, and flows that were never established.
    pub const HALF_OPEN: u32 = 2;
}

/// [`claim`] and [`insert`] for the new flow in this CPU's scratch. Global functions in the kernel, whose verifier looks at
/// them once and not once for every port that is tried; so they take nothing but numbers.
macro_rules! claims {
    ($($name:ident: $address:ty;)+) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub extern "C" fn $name(yields: u32, now: u32) -> u32 {
                let Some(scratch) = scratch::<$address>() else { return 0 };
                // SAFETY: the scratch is this run's alone; `create` has filled both, and nothing else writes them meanwhile.
                let (forward, flow) = unsafe { (&(*scratch).forward, (*scratch).new_flow.assume_init_ref()) };
                u32::from(claim(forward, flow, yields, now) && insert(forward, flow))
            }
        )+
    };
}

claims! {
    claim_and_insert4: Ipv4Address;
    claim_and_insert6: Ipv6Address;
}

/// Whether the reply tuple of a new flow is free: nobody has it, or what has it [`yields`] and is removed.
#[inline(always)]
fn claim<A: Family>(forward: &FlowKey<A>, flow: &Flow<A>, yields: u32, now: u32) -> bool {
    let yields_closed = yields >= yields::CLOSED;
    vacate(Table::Established, forward, flow, yields_closed, now)
        && (vacate(Table::HalfOpen, forward, flow, yields_closed, now)
            || (yields >= yields::HALF_OPEN && take_over(forward, flow)))
}

/// [`claim`] for one map. A function of its own in the kernel too, for its stack.
#[inline(never)]
fn vacate<A: Family>(table: Table, forward: &FlowKey<A>, flow: &Flow<A>, yields_closed: bool, now: u32) -> bool {
    let Some(config) = maps::config() else { return false };
    let Some(reply) = sibling_key(flow, forward) else { return false };
    let Some(element) = A::flow(table, reply) else { return true };
    // SAFETY: a map value stays readable while the program runs.
    let (own, life) = unsafe { (turns_back(element, &forward.tuple), Life::of(element)) };
    if own || life.expired(reply.protocol, now, config) || (yields_closed && life.closed()) {
        A::remove_flow(table, reply);
        return true;
    }
    false
}

/// Ends the half-open flow that has a new flow's reply tuple: both halves, or its client's next packets would be sent to the backend
/// on the new flow's tuple. A function of its own in the kernel too, for its stack.
#[inline(never)]
fn take_over<A: Family>(forward: &FlowKey<A>, flow: &Flow<A>) -> bool {
    let Some(reply) = sibling_key(flow, forward) else { return false };
    let Some(element) = A::flow(Table::HalfOpen, reply) else { return false };
    // SAFETY: a map value stays readable while the program runs; what is read of one that is being recycled is checked below.
    let element = unsafe { &*element };
    if element.flags & flags::REPLY == 0 {
        return false;
    }
    let Some(key) = sibling_key(element, forward) else { return false };
    let is_its = |client: *mut Flow<A>| {
        // SAFETY: as above.
        maps::same_words(unsafe { &(*client).rewrite }, &flow.rewrite)
    };
    if A::flow(Table::HalfOpen, key).is_some_and(is_its) {
        A::remove_flow(Table::HalfOpen, key);
    }
    let Some(key) = sibling_key(flow, forward) else { return false };
    A::remove_flow(Table::HalfOpen, key);
    observe::count(DropReason::HalfOpenReplaced);
    true
}

/// Inserts both halves of a new flow; the reply key has been claimed. False if another CPU was faster or there is no room.
/// A function of its own in the kernel too, for its stack.
#[inline(never)]
fn insert<A: Family>(forward: &FlowKey<A>, flow: &Flow<A>) -> bool {
    let (Some(sibling_key), Some(sibling)) = (sibling_key(flow, forward), sibling(flow, forward)) else {
        return false;
    };
    filter::admit(forward, flow, flow.last_seen);
    if A::insert_flow(Table::HalfOpen, sibling_key, sibling, NOEXIST).is_err() {
        return false;
    }
    // A stale established flow of the same client port would hide the new one.
    A::remove_flow(Table::Established, forward);
    A::insert_flow(Table::HalfOpen, forward, flow, ANY).is_ok()
}

/// Removes both halves of a half-open flow; false, and nothing is removed, if it has been answered. The reply half goes first: a
/// client must not see the answer to a SYN that it no longer has a flow for.
#[inline(always)]
pub fn remove_unanswered<A: Family>(forward: &FlowKey<A>, flow: &Flow<A>) -> bool {
    let Some(reply) = sibling_key(flow, forward) else { return false };
    if let Some(element) = A::flow(Table::HalfOpen, reply) {
        // SAFETY: a map value stays readable while the program runs.
        let (own, life) = unsafe { (turns_back(element, &forward.tuple), Life::of(element)) };
        if own && life.state != state::NEW {
            return false;
        }
        if own {
            A::remove_flow(Table::HalfOpen, reply);
        }
    }
    A::remove_flow(Table::HalfOpen, forward);
    true
}
