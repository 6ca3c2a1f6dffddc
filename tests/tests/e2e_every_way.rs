//! Every way to a Service in one cluster: from a pod, from outside and from the node itself, by TCP, UDP and ping, in both
//! families, by tc and at sockets, and after a restart with XDP.
//!
//! The other targets look closer, each at one thing in clusters of its own. This one asks whatever a kernel may do otherwise, of
//! one cluster: `cargo xtask vm test` runs it where the processor is emulated, and building a cluster and starting take long.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::util::KernelVersion;
use sheave_tests::client::{self, Answers, Conversation};
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::process::{Process, built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{Shape, client_address};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
const FAR6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x11);
const STICKY: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 12);
const STICKY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x12);
const EMPTY: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 13);
const EMPTY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x13);
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
/// So many that a random choice never leaves one of two pods out.
const MANY: usize = 60;
/// Bytes, enough for several windows and for segments of any size.
const TRANSFER: usize = 400_000;

/// Behind it are the second pod of this node and one of the other.
fn web() -> Service {
    Service::new("web", WEB)
        .and(WEB6)
        .tcp("http", 80, server::WHO)
        .node_port(30_500)
        .udp("udp", 53, server::UDP)
        .node_port(30_053)
}

/// The other node's pod.
fn far() -> Service {
    Service::new("far", FAR).and(FAR6).tcp("echo", 7, server::ECHO).node_port(30_007)
}

fn sticky() -> Service {
    Service::new("sticky", STICKY).and(STICKY6).affinity(600).tcp("http", 80, server::WHO)
}

/// Both pods answer by TCP and UDP, large datagrams in fragments too, and they see these addresses as the client's.
fn both_answer(from: &Namespace, http: SocketAddr, udp: SocketAddr, seen: &[IpAddr]) -> Result<()> {
    let answers = client::who_many(Some(from), http, MANY, 2);
    answers.all_answered().with_context(|| http.to_string())?;
    ensure!(answers.by_backend.len() == 2, "{http}: {:?} answered", answers.by_backend);
    ensure!(answers.seen == seen.iter().copied().collect::<BTreeSet<_>>(), "{http}: pods saw {:?}", answers.seen);
    for size in [1, 1_400, 4_000] {
        let answer = from.run(|| client::ask_udp(udp, &"x".repeat(size)));
        let answer = answer.with_context(|| format!("{size} bytes to {udp}"))?;
        ensure!(seen.contains(&answer.seen.ip()), "{udp}: the pod saw {}", answer.seen);
    }
    Ok(())
}

/// A transfer, and another one when the road to the other node has become narrower than the client's.
fn transfers(scenario: &Scenario, from: &Namespace, target: SocketAddr) -> Result<()> {
    from.run(|| Conversation::open(target)?.transfer(TRANSFER)).with_context(|| format!("{target}: a transfer"))?;
    let road = |mtu| {
        scenario.node().namespace.ip(&[
            format!("route replace 10.244.2.0/24 via 192.168.50.2 mtu {mtu}"),
            format!("route replace fd00:10:244:2::/64 via fd00:50::2 mtu {mtu}"),
        ])
    };
    road(1300)?;
    from.run(|| Conversation::open(target)?.transfer(TRANSFER)).with_context(|| format!("{target}: a narrow road"))?;
    road(1500)?;
    // Or the next transfer would go in small packets from its start.
    for family in ["-4", "-6"] {
        from.output("ip", &[family, "route", "flush", "cache"])?;
    }
    Ok(())
}

fn from_a_pod(scenario: &Scenario) -> Result<()> {
    let pod = scenario.pod(1, 1);
    pod.namespace.sysctl("ipv4/ping_group_range", "0 2147483647")?;
    for family in Family::BOTH {
        let web = family.pick(WEB, WEB6);
        let own = pod.address_of(family);
        both_answer(&pod.namespace, scenario.at(web, 80), scenario.at(web, 53), &[own])?;
        transfers(scenario, &pod.namespace, scenario.at(family.pick(FAR, FAR6), 7))?;
        eventually(Duration::from_secs(5), || {
            ensure!(pod.namespace.run(|| client::ping(scenario.at(web, 80).ip(), 56))?, "no ping of {web} is answered");
            Ok(())
        })?;
    }
    Ok(())
}

fn from_outside(scenario: &Scenario) -> Result<()> {
    let outside = &scenario.cluster.client;
    for family in Family::BOTH {
        let node = scenario.node().address_of(family);
        // The other node's pod sees this node: the answer must come back through it.
        let seen = [client_address(family), node];
        both_answer(outside, scenario.at(node, 30_500), scenario.at(node, 30_053), &seen)?;
        transfers(scenario, outside, scenario.at(node, 30_007))?;
    }
    Ok(())
}

fn from_the_node(scenario: &Scenario) -> Result<()> {
    for (cluster_ip, loopback) in [IpAddr::V4(WEB), IpAddr::V6(WEB6)].into_iter().zip(LOOPBACK) {
        // An unconnected socket stays with the pod that it asked first.
        for (protocol, port, node_port, pods) in
            [("tcp", 80, 30_500, 2), ("udp", 53, 30_053, 2), ("udp-unconnected", 53, 30_053, 1)]
        {
            for target in [scenario.at(cluster_ip, port), scenario.at(loopback, node_port)] {
                let answers = scenario.from_host(protocol, target, MANY)?;
                answers.all_answered().with_context(|| format!("{protocol} of the node to {target}"))?;
                ensure!(answers.by_backend.len() == pods, "{protocol} to {target}: {:?} answered", answers.by_backend);
            }
        }
    }
    Ok(())
}

/// Before 5.14, the host's processes are those of the machine's first network namespace, where no test may send anything. That
/// they are looked at when they connect shows by a Service without endpoints: it is refused before a packet is made.
fn from_the_first_namespace(scenario: &Scenario) -> Result<()> {
    scenario.publish(&Service::new("empty", EMPTY).and(EMPTY6).udp("udp", 53, server::UDP), [])?;
    for address in [IpAddr::V4(EMPTY), IpAddr::V6(EMPTY6)] {
        let target = scenario.at(address, 53);
        let mut command = scenario.agent.member_command(built("probe")?);
        command.args(["udp", &target.to_string(), "1"]);
        let answers: Answers =
            serde_json::from_str(&Process::start("probe", &mut command)?.finish(Duration::from_secs(60))?)?;
        let refused = answers.errors.iter().any(|error| error.contains("not permitted"));
        ensure!(refused, "a process of the node may connect to {target}: {answers:?}");
    }
    Ok(())
}

/// The pod that a client with a session has, of each family.
fn sticks_to(scenario: &Scenario) -> Result<[String; 2]> {
    let client = &scenario.pod(1, 1).namespace;
    let pod = |family: Family| -> Result<String> {
        let target = scenario.at(family.pick(STICKY, STICKY6), 80);
        let answers = client::who_many(Some(client), target, 20, 1);
        answers.all_answered()?;
        ensure!(answers.by_backend.len() == 1, "{target}: one client was sent to {:?}", answers.by_backend);
        answers.by_backend.keys().next().cloned().context("nobody answered")
    };
    Ok([pod(Family::V4)?, pod(Family::V6)?])
}

/// Some way to a Service would be closed on this kernel.
#[test]
fn every_way_to_a_service_is_open_before_and_after_a_restart_with_xdp() -> Result<()> {
    let shape = Shape { pod_counts: [2, 1], xdp: true, ..Shape::default() };
    let mut scenario = Scenario::start(shape, &["--xdp", "off"])?;
    let both = |scenario: &Scenario| web().endpoints([scenario.pod(1, 2), scenario.pod(2, 1)]);
    scenario.update(&web(), &both(&scenario))?;
    scenario.update(&sticky(), &both(&scenario))?;
    scenario.publish(&far(), [scenario.pod(2, 1)])?;
    for service in [web(), sticky()] {
        scenario.wait_until_published(&service, &both(&scenario))?;
    }
    from_a_pod(&scenario)?;
    from_outside(&scenario).context("by tc")?;
    if KernelVersion::current()? >= KernelVersion::new(5, 14, 0) {
        from_the_node(&scenario)?;
    } else {
        from_the_first_namespace(&scenario)?;
    }
    let pods = sticks_to(&scenario)?;

    let inside = scenario.pod(1, 1).namespace.clone();
    let outside = scenario.cluster.client.clone();
    let mut talks = Vec::new();
    for family in Family::BOTH {
        let cluster_ip = scenario.at(family.pick(FAR, FAR6), 7);
        talks.push(inside.run(|| Conversation::open(cluster_ip))?);
        let node_port = scenario.at(scenario.node().address_of(family), 30_007);
        talks.push(outside.run(|| Conversation::open(node_port))?);
    }
    scenario.agent.kill();
    let left = web().endpoints([scenario.pod(2, 1)]);
    scenario.update(&web(), &left)?;
    for talk in &mut talks {
        talk.say(b"while it is down")?;
    }
    scenario.agent.restart_with(&["--xdp", "native"])?;
    for talk in &mut talks {
        talk.say(b"when it is up")?;
    }
    scenario.wait_until_published(&web(), &left).context("what changed while it was down")?;
    scenario.publish(&web(), [scenario.pod(1, 2), scenario.pod(2, 1)])?;
    ensure!(sticks_to(&scenario)? == pods, "sessions were forgotten");
    let _statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
    let ran = |scenario: &Scenario| -> Result<[u64; 2]> {
        Ok([scenario.agent.runs("uplink_xdp")?, scenario.agent.runs("uplink_ingress")?])
    };
    let before = ran(&scenario)?;
    from_outside(&scenario).context("with XDP")?;
    let [xdp, tc] = ran(&scenario)?;
    let [xdp, tc] = [xdp - before[0], tc - before[1]];
    ensure!(tc < xdp / 2, "{tc} of {xdp} frames came up to tc, where only those for this node's pods should");
    ensure!(scenario.cluster.checksum_errors()? == 0, "checksum errors");
    Ok(())
}
