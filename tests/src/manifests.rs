//! Manifests for `sheave run --manifests`: a folder of YAML, one file per Service with its EndpointSlices.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::family::Family;
use crate::kube_proxy;
use crate::topology::{Node, Pod};

/// A folder of manifests, removed on drop.
#[derive(Debug)]
pub struct Manifests {
    folder: PathBuf,
    staging: PathBuf,
}

/// A Service in the namespace `default`, of one family or of both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    name: String,
    cluster_ips: Vec<IpAddr>,
    ports: Vec<Port>,
    affinity_seconds: Option<u32>,
    external_local: bool,
    node_ports: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
    name: String,
    protocol: &'static str,
    port: u16,
    target: u16,
    target_name: Option<String>,
    node_port: Option<u16>,
}

/// An endpoint of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address, which says into which family's slice it goes.
    pub address: IpAddr,
    /// The node that it is on.
    pub node: String,
    /// condition ready
    pub ready: bool,
    /// condition serving
    pub serving: bool,
    /// condition terminating
    pub terminating: bool,
}

impl From<&Pod> for Endpoint {
    fn from(pod: &Pod) -> Self {
        Self::of(pod, Family::V4)
    }
}

impl Endpoint {
    /// A pod's address of a family, ready.
    #[must_use]
    pub fn of(pod: &Pod, family: Family) -> Self {
        let (address, node) = (pod.address_of(family), pod.node.clone());
        Self { address, node, ready: true, serving: true, terminating: false }
    }
}

impl Service {
    /// A ClusterIP Service without ports yet, of its address's family.
    #[must_use]
    pub fn new(name: &str, cluster_ip: impl Into<IpAddr>) -> Self {
        Self {
            name: name.into(),
            cluster_ips: vec![cluster_ip.into()],
            ports: Vec::new(),
            affinity_seconds: None,
            external_local: false,
            node_ports: false,
        }
    }

    /// Gives it a ClusterIP of the other family as well.
    #[must_use]
    pub fn and(mut self, cluster_ip: impl Into<IpAddr>) -> Self {
        self.cluster_ips.push(cluster_ip.into());
        self
    }

    /// Its ClusterIPs, the primary one first.
    #[must_use]
    pub fn cluster_ips(&self) -> &[IpAddr] {
        &self.cluster_ips
    }

    /// Its families, the primary one first.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        self.cluster_ips.iter().map(|address| Family::of(*address))
    }

    /// Endpoints of all its families for these pods.
    #[must_use]
    pub fn endpoints<'a>(&self, pods: impl IntoIterator<Item = &'a Pod>) -> Vec<Endpoint> {
        pods.into_iter().flat_map(|pod| self.families().map(move |family| Endpoint::of(pod, family))).collect()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The nodePort of each of its ports, where one is asked for.
    #[must_use]
    pub fn node_ports(&self) -> Vec<Option<u16>> {
        self.ports.iter().map(|port| port.node_port).collect()
    }

    /// `default/name`, as Sheave writes it.
    #[must_use]
    pub fn id(&self) -> String {
        format!("default/{}", self.name)
    }

    /// Adds a TCP port.
    #[must_use]
    pub fn tcp(self, name: &str, port: u16, target: u16) -> Self {
        self.port(name, "TCP", port, target)
    }

    /// Adds a UDP port.
    #[must_use]
    pub fn udp(self, name: &str, port: u16, target: u16) -> Self {
        self.port(name, "UDP", port, target)
    }

    fn port(mut self, name: &str, protocol: &'static str, port: u16, target: u16) -> Self {
        self.ports.push(Port { name: name.into(), protocol, port, target, target_name: None, node_port: None });
        self
    }

    /// Gives the last port a nodePort.
    #[must_use]
    pub fn node_port(mut self, node_port: u16) -> Self {
        self.node_ports = true;
        if let Some(port) = self.ports.last_mut() {
            port.node_port = Some(node_port);
        }
        self
    }

    /// Makes the last port's targetPort a name.
    #[must_use]
    pub fn target_name(mut self, name: &str) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.target_name = Some(name.into());
        }
        self
    }

    /// sessionAffinity: ClientIP.
    #[must_use]
    pub fn affinity(mut self, seconds: u32) -> Self {
        self.affinity_seconds = Some(seconds);
        self
    }

    /// externalTrafficPolicy: Local.
    #[must_use]
    pub fn external_local(mut self) -> Self {
        self.external_local = true;
        self
    }

    /// Its ports of a family as kube-proxy would have netfilter serve them, to these pods.
    pub fn ruleset<'a>(&self, family: Family, pods: impl IntoIterator<Item = &'a Pod>) -> Vec<kube_proxy::Port> {
        let pods: Vec<IpAddr> = pods.into_iter().map(|pod| pod.address_of(family)).collect();
        let addresses = self.cluster_ips.iter().filter(|address| Family::of(**address) == family);
        let ports = addresses.flat_map(|address| self.ports.iter().map(move |port| (*address, port)));
        let ports = ports.map(|(address, port)| kube_proxy::Port {
            name: format!("{}-{}", self.name, port.name),
            at: (address, port.port).into(),
            protocol: if port.protocol == "TCP" { "tcp" } else { "udp" },
            node_port: port.node_port,
            endpoints: pods.iter().map(|pod| (*pod, port.target).into()).collect(),
        });
        ports.collect()
    }

    /// The Service and its EndpointSlices as YAML.
    #[must_use]
    pub fn yaml(&self, endpoints: &[Endpoint]) -> String {
        let mut text = self.service_yaml();
        for slice in self.slices_yaml(endpoints) {
            text.push_str("---\n");
            text.push_str(&slice);
        }
        text
    }

    pub(crate) fn service_yaml(&self) -> String {
        let (name, address) = (&self.name, self.cluster_ips[0]);
        let kind = if self.node_ports { "NodePort" } else { "ClusterIP" };
        let addresses: Vec<String> = self.cluster_ips.iter().copied().map(yaml_address).collect();
        let families: Vec<String> = self.families().map(|family| family.to_string()).collect();
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  type: {kind}\n  \
             clusterIP: {address}\n  clusterIPs: [{}]\n  ipFamilies: [{}]\n",
            addresses.join(", "),
            families.join(", ")
        );
        if self.cluster_ips.len() > 1 {
            text.push_str("  ipFamilyPolicy: RequireDualStack\n");
        }
        if let Some(seconds) = self.affinity_seconds {
            let _ = writeln!(
                text,
                "  sessionAffinity: ClientIP\n  sessionAffinityConfig:\n    clientIP:\n      timeoutSeconds: {seconds}"
            );
        }
        if self.external_local {
            text.push_str("  externalTrafficPolicy: Local\n");
        }
        text.push_str("  ports:\n");
        for port in &self.ports {
            let target = port.target_name.clone().unwrap_or_else(|| port.target.to_string());
            let _ = writeln!(
                text,
                "  - name: {}\n    protocol: {}\n    port: {}\n    targetPort: {target}",
                port.name, port.protocol, port.port
            );
            if let Some(node_port) = port.node_port {
                let _ = writeln!(text, "    nodePort: {node_port}");
            }
        }
        text
    }

    /// A slice for each family.
    pub(crate) fn slices_yaml(&self, endpoints: &[Endpoint]) -> Vec<String> {
        let of = |family: Family| endpoints.iter().filter(move |endpoint| Family::of(endpoint.address) == family);
        self.families().map(|family| self.slice_yaml(family, of(family))).collect()
    }

    fn slice_yaml<'a>(&self, family: Family, endpoints: impl Iterator<Item = &'a Endpoint>) -> String {
        let name = &self.name;
        // As the first slice of a Service has been called since there was one family.
        let number = if family == Family::V4 { 1 } else { 6 };
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{number}\n  namespace: default\n  \
             labels:\n    kubernetes.io/service-name: {name}\naddressType: {family}\nports:\n"
        );
        for port in &self.ports {
            let _ = writeln!(text, "- name: {}\n  protocol: {}\n  port: {}", port.name, port.protocol, port.target);
        }
        let mut endpoints = endpoints.peekable();
        if endpoints.peek().is_none() {
            text.push_str("endpoints: []\n");
            return text;
        }
        text.push_str("endpoints:\n");
        for endpoint in endpoints {
            let Endpoint { address, node, ready, serving, terminating } = endpoint;
            let _ = writeln!(
                text,
                "- addresses: [{}]\n  nodeName: {node}\n  conditions: {{ready: {ready}, serving: {serving}, \
                 terminating: {terminating}}}",
                yaml_address(*address)
            );
        }
        text
    }
}

/// An address in a flow sequence, where an IPv6 address must be quoted: colons are YAML's own there.
fn yaml_address(address: IpAddr) -> String {
    if address.is_ipv6() { format!("{:?}", address.to_string()) } else { address.to_string() }
}

impl Manifests {
    /// An empty folder.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn new() -> Result<Self> {
        let base = std::env::temp_dir().join(crate::leftovers::unique_name());
        let manifests = Self { folder: base.join("manifests"), staging: base.join("staging") };
        fs::create_dir_all(&manifests.folder).context("making the manifests' folder")?;
        fs::create_dir_all(&manifests.staging).context("making the manifests' folder")?;
        Ok(manifests)
    }

    /// A folder that describes a node.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn for_node(node: &Node) -> Result<Self> {
        let manifests = Self::new()?;
        manifests.node(&node.name, &[node.address.into(), node.address6.into()])?;
        Ok(manifests)
    }

    /// The folder's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Writes a Node with its InternalIPs.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn node(&self, name: &str, addresses: &[IpAddr]) -> Result<()> {
        let mut text = format!("apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nstatus:\n  addresses:\n");
        for address in addresses {
            let _ = writeln!(text, "  - type: InternalIP\n    address: {address}");
        }
        self.write(&format!("node-{name}.yaml"), &text)
    }

    /// Writes a Service and its endpoints, or replaces them.
    ///
    /// # Errors
    /// If they can't be written.
    pub fn service(&self, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
        self.write(&format!("{}.yaml", service.name), &service.yaml(endpoints))
    }

    /// Writes any file, at once and whole: it is moved into the folder.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let staged = self.staging.join(file);
        fs::write(&staged, text).with_context(|| format!("writing {}", staged.display()))?;
        fs::rename(&staged, self.folder.join(file)).with_context(|| format!("moving {}", staged.display()))
    }

    /// Removes a file.
    ///
    /// # Errors
    /// If it isn't there.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.folder.join(file)).with_context(|| format!("removing {file}"))
    }
}

impl Drop for Manifests {
    fn drop(&mut self) {
        if let Some(base) = self.folder.parent() {
            let _ = fs::remove_dir_all(base);
        }
    }
}
