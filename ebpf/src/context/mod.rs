//! XDP and tc packets behind one trait, so that parsing, translation and forwarding are written once.

mod skb;
mod xdp;

use core::ffi::c_void;

pub use skb::Skb;

/// Whom a frame is addressed to, by its destination MAC address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Addressee {
    /// This interface; under XDP, which does not know the interface's address, any single one.
    Us,
    /// Another interface. A bridge's ports see such frames, and an uplink in promiscuous mode.
    AnotherHost,
    /// Broadcast or multicast.
    Group,
}

/// A packet under a program.
pub trait Context {
    /// The packet is an XDP frame: what can't be finished here goes up to tc untouched.
    const XDP: bool;
    /// Offset of the network header.
    const NETWORK: u32;

    /// The kernel's context.
    fn as_ptr(&self) -> *mut c_void;
    /// Interface that the program runs on.
    fn ifindex(&self) -> u32;
    /// Whom the frame is addressed to.
    fn addressee(&self) -> Addressee;
    /// Bytes of the whole packet, link-layer header included.
    fn length(&self) -> u32;
    /// The packet is in one piece, as every device can send it.
    fn is_linear(&self) -> bool;
    /// Bytes of payload in each segment of a GSO packet; 0 if it isn't one.
    fn segment_payload(&self) -> u32;
    /// Where the packet has a `T`, to be read and written in place: the cheapest way, for offsets that the compiler knows (the
    /// verifier must). Valid until the next change of the packet by other means.
    fn at<T>(&self, offset: u32) -> Option<*mut T>;
    /// Reads at an offset from the frame's start.
    fn load<T: Copy>(&self, offset: u32) -> Option<T>;
    /// Reads into place, for values that are too large to move about a BPF stack.
    fn load_into<T: Copy>(&self, offset: u32, value: &mut T) -> Option<()>;
    /// Writes at an offset; `None` if that failed.
    fn store<T>(&self, offset: u32, value: &T) -> Option<()>;
    /// The same for data whose change no checksum inside the packet makes up for: IPv6 addresses, SCTP. A checksum of the whole
    /// packet that the device computed (CHECKSUM_COMPLETE) follows.
    fn store_uncompensated<T>(&self, offset: u32, value: &T) -> Option<()>;
    /// What [`Context::store_uncompensated`] does beside storing, for data that changed in place by `difference` (a
    /// one's-complement sum).
    fn follow(&self, difference: u64);
    /// Adjusts a TCP, UDP or ICMP checksum. `pseudo`: the data is part of the pseudo-header. `udp`: 0 means none.
    fn adjust_checksum(&self, offset: u32, difference: u64, pseudo: bool, udp: bool) -> Option<()>;
    /// Adjusts a TCP or UDP checksum at an offset that the compiler knows, for addresses and ports that changed by so much.
    fn adjust_checksum_at(&self, offset: u32, addresses: u64, ports: u64, udp: bool) -> Option<()>;
}
