//! A client outside the cluster asks a nodePort of node 1: local backends, and backends on node 2 over plain routes and
//! through VXLAN; by tc alone, and with native XDP on the uplink; in both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::patience::patient;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{NodeNetwork, Pod, PodNetwork, Shape, client_address};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
/// Connections, and what an even share may differ by: enough for a random choice of one in four to stay within it by five
/// standard deviations.
const MANY: [(Family, usize, f64); 2] = [(Family::V4, 40_000, 0.05), (Family::V6, 10_000, 0.1)];

fn web() -> Service {
    Service::new("web", WEB)
        .and(WEB6)
        .tcp("http", 80, server::WHO)
        .node_port(HTTP)
        .tcp("patient", 81, server::PATIENT)
        .node_port(PATIENT)
        .tcp("echo", 7, server::ECHO)
        .node_port(ECHO)
        .udp("udp", 53, server::UDP)
        .node_port(UDP)
}

const HTTP: u16 = 30_500;
const PATIENT: u16 = 30_501;
const ECHO: u16 = 30_007;
const UDP: u16 = 30_053;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Backends {
    Local,
    Remote(NodeNetwork),
}

impl Backends {
    /// The address that pods should see as the client's.
    fn seen(self, family: Family) -> IpAddr {
        match self {
            Self::Local => client_address(family),
            Self::Remote(NodeNetwork::Plain) => family.pick([192, 168, 50, 1], [0xfd00, 0x50, 0, 0, 0, 0, 0, 1]),
            Self::Remote(NodeNetwork::Vxlan) => family.pick([10, 244, 1, 0], [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0]),
        }
    }
}

/// Node 1 with `count` backends behind the nodePorts.
fn start(backends: Backends, pods: PodNetwork, xdp: bool, count: u8) -> Result<Scenario> {
    let (pod_counts, nodes) = match backends {
        Backends::Local => ([count, 1], NodeNetwork::Plain),
        Backends::Remote(nodes) => ([1, count], nodes),
    };
    let arguments = ["--xdp", if xdp { "native" } else { "off" }];
    let scenario = Scenario::start(Shape { pods, nodes, pod_counts, xdp }, &arguments)?;
    scenario.publish(&web(), behind(&scenario, backends))?;
    Ok(scenario)
}

/// A nodePort of node 1.
fn node_at(scenario: &Scenario, family: Family, port: u16) -> SocketAddr {
    scenario.at(scenario.node().address_of(family), port)
}

fn behind(scenario: &Scenario, backends: Backends) -> &[Pod] {
    &scenario.cluster.nodes[if backends == Backends::Local { 0 } else { 1 }].pods
}

fn every_connection_is_answered(backends: Backends, xdp: bool) -> Result<()> {
    let scenario = start(backends, PodNetwork::Bridged, xdp, 4)?;
    // The client closes first: a pod's TIME_WAIT would refuse other clients behind the same SNAT port for a minute, and
    // 40 000 connections in a few seconds use every SNAT port several times.
    for (family, many, tolerance) in MANY {
        let ask = || client::who_and_close(node_at(&scenario, family, PATIENT));
        let answers = client::many(Some(&scenario.cluster.client), many, 4, &ask);
        answers.all_answered().with_context(|| family.to_string())?;
        answers.evenly_spread(4, tolerance).with_context(|| family.to_string())?;
        let seen = backends.seen(family);
        ensure!(answers.seen.iter().eq([&seen]), "{family}: pods saw {:?}, not {seen}", answers.seen);
    }
    ensure!(scenario.cluster.checksum_errors()? == 0, "checksum errors");
    Ok(())
}

/// The world outside would not reach pods of the node that it asks.
#[test]
fn every_connection_to_local_pods_is_answered_with_the_clients_address_kept() -> Result<()> {
    every_connection_is_answered(Backends::Local, false)
}

/// The same where XDP sees the packets first.
#[test]
fn every_connection_to_local_pods_is_answered_with_xdp() -> Result<()> {
    every_connection_is_answered(Backends::Local, true)
}

/// The world outside would not reach pods of another node.
#[test]
fn every_connection_to_pods_of_another_node_is_answered() -> Result<()> {
    every_connection_is_answered(Backends::Remote(NodeNetwork::Plain), false)
}

/// The same with XDP.
#[test]
fn every_connection_to_pods_of_another_node_is_answered_with_xdp() -> Result<()> {
    every_connection_is_answered(Backends::Remote(NodeNetwork::Plain), true)
}

/// The same through an overlay.
#[test]
fn every_connection_through_vxlan_is_answered() -> Result<()> {
    every_connection_is_answered(Backends::Remote(NodeNetwork::Vxlan), false)
}

/// The same through an overlay, with XDP on the uplink below it.
#[test]
fn every_connection_through_vxlan_is_answered_with_xdp() -> Result<()> {
    every_connection_is_answered(Backends::Remote(NodeNetwork::Vxlan), true)
}

const ALL: [Backends; 3] =
    [Backends::Local, Backends::Remote(NodeNetwork::Plain), Backends::Remote(NodeNetwork::Vxlan)];

/// XDP would be attached for nothing, and every packet pay for two programs.
#[test]
fn xdp_does_the_work_for_remote_backends_and_tc_hardly_any() -> Result<()> {
    let scenario = start(Backends::Remote(NodeNetwork::Plain), PodNetwork::Bridged, true, 2)?;
    let _statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
    for family in Family::BOTH {
        let ask = || client::who_and_close(node_at(&scenario, family, PATIENT));
        // Neighbours are learnt first.
        client::many(Some(&scenario.cluster.client), 10, 1, &ask).all_answered()?;
        let runs = |program| scenario.agent.runs(program);
        let (xdp, tc) = (runs("uplink_xdp")?, runs("uplink_ingress")?);
        client::many(Some(&scenario.cluster.client), 1_000, 2, &ask).all_answered()?;
        let (xdp, tc) = (runs("uplink_xdp")? - xdp, runs("uplink_ingress")? - tc);
        ensure!(xdp > 7_000, "{family}: 1000 connections there and back are more than {xdp} frames");
        ensure!(tc < xdp / 20, "{family}: {tc} of {xdp} frames came up to tc");
    }
    Ok(())
}

/// Clients outside would notice every deployment.
#[test]
fn no_connection_fails_while_the_backends_change_ten_times_a_second() -> Result<()> {
    for (nodes, xdp) in [(NodeNetwork::Plain, false), (NodeNetwork::Plain, true), (NodeNetwork::Vxlan, false)] {
        let shape = Shape { nodes, pod_counts: [2, 2], xdp, ..Shape::default() };
        let scenario = Scenario::start(shape, &["--xdp", if xdp { "native" } else { "off" }])?;
        let pods: Vec<&Pod> = scenario.cluster.nodes.iter().flat_map(|node| &node.pods).collect();
        scenario.publish(&web(), pods.iter().copied())?;
        let turn = AtomicUsize::new(0);
        let ask = || {
            let family = Family::BOTH[turn.fetch_add(1, Ordering::Relaxed) % 2];
            client::who_and_close(node_at(&scenario, family, PATIENT))
        };
        let answers = scenario.ask_while_backends_change(&web(), &pods, &scenario.cluster.client, &ask)?;
        answers.all_answered().with_context(|| format!("{nodes:?}, XDP {xdp}"))?;
        ensure!(answers.total() > 1_000, "only {} connections in ten seconds", answers.total());
        ensure!(answers.by_backend.len() == 4, "not every backend had its turn: {:?}", answers.by_backend);
    }
    Ok(())
}

/// A DNS server behind a nodePort would not be reached, and long transfers would stall.
#[test]
fn datagrams_and_transfers_go_both_ways() -> Result<()> {
    for backends in ALL {
        // The client's fragments are too large for a tunnel until it has learnt the tunnel's width, which costs a datagram.
        let narrow = backends == Backends::Remote(NodeNetwork::Vxlan);
        let sizes = if narrow { &[1, 1_000][..] } else { &[1, 1_000, 4_000] };
        for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
            for xdp in [false, true] {
                let scenario = start(backends, pods, xdp, 1)?;
                for family in Family::BOTH {
                    let context = || format!("{backends:?}, {pods:?}, XDP {xdp}, {family}");
                    scenario.cluster.client.run(|| -> Result<()> {
                        for size in sizes {
                            let target = node_at(&scenario, family, UDP);
                            let answer = client::ask_udp(target, &"x".repeat(*size)).with_context(context)?;
                            let seen = answer.seen;
                            ensure!(seen.ip() == backends.seen(family), "{}: the pod saw {seen}", context());
                        }
                        let target = node_at(&scenario, family, ECHO);
                        Conversation::open(target).with_context(context)?.transfer(3_000_000).with_context(context)
                    })?;
                }
                ensure!(scenario.cluster.checksum_errors()? == 0, "{backends:?}, {pods:?}: checksum errors");
            }
        }
    }
    Ok(())
}

/// Bulk traffic with all offloads on would be slow or damaged.
#[test]
fn gigabytes_flow_without_a_checksum_error() -> Result<()> {
    for backends in ALL {
        let scenario = start(backends, PodNetwork::Bridged, false, 1)?;
        let bulk = Service::new("bulk", Ipv4Addr::new(10, 96, 0, 20))
            .and(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x20))
            .tcp("iperf", 5201, 5201)
            .node_port(30_201);
        let backend = &behind(&scenario, backends)[0];
        scenario.publish(&bulk, [backend])?;
        let before = scenario.cluster.checksum_errors()?;
        for family in Family::BOTH {
            let target = node_at(&scenario, family, 30_201);
            let moved = server::iperf(&backend.namespace, &scenario.cluster.client, target, 1_500_000_000);
            let moved = moved.with_context(|| format!("{backends:?}, {family}"))?;
            ensure!(moved >= 1_450_000_000, "{backends:?}, {family}: only {moved} bytes arrived");
            ensure!(scenario.cluster.checksum_errors()? == before, "{backends:?}, {family}: checksum errors");
        }
    }
    Ok(())
}

/// Uploads would hang where the road to the other node is narrower than the client's.
#[test]
fn a_transfer_over_a_narrower_road_succeeds() -> Result<()> {
    for xdp in [false, true] {
        let scenario = start(Backends::Remote(NodeNetwork::Plain), PodNetwork::Bridged, xdp, 1)?;
        scenario.node().namespace.ip(&[
            "route replace 10.244.2.0/24 via 192.168.50.2 mtu 1300",
            "route replace fd00:10:244:2::/64 via fd00:50::2 mtu 1300",
        ])?;
        for family in Family::BOTH {
            let target = node_at(&scenario, family, ECHO);
            let transfer = scenario.cluster.client.run(|| Conversation::open(target)?.transfer(3_000_000));
            transfer.with_context(|| format!("{family}, XDP {xdp}"))?;
        }
    }
    Ok(())
}

/// Under policy Local, a client would be sent over to another node and lose its address.
#[test]
fn under_policy_local_only_local_pods_answer_and_without_any_the_node_is_silent() -> Result<()> {
    let scenario = start(Backends::Remote(NodeNetwork::Plain), PodNetwork::Bridged, false, 2)?;
    let (local, remote) = (scenario.pod(1, 1), scenario.pod(2, 1));
    let service = web().external_local();
    scenario.publish(&service, [local, remote])?;
    for family in Family::BOTH {
        let target = node_at(&scenario, family, HTTP);
        let answers = sheave_tests::process::eventually(Duration::from_secs(5), || {
            let answers = client::who_many(Some(&scenario.cluster.client), target, 100, 2);
            ensure!(answers.by_backend.keys().eq([&local.name]), "{:?} answered by {family}", answers.by_backend);
            Ok(answers)
        })?;
        answers.all_answered()?;
        let own = client_address(family);
        ensure!(answers.seen.iter().eq([&own]), "the pod saw {:?}", answers.seen);
    }

    scenario.publish(&service, [remote])?;
    for family in Family::BOTH {
        let target = node_at(&scenario, family, HTTP);
        sheave_tests::process::eventually(Duration::from_secs(8), || {
            let attempt =
                scenario.cluster.client.run(|| std::net::TcpStream::connect_timeout(&target, Duration::from_secs(1)));
            let error = attempt.err().with_context(|| format!("{target} accepted a connection"))?;
            ensure!(error.kind() == std::io::ErrorKind::TimedOut, "{target} is not silent: {error}");
            Ok(())
        })?;
        // Pods take the short cut to every endpoint, as kube-proxy has it.
        let answer = local.namespace.run(|| client::who(target)).context("a pod asks its node's nodePort")?;
        ensure!(answer.backend == remote.name, "{answer:?}");
    }
    Ok(())
}

/// A client would wait for its own time-out where "connection refused" is the answer.
#[test]
fn a_node_port_without_endpoints_refuses_at_once() -> Result<()> {
    for xdp in [false, true] {
        let scenario = start(Backends::Local, PodNetwork::Bridged, xdp, 1)?;
        let empty = Service::new("empty", Ipv4Addr::new(10, 96, 0, 11))
            .and(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x11))
            .tcp("http", 80, 1)
            .node_port(30_600)
            .udp("dns", 53, 1)
            .node_port(30_601);
        scenario.publish(&empty, [])?;
        for family in Family::BOTH {
            let (tcp, udp) = (node_at(&scenario, family, 30_600), node_at(&scenario, family, 30_601));
            let started = Instant::now();
            let attempt =
                scenario.cluster.client.run(|| std::net::TcpStream::connect_timeout(&tcp, patient(client::LIMIT)));
            let error = attempt.err().context("a connection was accepted")?;
            ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{family}, XDP {xdp}: {error}");
            let refused = scenario.cluster.client.run(|| client::ask_udp(udp, "ping"));
            let error = format!("{:#}", refused.err().with_context(|| format!("{udp} answered"))?);
            ensure!(error.contains("refused"), "UDP by {family}: {error}");
            let took = started.elapsed();
            // An ICMP error that finds the socket busy with its SYN is heard again when that is repeated, after a second.
            ensure!(took < Duration::from_millis(2_500), "{family}, XDP {xdp}: it took {took:?}");
        }
    }
    Ok(())
}

/// Services that aren't ours to balance (ssh, the kubelet) would break with Sheave on the uplink.
#[test]
fn what_is_no_service_is_left_alone() -> Result<()> {
    for xdp in [false, true] {
        let scenario = start(Backends::Local, PodNetwork::Bridged, xdp, 1)?;
        let node = scenario.node();
        let _server = server::Server::start(&node.namespace, "the-node")?;
        for family in Family::BOTH {
            let target = |port| node_at(&scenario, family, port);
            let answers = client::who_many(Some(&scenario.cluster.client), target(server::WHO), 500, 2);
            answers.all_answered()?;
            let own = client_address(family);
            ensure!(answers.seen.iter().eq([&own]), "the node saw {:?}", answers.seen);
            scenario.cluster.client.run(|| client::ask_udp(target(server::UDP), "ping"))?;
            scenario.cluster.client.run(|| Conversation::open(target(server::ECHO))?.transfer(1_000_000))?;
            let (from, to) = (scenario.pod(1, 1), scenario.pod(2, 1));
            from.namespace.run(|| client::who(at(to.address_of(family), server::WHO))).context("pod to pod")?;
        }
    }
    Ok(())
}

/// A client of a Service's address from outside the cluster, with a route to it through a node, would get no answer.
#[test]
fn a_client_outside_reaches_a_cluster_ip_through_the_node() -> Result<()> {
    for backends in ALL {
        let scenario = start(backends, PodNetwork::Bridged, false, 2)?;
        for family in Family::BOTH {
            let target = scenario.at(family.pick(WEB, WEB6), 80);
            let answers = client::who_many(Some(&scenario.cluster.client), target, 200, 2);
            answers.all_answered().with_context(|| format!("{backends:?}, {family}"))?;
        }
    }
    Ok(())
}
