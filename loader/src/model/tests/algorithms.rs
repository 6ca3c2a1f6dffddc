//! What annotations say of choosing: a Service's algorithm, endpoints' weights.

use super::super::desired::Algorithm;
use super::Cluster;

const SPEC: &str = "spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}";

fn annotated(annotation: &str) -> Algorithm {
    let mut cluster = Cluster::new();
    cluster.service("web", &format!("metadata: {{annotations: {{sheave.dev/algorithm: {annotation}}}}}\n{SPEC}"));
    cluster.port("").algorithm
}

#[test]
fn a_service_may_say_how_its_backends_are_chosen() {
    assert_eq!(annotated("maglev"), Algorithm::Maglev);
    assert_eq!(annotated("round-robin"), Algorithm::RoundRobin);
    assert_eq!(annotated("least-connections"), Algorithm::LeastConnections);
    assert_eq!(annotated("random"), Algorithm::Random);
    assert_eq!(annotated("best"), Algorithm::Random, "unknown: the cluster's default");
}

fn weights(annotation: &str) -> Vec<(String, u16)> {
    let mut cluster = Cluster::new();
    cluster.service("web", SPEC);
    cluster.slice(
        "web-1",
        &format!(
            "metadata: {{annotations: {{sheave.dev/weights: {annotation:?}}}}}\n\
             addressType: IPv4\n\
             ports: [{{name: '', port: 80}}]\n\
             endpoints: [{{addresses: [10.1.0.1]}}, {{addresses: [10.1.0.2]}}]"
        ),
    );
    let set = cluster.port("").endpoints4.cluster;
    set.iter().map(|endpoint| (endpoint.address.to_string(), endpoint.weight)).collect()
}

#[test]
fn an_endpoint_slice_may_weigh_its_endpoints() {
    let both = |first, second| vec![("10.1.0.1".to_owned(), first), ("10.1.0.2".to_owned(), second)];
    assert_eq!(weights("3"), both(3, 3));
    assert_eq!(weights("10.1.0.1=5, 10.1.0.2=0"), both(5, 0));
    assert_eq!(weights("10.1.0.2=7"), both(1, 7));
    assert_eq!(weights("heavy, 10.1.0.1=x, 10.1.0.2=2"), both(1, 2), "what can't be read is left out");
}
