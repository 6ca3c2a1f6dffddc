//! Which endpoints a connection may reach.

use super::super::objects::SliceKey;
use super::super::{Change, Model};
use super::{Cluster, key, keys, texts};

/// A slice with the port without a name at 8080 and these endpoints.
fn slice(endpoints: &str) -> String {
    format!("{{addressType: IPv4, ports: [{{name: '', port: 8080}}], endpoints: [{endpoints}]}}")
}

fn web() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.web("{clusterIP: 10.96.0.10, ports: [{port: 80}]}");
    cluster
}

fn web_with(endpoints: &str) -> Cluster {
    let mut cluster = web();
    assert_eq!(cluster.slice("web-1", &slice(endpoints)), keys(&["web"]));
    cluster
}

#[test]
fn several_slices_make_one_set_and_each_can_go() {
    let mut cluster = web_with("{addresses: [10.1.0.2]}");
    cluster.slice("web-2", &slice("{addresses: [10.1.0.1]}"));
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080", "10.1.0.2:8080"]);
    assert_eq!(cluster.slice("web-2", &slice("{addresses: [10.1.0.1]}")), keys(&[]), "the same again");
    let slice = SliceKey { namespace: "default".into(), name: "web-1".into() };
    assert_eq!(cluster.model.apply(Change::SliceGone(slice)), keys(&["web"]));
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
}

#[test]
fn slices_that_arrive_before_their_service_count_when_it_comes() {
    let mut cluster = Cluster::new();
    assert_eq!(cluster.slice("web-1", &slice("{addresses: [10.1.0.1]}")), keys(&[]));
    cluster.web("{clusterIP: 10.96.0.10, ports: [{port: 80}]}");
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
}

#[test]
fn a_slice_that_changes_its_label_leaves_one_service_and_joins_the_other() {
    let mut cluster = web_with("{addresses: [10.1.0.1]}");
    cluster.service("other", "spec: {clusterIP: 10.96.0.11, ports: [{port: 80}]}");
    let moved = "{metadata: {labels: {kubernetes.io/service-name: other}}, addressType: IPv4,
        ports: [{name: '', port: 8080}], endpoints: [{addresses: [10.1.0.1]}]}";
    assert_eq!(cluster.slice("web-1", moved), keys(&["other", "web"]));
    assert!(cluster.cluster_set().is_empty());
    let other = cluster.model.desired(&key("other")).into_values().next().expect("one port");
    assert_eq!(texts(&other.endpoints4.cluster), ["10.1.0.1:8080"]);
}

#[test]
fn headless_foreign_fqdn_and_other_family_slices_do_not_count() {
    for fields in [
        "metadata: {labels: {kubernetes.io/service-name: web, service.kubernetes.io/headless: ''}}, addressType: IPv4",
        "metadata: {labels: {kubernetes.io/service-name: web, service.kubernetes.io/service-proxy-name: x}}, addressType: IPv4",
        "addressType: FQDN",
        "addressType: IPv6",
        "metadata: {labels: {}}, addressType: IPv4",
    ] {
        let mut cluster = web_with("{addresses: [10.1.0.1]}");
        let other = format!("{{{fields}, ports: [{{name: '', port: 8080}}], endpoints: [{{addresses: [10.1.0.9]}}]}}");
        cluster.slice("web-2", &other);
        assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"], "{fields}");
    }
}

#[test]
fn each_family_has_its_own_endpoints() {
    let mut cluster = Cluster::new();
    cluster.web("{clusterIPs: [10.96.0.10, 'fd00:96::10'], ports: [{port: 80}]}");
    cluster.slice("web-4", &slice("{addresses: [10.1.0.1]}"));
    cluster.slice(
        "web-6",
        "{addressType: IPv6, ports: [{name: '', port: 8081}], endpoints: [{addresses: ['fd00:1::1']}]}",
    );
    assert_eq!(texts(&cluster.port("").endpoints4.cluster), ["10.1.0.1:8080"]);
    assert_eq!(texts(&cluster.port("").endpoints6.cluster), ["fd00:1::1:8081"]);
}

#[test]
fn only_the_first_address_counts_and_a_bad_one_costs_only_its_endpoint() {
    let cluster = web_with(
        "{addresses: [10.1.0.1, 10.1.0.9]}, {addresses: [x]}, {addresses: ['fd00::1']}, {addresses: [10.1.0.2]}",
    );
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080", "10.1.0.2:8080"]);
    assert_eq!(cluster.model.problems(), 2);
}

#[test]
fn ports_match_by_name_and_may_differ_from_slice_to_slice() {
    let mut cluster = Cluster::new();
    cluster.web("{clusterIP: 10.96.0.10, ports: [{name: http, port: 80}, {name: admin, port: 81}]}");
    cluster.slice(
        "web-1",
        "{addressType: IPv4, ports: [{name: http, port: 8080}, {name: admin, port: 9000}], endpoints: [{addresses: [10.1.0.1]}]}",
    );
    cluster.slice(
        "web-2",
        "{addressType: IPv4, ports: [{name: http, port: 8888}, {port: 7}, {name: admin}, {name: admin, port: 0}],
          endpoints: [{addresses: [10.1.0.2]}]}",
    );
    assert_eq!(texts(&cluster.port("http").endpoints4.cluster), ["10.1.0.1:8080", "10.1.0.2:8888"]);
    assert_eq!(texts(&cluster.port("admin").endpoints4.cluster), ["10.1.0.1:9000"]);
}

#[test]
fn absent_conditions_mean_ready_and_serving_follows_ready() {
    let cluster = web_with(
        "{addresses: [10.1.0.1]}, {addresses: [10.1.0.2], conditions: {}}, {addresses: [10.1.0.3], conditions: {ready: false}},
         {addresses: [10.1.0.4], conditions: {ready: false, terminating: true}}",
    );
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080", "10.1.0.2:8080"]);
    let cluster = web_with("{addresses: [10.1.0.4], conditions: {ready: false, terminating: true}}");
    assert!(cluster.cluster_set().is_empty(), "serving is absent, so it follows ready");
}

#[test]
fn terminating_endpoints_that_still_serve_are_used_when_nothing_is_ready() {
    let terminating =
        "{addresses: [10.1.0.2], nodeName: there, conditions: {ready: false, serving: true, terminating: true}}";
    let mut cluster = web_with(&format!("{terminating}, {{addresses: [10.1.0.3], conditions: {{ready: false}}}}"));
    assert_eq!(cluster.cluster_set(), ["10.1.0.2:8080"]);
    assert!(cluster.port("").endpoints4.cluster[0].terminating);
    cluster.slice("web-2", &slice("{addresses: [10.1.0.1]}"));
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
}

#[test]
fn the_local_set_is_what_runs_here_and_falls_back_to_terminating_here() {
    let terminating =
        "{addresses: [10.1.0.2], nodeName: here, conditions: {ready: false, serving: true, terminating: true}}";
    let mut cluster = web_with(&format!("{terminating}, {{addresses: [10.1.0.3], nodeName: there}}"));
    assert_eq!(cluster.local_set(), ["10.1.0.2:8080"]);
    assert_eq!(cluster.cluster_set(), ["10.1.0.3:8080"]);
    cluster.slice("web-2", &slice("{addresses: [10.1.0.1], nodeName: here}"));
    assert_eq!(cluster.local_set(), ["10.1.0.1:8080"]);
    let local: Vec<bool> = cluster.port("").endpoints4.cluster.iter().map(|endpoint| endpoint.local).collect();
    assert_eq!(local, [true, false]);
}

#[test]
fn an_endpoint_in_two_slices_is_one_and_moves_without_a_gap() {
    let mut cluster = web_with("{addresses: [10.1.0.1]}");
    for (first, second) in [("", ", nodeName: here"), (", nodeName: here", "")] {
        cluster.slice("web-1", &slice(&format!("{{addresses: [10.1.0.1]{first}}}")));
        cluster.slice("web-2", &slice(&format!("{{addresses: [10.1.0.1]{second}}}")));
        assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
        assert_eq!(cluster.local_set(), ["10.1.0.1:8080"]);
    }
    cluster.slice("web-1", &slice("{addresses: [10.1.0.1], conditions: {ready: false}}"));
    cluster.slice("web-2", &slice("{addresses: [10.1.0.1]}"));
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
    cluster.slice("web-1", &slice(""));
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
}

fn zoned(model: &mut Cluster, zone: &str) {
    assert_eq!(model.node(&[("topology.kubernetes.io/zone", zone)], "{}"), keys(&["web"]));
}

#[test]
fn zone_hints_keep_traffic_in_the_zone_when_every_ready_endpoint_has_one() {
    let near = "{addresses: [10.1.0.1], hints: {forZones: [{name: a}]}}";
    let far = "{addresses: [10.1.0.2], hints: {forZones: [{name: b}]}}";
    let mut cluster = web_with(&format!("{near}, {far}"));
    assert_eq!(cluster.cluster_set().len(), 2, "this node has no zone yet");
    zoned(&mut cluster, "a");
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
    zoned(&mut cluster, "c");
    assert_eq!(cluster.cluster_set().len(), 2, "no endpoint for this zone");
    zoned(&mut cluster, "a");
    cluster.slice("web-2", &slice("{addresses: [10.1.0.3]}"));
    assert_eq!(cluster.cluster_set().len(), 3, "one ready endpoint has no hint");
    cluster.slice("web-2", &slice("{addresses: [10.1.0.3], conditions: {ready: false}}"));
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"], "only ready endpoints need one");
}

#[test]
fn node_hints_come_before_zone_hints() {
    let here = "{addresses: [10.1.0.1], hints: {forNodes: [{name: here}], forZones: [{name: b}]}}";
    let there = "{addresses: [10.1.0.2], hints: {forNodes: [{name: there}], forZones: [{name: a}]}}";
    let mut cluster = web_with(&format!("{here}, {there}"));
    zoned(&mut cluster, "a");
    assert_eq!(cluster.cluster_set(), ["10.1.0.1:8080"]);
    cluster.slice("web-1", &slice(there));
    assert_eq!(cluster.cluster_set(), ["10.1.0.2:8080"], "no endpoint for this node, so the zone decides");
}

#[test]
fn topology_never_narrows_the_local_set() {
    let mut cluster = web_with(
        "{addresses: [10.1.0.1], nodeName: here, hints: {forZones: [{name: b}]}},
         {addresses: [10.1.0.2], nodeName: there, hints: {forZones: [{name: a}]}}",
    );
    zoned(&mut cluster, "a");
    assert_eq!(cluster.cluster_set(), ["10.1.0.2:8080"]);
    assert_eq!(cluster.local_set(), ["10.1.0.1:8080"]);
}

#[test]
fn another_nodes_object_changes_nothing_here() {
    let mut cluster = web_with("{addresses: [10.1.0.1]}");
    let mut other = super::super::objects::Node {
        name: "there".to_owned(),
        zone: Some("a".to_owned()),
        internal_ips: Vec::new(),
        leaving: false,
        problems: Vec::new(),
    };
    assert_eq!(cluster.model.apply(Change::Node(other.clone())), keys(&[]));
    other.name = "here".to_owned();
    assert_eq!(cluster.model.apply(Change::Node(other)), keys(&["web"]));
}

#[test]
fn a_relist_removes_what_it_does_not_name() {
    fn services(model: &Model) -> Vec<String> {
        model.services().map(|key| key.name.to_string()).collect()
    }
    let mut cluster = web_with("{addresses: [10.1.0.1]}");
    cluster.service("other", "spec: {clusterIP: 10.96.0.11, ports: [{port: 80}]}");
    assert_eq!(services(&cluster.model), ["other", "web"]);
    assert_eq!(cluster.model.apply(Change::SlicesReplaced(Vec::new())), keys(&["web"]));
    assert!(cluster.cluster_set().is_empty());
    assert_eq!(cluster.model.apply(Change::ServicesReplaced(Vec::new())), keys(&["other", "web"]));
    assert!(services(&cluster.model).is_empty());
}
