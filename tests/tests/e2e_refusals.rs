//! What is answered in a backend's stead, on packets as senders with every offload hand them over.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::{Ipv4Address, Ipv6Address, names};
use sheave_tests::client;
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{NodeNetwork, PodNetwork, Shape};
use sheave_tests::wire;

const ECHO: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const ECHO6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const SOON: Duration = Duration::from_secs(2);

/// A bulk sender whose flow is lost would wait for minutes: the reset answers a packet of many segments.
#[test]
fn a_bulk_sender_whose_flow_is_lost_is_reset_at_once() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [1, 1], ..Shape::default() }, &[])?;
        let echo = Service::new("echo", ECHO).and(ECHO6).tcp("echo", 7, server::ECHO);
        scenario.publish(&echo, [scenario.pod(2, 1)])?;
        for family in Family::BOTH {
            scenario.pod(1, 1).namespace.run(|| -> Result<()> {
                let mut connection = TcpStream::connect(scenario.at(family.pick(ECHO, ECHO6), 7))?;
                connection.set_write_timeout(Some(SOON))?;
                connection.set_read_timeout(Some(SOON))?;
                let _ = connection.read(&mut [0; 64])?;
                // The congestion window grows, so that segments go in bundles.
                let mut echoed = vec![0; 200_000];
                connection.write_all(&[1; 200_000])?;
                connection.read_exact(&mut echoed)?;
                let lost = match family {
                    Family::V4 => lose_flows::<Ipv4Address>(&scenario, names::CONNTRACK4)?,
                    Family::V6 => lose_flows::<Ipv6Address>(&scenario, names::CONNTRACK6)?,
                };
                ensure!(lost > 0, "no flow to lose");
                let lost = Instant::now();
                let ended = connection.write_all(&[2; 4 << 20]).and_then(|()| connection.read(&mut echoed).map(|_| ()));
                let error = ended.err().context("the connection went on")?;
                ensure!(
                    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
                    "{pods:?}, {family}: {error} after {:?}",
                    lost.elapsed()
                );
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Removes every flow of a family; returns how many there were.
fn lose_flows<A>(scenario: &Scenario, map: &str) -> Result<usize>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let data = MapData::from_pin(scenario.agent.pins().join(map))?;
    let mut flows: HashMap<_, FlowKey<A>, Flow<A>> = HashMap::try_from(Map::LruHashMap(data))?;
    let keys: Vec<_> = flows.keys().filter_map(Result::ok).collect();
    for key in &keys {
        flows.remove(key)?;
    }
    Ok(keys.len())
}

/// Some networks switch a veth's checksum offload off (for VXLAN's sake): the kernel then finishes the checksum that the
/// sender left to the device, and must not do so in the answer that took the packet's place.
#[test]
fn refusals_arrive_over_a_link_without_checksum_offload() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [1, 0], ..Shape::default() }, &[])?;
    let pod = scenario.pod(1, 1);
    wire::disable_checksum_offload(&scenario.node().namespace, &pod.host_link)?;
    scenario.publish(&Service::new("empty", ECHO).and(ECHO6).tcp("http", 80, 1).udp("dns", 53, 1), [])?;
    for family in Family::BOTH {
        let vip = family.pick(ECHO, ECHO6);
        pod.namespace.run(|| -> Result<()> {
            let refused = TcpStream::connect_timeout(&scenario.at(vip, 80), SOON).err().context("TCP: a connection")?;
            ensure!(refused.kind() == io::ErrorKind::ConnectionRefused, "TCP by {family}: {refused}");
            refused_datagram(scenario.at(vip, 53)).with_context(|| family.to_string())
        })?;
    }
    Ok(())
}

/// Asks by datagram, and fails unless that is refused at once.
fn refused_datagram(target: std::net::SocketAddr) -> Result<()> {
    let socket = client::udp_to(target)?;
    socket.set_read_timeout(Some(SOON))?;
    socket.send(b"question")?;
    let refused = socket.recv(&mut [0; 64]).err().context("UDP: an answer")?;
    ensure!(refused.kind() == io::ErrorKind::ConnectionRefused, "UDP to {target}: {refused}");
    Ok(())
}

/// A resolver whose server doesn't listen would wait for its time-out: the backend's own refusal must reach the client as
/// the Service's, from wherever it asks.
#[test]
fn a_backends_refusal_of_a_datagram_reaches_its_client() -> Result<()> {
    // Nobody listens there.
    let closed = Service::new("closed", ECHO).and(ECHO6).udp("closed", 53, 9).node_port(30_053);
    for (pods, nodes, xdp) in [
        (PodNetwork::Bridged, NodeNetwork::Plain, false),
        (PodNetwork::Routed, NodeNetwork::Plain, true),
        (PodNetwork::Bridged, NodeNetwork::Vxlan, true),
    ] {
        let shape = Shape { pods, nodes, pod_counts: [2, 1], xdp };
        let scenario = Scenario::start(shape, &["--xdp", if xdp { "native" } else { "off" }])?;
        let (pod, node) = (scenario.pod(1, 1), scenario.node());
        for backend in [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)] {
            scenario.publish(&closed, [backend])?;
            for family in Family::BOTH {
                let context = || format!("{pods:?}, {nodes:?}, XDP {xdp}, {family}, {}", backend.name);
                let cluster_ip = scenario.at(family.pick(ECHO, ECHO6), 53);
                pod.namespace.run(|| refused_datagram(cluster_ip)).with_context(context)?;
                let node_port = scenario.at(node.address_of(family), 30_053);
                for _ in 0..2 {
                    // With XDP, tc has the first one, for which neighbours must be found.
                    scenario.cluster.client.run(|| refused_datagram(node_port)).with_context(context)?;
                }
            }
        }
    }
    Ok(())
}
