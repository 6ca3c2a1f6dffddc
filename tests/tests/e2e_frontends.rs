//! Where a Service is reached, as Services and the Node change under traffic. Sheave runs on node 1.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sheave_tests::client::{self, Answers, Conversation, at};
use sheave_tests::netns::Namespace;
use sheave_tests::objects::{node, ready, service, slice};
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{ECHO, PATIENT, WHO};
use sheave_tests::topology::{Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 11);
const THIRD: Ipv4Addr = Ipv4Addr::new(192, 168, 60, 1);
const LOAD_BALANCER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const SHARED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);
const NODE_PORT: u16 = 30_500;

/// Two pods on node 1, of which the first asks, and one on node 2; the client outside has a route to every address above.
fn start(arguments: &[&str]) -> Result<Scenario> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [2, 1], ..Shape::default() }, arguments)?;
    let route = |network: &str| format!("route add {network} via {NODE}");
    let client = &scenario.cluster.client;
    client.ip(&[route("192.0.2.0/24"), route("192.168.60.0/24")])?;
    // While nobody serves an address, the node knows a better way there.
    client.sysctl("ipv4/conf/all/accept_redirects", "0")?;
    client.sysctl("ipv4/conf/eth0/accept_redirects", "0")?;
    Ok(scenario)
}

fn web_slice(pods: &[&Pod]) -> Value {
    slice("web", 1, &[("", WHO)], &ready(pods))
}

/// Asks from outside the cluster, or from a pod, while something else happens.
fn while_asking(client: &Namespace, target: SocketAddr, work: impl FnOnce() -> Result<()>) -> Result<Answers> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| client::until(Some(client), &stop, 2, &|| client::who_and_close(target)));
        let outcome = work();
        stop.store(true, Ordering::Relaxed);
        let answers = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.map(|()| answers)
    })
}

/// The Service `other`, which nothing that happens to `web` may disturb.
fn put_other(scenario: &Scenario) -> Result<SocketAddr> {
    let spec = json!({"clusterIP": OTHER, "ports": [{"port": 80}]});
    scenario.put(
        "other",
        &spec,
        &[slice("other", 1, &[("", PATIENT)], &ready(&[scenario.pod(1, 2), scenario.pod(2, 1)]))],
    )?;
    scenario.agent.wait_for_services("other", |shown| shown.to_string().contains("10.244.2.2:8082"))?;
    Ok(at(OTHER, 80))
}

/// After an edit of its type, a Service would be half of what it was, or take its neighbours down with it.
#[test]
fn a_service_changes_its_type_and_everything_else_goes_on() -> Result<()> {
    let scenario = start(&[])?;
    let [asks, one, two] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let pods: &[&Pod] = &[one, two];
    let other = put_other(&scenario)?;
    let put = |spec: &Value, status: Value| {
        let mut web = service("web", spec);
        web["status"] = status;
        scenario.manifests().objects("web", &[web, web_slice(pods)])
    };
    let inside = json!({"clusterIP": WEB, "ports": [{"port": 80}]});
    let mut node_port = inside.clone();
    node_port["type"] = "NodePort".into();
    node_port["ports"][0]["nodePort"] = NODE_PORT.into();
    let mut load_balancer = node_port.clone();
    load_balancer["type"] = "LoadBalancer".into();
    let given = json!({"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER}]}});
    let [cluster_ip, by_node, by_address] = [at(WEB, 80), at(NODE, NODE_PORT), at(LOAD_BALANCER, 80)];
    let outside = &scenario.cluster.client;
    // Nothing else listens there, so the node's own stack refuses a nodePort that is gone; nobody owns the other address.
    let answers = while_asking(&asks.namespace, other, || {
        put(&inside, json!({}))?;
        scenario.until_answered(&asks.namespace, cluster_ip, pods)?;
        let mut conversation = None;
        for _ in 0..2 {
            put(&node_port, json!({}))?;
            scenario.until_answered(outside, by_node, pods)?;
            if conversation.is_none() {
                conversation = Some(asks.namespace.run(|| Conversation::open(at(one.address, ECHO)))?);
            }
            put(&load_balancer, given.clone())?;
            scenario.until_answered(outside, by_address, pods)?;
            scenario.until_answered(outside, by_node, pods)?;
            put(&inside, json!({}))?;
            scenario.until_fails(outside, by_node, ErrorKind::ConnectionRefused)?;
            scenario.not_served(outside, by_address)?;
            scenario.until_answered(&asks.namespace, cluster_ip, pods)?;
            // Neither of these is balanced.
            for skipped in
                [json!({"type": "ExternalName", "externalName": "example.com"}), json!({"clusterIP": "None"})]
            {
                put(&skipped, json!({}))?;
                scenario.agent.wait_for_services("no web", |shown| !shown.to_string().contains("default/web"))?;
                put(&inside, json!({}))?;
                scenario.until_answered(&asks.namespace, cluster_ip, pods)?;
            }
        }
        conversation.map_or(Ok(()), |mut conversation| conversation.say(b"still here"))
    })?;
    answers.all_answered()?;
    ensure!(answers.total() > 300, "only {} connections meanwhile", answers.total());
    let log = scenario.agent.log();
    ensure!(!log.contains("WARN") && !log.contains("ERROR"), "a complaint:\n{log}");
    Ok(())
}

/// `kubectl replace --force` would end in an address that is dead for a while.
#[test]
fn a_service_recreated_with_the_same_cluster_ip_works_at_once() -> Result<()> {
    let scenario = start(&[])?;
    let [asks, one, two] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let other = put_other(&scenario)?;
    let spec = json!({"clusterIP": WEB, "ports": [{"port": 80}], "sessionAffinity": "ClientIP"});
    let answers = while_asking(&asks.namespace, other, || {
        for round in 0..4 {
            // Created again by the same name, or by another.
            let name = if round == 2 { "web-two" } else { "web" };
            let pods: &[&Pod] = if round % 2 == 0 { &[one] } else { &[two] };
            let slice = slice(name, 1, &[("", WHO)], &ready(pods));
            scenario.manifests().objects("web", &[service(name, &spec), slice])?;
            scenario.until_answered(&asks.namespace, at(WEB, 80), pods)?;
            scenario.manifests().remove("web.json")?;
            if round < 2 {
                scenario.agent.wait_for_services("no web", |shown| !shown.to_string().contains("default/web"))?;
            }
        }
        Ok(())
    })?;
    answers.all_answered()
}

/// Two Services behind one address could not be rearranged without an outage.
#[test]
fn two_services_on_one_address_swap_their_ports_under_traffic() -> Result<()> {
    let scenario = start(&[])?;
    let [asks, one, two] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let put = |swapped: bool| {
        let mut objects = Vec::new();
        for (name, own, pod) in [("blue", WEB, one), ("green", OTHER, two)] {
            let port = if (name == "blue") == swapped { 81 } else { 80 };
            let spec = json!({"clusterIP": own, "externalIPs": [SHARED], "ports": [{"port": port}]});
            objects.extend([service(name, &spec), slice(name, 1, &[("", PATIENT)], &ready(&[pod]))]);
        }
        scenario.manifests().objects("both", &objects)
    };
    let who = |port: u16, pod: &Pod| {
        sheave_tests::process::eventually(client::LIMIT, || {
            let answer = asks.namespace.run(|| client::who_and_close(at(SHARED, port)))?;
            ensure!(answer.backend == pod.name, "port {port}: {} answered", answer.backend);
            Ok(())
        })
    };
    put(false)?;
    who(80, one)?;
    who(81, two)?;
    for port in [80, 81] {
        let answers = while_asking(&asks.namespace, at(SHARED, port), || {
            for swapped in [true, false, true, false] {
                put(swapped)?;
                let [first, second] = if swapped { [two, one] } else { [one, two] };
                who(80, first)?;
                who(81, second)?;
            }
            Ok(())
        })?;
        answers.all_answered()?;
        ensure!(answers.by_backend.len() == 2, "port {port}: {:?} answered", answers.by_backend);
    }
    Ok(())
}

/// A node that gets another address would lose its nodePorts until a restart.
#[test]
fn node_ports_follow_the_nodes_address_live() -> Result<()> {
    let scenario = start(&[])?;
    let pods: &[&Pod] = &[scenario.pod(1, 2), scenario.pod(2, 1)];
    let spec = json!({"type": "NodePort", "clusterIP": WEB, "ports": [{"port": 80, "nodePort": NODE_PORT}]});
    scenario.put("web", &spec, &[web_slice(pods)])?;
    let outside = &scenario.cluster.client;
    let [old, new] = [NODE, SECOND].map(|address| at(address, NODE_PORT));
    scenario.until_answered(outside, old, pods)?;
    scenario.node().namespace.ip(&[format!("address add {SECOND}/24 dev eth0")])?;
    let renamed = |address: Ipv4Addr| {
        let node = node(scenario.node(), None, &[&address.to_string()]);
        scenario.manifests().write("node-node-1.yaml", &node.to_string())
    };
    for (address, served, refused) in [(SECOND, new, old), (NODE, old, new)] {
        renamed(address)?;
        scenario.until_answered(outside, served, pods)?;
        scenario.until_answered(&scenario.pod(1, 1).namespace, served, pods)?;
        scenario.until_fails(outside, refused, ErrorKind::ConnectionRefused)?;
        scenario.until_host_answered(at(Ipv4Addr::LOCALHOST, NODE_PORT), pods)?;
    }
    Ok(())
}

/// A nodePort would be open on an interface that the operator had left out, or shut on one that he had named.
#[test]
fn node_ports_are_served_on_the_addresses_that_the_operator_names() -> Result<()> {
    for (rule, served) in [
        ("primary", vec![NODE]),
        ("192.168.60.0/24", vec![THIRD]),
        ("192.168.50.11/32,192.168.60.0/24", vec![SECOND, THIRD]),
        ("all", vec![NODE, SECOND, THIRD]),
    ] {
        let scenario = start(&["--nodeport-addresses", rule])?;
        let pods: &[&Pod] = &[scenario.pod(1, 2), scenario.pod(2, 1)];
        let spec = json!({"type": "NodePort", "clusterIP": WEB, "ports": [{"port": 80, "nodePort": NODE_PORT}]});
        scenario.put("web", &spec, &[web_slice(pods)])?;
        // These come while it runs.
        let addresses =
            [(SECOND, "eth0"), (THIRD, "lo")].map(|(address, link)| format!("address add {address}/24 dev {link}"));
        scenario.node().namespace.ip(&addresses)?;
        for address in [NODE, SECOND, THIRD] {
            let target = at(address, NODE_PORT);
            if served.contains(&address) {
                scenario.until_answered(&scenario.cluster.client, target, pods)?;
                scenario.until_answered(&scenario.pod(1, 1).namespace, target, pods)?;
                scenario.until_host_answered(target, pods)?;
            } else {
                scenario.until_fails(&scenario.cluster.client, target, ErrorKind::ConnectionRefused)?;
            }
        }
        scenario.until_host_answered(at(Ipv4Addr::LOCALHOST, NODE_PORT), pods)?;
    }
    Ok(())
}

/// Whoever may create Services could take over any address.
#[test]
fn external_ips_are_served_as_far_as_the_operator_lets_them() -> Result<()> {
    for (external, served) in [("false", false), ("192.0.2.0/24,fd00::/8", true)] {
        let scenario = start(&["--external-ips", external])?;
        let pods: &[&Pod] = &[scenario.pod(1, 2), scenario.pod(2, 1)];
        let spec = json!({"clusterIP": WEB, "externalIPs": [SHARED], "ports": [{"port": 80}]});
        scenario.put("web", &spec, &[web_slice(pods)])?;
        let [outside, asks] = [&scenario.cluster.client, &scenario.pod(1, 1).namespace];
        scenario.until_answered(asks, at(WEB, 80), pods)?;
        if served {
            for client in [outside, asks] {
                scenario.until_answered(client, at(SHARED, 80), pods)?;
            }
            scenario.until_host_answered(at(SHARED, 80), pods)?;
        } else {
            for client in [outside, asks] {
                scenario.not_served(client, at(SHARED, 80))?;
            }
            let answers = scenario.from_host("tcp", at(SHARED, 80), 1)?;
            ensure!(answers.total() == 0, "{SHARED} is served to the node itself");
        }
    }
    Ok(())
}

/// Traffic would not pass the proxy that the cloud puts in front, or a nodePort that nobody asked for would be open.
#[test]
fn a_load_balancers_address_is_served_only_in_mode_vip_and_its_node_port_only_if_there_is_one() -> Result<()> {
    let scenario = start(&[])?;
    let pods: &[&Pod] = &[scenario.pod(1, 2), scenario.pod(2, 1)];
    let outside = &scenario.cluster.client;
    let put = |ingress: Value| {
        let mut web = service(
            "web",
            &json!({"type": "LoadBalancer", "clusterIP": WEB,
            "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]}),
        );
        web["status"] = json!({"loadBalancer": {"ingress": [ingress, {"hostname": "web.example.com"}]}});
        scenario.manifests().objects("web", &[web, web_slice(pods)])
    };
    for mode in [json!({"ip": LOAD_BALANCER, "ipMode": "VIP"}), json!({"ip": LOAD_BALANCER})] {
        put(mode)?;
        scenario.until_answered(outside, at(LOAD_BALANCER, 80), pods)?;
        scenario.until_answered(&scenario.pod(1, 1).namespace, at(LOAD_BALANCER, 80), pods)?;
        put(json!({"ip": LOAD_BALANCER, "ipMode": "Proxy"}))?;
        let gone = |shown: &Value| !shown.to_string().contains(&LOAD_BALANCER.to_string());
        scenario.agent.wait_for_services("no load-balancer address", gone)?;
        scenario.not_served(outside, at(LOAD_BALANCER, 80))?;
        scenario.until_answered(&scenario.pod(1, 1).namespace, at(WEB, 80), pods)?;
    }
    let shown = scenario.agent.services()?;
    let kinds: Vec<&str> = shown.as_array().into_iter().flatten().filter_map(|row| row["type"].as_str()).collect();
    ensure!(kinds == ["ClusterIP"], "{shown:#}");
    Ok(())
}
