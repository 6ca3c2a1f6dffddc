//! Two Services that ask for the same address, port and protocol.

use super::super::Change;
use super::{Cluster, key, keys};

fn service(created: &str, port: u16, protocol: &str) -> String {
    format!(
        "{{metadata: {{creationTimestamp: '{created}'}},
          spec: {{clusterIP: 10.96.0.10, ports: [{{port: {port}, protocol: {protocol}}}]}}}}"
    )
}

const OLD: &str = "2024-01-01T00:00:00Z";
const NEW: &str = "2025-01-01T00:00:00Z";

#[test]
fn the_older_service_has_it_and_the_younger_gets_it_when_the_older_goes() {
    for order in [["a", "b"], ["b", "a"]] {
        let mut cluster = Cluster::new();
        for name in order {
            cluster.service(name, &service(if name == "a" { NEW } else { OLD }, 80, "TCP"));
        }
        assert!(cluster.frontends("a").is_empty());
        assert_eq!(cluster.frontends("b").len(), 1);
        assert_eq!(cluster.model.apply(Change::ServiceGone(key("b"))), keys(&["a", "b"]));
        assert_eq!(cluster.frontends("a").len(), 1);
    }
}

#[test]
fn of_two_equally_old_the_name_decides_and_the_loser_is_told_apart() {
    let mut cluster = Cluster::new();
    cluster.service("b", &service(OLD, 80, "TCP"));
    assert_eq!(cluster.service("a", &service(OLD, 80, "TCP")), keys(&["a", "b"]), "b loses it");
    assert_eq!(cluster.frontends("a").len(), 1);
    assert!(cluster.frontends("b").is_empty());
}

#[test]
fn another_protocol_or_port_of_the_same_address_is_no_contest() {
    let mut cluster = Cluster::new();
    cluster.service("a", &service(OLD, 80, "TCP"));
    cluster.service("b", &service(OLD, 80, "UDP"));
    cluster.service("c", &service(OLD, 81, "TCP"));
    assert!(["a", "b", "c"].iter().all(|name| cluster.frontends(name).len() == 1));
}

#[test]
fn two_services_can_swap_ports_on_a_shared_address() {
    let mut cluster = Cluster::new();
    cluster.service("a", &service(OLD, 80, "TCP"));
    cluster.service("b", &service(NEW, 81, "TCP"));
    cluster.service("a", &service(OLD, 81, "TCP"));
    cluster.service("b", &service(NEW, 80, "TCP"));
    assert!(cluster.frontends("a").contains_key("10.96.0.10:81"));
    assert!(cluster.frontends("b").contains_key("10.96.0.10:80"));
}

#[test]
fn a_service_that_stops_being_balanced_gives_its_frontends_up() {
    let mut cluster = Cluster::new();
    cluster.service("a", &service(OLD, 80, "TCP"));
    cluster.service("b", &service(NEW, 80, "TCP"));
    assert_eq!(cluster.service("a", "spec: {clusterIP: None}"), keys(&["a", "b"]));
    assert_eq!(cluster.frontends("b").len(), 1);
}

#[test]
fn a_service_recreated_younger_loses_what_it_had() {
    let mut cluster = Cluster::new();
    cluster.service("a", &service("2023-01-01T00:00:00Z", 80, "TCP"));
    cluster.service("b", &service(OLD, 80, "TCP"));
    assert_eq!(cluster.service("a", &service(NEW, 80, "TCP")), keys(&["a", "b"]));
    assert!(cluster.frontends("a").is_empty());
    assert_eq!(cluster.frontends("b").len(), 1);
}
