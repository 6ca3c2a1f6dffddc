//! Whatever the order of changes was, the outcome is that of the objects as they are, and the dirty sets named
//! every Service that it differs for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use super::super::desired::{Algorithm, Protocol, ServiceKey, ServicePort, ServicePortName};
use super::super::objects::{
    EndpointSlice, Family, Hints, Node, Port, Service, ServiceType, SliceEndpoint, SliceKey, SlicePort,
};
use super::super::{Change, HealthCheck, Model, ModelOptions};
use super::key;
use crate::config::{ExternalIps, NodePortAddresses};

/// xorshift64*: reproducible, and good enough to pick from small ranges.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % bound
    }

    fn small(&mut self, bound: u8) -> u8 {
        u8::try_from(self.below(u64::from(bound))).expect("below a u8")
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[usize::try_from(self.below(items.len() as u64)).expect("an index")].clone()
    }

    fn name(&mut self) -> String {
        format!("service-{}", self.below(8))
    }

    fn address(&mut self, network: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, network, 0, self.small(4)))
    }

    fn service(&mut self) -> Service {
        let ports = (0..self.small(3)).map(|i| Port {
            name: format!("p{i}").into(),
            protocol: self.pick(&[Protocol::Tcp, Protocol::Udp]),
            port: u16::from(self.small(3)) + 80,
            node_port: self.one_in(2).then(|| u16::from(self.small(3)) + 30_000),
        });
        let ports = ports.collect();
        Service {
            key: key(&self.name()),
            created: self.one_in(2).then(|| self.below(3).cast_signed()),
            service_type: self.pick(&[
                ServiceType::ClusterIp,
                ServiceType::NodePort,
                ServiceType::LoadBalancer,
                ServiceType::ExternalName,
            ]),
            foreign: self.one_in(8),
            cluster_ips: (0..self.small(3)).map(|_| self.address(96)).collect(),
            external_ips: (0..self.small(2)).map(|_| self.address(96)).collect(),
            load_balancer_ips: (0..self.small(2)).map(|_| self.address(97)).collect(),
            source_ranges: self.one_in(2).then(BTreeSet::new),
            ports,
            internal_local: self.one_in(2),
            external_local: self.one_in(2),
            affinity_seconds: 0,
            algorithm: None,
            health_check_node_port: self.one_in(2).then_some(32_000),
            uid: None,
            problems: Vec::new(),
        }
    }

    fn slice(&mut self) -> EndpointSlice {
        let nodes = ["here".to_owned(), "there".to_owned()];
        let zones = ["a".to_owned(), "b".to_owned()];
        let endpoints = (0..self.small(5)).map(|_| SliceEndpoint {
            address: self.address(1),
            node_name: Some(self.pick(&nodes).into()),
            ready: !self.one_in(3),
            serving: self.one_in(2),
            terminating: self.one_in(2),
            weight: 1,
            hints: Some(Box::new(Hints {
                for_nodes: if self.one_in(2) { vec![self.pick(&nodes).into()] } else { Vec::new() },
                for_zones: if self.one_in(4) { Vec::new() } else { vec![self.pick(&zones).into()] },
            })),
        });
        let endpoints = endpoints.collect();
        EndpointSlice {
            key: SliceKey { namespace: "default".into(), name: format!("slice-{}", self.below(12)).into() },
            service: (!self.one_in(8)).then(|| key(&self.name())),
            ignored: self.one_in(8),
            family: Some(Family::V4),
            ports: [SlicePort { name: "p0".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
            endpoints,
            triggered: None,
            problems: Vec::new(),
        }
    }

    fn node(&mut self) -> Node {
        Node {
            name: self.pick(&["here".to_owned(), "here".to_owned(), "there".to_owned()]),
            zone: self.pick(&[None, Some("a".to_owned()), Some("b".to_owned())]),
            internal_ips: (0..self.small(3)).map(|_| self.address(0)).collect(),
            leaving: self.one_in(4),
            problems: Vec::new(),
        }
    }

    fn change(&mut self) -> Change {
        match self.below(100) {
            0..35 => Change::Service(self.service()),
            35..45 => Change::ServiceGone(key(&self.name())),
            45..80 => Change::Slice(self.slice()),
            80..90 => Change::SliceGone(self.slice().key),
            90..97 => Change::Node(self.node()),
            97 => Change::NodeGone,
            98 => Change::ServicesReplaced((0..self.below(8)).map(|_| self.service()).collect()),
            _ => Change::SlicesReplaced((0..self.below(12)).map(|_| self.slice()).collect()),
        }
    }
}

/// The objects as they are, by the plainest of means.
#[derive(Default)]
struct Objects {
    services: BTreeMap<ServiceKey, Service>,
    slices: BTreeMap<SliceKey, EndpointSlice>,
    node: Option<Node>,
}

impl Objects {
    fn apply(&mut self, change: Change) {
        match change {
            Change::Service(service) => drop(self.services.insert(service.key.clone(), service)),
            Change::ServiceGone(key) => drop(self.services.remove(&key)),
            Change::ServicesReplaced(all) => {
                self.services = all.into_iter().map(|service| (service.key.clone(), service)).collect();
            }
            Change::Slice(slice) => drop(self.slices.insert(slice.key.clone(), slice)),
            Change::SliceGone(key) => drop(self.slices.remove(&key)),
            Change::SlicesReplaced(all) => {
                self.slices = all.into_iter().map(|slice| (slice.key.clone(), slice)).collect();
            }
            Change::Node(node) if node.name == "here" => self.node = Some(node),
            Change::Node(_) => {}
            Change::NodeGone => self.node = None,
            Change::ServiceCidr(_) | Change::ServiceCidrGone(_) | Change::ServiceCidrsReplaced(_) => {}
        }
    }

    /// A model that sees them for the first time, in another order than they came in.
    fn fresh_model(&self) -> Model {
        let mut model = model();
        model.apply(Change::SlicesReplaced(self.slices.values().rev().cloned().collect()));
        model.apply(Change::ServicesReplaced(self.services.values().rev().cloned().collect()));
        if let Some(node) = &self.node {
            model.apply(Change::Node(node.clone()));
        }
        model
    }
}

fn model() -> Model {
    let node_name = "here".to_owned();
    Model::new(ModelOptions {
        node_name,
        external_ips: ExternalIps::All,
        nodeport_addresses: NodePortAddresses::Primary,
        algorithm: Algorithm::Random,
    })
}

/// What follows from a Service, where something does.
type Outcome = (BTreeMap<ServicePortName, ServicePort>, Option<HealthCheck>);
type Desired = BTreeMap<ServiceKey, Outcome>;

fn outcome(model: &Model, key: &ServiceKey) -> Option<Outcome> {
    let (ports, check) = (model.desired(key), model.health_check(key));
    (!ports.is_empty() || check.is_some()).then_some((ports, check))
}

fn desired(model: &Model) -> Desired {
    model.services().filter_map(|key| Some((key.clone(), outcome(model, key)?))).collect()
}

#[test]
fn a_thousand_random_changes_end_where_a_fresh_start_would() {
    for seed in 1..=20 {
        let mut random = Random(seed);
        let (mut objects, mut model, mut followed) = (Objects::default(), model(), Desired::new());
        for step in 0..1000 {
            let change = random.change();
            objects.apply(change.clone());
            for key in model.apply(change) {
                match outcome(&model, &key) {
                    None => followed.remove(&key),
                    Some(outcome) => followed.insert(key, outcome),
                };
            }
            if step % 50 == 49 {
                let expected = desired(&objects.fresh_model());
                assert_eq!(desired(&model), expected, "seed {seed}, step {step}");
                assert_eq!(followed, expected, "a Service was left out of the dirty set: seed {seed}, step {step}");
            }
        }
    }
}
