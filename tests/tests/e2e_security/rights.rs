//! What the service account of `deploy/` may do at the API server.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::rbac::v1::ClusterRole;
use serde_json::{Value, json};
use sheave_tests::agent::Agent;
use sheave_tests::kube_api::{KubeApi, Resource, Verb};
use sheave_tests::kubectl::kustomize;
use sheave_tests::leftovers::unique_name;
use sheave_tests::objects;
use sheave_tests::process::eventually;
use sheave_tests::topology::{Cluster, Shape};

use super::WEB;

const SOON: Duration = Duration::from_secs(10);
const HEALTH_CHECK: u16 = 32_100;

/// `list services.` or `create events.events.k8s.io`, as `kubectl auth can-i` writes it.
fn right(verb: &str, resource: &str, group: &str) -> String {
    format!("{verb} {resource}.{group}")
}

/// What the base's only ClusterRole allows.
fn allowed() -> Result<BTreeSet<String>> {
    let base = kustomize(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize"))?;
    let role = base.iter().find(|object| object["kind"] == "ClusterRole").context("the base has no ClusterRole")?;
    let role: ClusterRole = serde_json::from_value(role.clone())?;
    let mut allowed = BTreeSet::new();
    for rule in role.rules.into_iter().flatten() {
        ensure!(rule.non_resource_urls.is_none() && rule.resource_names.is_none(), "{rule:?}");
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                allowed.extend(rule.verbs.iter().map(|verb| right(verb, resource, group)));
            }
        }
    }
    Ok(allowed)
}

/// What was asked of the API server.
fn used(api: &KubeApi) -> BTreeSet<String> {
    let requests = api.requests();
    let rights = requests.iter().map(|request| {
        let (group, _) = request.resource.api_version().rsplit_once('/').unwrap_or_default();
        right(&format!("{:?}", request.verb).to_lowercase(), request.resource.plural(), group)
    });
    rights.collect()
}

/// Whoever breaks into Sheave could do more harm in the cluster than need be; or Sheave would be refused what it needs.
#[test]
fn the_service_account_may_do_what_sheave_does_and_nothing_else() -> Result<()> {
    let cluster = Cluster::build(Shape { pod_counts: [1, 0], ..Shape::default() })?;
    let node = &cluster.nodes[0];
    let api = KubeApi::serve(node.namespace.run(|| TcpListener::bind("127.0.0.1:0"))?);
    api.apply(objects::node(node, None, &[&node.address.to_string()]));
    let kubeconfig = std::env::temp_dir().join(unique_name());
    std::fs::write(&kubeconfig, api.kubeconfig())?;
    let outcome = use_every_right(&cluster, &api, &kubeconfig);
    std::fs::remove_file(&kubeconfig)?;
    outcome?;
    let (allowed, used) = (allowed()?, used(&api));
    ensure!(used == allowed, "the role allows {allowed:#?}\nwhat is used is {used:#?}");
    Ok(())
}

/// Runs Sheave until it has done everything that it ever asks of an API server.
fn use_every_right(cluster: &Cluster, api: &KubeApi, kubeconfig: &Path) -> Result<()> {
    let node = &cluster.nodes[0];
    let agent = Agent::start_with_kubeconfig(node, &node.name, kubeconfig, &[])?;

    // A health check that can't be answered is told in an Event, and told again in the same one.
    let taken = node.namespace.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, HEALTH_CHECK)))?;
    let publish = |health_check: u16| {
        let mut web = objects::service(
            "web",
            &json!({"type": "LoadBalancer", "clusterIP": WEB, "externalTrafficPolicy": "Local",
                "healthCheckNodePort": health_check, "ports": [{"port": 80, "nodePort": 30_500}]}),
        );
        web["metadata"]["uid"] = Value::from("uid-of-web");
        api.apply(web)
    };
    publish(HEALTH_CHECK);
    let asked = |verb| {
        eventually(SOON, || {
            ensure!(api.count(Resource::Events, verb) > 0, "no {verb:?} of an Event\n{}", agent.log());
            Ok(())
        })
    };
    asked(Verb::Create)?;
    publish(HEALTH_CHECK + 1);
    eventually(SOON, || {
        let free = node.namespace.run(|| TcpListener::bind((node.address, HEALTH_CHECK + 1)));
        ensure!(free.is_err(), "the other health check is not served");
        Ok(())
    })?;
    publish(HEALTH_CHECK);
    asked(Verb::Patch)?;
    drop(taken);
    Ok(())
}
