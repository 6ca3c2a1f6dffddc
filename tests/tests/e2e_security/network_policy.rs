//! NetworkPolicy: what CNIs make of one are rules on pods' addresses.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client;
use sheave_tests::family::Family;
use sheave_tests::netns::Namespace;
use sheave_tests::patience::patient;
use sheave_tests::process::Process;
use sheave_tests::scenario::Scenario;
use sheave_tests::topology::{PodNetwork, Shape, client_address};

use super::{NODE_PORT, web, web_at};

/// How long silence has to last; what is allowed answers in a hundredth of it.
const SILENCE: Duration = Duration::from_millis(700);

/// Drops what passes a chain of the node from one address to another.
fn forbid(node: &Namespace, chain: &str, from: IpAddr, to: IpAddr) -> Result<()> {
    let program = if to.is_ipv4() { "iptables" } else { "ip6tables" };
    let (from, to) = (from.to_string(), to.to_string());
    node.output(program, &["-w", "-I", chain, "-s", &from, "-d", &to, "-j", "DROP"]).map(|_| ())
}

/// Whether a question gets silence for an answer.
fn is_silent<T>(outcome: io::Result<T>) -> bool {
    outcome.is_err_and(|error| matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock))
}

/// Asks all of these at once, from a namespace, and expects silence.
fn out_of_reach(client: &Namespace, tcp: &[SocketAddr], udp: SocketAddr) -> Result<()> {
    let datagram = || -> io::Result<usize> {
        let socket = UdpSocket::bind(if udp.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.connect(udp)?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.send(b"?")?;
        socket.recv(&mut [0; 64])
    };
    std::thread::scope(|scope| {
        let asking: Vec<_> = tcp
            .iter()
            .map(|target| scope.spawn(|| client.run(|| is_silent(TcpStream::connect_timeout(target, SILENCE)))))
            .collect();
        let silent = client.run(|| is_silent(datagram()));
        for (thread, target) in asking.into_iter().zip(tcp) {
            ensure!(thread.join().unwrap_or(false), "{} is not kept from {target}", client.name());
        }
        ensure!(silent, "{} is not kept from {udp} by UDP", client.name());
        Ok(())
    })
}

/// A connection to an echo server, after its greeting.
fn talk(target: SocketAddr) -> Result<TcpStream> {
    let mut connection = TcpStream::connect_timeout(&target, patient(client::LIMIT))?;
    connection.set_read_timeout(Some(patient(client::LIMIT)))?;
    ensure!(connection.read(&mut [0; 256])? > 0, "{target} hung up");
    Ok(connection)
}

/// A pod that may not talk to another one would only have to ask by way of its Service.
#[test]
fn a_rule_between_two_pods_holds_through_cluster_ips_and_node_ports() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [3, 1], ..Shape::default() }, &[])?;
        let [asks, local, other] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(1, 3)];
        for backend in [local, scenario.pod(2, 1)] {
            scenario.publish(&web(), [backend])?;
            for family in Family::BOTH {
                let what = || format!("{pods:?} pods, {family}, {}", backend.name);
                let tcp = [
                    web_at(&scenario, family, 80),
                    web_at(&scenario, family, 7),
                    scenario.at(scenario.node().address_of(family), NODE_PORT),
                ];
                let udp = web_at(&scenario, family, 53);
                let mut open = asks.namespace.run(|| talk(tcp[1])).with_context(what)?;
                forbid(&scenario.node().namespace, "FORWARD", asks.address_of(family), backend.address_of(family))?;
                out_of_reach(&asks.namespace, &tcp, udp).with_context(what)?;
                // It holds for what was open before, too.
                open.set_read_timeout(Some(SILENCE))?;
                open.write_all(b"still here?")?;
                ensure!(is_silent(open.read(&mut [0; 64])), "{}: an open connection goes on", what());
                // And for nobody else.
                for target in [tcp[0], tcp[2]] {
                    client::who_many(Some(&other.namespace), target, 5, 1).all_answered().with_context(what)?;
                }
                other.namespace.run(|| client::ask_udp(udp, "?")).with_context(what)?;
            }
        }
    }
    Ok(())
}

/// Policies on where packets come from would be blind for the world outside, or for the node's own processes.
#[test]
fn a_rule_against_a_client_outside_or_against_the_node_holds_through_services() -> Result<()> {
    for xdp in ["off", "native"] {
        let shape = Shape { pods: PodNetwork::Routed, pod_counts: [2, 1], xdp: xdp == "native", ..Shape::default() };
        let scenario = Scenario::start(shape, &["--xdp", xdp])?;
        let outside = &scenario.cluster.client;
        let [one, two] = [&scenario.cluster.nodes[0], &scenario.cluster.nodes[1]];
        for (backend, node) in [(scenario.pod(1, 1), one), (scenario.pod(2, 1), two)] {
            scenario.publish(&web(), [backend])?;
            for family in Family::BOTH {
                let what = || format!("XDP {xdp}, {family}, {}", backend.name);
                let node_port = scenario.at(one.address_of(family), NODE_PORT);
                let targets = [node_port, web_at(&scenario, family, 80)];
                for target in targets {
                    client::who_many(Some(outside), target, 5, 1).all_answered().with_context(what)?;
                }
                // Another node's pods see this node for a client, as with any proxy under the Cluster policy.
                let from = if node.name == one.name { client_address(family) } else { one.address_of(family) };
                forbid(&node.namespace, "FORWARD", from, backend.address_of(family))?;
                out_of_reach(outside, &targets, web_at(&scenario, family, 53)).with_context(what)?;
            }
        }
        // The node's processes are balanced at connect, before its OUTPUT chain.
        let local = scenario.pod(1, 2);
        scenario.publish(&web(), [local])?;
        for family in Family::BOTH {
            let target = web_at(&scenario, family, 80);
            let ask = |seconds: &str| {
                let mut command = scenario.agent.host_command("curl");
                command.args(["-sS", "-m", seconds, &format!("telnet://{target}")]);
                Process::start("curl", &mut command)?.finish(patient(client::LIMIT))
            };
            let answer = ask("5").with_context(|| format!("the node asks {target}"))?;
            ensure!(answer.contains(&local.name), "{target} answered {answer:?}");
            let program = if target.is_ipv4() { "iptables" } else { "ip6tables" };
            let pod = local.address_of(family).to_string();
            one.namespace.output(program, &["-w", "-I", "OUTPUT", "-d", &pod, "-j", "DROP"])?;
            let answer = ask("1");
            ensure!(answer.is_err(), "the node is not kept from {target}: {answer:?}");
        }
    }
    Ok(())
}
