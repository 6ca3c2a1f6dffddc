//! A pod asks a ClusterIP: real connections through the kernel, on bridged and routed pod networks.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Conversation};
use sheave_tests::manifests::Service;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{NodeNetwork, Pod, PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Enough for a random choice of one in four to stay within 5 % of even by five standard deviations.
const MANY: usize = 40_000;

fn web() -> Service {
    Service::new("web", WEB).tcp("http", 80, server::WHO).tcp("echo", 7, server::ECHO).udp("udp", 53, server::UDP)
}

/// The client is the first pod of node 1; the four servers are beside it or on node 2.
fn four_backends(pods: PodNetwork, remote: bool, nodes: NodeNetwork) -> Result<Scenario> {
    let pod_counts = if remote { [1, 4] } else { [5, 1] };
    let scenario = Scenario::start(Shape { pods, nodes, pod_counts, xdp: false }, &[])?;
    scenario.publish(&web(), backends(&scenario))?;
    Ok(scenario)
}

fn backends(scenario: &Scenario) -> &[Pod] {
    let [one, two] = [&scenario.cluster.nodes[0], &scenario.cluster.nodes[1]];
    if two.pods.len() == 4 { &two.pods } else { &one.pods[1..] }
}

fn every_connection_is_answered(pods: PodNetwork, remote: bool, nodes: NodeNetwork) -> Result<()> {
    let scenario = four_backends(pods, remote, nodes)?;
    let client = scenario.pod(1, 1);
    let answers = client::who_many(Some(&client.namespace), scenario.at(WEB, 80), MANY, 4);
    answers.all_answered()?;
    answers.evenly_spread(4, 0.05)?;
    let own = IpAddr::from(client.address);
    ensure!(answers.seen.iter().eq([&own]), "pods saw {:?}", answers.seen);
    Ok(())
}

/// Connections of a pod to a Service would fail or pile up on one pod.
#[test]
fn every_connection_to_bridged_pods_of_this_node_is_answered_and_spread() -> Result<()> {
    every_connection_is_answered(PodNetwork::Bridged, false, NodeNetwork::Plain)
}

/// The same with a CNI that routes.
#[test]
fn every_connection_to_routed_pods_of_this_node_is_answered_and_spread() -> Result<()> {
    every_connection_is_answered(PodNetwork::Routed, false, NodeNetwork::Plain)
}

/// Connections to pods of another node would fail.
#[test]
fn every_connection_from_a_bridged_pod_to_another_node_is_answered_and_spread() -> Result<()> {
    every_connection_is_answered(PodNetwork::Bridged, true, NodeNetwork::Plain)
}

/// The same with a CNI that routes.
#[test]
fn every_connection_from_a_routed_pod_to_another_node_is_answered_and_spread() -> Result<()> {
    every_connection_is_answered(PodNetwork::Routed, true, NodeNetwork::Plain)
}

/// The same through an overlay.
#[test]
fn every_connection_through_vxlan_is_answered_and_spread() -> Result<()> {
    every_connection_is_answered(PodNetwork::Bridged, true, NodeNetwork::Vxlan)
}

/// A rollout would cost some clients their connection.
#[test]
fn no_connection_fails_while_the_backends_change_ten_times_a_second() -> Result<()> {
    for (pods, remote) in [(PodNetwork::Bridged, false), (PodNetwork::Routed, true)] {
        let scenario = four_backends(pods, remote, NodeNetwork::Plain)?;
        let client = scenario.pod(1, 1);
        let all: Vec<_> = backends(&scenario).iter().collect();
        let answers = scenario
            .ask_while_backends_change(&web(), &all, &client.namespace, &|| client::who(scenario.at(WEB, 80)))?;
        answers.all_answered()?;
        ensure!(answers.total() > 1_000, "only {} connections in ten seconds", answers.total());
        ensure!(answers.by_backend.len() == 4, "not every backend had its turn: {:?}", answers.by_backend);
    }
    Ok(())
}

/// DNS would not work.
#[test]
fn datagrams_go_both_ways() -> Result<()> {
    for (pods, remote) in [(PodNetwork::Bridged, false), (PodNetwork::Routed, false), (PodNetwork::Bridged, true)] {
        let scenario = four_backends(pods, remote, NodeNetwork::Plain)?;
        let client = scenario.pod(1, 1);
        for size in [1, 100, 1_400] {
            let answer = client.namespace.run(|| client::ask_udp(scenario.at(WEB, 53), &"x".repeat(size)))?;
            ensure!(answer.seen.ip() == client.address, "the pod saw {}", answer.seen);
        }
    }
    Ok(())
}

/// A sender that turned UDP checksums off would have its datagrams dropped at the pod.
#[test]
fn a_datagram_without_checksum_arrives_without_checksum() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [2, 0], ..Shape::default() }, &[])?;
    let (client, backend) = (scenario.pod(1, 1), scenario.pod(1, 2));
    scenario.publish(&web(), [backend])?;
    let sniffer = backend.namespace.run(server::raw_udp)?;
    let (with, without) = client.namespace.run(|| -> Result<_> {
        let without = client::udp_without_checksum()?;
        without.connect(scenario.at(WEB, 53))?;
        client::ask_udp_with(&without, "without")?;
        let with = UdpSocket::bind("0.0.0.0:0")?;
        with.connect(scenario.at(WEB, 53))?;
        client::ask_udp_with(&with, "with")?;
        Ok((with.local_addr()?.port(), without.local_addr()?.port()))
    })?;
    ensure!(sniffer.checksum_from(without)? == 0, "a checksum of zero was changed");
    ensure!(sniffer.checksum_from(with)? != 0, "a checksum was lost");
    ensure!(scenario.cluster.checksum_errors()? == 0, "checksum errors");
    Ok(())
}

/// A pod that is its own backend would not reach its Service.
#[test]
fn a_pod_reaches_itself_through_its_service() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [1, 0], ..Shape::default() }, &[])?;
        let pod = scenario.pod(1, 1);
        scenario.publish(&web(), [pod])?;
        let answers = client::who_many(Some(&pod.namespace), scenario.at(WEB, 80), 500, 2);
        answers.all_answered()?;
        let hairpin: IpAddr = [169, 254, 42, 1].into();
        ensure!(answers.seen.iter().eq([&hairpin]), "{pods:?}: the pod saw {:?}", answers.seen);
        pod.namespace.run(|| client::ask_udp(scenario.at(WEB, 53), "ping"))?;
        pod.namespace
            .run(|| Conversation::open(scenario.at(WEB, 7))?.transfer(5_000_000))
            .context("a hairpin transfer")?;
    }
    Ok(())
}

/// A client would wait for its own time-out where "connection refused" is the answer.
#[test]
fn a_service_without_endpoints_and_an_unknown_port_refuse_at_once() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [2, 0], ..Shape::default() }, &[])?;
        let client = scenario.pod(1, 1);
        let empty = Ipv4Addr::new(10, 96, 0, 11);
        scenario.publish(&Service::new("empty", empty).tcp("http", 80, 1).udp("dns", 53, 1), [])?;
        scenario.publish(&web(), [scenario.pod(1, 2)])?;
        for target in [scenario.at(empty, 80), scenario.at(WEB, 81)] {
            let started = Instant::now();
            let refused = client.namespace.run(|| std::net::TcpStream::connect_timeout(&target, client::LIMIT));
            let error = refused.err().with_context(|| format!("{target} accepted a connection"))?;
            ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{target}: {error}");
            ensure!(started.elapsed() < Duration::from_millis(500), "{target} took {:?}", started.elapsed());
        }
        let refused = client.namespace.run(|| client::ask_udp(scenario.at(empty, 53), "ping"));
        let error = format!("{:#}", refused.err().context("an empty service answered")?);
        ensure!(error.contains("refused"), "UDP: {error}");
    }
    Ok(())
}

/// A client with a session on one pod would be sent to another.
#[test]
fn clients_with_affinity_stay_with_their_pod() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [5, 0], ..Shape::default() }, &[])?;
    let service = web().affinity(600);
    scenario.publish(&service, &scenario.node().pods[1..])?;
    let client = scenario.pod(1, 1);
    let answers = client::who_many(Some(&client.namespace), scenario.at(WEB, 80), 200, 2);
    answers.all_answered()?;
    ensure!(answers.by_backend.len() == 1, "one client was sent to {:?}", answers.by_backend);

    // The pod goes; the client gets another one and stays with it.
    let first = answers.by_backend.keys().next().cloned().unwrap_or_default();
    scenario.publish(&service, scenario.node().pods[1..].iter().filter(|pod| pod.name != first))?;
    sheave_tests::process::eventually(Duration::from_secs(5), || {
        let answer = client.namespace.run(|| client::who(scenario.at(WEB, 80)))?;
        ensure!(answer.backend != first, "the client is still sent to {first}");
        Ok(())
    })?;
    let answers = client::who_many(Some(&client.namespace), scenario.at(WEB, 80), 200, 2);
    answers.all_answered()?;
    ensure!(answers.by_backend.len() == 1, "one client was sent to {:?}", answers.by_backend);
    Ok(())
}

/// Uploads would hang where the road to the backend is narrower than the pod's own link.
#[test]
fn a_transfer_over_a_narrower_road_succeeds() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [1, 1], ..Shape::default() }, &[])?;
        let (client, backend) = (scenario.pod(1, 1), scenario.pod(2, 1));
        scenario.publish(&web(), [backend])?;
        scenario.node().namespace.ip(&["route replace 10.244.2.0/24 via 192.168.50.2 mtu 1300"])?;
        client.namespace.run(|| Conversation::open(scenario.at(WEB, 7))?.transfer(5_000_000)).with_context(|| {
            let route = client.namespace.output("ip", &["route", "get", &scenario.cluster_ip(WEB).to_string()]);
            format!("{pods:?}: the client's route: {route:?}")
        })?;
        let route = client.namespace.output("ip", &["route", "get", &scenario.cluster_ip(WEB).to_string()])?;
        ensure!(route.contains("mtu 1300"), "{pods:?}: the client has not learnt the road's width: {route}");
    }
    Ok(())
}

/// A client that uses one source port towards two Services with the same pod would lose one connection.
#[test]
fn one_source_port_to_two_services_with_one_backend_is_two_connections() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [2, 1], ..Shape::default() }, &[])?;
    let other = Ipv4Addr::new(10, 96, 0, 12);
    for backend in [scenario.pod(1, 2), scenario.pod(2, 1)] {
        scenario.publish(&web(), [backend])?;
        scenario.publish(&Service::new("other", other).tcp("echo", 7, server::ECHO), [backend])?;
        let client = scenario.pod(1, 1);
        client.namespace.run(|| -> Result<()> {
            let source = SocketAddrV4::new(client.address, 5_000);
            let mut one = Conversation::open_from(source, SocketAddrV4::new(scenario.cluster_ip(WEB), 7))
                .context("the first Service")?;
            let mut two = Conversation::open_from(source, SocketAddrV4::new(scenario.cluster_ip(other), 7))
                .context("the second Service")?;
            for words in [&b"one"[..], b"two", b"three"] {
                one.say(words).context("through the first Service")?;
                two.say(words).context("through the second Service")?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// With a CNI's usual firewall in the way, replies would be dropped as invalid.
#[test]
fn a_firewall_that_drops_invalid_packets_sees_proper_connections() -> Result<()> {
    let rules = "table ip cni { chain forward { type filter hook forward priority filter; ct state invalid drop; }; }";
    for (pods, bridge_netfilter, firewall) in [
        (PodNetwork::Bridged, "1", true),
        (PodNetwork::Bridged, "1", false),
        (PodNetwork::Bridged, "0", false),
        (PodNetwork::Routed, "1", true),
    ] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [3, 2], ..Shape::default() }, &[])?;
        let node = scenario.node();
        node.namespace.sysctl("bridge/bridge-nf-call-iptables", bridge_netfilter)?;
        if firewall {
            node.namespace.output("nft", &[rules])?;
        }
        let pods = node.pods[1..].iter().chain(&scenario.cluster.nodes[1].pods);
        scenario.publish(&web(), pods)?;
        let client = scenario.pod(1, 1);
        let answers = client::who_many(Some(&client.namespace), scenario.at(WEB, 80), 500, 2);
        answers
            .all_answered()
            .with_context(|| format!("bridge-nf-call-iptables {bridge_netfilter}, firewall {firewall}"))?;
        ensure!(answers.by_backend.len() == 4, "{:?}", answers.by_backend);
        client.namespace.run(|| Conversation::open(scenario.at(WEB, 7))?.transfer(5_000_000))?;
    }
    Ok(())
}

/// Bulk traffic with all offloads on would be slow or damaged.
#[test]
fn gigabytes_flow_without_a_checksum_error() -> Result<()> {
    for (pods, remote) in [(PodNetwork::Bridged, false), (PodNetwork::Routed, false), (PodNetwork::Bridged, true)] {
        let pod_counts = if remote { [1, 1] } else { [2, 1] };
        let scenario = Scenario::start(Shape { pods, pod_counts, ..Shape::default() }, &[])?;
        let backend = if remote { scenario.pod(2, 1) } else { scenario.pod(1, 2) };
        let service = Service::new("bulk", WEB).tcp("iperf", 5201, 5201);
        scenario.publish(&service, [backend])?;
        let before = scenario.cluster.checksum_errors()?;
        let moved =
            server::iperf(&backend.namespace, &scenario.pod(1, 1).namespace, scenario.at(WEB, 5201), 2_000_000_000)?;
        ensure!(moved >= 1_950_000_000, "only {moved} bytes arrived");
        ensure!(scenario.cluster.checksum_errors()? == before, "checksum errors");
    }
    Ok(())
}
