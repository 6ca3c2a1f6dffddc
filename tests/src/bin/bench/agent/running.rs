//! The agent, its API server, and pods that ask and answer.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sheave::dataplane::PinnedMaps;
use sheave_tests::agent::Agent;
use sheave_tests::client;
use sheave_tests::follower::Folder;
use sheave_tests::kube_api::KubeApi;
use sheave_tests::netns::Namespace;
use sheave_tests::objects;
use sheave_tests::process::eventually;
use sheave_tests::server::{ECHO, Server, WHO};
use sheave_tests::topology::{Cluster, NodeNetwork, Pod, PodNetwork, Shape};

use crate::controller::Load;
use crate::path::address;

/// Pods that answer; one more asks.
const SERVERS: u8 = 4;
/// How long the maps may take to hold what they should.
const PATIENCE: Duration = Duration::from_secs(20);

/// A service that clients ask; its endpoints are pods.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// Tells them apart.
    pub(crate) number: u32,
}

/// All of it. Dropped in this order.
pub(crate) struct Running {
    /// The agent, on the first node.
    pub(crate) agent: Agent,
    /// What tells it.
    pub(crate) api: KubeApi,
    /// How long it took until it served.
    pub(crate) start: Duration,
    /// The services that nobody asks.
    pub(crate) load: Load,
    _folder: Folder,
    _servers: Vec<Server>,
    cluster: Cluster,
}

impl Running {
    /// Starts an agent with this load and these arguments, and waits until it serves.
    pub(crate) fn start(load: Load, more: &[&str]) -> Result<Self> {
        let shape = Shape {
            pods: PodNetwork::Routed,
            nodes: NodeNetwork::Plain,
            pod_counts: [SERVERS + 1, 0],
            ..Shape::default()
        };
        let cluster = Cluster::build(shape)?;
        let node = &cluster.nodes[0];
        let servers =
            node.pods[1..].iter().map(|pod| Server::start(&pod.namespace, &pod.name)).collect::<Result<_>>()?;
        let listener = node.namespace.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let api = KubeApi::serve(listener);
        api.apply(objects::node(node, None, &[&node.address.to_string()]));
        for object in load.objects() {
            api.apply(object);
        }
        let folder = Folder::new("bench-agent");
        folder.write("kubeconfig", &api.kubeconfig());
        let mut arguments = vec!["--connect", "off", "--healthz-bind-address", "", "--metrics-bind-address", ""];
        arguments.extend(more);
        let started = Instant::now();
        let agent = Agent::start_with_kubeconfig(node, &node.name, &folder.path("kubeconfig"), &arguments)?;
        Ok(Self { agent, api, start: started.elapsed(), load, _folder: folder, _servers: servers, cluster })
    }

    /// Fails unless the maps come to hold the load.
    pub(crate) fn check(&self) -> Result<()> {
        eventually(PATIENCE, || self.load.check(&PinnedMaps::open(self.agent.pins())?))
    }

    /// Where clients are.
    pub(crate) fn client(&self) -> &Namespace {
        &self.cluster.nodes[0].pods[0].namespace
    }

    /// A pod that answers, by its number.
    pub(crate) fn pod(&self, number: usize) -> &Pod {
        &self.cluster.nodes[0].pods[1 + number]
    }

    /// Publishes a service with these pods behind it, and waits until it answers.
    pub(crate) fn publish(&self, asked: Asked, pods: &[usize]) -> Result<()> {
        let cluster_ip = address(self.load.services + asked.number);
        let ports = json!([{"name": "who", "port": WHO}, {"name": "echo", "port": ECHO}]);
        let spec = json!({"type": "ClusterIP", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip],
            "ipFamilies": ["IPv4"], "ports": ports});
        let mut service = objects::service(&asked.name(), &spec);
        service["metadata"]["namespace"] = "bench".into();
        self.api.apply(service);
        self.give(asked, pods);
        let target = self.target(asked, WHO);
        eventually(PATIENCE, || self.client().run(|| client::who(target).map(drop)))
    }

    /// Gives a service these endpoints.
    pub(crate) fn give(&self, asked: Asked, pods: &[usize]) {
        let pods: Vec<&Pod> = pods.iter().map(|number| self.pod(*number)).collect();
        let mut slice = objects::slice(&asked.name(), 1, &[("who", WHO), ("echo", ECHO)], &objects::ready(&pods));
        slice["metadata"]["namespace"] = "bench".into();
        self.api.apply(slice);
    }

    /// Where a service is asked.
    pub(crate) fn target(&self, asked: Asked, port: u16) -> SocketAddr {
        (address(self.load.services + asked.number), port).into()
    }

    /// Processor time that the agent has used so far.
    pub(crate) fn processor_time(&mut self) -> Result<Duration> {
        let process = self.agent.process().context("the agent runs")?.id();
        let text = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
        // The name, in parentheses, may hold anything; utime and stime are the 12th and 13th fields behind it.
        let (_, fields) = text.rsplit_once(')').context("no name in /proc/…/stat")?;
        let ticks: Vec<u64> = fields.split_whitespace().skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
        ensure!(ticks.len() == 2, "no times in {text:?}");
        // SAFETY: sysconf takes no pointers.
        let second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) })?;
        Ok(Duration::from_millis(ticks.iter().sum::<u64>() * 1_000 / second))
    }
}

impl Asked {
    fn name(self) -> String {
        format!("asked-{}", self.number)
    }
}
