//! From kube-proxy to Sheave and back, as README has it: connections that are open go on, and new ones succeed at every step.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::agent::Agent;
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::family::Family;
use sheave_tests::kube_proxy::{self, feed};
use sheave_tests::manifests::{Manifests, Service};
use sheave_tests::netns::Namespace;
use sheave_tests::process::eventually;
use sheave_tests::server::{self, Server};
use sheave_tests::topology::{Cluster, Node, Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
/// How long netfilter remembers a connection that is over.
const REMEMBERS: &str = "1";

/// How kube-proxy programs netfilter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nftables,
    /// By the iptables commands with this in their names.
    Iptables(&'static str),
}

/// Who translates a new connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Proxy {
    Netfilter,
    Sheave,
}

fn web() -> Service {
    Service::new("web", WEB)
        .and(WEB6)
        .tcp("http", 80, server::WHO)
        .node_port(30_500)
        .tcp("echo", 7, server::ECHO)
        .node_port(30_007)
}

/// Has netfilter do what a kube-proxy on the node would have it do.
fn kube_proxy(mode: Mode, node: &Node, pods: &[&Pod]) -> Result<()> {
    for family in Family::BOTH {
        let ports = web().ruleset(family, pods.iter().copied());
        match mode {
            Mode::Nftables => {
                let rules = kube_proxy::nftables(family, &ports, node.address_of(family));
                feed(&node.namespace, "nft", &["-f", "-"], &rules)?;
            }
            Mode::Iptables(kind) => {
                let tool = format!("{}{kind}-restore", if family == Family::V4 { "iptables" } else { "ip6tables" });
                feed(&node.namespace, &tool, &["--noflush"], &kube_proxy::iptables(family, &ports))?;
            }
        }
    }
    Ok(())
}

/// What netfilter's tables hold, of both kinds.
fn rules(node: &Node) -> Result<String> {
    let mut all = node.namespace.output("nft", &["list", "ruleset"])?;
    for tool in ["iptables-legacy-save", "ip6tables-legacy-save"] {
        all += &node.namespace.output(tool, &[])?;
    }
    Ok(all)
}

/// A connection of each family from each kind of client: a pod, someone outside who asks the node, and the node itself, outside
/// the cgroup that Sheave looks after, so that netfilter translates it.
fn conversations(cluster: &Cluster, proxy: Proxy) -> Result<Vec<(String, Conversation)>> {
    let node = &cluster.nodes[0];
    let mut open = Vec::new();
    for family in Family::BOTH {
        let service = at(family.pick(WEB, WEB6), 7);
        let node_port = at(node.address_of(family), 30_007);
        let clients = [(&node.pods[0].namespace, service), (&cluster.client, node_port), (&node.namespace, service)];
        for (client, target) in clients.into_iter().take(if proxy == Proxy::Netfilter { 3 } else { 2 }) {
            let what = format!("{} by {family}", client.name());
            let conversation = client.run(|| Conversation::open(target)).with_context(|| what.clone())?;
            open.push((what, conversation));
        }
    }
    Ok(open)
}

fn all_go_on(open: &mut [(String, Conversation)], when: &str) -> Result<()> {
    open.iter_mut().try_for_each(|(what, conversation)| {
        conversation.transfer(20_000).with_context(|| format!("{what}, open since before, {when}"))
    })
}

/// Who moves a cluster to Sheave, or away from it, would break its connections.
fn there_and_back(mode: Mode) -> Result<()> {
    let cluster = Cluster::build(Shape { pod_counts: [2, 1], ..Shape::default() })?;
    let node = &cluster.nodes[0];
    let pods = cluster.nodes.iter().flat_map(|node| &node.pods);
    let _servers: Vec<Server> = pods.map(|pod| Server::start(&pod.namespace, &pod.name)).collect::<Result<_>>()?;
    let endpoints = [&node.pods[1], &cluster.nodes[1].pods[0]];
    let manifests = Manifests::for_node(node)?;
    manifests.service(&web(), &web().endpoints(endpoints))?;
    kube_proxy(mode, node, &endpoints)?;
    node.namespace.sysctl("netfilter/nf_conntrack_tcp_timeout_time_wait", REMEMBERS)?;
    let (outsider, stop) = (&cluster.client, AtomicBool::new(false));
    let stage = Mutex::new("with kube-proxy");
    let ask = &|client: &Namespace, address: IpAddr, port: u16| {
        client::until(Some(client), &stop, 1, &|| {
            // As fast as can be, the client would run out of ports that no old connection had.
            std::thread::sleep(Duration::from_millis(20));
            let before = *lock(&stage);
            client::who(at(address, port)).with_context(|| format!("{before} … {}", lock(&stage)))
        })
    };
    std::thread::scope(|scope| {
        let inside = [IpAddr::from(WEB), WEB6.into()]
            .map(|address| scope.spawn(move || ask(&node.pods[0].namespace, address, 80)));
        let outside = Family::BOTH.map(|family| scope.spawn(move || ask(outsider, node.address_of(family), 30_500)));
        let outcome = steps(mode, &cluster, &manifests, &endpoints, &|next| *lock(&stage) = next);
        stop.store(true, Ordering::Relaxed);
        outcome?;
        for asking in inside.into_iter().chain(outside) {
            let answers = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            answers.all_answered()?;
            ensure!(answers.by_backend.len() == 2, "{:?}", answers.by_backend);
        }
        Ok(())
    })
}

fn lock<'a>(stage: &'a Mutex<&'static str>) -> MutexGuard<'a, &'static str> {
    stage.lock().unwrap_or_else(PoisonError::into_inner)
}

fn steps(
    mode: Mode,
    cluster: &Cluster,
    manifests: &Manifests,
    endpoints: &[&Pod],
    stage: &dyn Fn(&'static str),
) -> Result<()> {
    let node = &cluster.nodes[0];
    let mut netfilters = conversations(cluster, Proxy::Netfilter)?;

    // To Sheave.
    stage("Sheave starts");
    let mut agent = Agent::start(node, manifests, &[])?;
    all_go_on(&mut netfilters, "when Sheave runs, too")?;
    let mut sheaves = conversations(cluster, Proxy::Sheave)?;
    stage("kube-proxy's rules go");
    let said = agent.clean_up_with(&["--kube-proxy"])?;
    ensure!(said.contains("table ip sheave-drain and table ip6 sheave-drain") || legacy(mode), "{said}");
    let left = rules(node)?;
    ensure!(!left.contains("KUBE-") && !left.contains("kube-proxy"), "left of kube-proxy's:\n{left}");
    all_go_on(&mut netfilters, "when kube-proxy's rules are gone")?;
    all_go_on(&mut sheaves, "when kube-proxy's rules are gone")?;
    stage("kube-proxy's connections end");
    // Its connections end, and with the last of them what was there for them.
    let pod = &node.pods[0].namespace;
    netfilters.clear();
    eventually(Duration::from_secs(20), || {
        let left = rules(node)?;
        let over = !left.contains("sheave-drain") && agent.log().contains("have drained");
        ensure!(over, "{}{}", node.namespace.output("conntrack", &["-L"])?, agent.log());
        Ok(())
    })?;

    // And back.
    stage("kube-proxy is back");
    kube_proxy(mode, node, endpoints)?;
    all_go_on(&mut sheaves, "when kube-proxy is back")?;
    stage("Sheave drains");
    agent.restart_with(&["--drain"])?;
    all_go_on(&mut sheaves, "while they drain")?;
    let mut netfilters = conversations(cluster, Proxy::Netfilter)?;
    let ports: Vec<String> =
        sheaves.iter().map(|(_, conversation)| conversation.answer.seen.port().to_string()).collect();
    let flows = agent.view("conntrack", &["-o", "json"])?;
    ensure!(ports.iter().any(|port| flows.contains(port)), "the flows are gone: {flows}");
    stage("Sheave's connections end");
    // As long as one is open, it stays.
    let (what, mut last) = sheaves.pop().context("no connection")?;
    sheaves.clear();
    // Longer than it takes from the last connection's end until it leaves.
    std::thread::sleep(Duration::from_secs(3));
    pod.run(|| last.say(b"the last one")).with_context(|| what)?;
    ensure!(agent.pins().exists(), "it left while a connection was open:\n{}", agent.log());
    drop(last);
    eventually(Duration::from_secs(20), || {
        ensure!(agent.log().contains("nothing of Sheave is left"), "{}", agent.log());
        Ok(())
    })?;
    ensure!(!agent.pins().exists(), "pins are left");
    stage("Sheave is gone");
    all_go_on(&mut netfilters, "when Sheave is gone")?;
    conversations(cluster, Proxy::Netfilter).map(drop)
}

fn legacy(mode: Mode) -> bool {
    mode == Mode::Iptables("-legacy")
}

#[test]
fn from_nftables_and_back_with_connections_open_all_the_way() -> Result<()> {
    there_and_back(Mode::Nftables)
}

#[test]
fn from_iptables_and_back_with_connections_open_all_the_way() -> Result<()> {
    there_and_back(Mode::Iptables("-nft"))
}

#[test]
fn from_the_older_iptables_and_back_with_connections_open_all_the_way() -> Result<()> {
    there_and_back(Mode::Iptables("-legacy"))
}
