//! The cluster of the soak: two nodes with a daemon each, which follow one API server, and pods with servers for every service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use super::figures::{Daemon, Figures};
use super::serve::{Findings, Servers, port};
use super::talk::{Job, PASSING, Target};
use super::totals::{Clients, Totals};
use crate::agent::Agent;
use crate::family::Family;
use crate::kube_api::{KubeApi, Resource};
use crate::leftovers::unique_name;
use crate::manifests::{Endpoint, Service};
use crate::process::built;
use crate::topology::{Cluster, Pod, Shape};

/// Services that are there all the time, with nodePorts; some pods are always behind them.
pub(super) const STEADY: [u32; 2] = [1, 2];
/// Has session affinity, and always the same pods.
const STICKY: u32 = 3;
/// Services that come, change and go.
pub(super) const CHANGING: std::ops::Range<u32> = 10..26;
/// Every service.
fn all() -> Vec<u32> {
    STEADY.into_iter().chain([STICKY]).chain(CHANGING).collect()
}

/// Ports of every service.
pub(super) const TCP: u16 = 80;
pub(super) const UDP: u16 = 53;
/// The kernel's programs and maps as a daemon has them by default, but for maps that are small enough to be filled by floods.
const ARGUMENTS: [&str; 4] = ["--max-half-open", "16384", "--max-conntrack", "65536"];

/// Where all happens. Dropped in this order: daemons, servers, API server, namespaces.
pub(super) struct World {
    /// On node 1 and on node 2.
    pub(super) agents: [Agent; 2],
    _servers: Vec<Servers>,
    /// Of pods that come and go, on node 1.
    passing: Vec<Servers>,
    api: KubeApi,
    kubeconfig: PathBuf,
    pub(super) cluster: Cluster,
    pub(super) findings: Findings,
}

/// The ClusterIP of a service.
pub(super) fn cluster_ip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + service)
}

pub(super) fn cluster_ip6(service: u32) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::try_from(0x100 + service).unwrap_or(0))
}

fn node_port(service: u32) -> u16 {
    30_500 + u16::try_from(service).unwrap_or(0)
}

fn name(service: u32) -> String {
    format!("service-{service}")
}

fn object(service: u32) -> Service {
    let object = Service::new(&name(service), cluster_ip(service)).and(cluster_ip6(service));
    let tcp = object.tcp("tcp", TCP, port(service));
    if STEADY.contains(&service) {
        tcp.node_port(node_port(service)).udp("udp", UDP, port(service)).node_port(node_port(service))
    } else if service == STICKY {
        tcp.affinity(3_600)
    } else {
        tcp.udp("udp", UDP, port(service))
    }
}

impl World {
    pub(super) fn build() -> Result<Self> {
        let cluster = Cluster::build(Shape { pod_counts: [5, 3], ..Shape::default() })?;
        let listener = cluster.lan.run(|| TcpListener::bind(("192.168.50.254", 6443)))?;
        let api = KubeApi::serve(listener);
        for node in &cluster.nodes {
            api.apply(json!({"kind": "Node", "metadata": {"name": node.name}, "status": {"addresses": [
                {"type": "InternalIP", "address": node.address}, {"type": "InternalIP", "address": node.address6},
            ]}}));
        }
        let findings = Findings::default();
        let mut servers = Vec::new();
        for (node, base) in cluster.nodes.iter().zip([100, 200]) {
            for (pod, number) in node.pods.iter().zip(base..) {
                servers.push(Servers::start(&pod.namespace, number, &all(), &findings)?);
            }
        }
        let kubeconfig = std::env::temp_dir().join(unique_name());
        std::fs::write(&kubeconfig, api.kubeconfig())?;
        let [first, second] = [&cluster.nodes[0], &cluster.nodes[1]]
            .map(|node| Agent::start_with_kubeconfig(node, &node.name, &kubeconfig, &ARGUMENTS));
        let agents = [first?, second?];
        let world = Self { agents, _servers: servers, passing: Vec::new(), api, kubeconfig, cluster, findings };
        for service in STEADY.into_iter().chain([STICKY]) {
            world.publish(service, &world.staying())?;
        }
        for agent in &world.agents {
            agent.wait_for_services("the last service", |shown| {
                shown.to_string().contains(&cluster_ip6(STICKY).to_string())
            })?;
        }
        Ok(world)
    }

    /// Pods that are always behind the steady services: two on node 1, one on node 2.
    pub(super) fn staying(&self) -> Vec<&Pod> {
        let [one, two] = [&self.cluster.nodes[0].pods, &self.cluster.nodes[1].pods];
        vec![&one[1], &one[2], &two[1]]
    }

    /// Pods that are sometimes behind them, and those that come and go.
    pub(super) fn further(&self) -> Vec<&Pod> {
        let [one, two] = [&self.cluster.nodes[0].pods, &self.cluster.nodes[1].pods];
        one[5..].iter().chain([&one[3], &two[2]]).collect()
    }

    /// Publishes a service with these pods behind it.
    pub(super) fn publish(&self, service: u32, pods: &[&Pod]) -> Result<()> {
        let object = object(service);
        let endpoints: Vec<Endpoint> = object.endpoints(pods.iter().copied());
        for text in object.yaml(&endpoints).split("---\n") {
            self.api.apply(serde_saphyr::from_str::<Value>(text)?);
        }
        Ok(())
    }

    /// Removes a service, or nothing.
    pub(super) fn remove(&self, service: u32) {
        self.api.delete(Resource::Services, "default", &name(service));
        for slice in [1, 6] {
            self.api.delete(Resource::EndpointSlices, "default", &format!("{}-{slice}", name(service)));
        }
    }

    /// Adds a pod to node 1 that will go again.
    pub(super) fn add_pod(&mut self) -> Result<()> {
        let number = PASSING + u32::try_from(self.passing.len())?;
        let pod = self.cluster.nodes[0].add_pod()?;
        self.passing.push(Servers::start(&pod.namespace, number, &all(), &self.findings)?);
        Ok(())
    }

    /// The last pod that was added.
    pub(super) fn passing(&self) -> Option<&Pod> {
        self.passing.last().and(self.cluster.nodes[0].pods.last())
    }

    /// Takes it away again.
    pub(super) fn remove_pod(&mut self) -> Result<()> {
        drop(self.passing.pop());
        self.cluster.nodes[0].remove_last_pod()
    }

    /// Where floods come from.
    pub(super) fn flooder(&self) -> &Pod {
        &self.cluster.nodes[0].pods[4]
    }

    /// Starts the clients: a pod on each node, one outside, and a process of node 1.
    pub(super) fn clients(&self, seed: u64, totals: &Totals) -> Result<Clients> {
        let soak = built("soak")?;
        let [one, two] = [&self.cluster.nodes[0], &self.cluster.nodes[1]];
        let inside: Vec<Target> = Family::BOTH.into_iter().flat_map(inside).collect();
        let outside = [one, two].into_iter().flat_map(|node| outside([node.address.into(), node.address6.into()]));
        let own = inside.iter().filter(|target| target.service != STICKY).cloned();
        let own = own.chain(outside_of(one.address.into()));
        let mut clients = Clients::new();
        let jobs: [(&str, Command, Vec<Target>); 4] = [
            ("pod-1-1", one.pods[0].namespace.command(&soak), inside.clone()),
            ("pod-2-1", two.pods[0].namespace.command(&soak), inside.clone()),
            ("client", self.cluster.client.command(&soak), outside.collect()),
            ("node-1", self.agents[0].host_command(&soak), own.collect()),
        ];
        for (number, (name, command, targets)) in (1..).zip(jobs) {
            clients.start(command, &Job { name: name.into(), seed: seed + number, targets }, totals)?;
        }
        Ok(clients)
    }

    pub(super) fn figures(&mut self) -> Result<Figures> {
        let [restarted, lasting] = &mut self.agents;
        Ok(Figures { restarted: Daemon::of(restarted)?, lasting: Daemon::of(lasting)? })
    }

    /// The ends of the daemons' logs.
    pub(super) fn logs(&self) -> String {
        let of = |agent: &Agent| {
            let log = agent.log();
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(40)..].join("\n")
        };
        format!("log of node-1:\n{}\nlog of node-2:\n{}", of(&self.agents[0]), of(&self.agents[1]))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.kubeconfig);
    }
}

fn target(service: u32, address: SocketAddr, udp: bool, long: u32) -> Target {
    let steady = !CHANGING.contains(&service);
    Target { service, address, udp, long, steady, sticky: service == STICKY }
}

/// What a pod asks in a family.
fn inside(family: Family) -> Vec<Target> {
    let at = |service: u32, port: u16| -> SocketAddr {
        (family.pick(cluster_ip(service), cluster_ip6(service)), port).into()
    };
    let mut targets = vec![target(STICKY, at(STICKY, TCP), false, 1)];
    for service in STEADY {
        targets.push(target(service, at(service, TCP), false, 3));
        targets.push(target(service, at(service, UDP), true, 1));
    }
    // One family's clients look at the services that come and go by TCP, the other's by UDP.
    let udp = family == Family::V6;
    let port = if udp { UDP } else { TCP };
    targets.extend(CHANGING.map(|service| target(service, at(service, port), udp, 0)));
    targets
}

/// NodePorts at a node's addresses.
fn outside(addresses: [IpAddr; 2]) -> Vec<Target> {
    addresses.into_iter().flat_map(outside_of).collect()
}

fn outside_of(address: IpAddr) -> Vec<Target> {
    let each = |service: u32| {
        let at = SocketAddr::new(address, node_port(service));
        [target(service, at, false, 3), target(service, at, true, 1)]
    };
    STEADY.into_iter().flat_map(each).collect()
}
