//! `conntrack4/6` and `half_open4/6`: how to rewrite the packets that carry a tuple.
//!
//! Flows come in pairs of mirror entries. For a key `k` with rewrite `r`, the sibling's key is `r` reversed (same
//! protocol and edge) and its rewrite is `k` reversed, so that each half can find and recreate the other.

use crate::{Address, Ipv4Address, Ipv6Address};

/// Source and destination of a packet of a known protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Tuple<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Source port, network order.
    pub source_port_be: u16,
    /// Destination port, network order.
    pub destination_port_be: u16,
}

impl<A: Copy> Tuple<A> {
    /// The tuple of packets in the other direction.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port_be: self.destination_port_be,
            destination_port_be: self.source_port_be,
        }
    }
}

/// Key of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FlowKey<A> {
    /// The packet's tuple before the rewrite.
    pub tuple: Tuple<A>,
    /// Where the client's packets meet this node: [`EDGE_UPLINK`], or the ifindex of a pod's veth (host side); or else
    /// [`EDGE_BYPASS`].
    pub edge: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Zeroes.
    pub reserved: [u8; 3],
}

/// The edge of all uplinks and tunnels together: a reply may come back by another one.
pub const EDGE_UPLINK: u32 = 0;

/// The edge of flows that bypass netfilter, wherever their packets enter: the client's and the backend's alike. No interface
/// has this index.
pub const EDGE_BYPASS: u32 = u32::MAX;

/// Value of a flow. Its rewrite never changes; `last_seen`, `state`, `closing` and `tried` are written in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Flow<A> {
    /// The packet's tuple after the rewrite.
    pub rewrite: Tuple<A>,
    /// Service port that the flow belongs to.
    pub service_id: u32,
    /// Backend that the flow uses.
    pub backend_id: u32,
    /// Seconds of CLOCK_MONOTONIC when a packet was last seen; written at most once a second.
    pub last_seen: u32,
    /// One of [`state`].
    pub state: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Bits of [`closing`], the same in both halves.
    pub closing: u8,
    /// When the flow was made, or a client's SYN sent on again: the lowest octet of CLOCK_MONOTONIC in units of 2^24
    /// nanoseconds (16.8 ms). Counts while no SYN-ACK has been seen.
    pub tried: u8,
}

/// Values of [`Flow::state`].
pub mod state {
    /// TCP: a SYN was translated, no SYN-ACK yet. UDP: no reply yet.
    pub const NEW: u8 = 0;
    /// TCP: a SYN-ACK was seen, the handshake's last ACK not yet. UDP: the backend has replied. Half-open flows only.
    pub const ANSWERED: u8 = 1;
    /// TCP: the handshake is complete. UDP: the client sent again after a reply, or the backend in a later second.
    pub const ESTABLISHED: u8 = 2;
}

/// Bits of [`Flow::closing`]. None set: the connection is open.
pub mod closing {
    /// The client sent FIN.
    pub const CLIENT_FIN: u8 = 1 << 0;
    /// The backend sent FIN.
    pub const BACKEND_FIN: u8 = 1 << 1;
    /// Either side sent RST.
    pub const RESET: u8 = 1 << 2;
    /// The connection is over, and its backend's load ([`crate::load`]) is less by it.
    pub const UNCOUNTED: u8 = 1 << 3;

    /// Whether the connection is over: reset, or closed by both sides.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(closing: u8) -> bool {
        const BOTH: u8 = CLIENT_FIN | BACKEND_FIN;
        closing & RESET != 0 || closing & BOTH == BOTH
    }
}

/// Where a flow is in its life, for people, by [`Flow::state`] and [`Flow::closing`].
#[must_use]
pub const fn phase(state: u8, closing: u8) -> &'static str {
    match (closing, state) {
        (bits, _) if bits & closing::RESET != 0 => "reset",
        (bits, _) if closing::is_over(bits) => "closed",
        (bits, _) if bits != 0 => "closing",
        (_, state::NEW) => "new",
        (_, state::ANSWERED) => "answered",
        (_, state::ESTABLISHED) => "established",
        _ => "unknown",
    }
}

/// Bits of [`Flow::flags`].
pub mod flags {
    /// The half that translates the backend's packets; without it, the half that translates the client's.
    pub const REPLY: u8 = 1 << 0;
    /// The rewritten source is an address of this node, or its rewritten packets leave by another road than the
    /// stack's: the program redirects them itself, by route.
    pub const REDIRECT: u8 = 1 << 1;
    /// The pod is its own backend: packets are turned round into the veth that they came from.
    pub const HAIRPIN: u8 = 1 << 2;
    /// With [`REDIRECT`]: the backend is a pod of this node, and the client's address stays.
    pub const BYPASS: u8 = 1 << 3;
    /// The flow counts in its backend's load, see [`crate::load`].
    pub const COUNTED: u8 = 1 << 4;
}

impl<A: Copy> Tuple<A> {
    /// Writes the tuple of packets in the other direction.
    #[inline(always)]
    pub const fn write_reversed(&self, place: &mut Self) {
        place.source = self.destination;
        place.destination = self.source;
        place.source_port_be = self.destination_port_be;
        place.destination_port_be = self.source_port_be;
    }
}

impl<A: Address> Tuple<A> {
    /// Whether this is the tuple of packets in the other direction.
    #[inline(always)]
    #[must_use]
    pub fn is_reverse_of(&self, other: &Self) -> bool {
        self.source_port_be == other.destination_port_be
            && self.destination_port_be == other.source_port_be
            && self.source.words() == other.destination.words()
            && self.destination.words() == other.source.words()
    }
}

impl<A: Copy> FlowKey<A> {
    /// A key.
    #[inline(always)]
    pub const fn new(tuple: Tuple<A>, protocol: u8, edge: u32) -> Self {
        Self { tuple, edge, protocol, reserved: [0; 3] }
    }
}

impl<A: Copy> Flow<A> {
    /// Writes the key of the mirror entry, given this entry's own key. Field by field: a value on the way would take as much
    /// again of a BPF program's small stack.
    #[inline(always)]
    pub const fn write_sibling_key(&self, key: &FlowKey<A>, place: &mut FlowKey<A>) {
        self.rewrite.write_reversed(&mut place.tuple);
        place.edge = key.edge;
        place.protocol = key.protocol;
        place.reserved = key.reserved;
    }

    /// Writes the mirror entry, given this entry's own key.
    #[inline(always)]
    pub const fn write_sibling(&self, key: &FlowKey<A>, place: &mut Self) {
        key.tuple.write_reversed(&mut place.rewrite);
        place.service_id = self.service_id;
        place.backend_id = self.backend_id;
        place.last_seen = self.last_seen;
        place.state = self.state;
        place.flags = self.flags ^ flags::REPLY;
        place.closing = self.closing;
        place.tried = self.tried;
    }

    /// Key of the mirror entry, given this entry's own key.
    #[inline(always)]
    #[must_use]
    pub const fn sibling_key(&self, key: &FlowKey<A>) -> FlowKey<A> {
        let mut sibling = *key;
        self.write_sibling_key(key, &mut sibling);
        sibling
    }

    /// The mirror entry, given this entry's own key.
    #[inline(always)]
    #[must_use]
    pub const fn sibling(&self, key: &FlowKey<A>) -> Self {
        let mut sibling = *self;
        self.write_sibling(key, &mut sibling);
        sibling
    }
}

crate::layout::layout!(Tuple<Ipv4Address>, size 12, {
    source @ 0 + 4, destination @ 4 + 4, source_port_be @ 8 + 2, destination_port_be @ 10 + 2,
});
crate::layout::layout!(Tuple<Ipv6Address>, size 36, {
    source @ 0 + 16, destination @ 16 + 16, source_port_be @ 32 + 2, destination_port_be @ 34 + 2,
});
crate::layout::layout!(FlowKey<Ipv4Address>, size 20, {
    tuple @ 0 + 12, edge @ 12 + 4, protocol @ 16 + 1, reserved @ 17 + 3,
});
crate::layout::layout!(FlowKey<Ipv6Address>, size 44, {
    tuple @ 0 + 36, edge @ 36 + 4, protocol @ 40 + 1, reserved @ 41 + 3,
});
crate::layout::layout!(Flow<Ipv4Address>, size 28, {
    rewrite @ 0 + 12, service_id @ 12 + 4, backend_id @ 16 + 4, last_seen @ 20 + 4,
    state @ 24 + 1, flags @ 25 + 1, closing @ 26 + 1, tried @ 27 + 1,
});
crate::layout::layout!(Flow<Ipv6Address>, size 52, {
    rewrite @ 0 + 36, service_id @ 36 + 4, backend_id @ 40 + 4, last_seen @ 44 + 4,
    state @ 48 + 1, flags @ 49 + 1, closing @ 50 + 1, tried @ 51 + 1,
});
