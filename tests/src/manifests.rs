//! Manifests for `sheave run --manifests`: a folder of YAML, one file per Service with its EndpointSlice.

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::topology::{Node, Pod};

/// A folder of manifests, removed on drop.
#[derive(Debug)]
pub struct Manifests {
    folder: PathBuf,
    staging: PathBuf,
}

/// A Service in the namespace `default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    name: String,
    cluster_ip: Ipv4Addr,
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
    /// Its address.
    pub address: Ipv4Addr,
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
        Self { address: pod.address, node: pod.node.clone(), ready: true, serving: true, terminating: false }
    }
}

impl Service {
    /// A ClusterIP Service without ports yet.
    #[must_use]
    pub fn new(name: &str, cluster_ip: Ipv4Addr) -> Self {
        Self {
            name: name.into(),
            cluster_ip,
            ports: Vec::new(),
            affinity_seconds: None,
            external_local: false,
            node_ports: false,
        }
    }

    /// Its ClusterIP.
    #[must_use]
    pub fn cluster_ip(&self) -> Ipv4Addr {
        self.cluster_ip
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

    /// The Service and its EndpointSlice as YAML.
    #[must_use]
    pub fn yaml(&self, endpoints: &[Endpoint]) -> String {
        let mut text = self.service_yaml();
        text.push_str("---\n");
        text.push_str(&self.slice_yaml(endpoints));
        text
    }

    pub(crate) fn service_yaml(&self) -> String {
        let (name, address) = (&self.name, self.cluster_ip);
        let kind = if self.node_ports { "NodePort" } else { "ClusterIP" };
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  type: {kind}\n  \
             clusterIP: {address}\n  clusterIPs: [{address}]\n  ipFamilies: [IPv4]\n"
        );
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

    pub(crate) fn slice_yaml(&self, endpoints: &[Endpoint]) -> String {
        let name = &self.name;
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-1\n  namespace: default\n  \
             labels:\n    kubernetes.io/service-name: {name}\naddressType: IPv4\nports:\n"
        );
        for port in &self.ports {
            let _ = writeln!(text, "- name: {}\n  protocol: {}\n  port: {}", port.name, port.protocol, port.target);
        }
        if endpoints.is_empty() {
            text.push_str("endpoints: []\n");
            return text;
        }
        text.push_str("endpoints:\n");
        for endpoint in endpoints {
            let Endpoint { address, node, ready, serving, terminating } = endpoint;
            let _ = writeln!(
                text,
                "- addresses: [{address}]\n  nodeName: {node}\n  conditions: {{ready: {ready}, serving: {serving}, \
                 terminating: {terminating}}}"
            );
        }
        text
    }
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
        manifests.node(&node.name, node.address)?;
        Ok(manifests)
    }

    /// The folder's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Writes a Node.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn node(&self, name: &str, address: Ipv4Addr) -> Result<()> {
        self.write(
            &format!("node-{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nstatus:\n  addresses:\n  - type: InternalIP\n    \
                 address: {address}\n"
            ),
        )
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
