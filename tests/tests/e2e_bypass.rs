//! `--bypass-netfilter`: Services' traffic to routed pods of this node meets no forward chain, in either direction.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sheave_tests::client::{self, Conversation};
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
/// Nobody listens there.
const DEAD: u16 = 9;
const DROP_ALL: &str = "add table inet firewall; \
    add chain inet firewall forward { type filter hook forward priority 0; policy drop; }";

fn web() -> Service {
    Service::new("web", WEB)
        .and(WEB6)
        .tcp("http", 80, server::WHO)
        .tcp("echo", 7, server::ECHO)
        .tcp("iperf", 5201, 5201)
        .udp("udp", 53, server::UDP)
        .udp("dead", 9, DEAD)
}

/// Three routed pods on node 1; the second is the Service's.
fn start(arguments: &[&str]) -> Result<Scenario> {
    let shape = Shape { pods: PodNetwork::Routed, pod_counts: [3, 1], ..Shape::default() };
    let scenario = Scenario::start(shape, arguments)?;
    scenario.publish(&web(), [scenario.pod(1, 2)])?;
    Ok(scenario)
}

fn at(scenario: &Scenario, family: Family, port: u16) -> SocketAddr {
    scenario.at(family.pick(WEB, WEB6), port)
}

/// Another pod, and the client outside.
fn clients(scenario: &Scenario) -> [&Namespace; 2] {
    [&scenario.pod(1, 1).namespace, &scenario.cluster.client]
}

/// An edge of netfilter that drops whatever it sees would be felt.
#[test]
fn nothing_that_bypasses_meets_a_chain_that_drops_everything() -> Result<()> {
    let scenario = start(&["--bypass-netfilter=force"])?;
    scenario.node().namespace.output("nft", &[DROP_ALL])?;
    let backend = scenario.pod(1, 2);
    for client in clients(&scenario) {
        for family in Family::BOTH {
            let what = || format!("{} by {family}", client.name());
            client::who_many(Some(client), at(&scenario, family, 80), 500, 2).all_answered().with_context(what)?;
            // The last one comes in fragments.
            for size in [1, 1_400, 4_000] {
                let asked = client.run(|| client::ask_udp(at(&scenario, family, 53), &"x".repeat(size)));
                asked.with_context(|| format!("{size} octets from {}", what()))?;
            }
            // The pod's ICMP error finds its way back.
            let refused = client.run(|| client::ask_udp(at(&scenario, family, 9), "?"));
            let error = refused.err().with_context(|| format!("a dead port answered {}", what()))?;
            let refused = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            ensure!(refused == Some(ErrorKind::ConnectionRefused), "{}: {error:#}", what());
            const BYTES: u64 = 1_000_000_000;
            let received = server::iperf(&backend.namespace, client, at(&scenario, family, 5201), BYTES)?;
            // The client stops counting when it has sent them.
            ensure!(received >= BYTES / 100 * 96, "{}: {received} octets", what());
        }
    }
    ensure!(scenario.cluster.checksum_errors()? == 0, "checksum errors");
    // Not through a Service, packets meet the chain.
    let direct = client::at(backend.address, server::WHO);
    ensure!(clients(&scenario)[0].run(|| client::who(direct)).is_err(), "the chain dropped nothing");
    let shown = scenario.agent.view("conntrack", &["-o", "json"])?;
    let flows: Value = serde_json::from_str(&shown)?;
    let mut edges = flows.as_array().into_iter().flatten().map(|flow| &flow["edge"]);
    ensure!(edges.clone().count() > 0 && edges.all(|edge| edge == "bypass"), "{shown}");
    Ok(())
}

/// A large packet on a narrow road would vanish, and the connection hang.
#[test]
fn a_pod_behind_a_narrower_road_is_reached() -> Result<()> {
    let scenario = start(&["--bypass-netfilter=force"])?;
    scenario.node().namespace.output("nft", &[DROP_ALL])?;
    for family in Family::BOTH {
        let address = scenario.pod(1, 2).address_of(family).to_string();
        let route = scenario.node().namespace.output("ip", &["route", "get", &address])?;
        let device = route.split(' ').skip_while(|word| *word != "dev").nth(1);
        let device = device.with_context(|| format!("no route to {address}"))?;
        scenario.node().namespace.ip(&[format!("route replace {address} dev {device} mtu lock 1300")])?;
        for client in clients(&scenario) {
            let target = at(&scenario, family, 7);
            let transferred = client.run(|| Conversation::open(target)?.transfer(5_000_000));
            transferred.with_context(|| format!("{} by {family}", client.name()))?;
            let learnt = client.output("ip", &["route", "get", &target.ip().to_string()])?;
            ensure!(learnt.contains("mtu 1300"), "{} has not learnt the road's width: {learnt}", client.name());
        }
    }
    Ok(())
}

/// Switching it off would break every open connection.
#[test]
fn flows_that_bypass_go_on_after_a_restart_without_it_and_new_ones_do_not() -> Result<()> {
    let mut scenario = start(&["--bypass-netfilter"])?;
    let client = scenario.pod(1, 1).namespace.clone();
    let target = at(&scenario, Family::V4, 7);
    let mut bypassing = client.run(|| Conversation::open(target))?;
    scenario.agent.restart_with(&[])?;
    scenario.node().namespace.output("nft", &[DROP_ALL])?;
    client.run(|| bypassing.say(b"past it"))?;
    ensure!(client.run(|| Conversation::open(target)).is_err(), "a new connection met no chain");
    // And one that netfilter knows goes on when it is switched on.
    scenario.node().namespace.output("nft", &["delete table inet firewall"])?;
    let mut ordinary = client.run(|| Conversation::open(target))?;
    scenario.agent.restart_with(&["--bypass-netfilter"])?;
    client.run(|| ordinary.say(b"through it"))?;
    client.run(|| bypassing.say(b"past it still"))
}

/// A firewall would be switched off unasked.
#[test]
fn it_is_refused_where_rules_of_others_would_be_skipped() -> Result<()> {
    let mut scenario = start(&[])?;
    let node = scenario.node().namespace.clone();
    let kube_proxys = "add table ip filter; add chain ip filter KUBE-FORWARD; \
        add chain ip filter FORWARD { type filter hook forward priority 0; }; \
        add rule ip filter FORWARD counter jump KUBE-FORWARD; \
        add table ip kube-proxy; add chain ip kube-proxy x { type filter hook forward priority 1; }; \
        add rule ip kube-proxy x ct state invalid drop";
    node.output("nft", &[kube_proxys])?;
    scenario.agent.restart_with(&["--bypass-netfilter"])?;
    let others = [
        ("add rule ip filter FORWARD ip saddr 192.0.2.7 drop", "chain FORWARD of table ip filter (1 rule)"),
        (DROP_ALL, "chain forward of table inet firewall (policy drop)"),
    ];
    for (rules, named) in others {
        node.output("nft", &[rules])?;
        let error = scenario.agent.restart_with(&["--bypass-netfilter"]).err().context("it started over a firewall")?;
        let error = format!("{error:#}");
        ensure!(error.contains(named) && error.contains("--bypass-netfilter=force"), "{error}");
    }
    scenario.agent.restart_with(&["--bypass-netfilter=force"])
}
