//! One of four pods is silently dead: it takes SYNs and answers none. Who hangs with it, with Sheave on node 1 and, side by side, with
//! nftables rules of kube-proxy's shape there; with affinity; and what becomes of a pod that only answers late.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sheave_tests::client::{self, Answer, Conversation};
use sheave_tests::family::Family;
use sheave_tests::kube_proxy::{self, feed};
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::patience::patient;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{ECHO, WHO};
use sheave_tests::topology::{Pod, Shape};

/// A client sends its first SYN again after a second; that, and what a connection takes.
const IN_TIME: Duration = Duration::from_millis(1_200);
/// As fast as a connection is that needs no second SYN.
const AT_ONCE: Duration = Duration::from_millis(800);
const CLIENTS: usize = 60;

const WEB: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 96, 0, 10), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10));
const NETFILTERS: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 96, 0, 20), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x20));
const NODE_PORT: u16 = 30_500;
const NETFILTERS_NODE_PORT: u16 = 30_600;

/// A client in the first pod of node 1; the other four pods are behind the Services.
fn start(arguments: &[&str], xdp: bool) -> Result<Scenario> {
    Scenario::start_with_folder(Shape { pod_counts: [2, 3], xdp, ..Shape::default() }, arguments)
}

fn backends(scenario: &Scenario) -> Vec<&Pod> {
    scenario.cluster.nodes.iter().flat_map(|node| &node.pods).skip(1).collect()
}

/// Has a namespace's netfilter work off a chain with this rule.
fn filter(namespace: &Namespace, hook: &str, rule: &str) -> Result<()> {
    let text = format!("table inet silence {{ chain silence {{ type filter hook {hook} priority 0; {rule}; }}\n}}\n");
    feed(namespace, "nft", &["-f", "-"], &text)
}

fn die(pod: &Pod) -> Result<()> {
    filter(&pod.namespace, "input", "meta l4proto tcp drop")
}

/// Does something for each of many at once, in a namespace.
fn at_once<I: Sync, T: Send>(namespace: &Namespace, all: &[I], work: impl Fn(&I) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let spawn = |one| {
            let work = &work;
            scope.spawn(move || {
                namespace.enter();
                work(one)
            })
        };
        let threads: Vec<_> = all.iter().map(spawn).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, T>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

/// How many of many clients at once are connected in time, and how long the slowest of them took.
fn connected(from: &Namespace, target: SocketAddr) -> (usize, Duration) {
    let attempts = at_once(from, &[target; CLIENTS], |target| {
        let started = Instant::now();
        TcpStream::connect_timeout(target, patient(IN_TIME)).map(|_| started.elapsed())
    });
    let took: Vec<Duration> = attempts.into_iter().flatten().collect();
    (took.len(), took.into_iter().max().unwrap_or_default())
}

/// A client would hang for the 40 seconds that a cluster takes to notice that a node is gone.
fn nobody_hangs_with_a_dead_pod(xdp: bool) -> Result<()> {
    let scenario = start(&["--drain-foreign=false", "--xdp", if xdp { "native" } else { "off" }], xdp)?;
    let pods = backends(&scenario);
    let web = Service::new("web", WEB.0).and(WEB.1).tcp("http", 80, WHO).node_port(NODE_PORT);
    scenario.publish(&web, pods.iter().copied())?;
    let other = Service::new("netfilter", NETFILTERS.0).and(NETFILTERS.1).tcp("http", 80, WHO);
    let other = other.node_port(NETFILTERS_NODE_PORT);
    let node = scenario.node();
    for family in Family::BOTH {
        let rules = other.ruleset(family, pods.iter().copied());
        feed(&node.namespace, "nft", &["-f", "-"], &kube_proxy::nftables(family, &rules, node.address_of(family)))?;
    }
    // The last one is on the other node: from outside it is reached with another source address and port.
    die(pods[3])?;
    for family in Family::BOTH {
        let inside = &scenario.pod(1, 1).namespace;
        let at = |address: (Ipv4Addr, Ipv6Addr)| SocketAddr::new(family.pick(address.0, address.1), 80);
        let node = node.address_of(family);
        for (who, from, sheave, netfilter) in [
            ("a pod", inside, at(WEB), at(NETFILTERS)),
            ("outside", &scenario.cluster.client, (node, NODE_PORT).into(), (node, NETFILTERS_NODE_PORT).into()),
        ] {
            let (there, hanging) = std::thread::scope(|scope| {
                let beside = scope.spawn(|| CLIENTS - connected(from, netfilter).0);
                (connected(from, sheave), beside.join().expect("no panic"))
            });
            println!(
                "{family} from {who}, XDP {xdp}: {} of {CLIENTS} connected, the slowest after {:?}; nftables: {hanging} hang",
                there.0, there.1
            );
            ensure!(there.0 == CLIENTS, "{family} from {who}: {} of {CLIENTS} connected in time", there.0);
            // A quarter, give or take three deviations.
            ensure!((5..=26).contains(&hanging), "{family} from {who}: with nftables {hanging} of {CLIENTS} hang");
        }
    }
    let shown = scenario.agent.view("status", &["-o", "json"])?;
    let shown: Value = serde_json::from_str(&shown)?;
    let counted = shown["dataplane"]["syn_failovers"].as_u64();
    ensure!(counted > Some(20), "{counted:?} failovers are counted: {shown:#}");
    Ok(())
}

#[test]
fn every_client_of_four_pods_connects_in_time_when_one_of_them_is_dead() -> Result<()> {
    nobody_hangs_with_a_dead_pod(false)
}

#[test]
fn so_it_does_with_xdp() -> Result<()> {
    nobody_hangs_with_a_dead_pod(true)
}

/// A client's address, who answered it, and how long that took; or its address alone.
type Visit = (IpAddr, Option<(String, Duration)>);

fn visits(scenario: &Scenario, clients: &[IpAddr], target: SocketAddr) -> Vec<Visit> {
    at_once(&scenario.cluster.client, clients, |client| {
        let started = Instant::now();
        let answer = client::who_from((*client, 0), target);
        (*client, answer.ok().map(|Answer { backend, .. }| (backend, started.elapsed())))
    })
}

/// A client whose pod has died would wait again and again; one whose pod lives would lose its session.
#[test]
fn affinity_moves_once_from_the_dead_pod_and_never_from_the_others() -> Result<()> {
    let scenario = start(&["--xdp", "off"], false)?;
    let pods = backends(&scenario);
    let web = Service::new("web", WEB.0).tcp("http", 80, WHO).node_port(NODE_PORT).affinity(600);
    scenario.publish(&web, pods.iter().copied())?;
    let clients: Vec<IpAddr> = (110..170).map(|host| Ipv4Addr::new(192, 168, 50, host).into()).collect();
    let addresses: Vec<String> = clients.iter().map(|client| format!("address add {client}/32 dev eth0")).collect();
    scenario.cluster.client.ip(&addresses)?;
    let target = (scenario.node().address_of(Family::V4), NODE_PORT).into();
    let visit = || -> Result<BTreeMap<IpAddr, (String, Duration)>> {
        let answered = visits(&scenario, &clients, target).into_iter();
        answered
            .map(|(client, answer)| Ok((client, answer.with_context(|| format!("{client} got nothing"))?)))
            .collect()
    };
    let before = visit()?;
    die(pods[3])?;
    let first = visit()?;
    let then = visit()?;
    let mut moved = 0;
    for (client, (pod, _)) in &before {
        let ((now, took), (later, later_took)) = (&first[client], &then[client]);
        ensure!(later == now && *later_took < patient(AT_ONCE), "{client}: {now}, then {later} after {later_took:?}");
        ensure!(*took < patient(IN_TIME), "{client} waited {took:?} for {now}");
        if *pod == pods[3].name {
            moved += 1;
            ensure!(now != pod, "the dead pod answered {client}");
        } else {
            ensure!(now == pod, "{client} lost {pod}, which lives, to {now}");
        }
    }
    ensure!(moved > 0, "nobody was bound to {}: {before:?}", pods[3].name);
    Ok(())
}

/// The late answer of the first pod would break the connection with the second, or be taken for its.
#[test]
fn a_pod_that_answers_late_disturbs_nobody() -> Result<()> {
    let scenario = start(&["--xdp", "off"], false)?;
    let pods = backends(&scenario);
    let talk = Service::new("talk", WEB.0).tcp("talk", 7, ECHO).node_port(NODE_PORT);
    scenario.publish(&talk, pods.iter().copied())?;
    // On the other node: a pod reaches it with its own address, from outside it is reached with node 1's. Its answers are lost on their
    // way, so that it says them again.
    let late = pods[3];
    let lost = format!("ip saddr {} tcp sport {ECHO} tcp flags & (syn | ack) == syn | ack drop", late.address);
    filter(&scenario.cluster.nodes[1].namespace, "forward", &lost)?;
    let targets = [
        (&scenario.pod(1, 1).namespace, SocketAddr::new(WEB.0.into(), 7)),
        (&scenario.cluster.client, (scenario.node().address_of(Family::V4), NODE_PORT).into()),
    ];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let talking: Vec<_> = targets
            .iter()
            .map(|(from, target)| {
                let stop = &stop;
                scope.spawn(move || {
                    at_once(from, &[*target; CLIENTS / 2], |target| -> Result<String> {
                        let mut conversation = Conversation::open(*target)?;
                        while !stop.load(Ordering::Relaxed) {
                            conversation.say(b"still there?")?;
                            std::thread::sleep(Duration::from_millis(20));
                        }
                        Ok(conversation.answer.backend.clone())
                    })
                })
            })
            .collect();
        let resets = answer_now(late, &scenario);
        stop.store(true, Ordering::Relaxed);
        let ends: Result<BTreeSet<String>> =
            talking.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect();
        let with = ends?;
        resets?;
        ensure!(!with.contains(&late.name), "{} answered late, and yet was taken: {with:?}", late.name);
        Ok(())
    })
}

/// Once every client has another pod, lets the late one answer, and waits until all that it waits for has been reset.
fn answer_now(late: &Pod, scenario: &Scenario) -> Result<()> {
    let handshakes = || late.namespace.output("ss", &["-Htn", "state", "syn-recv"]);
    eventually(Duration::from_secs(5), || {
        let shown = scenario.agent.view("conntrack", &["-o", "json"])?;
        let shown: Value = serde_json::from_str(&shown)?;
        let flows = shown.as_array().into_iter().flatten();
        let open = flows.filter(|flow| flow["state"] == "established" && flow["from"] == "client").count();
        ensure!(open == CLIENTS, "{open} connections are open");
        Ok(())
    })?;
    ensure!(!handshakes()?.is_empty(), "nobody tried {} first", late.name);
    scenario.cluster.nodes[1].namespace.output("nft", &["delete", "table", "inet", "silence"])?;
    // It answers again one, three and seven seconds after the SYN.
    eventually(Duration::from_secs(10), || {
        let waiting = handshakes()?;
        ensure!(waiting.is_empty(), "{} waits for {waiting}", late.name);
        Ok(())
    })
}
