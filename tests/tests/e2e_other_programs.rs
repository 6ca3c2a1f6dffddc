//! Other tools' programs on the same interfaces: they run, ours work, and neither minds when the other comes or goes.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client;
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::process::eventually;
use sheave_tests::program::XDP_PASS;
use sheave_tests::raw_bpf::{ATOMIC_ADD, Array, EXIT, Kind, MOVE, Place, Program, element_address, instruction};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{Cluster, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const SOON: Duration = Duration::from_secs(40);
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_OK: i32 = 0;

/// Another tool's program that counts the packets it sees; attached as long as this value lives.
struct Other {
    seen: Array,
    _link: OwnedFd,
}

impl Other {
    fn attach(namespace: &Namespace, interface: &str, place: Place, verdict: i32) -> Result<Self> {
        let kind = if place == Place::XdpNative { Kind::Xdp } else { Kind::Classifier };
        let seen = Array::new(&[0; 8])?;
        let count = [instruction(MOVE, 2, 0, 0, 1), instruction(ATOMIC_ADD, 1, 2, 0, 0)];
        let end = [instruction(MOVE, 0, 0, 0, verdict), EXIT];
        let program = Program::load(kind, &[&element_address(1, &seen)[..], &count, &end].concat())?;
        let link = namespace.run(|| program.attach(interface, place));
        Ok(Self { seen, _link: link.with_context(|| format!("{place:?} on {interface}"))? })
    }

    fn seen(&self) -> Result<u64> {
        let mut seen = [0; 8];
        self.seen.get(&mut seen)?;
        Ok(u64::from_ne_bytes(seen))
    }
}

fn web() -> Service {
    Service::new("web", WEB).tcp("http", 80, server::WHO).node_port(30_500)
}

fn start(shape: Shape, arguments: &[&str]) -> Result<Scenario> {
    let scenario = Scenario::start_with_folder(shape, arguments)?;
    scenario.publish(&web(), [scenario.pod(1, 2), scenario.pod(2, 1)])?;
    Ok(scenario)
}

/// From a pod to the ClusterIP, and from outside to the node's port.
fn asked(scenario: &Scenario, what: &str) -> Result<()> {
    let Cluster { client, .. } = &scenario.cluster;
    for (namespace, address, port) in [(&scenario.pod(1, 1).namespace, WEB, 80), (client, NODE, 30_500)] {
        let answers = client::who_many(Some(namespace), client::at(address, port), 20, 2);
        answers.all_answered().with_context(|| format!("{address}, {what}"))?;
        ensure!(answers.by_backend.len() == 2, "{address}, {what}: {:?}", answers.by_backend);
    }
    Ok(())
}

/// A monitoring tool, a firewall or a CNI on the same interfaces would lose its packets, or Services theirs.
#[test]
fn tc_programs_of_others_run_before_and_after_and_come_and_go() -> Result<()> {
    let mut scenario = start(Shape { pod_counts: [2, 1], ..Shape::default() }, &["--audit-period", "1"])?;
    let node = scenario.node().namespace.clone();
    let pod = scenario.pod(1, 1).host_link.clone();
    let attach = |interface: &str, place, verdict| Other::attach(&node, interface, place, verdict);
    let mut others = Vec::new();
    for interface in [&*pod, "eth0"] {
        others.push(attach(interface, Place::IngressFirst, TC_ACT_UNSPEC)?);
        others.push(attach(interface, Place::EgressFirst, TC_ACT_UNSPEC)?);
        // Who ends the chain behind us takes nothing away.
        others.push(attach(interface, Place::IngressLast, TC_ACT_OK)?);
        others.push(attach(interface, Place::EgressLast, TC_ACT_OK)?);
    }
    asked(&scenario, "among others' programs")?;
    for (place, other) in others.iter().enumerate() {
        ensure!(other.seen()? >= 20, "program {place} saw {} packets", other.seen()?);
    }
    let links = || -> Result<usize> {
        let shown = node.output("bpftool", &["net", "show"])?;
        Ok(shown.lines().filter(|line| line.contains("tcx/")).count())
    };
    let number = links()?;
    scenario.agent.restart()?;
    asked(&scenario, "after a restart")?;
    ensure!(links()? == number, "{} links, and there were {number}", links()?);

    others.clear();
    asked(&scenario, "without them")?;

    // A program before ours that accepts packets hides them from us, until it goes.
    let hiding = attach(&pod, Place::IngressFirst, TC_ACT_OK)?;
    let pod = scenario.pod(1, 1).namespace.clone();
    let attempt = pod.run(|| std::net::TcpStream::connect_timeout(&client::at(WEB, 80), Duration::from_millis(500)));
    ensure!(attempt.is_err() && hiding.seen()? > 0, "it hides nothing");
    drop(hiding);
    asked(&scenario, "without the one that hides")?;

    let late = attach("eth0", Place::IngressFirst, TC_ACT_UNSPEC)?;
    scenario.agent.kill();
    scenario.agent.clean_up()?;
    let before = late.seen()?;
    // Refused or not: the packet came in.
    let knock = || std::net::TcpStream::connect_timeout(&client::at(NODE, 1), Duration::from_millis(500));
    drop(scenario.cluster.client.run(knock));
    ensure!(late.seen()? > before, "the cleanup removed another's program");
    Ok(())
}

/// With another tool's XDP program on the uplink, node ports would not work, or that tool's program would be thrown out.
#[test]
fn another_xdp_program_is_left_alone_and_ours_comes_when_it_goes() -> Result<()> {
    let shape = Shape { pod_counts: [2, 1], xdp: true, ..Shape::default() };
    let mut scenario = start(shape, &["--xdp", "native"])?;
    scenario.agent.kill();
    scenario.agent.clean_up()?;
    let node = scenario.node().namespace.clone();
    let other = Other::attach(&node, "eth0", Place::XdpNative, XDP_PASS)?;
    scenario.agent.restart()?;
    eventually(SOON, || {
        let log = scenario.agent.log();
        let line = log.lines().find(|line| line.contains("cannot attach") && line.contains("uplink_xdp"));
        line.map(drop).with_context(|| format!("the log does not say that XDP has no place:\n{log}"))
    })?;
    asked(&scenario, "by tc, beside another's XDP program")?;
    ensure!(other.seen()? > 20, "the other one saw {} frames", other.seen()?);
    drop(other);
    eventually(SOON, || {
        let shown = node.output("bpftool", &["net", "show"])?;
        ensure!(shown.contains("uplink_xdp") || shown.contains("driver id"), "XDP is not attached:\n{shown}");
        Ok(())
    })?;
    asked(&scenario, "by XDP")
}
