//! A cluster with servers in every pod and Sheave on node 1: where most end-to-end tests begin.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::agent::Agent;
use crate::manifests::{Endpoint, Manifests, Service};
use crate::process::eventually;
use crate::server::Server;
use crate::topology::{Cluster, Node, Pod, Shape};

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
}
