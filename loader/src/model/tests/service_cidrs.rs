//! Where ClusterIPs come from.

use k8s_openapi::api::networking::v1 as networking;

use super::super::Change;
use super::{Cluster, keys, yaml};
use crate::model::objects::ServiceCidr;

fn cidr(name: &str, cidrs: &str) -> ServiceCidr {
    let object: networking::ServiceCIDR = yaml(&format!("spec: {{cidrs: {cidrs}}}"), name, &[]);
    (&object).into()
}

fn networks(cluster: &Cluster) -> Option<Vec<String>> {
    Some(cluster.model.service_cidrs()?.iter().map(ToString::to_string).collect())
}

fn some(networks: &[&str]) -> Option<Vec<String>> {
    Some(networks.iter().map(|network| (*network).to_owned()).collect())
}

/// What a restarted node still knows would be forgotten before it can be read again.
#[test]
fn nothing_is_known_of_them_before_somebody_says_so() {
    let mut cluster = Cluster::new();
    assert_eq!(networks(&cluster), None);
    cluster.model.apply(Change::ServiceCidrGone("kubernetes".to_owned()));
    assert_eq!(networks(&cluster), None);
    cluster.model.apply(Change::ServiceCidrsReplaced(Vec::new()));
    assert_eq!(networks(&cluster), some(&[]));
}

#[test]
fn they_come_and_go_and_make_no_service_dirty() {
    let mut cluster = Cluster::new();
    cluster.web("{clusterIP: 10.96.0.10, ports: [{port: 80}]}");
    let kubernetes = cidr("kubernetes", "[10.96.0.0/16, 'fd00:96::/112']");
    assert_eq!(cluster.model.apply(Change::ServiceCidrsReplaced(vec![kubernetes.clone()])), keys(&[]));
    assert_eq!(networks(&cluster), some(&["10.96.0.0/16", "fd00:96::/112"]));
    cluster.model.apply(Change::ServiceCidr(cidr("extra", "[10.97.0.0/16, 10.96.0.0/16]")));
    assert_eq!(networks(&cluster), some(&["10.96.0.0/16", "10.97.0.0/16", "fd00:96::/112"]));
    cluster.model.apply(Change::ServiceCidr(cidr("extra", "[10.98.0.0/16]")));
    assert_eq!(networks(&cluster), some(&["10.96.0.0/16", "10.98.0.0/16", "fd00:96::/112"]));
    cluster.model.apply(Change::ServiceCidrGone("extra".to_owned()));
    assert_eq!(networks(&cluster), some(&["10.96.0.0/16", "fd00:96::/112"]));
    cluster.model.apply(Change::ServiceCidrsReplaced(vec![cidr("other", "[10.99.0.0/16]")]));
    assert_eq!(networks(&cluster), some(&["10.99.0.0/16"]));
}

#[test]
fn one_that_cannot_be_read_is_counted_once_and_the_others_are_known() {
    let mut cluster = Cluster::new();
    for cidrs in ["[10.96.0.0/16, everything]", "[everything, 10.97.0.0/16]"] {
        cluster.model.apply(Change::ServiceCidr(cidr("kubernetes", cidrs)));
        assert_eq!(networks(&cluster).map(|networks| networks.len()), Some(1), "{cidrs}");
        cluster.model.apply(Change::ServiceCidrsReplaced(vec![cidr("kubernetes", cidrs)]));
    }
    assert_eq!(cluster.model.problems(), 2);
}
