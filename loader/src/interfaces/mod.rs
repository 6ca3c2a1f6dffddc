//! The machine's interfaces as Sheave sees them: found and followed by rtnetlink, in the network namespace of the
//! process. Never by /sys/class/net, which may show another namespace's.
//!
//! [`discover`] decides what an interface is, [`state`] keeps what netlink told, [`watch`] listens. Who consumes the
//! events attaches programs and sweeps flows; this module touches nothing.

mod details;
pub mod discover;
mod message;
pub mod state;
pub mod toward;
pub mod watch;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use details::{Details, details};
pub use watch::{InterfaceError, list, remove, run};

/// What an interface is to Sheave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Host side of a pod's veth (a bridge port or a routed one).
    Pod,
    /// Uplink: holds a node address or a default route.
    Uplink,
    /// Tunnel to other nodes (VXLAN and the like).
    Tunnel,
}

/// An interface that programs are attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// ifindex.
    pub index: u32,
    /// Name, for people and for attaching.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Packets carry an Ethernet header.
    pub ethernet: bool,
    /// Backed by a device of its own (not veth, tunnel or bridge), so native XDP is worth trying in mode `auto`.
    pub physical: bool,
    /// Source address for packets that are SNATed out of it, IPv4.
    pub source4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub source6: Option<Ipv6Addr>,
}

/// A change in the set of interfaces that programs belong on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Appeared, or changed in a field of [`Interface`].
    Present(Interface),
    /// Went away, or no longer has a role. Its index may be given to another interface at once.
    Gone {
        /// ifindex.
        index: u32,
    },
    /// All the addresses that this node answers to, sorted, of both families: unicast, not loopback and not
    /// link-local. Sent before the first [`Self::Synced`] and whenever the list changes.
    Addresses(Vec<IpAddr>),
    /// The first listing is complete: every interface that existed at the start has been reported.
    Synced,
}
