//! A process of the node itself asks Services: its sockets are balanced when they connect.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Answers};
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::process::{Process, built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{self, Server};
use sheave_tests::topology::{PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 1);
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
const CLUSTER_IPS: [IpAddr; 2] = [IpAddr::V4(WEB), IpAddr::V6(WEB6)];
/// Where this node serves nodePorts to its own processes.
const NODE_PORTS: [IpAddr; 4] = [IpAddr::V4(NODE), IpAddr::V6(NODE6), LOOPBACK[0], LOOPBACK[1]];

fn web() -> Service {
    Service::new("web", WEB)
        .and(WEB6)
        .tcp("http", 80, server::WHO)
        .node_port(30_500)
        .udp("udp", 53, server::UDP)
        .node_port(30_053)
}

/// Two backends on each node.
fn start(pods: PodNetwork) -> Result<Scenario> {
    let scenario = Scenario::start(Shape { pods, pod_counts: [2, 2], ..Shape::default() }, &[])?;
    scenario.publish(&web(), scenario.cluster.nodes.iter().flat_map(|node| &node.pods))?;
    Ok(scenario)
}

fn probe(mut command: Command, protocol: &str, target: SocketAddr, count: usize) -> Result<Answers> {
    command.args([protocol, &target.to_string(), &count.to_string()]);
    let output = Process::start("probe", &mut command)?.finish(Duration::from_secs(60))?;
    serde_json::from_str(&output).with_context(|| format!("the probe printed {output}"))
}

/// Where a published port is in either family, and the IPv4 addresses also as IPv4-mapped ones, which AF_INET6 sockets ask.
fn everywhere(scenario: &Scenario, addresses: &[IpAddr], port: u16) -> BTreeSet<SocketAddr> {
    let targets = addresses.iter().map(|address| scenario.at(*address, port));
    targets.flat_map(|target| [target, client::mapped(target)]).collect()
}

/// The kubelet and other processes of a node would not reach Services.
#[test]
fn a_host_process_reaches_cluster_ips_and_node_ports() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = start(pods)?;
        let targets = everywhere(&scenario, &CLUSTER_IPS, 80);
        for target in targets.into_iter().chain(everywhere(&scenario, &NODE_PORTS, 30_500)) {
            let answers = probe(scenario.agent.host_command(built("probe")?), "tcp", target, 1_000)?;
            answers.all_answered().with_context(|| format!("{pods:?}: {target}"))?;
            answers.evenly_spread(4, 0.25).with_context(|| format!("{pods:?}: {target}"))?;
        }
    }
    Ok(())
}

/// A node's resolver would not reach the cluster's DNS, or throw its answers away.
#[test]
fn a_host_process_asks_by_datagram() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    let targets = everywhere(&scenario, &CLUSTER_IPS, 53);
    for target in targets.into_iter().chain(everywhere(&scenario, &NODE_PORTS, 30_053)) {
        for protocol in ["udp", "udp-named", "udp-unconnected"] {
            let answers = probe(scenario.agent.host_command(built("probe")?), protocol, target, 50)?;
            answers.all_answered().with_context(|| format!("{protocol} to {target}"))?;
        }
    }
    Ok(())
}

/// A resolver with two servers in /etc/resolv.conf would throw away the answers of one, where both are the same pod.
#[test]
fn one_socket_asks_two_services_with_one_backend_in_turn() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    let addresses = [Ipv4Addr::new(10, 96, 0, 20), Ipv4Addr::new(10, 96, 0, 21)];
    for (name, address) in ["first", "second"].into_iter().zip(addresses) {
        scenario.publish(&Service::new(name, address).udp("udp", 53, server::UDP), [scenario.pod(1, 1)])?;
    }
    let mut command = scenario.agent.host_command(built("probe")?);
    command.args(["udp-unconnected", &addresses.map(|address| scenario.at(address, 53).to_string()).join(","), "40"]);
    let output = Process::start("probe", &mut command)?.finish(Duration::from_secs(60))?;
    let answers: Answers = serde_json::from_str(&output)?;
    answers.all_answered()
}

/// A long-lived socket would go on asking a Service that has given its port to another one.
#[test]
fn a_socket_follows_a_port_to_the_service_that_takes_it_over() -> Result<()> {
    // An API server gives out nodePorts itself, so this is about a folder.
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [2, 1], ..Shape::default() }, &[])?;
    let service = |name, last, port| {
        Service::new(name, Ipv4Addr::new(10, 96, 0, last)).udp("udp", 53, server::UDP).node_port(port)
    };
    let pods = [scenario.pod(1, 1), scenario.pod(1, 2)];
    scenario.publish(&service("old", 20, 30_153), [pods[0]])?;
    scenario.publish(&service("new", 21, 30_154), [pods[1]])?;
    let mut command = scenario.agent.host_command(built("probe")?);
    command.args(["udp-unconnected", &format!("{NODE}:30153"), "60", "50"]);
    let probe = Process::start("probe", &mut command)?;
    eventually(Duration::from_secs(5), || {
        let text = pods[0].namespace.output("cat", &["/proc/self/net/snmp"])?;
        // A line of names, then a line of numbers; the first is how many datagrams have arrived.
        let numbers =
            text.lines().filter_map(|line| line.strip_prefix("Udp: ")).nth(1).context("no counters of UDP")?;
        ensure!(!numbers.starts_with("0 "), "the old Service's pod has not been asked");
        Ok(())
    })?;
    scenario.publish(&service("old", 20, 30_155), [pods[0]])?;
    scenario.publish(&service("new", 21, 30_153), [pods[1]])?;
    let answers: Answers = serde_json::from_str(&probe.finish(Duration::from_secs(60))?)?;
    ensure!(answers.by_backend.len() == 2, "{:?} answered", answers.by_backend);
    Ok(())
}

/// A process that only shares the cgroup, in another network, would find its own servers hidden behind our Services.
#[test]
fn a_process_of_another_network_in_the_same_cgroup_is_not_touched() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    let elsewhere = Namespace::new("elsewhere")?;
    elsewhere.ip(&[format!("address add {}/32 dev lo", scenario.cluster_ip(WEB))])?;
    let _server = Server::start(&elsewhere, "bystander")?;
    for (protocol, target) in [("tcp", scenario.at(WEB, server::WHO)), ("udp", scenario.at(WEB, server::UDP))] {
        let command = scenario.agent.bystander_command(&elsewhere, built("probe")?);
        let answers = probe(command, protocol, target, 50)?;
        answers.all_answered()?;
        ensure!(answers.by_backend.keys().eq(["bystander"]), "{:?} answered", answers.by_backend);
    }
    // On the very address and port of a frontend there is nobody there, and it must stay so.
    let command = scenario.agent.bystander_command(&elsewhere, built("probe")?);
    let answers = probe(command, "tcp", scenario.at(WEB, 80), 5)?;
    ensure!(answers.total() == 0, "a process of another network was sent to {:?}", answers.by_backend);
    Ok(())
}

/// A host process would wait for a time-out where "connection refused" is the answer.
#[test]
fn a_host_process_is_refused_at_once_without_endpoints() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    let empty = ["10.96.0.11".parse::<IpAddr>()?, "fd00:10:96::11".parse()?];
    scenario.publish(&Service::new("empty", empty[0]).and(empty[1]).tcp("http", 80, 1).node_port(30_600), [])?;
    let unknown = everywhere(&scenario, &CLUSTER_IPS, 81);
    let targets = everywhere(&scenario, &empty, 80).into_iter().chain(everywhere(&scenario, &NODE_PORTS, 30_600));
    for target in targets.chain(unknown) {
        let answers = probe(scenario.agent.host_command(built("probe")?), "tcp", target, 3)?;
        ensure!(answers.failed == 3 && answers.errors.iter().all(|error| error.contains("refused")), "{answers:?}");
    }
    Ok(())
}

/// A pod's own processes see the Service's address as their peer, so they must be translated by packet, not by socket.
#[test]
fn a_pods_process_in_the_cgroup_is_balanced_by_packet_only() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    let pod = scenario.pod(1, 1);
    let command = scenario.agent.bystander_command(&pod.namespace, built("probe")?);
    let answers = probe(command, "tcp", scenario.at(WEB, 80), 500)?;
    answers.all_answered()?;
    let hairpin = IpAddr::from([169, 254, 42, 1]);
    ensure!(answers.seen.contains(&hairpin), "no packet was turned back to the pod itself: {:?}", answers.seen);
    Ok(())
}

/// A process that binds to loopback and asks a nodePort there would wait for an answer that can't come back: no packet
/// from loopback leaves the machine.
#[test]
fn a_socket_bound_to_loopback_is_left_alone() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    for target in everywhere(&scenario, &LOOPBACK, 30_500) {
        let answers = probe(scenario.agent.host_command(built("probe")?), "tcp-bound", target, 1)?;
        // Nobody listens there.
        ensure!(answers.failed == 1 && answers.errors[0].contains("refused"), "{target}: {answers:?}");
    }
    Ok(())
}

/// A node's processes would be scattered over the backends of a Service with affinity, or share a pod's backend.
#[test]
fn the_client_of_affinity_is_the_node_or_the_pod() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [2, 2], ..Shape::default() }, &["--connect", "all"])?;
    scenario.publish(&web().affinity(600), scenario.cluster.nodes.iter().flat_map(|node| &node.pods))?;
    let pods = [scenario.pod(1, 1), scenario.pod(1, 2)];
    for target in everywhere(&scenario, &CLUSTER_IPS, 80) {
        for client in [None, Some(pods[0]), Some(pods[1])] {
            let ask = |count| {
                let command = match client {
                    None => scenario.agent.host_command(built("probe")?),
                    Some(pod) => scenario.agent.bystander_command(&pod.namespace, built("probe")?),
                };
                probe(command, "tcp", target, count)
            };
            // Two first connections at once may choose differently.
            let mut answers = ask(1)?;
            answers.merge(ask(20)?);
            answers.all_answered()?;
            ensure!(answers.by_backend.len() == 1, "{target}: {:?} answered one client", answers.by_backend);
        }
    }
    let shown: serde_json::Value = serde_json::from_str(&scenario.agent.view("affinity", &["-o", "json"])?)?;
    let rows = shown.as_array().context("affinity is a list")?.iter();
    let clients: Vec<IpAddr> = rows.filter_map(|row| row["client"].as_str()?.parse().ok()).collect();
    ensure!(clients.len() == 6 && clients.contains(&NODE.into()) && clients.contains(&NODE6.into()), "{shown:#}");
    Ok(())
}
