//! Connections that want the same tuple: one port of a client used for several things at once.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sheave_tests::agent::Agent;
use sheave_tests::client::{Conversation, at};
use sheave_tests::objects::{self, ready, service, slice};
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{ECHO, Server};
use sheave_tests::topology::{CLIENT, Node, Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const NODE_PORT: u16 = 30_007;
const OTHER_NODE_PORT: u16 = 30_008;

/// Two Services with the same pods, and Sheave on both nodes.
fn start(pod_counts: [u8; 2]) -> Result<(Scenario, Agent)> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts, ..Shape::default() }, &[])?;
    let second: &Node = &scenario.cluster.nodes[1];
    scenario.manifests().objects("second", &[objects::node(second, None, &[&second.address.to_string()])])?;
    let agent = Agent::start(second, scenario.manifests(), &[])?;
    Ok((scenario, agent))
}

fn publish(scenario: &Scenario, second: &Agent, pods: &[&Pod]) -> Result<()> {
    let mut written = Vec::new();
    for (name, address, node_port) in [("web", WEB, NODE_PORT), ("other", OTHER, OTHER_NODE_PORT)] {
        let spec = json!({"type": "NodePort", "clusterIP": address, "ports": [{"port": 7, "nodePort": node_port}]});
        written.extend([service(name, &spec), slice(name, 1, &[("", ECHO)], &ready(pods))]);
    }
    scenario.manifests().objects("both", &written)?;
    let mut expected: Vec<String> = pods.iter().map(|pod| format!("{}:{ECHO}", pod.address)).collect();
    expected.sort();
    for agent in [&scenario.agent, second] {
        agent.wait_for_services("both Services", |shown| {
            let rows = shown.as_array().map_or(&[][..], Vec::as_slice);
            !rows.is_empty() && rows.iter().all(|row| row["cluster_backends"] == json!(expected))
        })?;
    }
    Ok(())
}

/// Opens conversations from one port to all of these, and has them all go on at the same time.
fn at_the_same_time(source: SocketAddr, targets: &[SocketAddr]) -> Result<()> {
    let open = |target: &SocketAddr| {
        Conversation::open_from(source, *target).with_context(|| format!("{source} opens {target}"))
    };
    let mut conversations = targets.iter().map(open).collect::<Result<Vec<_>>>()?;
    for words in [&b"one"[..], b"two", b"three"] {
        for (conversation, target) in conversations.iter_mut().zip(targets) {
            conversation.say(words).with_context(|| format!("{source} talks to {target}"))?;
        }
    }
    for (conversation, target) in conversations.iter_mut().zip(targets) {
        conversation.transfer(200_000).with_context(|| format!("{source} sends much to {target}"))?;
    }
    Ok(())
}

/// A client that uses one source port towards several frontends of one pod would lose all connections but one.
#[test]
fn one_source_port_reaches_one_pod_through_two_services_and_two_nodes() -> Result<()> {
    let (scenario, second) = start([2, 1])?;
    let other_node = scenario.cluster.nodes[1].address;
    let inside = [at(WEB, 7), at(OTHER, 7), at(NODE, NODE_PORT), at(NODE, OTHER_NODE_PORT)];
    let all = [&inside[..], &[at(other_node, NODE_PORT), at(other_node, OTHER_NODE_PORT)]].concat();
    // The pod is on the one node, and then on the other.
    for backend in [scenario.pod(1, 2), scenario.pod(2, 1)] {
        publish(&scenario, &second, &[backend])?;
        for port in [5_000, 5_001] {
            let outside = SocketAddr::from((CLIENT, port));
            scenario.cluster.client.run(|| at_the_same_time(outside, &all)).with_context(|| backend.name.clone())?;
            // What a pod opens through its own node comes to another node as a direct connection; see the limits below.
            let targets = if backend.node == "node-1" { &all[..] } else { &inside };
            let pod = scenario.pod(1, 1);
            let source = SocketAddr::from((pod.address, port));
            pod.namespace.run(|| at_the_same_time(source, targets)).with_context(|| backend.name.clone())?;
        }
    }
    Ok(())
}

/// A client whose own port happens to have the number of the nodePort would not get through.
#[test]
fn a_clients_port_may_have_the_number_of_the_node_port() -> Result<()> {
    let (scenario, second) = start([2, 1])?;
    let targets = [at(NODE, NODE_PORT), at(scenario.cluster.nodes[1].address, NODE_PORT)];
    let pod = scenario.pod(1, 1);
    let outside = SocketAddr::from((CLIENT, NODE_PORT));
    let inside = SocketAddr::from((pod.address, NODE_PORT));
    for backend in [scenario.pod(1, 2), scenario.pod(2, 1)] {
        publish(&scenario, &second, &[backend])?;
        scenario.cluster.client.run(|| at_the_same_time(outside, &targets))?;
        for target in targets {
            pod.namespace.run(|| at_the_same_time(inside, &[target]))?;
        }
    }
    Ok(())
}

/// A limit that the README names: a direct connection is in nobody's table. A connection through a Service from the same
/// port to the same pod takes its tuple: it works, and the direct one stands still.
#[test]
fn limit_a_connection_through_a_service_takes_the_tuple_of_a_direct_one() -> Result<()> {
    let (scenario, second) = start([2, 1])?;
    let pod = scenario.pod(1, 1);
    let source = SocketAddr::from((pod.address, 5_000));
    // By way of another node's nodePort it is the same: what a pod opens through its own node comes there directly.
    let other_node = at(scenario.cluster.nodes[1].address, NODE_PORT);
    for (backend, first, through) in [
        (scenario.pod(1, 2), at(scenario.pod(1, 2).address, ECHO), at(WEB, 7)),
        (scenario.pod(2, 1), at(WEB, 7), other_node),
    ] {
        publish(&scenario, &second, &[backend])?;
        pod.namespace.run(|| -> Result<()> {
            let mut direct = Conversation::open_from(source, first).with_context(|| format!("{first}"))?;
            direct.say(b"first")?;
            let mut through = Conversation::open_from(source, through).with_context(|| format!("{through}"))?;
            through.say(b"second")?;
            ensure!(direct.say(b"still there?").is_err(), "no longer a limit: {first} goes on beside {through:?}");
            through.say(b"and on")
        })?;
    }
    Ok(())
}

/// A process of the node that happens to have a nodePort's number as its own port would get no answer: what comes to a
/// nodePort is a client's.
#[test]
fn a_nodes_own_connection_may_have_the_number_of_a_node_port() -> Result<()> {
    let (scenario, second) = start([2, 1])?;
    publish(&scenario, &second, &[scenario.pod(1, 2)])?;
    let _server = Server::start(&scenario.cluster.client, "outside")?;
    let pod = scenario.pod(1, 1);
    for target in [at(CLIENT, ECHO), at(pod.address, ECHO)] {
        let own = SocketAddr::from((NODE, NODE_PORT));
        scenario.node().namespace.run(|| at_the_same_time(own, &[target]))?;
    }
    // Who only listens there gets nothing of what is the Service's.
    let _listener = scenario.node().namespace.run(|| std::net::TcpListener::bind(("0.0.0.0", NODE_PORT)))?;
    let outside = SocketAddr::from((CLIENT, 5_000));
    scenario.cluster.client.run(|| at_the_same_time(outside, &[at(NODE, NODE_PORT)]))
}
