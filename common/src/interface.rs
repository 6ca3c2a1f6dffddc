//! `interfaces`: ifindex (u32) → what the programs need to know of an interface that Sheave is attached to.

use crate::{Ipv4Address, Ipv6Address};

/// Value of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Interface {
    /// Source address of packets that are SNATed out of this interface; unspecified if it has none.
    pub source4: Ipv4Address,
    /// The same for IPv6.
    pub source6: Ipv6Address,
    /// Bits of [`flags`].
    pub flags: u32,
}

/// Bits of [`Interface::flags`].
pub mod flags {
    /// Host side of a pod's veth.
    pub const POD: u32 = 1 << 0;
    /// Uplink or tunnel.
    pub const UPLINK: u32 = 1 << 1;
    /// Sheave's XDP program is attached, so frames may be sent here with XDP_REDIRECT.
    pub const XDP: u32 = 1 << 2;
}

crate::layout::layout!(Interface, size 24, { source4 @ 0 + 4, source6 @ 4 + 16, flags @ 20 + 4 });
