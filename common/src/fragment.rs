//! `fragments4` and `fragments6`: the ports of a fragmented packet, which only its first fragment carries.

use crate::{Ipv4Address, Ipv6Address};

/// Key: what all fragments of one packet have in common (RFC 791, RFC 8200 4.5), and the edge and direction that they
/// were seen at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FragmentKey<A> {
    /// Source before the rewrite.
    pub source: A,
    /// Destination before the rewrite.
    pub destination: A,
    /// Identification, as it is sent; IPv4's 16 bits are the lower ones.
    pub identification: u32,
    /// As [`crate::flow::FlowKey::edge`].
    pub edge: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// 1 at egress hooks, 0 at ingress.
    pub egress: u8,
    /// Zeroes.
    pub reserved: [u8; 2],
}

/// Value: what the first fragment said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentPorts {
    /// Source port, network order.
    pub source_port_be: u16,
    /// Destination port, network order.
    pub destination_port_be: u16,
    /// Seconds of CLOCK_MONOTONIC when the first fragment was seen.
    pub seen: u32,
}

crate::layout::layout!(FragmentKey<Ipv4Address>, size 20, {
    source @ 0 + 4, destination @ 4 + 4, identification @ 8 + 4, edge @ 12 + 4, protocol @ 16 + 1, egress @ 17 + 1,
    reserved @ 18 + 2,
});
crate::layout::layout!(FragmentKey<Ipv6Address>, size 44, {
    source @ 0 + 16, destination @ 16 + 16, identification @ 32 + 4, edge @ 36 + 4, protocol @ 40 + 1, egress @ 41 + 1,
    reserved @ 42 + 2,
});
crate::layout::layout!(FragmentPorts, size 8, { source_port_be @ 0 + 2, destination_port_be @ 2 + 2, seen @ 4 + 4 });
