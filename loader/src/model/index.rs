//! The objects as they are now, and which Services a change touches.
//!
//! A change costs what it changes: only a change of this node looks at every Service. Owned by one task.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use sheave_common::frontend::flags;

use super::claims::{Claim, Claimant, Claims};
use super::desired::{Algorithm, EndpointSets, ServiceKey, ServicePort, ServicePortName};
use super::endpoints;
use super::frontends::{self, Frontends};
use super::health_check::{self, HealthCheck};
use super::network::Network;
use super::objects::{EndpointSlice, Family, Node, Problem, Service, ServiceCidr, SliceKey};
use super::topology::Topology;
use crate::config::{ExternalIps, NodePortAddresses};

/// What the model needs to know besides objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelOptions {
    /// Name of this node.
    pub node_name: String,
    /// Which of spec.externalIPs are frontends.
    pub external_ips: ExternalIps,
    /// Which node addresses serve nodePorts.
    pub nodeport_addresses: NodePortAddresses,
    /// How backends are chosen where a Service does not say.
    pub algorithm: Algorithm,
}

/// A change of the objects, as a source reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Service appeared or changed.
    Service(Service),
    /// A Service went away.
    ServiceGone(ServiceKey),
    /// These are all Services there are: any other one is gone.
    ServicesReplaced(Vec<Service>),
    /// An EndpointSlice appeared or changed.
    Slice(EndpointSlice),
    /// An EndpointSlice went away.
    SliceGone(SliceKey),
    /// These are all EndpointSlices there are: any other one is gone.
    SlicesReplaced(Vec<EndpointSlice>),
    /// This node's object appeared or changed. Other nodes' are ignored.
    Node(Node),
    /// This node's object went away.
    NodeGone,
    /// A ServiceCIDR appeared or changed.
    ServiceCidr(ServiceCidr),
    /// The ServiceCIDR of this name went away.
    ServiceCidrGone(String),
    /// These are all ServiceCIDRs there are, or may be read: any other one is gone.
    ServiceCidrsReplaced(Vec<ServiceCidr>),
}

/// A Service and what it asks for.
#[derive(Debug)]
struct Entry {
    service: Service,
    /// One element for each of `service.ports`, or none at all if the Service isn't balanced.
    frontends: Box<[Frontends]>,
}

impl Entry {
    fn claimant(&self) -> Claimant {
        Claimant { created: self.service.created, service: self.service.key.clone() }
    }

    fn claims(&self) -> BTreeSet<Claim> {
        let ports = self.service.ports.iter().zip(&self.frontends);
        ports.flat_map(|(port, frontends)| frontends.iter().map(|(frontend, _)| (*frontend, port.protocol))).collect()
    }
}

/// Every object that matters here.
#[derive(Debug)]
pub struct Model {
    options: ModelOptions,
    services: BTreeMap<ServiceKey, Box<Entry>>,
    slices: HashMap<SliceKey, EndpointSlice>,
    /// Slices by the Service they belong to, which need not exist.
    slices_of: HashMap<ServiceKey, Vec<SliceKey>>,
    claims: Claims,
    node: Option<Node>,
    /// `None` as long as nobody has said which there are.
    service_cidrs: Option<BTreeMap<String, ServiceCidr>>,
    topology: Topology,
    /// Addresses of this machine's interfaces.
    local_addresses: BTreeSet<IpAddr>,
    /// Those that serve nodePorts.
    node_addresses: BTreeSet<IpAddr>,
    problems: u64,
}

impl Model {
    /// An empty model.
    #[must_use]
    pub fn new(options: ModelOptions) -> Self {
        let topology = Topology { node_name: options.node_name.clone(), zone: None };
        Self {
            options,
            services: BTreeMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            claims: Claims::default(),
            node: None,
            service_cidrs: None,
            topology,
            local_addresses: BTreeSet::new(),
            node_addresses: BTreeSet::new(),
            problems: 0,
        }
    }

    /// Takes a change in, and returns the Services whose [`desired`](Self::desired) may differ from before.
    pub fn apply(&mut self, change: Change) -> BTreeSet<ServiceKey> {
        let mut dirty = BTreeSet::new();
        match change {
            Change::Service(service) => self.put_service(service, &mut dirty),
            Change::ServiceGone(key) => self.remove_service(&key, &mut dirty),
            Change::ServicesReplaced(services) => self.replace_services(services, &mut dirty),
            Change::Slice(slice) => self.put_slice(slice, &mut dirty),
            Change::SliceGone(key) => self.remove_slice(&key, &mut dirty),
            Change::SlicesReplaced(slices) => self.replace_slices(slices, &mut dirty),
            Change::Node(node) if node.name == self.options.node_name => self.set_node(Some(node), &mut dirty),
            Change::Node(_) => {}
            Change::NodeGone => self.set_node(None, &mut dirty),
            Change::ServiceCidr(cidr) => self.put_service_cidr(cidr),
            Change::ServiceCidrGone(name) => drop(self.service_cidrs.as_mut().and_then(|cidrs| cidrs.remove(&name))),
            Change::ServiceCidrsReplaced(cidrs) => self.replace_service_cidrs(cidrs),
        }
        dirty
    }

    /// Tells the addresses of this machine's interfaces, which count for nodePorts unless those are on the primary
    /// addresses. Returns the Services that this changes.
    pub fn set_node_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> BTreeSet<ServiceKey> {
        let mut dirty = BTreeSet::new();
        self.local_addresses = addresses;
        self.update_node_addresses(&mut dirty);
        dirty
    }

    /// Every Service there is, balanced or not.
    pub fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.keys()
    }

    /// What a Service's ports should look like. Empty if it doesn't exist or isn't balanced; a port that has lost all
    /// its frontends to older Services is left out.
    #[must_use]
    pub fn desired(&self, key: &ServiceKey) -> BTreeMap<ServicePortName, ServicePort> {
        let Some(Entry { service, frontends }) = self.services.get(key).map(Box::as_ref) else {
            return BTreeMap::new();
        };
        let mut ports = BTreeMap::new();
        for (port, frontends) in service.ports.iter().zip(frontends) {
            let owned = |frontend| self.claims.is_owner(&(frontend, port.protocol), key);
            let frontends: BTreeMap<_, _> = frontends.iter().copied().filter(|(f, _)| owned(*f)).collect();
            if frontends.is_empty() {
                continue;
            }
            let endpoints = |family| {
                if !service.has_family(family) {
                    return EndpointSets::default();
                }
                endpoints::choose(self.slices_of(key), family, &port.name, port.protocol, &self.topology)
            };
            let name = ServicePortName { service: key.clone(), port: port.name.clone(), protocol: port.protocol };
            let guarded = frontends.values().any(|bits| bits & flags::SOURCE_RANGES != 0);
            let source_ranges = service.source_ranges.clone().filter(|_| guarded).unwrap_or_default();
            let port = ServicePort {
                frontends,
                source_ranges,
                affinity_seconds: service.affinity_seconds,
                algorithm: service.algorithm.unwrap_or(self.options.algorithm),
                endpoints4: endpoints(Family::V4),
                endpoints6: endpoints(Family::V6),
            };
            ports.insert(name, port);
        }
        ports
    }

    /// What load balancers that check a Service's health here are to be told; `None` if they don't.
    #[must_use]
    pub fn health_check(&self, key: &ServiceKey) -> Option<HealthCheck> {
        let service = &self.services.get(key)?.service;
        health_check::of_service(service, || self.slices_of(key), &self.topology)
    }

    /// The addresses that serve nodePorts to packets.
    #[must_use]
    pub const fn nodeport_addresses(&self) -> &BTreeSet<IpAddr> {
        &self.node_addresses
    }

    /// This Node, if it is known.
    #[must_use]
    pub const fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The networks that ClusterIPs come from; `None` as long as nobody has said which there are.
    #[must_use]
    pub fn service_cidrs(&self) -> Option<BTreeSet<Network>> {
        let cidrs = self.service_cidrs.as_ref()?;
        Some(cidrs.values().flat_map(|cidr| &cidr.networks).copied().collect())
    }

    /// Fields of objects that had to be skipped because they could not be read, since the start.
    #[must_use]
    pub const fn problems(&self) -> u64 {
        self.problems
    }

    fn slices_of(&self, key: &ServiceKey) -> impl Iterator<Item = &EndpointSlice> {
        self.slices_of.get(key).into_iter().flatten().filter_map(|slice| self.slices.get(slice))
    }

    fn put_service(&mut self, service: Service, dirty: &mut BTreeSet<ServiceKey>) {
        let old = self.services.remove(&service.key);
        if let Some(old) = old.as_ref().filter(|old| old.service == service) {
            // The same again, from a relist.
            let frontends = old.frontends.clone();
            self.services.insert(service.key.clone(), Box::new(Entry { service, frontends }));
            return;
        }
        let known = old.as_ref().map_or(&[][..], |old| &old.service.problems);
        self.problems += log_problems("Service", &service.key, known, &service.problems);
        dirty.insert(service.key.clone());
        let frontends = frontends::of_service(&service, &self.options.external_ips, &self.node_addresses);
        let new = Entry { service, frontends };
        self.move_claims(old.as_deref(), Some(&new), dirty);
        self.services.insert(new.service.key.clone(), Box::new(new));
    }

    fn remove_service(&mut self, key: &ServiceKey, dirty: &mut BTreeSet<ServiceKey>) {
        let Some(old) = self.services.remove(key) else { return };
        dirty.insert(key.clone());
        self.move_claims(Some(&old), None, dirty);
    }

    fn replace_services(&mut self, services: Vec<Service>, dirty: &mut BTreeSet<ServiceKey>) {
        let listed: BTreeSet<ServiceKey> = services.iter().map(|service| service.key.clone()).collect();
        let gone: Vec<ServiceKey> = self.services.keys().filter(|key| !listed.contains(key)).cloned().collect();
        // Removals first: nobody loses a frontend to a Service that is no longer there.
        for key in gone {
            self.remove_service(&key, dirty);
        }
        for service in services {
            self.put_service(service, dirty);
        }
    }

    /// Releases what only `old` asks for, then takes what only `new` asks for.
    fn move_claims(&mut self, old: Option<&Entry>, new: Option<&Entry>, dirty: &mut BTreeSet<ServiceKey>) {
        let of = |entry: Option<&Entry>| entry.map(|entry| (entry.claimant(), entry.claims()));
        let (old, new) = (of(old), of(new));
        let same_claimant = matches!((&old, &new), (Some((old, _)), Some((new, _))) if old == new);
        if let Some((claimant, claims)) = &old {
            let kept = new.as_ref().filter(|_| same_claimant).map(|(_, claims)| claims);
            for claim in claims.iter().filter(|claim| kept.is_none_or(|kept| !kept.contains(claim))) {
                self.claims.remove(*claim, claimant, dirty);
            }
        }
        if let Some((claimant, claims)) = &new {
            let kept = old.as_ref().filter(|_| same_claimant).map(|(_, claims)| claims);
            for claim in claims.iter().filter(|claim| kept.is_none_or(|kept| !kept.contains(claim))) {
                self.claims.add(*claim, claimant, dirty);
            }
        }
    }

    fn put_slice(&mut self, slice: EndpointSlice, dirty: &mut BTreeSet<ServiceKey>) {
        let old = self.slices.get(&slice.key);
        if old == Some(&slice) {
            return;
        }
        let known = old.map_or(&[][..], |old| &old.problems);
        self.problems += log_problems("EndpointSlice", &slice.key, known, &slice.problems);
        if old.is_some_and(|old| old.service != slice.service) {
            self.remove_slice(&slice.key.clone(), dirty);
        }
        if let Some(service) = &slice.service {
            let slices = self.slices_of.entry(service.clone()).or_insert_with(|| Vec::with_capacity(1));
            if let Err(place) = slices.binary_search(&slice.key) {
                slices.insert(place, slice.key.clone());
            }
            self.touch(service, dirty);
        }
        self.slices.insert(slice.key.clone(), slice);
    }

    fn remove_slice(&mut self, key: &SliceKey, dirty: &mut BTreeSet<ServiceKey>) {
        let Some(old) = self.slices.remove(key) else { return };
        let Some(service) = old.service else { return };
        if let Some(slices) = self.slices_of.get_mut(&service) {
            slices.retain(|slice| slice != key);
            if slices.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        self.touch(&service, dirty);
    }

    fn replace_slices(&mut self, slices: Vec<EndpointSlice>, dirty: &mut BTreeSet<ServiceKey>) {
        let listed: BTreeSet<SliceKey> = slices.iter().map(|slice| slice.key.clone()).collect();
        let gone: Vec<SliceKey> = self.slices.keys().filter(|key| !listed.contains(key)).cloned().collect();
        for key in gone {
            self.remove_slice(&key, dirty);
        }
        for slice in slices {
            self.put_slice(slice, dirty);
        }
    }

    /// A Service whose endpoints changed is dirty, if it is there at all.
    fn touch(&self, service: &ServiceKey, dirty: &mut BTreeSet<ServiceKey>) {
        if self.services.contains_key(service) {
            dirty.insert(service.clone());
        }
    }

    fn set_node(&mut self, node: Option<Node>, dirty: &mut BTreeSet<ServiceKey>) {
        if let Some(node) = &node {
            let known = self.node.as_ref().map_or(&[][..], |old| &old.problems);
            self.problems += log_problems("Node", &node.name, known, &node.problems);
        }
        let zone = node.as_ref().and_then(|node| node.zone.clone());
        if self.topology.zone != zone {
            self.topology.zone = zone;
            dirty.extend(self.services.keys().cloned());
        }
        self.node = node;
        self.update_node_addresses(dirty);
    }

    fn put_service_cidr(&mut self, cidr: ServiceCidr) {
        let cidrs = self.service_cidrs.get_or_insert_default();
        let known = cidrs.get(&cidr.name).map_or(&[][..], |old| &old.problems);
        self.problems += log_problems("ServiceCIDR", &cidr.name, known, &cidr.problems);
        cidrs.insert(cidr.name.clone(), cidr);
    }

    fn replace_service_cidrs(&mut self, cidrs: Vec<ServiceCidr>) {
        let listed: BTreeSet<String> = cidrs.iter().map(|cidr| cidr.name.clone()).collect();
        self.service_cidrs.get_or_insert_default().retain(|name, _| listed.contains(name));
        for cidr in cidrs {
            self.put_service_cidr(cidr);
        }
    }

    fn update_node_addresses(&mut self, dirty: &mut BTreeSet<ServiceKey>) {
        let internal_ips = self.node.as_ref().map_or(&[][..], |node| &node.internal_ips);
        let addresses =
            frontends::node_addresses(&self.options.nodeport_addresses, internal_ips, &self.local_addresses);
        if addresses == self.node_addresses {
            return;
        }
        self.node_addresses = addresses;
        let mut services = std::mem::take(&mut self.services);
        for (key, entry) in &mut services {
            let frontends = frontends::of_service(&entry.service, &self.options.external_ips, &self.node_addresses);
            if frontends == entry.frontends {
                continue;
            }
            let new = Entry { service: entry.service.clone(), frontends };
            self.move_claims(Some(entry), Some(&new), dirty);
            **entry = new;
            dirty.insert(key.clone());
        }
        self.services = services;
    }
}

/// Logs the problems that are new with this version of an object, and returns their number.
fn log_problems(kind: &str, key: &dyn std::fmt::Display, known: &[Problem], problems: &[Problem]) -> u64 {
    let mut count = 0;
    for problem in problems.iter().filter(|problem| !known.contains(problem)) {
        tracing::warn!(object = %format_args!("{kind} {key}"), field = %problem.field, problem = %problem.message,
            "skipped a field that can't be used; the rest of the object counts");
        count += 1;
    }
    count
}
