//! Objects at the limits of what the API allows, and beyond: each comes to what it can, what can't be is a problem that names the
//! field, and the Services beside it are as they were.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde_json::{Value, json};
use sheave::model::Change;
use sheave::model::desired::{ServicePort, ServicePortName};
use sheave::model::objects::{EndpointSlice, Problem, Service};
use sheave::plan::PlanError;
use sheave_tests::fuzz::objects;

/// As much as these need.
const ROOM: objects::Room = objects::Room { table: 65_536, services: 2_048 };

type Ports = BTreeMap<ServicePortName, ServicePort>;

fn service(object: Value) -> Service {
    (&serde_json::from_value::<core::Service>(object).expect("a Service")).into()
}

fn slice(object: Value) -> EndpointSlice {
    (&serde_json::from_value::<discovery::EndpointSlice>(object).expect("an EndpointSlice")).into()
}

/// A slice of the Service `name` with these endpoints' addresses.
fn slice_of(name: &str, number: usize, addresses: &[String]) -> EndpointSlice {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    slice(json!({
        "metadata": {"name": format!("{name}-{number}"), "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints,
    }))
}

fn fields(problems: &[Problem]) -> Vec<&str> {
    problems.iter().map(|problem| problem.field.as_str()).collect()
}

/// What objects come to beside the sound ones, and what the plan refuses of them.
fn beside_others(changes: Vec<Change>) -> (Ports, BTreeMap<ServicePortName, PlanError>) {
    let sound = objects::sound();
    let alone = objects::desired(&sound);
    let (mut ports, refused) = objects::check(&[sound, changes].concat(), &alone, ROOM);
    ports.retain(|name, _| &*name.service.namespace == "default");
    (ports, refused)
}

#[test]
fn a_service_of_a_thousand_ports_has_them_all() {
    let ports: Vec<Value> = (1..=1_000).map(|port| json!({"name": format!("p{port}"), "port": port})).collect();
    let many = service(json!({"metadata": {"name": "many"}, "spec": {"clusterIPs": ["10.96.1.1"], "ports": ports}}));
    assert_eq!(many.problems, []);
    let (ports, refused) = beside_others(vec![Change::Service(many)]);
    assert_eq!((ports.len(), refused.len()), (1_000, 0));
}

/// A slice may have a thousand, by the API's rules; who writes manifests need not know them.
#[test]
fn ten_thousand_endpoints_are_all_used_whatever_slices_they_are_in() {
    let addresses: Vec<String> =
        (0..10_000).map(|n| format!("10.{}.{}.{}", 200 + n / 2_500, n % 2_500 / 250, n % 250)).collect();
    for size in [100, 1_000, 10_000] {
        let mut changes = vec![Change::Service(service(json!({
            "metadata": {"name": "large"}, "spec": {"clusterIPs": ["10.96.1.1"], "ports": [{"port": 80}]},
        })))];
        let slices = addresses.chunks(size).enumerate();
        changes.extend(slices.map(|(number, part)| Change::Slice(slice_of("large", number, part))));
        let (ports, refused) = beside_others(changes);
        assert!(refused.is_empty());
        let port = ports.values().next().expect("the port");
        assert_eq!(port.endpoints4.cluster.len(), 10_000, "{size} in a slice");
    }
}

#[test]
fn five_thousand_source_ranges_are_all_kept() {
    let ranges: Vec<String> = (0..5_000).map(|n| format!("172.16.{}.{}/32", n / 250, n % 250)).collect();
    let guarded = service(json!({
        "metadata": {"name": "guarded"},
        "spec": {"type": "LoadBalancer", "clusterIPs": ["10.96.1.1"], "ports": [{"port": 80}], "loadBalancerSourceRanges": ranges},
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}},
    }));
    let (ports, refused) = beside_others(vec![Change::Service(guarded)]);
    assert!(refused.is_empty());
    assert_eq!(ports.values().next().expect("the port").source_ranges.len(), 5_000);
}

#[test]
fn the_longest_names_fit_and_longer_ones_are_refused_by_name() {
    let named = |name: &str, port: &str, address: &str| {
        Change::Service(service(json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIPs": [address], "ports": [{"name": port, "port": 80}]},
        })))
    };
    let (long, longer) = ("s".repeat(63), "s".repeat(253));
    let changes = vec![
        named(&long, &"p".repeat(63), "10.96.1.1"),
        named(&longer, "p", "10.96.1.2"),
        named("a:b", "", "10.96.1.3"),
    ];
    let (ports, refused) = beside_others(changes);
    assert_eq!(ports.keys().map(|name| name.service.name.to_string()).collect::<Vec<_>>(), [long]);
    let refused: Vec<_> = refused.iter().map(|(name, error)| (name.service.name.to_string(), error)).collect();
    assert_eq!(refused, [("a:b".to_owned(), &PlanError::NameAmbiguous), (longer, &PlanError::NameTooLong)]);
}

#[test]
fn ports_at_and_beyond_the_limits() {
    let ports =
        [-1, 0, 1, 65_535, 65_536].map(|port| json!({"name": format!("p{port}"), "port": port, "nodePort": port}));
    let limits = service(json!({
        "metadata": {"name": "limits"}, "spec": {"type": "NodePort", "clusterIPs": ["10.96.1.1"], "ports": ports},
    }));
    assert_eq!(fields(&limits.problems), ["spec.ports[0].port", "spec.ports[1].port", "spec.ports[4].port"]);
    let (ports, _) = beside_others(vec![Change::Service(limits)]);
    let frontends: Vec<SocketAddr> = ports.values().flat_map(|port| port.frontends.keys().copied()).collect();
    for port in [1, 65_535] {
        assert!(frontends.contains(&SocketAddr::from(([10, 96, 1, 1], port))), "{frontends:?}");
        assert!(frontends.contains(&SocketAddr::from(([192, 0, 2, 1], port))), "{frontends:?}");
    }
    assert_eq!(ports.len(), 2);
}

#[test]
fn duplicates_of_everything_count_once() {
    let twice = service(json!({
        "metadata": {"name": "twice"},
        "spec": {
            "clusterIPs": ["10.96.1.1", "10.96.1.1"], "externalIPs": ["203.0.113.7", "203.0.113.7", "10.96.1.1"],
            "ports": [{"name": "a", "port": 80}, {"name": "a", "port": 80}, {"name": "b", "port": 80}],
        },
    }));
    assert_eq!(fields(&twice.problems), ["spec.ports[1].name"]);
    let addresses = ["10.244.0.1".to_owned(), "10.244.0.1".to_owned()];
    let mut slices = [slice_of("twice", 1, &addresses), slice_of("twice", 2, &addresses)];
    for slice in &mut slices {
        slice.ports = ["a", "b"]
            .map(|name| sheave::model::objects::SlicePort { name: name.into(), ..slice.ports[0].clone() })
            .into();
    }
    let [one, other] = slices;
    let changes = [Change::Service(twice), Change::Slice(one.clone()), Change::Slice(other), Change::Slice(one)];
    let (ports, refused) = beside_others(changes.into());
    assert!(refused.is_empty());
    let frontends: Vec<&SocketAddr> = ports.values().flat_map(|port| port.frontends.keys()).collect();
    assert_eq!(frontends.len(), 2, "each of the two addresses' port 80 is one port's: {ports:?}");
    for port in ports.values() {
        assert_eq!(port.endpoints4.cluster.len(), 1);
    }
}

#[test]
fn what_is_unknown_or_of_the_wrong_family_is_named_and_left_out() {
    let odd = service(json!({
        "metadata": {"name": "odd", "unknown": true},
        "spec": {
            "type": "Balancer", "clusterIPs": ["10.96.1.1"], "internalTrafficPolicy": "Bar", "externalTrafficPolicy": "Nearest",
            "sessionAffinity": "Cookie", "unknown": {"field": 1},
            "ports": [{"name": "a", "port": 80, "protocol": "FOO"}, {"name": "b", "port": 81}],
        },
    }));
    let mut named = fields(&odd.problems);
    named.sort_unstable();
    let policies = ["spec.externalTrafficPolicy", "spec.internalTrafficPolicy"];
    assert_eq!(named, [policies[0], policies[1], "spec.ports[0].protocol", "spec.sessionAffinity", "spec.type"]);
    for problem in &odd.problems {
        assert!(problem.message.starts_with('"'), "{problem} says what was there");
    }
    let mut family = slice_of("odd", 1, &["fd00:244::1".to_owned(), "10.244.0.1".to_owned()]);
    assert_eq!(fields(&family.problems), ["endpoints[0].addresses[0]"]);
    family.ports = [sheave::model::objects::SlicePort { name: "b".into(), ..family.ports[0].clone() }].into();
    let (ports, _) = beside_others(vec![Change::Service(odd), Change::Slice(family)]);
    let [port] = &ports.values().collect::<Vec<_>>()[..] else { panic!("one port of two: {ports:?}") };
    assert_eq!((port.endpoints4.cluster.len(), port.endpoints6.cluster.len()), (1, 0));
}
