//! A cluster of its own for each way to a backend, all of them there at the same time, so that they can be asked in turn.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::agent::Agent;
use sheave_tests::family::Family;
use sheave_tests::kube_proxy::{self, feed};
use sheave_tests::manifests::Manifests;
use sheave_tests::process::Process;
use sheave_tests::topology::{CLIENT, Cluster, NodeNetwork, Pod, PodNetwork, Shape};

use super::server::{BULK, Server, TCP, UDP};
use super::services;
use super::traffic::{Arguments, Kind, Sample};

/// Most bytes that a connection's socket buffers hold at both ends (net.ipv4.tcp_wmem, tcp_rmem).
const BUFFERS: u64 = 16 << 20;

/// What lies between client and backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The client knows the pod's address; routed.
    Direct,
    /// The same with connection tracking.
    DirectTracked,
    /// kube-proxy's iptables rules.
    Iptables,
    /// kube-proxy's nftables rules.
    Nftables,
    /// Sheave's tc programs.
    SheaveTc,
    /// Sheave's tc programs past this node's stack (`--bypass-netfilter`).
    SheaveBypass,
    /// Sheave's connect-time programs for every pod (`--connect all`).
    SheaveConnect,
    /// The same for TCP alone (`--connect tcp`); datagrams meet the tc programs.
    SheaveConnectTcp,
    /// A process of the node itself knows the pod's address.
    HostDirect,
    /// It asks a service: Sheave's connect-time programs (`--connect host`).
    SheaveHost,
    /// A client outside knows the address of a pod on another node, and is routed there and back by this node.
    RemoteDirect,
    /// It asks this node's nodePort: kube-proxy's iptables rules, with SNAT.
    NodePortIptables,
    /// The same with its nftables rules.
    NodePortNftables,
    /// The same with Sheave's tc programs.
    NodePortTc,
    /// The same with its XDP program.
    NodePortXdp,
}

impl Way {
    /// As figures call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct | Self::RemoteDirect => "direct",
            Self::DirectTracked => "direct with conntrack",
            Self::Iptables | Self::NodePortIptables => "iptables",
            Self::Nftables | Self::NodePortNftables => "nftables",
            Self::SheaveTc | Self::NodePortTc => "sheave tc",
            Self::SheaveBypass => "sheave bypass",
            Self::SheaveConnect => "sheave connect all",
            Self::SheaveConnectTcp => "sheave connect tcp",
            Self::HostDirect => "direct from the host",
            Self::SheaveHost => "sheave connect host",
            Self::NodePortXdp => "sheave xdp",
        }
    }

    /// `--connect` of the agent, where there is one.
    fn connect(self) -> Option<&'static str> {
        match self {
            Self::SheaveTc | Self::SheaveBypass | Self::NodePortTc | Self::NodePortXdp => Some("off"),
            Self::SheaveConnect => Some("all"),
            Self::SheaveConnectTcp => Some("tcp"),
            Self::SheaveHost => Some("host"),
            _ => None,
        }
    }

    /// Whether the client is outside and the backend on the other node.
    fn is_remote(self) -> bool {
        matches!(
            self,
            Self::RemoteDirect | Self::NodePortIptables | Self::NodePortNftables | Self::NodePortTc | Self::NodePortXdp
        )
    }
}

/// One of them, running. Dropped in this order.
#[derive(Debug)]
pub(crate) struct Variant {
    /// Which.
    pub(crate) way: Way,
    agent: Option<Agent>,
    _manifests: Option<Manifests>,
    server: Server,
    cluster: Cluster,
}

impl Variant {
    /// Builds the cluster and what lies in between, for so many services.
    pub(crate) fn start(way: Way, services: u32) -> Result<Self> {
        Self::build(way, services).with_context(|| format!("{} with {services} services", way.name()))
    }

    fn build(way: Way, services: u32) -> Result<Self> {
        let remote = way.is_remote();
        let pod_counts = if remote { [0, 1] } else { [2, 0] };
        // All that are compared have the same wires.
        let shape = Shape { pods: PodNetwork::Routed, nodes: NodeNetwork::Plain, pod_counts, xdp: remote };
        let cluster = Cluster::build(shape)?;
        let (node, backend) = (&cluster.nodes[0], backend(&cluster, way));
        let server = Server::start(&backend.namespace, &backend.name)?;
        let (mut agent, mut manifests) = (None, None);
        if remote {
            // This node sends everything back where it came from, and means it.
            for interface in ["all", "eth0"] {
                node.namespace.sysctl(&format!("ipv4/conf/{interface}/send_redirects"), "0")?;
            }
        }
        match way {
            Way::Direct | Way::HostDirect => {}
            Way::DirectTracked => {
                let rules = "table ip tracked { chain forward { type filter hook forward priority filter; ct state invalid drop; }\n}";
                feed(&node.namespace, "nft", &["-f", "-"], rules)?;
            }
            Way::Iptables | Way::NodePortIptables => {
                let ruleset = services::ruleset(services, backend.address);
                feed(&node.namespace, "iptables-restore", &[], &kube_proxy::iptables(Family::V4, &ruleset))?;
            }
            Way::Nftables | Way::NodePortNftables => {
                let ruleset = services::ruleset(services, backend.address);
                let rules = kube_proxy::nftables(Family::V4, &ruleset, node.address.into());
                feed(&node.namespace, "nft", &["-f", "-"], &rules)?;
            }
            Way::RemoteDirect => {
                cluster.client.ip(&[format!("route add {}/32 via {}", backend.address, node.address)])?;
                let back = format!("route add {CLIENT}/32 via {}", node.address);
                cluster.nodes[1].namespace.ip(&[back])?;
            }
            Way::SheaveTc
            | Way::SheaveBypass
            | Way::SheaveConnect
            | Way::SheaveConnectTcp
            | Way::SheaveHost
            | Way::NodePortTc
            | Way::NodePortXdp => {
                let folder = Manifests::for_node(node)?;
                folder.objects("services", &services::objects(services, backend.address, &backend.node))?;
                let connect = way.connect().context("a way with an agent")?;
                let xdp = if way == Way::NodePortXdp { "native" } else { "off" };
                let mut arguments = vec![
                    "--xdp",
                    xdp,
                    "--connect",
                    connect,
                    "--healthz-bind-address",
                    "",
                    "--metrics-bind-address",
                    "",
                ];
                arguments.extend((way == Way::SheaveBypass).then_some("--bypass-netfilter"));
                agent = Some(Agent::start(node, &folder, &arguments)?);
                manifests = Some(folder);
            }
        }
        Ok(Self { way, agent, _manifests: manifests, server, cluster })
    }

    /// Where a service's port is asked for.
    fn target(&self, service: u32, port: u16) -> SocketAddr {
        match self.way {
            Way::Direct | Way::DirectTracked | Way::RemoteDirect | Way::HostDirect => {
                (backend(&self.cluster, self.way).address, port).into()
            }
            way if way.is_remote() => (self.cluster.nodes[0].address, services::node_port(port)).into(),
            _ => (services::address(service), port).into(),
        }
    }

    /// A client's command: in the first pod, on the node or outside, and in the agent's cgroup where the programs there are
    /// what is measured.
    fn client(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let node = &self.cluster.nodes[0];
        let namespace = match self.way {
            Way::HostDirect | Way::SheaveHost => &node.namespace,
            way if way.is_remote() => &self.cluster.client,
            _ => &node.pods[0].namespace,
        };
        match &self.agent {
            Some(agent) if self.way.connect() != Some("off") => agent.bystander_command(namespace, program),
            _ => namespace.command(program),
        }
    }

    /// Lets a client ask one service for some time, or with `spread` so many in random order.
    pub(crate) fn ask(&self, kind: Kind, service: u32, spread: Option<u32>, length: Duration) -> Result<Sample> {
        let port = if kind == Kind::Datagrams { UDP } else { TCP };
        let target = self.target(service, port);
        let backend = &backend(&self.cluster, self.way).name;
        let mut command = self.client(std::env::current_exe()?);
        command.args(Arguments::line(kind, target, backend, length));
        if let Some(services) = spread {
            command.args(["--services", &services.to_string()]);
        }
        let before = self.server.datagrams();
        let output = Process::start("client", &mut command)?.finish(length * 2 + Duration::from_secs(20));
        let output = output.with_context(|| format!("{} to {target}", self.way.name()))?;
        let mut sample: Sample = serde_json::from_str(&output).with_context(|| format!("a client printed {output}"))?;
        if kind == Kind::Datagrams {
            // What counts is what arrives; its last datagrams are in the server's buffers at most.
            sample.events = self.server.datagrams() - before;
        }
        ensure!(sample.events > 0, "{} moved nothing", self.way.name());
        Ok(sample)
    }

    /// Moves bytes with iperf3 and returns the bits per second that arrived.
    pub(crate) fn bulk(&self, bytes: u64) -> Result<f64> {
        let target = self.target(0, BULK);
        let (target, port) = (target.ip().to_string(), target.port().to_string());
        let mut command = self.client("iperf3");
        command.args(["-c", &target, "-p", &port, "-n", &bytes.to_string(), "--json"]);
        let output = Process::start("iperf3 -c", &mut command)?.finish(Duration::from_secs(120))?;
        let report: serde_json::Value = serde_json::from_str(&output).context("iperf3's report")?;
        let received = &report["end"]["sum_received"];
        let arrived = received["bytes"].as_u64().context("iperf3's report has no sum_received")?;
        // What is still in socket buffers when the client ends is not counted.
        ensure!(arrived + BUFFERS >= bytes, "{arrived} of {bytes} bytes arrived");
        received["bits_per_second"].as_f64().context("iperf3's report has no rate")
    }
}

/// The pod that answers.
fn backend(cluster: &Cluster, way: Way) -> &Pod {
    if way.is_remote() { &cluster.nodes[1].pods[0] } else { &cluster.nodes[0].pods[1] }
}
