//! `--connect`: which processes are balanced at their sockets, and that those which are not are balanced by their packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::Answers;
use sheave_tests::manifests::Service;
use sheave_tests::process::{Process, built};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::Shape;

const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const PROTOCOLS: [(&str, u16); 2] = [("tcp", 80), ("udp", 53)];

/// Backends on both nodes, and a third pod of the first node to ask from.
fn start(mode: &str) -> Result<Scenario> {
    let scenario = Scenario::start(Shape { pod_counts: [3, 1], ..Shape::default() }, &["--connect", mode])?;
    let service = Service::new("web", VIP).and(VIP6).tcp("http", 80, server::WHO).udp("udp", 53, server::UDP);
    scenario.publish(&service, [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)])?;
    Ok(scenario)
}

fn ask(mut command: Command, protocol: &str, target: SocketAddr, count: usize) -> Result<Answers> {
    command.args([protocol, &target.to_string(), &count.to_string()]);
    let output = Process::start("probe", &mut command)?.finish(Duration::from_secs(60))?;
    serde_json::from_str(&output).with_context(|| format!("the probe printed {output}"))
}

/// Whether there are flows of a client, which there are only if its packets are translated.
fn has_flows(scenario: &Scenario, client: IpAddr, protocol: &str) -> Result<bool> {
    let shown: serde_json::Value =
        serde_json::from_str(&scenario.agent.view("conntrack", &["--client", &client.to_string(), "-o", "json"])?)?;
    let rows = shown.as_array().context("a list")?;
    Ok(rows.iter().any(|row| row["protocol"].as_str().is_some_and(|name| name.eq_ignore_ascii_case(protocol))))
}

/// A pod's process asks in both families; `by_socket` are the protocols that must need no flow.
fn check_pod(scenario: &Scenario, by_socket: &[&str]) -> Result<()> {
    let pod = scenario.pod(1, 3);
    for (address, client) in [(IpAddr::from(VIP), IpAddr::from(pod.address)), (VIP6.into(), pod.address6.into())] {
        for (protocol, port) in PROTOCOLS {
            let command = scenario.agent.bystander_command(&pod.namespace, built("probe")?);
            let answers = ask(command, protocol, scenario.at(address, port), 200)?;
            answers.all_answered().with_context(|| format!("{protocol} of a pod to {address}"))?;
            answers.evenly_spread(3, 0.5)?;
            ensure!(answers.seen == [client].into(), "the backends saw {:?}, not {client}", answers.seen);
            let by_packet = has_flows(scenario, client, protocol)?;
            ensure!(by_packet != by_socket.contains(&protocol), "{protocol} of {client} has flows: {by_packet}");
        }
    }
    Ok(())
}

fn ask_as_host(scenario: &Scenario, count: usize, check: impl Fn(&Answers) -> Result<()>) -> Result<()> {
    for address in [IpAddr::from(VIP), VIP6.into()] {
        for (protocol, port) in PROTOCOLS {
            let command = scenario.agent.host_command(built("probe")?);
            let answers = ask(command, protocol, scenario.at(address, port), count)?;
            check(&answers).with_context(|| format!("{protocol} of the host to {address}"))?;
        }
    }
    Ok(())
}

fn check_host(scenario: &Scenario) -> Result<()> {
    ask_as_host(scenario, 200, |answers| {
        answers.all_answered()?;
        answers.evenly_spread(3, 0.5)
    })
}

/// Pods would lose their NetworkPolicies' view of a Service's address, or the node its Services.
#[test]
fn host_balances_the_hosts_sockets_and_pods_packets() -> Result<()> {
    let scenario = start("host")?;
    check_host(&scenario)?;
    check_pod(&scenario, &[])
}

#[test]
fn tcp_balances_pods_connections_at_the_socket_and_their_datagrams_by_packet() -> Result<()> {
    let scenario = start("tcp")?;
    check_host(&scenario)?;
    check_pod(&scenario, &["tcp"])
}

#[test]
fn all_balances_everything_at_the_socket() -> Result<()> {
    let scenario = start("all")?;
    check_host(&scenario)?;
    check_pod(&scenario, &["tcp", "udp"])
}

/// Somebody who switches it off because of another program on these hooks would find it there nevertheless.
#[test]
fn off_leaves_sockets_alone_and_balances_pods_packets() -> Result<()> {
    let scenario = start("off")?;
    check_pod(&scenario, &[])?;
    ask_as_host(&scenario, 1, |answers| {
        ensure!(answers.total() == 0, "{:?} answered", answers.by_backend);
        Ok(())
    })
}

/// A pod whose datagrams go by one socket to several Services, as a resolver's do, would have answers thrown away.
#[test]
fn an_unconnected_socket_of_a_pod_gets_its_answers_in_every_mode() -> Result<()> {
    for mode in ["host", "tcp", "all"] {
        let scenario = start(mode)?;
        let pod = scenario.pod(1, 3);
        for address in [IpAddr::from(VIP), VIP6.into()] {
            let command = scenario.agent.bystander_command(&pod.namespace, built("probe")?);
            let answers = ask(command, "udp-unconnected", scenario.at(address, 53), 20)?;
            answers.all_answered().with_context(|| format!("{mode}: {address}"))?;
        }
    }
    Ok(())
}
