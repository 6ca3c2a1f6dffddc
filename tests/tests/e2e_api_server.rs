//! What `SHEAVE_TEST_KUBECONFIG` does, against the tests' own API: scenarios publish through an API server, take the
//! addresses that it gives out, and leave nothing behind. And what becomes of a node whose API servers die.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sheave_tests::agent::Agent;
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::kube_api::{KubeApi, Resource};
use sheave_tests::leftovers::unique_name;
use sheave_tests::manifests::{Endpoint, Service};
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{self, Server};
use sheave_tests::topology::{Cluster, Node, Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);

/// Runs with an API server in which the scenario's addresses are another's, and checks what is left there.
fn with_api_server(test: impl FnOnce(&KubeApi, &Path) -> Result<()>) -> Result<()> {
    let api = KubeApi::serve(TcpListener::bind("127.0.0.1:0")?);
    api.apply(json!({"kind": "Service", "metadata": {"name": "taken"},
        "spec": {"clusterIP": WEB, "ports": [{"port": 80, "nodePort": 30_500}]}}));
    let kubeconfig = std::env::temp_dir().join(unique_name());
    std::fs::write(&kubeconfig, api.kubeconfig())?;
    let outcome = test(&api, &kubeconfig);
    std::fs::remove_file(&kubeconfig)?;
    api.delete(Resource::Services, "default", "taken");
    let kinds = [Resource::Namespaces, Resource::Nodes, Resource::Services, Resource::EndpointSlices];
    let left: Vec<Value> = kinds.into_iter().flat_map(|kind| api.objects(kind)).collect();
    ensure!(left.is_empty(), "left behind: {left:#?} after {outcome:?}");
    outcome
}

/// Runs against a real cluster would not be runs against that cluster.
#[test]
fn a_scenario_runs_with_an_api_servers_addresses_and_removes_what_it_made() -> Result<()> {
    with_api_server(|_, kubeconfig| {
        let shape = Shape { pod_counts: [2, 1], ..Shape::default() };
        let scenario = Scenario::start_with_kubeconfig(shape, kubeconfig, &[])?;
        let web = Service::new("web", WEB).tcp("http", 80, server::WHO).node_port(30_500);
        let pods = [scenario.pod(1, 2), scenario.pod(2, 1)];
        scenario.publish(&web, pods)?;
        ensure!(scenario.cluster_ip(WEB) != WEB && scenario.at(NODE, 30_500).port() != 30_500, "not the server's own");
        for (from, target) in [
            (&scenario.pod(1, 1).namespace, scenario.at(WEB, 80)),
            (&scenario.cluster.client, scenario.at(WEB, 80)),
            (&scenario.cluster.client, scenario.at(NODE, 30_500)),
        ] {
            let answers = client::who_many(Some(from), target, 200, 2);
            answers.all_answered()?;
            ensure!(answers.by_backend.len() == 2, "{:?}", answers.by_backend);
        }
        // A pod of this node is known by the name that the node has there.
        scenario.publish(&web.external_local(), pods)?;
        scenario.agent.wait_for_services("the local pod", |shown| {
            let mut rows = shown.as_array().into_iter().flatten();
            rows.any(|row| row["local_backends"].as_array().is_some_and(|local| local.len() == 1))
        })
    })
}

/// Failing runs would litter the cluster.
#[test]
fn a_failing_scenario_removes_what_it_made() -> Result<()> {
    let mut made = 0;
    let outcome = with_api_server(|api, kubeconfig| {
        let shape = Shape { pod_counts: [1, 0], ..Shape::default() };
        let scenario = Scenario::start_with_kubeconfig(shape, kubeconfig, &[])?;
        scenario.publish(&Service::new("web", WEB).tcp("http", 80, server::WHO), [scenario.pod(1, 1)])?;
        made = api.objects(Resource::Namespaces).len() + api.objects(Resource::Nodes).len();
        bail!("as tests do")
    });
    ensure!(made == 2, "{made} objects");
    ensure!(outcome.is_err_and(|error| error.to_string() == "as tests do"), "another failure");
    Ok(())
}

/// A Service and its slices, in every one of these servers.
fn apply(apis: &[KubeApi], service: &Service, endpoints: &[Endpoint]) -> Result<()> {
    for text in service.yaml(endpoints).split("---\n") {
        let object: Value = serde_saphyr::from_str(text)?;
        for api in apis {
            api.apply(object.clone());
        }
    }
    Ok(())
}

/// Waits until the only backend of `web` is this pod.
fn wait_for_backend(agent: &Agent, pod: &Pod) -> Result<()> {
    let expected = json!([format!("{}:{}", pod.address, server::WHO)]);
    let waited = eventually(Duration::from_secs(60), || {
        let shown = agent.services()?;
        let mut rows = shown.as_array().into_iter().flatten().filter(|row| row["service"] == "default/web:http");
        ensure!(rows.any(|row| row["cluster_backends"] == expected), "not {}: {shown:#}", pod.name);
        Ok(())
    });
    waited.with_context(|| format!("log of sheave:\n{}", agent.log()))
}

/// A control plane that fails over, or is away for long, would take Services with it; and a restart then, the changes.
#[test]
fn traffic_and_changes_go_on_while_api_servers_die() -> Result<()> {
    let cluster = Cluster::build(Shape { pod_counts: [4, 0], ..Shape::default() })?;
    let node = &cluster.nodes[0];
    let pods: Vec<&Pod> = node.pods.iter().collect();
    let _servers = pods.iter().map(|pod| Server::start(&pod.namespace, &pod.name)).collect::<Result<Vec<_>>>()?;
    let serve = |node: &Node, port| {
        let listener = node.namespace.run(|| TcpListener::bind((node.address, port)));
        listener.map(KubeApi::serve)
    };
    let mut apis = vec![serve(&cluster.nodes[1], 6443)?, serve(node, 6444)?];
    for api in &apis {
        api.apply(json!({"kind": "Node", "metadata": {"name": node.name}, "status": {"addresses": [
            {"type": "InternalIP", "address": node.address}, {"type": "InternalIP", "address": node.address6},
        ]}}));
    }
    let web = Service::new("web", WEB).tcp("http", 80, server::WHO).tcp("echo", 7, server::ECHO);
    apply(&apis, &web, &web.endpoints(pods[1..].iter().copied()))?;
    // The kubeconfig knows the first server only; the cluster names the second.
    let kubernetes = Service::new("kubernetes", Ipv4Addr::new(10, 96, 0, 1)).tcp("https", 443, 6444);
    let second = Endpoint { address: node.address.into(), ..Endpoint::from(pods[0]) };
    apply(&apis, &kubernetes, &[second])?;
    let kubeconfig = std::env::temp_dir().join(unique_name());
    std::fs::write(&kubeconfig, apis[0].kubeconfig())?;
    let mut agent = Agent::start_with_kubeconfig(node, &node.name, &kubeconfig, &[])?;

    let client = pods[0].namespace.clone();
    let mut talk = client.run(|| Conversation::open(at(WEB, 7)))?;
    let stop = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| -> Result<_> {
        let asking = scope.spawn(|| client::until(Some(&client), &stop, 2, &|| client::who(at(WEB, 80))));
        let outcome = (|| {
            // Its machine is off: nothing says so to those who are connected.
            cluster.nodes[1].namespace.ip(&["link set eth0 down"])?;
            apply(&apis, &web, &web.endpoints([pods[2]]))?;
            wait_for_backend(&agent, pods[2]).context("after the end of the configured server")?;
            agent.kill();
            apply(&apis, &web, &web.endpoints([pods[3]]))?;
            agent.restart().context("while the configured server is dead")?;
            wait_for_backend(&agent, pods[3])?;
            apis.clear();
            for _ in 0..30 {
                std::thread::sleep(Duration::from_millis(100));
                talk.say(b"without any API server")?;
            }
            ensure!(agent.log().contains("what is known stays in place"), "not noticed:\n{}", agent.log());
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let answers = asking.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        outcome.map(|()| answers)
    })?;
    std::fs::remove_file(&kubeconfig)?;
    answers.all_answered()?;
    let last = client::who_many(Some(&client), at(WEB, 80), 50, 2);
    last.all_answered()?;
    ensure!(last.by_backend.keys().eq([&pods[3].name]), "{:?}", last.by_backend);
    Ok(())
}
