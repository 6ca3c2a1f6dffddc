//! The objects of a cluster, as an API server holds them, and how this node is set up.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;

/// Name of the node that packets arrive at.
pub const THIS_NODE: &str = "node-1";

/// Every object, by `namespace/name`, or by name where there is no namespace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Services.
    pub services: BTreeMap<String, Service>,
    /// EndpointSlices.
    pub slices: BTreeMap<String, EndpointSlice>,
    /// Nodes.
    pub nodes: BTreeMap<String, Node>,
    /// ServiceCIDRs.
    pub service_cidrs: BTreeMap<String, ServiceCIDR>,
}

/// What the operator chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether spec.externalIPs are frontends.
    pub external_ips: bool,
    /// Where nodePorts are.
    pub node_ports: NodePorts,
    /// Every address of this node's interfaces.
    pub addresses: BTreeSet<IpAddr>,
}

/// Which addresses of this node serve nodePorts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePorts {
    /// InternalIPs of the Node object.
    Primary,
    /// Those of the interfaces that lie in this network: address and prefix length.
    Network(IpAddr, u8),
    /// Those of the interfaces.
    All,
}

/// `namespace/name`.
pub(super) fn key(metadata: &ObjectMeta) -> String {
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    format!("{namespace}/{}", metadata.name.as_deref().unwrap_or_default())
}

/// The value of a label.
pub(super) fn label<'a>(metadata: &'a ObjectMeta, label: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(label).map(String::as_str)
}

impl Cluster {
    /// Adds or replaces a Service.
    pub(super) fn put_service(&mut self, service: Service) {
        self.services.insert(key(&service.metadata), service);
    }

    /// Adds or replaces an EndpointSlice.
    pub(super) fn put_slice(&mut self, slice: EndpointSlice) {
        self.slices.insert(key(&slice.metadata), slice);
    }
}

/// As YAML that `sheave run --manifests` reads.
impl fmt::Display for Cluster {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn write(formatter: &mut fmt::Formatter<'_>, object: &impl Serialize) -> fmt::Result {
            let text = serde_saphyr::to_string(object).map_err(|_| fmt::Error)?;
            write!(formatter, "---\n{text}")
        }
        self.nodes.values().try_for_each(|node| write(formatter, node))?;
        self.service_cidrs.values().try_for_each(|cidr| write(formatter, cidr))?;
        self.services.values().try_for_each(|service| write(formatter, service))?;
        self.slices.values().try_for_each(|slice| write(formatter, slice))
    }
}
