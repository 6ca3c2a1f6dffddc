//! From rtnetlink's messages to the few facts that [`super::discover`] needs.

use std::net::IpAddr;

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHopFlags, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::discover::{DefaultRoute, InterfaceAddress, Link};
use super::state::Change;

/// IFA_F_TEMPORARY is the same bit as IFA_F_SECONDARY.
const NOT_CHOSEN: AddressFlags = AddressFlags::Secondary
    .union(AddressFlags::Deprecated)
    .union(AddressFlags::Tentative)
    .union(AddressFlags::Dadfailed);

/// What a notification says, if it matters.
pub(super) fn change(message: &RouteNetlinkMessage) -> Option<Change> {
    match message {
        RouteNetlinkMessage::NewLink(message) => link(message).map(Change::Link),
        RouteNetlinkMessage::DelLink(message) if is_device(message) => Some(Change::LinkGone(message.header.index)),
        RouteNetlinkMessage::NewAddress(message) => address(message).map(Change::Address),
        RouteNetlinkMessage::DelAddress(message) => {
            address(message).map(|held| Change::AddressGone { index: held.index, address: held.address })
        }
        RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) => {
            is_default(message).then_some(Change::Routes)
        }
        _ => None,
    }
}

/// A link, unless the message is about something else: bridge port states (AF_BRIDGE) and wireless events come as
/// link messages too.
pub(super) fn link(message: &LinkMessage) -> Option<Link> {
    if !is_device(message) {
        return None;
    }
    let header = &message.header;
    let mut link = Link {
        index: header.index,
        ethernet: header.link_layer_type == LinkLayerType::Ether,
        loopback: header.flags.contains(LinkFlags::Loopback),
        up: header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(address) => link.hardware_address.clone_from(address),
            LinkAttribute::ParentDevName(_) => link.on_bus = true,
            LinkAttribute::Link(index) => link.lower = Some(*index),
            LinkAttribute::LinkNetNsId(_) => link.lower_elsewhere = true,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(information) => link.kind = information.iter().find_map(kind),
            LinkAttribute::Wireless(_) => return None,
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn kind(information: &LinkInfo) -> Option<String> {
    match information {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    }
}

fn is_device(message: &LinkMessage) -> bool {
    message.header.interface_family == AddressFamily::Unspec
}

/// An address. On point-to-point links IFA_LOCAL is ours and IFA_ADDRESS the other end's.
pub(super) fn address(message: &AddressMessage) -> Option<InterfaceAddress> {
    let header = &message.header;
    let mut flags = AddressFlags::from_bits_retain(u32::from(header.flags.bits()));
    let (mut local, mut remote) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => remote = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(InterfaceAddress {
        index: header.index,
        address: local.or(remote)?,
        prefix_length: header.prefix_len,
        secondary: flags.intersects(NOT_CHOSEN),
    })
}

fn is_default(message: &RouteMessage) -> bool {
    message.header.destination_prefix_length == 0 && message.header.kind == RouteType::Unicast
}

/// The default routes that a route message holds: one per next hop.
pub(super) fn default_routes(message: &RouteMessage) -> Vec<DefaultRoute> {
    if !is_default(message) {
        return Vec::new();
    }
    let ipv6 = message.header.address_family == AddressFamily::Inet6;
    let mut table = u32::from(message.header.table);
    let (mut source, mut metric, mut indexes) = (None, 0, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => indexes.push(*index),
            RouteAttribute::MultiPath(hops) => indexes.extend(
                hops.iter().filter(|hop| !hop.flags.contains(RouteNextHopFlags::Dead)).map(|hop| hop.interface_index),
            ),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(IpAddr::V4(*address)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some(IpAddr::V6(*address)),
            _ => {}
        }
    }
    let main = table == u32::from(RouteHeader::RT_TABLE_MAIN);
    indexes.into_iter().map(|index| DefaultRoute { index, ipv6, main, source, metric }).collect()
}
