//! Which pods answer, as conditions, hints and slices change under a client. Sheave runs on node 1.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sheave_tests::client::{self, at};
use sheave_tests::objects::{endpoint, node, ready, slice};
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{ECHO, PATIENT, Server, WHO};
use sheave_tests::topology::{Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const NODE_PORT: u16 = 30_500;

/// Two pods on each node; the first one of node 1 asks.
fn start() -> Result<Scenario> {
    Scenario::start_with_folder(Shape { pod_counts: [3, 2], ..Shape::default() }, &[])
}

fn spec() -> Value {
    json!({"type": "NodePort", "clusterIP": WEB, "ports": [{"name": "http", "port": 80, "nodePort": NODE_PORT}]})
}

/// The Service `web` with one slice.
fn web(scenario: &Scenario, endpoints: &[Value]) -> Result<()> {
    scenario.put("web", &spec(), &[slice("web", 1, &[("http", WHO)], endpoints)])
}

fn hinted(pod: &Pod, zone: &str, node: &str) -> Value {
    let mut hints = json!({});
    if !zone.is_empty() {
        hints["forZones"] = json!([{"name": zone}]);
    }
    if !node.is_empty() {
        hints["forNodes"] = json!([{"name": node}]);
    }
    endpoint(pod, json!({"hints": hints}))
}

/// Traffic would cross zones that cost money, or all land on one pod of a zone that has few.
#[test]
fn hints_choose_the_pods_and_follow_the_nodes_zone_live() -> Result<()> {
    let scenario = start()?;
    let [asks, near, far, third] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1), scenario.pod(2, 2)];
    let target = at(WEB, 80);
    let zone = |zone| scenario.manifests().objects("node", &[node(scenario.node(), zone, &["192.168.50.1"])]);
    let answered = |pods: &[&Pod]| scenario.until_answered(&asks.namespace, target, pods).map(drop);
    scenario.manifests().remove("node-node-1.yaml")?;

    // By zone. The node has none at first.
    zone(None)?;
    web(&scenario, &[hinted(near, "a", ""), hinted(far, "b", "")])?;
    answered(&[near, far])?;
    zone(Some("a"))?;
    answered(&[near])?;
    zone(Some("b"))?;
    answered(&[far])?;
    scenario.until_answered(&scenario.cluster.client, at(NODE, NODE_PORT), &[far])?;
    scenario.until_host_answered(target, &[far])?;
    // No endpoint for this zone, or one without a hint: all.
    zone(Some("c"))?;
    answered(&[near, far])?;
    zone(Some("b"))?;
    answered(&[far])?;
    web(&scenario, &[hinted(near, "a", ""), hinted(far, "b", ""), endpoint(third, Value::Null)])?;
    answered(&[near, far, third])?;
    // An endpoint that isn't ready needs no hint.
    let unready = endpoint(third, json!({"conditions": {"ready": false}}));
    web(&scenario, &[hinted(near, "a", ""), hinted(far, "b", ""), unready])?;
    answered(&[far])?;

    // Hints for nodes go first, as long as one names this node and every endpoint has one.
    web(&scenario, &[hinted(near, "a", "node-1"), hinted(far, "b", "node-2")])?;
    answered(&[near])?;
    web(&scenario, &[hinted(near, "a", "node-2"), hinted(far, "b", "node-2")])?;
    answered(&[far])?;
    web(&scenario, &[hinted(near, "a", "node-1"), hinted(far, "b", "")])?;
    answered(&[far])?;
    zone(None)?;
    answered(&[near, far])
}

/// A rolling update would have a moment in which nobody answers, or clients would reach pods that can't.
#[test]
fn terminating_pods_that_still_serve_answer_only_when_no_pod_is_ready() -> Result<()> {
    let scenario = start()?;
    let [asks, one, two, three] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1), scenario.pod(2, 2)];
    let answered = |pods: &[&Pod]| scenario.until_answered(&asks.namespace, at(WEB, 80), pods).map(drop);
    let leaving = |pod| endpoint(pod, json!({"conditions": {"ready": false, "serving": true, "terminating": true}}));
    let gone = |pod| endpoint(pod, json!({"conditions": {"ready": false, "serving": false, "terminating": true}}));
    let unready = |pod| endpoint(pod, json!({"conditions": {"ready": false}}));

    web(&scenario, &[endpoint(one, json!({"conditions": {}})), leaving(two), leaving(three)])?;
    answered(&[one])?;
    web(&scenario, &[unready(one), leaving(two), gone(three)])?;
    answered(&[two])?;
    web(&scenario, &[gone(one), leaving(two), leaving(three)])?;
    answered(&[two, three])?;
    scenario.until_host_answered(at(WEB, 80), &[two, three])?;
    // Ready but not serving: what the slices of a Service with publishNotReadyAddresses say of a pod that isn't ready.
    let published = |pod| endpoint(pod, json!({"conditions": {"ready": true, "serving": false}}));
    let mut spec = spec();
    spec["publishNotReadyAddresses"] = true.into();
    scenario.put("web", &spec, &[slice("web", 1, &[("http", WHO)], &[published(one), published(two)])])?;
    answered(&[one, two])?;
    // Nobody: refused, not sent to pods that can't serve.
    web(&scenario, &[unready(one), gone(two)])?;
    scenario.until_fails(&asks.namespace, at(WEB, 80), std::io::ErrorKind::ConnectionRefused)
}

/// A large Service has several slices, and the controller moves endpoints between them.
#[test]
fn an_endpoint_that_moves_between_slices_or_is_in_two_leaves_no_gap() -> Result<()> {
    let scenario = start()?;
    let [asks, one, two] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let ports = [("http", PATIENT)];
    let put = |first: &[&Pod], second: &[&Pod]| {
        scenario.put("web", &spec(), &[slice("web", 1, &ports, &ready(first)), slice("web", 2, &ports, &ready(second))])
    };
    put(&[one], &[two])?;
    let second = two.address.to_string();
    scenario.agent.wait_for_services("both slices", |shown| shown.to_string().contains(&second))?;
    let stop = AtomicBool::new(false);
    let ask = || client::who_and_close(at(WEB, 80));
    let answers = std::thread::scope(|scope| -> Result<_> {
        let asking = scope.spawn(|| client::until(Some(&asks.namespace), &stop, 4, &ask));
        let outcome = (0..30).try_for_each(|round| {
            let (first, second): (&[&Pod], &[&Pod]) = match round % 4 {
                0 => (&[one, two], &[]),
                1 => (&[two], &[one]),
                2 => (&[one, two], &[two]),
                _ => (&[], &[one, two]),
            };
            std::thread::sleep(Duration::from_millis(100));
            put(first, second)
        });
        stop.store(true, Ordering::Relaxed);
        let answers = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.map(|()| answers)
    })?;
    answers.all_answered()?;
    ensure!(answers.total() > 300, "only {} connections in three seconds", answers.total());

    // In both slices it is one endpoint, with one share.
    put(&[one, two], &[two])?;
    let first = one.address.to_string();
    scenario.agent.wait_for_services("both slices", |shown| shown.to_string().contains(&first))?;
    let answers = client::many(Some(&asks.namespace), 2_000, 4, &ask);
    answers.all_answered()?;
    answers.evenly_spread(2, 0.15)
}

/// A Service's second port would not answer, or lead to the wrong container port.
#[test]
fn each_port_leads_to_its_own_target_also_where_a_name_means_another_number_in_another_slice() -> Result<()> {
    let scenario = start()?;
    let [asks, one, two] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let spec = json!({"clusterIP": WEB, "ports": [
        {"name": "http", "port": 80, "targetPort": "http"},
        {"name": "talk", "port": 7, "targetPort": ECHO},
        {"name": "nobody", "port": 81, "targetPort": "nobody"}]});
    let slices = [
        slice("web", 1, &[("http", WHO), ("talk", ECHO)], &ready(&[one])),
        slice("web", 2, &[("http", PATIENT), ("talk", ECHO)], &ready(&[two])),
    ];
    scenario.put("web", &spec, &slices)?;
    let second = format!("{}:{PATIENT}", two.address);
    scenario.agent.wait_for_services("both slices", |shown| shown.to_string().contains(&second))?;
    let answers = client::many(Some(&asks.namespace), 40, 2, &|| client::who_and_close(at(WEB, 80)));
    answers.all_answered()?;
    ensure!(answers.by_backend.keys().eq([&one.name, &two.name]), "{:?} answered", answers.by_backend);
    asks.namespace.run(|| client::Conversation::open(at(WEB, 7))?.say(b"and the second port"))?;
    scenario.until_fails(&asks.namespace, at(WEB, 81), std::io::ErrorKind::ConnectionRefused)
}

/// Pods of the host's network, such as an ingress' or a node exporter's, would not be reached.
#[test]
fn pods_of_the_hosts_own_network_answer_on_this_node_and_on_the_other() -> Result<()> {
    let mut scenario = start()?;
    let nodes = scenario.cluster.nodes.iter();
    let servers = nodes.map(|node| Server::start(&node.namespace, &node.name)).collect::<Result<Vec<_>>>()?;
    scenario.servers.extend(servers);
    let host =
        |number: u8| json!({"addresses": [format!("192.168.50.{number}")], "nodeName": format!("node-{number}")});
    for number in [1, 2] {
        web(&scenario, &[host(number)])?;
        let backend = format!("192.168.50.{number}:{WHO}");
        scenario.agent.wait_for_services(&backend, |shown| shown.to_string().contains(&backend))?;
        let expected = format!("node-{number}");
        for (client, target) in [
            (&scenario.pod(1, 1).namespace, at(WEB, 80)),
            (&scenario.pod(1, 1).namespace, at(NODE, NODE_PORT)),
            (&scenario.cluster.client, at(NODE, NODE_PORT)),
            (&scenario.cluster.client, at(WEB, 80)),
        ] {
            let answers = client::who_many(Some(client), target, 20, 1);
            answers.all_answered()?;
            ensure!(answers.by_backend.keys().eq([&expected]), "{target}: {:?} answered", answers.by_backend);
        }
        for target in [at(WEB, 80), at(NODE, NODE_PORT), at(Ipv4Addr::LOCALHOST, NODE_PORT)] {
            let answers = scenario.from_host("tcp", target, 20)?;
            answers.all_answered()?;
            ensure!(answers.by_backend.keys().eq([&expected]), "{target}: {:?} answered", answers.by_backend);
        }
    }
    Ok(())
}
