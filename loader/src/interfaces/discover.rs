//! What an interface is: a pure decision over links, addresses, default routes and the user's rules.
//!
//! In order: the user's patterns; never loopback; an address of the node makes an uplink; tunnels by their kind; a
//! default route makes an uplink; a veth into another namespace is a pod's, unless it has an address in a subnet of
//! its own (a node that is itself a container); a bridge with a way out of the machine, or any other device with a
//! global address, is an uplink. What is left is none of our business.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Interface, Role};
use crate::config::InterfaceRules;

/// A network device, as far as its role depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// ifindex.
    pub index: u32,
    /// Name.
    pub name: String,
    /// IFLA_INFO_KIND: the driver's name of a virtual device; hardware has none.
    pub kind: Option<String>,
    /// The link layer is Ethernet (ARPHRD_ETHER).
    pub ethernet: bool,
    /// IFF_LOOPBACK.
    pub loopback: bool,
    /// IFF_UP.
    pub up: bool,
    /// IFLA_PARENT_DEV_NAME is there: a device on a bus.
    pub on_bus: bool,
    /// IFLA_LINK: a veth's peer, a VLAN's parent.
    pub lower: Option<u32>,
    /// IFLA_LINK_NETNSID is there: `lower` is in another network namespace.
    pub lower_elsewhere: bool,
    /// IFLA_MASTER: the bridge, bond or VRF that this is a port of.
    pub controller: Option<u32>,
    /// Link-layer address; with the other fields it tells a reused index from a renamed device.
    pub hardware_address: Vec<u8>,
}

/// An address of an interface, in the kernel's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// ifindex.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Prefix length.
    pub prefix_length: u8,
    /// The kernel does not choose it by itself: secondary (IPv4), temporary, deprecated, or not yet verified (IPv6).
    pub secondary: bool,
}

/// A default route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// ifindex that it leaves by.
    pub index: u32,
    /// Whether it is an IPv6 route.
    pub ipv6: bool,
    /// In the main table, and not one for policy rules.
    pub main: bool,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Priority; the smallest is used.
    pub metric: u32,
}

/// Everything that the decision looks at.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// All links.
    pub links: &'a [Link],
    /// All addresses.
    pub addresses: &'a [InterfaceAddress],
    /// Default routes of all tables.
    pub routes: &'a [DefaultRoute],
    /// Addresses of this node by its Node object, the primary ones first; empty while unknown.
    pub node_addresses: &'a [IpAddr],
    /// The user's patterns.
    pub rules: &'a InterfaceRules,
}

/// Kinds of devices that lead to other nodes.
const TUNNELS: &[&str] = &[
    "vxlan",
    "geneve",
    "ipip",
    "gre",
    "gretap",
    "sit",
    "wireguard",
    "ip6tnl",
    "ip6gre",
    "ip6gretap",
    "erspan",
    "ip6erspan",
    "vti",
    "vti6",
    "xfrm",
    "bareudp",
];
/// Devices that a tunnel driver puts into every namespace, used or not.
const FALLBACK_TUNNELS: &[&str] =
    &["tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0"];
/// Kinds that never face the outside by themselves, whatever addresses they hold (kube-ipvs0, nodelocaldns).
const INWARD: &[&str] = &["dummy", "ifb", "vrf", "nlmon", "netkit"];
/// Devices on which other software parks addresses that are not the node's.
const PARKED: &[&str] = &["kube-ipvs0", "nodelocaldns"];

/// The interfaces that have a role, by index.
#[must_use]
pub fn interfaces(view: &View<'_>) -> Vec<Interface> {
    let mut found: Vec<Interface> = view
        .links
        .iter()
        .filter_map(|link| {
            Some(Interface {
                index: link.index,
                name: link.name.clone(),
                role: view.role(link)?,
                ethernet: link.ethernet,
                physical: physical(link),
                source4: view.source4(link.index),
                source6: view.source6(link.index),
            })
        })
        .collect();
    found.sort_by_key(|interface| interface.index);
    found
}

/// The addresses that this node answers to: sorted, unicast, neither loopback nor link-local.
#[must_use]
pub fn local_addresses(view: &View<'_>) -> Vec<IpAddr> {
    let parked: BTreeSet<u32> =
        view.links.iter().filter(|link| PARKED.contains(&link.name.as_str())).map(|link| link.index).collect();
    let addresses: BTreeSet<IpAddr> = view
        .addresses
        .iter()
        .filter(|held| is_global(held.address) && !parked.contains(&held.index))
        .map(|held| held.address)
        .collect();
    addresses.into_iter().collect()
}

/// Whether `name` matches `pattern`, in which `*` stands for any run of characters, also none.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let Some(last) = pattern.rsplit_once('*').map(|(_, last)| last) else { return rest.is_empty() };
    let mut parts: Vec<&str> = parts.collect();
    parts.pop();
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

impl View<'_> {
    /// What `link` is; `None` for what Sheave leaves alone.
    #[must_use]
    pub fn role(&self, link: &Link) -> Option<Role> {
        let named = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, &link.name));
        if named(&self.rules.ignored) {
            return None;
        }
        let ruled =
            [(&self.rules.pods, Role::Pod), (&self.rules.uplinks, Role::Uplink), (&self.rules.tunnels, Role::Tunnel)];
        if let Some((_, role)) = ruled.into_iter().find(|(patterns, _)| named(patterns)) {
            return Some(role);
        }
        if link.loopback {
            return None;
        }
        let kind = link.kind.as_deref().unwrap_or_default();
        if self.holds_node_address(link.index) && !INWARD.contains(&kind) {
            return Some(Role::Uplink);
        }
        if TUNNELS.contains(&kind) {
            return (link.up || !FALLBACK_TUNNELS.contains(&link.name.as_str())).then_some(Role::Tunnel);
        }
        if INWARD.contains(&kind) {
            return None;
        }
        let mut routes = self.routes.iter().filter(|route| route.index == link.index);
        if kind == "veth" && link.lower_elsewhere {
            let uplink = routes.any(|route| route.main) || self.has_subnet(link.index);
            return Some(if uplink { Role::Uplink } else { Role::Pod });
        }
        if routes.next().is_some() {
            return Some(Role::Uplink);
        }
        let addressed = self.addresses_of(link.index).any(|held| is_global(held.address));
        (addressed && (kind != "bridge" || self.leads_out(link.index))).then_some(Role::Uplink)
    }

    fn addresses_of(&self, index: u32) -> impl Iterator<Item = &InterfaceAddress> {
        self.addresses.iter().filter(move |held| held.index == index)
    }

    fn holds_node_address(&self, index: u32) -> bool {
        self.addresses_of(index).any(|held| self.node_addresses.contains(&held.address))
    }

    /// Holds an address in a subnet. The gateway addresses that CNI plugins give to pods' veths are single hosts.
    fn has_subnet(&self, index: u32) -> bool {
        self.addresses_of(index).any(|held| {
            let host = if held.address.is_ipv4() { 32 } else { 128 };
            is_global(held.address) && held.prefix_length < host
        })
    }

    /// A port of this bridge is a device that leaves the machine: neither a pod's or virtual machine's, nor a tunnel.
    fn leads_out(&self, bridge: u32) -> bool {
        self.links.iter().filter(|port| port.controller == Some(bridge)).any(|port| {
            let kind = port.kind.as_deref().unwrap_or_default();
            !matches!(kind, "veth" | "tun" | "bridge" | "macvtap" | "netkit" | "dummy" | "ifb")
                && !TUNNELS.contains(&kind)
        })
    }

    fn source4(&self, index: u32) -> Option<Ipv4Addr> {
        self.source(index, false).and_then(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        })
    }

    fn source6(&self, index: u32) -> Option<Ipv6Addr> {
        self.source(index, true).and_then(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        })
    }

    /// The interface's own address, or else the node's.
    fn source(&self, index: u32, ipv6: bool) -> Option<IpAddr> {
        self.own_source(index, ipv6).or_else(|| self.node_source(ipv6))
    }

    /// The node's address if it is held here, or else the first global one, a primary one if there is one.
    fn own_source(&self, index: u32, ipv6: bool) -> Option<IpAddr> {
        let candidates =
            || self.addresses_of(index).filter(|held| held.address.is_ipv6() == ipv6 && is_global(held.address));
        self.node_addresses
            .iter()
            .find(|address| candidates().any(|held| held.address == **address))
            .copied()
            .or_else(|| candidates().find(|held| !held.secondary).map(|held| held.address))
            .or_else(|| candidates().next().map(|held| held.address))
    }

    /// The default route's preferred source, the node's primary address, or what the default route's device holds.
    fn node_source(&self, ipv6: bool) -> Option<IpAddr> {
        let route =
            self.routes.iter().filter(|route| route.main && route.ipv6 == ipv6).min_by_key(|route| route.metric);
        route
            .and_then(|route| route.source)
            .or_else(|| self.node_addresses.iter().find(|address| address.is_ipv6() == ipv6).copied())
            .or_else(|| self.own_source(route?.index, ipv6))
    }
}

/// On a bus, or of no virtual kind at all.
fn physical(link: &Link) -> bool {
    !link.loopback && (link.on_bus || link.kind.is_none())
}

/// A unicast address that other machines can use.
fn is_global(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !link_local && !address.is_loopback() && !address.is_multicast() && !address.is_unspecified()
}

#[cfg(test)]
mod tests;
