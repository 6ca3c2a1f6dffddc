//! Everything that a running Sheave can be told, as plain values: `cli` fills it from flags and environment variables,
//! tests build it directly.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use sheave_common::config::Timeouts;

use crate::model::desired::Algorithm;

/// What `sheave run` was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunConfig {
    /// Where Services, EndpointSlices, this Node and ServiceCIDRs come from.
    pub source: SourceConfig,
    /// Name of this node: whose endpoints are local, and which Node object is ours.
    pub node_name: String,
    /// Directory of the pins, on a BPF file system.
    pub pin_path: PathBuf,
    /// Cgroup v2 directory whose processes are balanced at connect time; the hierarchy's root if absent.
    pub cgroup: Option<PathBuf>,
    /// Which processes are balanced at connect time.
    pub connect: ConnectMode,
    /// How XDP is used on uplinks.
    pub xdp: XdpMode,
    /// Which interfaces are what, where detection is not wanted.
    pub interfaces: InterfaceRules,
    /// Which node addresses serve nodePorts.
    pub nodeport_addresses: NodePortAddresses,
    /// Which of spec.externalIPs are frontends.
    pub external_ips: ExternalIps,
    /// How backends are chosen where a Service does not say.
    pub algorithm: Algorithm,
    /// Source of a pod's packets to itself.
    pub hairpin4: Ipv4Addr,
    /// The same for IPv6.
    pub hairpin6: Ipv6Addr,
    /// Idle time-outs of flows.
    pub timeouts: Timeouts,
    /// Source ports for SNAT, inclusive.
    pub snat_ports: (u16, u16),
    /// Rejects and resets that one CPU may send in a second.
    pub rejects_per_second: u32,
    /// When TCP connections that another proxy translates are left to it.
    pub drain_foreign: DrainForeign,
    /// Take no new connections, and leave this node when the last one has ended, or after this time.
    pub drain: Option<Duration>,
    /// Whether traffic to pods of this node bypasses netfilter.
    pub bypass_netfilter: Bypass,
    /// Whether a SYN that is sent again, because nothing has answered it, goes to another backend.
    pub syn_failover: bool,
    /// Where `/healthz` and `/livez` are served.
    pub healthz: BindAddresses,
    /// Where `/metrics` is served.
    pub metrics: BindAddresses,
    /// How often what the kernel holds is compared with what was written there; never if absent.
    pub audit_period: Option<Duration>,
    /// How long a change may wait until this proxy calls itself unhealthy.
    pub health_timeout: Duration,
    /// Sizes of the maps.
    pub sizes: MapSizes,
}

/// Addresses and ports that something is served on; none turns it off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BindAddresses(pub Vec<SocketAddr>);

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// A folder of YAML files.
    Manifests(PathBuf),
    /// A Kubernetes API server.
    Kubernetes {
        /// Path of a kubeconfig; without one, $KUBECONFIG, ~/.kube/config or the in-cluster service account.
        kubeconfig: Option<PathBuf>,
        /// Addresses of API servers that replace the one configured, tried in turn.
        api_servers: Vec<String>,
    },
}

/// Which processes are balanced at connect time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectMode {
    /// Processes in the network namespace that Sheave runs in.
    Host,
    /// Those, and TCP of every process below the cgroup.
    Tcp,
    /// Every process below the cgroup.
    All,
    /// None.
    Off,
}

/// When mid-flow TCP to a frontend that no flow knows is passed instead of reset, because another proxy translates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainForeign {
    /// While kube-proxy's rules are there, or connections that netfilter translates to a frontend.
    Auto,
    /// Always.
    On,
    /// For so long.
    For(Duration),
    /// Never.
    Off,
}

/// Whether traffic to pods of this node bypasses netfilter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bypass {
    /// It does not.
    Off,
    /// It does; refused where that would skip rules.
    Safe,
    /// It does, whatever rules there are.
    Force,
}

/// How XDP is used on uplinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// Native, on physical uplinks whose driver has it.
    Auto,
    /// Native, on all uplinks; failing is an error.
    Native,
    /// The kernel's generic XDP on all uplinks.
    Generic,
    /// Not at all.
    Off,
}

/// Interface name patterns (`*` matches any run of characters) that override detection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceRules {
    /// Host sides of pods' veths.
    pub pods: Vec<String>,
    /// Uplinks.
    pub uplinks: Vec<String>,
    /// Tunnels.
    pub tunnels: Vec<String>,
    /// Interfaces to leave alone.
    pub ignored: Vec<String>,
}

/// Which node addresses serve nodePorts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Node.status InternalIP, per family.
    Primary,
    /// Every address of this node that lies in one of these networks: (address, prefix length).
    Networks(Vec<(std::net::IpAddr, u8)>),
    /// Every address of this node.
    All,
}

/// Which of spec.externalIPs Services may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExternalIps {
    /// None.
    None,
    /// Those in one of these networks: (address, prefix length).
    Networks(Vec<(std::net::IpAddr, u8)>),
    /// All.
    All,
}

/// Maximum entries of the maps that grow with the cluster or with traffic. `None`: those of the map that is pinned, or else
/// what this machine's memory allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapSizes {
    /// Service ports: names and counters.
    pub services: Option<u32>,
    /// Frontends, per family.
    pub frontends: Option<u32>,
    /// Backends, per family.
    pub backends: Option<u32>,
    /// Elements of the backend table.
    pub table: Option<u32>,
    /// Flows, two entries each, per family.
    pub conntrack: Option<u32>,
    /// Half-open flows, two entries each, per family.
    pub half_open: Option<u32>,
    /// Clients with session affinity, per family, and as many newcomers.
    pub affinity: Option<u32>,
    /// Sockets balanced at connect time, per family.
    pub sockets: Option<u32>,
    /// Entries of loadBalancerSourceRanges, one for each port of their Services, per family.
    pub source_ranges: Option<u32>,
}

/// kube-proxy's ports.
pub const HEALTHZ_PORT: u16 = 10_256;
/// See [`HEALTHZ_PORT`].
pub const METRICS_PORT: u16 = 10_249;
/// See [`RunConfig::audit_period`].
const AUDIT_PERIOD: Duration = Duration::from_secs(60);
/// What failed is tried again at least every 30 seconds: this leaves it several attempts.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(120);

impl RunConfig {
    /// The defaults of `sheave run` for a source and a node.
    #[must_use]
    pub fn new(source: SourceConfig, node_name: String) -> Self {
        Self {
            source,
            node_name,
            pin_path: PathBuf::from("/sys/fs/bpf/sheave"),
            cgroup: None,
            connect: ConnectMode::Host,
            xdp: XdpMode::Auto,
            interfaces: InterfaceRules::default(),
            nodeport_addresses: NodePortAddresses::Primary,
            external_ips: ExternalIps::All,
            algorithm: Algorithm::Random,
            hairpin4: Ipv4Addr::new(169, 254, 42, 1),
            hairpin6: Ipv6Addr::new(0xfd53, 0x6865, 0x6176, 0x6500, 0, 0, 0, 1),
            timeouts: Timeouts::DEFAULT,
            snat_ports: (10_000, 29_999),
            rejects_per_second: 1_000,
            drain_foreign: DrainForeign::Auto,
            drain: None,
            bypass_netfilter: Bypass::Off,
            syn_failover: true,
            healthz: BindAddresses(vec![
                (Ipv4Addr::UNSPECIFIED, HEALTHZ_PORT).into(),
                (Ipv6Addr::UNSPECIFIED, HEALTHZ_PORT).into(),
            ]),
            metrics: BindAddresses(vec![(Ipv4Addr::LOCALHOST, METRICS_PORT).into()]),
            audit_period: Some(AUDIT_PERIOD),
            health_timeout: HEALTH_TIMEOUT,
            sizes: MapSizes::default(),
        }
    }
}
