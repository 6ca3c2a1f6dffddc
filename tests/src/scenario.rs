//! A cluster with servers in every pod and Sheave on node 1: where most end-to-end tests begin.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::agent::Agent;
use crate::client;
use crate::manifests::{Endpoint, Manifests, Service};
use crate::netns::Namespace;
use crate::process::eventually;
use crate::server::Server;
use crate::topology::{Cluster, Node, Pod, Shape};

/// How long backends change under traffic.
const CHANGING: Duration = Duration::from_secs(10);

/// The running thing. Dropped in this order: servers, Sheave, manifests, namespaces.
#[derive(Debug)]
pub struct Scenario {
    /// Servers of every pod, node 1 first.
    pub servers: Vec<Server>,
    /// Sheave on node 1.
    pub agent: Agent,
    /// What it reads.
    pub manifests: Manifests,
    /// Where all that runs.
    pub cluster: Cluster,
}

impl Scenario {
    /// Builds the cluster, starts a server in every pod and Sheave on node 1.
    ///
    /// # Errors
    /// Whatever does not start.
    pub fn start(shape: Shape, arguments: &[&str]) -> Result<Self> {
        let cluster = Cluster::build(shape)?;
        let pods = cluster.nodes.iter().flat_map(|node| &node.pods);
        let servers = pods.map(|pod| Server::start(&pod.namespace, &pod.name)).collect::<Result<_>>()?;
        let manifests = Manifests::for_node(&cluster.nodes[0])?;
        let agent = Agent::start(&cluster.nodes[0], &manifests, arguments)?;
        Ok(Self { servers, agent, manifests, cluster })
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
        let endpoints: Vec<Endpoint> = pods.into_iter().map(Endpoint::from).collect();
        self.manifests.service(service, &endpoints)?;
        self.wait_until_published(service, &endpoints.iter().map(|endpoint| endpoint.address).collect::<Vec<_>>())
    }

    fn wait_until_published(&self, service: &Service, endpoints: &[Ipv4Addr]) -> Result<()> {
        let mut expected: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
        expected.sort();
        let named_port = format!("{}:", service.id());
        let waited = eventually(Duration::from_secs(10), || {
            let shown = self.agent.services()?;
            let rows = shown.as_array().into_iter().flatten();
            let mut rows = rows.filter(|row| row["service"].as_str().is_some_and(|name| name.starts_with(&named_port)));
            let holds = |row: &Value| {
                let backends = row["cluster_backends"].as_array().into_iter().flatten().filter_map(Value::as_str);
                let mut addresses: Vec<&str> = backends.filter_map(|one| one.split(':').next()).collect();
                addresses.sort_unstable();
                addresses == expected
            };
            let first =
                rows.next().with_context(|| format!("{} is not in `sheave services`: {shown:#}", service.id()))?;
            ensure!(holds(first) && rows.all(holds), "{} should have {expected:?}: {shown:#}", service.id());
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
                let endpoints: Vec<Endpoint> = set.map(|(_, pod)| Endpoint::from(*pod)).collect();
                outcome = self.manifests.service(service, &endpoints);
                std::thread::sleep(Duration::from_millis(100));
            }
            stop.store(true, Ordering::Relaxed);
            let answers = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.map(|()| answers)
        })
    }
}
