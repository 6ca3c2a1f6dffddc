//! Changes of a cluster, as days bring them.

use std::collections::BTreeMap;
use std::fmt;

use fastrand::Rng;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::api::networking::v1::ServiceCIDR;

use super::cluster::{Cluster, THIS_NODE};
use super::generate::{
    Mood, add_service, affinity, conditions, elsewhere, endpoint, external_ips, hints, node, policies, retype, service,
    service_cidr, set_label, slice, source_ranges,
};
use super::settle::settle;

/// An object that appeared, changed or went.
#[derive(Clone)]
pub(super) enum Change {
    Service(String, Option<Box<Service>>),
    Slice(String, Option<Box<EndpointSlice>>),
    Node(String, Option<Box<Node>>),
    ServiceCidr(String, Option<Box<ServiceCIDR>>),
}

impl Change {
    /// The Service that changes, by itself or by a slice; slices are called as their Service, with a number.
    pub(super) fn service(&self) -> Option<String> {
        match self {
            Self::Service(key, _) => Some(key.clone()),
            Self::Slice(key, _) => key.rsplit_once('-').map(|(service, _)| service.to_owned()),
            Self::Node(..) | Self::ServiceCidr(..) => None,
        }
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, key, gone) = match self {
            Self::Service(key, object) => ("Service", key, object.is_none()),
            Self::Slice(key, object) => ("EndpointSlice", key, object.is_none()),
            Self::Node(key, object) => ("Node", key, object.is_none()),
            Self::ServiceCidr(key, object) => ("ServiceCIDR", key, object.is_none()),
        };
        write!(formatter, "{kind} {key}{}", if gone { " is gone" } else { "" })
    }
}

/// Makes a few changes at once.
pub(super) fn mutate(rng: &mut Rng, cluster: &mut Cluster) {
    for _ in 0..rng.usize(1..5) {
        match rng.u8(0..23) {
            0 | 1 => add_service(rng, cluster),
            2 => remove_service(rng, cluster),
            3..=6 => change_service(rng, cluster),
            7 => swap_ports(rng, cluster),
            8..=10 => replace_slice(rng, cluster),
            11 => drop(some_key(rng, &cluster.slices).and_then(|key| cluster.slices.remove(&key))),
            12..=16 => change_slice(rng, cluster),
            17 | 18 => move_endpoint(rng, cluster),
            19 => {
                let number = rng.u8(1..4);
                let node = node(rng, number);
                cluster.nodes.insert(format!("node-{number}"), node);
            }
            20 => service_cidr(rng, cluster),
            21 if rng.u8(0..4) == 0 => drop(cluster.nodes.remove(THIS_NODE)),
            _ => readiness_elsewhere(rng, cluster),
        }
    }
    settle(cluster);
}

fn some_key<V>(rng: &mut Rng, of: &BTreeMap<String, V>) -> Option<String> {
    let keys: Vec<&String> = of.keys().collect();
    (!keys.is_empty()).then(|| keys[rng.usize(0..keys.len())].clone())
}

/// A Service goes, often with its slices.
fn remove_service(rng: &mut Rng, cluster: &mut Cluster) {
    let Some(key) = some_key(rng, &cluster.services) else { return };
    cluster.services.remove(&key);
    if rng.bool() {
        cluster.slices.retain(|slice, _| !slice.starts_with(&format!("{key}-")));
    }
}

fn change_service(rng: &mut Rng, cluster: &mut Cluster) {
    let Some(key) = some_key(rng, &cluster.services) else { return };
    let Some(changed) = cluster.services.get_mut(&key) else { return };
    match rng.u8(0..9) {
        8 => source_ranges(rng, changed),
        0 => retype(rng, changed),
        1 | 2 => policies(rng, changed),
        3 => affinity(rng, changed),
        4 => external_ips(rng, changed),
        5 => {
            let foreign = rng.bool().then_some("somebody");
            set_label(&mut changed.metadata, "service.kubernetes.io/service-proxy-name", foreign);
        }
        6 => {
            // Other ports, and one that keeps its name.
            let (namespace, name) = key.split_once('/').unwrap_or_default();
            let other = service(rng, namespace, name);
            changed.spec.get_or_insert_default().ports = other.spec.and_then(|spec| spec.ports);
        }
        _ => {
            // Another Service altogether under the same name, or the same one with another ClusterIP.
            let (namespace, name) = key.split_once('/').unwrap_or_default();
            let other = service(rng, namespace, name);
            if rng.bool() {
                *changed = other;
            } else if let (Some(spec), Some(other)) = (&mut changed.spec, other.spec) {
                (spec.cluster_ip, spec.cluster_ips) = (other.cluster_ip, other.cluster_ips);
            }
        }
    }
}

/// Two Services exchange the ports that clients see, and the external IPs that they have them on.
fn swap_ports(rng: &mut Rng, cluster: &mut Cluster) {
    let (Some(one), Some(other)) = (some_key(rng, &cluster.services), some_key(rng, &cluster.services)) else { return };
    let external_ips = |cluster: &Cluster, key| cluster.services[key].spec.clone().and_then(|spec| spec.external_ips);
    let ports = |cluster: &Cluster, key| cluster.services[key].spec.clone().and_then(|spec| spec.ports);
    let of_one = (external_ips(cluster, &one), ports(cluster, &one));
    let of_other = (external_ips(cluster, &other), ports(cluster, &other));
    for (key, (external_ips, ports)) in [(&one, of_other), (&other, of_one)] {
        if let Some(spec) = cluster.services.get_mut(key).and_then(|service| service.spec.as_mut()) {
            (spec.external_ips, spec.ports) = (external_ips, ports);
        }
    }
}

/// Adds a slice to a Service, or replaces one.
fn replace_slice(rng: &mut Rng, cluster: &mut Cluster) {
    let Some(key) = some_key(rng, &cluster.services) else { return };
    let number = rng.usize(0..4);
    let slice = slice(rng, &cluster.services[&key], number);
    cluster.put_slice(slice);
}

/// Endpoints of a slice come, go or change.
fn change_slice(rng: &mut Rng, cluster: &mut Cluster) {
    let Some(key) = some_key(rng, &cluster.slices) else { return };
    let Some(slice) = cluster.slices.get_mut(&key) else { return };
    let mood = Mood::new(rng);
    let address_type = slice.address_type.clone();
    let number = slice.endpoints.len();
    match rng.u8(0..6) {
        0 => slice.endpoints.push(endpoint(rng, &address_type, mood)),
        1 if number > 0 => drop(slice.endpoints.remove(rng.usize(0..number))),
        2 => slice.endpoints.iter_mut().for_each(|endpoint| endpoint.hints = hints(rng, mood)),
        3 => slice.endpoints.clear(),
        _ => {
            for endpoint in &mut slice.endpoints {
                if rng.bool() {
                    endpoint.conditions = conditions(rng, mood);
                }
            }
        }
    }
}

/// An endpoint moves to another slice of its Service, or is in both for a while.
fn move_endpoint(rng: &mut Rng, cluster: &mut Cluster) {
    let (Some(from), Some(to)) = (some_key(rng, &cluster.slices), some_key(rng, &cluster.slices)) else { return };
    let service = |key: &String| cluster.slices[key].metadata.labels.clone();
    if service(&from) != service(&to) || cluster.slices[&from].address_type != cluster.slices[&to].address_type {
        return;
    }
    let stays = rng.bool();
    let endpoints: &mut Vec<Endpoint> = &mut cluster.slices.get_mut(&from).expect("it is there").endpoints;
    if endpoints.is_empty() {
        return;
    }
    let at = rng.usize(0..endpoints.len());
    let mut endpoint = if stays { endpoints[at].clone() } else { endpoints.remove(at) };
    if stays && rng.bool() {
        elsewhere(rng, &mut endpoint);
    }
    cluster.slices.get_mut(&to).expect("it is there").endpoints.push(endpoint);
}

/// One address becomes ready or unready wherever it is an endpoint.
fn readiness_elsewhere(rng: &mut Rng, cluster: &mut Cluster) {
    let endpoints = cluster.slices.values().flat_map(|slice| &slice.endpoints);
    let addresses: Vec<Vec<String>> = endpoints.map(|endpoint| endpoint.addresses.clone()).collect();
    if addresses.is_empty() {
        return;
    }
    let address = &addresses[rng.usize(0..addresses.len())];
    let mood = Mood::new(rng);
    let conditions = conditions(rng, mood);
    for endpoint in cluster.slices.values_mut().flat_map(|slice| &mut slice.endpoints) {
        if endpoint.addresses[0] == address[0] {
            endpoint.conditions.clone_from(&conditions);
        }
    }
}

/// What leads from one cluster to another, in any order.
pub(super) fn changes(rng: &mut Rng, old: &Cluster, new: &Cluster) -> Vec<Change> {
    let mut changes = Vec::new();
    changes.extend(differences(&old.services, &new.services).map(|(key, new)| Change::Service(key, new)));
    changes.extend(differences(&old.slices, &new.slices).map(|(key, new)| Change::Slice(key, new)));
    changes.extend(differences(&old.nodes, &new.nodes).map(|(key, new)| Change::Node(key, new)));
    let cidrs = differences(&old.service_cidrs, &new.service_cidrs);
    changes.extend(cidrs.map(|(key, new)| Change::ServiceCidr(key, new)));
    rng.shuffle(&mut changes);
    changes
}

fn differences<'a, V: Clone + PartialEq>(
    old: &'a BTreeMap<String, V>,
    new: &'a BTreeMap<String, V>,
) -> impl Iterator<Item = (String, Option<Box<V>>)> + 'a {
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key.clone(), None));
    let changed = new.iter().filter(|(key, value)| old.get(*key) != Some(value));
    gone.chain(changed.map(|(key, value)| (key.clone(), Some(Box::new(value.clone())))))
}
