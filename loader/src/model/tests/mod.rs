//! Scenarios: objects as a user writes them, and what a node would serve.

mod algorithms;
mod contests;
mod endpoints;
mod frontends;
mod health_checks;
mod random;
mod service_cidrs;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

use super::desired::{Algorithm, Endpoint, Protocol, ServiceKey, ServicePort, ServicePortName};
use super::{Change, Model, ModelOptions};
use crate::config::{ExternalIps, NodePortAddresses};

/// A node `here`, and what it was told.
struct Cluster {
    model: Model,
}

impl Cluster {
    fn new() -> Self {
        Self::with(ExternalIps::All, NodePortAddresses::Primary)
    }

    fn with(external_ips: ExternalIps, nodeport_addresses: NodePortAddresses) -> Self {
        let node_name = "here".to_owned();
        Self {
            model: Model::new(ModelOptions {
                node_name,
                external_ips,
                nodeport_addresses,
                algorithm: Algorithm::Random,
            }),
        }
    }

    /// A Service `default/web` with this spec.
    fn web(&mut self, spec: &str) -> BTreeSet<ServiceKey> {
        self.service("web", &format!("spec: {spec}"))
    }

    /// A Service in `default` with these fields besides its name.
    fn service(&mut self, name: &str, fields: &str) -> BTreeSet<ServiceKey> {
        let object: core::Service = yaml(&format!("{fields}\n"), name, &[]);
        self.model.apply(Change::Service((&object).into()))
    }

    /// An EndpointSlice of `default/web` with these fields besides its name.
    fn slice(&mut self, name: &str, fields: &str) -> BTreeSet<ServiceKey> {
        let object: discovery::EndpointSlice = yaml(fields, name, &[("kubernetes.io/service-name", "web")]);
        self.model.apply(Change::Slice((&object).into()))
    }

    /// The Node `here` with these fields besides its name.
    fn node(&mut self, labels: &[(&str, &str)], fields: &str) -> BTreeSet<ServiceKey> {
        let object: core::Node = yaml(fields, "here", labels);
        self.model.apply(Change::Node((&object).into()))
    }

    fn port(&self, name: &str) -> ServicePort {
        let name = ServicePortName { service: key("web"), port: name.into(), protocol: Protocol::Tcp };
        self.model.desired(&key("web")).remove(&name).unwrap_or_default()
    }

    /// Frontends of a Service's only port, as text → flags.
    fn frontends(&self, service: &str) -> BTreeMap<String, u32> {
        let desired = self.model.desired(&key(service));
        let frontends = desired.into_values().flat_map(|port| port.frontends);
        frontends.map(|(address, flags)| (address.to_string(), flags)).collect()
    }

    /// The IPv4 cluster set of the port without a name.
    fn cluster_set(&self) -> Vec<String> {
        texts(&self.port("").endpoints4.cluster)
    }

    /// The IPv4 local set of the port without a name.
    fn local_set(&self) -> Vec<String> {
        texts(&self.port("").endpoints4.local)
    }
}

fn texts(endpoints: &[Endpoint]) -> Vec<String> {
    endpoints.iter().map(|endpoint| format!("{}:{}", endpoint.address, endpoint.port)).collect()
}

fn key(name: &str) -> ServiceKey {
    ServiceKey { namespace: "default".into(), name: name.into() }
}

fn keys(names: &[&str]) -> BTreeSet<ServiceKey> {
    names.iter().map(|name| key(name)).collect()
}

/// An object from its fields in YAML. Labels in `fields` (as `metadata:`) take the place of those given.
fn yaml<T: serde::de::DeserializeOwned>(fields: &str, name: &str, labels: &[(&str, &str)]) -> T {
    let mut object: serde_json::Value = serde_saphyr::from_str(fields).expect("the test's YAML is sound");
    let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
    let metadata = object.as_object_mut().expect("a mapping").entry("metadata").or_insert(serde_json::json!({}));
    metadata["name"] = name.into();
    if metadata.get("labels").is_none() {
        metadata["labels"] = serde_json::json!(labels);
    }
    serde_json::from_value(object).expect("the test's object is sound")
}
