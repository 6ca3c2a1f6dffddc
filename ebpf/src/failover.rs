//! SYN failover: a client that sends its SYN again, because nothing has answered it, gets another backend.
//!
//! What counts is a SYN that the same client's same port sends half a second or more after the last one, while its flow has seen no
//! answer: copies that a network makes come within milliseconds, a client's own retransmission after a second (RFC 6298, 2.1).
//!
//! - The other backend is chosen from the same set, at random or as the service's algorithm says, but never the one that was
//!   tried last. Where there is no other one, the flow stays as it is, its port included.
//! - The flow to the first backend is forgotten before the new one is made. What that backend still sends is no flow's: it goes
//!   to the client, or to this node's port, as it is, and is answered with a reset.
//! - With session affinity the client is bound to the other backend. But if the first one has answered anybody since the SYN
//!   was sent, it lives and the SYN was lost: then the client stays with it. Where nothing tells the two apart, it moves.

use sheave_common::PROTOCOL_UDP;
use sheave_common::config::{Config, flags as config_flags};
use sheave_common::event::kind;
use sheave_common::flow::{EDGE_BYPASS, Flow, FlowKey, flags, state};

use crate::maps::Family;
use crate::packet::Packet;
use crate::packet::transport::flags as tcp;
use crate::{conntrack, event, features, load, observe};

/// How long after the last SYN the next one is a client's own, in units of [`features::stamp`]: half a second.
const PATIENCE: i8 = 30;

/// Elements of [`ANSWERED`]: the ids of that many backends in a row each have one of their own.
const BACKENDS: usize = 65_536;

/// When a backend last answered a SYN, by [`features::stamp`] and the lowest bits of its id; 0 if never. Only a hint, so it need
/// not outlive the programs.
pub static mut ANSWERED: [u32; BACKENDS] = [0; BACKENDS];

/// Whether a packet is a client's second attempt to reach a backend that hasn't answered the first. `flow` is the packet's own,
/// half-open, and still counts.
#[inline(always)]
pub fn is_due<A: Family>(flow: &Flow<A>, packet: &Packet<A>, now: u32, config: &Config) -> bool {
    config.flags & (config_flags::SYN_FAILOVER | config_flags::LEAVING) == config_flags::SYN_FAILOVER
        && packet.key.protocol != PROTOCOL_UDP
        && packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN
        && flow.flags & flags::REPLY == 0
        && flow.state == state::NEW
        // The stamp goes round in 4.3 seconds. One of another CPU may be a moment later than this one's.
        && (features::elapsed(flow.last_seen, now) >= 2 || age(flow, features::stamp()) as i8 >= PATIENCE)
}

/// Notes that a SYN is sent on again, in its flow's element.
///
/// # Safety
///
/// `element` is a map value of this program run.
#[inline(always)]
pub unsafe fn try_again<A>(element: *mut Flow<A>) {
    // SAFETY: by the caller's promise the pointer is a map value; the field is a byte.
    unsafe { (&raw mut (*element).tried).write_volatile(features::stamp() as u8) };
}

/// Notes that a backend answers a SYN.
#[inline(always)]
pub fn answered(backend_id: u32) {
    // SAFETY: the index is below the array's length, and an aligned word is written whole.
    unsafe { (&raw mut ANSWERED[backend_id as usize % BACKENDS]).write_volatile(features::stamp()) };
}

/// Whether the backend of a flow has answered anybody since the flow's SYN was last sent on.
#[inline(always)]
pub fn lives<A>(flow: &Flow<A>) -> bool {
    // SAFETY: as in `answered`.
    let answered = unsafe { (&raw const ANSWERED[flow.backend_id as usize % BACKENDS]).read_volatile() };
    let stamp = features::stamp();
    stamp.wrapping_sub(answered) < u32::from(age(flow, stamp))
}

/// How long ago a flow's SYN was last sent on, in units of [`features::stamp`], modulo 256.
#[inline(always)]
fn age<A>(flow: &Flow<A>, stamp: u32) -> u8 {
    (stamp as u8).wrapping_sub(flow.tried)
}

/// Forgets an unanswered flow, of which `forward` is the client's half's key but for the edge. False, and nothing is forgotten, if
/// the answer has come meanwhile. A function of its own in the kernel too, for its stack.
#[inline(never)]
pub fn forget<A: Family>(forward: &mut FlowKey<A>, flow: &Flow<A>) -> bool {
    let edge = forward.edge;
    if flow.flags & flags::BYPASS != 0 {
        forward.edge = EDGE_BYPASS;
    }
    let forgotten = conntrack::remove_unanswered(forward, flow);
    if forgotten {
        observe::failover();
        event::flow(&*forward, flow, kind::FAILOVER);
        load::take_back(flow);
    }
    forward.edge = edge;
    forgotten
}
