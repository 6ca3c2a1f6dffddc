//! What is answered in a backend's stead, on packets as senders with every offload hand them over.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use sheave_common::Ipv4Address;
use sheave_common::flow::{Flow, FlowKey};
use sheave_tests::manifests::Service;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{PodNetwork, Shape};
use sheave_tests::wire;

const ECHO: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const SOON: Duration = Duration::from_secs(2);

/// A bulk sender whose flow is lost would wait for minutes: the reset answers a packet of many segments.
#[test]
fn a_bulk_sender_whose_flow_is_lost_is_reset_at_once() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [1, 1], ..Shape::default() }, &[])?;
        scenario.publish(&Service::new("echo", ECHO).tcp("echo", 7, server::ECHO), [scenario.pod(2, 1)])?;
        scenario.pod(1, 1).namespace.run(|| -> Result<()> {
            let mut connection = TcpStream::connect(scenario.at(ECHO, 7))?;
            connection.set_write_timeout(Some(SOON))?;
            connection.set_read_timeout(Some(SOON))?;
            let _ = connection.read(&mut [0; 64])?;
            // The congestion window grows, so that segments go in bundles.
            let mut echoed = vec![0; 200_000];
            connection.write_all(&[1; 200_000])?;
            connection.read_exact(&mut echoed)?;
            let data = MapData::from_pin(scenario.agent.pins().join(sheave_common::names::CONNTRACK4))?;
            let mut flows: HashMap<_, FlowKey<Ipv4Address>, Flow<Ipv4Address>> =
                HashMap::try_from(Map::LruHashMap(data))?;
            let keys: Vec<_> = flows.keys().filter_map(Result::ok).collect();
            for key in &keys {
                flows.remove(key)?;
            }
            ensure!(!keys.is_empty(), "no flow to lose");
            let lost = Instant::now();
            let ended = connection.write_all(&[2; 4 << 20]).and_then(|()| connection.read(&mut echoed).map(|_| ()));
            let error = ended.err().context("the connection went on")?;
            ensure!(
                matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
                "{pods:?}: {error} after {:?}",
                lost.elapsed()
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// Some networks switch a veth's checksum offload off (for VXLAN's sake): the kernel then finishes the checksum that the
/// sender left to the device, and must not do so in the answer that took the packet's place.
#[test]
fn refusals_arrive_over_a_link_without_checksum_offload() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [1, 0], ..Shape::default() }, &[])?;
    let pod = scenario.pod(1, 1);
    wire::disable_checksum_offload(&scenario.node().namespace, &pod.host_link)?;
    scenario.publish(&Service::new("empty", ECHO).tcp("http", 80, 1).udp("dns", 53, 1), [])?;
    pod.namespace.run(|| -> Result<()> {
        let refused = TcpStream::connect_timeout(&scenario.at(ECHO, 80), SOON).err().context("TCP: a connection")?;
        ensure!(refused.kind() == io::ErrorKind::ConnectionRefused, "TCP: {refused}");
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(SOON))?;
        socket.connect(scenario.at(ECHO, 53))?;
        socket.send(b"question")?;
        let refused = socket.recv(&mut [0; 64]).err().context("UDP: an answer")?;
        ensure!(refused.kind() == io::ErrorKind::ConnectionRefused, "UDP: {refused}");
        Ok(())
    })
}
