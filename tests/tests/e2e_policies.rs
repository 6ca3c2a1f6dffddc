//! Traffic policies and the short circuit, asked from a pod, from the node itself and from outside. Sheave runs on node 1.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sheave_tests::client::at;
use sheave_tests::objects::{endpoint, ready, service, slice};
use sheave_tests::scenario::Scenario;
use sheave_tests::server::WHO;
use sheave_tests::topology::{CLIENT, Pod, PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const LOAD_BALANCER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const EXTERNAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);
const NODE_PORT: u16 = 30_500;

/// Where the Service is for those outside.
fn outside() -> [SocketAddr; 3] {
    [at(NODE, NODE_PORT), at(LOAD_BALANCER, 80), at(EXTERNAL, 80)]
}

fn web(scenario: &Scenario, policies: Value, endpoints: &[Value]) -> Result<()> {
    let mut spec = json!({"type": "LoadBalancer", "clusterIP": WEB, "externalIPs": [EXTERNAL],
        "ports": [{"port": 80, "nodePort": NODE_PORT}]});
    if let (Some(spec), Value::Object(mut policies)) = (spec.as_object_mut(), policies) {
        spec.append(&mut policies);
    }
    let mut web = service("web", &spec);
    web["status"] = json!({"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER}]}});
    scenario.manifests().objects("web", &[web, slice("web", 1, &[("", WHO)], endpoints)])
}

/// Two pods on node 1, of which the first asks, and one on node 2.
fn start(pods: PodNetwork) -> Result<Scenario> {
    let scenario = Scenario::start_with_folder(Shape { pods, pod_counts: [2, 1], ..Shape::default() }, &[])?;
    scenario.cluster.client.ip(&[format!("route add 192.0.2.0/24 via {NODE}")])?;
    Ok(scenario)
}

/// A log agent on every node is asked under policy Local: its clients would reach another node's.
#[test]
fn under_internal_policy_local_only_this_nodes_pods_answer_and_without_any_there_is_silence() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    let [asks, local, remote] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let cluster_ip = at(WEB, 80);
    web(&scenario, json!({}), &ready(&[local, remote]))?;
    scenario.until_answered(&asks.namespace, cluster_ip, &[local, remote])?;
    let policy = json!({"internalTrafficPolicy": "Local"});
    web(&scenario, policy.clone(), &ready(&[local, remote]))?;
    for client in [&asks.namespace, &scenario.cluster.client] {
        scenario.until_answered(client, cluster_ip, &[local])?;
    }
    scenario.until_host_answered(cluster_ip, &[local])?;
    // The other frontends are the external policy's.
    for target in outside() {
        scenario.until_answered(&asks.namespace, target, &[local, remote])?;
        scenario.until_answered(&scenario.cluster.client, target, &[local, remote])?;
    }
    // A terminating pod of this node that still serves comes before silence, and before the other node's ready one.
    let leaving = endpoint(local, json!({"conditions": {"ready": false, "serving": true, "terminating": true}}));
    web(&scenario, policy.clone(), &[leaving, endpoint(remote, Value::Null)])?;
    scenario.until_answered(&asks.namespace, at(NODE, NODE_PORT), &[remote])?;
    scenario.until_answered(&asks.namespace, cluster_ip, &[local])?;

    web(&scenario, policy, &ready(&[remote]))?;
    scenario.until_fails(&asks.namespace, cluster_ip, ErrorKind::TimedOut)?;
    scenario.until_fails(&scenario.cluster.client, cluster_ip, ErrorKind::TimedOut)?;
    // A process of the node learns it at once, instead of waiting for its own time-out: connect() has no way to be silent.
    let answers = scenario.from_host("tcp", cluster_ip, 2)?;
    ensure!(answers.total() == 0, "a process of the node was sent to {:?}", answers.by_backend);
    Ok(())
}

/// Pods and the node itself would be cut off from their own load balancer, where no local pod is behind it.
#[test]
fn the_short_circuit_takes_pods_and_the_node_to_every_pod_under_external_policy_local() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = start(pods)?;
        let [asks, local, remote] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
        let policy = json!({"externalTrafficPolicy": "Local"});
        let context = |who: &str, target| format!("{pods:?}: {who} asks {target}");
        web(&scenario, policy.clone(), &ready(&[local, remote]))?;
        for target in outside() {
            let answers = scenario.until_answered(&scenario.cluster.client, target, &[local])?;
            let own = IpAddr::from(CLIENT);
            ensure!(answers.seen.iter().eq([&own]), "{target}: the pod saw {:?}", answers.seen);
        }
        web(&scenario, policy, &ready(&[remote]))?;
        let loopback = at(Ipv4Addr::LOCALHOST, NODE_PORT);
        let everyone: &[&Pod] = &[remote];
        for target in outside().into_iter().chain([at(WEB, 80)]) {
            scenario.until_answered(&asks.namespace, target, everyone).with_context(|| context("a pod", target))?;
        }
        for target in outside().into_iter().chain([at(WEB, 80), loopback]) {
            scenario.until_host_answered(target, everyone).with_context(|| context("the node", target))?;
        }
        for target in outside() {
            scenario.until_fails(&scenario.cluster.client, target, ErrorKind::TimedOut)?;
        }
    }
    Ok(())
}

/// What the pods' logs say of their clients would be wrong.
#[test]
fn the_clients_address_is_kept_wherever_the_reply_comes_back_by_itself() -> Result<()> {
    let scenario = start(PodNetwork::Bridged)?;
    let [asks, local, remote] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let every: Vec<SocketAddr> = outside().into_iter().chain([at(WEB, 80)]).collect();
    for (backend, seen_outside) in [(local, IpAddr::from(CLIENT)), (remote, IpAddr::from(NODE))] {
        web(&scenario, json!({}), &ready(&[backend]))?;
        for target in &every {
            let answers = scenario.until_answered(&scenario.cluster.client, *target, &[backend])?;
            ensure!(answers.seen.iter().eq([&seen_outside]), "{target}: {} saw {:?}", backend.name, answers.seen);
            let answers = scenario.until_answered(&asks.namespace, *target, &[backend])?;
            let own = IpAddr::from(asks.address);
            ensure!(answers.seen.iter().eq([&own]), "{target}: {} saw {:?}", backend.name, answers.seen);
        }
    }
    Ok(())
}
