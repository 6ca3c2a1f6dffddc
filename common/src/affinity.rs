//! `affinity4` and `affinity6`: which backend a client of a service port last used; `new_affinity4` and `new_affinity6`: the same while
//! none of the client's connections is established, so that clients that are none can't push out others. Processes of this host are in
//! the first two at once.
//!
//! A client is an address at an edge: a pod that sends with another pod's address changes nothing for that one.

use crate::{Ipv4Address, Ipv6Address};

/// Key of a client's affinity. Which frontend and which source port the client used does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct AffinityKey<A> {
    /// Service port.
    pub service_id: u32,
    /// Where the client's packets meet this node, as in [`crate::flow::FlowKey`]; [`crate::flow::EDGE_UPLINK`] for
    /// processes as well.
    pub edge: u32,
    /// The client's address; for processes of this host, the node's address ([`crate::config::Config`]).
    pub client: A,
}

/// Value of a client's affinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Affinity {
    /// Backend of the client's last new connection.
    pub backend_id: u32,
    /// Seconds of CLOCK_MONOTONIC when that connection was new; the time-out counts from here.
    pub last_new_connection: u32,
}

crate::layout::layout!(AffinityKey<Ipv4Address>, size 12, { service_id @ 0 + 4, edge @ 4 + 4, client @ 8 + 4 });
crate::layout::layout!(AffinityKey<Ipv6Address>, size 24, { service_id @ 0 + 4, edge @ 4 + 4, client @ 8 + 16 });
crate::layout::layout!(Affinity, size 8, { backend_id @ 0 + 4, last_new_connection @ 4 + 4 });
