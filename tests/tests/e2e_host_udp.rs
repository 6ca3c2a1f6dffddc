//! A process of the node itself keeps a UDP socket connected to a Service: the socket is closed when its endpoint goes, so
//! that the process connects again and finds another one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Ipv4Address, names};
use sheave_tests::client;
use sheave_tests::held::{Held, probe};
use sheave_tests::manifests::Service;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::Shape;

const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 1);

fn dns() -> Service {
    Service::new("dns", DNS).and(DNS6).udp("dns", 53, server::UDP).node_port(30_053)
}

fn start() -> Result<Scenario> {
    Scenario::start(Shape { pod_counts: [2, 0], ..Shape::default() }, &[])
}

fn hold(scenario: &Scenario, target: SocketAddr) -> Result<Held> {
    Held::connect(scenario.agent.host_command(probe()?), target)
}

/// A log shipper would send to an address where nobody is any more, for as long as it runs.
#[test]
fn a_connected_socket_is_closed_when_its_endpoint_leaves() -> Result<()> {
    let scenario = start()?;
    let (old, new) = (scenario.pod(1, 1), scenario.pod(1, 2));
    scenario.publish(&dns(), [old])?;
    let targets = [
        scenario.at(DNS, 53),
        client::mapped(scenario.at(DNS, 53)),
        scenario.at(DNS6, 53),
        scenario.at(NODE, 30_053),
        scenario.at(NODE6, 30_053),
    ];
    let mut sockets: Vec<Held> = targets.iter().map(|target| hold(&scenario, *target)).collect::<Result<_>>()?;
    let addresses = [IpAddr::from(old.address), old.address6.into()];
    let direct = addresses.map(|address| hold(&scenario, SocketAddr::new(address, server::UDP)));
    let mut direct: Vec<Held> = direct.into_iter().collect::<Result<_>>()?;
    for socket in sockets.iter_mut().chain(&mut direct) {
        ensure!(socket.ask()? == old.name);
    }
    scenario.publish(&dns(), [new])?;
    for (socket, target) in sockets.iter_mut().zip(targets) {
        socket.wait_until_closed().with_context(|| format!("connected to {target}"))?;
        socket.reconnect()?;
        let backend = socket.ask().with_context(|| format!("connected to {target} again"))?;
        ensure!(backend == new.name, "{backend} answered at {target}");
    }
    // The other sockets are closed by now, so these would be as well.
    for socket in &mut direct {
        ensure!(socket.ask().context("a socket that never asked the Service")? == old.name);
    }
    Ok(())
}

/// A process that asks a Service without endpoints for a while would never reach it again.
#[test]
fn a_connected_socket_finds_a_service_again_that_had_no_endpoint_for_a_while() -> Result<()> {
    let scenario = start()?;
    let pod = scenario.pod(1, 1);
    scenario.publish(&dns(), [pod])?;
    let mut socket = hold(&scenario, scenario.at(DNS, 53))?;
    ensure!(socket.ask()? == pod.name);
    scenario.publish(&dns(), [])?;
    socket.wait_until_closed()?;
    let refused = socket.reconnect().err().context("a connection without an endpoint")?.to_string();
    ensure!(refused.contains("refused"), "{refused}");
    scenario.publish(&dns(), [pod])?;
    socket.reconnect()?;
    ensure!(socket.ask()? == pod.name);
    Ok(())
}

/// A socket to a Service that was deleted would go on asking a pod that may be anybody's by now.
#[test]
fn a_connected_socket_is_closed_when_its_service_is_deleted() -> Result<()> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [2, 0], ..Shape::default() }, &[])?;
    let pod = scenario.pod(1, 1);
    let other = Service::new("other", Ipv4Addr::new(10, 96, 0, 20)).udp("udp", 53, server::UDP);
    scenario.publish(&dns(), [pod])?;
    scenario.publish(&other, [pod])?;
    let mut socket = hold(&scenario, scenario.at(DNS, 53))?;
    let mut untouched = hold(&scenario, scenario.at(Ipv4Addr::new(10, 96, 0, 20), 53))?;
    ensure!((socket.ask()?, untouched.ask()?) == (pod.name.clone(), pod.name.clone()));
    scenario.manifests().remove("dns.yaml")?;
    socket.wait_until_closed()?;
    ensure!(untouched.ask().context("a socket of another Service with the same pod")? == pod.name);
    Ok(())
}

/// A socket would go on asking by a port that its Service has given up.
#[test]
fn a_connected_socket_is_closed_when_its_port_is_given_up() -> Result<()> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [1, 0], ..Shape::default() }, &[])?;
    let pod = scenario.pod(1, 1);
    scenario.publish(&dns(), [pod])?;
    let mut by_node_port = hold(&scenario, scenario.at(NODE, 30_053))?;
    let mut by_cluster_ip = hold(&scenario, scenario.at(DNS, 53))?;
    ensure!((by_node_port.ask()?, by_cluster_ip.ask()?) == (pod.name.clone(), pod.name.clone()));
    scenario.publish(&Service::new("dns", DNS).and(DNS6).udp("dns", 53, server::UDP), [pod])?;
    by_node_port.wait_until_closed()?;
    ensure!(by_cluster_ip.ask()? == pod.name);
    Ok(())
}

/// An upgrade of Sheave while endpoints change would leave sockets behind that ask nobody.
#[test]
fn a_connected_socket_is_closed_when_its_endpoint_left_while_no_daemon_ran() -> Result<()> {
    let mut scenario = Scenario::start_with_folder(Shape { pod_counts: [2, 0], ..Shape::default() }, &[])?;
    scenario.publish(&dns(), [scenario.pod(1, 1)])?;
    let mut socket = hold(&scenario, scenario.at(DNS, 53))?;
    ensure!(socket.ask()? == scenario.pod(1, 1).name);
    scenario.agent.kill();
    scenario.update(&dns(), &dns().endpoints([scenario.pod(1, 2)]))?;
    ensure!(socket.ask()? == scenario.pod(1, 1).name, "nobody has closed it yet");
    scenario.agent.restart()?;
    socket.wait_until_closed()?;
    socket.reconnect()?;
    ensure!(socket.ask()? == scenario.pod(1, 2).name);
    Ok(())
}

/// A socket that lives for weeks would be left behind when its endpoint goes: an LRU map has room for so many sockets only,
/// and forgets.
#[test]
fn a_connected_socket_is_closed_also_when_the_map_has_forgotten_it() -> Result<()> {
    let scenario = start()?;
    let pod = scenario.pod(1, 1);
    scenario.publish(&dns(), [pod])?;
    let mut socket = hold(&scenario, scenario.at(DNS, 53))?;
    // When another one is closed, all have been looked at.
    let other = Ipv4Addr::new(10, 96, 0, 20);
    let service = Service::new("other", other).udp("udp", 53, server::UDP);
    scenario.publish(&service, [pod])?;
    let mut witness = hold(&scenario, scenario.at(other, 53))?;
    scenario.publish(&service, [])?;
    witness.wait_until_closed()?;

    let map = MapData::from_pin(scenario.agent.pins().join(names::SOCK_REVERSE4))?;
    let mut map: HashMap<_, SocketKey<Ipv4Address>, SocketPeer<Ipv4Address>> = Map::LruHashMap(map).try_into()?;
    for key in map.keys().collect::<Result<Vec<_>, _>>()? {
        map.remove(&key)?;
    }
    let peer = socket.peer()?;
    ensure!(peer == SocketAddr::new(pod.address.into(), server::UDP), "the map still knows that it asked {peer}");
    scenario.publish(&dns(), [scenario.pod(1, 2)])?;
    socket.wait_until_closed()
}

/// A process that looks up a pod through a Service, and then talks to that pod itself, would lose its connection with the
/// Service.
#[test]
fn a_socket_that_connects_to_the_pod_itself_is_not_the_services_any_more() -> Result<()> {
    let scenario = start()?;
    let (old, new) = (scenario.pod(1, 1), scenario.pod(1, 2));
    scenario.publish(&dns(), [old])?;
    let mut sockets = [hold(&scenario, scenario.at(DNS, 53))?, hold(&scenario, scenario.at(DNS6, 53))?];
    let mut witness = hold(&scenario, scenario.at(DNS, 53))?;
    for (socket, address) in sockets.iter_mut().zip([IpAddr::from(old.address), old.address6.into()]) {
        let target = SocketAddr::new(address, server::UDP);
        socket.connect_to(target)?;
        let peer = socket.peer()?;
        ensure!(peer == target, "connected to {target}, it shows {peer}");
    }
    scenario.publish(&dns(), [new])?;
    witness.wait_until_closed()?;
    for socket in &mut sockets {
        ensure!(socket.ask()? == old.name);
    }
    Ok(())
}
