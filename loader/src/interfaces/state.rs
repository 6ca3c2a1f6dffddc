//! What netlink has told so far, and which of it has been reported. Pure: messages in, [`Event`]s out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::discover::{self, DefaultRoute, InterfaceAddress, Link, View};
use super::{Event, Interface};
use crate::config::InterfaceRules;

/// A full listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// All links.
    pub links: Vec<Link>,
    /// All addresses, in the kernel's order.
    pub addresses: Vec<InterfaceAddress>,
    /// All default routes.
    pub routes: Vec<DefaultRoute>,
}

/// One notification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A link appeared or changed.
    Link(Link),
    /// A link is gone.
    LinkGone(u32),
    /// An address appeared or changed.
    Address(InterfaceAddress),
    /// An address is gone.
    AddressGone {
        /// ifindex.
        index: u32,
        /// The address.
        address: IpAddr,
    },
    /// Default routes changed; the listing has to be read again.
    Routes,
}

/// The table of links, addresses and routes, and what was reported of it.
#[derive(Debug, Default)]
pub struct State {
    links: BTreeMap<u32, Link>,
    addresses: Vec<InterfaceAddress>,
    routes: Vec<DefaultRoute>,
    reported: BTreeMap<u32, Interface>,
    reported_addresses: Option<Vec<IpAddr>>,
    events: Vec<Event>,
    routes_stale: bool,
    links_stale: Vec<u32>,
}

impl State {
    /// Takes a full listing, after which only what is in it exists.
    pub fn replace(&mut self, listing: Listing) {
        let links: BTreeMap<u32, Link> = listing.links.into_iter().map(|link| (link.index, link)).collect();
        let gone: Vec<u32> = self
            .links
            .iter()
            .filter(|(index, old)| links.get(index).is_none_or(|new| is_another(old, new)))
            .map(|(index, _)| *index)
            .collect();
        for index in gone {
            self.report_gone(index);
        }
        self.links = links;
        self.addresses = listing.addresses;
        self.replace_routes(listing.routes);
        self.links_stale.clear();
    }

    /// Takes a new list of the default routes.
    pub fn replace_routes(&mut self, routes: Vec<DefaultRoute>) {
        self.routes = routes;
        self.routes_stale = false;
    }

    /// Takes one notification.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Link(link) => self.apply_link(link),
            Change::LinkGone(index) => self.remove_link(index),
            Change::Address(new) => {
                let same = |held: &&mut InterfaceAddress| held.index == new.index && held.address == new.address;
                match self.addresses.iter_mut().find(same) {
                    Some(held) => *held = new,
                    None => self.addresses.push(new),
                }
            }
            Change::AddressGone { index, address } => {
                self.addresses.retain(|held| held.index != index || held.address != address);
                // IPv4 drops routes that prefer a removed address without a notification.
                self.routes_stale |=
                    self.routes.iter().any(|route| route.index == index || route.source == Some(address));
            }
            Change::Routes => self.routes_stale = true,
        }
    }

    fn apply_link(&mut self, link: Link) {
        // IPv4 drops the routes of a device that goes down without a notification.
        self.routes_stale |= !link.up && self.routes.iter().any(|route| route.index == link.index);
        if self.links.get(&link.index).is_some_and(|old| old.kind != link.kind) {
            self.report_gone(link.index);
        }
        self.links.insert(link.index, link);
    }

    fn remove_link(&mut self, index: u32) {
        self.report_gone(index);
        self.links.remove(&index);
        self.addresses.retain(|held| held.index != index);
        let routes = self.routes.len();
        self.routes.retain(|route| route.index != index);
        self.routes_stale |= routes != self.routes.len();
        // A veth's peer that left for another namespace changes what this end is, and nothing says so.
        let peers = self
            .links
            .values()
            .filter(|link| link.lower == Some(index) && !link.lower_elsewhere && link.kind.as_deref() == Some("veth"));
        self.links_stale.extend(peers.map(|link| link.index));
    }

    /// Whether [`Self::replace_routes`] is due.
    #[must_use]
    pub fn routes_stale(&self) -> bool {
        self.routes_stale
    }

    /// Indexes of links that may have changed without a notification and have to be read again.
    pub fn take_stale_links(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.links_stale)
    }

    /// What changed since the last call, in the order in which it has to be acted on.
    pub fn events(&mut self, node_addresses: &[IpAddr], rules: &InterfaceRules) -> Vec<Event> {
        let links: Vec<Link> = self.links.values().cloned().collect();
        let view = View { links: &links, addresses: &self.addresses, routes: &self.routes, node_addresses, rules };
        let found: BTreeMap<u32, Interface> =
            discover::interfaces(&view).into_iter().map(|interface| (interface.index, interface)).collect();
        let addresses = discover::local_addresses(&view);

        let lost: Vec<u32> = self.reported.keys().filter(|index| !found.contains_key(index)).copied().collect();
        for index in lost {
            self.report_gone(index);
        }
        if self.reported_addresses.as_ref() != Some(&addresses) {
            self.events.push(Event::Addresses(addresses.clone()));
            self.reported_addresses = Some(addresses);
        }
        for (index, interface) in &found {
            if self.reported.get(index) != Some(interface) {
                self.events.push(Event::Present(interface.clone()));
            }
        }
        self.reported = found;
        std::mem::take(&mut self.events)
    }

    fn report_gone(&mut self, index: u32) {
        if self.reported.remove(&index).is_some() {
            self.events.push(Event::Gone { index });
        }
    }
}

/// Whether two listings of an index show different devices. A new veth has a random address and mostly another peer;
/// other devices may change one thing about themselves.
fn is_another(old: &Link, new: &Link) -> bool {
    let address = old.hardware_address != new.hardware_address;
    old.kind != new.kind
        || old.ethernet != new.ethernet
        || if old.kind.as_deref() == Some("veth") {
            address || old.lower != new.lower
        } else {
            address && old.name != new.name
        }
}

#[cfg(test)]
mod tests;
