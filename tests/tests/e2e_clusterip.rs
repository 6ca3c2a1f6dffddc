//! A pod asks a ClusterIP: real connections through the kernel, on bridged and routed pod networks, in both families.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Conversation};
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::patience::patient;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{NodeNetwork, Pod, PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
/// Connections, and what an even share may differ by: enough for a random choice of one in four to stay within it by five
/// standard deviations.
const MANY: usize = 10_000;
const TOLERANCE: f64 = 0.1;

fn web() -> Service {
    Service::new("web", WEB).and(WEB6).tcp("http", 80, server::WHO).tcp("echo", 7, server::ECHO).udp(
        "udp",
        53,
        server::UDP,
    )
}

/// Where [`web`] is.
fn web_at(scenario: &Scenario, family: Family, port: u16) -> SocketAddr {
    scenario.at(family.pick(WEB, WEB6), port)
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
    for family in Family::BOTH {
        let answers = client::who_many(Some(&client.namespace), web_at(&scenario, family, 80), MANY, 4);
        answers.all_answered().with_context(|| family.to_string())?;
        answers.evenly_spread(4, TOLERANCE).with_context(|| family.to_string())?;
        let own = client.address_of(family);
        ensure!(answers.seen.iter().eq([&own]), "{family}: pods saw {:?}", answers.seen);
    }
    ensure!(scenario.cluster.checksum_errors()? == 0, "checksum errors");
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
        let turn = AtomicUsize::new(0);
        let answers = scenario.ask_while_backends_change(&web(), &all, &client.namespace, &|| {
            let family = Family::BOTH[turn.fetch_add(1, Ordering::Relaxed) % 2];
            client::who(web_at(&scenario, family, 80))
        })?;
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
        for (family, size) in
            Family::BOTH.into_iter().flat_map(|family| [1, 100, 1_400, 4_000].map(|size| (family, size)))
        {
            let answer = client.namespace.run(|| client::ask_udp(web_at(&scenario, family, 53), &"x".repeat(size)))?;
            ensure!(answer.seen.ip() == client.address_of(family), "the pod saw {}", answer.seen);
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
        for family in Family::BOTH {
            let answers = client::who_many(Some(&pod.namespace), web_at(&scenario, family, 80), 500, 2);
            answers.all_answered().with_context(|| format!("{pods:?}, {family}"))?;
            let hairpin = family.pick([169, 254, 42, 1], [0xfd53, 0x6865, 0x6176, 0x6500, 0, 0, 0, 1]);
            ensure!(answers.seen.iter().eq([&hairpin]), "{pods:?}: the pod saw {:?}", answers.seen);
            pod.namespace.run(|| client::ask_udp(web_at(&scenario, family, 53), "ping"))?;
            pod.namespace
                .run(|| Conversation::open(web_at(&scenario, family, 7))?.transfer(5_000_000))
                .with_context(|| format!("a hairpin transfer by {family}"))?;
        }
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
        let empty6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x11);
        scenario.publish(&Service::new("empty", empty).and(empty6).tcp("http", 80, 1).udp("dns", 53, 1), [])?;
        scenario.publish(&web(), [scenario.pod(1, 2)])?;
        for target in [scenario.at(empty, 80), scenario.at(empty6, 80), scenario.at(WEB, 81), scenario.at(WEB6, 81)] {
            let started = Instant::now();
            let refused =
                client.namespace.run(|| std::net::TcpStream::connect_timeout(&target, patient(client::LIMIT)));
            let error = refused.err().with_context(|| format!("{target} accepted a connection"))?;
            ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{target}: {error}");
            ensure!(started.elapsed() < Duration::from_millis(500), "{target} took {:?}", started.elapsed());
        }
        for target in [scenario.at(empty, 53), scenario.at(empty6, 53), scenario.at(WEB6, 54)] {
            let refused = client.namespace.run(|| client::ask_udp(target, "ping"));
            let error = format!("{:#}", refused.err().with_context(|| format!("{target} answered"))?);
            ensure!(error.contains("refused"), "UDP to {target}: {error}");
        }
    }
    Ok(())
}

/// A client with a session on one pod would be sent to another.
#[test]
fn clients_with_affinity_stay_with_their_pod() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [5, 0], ..Shape::default() }, &[])?;
    let service = web().affinity(600);
    let client = scenario.pod(1, 1);
    for family in Family::BOTH {
        scenario.publish(&service, &scenario.node().pods[1..])?;
        let target = web_at(&scenario, family, 80);
        let answers = client::who_many(Some(&client.namespace), target, 200, 2);
        answers.all_answered()?;
        ensure!(answers.by_backend.len() == 1, "one client was sent to {:?} by {family}", answers.by_backend);

        // The pod goes; the client gets another one and stays with it.
        let first = answers.by_backend.keys().next().cloned().unwrap_or_default();
        scenario.publish(&service, scenario.node().pods[1..].iter().filter(|pod| pod.name != first))?;
        sheave_tests::process::eventually(Duration::from_secs(5), || {
            let answer = client.namespace.run(|| client::who(target))?;
            ensure!(answer.backend != first, "the client is still sent to {first}");
            Ok(())
        })?;
        let answers = client::who_many(Some(&client.namespace), target, 200, 2);
        answers.all_answered()?;
        ensure!(answers.by_backend.len() == 1, "one client was sent to {:?} by {family}", answers.by_backend);
    }
    Ok(())
}

/// Uploads would hang where the road to the backend is narrower than the pod's own link.
#[test]
fn a_transfer_over_a_narrower_road_succeeds() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [1, 1], ..Shape::default() }, &[])?;
        let (client, backend) = (scenario.pod(1, 1), scenario.pod(2, 1));
        scenario.publish(&web(), [backend])?;
        scenario.node().namespace.ip(&[
            "route replace 10.244.2.0/24 via 192.168.50.2 mtu 1300",
            "route replace fd00:10:244:2::/64 via fd00:50::2 mtu 1300",
        ])?;
        for family in Family::BOTH {
            let target = web_at(&scenario, family, 7);
            let route = || client.namespace.output("ip", &["route", "get", &target.ip().to_string()]);
            client
                .namespace
                .run(|| Conversation::open(target)?.transfer(5_000_000))
                .with_context(|| format!("{pods:?}: the client's route: {:?}", route()))?;
            let route = route()?;
            ensure!(route.contains("mtu 1300"), "{pods:?}: the client has not learnt the road's width: {route}");
        }
    }
    Ok(())
}

/// A client that uses one source port towards two Services with the same pod would lose one connection.
#[test]
fn one_source_port_to_two_services_with_one_backend_is_two_connections() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [2, 1], ..Shape::default() }, &[])?;
    let other = Ipv4Addr::new(10, 96, 0, 12);
    let other6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x12);
    for backend in [scenario.pod(1, 2), scenario.pod(2, 1)] {
        scenario.publish(&web(), [backend])?;
        scenario.publish(&Service::new("other", other).and(other6).tcp("echo", 7, server::ECHO), [backend])?;
        let client = scenario.pod(1, 1);
        for family in Family::BOTH {
            client.namespace.run(|| -> Result<()> {
                let source = client::at(client.address_of(family), 5_000);
                let mut one = Conversation::open_from(source, web_at(&scenario, family, 7))
                    .with_context(|| format!("the first Service by {family}"))?;
                let mut two = Conversation::open_from(source, scenario.at(family.pick(other, other6), 7))
                    .with_context(|| format!("the second Service by {family}"))?;
                for words in [&b"one"[..], b"two", b"three"] {
                    one.say(words).context("through the first Service")?;
                    two.say(words).context("through the second Service")?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// With a CNI's usual firewall in the way, replies would be dropped as invalid.
#[test]
fn a_firewall_that_drops_invalid_packets_sees_proper_connections() -> Result<()> {
    let rules =
        "table inet cni { chain forward { type filter hook forward priority filter; ct state invalid drop; }; }";
    for (pods, bridge_netfilter, firewall) in [
        (PodNetwork::Bridged, "1", true),
        (PodNetwork::Bridged, "1", false),
        (PodNetwork::Bridged, "0", false),
        (PodNetwork::Routed, "1", true),
    ] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [3, 2], ..Shape::default() }, &[])?;
        let node = scenario.node();
        node.namespace.sysctl("bridge/bridge-nf-call-iptables", bridge_netfilter)?;
        node.namespace.sysctl("bridge/bridge-nf-call-ip6tables", bridge_netfilter)?;
        if firewall {
            node.namespace.output("nft", &[rules])?;
        }
        let pods = node.pods[1..].iter().chain(&scenario.cluster.nodes[1].pods);
        scenario.publish(&web(), pods)?;
        let client = scenario.pod(1, 1);
        for family in Family::BOTH {
            let answers = client::who_many(Some(&client.namespace), web_at(&scenario, family, 80), 500, 2);
            answers.all_answered().with_context(|| {
                format!("{family}, bridge-nf-call-iptables {bridge_netfilter}, firewall {firewall}")
            })?;
            ensure!(answers.by_backend.len() == 4, "{:?}", answers.by_backend);
            client.namespace.run(|| Conversation::open(web_at(&scenario, family, 7))?.transfer(5_000_000))?;
        }
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
        let service = Service::new("bulk", WEB).and(WEB6).tcp("iperf", 5201, 5201);
        scenario.publish(&service, [backend])?;
        let before = scenario.cluster.checksum_errors()?;
        for family in Family::BOTH {
            let target = web_at(&scenario, family, 5201);
            let moved = server::iperf(&backend.namespace, &scenario.pod(1, 1).namespace, target, 1_500_000_000)
                .with_context(|| format!("{pods:?}, {family}, remote {remote}"))?;
            ensure!(moved >= 1_450_000_000, "{family}: only {moved} bytes arrived");
            ensure!(scenario.cluster.checksum_errors()? == before, "{family}: checksum errors");
        }
    }
    Ok(())
}
