//! Session affinity with traffic: one memory for all of a Service's addresses, packets and sockets alike, its time, and what
//! becomes of it when pods leave or it is switched off. Sheave runs on node 1.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::netns::Namespace;
use sheave_tests::objects::{ready, service, slice};
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{ECHO, WHO};
use sheave_tests::topology::{CLIENT, Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);
const NODE_PORT: u16 = 30_500;

/// Four pods on each node, all of them behind the Service.
fn start(arguments: &[&str]) -> Result<Scenario> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [4, 4], ..Shape::default() }, arguments)?;
    scenario.cluster.client.ip(&[format!("route add {EXTERNAL}/32 via {NODE}")])?;
    Ok(scenario)
}

/// Publishes the Service and waits until the kernel has its endpoints and its affinity.
fn web(scenario: &Scenario, pods: &[&Pod], seconds: u32) -> Result<()> {
    let mut spec = json!({"type": "NodePort", "clusterIP": WEB, "externalIPs": [EXTERNAL], "ports": [
        {"name": "http", "port": 80, "nodePort": NODE_PORT}, {"name": "talk", "port": 7}]});
    if seconds > 0 {
        spec["sessionAffinity"] = "ClientIP".into();
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
    }
    let slice = slice("web", 1, &[("http", WHO), ("talk", ECHO)], &ready(pods));
    scenario.manifests().objects("web", &[service("web", &spec), slice])?;
    scenario.agent.wait_for_services("the Service as it is now", |shown| {
        let mut rows = shown.as_array().into_iter().flatten().peekable();
        let backends = |row: &Value| row["cluster_backends"].as_array().map_or(0, Vec::len);
        rows.peek().is_some() && rows.all(|row| row["affinity_seconds"] == seconds && backends(row) == pods.len())
    })?;
    // Those that left are forgotten a few writes later.
    eventually(Duration::from_secs(5), || {
        let shown: Value = serde_json::from_str(&scenario.agent.view("backends", &["-o", "json"])?)?;
        let stays = |row: &Value| pods.iter().any(|pod| row["address"] == pod.address.to_string());
        let mut rows = shown.as_array().into_iter().flatten();
        ensure!(rows.all(|row| stays(row) == (row["state"] != "removed")), "{shown:#}");
        Ok(())
    })
}

fn all(scenario: &Scenario) -> Vec<&Pod> {
    scenario.cluster.nodes.iter().flat_map(|node| &node.pods).collect()
}

/// The addresses of one and the same service port.
fn addresses() -> [SocketAddr; 3] {
    [at(WEB, 80), at(NODE, NODE_PORT), at(EXTERNAL, 80)]
}

/// The pod that answers at all of these addresses, several times each.
fn steady(client: &Namespace, targets: &[SocketAddr]) -> Result<String> {
    let mut answered = BTreeMap::new();
    for target in targets {
        let answers = client::who_many(Some(client), *target, 10, 2);
        answers.all_answered()?;
        for (backend, _) in answers.by_backend {
            answered.entry(backend).or_insert(*target);
        }
    }
    ensure!(answered.len() == 1, "several pods answered {}: {answered:?}", client.name());
    answered.into_keys().next().context("no pod answered")
}

/// `sheave affinity`: client → backend's address.
fn remembered(scenario: &Scenario) -> Result<BTreeMap<String, String>> {
    let shown: Value = serde_json::from_str(&scenario.agent.view("affinity", &["-o", "json"])?)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let rows = shown.as_array().into_iter().flatten().filter(|row| row["service"] == "default/web:http");
    Ok(rows.map(|row| (text(&row["client"]), text(&row["backend"]))).collect())
}

/// A client would have two sessions, one by each of the Service's addresses.
#[test]
fn a_client_has_one_pod_at_all_addresses_of_a_service_by_packet_and_at_connect() -> Result<()> {
    let scenario = start(&[])?;
    let pods = all(&scenario);
    web(&scenario, &pods, 600)?;
    let mut chosen = BTreeMap::new();
    for pod in &scenario.node().pods {
        chosen.insert(pod.address.to_string(), steady(&pod.namespace, &addresses())?);
    }
    chosen.insert(CLIENT.to_string(), steady(&scenario.cluster.client, &addresses())?);
    // The node's own processes are one client, whatever address they ask.
    let mut answered = BTreeMap::new();
    for target in addresses().into_iter().chain([at(Ipv4Addr::LOCALHOST, NODE_PORT)]) {
        let answers = scenario.from_host("tcp", target, 10)?;
        answers.all_answered()?;
        answered.extend(answers.by_backend);
    }
    ensure!(answered.len() == 1, "several pods answered the node: {answered:?}");
    chosen.extend(answered.into_keys().map(|pod| (NODE.to_string(), pod)));
    // One memory, in which packets and sockets of a client are the same client.
    let remembered = remembered(&scenario)?;
    ensure!(remembered.keys().eq(chosen.keys()), "{remembered:?} is remembered, not {chosen:?}");
    for (client, backend) in &remembered {
        let pod = pods.iter().find(|pod| format!("{}:{WHO}", pod.address) == *backend);
        ensure!(pod.is_some_and(|pod| pod.name == chosen[client]), "{client}: {backend}, not {}", chosen[client]);
    }
    Ok(())
}

/// A session would end with a deployment that left its pod alone, or never find a new pod, or break a download.
#[test]
fn when_the_pod_leaves_another_is_chosen_and_remembered_and_open_connections_go_on() -> Result<()> {
    let scenario = start(&[])?;
    let pods = all(&scenario);
    let asks = &scenario.pod(1, 1).namespace;
    web(&scenario, &pods, 600)?;
    let first = steady(asks, &addresses())?;
    // The second port is another service port; its connection stays with the pod that it has.
    let mut conversation = asks.run(|| Conversation::open(at(WEB, 7)))?;
    let left: Vec<&Pod> =
        pods.iter().copied().filter(|pod| pod.name != first && pod.name != conversation.answer.backend).collect();
    web(&scenario, &left, 600)?;
    let second = steady(asks, &addresses())?;
    ensure!(second != first, "{first} has left and still answers");
    asks.run(|| conversation.say(b"open still"))?;
    // The first one comes back, and the client stays with the second.
    web(&scenario, &pods, 600)?;
    ensure!(steady(asks, &addresses())? == second, "the client went back");

    // Switched off: connections spread, open ones go on. Switched on again: they stay.
    web(&scenario, &pods, 0)?;
    eventually(Duration::from_secs(10), || {
        let answers = client::who_many(Some(asks), at(WEB, 80), 60, 2);
        answers.all_answered()?;
        ensure!(answers.by_backend.len() >= 4, "{:?} answered without affinity", answers.by_backend);
        Ok(())
    })?;
    asks.run(|| conversation.say(b"and still"))?;
    web(&scenario, &pods, 600)?;
    steady(asks, &addresses())?;
    steady(&scenario.cluster.client, &addresses())?;
    asks.run(|| conversation.say(b"and on"))
}

/// A client that keeps working would be moved in the middle, or one that was away for long would never be moved.
#[test]
fn the_time_runs_from_the_last_new_connection() -> Result<()> {
    const SECONDS: u32 = 3;
    let scenario = start(&[])?;
    let pods = all(&scenario);
    web(&scenario, &pods, SECONDS)?;
    let clients: Vec<&Namespace> = scenario.node().pods.iter().map(|pod| &pod.namespace).collect();
    let once = |client: &Namespace| client.run(|| client::who(at(WEB, 80))).map(|answer| answer.backend);
    let first = clients.iter().map(|client| once(client)).collect::<Result<Vec<_>>>()?;
    // Each new connection starts the time again.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(u64::from(SECONDS) + 3) {
        std::thread::sleep(Duration::from_secs(1));
        for (client, first) in clients.iter().zip(&first) {
            let again = once(client)?;
            ensure!(again == *first, "{} was moved from {first} to {again}", client.name());
        }
    }
    // An open connection's packets don't: in time the client is forgotten. All four may choose the same pods again by chance.
    let mut conversation = clients[0].run(|| Conversation::open(at(WEB, 7)))?;
    let mut before = first;
    for _ in 0..4 {
        let idle = Instant::now();
        while idle.elapsed() < Duration::from_secs(u64::from(SECONDS) + 2) {
            clients[0].run(|| conversation.say(b"only talking"))?;
            std::thread::sleep(Duration::from_millis(200));
        }
        let after = clients.iter().map(|client| once(client)).collect::<Result<Vec<_>>>()?;
        if after[0] != before[0] && after != before {
            return Ok(());
        }
        before = after;
    }
    anyhow::bail!("{} has had the same pod after four times its time", clients[0].name())
}

/// A flood of clients would fill the memory and shut out everybody else.
#[test]
fn a_full_memory_forgets_clients_and_refuses_none() -> Result<()> {
    let scenario = start(&["--max-affinity", "64"])?;
    let (pod, pods) = (scenario.pod(1, 1), all(&scenario));
    web(&scenario, &pods[1..], 600)?;
    // One pod with many addresses is many clients.
    let sources: Vec<Ipv4Addr> = (1..=250).map(|last| Ipv4Addr::new(10, 244, 1, last)).skip(9).collect();
    pod.namespace.ip(&sources.iter().map(|source| format!("address add {source}/24 dev eth0")).collect::<Vec<_>>())?;
    for round in 0..2 {
        for source in &sources {
            let asked = pod.namespace.run(|| client::who_from(SocketAddr::from((*source, 5_000 + round)), at(WEB, 80)));
            asked.with_context(|| format!("{source} in round {round}"))?;
        }
    }
    let remembered = remembered(&scenario)?;
    ensure!(!remembered.is_empty() && remembered.len() <= 64, "{} clients are remembered", remembered.len());
    Ok(())
}
