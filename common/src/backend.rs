//! `backends4` and `backends6`: backend id (u32, never reused, never 0) → one endpoint of a service port.
//! `backend_table`: index → [`TableElement`].

use crate::{Address, Ipv4Address, Ipv6Address};

/// Backend ids that lie in one element of `backend_table`: an array's element takes 8 octets at least. The id at an index
/// of a run, as [`crate::frontend::BackendSet`] counts them, is in the element of half that index. No two runs share an
/// element.
pub const IDS_PER_ELEMENT: u32 = 2;

/// Value of the backend table: backend ids, 0 where a run ends before.
pub type TableElement = [u32; IDS_PER_ELEMENT as usize];

/// Value of a backend. It is replaced as a whole, never written in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Backend<A: Address> {
    /// Unique over all writes of frontends and backends; see DESIGN, "Replacing an element".
    pub version: u64,
    /// Service port that this backend serves.
    pub service_id: u32,
    /// Endpoint address.
    pub address: A,
    /// Endpoint port, network order.
    pub port_be: u16,
    /// Share of new connections relative to the other backends of its set; 1 unless weighted.
    pub weight: u16,
    /// Bits of [`flags`].
    pub flags: u32,
    /// Zeroes.
    pub reserved: A::Fill,
}

/// Bits of [`Backend::flags`].
pub mod flags {
    /// The endpoint is on this node.
    pub const LOCAL: u32 = 1 << 0;
    /// The endpoint is terminating and still serving.
    pub const TERMINATING: u32 = 1 << 1;
    /// The backend is in its service port's cluster set.
    pub const IN_CLUSTER_SET: u32 = 1 << 2;
    /// The backend is in its service port's local set.
    pub const IN_LOCAL_SET: u32 = 1 << 3;
    /// Datagrams of flows that exist may reach the backend; all may that are in a set, and those that only serve what they
    /// have. Without it the backend is leaving, and stays for packets in flight alone.
    pub const SERVING: u32 = 1 << 4;
    /// The backend's connections are counted, because its service chooses by them.
    pub const COUNTED: u32 = 1 << 5;
    /// Packets may reach a backend that has one of these.
    pub const IN_USE: u32 = IN_CLUSTER_SET | IN_LOCAL_SET | SERVING;
}

crate::layout::layout!(Backend<Ipv4Address>, size 24, {
    version @ 0 + 8, service_id @ 8 + 4, address @ 12 + 4, port_be @ 16 + 2, weight @ 18 + 2, flags @ 20 + 4,
    reserved @ 24 + 0,
});

crate::layout::layout!(Backend<Ipv6Address>, size 40, {
    version @ 0 + 8, service_id @ 8 + 4, address @ 12 + 16, port_be @ 28 + 2, weight @ 30 + 2, flags @ 32 + 4,
    reserved @ 36 + 4,
});
