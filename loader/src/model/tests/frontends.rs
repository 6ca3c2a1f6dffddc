//! Which addresses and ports a node serves.

use std::net::IpAddr;

use sheave_common::frontend::flags::{
    CLUSTER_IP, EXTERNAL_IP, EXTERNAL_LOCAL, HOST_ONLY, INTERNAL_LOCAL, LOAD_BALANCER, NODE_PORT, SOURCE_RANGES,
};

use super::super::{Change, desired};
use super::{Cluster, key, keys};
use crate::config::{ExternalIps, NodePortAddresses};

fn served(cluster: &Cluster, expected: &[(&str, u32)]) {
    let expected = expected.iter().map(|(text, flags)| ((*text).to_owned(), *flags)).collect();
    assert_eq!(cluster.frontends("web"), expected);
}

const NODE: &str = "status: {addresses: [
    {type: Hostname, address: here}, {type: ExternalIP, address: 198.51.100.1},
    {type: InternalIP, address: 10.0.0.1}, {type: InternalIP, address: 10.0.0.2}, {type: InternalIP, address: 'fd00::1'}]}";

#[test]
fn a_cluster_ip_is_served_and_ends_with_its_service() {
    let mut cluster = Cluster::new();
    assert_eq!(cluster.web("{clusterIP: 10.96.0.10, ports: [{port: 80}]}"), keys(&["web"]));
    served(&cluster, &[("10.96.0.10:80", CLUSTER_IP)]);
    assert_eq!(cluster.web("{clusterIP: 10.96.0.10, ports: [{port: 80}]}"), keys(&[]), "the same again");
    assert_eq!(cluster.model.apply(Change::ServiceGone(key("web"))), keys(&["web"]));
    served(&cluster, &[]);
    assert_eq!(cluster.model.apply(Change::ServiceGone(key("web"))), keys(&[]));
}

#[test]
fn headless_foreign_and_external_name_services_are_not_served_also_when_they_become_so() {
    let balanced = "{clusterIP: 10.96.0.10, ports: [{port: 80}]}";
    for other in [
        "spec: {clusterIP: None, clusterIPs: [None], ports: [{port: 80}]}",
        "spec: {clusterIP: '', ports: [{port: 80}]}",
        "spec: {type: ExternalName, externalName: example.org, clusterIP: 10.96.0.10, ports: [{port: 80}]}",
        "{metadata: {labels: {service.kubernetes.io/service-proxy-name: x}}, spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}}",
    ] {
        let mut cluster = Cluster::new();
        cluster.web(balanced);
        assert_eq!(cluster.service("web", other), keys(&["web"]));
        served(&cluster, &[]);
        cluster.web(balanced);
        served(&cluster, &[("10.96.0.10:80", CLUSTER_IP)]);
        assert_eq!(cluster.model.problems(), 0, "without a complaint");
    }
}

#[test]
fn a_dual_stack_service_is_served_in_both_families() {
    let mut cluster = Cluster::new();
    cluster.web("{clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10, 'fd00:96::10'], ports: [{port: 80}]}");
    served(&cluster, &[("10.96.0.10:80", CLUSTER_IP), ("[fd00:96::10]:80", CLUSTER_IP)]);
}

#[test]
fn a_node_port_is_served_on_the_first_internal_ip_of_each_family_and_for_the_host_on_loopback() {
    let mut cluster = Cluster::new();
    cluster.web("{type: NodePort, clusterIPs: [10.96.0.10, 'fd00:96::10'], ports: [{port: 80, nodePort: 30080}]}");
    assert_eq!(cluster.node(&[], NODE), keys(&["web"]));
    served(
        &cluster,
        &[
            ("10.96.0.10:80", CLUSTER_IP),
            ("[fd00:96::10]:80", CLUSTER_IP),
            ("10.0.0.1:30080", NODE_PORT),
            ("[fd00::1]:30080", NODE_PORT),
            ("127.0.0.1:30080", NODE_PORT | HOST_ONLY),
            ("[::1]:30080", NODE_PORT | HOST_ONLY),
        ],
    );
    assert_eq!(cluster.model.apply(Change::NodeGone), keys(&["web"]));
    assert!(!cluster.frontends("web").contains_key("10.0.0.1:30080"));
}

#[test]
fn a_single_stack_service_has_no_frontend_of_the_other_family() {
    let mut cluster = Cluster::new();
    cluster.node(&[], NODE);
    cluster.web(
        "{type: NodePort, clusterIP: 10.96.0.10, externalIPs: ['fd00:77::1'], ports: [{port: 80, nodePort: 30080}]}",
    );
    served(
        &cluster,
        &[("10.96.0.10:80", CLUSTER_IP), ("10.0.0.1:30080", NODE_PORT), ("127.0.0.1:30080", NODE_PORT | HOST_ONLY)],
    );
}

#[test]
fn node_port_addresses_can_be_networks_or_all_and_follow_the_interfaces() {
    let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse::<IpAddr>().expect("an address")).collect();
    let machine = ["127.0.0.1", "127.0.0.53", "10.0.0.1", "192.168.1.1", "fe80::1", "fd00::1"];
    let networks = NodePortAddresses::Networks(vec![("192.168.0.0".parse().expect("an address"), 16)]);
    let cases: [(NodePortAddresses, &[&str]); 2] = [
        (networks, &["127.0.0.1:30080", "192.168.1.1:30080"]),
        (NodePortAddresses::All, &["10.0.0.1:30080", "127.0.0.1:30080", "192.168.1.1:30080"]),
    ];
    for (rule, expected) in cases {
        let mut cluster = Cluster::with(ExternalIps::All, rule);
        cluster.node(&[], NODE);
        cluster.web("{type: NodePort, clusterIP: 10.96.0.10, ports: [{port: 80, nodePort: 30080}]}");
        cluster.service("other", "spec: {clusterIP: 10.96.0.11, ports: [{port: 80}]}");
        assert_eq!(cluster.model.set_node_addresses(addresses(&machine)), keys(&["web"]));
        let frontends = cluster.frontends("web");
        let node_ports: Vec<&str> = frontends.keys().map(String::as_str).filter(|f| f.ends_with(":30080")).collect();
        assert_eq!(node_ports, expected);
        assert_eq!(cluster.model.set_node_addresses(addresses(&machine)), keys(&[]), "the same again");
    }
}

#[test]
fn a_load_balancer_ip_is_served_unless_its_mode_is_proxy() {
    let mut cluster = Cluster::new();
    cluster.service(
        "web",
        "{spec: {type: LoadBalancer, clusterIP: 10.96.0.10, allocateLoadBalancerNodePorts: false, ports: [{port: 80}]},
         status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: VIP},
            {ip: 192.0.2.3, ipMode: Proxy}, {hostname: lb.example.org}]}}}",
    );
    served(
        &cluster,
        &[("10.96.0.10:80", CLUSTER_IP), ("192.0.2.1:80", LOAD_BALANCER), ("192.0.2.2:80", LOAD_BALANCER)],
    );
}

/// A load-balancer Service with these loadBalancerSourceRanges.
fn guarded(ranges: &str) -> String {
    format!(
        "{{spec: {{type: LoadBalancer, clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10, 'fd00:96::10'], \
         externalIPs: [192.0.2.9, 192.0.2.2], loadBalancerSourceRanges: {ranges}, ports: [{{port: 80, nodePort: 30080}}]}}, \
         status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.1}}, {{ip: 192.0.2.2}}, {{ip: 'fd00::1'}}]}}}}}}"
    )
}

fn ranges(cluster: &Cluster) -> Vec<String> {
    cluster.port("").source_ranges.iter().map(ToString::to_string).collect()
}

/// Only the cloud's clients would be kept out, or those of a nodePort as well.
#[test]
fn source_ranges_guard_load_balancer_ips_and_nothing_else() {
    let mut cluster = Cluster::new();
    cluster.node(&[], NODE);
    cluster.service("web", &guarded("[198.51.100.0/24]"));
    served(
        &cluster,
        &[
            ("10.96.0.10:80", CLUSTER_IP),
            ("[fd00:96::10]:80", CLUSTER_IP),
            ("192.0.2.1:80", LOAD_BALANCER | SOURCE_RANGES),
            ("192.0.2.2:80", LOAD_BALANCER | EXTERNAL_IP | SOURCE_RANGES),
            ("192.0.2.9:80", EXTERNAL_IP),
            ("[fd00::1]:80", LOAD_BALANCER | SOURCE_RANGES),
            ("10.0.0.1:30080", NODE_PORT),
            ("[fd00::1]:30080", NODE_PORT),
            ("127.0.0.1:30080", NODE_PORT | HOST_ONLY),
            ("[::1]:30080", NODE_PORT | HOST_ONLY),
        ],
    );
    assert_eq!(ranges(&cluster), ["198.51.100.0/24"]);
    for unguarded in ["[]", "null"] {
        cluster.service("web", &guarded(unguarded));
        assert_eq!(cluster.frontends("web")["192.0.2.1:80"], LOAD_BALANCER);
        assert!(ranges(&cluster).is_empty());
    }
    assert_eq!(cluster.model.problems(), 0);
}

/// A list that was typed by a person would lock everybody out, or let everybody in.
#[test]
fn source_ranges_are_trimmed_and_read_as_kubernetes_reads_them_and_those_that_cannot_be_read_admit_nobody() {
    for (list, expected, problems) in [
        ("[' 198.51.100.7/24', \"\\t10.0.0.0/8\\n\"]", &["10.0.0.0/8", "198.51.100.0/24"][..], 0),
        ("['fd00:1::9/64', 198.051.100.000/24]", &["198.51.100.0/24", "fd00:1::/64"], 0),
        ("['::ffff:198.51.100.0/120', '::ffff:0:0/95']", &["198.51.100.0/24", "::fffe:0:0/95"], 0),
        ("[10.0.0.0/8, 10.0.0.0/8]", &["10.0.0.0/8"], 0),
        ("[10.0.0.0/33, 10.0.0.0/8]", &["10.0.0.0/8"], 1),
        ("[10.0.0.1, '', ' ', 10.0.0.0/, /8, 10.0.0.0/+8, 10.0.0.0/8/8, '10.0.0.0 /8', 'fd00::/129', all]", &[], 10),
    ] {
        let mut cluster = Cluster::new();
        cluster.service("web", &guarded(list));
        assert_eq!(ranges(&cluster), expected, "{list}");
        assert_eq!(cluster.frontends("web")["192.0.2.1:80"], LOAD_BALANCER | SOURCE_RANGES, "{list}");
        assert_eq!(cluster.model.problems(), problems, "{list}");
        cluster.service("web", &guarded(list));
        assert_eq!(cluster.model.problems(), problems, "said once");
    }
}

#[test]
fn source_ranges_of_a_service_that_has_no_load_balancer_ip_yet_are_kept_for_later() {
    let mut cluster = Cluster::new();
    cluster.web(
        "{type: LoadBalancer, clusterIP: 10.96.0.10, loadBalancerSourceRanges: [192.0.2.0/24], ports: [{port: 80}]}",
    );
    served(&cluster, &[("10.96.0.10:80", CLUSTER_IP)]);
    assert!(ranges(&cluster).is_empty(), "nothing asks for them");
    assert_eq!(cluster.service("web", &guarded("[192.0.2.0/24]")), keys(&["web"]));
    assert_eq!(ranges(&cluster), ["192.0.2.0/24"]);
}

#[test]
fn changing_the_type_removes_what_the_old_type_served() {
    let mut cluster = Cluster::new();
    cluster.node(&[], NODE);
    let service = |kind: &str| {
        format!(
            "{{spec: {{type: {kind}, clusterIP: 10.96.0.10, ports: [{{port: 80, nodePort: 30080}}]}},
             status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.1}}]}}}}}}"
        )
    };
    cluster.service("web", &service("LoadBalancer"));
    assert_eq!(cluster.frontends("web").len(), 4);
    cluster.service("web", &service("NodePort"));
    assert_eq!(cluster.frontends("web").len(), 3);
    cluster.service("web", &service("ClusterIP"));
    served(&cluster, &[("10.96.0.10:80", CLUSTER_IP)]);
}

#[test]
fn external_ips_are_served_as_far_as_the_operator_lets_them() {
    let network = |text: &str| {
        let (address, length) = text.split_once('/').expect("a network");
        (address.parse().expect("an address"), length.parse().expect("a length"))
    };
    let networks = |texts: &[&str]| ExternalIps::Networks(texts.iter().map(|text| network(text)).collect());
    let [near, far] = ["192.0.2.9:80", "[2001:db8::9]:80"];
    for (allowed, served_there) in [
        (ExternalIps::All, [near, far].as_slice()),
        (ExternalIps::None, &[]),
        (networks(&["192.0.2.8/30"]), &[near]),
        (networks(&["192.0.2.0/32", "2001:db8::/64"]), &[far]),
    ] {
        let mut cluster = Cluster::with(allowed, NodePortAddresses::Primary);
        cluster.web(
            "{clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10, \"fd00:96::10\"], ipFamilies: [IPv4, IPv6],
                externalIPs: [192.0.2.9, \"2001:db8::9\"], ports: [{port: 80}]}",
        );
        let mut expected = vec![("10.96.0.10:80", CLUSTER_IP), ("[fd00:96::10]:80", CLUSTER_IP)];
        expected.extend(served_there.iter().map(|address| (*address, EXTERNAL_IP)));
        served(&cluster, &expected);
    }
}

#[test]
fn each_traffic_policy_marks_the_frontends_that_it_governs() {
    let mut cluster = Cluster::new();
    cluster.node(&[], NODE);
    let service = |policy: &str| {
        format!(
            "{{spec: {{type: LoadBalancer, clusterIP: 10.96.0.10, externalIPs: [192.0.2.9], {policy}: Local,
                ports: [{{port: 80, nodePort: 30080}}]}}, status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.1}}]}}}}}}"
        )
    };
    cluster.service("web", &service("internalTrafficPolicy"));
    served(
        &cluster,
        &[
            ("10.96.0.10:80", CLUSTER_IP | INTERNAL_LOCAL | EXTERNAL_LOCAL),
            ("192.0.2.9:80", EXTERNAL_IP),
            ("192.0.2.1:80", LOAD_BALANCER),
            ("10.0.0.1:30080", NODE_PORT),
            ("127.0.0.1:30080", NODE_PORT | HOST_ONLY),
        ],
    );
    cluster.service("web", &service("externalTrafficPolicy"));
    served(
        &cluster,
        &[
            ("10.96.0.10:80", CLUSTER_IP),
            ("192.0.2.9:80", EXTERNAL_IP | EXTERNAL_LOCAL),
            ("192.0.2.1:80", LOAD_BALANCER | EXTERNAL_LOCAL),
            ("10.0.0.1:30080", NODE_PORT | EXTERNAL_LOCAL),
            ("127.0.0.1:30080", NODE_PORT | HOST_ONLY | EXTERNAL_LOCAL),
        ],
    );
}

#[test]
fn session_affinity_has_a_default_time_and_bounds() {
    for (fields, seconds) in [
        ("", 0),
        ("sessionAffinity: None,", 0),
        ("sessionAffinity: ClientIP,", 10_800),
        ("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 30}},", 30),
        ("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86400}},", 86_400),
        ("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}},", 10_800),
    ] {
        let mut cluster = Cluster::new();
        cluster.web(&format!("{{{fields} clusterIP: 10.96.0.10, ports: [{{port: 80}}]}}"));
        assert_eq!(cluster.port("").affinity_seconds, seconds, "{fields}");
    }
}

#[test]
fn a_port_is_named_by_service_name_and_protocol() {
    let mut cluster = Cluster::new();
    cluster.web(
        "{clusterIP: 10.96.0.10, ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53},
          {name: sctp, port: 99, protocol: SCTP}]}",
    );
    let desired = cluster.model.desired(&key("web"));
    let names: Vec<(String, desired::Protocol)> =
        desired.keys().map(|name| (name.to_string(), name.protocol)).collect();
    assert_eq!(
        names,
        [
            ("default/web:dns".to_owned(), desired::Protocol::Udp),
            ("default/web:dns-tcp".to_owned(), desired::Protocol::Tcp),
            ("default/web:sctp".to_owned(), desired::Protocol::Sctp),
        ]
    );
}

#[test]
fn what_cannot_be_read_is_skipped_and_counted_once_and_the_rest_is_served() {
    let mut cluster = Cluster::new();
    let service = "{type: NodePort, clusterIP: 10.96.0.10, externalIPs: [10.0.0.300, 192.0.2.9],
        ports: [{name: a, port: 80, nodePort: 70000}, {name: b, port: 0}, {name: c, port: 81, protocol: ICMP},
                {name: d, port: 82}]}";
    cluster.web(service);
    assert_eq!(cluster.model.problems(), 4);
    let served: Vec<String> = cluster.frontends("web").into_keys().collect();
    assert_eq!(served, ["10.96.0.10:80", "10.96.0.10:82", "192.0.2.9:80", "192.0.2.9:82"]);
    cluster.web(&service.replace("82", "83"));
    assert_eq!(cluster.model.problems(), 4, "nothing new to complain about");
    cluster.service("other", "spec: {clusterIP: 10.96.0.11, ports: [{port: 80}]}");
    assert_eq!(cluster.frontends("other").len(), 1);
}

#[test]
fn an_old_address_with_leading_zeros_is_read_as_kubernetes_reads_it() {
    let mut cluster = Cluster::new();
    cluster.web("{clusterIP: 010.096.000.010, ports: [{port: 80}]}");
    served(&cluster, &[("10.96.0.10:80", CLUSTER_IP)]);
}
