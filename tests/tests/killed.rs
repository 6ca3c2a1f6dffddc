//! `kill -9` between any two writes of a change, and a restart: packets always go to an endpoint that their Service has had
//! before the change or has after it, and the maps end as if nothing had happened.
//!
//! Needs root and a kernel with BPF. `SHEAVE_SEED=n` plays one random history again.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Instant;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use sheave_tests::oracle::killed::{self, Step, Tally};
use sheave_tests::oracle::{Cluster, NodePorts, Options, THIS_NODE};

/// A dual-stack Service of a load balancer: (name, port, nodePort) and the last octet of its addresses.
fn service(cluster: &mut Cluster, name: &str, host: u8, ports: &[(&str, u16, u16)]) {
    let ports: Vec<Value> = ports
        .iter()
        .map(|(name, port, node_port)| json!({"name": name, "port": port, "protocol": "TCP", "nodePort": node_port}))
        .collect();
    let (v4, v6) = (format!("10.96.0.{host}"), format!("fd00:a:60::{host}"));
    let object: Service = read(json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"type": "LoadBalancer", "clusterIP": v4, "clusterIPs": [v4, v6], "ipFamilies": ["IPv4", "IPv6"],
            "ports": ports, "externalIPs": [format!("203.0.113.{host}")]},
        "status": {"loadBalancer": {"ingress": [
            {"ip": format!("203.0.114.{host}")}, {"ip": format!("fd00:cb:72::{host}")}]}}
    }));
    cluster.services.insert(format!("default/{name}"), object);
}

/// The pods behind a Service: (node, number).
fn endpoints(cluster: &mut Cluster, name: &str, pods: &[(u8, u8)]) {
    for (number, kind) in ["IPv4", "IPv6"].into_iter().enumerate() {
        let endpoints: Vec<Value> = pods
            .iter()
            .map(|(node, pod)| {
                let address =
                    if number == 0 { format!("10.244.{node}.{pod}") } else { format!("fd00:a:f4:{node}::{pod}") };
                json!({"addresses": [address], "nodeName": format!("node-{node}"), "conditions": {"ready": true}})
            })
            .collect();
        let object: EndpointSlice = read(json!({
            "metadata": {"namespace": "default", "name": format!("{name}-{number}"),
                "labels": {"kubernetes.io/service-name": name}},
            "addressType": kind,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "more", "port": 9090, "protocol": "TCP"}],
            "endpoints": endpoints
        }));
        cluster.slices.insert(format!("default/{name}-{number}"), object);
    }
}

fn read<T: serde::de::DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).expect("an object")
}

fn spec<'a>(cluster: &'a mut Cluster, name: &str) -> &'a mut k8s_openapi::api::core::v1::ServiceSpec {
    cluster.services.get_mut(&format!("default/{name}")).and_then(|service| service.spec.as_mut()).expect("it is there")
}

fn remove(cluster: &mut Cluster, name: &str) {
    cluster.services.remove(&format!("default/{name}"));
    cluster.slices.retain(|slice, _| !slice.starts_with(&format!("default/{name}-")));
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    let node: Node = read(json!({
        "metadata": {"name": THIS_NODE},
        "status": {"addresses": [
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "fd00:c0:0:2::1"}]}
    }));
    cluster.nodes.insert(THIS_NODE.to_owned(), node);
    service(&mut cluster, "web", 10, &[("http", 80, 30_080)]);
    endpoints(&mut cluster, "web", &[(1, 2), (2, 2)]);
    service(&mut cluster, "db", 11, &[("http", 5432, 30_432)]);
    endpoints(&mut cluster, "db", &[(2, 3)]);
    cluster
}

/// What days bring, one by one, and at last together.
const STEPS: &[Step<'static>] = &[
    ("an endpoint comes", &|c| endpoints(c, "web", &[(1, 2), (2, 2), (2, 4)])),
    ("an endpoint moves", &|c| endpoints(c, "web", &[(1, 5), (2, 2), (2, 4)])),
    ("an endpoint goes", &|c| endpoints(c, "web", &[(1, 5), (2, 4)])),
    ("an endpoint ends", &|c| {
        for slice in
            c.slices.values_mut().filter(|slice| slice.metadata.name.as_deref().is_some_and(|n| n.starts_with("web")))
        {
            let conditions = json!({"ready": false, "serving": true, "terminating": true});
            slice.endpoints[0].conditions = Some(read(conditions));
        }
    }),
    ("the last endpoint goes", &|c| endpoints(c, "db", &[])),
    ("an endpoint comes after all", &|c| endpoints(c, "db", &[(1, 3)])),
    ("a Service comes", &|c| {
        service(c, "late", 12, &[("http", 80, 30_081), ("more", 90, 30_090)]);
        endpoints(c, "late", &[(1, 6), (2, 6)]);
    }),
    ("ports change", &|c| service(c, "late", 12, &[("http", 81, 30_081), ("more", 90, 30_091)])),
    ("affinity", &|c| spec(c, "web").session_affinity = Some("ClientIP".to_owned())),
    ("source ranges", &|c| {
        let ranges = ["198.51.0.0/17", "fd00:c6:33::/64"].map(str::to_owned);
        spec(c, "web").load_balancer_source_ranges = Some(ranges.to_vec());
    }),
    ("other source ranges", &|c| {
        let ranges = ["198.51.64.0/18", "198.51.128.0/17", "fd00:c6::/32"].map(str::to_owned);
        spec(c, "web").load_balancer_source_ranges = Some(ranges.to_vec());
    }),
    ("no source ranges", &|c| spec(c, "web").load_balancer_source_ranges = None),
    ("policies", &|c| {
        spec(c, "late").external_traffic_policy = Some("Local".to_owned());
        spec(c, "late").internal_traffic_policy = Some("Local".to_owned());
    }),
    ("two Services exchange their ports and addresses", &|c| {
        service(c, "web", 11, &[("http", 5432, 30_432)]);
        service(c, "db", 10, &[("http", 80, 30_080)]);
    }),
    ("a Service goes", &|c| remove(c, "db")),
    ("another Service gets its addresses", &|c| {
        remove(c, "web");
        service(c, "heir", 11, &[("http", 5432, 30_432)]);
        endpoints(c, "heir", &[(1, 5), (2, 7)]);
    }),
];

fn options() -> Options {
    let addresses = ["192.0.2.1", "fd00:c0:0:2::1"].map(|address| address.parse().expect("an address"));
    Options { external_ips: true, node_ports: NodePorts::Primary, addresses: BTreeSet::from(addresses) }
}

/// Says what was tried, past the test harness, which keeps to itself what a test prints that passes.
fn report(tally: &Tally, started: Instant) {
    let _ = writeln!(std::io::stderr(), "\n{tally:?} in {:.1} s", started.elapsed().as_secs_f64());
}

#[test]
fn a_daemon_killed_between_any_two_writes_misleads_no_packet_and_leaves_nothing_behind() {
    let started = Instant::now();
    let tally = killed::steps(cluster(), options(), STEPS);
    report(&tally, started);
    assert_eq!(tally.changes, STEPS.len() as u64 + 1);
    assert!(tally.killed > 10 * tally.changes / 2 && tally.of_open > tally.killed, "{tally:?}");
    assert!(tally.batches > 0 && tally.ids_again > 0, "{tally:?}");
}

#[test]
#[ignore = "slow: every write of dozens of random changes, four minutes"]
fn a_daemon_killed_between_any_two_writes_of_random_changes_misleads_no_packet() {
    let seeds = match std::env::var("SHEAVE_SEED") {
        Ok(seed) => vec![seed.parse().expect("SHEAVE_SEED is a number")],
        Err(_) => vec![1, fastrand::u64(..)],
    };
    for seed in seeds {
        let _ = writeln!(std::io::stderr(), "\nSHEAVE_SEED={seed}");
        let started = Instant::now();
        report(&killed::random(seed, 12), started);
    }
}
