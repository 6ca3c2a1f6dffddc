//! LPM tries: `source_ranges4/6` (who may use a load-balancer IP) and `service_cidrs4/6` (where ClusterIPs come from).
//! Every value is a u32 of 1: a key that is there says all there is to say.

use crate::{Ipv4Address, Ipv6Address};

/// Key of an LPM trie: the first bits of `data` in the order of its octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Prefix<T> {
    /// Number of bits of `data` that count.
    pub prefix_len: u32,
    /// What is matched; bits beyond `prefix_len` are zero.
    pub data: T,
}

/// What `source_ranges4/6` match: clients of a service port. The service id counts whole, so a key's `prefix_len` is 32
/// more than the range's own length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct SourceRange<A> {
    /// Service port.
    pub service_id: u32,
    /// The client's address, or the range's network.
    pub address: A,
}

crate::layout::layout!(SourceRange<Ipv4Address>, size 8, { service_id @ 0 + 4, address @ 4 + 4 });
crate::layout::layout!(SourceRange<Ipv6Address>, size 20, { service_id @ 0 + 4, address @ 4 + 16 });
crate::layout::layout!(Prefix<SourceRange<Ipv4Address>>, size 12, { prefix_len @ 0 + 4, data @ 4 + 8 });
crate::layout::layout!(Prefix<SourceRange<Ipv6Address>>, size 24, { prefix_len @ 0 + 4, data @ 4 + 20 });
crate::layout::layout!(Prefix<Ipv4Address>, size 8, { prefix_len @ 0 + 4, data @ 4 + 4 });
crate::layout::layout!(Prefix<Ipv6Address>, size 20, { prefix_len @ 0 + 4, data @ 4 + 16 });
