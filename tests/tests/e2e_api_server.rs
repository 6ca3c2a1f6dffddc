//! What `SHEAVE_TEST_KUBECONFIG` does, against the tests' own API: scenarios publish through an API server, take the
//! addresses that it gives out, and leave nothing behind.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use sheave_tests::client;
use sheave_tests::kube_api::{KubeApi, Resource};
use sheave_tests::leftovers::unique_name;
use sheave_tests::manifests::Service;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::Shape;

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
