//! A cluster with servers in every pod and Sheave on node 1: where most end-to-end tests begin.
//!
//! Services are published in a folder of manifests, or through the API server of `SHEAVE_TEST_KUBECONFIG` if that is set.
//! An API server gives out cluster IPs and node ports of its own, so who asks a Service asks [`Scenario::at`] where it is.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::agent::Agent;
use crate::api_server::{ApiServer, Given};
use crate::client;
use crate::family::Family;
use crate::manifests::{Endpoint, Manifests, Service};
use crate::netns::Namespace;
use crate::process::eventually;
use crate::server::Server;
use crate::topology::{Cluster, Node, Pod, Shape};

/// How long backends change under traffic.
const CHANGING: Duration = Duration::from_secs(10);

/// Where Services are published.
#[derive(Debug)]
enum Source {
    Folder(Manifests),
    ApiServer(Box<ApiServer>),
}

/// The running thing. Dropped in this order: servers, Sheave, what it reads, namespaces.
#[derive(Debug)]
pub struct Scenario {
    /// Servers of every pod, node 1 first.
    pub servers: Vec<Server>,
    /// Sheave on node 1.
    pub agent: Agent,
    source: Source,
    given: Mutex<Given>,
    /// Where all that runs.
    pub cluster: Cluster,
}

impl Scenario {
    /// Builds the cluster, starts a server in every pod and Sheave on node 1.
    ///
    /// # Errors
    /// Whatever does not start.
    pub fn start(shape: Shape, arguments: &[&str]) -> Result<Self> {
        match ApiServer::from_environment()? {
            Some(server) => Self::start_with(shape, Source::ApiServer(Box::new(server)), arguments),
            None => Self::start_with_folder(shape, arguments),
        }
    }

    /// The same with a folder of manifests in any case, for what only folders do.
    ///
    /// # Errors
    /// Whatever does not start.
    pub fn start_with_folder(shape: Shape, arguments: &[&str]) -> Result<Self> {
        Self::start_with(shape, Source::Folder(Manifests::new()?), arguments)
    }

    /// The same with this kubeconfig's API server in any case.
    ///
    /// # Errors
    /// Whatever does not start.
    pub fn start_with_kubeconfig(shape: Shape, kubeconfig: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_with(shape, Source::ApiServer(Box::new(ApiServer::connect(kubeconfig)?)), arguments)
    }

    fn start_with(shape: Shape, source: Source, arguments: &[&str]) -> Result<Self> {
        let cluster = Cluster::build(shape)?;
        let pods = cluster.nodes.iter().flat_map(|node| &node.pods);
        let servers = pods.map(|pod| Server::start(&pod.namespace, &pod.name)).collect::<Result<_>>()?;
        let node = &cluster.nodes[0];
        let agent = match &source {
            Source::Folder(manifests) => {
                manifests.node(&node.name, &[node.address.into(), node.address6.into()])?;
                Agent::start(node, manifests, arguments)?
            }
            Source::ApiServer(server) => {
                server.node(node)?;
                let kubeconfig = server.reach_from(&node.namespace)?;
                Agent::start_with_kubeconfig(node, &server.node_name(&node.name), &kubeconfig, arguments)?
            }
        };
        Ok(Self { servers, agent, source, given: Mutex::default(), cluster })
    }

    /// The folder that Sheave reads.
    ///
    /// # Panics
    /// If it reads an API server.
    #[must_use]
    pub fn manifests(&self) -> &Manifests {
        match &self.source {
            Source::Folder(manifests) => manifests,
            Source::ApiServer(server) => panic!("no folder here, but {server:?}"),
        }
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ClusterIP that a Service has got which was published with this one; see [`Self::at`] for either family.
    #[must_use]
    pub fn cluster_ip(&self, asked: Ipv4Addr) -> Ipv4Addr {
        match self.given().cluster_ips.get(&asked.into()) {
            Some(IpAddr::V4(given)) => *given,
            _ => asked,
        }
    }

    /// Where to ask for what was published with this address and port: a ClusterIP's port, or a nodePort of any other
    /// address. What isn't published is where it is.
    #[must_use]
    pub fn at(&self, address: impl Into<IpAddr>, port: u16) -> SocketAddr {
        let (address, given) = (address.into(), self.given());
        match given.cluster_ips.get(&address) {
            Some(given) => client::at(*given, port),
            None => client::at(address, given.node_ports.get(&port).copied().unwrap_or(port)),
        }
    }

    /// The first node.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    /// A pod by node and number, both from 1, as in its name.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn pod(&self, node: usize, number: usize) -> &Pod {
        &self.cluster.nodes[node - 1].pods[number - 1]
    }

    /// Publishes a Service with these pods behind it, and waits until the kernel knows.
    ///
    /// # Errors
    /// If the manifests can't be written, or don't reach the maps within seconds.
    pub fn publish<'a>(&self, service: &Service, pods: impl IntoIterator<Item = &'a Pod>) -> Result<()> {
        let endpoints = service.endpoints(pods);
        self.update(service, &endpoints)?;
        self.wait_until_published(service, &endpoints)
    }

    /// Publishes a Service, or what has become of it, without waiting.
    ///
    /// # Errors
    /// If the manifests can't be written, or the API server refuses.
    pub fn update(&self, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
        let server = match &self.source {
            Source::Folder(manifests) => return manifests.service(service, endpoints),
            Source::ApiServer(server) => server,
        };
        let Given { cluster_ips, node_ports } = server.service(service, endpoints)?;
        for address in cluster_ips.values() {
            // As to the addresses that tests take themselves.
            let family = Family::of(*address);
            let length = if family == Family::V4 { 32 } else { 128 };
            let route = format!("route replace {address}/{length} via {}", self.node().address_of(family));
            self.cluster.client.ip(&[route])?;
        }
        let mut given = self.given();
        given.cluster_ips.extend(cluster_ips);
        given.node_ports.extend(node_ports);
        Ok(())
    }

    /// Waits until every frontend of a Service has the endpoints of its family.
    ///
    /// # Errors
    /// If the maps don't show that within seconds.
    pub fn wait_until_published(&self, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
        let id = match &self.source {
            Source::Folder(_) => service.id(),
            Source::ApiServer(server) => server.id(service),
        };
        let named_port = format!("{id}:");
        let waited = eventually(Duration::from_secs(10), || {
            let shown = self.agent.services()?;
            let rows = shown.as_array().into_iter().flatten();
            let mut rows = rows.filter(|row| row["service"].as_str().is_some_and(|name| name.starts_with(&named_port)));
            let holds = |row: &Value| {
                let Some(address) = row["address"].as_str().and_then(|address| address.parse::<IpAddr>().ok()) else {
                    return false;
                };
                let addresses = endpoints.iter().map(|endpoint| endpoint.address);
                let mut expected: Vec<IpAddr> =
                    addresses.filter(|one| Family::of(*one) == Family::of(address)).collect();
                expected.sort_unstable();
                let backends = row["cluster_backends"].as_array().into_iter().flatten().filter_map(Value::as_str);
                let backends = backends.filter_map(|one| one.parse::<SocketAddr>().ok());
                let mut addresses: Vec<IpAddr> = backends.map(|one| one.ip()).collect();
                addresses.sort_unstable();
                addresses == expected
            };
            let first = rows.next().with_context(|| format!("{id} is not in `sheave services`: {shown:#}"))?;
            ensure!(holds(first) && rows.all(holds), "{id} should have {endpoints:?}: {shown:#}");
            Ok(())
        });
        waited.with_context(|| format!("log of sheave:\n{}", self.agent.log()))
    }

    /// Asks `service` from `client` for some seconds, while the set behind it changes every 100 ms among `pods`.
    ///
    /// # Errors
    /// If the manifests can't be written.
    ///
    /// # Panics
    /// If `ask` does.
    pub fn ask_while_backends_change(
        &self,
        service: &Service,
        pods: &[&Pod],
        client: &Namespace,
        ask: &(dyn Fn() -> Result<client::Answer> + Sync),
    ) -> Result<client::Answers> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| client::until(Some(client), &stop, 4, ask));
            let started = Instant::now();
            let mut outcome = Ok(());
            for round in 0_usize.. {
                if started.elapsed() > CHANGING || outcome.is_err() {
                    break;
                }
                // Every set but the empty one comes up.
                let chosen = round % ((1 << pods.len()) - 1) + 1;
                let set = pods.iter().enumerate().filter(|(index, _)| chosen >> index & 1 == 1);
                let endpoints = service.endpoints(set.map(|(_, pod)| *pod));
                outcome = self.update(service, &endpoints);
                std::thread::sleep(Duration::from_millis(100));
            }
            stop.store(true, Ordering::Relaxed);
            let answers = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.map(|()| answers)
        })
    }
}
