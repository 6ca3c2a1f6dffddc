//! Which packets need no look at the hash maps, see [`sheave_common::filter`].

use sheave_common::filter::element;
use sheave_common::flow::{Flow, FlowKey, flags};

use crate::features;
use crate::maps::{self, DESTINATIONS, Family, SOURCES};

/// Whether the destination of a packet that enters may be a frontend's address, or a flow's.
#[inline(always)]
pub fn may_enter<A: Family>(destination: &A) -> bool {
    // SAFETY: an aligned word of an array element.
    DESTINATIONS.get_ptr(element(destination)).is_none_or(|known| unsafe { known.read_volatile() } != 0)
}

/// Whether the source of a packet that leaves may be the backend of a flow.
#[inline(always)]
pub fn may_leave<A: Family>(source: &A, now: u32) -> bool {
    // SAFETY: an aligned word of an array element.
    let seen = SOURCES.get_ptr(element(source)).map(|seen| unsafe { seen.read_volatile() });
    match seen {
        Some(0) => false,
        Some(seen) if seen != now => recently(seen, now),
        _ => true,
    }
}

/// Whether a flow that was last seen then may still count, whatever its state.
#[inline(always)]
fn recently(seen: u32, now: u32) -> bool {
    let Some(config) = maps::config() else { return true };
    let timeouts = &config.timeouts;
    let tcp = timeouts.established.max(timeouts.closing).max(timeouts.syn).max(timeouts.reset);
    features::elapsed(seen, now) <= tcp.max(timeouts.udp_established).max(timeouts.udp_new)
}

/// Lets packets of a flow's other half in, or out; `key` is that of the half that `flow` is. A function of its own in the
/// kernel too, for its callers' stack.
#[inline(never)]
pub fn admit<A: Family>(key: &FlowKey<A>, flow: &Flow<A>, now: u32) {
    let reply = flow.flags & flags::REPLY != 0;
    let (array, address, value) = if flow.flags & (flags::REDIRECT | flags::HAIRPIN) != 0 {
        (&DESTINATIONS, if reply { &key.tuple.destination } else { &flow.rewrite.source }, 1)
    } else {
        (&SOURCES, if reply { &key.tuple.source } else { &flow.rewrite.destination }, now)
    };
    if let Some(known) = array.get_ptr_mut(element(address)) {
        // SAFETY: an aligned word of an array element, which other CPUs set to the same or nearly so.
        unsafe {
            if known.read_volatile() != value {
                known.write_volatile(value);
            }
        }
    }
}
