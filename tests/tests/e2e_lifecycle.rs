//! Sheave comes, goes, is killed, finds things in its way: traffic goes on.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::agent::Agent;
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::manifests::{Manifests, Service};
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{self, Server};
use sheave_tests::topology::{CLIENT, PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);

fn web() -> Service {
    Service::new("web", WEB)
        .tcp("http", 80, server::WHO)
        .node_port(30_500)
        .tcp("echo", 7, server::ECHO)
        .node_port(30_007)
}

fn start(pods: PodNetwork, pod_counts: [u8; 2]) -> Result<Scenario> {
    published(Scenario::start(Shape { pods, pod_counts, ..Shape::default() }, &[])?)
}

fn start_with_folder(pod_counts: [u8; 2]) -> Result<Scenario> {
    published(Scenario::start_with_folder(Shape { pod_counts, ..Shape::default() }, &[])?)
}

fn published(scenario: Scenario) -> Result<Scenario> {
    scenario.publish(&web(), scenario.node().pods[1..].iter().chain(&scenario.cluster.nodes[1].pods))?;
    Ok(scenario)
}

/// An upgrade, a crash or an out-of-memory kill of Sheave would cost connections.
#[test]
fn connections_go_on_while_sheave_is_killed_and_started_again() -> Result<()> {
    let mut scenario = start(PodNetwork::Bridged, [3, 2])?;
    let pod = scenario.pod(1, 1).namespace.clone();
    let outside = scenario.cluster.client.clone();
    let (web, node_port) = (scenario.at(WEB, 80), scenario.at(NODE, 30_500));
    let mut inside_talk = pod.run(|| Conversation::open(scenario.at(WEB, 7)))?;
    let mut outside_talk = outside.run(|| Conversation::open(scenario.at(NODE, 30_007)))?;
    let stop = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| -> Result<_> {
        let inside = scope.spawn(|| client::until(Some(&pod), &stop, 2, &|| client::who(web)));
        let from_outside = scope.spawn(|| client::until(Some(&outside), &stop, 2, &|| client::who(node_port)));
        let outcome = (0..5).try_for_each(|round| {
            scenario.agent.kill();
            // Time for hundreds of new connections without it.
            std::thread::sleep(Duration::from_millis(300));
            inside_talk.say(b"while it is down")?;
            outside_talk.say(b"while it is down")?;
            scenario.agent.restart().with_context(|| format!("start number {}", round + 2))?;
            inside_talk.say(b"when it is up")?;
            outside_talk.say(b"when it is up")
        });
        stop.store(true, Ordering::Relaxed);
        let mut answers = inside.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        answers.merge(from_outside.join().map_err(|_| anyhow::anyhow!("the client panicked"))?);
        outcome.map(|()| answers)
    })?;
    answers.all_answered()?;
    ensure!(answers.by_backend.len() == 4, "{:?}", answers.by_backend);
    Ok(())
}

/// What changed while Sheave was down would be missed.
#[test]
fn a_change_made_while_sheave_was_down_is_caught_up() -> Result<()> {
    let mut scenario = start(PodNetwork::Bridged, [3, 0])?;
    scenario.agent.kill();
    let left = scenario.pod(1, 3);
    scenario.update(&web(), &[left.into()])?;
    let (left, client) = (left.name.clone(), scenario.pod(1, 1).namespace.clone());
    scenario.agent.restart()?;
    eventually(Duration::from_secs(5), || {
        let answers = client::who_many(Some(&client), scenario.at(WEB, 80), 100, 2);
        answers.all_answered()?;
        ensure!(answers.by_backend.keys().eq([&left]), "{:?}", answers.by_backend);
        Ok(())
    })
}

/// Editing a manifest would need a restart, and a broken one would take Services down.
#[test]
fn manifests_are_followed_and_a_broken_one_changes_nothing() -> Result<()> {
    let scenario = start_with_folder([2, 1])?;
    let client = scenario.pod(1, 1).namespace.clone();
    let ask = |address, port| client.run(|| client::who(at(address, port)));
    ask(WEB, 80)?;

    let second = Ipv4Addr::new(10, 96, 0, 11);
    scenario.publish(&Service::new("second", second).tcp("http", 80, server::WHO), [scenario.pod(2, 1)])?;
    ask(second, 80)?;

    scenario.manifests().write("web.yaml", "apiVersion: v1\nkind: Service\nspec: [this is\n")?;
    eventually(Duration::from_secs(5), || {
        let log = scenario.agent.log();
        ensure!(log.contains("web.yaml"), "the log does not name the broken file:\n{log}");
        Ok(())
    })?;
    ask(WEB, 80).context("with a broken web.yaml")?;

    scenario.manifests().remove("second.yaml")?;
    eventually(Duration::from_secs(5), || {
        let services = scenario.agent.view("services", &["-o", "json"])?;
        ensure!(!services.contains("10.96.0.11"), "the deleted Service is still there:\n{services}");
        Ok(())
    })?;
    ask(WEB, 80).context("after the deletion of another Service")?;
    Ok(())
}

/// A new pod whose veth got the index of a deleted pod's would inherit the dead pod's connections.
#[test]
fn a_reused_interface_index_does_no_harm() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let mut scenario = start(pods, [2, 1])?;
        let (source_port, web) = (6_000, SocketAddrV4::new(scenario.cluster_ip(WEB), 7));
        for round in 0..3 {
            let node = &mut scenario.cluster.nodes[0];
            let index = node.link_index(&node.pods[0].host_link)?;
            let address = node.pods[0].address;
            let talk = || Conversation::open_from(SocketAddrV4::new(address, source_port), web);
            // Left open: the pod is gone before its connections are.
            let talked = eventually(Duration::from_secs(5), || node.pods[0].namespace.run(talk));
            let talked = talked.with_context(|| format!("{pods:?}, round {round}"))?;
            let node = &mut scenario.cluster.nodes[0];
            node.replace_first_pod(index)?;
            ensure!(node.link_index(&node.pods[0].host_link)? == index, "the index was not reused");
            drop(talked);
        }
    }
    Ok(())
}

/// Pods that come after Sheave has started would not reach Services.
#[test]
fn a_pod_that_comes_later_is_served() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let mut scenario = start(pods, [2, 1])?;
        let pod = scenario.cluster.nodes[0].add_pod()?;
        let namespace = pod.namespace.clone();
        eventually(Duration::from_secs(5), || namespace.run(|| client::who(scenario.at(WEB, 80))))?;
        client::who_many(Some(&namespace), scenario.at(WEB, 80), 200, 2).all_answered()?;
    }
    Ok(())
}

/// Two nodes' Sheaves on one machine (or a test beside production) would overwrite each other.
#[test]
fn a_second_instance_in_another_namespace_lives_beside_the_first() -> Result<()> {
    let scenario = start_with_folder([2, 2])?;
    let second_node = &scenario.cluster.nodes[1];
    let manifests = Manifests::for_node(second_node)?;
    let pod = &second_node.pods[1];
    manifests.service(&web(), &[pod.into()])?;
    let second = Agent::start(second_node, &manifests, &[])?;
    let only = |answers: client::Answers| answers.by_backend.keys().eq([&pod.name]);
    eventually(Duration::from_secs(5), || {
        let answers = client::who_many(Some(&second_node.pods[0].namespace), at(WEB, 80), 50, 2);
        answers.all_answered()?;
        ensure!(only(answers), "the second instance does not follow its own manifests");
        Ok(())
    })?;
    drop(second);
    let answers = client::who_many(Some(&scenario.pod(1, 1).namespace), at(WEB, 80), 200, 2);
    answers.all_answered()?;
    ensure!(answers.by_backend.len() == 3, "the first instance was disturbed: {:?}", answers.by_backend);
    Ok(())
}

/// Removing Sheave from a node would leave programs behind that nobody feeds.
#[test]
fn cleanup_removes_every_trace() -> Result<()> {
    let mut scenario = start(PodNetwork::Bridged, [2, 1])?;
    scenario.agent.kill();
    let client = scenario.pod(1, 1).namespace.clone();
    client.run(|| client::who(scenario.at(WEB, 80))).context("the dataplane should outlive the process")?;
    scenario.agent.clean_up()?;
    ensure!(!scenario.agent.pins().exists(), "{} is still there", scenario.agent.pins().display());
    let attached = scenario.node().namespace.output("bpftool", &["net", "show"])?;
    ensure!(!attached.contains("sheave"), "programs are left:\n{attached}");
    let attempt =
        client.run(|| std::net::TcpStream::connect_timeout(&scenario.at(WEB, 80), Duration::from_millis(500)));
    ensure!(attempt.is_err(), "a removed Service answered");
    Ok(())
}

/// After `sheave cleanup`, a new start would find something in its way.
#[test]
fn it_starts_afresh_after_cleanup() -> Result<()> {
    let mut scenario = start(PodNetwork::Bridged, [2, 1])?;
    scenario.agent.kill();
    scenario.agent.clean_up()?;
    scenario.agent.restart()?;
    let client = scenario.pod(1, 1).namespace.clone();
    eventually(Duration::from_secs(5), || client.run(|| client::who(scenario.at(WEB, 80))))?;
    Ok(())
}

/// A node's own server must not hear of it: an address that stops being a Service's is nobody's again.
#[test]
fn a_service_that_goes_leaves_its_node_port_to_others() -> Result<()> {
    let scenario = start_with_folder([2, 0])?;
    let outside = &scenario.cluster.client;
    outside.run(|| client::who(at(NODE, 30_500)))?;
    let _server = Server::start(&scenario.node().namespace, "the-node")?;
    let taken = Service::new("taken", Ipv4Addr::new(10, 96, 0, 30)).tcp("http", 80, server::WHO).node_port(server::WHO);
    scenario.publish(&taken, [scenario.pod(1, 2)])?;
    ensure!(outside.run(|| client::who(at(NODE, server::WHO)))?.backend == scenario.pod(1, 2).name, "not the Service");
    scenario.manifests().remove("taken.yaml")?;
    eventually(Duration::from_secs(5), || {
        let answer = outside.run(|| client::who(at(NODE, server::WHO)))?;
        ensure!(answer.backend == "the-node", "{answer:?}");
        Ok(())
    })
}

/// A client that takes the same source port again at once would hit the remains of its last connection.
#[test]
fn a_source_port_that_is_used_again_at_once_gets_a_new_connection() -> Result<()> {
    let scenario = start(PodNetwork::Bridged, [3, 2])?;
    let pod = scenario.pod(1, 1);
    let client = &scenario.cluster.client;
    let from_pod =
        (&pod.namespace, SocketAddrV4::new(pod.address, 7_000), SocketAddrV4::new(scenario.cluster_ip(WEB), 80));
    let from_outside =
        (client, SocketAddrV4::new(CLIENT, 7_000), SocketAddrV4::new(NODE, scenario.at(NODE, 30_500).port()));
    for (namespace, source, target) in [from_pod, from_outside] {
        let mut answers = client::Answers::default();
        namespace.run(|| {
            for _ in 0..300 {
                answers.add(client::who_from(source, target));
                // A server's TIME_WAIT takes a new connection only with a newer time stamp (RFC 6191), in milliseconds.
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        answers.all_answered().with_context(|| format!("{source} to {target}"))?;
        ensure!(answers.by_backend.len() == 4, "{source} to {target}: {:?}", answers.by_backend);
    }
    Ok(())
}

/// A connection that was reset would poison its source port.
#[test]
fn a_source_port_is_free_after_a_reset() -> Result<()> {
    let scenario = start(PodNetwork::Bridged, [2, 2])?;
    let pod = scenario.pod(1, 1);
    pod.namespace.run(|| -> Result<()> {
        for round in 0..100 {
            let source = SocketAddrV4::new(pod.address, 7_000);
            let talk = Conversation::open_from(source, SocketAddrV4::new(scenario.cluster_ip(WEB), 7))
                .with_context(|| format!("round {round}"))?;
            talk.reset()?;
        }
        Ok(())
    })
}

/// Another version's maps would be read with the wrong layout.
#[test]
fn foreign_pins_are_refused_with_a_clear_message() -> Result<()> {
    let mut scenario = start(PodNetwork::Bridged, [2, 0])?;
    scenario.agent.kill();
    scenario.agent.clean_up()?;
    std::fs::create_dir_all(scenario.agent.pins())?;
    let pin = scenario.agent.pins().join("frontends4");
    let create = [
        "map",
        "create",
        &pin.to_string_lossy(),
        "type",
        "hash",
        "key",
        "4",
        "value",
        "4",
        "entries",
        "8",
        "name",
        "x",
    ];
    scenario.node().namespace.output("bpftool", &create)?;
    let error = scenario.agent.restart().err().context("it started over a foreign map")?;
    ensure!(format!("{error:#}").contains("frontends4"), "the message does not name the pin: {error:#}");
    Ok(())
}
