//! A small dual-stack cluster made of network namespaces.
//!
//! ```text
//!   client ──┐    192.168.50.100                          fd00:50::100
//!            lan (a switch; 192.168.50.254 and fd00:50::fe are everyone's default gateways)
//!   node-1 ──┤    192.168.50.1, pods 10.244.1.0/24        fd00:50::1, pods fd00:10:244:1::/64
//!   node-2 ──┘    192.168.50.2, pods 10.244.2.0/24        fd00:50::2, pods fd00:10:244:2::/64
//! ```
//!
//! Pods hang on a bridge (as with flannel or the bridge plugin) or on one routed veth each (as with Calico); the nodes
//! reach each other's pods by plain routes or through VXLAN as flannel builds it, one device for each family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};

use crate::family::Family;
use crate::netns::Namespace;
use crate::wire::{self, XdpPass};

/// How pods are connected to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// All pods of a node on the bridge `cni0`.
    Bridged,
    /// A veth and a host route of each family; the gateway is 169.254.1.1, answered by proxy ARP, or the veth's link-local
    /// address.
    Routed,
}

/// How a node reaches the other's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeNetwork {
    /// By a route over the uplink.
    Plain,
    /// Through the VXLAN devices `flannel.1` and, for IPv6, `flannel-v6.1`.
    Vxlan,
}

/// What a cluster looks like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How pods are connected.
    pub pods: PodNetwork,
    /// How nodes are connected.
    pub nodes: NodeNetwork,
    /// Pods on node 1 and on node 2.
    pub pod_counts: [u8; 2],
    /// The uplinks are fit for native XDP (see [`wire`]); otherwise they keep all their offloads.
    pub xdp: bool,
}

impl Default for Shape {
    /// Bridged pods, plain routes, four pods and then one on the second node.
    fn default() -> Self {
        Self { pods: PodNetwork::Bridged, nodes: NodeNetwork::Plain, pod_counts: [4, 1], xdp: false }
    }
}

/// A cluster of two nodes, and a client outside.
#[derive(Debug)]
pub struct Cluster {
    /// The switch between the nodes.
    pub lan: Namespace,
    /// The client, at [`CLIENT`] and [`CLIENT6`].
    pub client: Namespace,
    /// `node-1` and `node-2`.
    pub nodes: Vec<Node>,
    _wires: Vec<XdpPass>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// `node-1`
    pub name: String,
    /// Its network namespace.
    pub namespace: Namespace,
    /// Its address on the LAN.
    pub address: Ipv4Addr,
    /// Its IPv6 address on the LAN.
    pub address6: Ipv6Addr,
    /// Its pods.
    pub pods: Vec<Pod>,
    number: u8,
    shape: Shape,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    /// `pod-1-2`: the second pod of the first node.
    pub name: String,
    /// Its network namespace.
    pub namespace: Namespace,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address6: Ipv6Addr,
    /// The node that it is on.
    pub node: String,
    /// Host side of its veth, in the node's namespace.
    pub host_link: String,
}

/// The client's address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 100);
/// The client's IPv6 address.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 0x100);
/// Where the tests' ClusterIPs come from; the client has a route to them through node 1.
pub const SERVICE_NETWORK: &str = "10.96.0.0/16";
/// The same for IPv6.
pub const SERVICE_NETWORK6: &str = "fd00:10:96::/112";

/// The client's address of a family.
#[must_use]
pub fn client_address(family: Family) -> IpAddr {
    family.pick(CLIENT, CLIENT6)
}

impl Cluster {
    /// Builds one.
    ///
    /// # Errors
    /// Whatever `ip` complains of.
    pub fn build(shape: Shape) -> Result<Self> {
        let lan = namespace("lan")?;
        lan.ip(&[
            "link add switch type bridge",
            "address add 192.168.50.254/24 dev switch",
            "address add fd00:50::fe/64 dev switch",
            "link set switch up",
        ])?;
        let client = namespace("client")?;
        connect(&lan, "client", &client)?;
        client.ip(&[
            format!("address add {CLIENT}/24 dev eth0"),
            format!("address add {CLIENT6}/64 dev eth0"),
            format!("route add {SERVICE_NETWORK} via 192.168.50.1"),
            format!("route add {SERVICE_NETWORK6} via fd00:50::1"),
        ])?;
        plenty_of_ports(&client)?;
        let mut nodes = Vec::new();
        for number in [1, 2] {
            nodes.push(Node::build(&lan, number, shape)?);
        }
        let mut wires = Vec::new();
        if shape.xdp {
            for (namespace, port) in
                [(&client, "client"), (&nodes[0].namespace, "node-1"), (&nodes[1].namespace, "node-2")]
            {
                wire::disable_checksum_offload(namespace, "eth0")?;
                wire::disable_checksum_offload(&lan, port)?;
                wires.push(XdpPass::attach(&lan, port)?);
            }
        }
        Ok(Self { lan, client, nodes, _wires: wires })
    }

    /// Every namespace.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        let nodes = self.nodes.iter();
        let nodes =
            nodes.flat_map(|node| std::iter::once(&node.namespace).chain(node.pods.iter().map(|pod| &pod.namespace)));
        [&self.lan, &self.client].into_iter().chain(nodes)
    }

    /// Packets with a wrong checksum that any namespace has received.
    ///
    /// # Errors
    /// If a counter can't be read.
    pub fn checksum_errors(&self) -> Result<u64> {
        self.namespaces().map(Namespace::checksum_errors).sum()
    }
}

/// A namespace whose IPv6 addresses may be used at once: nobody else on these links could have them, so there is nothing
/// to wait for.
fn namespace(name: &str) -> Result<Namespace> {
    let namespace = Namespace::new(name)?;
    namespace.sysctl("ipv6/conf/default/accept_dad", "0")?;
    namespace.sysctl("ipv6/conf/default/accept_ra", "0")?;
    Ok(namespace)
}

/// Lets a client open tens of thousands of connections to one address: without reuse, the kernel searches longer and longer
/// for a port that no TIME_WAIT holds.
fn plenty_of_ports(namespace: &Namespace) -> Result<()> {
    namespace.sysctl("ipv4/ip_local_port_range", "1024 65535")?;
    namespace.sysctl("ipv4/tcp_tw_reuse", "1")
}

/// A veth from the switch's port to the other namespace's `eth0`.
fn connect(lan: &Namespace, port: &str, to: &Namespace) -> Result<()> {
    lan.ip(&[
        format!("link add {port} type veth peer name eth0 netns {}", to.path()),
        format!("link set {port} master switch up"),
    ])?;
    to.ip(&["link set eth0 up"])
}

impl Node {
    fn build(lan: &Namespace, number: u8, shape: Shape) -> Result<Self> {
        let name = format!("node-{number}");
        let namespace = namespace(&name)?;
        connect(lan, &name, &namespace)?;
        let other = 3 - number;
        namespace.ip(&[
            format!("address add 192.168.50.{number}/24 dev eth0"),
            format!("address add fd00:50::{number}/64 dev eth0"),
            "route add default via 192.168.50.254".into(),
            "route add default via fd00:50::fe".into(),
        ])?;
        namespace.sysctl("ipv4/ip_forward", "1")?;
        namespace.sysctl("ipv6/conf/all/forwarding", "1")?;
        match shape.nodes {
            NodeNetwork::Plain => {
                namespace.ip(&[
                    format!("route add 10.244.{other}.0/24 via 192.168.50.{other}"),
                    format!("route add fd00:10:244:{other}::/64 via fd00:50::{other}"),
                ])?;
            }
            NodeNetwork::Vxlan => {
                for family in Family::BOTH {
                    vxlan(&namespace, family, number, other)?;
                }
            }
        }
        if shape.pods == PodNetwork::Bridged {
            namespace.ip(&[
                // With an address of its own, as CNI plugins do it. Otherwise it has the lowest of its ports', and pods would
                // lose their gateway whenever a port with a lower one comes or goes.
                format!("link add cni0 address 0a:58:0a:f4:{number:02x}:01 mtu {} type bridge", shape.pod_mtu()),
                format!("address add 10.244.{number}.1/24 dev cni0"),
                format!("address add fd00:10:244:{number}::1/64 dev cni0"),
                "link set cni0 up".into(),
            ])?;
        }
        let address = Ipv4Addr::new(192, 168, 50, number);
        let address6 = Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, u16::from(number));
        let mut node = Self { name, namespace, address, address6, pods: Vec::new(), number, shape };
        for _ in 0..shape.pod_counts[usize::from(number - 1)] {
            node.add_pod()?;
        }
        Ok(node)
    }

    /// Its address of a family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> IpAddr {
        family.pick(self.address, self.address6)
    }

    /// Adds a pod, as a CNI would.
    ///
    /// # Errors
    /// Whatever `ip` complains of.
    pub fn add_pod(&mut self) -> Result<&Pod> {
        let count = u8::try_from(self.pods.len() + 1)?;
        let pod = self.make_pod(count, None)?;
        self.pods.push(pod);
        self.pods.last().context("a pod was just added")
    }

    fn make_pod(&self, count: u8, index: Option<u32>) -> Result<Pod> {
        let (number, mtu) = (self.number, self.shape.pod_mtu());
        let index = index.map(|index| format!("index {index}")).unwrap_or_default();
        let name = format!("pod-{number}-{count}");
        let host_link = match self.shape.pods {
            PodNetwork::Bridged => format!("veth{count}"),
            PodNetwork::Routed => format!("cali{count}"),
        };
        let address = Ipv4Addr::new(10, 244, number, count + 1);
        let address6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(number), 0, 0, 0, u16::from(count) + 1);
        // By the IP address, as CNI plugins do it: a pod that takes over an address is known to its neighbours at once.
        let hardware_address = format!("0a:58:0a:f4:{number:02x}:{:02x}", count + 1);
        let namespace = namespace(&name)?;
        self.namespace.ip(&[
            format!(
                "link add {host_link} {index} mtu {mtu} type veth peer name eth0 address {hardware_address} mtu {mtu} netns {}",
                namespace.path()
            ),
            format!("link set {host_link} up"),
        ])?;
        match self.shape.pods {
            PodNetwork::Bridged => {
                self.namespace.ip(&[format!("link set {host_link} master cni0")])?;
                namespace.ip(&[
                    format!("address add {address}/24 dev eth0"),
                    format!("address add {address6}/64 dev eth0"),
                    "link set eth0 up".into(),
                    format!("route add default via 10.244.{number}.1"),
                    format!("route add default via fd00:10:244:{number}::1"),
                ])?;
            }
            PodNetwork::Routed => {
                self.namespace.sysctl(&format!("ipv4/conf/{host_link}/proxy_arp"), "1")?;
                self.namespace.sysctl(&format!("ipv4/neigh/{host_link}/proxy_delay"), "0")?;
                self.namespace.ip(&[
                    format!("route add {address}/32 dev {host_link} scope link"),
                    format!("address add {LINK_LOCAL_GATEWAY}/64 dev {host_link}"),
                    format!("route add {address6}/128 dev {host_link}"),
                ])?;
                namespace.ip(&[
                    format!("address add {address}/32 dev eth0"),
                    format!("address add {address6}/128 dev eth0"),
                    "link set eth0 up".into(),
                    "route add 169.254.1.1 dev eth0 scope link".into(),
                    "route add default via 169.254.1.1 dev eth0".into(),
                    format!("route add default via {LINK_LOCAL_GATEWAY} dev eth0"),
                ])?;
            }
        }
        plenty_of_ports(&namespace)?;
        Ok(Pod { name, namespace, address, address6, node: self.name.clone(), host_link })
    }

    /// Takes the first pod away and makes a new one with its address and its interface index.
    ///
    /// # Errors
    /// Whatever `ip` complains of.
    pub fn replace_first_pod(&mut self, index: u32) -> Result<()> {
        self.namespace.ip(&[format!("link delete {}", self.pods[0].host_link)])?;
        self.pods[0] = self.make_pod(1, Some(index))?;
        Ok(())
    }

    /// Takes the last pod away, with its interface.
    ///
    /// # Errors
    /// Whatever `ip` complains of, or if there is no pod.
    pub fn remove_last_pod(&mut self) -> Result<()> {
        let pod = self.pods.pop().context("no pod to take away")?;
        self.namespace.ip(&[format!("link delete {}", pod.host_link)])
    }

    /// The index of an interface in the node's namespace.
    ///
    /// # Errors
    /// If there is no such interface.
    pub fn link_index(&self, link: &str) -> Result<u32> {
        let text = self.namespace.output("ip", &["-oneline", "link", "show", "dev", link])?;
        text.split(':').next().and_then(|index| index.trim().parse().ok()).context("ip showed no index")
    }
}

impl Pod {
    /// Its address of a family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> IpAddr {
        family.pick(self.address, self.address6)
    }
}

impl Shape {
    /// VXLAN takes 50 bytes of every packet, and 70 where it goes over IPv6.
    fn pod_mtu(&self) -> u16 {
        match self.nodes {
            NodeNetwork::Plain => 1500,
            NodeNetwork::Vxlan => 1430,
        }
    }
}

/// The gateway of routed pods, on the host side of each one's veth.
const LINK_LOCAL_GATEWAY: &str = "fe80::ecee:eeff:feee:eeee";

/// The tunnel from node `number` to the pods of `other`.
fn vxlan(namespace: &Namespace, family: Family, number: u8, other: u8) -> Result<()> {
    let device = match family {
        Family::V4 => "flannel.1",
        Family::V6 => "flannel-v6.1",
    };
    let node = |number: u8| match family {
        Family::V4 => format!("192.168.50.{number}"),
        Family::V6 => format!("fd00:50::{number}"),
    };
    let subnet = |number: u8| match family {
        Family::V4 => (format!("10.244.{number}.0"), 24, 32),
        Family::V6 => (format!("fd00:10:244:{number}::"), 64, 128),
    };
    let mac = |node: u8| format!("02:00:00:00:f{}:{node:02x}", if family == Family::V4 { 'a' } else { 'b' });
    let ((own, _, host), (there, length, _)) = (subnet(number), subnet(other));
    namespace.ip(&[
        format!("link add {device} type vxlan id 1 dev eth0 local {} dstport 8472 nolearning", node(number)),
        format!("link set {device} address {}", mac(number)),
        format!("address add {own}/{host} dev {device}"),
        format!("link set {device} up"),
        format!("route add {there}/{length} via {there} dev {device} onlink"),
        format!("neighbour add {there} lladdr {} dev {device} nud permanent", mac(other)),
    ])?;
    namespace.bridge(&[format!("fdb append {} dev {device} dst {}", mac(other), node(other))])
}
