//! `frontends4` and `frontends6`: an (address, port, protocol) that clients connect to.

use crate::{Address, Ipv4Address, Ipv6Address};

/// Key of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FrontendKey<A> {
    /// Service address, or a node address for a nodePort.
    pub address: A,
    /// Service port or nodePort, network order. 0 together with protocol 0 names the address as a whole, see
    /// [`flags::WHOLE_ADDRESS`] and [`flags::SERVICE_ADDRESS`].
    pub port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// A run of the backend table: the backends of one set. Unused (length 0) means that the set is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct BackendSet {
    /// Index of the first backend id in `backend_table`: even, as each of its elements holds two.
    pub first: u32,
    /// Number of backend ids.
    pub length: u32,
}

/// Value of a frontend. It is replaced as a whole, never written in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Frontend {
    /// Unique over all writes of frontends and backends; see DESIGN, "Replacing an element".
    pub version: u64,
    /// Service port that this frontend belongs to; 0 for a mark on an address.
    pub service_id: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// Backends that traffic may reach under policy Cluster.
    pub cluster: BackendSet,
    /// Backends that traffic may reach under policy Local.
    pub local: BackendSet,
    /// Session affinity time-out in seconds (1 to 86400); 0 means no affinity.
    pub affinity_seconds: u32,
    /// One of [`algorithm`].
    pub algorithm: u32,
}

/// Values of [`Frontend::algorithm`]: how a new connection's index into its set's run is found.
pub mod algorithm {
    /// At random.
    pub const RANDOM: u32 = 0;
    /// In turn, by each CPU for itself.
    pub const ROUND_ROBIN: u32 = 1;
    /// By [`super::client_hash`]: the run is a Maglev table.
    pub const MAGLEV: u32 = 2;
    /// Of two at random, the one with fewer connections for its weight: see [`crate::load`].
    pub const LEAST_CONNECTIONS: u32 = 3;
}

/// The hash by which all nodes find the same element for a client: of its address and, but with session affinity (when
/// `port_be` is 0), its port, and of the port that it asks for.
#[inline(always)]
#[must_use]
pub fn client_hash<A: Address>(client: &A, port_be: u16, frontend_port_be: u16, protocol: u8) -> u32 {
    let mut hash = (u32::from(u16::from_be(port_be)) << 16 | u32::from(u16::from_be(frontend_port_be)))
        ^ u32::from(protocol).wrapping_mul(0x9e37_79b9);
    for word in client.words() {
        // MurmurHash3's finalizer, once for each word.
        hash = (hash ^ u32::from_be(word)).wrapping_mul(0x85eb_ca6b);
        hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
        hash ^= hash >> 16;
    }
    hash
}

/// Bits of [`Frontend::flags`].
pub mod flags {
    /// The service's ClusterIP.
    pub const CLUSTER_IP: u32 = 1 << 0;
    /// A node address with the nodePort.
    pub const NODE_PORT: u32 = 1 << 1;
    /// A load-balancer ingress IP.
    pub const LOAD_BALANCER: u32 = 1 << 2;
    /// One of spec.externalIPs.
    pub const EXTERNAL_IP: u32 = 1 << 3;
    /// Traffic that comes from inside the cluster (pods, this host) uses the local set. Never set on frontends that
    /// fall under the external traffic policy: for those the short circuit holds.
    pub const INTERNAL_LOCAL: u32 = 1 << 4;
    /// Traffic that comes from outside the cluster uses the local set.
    pub const EXTERNAL_LOCAL: u32 = 1 << 5;
    /// For processes on this host only (127.0.0.1 with a nodePort); packets never match it.
    pub const HOST_ONLY: u32 = 1 << 6;
    /// Not a frontend but a mark on an address of which all ports belong to a Service (a ClusterIP): a packet to a
    /// port that it doesn't have is rejected. Key: the address, port 0, protocol 0.
    pub const WHOLE_ADDRESS: u32 = 1 << 7;
    /// Not a frontend but a mark on an address that has frontends and is no address of this node (a load-balancer or
    /// external IP): what can't be told from traffic to them, such as a fragment without ports, is not forwarded. The same
    /// key; a ClusterIP has [`WHOLE_ADDRESS`] instead.
    pub const SERVICE_ADDRESS: u32 = 1 << 8;
    /// Only clients that `source_ranges4/6` name for this service port may open connections; for load-balancer IPs.
    pub const SOURCE_RANGES: u32 = 1 << 9;
    /// On a mark: some frontend of the address has an endpoint, so a ping of the address is answered.
    pub const HAS_ENDPOINT: u32 = 1 << 10;
}

impl<A> FrontendKey<A> {
    /// The key for an (address, port in network order, protocol).
    #[inline(always)]
    pub const fn new(address: A, port_be: u16, protocol: u8) -> Self {
        Self { address, port_be, protocol, reserved: 0 }
    }

    /// The key of the mark on an address, see [`flags::WHOLE_ADDRESS`] and [`flags::SERVICE_ADDRESS`].
    #[inline(always)]
    pub const fn mark(address: A) -> Self {
        Self::new(address, 0, 0)
    }
}

crate::layout::layout!(BackendSet, size 8, { first @ 0 + 4, length @ 4 + 4 });
crate::layout::layout!(FrontendKey<Ipv4Address>, size 8, {
    address @ 0 + 4, port_be @ 4 + 2, protocol @ 6 + 1, reserved @ 7 + 1,
});
crate::layout::layout!(FrontendKey<Ipv6Address>, size 20, {
    address @ 0 + 16, port_be @ 16 + 2, protocol @ 18 + 1, reserved @ 19 + 1,
});
crate::layout::layout!(Frontend, size 40, {
    version @ 0 + 8, service_id @ 8 + 4, flags @ 12 + 4, cluster @ 16 + 8, local @ 24 + 8,
    affinity_seconds @ 32 + 4, algorithm @ 36 + 4,
});
