//! What is taken out of random clusters: objects that no API server would store, and what the rules leave open, which is
//! two service ports that claim one frontend, and an endpoint that two slices describe differently.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::Endpoint;

use super::cluster::{Cluster, NodePorts, Options, THIS_NODE, label};
use super::frontends::{Frontend, Kind, ServicePortKey, cluster_ips, frontends_of};
use super::generate::{set_label, this_node};

/// Takes out what no API server would store, and what the rules leave open.
pub(super) fn settle(cluster: &mut Cluster) {
    mirror_labels(cluster);
    clear_node_ports(cluster);
    resolve_claims(cluster);
    agree_on_endpoints(cluster);
}

/// The controller that makes slices copies this label.
fn mirror_labels(cluster: &mut Cluster) {
    const FOREIGN: &str = "service.kubernetes.io/service-proxy-name";
    for slice in cluster.slices.values_mut() {
        let name = label(&slice.metadata, "kubernetes.io/service-name").unwrap_or_default();
        let service = format!("{}/{name}", slice.metadata.namespace.as_deref().unwrap_or("default"));
        let service = cluster.services.get(&service);
        let foreign = service.and_then(|service| label(&service.metadata, FOREIGN)).map(str::to_owned);
        set_label(&mut slice.metadata, FOREIGN, foreign.as_deref());
    }
}

/// nodePorts are for the types that have them.
fn clear_node_ports(cluster: &mut Cluster) {
    for spec in cluster.services.values_mut().filter_map(|service| service.spec.as_mut()) {
        if !matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer")) {
            spec.ports.iter_mut().flatten().for_each(|port| port.node_port = None);
        }
    }
}

/// Services lose what another one claims already: a ClusterIP that belongs to another, or an address and port.
fn resolve_claims(cluster: &mut Cluster) {
    // As if every option were on, so that a claim does not depend on options.
    let all = Options { external_ips: true, node_ports: NodePorts::All, addresses: this_node() };
    let mut ips: BTreeSet<IpAddr> = BTreeSet::new();
    let mut owners: BTreeMap<_, ServicePortKey> = BTreeMap::new();
    let keys: Vec<String> = cluster.services.keys().cloned().collect();
    for key in keys {
        let Some(mut service) = cluster.services.remove(&key) else { continue };
        let own = service.spec.as_ref().map(cluster_ips).unwrap_or_default();
        if own.iter().any(|ip| ips.contains(ip)) {
            continue;
        }
        ips.extend(own);
        while let Some(contested) = frontends_of(&service, cluster, &all)
            .into_iter()
            .find(|frontend| {
                let owner = owners.get(&(frontend.address, frontend.service_port.2));
                owner.is_some_and(|owner| *owner != frontend.service_port)
            })
            .or_else(|| rivals(&service, cluster, &all))
        {
            give_up(&mut service, contested.kind, contested.address.port());
        }
        for frontend in frontends_of(&service, cluster, &all) {
            owners.insert((frontend.address, frontend.service_port.2), frontend.service_port);
        }
        cluster.services.insert(key, service);
    }
}

/// A frontend that two ports of one Service claim.
fn rivals(service: &Service, cluster: &Cluster, options: &Options) -> Option<Frontend> {
    let frontends = frontends_of(service, cluster, options);
    let rival = |one: &Frontend| {
        frontends.iter().any(|other| {
            (other.address, other.service_port.2) == (one.address, one.service_port.2)
                && other.service_port != one.service_port
        })
    };
    frontends.iter().find(|frontend| rival(frontend)).cloned()
}

fn give_up(service: &mut Service, kind: Kind, port: u16) {
    let spec = service.spec.get_or_insert_default();
    match kind {
        Kind::ExternalIp => spec.external_ips = None,
        Kind::LoadBalancer => service.status = None,
        Kind::NodePort => {
            for own in spec.ports.iter_mut().flatten().filter(|own| own.node_port == Some(i32::from(port))) {
                own.node_port = None;
            }
        }
        Kind::ClusterIp => unreachable!("cluster IPs come from a pool of their own, and ports differ"),
    }
}

/// One address of a Service has the same conditions and hints in every slice, but for one that says it is local.
fn agree_on_endpoints(cluster: &mut Cluster) {
    let mut said: BTreeMap<(String, String, bool), Endpoint> = BTreeMap::new();
    for slice in cluster.slices.values_mut() {
        let name = label(&slice.metadata, "kubernetes.io/service-name").unwrap_or_default();
        let service = format!("{}/{name}", slice.metadata.namespace.as_deref().unwrap_or("default"));
        for endpoint in &mut slice.endpoints {
            let local = endpoint.node_name.as_deref() == Some(THIS_NODE);
            let address = endpoint.addresses.first().cloned().unwrap_or_default();
            let first = said.entry((service.clone(), address, local)).or_insert_with(|| endpoint.clone());
            endpoint.conditions.clone_from(&first.conditions);
            endpoint.hints.clone_from(&first.hints);
        }
    }
}
