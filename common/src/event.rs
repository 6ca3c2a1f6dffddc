//! `events` (ring buffer of [`Event`]s, for `sheave monitor`) and `listener` (array: [`UNTIL`] and [`LOST`]), which says whether
//! anybody listens: while nobody does, nothing is written.

/// Index in `listener`: second of CLOCK_MONOTONIC until which events are wanted. Who listens moves it on, so that one that was
/// killed is soon nobody.
pub const UNTIL: u32 = 0;
/// Index in `listener`: events so far for which the ring buffer had no room.
pub const LOST: u32 = 1;
/// Elements of `listener`.
pub const LISTENER: usize = 2;
/// Octets of `events`: room for some ten thousand events that nobody has read yet.
pub const OCTETS: usize = 1 << 20;

/// [`Event::edge`] of a process's connect() or sendmsg(), whose own address is not known yet: its source reads zero.
pub const EDGE_SOCKET: u32 = u32::MAX - 1;

/// Something that happened to a packet or a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Event {
    /// The packet's source address as words in memory order; IPv4's is the first.
    pub source: [u32; 4],
    /// Its destination.
    pub destination: [u32; 4],
    /// The source that the flow makes of it; zeroes if there is no flow.
    pub rewritten_source: [u32; 4],
    /// The destination that the flow makes of it.
    pub rewritten_destination: [u32; 4],
    /// Source port, network order.
    pub source_port_be: u16,
    /// Destination port, network order.
    pub destination_port_be: u16,
    /// Source port after the rewrite, network order.
    pub rewritten_source_port_be: u16,
    /// Destination port after the rewrite, network order.
    pub rewritten_destination_port_be: u16,
    /// Service port, 0 if there is no flow.
    pub service_id: u32,
    /// Backend, 0 if there is no flow.
    pub backend_id: u32,
    /// As [`crate::flow::FlowKey::edge`], or [`EDGE_SOCKET`].
    pub edge: u32,
    /// One of [`kind`].
    pub kind: u8,
    /// 4 or 6.
    pub family: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// A [`crate::DropReason`], if something was dropped.
    pub reason: u8,
    /// Bits of [`crate::flow::flags`].
    pub flags: u8,
    /// Zeroes.
    pub reserved: [u8; 7],
}

/// Values of [`Event::kind`].
pub mod kind {
    /// A packet was dropped, rejected or reset.
    pub const DROP: u8 = 0;
    /// A flow, or a socket's way to a backend, was made.
    pub const NEW: u8 = 1;
    /// A connection was closed by both sides, or reset. Flows that fall idle end unseen.
    pub const END: u8 = 2;
    /// A flow whose backend has not answered is given up for another one, whose flow's beginning follows.
    pub const FAILOVER: u8 = 3;
}

crate::layout::layout!(Event, size 96, {
    source @ 0 + 16, destination @ 16 + 16, rewritten_source @ 32 + 16, rewritten_destination @ 48 + 16,
    source_port_be @ 64 + 2, destination_port_be @ 66 + 2, rewritten_source_port_be @ 68 + 2,
    rewritten_destination_port_be @ 70 + 2, service_id @ 72 + 4, backend_id @ 76 + 4, edge @ 80 + 4,
    kind @ 84 + 1, family @ 85 + 1, protocol @ 86 + 1, reason @ 87 + 1, flags @ 88 + 1, reserved @ 89 + 7,
});
