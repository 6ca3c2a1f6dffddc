//! The container of `deploy/kustomize` on a node: it serves with the rights that its manifest gives it, and each of them is
//! needed.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Probe;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};
use sheave_tests::cgroup::Cgroup;
use sheave_tests::client;
use sheave_tests::container::{Container, Place, Pod};
use sheave_tests::http;
use sheave_tests::kube_api::KubeApi;
use sheave_tests::kubectl::kustomize;
use sheave_tests::leftovers::unique_name;
use sheave_tests::objects;
use sheave_tests::process::{Process, built, eventually};
use sheave_tests::server::{self, Server};
use sheave_tests::topology::{Cluster, PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE_PORT: u16 = 30_500;
const TOKEN: &str = "token-of-sheave";
/// As long as for an agent.
const START: Duration = Duration::from_secs(30);
/// Bits of capabilities (capability.h) that the manifests use.
const BITS: [(&str, u32); 3] = [("NET_ADMIN", 12), ("PERFMON", 38), ("BPF", 39)];

/// A node before Sheave is installed: an API server that wants the account's token, and a Service of a pod here and one there.
struct Installation {
    pins: PathBuf,
    cgroup: Cgroup,
    _servers: Vec<Server>,
    api: KubeApi,
    cluster: Cluster,
}

impl Installation {
    fn prepare() -> Result<Self> {
        let cluster =
            Cluster::build(Shape { pods: PodNetwork::Routed, pod_counts: [2, 1], xdp: true, ..Shape::default() })?;
        let pods: Vec<_> = cluster.nodes.iter().flat_map(|node| &node.pods).collect();
        let servers = pods.iter().map(|pod| Server::start(&pod.namespace, &pod.name)).collect::<Result<_>>()?;
        let node = &cluster.nodes[0];
        let api = KubeApi::serve(node.namespace.run(|| TcpListener::bind("127.0.0.1:0"))?);
        api.require_token(TOKEN);
        api.apply(objects::node(node, None, &[&node.address.to_string()]));
        api.apply(objects::service(
            "web",
            &json!({
                "type": "NodePort", "clusterIP": WEB, "clusterIPs": [WEB], "ipFamilies": ["IPv4"],
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT}],
            }),
        ));
        api.apply(objects::slice("web", 1, &[("http", server::WHO)], &objects::ready(&pods[1..])));
        let pins = Path::new("/sys/fs/bpf").join(unique_name());
        std::fs::create_dir(&pins).with_context(|| format!("making {}", pins.display()))?;
        Ok(Self { pins, cgroup: Cgroup::new()?, _servers: servers, api, cluster })
    }

    /// The pod of the base, with the API server's address set as the README says, and a hook more than by default.
    fn pod(&self) -> Result<Pod> {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize");
        let mut pod = Pod::read(&kustomize(&base)?)?;
        pod.set("SHEAVE_API_SERVER", &self.api.url());
        pod.set("SHEAVE_XDP", "native");
        // Asks netfilter for its rules first.
        pod.set("SHEAVE_BYPASS_NETFILTER", "true");
        Ok(pod)
    }

    fn start(&self, pod: &Pod) -> Result<Container> {
        let node = &self.cluster.nodes[0];
        let cgroup = Path::new("/sys/fs/cgroup").join(self.cgroup.path().file_name().context("a cgroup without name")?);
        let host_paths = [("/sys/fs/bpf", self.pins.as_path()), ("/sys/fs/cgroup", &cgroup)];
        let place = Place { namespace: &node.namespace, node_name: &node.name, host_paths: &host_paths, token: TOKEN };
        Container::start(pod, &place)
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

/// Asks as a kubelet does.
fn probe(installation: &Installation, probe: Option<&Probe>) -> Result<()> {
    let get = probe.and_then(|probe| probe.http_get.as_ref()).context("no probe by HTTP")?;
    let IntOrString::Int(port) = &get.port else { bail!("no port has a name: {:?}", get.port) };
    let node = &installation.cluster.nodes[0];
    let address = client::at(node.address, u16::try_from(*port)?);
    let answer = node.namespace.run(|| http::get(address, get.path.as_deref().unwrap_or("/")))?;
    ensure!(answer.status == 200, "{get:?}: {answer:?}");
    Ok(())
}

/// Every name of a metric in the dashboard's questions.
fn metrics_of_the_dashboard() -> Result<BTreeSet<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/monitoring/sheave.json");
    let dashboard: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?.iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let variables = dashboard["templating"]["list"].as_array().context("no variables")?.iter();
    let questions = targets.map(|target| &target["expr"]).chain(variables.map(|variable| &variable["query"]["query"]));
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let words = questions.filter_map(Value::as_str).flat_map(|question| question.split(move |one| !is_name(one)));
    Ok(words.filter(|word| word.starts_with("sheave_") || word.starts_with("kubeproxy_")).map(str::to_owned).collect())
}

/// The way to install Sheave that the README shows would not work, or only with more rights than it says.
#[test]
fn the_container_serves_with_the_rights_in_its_manifest() -> Result<()> {
    let installation = Installation::prepare()?;
    let pod = installation.pod()?;
    let mut container = installation.start(&pod)?;
    container.process().wait_for("ready services", START)?;

    let capabilities = pod.capabilities()?;
    let bits = BITS.iter().filter(|(name, _)| capabilities.iter().any(|one| one == name));
    let expected = format!("{:016x}", bits.fold(0_u64, |set, (_, bit)| set | 1 << bit));
    for set in ["CapBnd", "CapPrm", "CapEff"] {
        ensure!(container.status(set)? == expected, "{set} is {}, not {capabilities:?}", container.status(set)?);
    }
    ensure!(container.status("NoNewPrivs")? == "1" && container.status("Seccomp")? == "2", "it may gain rights");

    let spec = pod.container()?;
    eventually(Duration::from_secs(10), || probe(&installation, spec.readiness_probe.as_ref()))?;
    probe(&installation, spec.liveness_probe.as_ref())?;

    // A pod, the client outside, and a process of the node.
    let cluster = &installation.cluster;
    let node = &cluster.nodes[0];
    for (from, target) in [
        (&node.pods[0].namespace, client::at(WEB, 80)),
        (&cluster.client, client::at(node.address, NODE_PORT)),
        (&cluster.client, client::at(WEB, 80)),
    ] {
        let answers = client::who_many(Some(from), target, 200, 2);
        answers.all_answered().with_context(|| format!("{} asks {target}", from.name()))?;
        ensure!(answers.by_backend.len() == 2, "{:?}", answers.by_backend);
    }
    let mut asking = node.namespace.command(built("probe")?);
    asking.args(["tcp", &client::at(WEB, 80).to_string(), "50"]);
    installation.cgroup.adopt(&mut asking);
    let answers: client::Answers =
        serde_json::from_str(&Process::start("probe", &mut asking)?.finish(Duration::from_secs(20))?)?;
    answers.all_answered().context("the node asks")?;

    let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, 10_249));
    let text = node.namespace.run(|| http::get(metrics, "/metrics"))?.body;
    for metric in metrics_of_the_dashboard()? {
        let is_there = text
            .lines()
            .any(|line| line.starts_with(&format!("{metric}{{")) || line.starts_with(&format!("{metric} ")));
        ensure!(is_there, "the dashboard asks for {metric}, which is not exported:\n{text}");
    }
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/docs/metrics.md"))?;
    for metric in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
        ensure!(page.contains(&format!("\n| `{metric}` |")), "deploy/docs/metrics.md says nothing of {metric}");
    }
    Ok(())
}

/// The manifest would give away rights for nothing.
#[test]
fn without_any_one_of_its_capabilities_it_does_not_start() -> Result<()> {
    let installation = Installation::prepare()?;
    let pod = installation.pod()?;
    let capabilities = pod.capabilities()?;
    ensure!(!capabilities.is_empty(), "no capabilities at all");
    for capability in capabilities {
        let mut pod = pod.clone().without(&capability);
        // Would be the first to complain, and of something else.
        pod.set("SHEAVE_BYPASS_NETFILTER", "false");
        let mut container = installation.start(&pod)?;
        let ready = container.process().wait_for("ready services", START);
        let error = ready.err().with_context(|| format!("it starts without {capability}"))?.to_string();
        ensure!(error.contains("ended"), "without {capability}: {error}");
        // Without PERFMON it is the verifier that complains, of a pointer.
        let complaints = ["CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", "cannot load program"];
        ensure!(complaints.iter().any(|complaint| error.contains(complaint)), "without {capability}: {error}");
    }
    Ok(())
}
