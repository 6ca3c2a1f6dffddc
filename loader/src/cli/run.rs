//! `sheave run`: every field of [`RunConfig`] as a flag and as an environment variable.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};
use sheave_common::config::Timeouts;

use super::values::{Drain, Period};
use super::{CliError, PinArgs, values};
use crate::config::{
    BindAddresses, Bypass, ConnectMode, DrainForeign, ExternalIps, InterfaceRules, MapSizes, NodePortAddresses,
    RunConfig, SourceConfig, XdpMode,
};
use crate::model::desired::Algorithm;

/// Flags of `sheave run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Name of this node in Kubernetes [default: $NODE_NAME, or else the hostname].
    #[arg(long, env = "SHEAVE_NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    #[command(flatten)]
    pins: PinArgs,
    /// Cgroup v2 directory whose processes are balanced at connect time [default: the root of the hierarchy].
    #[arg(long, env = "SHEAVE_CGROUP", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Processes that are balanced at connect time: host, tcp (also pods' TCP), all, off.
    #[arg(long, env = "SHEAVE_CONNECT", value_name = "MODE", default_value = "host", value_parser = values::connect)]
    connect: ConnectMode,
    /// XDP on uplinks: auto (native where the driver has it), native, generic, off.
    #[arg(long, env = "SHEAVE_XDP", value_name = "MODE", default_value = "auto", value_parser = values::xdp)]
    xdp: XdpMode,
    /// Node addresses that serve nodePorts: primary (the Node object's InternalIPs), all, or networks.
    #[arg(
        long,
        env = "SHEAVE_NODEPORT_ADDRESSES",
        value_name = "primary|all|CIDR,…",
        default_value = "primary",
        value_parser = values::nodeport_addresses
    )]
    nodeport_addresses: NodePortAddresses,
    /// Which of spec.externalIPs are frontends: true (all), false (none), or those in networks. Who may write Services may
    /// otherwise take any address over, and read what is sent there (CVE-2020-8554).
    #[arg(
        long,
        env = "SHEAVE_EXTERNAL_IPS",
        value_name = "BOOL|CIDR,…",
        default_value = "true",
        num_args = 0..=1,
        default_missing_value = "true",
        value_parser = values::external_ips
    )]
    external_ips: ExternalIps,
    /// How a backend is chosen for a new connection: random, round-robin, maglev, least-connections. A Service's annotation
    /// sheave.dev/algorithm goes before it.
    #[arg(long, env = "SHEAVE_ALGORITHM", value_name = "NAME", default_value = "random", value_parser = values::algorithm)]
    algorithm: Algorithm,
    /// Whether a client that sends its SYN again, because nothing has answered it, gets another backend.
    #[arg(
        long,
        env = "SHEAVE_SYN_FAILOVER",
        value_name = "BOOL",
        default_value_t = true,
        action = ArgAction::Set,
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    syn_failover: bool,
    /// Source address of a pod's packets to itself through a Service, IPv4.
    #[arg(long, env = "SHEAVE_HAIRPIN_IPV4", value_name = "ADDRESS", default_value = "169.254.42.1")]
    hairpin_ipv4: Ipv4Addr,
    /// The same for IPv6.
    #[arg(long, env = "SHEAVE_HAIRPIN_IPV6", value_name = "ADDRESS", default_value = "fd53:6865:6176:6500::1")]
    hairpin_ipv6: Ipv6Addr,
    /// Source ports for connections that this node passes on to another; outside nodePorts and the ephemeral range.
    #[arg(
        long,
        env = "SHEAVE_SNAT_PORTS",
        value_name = "FIRST-LAST",
        default_value = "10000-29999",
        value_parser = values::ports
    )]
    snat_ports: (u16, u16),
    /// Rejects and resets that one CPU may send in a second.
    #[arg(long, env = "SHEAVE_REJECTS_PER_SECOND", value_name = "NUMBER", default_value_t = 1_000)]
    rejects_per_second: u32,
    /// Leave TCP connections to the proxy that translates them, instead of resetting what is in no table here: auto (while
    /// kube-proxy's rules are there, or connections that netfilter translates to a Service), true, false, or for a time.
    #[arg(
        long,
        env = "SHEAVE_DRAIN_FOREIGN",
        value_name = "auto|BOOL|TIME",
        default_value = "auto",
        num_args = 0..=1,
        default_missing_value = "true",
        value_parser = values::drain_foreign
    )]
    drain_foreign: DrainForeign,
    /// Leave this node to another proxy, whose rules are there already: take no new connections, keep those that are open,
    /// and when the last has ended, or after this time, remove everything, and wait to be stopped. Serves neither health
    /// nor metrics, whose ports the other one needs.
    #[arg(
        long,
        env = "SHEAVE_DRAIN",
        value_name = "BOOL|TIME",
        default_value = "false",
        num_args = 0..=1,
        default_missing_value = "true",
        value_parser = values::drain
    )]
    drain: Drain,
    /// Pass traffic through Services to routed pods of this node straight into the pod, past the host's stack and netfilter, both
    /// ways. Refused where that would skip rules in forward chains, unless the value is "force".
    #[arg(
        long,
        env = "SHEAVE_BYPASS_NETFILTER",
        value_name = "BOOL|force",
        default_value = "false",
        num_args = 0..=1,
        default_missing_value = "true",
        value_parser = values::bypass
    )]
    bypass_netfilter: Bypass,
    /// How often maps, programs and pins are compared with what they should be, repaired, and what differed is told; 0 for
    /// never (seconds, or with s, m, h, d).
    #[arg(long, env = "SHEAVE_AUDIT_PERIOD", value_name = "TIME", default_value = "1m", value_parser = values::period)]
    audit_period: Period,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    interfaces: InterfaceArgs,
    #[command(flatten)]
    serve: ServeArgs,
    #[command(flatten)]
    timeouts: TimeoutArgs,
    #[command(flatten)]
    sizes: SizeArgs,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Where Services come from")]
struct SourceArgs {
    /// Folder of YAML manifests: Services, EndpointSlices, this Node and ServiceCIDRs. Excludes the API server.
    #[arg(long, env = "SHEAVE_MANIFESTS", value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Kubeconfig [default: $KUBECONFIG, ~/.kube/config, or the in-cluster service account].
    #[arg(long, env = "SHEAVE_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Addresses of API servers instead of the configured one, tried in turn; never a ClusterIP.
    #[arg(long, env = "SHEAVE_API_SERVER", value_name = "URL", value_delimiter = ',')]
    api_server: Vec<String>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Interfaces (names and patterns with *, separated by commas; they override detection)")]
struct InterfaceArgs {
    /// Host sides of pods' veths.
    #[arg(long, env = "SHEAVE_POD_INTERFACES", value_name = "PATTERN", value_delimiter = ',', value_parser = values::pattern)]
    pod_interfaces: Vec<String>,
    /// Uplinks.
    #[arg(long, env = "SHEAVE_UPLINK_INTERFACES", value_name = "PATTERN", value_delimiter = ',', value_parser = values::pattern)]
    uplink_interfaces: Vec<String>,
    /// Tunnels.
    #[arg(long, env = "SHEAVE_TUNNEL_INTERFACES", value_name = "PATTERN", value_delimiter = ',', value_parser = values::pattern)]
    tunnel_interfaces: Vec<String>,
    /// Interfaces to leave alone; goes before the others.
    #[arg(long, env = "SHEAVE_IGNORE_INTERFACES", value_name = "PATTERN", value_delimiter = ',', value_parser = values::pattern)]
    ignore_interfaces: Vec<String>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Health and metrics (addresses with ports, separated by commas; empty for none)")]
struct ServeArgs {
    /// Where /healthz (should clients be sent to this node?) and /livez (does this process work?) are served.
    #[arg(
        long,
        env = "SHEAVE_HEALTHZ_BIND_ADDRESS",
        value_name = "ADDRESS:PORT,…",
        default_value = "0.0.0.0:10256,[::]:10256",
        value_parser = values::bind_addresses
    )]
    healthz_bind_address: BindAddresses,
    /// Where /metrics is served, in Prometheus' text format.
    #[arg(
        long,
        env = "SHEAVE_METRICS_BIND_ADDRESS",
        value_name = "ADDRESS:PORT,…",
        default_value = "127.0.0.1:10249",
        value_parser = values::bind_addresses
    )]
    metrics_bind_address: BindAddresses,
    /// How long a change may wait to be applied until /healthz and /livez answer 503 (seconds, or with s, m, h, d).
    #[arg(long, env = "SHEAVE_HEALTH_TIMEOUT", value_name = "TIME", default_value = "2m", value_parser = values::seconds)]
    health_timeout: u32,
}

macro_rules! timeouts {
    ($($flag:ident, $env:literal, $default:expr => $field:ident: $help:literal;)+) => {
        #[derive(Clone, Debug, Args)]
        #[command(next_help_heading = "Idle time-outs of flows (seconds, or with s, m, h, d)")]
        struct TimeoutArgs {
            $(
                #[doc = $help]
                #[arg(long, env = $env, value_name = "TIME", default_value_t = $default, value_parser = values::seconds)]
                $flag: u32,
            )+
        }

        impl TimeoutArgs {
            fn timeouts(&self) -> Timeouts {
                Timeouts { $($field: self.$flag),+ }
            }
        }
    };
}

timeouts! {
    timeout_syn, "SHEAVE_TIMEOUT_SYN", Timeouts::DEFAULT.syn => syn: "TCP, handshake incomplete.";
    timeout_established, "SHEAVE_TIMEOUT_ESTABLISHED", Timeouts::DEFAULT.established => established: "TCP, open.";
    timeout_closing, "SHEAVE_TIMEOUT_CLOSING", Timeouts::DEFAULT.closing => closing: "TCP, after a FIN.";
    timeout_reset, "SHEAVE_TIMEOUT_RESET", Timeouts::DEFAULT.reset => reset: "TCP, after a RST.";
    timeout_udp_new, "SHEAVE_TIMEOUT_UDP_NEW", Timeouts::DEFAULT.udp_new => udp_new: "UDP, no reply seen.";
    timeout_udp_established, "SHEAVE_TIMEOUT_UDP_ESTABLISHED", Timeouts::DEFAULT.udp_established => udp_established:
        "UDP, replied.";
}

macro_rules! sizes {
    ($($flag:ident, $env:literal => $field:ident: $help:literal;)+) => {
        #[derive(Clone, Debug, Args)]
        #[command(
            next_help_heading = "Maximum entries of the maps (another one counts from the next start; defaults are for 8 GiB of \
                                 memory or more, and half of that for each halving, to a sixteenth)"
        )]
        struct SizeArgs {
            $(
                #[doc = $help]
                #[arg(long, env = $env, value_name = "ENTRIES", value_parser = clap::value_parser!(u32).range(2..=1 << 27))]
                $flag: Option<u32>,
            )+
        }

        impl SizeArgs {
            fn sizes(&self) -> MapSizes {
                MapSizes { $($field: self.$flag),+ }
            }
        }
    };
}

sizes! {
    max_services, "SHEAVE_MAX_SERVICES" => services: "Service ports [default: 65536].";
    max_frontends, "SHEAVE_MAX_FRONTENDS" => frontends: "Frontends and the addresses that they are on, per family [default: 131072].";
    max_backends, "SHEAVE_MAX_BACKENDS" => backends: "Backends, per family [default: 131072].";
    max_table, "SHEAVE_MAX_TABLE" => table: "Backend ids in the backend table [default: 524288].";
    max_conntrack, "SHEAVE_MAX_CONNTRACK" => conntrack: "Flow entries, two a flow, per family [default: 524288].";
    max_half_open, "SHEAVE_MAX_HALF_OPEN" => half_open:
        "Entries of flows that are not established yet, two a flow, per family [default: 131072].";
    max_affinity, "SHEAVE_MAX_AFFINITY" => affinity:
        "Clients with session affinity, per family, and as many that have no established connection yet [default: 65536].";
    max_sockets, "SHEAVE_MAX_SOCKETS" => sockets: "Sockets balanced at connect time, per family [default: 65536].";
    max_source_ranges, "SHEAVE_MAX_SOURCE_RANGES" => source_ranges:
        "Entries of loadBalancerSourceRanges, per family [default: 65536].";
}

impl RunArgs {
    /// The configuration that these flags describe.
    ///
    /// # Errors
    ///
    /// If values contradict each other, or this machine's name is needed and can't be read.
    pub fn config(&self) -> Result<RunConfig, CliError> {
        if !self.pins.pin_path.is_absolute() {
            return Err(CliError::Value {
                flag: "--pin-path",
                value: self.pins.pin_path.display().to_string(),
                remedy: "give an absolute path on a BPF file system, like /sys/fs/bpf/sheave".to_owned(),
            });
        }
        Ok(RunConfig {
            source: self.source.config()?,
            node_name: self.node_name()?,
            pin_path: self.pins.pin_path.clone(),
            cgroup: self.cgroup.clone(),
            connect: self.connect,
            xdp: self.xdp,
            interfaces: InterfaceRules {
                pods: self.interfaces.pod_interfaces.clone(),
                uplinks: self.interfaces.uplink_interfaces.clone(),
                tunnels: self.interfaces.tunnel_interfaces.clone(),
                ignored: self.interfaces.ignore_interfaces.clone(),
            },
            nodeport_addresses: self.nodeport_addresses.clone(),
            external_ips: self.external_ips.clone(),
            algorithm: self.algorithm,
            hairpin4: self.hairpin_ipv4,
            hairpin6: self.hairpin_ipv6,
            timeouts: self.timeouts.timeouts(),
            snat_ports: self.snat_ports,
            rejects_per_second: self.rejects_per_second,
            drain_foreign: self.drain_foreign,
            drain: self.drain.0,
            bypass_netfilter: self.bypass_netfilter,
            syn_failover: self.syn_failover,
            healthz: self.serve.healthz_bind_address.clone(),
            metrics: self.serve.metrics_bind_address.clone(),
            audit_period: self.audit_period.0,
            health_timeout: Duration::from_secs(self.serve.health_timeout.into()),
            sizes: self.sizes.sizes(),
        })
    }

    fn node_name(&self) -> Result<String, CliError> {
        let given = self.node_name.clone().or_else(|| std::env::var("NODE_NAME").ok()).filter(|name| !name.is_empty());
        if let Some(name) = given {
            return Ok(name);
        }
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(CliError::Hostname)?;
        // The kubelet's default: the hostname in lower case.
        Ok(hostname.trim().to_lowercase())
    }
}

impl SourceArgs {
    fn config(&self) -> Result<SourceConfig, CliError> {
        let Some(folder) = &self.manifests else {
            return Ok(SourceConfig::Kubernetes {
                kubeconfig: self.kubeconfig.clone(),
                api_servers: self.api_server.clone(),
            });
        };
        let second = match (&self.kubeconfig, self.api_server.is_empty()) {
            (Some(_), _) => "--kubeconfig",
            (None, false) => "--api-server",
            (None, true) => return Ok(SourceConfig::Manifests(folder.clone())),
        };
        Err(CliError::Exclusive { first: "--manifests", second })
    }
}
