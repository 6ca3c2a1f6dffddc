//! What a node itself does to Sheave: pods that come and go with the index of the one before, and clocks of another kind.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Conversation};
use sheave_tests::manifests::Service;
use sheave_tests::process::{built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const LIMIT: Duration = Duration::from_secs(20);

/// The first pod only asks; the others answer.
fn start(pods: PodNetwork, arguments: &[&str]) -> Result<Scenario> {
    let scenario = Scenario::start_with_folder(Shape { pods, pod_counts: [3, 2], ..Shape::default() }, arguments)?;
    publish(&scenario)?;
    Ok(scenario)
}

fn publish(scenario: &Scenario) -> Result<()> {
    let web = Service::new("web", WEB).tcp("http", 80, server::WHO).node_port(30_500);
    let web = web.tcp("echo", 7, server::ECHO);
    scenario.publish(&web, scenario.node().pods[1..].iter().chain(&scenario.cluster.nodes[1].pods))
}

/// Asks from another pod and from outside while something happens. Every question has to be answered.
fn meanwhile<T>(scenario: &mut Scenario, happens: impl FnOnce(&mut Scenario) -> Result<T>) -> Result<T> {
    let (pod, outside) = (scenario.pod(1, 2).namespace.clone(), scenario.cluster.client.clone());
    let (inside, node_port) = (scenario.at(WEB, 80), scenario.at(NODE, 30_500));
    let stop = AtomicBool::new(false);
    let ask = |target| {
        std::thread::sleep(Duration::from_millis(2));
        client::who(target)
    };
    std::thread::scope(|scope| {
        let askers = [
            scope.spawn(|| client::until(Some(&pod), &stop, 1, &|| ask(inside))),
            scope.spawn(|| client::until(Some(&outside), &stop, 1, &|| ask(node_port))),
        ];
        let outcome = happens(scenario);
        stop.store(true, Ordering::Relaxed);
        for asker in askers {
            let answers = asker.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            answers.all_answered()?;
            ensure!(answers.by_backend.len() == 4, "{:?}", answers.by_backend);
        }
        outcome
    })
}

/// A pod that crashes at every start would make the next one inherit its connections, or leave programs and flows behind.
#[test]
fn pods_that_come_and_go_with_one_index_leave_nothing_to_each_other() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let mut scenario = start(pods, &[])?;
        let links = |scenario: &Scenario| std::fs::read_dir(scenario.agent.pins().join("links")).map(Iterator::count);
        let before = links(&scenario)?;
        let echo = scenario.at(WEB, 7);
        meanwhile(&mut scenario, |scenario| {
            let index = scenario.node().link_index(&scenario.pod(1, 1).host_link)?;
            for round in 0..12 {
                let pod = scenario.pod(1, 1);
                let source = std::net::SocketAddrV4::new(pod.address, 6_000);
                let talk = || Conversation::open_from(source, echo);
                // The same source port each time, and left open.
                let mut talk =
                    eventually(LIMIT, || pod.namespace.run(talk)).with_context(|| format!("round {round}"))?;
                talk.say(b"before it goes")?;
                scenario.cluster.nodes[0].replace_first_pod(index)?;
                if round % 3 == 0 {
                    // Gone again before anybody can have looked.
                    scenario.cluster.nodes[0].replace_first_pod(index)?;
                }
                drop(talk);
            }
            Ok(())
        })?;
        eventually(LIMIT, || {
            let now = links(&scenario)?;
            ensure!(now == before, "{now} links, and before there were {before}");
            Ok(())
        })?;
        let attached = scenario.agent.log().matches("cannot attach").count();
        ensure!(attached <= 12, "the log complains {attached} times");
    }
    Ok(())
}

/// In a time namespace the clock that a process sees is not the one by which flows are timed.
#[test]
fn flows_are_as_old_as_they_are_whatever_clock_a_process_is_shown() -> Result<()> {
    let scenario = start(PodNetwork::Bridged, &[])?;
    let pod = scenario.pod(1, 1).namespace.clone();
    let _open = pod.run(|| Conversation::open(scenario.at(WEB, 7)))?;
    let ages = |command: &mut Command| -> Result<Vec<u64>> {
        command.args(["conntrack", "-o", "json", "--pin-path"]).arg(scenario.agent.pins());
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let rows: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let rows = rows.as_array().context("rows")?;
        rows.iter().map(|row| row["age_seconds"].as_u64().with_context(|| format!("{row}"))).collect()
    };
    let mut command = Command::new("unshare");
    let ages = ages(command.args(["--time", "--fork", "--monotonic", "100000"]).arg(built("sheave")?))?;
    ensure!(!ages.is_empty() && ages.iter().all(|seconds| *seconds < 60), "{ages:?}");
    Ok(())
}
