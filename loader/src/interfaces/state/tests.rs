//! Sequences of notifications, and what a controller is told of them.

use super::super::Role;
use super::*;

fn veth(index: u32, name: &str, hardware_address: u8) -> Link {
    Link {
        index,
        name: name.to_owned(),
        kind: Some("veth".to_owned()),
        ethernet: true,
        up: true,
        lower: Some(2),
        lower_elsewhere: true,
        hardware_address: vec![hardware_address; 6],
        ..Link::default()
    }
}

fn uplink(index: u32, name: &str) -> Link {
    Link { index, name: name.to_owned(), ethernet: true, up: true, ..Link::default() }
}

fn address(index: u32, text: &str) -> InterfaceAddress {
    InterfaceAddress { index, address: text.parse().unwrap(), prefix_length: 24, secondary: false }
}

fn told(state: &mut State) -> Vec<String> {
    let rules = InterfaceRules::default();
    let events = state.events(&[], &rules);
    events
        .into_iter()
        .map(|event| match event {
            Event::Present(Interface { index, name, role, .. }) => format!("{index} {name} {role:?}"),
            Event::Gone { index } => format!("{index} gone"),
            Event::Addresses(addresses) => format!("{addresses:?}"),
            Event::Synced => "synced".to_owned(),
        })
        .collect()
}

fn settled(links: Vec<Link>) -> State {
    let mut state = State::default();
    state.replace(Listing { links, ..Listing::default() });
    told(&mut state);
    state
}

#[test]
fn nothing_is_said_twice() {
    let mut state = settled(vec![veth(5, "veth5", 1)]);
    state.apply(Change::Link(veth(5, "veth5", 1)));
    assert!(told(&mut state).is_empty());
    state.apply(Change::Link(veth(5, "renamed", 1)));
    assert_eq!(told(&mut state), ["5 renamed Pod"]);
}

#[test]
fn an_index_reused_within_one_batch_is_gone_before_it_is_present() {
    let mut state = settled(vec![veth(5, "veth5", 1)]);
    state.apply(Change::LinkGone(5));
    state.apply(Change::Link(veth(5, "veth5", 2)));
    assert_eq!(told(&mut state), ["5 gone", "5 veth5 Pod"]);
}

#[test]
fn a_link_that_came_and_went_within_one_batch_is_not_mentioned() {
    let mut state = settled(Vec::new());
    state.apply(Change::Link(veth(5, "veth5", 1)));
    state.apply(Change::LinkGone(5));
    assert!(told(&mut state).is_empty());
}

#[test]
fn an_index_reused_while_notifications_were_lost_is_seen() {
    let mut state = settled(vec![veth(5, "veth5", 1), veth(6, "veth6", 1), uplink(7, "eth0")]);
    let links = vec![veth(5, "veth5", 2), veth(6, "other-name", 1), uplink(7, "eth0")];
    state.replace(Listing { links, ..Listing::default() });
    assert_eq!(told(&mut state), ["5 gone", "5 veth5 Pod", "6 other-name Pod"]);
}

#[test]
fn a_link_without_role_is_gone_when_it_loses_it() {
    let mut state = settled(vec![uplink(2, "eth0")]);
    state.apply(Change::Address(address(2, "10.0.0.1")));
    assert_eq!(told(&mut state), ["[10.0.0.1]", "2 eth0 Uplink"]);
    state.apply(Change::AddressGone { index: 2, address: "10.0.0.1".parse().unwrap() });
    assert_eq!(told(&mut state), ["2 gone", "[]"]);
}

#[test]
fn changed_addresses_are_followed() {
    let mut state = settled(vec![uplink(2, "eth0")]);
    state.apply(Change::Address(address(2, "10.0.0.1")));
    told(&mut state);
    state.apply(Change::AddressGone { index: 2, address: "10.0.0.1".parse().unwrap() });
    state.apply(Change::Address(address(2, "10.0.0.2")));
    let events = state.events(&[], &InterfaceRules::default());
    let Some(Event::Present(interface)) = events.last() else { panic!("{events:?}") };
    assert_eq!((interface.role, interface.source4.unwrap().to_string()), (Role::Uplink, "10.0.0.2".to_owned()));
}

#[test]
fn a_peer_that_left_makes_the_other_end_worth_another_look() {
    let inside = Link { lower: Some(6), lower_elsewhere: false, ..veth(5, "veth5", 1) };
    let mut state = settled(vec![inside, Link { lower: Some(5), lower_elsewhere: false, ..veth(6, "peer", 2) }]);
    state.apply(Change::LinkGone(6));
    assert_eq!(state.take_stale_links(), [5]);
    state.apply(Change::Link(veth(5, "veth5", 1)));
    assert_eq!(told(&mut state), ["5 veth5 Pod"]);
}

#[test]
fn routes_are_read_again_when_they_may_have_vanished_silently() {
    let mut state = State::default();
    let route = DefaultRoute { index: 2, ipv6: false, main: true, source: None, metric: 0 };
    let links = vec![uplink(2, "eth0"), veth(5, "veth5", 1)];
    state.replace(Listing { links, addresses: vec![address(2, "10.0.0.1")], routes: vec![route] });
    told(&mut state);
    state.apply(Change::Link(Link { up: false, ..veth(5, "veth5", 1) }));
    state.apply(Change::LinkGone(5));
    assert!(!state.routes_stale(), "pods come and go, that is no reason");
    state.apply(Change::Link(Link { up: false, ..uplink(2, "eth0") }));
    assert!(state.routes_stale());
}
