//! Pings of a load balancer's addresses, from a pod and from outside, in both families.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sheave_tests::client;
use sheave_tests::family::Family;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{Pod, Shape};

const LOAD_BALANCER: [&str; 2] = ["203.0.113.5", "fd00:203::5"];

fn web() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:10:96::10"],
            "ports": [{"name": "http", "port": 80, "targetPort": server::WHO}],
        },
        "status": {"loadBalancer": {"ingress": LOAD_BALANCER.map(|ip| json!({"ip": ip}))}},
    })
}

fn slice(family: Family, pod: Option<&Pod>) -> Value {
    let endpoint = |pod: &Pod| json!({"addresses": [pod.address_of(family)], "nodeName": pod.node});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("web-{family}"), "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family.to_string(), "ports": [{"name": "http", "port": server::WHO}],
        "endpoints": pod.map(endpoint).into_iter().collect::<Vec<_>>(),
    })
}

/// Whoever watches a load balancer's address by pings would be told that it is down, or that it is up when nobody serves it.
#[test]
fn a_load_balancers_address_answers_pings_while_somebody_serves_its_family() -> Result<()> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [1, 1], ..Shape::default() }, &[])?;
    let [inside, outside] = [&scenario.pod(1, 1).namespace, &scenario.cluster.client];
    outside.ip(&["route add 203.0.113.0/24 via 192.168.50.1", "route add fd00:203::/64 via fd00:50::1"])?;
    for namespace in [inside, outside] {
        namespace.sysctl("ipv4/ping_group_range", "0 2147483647")?;
    }
    scenario.manifests().write("web.json", &web().to_string())?;
    // IPv4 alone, IPv6 alone, both, neither.
    for served in [[true, false], [false, true], [true, true], [false, false]] {
        for (family, served) in Family::BOTH.into_iter().zip(served) {
            let slice = slice(family, served.then(|| scenario.pod(2, 1)));
            scenario.manifests().write(&format!("web-{family}.json"), &slice.to_string())?;
        }
        for (address, served) in LOAD_BALANCER.iter().zip(served) {
            let address: IpAddr = address.parse()?;
            for namespace in [inside, outside] {
                eventually(Duration::from_secs(10), || {
                    let answered = namespace.run(|| client::ping(address, 56))?;
                    ensure!(answered == served, "{} pings {address}: {answered}, not {served}", namespace.name());
                    Ok(())
                })?;
            }
        }
        for family in Family::BOTH {
            let node = scenario.node().address_of(family);
            ensure!(outside.run(|| client::ping(node, 56))?, "{node} answers for itself");
        }
    }
    Ok(())
}
