//! What load balancers are told that check a Service's healthCheckNodePort.

use std::time::{Duration, SystemTime};

use super::super::objects::Family;
use super::*;

const LOCAL: &str = "type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 32000";

fn balanced() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.web(&format!("{{{LOCAL}, clusterIP: 10.96.0.10, ports: [{{name: a, port: 80}}, {{name: b, port: 81}}]}}"));
    cluster
}

impl Cluster {
    fn slice_of(&mut self, name: &str, port: &str, endpoints: &str) {
        self.slice(
            name,
            &format!("{{addressType: IPv4, ports: [{{name: {port}, port: 8080}}], endpoints: [{endpoints}]}}"),
        );
    }

    /// What the only Service's health check counts, of IPv4.
    fn counted(&self) -> Option<usize> {
        self.model.health_check(&key("web"))?.endpoints.get(&Family::V4).copied()
    }
}

const HERE: &str = "{addresses: [10.1.0.1], nodeName: here}";

#[test]
fn a_pod_counts_once_however_many_ports_and_slices_it_is_in() {
    let mut cluster = balanced();
    assert_eq!(cluster.counted(), Some(0));
    cluster.slice_of("one", "a", HERE);
    cluster.slice_of("two", "b", HERE);
    cluster.slice_of("three", "a", &format!("{HERE}, {{addresses: [10.1.0.2], nodeName: here}}"));
    assert_eq!(cluster.counted(), Some(2));
    assert_eq!(cluster.model.health_check(&key("web")).unwrap().port, 32_000);
}

#[test]
fn only_pods_that_are_here_and_ready_and_stay_count() {
    for (endpoint, counted) in [
        (HERE, 1),
        ("{addresses: [10.1.0.1], nodeName: there}", 0),
        ("{addresses: [10.1.0.1]}", 0),
        ("{addresses: [10.1.0.1], nodeName: here, conditions: {ready: false}}", 0),
        ("{addresses: [10.1.0.1], nodeName: here, conditions: {ready: false, serving: true, terminating: true}}", 0),
        // publishNotReadyAddresses.
        ("{addresses: [10.1.0.1], nodeName: here, conditions: {ready: true, serving: true, terminating: true}}", 0),
    ] {
        let mut cluster = balanced();
        cluster.slice_of("one", "a", endpoint);
        assert_eq!(cluster.counted(), Some(counted), "{endpoint}");
    }
}

#[test]
fn a_pod_that_no_port_of_the_service_leads_to_does_not_count() {
    let mut cluster = balanced();
    cluster.slice_of("one", "other", HERE);
    cluster.slice("two", &format!("{{addressType: IPv4, ports: [], endpoints: [{HERE}]}}"));
    assert_eq!(cluster.counted(), Some(0));
}

#[test]
fn each_family_counts_its_own() {
    let mut cluster = Cluster::new();
    cluster.web(&format!("{{{LOCAL}, clusterIPs: [10.96.0.10, \"fd00::10\"], ports: [{{port: 80}}]}}"));
    cluster.slice_of("four", "\"\"", HERE);
    let six = "{addresses: [\"fd01::1\"], nodeName: here}, {addresses: [\"fd01::2\"], nodeName: here}";
    cluster.slice("six", &format!("{{addressType: IPv6, ports: [{{name: \"\", port: 80}}], endpoints: [{six}]}}"));
    let check = cluster.model.health_check(&key("web")).unwrap();
    assert_eq!(check.endpoints, BTreeMap::from([(Family::V4, 1), (Family::V6, 2)]));
    let single = balanced().model.health_check(&key("web")).unwrap();
    assert_eq!(single.endpoints, BTreeMap::from([(Family::V4, 0)]));
}

#[test]
fn only_load_balancers_under_policy_local_are_checked() {
    for spec in [
        "type: LoadBalancer, externalTrafficPolicy: Cluster, healthCheckNodePort: 32000, clusterIP: 10.96.0.10",
        "type: NodePort, externalTrafficPolicy: Local, healthCheckNodePort: 32000, clusterIP: 10.96.0.10",
        "type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 32000, clusterIP: None",
        "type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 0, clusterIP: 10.96.0.10",
        "type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 70000, clusterIP: 10.96.0.10",
        "type: LoadBalancer, externalTrafficPolicy: Local, clusterIP: 10.96.0.10",
    ] {
        let mut cluster = Cluster::new();
        cluster.web(&format!("{{{spec}, ports: [{{port: 80}}]}}"));
        assert_eq!(cluster.model.health_check(&key("web")), None, "{spec}");
    }
    let mut cluster = Cluster::new();
    let labels = "{labels: {service.kubernetes.io/service-proxy-name: other}}";
    cluster.service("web", &format!("{{metadata: {labels}, spec: {{{LOCAL}, clusterIP: 10.96.0.10}}}}"));
    assert_eq!(cluster.model.health_check(&key("web")), None);
    assert_eq!(cluster.model.health_check(&key("unknown")), None);
}

#[test]
fn a_service_made_anew_is_another_one_for_events() {
    let mut cluster = balanced();
    for uid in ["first", "second"] {
        let spec = format!("{{{LOCAL}, clusterIP: 10.96.0.10, ports: [{{port: 80}}]}}");
        let dirty = cluster.service("web", &format!("{{metadata: {{uid: {uid}}}, spec: {spec}}}"));
        assert_eq!(dirty, keys(&["web"]));
        assert_eq!(cluster.model.health_check(&key("web")).unwrap().uid.as_deref(), Some(uid));
    }
}

#[test]
fn a_node_leaves_when_it_is_deleted_or_the_autoscaler_says_so() {
    let mut cluster = Cluster::new();
    assert!(cluster.model.node().is_none());
    for (fields, leaving) in [
        ("spec: {}", false),
        ("spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}", true),
        ("spec: {taints: [{key: DeletionCandidateOfClusterAutoscaler, effect: PreferNoSchedule}]}", false),
        ("{metadata: {deletionTimestamp: \"2026-01-01T00:00:00Z\"}}", true),
    ] {
        cluster.node(&[], fields);
        assert_eq!(cluster.model.node().map(|node| node.leaving), Some(leaving), "{fields}");
    }
}

#[test]
fn a_slice_says_when_that_happened_for_which_it_was_written() {
    let read = |time: &str| {
        let annotation = format!("{{endpoints.kubernetes.io/last-change-trigger-time: \"{time}\"}}");
        let fields = format!("{{metadata: {{annotations: {annotation}}}, addressType: IPv4, endpoints: []}}");
        let object: discovery::EndpointSlice = yaml(&fields, "one", &[]);
        super::super::objects::EndpointSlice::from(&object)
    };
    let slice = read("1970-01-01T00:01:00.5Z");
    assert_eq!(slice.triggered, Some(SystemTime::UNIX_EPOCH + Duration::from_millis(60_500)));
    let slice = read("yesterday");
    assert_eq!((slice.triggered, slice.problems.len()), (None, 1));
}
