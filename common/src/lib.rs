//! What both sides of the kernel line agree on: the key and value of every BPF map, the maps' names,
//! the numbered drop reasons, and the pure arithmetic that programs and tests share.
//!
//! Every type is `repr(C)`, has a size and field offsets fixed by compile-time asserts, and has no implicit padding:
//! the kernel hashes and compares keys as bytes. Addresses and ports are in network byte order, and the names of
//! ports say so (`_be`). Everything else is in the machine's own order.
//!
//! A change of any layout raises [`LAYOUT_VERSION`].
#![no_std]

pub mod address;
pub mod affinity;
pub mod backend;
pub mod checksum;
pub mod config;
pub mod counter;
pub mod crc32c;
pub mod drop_reason;
pub mod event;
pub mod features;
pub mod filter;
pub mod flow;
pub mod fragment;
pub mod frontend;
pub mod interface;
mod layout;
pub mod load;
pub mod names;
pub mod prefix;
pub mod service_name;
pub mod socket;

pub use address::{Address, Ipv4Address, Ipv6Address};
pub use drop_reason::DropReason;

/// Version of all the map layouts in this crate together. It is stored in [`config::Config::layout_version`] of the
/// pinned config map; a loader refuses pins of another version.
pub const LAYOUT_VERSION: u32 = 5;

/// IP protocol number of ICMP (RFC 792).
pub const PROTOCOL_ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// IP protocol number of ICMPv6 (RFC 4443).
pub const PROTOCOL_ICMPV6: u8 = 58;
/// IP protocol number of SCTP.
pub const PROTOCOL_SCTP: u8 = 132;
